//! Convolution on the CPU as an implicit GEMM: no patch matrix is ever built.
//!
//! Activations `[N, H, W, C]`, weights `[K, R, S, C / groups]`. A task takes a block of output pixels (rows of one
//! image, or several small images) and copies the input it needs, with zero padding, into scratch that fits in L2.
//! There the S * C values under a kernel row are contiguous, so the register kernels of [`crate::backend::cpu`]
//! read pixels in place through one offset per pixel and one per kernel row.
//!
//! - A 1x1 convolution of stride 1 is a plain product; a 3x3 of stride 1 with enough channels and pixels goes by
//!   Winograd's F(4x4, 3x3) (`winograd.rs`); everything else is an implicit GEMM:
//! - fprop: pixels times packed weights.
//! - dgrad: for each phase of the stride, a stride-1 convolution of dY with the flipped taps of that phase.
//! - wgrad: per kernel row, `dY^T X` over the pixels of a block. Small weights: fixed groups of blocks have partial
//!   sums that are added in order; large weights: tasks own parts of dW.
//!
//! Nothing depends on the number of threads but which thread does what, so the bits do not either.

mod blocks;
pub mod exact;
mod wgrad;
mod winograd;

use super::shape::{Algorithm, ConvShape, Pass};
use crate::backend::cpu::gemm::{Mat, PackedB, column_sums, gemm, gemm_packed};
use crate::backend::cpu::kernel::{Kernels, MAX_MR, MAX_NR, Rows, kernels};
use crate::backend::cpu::pack::{pack_panel_cols, pack_panel_rows, packed_len};
use crate::backend::cpu::parallel::{Shared, parallel_for, part};
use crate::backend::cpu::scratch::{with_floats, with_indices};
use crate::backend::cpu::{Epilogue, Finish, RawEpilogue};
use crate::ops::act::Act;
use crate::{Error, Result};
use blocks::{Blocks, Window, trim};
use std::ops::Range;
use wgrad::{PARTIAL_FLOATS, wgrad_with};
use winograd::Winograd;

/// Weights `[K, R, S, C / groups]` packed once for [`fprop_packed`], for inference.
pub struct PackedFilter(Packed);

