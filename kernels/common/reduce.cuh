// Ordered reductions: the same bits every time, no atomics.
#pragma once

#include "common/vec.cuh"

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) v += __shfl_xor_sync(0xffffffffu, v, s);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int s = 16; s > 0; s >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, s));
    return v;
}

// Sum over the warps that share a row; every thread gets it. One warp a row needs no shared memory and no barrier.
// A block of 256 threads has either eight rows of one warp or one row of eight.
template <int SHARING>
__device__ __forceinline__ float row_sum(float v) {
    v = warp_sum(v);
    if constexpr (SHARING > 1) {
        __shared__ float parts[SHARING];
        __syncthreads();  // the last use of `parts` is over
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
        __syncthreads();
        v = 0.0f;
#pragma unroll
        for (int w = 0; w < SHARING; ++w) v += parts[w];
    }
    return v;
}

template <int SHARING>
__device__ __forceinline__ float row_max(float v) {
    v = warp_max(v);
    if constexpr (SHARING > 1) {
        __shared__ float parts[SHARING];
        __syncthreads();
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
        __syncthreads();
        v = parts[0];
#pragma unroll
        for (int w = 1; w < SHARING; ++w) v = fmaxf(v, parts[w]);
    }
    return v;
}

// Blocks of blockDim.x columns (items of VEC floats) by blockDim.y rows, 256 threads, both powers of two: sums `v` over
// the block's rows, result valid where threadIdx.y is 0. `scratch` has 256 places.
template <int N>
__device__ __forceinline__ Vec<N> column_sum(Vec<N> v, Vec<N>* scratch) {
    const unsigned at = threadIdx.y * blockDim.x + threadIdx.x;
    __syncthreads();
    scratch[at] = v;
    for (unsigned s = blockDim.y / 2; s > 0; s /= 2) {
        __syncthreads();
        if (threadIdx.y < s) {
            const Vec<N> other = scratch[at + s * blockDim.x];
#pragma unroll
            for (int k = 0; k < N; ++k) v.v[k] += other.v[k];
            scratch[at] = v;
        }
    }
    return v;
}
