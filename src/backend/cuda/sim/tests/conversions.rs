//! Conversions and packed halves, as in [`instructions`](super::instructions).

#![allow(clippy::precedence)]

use super::instructions::{As, check, f, floats, operands, u};

#[test]
fn conversions() {
    use As::{Bits, Float};
    fn clamp(x: f64, lo: f64, hi: f64) -> i64 {
        if x.is_nan() {
            0
        } else {
            x.clamp(lo, hi) as i64
        }
    }
    check(
        &[
            ("cvt.rzi.s32.f32 d, a;", Bits, |a, _, _| {
                clamp(f64::from(f(a)).trunc(), -2_147_483_648.0, 2_147_483_647.0) as u32
            }),
            ("cvt.rni.s32.f32 d, a;", Bits, |a, _, _| {
                clamp(
                    f64::from(f(a)).round_ties_even(),
                    -2_147_483_648.0,
                    2_147_483_647.0,
                ) as u32
            }),
            ("cvt.rmi.s32.f32 d, a;", Bits, |a, _, _| {
                clamp(f64::from(f(a)).floor(), -2_147_483_648.0, 2_147_483_647.0) as u32
            }),
            ("cvt.rpi.u32.f32 d, a;", Bits, |a, _, _| {
                clamp(f64::from(f(a)).ceil(), 0.0, 4_294_967_295.0) as u32
            }),
            ("cvt.rni.f32.f32 d, a;", Float, |a, _, _| {
                f(a).round_ties_even().to_bits()
            }),
            ("cvt.rmi.f32.f32 d, a;", Float, |a, _, _| {
                f(a).floor().to_bits()
            }),
            ("cvt.sat.f32.f32 d, a;", Bits, |a, _, _| {
                if f(a) > 0.0 {
                    f(a).min(1.0).to_bits()
                } else {
                    0
                }
            }),
            ("cvt.rn.f32.s32 d, a;", Bits, |a, _, _| {
                (f64::from(a as i32) as f32).to_bits()
            }),
            ("cvt.rn.f32.u32 d, a;", Bits, |a, _, _| {
                (f64::from(a) as f32).to_bits()
            }),
            (
                "mov.b64 x, {a, b}; cvt.rn.f32.u64 d, x;",
                Bits,
                |a, b, _| ((u(b) << 32 | u(a)) as f32).to_bits(),
            ),
            (
                "mov.b64 x, {a, b}; cvt.rn.f32.s64 d, x;",
                Bits,
                |a, b, _| ((u(b) << 32 | u(a)) as i64 as f32).to_bits(),
            ),
            (
                "cvt.rn.bf16.f32 h, a; cvt.u32.u16 d, h;",
                Bits,
                |a, _, _| {
                    if f(a).is_nan() {
                        0x7fff
                    } else {
                        u32::from(half::bf16::from_f32(f(a)).to_bits())
                    }
                },
            ),
            ("cvt.rn.f16.f32 h, a; cvt.u32.u16 d, h;", Bits, |a, _, _| {
                if f(a).is_nan() {
                    0x7fff
                } else {
                    u32::from(half::f16::from_f32(f(a)).to_bits())
                }
            }),
            ("cvt.u16.u32 h, a; cvt.f32.f16 d, h;", Float, |a, _, _| {
                half::f16::from_bits(a as u16).to_f32().to_bits()
            }),
            ("cvt.u16.u32 h, a; cvt.f32.bf16 d, h;", Float, |a, _, _| {
                a << 16
            }),
            // The first source is the upper half.
            ("cvt.rn.bf16x2.f32 d, a, b;", Bits, |a, b, _| {
                let h = |x: u32| {
                    if f(x).is_nan() {
                        0x7fff
                    } else {
                        u32::from(half::bf16::from_f32(f(x)).to_bits())
                    }
                };
                h(a) << 16 | h(b)
            }),
            ("cvt.rn.f16x2.f32 d, a, b;", Bits, |a, b, _| {
                let h = |x: u32| {
                    if f(x).is_nan() {
                        0x7fff
                    } else {
                        u32::from(half::f16::from_f32(f(x)).to_bits())
                    }
                };
                h(a) << 16 | h(b)
            }),
            // To tf32: 10 bits of mantissa; a tie goes away from zero.
            ("cvt.rna.tf32.f32 d, a;", Float, |a, _, _| {
                let x = f(a);
                if !x.is_finite() {
                    return a;
                }
                let unit = 2f64.powi(((a >> 23 & 255).max(1) as i32) - 127 - 10);
                (((f64::from(x) / unit).round() * unit) as f32).to_bits()
            }),
        ],
        &floats(),
    );
}

#[test]
fn half_arithmetic() {
    use As::Bits;
    fn each(a: u32, b: u32, c: u32, g: impl Fn(f64, f64, f64) -> f64) -> u32 {
        let one = |sh: u32| {
            let x = |v: u32| half::bf16::from_bits((v >> sh) as u16).to_f64();
            let r = g(x(a), x(b), x(c));
            if r.is_nan() {
                0x7fff << sh
            } else {
                u32::from(half::bf16::from_f64(r).to_bits()) << sh
            }
        };
        one(0) | one(16)
    }
    check(
        &[
            ("fma.rn.bf16x2 d, a, b, c;", Bits, |a, b, c| {
                each(a, b, c, |x, y, z| x * y + z)
            }),
            ("add.rn.bf16x2 d, a, b;", Bits, |a, b, c| {
                each(a, b, c, |x, y, _| x + y)
            }),
            ("mul.rn.bf16x2 d, a, b;", Bits, |a, b, c| {
                each(a, b, c, |x, y, _| x * y)
            }),
        ],
        // Of like size, so that the exact sum fits a double.
        &operands(&[0, 0x3f80_3f80, 0xbf80_3f80, 0x4000_bf80], 3, |x, _| {
            x & 0x83ff_83ff | 0x3c00_3c00
        }),
    );
}
