//! A map made larger by zeros at the bottom and at the right, or cut off there: what window attention wants of maps
//! that are not a whole number of windows.

use super::{Case, Cost, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, op_common};

/// `y[n, i, j] = x[n, i, j]` inside x, 0 outside. Operand: x `[N, H, W, C]`. Result: y `[N, h, w, C]`. Its gradient is
/// the same with the sizes exchanged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pad2d {
    /// Rows of the result.
    pub h: usize,
    /// Columns of the result.
    pub w: usize,
}

impl Op for Pad2d {
    op_common!("pad2d");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        let &[n, _, _, c] = &x[0].shape[..] else {
            return Err(format!("takes [N, H, W, C], got {:?}", x[0].shape));
        };
        ensure!(self.h * self.w > 0, "makes a map of {}x{}", self.h, self.w);
        Ok(vec![Spec::f32([n, self.h, self.w, c])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: 0,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let shape = b.graph.shape(node.inputs[0]);
        let op = Pad2d {
            h: shape[1],
            w: shape[2],
        };
        let dx = b.emit1(op, &[dy])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (h, w) = (x[0].shape[1], x[0].shape[2]);
        for r in 0..y[0].rows() {
            let (n, i, j) = (r / self.w / self.h, r / self.w % self.h, r % self.w);
            if i < h && j < w {
                y[0].row_mut(r)
                    .copy_from_slice(x[0].row((n * h + i) * w + j));
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (h, w, c) = (cx.x[0].shape[1], cx.x[0].shape[2], cx.x[0].shape[3]);
        let Pad2d { h: oh, w: ow } = *self;
        let copied = w.min(ow) * c;
        Ok(Box::new(move |a| {
            let x = a.x(0);
            par::rows(a.y(0), ow * c, |first, y| {
                for (r, y) in y.chunks_exact_mut(ow * c).enumerate() {
                    let (n, i) = ((first + r) / oh, (first + r) % oh);
                    let inside = if i < h { copied } else { 0 };
                    let (y, zeros) = y.split_at_mut(inside);
                    y.copy_from_slice(&x[(n * h + i.min(h - 1)) * w * c..][..inside]);
                    zeros.fill(0.0);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let &[n, h, w, c] = &cx.x[0].shape[..] else {
            unreachable!("the shape rule was checked")
        };
        let (from, to) = (h * w * c, self.h * self.w * c);
        let params = [h, w, self.h, self.w, c].map(|v| v as u32);
        for cut in cx.cuts(n, &[from, to])? {
            let args = [cut.of(Arg::In(0), from), cut.of(Arg::Out(0), to)];
            cx.items(("pad2d.wgsl", "pad"), &[], cut.rows * to, &args, &params)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let &[n, h, w, c] = &cx.x[0].shape[..] else {
            unreachable!("the shape rule was checked")
        };
        let vec = cuda::vector(&[c]);
        let items = n * self.h * self.w * c / vec;
        let mut args = [h, w, self.h, self.w, c / vec].map(Arg::n).to_vec();
        args.extend([Arg::In(0), Arg::Out(0)]);
        let consts = vec![("VEC", vec.to_string())];
        cx.items(("pad2d.cu", "pad2d"), consts, items, 256, &args)
    }
}

impl Graph {
    /// `[N, H, W, C]` to `[N, h, w, C]`: zeros put at the bottom and at the right, or what lies there cut off. The same
    /// tensor where the sizes are the same.
    ///
    /// # Errors
    /// `x` is not a map.
    pub fn pad2d(&mut self, x: Tid, h: usize, w: usize) -> Result<Tid> {
        match self.shape(x) {
            &[_, from_h, from_w, _] if (from_h, from_w) == (h, w) => Ok(x),
            _ => self.push1(Pad2d { h, w }, &[x]),
        }
    }
}

/// The room of [`Pad2d`].
pub const ROOM: Room = Room {
    name: "pad2d",
    about: "zeros at the bottom and at the right of a map, or those cut off",
    case: |p| {
        let shape = [
            p.get("n", 2)?,
            p.get("h", 4)?,
            p.get("w", 4)?,
            p.get("c", 4)?,
        ];
        Ok(Case::new(Pad2d {
            h: p.get("oh", 6)?,
            w: p.get("ow", 6)?,
        })
        .x(&shape))
    },
    cases: &[
        "n=1,h=1,w=1,c=1,oh=2,ow=3",
        "n=2,h=4,w=5,c=3,oh=7,ow=7",
        "n=2,h=7,w=7,c=3,oh=4,ow=5",
        "n=3,h=4,w=9,c=5,oh=8,ow=2",
        "n=2,h=25,w=25,c=96,oh=28,ow=28",
    ],
    bench: &["n=8,h=64,w=64,c=96,oh=70,ow=70"],
    refused: &["oh=0"],
};
