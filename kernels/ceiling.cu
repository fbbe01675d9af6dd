// What the device can do at most: multiply-adds in registers, products on tensor cores, and passes over memory.
//
// Compile-time constant: OPERAND (mma_chains: 16 for bf16, 8 for tf32: the depth of one mma).

#include "common/mma.cuh"

#ifndef OPERAND
#define OPERAND 16
#endif

constexpr int CHAINS = 8;

// y[i] = the sum of 8 chains of 16 * rounds multiply-adds that start at x[i] + 0 .. x[i] + 7
extern "C" __global__ void __launch_bounds__(256)
fma_chains(unsigned n, unsigned rounds, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float v[CHAINS];
#pragma unroll
    for (int k = 0; k < CHAINS; ++k) v[k] = x[i] + static_cast<float>(k);
    for (unsigned r = 0; r < rounds; ++r) {
#pragma unroll
        for (int d = 0; d < 16; ++d)
#pragma unroll
            for (int k = 0; k < CHAINS; ++k) v[k] = fmaf(v[k], 0.999f, 1e-3f);
    }
    float sum = v[0];
#pragma unroll
    for (int k = 1; k < CHAINS; ++k) sum += v[k];
    y[i] = sum;
}

// y[i] = the sum of 8 accumulators that start at x[i] + 0 .. x[i] + 7 and get `rounds` products of 16 x OPERAND by
// OPERAND x 8 matrices of 1/32: each adds OPERAND / 1024. n is a multiple of 32.
extern "C" __global__ void __launch_bounds__(256)
mma_chains(unsigned n, unsigned rounds, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned part = OPERAND == 16 ? bf16_pair(0.03125f, 0.03125f) : tf32_round(0.03125f);
    const unsigned a[4] = {part, part, part, part};
    float d[CHAINS][4];
#pragma unroll
    for (int k = 0; k < CHAINS; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) d[k][j] = x[i] + static_cast<float>(k);
    for (unsigned r = 0; r < rounds; ++r) {
#pragma unroll
        for (int k = 0; k < CHAINS; ++k) {
#if OPERAND == 16
            mma_m16n8k16_bf16(d[k], a, part, part);
#else
            mma_m16n8k8_tf32(d[k], a, part, part);
#endif
        }
    }
    float sum = d[0][0];
#pragma unroll
    for (int k = 1; k < CHAINS; ++k) sum += d[k][k % 4];
    y[i] = sum;
}

// y = x, 16 bytes a thread
extern "C" __global__ void __launch_bounds__(256)
copy(unsigned n, const float4* __restrict__ x, float4* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i];
}

// x *= 0.999 in place, 16 bytes a thread
extern "C" __global__ void __launch_bounds__(256)
update(unsigned n, float4* __restrict__ x) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float4 v = x[i];
    x[i] = make_float4(v.x * 0.999f, v.y * 0.999f, v.z * 0.999f, v.w * 0.999f);
}

// y[i] = the sum of x[i], x[i + n], .. x[i + 63 n]
extern "C" __global__ void __launch_bounds__(256)
sum_runs(unsigned n, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float s = 0.0f;
#pragma unroll 8
    for (unsigned k = 0; k < 64; ++k) s += x[i + k * n];
    y[i] = s;
}
