//! Arithmetic on 32 lanes at a time.
//!
//! Every lane is computed and the active ones are stored: no operation here has an effect beyond its result.

use super::ast::Ty;
use super::compare::compare;
use super::float as fl;
use super::program::{Alu, Inst, Rnd};
use super::warp::{R32, R64, Warp};

/// An array from a function of the index, by a plain loop: `array::from_fn` is not inlined into code compiled for AVX2,
/// and a call of its own there costs a call of libm's `fma`, too.
macro_rules! fill {
    ($ty:ty, |$l:ident| $e:expr) => {{
        let mut t = <$ty>::default();
        for $l in 0..t.len() {
            t[$l] = $e;
        }
        t
    }};
}
pub(super) use fill;

#[inline(always)]
fn map1(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(u32) -> u32) {
    let a = w.r(i.a);
    let t = fill!(R32, |l| f(a[l]));
    w.put(i.d, m, &t);
}

#[inline(always)]
fn map2(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(u32, u32) -> u32) {
    let (a, b) = (w.r(i.a), w.r(i.b));
    let t = fill!(R32, |l| f(a[l], b[l]));
    w.put(i.d, m, &t);
}

#[inline(always)]
fn map3(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(u32, u32, u32) -> u32) {
    let (a, b, c) = (w.r(i.a), w.r(i.b), w.r(i.c));
    let t = fill!(R32, |l| f(a[l], b[l], c[l]));
    w.put(i.d, m, &t);
}

#[inline(always)]
fn map1w(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(u64) -> u64) {
    let a = w.r64(i.a);
    let t = fill!(R64, |l| f(a[l]));
    w.put64(i.d, m, &t);
}

#[inline(always)]
fn map2w(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(u64, u64) -> u64) {
    let (a, b) = (w.r64(i.a), w.r64(i.b));
    let t = fill!(R64, |l| f(a[l], b[l]));
    w.put64(i.d, m, &t);
}

#[inline(always)]
fn map3w(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(u64, u64, u64) -> u64) {
    let (a, b, c) = (w.r64(i.a), w.r64(i.b), w.r64(i.c));
    let t = fill!(R64, |l| f(a[l], b[l], c[l]));
    w.put64(i.d, m, &t);
}

/// One f32 operand in, flushed; result flushed and saturated.
#[inline(always)]
fn f1(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(f32) -> f32) {
    let (ftz, sat) = (i.ftz, i.sat);
    map1(w, i, m, |a| {
        fl::saturate(fl::flush(f(fl::flush(f32::from_bits(a), ftz)), ftz), sat).to_bits()
    });
}

#[inline(always)]
fn f2(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(f32, f32) -> f32) {
    let (ftz, sat) = (i.ftz, i.sat);
    if ftz || sat {
        map2(w, i, m, |a, b| {
            let r = f(
                fl::flush(f32::from_bits(a), ftz),
                fl::flush(f32::from_bits(b), ftz),
            );
            fl::saturate(fl::flush(r, ftz), sat).to_bits()
        });
    } else {
        map2(w, i, m, |a, b| {
            f(f32::from_bits(a), f32::from_bits(b)).to_bits()
        });
    }
}

#[inline(always)]
fn f3(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(f32, f32, f32) -> f32) {
    let (ftz, sat) = (i.ftz, i.sat);
    if ftz || sat {
        map3(w, i, m, |a, b, c| {
            let x = |v| fl::flush(f32::from_bits(v), ftz);
            fl::saturate(fl::flush(f(x(a), x(b), x(c)), ftz), sat).to_bits()
        });
    } else {
        map3(w, i, m, |a, b, c| {
            f(f32::from_bits(a), f32::from_bits(b), f32::from_bits(c)).to_bits()
        });
    }
}

#[inline(always)]
fn d2(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(f64, f64) -> f64) {
    map2w(w, i, m, |a, b| {
        f(f64::from_bits(a), f64::from_bits(b)).to_bits()
    });
}

