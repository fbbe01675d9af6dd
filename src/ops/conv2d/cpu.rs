//! Convolution on the CPU as an implicit GEMM: no patch matrix is ever built.
//!
//! Activations `[N, H, W, C]`, weights `[K, R, S, C / groups]`. A task takes a block of output pixels (rows of one
//! image, or several small images) and copies the input it needs, with zero padding, into scratch that fits in L2.
//! There the S * C values under a kernel row are contiguous, so the register kernels of [`crate::backend::cpu`]
//! read pixels in place through one offset per pixel and one per kernel row.
//!
//! - fprop: pixels times packed weights.
//! - dgrad: for each phase of the stride, a stride-1 convolution of dY with the flipped taps of that phase.
//! - wgrad: per kernel row, `dY^T X` over the pixels of a block. Small weights: fixed groups of blocks have partial
//!   sums that are added in order; large weights: tasks own parts of dW.
//!
//! Nothing depends on the number of threads but which thread does what, so the bits do not either.

use super::shape::ConvShape;
use crate::backend::cpu::gemm::{Mat, column_sums, gemm};
use crate::backend::cpu::kernel::{Kernels, MAX_MR, MAX_NR, Outer, Rows, kernels};
use crate::backend::cpu::pack::{pack_panel_cols, pack_panel_rows, packed_len};
use crate::backend::cpu::parallel::{Shared, parallel_for, part};
use crate::backend::cpu::scratch::{with_floats, with_indices};
use crate::backend::cpu::{Activation, Epilogue, Finish, RawEpilogue};
use std::ops::Range;

/// Floats of padded input that a block should stay below, to fit in L2.
const BLOCK_FLOATS: usize = 64 * 1024;
/// Pixels that a block should have, to make use of each packed weight.
const BLOCK_PIXELS: usize = 96;
/// Weights up to this size (floats) are summed in partial copies by wgrad.
const PARTIAL_FLOATS: usize = 64 * 1024;
/// Partial copies of dW, at most.
const PARTIALS: usize = 16;

/// Weights `[K, R, S, C / groups]` packed once for [`fprop_packed`], for inference.
pub struct PackedFilter {
    kernels: &'static Kernels,
    data: Vec<f32>,
}

impl PackedFilter {
    /// Packs `w` for convolutions of this shape (any N, H, W).
    pub fn new(shape: &ConvShape, w: &[f32]) -> Self {
        let kernels = kernels();
        let mut data = vec![0.0; fprop_packed_len(kernels, shape)];
        pack_fprop(kernels, shape, w, &mut data);
        PackedFilter { kernels, data }
    }
}

/// `y = relu?(conv(x, w) + bias + residual)`; `bias` is `[K]`, `residual` is laid out as `y`.
///
/// # Panics
/// When a slice does not have the size that `shape` gives: the graph checks shapes before anything runs.
pub fn fprop(
    shape: &ConvShape,
    x: &[f32],
    w: &[f32],
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    relu: bool,
    y: &mut [f32],
) {
    check_len("w", w, shape.weight_len());
    if shape.is_matrix_product() {
        let [m, k, n] = [shape.n * shape.h * shape.w, shape.c, shape.k];
        check_len("x", x, shape.input_len());
        return gemm(
            m,
            n,
            k,
            Mat::new(x, k),
            Mat::transposed(w, k),
            y,
            n,
            false,
            epilogue(bias, residual, relu),
        );
    }
    let kernels = kernels();
    with_floats(fprop_packed_len(kernels, shape), |packed| {
        pack_fprop(kernels, shape, w, packed);
        fprop_with(kernels, shape, x, packed, epilogue(bias, residual, relu), y);
    });
}

/// [`fprop`] with weights packed before.
pub fn fprop_packed(
    shape: &ConvShape,
    x: &[f32],
    w: &PackedFilter,
    bias: Option<&[f32]>,
    residual: Option<&[f32]>,
    relu: bool,
    y: &mut [f32],
) {
    check_len("packed w", &w.data, fprop_packed_len(w.kernels, shape));
    fprop_with(
        w.kernels,
        shape,
        x,
        &w.data,
        epilogue(bias, residual, relu),
        y,
    );
}

/// `dx = conv^T(dy, w) + addend`; `addend` is laid out as `dx`.
///
/// # Panics
/// As [`fprop`].
pub fn dgrad(shape: &ConvShape, dy: &[f32], w: &[f32], addend: Option<&[f32]>, dx: &mut [f32]) {
    check_len("w", w, shape.weight_len());
    if shape.is_matrix_product() {
        let [m, n, k] = [shape.n * shape.h * shape.w, shape.c, shape.k];
        check_len("dy", dy, shape.output_len());
        let ep = Epilogue {
            addend,
            ..Default::default()
        };
        return gemm(m, n, k, Mat::new(dy, k), Mat::new(w, n), dx, n, false, ep);
    }
    dgrad_with(kernels(), shape, dy, w, addend, dx);
}

