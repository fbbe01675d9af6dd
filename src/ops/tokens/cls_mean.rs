//! What the linear classifiers over DINOv2 read (Oquab et al. 2023, section 7): the class token beside the mean of the
//! patches.

use super::pick_cuda;
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::CudaCx;
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::ops::{Case, Host, Op, Room};
use crate::{Result, ensure, op_common};

/// `y[n] = (x[n, 0], mean of x[n, prefix..])`. Operand: x `[N, T, C]`. Result: y `[N, 2 C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClsMean {
    /// Tokens before the patches.
    pub prefix: usize,
}

/// The gradient of [`ClsMean`]. Operand: dy `[N, 2 C]`. Result: dx `[N, tokens, C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ClsMeanBwd {
    /// Tokens before the patches.
    pub prefix: usize,
    /// All tokens.
    pub tokens: usize,
}

impl Op for ClsMean {
    op_common!("cls_mean");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 1 && x[0].shape.len() == 3,
            "takes one operand [N, T, C]"
        );
        let [n, t, c] = [x[0].shape[0], x[0].shape[1], x[0].shape[2]];
        let prefix = self.prefix;
        ensure!(
            prefix < t && t > 0,
            "has no patch behind its {prefix} tokens in front"
        );
        Ok(vec![Spec::f32([n, 2 * c])])
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let op = ClsMeanBwd {
            prefix: self.prefix,
            tokens: b.graph.shape(node.inputs[0])[1],
        };
        let dx = b.emit1(op, &[dy])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (t, c) = (x[0].shape[1], x[0].shape[2]);
        for n in 0..y[0].rows() {
            let y = y[0].row_mut(n);
            y[..c].copy_from_slice(x[0].row(n * t));
            for j in self.prefix..t {
                for (y, v) in y[c..].iter_mut().zip(x[0].row(n * t + j)) {
                    *y += v / (t - self.prefix) as f64;
                }
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (t, c, prefix) = (cx.x[0].shape[1], cx.x[0].shape[2], self.prefix);
        Ok(Box::new(move |a| {
            let x = a.x(0);
            par::rows(a.y(0), 2 * c, |first, y| {
                for (n, y) in y.chunks_exact_mut(2 * c).enumerate() {
                    let x = &x[(first + n) * t * c..][..t * c];
                    let (cls, mean) = y.split_at_mut(c);
                    cls.copy_from_slice(&x[..c]);
                    mean.fill(0.0);
                    for row in x[prefix * c..].chunks_exact(c) {
                        mean.iter_mut().zip(row).for_each(|(m, v)| *m += v);
                    }
                    mean.iter_mut().for_each(|m| *m /= (t - prefix) as f32);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let [n, t, c] = [cx.x[0].shape[0], cx.x[0].shape[1], cx.x[0].shape[2]];
        launch(cx, "cls_mean", n, [t * c, 2 * c], [t, c, self.prefix])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let [t, c] = [cx.x[0].shape[1], cx.x[0].shape[2]];
        pick_cuda(cx, "cls_mean", [t, c, self.prefix])
    }
}

impl Op for ClsMeanBwd {
    op_common!("cls_mean_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(
            x.len() == 1 && x[0].shape.len() == 2 && x[0].channels().is_multiple_of(2),
            "takes one operand [N, 2 C]"
        );
        let c = x[0].channels() / 2;
        Ok(vec![Spec::f32([x[0].shape[0], self.tokens, c])])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (t, c) = (self.tokens, y[0].channels());
        for r in 0..y[0].rows() {
            let dy = x[0].row(r / t);
            for (k, d) in y[0].row_mut(r).iter_mut().enumerate() {
                if r % t == 0 {
                    *d += dy[k];
                }
                if r % t >= self.prefix {
                    *d += dy[c + k] / (t - self.prefix) as f64;
                }
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let ClsMeanBwd { prefix, tokens } = *self;
        let c = cx.y[0].channels();
        Ok(Box::new(move |a| {
            let dy = a.x(0);
            par::rows(a.y(0), c, |first, dx| {
                for (r, dx) in dx.chunks_exact_mut(c).enumerate() {
                    let (n, t) = ((first + r) / tokens, (first + r) % tokens);
                    let (cls, mean) = dy[n * 2 * c..][..2 * c].split_at(c);
                    dx.fill(0.0);
                    if t == 0 {
                        dx.copy_from_slice(cls);
                    }
                    if t >= prefix {
                        let patches = (tokens - prefix) as f32;
                        dx.iter_mut().zip(mean).for_each(|(d, m)| *d += m / patches);
                    }
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (n, t, c) = (cx.x[0].rows(), self.tokens, cx.y[0].channels());
        launch(cx, "cls_mean_bwd", n, [2 * c, t * c], [t, c, self.prefix])
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let c = cx.y[0].channels();
        pick_cuda(cx, "cls_mean_bwd", [self.tokens, c, self.prefix])
    }
}

/// Forward or backward; `from` and `to` are the elements per image of operand and result.
fn launch(
    cx: &mut WgpuCx,
    entry: &'static str,
    images: usize,
    [from, to]: [usize; 2],
    [t, c, prefix]: [usize; 3],
) -> Result<()> {
    let params = [0, t, c, prefix, 0].map(|v| v as u32);
    for cut in cx.cuts(images, &[from, to])? {
        let args = [cut.of(Arg::In(0), from), cut.of(Arg::Out(0), to)];
        cx.items(("tokens.wgsl", entry), &[], cut.rows * to, &args, &params)?;
    }
    Ok(())
}

impl Graph {
    /// The class token beside the mean of the tokens from `prefix` on: `[N, T, C]` to `[N, 2 C]`.
    ///
    /// # Errors
    /// There is no token from `prefix` on.
    pub fn cls_mean(&mut self, x: Tid, prefix: usize) -> Result<Tid> {
        self.push1(ClsMean { prefix }, &[x])
    }
}

/// The room of [`ClsMean`].
pub const ROOM: Room = Room {
    name: "cls_mean",
    about: "the class token beside the mean of the patches",
    case: |p| {
        let shape = [p.get("n", 2)?, p.get("t", 5)?, p.get("c", 8)?];
        Ok(Case::new(ClsMean {
            prefix: p.get("prefix", 1)?,
        })
        .x(&shape))
    },
    cases: &[
        "n=1,t=2,c=1",
        "n=3,t=5,c=7,prefix=0",
        "n=2,t=9,c=12,prefix=5",
        "n=2,t=257,c=384",
    ],
    bench: &["n=128,t=257,c=384"],
    refused: &["t=1", "t=3,prefix=3"],
};
