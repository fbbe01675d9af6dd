//! The weight gradient.

use super::blocks::{Blocks, Filter, Window, trim};
use super::winograd::Winograd;
use crate::backend::cpu::kernel::{Kernels, MAX_MR, MAX_NR, Outer};
use crate::backend::cpu::parallel::{Shared, parallel_for, part};
use crate::backend::cpu::scratch::{with_floats, with_indices};
use crate::backend::cpu::{Finish, RawEpilogue};
use crate::ops::conv2d::{ConvShape, Pass};
use std::ops::Range;

/// Weights up to this size (floats) are summed in partial copies by wgrad.
pub(super) const PARTIAL_FLOATS: usize = 64 * 1024;
/// Pixels of a block when large weights are summed.
const PACKED_PIXELS: usize = 1024;
/// Partial copies of dW, at most.
const PARTIALS: usize = 16;

pub(super) fn wgrad_with(
    kernels: &'static Kernels,
    full: &ConvShape,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    accumulate: bool,
) {
    let (s, filter) = &trim(full);
    let total = full.weight_len();
    if total == 0 {
        return;
    }
    if s.output_len() == 0 {
        if !accumulate {
            dw[..total].fill(0.0);
        }
        return;
    }
    if let Some(job) = Winograd::chosen(kernels, full, Pass::Wgrad) {
        return job.wgrad(x, dy, dw, accumulate);
    }
    let trimmed = s.weight_len() < total;
    if trimmed && !accumulate {
        dw[..total].fill(0.0);
    }
    if total > PARTIAL_FLOATS && s.groups == 1 {
        return wgrad_packed(kernels, s, filter, x, dy, dw, accumulate);
    }
    let [sh, sw] = s.stride;
    let width = (s.wo - 1) * sw + s.s;
    let blocks = Blocks::new(s.n, s.ho, s.wo, sh * width * s.c + s.wo * s.k);
    let partials = if total <= PARTIAL_FLOATS {
        blocks.count().min(PARTIALS)
    } else {
        1
    };
    // Kernel rows and parts of K, so that there is work for every thread.
    let threads = rayon::current_num_threads();
    let k_parts = (4 * threads)
        .div_ceil(partials * s.r)
        .clamp(1, s.kg().div_ceil(2 * kernels.mr()));
    let owners = if partials >= 4 * threads {
        1
    } else {
        s.r * k_parts
    };
    let run = |out: Shared, accumulate: bool| {
        parallel_for(partials * owners, |task| {
            let (partial, owner) = (task / owners, task % owners);
            let job = Wgrad {
                kernels,
                s,
                filter,
                x,
                dy,
                // SAFETY: `out` holds `partials` copies of dw; this task alone writes its part of this one.
                dw: unsafe { out.get().add(partial * total) },
                r: if owners == 1 {
                    0..s.r
                } else {
                    owner / k_parts..owner / k_parts + 1
                },
                k: if owners == 1 {
                    0..s.kg()
                } else {
                    part(s.kg(), k_parts, owner % k_parts)
                },
            };
            let mine = part(blocks.count(), partials, partial);
            for b in mine.clone() {
                let (images, rows) = blocks.get(b);
                job.block(images, rows, accumulate || b > mine.start);
            }
        });
    };
    if partials == 1 {
        return run(Shared::new(dw), accumulate);
    }
    with_floats(partials * total, |sums| {
        if trimmed {
            sums.fill(0.0);
        }
        run(Shared::new(sums), false);
        let out = Shared::new(dw);
        let pieces = total.div_ceil(4096);
        parallel_for(pieces, |i| {
            let range = part(total, pieces, i);
            // SAFETY: this task alone writes this range.
            let out =
                unsafe { std::slice::from_raw_parts_mut(out.get().add(range.start), range.len()) };
            if !accumulate {
                out.fill(0.0);
            }
            for p in 0..partials {
                let sums = &sums[p * total..][range.clone()];
                out.iter_mut().zip(sums).for_each(|(o, v)| *o += v);
            }
        });
    });
}

/// The part of dW that one task computes: kernel rows `r` and output channels `k` (of each group).
struct Wgrad<'a> {
    kernels: &'static Kernels,
    s: &'a ConvShape,
    filter: &'a Filter,
    x: &'a [f32],
    dy: &'a [f32],
    dw: *mut f32,
    r: Range<usize>,
    k: Range<usize>,
}