/// `dw = x^T dy` over all pixels, added to what `dw` holds if `accumulate`.
///
/// # Panics
/// As [`fprop`].
pub fn wgrad(shape: &ConvShape, x: &[f32], dy: &[f32], dw: &mut [f32], accumulate: bool) {
    check_len("x", x, shape.input_len());
    check_len("dy", dy, shape.output_len());
    check_len("dw", dw, shape.weight_len());
    if shape.is_matrix_product() && shape.weight_len() > PARTIAL_FLOATS {
        let [m, n, k] = [shape.k, shape.c, shape.n * shape.h * shape.w];
        return gemm(
            m,
            n,
            k,
            Mat::transposed(dy, m),
            Mat::new(x, n),
            dw,
            n,
            accumulate,
            Epilogue::default(),
        );
    }
    wgrad_with(kernels(), shape, x, dy, dw, accumulate);
}

/// `dbias[K]` = sum of `dy` over pixels, added to what `dbias` holds if `accumulate`.
pub fn bias_grad(shape: &ConvShape, dy: &[f32], dbias: &mut [f32], accumulate: bool) {
    column_sums(
        shape.n * shape.ho * shape.wo,
        shape.k,
        dy,
        dbias,
        accumulate,
    );
}

fn epilogue<'a>(bias: Option<&'a [f32]>, addend: Option<&'a [f32]>, relu: bool) -> Epilogue<'a> {
    let activation = if relu {
        Activation::Relu
    } else {
        Activation::None
    };
    Epilogue {
        bias,
        addend,
        activation,
        preact: None,
    }
}

fn check_len(name: &str, s: &[f32], want: usize) {
    assert!(
        s.len() >= want,
        "conv2d: {name} holds {} floats, the shape needs {want}",
        s.len()
    );
}

/// How the pixels of a batch are cut into blocks: rows of one image, or whole images.
#[derive(Clone, Copy)]
struct Blocks {
    images: usize,
    rows: usize,
    images_per: usize,
    rows_per: usize,
}

impl Blocks {
    /// For `rows` rows of `cols` pixels per image, where a row of pixels brings `row_floats` of scratch.
    fn new(images: usize, rows: usize, cols: usize, row_floats: usize) -> Self {
        let fit = (BLOCK_FLOATS / row_floats.max(1)).max(1);
        if fit >= rows {
            let wanted = BLOCK_PIXELS.div_ceil((rows * cols).max(1));
            let images_per = wanted.min(fit / rows.max(1)).clamp(1, images.max(1));
            return Blocks {
                images,
                rows,
                images_per,
                rows_per: rows,
            };
        }
        let wanted = BLOCK_PIXELS.div_ceil(cols);
        let parts = rows.div_ceil(fit.max(wanted).min(rows));
        Blocks {
            images,
            rows,
            images_per: 1,
            rows_per: rows.div_ceil(parts),
        }
    }

    fn row_parts(&self) -> usize {
        self.rows.div_ceil(self.rows_per)
    }

    fn count(&self) -> usize {
        self.images.div_ceil(self.images_per) * self.row_parts()
    }

    /// Images and rows of block `i`.
    fn get(&self, i: usize) -> (Range<usize>, Range<usize>) {
        let (group, rows) = (i / self.row_parts(), i % self.row_parts());
        let images = group * self.images_per..((group + 1) * self.images_per).min(self.images);
        let rows = rows * self.rows_per..((rows + 1) * self.rows_per).min(self.rows);
        (images, rows)
    }
}

/// A window of `[images, height, width, c]` copied with zeros around it: rows `h0 ..` and columns `w0 ..`, which may
/// lie outside the image.
struct Window {
    h0: isize,
    w0: isize,
    height: usize,
    width: usize,
}

impl Window {
    fn len(&self, images: usize, c: usize) -> usize {
        images * self.height * self.width * c
    }

