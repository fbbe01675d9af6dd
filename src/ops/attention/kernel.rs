//! The inner loops of attention for one instruction set: register tiles of the matrix products, and passes over rows.
//!
//! All of them work on a thread's scratch, whose rows are padded to whole vector registers, so that none has a tail.

use crate::backend::cpu::pack::{Columns, columns};
use crate::backend::cpu::simd::{Portable, Simd};
use std::sync::LazyLock;

/// `A B` with a register tile of `[MR, NV * LANES]`; row `i` of the result is at `c[i * ldc]`, row `k` of B at
/// `b[k * ldb]`.
pub(in crate::ops) struct Tile {
    pub a: *const f32,
    pub lda: usize,
    pub b: *const f32,
    pub ldb: usize,
    pub depth: usize,
    pub c: *mut f32,
    pub ldc: usize,
}

type TileFn = unsafe fn(&Tile);

/// One instruction set's loops.
pub(in crate::ops) struct Kernels {
    /// `avx512`, `avx2` or `portable`.
    pub name: &'static str,
    /// f32 per vector register.
    pub lanes: usize,
    /// `C = A B` with `A[i, k]` at `a[i * lda + k]`, by `[registers - 1][rows - 1]`.
    pub rows: &'static [&'static [TileFn]],
    /// `C += A B` with `A[i, k]` at `a[k * lda + i]`.
    pub outer: &'static [&'static [TileFn]],
    /// Rows of `dim` floats, `stride` apart, to rows of whole registers padded with zeros.
    pub pack: unsafe fn(src: *const f32, stride: usize, rows: usize, dim: usize, dst: *mut f32),
    /// The way back: row `r` times `factor[r]`, without the padding.
    pub unpack: unsafe fn(
        src: *const f32,
        factor: *const f32,
        rows: usize,
        dim: usize,
        dst: *mut f32,
        stride: usize,
    ),
    /// Rows to the columns of a panel, as GEMM packs them.
    pub pack_columns: unsafe fn(&Columns),
    /// Per row of scores: `p = exp2(c * (s - max))` in place; the maxima and the sums go to `max` and `sum`.
    pub softmax:
        unsafe fn(s: *mut f32, rows: usize, tokens: usize, c: f32, max: *mut f32, sum: *mut f32),
    /// Rows over keys: scores `p` to `exp2(c * p - lse2)`, and `ds` (dP) to `scale * p * (ds - delta)`.
    pub gradient: unsafe fn(
        p: *mut f32,
        ds: *mut f32,
        rows: usize,
        width: usize,
        stats: *const f32,
        c: f32,
        scale: f32,
    ),
    /// `dst[r] = a[r] . b[r]` for rows of `dim` floats, both `stride` apart.
    pub dots: unsafe fn(
        a: *const f32,
        b: *const f32,
        stride: usize,
        rows: usize,
        dim: usize,
        dst: *mut f32,
    ),
}

impl Kernels {
    /// `n` in whole registers.
    pub fn pad(&self, n: usize) -> usize {
        n.next_multiple_of(self.lanes)
    }
}

/// What attention needs beside [`Simd`].
trait Lanes: Simd {
    /// `2^x` to about 2 ulp for `x` below 128; nothing or nearly nothing below -126.
    unsafe fn exp2(x: Self::V) -> Self::V;
    /// The sum of the lanes, in a fixed order.
    unsafe fn reduce_add(v: Self::V) -> f32;
    /// The greatest lane.
    unsafe fn reduce_max(v: Self::V) -> f32;
    /// Asks for the line at `p`, which may be any address.
    unsafe fn prefetch(p: *const f32);
}

/// `2^r` on [-1/2, 1/2]: minimax in relative error, 7.5e-8.
const EXP2: [f32; 6] = [
    1.000_000_1,
    0.693_146_94,
    0.240_221_2,
    0.055_507_13,
    0.009_675_541,
    0.001_327_647,
];

#[inline(always)]
unsafe fn exp2_polynomial<S: Simd>(r: S::V) -> S::V {
    // SAFETY: the caller's contract.
    unsafe {
        let mut p = S::splat(EXP2[5]);
        for c in EXP2[..5].iter().rev() {
            p = S::fma(p, r, S::splat(*c));
        }
        p
    }
}