impl Wgrad<'_> {
    /// Adds (or stores) the products over the pixels of one block.
    fn block(&self, images: Range<usize>, rows: Range<usize>, accumulate: bool) {
        let s = self.s;
        let [sh, sw] = s.stride;
        let (cg, kg) = (s.cg(), s.kg());
        let window = Window {
            h0: (rows.start * sh + self.r.start) as isize - s.pad[0] as isize,
            w0: -(s.pad[1] as isize),
            height: (rows.len() - 1) * sh + self.r.len(),
            width: (s.wo - 1) * sw + s.s,
        };
        let pixels = images.len() * rows.len() * s.wo;
        // The kernels load whole registers, so the last pixel may be read beyond its end.
        with_floats(window.len(images.len(), s.c) + MAX_NR, |b| {
            with_indices(pixels, |b_row| {
                window.copy(self.x, [s.h, s.w, s.c], images.clone(), b);
                let mut q = 0;
                for i in 0..images.len() {
                    for row in 0..rows.len() {
                        let at = (i * window.height + row * sh) * window.width;
                        for col in 0..s.wo {
                            b_row[q] = (at + col * sw) * s.c;
                            q += 1;
                        }
                    }
                }
                let pixel = (images.start * s.ho + rows.start) * s.wo;
                // With one group the columns (s, c) under a kernel row are contiguous.
                let (taps, n) = if s.groups == 1 {
                    (1, s.s * s.c)
                } else {
                    (s.s, cg)
                };
                for g in 0..s.groups {
                    for (row, r) in self.r.clone().enumerate() {
                        for tap in 0..taps {
                            let b_at = (row * window.width + tap) * s.c + g * cg;
                            let dw_at = self.filter.tap(g * kg, r, tap);
                            self.product(
                                &b[b_at..],
                                b_row,
                                n,
                                pixel * s.k + g * kg,
                                dw_at,
                                accumulate,
                            );
                        }
                    }
                }
            });
        });
    }

    /// `dw[dw_at + k * R * S * Cg + j] (+)= sum over pixels of dy[dy_at + pixel * K + k] * b[b_row[pixel] + j]`.
    fn product(
        &self,
        b: &[f32],
        b_row: &[usize],
        n: usize,
        dy_at: usize,
        dw_at: usize,
        accumulate: bool,
    ) {
        let s = self.s;
        let dw_step = self.filter.k_step;
        let mut tile = [0.0f32; MAX_MR * MAX_NR];
        let tiles = self.k.len().div_ceil(self.kernels.mr());
        let mut j = 0;
        while j < n {
            let nr = self.kernels.panel(n, j);
            for t in 0..tiles {
                let ks = part(self.k.len(), tiles, t);
                let k = self.k.start + ks.start;
                let a = self.dy[dy_at + k..].as_ptr();
                let args = Outer {
                    a,
                    a_step: s.k,
                    b: b[j..].as_ptr(),
                    b_row,
                    out: tile.as_mut_ptr(),
                };
                // SAFETY: dy covers these pixels and channels, the window these receptive fields and MAX_NR more.
                unsafe { self.kernels.outer(ks.len(), nr, &args) }
                let row: [usize; MAX_MR] = std::array::from_fn(|i| dw_at + (k + i) * dw_step);
                let args = Finish {
                    tile: tile.as_ptr(),
                    nr,
                    row: &row[..ks.len()],
                    col: j,
                    cols: nr.min(n - j),
                    c: self.dw,
                    accumulate,
                    ep: RawEpilogue::PLAIN,
                };
                // SAFETY: this task alone writes these rows of dw.
                unsafe { self.kernels.finish(&args) }
            }
            j += nr;
        }
    }
}

