//! Conversions between types (`cvt`).

use super::ast::Ty;
use super::float as fl;
use super::program::{Inst, Rnd};
use super::warp::{R32, R64, Warp};

/// Converts the lanes in `m`. Sources are in the low bits of their register; narrow results are zero-extended to 16
/// bits' registers and sign-extended into 32-bit ones.
#[inline(always)]
pub fn exec(w: &mut Warp, i: &Inst, m: u32) {
    use Ty::{Bf16, F32, S32, S64, U8, U16, U32, U64};
    macro_rules! to32 {
        ($f:expr) => {{
            let a = w.r(i.a);
            let mut t: R32 = [0; 32];
            for l in 0..32 {
                t[l] = $f(a[l]);
            }
            w.put(i.d, m, &t);
        }};
    }
    macro_rules! to64 {
        ($f:expr) => {{
            let a = w.r(i.a);
            let mut t: R64 = [0; 32];
            for l in 0..32 {
                t[l] = $f(a[l]);
            }
            w.put64(i.d, m, &t);
        }};
    }
    match (i.ty, i.ty2) {
        (U64 | S64, U32) => to64!(u64::from),
        (U64 | S64, S32) if !i.sat => to64!(|x: u32| i64::from(x as i32) as u64),
        (U32 | S32, U64 | S64) if !i.sat => {
            let a = w.r64(i.a);
            let t: R32 = a.map(|x| x as u32);
            w.put(i.d, m, &t);
        }
        (U32 | S32, U16) if !i.sat => to32!(|x: u32| x & 0xffff),
        (U32 | S32 | U16, U8) if !i.sat => to32!(|x: u32| x & 0xff),
        (U16, U32 | S32) if !i.sat => to32!(|x: u32| x & 0xffff),
        (F32, S32) if i.rnd == Rnd::Near && !i.sat => to32!(|x: u32| (x as i32 as f32).to_bits()),
        (F32, U32) if i.rnd == Rnd::Near && !i.sat => to32!(|x: u32| (x as f32).to_bits()),
        (S32, F32) if i.rnd == Rnd::Zero => to32!(|x: u32| (f32::from_bits(x) as i32) as u32),
        (U32, F32) if i.rnd == Rnd::Zero => to32!(|x: u32| f32::from_bits(x) as u32),
        (F32, Bf16) if !i.sat => to32!(|x: u32| x << 16),
        (Bf16, F32) if !i.sat && !i.flag && matches!(i.rnd, Rnd::Near | Rnd::Zero) => {
            to32!(|x: u32| fl::to_bf16(f32::from_bits(x), i.rnd));
        }
        (Ty::F16, F32) if !i.sat && !i.flag && matches!(i.rnd, Rnd::Near | Rnd::Zero) => {
            to32!(|x: u32| fl::to_f16(f32::from_bits(x), i.rnd));
        }
        (F32, Ty::F16) if !i.sat && !i.ftz => to32!(|x: u32| fl::from_f16(x & 0xffff).to_bits()),
        (Ty::Tf32, F32) => to32!(|x: u32| fl::to_tf32(f32::from_bits(x), i.rnd)),
        _ => general(w, i, m),
    }
}

/// A value on its way from one type to another.
enum Value {
    Int(i128),
    Float(f64),
}

#[inline(never)]
fn general(w: &mut Warp, i: &Inst, m: u32) {
    for l in (0..32).filter(|l| m >> l & 1 == 1) {
        let bits = if i.ty2.bytes() == 8 {
            w.r64(i.a)[l]
        } else {
            u64::from(w.r(i.a)[l])
        };
        let out = convert(bits, i);
        if i.ty.bytes() == 8 {
            w.r64_mut(i.d)[l] = out;
        } else {
            // `b` tells that the destination register has 16 bits.
            w.r_mut(i.d)[l] = if i.b == 1 {
                out as u32 & 0xffff
            } else {
                out as u32
            };
        }
    }
}

