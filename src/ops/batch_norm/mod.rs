//! Batch norm (Ioffe & Szegedy 2015) over the rows of `x` seen as `[rows, C]`: with the batch's statistics (training),
//! with running statistics ([`eval`]), and folded into a convolution ([`fold`]). ReLU and a residual addend ride along
//! where fused.

mod cpu;
mod cuda;
pub mod eval;
pub mod fold;
mod wgpu;

use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::{Arg as CudaArg, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Init, Layout, Spec, Tid};
use crate::{Result, ensure, op_common};
use cpu::{Cut, Grads, Mask, Norm};
pub use eval::{BatchNormEval, BatchNormEvalBwd};
pub use fold::FoldBatchNorm;

/// PyTorch's momentum: the weight of the new batch in the running statistics.
pub const MOMENTUM: f32 = 0.1;

/// `y = (x - mean) * rstd * gamma + beta [+ residual]`, then ReLU where `relu`, with the statistics of the batch.
///
/// Operands: x `[.., C]`, gamma, beta, running_mean, running_var (all `[C]`), and the residual `[.., C]` where so.
/// Results: y `[.., C]`, mean `[C]`, rstd `[C]` (1 / sqrt(biased variance + eps)), and running_mean, running_var
/// updated in place as PyTorch does: `(1 - momentum) * running + momentum * new`, the variance unbiased.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct BatchNormTrain {
    /// Added to the variance.
    pub eps: f32,
    /// Weight of the new batch in the running statistics.
    pub momentum: f32,
    /// ReLU follows.
    pub relu: bool,
    /// A residual is added before the ReLU.
    pub residual: bool,
}

fn check_vectors(x: &[Spec], at: std::ops::Range<usize>) -> Result<(), String> {
    let c = x[0].channels();
    for i in at {
        ensure!(
            x[i].shape == [c],
            "normalises {c} channels, operand {i} has shape {:?}",
            x[i].shape
        );
    }
    Ok(())
}

fn same_shape(what: &str, x: &Spec, other: &Spec) -> Result<(), String> {
    ensure!(
        x == other,
        "has {what} of shape {:?} for {:?}",
        other.shape,
        x.shape
    );
    Ok(())
}

/// Applies the residual and the ReLU to one value.
fn finish(v: f64, residual: Option<f64>, relu: bool) -> f64 {
    let v = v + residual.unwrap_or(0.0);
    if relu && v < 0.0 { 0.0 } else { v }
}

