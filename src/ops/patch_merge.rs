//! Patch merging's rearrangement (Liu et al. 2021, section 3.1): the channels of 2x2 neighbouring pixels side by side,
//! in the order of the libraries: top left, bottom left, top right, bottom right. An odd map counts as padded with zeros.

use super::{Case, Cost, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, op_common};

/// `y[n, i, j, q * C + c] = x[n, 2 i + q % 2, 2 j + q / 2, c]`. Operand: x `[N, H, W, C]`. Result: y
/// `[N, ceil(H / 2), ceil(W / 2), 4 C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PatchMerge;

/// The gradient of [`PatchMerge`]. Operand: dy `[N, ceil(h / 2), ceil(w / 2), 4 C]`. Result: dx `[N, h, w, C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PatchMergeBwd {
    /// Rows of the forward operand.
    pub h: usize,
    /// Columns of the forward operand.
    pub w: usize,
}

/// The four dimensions of a map.
fn map(x: &[Spec]) -> Result<[usize; 4], String> {
    ensure!(x.len() == 1, "takes one operand");
    match x[0].shape[..] {
        [n, h, w, c] if h * w > 0 => Ok([n, h, w, c]),
        _ => Err(format!("takes [N, H, W, C], got {:?}", x[0].shape)),
    }
}

fn moves(x: &[Spec], y: &[Spec]) -> Cost {
    Cost {
        flops: 0,
        bytes: traffic(x, y),
    }
}

impl Op for PatchMerge {
    op_common!("patch_merge");

