// LayerScale: y = x * g (+ residual) over rows of C channels, and its gradients. Threads stand as in batch_norm.cu.
//
// Compile-time constants: VEC; RESIDUAL.

#include "common/reduce.cuh"

#ifndef RESIDUAL
#define RESIDUAL 0
#endif

constexpr int ROWS = 4;

extern "C" __global__ void __launch_bounds__(256)
layer_scale(unsigned rows, unsigned items, const float* __restrict__ x, const float* __restrict__ g,
            const float* __restrict__ residual, float* __restrict__ y) {
    const unsigned c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= items) return;
    const Vec<VEC> scale = load_vec<VEC>(g, c);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const unsigned row = (blockIdx.x * ROWS + r) * blockDim.y + threadIdx.y;
        if (row >= rows) return;
        const size_t at = size_t(row) * items + c;
        Vec<VEC> v = load_vec<VEC>(x, at), old = {};
        if (RESIDUAL) old = load_vec<VEC>(residual, at);
#pragma unroll
        for (int k = 0; k < VEC; ++k) v.v[k] = v.v[k] * scale.v[k] + old.v[k];
        store_vec<VEC>(y, at, v);
    }
}

// dx = dy * g, and part [parts, C] = sum of dy * x over the part's rows, in one pass over dy and x.
extern "C" __global__ void __launch_bounds__(256)
layer_scale_bwd(unsigned rows, unsigned items, unsigned per_part, const float* __restrict__ dy,
                const float* __restrict__ x, const float* __restrict__ g, float* __restrict__ dx,
                float* __restrict__ part) {
    __shared__ Vec<VEC> scratch[256];
    const unsigned c = blockIdx.y * blockDim.x + threadIdx.x;
    Vec<VEC> sum = {};
    if (c < items) {
        const Vec<VEC> scale = load_vec<VEC>(g, c);
        const unsigned first = blockIdx.x * per_part, end = min(first + per_part, rows);
        for (unsigned row = first + threadIdx.y; row < end; row += blockDim.y) {
            const size_t at = size_t(row) * items + c;
            Vec<VEC> d = load_vec<VEC>(dy, at);
            const Vec<VEC> v = load_vec<VEC>(x, at);
#pragma unroll
            for (int k = 0; k < VEC; ++k) {
                sum.v[k] += d.v[k] * v.v[k];
                d.v[k] *= scale.v[k];
            }
            store_vec<VEC>(dx, at, d);
        }
    }
    sum = column_sum<VEC>(sum, scratch);
    if (c < items && threadIdx.y == 0) store_vec<VEC>(part, size_t(blockIdx.x) * items + c, sum);
}
