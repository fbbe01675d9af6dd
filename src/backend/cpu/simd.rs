//! The few vector operations the inner loops need, for AVX-512, AVX2 + FMA and plain Rust.
//!
//! Every function is `inline(always)`, so that it is compiled inside the `#[target_feature]` kernel that calls it.

/// One vector register of `LANES` f32.
///
/// # Safety
/// The methods may be called only on a processor that has the implementation's instructions, with pointers to
/// `LANES` readable (`load`) or writable (`store`) floats, of any alignment.
pub(crate) trait Simd: Copy {
    type V: Copy;
    const LANES: usize;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// The greater; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// A square of `LANES` rows of `LANES` floats: rows `lds` apart become columns of rows `ldd` apart.
    unsafe fn transpose(src: *const f32, lds: usize, dst: *mut f32, ldd: usize);
}

/// Four lanes in plain Rust, which LLVM turns into SSE2, NEON or scalar code.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        // SAFETY: the caller gives LANES readable floats.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        // SAFETY: the caller gives LANES writable floats.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not mul_add: without an FMA unit that is a library call per lane.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn transpose(src: *const f32, lds: usize, dst: *mut f32, ldd: usize) {
        for r in 0..Self::LANES {
            for c in 0..Self::LANES {
                // SAFETY: the caller gives a square of LANES rows on both sides.
                unsafe { *dst.add(c * ldd + r) = *src.add(r * lds + c) };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Simd;
    use std::arch::x86_64::*;

    /// 8 lanes; needs `avx2` and `fma`.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    // SAFETY (all methods): the trait's contract, passed on to the intrinsic.
    impl Simd for Avx2 {
        type V = __m256;
        const LANES: usize = 8;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m256 {
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn transpose(src: *const f32, lds: usize, dst: *mut f32, ldd: usize) {
            unsafe {
                let r: [__m256; 8] = std::array::from_fn(|i| _mm256_loadu_ps(src.add(i * lds)));
                let pair: [__m256; 8] = std::array::from_fn(|i| {
                    let (a, b) = (r[i & !1], r[i | 1]);
                    if i & 1 == 0 {
                        _mm256_unpacklo_ps(a, b)
                    } else {
                        _mm256_unpackhi_ps(a, b)
                    }
                });
                for e in 0..4 {
                    let four = |g: usize| {
                        let (a, b) = (
                            _mm256_castps_pd(pair[g + (e >> 1)]),
                            _mm256_castps_pd(pair[g + 2 + (e >> 1)]),
                        );
                        _mm256_castpd_ps(if e & 1 == 0 {
                            _mm256_unpacklo_pd(a, b)
                        } else {
                            _mm256_unpackhi_pd(a, b)
                        })
                    };
                    let (low, high) = (four(0), four(4));
                    _mm256_storeu_ps(dst.add(e * ldd), _mm256_permute2f128_ps::<0x20>(low, high));
                    _mm256_storeu_ps(
                        dst.add((4 + e) * ldd),
                        _mm256_permute2f128_ps::<0x31>(low, high),
                    );
                }
            }
        }
    }

    /// 16 lanes; needs `avx512f`.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    // SAFETY (all methods): the trait's contract, passed on to the intrinsic.
    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn transpose(src: *const f32, lds: usize, dst: *mut f32, ldd: usize) {
            unsafe {
                let r: [__m512; 16] = std::array::from_fn(|i| _mm512_loadu_ps(src.add(i * lds)));
                // Pairs of rows, then fours, within each 128-bit quarter; then the quarters change places.
                let pair: [__m512; 16] = std::array::from_fn(|i| {
                    let (a, b) = (r[i & !1], r[i | 1]);
                    if i & 1 == 0 {
                        _mm512_unpacklo_ps(a, b)
                    } else {
                        _mm512_unpackhi_ps(a, b)
                    }
                });
                // four[4 g + e]: element e of each quarter of rows 4 g .. 4 g + 4.
                let four: [__m512; 16] = std::array::from_fn(|i| {
                    let (g, e) = (i & !3, i & 3);
                    let (a, b) = (
                        _mm512_castps_pd(pair[g + (e >> 1)]),
                        _mm512_castps_pd(pair[g + 2 + (e >> 1)]),
                    );
                    _mm512_castpd_ps(if e & 1 == 0 {
                        _mm512_unpacklo_pd(a, b)
                    } else {
                        _mm512_unpackhi_pd(a, b)
                    })
                });
                for e in 0..4 {
                    let even = _mm512_shuffle_f32x4::<0x88>(four[e], four[4 + e]);
                    let odd = _mm512_shuffle_f32x4::<0xdd>(four[e], four[4 + e]);
                    let even2 = _mm512_shuffle_f32x4::<0x88>(four[8 + e], four[12 + e]);
                    let odd2 = _mm512_shuffle_f32x4::<0xdd>(four[8 + e], four[12 + e]);
                    _mm512_storeu_ps(dst.add(e * ldd), _mm512_shuffle_f32x4::<0x88>(even, even2));
                    _mm512_storeu_ps(
                        dst.add((4 + e) * ldd),
                        _mm512_shuffle_f32x4::<0x88>(odd, odd2),
                    );
                    _mm512_storeu_ps(
                        dst.add((8 + e) * ldd),
                        _mm512_shuffle_f32x4::<0xdd>(even, even2),
                    );
                    _mm512_storeu_ps(
                        dst.add((12 + e) * ldd),
                        _mm512_shuffle_f32x4::<0xdd>(odd, odd2),
                    );
                }
            }
        }
    }
}
