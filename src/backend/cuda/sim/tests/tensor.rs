//! Tensor-core instructions against the fragments' layouts as the PTX document gives them, element by element.

use super::{Bench, Module, module, numbers};
use half::bf16;

/// `mma` of every shape: each thread gathers and scatters its elements by the document's formulas.
const MMA: &str = r#"
typedef unsigned u32;
__device__ u32 two(const unsigned short* m, int i, int j) { return m[i] | (u32)m[j] << 16; }
extern "C" __global__ void k16(const unsigned short* a, const unsigned short* b, const float* c, float* d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 a0 = two(a, g * 16 + 2 * t, g * 16 + 2 * t + 1), a1 = two(a, (g + 8) * 16 + 2 * t, (g + 8) * 16 + 2 * t + 1);
    u32 a2 = two(a, g * 16 + 2 * t + 8, g * 16 + 2 * t + 9), a3 = two(a, (g + 8) * 16 + 2 * t + 8, (g + 8) * 16 + 2 * t + 9);
    u32 b0 = two(b, 2 * t * 8 + g, (2 * t + 1) * 8 + g), b1 = two(b, (2 * t + 8) * 8 + g, (2 * t + 9) * 8 + g);
    float d0, d1, d2, d3;
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1),
          "f"(c[g * 8 + 2 * t]), "f"(c[g * 8 + 2 * t + 1]), "f"(c[(g + 8) * 8 + 2 * t]), "f"(c[(g + 8) * 8 + 2 * t + 1]));
    d[g * 8 + 2 * t] = d0; d[g * 8 + 2 * t + 1] = d1; d[(g + 8) * 8 + 2 * t] = d2; d[(g + 8) * 8 + 2 * t + 1] = d3;
}
extern "C" __global__ void k8(const unsigned short* a, const unsigned short* b, const float* c, float* d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    u32 a0 = two(a, g * 8 + 2 * t, g * 8 + 2 * t + 1), a1 = two(a, (g + 8) * 8 + 2 * t, (g + 8) * 8 + 2 * t + 1);
    u32 b0 = two(b, 2 * t * 8 + g, (2 * t + 1) * 8 + g);
    float d0, d1, d2, d3;
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3) : "r"(a0), "r"(a1), "r"(b0),
          "f"(c[g * 8 + 2 * t]), "f"(c[g * 8 + 2 * t + 1]), "f"(c[(g + 8) * 8 + 2 * t]), "f"(c[(g + 8) * 8 + 2 * t + 1]));
    d[g * 8 + 2 * t] = d0; d[g * 8 + 2 * t + 1] = d1; d[(g + 8) * 8 + 2 * t] = d2; d[(g + 8) * 8 + 2 * t + 1] = d3;
}
extern "C" __global__ void t8(const u32* a, const u32* b, const float* c, float* d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float d0, d1, d2, d3;
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
        : "r"(a[g * 8 + t]), "r"(a[(g + 8) * 8 + t]), "r"(a[g * 8 + t + 4]), "r"(a[(g + 8) * 8 + t + 4]),
          "r"(b[t * 8 + g]), "r"(b[(t + 4) * 8 + g]),
          "f"(c[g * 8 + 2 * t]), "f"(c[g * 8 + 2 * t + 1]), "f"(c[(g + 8) * 8 + 2 * t]), "f"(c[(g + 8) * 8 + 2 * t + 1]));
    d[g * 8 + 2 * t] = d0; d[g * 8 + 2 * t + 1] = d1; d[(g + 8) * 8 + 2 * t] = d2; d[(g + 8) * 8 + 2 * t + 1] = d3;
}
extern "C" __global__ void t4(const u32* a, const u32* b, const float* c, float* d) {
    int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float d0, d1, d2, d3;
    asm volatile("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3) : "r"(a[g * 4 + t]), "r"(a[(g + 8) * 4 + t]), "r"(b[t * 8 + g]),
          "f"(c[g * 8 + 2 * t]), "f"(c[g * 8 + 2 * t + 1]), "f"(c[(g + 8) * 8 + 2 * t]), "f"(c[(g + 8) * 8 + 2 * t + 1]));
    d[g * 8 + 2 * t] = d0; d[g * 8 + 2 * t + 1] = d1; d[(g + 8) * 8 + 2 * t] = d2; d[(g + 8) * 8 + 2 * t + 1] = d3;
}"#;

