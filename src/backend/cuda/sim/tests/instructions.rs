//! One kernel for each instruction, against the same operation computed on the CPU in another way: in wider integers
//! or doubles, and for directed roundings by the processor's own rounding modes.

// The references are written as the document has them.
#![allow(
    clippy::neg_cmp_op_on_partial_ord,
    clippy::precedence,
    clippy::cast_abs_to_unsigned
)]

use super::super::float;
use super::super::program::Rnd;
use super::{Bench, bits, module};

/// How a result is compared.
#[derive(Clone, Copy, PartialEq)]
pub enum As {
    Bits,
    /// f32: any NaN equals any other.
    Float,
    /// f32, within so many units in the last place.
    Ulps(u32),
}

pub type Ref = fn(u32, u32, u32) -> u32;

/// Runs `d = body(a, b, c)` for each case on many operands.
pub fn check(cases: &[(&str, As, Ref)], operands: &[[u32; 3]]) {
    let mut src = String::new();
    for (i, (body, ..)) in cases.iter().enumerate() {
        src += &format!(
            r#"
extern "C" __global__ void k{i}(const unsigned* a, const unsigned* b, const unsigned* c, unsigned* d) {{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned r;
    asm volatile("{{ .reg .b32 a, b, c, d, e, f; .reg .b64 x, y, z, w; .reg .b16 h, i, j, k; .reg .pred p, q;"
        "mov.b32 a, %1; mov.b32 b, %2; mov.b32 c, %3; mov.b32 d, 0;"
        "{body} mov.b32 %0, d; }}" : "=r"(r) : "r"(a[i]), "r"(b[i]), "r"(c[i]));
    d[i] = r;
}}"#
        );
    }
    let Some(m) = module(&src) else { return };
    let n = operands.len() / 128 * 128;
    let column = |k: usize| operands[..n].iter().map(|o| o[k]).collect::<Vec<_>>();
    for (i, (body, how, f)) in cases.iter().enumerate() {
        let bench = Bench::new()
            .buffer("a", &column(0))
            .buffer("b", &column(1))
            .buffer("c", &column(2))
            .empty("d", 4 * n);
        bench
            .run(&m, &format!("k{i}"), n as u32 / 128, 128)
            .unwrap_or_else(|e| panic!("{body}: {e}"));
        for (o, got) in operands.iter().zip(bench.read::<u32>(3)) {
            let want = f(o[0], o[1], o[2]);
            let (x, y) = (f32::from_bits(got), f32::from_bits(want));
            let same = match how {
                As::Bits => got == want,
                As::Float => got == want || (x.is_nan() && y.is_nan()),
                As::Ulps(n) => {
                    got == want
                        || (x.is_nan() && y.is_nan())
                        || (x.is_sign_negative() == y.is_sign_negative()
                            && got.abs_diff(want) <= *n)
                }
            };
            assert!(
                same,
                "{body} of {o:08x?}: got {got:08x} ({x:e}), want {want:08x} ({y:e})"
            );
        }
    }
}

pub fn operands(edges: &[u32], seed: u64, make: impl Fn(u32, u32) -> u32) -> Vec<[u32; 3]> {
    let mut out = Vec::new();
    for &a in edges {
        for &b in edges {
            for &c in edges {
                out.push([a, b, c]);
            }
        }
    }
    let mut r = bits(seed);
    let mut next = || make(r.next().expect("endless"), r.next().expect("endless"));
    for _ in 0..2048 {
        out.push([next(), next(), next()]);
    }
    while out.len() % 128 != 0 {
        out.push([edges[0]; 3]);
    }
    out
}

fn integers() -> Vec<[u32; 3]> {
    let edges = [
        0,
        1,
        2,
        7,
        31,
        32,
        33,
        63,
        255,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
    ];
    operands(&edges, 1, |x, how| x >> (how % 32))
}

pub fn floats() -> Vec<[u32; 3]> {
    let f = |x: f32| x.to_bits();
    let edges = [
        f(0.0),
        f(-0.0),
        f(1.0),
        f(-1.0),
        f(0.5),
        f(1.5),
        f(-2.5),
        f(3.5),
        f(0.999_999_9),
        f(1e-30),
        f(3e38),
        f(-3e38),
        1,
        0x8000_0001,
        0x007f_ffff,
        0x0080_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        f(16_777_217.0),
        f(123.456),
    ];
    // Numbers of like size, so that sums cancel and round; and any bits at all.
    operands(&edges, 2, |x, how| {
        if how % 4 == 0 {
            x
        } else {
            x & 0x83ff_ffff | 0x3c00_0000
        }
    })
}

