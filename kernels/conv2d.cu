// Convolution as implicit GEMM, activations [N, H, W, C], weights [K, R, S, C / groups]: the rows that im2col would
// write out are only addresses, made from pixel and tap while tiles are loaded. Any kernel, stride, padding, groups.
//   MODE 0  fprop  y[pixel, k]     = sum over taps and channels of x[pixel * stride + tap - pad, c] w[k, tap, c]
//   MODE 1  dgrad  dx[pixel, c]    = sum over taps and filters of dy[(pixel + pad - tap) / stride, k] w[k, tap, c]
//                  With a stride the input's pixels fall into classes that different taps meet; a launch does one
//                  class, and no product is spent on a tap that misses (LATTICE 1 where there are several).
//   MODE 2  wgrad  dw[k, tap, c]   = sum over output pixels of dy[pixel, k] x[pixel * stride + tap - pad, c]
// A block owns the tile TILE_M x TILE_N of one group with number blockIdx.x (columns fastest, so that neighbours meet
// the same pixels in L2); blockIdx.y is the group, blockIdx.z the part of a split sum. Grid: tiles, groups, parts.
//
// Constants: as in linear.cu, and LATTICE. Granules of four (bf16: eight or four) run along channels where these are
// in fours; else (three channels of an image) the float32 and tf32 kernels load single floats, and the bf16 kernels
// find channels padded with zeros by cast_bf16. Shared memory: as common/gemm_core.cuh says.
// The ladder: `naive` is the definition, a thread an output; `simt` and `mma` differ from it as in linear.cu. 1 x 1
// convolutions of stride 1 go to linear.cu, which has no taps to find.

#include "common/gemm_core.cuh"
#include "common/targets.cuh"

#ifndef RUNG
#define RUNG 2
#define MODE 0
#define TILE_M 128
#define TILE_N 128
#define VEC_A 8
#define VEC_B 8
#define VEC_C 4
#define ACT ACT_NONE
#define LATTICE 0
#define ELEMENT bf16
#define WARP_M 64
#define WARP_N 32
#define BUFFERS 4
#endif

#if RUNG == 0

// Sizes: input [n, h, w, groups * c], output [n, p, q, groups * k], r x s taps.
struct Shape {
    unsigned n, h, w, c, p, q, k, r, s, groups;
    int stride_y, stride_x, pad_y, pad_x;
};

__device__ __forceinline__ unsigned peel(unsigned& i, unsigned extent) {
    const unsigned rest = i % extent;
    i /= extent;
    return rest;
}

#if MODE == 0
// y[n, p, q, g, k] per thread.
extern "C" __global__ void __launch_bounds__(256)
conv_naive(const float* __restrict__ x, const float* __restrict__ w, Epilogue epilogue, Shape z) {
    const unsigned at = blockIdx.x * 256 + threadIdx.x;
    unsigned i = at;
    const unsigned k = peel(i, z.k), g = peel(i, z.groups), q = peel(i, z.q), p = peel(i, z.p), n = i;
    if (n >= z.n) return;
    float sum[1] = {0.0f};
    for (unsigned r = 0; r < z.r; ++r)
        for (unsigned s = 0; s < z.s; ++s) {
            const int y = int(p) * z.stride_y + int(r) - z.pad_y, xx = int(q) * z.stride_x + int(s) - z.pad_x;
            if (y < 0 || xx < 0 || y >= int(z.h) || xx >= int(z.w)) continue;
            const float* from = x + (size_t((n * z.h + y) * z.w + xx) * z.groups + g) * z.c;
            const float* filter = w + size_t(((g * z.k + k) * z.r + r) * z.s + s) * z.c;
            for (unsigned c = 0; c < z.c; ++c) sum[0] = fmaf(from[c], filter[c], sum[0]);
        }
    epilogue.store<ACT, false>(at, g * z.k + k, 1, sum);
}
#elif MODE == 1
// dx[n, h, w, g, c] per thread.
extern "C" __global__ void __launch_bounds__(256)
conv_naive(const float* __restrict__ dy, const float* __restrict__ w, Epilogue epilogue, Shape z) {
    const unsigned at = blockIdx.x * 256 + threadIdx.x;
    unsigned i = at;
    const unsigned c = peel(i, z.c), g = peel(i, z.groups), xx = peel(i, z.w), y = peel(i, z.h), n = i;
    if (n >= z.n) return;
    float sum[1] = {0.0f};
    for (unsigned r = 0; r < z.r; ++r)
        for (unsigned s = 0; s < z.s; ++s) {
            const int py = int(y) + z.pad_y - int(r), qx = int(xx) + z.pad_x - int(s);
            if (py < 0 || qx < 0 || py % z.stride_y || qx % z.stride_x) continue;
            const int p = py / z.stride_y, q = qx / z.stride_x;
            if (p >= int(z.p) || q >= int(z.q)) continue;
            const float* from = dy + (size_t((n * z.p + p) * z.q + q) * z.groups + g) * z.k;
            for (unsigned k = 0; k < z.k; ++k)
                sum[0] = fmaf(from[k], w[size_t(((g * z.k + k) * z.r + r) * z.s + s) * z.c + c], sum[0]);
        }
    epilogue.store<ACT, false>(at, g * z.c + c, 1, sum);
}
#else
// dw[g, k, r, s, c] per thread.
extern "C" __global__ void __launch_bounds__(256)
conv_naive(const float* __restrict__ dy, const float* __restrict__ x, Epilogue epilogue, Shape z) {
    const unsigned at = blockIdx.x * 256 + threadIdx.x;
    unsigned i = at;
    const unsigned c = peel(i, z.c), s = peel(i, z.s), r = peel(i, z.r), k = peel(i, z.k), g = i;
    if (g >= z.groups) return;
    float sum[1] = {0.0f};
    for (unsigned n = 0; n < z.n; ++n)
        for (unsigned p = 0; p < z.p; ++p)
            for (unsigned q = 0; q < z.q; ++q) {
                const int y = int(p) * z.stride_y + int(r) - z.pad_y, xx = int(q) * z.stride_x + int(s) - z.pad_x;
                if (y < 0 || xx < 0 || y >= int(z.h) || xx >= int(z.w)) continue;
                const float d = dy[(size_t((n * z.p + p) * z.q + q) * z.groups + g) * z.k + k];
                sum[0] = fmaf(d, x[(size_t((n * z.h + y) * z.w + xx) * z.groups + g) * z.c + c], sum[0]);
            }
    epilogue.store<ACT, false>(at, 0, 1, sum);
}
#endif

