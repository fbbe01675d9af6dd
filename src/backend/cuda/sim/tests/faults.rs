//! One kernel for each kind of error, wrong in exactly that way; each has a sibling that is right.

use super::{Bench, Fault, module};

/// Runs kernel `name` of `source` and returns its fault.
fn fault(source: &str, bench: &Bench, grid: u32, block: u32) -> Option<Fault> {
    let m = module(source)?;
    Some(
        *bench
            .run(&m, "k", grid, block)
            .expect_err("the kernel is wrong"),
    )
}

fn fine(source: &str, bench: &Bench, grid: u32, block: u32) {
    if let Some(m) = module(source) {
        bench
            .run(&m, "k", grid, block)
            .unwrap_or_else(|f| panic!("a right kernel is refused: {f}"));
    }
}

/// The number of the source line that holds `mark`.
fn line(source: &str, mark: &str) -> u32 {
    source
        .lines()
        .position(|l| l.contains(mark))
        .expect("the mark is there") as u32
        + 1
}

#[test]
fn read_past_the_end_names_owner_line_block_and_thread() {
    let src = r#"
extern "C" __global__ void k(const float* w, float* y) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    y[i] = w[i + 1]; // here
}"#;
    let b = Bench::new().buffer("w", &[1f32; 64]).empty("y", 256);
    let Some(f) = fault(src, &b, 2, 32) else {
        return;
    };
    assert_eq!(
        (f.line, f.block, f.thread),
        (line(src, "here"), [1, 0, 0], [31, 0, 0]),
        "{f}"
    );
    assert!(
        f.what
            .contains("out of bounds: read of 4 bytes at 0 past the end of `w` (256 bytes)"),
        "{f}"
    );
    assert!(
        f.to_string()
            .contains("kernel `k`, test.cu:4, block (1, 0, 0), thread (31, 0, 0)"),
        "{f}"
    );
}

#[test]
fn write_before_the_start() {
    let src = r#"
extern "C" __global__ void k(float* a, float* w) { w[(int)threadIdx.x - 1] = 1.f; }"#;
    let b = Bench::new().empty("a", 128).empty("w", 256);
    let Some(f) = fault(src, &b, 1, 32) else {
        return;
    };
    assert_eq!(f.thread, [0, 0, 0]);
    assert!(
        f.what.contains("4 before `w`") && f.what.contains("write"),
        "{f}"
    );
}

