// Batch norm over the rows of x [rows, C], forward and backward.
//
// Threads stand as blockDim.x columns (VEC channels each) by blockDim.y rows. Forward: `stats` reads x once and leaves a
// mean and a sum of squared deviations per part; `finish_stats` merges the parts; `normalize` reads x a second time and
// writes y. Backward: `bwd_sums`, `bwd_finish`, `bwd_apply`. No E[x^2] - E[x]^2 anywhere: four rows at a time get their
// own mean and deviations in registers, which are then merged by Chan et al. 1979 ("Updating Formulae and a Pairwise
// Algorithm for Computing Sample Variances").
//
// Compile-time constants: VEC; RELU; RESIDUAL (added forward; backward: the mask is read off the forward result);
// DRESIDUAL (its gradient is written); VARIANCE (the second vector is a variance, not 1 / sqrt(variance + eps)).

#include "common/math.cuh"
#include "common/reduce.cuh"

#ifndef RELU
#define RELU 0
#endif
#ifndef RESIDUAL
#define RESIDUAL 0
#endif
#ifndef DRESIDUAL
#define DRESIDUAL 0
#endif
#ifndef VARIANCE
#define VARIANCE 0
#endif

// Rows that a thread handles at a time: their loads are in flight together.
constexpr int ROWS = 4;

// Mean and sum of squared deviations of n values of each of VEC channels.
struct Moments {
    Vec<VEC> mean, m2;
    float n;
};

__device__ __forceinline__ void merge(Moments& a, const Moments& b) {
    if (b.n == 0.0f) return;
    const float n = a.n + b.n, share = b.n / n, weight = a.n * share;
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
        const float d = b.mean.v[k] - a.mean.v[k];
        a.mean.v[k] += d * share;
        a.m2.v[k] += b.m2.v[k] + d * d * weight;
    }
    a.n = n;
}

// Merges over the block's rows; valid where threadIdx.y is 0. 9 KiB of shared memory with VEC 4.
__device__ __forceinline__ Moments merge_rows(Moments m) {
    __shared__ Vec<VEC> means[256], m2s[256];
    __shared__ float counts[256];
    const unsigned at = threadIdx.y * blockDim.x + threadIdx.x;
    means[at] = m.mean, m2s[at] = m.m2, counts[at] = m.n;
    for (unsigned s = blockDim.y / 2; s > 0; s /= 2) {
        __syncthreads();
        if (threadIdx.y < s) {
            const unsigned other = at + s * blockDim.x;
            merge(m, Moments{means[other], m2s[other], counts[other]});
            means[at] = m.mean, m2s[at] = m.m2, counts[at] = m.n;
        }
    }
    return m;
}

// part_mean, part_m2 [parts, C] of rows [blockIdx.x * per_part, + per_part).
extern "C" __global__ void __launch_bounds__(256)
stats(unsigned rows, unsigned items, unsigned per_part, const float* __restrict__ x, float* __restrict__ part_mean,
      float* __restrict__ part_m2) {
    const unsigned c = blockIdx.y * blockDim.x + threadIdx.x;
    const unsigned first = blockIdx.x * per_part;
    const unsigned end = min(first + per_part, rows);
    Moments all = {};
    if (c < items) {
        for (unsigned row = first + threadIdx.y; row < end; row += ROWS * blockDim.y) {
            Vec<VEC> v[ROWS];
            Moments some = {};
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const unsigned at = row + r * blockDim.y;
                v[r] = {};
                if (at < end) {
                    v[r] = load_vec<VEC>(x, size_t(at) * items + c);
                    some.n += 1.0f;
                }
            }
            const float inverse = 1.0f / some.n;
#pragma unroll
            for (int k = 0; k < VEC; ++k) {
                float sum = 0.0f, m2 = 0.0f;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) sum += v[r].v[k];
                const float mean = sum * inverse;
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float d = row + r * blockDim.y < end ? v[r].v[k] - mean : 0.0f;
                    m2 += d * d;
                }
                some.mean.v[k] = mean;
                some.m2.v[k] = m2;
            }
            merge(all, some);
        }
    }
    all = merge_rows(all);
    if (c < items && threadIdx.y == 0) {
        store_vec<VEC>(part_mean, size_t(blockIdx.x) * items + c, all.mean);
        store_vec<VEC>(part_m2, size_t(blockIdx.x) * items + c, all.m2);
    }
}

