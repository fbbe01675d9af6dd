//! Floating-point arithmetic with PTX's rounding, flushing and saturation.

use super::program::Rnd;
use half::{bf16, f16};

/// Flushes a subnormal to zero of the same sign.
#[inline(always)]
pub fn flush(x: f32, ftz: bool) -> f32 {
    let b = x.to_bits();
    if ftz && b & 0x7f80_0000 == 0 {
        f32::from_bits(b & 0x8000_0000)
    } else {
        x
    }
}

/// Clamps to [0, 1]; NaN becomes 0.
#[inline(always)]
pub fn saturate(x: f32, sat: bool) -> f32 {
    if !sat {
        x
    } else if x > 0.0 {
        if x < 1.0 { x } else { 1.0 }
    } else {
        0.0
    }
}

/// Rounds `hi + lo` to f32, where `hi` is a double's rounding of an exact value and `lo` has the sign of what is
/// missing (or is zero).
pub fn round_to_f32(hi: f64, lo: f64, rnd: Rnd) -> f32 {
    let r = hi as f32;
    if !r.is_finite() && !hi.is_finite() {
        return r;
    }
    // The exact value lies above (1) or below (-1) `r`. Nearest rounding of the double may be a double rounding: where
    // it lies half-way between two floats, what is missing decides.
    let diff = hi - f64::from(r);
    let side = if diff != 0.0 { diff } else { lo };
    match rnd {
        Rnd::Near | Rnd::Away => {
            if diff != 0.0 && lo != 0.0 && r.is_finite() {
                let other = if diff > 0.0 {
                    r.next_up()
                } else {
                    r.next_down()
                };
                if other.is_finite() {
                    let half = (f64::from(r) + f64::from(other)) / 2.0;
                    if hi == half && (lo > 0.0) == (diff > 0.0) {
                        return other;
                    }
                }
            }
            r
        }
        Rnd::Down => {
            if side < 0.0 {
                r.next_down()
            } else {
                r
            }
        }
        Rnd::Up => {
            if side > 0.0 {
                r.next_up()
            } else {
                r
            }
        }
        Rnd::Zero => {
            if side < 0.0 && r > 0.0 {
                r.next_down()
            } else if side > 0.0 && r < 0.0 {
                r.next_up()
            } else {
                r
            }
        }
    }
}

/// The error of `a + b` in double precision (Knuth).
fn sum_error(a: f64, b: f64) -> (f64, f64) {
    let s = a + b;
    let t = s - a;
    let e = (a - (s - t)) + (b - t);
    (s, if s.is_finite() { e } else { 0.0 })
}

/// The sum of two doubles, rounded once.
fn round_sum(a: f64, b: f64, rnd: Rnd) -> f32 {
    let (s, e) = sum_error(a, b);
    // An exact zero of opposite signs is -0 when rounding down.
    if rnd == Rnd::Down && s == 0.0 && e == 0.0 && a.is_sign_negative() != b.is_sign_negative() {
        return -0.0;
    }
    round_to_f32(s, e, rnd)
}

/// `a + b` in the given rounding.
pub fn add(a: f32, b: f32, rnd: Rnd) -> f32 {
    round_sum(f64::from(a), f64::from(b), rnd)
}

/// `a * b` in the given rounding.
pub fn mul(a: f32, b: f32, rnd: Rnd) -> f32 {
    round_to_f32(f64::from(a) * f64::from(b), 0.0, rnd)
}

/// `a * b + c` with one rounding.
pub fn fma(a: f32, b: f32, c: f32, rnd: Rnd) -> f32 {
    round_sum(f64::from(a) * f64::from(b), f64::from(c), rnd)
}

/// `a / b` in the given rounding.
pub fn div(a: f32, b: f32, rnd: Rnd) -> f32 {
    if rnd == Rnd::Near {
        return a / b;
    }
    let (x, y) = (f64::from(a), f64::from(b));
    let q = x / y;
    // The remainder's sign relative to the divisor's tells on which side the exact quotient lies.
    let e = if q.is_finite() {
        (-q).mul_add(y, x) * y.signum()
    } else {
        0.0
    };
    round_to_f32(q, e, rnd)
}

/// The square root in the given rounding.
pub fn sqrt(a: f32, rnd: Rnd) -> f32 {
    if rnd == Rnd::Near {
        return a.sqrt();
    }
    let x = f64::from(a);
    let q = x.sqrt();
    let e = if q.is_finite() {
        (-q).mul_add(q, x)
    } else {
        0.0
    };
    round_to_f32(q, e, rnd)
}

