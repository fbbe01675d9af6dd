//! Counters against numbers worked out by hand.

use super::super::Class;
use super::{Bench, LaunchOptions, module};

#[test]
fn sectors_of_strided_and_vector_accesses() {
    let src = r#"
extern "C" __global__ void k(const float* x, float* y, int stride) { y[threadIdx.x] = x[threadIdx.x * stride]; }
extern "C" __global__ void v(const float4* x, float4* y, int n) { y[threadIdx.x] = x[threadIdx.x]; }"#;
    let Some(m) = module(src) else { return };
    let x = vec![0f32; 4096];
    for (stride, sectors, ideal) in [(1, 4, 4), (2, 8, 4), (8, 32, 4), (100, 32, 4), (0, 1, 1)] {
        let b = Bench::new().buffer("x", &x).empty("y", 128).int(stride);
        let c = b.run(&m, "k", 1, 32).unwrap_or_else(|f| panic!("{f}"));
        let t = c.global_load;
        assert_eq!(
            (t.requests, t.units, t.ideal, t.bytes),
            (1, sectors, ideal, 128),
            "stride {stride}"
        );
        assert_eq!(
            (c.global_store.units, c.global_bytes()),
            (4, 32 * (sectors + 4))
        );
    }
    let b = Bench::new().buffer("x", &x).empty("y", 512).int(0);
    let c = b.run(&m, "v", 1, 32).unwrap_or_else(|f| panic!("{f}"));
    assert_eq!(
        (
            c.global_load.requests,
            c.global_load.units,
            c.global_load.efficiency()
        ),
        (1, 16, 1.0)
    );
}

#[test]
fn bank_conflicts_by_stride_and_width() {
    let src = r#"
extern "C" __global__ void k(float* y, int stride) {
    __shared__ float s[32 * 33];
    s[threadIdx.x * stride] = 1.f;
    __syncwarp();
    y[threadIdx.x] = s[threadIdx.x * stride];
}
extern "C" __global__ void v(float4* y, int stride) {
    __shared__ float4 s[32 * 9];
    s[threadIdx.x * stride] = make_float4(1, 2, 3, 4);
    __syncwarp();
    y[threadIdx.x] = s[threadIdx.x * stride];
}"#;
    let Some(m) = module(src) else { return };
    for (stride, fronts) in [(1, 1), (2, 2), (4, 4), (32, 32), (33, 1), (3, 1)] {
        let b = Bench::new().empty("y", 128).int(stride);
        let c = b.run(&m, "k", 1, 32).unwrap_or_else(|f| panic!("{f}"));
        assert_eq!(
            (c.shared_load.units, c.shared_store.units),
            (fronts, fronts),
            "stride {stride}"
        );
        assert_eq!(c.bank_conflicts(), 2 * (fronts - 1));
    }
    // 16 bytes a lane go by quarters of a warp; rows of 128 bytes put all eight lanes of one on the same banks.
    for (stride, fronts) in [(1, 4), (8, 32), (9, 4)] {
        let b = Bench::new().empty("y", 512).int(stride);
        let c = b.run(&m, "v", 1, 32).unwrap_or_else(|f| panic!("{f}"));
        assert_eq!(
            (c.shared_load.units, c.shared_load.ideal),
            (fronts, 4),
            "stride {stride}"
        );
    }
}

#[test]
fn counts_do_not_depend_on_host_threads() {
    let src = r#"
extern "C" __global__ void k(const float* x, float* y, int n) {
    __shared__ float s[64];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    s[threadIdx.x] = i < n ? x[i] : 0.f;
    __syncthreads();
    for (int k = 0; k < threadIdx.x % 5; k++) s[threadIdx.x] += 1.f;
    __syncthreads();
    if (i < n) y[i] = s[63 - threadIdx.x];
}"#;
    let Some(m) = module(src) else { return };
    let x = vec![1f32; 1000];
    let run = |threads| {
        let b = Bench::new().buffer("x", &x).empty("y", 4000).int(1000);
        let o = LaunchOptions {
            threads,
            ..Default::default()
        };
        b.run_with(&m, "k", 16, 64, &o)
            .unwrap_or_else(|f| panic!("{f}"))
    };
    let one = run(1);
    assert_eq!(one, run(3));
    assert_eq!(
        (one.blocks, one.threads, one.barriers),
        (16, 1024, 2 * 2 * 16)
    );
    assert!(one.divergent_branches >= 32);
    assert_eq!(one.by_class.values().sum::<u64>(), one.instructions);
    // One load a warp, but none in the last warp's lanes beyond the end: 1000 = 31 * 32 + 8.
    assert_eq!(
        (one.by_class[&Class::StoreGlobal], one.global_store.bytes),
        (32, 4000)
    );
    assert!(
        one.lines
            .iter()
            .any(|l| l.line == 9 && l.global.requests == 32),
        "{:?}",
        one.lines
    );
}
