// Layer norm over rows of x [rows, C], forward and backward. A row is spread over WARPS warps (1, or 8 for long rows) and
// stays in registers between its two passes, so that every byte moves once: ITEMS items of VEC floats a lane.
//
// Compile-time constants: VEC, ITEMS, WARPS; ADDEND (backward: a gradient that is added to dx).

#include "common/reduce.cuh"

#ifndef ITEMS
#define ITEMS 1
#endif
#ifndef WARPS
#define WARPS 1
#endif
#ifndef ADDEND
#define ADDEND 0
#endif

constexpr int THREADS = 256;
constexpr int ROW_THREADS = 32 * WARPS;
constexpr int ROWS_PER_BLOCK = THREADS / ROW_THREADS;

// y = (x - mean) * rstd * gamma + beta; mean and rstd [rows]. `items` = C / VEC.
extern "C" __global__ void __launch_bounds__(THREADS)
layer_norm(unsigned rows, unsigned items, const float* __restrict__ x, const float* __restrict__ gamma,
           const float* __restrict__ beta, float eps, float* __restrict__ y, float* __restrict__ mean,
           float* __restrict__ rstd) {
    const unsigned lane = threadIdx.x % ROW_THREADS;
    const unsigned row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x / ROW_THREADS;
    // Rows beyond the end only come with one warp a row, where nothing is waited for.
    if (row >= rows) return;
    const float inverse = 1.0f / static_cast<float>(items * VEC);
    Vec<VEC> v[ITEMS];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const unsigned c = lane + j * ROW_THREADS;
        v[j] = {};
        if (c < items) v[j] = load_vec<VEC>(x, size_t(row) * items + c);
#pragma unroll
        for (int k = 0; k < VEC; ++k) sum += v[j].v[k];
    }
    const float mu = row_sum<WARPS>(sum) * inverse;
    float m2 = 0.0f;
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        if (lane + j * ROW_THREADS < items) {
#pragma unroll
            for (int k = 0; k < VEC; ++k) m2 += (v[j].v[k] - mu) * (v[j].v[k] - mu);
        }
    }
    const float r = 1.0f / sqrtf(row_sum<WARPS>(m2) * inverse + eps);
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        const unsigned c = lane + j * ROW_THREADS;
        if (c >= items) break;
        const Vec<VEC> g = load_vec<VEC>(gamma, c), b = load_vec<VEC>(beta, c);
#pragma unroll
        for (int k = 0; k < VEC; ++k) v[j].v[k] = (v[j].v[k] - mu) * r * g.v[k] + b.v[k];
        store_vec<VEC>(y, size_t(row) * items + c, v[j]);
    }
    if (lane == 0) {
        mean[row] = mu;
        rstd[row] = r;
    }
}

// With g = dy * gamma and h = (x - mean) * rstd: dx = rstd * (g - mean(g) - h * mean(g h)) (+ old). A block walks over
// rows with a stride of the grid, so that each thread adds up dgamma and dbeta of its own channels in registers; the
// block's warps are then added in order into part_gamma, part_beta [gridDim.x, C].
//
// BWD_BLOCKS of a multiprocessor leave registers for all of it: asked for no number, the compiler fits short rows into 32
// registers, for two blocks more, and spills.
constexpr int BWD_BLOCKS = ITEMS == 1 ? 6 : ITEMS <= 6 ? 2 : 1;

extern "C" __global__ void __launch_bounds__(THREADS, BWD_BLOCKS)
layer_norm_bwd(unsigned rows, unsigned items, const float* __restrict__ dy, const float* __restrict__ x,
               const float* __restrict__ mean, const float* __restrict__ rstd, const float* __restrict__ gamma,
               const float* __restrict__ old, float* __restrict__ dx, float* __restrict__ part_gamma,
               float* __restrict__ part_beta) {
    const unsigned lane = threadIdx.x % ROW_THREADS;
    const unsigned slot = threadIdx.x / ROW_THREADS;
    const float inverse = 1.0f / static_cast<float>(items * VEC);
    Vec<VEC> dgamma[ITEMS] = {}, dbeta[ITEMS] = {};
    for (unsigned row = blockIdx.x * ROWS_PER_BLOCK + slot; row < rows; row += gridDim.x * ROWS_PER_BLOCK) {
        const float mu = mean[row], r = rstd[row];
        Vec<VEC> g[ITEMS], h[ITEMS];
        float sum = 0.0f, sum_h = 0.0f;
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const unsigned c = lane + j * ROW_THREADS;
            g[j] = {}, h[j] = {};
            if (c < items) {
                const size_t at = size_t(row) * items + c;
                g[j] = load_vec<VEC>(dy, at);
                h[j] = load_vec<VEC>(x, at);
                const Vec<VEC> w = load_vec<VEC>(gamma, c);
#pragma unroll
                for (int k = 0; k < VEC; ++k) {
                    h[j].v[k] = (h[j].v[k] - mu) * r;
                    dgamma[j].v[k] += g[j].v[k] * h[j].v[k];
                    dbeta[j].v[k] += g[j].v[k];
                    g[j].v[k] *= w.v[k];
                    sum += g[j].v[k];
                    sum_h += g[j].v[k] * h[j].v[k];
                }
            }
        }
        const float a = row_sum<WARPS>(sum) * inverse, b = row_sum<WARPS>(sum_h) * inverse;
#pragma unroll
        for (int j = 0; j < ITEMS; ++j) {
            const unsigned c = lane + j * ROW_THREADS;
            if (c >= items) break;
            const size_t at = size_t(row) * items + c;
            Vec<VEC> o = {};
            if (ADDEND) o = load_vec<VEC>(old, at);
#pragma unroll
            for (int k = 0; k < VEC; ++k) o.v[k] += r * (g[j].v[k] - a - h[j].v[k] * b);
            store_vec<VEC>(dx, at, o);
        }
    }
    // Row slots of the block one after another, each item by the thread that owns it in every slot.
    __shared__ Vec<VEC> shared_gamma[ROW_THREADS], shared_beta[ROW_THREADS];
#pragma unroll
    for (int j = 0; j < ITEMS; ++j) {
        for (unsigned s = 1; s < ROWS_PER_BLOCK; ++s) {
            __syncthreads();
            if (slot == s) shared_gamma[lane] = dgamma[j], shared_beta[lane] = dbeta[j];
            __syncthreads();
            if (slot == 0) {
#pragma unroll
                for (int k = 0; k < VEC; ++k) {
                    dgamma[j].v[k] += shared_gamma[lane].v[k];
                    dbeta[j].v[k] += shared_beta[lane].v[k];
                }
            }
        }
        const unsigned c = lane + j * ROW_THREADS;
        if (slot == 0 && c < items) {
            store_vec<VEC>(part_gamma, size_t(blockIdx.x) * items + c, dgamma[j]);
            store_vec<VEC>(part_beta, size_t(blockIdx.x) * items + c, dbeta[j]);
        }
    }
}
