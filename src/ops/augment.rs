//! Augmentation on the device: flips, crops with padding, rotations and translations as one affine resampling.

use super::{Case, Cost, Fill, Host, Op, Room, traffic};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::graph::{Graph, Spec, Tid};
use crate::{Error, Result, ensure, op_common};

/// Resamples each image along its own affine map: output pixel (x, y) takes the value at
/// `(m0 x + m1 y + m2, m3 x + m4 y + m5)` = (column, row) of the input, pixel centres at integers.
///
/// Nearest takes the pixel whose centre is nearest, halves to the even one as `torch.nn.functional.grid_sample` does
/// (PIL rounds them up). Bilinear weighs four pixels. A pixel outside the image has the value `fill`. Not
/// differentiated.
///
/// Operands: x `[N, H, W, C]`, matrix `[N, 6]`, fill `[C]`. Result: y `[N, H, W, C]`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AffineSample {
    /// Bilinear rather than nearest.
    pub bilinear: bool,
}

/// One image of `h` rows and `w` columns. Its methods are compiled for `C` channels, so that a pixel is moved without a
/// loop; 0 stands for any number.
struct Image<'a, const C: usize> {
    x: &'a [f32],
    fill: &'a [f32],
    h: usize,
    w: usize,
}

impl<const C: usize> Image<'_, C> {
    #[inline(always)]
    fn channels(&self) -> usize {
        if C == 0 { self.fill.len() } else { C }
    }

    /// The pixel at a whole column and row, or the fill.
    #[inline(always)]
    fn pixel(&self, col: f32, row: f32) -> &[f32] {
        let c = self.channels();
        // NaN fails every comparison.
        if col >= 0.0 && row >= 0.0 && col < self.w as f32 && row < self.h as f32 {
            &self.x[(row as usize * self.w + col as usize) * c..][..c]
        } else {
            &self.fill[..c]
        }
    }

    #[inline(always)]
    fn nearest(&self, col: f32, row: f32, y: &mut [f32]) {
        y.copy_from_slice(self.pixel(col.round_ties_even(), row.round_ties_even()));
    }

    #[inline(always)]
    fn bilinear(&self, col: f32, row: f32, y: &mut [f32]) {
        let (c0, r0) = (col.floor(), row.floor());
        let (u, v) = (col - c0, row - r0);
        let a = self.pixel(c0, r0);
        let b = self.pixel(c0 + 1.0, r0);
        let c = self.pixel(c0, r0 + 1.0);
        let d = self.pixel(c0 + 1.0, r0 + 1.0);
        let (wa, wb, wc, wd) = ((1.0 - u) * (1.0 - v), u * (1.0 - v), (1.0 - u) * v, u * v);
        for (i, y) in y.iter_mut().enumerate() {
            *y = wa * a[i] + wb * b[i] + wc * c[i] + wd * d[i];
        }
    }

    /// Row `from` (or none) moved by whole pixels: output column j takes column `first + j`, or `first - j` mirrored.
    fn shifted(&self, row: Option<usize>, first: i64, mirrored: bool, y: &mut [f32]) {
        let (c, w) = (self.channels(), self.w as i64);
        let fill = &self.fill[..c];
        let source = row.map(|r| &self.x[r * self.w * c..(r + 1) * self.w * c]);
        // Output columns [from, to) have a source.
        let (from, to) = match (source, mirrored) {
            (None, _) => (0, 0),
            (_, false) => (-first, w - first),
            (_, true) => (first - w + 1, first + 1),
        };
        let (from, to) = (from.clamp(0, w) as usize, to.clamp(0, w) as usize);
        let (from, to) = (from, to.max(from));
        for p in y[..from * c].chunks_exact_mut(c) {
            p.copy_from_slice(fill);
        }
        for p in y[to * c..].chunks_exact_mut(c) {
            p.copy_from_slice(fill);
        }
        let Some(source) = source.filter(|_| to > from) else {
            return;
        };
        let y = &mut y[from * c..to * c];
        if mirrored {
            let end = (first - from as i64 + 1) as usize * c;
            let pixels = source[end - y.len()..end].chunks_exact(c).rev();
            for (p, s) in y.chunks_exact_mut(c).zip(pixels) {
                p.copy_from_slice(s);
            }
        } else {
            let start = (first + from as i64) as usize * c;
            y.copy_from_slice(&source[start..start + y.len()]);
        }
    }

    /// Output row `row` along the map `m`.
    fn row(&self, m: &[f32], row: usize, bilinear: bool, y: &mut [f32]) {
        if let Some((mirrored, left, upside_down, top)) = whole_pixels(m) {
            let from = if upside_down {
                top - row as i64
            } else {
                top + row as i64
            };
            let from = (0..self.h as i64).contains(&from).then_some(from as usize);
            return self.shifted(from, left, mirrored, y);
        }
        let v = row as f32;
        for (j, y) in y.chunks_exact_mut(self.channels()).enumerate() {
            let u = j as f32;
            let (u, v) = (m[0] * u + m[1] * v + m[2], m[3] * u + m[4] * v + m[5]);
            if bilinear {
                self.bilinear(u, v, y);
            } else {
                self.nearest(u, v, y);
            }
        }
    }
}

