//! Elementwise sums: `y = a + b`, with ReLU on the way out where fused.

use super::{Case, Cost, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::ops::act::{Act, ActBwd};
use crate::{Result, ensure, op_common};

/// `y = a + b`, then ReLU where `relu`. Any shape; both operands the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Add {
    /// ReLU follows.
    pub relu: bool,
}

impl Add {
    /// A sum.
    pub fn new(relu: bool) -> Self {
        Add { relu }
    }
}

impl Op for Add {
    op_common!("add");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "takes two operands");
        ensure!(
            x[0] == x[1],
            "adds {:?} to {:?}: the shapes differ",
            x[1].shape,
            x[0].shape
        );
        Ok(vec![x[0].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let mut dy = b.need(node.outputs[0])?;
        if self.relu {
            dy = b.emit1(ActBwd { act: Act::Relu }, &[dy, node.outputs[0]])?;
        }
        b.give(node.inputs[0], dy)?;
        b.give(node.inputs[1], dy)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for (i, v) in y[0].data.iter_mut().enumerate() {
            *v = x[0].data[i] + x[1].data[i];
            if self.relu {
                *v = Act::Relu.value(*v);
            }
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let relu = self.relu;
        Ok(Box::new(move |a| {
            if relu {
                par::map2(a.x(0), a.x(1), a.y(0), |a, b| Act::Relu.value_f32(a + b));
            } else {
                par::map2(a.x(0), a.x(1), a.y(0), |a, b| a + b);
            }
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let n = cx.y[0].len();
        let args = [Arg::In(0), Arg::In(1), Arg::Out(0)];
        let f = u32::from(self.relu);
        cx.map("elementwise.wgsl", "add", n, &args, &[f])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let act = if self.relu { Act::Relu.code() } else { 0 };
        let args = [Arg::In(0), Arg::In(1), Arg::Out(0)];
        let consts = vec![("ACT", act.to_string())];
        cx.map(("elementwise.cu", "add"), consts, cx.y[0].len(), &args)
    }
}

/// `y = scale * (a + b)`, both operands of one shape: the mean of two classifiers (DeiT's at inference).
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ScaledSum {
    /// Factor on the sum.
    pub scale: f32,
}

impl Op for ScaledSum {
    op_common!("scaled_sum");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(self.scale.is_finite(), "has the factor {}", self.scale);
        Add::new(false).infer(x)
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let half = ScaledSum {
            scale: self.scale / 2.0,
        };
        let d = b.emit1(half, &[dy, dy])?;
        b.give(node.inputs[0], d)?;
        b.give(node.inputs[1], d)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for (i, v) in y[0].data.iter_mut().enumerate() {
            *v = f64::from(self.scale) * (x[0].data[i] + x[1].data[i]);
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let scale = self.scale;
        Ok(Box::new(move |a| {
            par::map2(a.x(0), a.x(1), a.y(0), |a, b| scale * (a + b));
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let n = cx.y[0].len();
        let args = [Arg::In(0), Arg::In(1), Arg::Out(0)];
        let params = [0, self.scale.to_bits()];
        cx.map("elementwise.wgsl", "scaled_sum", n, &args, &params)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let args = [Arg::F32(self.scale), Arg::In(0), Arg::In(1), Arg::Out(0)];
        let n = cx.y[0].len();
        cx.map(("elementwise.cu", "scaled_sum"), vec![], n, &args)
    }
}

impl Graph {
    /// `(a + b) / 2`.
    ///
    /// # Errors
    /// The shapes differ.
    pub fn mean_of_two(&mut self, a: Tid, b: Tid) -> Result<Tid> {
        self.push1(ScaledSum { scale: 0.5 }, &[a, b])
    }

    /// `a + b`.
    ///
    /// # Errors
    /// The shapes differ.
    pub fn add(&mut self, a: Tid, b: Tid) -> Result<Tid> {
        self.push1(Add::new(false), &[a, b])
    }
}

/// The room of [`Add`].
pub const ADD: Room = Room {
    name: "add",
    about: "y = a + b, with ReLU where fused",
    case: |p| {
        let shape = [p.get("n", 2)?, p.get("c", 8)?];
        Ok(Case::new(Add {
            relu: p.flag("relu")?,
        })
        .x(&shape)
        .x(&shape))
    },
    cases: &[
        "n=1,c=1",
        "n=3,c=5,relu=1",
        "n=7,c=1031",
        "n=64,c=4097,relu=1",
    ],
    bench: &["n=128,c=16384"],
    refused: &[],
};

/// The room of [`ScaledSum`].
pub const SCALED_SUM: Room = Room {
    name: "scaled_sum",
    about: "y = scale * (a + b)",
    case: |p| {
        let shape = [p.get("n", 2)?, p.get("c", 8)?];
        Ok(Case::new(ScaledSum {
            scale: p.get("scale", 0.5)?,
        })
        .x(&shape)
        .x(&shape))
    },
    cases: &["n=1,c=1", "n=3,c=7,scale=-2", "n=8,c=1000"],
    bench: &["n=256,c=1000"],
    refused: &["scale=inf"],
};
