//! AdamW and Adam.

use super::{check_update, chunks, tail, update};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::Spec;
use crate::ops::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::{Result, multiversion, op_common};

/// Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), as `torch.optim` computes them:
/// `p -= lr decay p` (decoupled) or `g += decay p`; `m = beta1 m + (1 - beta1) g`; `v = beta2 v + (1 - beta2) g^2`;
/// `p -= lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)`.
///
/// Operands: param, grad, m, v (equal lengths), hyper `[8]` = (lr, c1 = 1 - beta1^t, c2 = 1 - beta2^t, factor on
/// gradients, 0..), and with `clip` the result of [`GradNorm`](super::GradNorm). Results: param, m, v, updated in
/// place.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AdamW {
    /// Factor on the learning rate.
    pub lr_scale: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Weight decay acts on the parameter (AdamW) rather than on the gradient (Adam).
    pub decoupled: bool,
    /// Gradients are scaled by operand 5's second element.
    pub clip: bool,
}

/// What one launch of AdamW multiplies by.
#[derive(Clone, Copy)]
struct AdamStep {
    grad: f32,
    keep: f32,
    l2: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    step: f32,
    inverse_root: f32,
    eps: f32,
}

multiversion! {
    fn adam_chunk(k: AdamStep, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
            let g = g * k.grad + k.l2 * *p;
            let mm = *m + k.one_minus_beta1 * (g - *m);
            let vv = k.beta2 * *v + k.one_minus_beta2 * g * g;
            *m = mm;
            *v = vv;
            *p = *p * k.keep - k.step * (mm / (vv.sqrt() * k.inverse_root + k.eps));
        }
    }
}

impl Op for AdamW {
    op_common!("adamw");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        check_update(x, 4, self.clip)?;
        Ok(vec![x[0].clone(), x[2].clone(), x[3].clone()])
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        &[(0, 0), (1, 2), (2, 3)]
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: 14 * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let h = &x[4].data;
        let clip = if self.clip { x[5].data[1] } else { 1.0 };
        let lr = h[0] * self.lr_scale;
        for i in 0..x[0].data.len() {
            let (mut p, mut g) = (x[0].data[i], x[1].data[i] * h[3] * clip);
            if self.decoupled {
                p *= 1.0 - lr * self.weight_decay;
            } else {
                g += self.weight_decay * p;
            }
            let m = self.beta1 * x[2].data[i] + (1.0 - self.beta1) * g;
            let v = self.beta2 * x[3].data[i] + (1.0 - self.beta2) * g * g;
            y[0].data[i] = p - lr / h[1] * m / (v.sqrt() / h[2].sqrt() + self.eps);
            y[1].data[i] = m;
            y[2].data[i] = v;
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        Ok(Box::new(move |a| {
            let h = a.x(4);
            let clip = a.x_if(op.clip, 5).map_or(1.0, |c| c[1]);
            let lr = f64::from(h[0]) * op.lr_scale;
            let (keep, l2) = match op.decoupled {
                true => (1.0 - lr * op.weight_decay, 0.0),
                false => (1.0, op.weight_decay),
            };
            let k = AdamStep {
                grad: h[3] * clip,
                keep: keep as f32,
                l2: l2 as f32,
                one_minus_beta1: (1.0 - op.beta1) as f32,
                beta2: op.beta2 as f32,
                one_minus_beta2: (1.0 - op.beta2) as f32,
                step: (lr / f64::from(h[1])) as f32,
                inverse_root: (1.0 / f64::from(h[2]).sqrt()) as f32,
                eps: op.eps as f32,
            };
            let g = a.x(1);
            chunks([a.y(0), a.y(1), a.y(2)], |at, [p, m, v]| {
                let n = p.len();
                adam_chunk(k, p, &g[at..at + n], m, v);
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let flags = u32::from(self.clip) + 2 * u32::from(self.decoupled);
        let floats = [
            self.lr_scale,
            self.weight_decay,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.eps,
            0.0,
        ];
        let hyper = [Arg::In(4), Arg::In(if self.clip { 5 } else { 4 })];
        update(
            cx,
            "adamw",
            flags,
            floats,
            hyper,
            &[Arg::Out(1), Arg::Out(2)],
        )
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (decay, l2) = match self.decoupled {
            true => (self.weight_decay, 0.0),
            false => (0.0, self.weight_decay),
        };
        let floats = [
            self.lr_scale,
            decay,
            l2,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.eps,
        ];
        let mut args = vec![
            Arg::Out(0),
            Arg::In(1),
            Arg::In(4),
            Arg::in_if(self.clip, 5),
            Arg::Out(1),
            Arg::Out(2),
        ];
        args.extend(floats.map(|v| Arg::F32(v as f32)));
        cx.map(("optim.cu", "adamw"), vec![], cx.x[0].len(), &args)
    }
}
/// The room of [`AdamW`].
pub const ADAMW: Room = Room {
    name: "adamw",
    about: "the update of AdamW or (l2=1) Adam",
    case: |p| {
        let n = [p.get("n", 100)?];
        let clip = p.flag("clip")?;
        let case = Case::new(AdamW {
            lr_scale: p.get("lr_scale", 1.0)?,
            weight_decay: p.get("decay", 0.05)?,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            decoupled: !p.flag("l2")?,
            clip,
        })
        .x(&n)
        .x(&n)
        .x(&n)
        .fixed(Spec::f32(n), Fill::Uniform(0.1, 2.0));
        Ok(tail(case, clip).forward_only())
    },
    cases: &[
        "n=1",
        "n=17,l2=1",
        "n=16385,clip=1",
        "n=100003,lr_scale=0.3",
    ],
    bench: &["n=11000000"],
    refused: &[],
};