fn product(a: &[f32], b: &[f32], c: &[f32], k: usize) -> Vec<f32> {
    let mut d = Vec::new();
    for i in 0..16 {
        for j in 0..8 {
            let sum: f64 = (0..k)
                .map(|x| f64::from(a[i * k + x]) * f64::from(b[x * 8 + j]))
                .sum();
            d.push((sum + f64::from(c[i * 8 + j])) as f32);
        }
    }
    d
}

fn close(got: &[f32], want: &[f32]) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!(
            (g - w).abs() <= 1e-6 * w.abs().max(1e-3),
            "element {i}: {g}, not {w}"
        );
    }
}

#[test]
fn products_of_every_shape() {
    let Some(m) = module(MMA) else { return };
    for (name, k, is_bf16) in [
        ("k16", 16, true),
        ("k8", 8, true),
        ("t8", 8, false),
        ("t4", 4, false),
    ] {
        let (a, b, c) = (numbers(1, 16 * k), numbers(2, 8 * k), numbers(3, 128));
        let bench = if is_bf16 {
            let h = |v: &[f32]| {
                v.iter()
                    .map(|&x| bf16::from_f32(x).to_bits())
                    .collect::<Vec<u16>>()
            };
            Bench::new().buffer("a", &h(&a)).buffer("b", &h(&b))
        } else {
            Bench::new().buffer("a", &a).buffer("b", &b)
        };
        let bench = bench.buffer("c", &c).empty("d", 512);
        let counters = bench.run(&m, name, 1, 32).unwrap_or_else(|f| panic!("{f}"));
        assert_eq!(
            (counters.mma, counters.mma_flops),
            (1, 2 * 16 * 8 * k as u64)
        );
        let round = |v: &[f32]| -> Vec<f32> {
            // tf32 operands lose their low 13 bits.
            v.iter()
                .map(|&x| {
                    if is_bf16 {
                        bf16::from_f32(x).to_f32()
                    } else {
                        f32::from_bits(x.to_bits() & !0x1fff)
                    }
                })
                .collect()
        };
        close(
            &bench.read::<f32>(3),
            &product(&round(&a), &round(&b), &c, k),
        );
    }
}

#[test]
fn a_lane_missing_from_mma_is_an_error() {
    let Some(m) = module(MMA) else { return };
    let bench = Bench::new()
        .buffer("a", &[0u16; 256])
        .buffer("b", &[0u16; 128])
        .buffer("c", &[0f32; 128])
        .empty("d", 512);
    let f = bench
        .run(&m, "k16", 1, 31)
        .expect_err("31 threads are no warp");
    assert!(f.what.contains("whole warp"), "{f}");
}

fn matrices(num: usize, trans: &str) -> Option<Module> {
    let regs = |op: &str| (0..num).map(|i| format!("{op}{i}")).collect::<Vec<_>>();
    let list = regs("%").join(", ");
    let outs = (0..num)
        .map(|i| format!("\"=r\"(r[{i}])"))
        .collect::<Vec<_>>()
        .join(", ");
    module(&format!(
        r#"
extern "C" __global__ void k(const unsigned short* x, unsigned* y) {{
    __shared__ __align__(16) unsigned short s[8 * {num}][24];
    for (int i = threadIdx.x; i < 64 * {num}; i += 32) s[i / 8][i % 8] = x[i];
    __syncthreads();
    unsigned r[4];
    unsigned a = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x % (8 * {num})][0]);
    asm volatile("ldmatrix.sync.aligned.m8n8.x{num}{trans}.shared.b16 {{{list}}}, [%{num}];" : {outs} : "r"(a));
    for (int q = 0; q < {num}; q++) y[q * 32 + threadIdx.x] = r[q];
}}"#
    ))
}