fn round(x: f64, rnd: Rnd) -> f64 {
    match rnd {
        Rnd::Near => x.round_ties_even(),
        Rnd::Away => x.round(),
        Rnd::Zero => x.trunc(),
        Rnd::Down => x.floor(),
        Rnd::Up => x.ceil(),
    }
}

/// Converts one value; the rules are those of the PTX document's section on `cvt`.
fn convert(bits: u64, i: &Inst) -> u64 {
    let from = i.ty2;
    let v = match from {
        Ty::F32 | Ty::Tf32 => {
            Value::Float(f64::from(fl::flush(f32::from_bits(bits as u32), i.ftz)))
        }
        Ty::F64 => Value::Float(f64::from_bits(bits)),
        Ty::F16 => Value::Float(f64::from(fl::from_f16(bits as u32 & 0xffff))),
        Ty::Bf16 => Value::Float(f64::from(fl::from_bf16(bits as u32 & 0xffff))),
        t => {
            let n = t.bytes() * 8;
            let raw = bits & (u64::MAX >> (64 - n));
            Value::Int(if t.signed() {
                i128::from((raw << (64 - n)) as i64 >> (64 - n))
            } else {
                i128::from(raw)
            })
        }
    };
    if i.ty.float() {
        let x = match v {
            Value::Int(n) => return int_to_float(n, i),
            Value::Float(x) if i.int_rnd => round(x, i.rnd),
            Value::Float(x) => x,
        };
        let x = if i.sat {
            if x > 0.0 { x.min(1.0) } else { 0.0 }
        } else {
            x
        };
        let x = if i.flag && x < 0.0 { 0.0 } else { x };
        return match i.ty {
            Ty::F64 => x.to_bits(),
            Ty::F32 => {
                let r = fl::round_to_f32(x, 0.0, if i.int_rnd { Rnd::Near } else { i.rnd });
                u64::from(fl::flush(r, i.ftz).to_bits())
            }
            Ty::Bf16 | Ty::F16 if i.rnd == Rnd::Zero => {
                let f = fl::round_to_f32(x, 0.0, Rnd::Zero);
                u64::from(if i.ty == Ty::Bf16 {
                    fl::to_bf16(f, i.rnd)
                } else {
                    fl::to_f16(f, i.rnd)
                })
            }
            t => u64::from(fl::f64_to_half(x, t == Ty::Bf16)),
        };
    }
    let n = match v {
        Value::Int(n) => n,
        Value::Float(x) => {
            // To an integer: NaN is 0, and out-of-range values clamp.
            let r = round(x, i.rnd);
            return clamp(if r.is_nan() { 0 } else { r as i128 }, i.ty);
        }
    };
    if i.sat { clamp(n, i.ty) } else { wrap(n, i.ty) }
}

fn int_to_float(n: i128, i: &Inst) -> u64 {
    let (hi, lo) = {
        let h = n as f64;
        (h, (n - h as i128) as f64)
    };
    match i.ty {
        // A 64-bit integer may take a second rounding on its way through f64: `lo` is what is missing.
        Ty::F32 => {
            let r = fl::round_to_f32(hi, lo, i.rnd);
            u64::from(fl::saturate(r, i.sat).to_bits())
        }
        Ty::F64 => hi.to_bits(),
        t => u64::from(fl::f64_to_half(hi, t == Ty::Bf16)),
    }
}

fn clamp(n: i128, t: Ty) -> u64 {
    let bits = t.bytes() * 8;
    let (lo, hi) = if t.signed() {
        (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
    } else {
        (0, (1i128 << bits) - 1)
    };
    wrap(n.clamp(lo, hi), t)
}

/// The low bits, extended by the type's sign to 64.
fn wrap(n: i128, t: Ty) -> u64 {
    let bits = t.bytes() * 8;
    let raw = n as u64 & (u64::MAX >> (64 - bits));
    if t.signed() {
        ((raw << (64 - bits)) as i64 >> (64 - bits)) as u64
    } else {
        raw
    }
}