/// Applies `f` to each half of packed operands (or to the one of a scalar), in double precision, with one rounding.
fn halves(w: &mut Warp, i: &Inst, m: u32, n: usize, f: impl Fn(f64, f64, f64) -> f64) {
    let bf = matches!(i.ty, Ty::Bf16 | Ty::Bf16x2);
    let packed = matches!(i.ty, Ty::Bf16x2 | Ty::F16x2);
    let from = |b: u32| {
        f64::from(if bf {
            fl::from_bf16(b)
        } else {
            fl::from_f16(b)
        })
    };
    let (a, b, c) = (w.r(i.a), w.r(i.b), w.r(i.c));
    let mut t: R32 = [0; 32];
    for l in 0..32 {
        let one = |s: u32| {
            let x = from(a[l] >> s & 0xffff);
            let y = if n > 1 { from(b[l] >> s & 0xffff) } else { 0.0 };
            let z = if n > 2 { from(c[l] >> s & 0xffff) } else { 0.0 };
            let mut r = f(x, y, z);
            if i.sat {
                r = if r > 0.0 { r.min(1.0) } else { 0.0 };
            }
            if i.flag && i.op_is_fma() && !r.is_nan() {
                r = r.max(0.0);
            }
            fl::f64_to_half(r, bf)
        };
        t[l] = if packed {
            one(0) | one(16) << 16
        } else {
            one(0)
        };
    }
    w.put(i.d, m, &t);
}

/// Sign-extends the low 16 bits.
#[inline(always)]
pub(super) fn s16(x: u32) -> i32 {
    i32::from(x as u16 as i16)
}

/// An operation on integers of 16 bits, by their 32-bit values.
#[inline(always)]
fn int16(w: &mut Warp, i: &Inst, m: u32, f: impl Fn(i64, i64, i64) -> i64) {
    let x = |v: u32| {
        if i.ty.signed() {
            i64::from(s16(v))
        } else {
            i64::from(v & 0xffff)
        }
    };
    map3(w, i, m, |a, b, c| f(x(a), x(b), x(c)) as u32 & 0xffff);
}

impl Inst {
    fn op_is_fma(&self) -> bool {
        matches!(self.op, super::program::Op::Alu(Alu::Fma))
    }
}

/// Executes `alu` for the lanes in `m`.
///
/// Compiled twice on x86: with AVX2 and FMA, chosen at run time, and without.
pub fn exec(w: &mut Warp, alu: Alu, i: &Inst, m: u32) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        // SAFETY: the processor has what the function was compiled for.
        unsafe { exec_avx2(w, alu, i, m) };
        return;
    }
    exec_any(w, alu, i, m);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
fn exec_avx2(w: &mut Warp, alu: Alu, i: &Inst, m: u32) {
    exec_any(w, alu, i, m);
}

