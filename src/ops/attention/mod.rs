//! Multi-head self-attention (Vaswani et al. 2017), fused: `out = softmax(scale * Q K^T) V` per image and head, with no
//! matrix over pairs of tokens in memory beyond a thread's tile of a few rows, forward or backward (Dao et al. 2022,
//! "FlashAttention": the backward pass recomputes the probabilities from the saved logarithms of their sums).
//!
//! `qkv` `[N, T, 3 * H * D]` holds, per token, Q, K and V one after the other, each `[H, D]`: the order of PyTorch's
//! `in_proj_weight` and timm's `qkv`.

pub(super) mod cpu;
mod cuda;
mod kernel;
mod reference;
mod wgpu;

use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::CudaCx;
use crate::backend::wgpu::WgpuCx;
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, op_common};

/// Operand: qkv `[N, T, 3 * H * D]`. Results: out `[N, T, H * D]`; lse `[N, H, T]`, the logarithm of the sum of
/// `exp(scale * q . k)` over k; where `probs`, the probabilities `[N, H, T, T]` (query, key) for analysis.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Attention {
    /// H.
    pub heads: usize,
    /// Factor on the scores; `None` is `1 / sqrt(D)`.
    pub scale: Option<f32>,
    /// The probabilities are a result too.
    pub probs: bool,
}

impl Attention {
    /// Attention of `heads` heads with the usual scale, out and lse only.
    pub fn new(heads: usize) -> Self {
        Attention {
            heads,
            scale: None,
            probs: false,
        }
    }
}

/// The extents of an attention.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Extents {
    /// Images N.
    pub images: usize,
    /// Tokens T.
    pub tokens: usize,
    /// Heads H.
    pub heads: usize,
    /// Channels per head D.
    pub dim: usize,
    /// Factor on the scores.
    pub scale: f32,
}

impl Extents {
    /// Of `qkv`.
    ///
    /// # Errors
    /// Its innermost extent is not three times a multiple of the heads.
    pub fn of(qkv: &Spec, heads: usize, scale: Option<f32>) -> Result<Self, String> {
        ensure!(
            qkv.shape.len() == 3,
            "wants qkv as [N, T, 3 * heads * dim], not {:?}",
            qkv.shape
        );
        let [images, tokens, width] = [qkv.shape[0], qkv.shape[1], qkv.shape[2]];
        ensure!(
            heads > 0 && width > 0 && width.is_multiple_of(3 * heads),
            "has {width} channels of q, k and v: not three times a multiple of {heads} heads"
        );
        let dim = width / (3 * heads);
        let scale = scale.unwrap_or(1.0 / (dim as f32).sqrt());
        ensure!(
            scale.is_finite() && scale > 0.0,
            "has the scale {scale}; it must be positive"
        );
        Ok(Extents {
            images,
            tokens,
            heads,
            dim,
            scale,
        })
    }

    /// FLOPs of `products` matrix products over all pairs of tokens.
    fn flops(&self, products: usize) -> u64 {
        2 * (products * self.images * self.heads * self.tokens * self.tokens * self.dim) as u64
    }
}

impl Op for Attention {
    op_common!("attention");

    fn reach(&self, _x: &[Spec]) -> super::Reach {
        super::Reach::All
    }

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        let e = Extents::of(&x[0], self.heads, self.scale)?;
        let mut y = vec![
            Spec::f32([e.images, e.tokens, e.heads * e.dim]),
            Spec::f32([e.images, e.heads, e.tokens]),
        ];
        if self.probs {
            y.push(Spec::f32([e.images, e.heads, e.tokens, e.tokens]));
        }
        Ok(y)
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        // Q K^T and P V; the exponentials are not counted, as is usual.
        let e = Extents::of(&x[0], self.heads, self.scale);
        Cost {
            flops: e.map_or(0, |e| e.flops(2)),
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let qkv = node.inputs[0];
        let dout = b.need(node.outputs[0])?;
        let op = AttentionBwd {
            heads: self.heads,
            scale: self.scale,
        };
        let dqkv = b.emit1(op, &[dout, qkv, node.outputs[0], node.outputs[1]])?;
        b.give(qkv, dqkv)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        reference::forward(self, x, y);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        cpu::forward(self, cx)
    }

    fn cpu_variants(&self) -> &'static [&'static str] {
        cpu::variants()
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        wgpu::forward(self, cx)
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::VARIANTS
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        cuda::forward(self, cx)
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// The gradient of [`Attention`]. Operands: dout, qkv, out, lse. Result: dqkv.
///
/// With `P = exp(scale * Q K^T - lse)`, `dP = dout V^T` and `delta = sum(dout * out)` per row:
/// `dS = scale * P * (dP - delta)`, `dQ = dS K`, `dK = dS^T Q`, `dV = P^T dout`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct AttentionBwd {
    /// H.
    pub heads: usize,
    /// Factor on the scores; `None` is `1 / sqrt(D)`.
    pub scale: Option<f32>,
}