#[test]
fn ldmatrix_rows_and_columns() {
    for num in [1, 2, 4] {
        for trans in ["", ".trans"] {
            let Some(m) = matrices(num, trans) else {
                return;
            };
            let x: Vec<u16> = (0..64 * num as u16).map(|i| i * 7 + 1).collect();
            let bench = Bench::new().buffer("x", &x).empty("y", 128 * num);
            bench.run(&m, "k", 1, 32).unwrap_or_else(|f| panic!("{f}"));
            for (i, got) in bench.read::<u32>(1).into_iter().enumerate() {
                let (q, row, col) = (i / 32, i % 32 / 4, i % 4 * 2);
                let at = |r: usize, c: usize| {
                    u32::from(
                        x[q * 64
                            + if trans.is_empty() {
                                r * 8 + c
                            } else {
                                c * 8 + r
                            }],
                    )
                };
                assert_eq!(
                    got,
                    at(row, col) | at(row, col + 1) << 16,
                    "x{num}{trans} {i}"
                );
            }
        }
    }
}

#[test]
fn stmatrix_is_the_inverse_of_ldmatrix() {
    for trans in ["", ".trans"] {
        let Some(m) = module(&format!(
            r#"
extern "C" __global__ void k(const unsigned* x, unsigned* y) {{
    __shared__ __align__(16) unsigned short s[32][8];
    unsigned a = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x][0]);
    unsigned r0 = x[threadIdx.x], r1 = x[32 + threadIdx.x], r2 = x[64 + threadIdx.x], r3 = x[96 + threadIdx.x];
    asm volatile("stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%0], {{%1, %2, %3, %4}};"
        :: "r"(a), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
    __syncwarp();
    asm volatile("ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%0, %1, %2, %3}}, [%4];"
        : "=r"(r0), "=r"(r1), "=r"(r2), "=r"(r3) : "r"(a));
    y[threadIdx.x] = r0; y[32 + threadIdx.x] = r1; y[64 + threadIdx.x] = r2; y[96 + threadIdx.x] = r3;
}}"#
        )) else {
            return;
        };
        let x: Vec<u32> = super::bits(5).take(128).collect();
        let bench = Bench::new().buffer("x", &x).empty("y", 512);
        bench.run(&m, "k", 1, 32).unwrap_or_else(|f| panic!("{f}"));
        assert_eq!(bench.read::<u32>(1), x);
    }
}

#[test]
fn cp_async_sizes_zero_fill_and_groups() {
    let src = r#"
extern "C" __global__ void k(const float* x, float* y) {
    __shared__ float4 s[3][32];
    int t = threadIdx.x;
    unsigned d[3];
    for (int i = 0; i < 3; i++) d[i] = (unsigned)__cvta_generic_to_shared(&s[i][t]);
    // Odd threads copy 8 bytes of 16, the rest becomes zero.
    int n = t % 2 ? 8 : 16;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(d[0]), "l"(x + 4 * t), "r"(n));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" :: "r"(d[1]), "l"(x + 4 * t));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(d[1] + 8), "l"(x + 4 * t + 3));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, 0;" :: "r"(d[1] + 12), "l"(x));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(d[2]), "l"(x + 4 * (31 - t)));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 2;" ::: "memory");
    float4 a = s[0][t];
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    float4 b = s[1][t];
    asm volatile("cp.async.wait_all;" ::: "memory");
    float4 c = s[2][t];
    float v[12] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w, c.x, c.y, c.z, c.w};
    for (int i = 0; i < 12; i++) y[12 * t + i] = v[i];
}"#;
    let Some(m) = module(src) else { return };
    let x: Vec<f32> = (1..=128).map(|i| i as f32).collect();
    let bench = Bench::new().buffer("x", &x).empty("y", 12 * 128);
    let c = bench.run(&m, "k", 1, 32).unwrap_or_else(|f| panic!("{f}"));
    // Copies of 16 bytes have no conflicts. Of 8, two lanes of a half warp share a bank; of 4, four lanes do.
    assert_eq!(c.bank_conflicts(), 2 + 3 + 3);
    for (t, v) in bench.read::<f32>(1).chunks_exact(12).enumerate() {
        let e = |i: usize| x[4 * t + i];
        let odd = |v: f32| if t % 2 == 1 { 0.0 } else { v };
        let last = 4 * (31 - t);
        let want = [
            e(0),
            e(1),
            odd(e(2)),
            odd(e(3)),
            e(0),
            e(1),
            e(3),
            0.0,
            x[last],
            x[last + 1],
            x[last + 2],
            x[last + 3],
        ];
        assert_eq!(v, want, "thread {t}");
    }
}
