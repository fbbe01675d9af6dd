//! What happens to a tile of sums on its way to memory: bias, addend, activation, and a copy before the activation.

use super::simd::Simd;
use std::f32::consts::{FRAC_1_SQRT_2, LOG2_E};

/// Elementwise function at the end of a GEMM or convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Activation {
    #[default]
    None,
    Relu,
    /// `x * Phi(x)` with the error function.
    GeluErf,
    /// `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// What is done to each sum before it is stored: `pre = sum + bias[column] + addend`, `out = activation(pre)`.
///
/// `addend` and `preact` are laid out as the output is.
#[derive(Default)]
pub struct Epilogue<'a> {
    pub bias: Option<&'a [f32]>,
    /// A residual branch (forward) or the gradient that is already there (backward).
    pub addend: Option<&'a [f32]>,
    pub activation: Activation,
    /// Where to keep `pre`, which the backward pass of a GELU needs.
    pub preact: Option<&'a mut [f32]>,
}

/// The epilogue as raw pointers (null: absent), shared by the threads that write disjoint tiles.
#[derive(Clone, Copy)]
pub(crate) struct RawEpilogue {
    pub bias: *const f32,
    pub addend: *const f32,
    pub preact: *mut f32,
    pub activation: Activation,
}

// SAFETY: the pointers are read, or written at elements that belong to one tile and so to one thread.
unsafe impl Send for RawEpilogue {}
// SAFETY: as above.
unsafe impl Sync for RawEpilogue {}

impl RawEpilogue {
    /// Stores the sums as they are.
    pub const PLAIN: Self = RawEpilogue {
        bias: std::ptr::null(),
        addend: std::ptr::null(),
        preact: std::ptr::null_mut(),
        activation: Activation::None,
    };

    pub fn new(e: Epilogue) -> Self {
        RawEpilogue {
            bias: e.bias.map_or(std::ptr::null(), |s| s.as_ptr()),
            addend: e.addend.map_or(std::ptr::null(), |s| s.as_ptr()),
            preact: e.preact.map_or(std::ptr::null_mut(), |s| s.as_mut_ptr()),
            activation: e.activation,
        }
    }
}

/// One tile to store: `c[row[i] + col + j]` from `tile[i * nr + j]`, for `j` in `0..cols`.
///
/// Every such element of `c`, of `addend` and `preact` where present, and `bias[col + j]` must be valid.
pub(crate) struct Finish<'a> {
    pub tile: *const f32,
    pub nr: usize,
    pub row: &'a [usize],
    pub col: usize,
    pub cols: usize,
    pub c: *mut f32,
    /// Add to what `c` holds.
    pub accumulate: bool,
    pub ep: RawEpilogue,
}

/// # Safety
/// The contract of [`Finish`].
#[inline(always)]
pub(crate) unsafe fn finish<S: Simd>(t: &Finish) {
    // SAFETY: passed on.
    unsafe {
        if !t.cols.is_multiple_of(S::LANES) {
            return finish_cols(t, t.cols);
        }
        finish_vectors::<S>(t);
        if matches!(t.ep.activation, Activation::GeluErf | Activation::GeluTanh) {
            for row in t.row {
                let out = std::slice::from_raw_parts_mut(t.c.add(row + t.col), t.cols);
                if t.ep.activation == Activation::GeluErf {
                    out.iter_mut().for_each(|o| *o = gelu_erf(*o));
                } else {
                    out.iter_mut().for_each(|o| *o = gelu_tanh(*o));
                }
            }
        }
    }
}