#[test]
fn write_past_shared_memory() {
    let src = r#"
extern "C" __global__ void k(float* y) {
    __shared__ float s[32];
    s[threadIdx.x + 4] = 1.f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(
        f.what.contains("of shared memory (128 bytes)") && f.thread == [28, 0, 0],
        "{f}"
    );
}

#[test]
fn misaligned_vector_read() {
    let src = r#"
extern "C" __global__ void k(const float* x, float* y) {
    float4 v = *(const float4*)(x + threadIdx.x);
    y[threadIdx.x] = v.x + v.w;
}"#;
    let b = Bench::new().buffer("x", &[1f32; 64]).empty("y", 128);
    let Some(f) = fault(src, &b, 1, 32) else {
        return;
    };
    assert!(
        f.what.contains("misaligned read of 16 bytes") && f.thread == [1, 0, 0],
        "{f}"
    );
}

#[test]
fn uninitialised_global_read() {
    let src = r#"
extern "C" __global__ void k(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }"#;
    let Some(f) = fault(src, &Bench::new().empty("x", 128).empty("y", 128), 1, 32) else {
        return;
    };
    assert!(
        f.what.contains("uninitialised") && f.what.contains("`x`"),
        "{f}"
    );
}

#[test]
fn what_one_launch_writes_the_next_may_read() {
    let src = r#"
extern "C" __global__ void k(float* x, float* y) { x[threadIdx.x] = 1.f; }
extern "C" __global__ void l(float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }"#;
    let Some(m) = module(src) else { return };
    let b = Bench::new().empty("x", 128).empty("y", 128);
    b.run(&m, "k", 1, 31).expect("right");
    b.run(&m, "l", 1, 31).expect("right");
    let f = b
        .run(&m, "l", 1, 32)
        .expect_err("one element was not written");
    assert!(f.what.contains("4 bytes at 124 of `x`"), "{f}");
}

#[test]
fn uninitialised_shared_read() {
    let src = r#"
extern "C" __global__ void k(float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = 1.f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 32];
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(
        f.what.contains("uninitialised") && f.what.contains("shared memory"),
        "{f}"
    );
}

#[test]
fn write_after_free_and_double_free() {
    let src = r#"
extern "C" __global__ void k(float* w) { w[threadIdx.x] = 1.f; }"#;
    let mut b = Bench::new().empty("w", 128);
    fine(src, &b, 1, 32);
    let a = b.buffers[0].0;
    b.mem.free(a).expect("it is there");
    assert!(b.mem.free(a).is_err());
    let other = b.mem.alloc(128, "other");
    assert_ne!(a, other, "addresses are not used twice");
    let Some(f) = fault(src, &b, 1, 32) else {
        return;
    };
    assert!(
        f.what.contains("write after free") && f.what.contains("`w`"),
        "{f}"
    );
}

#[test]
fn race_between_warps_without_a_barrier() {
    let src = |sync: &str| {
        format!(
            r#"
extern "C" __global__ void k(float* y) {{
    __shared__ float s[64];
    s[threadIdx.x] = threadIdx.x; // write
    {sync};
    y[threadIdx.x] = s[63 - threadIdx.x]; // read
}}"#
        )
    };
    let bench = || Bench::new().empty("y", 256);
    fine(&src("__syncthreads()"), &bench(), 1, 64);
    // Whether the read is of what is written or not yet: the second warp's write comes after the first one's read, so
    // memory is filled before to leave only the race.
    let racy = src("").replace(
        "float s[64];",
        "float s[64]; s[threadIdx.x] = 0.f; __syncthreads();",
    );
    let Some(f) = fault(&racy, &bench(), 1, 64) else {
        return;
    };
    assert!(
        f.what.contains("race") && f.what.contains("without a barrier"),
        "{f}"
    );
    assert!(
        f.line == line(&racy, "// write") || f.line == line(&racy, "// read"),
        "{f}"
    );
}

#[test]
fn race_on_reuse_of_a_buffer() {
    // The barrier after the read is missing: the next round's write may come before another warp's read.
    let src = |sync: &str| {
        format!(
            r#"
extern "C" __global__ void k(float* y) {{
    __shared__ float s[64];
    float a = 0.f;
    for (int i = 0; i < 4; i++) {{
        s[threadIdx.x] = threadIdx.x * i;
        __syncthreads();
        a += s[63 - threadIdx.x];
        {sync};
    }}
    y[threadIdx.x] = a;
}}"#
        )
    };
    fine(
        &src("__syncthreads()"),
        &Bench::new().empty("y", 256),
        1,
        64,
    );
    let Some(f) = fault(&src(""), &Bench::new().empty("y", 256), 1, 64) else {
        return;
    };
    assert!(f.what.contains("race"), "{f}");
}

#[test]
fn lanes_of_a_warp_need_syncwarp() {
    let src = |sync: &str| {
        format!(
            r#"
extern "C" __global__ void k(float* y) {{
    volatile __shared__ float s[32];
    s[threadIdx.x] = threadIdx.x;
    {sync};
    y[threadIdx.x] = s[31 - threadIdx.x];
}}"#
        )
    };
    fine(&src("__syncwarp()"), &Bench::new().empty("y", 128), 1, 32);
    let Some(f) = fault(&src(""), &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(f.what.contains("__syncwarp"), "{f}");
}

#[test]
fn lanes_that_write_different_values_to_one_word() {
    let src = |v: &str| {
        format!(
            r#"
extern "C" __global__ void k(int* y) {{
    __shared__ int s[1];
    s[0] = {v};
    __syncthreads();
    y[threadIdx.x] = s[0];
}}"#
        )
    };
    fine(&src("7"), &Bench::new().empty("y", 128), 1, 32);
    let Some(f) = fault(&src("threadIdx.x"), &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(f.what.contains("race"), "{f}");
}

#[test]
fn halves_of_a_word_by_different_threads_are_no_race() {
    let src = r#"
extern "C" __global__ void k(unsigned short* y) {
    __shared__ unsigned short s[128];
    s[threadIdx.x] = threadIdx.x;
    s[64 + (threadIdx.x % 2) * 32 + threadIdx.x / 2] = threadIdx.x;
    y[threadIdx.x] = s[threadIdx.x];
    __syncthreads();
    y[64 + threadIdx.x] = s[127 - threadIdx.x];
}"#;
    fine(src, &Bench::new().empty("y", 256), 1, 64);
}

#[test]
fn shared_atomics_do_not_race_with_each_other() {
    let src = r#"
extern "C" __global__ void k(int* y) {
    __shared__ int s[1];
    if (threadIdx.x == 0) s[0] = 0;
    __syncthreads();
    atomicAdd(s, 1);
    __syncthreads();
    y[threadIdx.x] = s[0];
}"#;
    let b = Bench::new().empty("y", 256);
    fine(src, &b, 1, 64);
    if module(src).is_some() {
        assert_eq!(b.read::<i32>(0), [64; 64]);
    }
    let Some(f) = fault(
        &src.replacen("__syncthreads();\n    y", "y", 1),
        &Bench::new().empty("y", 256),
        1,
        64,
    ) else {
        return;
    };
    assert!(f.what.contains("race"), "{f}");
}

#[test]
fn barrier_in_divergent_code() {
    let src = r#"
extern "C" __global__ void k(float* y) {
    if (threadIdx.x < 16) __syncthreads();
    y[threadIdx.x] = 1.f;
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(
        f.what.contains("divergent") && f.what.contains("(16, 0, 0) is not"),
        "{f}"
    );
}

#[test]
fn barrier_that_a_warp_never_reaches() {
    let src = r#"
extern "C" __global__ void k(float* y) {
    if (threadIdx.x < 32) __syncthreads();
    y[threadIdx.x] = 1.f;
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 256), 1, 64) else {
        return;
    };
    assert!(
        f.what.contains("never reached by all threads: 32 of 64"),
        "{f}"
    );
    assert_eq!(f.line, 3, "{f}");
}

#[test]
fn barrier_after_some_threads_have_returned() {
    let src = r#"
extern "C" __global__ void k(float* y, int n) {
    if (threadIdx.x >= n) return;
    __syncthreads();
    y[threadIdx.x] = 1.f;
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 256).int(40), 1, 64) else {
        return;
    };
    assert!(f.what.contains("has ended"), "{f}");
}

#[test]
fn shuffle_with_lanes_that_are_not_there() {
    let src = r#"
extern "C" __global__ void k(float* y) {
    float v = threadIdx.x;
    if (threadIdx.x < 16) v += __shfl_xor_sync(0xffffffff, v, 1);
    y[threadIdx.x] = v;
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(
        f.what.contains("shuffle") && f.what.contains("not active"),
        "{f}"
    );
    fine(
        &src.replace("0xffffffff", "0x0000ffff"),
        &Bench::new().empty("y", 128),
        1,
        32,
    );
}

#[test]
fn shuffle_from_a_lane_outside_the_mask() {
    let src = r#"
extern "C" __global__ void k(float* y) {
    float v = threadIdx.x;
    if (threadIdx.x < 16) v = __shfl_sync(0x0000ffff, v, 20);
    y[threadIdx.x] = v;
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(f.what.contains("reads from lane 20"), "{f}");
}

#[test]
fn vote_with_lanes_that_are_not_there() {
    let src = r#"
extern "C" __global__ void k(int* y) {
    int v = 0;
    if (threadIdx.x < 5) v = __ballot_sync(0xffffffff, threadIdx.x & 1);
    y[threadIdx.x] = v;
}"#;
    let Some(f) = fault(src, &Bench::new().empty("y", 128), 1, 32) else {
        return;
    };
    assert!(f.what.contains("vote"), "{f}");
}

const COPY: &str = r#"
extern "C" __global__ void k(const float* x, float* y) {
    __shared__ float4 s[32];
    unsigned d = (unsigned)__cvta_generic_to_shared(&s[threadIdx.x]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(d), "l"(x + 4 * threadIdx.x));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    __syncthreads();
    y[threadIdx.x] = s[31 - threadIdx.x].y;
}"#;

#[test]
fn cp_async_is_not_visible_before_the_wait() {
    let data: Vec<f32> = (0..128).map(|i| i as f32).collect();
    let bench = || Bench::new().buffer("x", &data).empty("y", 128);
    let b = bench();
    fine(COPY, &b, 1, 32);
    if module(COPY).is_some() {
        let want: Vec<f32> = (0..32).map(|i| (4 * (31 - i) + 1) as f32).collect();
        assert_eq!(b.read::<f32>(1), want);
    }
    let Some(f) = fault(
        &COPY.replace("wait_group 0", "wait_group 1"),
        &bench(),
        1,
        32,
    ) else {
        return;
    };
    assert!(f.what.contains("in flight"), "{f}");
    // The wait is only for one's own copies.
    let Some(f) = fault(&COPY.replace("__syncthreads();", ""), &bench(), 1, 32) else {
        return;
    };
    assert!(f.what.contains("race"), "{f}");
}

#[test]
fn an_endless_loop_is_noticed() {
    let src = r#"
extern "C" __global__ void k(volatile int* x) { while (x[0] == 0); }"#;
    let Some(m) = module(src) else { return };
    let b = Bench::new().buffer("x", &[0i32]);
    let o = super::LaunchOptions {
        budget: 1_000_000,
        ..Default::default()
    };
    let f = b.run_with(&m, "k", 1, 32, &o).expect_err("it does not end");
    assert!(f.what.contains("endless"), "{f}");
}

#[test]
fn launches_that_are_not_possible() {
    let src = r#"
extern "C" __global__ void __launch_bounds__(128) k(int* x, int n) { x[0] = n; }"#;
    let Some(m) = module(src) else { return };
    let b = Bench::new().buffer("x", &[0i32]);
    assert!(
        b.run(&m, "k", 1, 32)
            .expect_err("too few parameters")
            .what
            .contains("parameters")
    );
    let b = b.int(1);
    assert!(
        b.run(&m, "nobody", 1, 32)
            .expect_err("no kernel")
            .what
            .contains("no such kernel")
    );
    assert!(
        b.run(&m, "k", 1, 256)
            .expect_err("too many")
            .what
            .contains("__launch_bounds__")
    );
    b.run(&m, "k", 1, 1).expect("right");
}

#[test]
fn the_lowest_failing_block_is_reported() {
    let src = r#"
extern "C" __global__ void k(int* x) { if (blockIdx.x > 2) x[-1] = 0; }"#;
    let Some(m) = module(src) else { return };
    for threads in [1, 2, 4] {
        let o = super::LaunchOptions {
            threads,
            ..Default::default()
        };
        let f = Bench::new()
            .buffer("x", &[0i32])
            .run_with(&m, "k", 64, 32, &o)
            .expect_err("wrong");
        assert_eq!(f.block, [3, 0, 0]);
    }
}

#[test]
fn unknown_instructions_are_refused_at_load_time() {
    let text = |body: &str| {
        format!(
            ".version 9.0\n.target sm_80\n.address_size 64\n.visible .entry k()\n{{\n.reg .b32 %r<4>;\n{body}\nret;\n}}\n"
        )
    };
    let error = |body: &str| {
        super::Module::parse(&text(body))
            .expect_err("unknown")
            .to_string()
    };
    let e = error("frobnicate.b32 %r1, %r2;");
    assert!(e.contains("line 7") && e.contains("frobnicate"), "{e}");
    let e = error("add.wrong.s32 %r1, %r2, %r3;");
    assert!(e.contains("line 7") && e.contains(".wrong"), "{e}");
    assert!(error("add.s32 %r1, %r2, %r9;").contains("%r9"));
    assert!(error("bra nowhere;").contains("nowhere"));
    assert!(error(".frob 3;").contains(".frob"));
    assert!(error("add.s32 %r1, %r2, #;").contains("'#'"));
    assert!(
        super::Module::parse("")
            .expect("nothing in it")
            .entries()
            .is_empty()
    );
    super::Module::parse(&text("add.s32 %r1, %r2, %r3;")).expect("right");
}