    /// Copies the window of `images` from `x[_, h, w, c]` to `out`.
    fn copy(&self, x: &[f32], [h, w, c]: [usize; 3], images: Range<usize>, out: &mut [f32]) {
        let left = (-self.w0).clamp(0, self.width as isize) as usize;
        let from = self.w0.max(0) as usize;
        let cols = (self.width - left).min(w.saturating_sub(from));
        let line = self.width * c;
        for (i, out) in out[..self.len(images.len(), c)]
            .chunks_exact_mut(line.max(1))
            .enumerate()
        {
            let (image, row) = (
                images.start + i / self.height,
                self.h0 + (i % self.height) as isize,
            );
            if row < 0 || row >= h as isize {
                out.fill(0.0);
                continue;
            }
            out[..left * c].fill(0.0);
            let source = ((image * h + row as usize) * w + from) * c;
            if cols > 0 {
                out[left * c..(left + cols) * c].copy_from_slice(&x[source..source + cols * c]);
            }
            out[(left + cols) * c..].fill(0.0);
        }
    }
}

/// An implicit GEMM over the pixels of a block: `C[pixel, n] = sum over (seg, k)`.
struct Tiles<'a> {
    kernels: &'static Kernels,
    a: &'a [f32],
    /// Offset in `a` of each pixel's first value, and in C of its row.
    a_row: &'a [usize],
    c_row: &'a [usize],
    seg_a: &'a [usize],
    len: usize,
    /// Packed weights of `seg_a.len() * len` rows and `n` columns.
    b: &'a [f32],
    n: usize,
    c: Shared,
    /// Column of C where the `n` columns begin.
    col: usize,
    ep: RawEpilogue,
}

impl Tiles<'_> {
    fn run(&self, panels: Range<usize>) {
        let mut tile = [0.0f32; MAX_MR * MAX_NR];
        let depth = self.seg_a.len() * self.len;
        let pixels = self.a_row.len();
        let tiles = pixels.div_ceil(self.kernels.mr());
        with_indices(self.seg_a.len(), |seg_b| {
            for p in panels {
                let j = p * self.kernels.nr();
                let nr = self.kernels.panel(self.n, j);
                seg_b
                    .iter_mut()
                    .enumerate()
                    .for_each(|(i, s)| *s = i * self.len * nr);
                for t in 0..tiles {
                    let rows = part(pixels, tiles, t);
                    let args = Rows {
                        a: self.a.as_ptr(),
                        row: &self.a_row[rows.clone()],
                        seg_a: self.seg_a,
                        seg_b,
                        len: self.len,
                        b: self.b[j * depth..].as_ptr(),
                        out: tile.as_mut_ptr(),
                    };
                    // SAFETY: the window holds every value under every pixel's receptive field.
                    unsafe { self.kernels.rows(nr, &args) }
                    let args = Finish {
                        tile: tile.as_ptr(),
                        nr,
                        row: &self.c_row[rows],
                        col: self.col + j,
                        cols: nr.min(self.n - j),
                        c: self.c.get(),
                        accumulate: false,
                        ep: self.ep,
                    };
                    // SAFETY: sizes were checked on entry; this task alone writes these pixels and columns.
                    unsafe { self.kernels.finish(&args) }
                }
            }
        });
    }
}

/// How many ways to cut the panels, so that there is work for every thread.
fn panel_parts(blocks: usize, panels: usize) -> usize {
    let threads = rayon::current_num_threads();
    if threads == 1 {
        1
    } else {
        (4 * threads).div_ceil(blocks.max(1)).clamp(1, panels)
    }
}

/// Offsets of the parts under the kernel that are contiguous in a window: kernel rows, or taps if there are groups.
fn segments(seg: &mut [usize], [r, s]: [usize; 2], width: usize, c: usize, groups: usize) {
    for (i, v) in seg.iter_mut().enumerate() {
        *v = if groups == 1 {
            i * width * c
        } else {
            (i / s * width + i % s) * c
        };
    }
    debug_assert_eq!(seg.len(), if groups == 1 { r } else { r * s });
}

fn fprop_packed_len(kernels: &Kernels, s: &ConvShape) -> usize {
    s.groups * packed_len(kernels, s.r * s.s * s.cg(), s.kg())
}

fn pack_fprop(kernels: &'static Kernels, s: &ConvShape, w: &[f32], out: &mut [f32]) {
    let (kg, depth) = (s.kg(), s.r * s.s * s.cg());
    let panels = kg.div_ceil(kernels.nr());
    let group_len = packed_len(kernels, depth, kg);
    let shared = Shared::new(out);
    parallel_for(s.groups * panels, |i| {
        let (g, j) = (i / panels, i % panels * kernels.nr());
        let nr = kernels.panel(kg, j);
        // SAFETY: this task alone writes this panel.
        let out = unsafe {
            std::slice::from_raw_parts_mut(shared.get().add(g * group_len + j * depth), depth * nr)
        };
        pack_panel_cols(out, &w[g * kg * depth..], depth, j, kg, nr);
    });
}