fn s(x: u32) -> i64 {
    i64::from(x as i32)
}

pub fn u(x: u32) -> u64 {
    u64::from(x)
}

pub fn f(x: u32) -> f32 {
    f32::from_bits(x)
}

#[test]
fn integer_arithmetic() {
    use As::Bits;
    check(
        &[
            ("add.s32 d, a, b;", Bits, |a, b, _| (s(a) + s(b)) as u32),
            ("sub.s32 d, a, b;", Bits, |a, b, _| (s(a) - s(b)) as u32),
            ("add.sat.s32 d, a, b;", Bits, |a, b, _| {
                (s(a) + s(b)).clamp(i32::MIN.into(), i32::MAX.into()) as u32
            }),
            ("mul.lo.u32 d, a, b;", Bits, |a, b, _| (u(a) * u(b)) as u32),
            ("mul.hi.u32 d, a, b;", Bits, |a, b, _| {
                ((u(a) * u(b)) >> 32) as u32
            }),
            ("mul.hi.s32 d, a, b;", Bits, |a, b, _| {
                ((s(a) * s(b)) >> 32) as u32
            }),
            ("mad.lo.s32 d, a, b, c;", Bits, |a, b, c| {
                (u(a) * u(b) + u(c)) as u32
            }),
            ("mad.hi.u32 d, a, b, c;", Bits, |a, b, c| {
                (((u(a) * u(b)) >> 32) + u(c)) as u32
            }),
            (
                "mul.wide.u32 x, a, b; mov.b64 {d, e}, x; xor.b32 d, d, e;",
                Bits,
                |a, b, _| {
                    let p = u(a) * u(b);
                    p as u32 ^ (p >> 32) as u32
                },
            ),
            (
                "mul.wide.s32 x, a, b; mov.b64 {d, e}, x; xor.b32 d, d, e;",
                Bits,
                |a, b, _| {
                    let p = s(a) * s(b);
                    p as u32 ^ (p >> 32) as u32
                },
            ),
            (
                "cvt.s64.s32 y, c; mad.wide.s32 x, a, b, y; mov.b64 {e, d}, x;",
                Bits,
                |a, b, c| ((s(a) * s(b)).wrapping_add(s(c)) >> 32) as u32,
            ),
            (
                "mov.b64 x, {a, b}; mov.b64 y, {c, a}; mul.hi.u64 z, x, y; mov.b64 {d, e}, z; xor.b32 d, d, e;",
                Bits,
                |a, b, c| {
                    let p = (u128::from(a) + (u128::from(b) << 32))
                        * (u128::from(c) + (u128::from(a) << 32))
                        >> 64;
                    p as u32 ^ (p >> 32) as u32
                },
            ),
            ("div.u32 d, a, b;", Bits, |a, b, _| {
                a.checked_div(b).unwrap_or(u32::MAX)
            }),
            ("div.s32 d, a, b;", Bits, |a, b, _| {
                if b == 0 {
                    u32::MAX
                } else {
                    (s(a) / s(b)) as u32
                }
            }),
            ("rem.u32 d, a, b;", Bits, |a, b, _| {
                a.checked_rem(b).unwrap_or(a)
            }),
            ("rem.s32 d, a, b;", Bits, |a, b, _| {
                if b == 0 { a } else { (s(a) % s(b)) as u32 }
            }),
            ("min.s32 d, a, b;", Bits, |a, b, _| s(a).min(s(b)) as u32),
            ("max.u32 d, a, b;", Bits, |a, b, _| a.max(b)),
            ("abs.s32 d, a;", Bits, |a, _, _| s(a).abs() as u32),
            ("neg.s32 d, a;", Bits, |a, _, _| (-s(a)) as u32),
            ("sad.s32 d, a, b, c;", Bits, |a, b, c| {
                ((s(a) - s(b)).abs() + s(c)) as u32
            }),
            (
                "cvt.u16.u32 h, a; cvt.u16.u32 i, b; add.s16 j, h, i; cvt.u32.u16 d, j;",
                Bits,
                |a, b, _| (a.wrapping_add(b)) & 0xffff,
            ),
            (
                "cvt.u16.u32 h, a; cvt.u16.u32 i, b; max.s16 j, h, i; cvt.s32.s16 d, j;",
                Bits,
                |a, b, _| (a as u16 as i16).max(b as u16 as i16) as i32 as u32,
            ),
            (
                "cvt.u16.u32 h, a; cvt.u16.u32 i, b; mul.wide.s16 d, h, i;",
                Bits,
                |a, b, _| (i32::from(a as u16 as i16) * i32::from(b as u16 as i16)) as u32,
            ),
            ("dp4a.s32.s32 d, a, b, c;", Bits, |a, b, c| {
                (0..4).fold(c, |t, k| {
                    t.wrapping_add(
                        (i32::from(a.to_le_bytes()[k] as i8) * i32::from(b.to_le_bytes()[k] as i8))
                            as u32,
                    )
                })
            }),
            ("dp4a.u32.s32 d, a, b, c;", Bits, |a, b, c| {
                (0..4).fold(c, |t, k| {
                    t.wrapping_add(
                        (i32::from(a.to_le_bytes()[k]) * i32::from(b.to_le_bytes()[k] as i8))
                            as u32,
                    )
                })
            }),
        ],
        &integers(),
    );
}

