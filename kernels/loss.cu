// Softmax cross-entropy and its gradient in one pass: a row of logits is spread over WARPS warps, ITEMS items of VEC
// logits a lane, and stays in registers. The sums over rows are trees of a fixed shape.
//
// Compile-time constants: VEC, ITEMS, WARPS; SOFT (soft targets in place of labels), WEIGHTED, FOCAL.

#include "common/reduce.cuh"

#ifndef ITEMS
#define ITEMS 1
#endif
#ifndef WARPS
#define WARPS 1
#endif
#ifndef SOFT
#define SOFT 0
#endif
#ifndef WEIGHTED
#define WEIGHTED 0
#endif
#ifndef FOCAL
#define FOCAL 0
#endif

constexpr int THREADS = 256;
constexpr int ROW_THREADS = 32 * WARPS;
constexpr unsigned IGNORED = 0xffffffffu;

// denominator[0] = sum of the labels' weights: one block. A label beyond the classes makes it NaN.
extern "C" __global__ void __launch_bounds__(THREADS)
count_labels(unsigned rows, unsigned classes, const unsigned* __restrict__ labels, const float* __restrict__ weights,
             float* __restrict__ denominator) {
    float sum = 0.0f;
    for (unsigned n = threadIdx.x; n < rows; n += THREADS) {
        const unsigned l = labels[n];
        if (l == IGNORED) continue;
        if (l >= classes) {
            sum = __uint_as_float(0x7fffffffu);
            break;
        }
        sum += WEIGHTED ? weights[l] : 1.0f;
    }
    sum = row_sum<8>(sum);
    if (threadIdx.x == 0) denominator[0] = sum;
}

// loss = sum of the rows' losses / denominator: one block. A null denominator stands for the number of rows.
extern "C" __global__ void __launch_bounds__(THREADS)
total(unsigned rows, const float* __restrict__ losses, const float* __restrict__ denominator, float* __restrict__ loss) {
    float sum = 0.0f;
    for (unsigned n = threadIdx.x; n < rows; n += THREADS) sum += losses[n];
    sum = row_sum<8>(sum);
    if (threadIdx.x == 0) loss[0] = sum / (denominator ? denominator[0] : static_cast<float>(rows));
}

// -f(p) and p f'(p) of f(p) = (1 - p)^focal log p, from log p.
__device__ __forceinline__ float2 focal_terms(float log_p, float focal) {
#if FOCAL
    const float rest = -expm1f(log_p);
    if (rest < 1e-37f) return make_float2(0.0f, 0.0f);
    const float factor = powf(rest, focal);
    return make_float2(-factor * log_p, factor - focal * expf(log_p) * factor / rest * log_p);
#else
    return make_float2(-log_p, 1.0f);
#endif
}

// losses[n] = -sum q f(p), dz[n] = its gradient / denominator, with q = weight * (keep * target + spread).
extern "C" __global__ void __launch_bounds__(THREADS)
softmax_ce(unsigned rows, unsigned items, const float* __restrict__ z, const void* __restrict__ targets,
           const float* __restrict__ weights, const float* __restrict__ denominator, float keep, float spread,
           float focal, float* __restrict__ losses, float* __restrict__ dz) {
    const unsigned lane = threadIdx.x % ROW_THREADS;
    const unsigned row = blockIdx.x * (THREADS / ROW_THREADS) + threadIdx.x / ROW_THREADS;
    if (row >= rows) return;
    const float inverse = 1.0f / (denominator ? denominator[0] : static_cast<float>(rows));
#if !SOFT
    const unsigned label = static_cast<const unsigned*>(targets)[row];
    if (label >= items * VEC) {
        Vec<VEC> v;
#pragma unroll
        for (int k = 0; k < VEC; ++k) v.v[k] = label == IGNORED ? 0.0f : __uint_as_float(0x7fffffffu);
        for (unsigned c = lane; c < items; c += ROW_THREADS) store_vec<VEC>(dz, size_t(row) * items + c, v);
        if (lane == 0) losses[row] = v.v[0];
        return;
    }
#endif
    Vec<VEC> v[ITEMS], q[ITEMS];
    const float lowest = __uint_as_float(0xff800000u);
    float top = lowest;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const unsigned c = lane + j * ROW_THREADS;
#pragma unroll
        for (int k = 0; k < VEC; ++k) v[j].v[k] = lowest, q[j].v[k] = 0.0f;
        if (c < items) {
            v[j] = load_vec<VEC>(z, size_t(row) * items + c);
#if SOFT
            q[j] = load_vec<VEC>(static_cast<const float*>(targets), size_t(row) * items + c);
#endif
            Vec<VEC> w = {};
            if (WEIGHTED) w = load_vec<VEC>(weights, c);
#pragma unroll
            for (int k = 0; k < VEC; ++k) {
    #if !SOFT
                q[j].v[k] = c * VEC + k == label ? 1.0f : 0.0f;
#endif
                q[j].v[k] = keep * q[j].v[k] + spread;
                if (WEIGHTED) q[j].v[k] *= w.v[k];
                // Lets NaN through.
                top = v[j].v[k] <= top ? top : v[j].v[k];
            }
        }
    }
    top = row_max<WARPS>(top);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
#pragma unroll
        for (int k = 0; k < VEC; ++k) sum += expf(v[j].v[k] - top);
    }
    sum = row_sum<WARPS>(sum);
    const float log_sum = logf(sum);
    float loss = 0.0f, all = 0.0f;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            // A class that cannot be, with a logit of minus infinity, costs nothing where nothing is asked of it.
            const float share = q[j].v[k];
            if (share != 0.0f) {
                const float2 t = focal_terms((v[j].v[k] - top) - log_sum, focal);
                loss += share * t.x;
                q[j].v[k] = share * t.y;
                all += q[j].v[k];
            }
        }
    }
    loss = row_sum<WARPS>(loss);
    all = row_sum<WARPS>(all);
    const float factor = all / sum;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const unsigned c = lane + j * ROW_THREADS;
        if (c >= items) break;
#pragma unroll
        for (int k = 0; k < VEC; ++k) v[j].v[k] = (expf(v[j].v[k] - top) * factor - q[j].v[k]) * inverse;
        store_vec<VEC>(dz, size_t(row) * items + c, v[j]);
    }
    if (lane == 0) losses[row] = loss;
}

// y = x * s[0]
extern "C" __global__ void __launch_bounds__(256)
scale_by(unsigned n, const float* __restrict__ x, const float* __restrict__ s, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    Vec<VEC> v = load_vec<VEC>(x, i);
    const float by = s[0];
#pragma unroll
    for (int k = 0; k < VEC; ++k) v.v[k] *= by;
    store_vec<VEC>(y, i, v);
}