enum Packed {
    /// Of a 1x1 convolution that is a plain product.
    Product(PackedB),
    Filter(&'static Kernels, Vec<f32>),
}

impl PackedFilter {
    /// Packs `w` for convolutions of this shape, of any batch size. `spent` hears which of them were read for the last
    /// time.
    pub fn new(shape: &ConvShape, w: &[f32], spent: impl Fn(Range<usize>) + Sync) -> Self {
        check_len("w", w, shape.weight_len());
        if shape.is_matrix_product() {
            let b = PackedB::new(shape.c, shape.k, w, spent);
            return PackedFilter(Packed::Product(b));
        }
        let kernels = kernels();
        let mut data = vec![0.0; fprop_packed_len(kernels, shape)];
        pack_fprop(kernels, shape, w, &mut data, spent);
        PackedFilter(Packed::Filter(kernels, data))
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
        pack_fprop(kernels, shape, w, packed, |_| ());
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
    let ep = epilogue(bias, residual, relu);
    match &w.0 {
        Packed::Product(w) => {
            let m = shape.n * shape.h * shape.w;
            assert_eq!(
                w.shape(),
                [shape.c, shape.k],
                "conv2d: the weights were packed for another shape"
            );
            gemm_packed(m, Mat::new(x, shape.c), w, y, shape.k, false, ep);
        }
        Packed::Filter(kernels, w) => {
            check_len("packed w", w, fprop_packed_len(kernels, shape));
            fprop_with(kernels, shape, x, w, ep, y);
        }
    }
}

/// Names of the variants; `auto` is the faster of the others.
pub const VARIANTS: &[&str] = &["auto", "implicit_gemm", "winograd_4x4"];
/// Those of the forward pass: one more, [`exact`], which the rule never takes.
pub const FPROP_VARIANTS: &[&str] = &["auto", "implicit_gemm", "winograd_4x4", "float64_sums"];

/// What a variant's name stands for.
pub(super) fn algorithm(variant: Option<&str>) -> Result<Algorithm> {
    match variant {
        None | Some("auto" | "float64_sums") => Ok(Algorithm::Auto),
        Some("implicit_gemm") => Ok(Algorithm::ImplicitGemm),
        Some("winograd_4x4") => Ok(Algorithm::Winograd),
        Some(other) => Err(Error::input(format!(
            "conv2d has no variant {other:?} on cpu: {}",
            VARIANTS.join(", ")
        ))),
    }
}

/// The algorithm that this pass uses for this shape.
pub fn variant(shape: &ConvShape, pass: Pass) -> &'static str {
    if shape.is_matrix_product() {
        "product"
    } else if Winograd::chosen(kernels(), shape, pass).is_some() {
        "winograd_4x4"
    } else {
        "implicit_gemm"
    }
}

/// Floating-point operations of the algorithm that [`variant`] names; Winograd's transforms are not counted.
pub(super) fn executed(shape: &ConvShape, pass: Pass) -> u64 {
    match Winograd::chosen(kernels(), shape, pass) {
        Some(w) if !shape.is_matrix_product() => w.products(),
        _ => trim(shape).0.flops(),
    }
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
    Epilogue {
        bias,
        addend,
        act: relu.then_some(Act::Relu),
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

fn fprop_packed_len(kernels: &Kernels, full: &ConvShape) -> usize {
    let (s, _) = trim(full);
    s.groups * packed_len(kernels, s.r * s.s * s.cg(), s.kg())
}

/// Packs the weights as `[group][panel][(r, s, c)][nr]`.
fn pack_fprop(
    kernels: &'static Kernels,
    full: &ConvShape,
    w: &[f32],
    out: &mut [f32],
    spent: impl Fn(Range<usize>) + Sync,
) {
    let (s, filter) = trim(full);
    let (kg, line, depth) = (s.kg(), s.s * s.cg(), s.r * s.s * s.cg());
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
        for (r, out) in out.chunks_exact_mut(line * nr).enumerate() {
            pack_panel_cols(
                kernels,
                out,
                &w[filter.tap(g * kg, r, 0)..],
                filter.k_step,
                j,
                kg,
                nr,
            );
        }
        let of = |k: usize| (g * kg + k) * full.r * full.s * s.cg();
        spent(of(j)..of(kg.min(j + nr)));
    });
}

fn fprop_with(
    kernels: &'static Kernels,
    full: &ConvShape,
    x: &[f32],
    packed: &[f32],
    ep: Epilogue,
    y: &mut [f32],
) {
    let (s, _) = &trim(full);
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
    if let Some(job) = Winograd::chosen(kernels, full, Pass::Fprop) {
        return job.run(x, packed, ep, y);
    }
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

/// How dgrad's weights are packed. Input row `h = f + stride t - pad`, of phase `f`, gets `dy[t - j]` through tap
/// `f + stride j`: one convolution of stride 1 per phase. The phases stand one after another, each as
/// `[panel][(taps of h, taps of w, K)][nr]` with the taps flipped.
struct Phases {
    stride: [usize; 2],
    kernel: [usize; 2],
}

impl Phases {
    fn of(s: &ConvShape) -> Self {
        Phases {
            stride: s.stride,
            kernel: [s.r, s.s],
        }
    }

    fn count(&self) -> usize {
        self.stride[0] * self.stride[1]
    }

    /// Vertical and horizontal phase.
    fn get(&self, p: usize) -> [usize; 2] {
        [p / self.stride[1], p % self.stride[1]]
    }

    /// Taps of phase `p`.
    fn taps(&self, p: usize) -> [usize; 2] {
        let f = self.get(p);
        [0, 1].map(|d| phase_taps(self.kernel[d], self.stride[d], f[d]))
    }

    /// Taps of the phases before `p`.
    fn before(&self, p: usize) -> usize {
        (0..p).map(|q| self.taps(q).iter().product::<usize>()).sum()
    }
}

fn pack_dgrad(kernels: &'static Kernels, full: &ConvShape, w: &[f32], packed: &mut [f32]) {
    let (s, filter) = trim(full);
    let (cg, kg) = (s.cg(), s.kg());
    let phases = Phases::of(&s);
    let panels = cg.div_ceil(kernels.nr());
    let n_padded = cg.next_multiple_of(kernels.lanes);
    let group_len = s.r * s.s * kg * n_padded;
    let shared = Shared::new(packed);
    parallel_for(s.groups * phases.count() * panels, |i| {
        let (g, p, j) = (
            i / (phases.count() * panels),
            i / panels % phases.count(),
            i % panels * kernels.nr(),
        );
        let [fh, fw] = phases.get(p);
        let [pr, ps] = phases.taps(p);
        let (nr, depth) = (kernels.panel(cg, j), pr * ps * kg);
        let at = g * group_len + phases.before(p) * kg * n_padded + j * depth;
        // SAFETY: this task alone writes this panel.
        let out = unsafe { std::slice::from_raw_parts_mut(shared.get().add(at), depth * nr) };
        pack_panel_rows(out, j, cg, nr, |row| {
            let (tap, k) = (row / kg, row % kg);
            let r = fh + s.stride[0] * (pr - 1 - tap / ps);
            let t = fw + s.stride[1] * (ps - 1 - tap % ps);
            &w[filter.tap(g * kg + k, r, t)..][..cg]
        });
    });
}

fn dgrad_with(
    kernels: &'static Kernels,
    full: &ConvShape,
    dy: &[f32],
    w: &[f32],
    addend: Option<&[f32]>,
    dx: &mut [f32],
) {
    let (s, _) = &trim(full);
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
    let phases = Phases::of(s);
    let [th, tw] =
        [0, 1].map(|d| s.pad[d] / s.stride[d]..([s.h, s.w][d] - 1 + s.pad[d]) / s.stride[d] + 1);
    let [most_r, most_s] = [s.r.div_ceil(sh), s.s.div_ceil(sw)];
    let width = tw.len() + most_s - 1;
    let blocks = Blocks::new(s.n, th.len(), tw.len(), width * s.k);
    let parts = panel_parts(blocks.count() * s.groups, panels);
    let c = Shared::new(dx);
    with_floats(s.groups * group_len, |packed| {
        pack_dgrad(kernels, full, w, packed);
        let packed = &*packed;
        if let Some(job) = Winograd::chosen(kernels, full, Pass::Dgrad) {
            return job.run(dy, packed, ep, dx);
        }
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
                    for p in 0..phases.count() {
                        let [fh, fw] = phases.get(p);
                        let [pr, ps] = phases.taps(p);
                        let mut q = 0;
                        for i in 0..images.len() {
                            for (row, t) in (th.start + rows.start..th.start + rows.end).enumerate()
                            {
                                let Some(h) =
                                    (t * sh + fh).checked_sub(s.pad[0]).filter(|&h| h < s.h)
                                else {
                                    continue;
                                };
                                let a0 = (i * window.height + row + most_r - pr) * width;
                                let c0 = ((images.start + i) * s.h + h) * s.w;
                                for (col, t) in tw.clone().enumerate() {
                                    let Some(x) =
                                        (t * sw + fw).checked_sub(s.pad[1]).filter(|&x| x < s.w)
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
                                b: &packed[g * group_len + phases.before(p) * kg * n_padded..],
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

#[cfg(test)]
mod tests;
