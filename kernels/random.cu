// Random masks by Philox: dropout per element, drop path per sample. rng = (seed low, seed high, step, 0).

#include "common/philox.cuh"
#include "common/vec.cuh"

#ifndef RESIDUAL
#define RESIDUAL 0
#endif

// y = x * mask * scale over n elements; a thread draws one Philox block for its four elements. VEC is 4 where n allows
// 16 bytes at a time.
extern "C" __global__ void __launch_bounds__(256)
dropout(unsigned n, const float* __restrict__ x, const unsigned* __restrict__ rng, unsigned id, float p, float scale,
        float* __restrict__ y) {
    const unsigned block = blockIdx.x * blockDim.x + threadIdx.x;
    if (block >= (n + 3) / 4) return;
    const uint4 w = draw(rng, id, block);
    const unsigned words[4] = {w.x, w.y, w.z, w.w};
#if VEC == 4
    Vec<4> v = load_vec<4>(x, block);
#pragma unroll
    for (int k = 0; k < 4; ++k) v.v[k] = unit(words[k]) >= p ? v.v[k] * scale : 0.0f;
    store_vec<4>(y, block, v);
#else
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const unsigned i = 4 * block + k;
        if (i < n) y[i] = unit(words[k]) >= p ? x[i] * scale : 0.0f;
    }
#endif
}

// y[s] = x[s] * mask[s] * scale (+ residual[s]); `chunks` blocks a sample of `items` items. All threads of a block draw
// the same number, which costs less than passing it around.
extern "C" __global__ void __launch_bounds__(256)
drop_path(unsigned items, unsigned chunks, const float* __restrict__ x, const unsigned* __restrict__ rng, unsigned id,
          float p, float scale, const float* __restrict__ residual, float* __restrict__ y) {
    const unsigned sample = blockIdx.x / chunks;
    const unsigned i = (blockIdx.x % chunks) * blockDim.x + threadIdx.x;
    if (i >= items) return;
    const uint4 w = draw(rng, id, sample / 4);
    const unsigned lane = sample % 4;
    const unsigned word = lane == 0 ? w.x : lane == 1 ? w.y : lane == 2 ? w.z : w.w;
    const size_t at = size_t(sample) * items + i;
    Vec<VEC> v = {}, old = {};
    // A dropped sample is not even read.
    if (unit(word) >= p) v = load_vec<VEC>(x, at);
    if (RESIDUAL) old = load_vec<VEC>(residual, at);
#pragma unroll
    for (int k = 0; k < VEC; ++k) v.v[k] = v.v[k] * scale + old.v[k];
    store_vec<VEC>(y, at, v);
}