fn fprop_with(
    kernels: &'static Kernels,
    s: &ConvShape,
    x: &[f32],
    packed: &[f32],
    ep: Epilogue,
    y: &mut [f32],
) {
    check_len("x", x, s.input_len());
    check_len("y", y, s.output_len());
    assert!(
        ep.bias.is_none_or(|b| b.len() >= s.k),
        "conv2d: the bias is shorter than {}",
        s.k
    );
    assert!(
        ep.addend.is_none_or(|a| a.len() >= s.output_len()),
        "conv2d: the residual is smaller than y"
    );
    if s.output_len() == 0 {
        return;
    }
    let ep = RawEpilogue::new(ep);
    let [sh, sw] = s.stride;
    let (cg, kg) = (s.cg(), s.kg());
    let width = (s.wo - 1) * sw + s.s;
    let blocks = Blocks::new(s.n, s.ho, s.wo, sh * width * s.c);
    let panels = kg.div_ceil(kernels.nr());
    let parts = panel_parts(blocks.count() * s.groups, panels);
    let segs = if s.groups == 1 { s.r } else { s.r * s.s };
    let group_len = packed_len(kernels, s.r * s.s * cg, kg);
    let c = Shared::new(y);
    parallel_for(blocks.count() * parts, |task| {
        let (images, rows) = blocks.get(task / parts);
        let window = Window {
            h0: (rows.start * sh) as isize - s.pad[0] as isize,
            w0: -(s.pad[1] as isize),
            height: (rows.len() - 1) * sh + s.r,
            width,
        };
        let pixels = images.len() * rows.len() * s.wo;
        with_floats(window.len(images.len(), s.c), |a| {
            with_indices(2 * pixels + segs, |indices| {
                let (seg_a, indices) = indices.split_at_mut(segs);
                let (a_row, c_row) = indices.split_at_mut(pixels);
                window.copy(x, [s.h, s.w, s.c], images.clone(), a);
                segments(seg_a, [s.r, s.s], width, s.c, s.groups);
                let mut q = 0;
                for i in 0..images.len() {
                    for row in 0..rows.len() {
                        let a0 = (i * window.height + row * sh) * width * s.c;
                        let c0 = (((images.start + i) * s.ho) + rows.start + row) * s.wo * s.k;
                        for col in 0..s.wo {
                            (a_row[q], c_row[q]) = (a0 + col * sw * s.c, c0 + col * s.k);
                            q += 1;
                        }
                    }
                }
                for g in 0..s.groups {
                    let tiles = Tiles {
                        kernels,
                        a: &a[g * cg..],
                        a_row,
                        c_row,
                        seg_a,
                        len: if s.groups == 1 { s.s * s.c } else { cg },
                        b: &packed[g * group_len..],
                        n: kg,
                        c,
                        col: g * kg,
                        ep,
                    };
                    tiles.run(part(panels, parts, task % parts));
                }
            });
        });
    });
}

/// The taps of a kernel dimension that reach inputs of phase `f` (`input + pad = f mod stride`): `f, f + stride, ...`
fn phase_taps(size: usize, stride: usize, f: usize) -> usize {
    size.saturating_sub(f).div_ceil(stride)
}