// mean and 1 / sqrt(variance + eps) [C], and the running statistics as PyTorch keeps them (the variance unbiased).
extern "C" __global__ void __launch_bounds__(256)
finish_stats(unsigned rows, unsigned items, unsigned per_part, unsigned parts, const float* __restrict__ part_mean,
             const float* __restrict__ part_m2, float eps, float momentum, float* __restrict__ mean,
             float* __restrict__ rstd, float* __restrict__ running_mean, float* __restrict__ running_var) {
    const unsigned c = blockIdx.x * blockDim.x + threadIdx.x;
    Moments all = {};
    if (c < items) {
        for (unsigned part = threadIdx.y; part < parts; part += blockDim.y) {
            const size_t at = size_t(part) * items + c;
            const float n = static_cast<float>(min(per_part, rows - part * per_part));
            merge(all, Moments{load_vec<VEC>(part_mean, at), load_vec<VEC>(part_m2, at), n});
        }
    }
    all = merge_rows(all);
    if (c >= items || threadIdx.y != 0) return;
    Vec<VEC> r, old_mean = load_vec<VEC>(running_mean, c), old_var = load_vec<VEC>(running_var, c);
    const float n = static_cast<float>(rows);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
        r.v[k] = 1.0f / sqrtf(all.m2.v[k] / n + eps);
        old_mean.v[k] += momentum * (all.mean.v[k] - old_mean.v[k]);
        old_var.v[k] += momentum * (all.m2.v[k] / (n - 1.0f) - old_var.v[k]);
    }
    store_vec<VEC>(mean, c, all.mean);
    store_vec<VEC>(rstd, c, r);
    store_vec<VEC>(running_mean, c, old_mean);
    store_vec<VEC>(running_var, c, old_var);
}

__device__ __forceinline__ Vec<VEC> load_rstd(const float* __restrict__ second, unsigned c, float eps) {
    Vec<VEC> r = load_vec<VEC>(second, c);
#if VARIANCE
#pragma unroll
    for (int k = 0; k < VEC; ++k) r.v[k] = 1.0f / sqrtf(r.v[k] + eps);
#endif
    return r;
}

// y = f((x - mean) * rstd * gamma + beta (+ residual)); a thread owns VEC channels of ROWS rows.
extern "C" __global__ void __launch_bounds__(256)
normalize(unsigned rows, unsigned items, const float* __restrict__ x, const float* __restrict__ mean,
          const float* __restrict__ second, const float* __restrict__ gamma, const float* __restrict__ beta, float eps,
          const float* __restrict__ residual, float* __restrict__ y) {
    const unsigned c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= items) return;
    const Vec<VEC> mu = load_vec<VEC>(mean, c), g = load_vec<VEC>(gamma, c), b = load_vec<VEC>(beta, c);
    Vec<VEC> scale = load_rstd(second, c, eps);
#pragma unroll
    for (int k = 0; k < VEC; ++k) scale.v[k] *= g.v[k];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const unsigned row = (blockIdx.x * ROWS + r) * blockDim.y + threadIdx.y;
        if (row >= rows) return;
        const size_t at = size_t(row) * items + c;
        Vec<VEC> v = load_vec<VEC>(x, at);
        Vec<VEC> old = {};
        if (RESIDUAL) old = load_vec<VEC>(residual, at);
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            v.v[k] = (v.v[k] - mu.v[k]) * scale.v[k] + b.v[k] + old.v[k];
            if (RELU) v.v[k] = relu(v.v[k]);
        }
        store_vec<VEC>(y, at, v);
    }
}

// dy behind the ReLU: by the forward result where a residual was added, else by the sign computed again.
__device__ __forceinline__ Vec<VEC> masked(Vec<VEC> d, const Vec<VEC>& centred, const Vec<VEC>& scale,
                                           const Vec<VEC>& shift, const float* __restrict__ y, size_t at) {
#if RELU && RESIDUAL
    const Vec<VEC> passed = load_vec<VEC>(y, at);
#pragma unroll
    for (int k = 0; k < VEC; ++k) d.v[k] = passed.v[k] > 0.0f ? d.v[k] : 0.0f;
#elif RELU
#pragma unroll
    for (int k = 0; k < VEC; ++k) d.v[k] = centred.v[k] * scale.v[k] + shift.v[k] > 0.0f ? d.v[k] : 0.0f;
#endif
    return d;
}

// part [parts, C] = sum of d; part_x [parts, C] = sum of d * xhat. `mask` is beta [C], or the forward result.
extern "C" __global__ void __launch_bounds__(256)
bwd_sums(unsigned rows, unsigned items, unsigned per_part, const float* __restrict__ dy, const float* __restrict__ x,
         const float* __restrict__ mean, const float* __restrict__ second, const float* __restrict__ gamma, float eps,
         const float* __restrict__ mask, float* __restrict__ part, float* __restrict__ part_x) {
    __shared__ Vec<VEC> scratch[256];
    const unsigned c = blockIdx.y * blockDim.x + threadIdx.x;
    Vec<VEC> sum = {}, sum_x = {}, rstd = {};
    if (c < items) {
        const Vec<VEC> mu = load_vec<VEC>(mean, c), g = load_vec<VEC>(gamma, c);
        rstd = load_rstd(second, c, eps);
        Vec<VEC> scale, shift = {};
        if (RELU && !RESIDUAL) shift = load_vec<VEC>(mask, c);
#pragma unroll
        for (int k = 0; k < VEC; ++k) scale.v[k] = rstd.v[k] * g.v[k];
        const unsigned first = blockIdx.x * per_part, end = min(first + per_part, rows);
#pragma unroll 4
        for (unsigned row = first + threadIdx.y; row < end; row += blockDim.y) {
            const size_t at = size_t(row) * items + c;
            Vec<VEC> centred = load_vec<VEC>(x, at);
#pragma unroll
            for (int k = 0; k < VEC; ++k) centred.v[k] -= mu.v[k];
            const Vec<VEC> d = masked(load_vec<VEC>(dy, at), centred, scale, shift, mask, at);
#pragma unroll
            for (int k = 0; k < VEC; ++k) {
                sum.v[k] += d.v[k];
                sum_x.v[k] += d.v[k] * centred.v[k];
            }
        }
    }
    sum = column_sum<VEC>(sum, scratch);
    sum_x = column_sum<VEC>(sum_x, scratch);
    if (c < items && threadIdx.y == 0) {
#pragma unroll
        for (int k = 0; k < VEC; ++k) sum_x.v[k] *= rstd.v[k];
        store_vec<VEC>(part, size_t(blockIdx.x) * items + c, sum);
        store_vec<VEC>(part_x, size_t(blockIdx.x) * items + c, sum_x);
    }
}

