//! Max pooling over `[N, H, W, C]`, by PyTorch's rule: the padding is minus infinity, the first of equal maxima wins, and
//! NaN propagates (the last one in a window is the argmax).

use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Graph, Spec, Tid};
use crate::{Result, ensure, multiversion, op_common};
use std::ops::Range;

/// A square window.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Window {
    /// Rows and columns of the window.
    pub kernel: usize,
    /// Step between windows.
    pub stride: usize,
    /// Rows and columns around the image, at most half the window.
    pub pad: usize,
}

impl Window {
    /// Parameters of shaders/pool.wgsl after the number of items and groups, for `[h, w, c]` pixels.
    fn params(&self, [h, w, c]: [usize; 3], [oh, ow]: [usize; 2]) -> [u32; 10] {
        let sizes = [h, w, c, oh, ow, self.kernel, self.stride, self.pad, 0, 0];
        sizes.map(|v| v as u32)
    }

    /// A launch of kernels/pool.cu over result 0, for `[h, w, c]` pixels under `[oh, ow]` windows.
    fn cuda(
        &self,
        cx: &mut CudaCx,
        entry: &'static str,
        [h, w, c]: [usize; 3],
        [oh, ow]: [usize; 2],
        tensors: [cuda::Arg; 3],
    ) -> Result<()> {
        let vec = cuda::vector(&[c]);
        let sizes = [h, w, c / vec, oh, ow, self.kernel, self.stride, self.pad];
        let args: Vec<_> = sizes.map(cuda::Arg::n).into_iter().chain(tensors).collect();
        let consts = vec![("VEC", vec.to_string())];
        let n = cx.y[0].len() / vec;
        cx.items(("pool.cu", entry), consts, n, 256, &args)
    }

    /// Windows along an axis of `n` pixels.
    fn count(&self, n: usize) -> usize {
        (n + 2 * self.pad - self.kernel) / self.stride + 1
    }

    /// Pixels of an axis of `n` under window `o`; never empty, as `pad` is at most half the window.
    #[inline(always)]
    fn pixels(&self, o: usize, n: usize) -> Range<usize> {
        let from = o * self.stride;
        from.saturating_sub(self.pad)..(from + self.kernel - self.pad).min(n)
    }

    /// Windows, of `count`, over pixel `i`.
    #[inline(always)]
    fn over(&self, i: usize, count: usize) -> Range<usize> {
        let end = (i + self.pad) / self.stride + 1;
        let first = (i + self.pad + self.stride).saturating_sub(self.kernel) / self.stride;
        first..end.min(count)
    }

    fn check(&self, x: &Spec) -> Result<(), String> {
        ensure!(x.shape.len() == 4, "takes [N, H, W, C], got {:?}", x.shape);
        ensure!(
            self.kernel > 0 && self.stride > 0,
            "has kernel {} and stride {}, both at least 1",
            self.kernel,
            self.stride
        );
        ensure!(
            2 * self.pad <= self.kernel,
            "has padding {} beyond half of kernel {}",
            self.pad,
            self.kernel
        );
        let (h, w) = (x.shape[1], x.shape[2]);
        ensure!(
            h.min(w) + 2 * self.pad >= self.kernel,
            "has kernel {} on {h} x {w} pixels with padding {}",
            self.kernel,
            self.pad
        );
        Ok(())
    }
}

/// Maximum under each window. Operand: x `[N, H, W, C]`. Results: y `[N, OH, OW, C]` and the argmax, uint32 of the same
/// shape: the pixel `h * W + w` within the image, as PyTorch returns it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MaxPool {
    /// The window.
    pub window: Window,
}

multiversion! {
    /// One output pixel over all channels; `taps` are the pixels under its window.
    fn pool_pixel(x: &[f32], w: usize, rows: Range<usize>, cols: Range<usize>, y: &mut [f32], arg: &mut [u32]) {
        let c = y.len();
        let arg = &mut arg[..c];
        let first = rows.start * w + cols.start;
        y.fill(f32::NEG_INFINITY);
        arg.fill(first as u32);
        for h in rows {
            for p in h * w + cols.start..h * w + cols.end {
                let x = &x[p * c..][..c];
                for ((&v, y), a) in x.iter().zip(y.iter_mut()).zip(arg.iter_mut()) {
                    let take = v > *y || v.is_nan();
                    *y = if take { v } else { *y };
                    *a = if take { p as u32 } else { *a };
                }
            }
        }
    }
}

multiversion! {
    fn gather(dy: &[f32], arg: &[u32], pixel: u32, dx: &mut [f32]) {
        for ((&d, &a), x) in dy.iter().zip(arg).zip(dx.iter_mut()) {
            *x += if a == pixel { d } else { 0.0 };
        }
    }
}

impl Op for MaxPool {
    op_common!("max_pool");