impl Op for BatchNormTrain {
    op_common!("batch_norm");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let n = 5 + usize::from(self.residual);
        ensure!(x.len() == n, "takes {n} operands");
        check_vectors(x, 1..5)?;
        if self.residual {
            same_shape("a residual", &x[0], &x[5])?;
        }
        ensure!(
            x[0].rows() > 1,
            "needs more than one value per channel when training, got {:?}",
            x[0].shape
        );
        let c = Spec::f32([x[0].channels()]);
        Ok(vec![x[0].clone(), c.clone(), c.clone(), c.clone(), c])
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(3, 3), (4, 4)]
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let per = 7 + u64::from(self.residual) + u64::from(self.relu);
        Cost {
            flops: per * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let (x, y) = (node.inputs[0], node.outputs[0]);
        let dy = b.need(y)?;
        let wanted = self.residual && b.wants(node.inputs[5]);
        let op = BatchNormTrainBwd {
            relu: self.relu,
            residual: self.residual,
            dresidual: wanted && self.relu,
        };
        let mut operands = vec![dy, x, node.outputs[1], node.outputs[2], node.inputs[1]];
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
        let (rows, n) = (x[0].rows(), x[0].rows() as f64);
        for c in 0..x[0].channels() {
            let mean = (0..rows).map(|r| x[0].row(r)[c]).sum::<f64>() / n;
            let m2: f64 = (0..rows).map(|r| (x[0].row(r)[c] - mean).powi(2)).sum();
            let rstd = 1.0 / (m2 / n + f64::from(self.eps)).sqrt();
            for r in 0..rows {
                let v = (x[0].row(r)[c] - mean) * rstd * x[1].data[c] + x[2].data[c];
                let residual = self.residual.then(|| x[5].row(r)[c]);
                y[0].row_mut(r)[c] = finish(v, residual, self.relu);
            }
            y[1].data[c] = mean;
            y[2].data[c] = rstd;
            let m = f64::from(self.momentum);
            y[3].data[c] += m * (mean - y[3].data[c]);
            y[4].data[c] += m * (m2 / (n - 1.0) - y[4].data[c]);
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let (rows, channels) = (cx.x[0].rows(), cx.x[0].channels());
        let cut = Cut::new(rows, channels);
        cx.workspace(cut.statistics_scratch().max(cut.lane_scratch()));
        Ok(Box::new(move |a| {
            let (mean, rstd) = (a.y(1), a.y(2));
            let (running_mean, running_var) = (a.y(3), a.y(4));
            let unbiased = rows as f64 / (rows as f64 - 1.0);
            let m = f64::from(op.momentum);
            cpu::statistics(&cut, a.x(0), a.work(), |c, mu, var| {
                mean[c] = mu as f32;
                rstd[c] = (1.0 / (var + f64::from(op.eps)).sqrt()) as f32;
                let blend =
                    |old: f32, new: f64| (f64::from(old) + m * (new - f64::from(old))) as f32;
                running_mean[c] = blend(running_mean[c], mu);
                running_var[c] = blend(running_var[c], var * unbiased);
            });
            let norm = Norm {
                mean,
                rstd,
                gamma: a.x(1),
                beta: a.x(2),
                batch: true,
            };
            let add = a.x_if(op.residual, 5);
            cpu::normalize(&cut, a.x(0), norm, add, op.relu, a.y(0), a.work());
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let columns = wgpu::Columns::new(cx.x[0].rows(), cx.x[0].channels(), true, self.eps);
        let results = [Arg::Out(1), Arg::Out(2), Arg::Out(3), Arg::Out(4)];
        columns.statistics(cx, Arg::In(0), results, self.momentum)?;
        let vectors = [Arg::Out(1), Arg::Out(2), Arg::In(1), Arg::In(2)];
        let coef = columns.prepare(cx, vectors, wgpu::BETA)?;
        let residual = self.residual.then_some(Arg::In(5));
        columns.normalize(cx, coef, residual, self.relu)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        cuda::statistics(cx, self.eps, self.momentum)?;
        let fused = cuda::Fused {
            relu: self.relu,
            residual: self.residual,
            ..Default::default()
        };
        cuda::normalize(cx, [CudaArg::Out(1), CudaArg::Out(2)], fused)
    }
}

/// Gradients of [`BatchNormTrain`].
///
/// Operands: dy, x `[.., C]`, mean, rstd, gamma `[C]`; with `relu` also what tells where it passed: the forward result
/// y `[.., C]` where a residual was added, else beta `[C]` (the sign is then recomputed from x, which saves reading y).
/// Results: dx `[.., C]`, dgamma `[C]`, dbeta `[C]`, and with `dresidual` the masked dy `[.., C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchNormTrainBwd {
    /// A ReLU followed.
    pub relu: bool,
    /// A residual was added.
    pub residual: bool,
    /// The gradient of the residual is a result (with `relu`; without, it is dy itself).
    pub dresidual: bool,
}

/// The shape rule of both backward ops: `vectors` operands of `[C]` after dy and x, then the ReLU's.
fn infer_bwd(
    x: &[Spec],
    vectors: usize,
    relu: bool,
    residual: bool,
    dresidual: bool,
) -> Result<Vec<Spec>, String> {
    let n = 2 + vectors + usize::from(relu);
    ensure!(x.len() == n, "takes {n} operands");
    ensure!(
        !dresidual || (relu && residual),
        "gives a residual's gradient only where there are a residual and a ReLU"
    );
    same_shape("a gradient", &x[1], &x[0])?;
    check_vectors(x, 2..2 + vectors)?;
    match (relu, residual) {
        (true, true) => same_shape("a forward result", &x[1], &x[n - 1])?,
        (true, false) => check_vectors(x, n - 1..n)?,
        _ => {}
    }
    let c = Spec::f32([x[0].channels()]);
    let mut y = vec![x[0].clone(), c.clone(), c];
    if dresidual {
        y.push(x[0].clone());
    }
    Ok(y)
}

/// The reference of both backward ops.
struct RefBwd<'a> {
    mean: &'a [f64],
    rstd: Vec<f64>,
    gamma: &'a [f64],
    /// `[.., C]` of the forward result, or `[C]` of beta.
    mask: Option<&'a Host>,
    residual: bool,
    batch: bool,
}

impl RefBwd<'_> {
    fn run(&self, dy: &Host, x: &Host, y: &mut [Host]) {
        let rows = x.rows();
        for c in 0..x.channels() {
            let (g, rstd) = (self.gamma[c], self.rstd[c]);
            let xhat = |r: usize| (x.row(r)[c] - self.mean[c]) * rstd;
            let d = |r: usize| {
                let pass = match self.mask {
                    None => true,
                    Some(y) if self.residual => y.row(r)[c] > 0.0,
                    Some(beta) => xhat(r) * g + beta.data[c] > 0.0,
                };
                if pass { dy.row(r)[c] } else { 0.0 }
            };
            let dbeta: f64 = (0..rows).map(d).sum();
            let dgamma: f64 = (0..rows).map(|r| d(r) * xhat(r)).sum();
            let n = if self.batch {
                rows as f64
            } else {
                f64::INFINITY
            };
            for r in 0..rows {
                y[0].row_mut(r)[c] = (d(r) - dbeta / n - xhat(r) * dgamma / n) * rstd * g;
                if let Some(dres) = y.get_mut(3) {
                    dres.row_mut(r)[c] = d(r);
                }
            }
            y[1].data[c] = dgamma;
            y[2].data[c] = dbeta;
        }
    }
}

