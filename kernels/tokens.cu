// Between patches [N, P, C] and tokens [N, T, C], with `first` = T - P learned tokens before the patches. A thread moves
// one item of VEC channels; `c` counts items.

#include "common/vec.cuh"

// y[n, t] = (class token or patch) + pos[t]
extern "C" __global__ void __launch_bounds__(256)
embed(unsigned n, unsigned p, unsigned t, unsigned c, const float* __restrict__ x, const float* __restrict__ cls,
      const float* __restrict__ pos, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned row = i / c, k = i - row * c, image = row / t, token = row - image * t, first = t - p;
    Vec<VEC> v = load_vec<VEC>(pos, token * c + k);
    const Vec<VEC> a = token < first ? load_vec<VEC>(cls, token * c + k)
                                     : load_vec<VEC>(x, (size_t(image) * p + token - first) * c + k);
#pragma unroll
    for (int j = 0; j < VEC; ++j) v.v[j] += a.v[j];
    store_vec<VEC>(y, i, v);
}

// dpatches[n, j] = dy[n, j + first]
extern "C" __global__ void __launch_bounds__(256)
patches(unsigned n, unsigned p, unsigned t, unsigned c, const float* __restrict__ dy, float* __restrict__ dx) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned row = i / c, k = i - row * c, image = row / p, j = row - image * p;
    store_vec<VEC>(dx, i, load_vec<VEC>(dy, (size_t(image) * t + j + t - p) * c + k));
}

// y[n] = x[n, token]
extern "C" __global__ void __launch_bounds__(256)
pick(unsigned n, unsigned t, unsigned c, unsigned token, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned image = i / c;
    store_vec<VEC>(y, i, load_vec<VEC>(x, (size_t(image) * t + token) * c + i - image * c));
}

// dx[n, t] = dy[n] for the picked token, else 0
extern "C" __global__ void __launch_bounds__(256)
pick_bwd(unsigned n, unsigned t, unsigned c, unsigned token, const float* __restrict__ dy, float* __restrict__ dx) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned row = i / c, image = row / t;
    Vec<VEC> v = {};
    if (row - image * t == token) v = load_vec<VEC>(dy, size_t(image) * c + i - row * c);
    store_vec<VEC>(dx, i, v);
}

// y[n] = (x[n, 0], mean of x[n, first..])
extern "C" __global__ void __launch_bounds__(256)
cls_mean(unsigned n, unsigned t, unsigned c, unsigned first, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned image = i / (2 * c), k = i - image * 2 * c;
    if (k < c) {
        store_vec<VEC>(y, i, load_vec<VEC>(x, size_t(image) * t * c + k));
        return;
    }
    Vec<VEC> sum = {};
    for (unsigned j = first; j < t; ++j) {
        const Vec<VEC> v = load_vec<VEC>(x, (size_t(image) * t + j) * c + k - c);
#pragma unroll
        for (int e = 0; e < VEC; ++e) sum.v[e] += v.v[e];
    }
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum.v[e] /= float(t - first);
    store_vec<VEC>(y, i, sum);
}

// dx[n, 0] = dy[n, ..c], dx[n, first..] = dy[n, c..] / patches, 0 between
extern "C" __global__ void __launch_bounds__(256)
cls_mean_bwd(unsigned n, unsigned t, unsigned c, unsigned first, const float* __restrict__ dy, float* __restrict__ dx) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned row = i / c, k = i - row * c, image = row / t, token = row - image * t;
    Vec<VEC> v = {};
    if (token == 0) v = load_vec<VEC>(dy, size_t(image) * 2 * c + k);
    if (token >= first) {
        const Vec<VEC> mean = load_vec<VEC>(dy, size_t(image) * 2 * c + c + k);
#pragma unroll
        for (int e = 0; e < VEC; ++e) v.v[e] += mean.v[e] / float(t - first);
    }
    store_vec<VEC>(dx, i, v);
}
