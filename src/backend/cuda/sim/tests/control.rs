//! Control flow, exchange between lanes, atomics and state spaces: results against plain loops.

use super::{Bench, LaunchOptions, module};

/// Runs `k(int* y)` on one block of `threads` and returns `y`.
fn run(src: &str, threads: u32, n: usize) -> Option<Vec<i32>> {
    let m = module(src)?;
    let b = Bench::new().empty("y", 4 * n);
    b.run(&m, "k", 1, threads).unwrap_or_else(|f| panic!("{f}"));
    Some(b.read(0))
}

#[test]
fn divergent_paths_meet_again() {
    let src = r#"
extern "C" __global__ void k(int* y) {
    int t = threadIdx.x, v = 0;
    for (int i = 0; i < t % 7; i++) {
        if (i % 2) { v += 3; if (i == 5) break; } else if (t % 3 == 0) { v += 10; continue; } else v -= 1;
        v += 100;
    }
    // Every lane is back: a vote over the whole warp is legal.
    int all = __ballot_sync(0xffffffff, v > 50);
    y[t] = v;
    y[64 + t] = all;
}"#;
    let Some(y) = run(src, 64, 128) else { return };
    let value = |t: i32| {
        let mut v = 0;
        for i in 0..t % 7 {
            if i % 2 == 1 {
                v += 3;
                if i == 5 {
                    break;
                }
            } else if t % 3 == 0 {
                v += 10;
                continue;
            } else {
                v -= 1;
            }
            v += 100;
        }
        v
    };
    for t in 0..64 {
        assert_eq!(y[t], value(t as i32), "thread {t}");
        let first = t / 32 * 32;
        let ballot = (0..32).fold(0u32, |m, l| {
            m | u32::from(value((first + l) as i32) > 50) << l
        });
        assert_eq!(y[64 + t] as u32, ballot);
    }
}

#[test]
fn an_early_return_in_one_arm_does_not_hold_up_the_others() {
    // Warp 1 returns as a whole, from within a branch; without checks for that, its threads count as arrived.
    let src = r#"
extern "C" __global__ void k(int* y) {
    int t = threadIdx.x;
    if (t % 2) {
        if (t > 100) { y[0] = 1; return; }
        y[t] = 2 * t;
    }
    int b = __ballot_sync(0xffffffff, 1);
    if (t % 2 == 0) y[t] = b;
}"#;
    let Some(y) = run(src, 64, 64) else { return };
    for t in 0..64 {
        assert_eq!(y[t], if t % 2 == 1 { 2 * t as i32 } else { -1 });
    }
}

#[test]
fn switches_and_function_calls() {
    let src = r#"
__device__ __noinline__ int twice(int x) { if (x & 1) return 2 * x + 1; return 2 * x; }
__device__ __noinline__ long long mix(int a, double b, short c, float* p) { *p = a + (float)b; return twice(a) * 1000LL + c; }
extern "C" __global__ void k(int* y) {
    int t = threadIdx.x, v;
    switch (t % 9) {
        case 0: v = twice(t); break;
        case 1: v = 17; break;
        case 2: v = t * t; break;
        case 3: v = -t; break;
        case 4: v = t ^ 5; break;
        case 5: v = 1 << (t % 8); break;
        case 6: v = t / 3; break;
        default: v = 99;
    }
    float f;
    if (t > 10) { long long m = mix(t, 0.5, (short)-t, &f); y[64 + t] = (int)m; y[128 + t] = (int)(2 * f); }
    else { y[64 + t] = 0; y[128 + t] = 0; }
    y[t] = v;
}"#;
    let Some(y) = run(src, 64, 192) else { return };
    for t in 0..64i32 {
        let twice = 2 * t + (t & 1);
        let v = [twice, 17, t * t, -t, t ^ 5, 1 << (t % 8), t / 3, 99, 99][(t % 9) as usize];
        let (m, f) = if t > 10 {
            (twice * 1000 - t, 2 * t + 1)
        } else {
            (0, 0)
        };
        assert_eq!(
            (y[t as usize], y[64 + t as usize], y[128 + t as usize]),
            (v, m, f),
            "thread {t}"
        );
    }
}

