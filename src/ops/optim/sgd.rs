//! SGD with momentum.

use super::{check_update, chunks, tail, update};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::Spec;
use crate::ops::{Case, Cost, Host, Op, Room, traffic};
use crate::{Result, ensure, multiversion, op_common};

/// SGD as `torch.optim.SGD` computes it: `g += decay p`; `b = momentum b + g`; `p -= lr b`, or with Nesterov's momentum
/// `p -= lr (g + momentum b)`.
///
/// Operands: param, grad, the buffer b (only with momentum; zero at first), hyper `[8]` as for
/// [`AdamW`](super::AdamW), and with `clip` the result of [`GradNorm`](super::GradNorm). Results: param and the buffer,
/// updated in place.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Sgd {
    /// Factor on the learning rate.
    pub lr_scale: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// Momentum; 0 for none.
    pub momentum: f64,
    /// Nesterov's momentum.
    pub nesterov: bool,
    /// Gradients are scaled by the last operand's second element.
    pub clip: bool,
}

multiversion! {
    fn sgd_chunk(k: [f32; 4], nesterov: bool, p: &mut [f32], g: &[f32], b: &mut [f32]) {
        let [grad, decay, momentum, lr] = k;
        // Momentum of the gradient itself: p -= lr (own g + of_b b).
        let (own, of_b) = if nesterov { (1.0, momentum) } else { (0.0, 1.0) };
        for ((p, &g), b) in p.iter_mut().zip(g).zip(b.iter_mut()) {
            let g = g * grad + decay * *p;
            let bb = momentum * *b + g;
            *b = bb;
            *p -= lr * (own * g + of_b * bb);
        }
    }
}

multiversion! {
    fn plain_sgd_chunk(k: [f32; 4], p: &mut [f32], g: &[f32]) {
        let [grad, decay, _, lr] = k;
        for (p, &g) in p.iter_mut().zip(g) {
            *p -= lr * (g * grad + decay * *p);
        }
    }
}

impl Sgd {
    fn slabs(&self) -> usize {
        2 + usize::from(self.momentum != 0.0)
    }
}

impl Op for Sgd {
    op_common!("sgd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        check_update(x, self.slabs(), self.clip)?;
        ensure!(
            !self.nesterov || self.momentum != 0.0,
            "has Nesterov's momentum without momentum"
        );
        let mut y = vec![x[0].clone()];
        if self.momentum != 0.0 {
            y.push(x[2].clone());
        }
        Ok(y)
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        if self.momentum != 0.0 {
            &[(0, 0), (1, 2)]
        } else {
            &[(0, 0)]
        }
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: (if self.momentum != 0.0 { 8 } else { 5 }) * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let at = self.slabs();
        let h = &x[at].data;
        let clip = if self.clip { x[at + 1].data[1] } else { 1.0 };
        for i in 0..x[0].data.len() {
            let p = x[0].data[i];
            let g = x[1].data[i] * h[3] * clip + self.weight_decay * p;
            let mut step = g;
            if self.momentum != 0.0 {
                let b = self.momentum * x[2].data[i] + g;
                y[1].data[i] = b;
                step = if self.nesterov {
                    g + self.momentum * b
                } else {
                    b
                };
            }
            y[0].data[i] = p - h[0] * self.lr_scale * step;
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let at = self.slabs();
        Ok(Box::new(move |a| {
            let h = a.x(at);
            let clip = a.x_if(op.clip, at + 1).map_or(1.0, |c| c[1]);
            let lr = (f64::from(h[0]) * op.lr_scale) as f32;
            let k = [h[3] * clip, op.weight_decay as f32, op.momentum as f32, lr];
            let g = a.x(1);
            if op.momentum != 0.0 {
                chunks([a.y(0), a.y(1)], |at, [p, b]| {
                    let n = p.len();
                    sgd_chunk(k, op.nesterov, p, &g[at..at + n], b);
                });
            } else {
                chunks([a.y(0)], |at, [p]| {
                    let n = p.len();
                    plain_sgd_chunk(k, p, &g[at..at + n]);
                });
            }
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let flags = u32::from(self.clip) + 2 * u32::from(self.nesterov);
        let at = self.slabs();
        let floats = [
            self.lr_scale,
            self.weight_decay,
            0.0,
            0.0,
            0.0,
            0.0,
            self.momentum,
        ];
        let hyper = [Arg::In(at), Arg::In(at + usize::from(self.clip))];
        if self.momentum == 0.0 {
            return update(cx, "sgd", flags, floats, hyper, &[]);
        }
        update(cx, "sgd_momentum", flags, floats, hyper, &[Arg::Out(1)])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let at = self.slabs();
        let clip = Arg::in_if(self.clip, at + 1);
        let mut args = vec![Arg::Out(0), Arg::In(1), Arg::In(at), clip];
        let mut floats = vec![self.lr_scale, self.weight_decay];
        let entry = if self.momentum == 0.0 {
            "sgd"
        } else {
            args.push(Arg::Out(1));
            let (own, of_b) = if self.nesterov {
                (1.0, self.momentum)
            } else {
                (0.0, 1.0)
            };
            floats.extend([self.momentum, own, of_b]);
            "sgd_momentum"
        };
        args.extend(floats.iter().map(|&v| Arg::F32(v as f32)));
        cx.map(("optim.cu", entry), vec![], cx.x[0].len(), &args)
    }
}

/// The room of [`Sgd`].
pub const SGD: Room = Room {
    name: "sgd",
    about: "the update of SGD, with momentum m, nesterov=1",
    case: |p| {
        let n = [p.get("n", 100)?];
        let clip = p.flag("clip")?;
        let momentum = p.get("m", 0.9)?;
        let case = Case::new(Sgd {
            lr_scale: p.get("lr_scale", 1.0)?,
            weight_decay: p.get("decay", 0.05)?,
            momentum,
            nesterov: p.flag("nesterov")?,
            clip,
        })
        .x(&n)
        .x(&n)
        .x_if(momentum != 0.0, &n);
        Ok(tail(case, clip).forward_only())
    },
    cases: &[
        "n=1",
        "n=17,m=0",
        "n=1031,nesterov=1,clip=1",
        "n=16385,m=0,clip=1",
        "n=100003,lr_scale=0.3",
    ],
    bench: &["n=11000000"],
    refused: &["m=0,nesterov=1"],
};