#[test]
fn bits_and_bytes() {
    use As::Bits;
    check(
        &[
            (
                "and.b32 d, a, b; or.b32 d, d, c; not.b32 d, d;",
                Bits,
                |a, b, c| !((a & b) | c),
            ),
            ("cnot.b32 d, a;", Bits, |a, _, _| u32::from(a == 0)),
            (
                "shl.b32 d, a, b;",
                Bits,
                |a, b, _| if b > 31 { 0 } else { a << b },
            ),
            (
                "shr.u32 d, a, b;",
                Bits,
                |a, b, _| if b > 31 { 0 } else { a >> b },
            ),
            ("shr.s32 d, a, b;", Bits, |a, b, _| {
                (s(a) >> b.min(63)) as u32
            }),
            (
                "mov.b64 x, {a, b}; shr.s64 x, x, c; mov.b64 {d, e}, x; xor.b32 d, d, e;",
                Bits,
                |a, b, c| {
                    let x = ((u(b) << 32 | u(a)) as i64) >> c.min(63);
                    x as u32 ^ (x >> 32) as u32
                },
            ),
            ("shf.l.wrap.b32 d, a, b, c;", Bits, |a, b, c| {
                (((u(b) << 32 | u(a)) << (c % 32)) >> 32) as u32
            }),
            ("shf.r.clamp.b32 d, a, b, c;", Bits, |a, b, c| {
                ((u(b) << 32 | u(a)) >> c.min(32)) as u32
            }),
            ("bfe.u32 d, a, b, c;", Bits, |a, b, c| {
                (0..(c & 255).min(32))
                    .filter(|k| (b & 255) + k < 32)
                    .fold(0, |r, k| r | (a >> ((b & 255) + k) & 1) << k)
            }),
            // The document's pseudocode: beyond the field, the bit at the field's top (or the sign).
            ("bfe.s32 d, a, b, c;", Bits, |a, b, c| {
                let (pos, len) = (b & 255, c & 255);
                let sbit = if len == 0 {
                    0
                } else {
                    a >> (pos + len - 1).min(31) & 1
                };
                (0..32).fold(0, |r, k| {
                    r | (if k < len && pos + k <= 31 {
                        a >> (pos + k) & 1
                    } else {
                        sbit
                    }) << k
                })
            }),
            ("bfi.b32 d, a, b, c, 5;", Bits, |a, b, c| {
                (0..5)
                    .map(|k| (k, (c & 255) + k))
                    .filter(|k| k.1 < 32)
                    .fold(b, |r, (k, at)| r & !(1 << at) | (a >> k & 1) << at)
            }),
            (
                "mov.b64 x, {a, b}; mov.b64 y, {b, c}; bfi.b64 z, x, y, 20, 30; mov.b64 {d, e}, z; xor.b32 d, d, e;",
                Bits,
                |a, b, c| {
                    let (x, y) = (u(b) << 32 | u(a), u(c) << 32 | u(b));
                    let z = (0..30).fold(y, |r, k| r & !(1 << (20 + k)) | (x >> k & 1) << (20 + k));
                    z as u32 ^ (z >> 32) as u32
                },
            ),
            ("brev.b32 d, a;", Bits, |a, _, _| {
                (0..32).fold(0, |r, k| r | (a >> k & 1) << (31 - k))
            }),
            ("clz.b32 d, a;", Bits, |a, _, _| {
                (0..32).rev().take_while(|k| a >> k & 1 == 0).count() as u32
            }),
            ("popc.b32 d, a;", Bits, |a, _, _| {
                (0..32).map(|k| a >> k & 1).sum()
            }),
            ("bfind.u32 d, a;", Bits, |a, _, _| {
                (0..32).rev().find(|k| a >> k & 1 == 1).unwrap_or(u32::MAX)
            }),
            ("bfind.s32 d, a;", Bits, |a, _, _| {
                (0..32)
                    .rev()
                    .find(|k| a >> k & 1 != a >> 31)
                    .unwrap_or(u32::MAX)
            }),
            ("prmt.b32 d, a, b, c;", Bits, |a, b, c| {
                let all: Vec<u8> = a.to_le_bytes().into_iter().chain(b.to_le_bytes()).collect();
                u32::from_le_bytes(std::array::from_fn(|k| {
                    let sel = c >> (4 * k) & 15;
                    let byte = all[(sel & 7) as usize];
                    if sel < 8 {
                        byte
                    } else if byte >= 128 {
                        255
                    } else {
                        0
                    }
                }))
            }),
            ("lop3.b32 d, a, b, c, 0x96;", Bits, |a, b, c| a ^ b ^ c),
            ("lop3.b32 d, a, b, c, 0xca;", Bits, |a, b, c| {
                (a & b) | (!a & c)
            }),
            (
                "setp.lt.s32 p, a, b; selp.b32 d, a, c, p;",
                Bits,
                |a, b, c| if s(a) < s(b) { a } else { c },
            ),
            (
                "setp.hi.u32 p|q, a, b; @p mov.b32 d, 1; @!p mov.b32 d, 2; @q add.s32 d, d, 4;",
                Bits,
                |a, b, _| if a > b { 1 } else { 6 },
            ),
            (
                "setp.ne.s32 q, c, 0; setp.ge.and.u32 p, a, b, !q; selp.u32 d, 1, 0, p;",
                Bits,
                |a, b, c| u32::from(a >= b && c == 0),
            ),
            ("slct.b32.s32 d, a, b, c;", Bits, |a, b, c| {
                if s(c) >= 0 { a } else { b }
            }),
            ("set.eq.u32.s32 d, a, b;", Bits, |a, b, _| {
                if a == b { u32::MAX } else { 0 }
            }),
            ("mov.b32 {h, i}, a; mov.b32 d, {i, h};", Bits, |a, _, _| {
                a.rotate_left(16)
            }),
            ("cvt.s32.s8 d, a;", Bits, |a, _, _| {
                a as u8 as i8 as i32 as u32
            }),
            ("cvt.sat.u8.s32 d, a;", Bits, |a, _, _| {
                s(a).clamp(0, 255) as u32
            }),
            (
                "cvt.sat.s16.s32 h, a; cvt.s32.s16 d, h;",
                Bits,
                |a, _, _| s(a).clamp(-32768, 32767) as u32,
            ),
        ],
        &integers(),
    );
}