/// For a map that only mirrors and moves by whole pixels: (column step, first column, row step, first row).
fn whole_pixels(m: &[f32]) -> Option<(bool, i64, bool, i64)> {
    let unit = |v: f32| (v.abs() == 1.0).then_some(v < 0.0);
    let whole = |v: f32| (v.fract() == 0.0 && v.abs() < 1e6).then_some(v as i64);
    if m[1] != 0.0 || m[3] != 0.0 {
        return None;
    }
    Some((unit(m[0])?, whole(m[2])?, unit(m[4])?, whole(m[5])?))
}

/// One image `[size, size, 3]` along one map, bilinear, as [`AffineSample`] resamples it.
pub(crate) fn resample(x: &[f32], fill: &[f32; 3], size: usize, map: &[f32; 6], y: &mut [f32]) {
    let image = Image::<3> {
        x,
        fill,
        h: size,
        w: size,
    };
    for (row, y) in y.chunks_exact_mut(size * 3).enumerate() {
        image.row(map, row, true, y);
    }
}

impl Op for AffineSample {
    op_common!("affine_sample");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 3, "takes three operands");
        let &[n, _, _, c] = &x[0].shape[..] else {
            return Err(format!("takes [N, H, W, C], got {:?}", x[0].shape));
        };
        ensure!(
            x[1].shape == [n, 6],
            "has {n} images and matrices {:?}",
            x[1].shape
        );
        ensure!(
            x[2].shape == [c],
            "has {c} channels and a fill of {:?}",
            x[2].shape
        );
        Ok(vec![x[0].clone()])
    }

    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let per = if self.bilinear { 8 } else { 1 };
        Cost {
            flops: per * x[0].len() as u64,
            bytes: traffic(x, y),
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let (h, w, c) = (x[0].shape[1], x[0].shape[2], x[0].shape[3]);
        for i in 0..y[0].data.len() {
            let (n, row, col, k) = (i / c / w / h, i / c / w % h, i / c % w, i % c);
            let m = x[1].row(n);
            let (u, v) = (col as f64, row as f64);
            let (u, v) = (m[0] * u + m[1] * v + m[2], m[3] * u + m[4] * v + m[5]);
            let at = |u: f64, v: f64| {
                if u >= 0.0 && v >= 0.0 && u < w as f64 && v < h as f64 {
                    x[0].data[((n * h + v as usize) * w + u as usize) * c + k]
                } else {
                    x[2].data[k]
                }
            };
            y[0].data[i] = if self.bilinear {
                let (u0, v0) = (u.floor(), v.floor());
                let (du, dv) = (u - u0, v - v0);
                (1.0 - dv) * ((1.0 - du) * at(u0, v0) + du * at(u0 + 1.0, v0))
                    + dv * ((1.0 - du) * at(u0, v0 + 1.0) + du * at(u0 + 1.0, v0 + 1.0))
            } else {
                at(u.round_ties_even(), v.round_ties_even())
            };
        }
    }

    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel> {
        let bilinear = self.bilinear;
        let shape = [cx.x[0].shape[1], cx.x[0].shape[2], cx.x[0].shape[3]];
        Ok(match shape[2] {
            1 => kernel::<1>(shape, bilinear),
            3 => kernel::<3>(shape, bilinear),
            _ => kernel::<0>(shape, bilinear),
        })
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let &[n, h, w, c] = &cx.x[0].shape[..] else {
            return Err(Error::run("affine_sample without four extents"));
        };
        let image = h * w * c;
        let bilinear = usize::from(self.bilinear);
        let params = [h, w, c, bilinear].map(|v| v as u32);
        for cut in cx.cuts(n, &[image, 6])? {
            let (x, y) = (cut.of(Arg::In(0), image), cut.of(Arg::Out(0), image));
            let args = [x, cut.of(Arg::In(1), 6), Arg::In(2), y];
            let n = cut.rows * image;
            cx.items(("augment.wgsl", "affine"), &[], n, &args, &params)?;
        }
        Ok(())
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let &[n, h, w, c] = &cx.x[0].shape[..] else {
            return Err(Error::run("affine_sample without four extents"));
        };
        let sizes = [h, w, c, usize::from(self.bilinear)].map(Arg::n);
        let tensors = [Arg::In(0), Arg::In(1), Arg::In(2), Arg::Out(0)];
        let args: Vec<Arg> = sizes.into_iter().chain(tensors).collect();
        cx.items(("augment.cu", "affine"), vec![], n * h * w, 256, &args)
    }
}