#[inline(always)]
fn exec_any(w: &mut Warp, alu: Alu, i: &Inst, m: u32) {
    use Ty::{B16, B32, B64, F32, F64, S16, S32, S64, U16, U32, U64};
    match (alu, i.ty) {
        (Alu::Mov, B64 | U64 | S64 | F64) => map1w(w, i, m, |a| a),
        (Alu::Mov, _) => map1(w, i, m, |a| a),

        (Alu::Add, S32) if i.sat => {
            map2(w, i, m, |a, b| (a as i32).saturating_add(b as i32) as u32)
        }
        (Alu::Sub, S32) if i.sat => {
            map2(w, i, m, |a, b| (a as i32).saturating_sub(b as i32) as u32)
        }
        (Alu::Add, U32 | S32) => map2(w, i, m, u32::wrapping_add),
        (Alu::Add, U64 | S64) => map2w(w, i, m, u64::wrapping_add),
        (Alu::Sub, U32 | S32) => map2(w, i, m, u32::wrapping_sub),
        (Alu::Sub, U64 | S64) => map2w(w, i, m, u64::wrapping_sub),
        (Alu::MulLo, U32 | S32) => map2(w, i, m, u32::wrapping_mul),
        (Alu::MulLo, U64 | S64) => map2w(w, i, m, u64::wrapping_mul),
        (Alu::MulHi, U32) => map2(w, i, m, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        (Alu::MulHi, S32) => map2(w, i, m, |a, b| {
            ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32
        }),
        (Alu::MulHi, U64) => map2w(w, i, m, |a, b| {
            ((u128::from(a) * u128::from(b)) >> 64) as u64
        }),
        (Alu::MulHi, S64) => {
            map2w(w, i, m, |a, b| {
                ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64
            });
        }
        (Alu::MulWide | Alu::MadWide, U32 | S32) => mul_wide(w, alu, i, m),
        (Alu::MulWide, U16) => map2(w, i, m, |a, b| (a & 0xffff) * (b & 0xffff)),
        (Alu::MulWide, S16) => map2(w, i, m, |a, b| (s16(a) * s16(b)) as u32),
        (Alu::MadWide, U16) => map3(w, i, m, |a, b, c| {
            ((a & 0xffff) * (b & 0xffff)).wrapping_add(c)
        }),
        (Alu::MadWide, S16) => map3(w, i, m, |a, b, c| {
            ((s16(a) * s16(b)) as u32).wrapping_add(c)
        }),
        (Alu::MadLo, U32 | S32) => map3(w, i, m, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        (Alu::MadLo, U64 | S64) => map3w(w, i, m, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        (Alu::MadHi, U32) => {
            map3(w, i, m, |a, b, c| {
                (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c)
            });
        }
        (Alu::MadHi, S32) => map3(w, i, m, |a, b, c| {
            (((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32).wrapping_add(c)
        }),
        (Alu::MadHi, U64) => map3w(w, i, m, |a, b, c| {
            (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)
        }),
        (Alu::MadHi, S64) => map3w(w, i, m, |a, b, c| {
            (((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64).wrapping_add(c)
        }),
        (Alu::Mul24, U32) => map2(w, i, m, |a, b| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff)),
        (Alu::Mul24, _) => map2(w, i, m, |a, b| s24(a).wrapping_mul(s24(b)) as u32),
        (Alu::Mad24, U32) => map3(w, i, m, |a, b, c| {
            (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff).wrapping_add(c)
        }),
        (Alu::Mad24, _) => map3(w, i, m, |a, b, c| {
            (s24(a).wrapping_mul(s24(b)) as u32).wrapping_add(c)
        }),
        (Alu::Sad, U32) => map3(w, i, m, |a, b, c| c.wrapping_add(a.abs_diff(b))),
        (Alu::Sad, S32) => map3(w, i, m, |a, b, c| {
            c.wrapping_add((a as i32).abs_diff(b as i32))
        }),
        (Alu::Sad, U64) => map3w(w, i, m, |a, b, c| c.wrapping_add(a.abs_diff(b))),
        (Alu::Sad, S64) => map3w(w, i, m, |a, b, c| {
            c.wrapping_add((a as i64).abs_diff(b as i64))
        }),
        // Division by zero gives all ones, its remainder the dividend, as the hardware does (PTX leaves it open).
        (Alu::Div, U32) => map2(w, i, m, |a, b| a.checked_div(b).unwrap_or(u32::MAX)),
        (Alu::Div, S32) => {
            map2(w, i, m, |a, b| {
                if b == 0 {
                    u32::MAX
                } else {
                    (a as i32).wrapping_div(b as i32) as u32
                }
            });
        }
        (Alu::Div, U64) => map2w(w, i, m, |a, b| a.checked_div(b).unwrap_or(u64::MAX)),
        (Alu::Div, S64) => {
            map2w(w, i, m, |a, b| {
                if b == 0 {
                    u64::MAX
                } else {
                    (a as i64).wrapping_div(b as i64) as u64
                }
            });
        }
        (Alu::Rem, U32) => map2(w, i, m, |a, b| a.checked_rem(b).unwrap_or(a)),
        (Alu::Rem, S32) => map2(w, i, m, |a, b| {
            if b == 0 {
                a
            } else {
                (a as i32).wrapping_rem(b as i32) as u32
            }
        }),
        (Alu::Rem, U64) => map2w(w, i, m, |a, b| a.checked_rem(b).unwrap_or(a)),
        (Alu::Rem, S64) => map2w(w, i, m, |a, b| {
            if b == 0 {
                a
            } else {
                (a as i64).wrapping_rem(b as i64) as u64
            }
        }),
        (Alu::Min, U32) => map2(w, i, m, u32::min),
        (Alu::Max, U32) => map2(w, i, m, u32::max),
        (Alu::Min, S32) => map2(w, i, m, |a, b| (a as i32).min(b as i32) as u32),
        (Alu::Max, S32) => map2(w, i, m, |a, b| (a as i32).max(b as i32) as u32),
        (Alu::Min, U64) => map2w(w, i, m, u64::min),
        (Alu::Max, U64) => map2w(w, i, m, u64::max),
        (Alu::Min, S64) => map2w(w, i, m, |a, b| (a as i64).min(b as i64) as u64),
        (Alu::Max, S64) => map2w(w, i, m, |a, b| (a as i64).max(b as i64) as u64),
        (Alu::Abs, S32) => map1(w, i, m, |a| (a as i32).wrapping_abs() as u32),
        (Alu::Abs, S64) => map1w(w, i, m, |a| (a as i64).wrapping_abs() as u64),
        (Alu::Neg, S32 | U32) => map1(w, i, m, u32::wrapping_neg),
        (Alu::Neg, S64 | U64) => map1w(w, i, m, u64::wrapping_neg),

        (Alu::And, B64) => map2w(w, i, m, |a, b| a & b),
        (Alu::Or, B64) => map2w(w, i, m, |a, b| a | b),
        (Alu::Xor, B64) => map2w(w, i, m, |a, b| a ^ b),
        (Alu::Not, B64) => map1w(w, i, m, |a| !a),
        (Alu::And, _) => map2(w, i, m, |a, b| a & b),
        (Alu::Or, _) => map2(w, i, m, |a, b| a | b),
        (Alu::Xor, _) => map2(w, i, m, |a, b| a ^ b),
        (Alu::Not, B16) => map1(w, i, m, |a| !a & 0xffff),
        (Alu::Not, _) => map1(w, i, m, |a| !a),
        (Alu::Cnot, B64) => map1w(w, i, m, |a| u64::from(a == 0)),
        (Alu::Cnot, _) => map1(w, i, m, |a| u32::from(a == 0)),
        (Alu::Shl | Alu::Shr, _) => shift(w, alu, i, m),
        (Alu::ShfL | Alu::ShfR, _) => {
            let (left, wrap) = (alu == Alu::ShfL, i.flag);
            map3(w, i, m, |a, b, c| {
                let n = if wrap { c & 31 } else { c.min(32) };
                let x = u64::from(b) << 32 | u64::from(a);
                if left {
                    ((x << n) >> 32) as u32
                } else {
                    (x >> n) as u32
                }
            });
        }
        (Alu::Bfe, U32) => map3(w, i, m, |a, p, n| {
            bfe(u64::from(a), p & 255, n & 255, 32, false) as u32
        }),
        (Alu::Bfe, U64) => bfe64(w, i, m, false),
        (Alu::Bfe, S64) => bfe64(w, i, m, true),
        (Alu::Bfe, _) => map3(w, i, m, |a, p, n| {
            bfe(u64::from(a), p & 255, n & 255, 32, true) as u32
        }),
        (Alu::Bfi, B64) => {
            let (a, b, c) = (w.r64(i.a), w.r64(i.b), w.r(i.c));
            let t = fill!(R64, |l| bfi(a[l], b[l], c[l] & 255, c[l] >> 8 & 255, 64));
            w.put64(i.d, m, &t);
        }
        (Alu::Bfi, _) => map3(w, i, m, |a, b, c| {
            bfi(u64::from(a), u64::from(b), c & 255, c >> 8 & 255, 32) as u32
        }),
        (Alu::Brev, B64) => map1w(w, i, m, u64::reverse_bits),
        (Alu::Brev, _) => map1(w, i, m, u32::reverse_bits),
        (Alu::Clz | Alu::Popc | Alu::Bfind, B64 | U64 | S64) => {
            let a = w.r64(i.a);
            let t = fill!(R32, |l| match alu {
                Alu::Clz => a[l].leading_zeros(),
                Alu::Popc => a[l].count_ones(),
                _ => {
                    let x = if i.ty == S64 && (a[l] as i64) < 0 {
                        !a[l]
                    } else {
                        a[l]
                    };
                    match (x, i.flag) {
                        (0, _) => u32::MAX,
                        (_, true) => x.leading_zeros(),
                        _ => 63 - x.leading_zeros(),
                    }
                }
            });
            w.put(i.d, m, &t);
        }
        (Alu::Clz, _) => map1(w, i, m, u32::leading_zeros),
        (Alu::Popc, _) => map1(w, i, m, u32::count_ones),
        (Alu::Bfind, t) => map1(w, i, m, |a| {
            let x = if t == S32 && (a as i32) < 0 { !a } else { a };
            match (x, i.flag) {
                (0, _) => u32::MAX,
                (_, true) => x.leading_zeros(),
                _ => 31 - x.leading_zeros(),
            }
        }),
        (Alu::Prmt, _) => map3(w, i, m, |a, b, c| {
            let x = u64::from(b) << 32 | u64::from(a);
            let mut r = 0;
            for k in 0..4 {
                let s = c >> (4 * k) & 15;
                let byte = (x >> (8 * (s & 7))) as u8;
                let byte = if s & 8 != 0 {
                    ((byte as i8) >> 7) as u8
                } else {
                    byte
                };
                r |= u32::from(byte) << (8 * k);
            }
            r
        }),
        (Alu::Lop3(t), _) => {
            let k = fill!([u32; 8], |b| if t >> b & 1 == 1 { u32::MAX } else { 0 });
            map3(w, i, m, |a, b, c| {
                (k[0] & !a & !b & !c)
                    | (k[1] & !a & !b & c)
                    | (k[2] & !a & b & !c)
                    | (k[3] & !a & b & c)
                    | (k[4] & a & !b & !c)
                    | (k[5] & a & !b & c)
                    | (k[6] & a & b & !c)
                    | (k[7] & a & b & c)
            });
        }
        (Alu::Dp4a, _) => {
            let byte = |x: u32, k: u32, t: Ty| {
                let v = (x >> (8 * k)) as u8;
                if t.signed() {
                    i32::from(v as i8)
                } else {
                    i32::from(v)
                }
            };
            map3(w, i, m, |a, b, c| {
                (0..4).fold(c, |s, k| {
                    s.wrapping_add((byte(a, k, i.ty) * byte(b, k, i.ty2)) as u32)
                })
            });
        }
        (Alu::Selp, t) => {
            let p = w.p(i.c);
            if t.bytes() == 8 {
                let (a, b) = (w.r64(i.a), w.r64(i.b));
                let r = fill!(R64, |l| if p >> l & 1 == 1 { a[l] } else { b[l] });
                w.put64(i.d, m, &r);
            } else {
                let (a, b) = (w.r(i.a), w.r(i.b));
                let r = fill!(R32, |l| if p >> l & 1 == 1 { a[l] } else { b[l] });
                w.put(i.d, m, &r);
            }
        }
        (Alu::Slct, t) => {
            let c = w.r(i.c);
            let ge = fill!([bool; 32], |l| match i.ty2 {
                S32 => c[l] as i32 >= 0,
                _ => fl::flush(f32::from_bits(c[l]), i.ftz) >= 0.0,
            });
            if t.bytes() == 8 {
                let (a, b) = (w.r64(i.a), w.r64(i.b));
                let r = fill!(R64, |l| if ge[l] { a[l] } else { b[l] });
                w.put64(i.d, m, &r);
            } else {
                let (a, b) = (w.r(i.a), w.r(i.b));
                let r = fill!(R32, |l| if ge[l] { a[l] } else { b[l] });
                w.put(i.d, m, &r);
            }
        }
        (Alu::Pack32, _) => map2(w, i, m, |a, b| a & 0xffff | b << 16),
        (Alu::Pack64, _) => {
            let (a, b) = (w.r(i.a), w.r(i.b));
            let r = fill!(R64, |l| u64::from(a[l]) | u64::from(b[l]) << 32);
            w.put64(i.d, m, &r);
        }
        (Alu::Unpack32, _) => {
            let a = *w.r(i.a);
            w.put(i.d, m, &a.map(|x| x & 0xffff));
            w.put(i.b, m, &a.map(|x| x >> 16));
        }
        (Alu::Unpack64, _) => {
            let a = *w.r64(i.a);
            w.put(i.d, m, &a.map(|x| x as u32));
            if i.b != super::program::NONE {
                w.put(i.b, m, &a.map(|x| (x >> 32) as u32));
            }
        }

        (Alu::Fma, F32) if i.rnd == Rnd::Near => f3(w, i, m, f32::mul_add),
        (Alu::Fma, F32) => f3(w, i, m, |a, b, c| fl::fma(a, b, c, i.rnd)),
        (Alu::Add, F32) if i.rnd == Rnd::Near => f2(w, i, m, |a, b| a + b),
        (Alu::Sub, F32) if i.rnd == Rnd::Near => f2(w, i, m, |a, b| a - b),
        (Alu::MulLo, F32) if i.rnd == Rnd::Near => f2(w, i, m, |a, b| a * b),
        (Alu::Add, F32) => f2(w, i, m, |a, b| fl::add(a, b, i.rnd)),
        (Alu::Sub, F32) => f2(w, i, m, |a, b| fl::add(a, -b, i.rnd)),
        (Alu::MulLo, F32) => f2(w, i, m, |a, b| fl::mul(a, b, i.rnd)),
        (Alu::Div, F32) => f2(w, i, m, |a, b| fl::div(a, b, i.rnd)),
        (Alu::Min, F32) => f2(w, i, m, |a, b| fl::min(a, b, i.flag)),
        (Alu::Max, F32) => f2(w, i, m, |a, b| fl::max(a, b, i.flag)),
        (Alu::Abs, F32) => f1(w, i, m, f32::abs),
        (Alu::Neg, F32) => f1(w, i, m, |a| -a),
        // `copysign d, a, b`: the sign of a, the rest of b.
        (Alu::CopySign, F32) => map2(w, i, m, |a, b| a & 0x8000_0000 | b & 0x7fff_ffff),
        (Alu::CopySign, _) => map2w(w, i, m, |a, b| a & (1 << 63) | b & !(1 << 63)),
        (Alu::Rcp, F32) => f1(w, i, m, |a| fl::div(1.0, a, i.rnd)),
        (Alu::Sqrt, F32) => f1(w, i, m, |a| fl::sqrt(a, i.rnd)),
        (Alu::Rsqrt, F32) => f1(w, i, m, |a| (1.0 / f64::from(a).sqrt()) as f32),
        (Alu::Ex2, F32) => f1(w, i, m, |a| fl::exp2(f64::from(a)) as f32),
        (Alu::Tanh, F32) => f1(w, i, m, |a| fl::tanh(f64::from(a)) as f32),
        (Alu::Lg2, F32) => f1(w, i, m, |a| f64::from(a).log2() as f32),
        (Alu::Sin, F32) => f1(w, i, m, |a| f64::from(a).sin() as f32),
        (Alu::Cos, F32) => f1(w, i, m, |a| f64::from(a).cos() as f32),

        (Alu::Fma, F64) => map3w(w, i, m, |a, b, c| {
            f64::from_bits(a)
                .mul_add(f64::from_bits(b), f64::from_bits(c))
                .to_bits()
        }),
        (Alu::Add, F64) => d2(w, i, m, |a, b| a + b),
        (Alu::Sub, F64) => d2(w, i, m, |a, b| a - b),
        (Alu::MulLo, F64) => d2(w, i, m, |a, b| a * b),
        (Alu::Div, F64) => d2(w, i, m, |a, b| a / b),
        (Alu::Min, F64) => d2(w, i, m, f64::min),
        (Alu::Max, F64) => d2(w, i, m, f64::max),
        (Alu::Abs, F64) => d2(w, i, m, |a, _| a.abs()),
        (Alu::Neg, F64) => d2(w, i, m, |a, _| -a),
        (Alu::Rcp, F64) => d2(w, i, m, |a, _| 1.0 / a),
        (Alu::Sqrt, F64) => d2(w, i, m, |a, _| a.sqrt()),
        (Alu::Rsqrt, F64) => d2(w, i, m, |a, _| 1.0 / a.sqrt()),

        (_, Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2)
            if !matches!(alu, Alu::Cvt | Alu::CvtPack | Alu::Set(_)) =>
        {
            half_op(w, alu, i, m);
        }
        (Alu::CvtPack, _) => cvt_pack(w, i, m),
        (Alu::Cvt, _) => super::cvt::exec(w, i, m),
        (Alu::Set(c), _) => {
            let t = compare(w, i, i.ty2, c);
            let one = if i.ty == F32 {
                1f32.to_bits()
            } else {
                u32::MAX
            };
            let r = fill!(R32, |l| if t >> l & 1 == 1 { one } else { 0 });
            w.put(i.d, m, &r);
        }
        (_, U16 | S16) => int16_op(w, alu, i, m),
        // The decoder lets nothing else through.
        (_, _) => debug_assert!(false, "{alu:?} of {:?}", (i.ty, B32)),
    }
}

fn s24(x: u32) -> i32 {
    (x << 8) as i32 >> 8
}

#[inline(always)]
fn mul_wide(w: &mut Warp, alu: Alu, i: &Inst, m: u32) {
    let (a, b) = (w.r(i.a), w.r(i.b));
    let mut t: R64 = if i.ty == Ty::U32 {
        fill!(R64, |l| u64::from(a[l]) * u64::from(b[l]))
    } else {
        fill!(R64, |l| (i64::from(a[l] as i32) * i64::from(b[l] as i32))
            as u64)
    };
    if alu == Alu::MadWide {
        let c = w.r64(i.c);
        for l in 0..32 {
            t[l] = t[l].wrapping_add(c[l]);
        }
    }
    w.put64(i.d, m, &t);
}

#[inline(always)]
fn shift(w: &mut Warp, alu: Alu, i: &Inst, m: u32) {
    let left = alu == Alu::Shl;
    match i.ty.bytes() {
        8 => {
            let (a, b) = (w.r64(i.a), w.r(i.b));
            let t = fill!(R64, |l| {
                let n = b[l];
                match (left, i.ty.signed()) {
                    (true, _) => a[l].checked_shl(n).unwrap_or(0),
                    (_, true) => ((a[l] as i64) >> n.min(63)) as u64,
                    _ => a[l].checked_shr(n).unwrap_or(0),
                }
            });
            w.put64(i.d, m, &t);
        }
        4 => match (left, i.ty.signed()) {
            (true, _) => map2(w, i, m, |a, n| if n < 32 { a << (n & 31) } else { 0 }),
            (_, true) => map2(w, i, m, |a, n| ((a as i32) >> n.min(31)) as u32),
            _ => map2(w, i, m, |a, n| if n < 32 { a >> (n & 31) } else { 0 }),
        },
        _ => map2(w, i, m, |a, n| {
            let n = n.min(31);
            let r = match (left, i.ty.signed()) {
                (true, _) => a << n,
                (_, true) => (s16(a) >> n) as u32,
                _ => (a & 0xffff) >> n,
            };
            r & 0xffff
        }),
    }
}

fn bfe(a: u64, pos: u32, len: u32, width: u32, signed: bool) -> u64 {
    if len == 0 {
        return 0;
    }
    let msb = width - 1;
    let top = pos.saturating_add(len).saturating_sub(1).min(msb);
    let sign = signed && (a >> top) & 1 == 1;
    let field = if pos > msb { 0 } else { a >> pos };
    let n = if pos > msb { 0 } else { len.min(width - pos) };
    let keep = if n >= 64 { u64::MAX } else { (1u64 << n) - 1 };
    (field & keep) | if sign { !keep } else { 0 }
}

fn bfe64(w: &mut Warp, i: &Inst, m: u32, signed: bool) {
    let (a, b, c) = (w.r64(i.a), w.r(i.b), w.r(i.c));
    let t = fill!(R64, |l| bfe(a[l], b[l] & 255, c[l] & 255, 64, signed));
    w.put64(i.d, m, &t);
}

fn bfi(a: u64, b: u64, pos: u32, len: u32, width: u32) -> u64 {
    if pos >= width || len == 0 {
        return b;
    }
    let n = len.min(width - pos);
    let keep = if n >= 64 {
        u64::MAX
    } else {
        ((1u64 << n) - 1) << pos
    };
    (b & !keep) | ((a << pos) & keep)
}

fn int16_op(w: &mut Warp, alu: Alu, i: &Inst, m: u32) {
    match alu {
        Alu::Add => int16(w, i, m, |a, b, _| a + b),
        Alu::Sub => int16(w, i, m, |a, b, _| a - b),
        Alu::MulLo => int16(w, i, m, |a, b, _| a * b),
        Alu::MulHi => int16(w, i, m, |a, b, _| (a * b) >> 16),
        Alu::MadLo => int16(w, i, m, |a, b, c| a * b + c),
        Alu::MadHi => int16(w, i, m, |a, b, c| ((a * b) >> 16) + c),
        Alu::Div => int16(w, i, m, |a, b, _| if b == 0 { -1 } else { a / b }),
        Alu::Rem => int16(w, i, m, |a, b, _| if b == 0 { a } else { a % b }),
        Alu::Min => int16(w, i, m, |a, b, _| a.min(b)),
        Alu::Max => int16(w, i, m, |a, b, _| a.max(b)),
        Alu::Abs => int16(w, i, m, |a, _, _| a.abs()),
        Alu::Neg => int16(w, i, m, |a, _, _| -a),
        Alu::Sad => int16(w, i, m, |a, b, c| c + (a - b).abs()),
        _ => {}
    }
}

fn half_op(w: &mut Warp, alu: Alu, i: &Inst, m: u32) {
    let nan = i.flag;
    match alu {
        Alu::Add => halves(w, i, m, 2, |a, b, _| a + b),
        Alu::Sub => halves(w, i, m, 2, |a, b, _| a - b),
        Alu::MulLo => halves(w, i, m, 2, |a, b, _| a * b),
        Alu::Fma => halves(w, i, m, 3, f64::mul_add),
        Alu::Min => halves(w, i, m, 2, |a, b, _| {
            f64::from(fl::min(a as f32, b as f32, nan))
        }),
        Alu::Max => halves(w, i, m, 2, |a, b, _| {
            f64::from(fl::max(a as f32, b as f32, nan))
        }),
        Alu::Abs => halves(w, i, m, 1, |a, _, _| a.abs()),
        Alu::Neg => halves(w, i, m, 1, |a, _, _| -a),
        Alu::Ex2 => halves(w, i, m, 1, |a, _, _| fl::exp2(a)),
        Alu::Tanh => halves(w, i, m, 1, |a, _, _| fl::tanh(a)),
        _ => {}
    }
}

#[inline(always)]
fn cvt_pack(w: &mut Warp, i: &Inst, m: u32) {
    let (rnd, relu) = (i.rnd, i.flag);
    let x = |v: u32| {
        let f = f32::from_bits(v);
        if relu && f < 0.0 { 0.0 } else { f }
    };
    if i.ty == Ty::Bf16x2 {
        map2(w, i, m, |a, b| {
            fl::to_bf16(x(a), rnd) << 16 | fl::to_bf16(x(b), rnd)
        });
    } else {
        map2(w, i, m, |a, b| {
            fl::to_f16(x(a), rnd) << 16 | fl::to_f16(x(b), rnd)
        });
    }
}
