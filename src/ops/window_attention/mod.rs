//! Attention within the windows of a feature map (Liu et al. 2021, "Swin Transformer"), fused: `softmax(scale * Q K^T +
//! bias + mask) V` per window and head, read straight from `[N, H, W, 3 * heads * D]` and written straight to
//! `[N, H, W, heads * D]`. The windows are addresses: nothing is rolled, cut into windows or put together again, and no
//! score leaves a thread's tile.
//!
//! With a shift, window `(a, b)` holds the pixels `(a * side + i + shift, b * side + j + shift)`, modulo the map's
//! height and width. What comes together by wrapping round is kept apart by -100 on the scores, as in the paper's code.
//! The bias of query and key `(i, j)`, `(k, l)` is entry `(i - k + side - 1) * (2 side - 1) + j - l + side - 1` of the
//! relative position table.

mod cpu;
mod cuda;
mod reference;
mod wgpu;

use super::attention::Extents;
use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::CudaCx;
use crate::backend::wgpu::WgpuCx;
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, op_common};

/// Added to the scores of pixels that are neighbours only by wrapping round.
const MASK: f32 = -100.0;

/// Operands: qkv `[N, H, W, 3 * heads * D]` (per pixel Q, K and V, each `[heads, D]`), the relative position table
/// `[(2 side - 1)^2, heads]`. Results: out `[N, H, W, heads * D]`; lse `[N, windows, heads, side^2]`, the logarithm of
/// the sum of the exponentials of a query's scores.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WindowAttention {
    /// Heads.
    pub heads: usize,
    /// Rows and columns of a window; H and W are multiples of it.
    pub side: usize,
    /// Cyclic shift of rows and of columns, less than a window.
    pub shift: [usize; 2],
}

/// Where everything is.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Windows {
    op: WindowAttention,
    images: usize,
    h: usize,
    w: usize,
    dim: usize,
}

impl Windows {
    fn of(op: WindowAttention, qkv: &Spec, table: &Spec) -> Result<Self, String> {
        let WindowAttention { heads, side, shift } = op;
        let &[images, h, w, width] = &qkv.shape[..] else {
            return Err(format!(
                "wants qkv as [N, H, W, 3 * heads * dim], not {:?}",
                qkv.shape
            ));
        };
        ensure!(
            heads > 0 && width > 0 && width.is_multiple_of(3 * heads),
            "has {width} channels of q, k and v: not three times a multiple of {heads} heads"
        );
        ensure!(
            side > 0 && h > 0 && w > 0 && h.is_multiple_of(side) && w.is_multiple_of(side),
            "cannot cut {h}x{w} into windows of {side}x{side}"
        );
        ensure!(
            shift[0] < side && shift[1] < side,
            "has a shift of {shift:?}; it must be less than the window's side, {side}"
        );
        ensure!(
            table.shape == [(2 * side - 1).pow(2), heads],
            "has a relative position table {:?} for {heads} heads and windows of {side}x{side}",
            table.shape
        );
        Ok(Windows {
            op,
            images,
            h,
            w,
            dim: width / (3 * heads),
        })
    }

    /// Tokens of a window.
    fn tokens(&self) -> usize {
        self.op.side * self.op.side
    }

    /// Windows of an image.
    fn per_image(&self) -> usize {
        self.h * self.w / self.tokens()
    }

    /// Entries of the relative position table, for each head.
    fn entries(&self) -> usize {
        (2 * self.op.side - 1).pow(2)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// Each window as an image of its own.
    fn extents(&self) -> Extents {
        Extents {
            images: self.images * self.per_image(),
            tokens: self.tokens(),
            heads: self.op.heads,
            dim: self.dim,
            scale: self.scale(),
        }
    }

    /// The pixel of token `t` of window `window` (counted over all images), counted over all images.
    fn pixel(&self, window: usize, t: usize) -> usize {
        let WindowAttention { side, shift, .. } = self.op;
        let (image, window) = (window / self.per_image(), window % self.per_image());
        let across = self.w / side;
        let y = (window / across * side + t / side + shift[0]) % self.h;
        let x = (window % across * side + t % side + shift[1]) % self.w;
        (image * self.h + y) * self.w + x
    }

    /// Whether the window is the last of its column and of its row, and so holds what wrapped round.
    fn wraps(&self, window: usize) -> [bool; 2] {
        let WindowAttention { side, shift, .. } = self.op;
        let (window, across) = (window % self.per_image(), self.w / side);
        [
            shift[0] > 0 && window / across == self.h / side - 1,
            shift[1] > 0 && window % across == across - 1,
        ]
    }

    /// Whether tokens `i` and `j` are kept apart in a window that wraps so.
    fn apart(&self, wraps: [bool; 2], i: usize, j: usize) -> bool {
        let WindowAttention { side, shift, .. } = self.op;
        let across = |at: usize, axis: usize| at >= side - shift[axis];
        (wraps[0] && across(i / side, 0) != across(j / side, 0))
            || (wraps[1] && across(i % side, 1) != across(j % side, 1))
    }

    /// The entry of the table for query `i` and key `j`.
    fn entry(&self, i: usize, j: usize) -> usize {
        let side = self.op.side;
        let rows = i / side + side - 1 - j / side;
        let columns = i % side + side - 1 - j % side;
        rows * (2 * side - 1) + columns
    }

    /// FLOPs of `products` matrix products over all pairs of tokens.
    fn flops(&self, products: usize) -> u64 {
        let pairs = self.images * self.per_image() * self.op.heads * self.tokens().pow(2);
        2 * (products * pairs * self.dim) as u64
    }
}

impl Op for WindowAttention {
    op_common!("window_attention");

