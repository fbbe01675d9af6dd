//! The optimizer's updates, one launch per slab: AdamW and Adam, SGD with momentum, the global gradient norm, and
//! gradient accumulation; as PyTorch computes them. Forward only.

use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::par::SharedMut;
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx, CudaLaunch};
use crate::backend::wgpu::{Arg, Launch, WgpuCx, fold};
use crate::graph::{DType, Spec};
use crate::{Result, ensure, multiversion, op_common};

/// Elements of the `hyper` operand: learning rate, `1 - beta1^t`, `1 - beta2^t`, factor on gradients, and four zeros.
pub const HYPER: usize = 8;

/// Elements that one task updates.
const CHUNK: usize = 16 * 1024;

/// The parts of the shape rule that both updates share.
fn check_update(x: &[Spec], slabs: usize, clip: bool) -> Result<(), String> {
    let n = slabs + 1 + usize::from(clip);
    ensure!(x.len() == n, "takes {n} operands");
    for s in &x[1..slabs] {
        ensure!(
            s.len() == x[0].len() && s.dtype == DType::F32,
            "updates {:?} by {:?}: the lengths differ",
            x[0].shape,
            s.shape
        );
    }
    ensure!(
        x[slabs].shape == [HYPER],
        "wants [{HYPER}] for the learning rate and the rest, got {:?}",
        x[slabs].shape
    );
    ensure!(
        !clip || x[slabs + 1].shape == [2],
        "wants the norm and the scale as [2], got {:?}",
        x.last().map(|s| &s.shape)
    );
    Ok(())
}

/// Calls `f` with equal stretches of every slab, on all threads.
fn chunks<const K: usize>(
    slabs: [&mut [f32]; K],
    f: impl Fn(usize, [&mut [f32]; K]) + Send + Sync,
) {
    let len = slabs.first().map_or(0, |s| s.len());
    let shared = slabs.map(SharedMut::new);
    par::for_each(len.div_ceil(CHUNK), |i| {
        let at = i * CHUNK;
        // SAFETY: each task has its own stretch of each slab.
        let parts = shared
            .each_ref()
            .map(|s| unsafe { s.slice(at, CHUNK.min(len - at)) });
        f(at, parts);
    });
}

/// Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019), as `torch.optim` computes them:
/// `p -= lr decay p` (decoupled) or `g += decay p`; `m = beta1 m + (1 - beta1) g`; `v = beta2 v + (1 - beta2) g^2`;
/// `p -= lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)`.
///
/// Operands: param, grad, m, v (equal lengths), hyper `[8]` = (lr, c1 = 1 - beta1^t, c2 = 1 - beta2^t, factor on
/// gradients, 0..), and with `clip` the result of [`GradNorm`]. Results: param, m, v, updated in place.
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

/// SGD as `torch.optim.SGD` computes it: `g += decay p`; `b = momentum b + g`; `p -= lr b`, or with Nesterov's momentum
/// `p -= lr (g + momentum b)`.
///
/// Operands: param, grad, the buffer b (only with momentum; zero at first), hyper `[8]` as for [`AdamW`], and with
/// `clip` the result of [`GradNorm`]. Results: param and the buffer, updated in place.
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

/// One update of result 0 by operand 1; `state` are the moments. `floats` follow the flags in the shader's parameters.
fn update(
    cx: &mut WgpuCx,
    entry: &'static str,
    flags: u32,
    floats: [f64; 7],
    [hyper, clip]: [Arg; 2],
    state: &[Arg],
) -> Result<()> {
    let n = cx.x[0].len();
    let mut params = vec![flags];
    params.extend(floats.map(|v| (v as f32).to_bits()));
    let (width, consts) = item(n);
    for cut in cx.cuts(n, &[1])? {
        let of = |a: Arg| cut.of(a, 1);
        let mut args = vec![of(Arg::Out(0)), of(Arg::In(1)), hyper, clip];
        args.extend(state.iter().map(|&s| of(s)));
        let n = cut.rows / width;
        cx.items(("optim.wgsl", entry), &consts, n, &args, &params)?;
    }
    Ok(())
}

fn item(n: usize) -> (usize, Vec<(&'static str, String)>) {
    if n.is_multiple_of(4) {
        return (4, vec![]);
    }
    (1, vec![("T", "f32".into())])
}

/// The L2 norm over all gradients, and the factor that brings it to `max_norm`, as `torch.nn.utils.clip_grad_norm_`:
/// `min(1, max_norm / (norm + 1e-6))`; NaN stays NaN.
///
/// Operands: any number of slabs, then hyper `[8]` where `scaled` (its factor on gradients counts into the norm).
/// Result: (norm, factor) `[2]`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct GradNorm {
    /// The largest norm that is left alone.
    pub max_norm: f64,
    /// The last operand is the updates' `hyper`.
    pub scaled: bool,
}