/// wgrad of large weights as a packed GEMM, `dW[k, (r, s, c)] = dY^T patches`, for one group.
///
/// Pixels are taken in blocks of whole output rows. `dY` is packed once per block; a task gathers one panel of patch
/// columns, which stays in L2, and multiplies it with all of `dY`.
fn wgrad_packed(
    kernels: &'static Kernels,
    s: &ConvShape,
    filter: &Filter,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    accumulate: bool,
) {
    let rows = s.n * s.ho;
    let blocks = rows.div_ceil((PACKED_PIXELS / s.wo).max(1));
    let row_cols = s.s * s.c;
    let panels = row_cols.div_ceil(kernels.nr());
    let tiles = s.k.div_ceil(kernels.mr());
    let most = rows.div_ceil(blocks) * s.wo;
    let out = Shared::new(dw);
    with_floats(most * s.k, |packed| {
        for block in 0..blocks {
            let rows = part(rows, blocks, block);
            let pixels = rows.len() * s.wo;
            let dy = &dy[rows.start * s.wo * s.k..rows.end * s.wo * s.k];
            let a = Shared::new(packed);
            parallel_for(tiles, |t| {
                let ks = part(s.k, tiles, t);
                // SAFETY: this task alone writes this tile.
                let a = unsafe {
                    std::slice::from_raw_parts_mut(
                        a.get().add(ks.start * pixels),
                        ks.len() * pixels,
                    )
                };
                for (line, dy) in a.chunks_exact_mut(ks.len()).zip(dy.chunks_exact(s.k)) {
                    line.copy_from_slice(&dy[ks.clone()]);
                }
            });
            let a = &packed[..];
            parallel_for(s.r * panels, |task| {
                let (r, j) = (task / panels, task % panels * kernels.nr());
                let nr = kernels.panel(row_cols, j);
                let cols = nr.min(row_cols - j);
                with_floats(pixels * nr, |b| {
                    with_indices(pixels, |b_row| {
                        b_row.iter_mut().enumerate().for_each(|(i, v)| *v = i * nr);
                        gather(s, x, rows.clone(), r, j..j + cols, nr, b);
                        let mut tile = [0.0f32; MAX_MR * MAX_NR];
                        for t in 0..tiles {
                            let ks = part(s.k, tiles, t);
                            let args = Outer {
                                a: a[ks.start * pixels..].as_ptr(),
                                a_step: ks.len(),
                                b: b.as_ptr(),
                                b_row,
                                out: tile.as_mut_ptr(),
                            };
                            // SAFETY: both operands hold `pixels` lines.
                            unsafe { kernels.outer(ks.len(), nr, &args) }
                            let row: [usize; MAX_MR] =
                                std::array::from_fn(|i| filter.tap(ks.start + i, r, 0));
                            let args = Finish {
                                tile: tile.as_ptr(),
                                nr,
                                row: &row[..ks.len()],
                                col: j,
                                cols,
                                c: out.get(),
                                accumulate: accumulate || block > 0,
                                ep: RawEpilogue::PLAIN,
                            };
                            // SAFETY: this task alone writes these columns of dw.
                            unsafe { kernels.finish(&args) }
                        }
                    });
                });
            });
        }
    });
}

/// Columns `cols` of (s, c) under kernel row `r`, for every pixel of the output rows `rows` (counted over the batch),
/// as lines of `nr` floats; zeros in the padding and beyond the columns.
fn gather(
    s: &ConvShape,
    x: &[f32],
    rows: Range<usize>,
    r: usize,
    cols: Range<usize>,
    nr: usize,
    out: &mut [f32],
) {
    if cols.len() < nr {
        out.chunks_exact_mut(nr)
            .for_each(|line| line[cols.len()..].fill(0.0));
    }
    let [sh, sw] = s.stride;
    for (lines, row) in out.chunks_exact_mut(s.wo * nr).zip(rows) {
        let h = (row % s.ho * sh + r)
            .checked_sub(s.pad[0])
            .filter(|&h| h < s.h);
        // Tap by tap: channels `c` of tap `t` go to columns `at` of the panel.
        let mut col = cols.start;
        while col < cols.end {
            let (t, at) = (col / s.c, col - cols.start);
            let c = col - t * s.c..s.c.min(cols.end - t * s.c);
            col += c.len();
            // Output columns whose tap lies inside the image.
            let (lo, hi) = match h {
                None => (s.wo, s.wo),
                Some(_) => {
                    let lo = s.pad[1].saturating_sub(t).div_ceil(sw).min(s.wo);
                    (
                        lo,
                        (s.w + s.pad[1])
                            .saturating_sub(t)
                            .div_ceil(sw)
                            .clamp(lo, s.wo),
                    )
                }
            };
            let outside = lines
                .chunks_exact_mut(nr)
                .enumerate()
                .filter(|(i, _)| *i < lo || *i >= hi);
            outside.for_each(|(_, line)| line[at..at + c.len()].fill(0.0));
            if lo < hi {
                let start = ((row / s.ho * s.h + h.unwrap_or(0)) * s.w + lo * sw + t - s.pad[1])
                    * s.c
                    + c.start;
                let source = x[start..].chunks(sw * s.c);
                for (line, source) in lines[lo * nr..hi * nr].chunks_exact_mut(nr).zip(source) {
                    let line = &mut line[at..at + c.len()];
                    // The usual case with its length as a constant.
                    if c.len() == 32 {
                        line.copy_from_slice(&source[..32])
                    } else {
                        line.copy_from_slice(&source[..c.len()])
                    }
                }
            }
        }
    }
}