#else

// The loaders, the target and the core of a block, for either rung.
template <class ShareA, class ShareB, class T, class Core>
__device__ __forceinline__ void conv_block(const T* a, const T* b, Epilogue epilogue, const Product& p, const Window& window, const Filter& filter, const Lattice& lattice, Core core) {
    const Work<TILE_M, TILE_N> w(p);
    a += size_t(w.group) * p.group_a;
    b += size_t(w.group) * p.group_b;
    epilogue.y += size_t(w.part) * p.length;
    const unsigned first = w.group * p.group_c;
#if MODE == 0
    PixelsK<ShareA> la(a, window, w.m0, p.rows, p.depth);
    PlainK<ShareB> lb(b, p.pitch_b, w.n0, p.columns, p.depth);
    const MatrixTarget<ACT, VEC_C == 4> target = {epilogue, p.real_rows, p.real_columns, p.pitch_c, first};
#elif MODE == 1
    PixelsK<ShareA> la(a, window, w.m0, p.rows, p.depth);
    FilterR<ShareB> lb(b, filter, w.n0, p.columns, p.depth);
#if LATTICE
    const PixelTarget<VEC_C == 4> target = {epilogue, lattice, p.real_rows, p.real_columns, p.pitch_c, first};
#else
    const MatrixTarget<ACT_NONE, VEC_C == 4> target = {epilogue, p.real_rows, p.real_columns, p.pitch_c, first};
#endif
#else
    PlainR<ShareA> la(a, p.pitch_a, w.m0, p.rows, p.depth);
    PixelsR<ShareB> lb(b, window, w.n0, p.columns, p.depth);
    const FilterTarget<VEC_C == 4> target = {epilogue.y + first, p.real_rows, p.columns, p.real_columns, p.pitch_c, window.channels};
#endif
    core(la, lb, w, target);
}

#if RUNG == 1

extern "C" __global__ void __launch_bounds__(256, 2)
conv_simt(const float* __restrict__ a, const float* __restrict__ b, Epilogue epilogue, const __grid_constant__ Product p, const __grid_constant__ Window window, const __grid_constant__ Filter filter, const __grid_constant__ Lattice lattice) {
    using A = SimtShare<TILE_M, VEC_A, MODE != 2>;
    using B = SimtShare<TILE_N, VEC_B, MODE == 0>;
    conv_block<A, B>(a, b, epilogue, p, window, filter, lattice, [](auto& la, auto& lb, const auto& w, const auto& target) {
        simt_tile(la, lb, w, target);
    });
}

#else

constexpr int MMA_THREADS = 32 * (TILE_M / WARP_M) * (TILE_N / WARP_N);

extern "C" __global__ void __launch_bounds__(MMA_THREADS)
conv_mma(const ELEMENT* __restrict__ a, const ELEMENT* __restrict__ b, Epilogue epilogue, const __grid_constant__ Product p, const __grid_constant__ Window window, const __grid_constant__ Filter filter, const __grid_constant__ Lattice lattice) {
    using A = MmaShare<ELEMENT, TILE_M, VEC_A, MODE != 2, MMA_THREADS>;
    using B = MmaShare<ELEMENT, TILE_N, VEC_B, MODE == 0, MMA_THREADS>;
    conv_block<A, B>(a, b, epilogue, p, window, filter, lattice, [](auto& la, auto& lb, const auto& w, const auto& target) {
        mma_tile<WARP_M, WARP_N, BUFFERS>(la, lb, w, target);
    });
}

#endif
#endif