fn kernel<const C: usize>([h, w, c]: [usize; 3], bilinear: bool) -> CpuKernel {
    Box::new(move |a| {
        par::rows(a.y(0), w * c, |first, y| {
            for (i, y) in y.chunks_mut(w * c).enumerate() {
                let (n, row) = ((first + i) / h, (first + i) % h);
                let image = Image::<C> {
                    x: &a.x(0)[n * h * w * c..][..h * w * c],
                    fill: a.x(2),
                    h,
                    w,
                };
                image.row(&a.x(1)[n * 6..][..6], row, bilinear, y);
            }
        });
    })
}

impl Graph {
    /// Resamples images `[N, H, W, C]` along matrices `[N, 6]`, with `fill` `[C]` outside.
    ///
    /// # Errors
    /// The shapes do not fit.
    pub fn affine_sample(&mut self, x: Tid, matrix: Tid, fill: Tid, bilinear: bool) -> Result<Tid> {
        self.push1(AffineSample { bilinear }, &[x, matrix, fill])
    }
}

/// The room of [`AffineSample`].
pub const ROOM: Room = Room {
    name: "affine_sample",
    about: "flip, shift, rotation as one resampling; map=flip|shift|mixed|any",
    case: |p| {
        let shape = [
            p.get("n", 4)?,
            p.get("h", 9)?,
            p.get("w", 7)?,
            p.get("c", 3)?,
        ];
        let [n, h, w, c] = shape;
        let map = p.get("map", "any".to_string())?;
        let matrix = (0..n).flat_map(|i| {
            let t = i as f32;
            let right = w as f32 - 1.0;
            let kind = match map.as_str() {
                "flip" => 0,
                "shift" => 1,
                "mixed" => i % 4,
                _ => 3,
            };
            match kind {
                0 => [-1.0, 0.0, right, 0.0, 1.0, 0.0],
                1 => [1.0, 0.0, t - 2.0, 0.0, -1.0, h as f32 - 3.0 + t],
                2 => [-1.0, 0.0, right + 3.0 - 2.0 * t, 0.0, 1.0, t - 4.0],
                _ => {
                    let (s, k) = (0.3 + 0.37 * t).sin_cos();
                    [
                        k,
                        -s,
                        0.31 + 0.2 * t + s * h as f32 / 2.0,
                        s,
                        k,
                        0.17 - 0.4 * t,
                    ]
                }
            }
        });
        let matrix = Fill::F32(matrix.collect());
        Ok(Case::new(AffineSample {
            bilinear: p.flag("bilinear")?,
        })
        .x(&shape)
        .fixed(Spec::f32([n, 6]), matrix)
        .fixed(Spec::f32([c]), Fill::Normal(1.0))
        .forward_only())
    },
    cases: &[
        "n=1,h=1,w=1,c=1",
        "n=3,h=5,w=4,c=1,map=flip",
        "n=9,h=6,w=5,c=3,map=shift",
        "n=9,h=6,w=5,c=3,map=shift,bilinear=1",
        "n=12,h=7,w=9,c=5,map=mixed",
        "n=12,h=7,w=9,c=5,map=mixed,bilinear=1",
        "n=6,h=17,w=13,c=17,bilinear=1",
        "n=16,h=32,w=32,c=3,map=mixed,bilinear=1",
        "n=16,h=32,w=32,c=3",
    ],
    bench: &[
        "n=128,h=32,w=32,c=3,bilinear=1",
        "n=128,h=32,w=32,c=3",
        "n=128,h=32,w=32,c=3,map=flip",
    ],
    refused: &[],
};
