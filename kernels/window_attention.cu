// Attention within shifted windows of [N, H, W, 3 * heads * dim] (Swin), forward and backward, in float32. A plain rung: a
// thread owns one query (or key) of one window's head with its vectors in registers; keys and values (queries and their
// gradients) pass by in tiles of TILE through shared memory, where all threads read the same address at a time. Windows
// are addresses only, and what wraps round is masked by -100. Softmax online; the backward pass computes the scores again.
//
// Compile-time constants: VEC; ITEMS, items of VEC floats of a head; TILE, at most 40 KiB of both tiles; SIDE of a window.

#include "common/vec.cuh"

#ifndef ITEMS
#define ITEMS 8
#endif
#ifndef TILE
#define TILE 16
#endif
#ifndef SIDE
#define SIDE 7
#endif

constexpr unsigned TOKENS = SIDE * SIDE;
constexpr unsigned ENTRIES = (2 * SIDE - 1) * (2 * SIDE - 1);
constexpr unsigned THREADS = 64;
using Item = Vec<VEC>;

__device__ __forceinline__ float dot(const Item& a, const Item& b, float sum) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) sum = fmaf(a.v[k], b.v[k], sum);
    return sum;
}

// y += a * x
__device__ __forceinline__ void add_scaled(Item& y, float a, const Item& x) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) y.v[k] = fmaf(a, x.v[k], y.v[k]);
}

// Heads and the map; offsets are in items.
struct Map {
    unsigned heads, h, w, shift_y, shift_x;

    // The pixel of token t of a window, both counted over all images.
    __device__ __forceinline__ unsigned pixel(unsigned window, unsigned t) const {
        const unsigned cols = w / SIDE, per = (h / SIDE) * cols;
        const unsigned y = (window % per / cols * SIDE + t / SIDE + shift_y) % h;
        const unsigned x = (window % cols * SIDE + t % SIDE + shift_x) % w;
        return (window / per * h + y) * w + x;
    }

    // Part 0 Q, 1 K, 2 V of a token.
    __device__ __forceinline__ size_t qkv(unsigned window, unsigned head, unsigned t, unsigned part) const {
        return ((size_t(pixel(window, t)) * 3 + part) * heads + head) * ITEMS;
    }

    __device__ __forceinline__ size_t out(unsigned window, unsigned head, unsigned t) const {
        return (size_t(pixel(window, t)) * heads + head) * ITEMS;
    }

    // The side of the seam that a token is on: bit 0 rows, bit 1 columns, where the window wraps round.
    __device__ __forceinline__ unsigned region(unsigned window, unsigned t) const {
        const unsigned cols = w / SIDE, rows = h / SIDE;
        const bool low = window / cols % rows == rows - 1 && shift_y > 0 && t / SIDE >= SIDE - shift_y;
        const bool right = window % cols == cols - 1 && shift_x > 0 && t % SIDE >= SIDE - shift_x;
        return (low ? 1u : 0u) + (right ? 2u : 0u);
    }
};

// The entry of the relative position table for query i and key j.
__device__ __forceinline__ unsigned entry(unsigned i, unsigned j) {
    return (i / SIDE + SIDE - 1 - j / SIDE) * (2 * SIDE - 1) + i % SIDE + SIDE - 1 - j % SIDE;
}

// What a block works on: 64 queries (or keys) from `first`, of a head of a window.
struct Place {
    unsigned first, head, window;
};

__device__ __forceinline__ Place place(const Map& m) {
    constexpr unsigned blocks = (TOKENS + THREADS - 1) / THREADS;
    return {blockIdx.x % blocks * THREADS, blockIdx.x / blocks % m.heads, blockIdx.x / blocks / m.heads};
}

// The head's column of the table into shared memory; the first barrier after it is the first tile's.
__device__ __forceinline__ void load_bias(float* bias, const float* __restrict__ table, const Map& m, unsigned head) {
    for (unsigned e = threadIdx.x; e < ENTRIES; e += THREADS) bias[e] = table[e * m.heads + head];
}

