//! The parameter-free shortcut of He et al. 2016 (option A): every `stride`-th pixel, with zero channels around.

use super::{Case, Host, Op, Room};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, op_common};

/// `y[n, i, j, low + c] = x[n, i * stride, j * stride, c]` with `low = (c_out - C) / 2`, zero in the other channels.
/// Operand: x `[N, H, W, C]`. Result: y `[N, ceil(H / stride), ceil(W / stride), c_out]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subsample {
    /// Step between the pixels that stay.
    pub stride: usize,
    /// Channels of the result.
    pub c_out: usize,
}

/// Gradient of [`Subsample`]: dx is zero but at the pixels that stayed.
/// Operand: dy `[N, ceil(h / stride), ceil(w / stride), c_out]`. Result: dx `[N, h, w, c]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SubsampleBwd {
    /// Step between the pixels that stay.
    pub stride: usize,
    /// Rows of the forward operand.
    pub h: usize,
    /// Columns of the forward operand.
    pub w: usize,
    /// Channels of the forward operand.
    pub c: usize,
}

impl Op for Subsample {
    op_common!("subsample");

    fn reach(&self, _x: &[Spec]) -> super::Reach {
        super::Reach::Window {
            size: [1; 2],
            stride: [self.stride; 2],
            pad: [0; 2],
        }
    }

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        let &[n, h, w, c] = &x[0].shape[..] else {
            return Err(format!("takes [N, H, W, C], got {:?}", x[0].shape));
        };
        ensure!(self.stride > 0, "has stride 0");
        ensure!(
            self.c_out >= c,
            "pads {c} channels to {}, which are fewer",
            self.c_out
        );
        let (h, w) = (h.div_ceil(self.stride), w.div_ceil(self.stride));
        Ok(vec![Spec::f32([n, h, w, self.c_out])])
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let shape = b.graph.shape(node.inputs[0]);
        let op = SubsampleBwd {
            stride: self.stride,
            h: shape[1],
            w: shape[2],
            c: shape[3],
        };
        let dx = b.emit1(op, &[dy])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (h, w, c) = (x[0].shape[1], x[0].shape[2], x[0].shape[3]);
        let (oh, ow) = (y[0].shape[1], y[0].shape[2]);
        let low = (self.c_out - c) / 2;
        for r in 0..y[0].rows() {
            let (n, i, j) = (r / ow / oh, r / ow % oh, r % ow);
            let from = (n * h + i * self.stride) * w + j * self.stride;
            y[0].row_mut(r)[low..low + c].copy_from_slice(x[0].row(from));
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let Subsample { stride, c_out } = *self;
        let (h, w, c) = (cx.x[0].shape[1], cx.x[0].shape[2], cx.x[0].shape[3]);
        let (oh, ow) = (cx.y[0].shape[1], cx.y[0].shape[2]);
        let low = (c_out - c) / 2;
        Ok(Box::new(move |a| {
            let x = a.x(0);
            par::rows(a.y(0), c_out, |first, y| {
                for (r, y) in y.chunks_mut(c_out).enumerate() {
                    let r = first + r;
                    let (n, i, j) = (r / ow / oh, r / ow % oh, r % ow);
                    let from = ((n * h + i * stride) * w + j * stride) * c;
                    y[..low].fill(0.0);
                    y[low..low + c].copy_from_slice(&x[from..from + c]);
                    y[low + c..].fill(0.0);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        launch(cx, "subsample", self.stride, &cx.x[0].shape, &cx.y[0].shape)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let (full, sub) = (&cx.x[0].shape, &cx.y[0].shape);
        launch_cuda(cx, "subsample", self.stride, full, sub)
    }
}

impl Op for SubsampleBwd {
    op_common!("subsample_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        let &[n, oh, ow, c_out] = &x[0].shape[..] else {
            return Err(format!("takes [N, H, W, C], got {:?}", x[0].shape));
        };
        ensure!(self.stride > 0, "has stride 0");
        ensure!(
            c_out >= self.c
                && oh == self.h.div_ceil(self.stride)
                && ow == self.w.div_ceil(self.stride),
            "has a gradient of shape {:?} for {} x {} x {} at stride {}",
            x[0].shape,
            self.h,
            self.w,
            self.c,
            self.stride
        );
        Ok(vec![Spec::f32([n, self.h, self.w, self.c])])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (oh, ow) = (x[0].shape[1], x[0].shape[2]);
        let low = (x[0].channels() - self.c) / 2;
        for r in 0..x[0].rows() {
            let (n, i, j) = (r / ow / oh, r / ow % oh, r % ow);
            let to = (n * self.h + i * self.stride) * self.w + j * self.stride;
            y[0].row_mut(to)
                .copy_from_slice(&x[0].row(r)[low..low + self.c]);
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let SubsampleBwd { stride, h, w, c } = *self;
        let (oh, ow, c_out) = (cx.x[0].shape[1], cx.x[0].shape[2], cx.x[0].shape[3]);
        let low = (c_out - c) / 2;
        Ok(Box::new(move |a| {
            let dy = a.x(0);
            par::rows(a.y(0), c, |first, dx| {
                for (r, dx) in dx.chunks_mut(c).enumerate() {
                    let r = first + r;
                    let (n, i, j) = (r / w / h, r / w % h, r % w);
                    if i % stride == 0 && j % stride == 0 {
                        let from = ((n * oh + i / stride) * ow + j / stride) * c_out + low;
                        dx.copy_from_slice(&dy[from..from + c]);
                    } else {
                        dx.fill(0.0);
                    }
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        launch(
            cx,
            "subsample_bwd",
            self.stride,
            &cx.y[0].shape,
            &cx.x[0].shape,
        )
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        let (full, sub) = (&cx.y[0].shape, &cx.x[0].shape);
        launch_cuda(cx, "subsample_bwd", self.stride, full, sub)
    }
}

/// Forward or backward between the full shape and the subsampled one.
fn launch(
    cx: &mut WgpuCx,
    entry: &'static str,
    stride: usize,
    full: &[usize],
    sub: &[usize],
) -> Result<()> {
    let (from, to) = (
        cx.x[0].len() / cx.x[0].shape[0],
        cx.y[0].len() / cx.y[0].shape[0],
    );
    let sizes = [
        full[1], full[2], full[3], sub[1], sub[2], 0, stride, 0, sub[3], 0,
    ];
    let params = sizes.map(|v| v as u32);
    for cut in cx.cuts(full[0], &[from, to])? {
        let args = [cut.of(Arg::In(0), from), cut.of(Arg::Out(0), to)];
        cx.items(("pool.wgsl", entry), &[], cut.rows * to, &args, &params)?;
    }
    Ok(())
}

/// A launch of kernels/pool.cu between the full shape and the subsampled one.
fn launch_cuda(
    cx: &mut CudaCx,
    entry: &'static str,
    stride: usize,
    full: &[usize],
    sub: &[usize],
) -> Result<()> {
    use cuda::Arg;
    let (c, c_out) = (full[3], sub[3]);
    let low = (c_out - c) / 2;
    let vec = cuda::vector(&[c, c_out, low]);
    let [h, w, oh, ow] = [full[1], full[2], sub[1], sub[2]];
    let sizes = [h, w, c / vec, oh, ow, c_out / vec, low / vec, stride];
    let mut args = sizes.map(Arg::n).to_vec();
    args.extend([Arg::In(0), Arg::Out(0)]);
    let consts = vec![("VEC", vec.to_string())];
    let n = cx.y[0].len() / vec;
    cx.items(("pool.cu", entry), consts, n, 256, &args)
}

impl Graph {
    /// Every `stride`-th pixel of `[N, H, W, C]`, zero channels around up to `c_out`.
    ///
    /// # Errors
    /// `c_out` is below the channels of `x`.
    pub fn subsample(&mut self, x: Tid, stride: usize, c_out: usize) -> Result<Tid> {
        self.push1(Subsample { stride, c_out }, &[x])
    }
}

/// The room of [`Subsample`].
pub const ROOM: Room = Room {
    name: "subsample",
    about: "every s-th pixel, zero channels around up to k: the option A shortcut",
    case: |p| {
        let shape = [
            p.get("n", 2)?,
            p.get("h", 8)?,
            p.get("w", 8)?,
            p.get("c", 4)?,
        ];
        Ok(Case::new(Subsample {
            stride: p.get("s", 2)?,
            c_out: p.get("k", 8)?,
        })
        .x(&shape))
    },
    cases: &[
        "n=1,h=1,w=1,c=1,s=1,k=1",
        "n=1,h=5,w=7,c=3,s=2,k=8",
        "n=2,h=4,w=3,c=5,s=3,k=5",
        "n=4,h=32,w=32,c=16,s=2,k=32",
    ],
    bench: &["n=128,h=32,w=32,c=16,k=32"],
    refused: &["c=8,k=4", "s=0"],
};
