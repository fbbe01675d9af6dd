//! Plain operations on a slab of gradients, in place.

use super::{chunks, item};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::Spec;
use crate::ops::{Case, Host, Op, Room};
use crate::{Result, ensure, op_common};

/// `acc += g`. Operands: acc, g. Result: acc, updated in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Accumulate;

impl Op for Accumulate {
    op_common!("accumulate");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "takes two operands");
        ensure!(
            x[0].len() == x[1].len(),
            "adds {:?} to {:?}: the lengths differ",
            x[1].shape,
            x[0].shape
        );
        Ok(vec![x[0].clone()])
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for (y, v) in y[0].data.iter_mut().zip(&x[1].data) {
            *y += v;
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        Ok(Box::new(|a| {
            let g = a.x(1);
            chunks([a.y(0)], |at, [y]| {
                for (y, v) in y.iter_mut().zip(&g[at..]) {
                    *y += v;
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let n = cx.x[0].len();
        let (width, consts) = item(n);
        for cut in cx.cuts(n, &[1])? {
            let args = [cut.of(Arg::Out(0), 1), cut.of(Arg::In(1), 1)];
            let n = cut.rows / width;
            cx.items(("optim.wgsl", "accumulate"), &consts, n, &args, &[])?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let args = [Arg::Out(0), Arg::In(1)];
        cx.map(("optim.cu", "accumulate"), vec![], cx.x[0].len(), &args)
    }
}

/// `x = 0`. Operand: x. Result: x, updated in place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill0;

impl Op for Fill0 {
    op_common!("fill0");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        Ok(vec![x[0].clone()])
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn reference(&self, _x: &[&Host], y: &mut [Host]) {
        y[0].data.fill(0.0);
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        Ok(Box::new(|a| chunks([a.y(0)], |_, [y]| y.fill(0.0))))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        for cut in cx.cuts(cx.x[0].len(), &[1])? {
            let y = cut.of(Arg::Out(0), 1);
            cx.items(("fill.wgsl", "fill"), &[], cut.rows, &[y], &[0])?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let n = cx.x[0].len();
        cx.map(("optim.cu", "fill0"), vec![], n, &[cuda::Arg::Out(0)])
    }
}

/// The room of [`Accumulate`].
pub const ACCUMULATE: Room = Room {
    name: "accumulate",
    about: "acc += g in place",
    case: |p| {
        let n = [p.get("n", 100)?];
        Ok(Case::new(Accumulate).x(&n).x(&n).forward_only())
    },
    cases: &["n=1", "n=1031", "n=100003"],
    bench: &["n=11000000"],
    refused: &[],
};

/// The room of [`Fill0`].
pub const FILL0: Room = Room {
    name: "fill0",
    about: "x = 0 in place",
    case: |p| Ok(Case::new(Fill0).x(&[p.get("n", 4)?]).forward_only()),
    cases: &["n=1", "n=4"],
    bench: &["n=11000000"],
    refused: &[],
};
