//! Register-tile kernels that GEMM and convolution share, and their choice by processor.
//!
//! Two loops, both `C[mr, nr] = sum over k of A[:, k] * B[k, :]` with the whole tile in registers:
//!
//! - `Rows`: A is contiguous along k; each row has its own offset, so a row may be a matrix row or the
//!   receptive field of an output pixel (implicit GEMM without an A pack). B is a packed panel.
//! - `Outer`: A is contiguous along the tile's rows (transposed or packed), and each step of k finds its B row
//!   through a table of offsets, so B may be a packed panel or input pixels (the weight gradient).
//!
//! Both leave the sums in a buffer of `[mr, nr]` floats; `Kernels::finish` adds and stores them.
//! A sum runs over k in order whatever the tile's size, so tiling never changes the bits.

use super::epilogue::{Finish, finish};
use super::pack::{self, Columns};
use super::simd::Simd;
use super::winograd;
use std::sync::LazyLock;

/// Most rows of a tile on any processor.
pub(crate) const MAX_MR: usize = 14;
/// Most columns of a tile on any processor.
pub(crate) const MAX_NR: usize = 64;

/// Arguments of the `rows` kernel: `A[i, (seg, k)]` is `a[row[i] + seg_a[seg] + k]`, `B[(seg, k), j]` is
/// `b[seg_b[seg] + k * nr + j]`.
pub(crate) struct Rows<'a> {
    pub a: *const f32,
    pub row: &'a [usize],
    pub seg_a: &'a [usize],
    pub seg_b: &'a [usize],
    pub len: usize,
    pub b: *const f32,
    pub out: *mut f32,
}

/// Arguments of the `outer` kernel: `A[i, k]` is `a[k * a_step + i]`, `B[k, j]` is `b[b_row[k] + j]`.
pub(crate) struct Outer<'a> {
    pub a: *const f32,
    pub a_step: usize,
    pub b: *const f32,
    pub b_row: &'a [usize],
    pub out: *mut f32,
}

type RowsFn = unsafe fn(&Rows);
type OuterFn = unsafe fn(&Outer);

/// The kernels for one instruction set, in tables indexed by `[nv - 1][mr - 1]`.
pub(crate) struct Kernels {
    /// `"avx512"`, `"avx2"` or `"portable"`.
    pub name: &'static str,
    /// f32 per vector register.
    pub lanes: usize,
    rows: &'static [&'static [RowsFn]],
    outer: &'static [&'static [OuterFn]],
    finish: unsafe fn(&Finish),
    pack_columns: unsafe fn(&Columns),
    /// Winograd's transforms; the contracts stand with the functions of the same names.
    pub winograd_input: unsafe fn(&winograd::Input),
    pub winograd_weights: unsafe fn(&winograd::Weights),
    pub winograd_output: unsafe fn(&winograd::Output),
    pub winograd_output_grad: unsafe fn(&winograd::OutputGrad),
    pub winograd_weights_grad: unsafe fn(&winograd::WeightsGrad),
}

impl Kernels {
    /// Columns of a full tile.
    pub fn nr(&self) -> usize {
        self.lanes * self.rows.len()
    }

    /// Rows of a full tile, of any width.
    pub fn mr(&self) -> usize {
        self.rows[0].len()
    }

    /// Width of the panel that begins at column `j` of `n`: a full tile, or what is left in whole registers.
    pub fn panel(&self, n: usize, j: usize) -> usize {
        self.nr().min((n - j).next_multiple_of(self.lanes))
    }

    /// # Safety
    /// `args.row.len()` is 1..=mr(), every element named in [`Rows`] is readable, `out` holds `[mr, nr]`.
    #[inline]
    pub unsafe fn rows(&self, nr: usize, args: &Rows) {
        // SAFETY: passed on; the instruction set was detected when `self` was chosen.
        unsafe { self.rows[nr / self.lanes - 1][args.row.len() - 1](args) }
    }

    /// # Safety
    /// `mr` is 1..=mr(), every element named in [`Outer`] is readable, `out` holds `[mr, nr]`.
    #[inline]
    pub unsafe fn outer(&self, mr: usize, nr: usize, args: &Outer) {
        // SAFETY: as above.
        unsafe { self.outer[nr / self.lanes - 1][mr - 1](args) }
    }

    /// # Safety
    /// The contract of [`Finish`].
    #[inline]
    pub unsafe fn finish(&self, args: &Finish) {
        // SAFETY: as above.
        unsafe { (self.finish)(args) }
    }

