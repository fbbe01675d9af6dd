// Updates of the optimizers in place, the gradient norm, accumulation. A launch covers a slab: the parameters, gradients
// and moments of many layers side by side. VEC elements a thread.
//
// hyper = (learning rate, 1 - beta1^t, 1 - beta2^t, factor on gradients, ..); clip = (norm, factor) or null.

#include "common/reduce.cuh"

__device__ __forceinline__ float gradient_factor(const float* __restrict__ hyper, const float* __restrict__ clip) {
    return clip ? hyper[3] * clip[1] : hyper[3];
}

// `decay` acts on the parameter (AdamW), `l2` on the gradient (Adam); one of them is zero.
extern "C" __global__ void __launch_bounds__(256)
adamw(unsigned n, float* __restrict__ param, const float* __restrict__ grad, const float* __restrict__ hyper,
      const float* __restrict__ clip, float* __restrict__ m, float* __restrict__ v, float lr_scale, float decay, float l2,
      float one_minus_beta1, float beta2, float one_minus_beta2, float eps) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float factor = gradient_factor(hyper, clip), lr = hyper[0] * lr_scale, keep = 1.0f - lr * decay;
    const float step = lr / hyper[1], inverse_root = 1.0f / sqrtf(hyper[2]);
    Vec<VEC> w = load_vec<VEC>(param, i), mm = load_vec<VEC>(m, i), vv = load_vec<VEC>(v, i);
    const Vec<VEC> gg = load_vec<VEC>(grad, i);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
        const float g = gg.v[k] * factor + l2 * w.v[k];
        mm.v[k] += one_minus_beta1 * (g - mm.v[k]);
        vv.v[k] = beta2 * vv.v[k] + one_minus_beta2 * g * g;
        w.v[k] = w.v[k] * keep - step * (mm.v[k] / (sqrtf(vv.v[k]) * inverse_root + eps));
    }
    store_vec<VEC>(param, i, w);
    store_vec<VEC>(m, i, mm);
    store_vec<VEC>(v, i, vv);
}

extern "C" __global__ void __launch_bounds__(256)
sgd(unsigned n, float* __restrict__ param, const float* __restrict__ grad, const float* __restrict__ hyper,
    const float* __restrict__ clip, float lr_scale, float decay) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float factor = gradient_factor(hyper, clip), lr = hyper[0] * lr_scale;
    Vec<VEC> w = load_vec<VEC>(param, i);
    const Vec<VEC> g = load_vec<VEC>(grad, i);
#pragma unroll
    for (int k = 0; k < VEC; ++k) w.v[k] -= lr * (g.v[k] * factor + decay * w.v[k]);
    store_vec<VEC>(param, i, w);
}

// p -= lr (own g + of_b b): Nesterov's momentum has (1, momentum), the plain one (0, 1).
extern "C" __global__ void __launch_bounds__(256)
sgd_momentum(unsigned n, float* __restrict__ param, const float* __restrict__ grad, const float* __restrict__ hyper,
             const float* __restrict__ clip, float* __restrict__ b, float lr_scale, float decay, float momentum, float own,
             float of_b) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float factor = gradient_factor(hyper, clip), lr = hyper[0] * lr_scale;
    Vec<VEC> w = load_vec<VEC>(param, i), bb = load_vec<VEC>(b, i);
    const Vec<VEC> gg = load_vec<VEC>(grad, i);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
        const float g = gg.v[k] * factor + decay * w.v[k];
        bb.v[k] = momentum * bb.v[k] + g;
        w.v[k] -= lr * (own * g + of_b * bb.v[k]);
    }
    store_vec<VEC>(param, i, w);
    store_vec<VEC>(b, i, bb);
}

extern "C" __global__ void __launch_bounds__(256)
accumulate(unsigned n, float* __restrict__ acc, const float* __restrict__ g) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Vec<VEC> a = load_vec<VEC>(acc, i);
    const Vec<VEC> v = load_vec<VEC>(g, i);
#pragma unroll
    for (int k = 0; k < VEC; ++k) a.v[k] += v.v[k];
    store_vec<VEC>(acc, i, a);
}

extern "C" __global__ void __launch_bounds__(256)
fill0(unsigned n, float* __restrict__ x) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) store_vec<VEC>(x, i, Vec<VEC>{});
}

// part[blockIdx.x] = sum of squares of the block's elements of a slab of n items.
extern "C" __global__ void __launch_bounds__(256)
squares(unsigned n, const float* __restrict__ x, float* __restrict__ part) {
    float sum = 0.0f;
    for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < n; i += gridDim.x * 256) {
        const Vec<VEC> v = load_vec<VEC>(x, i);
        float some = 0.0f;
#pragma unroll
        for (int k = 0; k < VEC; ++k) some += v.v[k] * v.v[k];
        sum += some;
    }
    sum = row_sum<8>(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

// norm = (sqrt(sum of the parts) * |hyper[3]|, the factor that brings it to max_norm): one block. hyper may be null.
extern "C" __global__ void __launch_bounds__(256)
finish_norm(unsigned parts, const float* __restrict__ part, const float* __restrict__ hyper, float max_norm,
            float* __restrict__ norm) {
    float sum = 0.0f;
    for (unsigned k = threadIdx.x; k < parts; k += 256) sum += part[k];
    sum = row_sum<8>(sum);
    if (threadIdx.x != 0) return;
    const float length = sqrtf(sum) * (hyper ? fabsf(hyper[3]) : 1.0f);
    const float scale = max_norm / (length + 1e-6f);
    norm[0] = length;
    norm[1] = scale > 1.0f ? 1.0f : scale;
}