fn dgrad_with(
    kernels: &'static Kernels,
    s: &ConvShape,
    dy: &[f32],
    w: &[f32],
    addend: Option<&[f32]>,
    dx: &mut [f32],
) {
    check_len("dy", dy, s.output_len());
    check_len("dx", dx, s.input_len());
    assert!(
        addend.is_none_or(|a| a.len() >= s.input_len()),
        "conv2d: the addend is smaller than dx"
    );
    if s.input_len() == 0 {
        return;
    }
    let ep = RawEpilogue::new(Epilogue {
        addend,
        ..Default::default()
    });
    let [sh, sw] = s.stride;
    let (cg, kg) = (s.cg(), s.kg());
    let panels = cg.div_ceil(kernels.nr());
    let n_padded = cg.next_multiple_of(kernels.lanes);
    let group_len = s.r * s.s * kg * n_padded;
    // Input row h = f + sh t - pad, of phase f, gets dy[t - j] through tap f + sh j. The packed weights hold the
    // phases one after another, each [(taps of h), (taps of w), K] with the taps flipped.
    let phases = sh * sw;
    let phase_size = |p: usize| [phase_taps(s.r, sh, p / sw), phase_taps(s.s, sw, p % sw)];
    let phase_at = |p: usize| {
        (0..p)
            .map(|q| phase_size(q).iter().product::<usize>())
            .sum::<usize>()
            * kg
    };
    let [th, tw] =
        [0, 1].map(|d| s.pad[d] / s.stride[d]..([s.h, s.w][d] - 1 + s.pad[d]) / s.stride[d] + 1);
    let [most_r, most_s] = [s.r.div_ceil(sh), s.s.div_ceil(sw)];
    let width = tw.len() + most_s - 1;
    let blocks = Blocks::new(s.n, th.len(), tw.len(), width * s.k);
    let parts = panel_parts(blocks.count() * s.groups, panels);
    let c = Shared::new(dx);
    with_floats(s.groups * group_len, |packed| {
        let shared = Shared::new(packed);
        parallel_for(s.groups * phases * panels, |i| {
            let (g, p, j) = (
                i / (phases * panels),
                i / panels % phases,
                i % panels * kernels.nr(),
            );
            let [pr, ps] = phase_size(p);
            let (nr, depth) = (kernels.panel(cg, j), pr * ps * kg);
            let at = g * group_len + phase_at(p) * n_padded + j * depth;
            // SAFETY: this task alone writes this panel.
            let out = unsafe { std::slice::from_raw_parts_mut(shared.get().add(at), depth * nr) };
            pack_panel_rows(out, j, cg, nr, |row| {
                let (tap, k) = (row / kg, row % kg);
                let r = p / sw + sh * (pr - 1 - tap / ps);
                let ss = p % sw + sw * (ps - 1 - tap % ps);
                &w[(((g * kg + k) * s.r + r) * s.s + ss) * cg..][..cg]
            });
        });
        let packed = &*packed;
        parallel_for(blocks.count() * parts, |task| {
            let (images, rows) = blocks.get(task / parts);
            let window = Window {
                h0: (th.start + rows.start) as isize - (most_r - 1) as isize,
                w0: tw.start as isize - (most_s - 1) as isize,
                height: rows.len() + most_r - 1,
                width,
            };
            let most = images.len() * rows.len() * tw.len();
            with_floats(window.len(images.len(), s.k), |a| {
                with_indices(2 * most + s.r * s.s, |indices| {
                    window.copy(dy, [s.ho, s.wo, s.k], images.clone(), a);
                    let (seg_a, indices) = indices.split_at_mut(s.r * s.s);
                    let (a_row, c_row) = indices.split_at_mut(most);
                    for p in 0..phases {
                        let [pr, ps] = phase_size(p);
                        let mut q = 0;
                        for i in 0..images.len() {
                            for (row, t) in (th.start + rows.start..th.start + rows.end).enumerate()
                            {
                                let Some(h) =
                                    (t * sh + p / sw).checked_sub(s.pad[0]).filter(|&h| h < s.h)
                                else {
                                    continue;
                                };
                                let a0 = (i * window.height + row + most_r - pr) * width;
                                let c0 = ((images.start + i) * s.h + h) * s.w;
                                for (col, t) in tw.clone().enumerate() {
                                    let Some(x) = (t * sw + p % sw)
                                        .checked_sub(s.pad[1])
                                        .filter(|&x| x < s.w)
                                    else {
                                        continue;
                                    };
                                    a_row[q] = (a0 + col + most_s - ps) * s.k;
                                    c_row[q] = (c0 + x) * s.c;
                                    q += 1;
                                }
                            }
                        }
                        let segs = match (pr * ps, s.groups) {
                            (0, _) => 0,
                            (_, 1) => pr,
                            (taps, _) => taps,
                        };
                        if segs > 0 {
                            segments(&mut seg_a[..segs], [pr, ps], width, s.k, s.groups);
                        }
                        for g in 0..s.groups {
                            let tiles = Tiles {
                                kernels,
                                a: &a[g * kg..],
                                a_row: &a_row[..q],
                                c_row: &c_row[..q],
                                seg_a: &seg_a[..segs],
                                len: if s.groups == 1 { ps * s.k } else { kg },
                                b: &packed[g * group_len + phase_at(p) * n_padded..],
                                n: cg,
                                c,
                                col: g * cg,
                                ep,
                            };
                            tiles.run(part(panels, parts, task % parts));
                        }
                    }
                });
            });
        });
    });
}

fn wgrad_with(
    kernels: &'static Kernels,
    s: &ConvShape,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    accumulate: bool,
) {
    let total = s.weight_len();
    if total == 0 {
        return;
    }
    if s.output_len() == 0 {
        if !accumulate {
            dw[..total].fill(0.0);
        }
        return;
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
                            let dw_at = (g * kg * s.r + r) * s.s * cg + tap * cg;
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
        let dw_step = s.r * s.s * s.cg();
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

#[cfg(test)]
#[path = "cpu_tests.rs"]
mod tests;