/// A rounding mode of the processor around one SSE instruction.
#[cfg(target_arch = "x86_64")]
mod processor {
    use std::arch::asm;

    /// MXCSR with exceptions masked and rounding `mode` (0 nearest, 1 down, 2 up, 3 to zero).
    fn csr(mode: u32) -> (u32, u32) {
        (0x1f80 | mode << 13, 0x1f80)
    }

    macro_rules! operation {
        ($name:ident, $insn:literal) => {
            pub fn $name(a: f32, b: f32, mode: u32) -> f32 {
                let (set, back) = csr(mode);
                let mut r = a;
                // SAFETY: register arithmetic; the control register is put back.
                unsafe {
                    asm!("ldmxcsr [{s}]", $insn, "ldmxcsr [{o}]", s = in(reg) &set, o = in(reg) &back,
                        r = inout(xmm_reg) r, b = in(xmm_reg) b);
                }
                r
            }
        };
    }
    operation!(add, "addss {r}, {b}");
    operation!(mul, "mulss {r}, {b}");
    operation!(div, "divss {r}, {b}");
    operation!(sqrt, "sqrtss {r}, {b}");

    pub fn fma(a: f32, b: f32, c: f32, mode: u32) -> f32 {
        let (set, back) = csr(mode);
        let mut r = c;
        // SAFETY: as above; the caller has seen that the processor has FMA.
        unsafe {
            asm!("ldmxcsr [{s}]", "vfmadd231ss {r}, {a}, {b}", "ldmxcsr [{o}]", s = in(reg) &set, o = in(reg) &back,
                r = inout(xmm_reg) r, a = in(xmm_reg) a, b = in(xmm_reg) b);
        }
        r
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn directed_rounding_is_the_processors() {
    for (rnd, mode) in [(Rnd::Near, 0), (Rnd::Down, 1), (Rnd::Up, 2), (Rnd::Zero, 3)] {
        let same = |x: f32, y: f32| x.to_bits() == y.to_bits() || (x.is_nan() && y.is_nan());
        for [a, b, c] in floats() {
            let (a, b, c) = (f(a), f(b), f(c));
            let pairs = [
                (float::add(a, b, rnd), processor::add(a, b, mode), "add"),
                (float::mul(a, b, rnd), processor::mul(a, b, mode), "mul"),
                (float::div(a, b, rnd), processor::div(a, b, mode), "div"),
                (float::sqrt(a, rnd), processor::sqrt(a, a, mode), "sqrt"),
            ];
            for (x, y, what) in pairs {
                assert!(
                    same(x, y),
                    "{what} of {a:e} {b:e}, {rnd:?}: {x:e}, the processor says {y:e}"
                );
            }
            if is_x86_feature_detected!("fma") {
                let (x, y) = (float::fma(a, b, c, rnd), processor::fma(a, b, c, mode));
                assert!(
                    same(x, y),
                    "fma of {a:e} {b:e} {c:e}, {rnd:?}: {x:e}, the processor says {y:e}"
                );
            }
        }
    }
}

fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

#[test]
fn float_arithmetic() {
    use As::{Bits, Float};
    check(
        &[
            ("add.f32 d, a, b;", Float, |a, b, _| {
                ((f64::from(f(a)) + f64::from(f(b))) as f32).to_bits()
            }),
            ("sub.rn.f32 d, a, b;", Float, |a, b, _| {
                (f(a) - f(b)).to_bits()
            }),
            ("mul.f32 d, a, b;", Float, |a, b, _| {
                ((f64::from(f(a)) * f64::from(f(b))) as f32).to_bits()
            }),
            ("fma.rn.f32 d, a, b, c;", Float, |a, b, c| {
                f(a).mul_add(f(b), f(c)).to_bits()
            }),
            ("fma.rn.ftz.f32 d, a, b, c;", Float, |a, b, c| {
                flush(flush(f(a)).mul_add(flush(f(b)), flush(f(c)))).to_bits()
            }),
            ("add.ftz.f32 d, a, b;", Float, |a, b, _| {
                flush(flush(f(a)) + flush(f(b))).to_bits()
            }),
            ("mul.ftz.f32 d, a, b;", Float, |a, b, _| {
                flush(flush(f(a)) * flush(f(b))).to_bits()
            }),
            ("add.sat.f32 d, a, b;", Bits, |a, b, _| {
                let r = f(a) + f(b);
                // NaN and -0 become +0.
                if r > 0.0 { r.min(1.0).to_bits() } else { 0 }
            }),
            ("div.rn.f32 d, a, b;", Float, |a, b, _| {
                ((f64::from(f(a)) / f64::from(f(b))) as f32).to_bits()
            }),
            ("rcp.rn.f32 d, a;", Float, |a, _, _| (1.0 / f(a)).to_bits()),
            ("sqrt.rn.f32 d, a;", Float, |a, _, _| f(a).sqrt().to_bits()),
            ("abs.f32 d, a; neg.f32 d, d;", Float, |a, _, _| {
                a | 0x8000_0000
            }),
            ("min.f32 d, a, b;", Float, |a, b, _| {
                if f(a).is_nan() {
                    return b;
                }
                if f(b).is_nan() {
                    return a;
                }
                // -0 lies below +0: order by sign and magnitude.
                let key = |x: u32| {
                    if x >> 31 == 1 {
                        -i64::from(x & 0x7fff_ffff) - 1
                    } else {
                        i64::from(x)
                    }
                };
                if key(a) < key(b) { a } else { b }
            }),
            ("max.NaN.f32 d, a, b;", Bits, |a, b, _| {
                if f(a).is_nan() || f(b).is_nan() {
                    return 0x7fff_ffff;
                }
                let key = |x: u32| {
                    if x >> 31 == 1 {
                        -i64::from(x & 0x7fff_ffff) - 1
                    } else {
                        i64::from(x)
                    }
                };
                if key(a) > key(b) { a } else { b }
            }),
            ("copysign.f32 d, a, b;", Bits, |a, b, _| {
                f(b).copysign(f(a)).to_bits()
            }),
            (
                "setp.lt.f32 p, a, b; selp.b32 d, 1, 0, p;",
                Bits,
                |a, b, _| u32::from(f(a) < f(b)),
            ),
            (
                "setp.ltu.f32 p, a, b; selp.b32 d, 1, 0, p;",
                Bits,
                |a, b, _| u32::from(!(f(a) >= f(b))),
            ),
            (
                "setp.neu.f32 p, a, b; selp.b32 d, 1, 0, p;",
                Bits,
                |a, b, _| u32::from(f(a) != f(b)),
            ),
            (
                "setp.ne.f32 p, a, b; selp.b32 d, 1, 0, p;",
                Bits,
                |a, b, _| u32::from(f(a) < f(b) || f(a) > f(b)),
            ),
            (
                "setp.gtu.f32 p, a, b; selp.b32 d, 1, 0, p;",
                Bits,
                |a, b, _| u32::from(!(f(a) <= f(b))),
            ),
            (
                "setp.nan.f32 p, a, b; selp.b32 d, 1, 0, p;",
                Bits,
                |a, b, _| u32::from(f(a).is_nan() || f(b).is_nan()),
            ),
            (
                "setp.num.f32 p, a, b; selp.b32 d, 1, 0, p;",
                Bits,
                |a, b, _| u32::from(!f(a).is_nan() && !f(b).is_nan()),
            ),
            ("set.gt.f32.f32 d, a, b;", Bits, |a, b, _| {
                if f(a) > f(b) { 1f32.to_bits() } else { 0 }
            }),
            (
                "cvt.f64.f32 x, a; cvt.f64.f32 y, b; add.f64 x, x, y; cvt.rn.f32.f64 d, x;",
                Float,
                |a, b, _| ((f64::from(f(a)) + f64::from(f(b))) as f32).to_bits(),
            ),
        ],
        &floats(),
    );
}

#[test]
fn approximations_are_accurate() {
    use As::{Float, Ulps};
    check(
        &[
            ("div.approx.f32 d, a, b;", Ulps(1), |a, b, _| {
                ((f64::from(f(a)) / f64::from(f(b))) as f32).to_bits()
            }),
            ("rcp.approx.f32 d, a;", Ulps(1), |a, _, _| {
                ((1.0 / f64::from(f(a))) as f32).to_bits()
            }),
            ("sqrt.approx.f32 d, a;", Ulps(1), |a, _, _| {
                (f64::from(f(a)).sqrt() as f32).to_bits()
            }),
            ("rsqrt.approx.f32 d, a;", Ulps(1), |a, _, _| {
                ((1.0 / f64::from(f(a)).sqrt()) as f32).to_bits()
            }),
            ("ex2.approx.f32 d, a;", Ulps(1), |a, _, _| {
                (f64::from(f(a)).exp2() as f32).to_bits()
            }),
            ("ex2.approx.ftz.f32 d, a;", Ulps(1), |a, _, _| {
                flush(f64::from(flush(f(a))).exp2() as f32).to_bits()
            }),
            ("lg2.approx.f32 d, a;", Ulps(1), |a, _, _| {
                (f64::from(f(a)).log2() as f32).to_bits()
            }),
            ("tanh.approx.f32 d, a;", Ulps(1), |a, _, _| {
                (f64::from(f(a)).tanh() as f32).to_bits()
            }),
            ("sin.approx.f32 d, a;", Float, |a, _, _| {
                (f64::from(f(a)).sin() as f32).to_bits()
            }),
            ("cos.approx.f32 d, a;", Float, |a, _, _| {
                (f64::from(f(a)).cos() as f32).to_bits()
            }),
        ],
        &floats(),
    );
}