#[test]
fn shuffles_by_the_documents_rules() {
    let src = r#"
extern "C" __global__ void k(int* y) {
    int t = threadIdx.x, v = 100 + t;
    y[t] = __shfl_up_sync(0xffffffff, v, 3);
    y[32 + t] = __shfl_down_sync(0xffffffff, v, 5, 16);
    y[64 + t] = __shfl_xor_sync(0xffffffff, v, 9);
    y[96 + t] = __shfl_sync(0xffffffff, v, t * 3, 8);
    y[128 + t] = __shfl_up_sync(0xffffffff, v, 1, 4);
    y[160 + t] = __shfl_xor_sync(0xffffffff, v, 12, 8);
}"#;
    let Some(y) = run(src, 32, 192) else { return };
    for t in 0..32i32 {
        let at = |i: i32| y[(32 * i + t) as usize] - 100;
        assert_eq!(at(0), if t >= 3 { t - 3 } else { t });
        assert_eq!(at(1), if t % 16 + 5 < 16 { t + 5 } else { t });
        assert_eq!(at(2), t ^ 9);
        assert_eq!(at(3), t / 8 * 8 + t * 3 % 8);
        assert_eq!(at(4), if t % 4 >= 1 { t - 1 } else { t });
        // A partner beyond the segment's end is out; one before it is in (CUDA's guide: accessing earlier groups).
        assert_eq!(at(5), if (t ^ 12) <= (t | 7) { t ^ 12 } else { t });
    }
}

#[test]
fn votes_matches_and_reductions() {
    let src = r#"
extern "C" __global__ void k(int* y) {
    int t = threadIdx.x;
    int p;
    y[t] = __all_sync(0xffffffff, t < 32) + 2 * __any_sync(0xffffffff, t == 7) + 4 * __any_sync(0xffffffff, t > 40);
    y[32 + t] = __match_any_sync(0xffffffff, t / 5);
    y[64 + t] = __match_all_sync(0xffffffff, t < 40, &p) + p;
    y[96 + t] = __reduce_add_sync(0xffffffff, t);
    y[128 + t] = __reduce_min_sync(0xffffffff, 5 - t);
    y[160 + t] = t < 10 ? (int)__activemask() : 0;
}"#;
    let Some(y) = run(src, 32, 192) else { return };
    for t in 0..32usize {
        let group = (0..32)
            .filter(|l| l / 5 == t / 5)
            .fold(0u32, |m, l| m | 1 << l);
        assert_eq!((y[t], y[32 + t] as u32, y[64 + t]), (3, group, 0), "-1 + 1");
        assert_eq!((y[96 + t], y[128 + t]), (496, -26));
        assert_eq!(y[160 + t], if t < 10 { 0x3ff } else { 0 });
    }
}

#[test]
fn barriers_that_count_and_named_ones() {
    let src = r#"
extern "C" __global__ void k(int* y) {
    __shared__ int s[64];
    int t = threadIdx.x;
    int n = __syncthreads_count(t % 3 == 0), a = __syncthreads_and(t < 96), o = __syncthreads_or(t == 95);
    // Warps 0 and 1 produce, warp 2 consumes: they arrive, it waits.
    if (t < 64) {
        s[t] = 5 * t;
        asm volatile("bar.arrive 1, 96;" ::: "memory");
    } else {
        asm volatile("bar.sync 1, 96;" ::: "memory");
        n += s[t - 40];
    }
    y[t] = n + 1000 * (a != 0) + 2000 * (o != 0);
}"#;
    let Some(y) = run(src, 96, 96) else { return };
    for t in 0..96i32 {
        assert_eq!(
            y[t as usize],
            32 + 3000 + if t < 64 { 0 } else { 5 * (t - 40) }
        );
    }
}