/// 2^x in double precision, to about 1e-14; vectorises.
#[inline(always)]
pub fn exp2(x: f64) -> f64 {
    let x = if x > 1100.0 { 1100.0 } else { x };
    let x = if x < -1100.0 { -1100.0 } else { x };
    const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52: adding it rounds to an integer
    let t = x + MAGIC;
    let n = t - MAGIC;
    let f = (x - n) * std::f64::consts::LN_2;
    let mut p = 1.0 / 6_227_020_800.0;
    for c in [
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = p * f + c;
    }
    // 2^n in two steps, so that subnormal results come out.
    let k = (t.to_bits() as u32 as i32) as i64;
    let (h, g) = (k >> 1, k - (k >> 1));
    p * f64::from_bits(((h + 1023) as u64) << 52) * f64::from_bits(((g + 1023) as u64) << 52)
}

/// tanh in double precision.
#[inline(always)]
pub fn tanh(x: f64) -> f64 {
    let e = exp2(x * (2.0 * std::f64::consts::LOG2_E));
    let big = 1.0 - 2.0 / (e + 1.0);
    // Near zero the difference cancels.
    if x.abs() < 1e-3 {
        x * (1.0 - x * x / 3.0)
    } else {
        big
    }
}

/// Minimum of numbers: NaN loses (or wins, with `nan`), -0 is below +0.
#[inline(always)]
pub fn min(a: f32, b: f32, nan: bool) -> f32 {
    pick(a, b, nan, a < b || (a == b && a.is_sign_negative()))
}

/// Maximum, as [`min`].
#[inline(always)]
pub fn max(a: f32, b: f32, nan: bool) -> f32 {
    pick(a, b, nan, a > b || (a == b && a.is_sign_positive()))
}

#[inline(always)]
fn pick(a: f32, b: f32, nan: bool, first: bool) -> f32 {
    const QNAN: f32 = f32::from_bits(0x7fff_ffff);
    let r = if first { a } else { b };
    let r = if b.is_nan() { a } else { r };
    let r = if a.is_nan() { b } else { r };
    if (nan && (a.is_nan() || b.is_nan())) || (a.is_nan() && b.is_nan()) {
        QNAN
    } else {
        r
    }
}

/// bf16 bits to f32.
#[inline(always)]
pub fn from_bf16(b: u32) -> f32 {
    f32::from_bits(b << 16)
}

/// f16 bits to f32.
#[inline(always)]
pub fn from_f16(b: u32) -> f32 {
    f16::from_bits(b as u16).to_f32()
}

/// f32 to bf16 bits; NaN becomes 0x7fff.
#[inline(always)]
pub fn to_bf16(x: f32, rnd: Rnd) -> u32 {
    let b = x.to_bits();
    let r = if rnd == Rnd::Zero {
        b >> 16
    } else {
        (b.wrapping_add(0x7fff + (b >> 16 & 1))) >> 16
    };
    if x.is_nan() { 0x7fff } else { r }
}

/// f32 to f16 bits; NaN becomes 0x7fff.
#[inline(always)]
pub fn to_f16(x: f32, rnd: Rnd) -> u32 {
    if x.is_nan() {
        return 0x7fff;
    }
    let h = f16::from_f32(x);
    if rnd == Rnd::Zero && h.to_f32().abs() > x.abs() {
        return u32::from(h.to_bits() - 1);
    }
    u32::from(h.to_bits())
}

/// f64 to a half type's bits with one rounding.
pub fn f64_to_half(x: f64, is_bf16: bool) -> u32 {
    if x.is_nan() {
        0x7fff
    } else {
        // Through f32 rounded to odd, which keeps what decides a tie.
        let r = x as f32;
        let odd = if f64::from(r) != x && r.is_finite() {
            let t = if f64::from(r).abs() > x.abs() {
                f32::from_bits(r.to_bits() - 1)
            } else {
                r
            };
            f32::from_bits(t.to_bits() | 1)
        } else {
            r
        };
        u32::from(if is_bf16 {
            bf16::from_f32(odd).to_bits()
        } else {
            f16::from_f32(odd).to_bits()
        })
    }
}

/// f32 to tf32: 10 bits of mantissa, the rest zero.
#[inline(always)]
pub fn to_tf32(x: f32, rnd: Rnd) -> u32 {
    let b = x.to_bits();
    if b & 0x7f80_0000 == 0x7f80_0000 {
        return if x.is_nan() { 0x7fff_ffff } else { b };
    }
    let r = match rnd {
        Rnd::Zero => b,
        Rnd::Away => b.wrapping_add(0x1000),
        _ => b.wrapping_add(0x0fff + (b >> 13 & 1)),
    };
    r & 0xffff_e000
}
