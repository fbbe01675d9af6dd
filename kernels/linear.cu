// Linear layers, and every convolution that is one (1 x 1, stride 1, one group): C = A B on plain matrices.
//   MODE 0  y[M, O]  = x[M, I] w[O, I]^T      both operands contiguous along the sum
//   MODE 1  dx[M, I] = dy[M, O] w[O, I]       the right one contiguous along its rows
//   MODE 2  dw[O, I] = dy[M, O]^T x[M, I]     both contiguous along their rows
// A block owns the tile TILE_M x TILE_N of C with number blockIdx.x (columns fastest: neighbours share rows of the larger
// operand through L2), blockIdx.y the part of a split sum. Grid: tiles, 1, parts.
//
// Constants: RUNG 0 naive, 1 simt, 2 mma; MODE; TILE_M, TILE_N; VEC_A, VEC_B elements a granule of either operand; VEC_C 4 where rows of C are in fours, else 1; ACT; for
// `mma` ELEMENT (float for tf32, bf16), WARP_M, WARP_N, BUFFERS and dynamic shared memory BUFFERS * (TILE_M + TILE_N) * 64 bytes.
// The ladder: `naive` is the definition, a thread an output; `simt` tiles it in shared memory and registers (each value
// read from global memory feeds 64 to 128 products, from shared memory 8); `mma` puts it on tensor cores.

#include "common/gemm_core.cuh"
#include "common/targets.cuh"

#ifndef RUNG
#define RUNG 2
#define MODE 0
#define TILE_M 128
#define TILE_N 128
#define VEC_A 4
#define VEC_B 4
#define VEC_C 4
#define ACT ACT_NONE
#define ELEMENT bf16
#define WARP_M 64
#define WARP_N 32
#define BUFFERS 4
#endif

#if RUNG == 0

// An element of C per thread. Grid: elements / 256.
extern "C" __global__ void __launch_bounds__(256)
linear_naive(const float* __restrict__ a, const float* __restrict__ b, Epilogue epilogue, unsigned rows, unsigned columns, unsigned depth) {
    const unsigned i = blockIdx.x * 256 + threadIdx.x, m = i / columns, n = i % columns;
    if (m >= rows) return;
    float sum[1] = {0.0f};
    for (unsigned k = 0; k < depth; ++k) {
        const float u = MODE == 2 ? a[size_t(k) * rows + m] : a[size_t(m) * depth + k];
        const float v = MODE == 0 ? b[size_t(n) * depth + k] : b[size_t(k) * columns + n];
        sum[0] = fmaf(u, v, sum[0]);
    }
    epilogue.store<ACT, false>(i, n, 1, sum);
}

#else

template <bool K_CONTIGUOUS, class S>
struct Plain;
template <class S>
struct Plain<true, S> : PlainK<S> {
    using PlainK<S>::PlainK;
};
template <class S>
struct Plain<false, S> : PlainR<S> {
    using PlainR<S>::PlainR;
};

// The loaders and the target of a block, for either rung.
template <class ShareA, class ShareB, class T, class Core>
__device__ __forceinline__ void linear_block(const T* a, const T* b, Epilogue epilogue, const Product& p, Core core) {
    const Work<TILE_M, TILE_N> w(p);
    epilogue.y += size_t(w.part) * p.length;
    Plain<MODE != 2, ShareA> la(a, p.pitch_a, w.m0, p.rows, p.depth);
    Plain<MODE == 0, ShareB> lb(b, p.pitch_b, w.n0, p.columns, MODE == 1 ? p.real_depth : p.depth);
    const MatrixTarget<ACT, VEC_C == 4> target = {epilogue, p.real_rows, p.real_columns, p.pitch_c, 0};
    core(la, lb, w, target);
}

#if RUNG == 1

extern "C" __global__ void __launch_bounds__(256, 2)
linear_simt(const float* __restrict__ a, const float* __restrict__ b, Epilogue epilogue, Product p) {
    using A = SimtShare<TILE_M, VEC_A, MODE != 2>;
    using B = SimtShare<TILE_N, VEC_B, MODE == 0>;
    linear_block<A, B>(a, b, epilogue, p, [](auto& la, auto& lb, const auto& w, const auto& target) { simt_tile(la, lb, w, target); });
}

#else

constexpr int MMA_THREADS = 32 * (TILE_M / WARP_M) * (TILE_N / WARP_N);

extern "C" __global__ void __launch_bounds__(MMA_THREADS)
linear_mma(const ELEMENT* __restrict__ a, const ELEMENT* __restrict__ b, Epilogue epilogue, Product p) {
    using A = MmaShare<ELEMENT, TILE_M, VEC_A, MODE != 2, MMA_THREADS>;
    using B = MmaShare<ELEMENT, TILE_N, VEC_B, MODE == 0, MMA_THREADS>;
    linear_block<A, B>(a, b, epilogue, p, [](auto& la, auto& lb, const auto& w, const auto& target) { mma_tile<WARP_M, WARP_N, BUFFERS>(la, lb, w, target); });
}

#endif
#endif