/// Whole vectors, all but a GELU: each result is stored once.
#[inline(always)]
unsafe fn finish_vectors<S: Simd>(t: &Finish) {
    for (i, &row) in t.row.iter().enumerate() {
        for j in (0..t.cols).step_by(S::LANES) {
            let at = row + t.col + j;
            // SAFETY: the contract of `Finish`.
            unsafe {
                let mut v = S::load(t.tile.add(i * t.nr + j));
                if t.accumulate {
                    v = S::add(S::load(t.c.add(at)), v);
                }
                if !t.ep.bias.is_null() {
                    v = S::add(v, S::load(t.ep.bias.add(t.col + j)));
                }
                if !t.ep.addend.is_null() {
                    v = S::add(v, S::load(t.ep.addend.add(at)));
                }
                if !t.ep.preact.is_null() {
                    S::store(t.ep.preact.add(at), v);
                }
                if t.ep.activation == Activation::Relu {
                    v = S::max(S::splat(0.0), v); // a NaN stays
                }
                S::store(t.c.add(at), v);
            }
        }
    }
}

#[inline(always)]
unsafe fn finish_cols(t: &Finish, cols: usize) {
    use std::slice::{from_raw_parts, from_raw_parts_mut};
    for (i, &row) in t.row.iter().enumerate() {
        let at = row + t.col;
        // SAFETY: the contract of `Finish`; `tile` is a buffer of its own, and `preact` is another tensor than `c`.
        unsafe {
            let sums = from_raw_parts(t.tile.add(i * t.nr), cols);
            let out = from_raw_parts_mut(t.c.add(at), cols);
            if t.accumulate {
                out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
            } else {
                out.copy_from_slice(sums);
            }
            if !t.ep.bias.is_null() {
                let bias = from_raw_parts(t.ep.bias.add(t.col), cols);
                out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
            }
            if !t.ep.addend.is_null() {
                let addend = from_raw_parts(t.ep.addend.add(at), cols);
                out.iter_mut().zip(addend).for_each(|(o, a)| *o += a);
            }
            if !t.ep.preact.is_null() {
                from_raw_parts_mut(t.ep.preact.add(at), cols).copy_from_slice(out);
            }
            match t.ep.activation {
                Activation::None => {}
                Activation::Relu => out
                    .iter_mut()
                    .for_each(|o| *o = if *o < 0.0 { 0.0 } else { *o }), // a NaN stays
                Activation::GeluErf => out.iter_mut().for_each(|o| *o = gelu_erf(*o)),
                Activation::GeluTanh => out.iter_mut().for_each(|o| *o = gelu_tanh(*o)),
            }
        }
    }
}

/// `e^x` for `x <= 0`, to about 1 ulp, in operations that vectorise; below -87 it gives `e^-87`.
#[inline(always)]
pub(crate) fn exp_neg(x: f32) -> f32 {
    // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two parts (Cody and Waite) keeps r exact.
    let x = x.max(-87.0);
    let shifted = x * LOG2_E + 12_582_912.0; // adding 1.5 * 2^23 rounds to an integer, in the low bits
    let n = shifted - 12_582_912.0;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    // Taylor polynomial to r^7 / 7!: the rest is below 1e-8 there.
    let mut p = 1.0 / 5040.0;
    for c in [
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * r + c;
    }
    p * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// GELU with the error function by Abramowitz and Stegun 7.1.26 (absolute error of erf 1.5e-7).
#[inline(always)]
pub(crate) fn gelu_erf(x: f32) -> f32 {
    let z = x.abs() * FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let poly = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_7) * t - 0.284_496_74) * t
        + 0.254_829_6)
        * t;
    let tail = 0.5 * x * poly * exp_neg(-z * z); // x * (1 - Phi(|x|))
    if x < 0.0 { tail } else { x - tail }
}

/// GELU by its tanh formula, as `x * sigmoid(2 u)`.
#[inline(always)]
pub(crate) fn gelu_tanh(x: f32) -> f32 {
    let u = 1.595_769 * (x + 0.044_715 * x * x * x); // 2 sqrt(2 / pi) (...)
    let e = exp_neg(-u.abs());
    let s = 1.0 / (1.0 + e); // sigmoid(|u|)
    x * if u < 0.0 { e * s } else { s }
}
