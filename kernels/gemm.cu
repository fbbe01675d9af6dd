// What stands around the GEMMs: operands rounded to bf16, the parts of split sums added, column sums for the gradients
// of biases. Each reads and writes every byte once; no order of addition depends on timing, so the bits never differ.

#include "common/epilogue.cuh"
#include "common/div.cuh"
#include "common/mma.cuh"

#ifndef ACT
#define ACT ACT_NONE
#endif
#ifndef VEC_C
#define VEC_C 4
#endif

// y[row, c] = bf16(x[row, c]), rows of `from` floats becoming rows of `to` (a multiple of four), zeros behind. Operands
// are rounded once here, not in the GEMM's loads: an element is loaded by several blocks and, in a convolution, by
// every tap; half the bytes then move through L2 and shared memory, ldmatrix can transpose, and padded channels turn
// an image of three channels into one that is copied eight bytes at a time. A thread makes four neighbours.
extern "C" __global__ void __launch_bounds__(256)
cast_bf16(unsigned items, const float* __restrict__ x, uint2* __restrict__ y, unsigned from, Div quads) {
    const unsigned i = blockIdx.x * 256 + threadIdx.x;
    if (i >= items) return;
    float v[4] = {};
    if constexpr (VEC_C == 4) {
        const float4 q = reinterpret_cast<const float4*>(x)[i];
        v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
    } else {
        unsigned row, quad;
        divide(i, quads, row, quad);
#pragma unroll
        for (int j = 0; j < 4; ++j)
            if (4 * quad + j < from) v[j] = x[size_t(row) * from + 4 * quad + j];
    }
    y[i] = make_uint2(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]));
}

// y[i] = f(part[0, i] + part[1, i] + ... + bias + addend), the parts in order. A thread owns VEC_C neighbours. `channels`
// is the extent of the bias.
extern "C" __global__ void __launch_bounds__(256)
reduce_parts(unsigned items, const float* __restrict__ part, Epilogue epilogue, unsigned parts, unsigned length, unsigned channels) {
    const unsigned i = blockIdx.x * 256 + threadIdx.x;
    if (i >= items) return;
    if constexpr (VEC_C == 4) {
        float v[4] = {};
        for (unsigned p = 0; p < parts; ++p) {
            const float4 q = reinterpret_cast<const float4*>(part + size_t(p) * length)[i];
            v[0] += q.x, v[1] += q.y, v[2] += q.z, v[3] += q.w;
        }
        epilogue.store<ACT, true>(size_t(i) * 4, i * 4 % channels, 4, v);
    } else {
        float v[2] = {};
        for (unsigned p = 0; p < parts; ++p) v[0] += part[size_t(p) * length + i];
        epilogue.store<ACT, false>(i, i % channels, 1, v);
    }
}

// y[part, c] = sum of x[row, c] over the part's rows. A block of 32 x 8 threads owns 32 columns (128 neighbouring bytes a
// row) of part blockIdx.y, its eight lines of threads every eighth row. Shared memory: 1,024 bytes.
extern "C" __global__ void __launch_bounds__(256)
column_sums(const float* __restrict__ x, float* __restrict__ y, unsigned rows, unsigned columns, unsigned per_part) {
    __shared__ float lines[8][32];
    const unsigned lane = threadIdx.x % 32, line = threadIdx.x / 32, c = blockIdx.x * 32 + lane;
    const unsigned start = blockIdx.y * per_part, stop = min(rows, start + per_part);
    float sum = 0.0f;
    if (c < columns)
        for (unsigned row = start + line; row < stop; row += 8) sum += x[size_t(row) * columns + c];
    lines[line][lane] = sum;
    __syncthreads();
    if (line != 0 || c >= columns) return;
#pragma unroll
    for (int i = 1; i < 8; ++i) sum += lines[i][lane];
    y[size_t(blockIdx.y) * columns + c] = sum;
}