    /// # Safety
    /// The contract of [`Columns`].
    #[inline]
    pub unsafe fn pack_columns(&self, args: &Columns) {
        // SAFETY: as above.
        unsafe { (self.pack_columns)(args) }
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
unsafe fn rows_tile<S: Simd, const MR: usize, const NV: usize>(t: &Rows) {
    // SAFETY: `Kernels::rows` states what must hold; every pointer below is inside those ranges.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; MR];
        let row: &[usize; MR] = t.row.try_into().unwrap_unchecked();
        for (&sa, &sb) in t.seg_a.iter().zip(t.seg_b) {
            let a: [*const f32; MR] = std::array::from_fn(|i| t.a.add(row[i] + sa));
            let mut b = t.b.add(sb);
            for k in 0..t.len {
                let bv: [S::V; NV] = std::array::from_fn(|v| S::load(b.add(v * S::LANES)));
                for i in 0..MR {
                    let av = S::splat(*a[i].add(k));
                    for v in 0..NV {
                        acc[i][v] = S::fma(av, bv[v], acc[i][v]);
                    }
                }
                b = b.add(NV * S::LANES);
            }
        }
        store_tile::<S, MR, NV>(&acc, t.out);
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
unsafe fn outer_tile<S: Simd, const MR: usize, const NV: usize>(t: &Outer) {
    // SAFETY: `Kernels::outer` states what must hold.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; MR];
        let mut a = t.a;
        for &off in t.b_row {
            let b = t.b.add(off);
            let bv: [S::V; NV] = std::array::from_fn(|v| S::load(b.add(v * S::LANES)));
            for i in 0..MR {
                let av = S::splat(*a.add(i));
                for v in 0..NV {
                    acc[i][v] = S::fma(av, bv[v], acc[i][v]);
                }
            }
            a = a.wrapping_add(t.a_step);
        }
        store_tile::<S, MR, NV>(&acc, t.out);
    }
}

#[inline(always)]
#[allow(clippy::needless_range_loop)] // indices up to constants unroll; iterators do not always
unsafe fn store_tile<S: Simd, const MR: usize, const NV: usize>(
    acc: &[[S::V; NV]; MR],
    out: *mut f32,
) {
    for i in 0..MR {
        for v in 0..NV {
            // SAFETY: `out` holds [MR, NV * LANES] floats.
            unsafe { S::store(out.add((i * NV + v) * S::LANES), acc[i][v]) };
        }
    }
}

/// The tables of one instruction set. `$nv: [$mr ...]` lists the tile heights compiled for each width in registers.
macro_rules! kernels {
    ($module:ident, $simd:ty, $name:literal, $(#[$feature:meta])?, $($nv:literal: [$($mr:literal)*]),*) => {
        mod $module {
            use super::*;
            $(#[$feature])?
            unsafe fn rows<const MR: usize, const NV: usize>(t: &Rows) {
                // SAFETY: passed on.
                unsafe { rows_tile::<$simd, MR, NV>(t) }
            }
            $(#[$feature])?
            unsafe fn outer<const MR: usize, const NV: usize>(t: &Outer) {
                // SAFETY: passed on.
                unsafe { outer_tile::<$simd, MR, NV>(t) }
            }
            $(#[$feature])?
            unsafe fn store(t: &Finish) {
                // SAFETY: passed on.
                unsafe { finish::<$simd>(t) }
            }
            $(#[$feature])?
            unsafe fn pack_columns(t: &Columns) {
                // SAFETY: passed on.
                unsafe { pack::columns::<$simd>(t) }
            }
            $(#[$feature])?
            unsafe fn winograd_input(t: &winograd::Input) {
                // SAFETY: passed on.
                unsafe { winograd::input::<$simd>(t) }
            }
            $(#[$feature])?
            unsafe fn winograd_weights(t: &winograd::Weights) {
                // SAFETY: passed on.
                unsafe { winograd::weights::<$simd>(t) }
            }
            $(#[$feature])?
            unsafe fn winograd_output(t: &winograd::Output) {
                // SAFETY: passed on.
                unsafe { winograd::output::<$simd>(t) }
            }
            $(#[$feature])?
            unsafe fn winograd_output_grad(t: &winograd::OutputGrad) {
                // SAFETY: passed on.
                unsafe { winograd::output_grad::<$simd>(t) }
            }
            $(#[$feature])?
            unsafe fn winograd_weights_grad(t: &winograd::WeightsGrad) {
                // SAFETY: passed on.
                unsafe { winograd::weights_grad::<$simd>(t) }
            }
            pub(super) static KERNELS: Kernels = Kernels {
                name: $name,
                lanes: <$simd>::LANES,
                rows: &[$(&[$(rows::<$mr, $nv>),*]),*],
                outer: &[$(&[$(outer::<$mr, $nv>),*]),*],
                finish: store,
                pack_columns,
                winograd_input,
                winograd_weights,
                winograd_output,
                winograd_output_grad,
                winograd_weights_grad,
            };
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(avx512, crate::backend::cpu::simd::Avx512, "avx512", #[target_feature(enable = "avx512f")],
    1: [1 2 3 4 5 6 7 8 9 10 11 12], 2: [1 2 3 4 5 6 7 8 9 10 11 12]);
#[cfg(target_arch = "x86_64")]
kernels!(avx2, crate::backend::cpu::simd::Avx2, "avx2", #[target_feature(enable = "avx2,fma")],
    1: [1 2 3 4 5 6], 2: [1 2 3 4 5 6]);
kernels!(portable, crate::backend::cpu::simd::Portable, "portable", , 1: [1 2 3 4], 2: [1 2 3 4]);

/// Every set of kernels that this processor can run, the fastest first.
pub(crate) fn available() -> Vec<&'static Kernels> {
    let mut sets = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            sets.push(&avx512::KERNELS);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            sets.push(&avx2::KERNELS);
        }
    }
    sets.push(&portable::KERNELS);
    sets
}

/// The kernels used by default: the first of [`available`].
pub(crate) fn kernels() -> &'static Kernels {
    static BEST: LazyLock<&'static Kernels> = LazyLock::new(|| available()[0]);
    *BEST
}

/// The instruction set in use: `avx512`, `avx2` or `portable`.
pub fn instruction_set() -> &'static str {
    kernels().name
}