#[test]
fn atomics_in_one_order() {
    let src = r#"
extern "C" __global__ void k(int* n, unsigned* u, float* f, unsigned long long* w, int* old) {
    int t = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&n[0], t); atomicMax(&n[1], t); atomicMin(&n[2], -t); atomicXor(&n[3], t); atomicOr(&n[4], 1 << (t % 31));
    atomicInc(&u[0], 9); atomicDec(&u[1], 9); atomicExch(&u[2], 77);
    atomicAdd(w, (1ULL << 33) + t);
    float x = 1.f / (1 + t);
    atomicAdd(f, x);
    for (int seen = n[5], was; ; seen = was) { was = atomicCAS(&n[5], seen, seen + 2); if (was == seen) break; }
    old[t] = atomicAdd(&n[6], 1);
}"#;
    let Some(m) = module(src) else { return };
    let mut sums = Vec::new();
    for (threads, seed) in [(1, 0), (4, 0), (1, 9), (3, 9)] {
        let b = Bench::new()
            .buffer("n", &[0i32; 8])
            .buffer("u", &[0u32; 4])
            .buffer("f", &[0f32])
            .buffer("w", &[0u64]);
        let b = b.empty("old", 4 * 256);
        let o = LaunchOptions {
            threads,
            seed,
            ..Default::default()
        };
        b.run_with(&m, "k", 8, 32, &o)
            .unwrap_or_else(|f| panic!("{f}"));
        let n: Vec<i32> = b.read(0);
        let xor = (0..256).fold(0, |a, t| a ^ t);
        assert_eq!(n[..7], [255 * 128, 255, -255, xor, i32::MAX, 512, 256]);
        assert_eq!(b.read::<u32>(1)[..3], [6, 4, 77]);
        assert_eq!(b.read::<u64>(3), [(256u64 << 33) + 255 * 128]);
        let mut old: Vec<i32> = b.read(4);
        assert_eq!(old.is_sorted(), seed == 0, "a seed changes the order");
        old.sort_unstable();
        assert!(old.iter().enumerate().all(|(i, &o)| i as i32 == o));
        sums.push((seed, b.read::<f32>(2)[0]));
    }
    assert_eq!(sums[0], sums[1]);
    assert_eq!(sums[2], sums[3]);
    assert!((sums[0].1 - sums[2].1).abs() < 1e-4);
}

#[test]
fn state_spaces() {
    let src = r#"
__constant__ int table[5] = {3, 1, 4, 1, 5};
__device__ int counter = 40;
__device__ int* where = &counter;
struct S { int a; short b[5]; double d; };
__device__ __noinline__ int get(const int* p) { return *p; }
extern "C" __global__ void k(int* y, S s, char c) {
    __shared__ int sh[32];
    int t = threadIdx.x;
    sh[t] = 7 * t;
    int loc[8];
    for (int i = 0; i < 8; i++) loc[i] = t + i;
    __syncwarp();
    // Generic addresses of three spaces in one load.
    const int* p = t % 3 == 0 ? &sh[t] : t % 3 == 1 ? &loc[t % 8] : &table[t % 5];
    y[t] = get(p) + s.b[t % 5] + s.a + (int)s.d + c;
    if (t == 0) *where += 2;
    __syncwarp();
    y[32 + t] = counter;
}"#;
    let Some(m) = module(src) else { return };
    let mut b = Bench::new().empty("y", 256);
    for x in [
        11i32.to_le_bytes(),
        [1, 0, 2, 0],
        [3, 0, 4, 0],
        [251, 255, 0, 0],
    ] {
        b.push(&x);
    }
    b.push(&2.5f64.to_le_bytes());
    b.push(&[0xfe]);
    b.run(&m, "k", 1, 32).unwrap_or_else(|f| panic!("{f}"));
    let y: Vec<i32> = b.read(0);
    for t in 0..32usize {
        let v = [7 * t as i32, (t + t % 8) as i32, [3, 1, 4, 1, 5][t % 5]][t % 3];
        assert_eq!(y[t], v + [1, 2, 3, 4, -5][t % 5] + 11 + 2 - 2, "thread {t}");
        assert_eq!(y[32 + t], 42);
    }
}