    fn reach(&self, _x: &[Spec]) -> super::Reach {
        super::Reach::Window {
            size: [2; 2],
            stride: [2; 2],
            pad: [0; 2],
        }
    }

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let [n, h, w, c] = map(x)?;
        Ok(vec![Spec::f32([n, h.div_ceil(2), w.div_ceil(2), 4 * c])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        moves(x, y)
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let shape = b.graph.shape(node.inputs[0]);
        let op = PatchMergeBwd {
            h: shape[1],
            w: shape[2],
        };
        let dx = b.emit1(op, &[dy])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let &[_, h, w, c] = &x[0].shape[..] else {
            unreachable!("the shape rule was checked")
        };
        let (oh, ow) = (y[0].shape[1], y[0].shape[2]);
        for r in 0..y[0].rows() {
            let (n, i, j) = (r / ow / oh, r / ow % oh, r % ow);
            for q in 0..4 {
                let (i, j) = (2 * i + q % 2, 2 * j + q / 2);
                if i < h && j < w {
                    let from = x[0].row((n * h + i) * w + j);
                    y[0].row_mut(r)[q * c..(q + 1) * c].copy_from_slice(from);
                }
            }
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let &[_, h, w, c] = &cx.x[0].shape[..] else {
            unreachable!("the shape rule was checked")
        };
        let (oh, ow) = (cx.y[0].shape[1], cx.y[0].shape[2]);
        Ok(Box::new(move |a| {
            let x = a.x(0);
            par::rows(a.y(0), 4 * c, |first, y| {
                for (r, y) in y.chunks_exact_mut(4 * c).enumerate() {
                    let r = first + r;
                    let (n, i, j) = (r / ow / oh, r / ow % oh, r % ow);
                    for (q, y) in y.chunks_exact_mut(c).enumerate() {
                        let (i, j) = (2 * i + q % 2, 2 * j + q / 2);
                        if i < h && j < w {
                            y.copy_from_slice(&x[((n * h + i) * w + j) * c..][..c]);
                        } else {
                            y.fill(0.0);
                        }
                    }
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        launch(cx, "merge", &cx.x[0].shape)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        launch_cuda(cx, "merge", &cx.x[0].shape)
    }
}

impl Op for PatchMergeBwd {
    op_common!("patch_merge_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        let [n, oh, ow, wide] = map(x)?;
        ensure!(
            wide.is_multiple_of(4) && oh == self.h.div_ceil(2) && ow == self.w.div_ceil(2),
            "has a gradient of shape {:?} for {} x {}",
            x[0].shape,
            self.h,
            self.w
        );
        Ok(vec![Spec::f32([n, self.h, self.w, wide / 4])])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        moves(x, y)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (h, w, c) = (self.h, self.w, y[0].channels());
        for r in 0..y[0].rows() {
            let from = merged(r, h, w, c);
            y[0].row_mut(r).copy_from_slice(&x[0].data[from..from + c]);
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let (h, w, c) = (self.h, self.w, cx.y[0].channels());
        Ok(Box::new(move |a| {
            let dy = a.x(0);
            par::rows(a.y(0), c, |first, dx| {
                for (r, dx) in dx.chunks_exact_mut(c).enumerate() {
                    dx.copy_from_slice(&dy[merged(first + r, h, w, c)..][..c]);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        launch(cx, "merge_bwd", &cx.y[0].shape)
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        launch_cuda(cx, "merge_bwd", &cx.y[0].shape)
    }
}

/// Where the channels of pixel `r` of `[N, h, w, c]` stand in the merged map.
fn merged(r: usize, h: usize, w: usize, c: usize) -> usize {
    let (n, i, j) = (r / w / h, r / w % h, r % w);
    let to = (n * h.div_ceil(2) + i / 2) * w.div_ceil(2) + j / 2;
    (4 * to + 2 * (j % 2) + i % 2) * c
}

/// A launch of kernels/patch_merge.cu; `full` is the shape of the map that is merged.
fn launch_cuda(cx: &mut CudaCx, entry: &'static str, full: &[usize]) -> Result<()> {
    use cuda::Arg;
    let vec = cuda::vector(&[full[3]]);
    let sizes = [full[1], full[2], full[3] / vec].map(Arg::n);
    let args: Vec<Arg> = sizes.into_iter().chain([Arg::In(0), Arg::Out(0)]).collect();
    let consts = vec![("VEC", vec.to_string())];
    let n = cx.y[0].len() / vec;
    cx.items(("patch_merge.cu", entry), consts, n, 256, &args)
}

/// Forward or backward; `full` is the shape of the map that is merged.
fn launch(cx: &mut WgpuCx, entry: &'static str, full: &[usize]) -> Result<()> {
    let of = |s: &Spec| s.len() / full[0].max(1);
    let (from, to) = (of(&cx.x[0]), of(&cx.y[0]));
    let params = [full[1], full[2], full[3]].map(|v| v as u32);
    for cut in cx.cuts(full[0], &[from, to])? {
        let args = [cut.of(Arg::In(0), from), cut.of(Arg::Out(0), to)];
        cx.items(
            ("patch_merge.wgsl", entry),
            &[],
            cut.rows * to,
            &args,
            &params,
        )?;
    }
    Ok(())
}

impl Graph {
    /// The channels of 2x2 neighbouring pixels side by side: `[N, H, W, C]` to `[N, ceil(H / 2), ceil(W / 2), 4 C]`.
    ///
    /// # Errors
    /// `x` is not a map.
    pub fn patch_merge(&mut self, x: Tid) -> Result<Tid> {
        self.push1(PatchMerge, &[x])
    }
}

/// The room of [`PatchMerge`].
pub const ROOM: Room = Room {
    name: "patch_merge",
    about: "the channels of 2x2 neighbouring pixels side by side (Swin)",
    case: |p| {
        let (n, h) = (p.get("n", 2)?, p.get("h", 4)?);
        Ok(Case::new(PatchMerge).x(&[n, h, p.get("w", h)?, p.get("c", 4)?]))
    },
    cases: &[
        "n=1,h=1,w=1,c=1",
        "n=2,h=4,w=6,c=5",
        "n=2,h=5,w=3,c=7",
        "n=3,h=7,w=8,c=4",
        "n=2,h=28,w=28,c=192",
    ],
    bench: &["n=8,h=56,w=56,c=96"],
    refused: &["h=0"],
};