// dgamma [C] and dbeta [C] of the parts.
extern "C" __global__ void __launch_bounds__(256)
bwd_finish(unsigned items, unsigned parts, const float* __restrict__ part, const float* __restrict__ part_x,
           float* __restrict__ dgamma, float* __restrict__ dbeta) {
    __shared__ Vec<VEC> scratch[256];
    const unsigned c = blockIdx.x * blockDim.x + threadIdx.x;
    Vec<VEC> sum = {}, sum_x = {};
    if (c < items) {
        for (unsigned p = threadIdx.y; p < parts; p += blockDim.y) {
            const Vec<VEC> a = load_vec<VEC>(part, size_t(p) * items + c);
            const Vec<VEC> b = load_vec<VEC>(part_x, size_t(p) * items + c);
#pragma unroll
            for (int k = 0; k < VEC; ++k) sum.v[k] += a.v[k], sum_x.v[k] += b.v[k];
        }
    }
    sum = column_sum<VEC>(sum, scratch);
    sum_x = column_sum<VEC>(sum_x, scratch);
    if (c < items && threadIdx.y == 0) {
        store_vec<VEC>(dgamma, c, sum_x);
        store_vec<VEC>(dbeta, c, sum);
    }
}

// dx = (d - dbeta share - xhat dgamma share) * rstd * gamma; share = 1 / rows, or 0 where the statistics are constants.
extern "C" __global__ void __launch_bounds__(256)
bwd_apply(unsigned rows, unsigned items, const float* __restrict__ dy, const float* __restrict__ x,
          const float* __restrict__ mean, const float* __restrict__ second, const float* __restrict__ gamma, float eps,
          const float* __restrict__ mask, const float* __restrict__ dgamma, const float* __restrict__ dbeta,
          float share, float* __restrict__ dx, float* __restrict__ dresidual) {
    const unsigned c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= items) return;
    const Vec<VEC> mu = load_vec<VEC>(mean, c), g = load_vec<VEC>(gamma, c), rstd = load_rstd(second, c, eps);
    Vec<VEC> by_x = load_vec<VEC>(dgamma, c), constant = load_vec<VEC>(dbeta, c), scale, shift = {};
    if (RELU && !RESIDUAL) shift = load_vec<VEC>(mask, c);
#pragma unroll
    for (int k = 0; k < VEC; ++k) {
        scale.v[k] = rstd.v[k] * g.v[k];
        by_x.v[k] *= rstd.v[k] * share;
        constant.v[k] *= share;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const unsigned row = (blockIdx.x * ROWS + r) * blockDim.y + threadIdx.y;
        if (row >= rows) return;
        const size_t at = size_t(row) * items + c;
        Vec<VEC> centred = load_vec<VEC>(x, at);
#pragma unroll
        for (int k = 0; k < VEC; ++k) centred.v[k] -= mu.v[k];
        const Vec<VEC> d = masked(load_vec<VEC>(dy, at), centred, scale, shift, mask, at);
        if (DRESIDUAL) store_vec<VEC>(dresidual, at, d);
#pragma unroll
        for (int k = 0; k < VEC; ++k) centred.v[k] = (d.v[k] - constant.v[k] - centred.v[k] * by_x.v[k]) * scale.v[k];
        store_vec<VEC>(dx, at, centred);
    }
}

// w[k, ..] *= s[k] and b'[k] = (bias - mean) s + beta, s = gamma / sqrt(var + eps); n items of VEC weights,
// `per` of them a filter. bias may be null.
extern "C" __global__ void __launch_bounds__(256)
fold(unsigned n, unsigned per, float* __restrict__ w, const float* __restrict__ bias,
     const float* __restrict__ gamma, const float* __restrict__ beta, const float* __restrict__ mean,
     const float* __restrict__ var, float eps, float* __restrict__ b2) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned k = i / per;
    const float s = gamma[k] / sqrtf(var[k] + eps);
    Vec<VEC> v = load_vec<VEC>(w, i);
#pragma unroll
    for (int j = 0; j < VEC; ++j) v.v[j] *= s;
    store_vec<VEC>(w, i, v);
    if (i == k * per) b2[k] = ((bias ? bias[k] : 0.0f) - mean[k]) * s + beta[k];
}