    fn reach(&self, _x: &[Spec]) -> super::Reach {
        super::Reach::Blocks
    }

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "takes two operands");
        let g = Windows::of(*self, &x[0], &x[1])?;
        Ok(vec![
            Spec::f32([g.images, g.h, g.w, self.heads * g.dim]),
            Spec::f32([g.images, g.per_image(), self.heads, g.tokens()]),
        ])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        // Q K^T and P V, as for attention.
        let g = Windows::of(*self, &x[0], &x[1]);
        Cost {
            flops: g.map_or(0, |g| g.flops(2)),
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let (qkv, table) = (node.inputs[0], node.inputs[1]);
        let dout = b.need(node.outputs[0])?;
        let operands = [dout, qkv, node.outputs[0], node.outputs[1], table];
        let grads = b.emit(WindowAttentionBwd { fwd: *self }, &operands)?;
        b.give(qkv, grads[0])?;
        b.give(table, grads[1])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        reference::forward(self, x, y);
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        cpu::forward(self, cx)
    }

    fn cpu_variants(&self) -> &'static [&'static str] {
        super::attention::cpu::variants()
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        wgpu::forward(self, cx)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        cuda::forward(self, cx)
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

/// The gradient of [`WindowAttention`]. Operands: dout, qkv, out, lse, table. Results: dqkv, dtable.
///
/// As for [`AttentionBwd`](super::attention::AttentionBwd); an entry of dtable is the sum of `P * (dP - delta)` over
/// all windows and all pairs that read it, in a fixed order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WindowAttentionBwd {
    /// The forward op.
    pub fwd: WindowAttention,
}

impl Op for WindowAttentionBwd {
    op_common!("window_attention_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 5, "takes five operands");
        let y = self.fwd.infer(&[x[1].clone(), x[4].clone()])?;
        ensure!(
            x[0] == y[0] && x[2] == y[0] && x[3] == y[1],
            "has a result {:?} with a gradient {:?} and row statistics {:?} for qkv {:?}",
            x[2].shape,
            x[0].shape,
            x[3].shape,
            x[1].shape
        );
        Ok(vec![x[1].clone(), x[4].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        // Q K^T again, dP, dQ, dK, dV.
        let g = Windows::of(self.fwd, &x[1], &x[4]);
        Cost {
            flops: g.map_or(0, |g| g.flops(5)),
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
        super::attention::cpu::variants()
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        wgpu::backward(self, cx)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        cuda::backward(self, cx)
    }

    fn cuda_variants(&self) -> &'static [&'static str] {
        cuda::VARIANTS
    }
}

impl Graph {
    /// Attention within windows of `op`, of `qkv` `[N, H, W, 3 * heads * D]` with the relative position `table`
    /// `[(2 side - 1)^2, heads]`: `[N, H, W, heads * D]`.
    ///
    /// # Errors
    /// The map cannot be cut into windows, or the shapes do not fit.
    pub fn window_attention(&mut self, op: WindowAttention, qkv: Tid, table: Tid) -> Result<Tid> {
        self.push1(op, &[qkv, table])
    }
}

/// The room of [`WindowAttention`].
pub const ROOM: Room = Room {
    name: "window_attention",
    about: "attention within shifted windows, with a relative position bias (Swin)",
    case: |p| {
        let (n, heads, d): (_, usize, usize) = (p.get("n", 1)?, p.get("heads", 2)?, p.get("d", 8)?);
        let side: usize = p.get("side", 2)?;
        let (h, w) = (p.get("h", 2 * side)?, p.get("w", 2 * side)?);
        let s = p.get("shift", 0)?;
        let op = WindowAttention {
            heads,
            side,
            shift: [s, p.get("shift_w", s)?],
        };
        let entries = (2 * side).saturating_sub(1).pow(2);
        let table = Spec::f32([p.get("entries", entries)?, heads]);
        let spread = p.get("spread", 1.0)?;
        let qkv = Spec::f32([n, h, w, 3 * heads * d]);
        Ok(Case::new(op)
            .operand(qkv, Fill::Normal(spread), true)
            .operand(table, Fill::Normal(1.0), true))
    },
    cases: &[
        "side=1,h=1,w=1,heads=1,d=1",
        "side=2,h=2,w=2,heads=1,d=4",
        "n=2,side=3,h=6,w=3,heads=2,d=5,shift=1,shift_w=0",
        "n=2,side=3,h=3,w=9,heads=3,d=7,shift=0,shift_w=2",
        "n=1,side=4,h=8,w=12,heads=2,d=16,shift=2",
        "n=1,side=2,h=4,w=4,heads=1,d=8,shift=1,spread=4",
        "n=2,side=7,h=14,w=14,heads=3,d=32,shift=3",
        "n=1,side=7,h=7,w=7,heads=4,d=32",
        "n=1,side=12,h=12,w=24,heads=2,d=32,shift=0,shift_w=6",
        "n=1,side=8,h=16,w=8,heads=1,d=20,shift=4,shift_w=0",
    ],
    bench: &[
        "n=8,side=7,h=56,w=56,heads=3,d=32,shift=3",
        "n=8,side=7,h=14,w=14,heads=12,d=32,shift=3",
        "n=2,side=12,h=48,w=48,heads=8,d=32,shift=6",
    ],
    refused: &[
        "side=3,h=4,w=3",
        "side=2,shift=2",
        "side=3,entries=9",
        "side=0,h=2,w=2",
    ],
};