impl Op for AttentionBwd {
    op_common!("attention_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 4, "takes four operands");
        let e = Extents::of(&x[1], self.heads, self.scale)?;
        ensure!(
            x[0] == x[2] && x[0].shape == [e.images, e.tokens, e.heads * e.dim],
            "has a result {:?} with a gradient {:?} for qkv {:?}",
            x[2].shape,
            x[0].shape,
            x[1].shape
        );
        ensure!(
            x[3].len() == e.images * e.heads * e.tokens,
            "has row statistics {:?} for qkv {:?} and {} heads",
            x[3].shape,
            x[1].shape,
            e.heads
        );
        Ok(vec![x[1].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        // Q K^T again, dP, dQ, dK, dV.
        let e = Extents::of(&x[1], self.heads, self.scale);
        Cost {
            flops: e.map_or(0, |e| e.flops(5)),
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        reference::backward(self, x, y);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        cpu::backward(self, cx)
    }

    fn cpu_variants(&self) -> &'static [&'static str] {
        cpu::variants()
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        wgpu::backward(self, cx)
    }

    fn wgpu_variants(&self) -> &'static [&'static str] {
        wgpu::VARIANTS
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        cuda::backward(self, cx)
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

impl Graph {
    /// Multi-head self-attention of `qkv` `[N, T, 3 * heads * D]` with the usual scale: `[N, T, heads * D]`.
    ///
    /// # Errors
    /// The channels are not three times a multiple of the heads.
    pub fn attention(&mut self, qkv: Tid, heads: usize) -> Result<Tid> {
        self.push1(Attention::new(heads), &[qkv])
    }

    /// [`attention`](Self::attention) that also gives the probabilities `[N, heads, T, T]`, for analysis.
    ///
    /// # Errors
    /// As [`attention`](Self::attention).
    pub fn attention_probs(&mut self, qkv: Tid, heads: usize) -> Result<(Tid, Tid)> {
        let op = Attention {
            probs: true,
            ..Attention::new(heads)
        };
        let out = self.push(op, &[qkv])?;
        Ok((out[0], out[2]))
    }
}

/// The room of [`Attention`].
pub const ROOM: Room = Room {
    name: "attention",
    about: "out = softmax(scale * Q K^T) V per head, without a matrix of token pairs in memory",
    case: |p| {
        let (n, t) = (p.get("n", 2)?, p.get("t", 5)?);
        let (h, d): (usize, usize) = (p.get("h", 2)?, p.get("d", 16)?);
        let scale: f32 = p.get("scale", 0.0)?;
        let op = Attention {
            heads: h,
            scale: (scale != 0.0).then_some(scale),
            probs: p.flag("probs")?,
        };
        let qkv = Spec::f32([n, t, p.get("width", 3 * h * d)?]);
        // Wider than normal where asked for, so that the softmax is sharp and its maximum matters.
        let spread = p.get("spread", 1.0)?;
        let case = Case::new(op).operand(qkv, Fill::Normal(spread), true);
        // The deviation of the scores, each the sum of d products. Forward and backward kernels may sum in another order,
        // and a score's last bit is a share of its probability; where one probability is all, the gradient of its score is
        // the difference of two sums as large.
        let deviation = match scale {
            0.0 => spread * spread,
            _ => scale * (d as f32).sqrt() * spread * spread,
        };
        Ok(Case {
            condition: f64::from(deviation.max(1.0)),
            ..case
        })
    },
    cases: &[
        "n=1,t=1,h=1,d=1",
        "n=1,t=2,h=1,d=16",
        "n=1,t=17,h=3,d=20",
        "n=3,t=5,h=2,d=7,scale=0.5",
        "n=2,t=5,h=2,d=16,probs=1",
        "n=1,t=33,h=2,d=16,spread=6",
        "n=1,t=49,h=3,d=32",
        "n=2,t=65,h=8,d=16",
        "n=1,t=65,h=4,d=32,probs=1",
        "n=1,t=50,h=1,d=80",
        "n=1,t=31,h=2,d=128",
        "n=1,t=197,h=3,d=64",
        "n=1,t=257,h=1,d=80",
    ],
    bench: &["n=8,t=197,h=12,d=64", "n=128,t=65,h=8,d=16"],
    refused: &["t=5,h=3,d=16,width=100", "h=2,scale=-1", "h=0,width=48"],
};