// K and V (a and b) of the tokens from j0.
__device__ __forceinline__ void load_keys(Item* a, Item* b, const float* __restrict__ qkv, const Map& m, const Place& at,
                                          unsigned j0) {
    __syncthreads();
    for (unsigned e = threadIdx.x; e < TILE * ITEMS; e += THREADS) {
        const unsigned j = j0 + e / ITEMS;
        if (j >= TOKENS) break;
        a[e] = load_vec<VEC>(qkv, m.qkv(at.window, at.head, j, 1) + e % ITEMS);
        b[e] = load_vec<VEC>(qkv, m.qkv(at.window, at.head, j, 2) + e % ITEMS);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS)
forward(Map m, float scale, const float* __restrict__ qkv, const float* __restrict__ table, float* __restrict__ out,
        float* __restrict__ lse) {
    __shared__ Item keys[TILE * ITEMS], values[TILE * ITEMS];
    __shared__ float bias[ENTRIES];
    const Place at = place(m);
    const unsigned i = at.first + threadIdx.x, token = min(i, TOKENS - 1), mine = m.region(at.window, token);
    load_bias(bias, table, m, at.head);
    Item q[ITEMS], o[ITEMS] = {};
    const size_t from = m.qkv(at.window, at.head, token, 0);
#pragma unroll
    for (int d = 0; d < ITEMS; ++d) {
        q[d] = load_vec<VEC>(qkv, from + d);
#pragma unroll
        for (int k = 0; k < VEC; ++k) q[d].v[k] *= scale;
    }
    float top = -1e30f, sum = 0.0f;
    for (unsigned j0 = 0; j0 < TOKENS; j0 += TILE) {
        load_keys(keys, values, qkv, m, at, j0);
        for (unsigned j = 0; j < min(unsigned(TILE), TOKENS - j0); ++j) {
            float score = 0.0f;
#pragma unroll
            for (int d = 0; d < ITEMS; ++d) score = dot(q[d], keys[j * ITEMS + d], score);
            score += bias[entry(token, j0 + j)];
            if (m.region(at.window, j0 + j) != mine) score -= 100.0f;
            if (score > top) {
                const float shrink = expf(top - score);
                sum *= shrink;
#pragma unroll
                for (int d = 0; d < ITEMS; ++d)
#pragma unroll
                    for (int k = 0; k < VEC; ++k) o[d].v[k] *= shrink;
                top = score;
            }
            const float e = expf(score - top);
            sum += e;
#pragma unroll
            for (int d = 0; d < ITEMS; ++d) add_scaled(o[d], e, values[j * ITEMS + d]);
        }
    }
    if (i >= TOKENS) return;
    const size_t to = m.out(at.window, at.head, i);
    const float inverse = 1.0f / sum;
#pragma unroll
    for (int d = 0; d < ITEMS; ++d) {
#pragma unroll
        for (int k = 0; k < VEC; ++k) o[d].v[k] *= inverse;
        store_vec<VEC>(out, to + d, o[d]);
    }
    lse[(at.window * m.heads + at.head) * TOKENS + i] = top + logf(sum);
}

// delta[window, head, t] = sum of dout * out over n rows
extern "C" __global__ void __launch_bounds__(THREADS)
deltas(Map m, unsigned n, const float* __restrict__ out, const float* __restrict__ dout, float* __restrict__ delta) {
    const unsigned i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    const size_t at = m.out(i / TOKENS / m.heads, i / TOKENS % m.heads, i % TOKENS);
    float sum = 0.0f;
#pragma unroll
    for (int d = 0; d < ITEMS; ++d) sum = dot(load_vec<VEC>(dout, at + d), load_vec<VEC>(out, at + d), sum);
    delta[i] = sum;
}

// dQ: a query a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
backward_q(Map m, float scale, const float* __restrict__ qkv, const float* __restrict__ table,
           const float* __restrict__ lse, const float* __restrict__ dout, const float* __restrict__ delta,
           float* __restrict__ dqkv) {
    __shared__ Item keys[TILE * ITEMS], values[TILE * ITEMS];
    __shared__ float bias[ENTRIES];
    const Place at = place(m);
    const unsigned i = at.first + threadIdx.x, token = min(i, TOKENS - 1), mine = m.region(at.window, token);
    load_bias(bias, table, m, at.head);
    Item q[ITEMS], g[ITEMS], dq[ITEMS] = {};
    const size_t from = m.qkv(at.window, at.head, token, 0), from_out = m.out(at.window, at.head, token);
#pragma unroll
    for (int d = 0; d < ITEMS; ++d) {
        q[d] = load_vec<VEC>(qkv, from + d);
        g[d] = load_vec<VEC>(dout, from_out + d);
#pragma unroll
        for (int k = 0; k < VEC; ++k) q[d].v[k] *= scale;
    }
    const unsigned row = (at.window * m.heads + at.head) * TOKENS + token;
    const float my_lse = lse[row], my_delta = delta[row];
    for (unsigned j0 = 0; j0 < TOKENS; j0 += TILE) {
        load_keys(keys, values, qkv, m, at, j0);
        for (unsigned j = 0; j < min(unsigned(TILE), TOKENS - j0); ++j) {
            float score = 0.0f, dp = 0.0f;
#pragma unroll
            for (int d = 0; d < ITEMS; ++d) {
                score = dot(q[d], keys[j * ITEMS + d], score);
                dp = dot(g[d], values[j * ITEMS + d], dp);
            }
            score += bias[entry(token, j0 + j)];
            if (m.region(at.window, j0 + j) != mine) score -= 100.0f;
            const float weight = expf(score - my_lse) * (dp - my_delta) * scale;
#pragma unroll
            for (int d = 0; d < ITEMS; ++d) add_scaled(dq[d], weight, keys[j * ITEMS + d]);
        }
    }
    if (i >= TOKENS) return;
#pragma unroll
    for (int d = 0; d < ITEMS; ++d) store_vec<VEC>(dqkv, from + d, dq[d]);
}

// dK and dV: a key a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
backward_kv(Map m, float scale, const float* __restrict__ qkv, const float* __restrict__ table,
            const float* __restrict__ lse, const float* __restrict__ dout, const float* __restrict__ delta,
            float* __restrict__ dqkv) {
    __shared__ Item queries[TILE * ITEMS], grads[TILE * ITEMS];
    __shared__ float bias[ENTRIES], tile_lse[TILE], tile_delta[TILE];
    const Place at = place(m);
    const unsigned i = at.first + threadIdx.x, token = min(i, TOKENS - 1), mine = m.region(at.window, token);
    load_bias(bias, table, m, at.head);
    Item key[ITEMS], value[ITEMS], dk[ITEMS] = {}, dv[ITEMS] = {};
    const size_t from_k = m.qkv(at.window, at.head, token, 1), from_v = m.qkv(at.window, at.head, token, 2);
#pragma unroll
    for (int d = 0; d < ITEMS; ++d) {
        key[d] = load_vec<VEC>(qkv, from_k + d);
        value[d] = load_vec<VEC>(qkv, from_v + d);
#pragma unroll
        for (int k = 0; k < VEC; ++k) key[d].v[k] *= scale;
    }
    for (unsigned j0 = 0; j0 < TOKENS; j0 += TILE) {
        __syncthreads();
        for (unsigned e = threadIdx.x; e < TILE * ITEMS; e += THREADS) {
            const unsigned j = j0 + e / ITEMS;
            if (j >= TOKENS) break;
            queries[e] = load_vec<VEC>(qkv, m.qkv(at.window, at.head, j, 0) + e % ITEMS);
            grads[e] = load_vec<VEC>(dout, m.out(at.window, at.head, j) + e % ITEMS);
        }
        for (unsigned e = threadIdx.x; e < TILE && j0 + e < TOKENS; e += THREADS) {
            const unsigned row = (at.window * m.heads + at.head) * TOKENS + j0 + e;
            tile_lse[e] = lse[row];
            tile_delta[e] = delta[row];
        }
        __syncthreads();
        for (unsigned j = 0; j < min(unsigned(TILE), TOKENS - j0); ++j) {
            float score = 0.0f, dp = 0.0f;
#pragma unroll
            for (int d = 0; d < ITEMS; ++d) {
                score = dot(key[d], queries[j * ITEMS + d], score);
                dp = dot(value[d], grads[j * ITEMS + d], dp);
            }
            score += bias[entry(j0 + j, token)];
            if (m.region(at.window, j0 + j) != mine) score -= 100.0f;
            const float e = expf(score - tile_lse[j]), weight = e * (dp - tile_delta[j]) * scale;
#pragma unroll
            for (int d = 0; d < ITEMS; ++d) {
                add_scaled(dk[d], weight, queries[j * ITEMS + d]);
                add_scaled(dv[d], e, grads[j * ITEMS + d]);
            }
        }
    }
    if (i >= TOKENS) return;
#pragma unroll
    for (int d = 0; d < ITEMS; ++d) {
        store_vec<VEC>(dqkv, from_k + d, dk[d]);
        store_vec<VEC>(dqkv, from_v + d, dv[d]);
    }
}

// pairs[part, head, i, j] = sum of P * (dP - delta) over the windows part, part + parts, ..: a pair a thread; the head
// is blockIdx.y, the part blockIdx.z.
extern "C" __global__ void __launch_bounds__(THREADS)
bias_pairs(Map m, unsigned windows, float scale, const float* __restrict__ qkv, const float* __restrict__ table,
           const float* __restrict__ lse, const float* __restrict__ dout, const float* __restrict__ delta,
           float* __restrict__ pairs) {
    const unsigned e = blockIdx.x * THREADS + threadIdx.x, head = blockIdx.y;
    if (e >= TOKENS * TOKENS) return;
    const unsigned i = e / TOKENS, j = e % TOKENS;
    const float bias = table[entry(i, j) * m.heads + head];
    float sum = 0.0f;
    for (unsigned window = blockIdx.z; window < windows; window += gridDim.z) {
        const size_t q = m.qkv(window, head, i, 0), key = m.qkv(window, head, j, 1), value = m.qkv(window, head, j, 2),
                     g = m.out(window, head, i);
        float score = 0.0f, dp = 0.0f;
#pragma unroll
        for (int d = 0; d < ITEMS; ++d) {
            score = dot(load_vec<VEC>(qkv, q + d), load_vec<VEC>(qkv, key + d), score);
            dp = dot(load_vec<VEC>(dout, g + d), load_vec<VEC>(qkv, value + d), dp);
        }
        const unsigned row = (window * m.heads + head) * TOKENS + i;
        const float mask = m.region(window, i) != m.region(window, j) ? -100.0f : 0.0f;
        sum += expf(score * scale + bias + mask - lse[row]) * (dp - delta[row]);
    }
    pairs[(blockIdx.z * m.heads + head) * TOKENS * TOKENS + e] = sum;
}

// dtable[entry, head]: the pairs of all parts that read it, n = entries * heads; an entry of a head a thread.
extern "C" __global__ void __launch_bounds__(THREADS)
bias_table(unsigned n, unsigned heads, unsigned parts, const float* __restrict__ pairs, float* __restrict__ dtable) {
    const unsigned e = blockIdx.x * THREADS + threadIdx.x;
    if (e >= n) return;
    const unsigned head = e % heads, place = e / heads;
    // Rows and columns from key to query, plus SIDE - 1.
    const unsigned dy = place / (2 * SIDE - 1), dx = place % (2 * SIDE - 1);
    float sum = 0.0f;
    for (unsigned part = 0; part < parts; ++part) {
        const float* from = pairs + size_t(part * heads + head) * TOKENS * TOKENS;
        for (unsigned iy = max(dy, SIDE - 1u) - (SIDE - 1u); iy < min(dy + 1, unsigned(SIDE)); ++iy) {
            for (unsigned ix = max(dx, SIDE - 1u) - (SIDE - 1u); ix < min(dx + 1, unsigned(SIDE)); ++ix) {
                const unsigned i = iy * SIDE + ix, j = (iy + SIDE - 1 - dy) * SIDE + ix + SIDE - 1 - dx;
                sum += from[i * TOKENS + j];
            }
        }
    }
    dtable[e] = sum;
}
