//! Batch norm with running statistics: a per-channel affine map.

use super::cpu::{self, Cut, Grads, Norm};
use super::{RefBwd, check_vectors, cuda, finish, infer_bwd, mask_of, operands, same_shape, wgpu};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::{Arg as CudaArg, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::Spec;
use crate::graph::autodiff::{Backward, Fwd};
use crate::ops::{Case, Cost, Host, Op, Room, traffic};
use crate::{Result, ensure, op_common};

/// `y = (x - running_mean) / sqrt(running_var + eps) * gamma + beta [+ residual]`, then ReLU where `relu`.
///
/// Operands: x `[.., C]`, gamma, beta, running_mean, running_var (all `[C]`), and the residual `[.., C]` where so.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BatchNormEval {
    /// Added to the variance.
    pub eps: f32,
    /// ReLU follows.
    pub relu: bool,
    /// A residual is added before the ReLU.
    pub residual: bool,
}

fn rstd(var: f32, eps: f32) -> f32 {
    (1.0 / (f64::from(var) + f64::from(eps)).sqrt()) as f32
}

impl Op for BatchNormEval {
    op_common!("batch_norm_eval");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let n = 5 + usize::from(self.residual);
        ensure!(x.len() == n, "takes {n} operands");
        check_vectors(x, 1..5)?;
        if self.residual {
            same_shape("a residual", &x[0], &x[5])?;
        }
        Ok(vec![x[0].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let per = 3 + u64::from(self.residual) + u64::from(self.relu);
        Cost {
            flops: per * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let (x, y) = (node.inputs[0], node.outputs[0]);
        let dy = b.need(y)?;
        let wanted = self.residual && b.wants(node.inputs[5]);
        let op = BatchNormEvalBwd {
            eps: self.eps,
            relu: self.relu,
            residual: self.residual,
            dresidual: wanted && self.relu,
        };
        let mut operands = vec![dy, x, node.inputs[3], node.inputs[4], node.inputs[1]];
        if self.relu {
            operands.push(if self.residual { y } else { node.inputs[2] });
        }
        let d = b.emit(op, &operands)?;
        b.give(x, d[0])?;
        b.give(node.inputs[1], d[1])?;
        b.give(node.inputs[2], d[2])?;
        if wanted {
            b.give(node.inputs[5], if self.relu { d[3] } else { dy })?;
        }
        Ok(())
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for r in 0..x[0].rows() {
            for c in 0..x[0].channels() {
                let rstd = 1.0 / (x[4].data[c] + f64::from(self.eps)).sqrt();
                let v = (x[0].row(r)[c] - x[3].data[c]) * rstd * x[1].data[c] + x[2].data[c];
                let residual = self.residual.then(|| x[5].row(r)[c]);
                y[0].row_mut(r)[c] = finish(v, residual, self.relu);
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let c = cx.x[0].channels();
        let cut = Cut::new(cx.x[0].rows(), c);
        cx.workspace(c + cut.lane_scratch());
        Ok(Box::new(move |a| {
            let (r, scratch) = a.work().split_at_mut(c);
            for (r, &var) in r.iter_mut().zip(a.x(4)) {
                *r = rstd(var, op.eps);
            }
            let norm = Norm {
                mean: a.x(3),
                rstd: r,
                gamma: a.x(1),
                beta: a.x(2),
                batch: false,
            };
            let add = a.x_if(op.residual, 5);
            cpu::normalize(&cut, a.x(0), norm, add, op.relu, a.y(0), scratch);
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let columns = wgpu::Columns::new(cx.x[0].rows(), cx.x[0].channels(), false, self.eps);
        let vectors = [Arg::In(3), Arg::In(4), Arg::In(1), Arg::In(2)];
        let coef = columns.prepare(cx, vectors, wgpu::VARIANCE + wgpu::BETA)?;
        let residual = self.residual.then_some(Arg::In(5));
        columns.normalize(cx, coef, residual, self.relu)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let fused = cuda::Fused {
            relu: self.relu,
            residual: self.residual,
            dresidual: false,
            variance: Some(self.eps),
        };
        cuda::normalize(cx, [CudaArg::In(3), CudaArg::In(4)], fused)
    }
}

/// Gradients of [`BatchNormEval`].
///
/// Operands: dy, x `[.., C]`, running_mean, running_var, gamma `[C]`; with `relu` also y `[.., C]` where a residual was
/// added, else beta `[C]`. Results: dx `[.., C]`, dgamma `[C]`, dbeta `[C]`, and with `dresidual` the masked dy.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BatchNormEvalBwd {
    /// Added to the variance.
    pub eps: f32,
    /// A ReLU followed.
    pub relu: bool,
    /// A residual was added.
    pub residual: bool,
    /// The gradient of the residual is a result (with `relu`; without, it is dy itself).
    pub dresidual: bool,
}

impl Op for BatchNormEvalBwd {
    op_common!("batch_norm_eval_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        infer_bwd(x, 3, self.relu, self.residual, self.dresidual)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: (5 + u64::from(self.relu)) * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let eps = f64::from(self.eps);
        RefBwd {
            mean: &x[2].data,
            rstd: x[3].data.iter().map(|v| 1.0 / (v + eps).sqrt()).collect(),
            gamma: &x[4].data,
            mask: self.relu.then(|| x[5]),
            residual: self.residual,
            batch: false,
        }
        .run(x[0], x[1], y);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let c = cx.x[0].channels();
        let cut = Cut::new(cx.x[0].rows(), c);
        cx.workspace(c + cut.sums_scratch() + cut.lane_scratch());
        Ok(Box::new(move |a| {
            let (r, scratch) = a.work().split_at_mut(c);
            for (r, &var) in r.iter_mut().zip(a.x(3)) {
                *r = rstd(var, op.eps);
            }
            let (mask, beta) = mask_of(op.relu, op.residual, a, 5);
            let norm = Norm {
                mean: a.x(2),
                rstd: r,
                gamma: a.x(4),
                beta,
                batch: false,
            };
            let out = Grads {
                dx: a.y(0),
                dgamma: a.y(1),
                dbeta: a.y(2),
                dadd: op.dresidual.then(|| a.y(3)),
            };
            cpu::backward(&cut, a.x(0), a.x(1), norm, mask, out, scratch);
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let columns = wgpu::Columns::new(cx.x[1].rows(), cx.x[1].channels(), false, self.eps);
        let fused = (self.relu, self.residual, self.dresidual);
        columns.backward(cx, fused, wgpu::VARIANCE)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let fused = cuda::Fused {
            relu: self.relu,
            residual: self.residual,
            dresidual: self.dresidual,
            variance: Some(self.eps),
        };
        cuda::backward(cx, fused)
    }
}

/// The room of [`BatchNormEval`].
pub const ROOM: Room = Room {
    name: "batch_norm_eval",
    about: "batch norm with running statistics; residual and ReLU where fused",
    case: |p| {
        let shape = [
            p.get("n", 2)?,
            p.get("h", 4)?,
            p.get("w", 4)?,
            p.get("c", 8)?,
        ];
        let (relu, residual) = (p.flag("relu")?, p.flag("residual")?);
        let case = Case::new(BatchNormEval {
            eps: p.get("eps", 1e-5)?,
            relu,
            residual,
        });
        let mut case = operands(case.x(&shape), &shape, residual);
        // Steps shorter than the distance of any value to the kink.
        case.step = if relu { 1e-7 } else { 1e-5 };
        Ok(case)
    },
    cases: &[
        "n=1,h=1,w=1,c=1",
        "n=1,h=3,w=5,c=3,relu=1",
        "n=3,h=5,w=1,c=5,relu=1,residual=1",
        "n=2,h=7,w=7,c=17,residual=1,eps=1e-3",
        "n=8,h=16,w=16,c=16,relu=1",
        "n=2,h=4,w=4,c=2048",
    ],
    bench: &["n=16,h=56,w=56,c=64,relu=1"],
    refused: &[],
};
