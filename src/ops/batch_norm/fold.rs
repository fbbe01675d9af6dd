//! Folding batch norm into the convolution before it, once after the parameters were written.

use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::CudaCx;
use crate::backend::wgpu::WgpuCx;
use crate::graph::Spec;
use crate::ops::{Case, Fill, Host, Op, Room};
use crate::{Result, ensure, op_common};

/// `w'[k] = w[k] s[k]`, `b'[k] = (bias[k] - mean[k]) s[k] + beta[k]` with `s = gamma / sqrt(var + eps)`: the convolution
/// with `w'`, `b'` is the convolution with `w` (and `bias`) followed by batch norm with running statistics.
///
/// Operands: w `[K, R, S, C]`, the convolution's bias `[K]` where so, gamma, beta, mean, var (all `[K]`).
/// Results: w' in the place of w, so that weights take their memory once, and b' `[K]`. It runs once after w was written.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FoldBatchNorm {
    /// Added to the variance.
    pub eps: f32,
    /// The convolution has a bias.
    pub bias: bool,
}

impl Op for FoldBatchNorm {
    op_common!("fold_batch_norm");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let n = 5 + usize::from(self.bias);
        ensure!(x.len() == n, "takes {n} operands");
        let k = x[0].shape[0];
        for (i, v) in x.iter().enumerate().skip(1) {
            ensure!(
                v.shape == [k],
                "folds into {k} filters, operand {i} has shape {:?}",
                v.shape
            );
        }
        Ok(vec![x[0].clone(), Spec::f32([k])])
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let [gamma, beta, mean, var] = &x[x.len() - 4..] else {
            unreachable!("the shape rule counted the operands")
        };
        let k = gamma.data.len();
        let per = x[0].data.len() / k;
        for i in 0..k {
            let s = gamma.data[i] / (var.data[i] + f64::from(self.eps)).sqrt();
            let bias = if self.bias { x[1].data[i] } else { 0.0 };
            for j in i * per..(i + 1) * per {
                y[0].data[j] = x[0].data[j] * s;
            }
            y[1].data[i] = (bias - mean.data[i]) * s + beta.data[i];
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let k = cx.y[1].len();
        let per = cx.x[0].len() / k;
        let at = 1 + usize::from(self.bias);
        Ok(Box::new(move |a| {
            let (gamma, beta, mean, var) = (a.x(at), a.x(at + 1), a.x(at + 2), a.x(at + 3));
            let (w, b) = (a.y(0), a.y(1));
            let bias = a.x_if(op.bias, 1);
            for i in 0..k {
                let s = f64::from(gamma[i]) / (f64::from(var[i]) + f64::from(op.eps)).sqrt();
                let from = f64::from(bias.map_or(0.0, |b| b[i]) - mean[i]);
                b[i] = (from * s + f64::from(beta[i])) as f32;
                w[i * per..(i + 1) * per]
                    .iter_mut()
                    .for_each(|w| *w *= s as f32);
            }
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        super::wgpu::fold(cx, self.bias, self.eps)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        super::cuda::fold(cx, self.bias, self.eps)
    }
}

/// The room of [`FoldBatchNorm`].
pub const ROOM: Room = Room {
    name: "fold_batch_norm",
    about: "filters and bias of a convolution with the batch norm after it folded in",
    case: |p| {
        let k = p.get("k", 8)?;
        let bias = p.flag("bias")?;
        let size = p.get("r", 3)?;
        let case = Case::new(FoldBatchNorm { eps: 1e-5, bias })
            .x(&[k, size, size, p.get("c", 4)?])
            .x_if(bias, &[k]);
        Ok(case
            .x(&[k])
            .x(&[k])
            .x(&[k])
            .fixed(Spec::f32([k]), Fill::Uniform(0.5, 2.0))
            .forward_only())
    },
    cases: &["k=1,r=1,c=1", "k=5,r=3,c=3,bias=1", "k=64,r=3,c=64"],
    bench: &["k=512,r=3,c=512"],
    refused: &[],
};
