//! Comparisons of 32 lanes at a time, to a mask.

use super::alu::{fill, s16};
use super::ast::Ty;
use super::float as fl;
use super::program::{Cmp, Inst};
use super::warp::Warp;

/// A lane mask from a test of every lane.
#[inline(always)]
fn mask(f: impl Fn(usize) -> bool) -> u32 {
    let t = fill!([u8; 32], |l| u8::from(f(l)) * 255);
    pack(&t)
}

/// The top bit of every byte.
#[inline(always)]
fn pack(t: &[u8; 32]) -> u32 {
    let mut r = 0;
    for (k, c) in t.chunks_exact(8).enumerate() {
        let x = u64::from_le_bytes(c.try_into().expect("8 bytes"));
        // Gathers the top bits of eight bytes into one.
        r |= (((x & 0x8080_8080_8080_8080).wrapping_mul(0x0002_0408_1020_4081) >> 56) as u32)
            << (8 * k);
    }
    r
}

#[inline(always)]
fn ordered<T: PartialOrd>(c: Cmp, a: T, b: T) -> bool {
    match c {
        Cmp::Eq | Cmp::Equ => a == b,
        Cmp::Ne | Cmp::Neu => a != b,
        Cmp::Lt | Cmp::Ltu => a < b,
        Cmp::Le | Cmp::Leu => a <= b,
        Cmp::Gt | Cmp::Gtu => a > b,
        Cmp::Ge | Cmp::Geu => a >= b,
        Cmp::Num => true,
        Cmp::Nan => false,
    }
}

#[inline(always)]
fn float_cmp<T: PartialOrd + Copy>(c: Cmp, a: T, b: T) -> bool {
    #[allow(clippy::eq_op)]
    let nan = a != a || b != b;
    match c {
        Cmp::Nan => nan,
        Cmp::Num => !nan,
        Cmp::Equ | Cmp::Neu | Cmp::Ltu | Cmp::Leu | Cmp::Gtu | Cmp::Geu => nan || ordered(c, a, b),
        _ => !nan && ordered(c, a, b),
    }
}

/// The lanes for which `$f` holds, with the comparison as a constant, so that each has a loop of its own.
macro_rules! each_cmp {
    ($cmp:expr, $f:ident, $l:ident, $a:expr, $b:expr) => {
        match $cmp {
            Cmp::Eq => mask(|$l| $f(Cmp::Eq, $a, $b)),
            Cmp::Ne => mask(|$l| $f(Cmp::Ne, $a, $b)),
            Cmp::Lt => mask(|$l| $f(Cmp::Lt, $a, $b)),
            Cmp::Le => mask(|$l| $f(Cmp::Le, $a, $b)),
            Cmp::Gt => mask(|$l| $f(Cmp::Gt, $a, $b)),
            Cmp::Ge => mask(|$l| $f(Cmp::Ge, $a, $b)),
            c => mask(|$l| $f(c, $a, $b)),
        }
    };
}

#[inline(always)]
fn compare_any(w: &Warp, i: &Inst, ty: Ty, c: Cmp) -> u32 {
    let (a, b) = (i.a, i.b);
    match ty {
        Ty::S32 => {
            let (a, b) = (w.r(a), w.r(b));
            each_cmp!(c, ordered, l, a[l] as i32, b[l] as i32)
        }
        Ty::F32 | Ty::Tf32 => {
            let (a, b) = (w.r(a), w.r(b));
            let f = |x: u32| fl::flush(f32::from_bits(x), i.ftz);
            each_cmp!(c, float_cmp, l, f(a[l]), f(b[l]))
        }
        Ty::U64 | Ty::B64 => {
            let (a, b) = (w.r64(a), w.r64(b));
            mask(|l| ordered(c, a[l], b[l]))
        }
        Ty::S64 => {
            let (a, b) = (w.r64(a), w.r64(b));
            mask(|l| ordered(c, a[l] as i64, b[l] as i64))
        }
        Ty::F64 => {
            let (a, b) = (w.r64(a), w.r64(b));
            mask(|l| float_cmp(c, f64::from_bits(a[l]), f64::from_bits(b[l])))
        }
        Ty::S16 => {
            let (a, b) = (w.r(a), w.r(b));
            mask(|l| ordered(c, s16(a[l]), s16(b[l])))
        }
        Ty::F16 => {
            let (a, b) = (w.r(a), w.r(b));
            mask(|l| float_cmp(c, fl::from_f16(a[l]), fl::from_f16(b[l])))
        }
        Ty::Bf16 => {
            let (a, b) = (w.r(a), w.r(b));
            mask(|l| float_cmp(c, fl::from_bf16(a[l]), fl::from_bf16(b[l])))
        }
        _ => {
            let (a, b) = (w.r(a), w.r(b));
            each_cmp!(c, ordered, l, a[l], b[l])
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
fn compare_avx2(w: &Warp, i: &Inst, ty: Ty, c: Cmp) -> u32 {
    compare_any(w, i, ty, c)
}

/// The lanes in which a comparison of `a` and `b` holds.
pub fn compare(w: &Warp, i: &Inst, ty: Ty, c: Cmp) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
    {
        // SAFETY: the processor has what the function was compiled for.
        return unsafe { compare_avx2(w, i, ty, c) };
    }
    compare_any(w, i, ty, c)
}