    fn reach(&self, _x: &[Spec]) -> super::Reach {
        let w = self.window;
        super::Reach::Window {
            size: [w.kernel; 2],
            stride: [w.stride; 2],
            pad: [w.pad; 2],
        }
    }

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        self.window.check(&x[0])?;
        let (n, c) = (x[0].shape[0], x[0].shape[3]);
        let (h, w) = (x[0].shape[1], x[0].shape[2]);
        let shape = [n, self.window.count(h), self.window.count(w), c];
        Ok(vec![Spec::f32(shape), Spec::u32(shape)])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let taps = (self.window.kernel * self.window.kernel) as u64;
        Cost {
            flops: taps * y[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn backward(&self, node: &Fwd, b: &mut Backward) -> Result<()> {
        let dy = b.need(node.outputs[0])?;
        let shape = b.graph.shape(node.inputs[0]);
        let op = MaxPoolBwd {
            window: self.window,
            h: shape[1],
            w: shape[2],
        };
        let dx = b.emit1(op, &[dy, node.outputs[1]])?;
        b.give(node.inputs[0], dx)
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let &[n, h, w, c] = &x[0].shape[..] else {
            unreachable!("the shape rule asks for four extents")
        };
        let (oh, ow) = (y[0].shape[1], y[0].shape[2]);
        let Window {
            kernel,
            stride,
            pad,
        } = self.window;
        for i in 0..n * oh * ow * c {
            let (b, o, q, k) = (i / c / ow / oh, i / c / ow % oh, i / c % ow, i % c);
            let (mut best, mut at) = (f64::NEG_INFINITY, None);
            for r in 0..kernel {
                for s in 0..kernel {
                    let (ih, iw) = (o * stride + r, q * stride + s);
                    if ih < pad || iw < pad || ih - pad >= h || iw - pad >= w {
                        continue;
                    }
                    let p = (ih - pad) * w + iw - pad;
                    let v = x[0].data[(b * h * w + p) * c + k];
                    if v > best || v.is_nan() || at.is_none() {
                        (best, at) = (v, Some(p));
                    }
                }
            }
            y[0].data[i] = best;
            y[1].data[i] = at.expect("every window holds a pixel") as f64;
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let window = self.window;
        let (h, w, c) = (cx.x[0].shape[1], cx.x[0].shape[2], cx.x[0].shape[3]);
        let (oh, ow) = (cx.y[0].shape[1], cx.y[0].shape[2]);
        Ok(Box::new(move |a| {
            let x = a.x(0);
            let arg = par::SharedMut::new(a.y(1));
            par::rows(a.y(0), ow * c, |first, y| {
                // SAFETY: the same stretch as `y`, which no other thread has.
                let arg = unsafe { arg.slice(first * ow * c, y.len()) };
                let arg: &mut [u32] = bytemuck::cast_slice_mut(arg);
                for (i, (y, arg)) in y.chunks_mut(c).zip(arg.chunks_mut(c)).enumerate() {
                    let (row, q) = (first + i / ow, i % ow);
                    let image = &x[row / oh * h * w * c..][..h * w * c];
                    let (rows, cols) = (window.pixels(row % oh, h), window.pixels(q, w));
                    pool_pixel(image, w, rows, cols, y, arg);
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (x, y) = (&cx.x[0].shape, &cx.y[0].shape);
        let (from, to) = (x[1..].iter().product(), y[1..].iter().product());
        let params = self.window.params([x[1], x[2], x[3]], [y[1], y[2]]);
        for cut in cx.cuts(x[0], &[from, to])? {
            let (y, arg) = (cut.of(Arg::Out(0), to), cut.of(Arg::Out(1), to));
            let args = [cut.of(Arg::In(0), from), y, arg];
            let n = cut.rows * to;
            cx.items(("pool.wgsl", "max_pool"), &[], n, &args, &params)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (x, y) = (&cx.x[0].shape, &cx.y[0].shape);
        let (pixels, windows) = ([x[1], x[2], x[3]], [y[1], y[2]]);
        let tensors = [Arg::In(0), Arg::Out(0), Arg::Out(1)];
        self.window.cuda(cx, "max_pool", pixels, windows, tensors)
    }
}

/// `dx[p] = sum of dy over the windows whose argmax is p`: a gather, so that overlapping windows need no atomics.
/// Operands: dy `[N, OH, OW, C]`, argmax. Result: dx `[N, h, w, C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MaxPoolBwd {
    /// The window.
    pub window: Window,
    /// Rows of the forward operand.
    pub h: usize,
    /// Columns of the forward operand.
    pub w: usize,
}

impl Op for MaxPoolBwd {
    op_common!("max_pool_bwd");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 2, "takes two operands");
        ensure!(
            x[0].shape == x[1].shape && x[0].shape.len() == 4,
            "has a gradient of shape {:?} for an argmax of {:?}",
            x[0].shape,
            x[1].shape
        );
        let dx = Spec::f32([x[0].shape[0], self.h, self.w, x[0].shape[3]]);
        self.window.check(&dx)?;
        let windows = [self.window.count(self.h), self.window.count(self.w)];
        ensure!(
            x[0].shape[1..3] == windows,
            "has a gradient of shape {:?} for {windows:?} windows",
            x[0].shape
        );
        Ok(vec![dx])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let c = x[0].channels();
        let windows = x[0].shape[1] * x[0].shape[2];
        for (i, (dy, at)) in x[0].data.iter().zip(&x[1].data).enumerate() {
            let image = i / c / windows * self.h * self.w;
            y[0].data[(image + *at as usize) * c + i % c] += dy;
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let MaxPoolBwd { window, h, w } = *self;
        let (oh, ow, c) = (cx.x[0].shape[1], cx.x[0].shape[2], cx.x[0].shape[3]);
        Ok(Box::new(move |a| {
            let (dy, arg) = (a.x(0), a.xu(1));
            par::rows(a.y(0), w * c, |first, dx| {
                for (i, dx) in dx.chunks_mut(c).enumerate() {
                    let (row, col) = (first + i / w, i % w);
                    let (image, row) = (row / h, row % h);
                    dx.fill(0.0);
                    for o in window.over(row, oh) {
                        for q in window.over(col, ow) {
                            let at = ((image * oh + o) * ow + q) * c;
                            gather(
                                &dy[at..at + c],
                                &arg[at..at + c],
                                (row * w + col) as u32,
                                dx,
                            );
                        }
                    }
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (dy, dx) = (&cx.x[0].shape, &cx.y[0].shape);
        let (from, to) = (dy[1..].iter().product(), dx[1..].iter().product());
        let params = self.window.params([dx[1], dx[2], dx[3]], [dy[1], dy[2]]);
        for cut in cx.cuts(dx[0], &[from, to])? {
            let (dy, arg) = (cut.of(Arg::In(0), from), cut.of(Arg::In(1), from));
            let args = [dy, cut.of(Arg::Out(0), to), arg];
            let n = cut.rows * to;
            cx.items(("pool.wgsl", "max_pool_bwd"), &[], n, &args, &params)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (dy, dx) = (&cx.x[0].shape, &cx.y[0].shape);
        let (pixels, windows) = ([dx[1], dx[2], dx[3]], [dy[1], dy[2]]);
        let tensors = [Arg::In(0), Arg::In(1), Arg::Out(0)];
        self.window
            .cuda(cx, "max_pool_bwd", pixels, windows, tensors)
    }
}

impl Graph {
    /// Max pooling of `[N, H, W, C]`.
    ///
    /// # Errors
    /// The window does not fit the image.
    pub fn max_pool(&mut self, x: Tid, kernel: usize, stride: usize, pad: usize) -> Result<Tid> {
        let window = Window {
            kernel,
            stride,
            pad,
        };
        self.push1(MaxPool { window }, &[x])
    }
}

/// The room of [`MaxPool`].
pub const ROOM: Room = Room {
    name: "max_pool",
    about: "maximum under each window, with its argmax; fill=ties and fill=nan show PyTorch's rules",
    case: |p| {
        let shape = [
            p.get("n", 2)?,
            p.get("h", 8)?,
            p.get("w", 8)?,
            p.get("c", 8)?,
        ];
        let kernel = p.get("k", 3)?;
        let window = Window {
            kernel,
            stride: p.get("s", 2)?,
            pad: p.get("p", kernel / 2)?,
        };
        let len = shape.iter().product::<usize>();
        let case = Case::new(MaxPool { window });
        let fixed = |case: Case, f: fn(usize) -> f32| {
            let values = (0..len).map(f).collect();
            case.fixed(Spec::f32(shape), Fill::F32(values))
                .forward_only()
        };
        Ok(match p.get("fill", "normal".to_string())?.as_str() {
            "ties" => fixed(case, |i| (i * 7 % 11 % 3) as f32),
            "nan" => fixed(case, |i| match i * 7 % 23 {
                0 => f32::NAN,
                1..12 => f32::NEG_INFINITY,
                v => v as f32,
            }),
            _ => {
                let mut case = case.x(&shape);
                // Shorter than the distance of the two largest values of any window.
                case.step = 1e-7;
                case
            }
        })
    },
    cases: &[
        "n=1,h=1,w=1,c=1,k=1,s=1",
        "n=1,h=1,w=1,c=3,k=3,s=2",
        "n=2,h=5,w=7,c=3,k=3,s=1",
        "n=1,h=9,w=8,c=5,k=2,s=3,p=0",
        "n=1,h=7,w=5,c=17,k=4,s=2",
        "n=2,h=6,w=7,c=5,fill=ties",
        "n=2,h=6,w=7,c=5,fill=nan",
        "n=1,h=6,w=6,c=1,k=2,s=1,p=1,fill=nan",
        "n=2,h=28,w=28,c=64",
    ],
    bench: &["n=16,h=112,w=112,c=64"],
    refused: &["k=3,p=2", "h=2,w=8,k=5,p=0", "k=0", "s=0"],
};
