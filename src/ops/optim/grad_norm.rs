//! The global norm of the gradients, and clipping by it.

use super::{CHUNK, HYPER, tail};
use crate::backend::cpu::par::{self, SharedMut};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::{self, CudaCx, CudaLaunch};
use crate::backend::wgpu::{Arg, Launch, WgpuCx, fold};
use crate::graph::Spec;
use crate::ops::{Case, Cost, Host, Op, Room, traffic};
use crate::{Result, ensure, multiversion, op_common};

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

#[cfg(test)]
mod tests {
    use super::*;

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