/// Which mask a backward op has, and its operand `i`.
fn mask_of<'a>(
    relu: bool,
    residual: bool,
    a: &crate::backend::cpu::Args<'a>,
    i: usize,
) -> (Mask<'a>, &'a [f32]) {
    match (relu, residual) {
        (false, _) => (Mask::None, &[]),
        (true, false) => (Mask::Recompute, a.x(i)),
        (true, true) => (Mask::Result(a.x(i)), &[]),
    }
}

impl Op for BatchNormTrainBwd {
    op_common!("batch_norm_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        infer_bwd(x, 3, self.relu, self.residual, self.dresidual)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: (10 + u64::from(self.relu)) * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        RefBwd {
            mean: &x[2].data,
            rstd: x[3].data.clone(),
            gamma: &x[4].data,
            mask: self.relu.then(|| x[5]),
            residual: self.residual,
            batch: true,
        }
        .run(x[0], x[1], y);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let cut = Cut::new(cx.x[0].rows(), cx.x[0].channels());
        cx.workspace(cut.sums_scratch() + cut.lane_scratch());
        Ok(Box::new(move |a| {
            let (mask, beta) = mask_of(op.relu, op.residual, a, 5);
            let norm = Norm {
                mean: a.x(2),
                rstd: a.x(3),
                gamma: a.x(4),
                beta,
                batch: true,
            };
            let out = Grads {
                dx: a.y(0),
                dgamma: a.y(1),
                dbeta: a.y(2),
                dadd: op.dresidual.then(|| a.y(3)),
            };
            cpu::backward(&cut, a.x(0), a.x(1), norm, mask, out, a.work());
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let columns = wgpu::Columns::new(cx.x[1].rows(), cx.x[1].channels(), true, 0.0);
        columns.backward(cx, (self.relu, self.residual, self.dresidual), 0)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let fused = cuda::Fused {
            relu: self.relu,
            residual: self.residual,
            dresidual: self.dresidual,
            variance: None,
        };
        cuda::backward(cx, fused)
    }
}

impl Graph {
    /// Batch norm over the last axis of `x`, with its parameters `name.weight`, `name.bias` and buffers
    /// `name.running_mean`, `name.running_var` under the current scope; statistics as [`Graph::mode`] says.
    ///
    /// # Errors
    /// With the batch's statistics, `x` has only one value per channel.
    pub fn batch_norm(&mut self, x: Tid, name: &str, eps: f32) -> Result<Tid> {
        self.scoped(name, |g| {
            let c = [g.spec(x).channels()];
            let gamma = g.param("weight", &c, Layout::Plain, Init::Ones, false);
            let beta = g.param("bias", &c, Layout::Plain, Init::Zeros, false);
            let mean = g.buffer("running_mean", &c, Init::Zeros);
            let var = g.buffer("running_var", &c, Init::Ones);
            let operands = [x, gamma, beta, mean, var];
            let (relu, residual) = (false, false);
            if g.mode.batch_stats {
                let momentum = MOMENTUM;
                g.push1(
                    BatchNormTrain {
                        eps,
                        momentum,
                        relu,
                        residual,
                    },
                    &operands,
                )
            } else {
                g.push1(
                    BatchNormEval {
                        eps,
                        relu,
                        residual,
                    },
                    &operands,
                )
            }
        })
    }
}

/// The operands of a case after x: gamma, beta, mean, var, and the residual where so.
fn operands(case: Case, shape: &[usize], residual: bool) -> Case {
    let c = *shape.last().expect("shapes of cases are not empty");
    let case = case
        .operand(Spec::f32([c]), Fill::Uniform(0.5, 1.5), true)
        .x(&[c])
        .fixed(Spec::f32([c]), Fill::Normal(0.5))
        .fixed(Spec::f32([c]), Fill::Uniform(0.5, 2.0));
    case.x_if(residual, shape)
}

/// The room of [`BatchNormTrain`].
pub const ROOM: Room = Room {
    name: "batch_norm",
    about: "batch norm with the batch's statistics, running statistics updated; residual and ReLU where fused",
    case: |p| {
        let shape = [
            p.get("n", 2)?,
            p.get("h", 4)?,
            p.get("w", 4)?,
            p.get("c", 8)?,
        ];
        let (relu, residual) = (p.flag("relu")?, p.flag("residual")?);
        let case = Case::new(BatchNormTrain {
            eps: p.get("eps", 1e-5)?,
            momentum: p.get("momentum", MOMENTUM)?,
            relu,
            residual,
        });
        let mut case = operands(case.x(&shape), &shape, residual);
        // Steps shorter than the distance of any value to the kink.
        case.step = if relu { 1e-7 } else { 1e-5 };
        Ok(case)
    },
    cases: &[
        "n=2,h=1,w=1,c=1,eps=1",
        "n=1,h=3,w=5,c=1,relu=1",
        "n=1,h=2,w=3,c=3,residual=1",
        "n=3,h=5,w=1,c=5,relu=1,residual=1",
        "n=1,h=7,w=7,c=17,relu=1",
        "n=2,h=3,w=3,c=127,eps=1e-3,momentum=0.3",
        "n=3,h=1,w=1,c=2048,relu=1,residual=1",
        "n=5,h=17,w=13,c=16,relu=1",
        "n=8,h=32,w=32,c=16,relu=1,residual=1",
        "n=8,h=16,w=16,c=32,relu=1",
        "n=2,h=28,w=28,c=64",
        "n=2,h=5,w=5,c=512,relu=1",
    ],
    bench: &[
        "n=128,h=32,w=32,c=16,relu=1",
        "n=128,h=16,w=16,c=32,relu=1",
        "n=16,h=112,w=112,c=64,relu=1",
        "n=16,h=56,w=56,c=256,relu=1,residual=1",
    ],
    refused: &["n=1,h=1,w=1,c=8"],
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_keep_their_digits_far_from_zero() {
        // Mean 4096, deviation 1: E[x^2] - E[x]^2 in float32 would have lost every digit of the variance.
        let x: Vec<f32> = (0..3 * 40_001)
            .map(|i| 4096.0 + if (i / 3) % 2 == 0 { 1.0 } else { -1.0 })
            .collect();
        let cut = Cut::new(40_001, 3);
        let mut scratch = vec![0.0; cut.statistics_scratch()];
        cpu::statistics(&cut, &x, &mut scratch, |c, mean, var| {
            assert!((mean - 4096.0 - 1.0 / 40_001.0).abs() < 1e-9, "{c}: {mean}");
            assert!((var - 1.0).abs() < 1e-8, "{c}: {var}");
        });
    }

    #[test]
    fn cuts_cover_every_element_with_whole_vectors() {
        for channels in [1, 3, 5, 16, 17, 48, 64, 127, 128, 130, 2048, 100_000] {
            for rows in [1, 2, 100, 9999] {
                let cut = Cut::new(rows, channels);
                assert!(channels >= 128 || cut.lane_scratch().is_multiple_of(6 * 16));
                let n = rows * channels;
                let mut scratch = vec![0.0; cut.statistics_scratch()];
                if n < 1_000_000 {
                    let x: Vec<f32> = (0..n).map(|i| (i % channels) as f32).collect();
                    cpu::statistics(&cut, &x, &mut scratch, |c, mean, var| {
                        assert!((mean - c as f64).abs() < 1e-9 && var.abs() < 1e-9);
                    });
                }
            }
        }
    }
}