impl Lanes for Portable {
    #[inline(always)]
    unsafe fn exp2(x: Self::V) -> Self::V {
        // Adding 1.5 * 2^23 rounds to an integer. A NaN stays one.
        let x: Self::V = std::array::from_fn(|i| if x[i] < -126.0 { -126.0 } else { x[i] });
        let n: Self::V = std::array::from_fn(|i| (x[i] + 12_582_912.0) - 12_582_912.0);
        // SAFETY: plain Rust.
        let p = unsafe { exp2_polynomial::<Self>(Self::sub(x, n)) };
        std::array::from_fn(|i| p[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn reduce_add(v: Self::V) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    unsafe fn reduce_max(v: Self::V) -> f32 {
        v.into_iter().fold(v[0], |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn prefetch(_p: *const f32) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Lanes, exp2_polynomial};
    use crate::backend::cpu::simd::{Avx2, Avx512};
    use std::arch::x86_64::*;

    // SAFETY (all methods of both): the trait's contract, passed on to the intrinsics.
    impl Lanes for Avx512 {
        #[inline(always)]
        unsafe fn exp2(x: __m512) -> __m512 {
            unsafe {
                let n =
                    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
                _mm512_scalef_ps(exp2_polynomial::<Self>(_mm512_sub_ps(x, n)), n)
            }
        }
        #[inline(always)]
        unsafe fn reduce_add(v: __m512) -> f32 {
            unsafe { _mm512_reduce_add_ps(v) }
        }
        #[inline(always)]
        unsafe fn reduce_max(v: __m512) -> f32 {
            unsafe { _mm512_reduce_max_ps(v) }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }

    impl Lanes for Avx2 {
        #[inline(always)]
        unsafe fn exp2(x: __m256) -> __m256 {
            unsafe {
                // The second operand is what a NaN leaves: x, so that it stays one.
                let x = _mm256_max_ps(_mm256_set1_ps(-126.0), x);
                let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
                let p = exp2_polynomial::<Self>(_mm256_sub_ps(x, n));
                let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
            }
        }
        #[inline(always)]
        unsafe fn reduce_add(v: __m256) -> f32 {
            unsafe {
                let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        unsafe fn reduce_max(v: __m256) -> f32 {
            unsafe {
                let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
                _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
            }
        }
        #[inline(always)]
        unsafe fn prefetch(p: *const f32) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    }
}

#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const OUTER: bool>(t: &Tile) {
    // SAFETY: the driver gives pointers to whole tiles.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; MR];
        if OUTER {
            acc = std::array::from_fn(|i| {
                std::array::from_fn(|v| S::load(t.c.add(i * t.ldc + v * S::LANES)))
            });
        }
        let row: [*const f32; MR] =
            std::array::from_fn(|i| t.a.add(if OUTER { i } else { i * t.lda }));
        let mut b = t.b;
        for k in 0..t.depth {
            let bv: [S::V; NV] = std::array::from_fn(|v| S::load(b.add(v * S::LANES)));
            let step = if OUTER { k * t.lda } else { k };
            for i in 0..MR {
                let av = S::splat(*row[i].add(step));
                for v in 0..NV {
                    acc[i][v] = S::fma(av, bv[v], acc[i][v]);
                }
            }
            b = b.wrapping_add(t.ldb);
        }
        for (i, row) in acc.iter().enumerate() {
            for (v, sum) in row.iter().enumerate() {
                S::store(t.c.add(i * t.ldc + v * S::LANES), *sum);
            }
        }
    }
}

#[inline(always)]
unsafe fn pack<S: Lanes>(src: *const f32, stride: usize, rows: usize, dim: usize, dst: *mut f32) {
    let width = dim.next_multiple_of(S::LANES);
    // SAFETY: `rows` rows of `dim` floats there, of `width` here.
    unsafe {
        for r in 0..rows {
            let (src, dst) = (src.add(r * stride), dst.add(r * width));
            let mut i = 0;
            while i + S::LANES <= dim {
                // The next head's row lies behind this one's: no hardware prefetcher foresees rows so far apart.
                S::prefetch(src.wrapping_add(dim + i));
                S::store(dst.add(i), S::load(src.add(i)));
                i += S::LANES;
            }
            while i < width {
                *dst.add(i) = if i < dim { *src.add(i) } else { 0.0 };
                i += 1;
            }
        }
    }
}

#[inline(always)]
unsafe fn unpack<S: Lanes>(
    src: *const f32,
    factor: *const f32,
    rows: usize,
    dim: usize,
    dst: *mut f32,
    stride: usize,
) {
    let width = dim.next_multiple_of(S::LANES);
    // SAFETY: as for `pack`; a null `factor` is none.
    unsafe {
        for r in 0..rows {
            let (src, dst) = (src.add(r * width), dst.add(r * stride));
            let f = if factor.is_null() {
                1.0
            } else {
                *factor.add(r)
            };
            let mut i = 0;
            while i + S::LANES <= dim {
                S::store(dst.add(i), S::mul(S::load(src.add(i)), S::splat(f)));
                i += S::LANES;
            }
            while i < dim {
                *dst.add(i) = *src.add(i) * f;
                i += 1;
            }
        }
    }
}

/// What padding scores are set to: no exponential of theirs is seen beside a true score's.
const MASKED: f32 = -1e30;

#[inline(always)]
unsafe fn softmax<S: Lanes>(
    s: *mut f32,
    rows: usize,
    tokens: usize,
    c: f32,
    max: *mut f32,
    sum: *mut f32,
) {
    let width = tokens.next_multiple_of(S::LANES);
    // SAFETY: `rows` rows of `width` floats, and as many maxima and sums.
    unsafe {
        let cv = S::splat(c);
        // Added to the last register of a row; scalar stores there would stall the loads that follow.
        let mut mask = [0.0f32; 16];
        mask[S::LANES - (width - tokens)..S::LANES].fill(MASKED);
        let (mask, last) = (S::load(mask.as_ptr()), width - S::LANES);
        for r in 0..rows {
            let s = s.add(r * width);
            let tail = S::add(S::load(s.add(last)), mask);
            S::store(s.add(last), tail);
            let mut m = tail;
            for j in (0..last).step_by(S::LANES) {
                m = S::max(m, S::load(s.add(j)));
            }
            let m = S::reduce_max(m);
            let shift = S::splat(-c * m);
            let mut total = S::splat(0.0);
            for j in (0..width).step_by(S::LANES) {
                let p = S::exp2(S::fma(S::load(s.add(j)), cv, shift));
                S::store(s.add(j), p);
                total = S::add(total, p);
            }
            *max.add(r) = m;
            *sum.add(r) = S::reduce_add(total);
        }
    }
}

#[inline(always)]
unsafe fn gradient<S: Lanes>(
    p: *mut f32,
    ds: *mut f32,
    rows: usize,
    width: usize,
    stats: *const f32,
    c: f32,
    scale: f32,
) {
    // SAFETY: `rows` rows of `width` floats; `stats` holds lse2 and delta, `width` floats each.
    unsafe {
        let (cv, scale) = (S::splat(c), S::splat(scale));
        for j in (0..width).step_by(S::LANES) {
            let (lse, delta) = (S::load(stats.add(j)), S::load(stats.add(width + j)));
            for r in 0..rows {
                let at = r * width + j;
                let v = S::exp2(S::sub(S::mul(S::load(p.add(at)), cv), lse));
                S::store(p.add(at), v);
                let d = S::mul(S::sub(S::load(ds.add(at)), delta), scale);
                S::store(ds.add(at), S::mul(v, d));
            }
        }
    }
}

#[inline(always)]
unsafe fn dots<S: Lanes>(
    a: *const f32,
    b: *const f32,
    stride: usize,
    rows: usize,
    dim: usize,
    dst: *mut f32,
) {
    // SAFETY: `rows` rows of `dim` floats on both sides.
    unsafe {
        for r in 0..rows {
            let (a, b) = (a.add(r * stride), b.add(r * stride));
            let mut sum = S::splat(0.0);
            let mut i = 0;
            while i + S::LANES <= dim {
                sum = S::fma(S::load(a.add(i)), S::load(b.add(i)), sum);
                i += S::LANES;
            }
            let mut total = S::reduce_add(sum);
            while i < dim {
                total += *a.add(i) * *b.add(i);
                i += 1;
            }
            *dst.add(r) = total;
        }
    }
}

/// One instruction set's loops; `$nv: [$mr ...]` lists the tile heights compiled for each width in registers.
macro_rules! kernels {
    ($module:ident, $simd:ty, $name:literal, $(#[$feature:meta])?, $($nv:literal: [$($mr:literal)*]),*) => {
        mod $module {
            use super::*;
            // SAFETY (all): passed on to the function of the same name.
            $(#[$feature])?
            unsafe fn rows<const MR: usize, const NV: usize>(t: &Tile) {
                unsafe { tile::<$simd, MR, NV, false>(t) }
            }
            $(#[$feature])?
            unsafe fn outer<const MR: usize, const NV: usize>(t: &Tile) {
                unsafe { tile::<$simd, MR, NV, true>(t) }
            }
            $(#[$feature])?
            unsafe fn pack(src: *const f32, stride: usize, rows: usize, dim: usize, dst: *mut f32) {
                unsafe { super::pack::<$simd>(src, stride, rows, dim, dst) }
            }
            $(#[$feature])?
            unsafe fn unpack(src: *const f32, f: *const f32, rows: usize, dim: usize, dst: *mut f32, stride: usize) {
                unsafe { super::unpack::<$simd>(src, f, rows, dim, dst, stride) }
            }
            $(#[$feature])?
            unsafe fn pack_columns(t: &Columns) {
                unsafe { columns::<$simd>(t) }
            }
            $(#[$feature])?
            unsafe fn softmax(s: *mut f32, rows: usize, tokens: usize, c: f32, max: *mut f32, sum: *mut f32) {
                unsafe { super::softmax::<$simd>(s, rows, tokens, c, max, sum) }
            }
            $(#[$feature])?
            unsafe fn gradient(p: *mut f32, ds: *mut f32, rows: usize, width: usize, stats: *const f32, c: f32, scale: f32) {
                unsafe { super::gradient::<$simd>(p, ds, rows, width, stats, c, scale) }
            }
            $(#[$feature])?
            unsafe fn dots(a: *const f32, b: *const f32, stride: usize, rows: usize, dim: usize, dst: *mut f32) {
                unsafe { super::dots::<$simd>(a, b, stride, rows, dim, dst) }
            }
            pub(super) static KERNELS: Kernels = Kernels {
                name: $name,
                lanes: <$simd>::LANES,
                rows: &[$(&[$(rows::<$mr, $nv>),*]),*],
                outer: &[$(&[$(outer::<$mr, $nv>),*]),*],
                pack,
                unpack,
                pack_columns,
                softmax,
                gradient,
                dots,
            };
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernels!(avx512, crate::backend::cpu::simd::Avx512, "avx512", #[target_feature(enable = "avx512f")],
    1: [1 2 3 4 5 6 7 8 9 10 11 12], 2: [1 2 3 4 5 6 7 8 9 10 11 12], 3: [1 2 3 4 5 6 7 8], 4: [1 2 3 4 5 6]);
#[cfg(target_arch = "x86_64")]
kernels!(avx2, crate::backend::cpu::simd::Avx2, "avx2", #[target_feature(enable = "avx2,fma")],
    1: [1 2 3 4 5 6 7 8], 2: [1 2 3 4 5 6], 3: [1 2 3 4]);
kernels!(portable, Portable, "portable", , 1: [1 2 3 4], 2: [1 2 3 4]);

/// Every set that this processor can run, the fastest first.
pub(super) fn available() -> &'static [&'static Kernels] {
    static ALL: LazyLock<Vec<&'static Kernels>> = LazyLock::new(|| {
        let mut sets: Vec<&'static Kernels> = vec![];
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
    });
    &ALL
}
