//! The optimizer's updates, one launch per slab: AdamW and Adam, SGD with momentum, the global gradient norm, and
//! gradient accumulation; as PyTorch computes them. Forward only.

mod adamw;
mod grad_norm;
mod sgd;
mod slab;

use super::{Case, Fill};
use crate::backend::cpu::par::{self, SharedMut};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::{DType, Spec};
use crate::{Result, ensure};

pub use adamw::{ADAMW, AdamW};
pub use grad_norm::{GRAD_NORM, GradNorm};
pub use sgd::{SGD, Sgd};
pub use slab::{ACCUMULATE, Accumulate, FILL0, Fill0};

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Host, Op};

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
}