multiversion! {
    fn squares(x: &[f32]) -> f64 {
        // Float64 lanes: no overflow, and a rounding below float32's.
        let mut lanes = [0f64; 16];
        for block in x.chunks(16) {
            for (s, &v) in lanes.iter_mut().zip(block) {
                *s += f64::from(v) * f64::from(v);
            }
        }
        lanes.iter().sum()
    }
}

impl GradNorm {
    fn result(&self, squares: f64, factor: f64) -> [f64; 2] {
        let norm = squares.sqrt() * factor.abs();
        let scale = self.max_norm / (norm + 1e-6);
        [norm, if scale > 1.0 { 1.0 } else { scale }]
    }
}

impl Op for GradNorm {
    op_common!("grad_norm");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let slabs = x.len().saturating_sub(usize::from(self.scaled));
        ensure!(slabs > 0, "takes at least one slab");
        ensure!(
            !self.scaled || x[slabs].shape == [HYPER],
            "wants [{HYPER}] as its last operand, got {:?}",
            x[slabs.min(x.len() - 1)].shape
        );
        Ok(vec![Spec::f32([2])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        Cost {
            flops: x.iter().map(|s| 2 * s.len() as u64).sum(),
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let slabs = x.len() - usize::from(self.scaled);
        let sum = x[..slabs].iter().flat_map(|s| &s.data).map(|v| v * v).sum();
        let factor = if self.scaled { x[slabs].data[3] } else { 1.0 };
        y[0].data.copy_from_slice(&self.result(sum, factor));
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let op = *self;
        let slabs = cx.x.len() - usize::from(self.scaled);
        let most = cx.x[..slabs].iter().map(|s| s.len().div_ceil(CHUNK)).max();
        cx.workspace(2 * most.unwrap_or(0));
        Ok(Box::new(move |a| {
            let mut sum = 0f64;
            for i in 0..slabs {
                let x = a.x(i);
                let n = x.len().div_ceil(CHUNK);
                let parts = SharedMut::new(a.work());
                par::for_each(n, |j| {
                    let s = squares(&x[j * CHUNK..x.len().min((j + 1) * CHUNK)]);
                    // SAFETY: each chunk has its own place.
                    let place = unsafe { parts.slice(2 * j, 2) };
                    place.copy_from_slice(bytemuck::cast_slice(&[s]));
                });
                for v in a.work().chunks_exact(2).take(n) {
                    sum += bytemuck::pod_read_unaligned::<f64>(bytemuck::cast_slice(v));
                }
            }
            let factor = a.x_if(op.scaled, slabs).map_or(1.0, |h| f64::from(h[3]));
            let [norm, scale] = op.result(sum, factor);
            a.y(0).copy_from_slice(&[norm as f32, scale as f32]);
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let slabs = cx.x.len() - usize::from(self.scaled);
        let mut runs = vec![];
        for i in 0..slabs {
            for cut in cx.cuts(cx.x[i].len(), &[1])? {
                // At most a few thousand sums a slab: enough for a GPU, and short sums are exact sums.
                runs.push((
                    cut.of(Arg::In(i), 1),
                    cut.rows,
                    cut.rows.div_ceil(32).min(4096),
                ));
            }
        }
        let parts = runs.iter().map(|r| r.2).sum();
        let part = Arg::Work(cx.workspace(parts));
        let params = |n: usize, groups_x: u32, part0: usize, parts: usize| {
            let mut p = vec![0; 13];
            p[0] = n as u32;
            p[1] = groups_x;
            p[2] = u32::from(self.scaled);
            p[10] = part0 as u32;
            p[11] = parts as u32;
            p[12] = (self.max_norm as f32).to_bits();
            p
        };
        let mut launch = |entry, args, params, groups| {
            cx.launch(Launch {
                shader: "optim.wgsl",
                entry,
                consts: vec![],
                args,
                params,
                groups,
            })
        };
        let mut part0 = 0;
        for (slab, n, here) in runs {
            let groups = fold(here, 64);
            let params = params(n, groups[0], part0, here);
            launch("squares", vec![slab, part], params, groups)?;
            part0 += here;
        }
        let hyper = if self.scaled { Arg::In(slabs) } else { part };
        let args = vec![Arg::Out(0), part, hyper];
        launch("finish_norm", args, params(0, 1, 0, parts), [1, 1, 1])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let slabs = cx.x.len() - usize::from(self.scaled);
        let most = 4 * cx.traits.sms as usize;
        let runs: Vec<(usize, usize, usize)> = (0..slabs)
            .map(|i| {
                let n = cx.x[i].len();
                let vec = cuda::vector(&[n]);
                (vec, n / vec, (n / vec).div_ceil(256).min(most))
            })
            .collect();
        let parts: usize = runs.iter().map(|r| r.2).sum();
        let part = Arg::Work(cx.workspace(parts));
        let mut launch = |entry, vec: usize, args, blocks: usize| {
            cx.launch(CudaLaunch {
                source: "optim.cu",
                entry,
                consts: vec![("VEC", vec.to_string())],
                args,
                grid: [blocks as u32, 1, 1],
                block: [256, 1, 1],
                smem: 0,
            })
        };
        let mut part0 = 0;
        for (i, (vec, items, blocks)) in runs.into_iter().enumerate() {
            let args = vec![Arg::n(items), Arg::In(i), part.at(part0)];
            launch("squares", vec, args, blocks)?;
            part0 += blocks;
        }
        let args = vec![
            Arg::n(parts),
            part,
            Arg::in_if(self.scaled, slabs),
            Arg::F32(self.max_norm as f32),
            Arg::Out(0),
        ];
        launch("finish_norm", 4, args, 1)
    }
}

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

/// The operands after the slabs: step 7 of Adam's defaults, and a clipping factor where so.
fn tail(case: Case, clip: bool) -> Case {
    let hyper = vec![0.01, 0.5217031, 0.00698, 0.5, 0.0, 0.0, 0.0, 0.0];
    let case = case.fixed(Spec::f32([HYPER]), Fill::F32(hyper));
    if clip {
        case.fixed(Spec::f32([2]), Fill::F32(vec![4.0, 0.25]))
    } else {
        case
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

/// The room of [`GradNorm`].
pub const GRAD_NORM: Room = Room {
    name: "grad_norm",
    about: "the L2 norm over k slabs and the factor that clips it",
    case: |p| {
        let (n, k) = (p.get("n", 100)?, p.get("k", 1)?);
        let scaled = p.flag("scaled")?;
        let mut case = Case::new(GradNorm {
            max_norm: p.get("max", 1.0)?,
            scaled,
        });
        for i in 0..k {
            case = case.x(&[n + 17 * i]);
        }
        if scaled {
            case = tail(case, false);
        }
        Ok(case.forward_only())
    },
    cases: &["n=1", "n=3,k=4,max=100", "n=16385,k=3,scaled=1", "n=100003"],
    bench: &["n=11000000"],
    refused: &["k=0", "k=0,scaled=1"],
};

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

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps by the reference, which the kernels are held to, on the gradients `t * (0.1, -0.2, 0.3, -0.4)`.
    fn three_steps(op: &dyn Op, state: usize) -> Vec<f64> {
        let mut slabs = vec![Host::zeros(&[4]); 1 + state];
        slabs[0].data = vec![0.5, -1.0, 2.0, 0.1];
        let lr = if op.name() == "sgd" { 0.1 } else { 0.01 };
        for t in 1..=3 {
            let grad = Host {
                shape: vec![4],
                data: [0.1, -0.2, 0.3, -0.4].map(|g| g * f64::from(t)).to_vec(),
            };
            let mut hyper = Host::zeros(&[HYPER]);
            hyper.data[..4].copy_from_slice(&[
                lr,
                1.0 - 0.9f64.powi(t),
                1.0 - 0.999f64.powi(t),
                1.0,
            ]);
            let before = slabs.clone();
            let mut x = vec![&before[0], &grad];
            x.extend(&before[1..]);
            x.push(&hyper);
            op.reference(&x, &mut slabs);
        }
        slabs.swap_remove(0).data
    }

    #[test]
    fn three_steps_of_pytorch() {
        let adam = |decoupled| AdamW {
            lr_scale: 1.0,
            weight_decay: 0.05,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            decoupled,
            clip: false,
        };
        let sgd = |weight_decay, momentum, nesterov| Sgd {
            lr_scale: 1.0,
            weight_decay,
            momentum,
            nesterov,
            clip: false,
        };
        // torch.optim 2.15.
        let cases: [(&dyn Op, usize, [f64; 4]); 5] = [
            (
                &adam(true),
                2,
                [0.47003335, -0.96928364, 1.96778440, 0.12906708],
            ),
            (
                &adam(false),
                2,
                [0.47054651, -0.97054869, 1.97049379, 0.12921980],
            ),
            (
                &sgd(0.05, 0.9, false),
                1,
                [0.39122468, -0.78244936, 1.65970898, 0.47644800],
            ),
            (
                &sgd(0.05, 0.9, true),
                1,
                [0.33533511, -0.67067021, 1.48605633, 0.67487347],
            ),
            (&sgd(0.0, 0.0, false), 0, [0.44, -0.88, 1.82, 0.34]),
        ];
        for (op, state, want) in cases {
            for (got, want) in three_steps(op, state).iter().zip(want) {
                assert!((got - want).abs() < 1e-6, "{op:?}: {got} for {want}");
            }
        }
    }

    #[test]
    fn a_norm_that_is_not_a_number_is_not_hidden() {
        let op = GradNorm {
            max_norm: 1.0,
            scaled: false,
        };
        assert!(op.result(f64::NAN, 1.0)[1].is_nan());
        assert_eq!(op.result(0.0, 1.0), [0.0, 1.0]);
    }
}
