// Maps over tensors of one shape: sums, activations and their slopes. Every byte is read and written once; a thread
// owns VEC (4 or 1) neighbouring elements, so that a warp moves 512 contiguous bytes per instruction.
//
// Compile-time constants: VEC; ACT, the activation's number (see common/math.cuh).

#include "common/math.cuh"
#include "common/vec.cuh"

#ifndef ACT
#define ACT ACT_NONE
#endif

// y = f(a + b)
extern "C" __global__ void __launch_bounds__(256)
add(unsigned n, const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const Vec<VEC> u = load_vec<VEC>(a, i), v = load_vec<VEC>(b, i);
    Vec<VEC> r;
#pragma unroll
    for (int k = 0; k < VEC; ++k) r.v[k] = act_value<ACT>(u.v[k] + v.v[k]);
    store_vec<VEC>(y, i, r);
}

// y = scale (a + b)
extern "C" __global__ void __launch_bounds__(256)
scaled_sum(unsigned n, float scale, const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const Vec<VEC> u = load_vec<VEC>(a, i), v = load_vec<VEC>(b, i);
    Vec<VEC> r;
#pragma unroll
    for (int k = 0; k < VEC; ++k) r.v[k] = scale * (u.v[k] + v.v[k]);
    store_vec<VEC>(y, i, r);
}

// y = f(x)
extern "C" __global__ void __launch_bounds__(256)
act(unsigned n, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Vec<VEC> v = load_vec<VEC>(x, i);
#pragma unroll
    for (int k = 0; k < VEC; ++k) v.v[k] = act_value<ACT>(v.v[k]);
    store_vec<VEC>(y, i, v);
}

// dx = dy f'(x)
extern "C" __global__ void __launch_bounds__(256)
act_bwd(unsigned n, const float* __restrict__ dy, const float* __restrict__ x, float* __restrict__ dx) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const Vec<VEC> d = load_vec<VEC>(dy, i);
    Vec<VEC> v = load_vec<VEC>(x, i);
#pragma unroll
    for (int k = 0; k < VEC; ++k) v.v[k] = d.v[k] * act_slope<ACT>(v.v[k]);
    store_vec<VEC>(dx, i, v);
}
