// Attention within shifted windows of [N, H, W, 3 * heads * dim] (Swin), forward and backward. Windows are addresses only;
// what wraps round is masked by -100; the relative position table's column of a head lies in shared memory. Softmax online;
// the backward pass computes the scores again, and every result has one owner and one order. The ladder:
//   0 plain  a thread owns one query (or key) of one window's head with its vectors in registers; keys and values (queries
//            and their gradients) pass by in tiles of TILE through shared memory, where all threads read the same address
//            at a time. float32 arithmetic.
//   1 mma    tensor cores, operands tf32 or bf16: the scheme of attention.cu on 64 rows of a window, 4 warps of 16 rows,
//            tiles of TILE columns. A window of 49 tokens is one block and one or two tiles. The table's gradient stays in
//            registers while windows pass by, in place of a recomputation from global memory for every pair.
//            Dynamic shared memory, 49 tokens of 32 channels, bf16: forward 16.5 KiB, the backward kernels as much or 22 KiB.
//
// Compile-time constants: RUNG; VEC; ITEMS, items of VEC floats of a head; SIDE of a window; TILE (plain: at most 40 KiB of
// both tiles); ROUND 0, 1 or 2 where operands are rounded to nothing, tf32, bf16; for mma ELEMENT (float for tf32, bf16) and
// DP, the head size rounded up to 16.

#include "common/flash.cuh"
#include "common/vec.cuh"

#ifndef RUNG
#define RUNG 1
#define ITEMS 8
#define TILE 64
#define SIDE 7
#define DP 32
#define ELEMENT bf16
#endif
#ifndef ROUND
#define ROUND 0
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

// An item in the run's precision.
__device__ __forceinline__ Item rounded(Item x) {
#pragma unroll
    for (int k = 0; k < VEC; ++k) x.v[k] = rounded_to<ROUND>(x.v[k]);
    return x;
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

// What a block works on: 64 queries (or keys) from `first`, of a head of a window.
struct Place {
    unsigned first, head, window;
};

__device__ __forceinline__ Place place(const Map& m) {
    constexpr unsigned blocks = (TOKENS + THREADS - 1) / THREADS;
    return {blockIdx.x % blocks * THREADS, blockIdx.x / blocks % m.heads, blockIdx.x / blocks / m.heads};
}

// delta[window, head, t] = sum of dout * out over n rows, a warp each; dout rounded as where dP is made of it, for the two
// cancel where one key has nearly all the weight.
extern "C" __global__ void __launch_bounds__(THREADS)
deltas(Map m, unsigned n, const float* __restrict__ out, const float* __restrict__ dout, float* __restrict__ delta) {
    const unsigned i = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (i >= n) return;
    const size_t at = m.out(i / TOKENS / m.heads, i / TOKENS % m.heads, i % TOKENS) * VEC;
    float sum = 0.0f;
    for (unsigned d = threadIdx.x % 32; d < ITEMS * VEC; d += 32) sum = fmaf(rounded_to<ROUND>(dout[at + d]), out[at + d], sum);
    sum = sum_of<32>(sum);
    if (threadIdx.x % 32 == 0) delta[i] = sum;
}

#if RUNG == 0

// The entry of the relative position table for query i and key j.
__device__ __forceinline__ unsigned entry(unsigned i, unsigned j) {
    return (i / SIDE + SIDE - 1 - j / SIDE) * (2 * SIDE - 1) + i % SIDE + SIDE - 1 - j % SIDE;
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
        a[e] = rounded(load_vec<VEC>(qkv, m.qkv(at.window, at.head, j, 1) + e % ITEMS));
        b[e] = rounded(load_vec<VEC>(qkv, m.qkv(at.window, at.head, j, 2) + e % ITEMS));
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
        q[d] = rounded(load_vec<VEC>(qkv, from + d));
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
        q[d] = rounded(load_vec<VEC>(qkv, from + d));
        g[d] = rounded(load_vec<VEC>(dout, from_out + d));
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
        key[d] = rounded(load_vec<VEC>(qkv, from_k + d));
        value[d] = rounded(load_vec<VEC>(qkv, from_v + d));
#pragma unroll
        for (int k = 0; k < VEC; ++k) key[d].v[k] *= scale;
    }
    for (unsigned j0 = 0; j0 < TOKENS; j0 += TILE) {
        __syncthreads();
        for (unsigned e = threadIdx.x; e < TILE * ITEMS; e += THREADS) {
            const unsigned j = j0 + e / ITEMS;
            if (j >= TOKENS) break;
            queries[e] = rounded(load_vec<VEC>(qkv, m.qkv(at.window, at.head, j, 0) + e % ITEMS));
            grads[e] = rounded(load_vec<VEC>(dout, m.out(at.window, at.head, j) + e % ITEMS));
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
            score = dot(rounded(load_vec<VEC>(qkv, q + d)), rounded(load_vec<VEC>(qkv, key + d)), score);
            dp = dot(rounded(load_vec<VEC>(dout, g + d)), rounded(load_vec<VEC>(qkv, value + d)), dp);
        }
        const unsigned row = (window * m.heads + head) * TOKENS + i;
        const float mask = m.region(window, i) != m.region(window, j) ? -100.0f : 0.0f;
        sum += expf(score * scale + bias + mask - lse[row]) * (dp - delta[row]);
    }
    pairs[(blockIdx.z * m.heads + head) * TOKENS * TOKENS + e] = sum;
}

#else

constexpr unsigned MMA_THREADS = 128;
constexpr unsigned PADDED = (TOKENS + 63) / 64 * 64;
constexpr int D = ITEMS * VEC;
using F = Flash<ELEMENT, DP>;

extern __shared__ uint4 window_shared[];

// What a block knows of its window and head, at the front of shared memory: the table's column in units of log 2, and of
// each token its pixel and `key << 2 | region`, where the table's entry for a pair is the difference of the keys + CENTRE.
// Tokens beyond the last have the values of the first, so that they can be looked up.
struct Known {
    float bias[(ENTRIES + 3) / 4 * 4];
    unsigned pixel[PADDED];
    unsigned info[PADDED];
};
constexpr int CENTRE = (SIDE - 1) * (2 * SIDE - 1) + SIDE - 1;
constexpr unsigned FRONT = (sizeof(Known) + 15) / 16 * 16;

__device__ __forceinline__ void know_window(Known& known, const Map& m, unsigned window) {
    for (unsigned t = threadIdx.x; t < PADDED; t += MMA_THREADS) {
        const unsigned token = t < TOKENS ? t : 0;
        known.pixel[t] = m.pixel(window, token);
        known.info[t] = (token / SIDE * (2 * SIDE - 1) + token % SIDE) << 2 | m.region(window, token);
    }
}

__device__ __forceinline__ void know_table(Known& known, const Map& m, const float* table, unsigned head) {
    for (unsigned e = threadIdx.x; e < ENTRIES; e += MMA_THREADS) known.bias[e] = table[e * m.heads + head] * LOG2_E;
}

// What is added to the score of a query and a key, by their info.
__device__ __forceinline__ float position(const Known& known, unsigned query, unsigned key) {
    const float bias = known.bias[int(query >> 2) - int(key >> 2) + CENTRE];
    return (query ^ key) & 3 ? bias - 100.0f * LOG2_E : bias;
}

// ROWS tokens from `first` on as a tile; `from` is pixel 0's vector, pixels are `pitch` floats apart.
template <int ROWS>
__device__ __forceinline__ void stage(char* to, const float* from, size_t pitch, const Known& known, unsigned first) {
#pragma unroll 2
    for (unsigned i = threadIdx.x; i < ROWS * (DP / 4); i += MMA_THREADS) {
        const unsigned row = i / (DP / 4), d = i % (DP / 4) * 4, token = first + row;
        const bool there = token < TOKENS;
        F::put(to, row, d, load_channels<D, VEC>(from + known.pixel[there ? token : 0] * pitch, d, there));
    }
}

// lse in units of log 2, and delta, of TILE tokens; `from` is the window's first.
__device__ __forceinline__ void stage_stats(float* to, const float* lse, const float* delta, unsigned first) {
    for (unsigned i = threadIdx.x; i < TILE; i += MMA_THREADS) {
        const bool there = first + i < TOKENS;
        to[i] = there ? lse[first + i] * LOG2_E : 0.0f;
        to[TILE + i] = there ? delta[first + i] : 0.0f;
    }
}

// Where a head's vectors begin, and how far pixels are apart.
struct Head {
    size_t pitch, out_pitch;
    const float *q, *k, *v;
    size_t out;
    __device__ Head(const Map& m, const float* qkv, unsigned head)
        : pitch(size_t(3) * m.heads * D), out_pitch(size_t(m.heads) * D), q(qkv + head * D), k(q + out_pitch), v(k + out_pitch), out(head * D) {}
};

extern "C" __global__ void __launch_bounds__(MMA_THREADS)
forward(Map m, float scale, const float* __restrict__ qkv, const float* __restrict__ table, float* __restrict__ out,
        float* __restrict__ lse) {
    Known& known = *reinterpret_cast<Known*>(window_shared);
    char* q = reinterpret_cast<char*>(window_shared) + FRONT;
    char *k = q + 64 * F::PITCH, *v = k + TILE * F::PITCH;
    const unsigned sq = shared_address(q), sk = shared_address(k), sv = shared_address(v);
    const Place at = place(m);
    const Head head(m, qkv, at.head);
    const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    know_window(known, m, at.window);
    know_table(known, m, table, at.head);
    __syncthreads();
    stage<64>(q, head.q, head.pitch, known, at.first);
    const unsigned mine[2] = {known.info[at.first + row + g], known.info[at.first + row + g + 8]};
    const float factor = scale * LOG2_E;
    float o[DP / 8][4] = {}, top[2] = {LOWEST, LOWEST}, sum[2] = {};
    for (unsigned c0 = 0; c0 < TOKENS; c0 += TILE) {
        if (c0 > 0) __syncthreads();
        stage<TILE>(k, head.k, head.pitch, known, c0);
        stage<TILE>(v, head.v, head.pitch, known, c0);
        __syncthreads();
        float s[TILE / 8][4];
        F::scores<TILE>(s, sq, row, sk);
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const unsigned c = c0 + 8 * j + 2 * t + e % 2;
                s[j][e] = c < TOKENS ? fmaf(s[j][e], factor, position(known, mine[e / 2], known.info[c])) : LOWEST;
            }
#pragma unroll
        for (int half = 0; half < 2; ++half) F::soften<TILE>(s, half, top[half], sum[half], o);
        F::apply<TILE>(o, s, sv);
    }
    const unsigned first = at.first + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float all = sum_of<4>(sum[half]);
        const unsigned token = first + g + 8 * half;
        if (t == 0 && token < TOKENS) lse[(at.window * m.heads + at.head) * TOKENS + token] = top[half] / LOG2_E + logf(all);
#pragma unroll
        for (int n = 0; n < DP / 8; ++n) o[n][2 * half] /= all, o[n][2 * half + 1] /= all;
    }
    F::put_rows<D, VEC>(o, [&](int r) { return first + r < TOKENS ? out + head.out + known.pixel[first + r] * head.out_pitch : nullptr; });
}

// P and dS of a tile in place of scores and dP. Rows are keys (KEYS; stats of the passing queries) or queries.
template <bool KEYS>
__device__ __forceinline__ void pull_back(float (&s)[TILE / 8][4], float (&dp)[TILE / 8][4], const Known& known, unsigned first, unsigned c0, float factor, const float* stats, const float (&row_lse)[2], const float (&row_delta)[2]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const unsigned mine[2] = {known.info[first + g], known.info[first + g + 8]};
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int at = 8 * j + 2 * t + e % 2;
            const bool pair = first + g + 8 * (e / 2) < TOKENS && c0 + at < TOKENS;
            const unsigned other = known.info[c0 + at];
            const float x = fmaf(s[j][e], factor, KEYS ? position(known, other, mine[e / 2]) : position(known, mine[e / 2], other));
            const float p = pair ? exp2f(x - (KEYS ? stats[at] : row_lse[e / 2])) : 0.0f;
            dp[j][e] = pair ? p * (dp[j][e] - (KEYS ? stats[TILE + at] : row_delta[e / 2])) : 0.0f;
            s[j][e] = p;
        }
}

// lse in units of log 2, and delta, of a thread's two rows.
__device__ __forceinline__ void row_stats(float (&row_lse)[2], float (&row_delta)[2], const float* lse, const float* delta, unsigned first) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const unsigned token = min(first + threadIdx.x % 32 / 4 + 8 * half, TOKENS - 1);
        row_lse[half] = lse[token] * LOG2_E, row_delta[half] = delta[token];
    }
}

template <bool KEYS>
__device__ __forceinline__ void backward(const Map& m, float scale, const float* __restrict__ qkv, const float* __restrict__ table,
                                         const float* __restrict__ lse, const float* __restrict__ dout, const float* __restrict__ delta,
                                         float* __restrict__ dqkv) {
    Known& known = *reinterpret_cast<Known*>(window_shared);
    char* a = reinterpret_cast<char*>(window_shared) + FRONT;
    char *ga = a + 64 * F::PITCH, *b = ga + 64 * F::PITCH, *gb = b + TILE * F::PITCH;
    float* stats = reinterpret_cast<float*>(gb + TILE * F::PITCH);
    const unsigned sa = shared_address(a), sga = shared_address(ga), sb = shared_address(b), sgb = shared_address(gb);
    const Place at = place(m);
    const Head head(m, qkv, at.head);
    const float* dy = dout + head.out;
    const size_t stat = size_t(at.window * m.heads + at.head) * TOKENS;
    const unsigned row = threadIdx.x / 32 * 16, first = at.first + row;
    know_window(known, m, at.window);
    know_table(known, m, table, at.head);
    __syncthreads();
    stage<64>(a, KEYS ? head.k : head.q, head.pitch, known, at.first);
    stage<64>(ga, KEYS ? head.v : dy, KEYS ? head.pitch : head.out_pitch, known, at.first);
    float row_lse[2], row_delta[2];
    if constexpr (!KEYS) row_stats(row_lse, row_delta, lse + stat, delta + stat, first);
    float da[DP / 8][4] = {}, dv[KEYS ? DP / 8 : 1][4] = {};
    for (unsigned c0 = 0; c0 < TOKENS; c0 += TILE) {
        if (c0 > 0) __syncthreads();
        stage<TILE>(b, KEYS ? head.q : head.k, head.pitch, known, c0);
        stage<TILE>(gb, KEYS ? dy : head.v, KEYS ? head.out_pitch : head.pitch, known, c0);
        if constexpr (KEYS) stage_stats(stats, lse + stat, delta + stat, c0);
        __syncthreads();
        float s[TILE / 8][4], dp[TILE / 8][4];
        F::scores<TILE>(s, sa, row, sb);
        F::scores<TILE>(dp, sga, row, sgb);
        pull_back<KEYS>(s, dp, known, first, c0, scale * LOG2_E, stats, row_lse, row_delta);
        if constexpr (KEYS) F::apply<TILE>(dv, s, sgb);
        F::apply<TILE>(da, dp, sb);
    }
#pragma unroll
    for (int n = 0; n < DP / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) da[n][e] *= scale;
    const auto part = [&](unsigned part, int r) -> float* {
        return first + r < TOKENS ? dqkv + known.pixel[first + r] * head.pitch + part * head.out_pitch + head.out : nullptr;
    };
    F::put_rows<D, VEC>(da, [&](int r) { return part(KEYS ? 1 : 0, r); });
    if constexpr (KEYS) F::put_rows<D, VEC>(dv, [&](int r) { return part(2, r); });
}

// Blocks of a multiprocessor that backward_q asks for: as many as there are registers for without a spill. Left to itself
// the compiler aims at one more and spills a few. Wide heads take what they need.
constexpr int BACKWARD_Q_BLOCKS = DP > 32 ? 1 : TOKENS > 64 ? 4 : sizeof(ELEMENT) == 2 ? 6 : 5;

extern "C" __global__ void __launch_bounds__(MMA_THREADS, BACKWARD_Q_BLOCKS)
backward_q(Map m, float scale, const float* __restrict__ qkv, const float* __restrict__ table, const float* __restrict__ lse,
           const float* __restrict__ dout, const float* __restrict__ delta, float* __restrict__ dqkv) {
    backward<false>(m, scale, qkv, table, lse, dout, delta, dqkv);
}

extern "C" __global__ void __launch_bounds__(MMA_THREADS)
backward_kv(Map m, float scale, const float* __restrict__ qkv, const float* __restrict__ table, const float* __restrict__ lse,
            const float* __restrict__ dout, const float* __restrict__ delta, float* __restrict__ dqkv) {
    backward<true>(m, scale, qkv, table, lse, dout, delta, dqkv);
}

// pairs[part, head, i, j] = sum of dS over the windows part, part + parts, ..: 64 queries and TILE keys a block
// (blockIdx.x, keys fastest), whose sums stay in registers; the head is blockIdx.y, the part blockIdx.z.
extern "C" __global__ void __launch_bounds__(MMA_THREADS)
bias_pairs(Map m, unsigned windows, float scale, const float* __restrict__ qkv, const float* __restrict__ table,
           const float* __restrict__ lse, const float* __restrict__ dout, const float* __restrict__ delta,
           float* __restrict__ pairs) {
    Known& known = *reinterpret_cast<Known*>(window_shared);
    char* q = reinterpret_cast<char*>(window_shared) + FRONT;
    char *dy = q + 64 * F::PITCH, *k = dy + 64 * F::PITCH, *v = k + TILE * F::PITCH;
    const unsigned sq = shared_address(q), sdy = shared_address(dy), sk = shared_address(k), sv = shared_address(v);
    constexpr unsigned TILES = (TOKENS + TILE - 1) / TILE;
    const unsigned c0 = blockIdx.x % TILES * TILE, r0 = blockIdx.x / TILES * 64, row = threadIdx.x / 32 * 16;
    const Head head(m, qkv, blockIdx.y);
    know_table(known, m, table, blockIdx.y);
    float sum[TILE / 8][4] = {};
    for (unsigned window = blockIdx.z; window < windows; window += gridDim.z) {
        __syncthreads();  // the window before is done with
        know_window(known, m, window);
        __syncthreads();
        stage<64>(q, head.q, head.pitch, known, r0);
        stage<64>(dy, dout + head.out, head.out_pitch, known, r0);
        stage<TILE>(k, head.k, head.pitch, known, c0);
        stage<TILE>(v, head.v, head.pitch, known, c0);
        const size_t stat = size_t(window * m.heads + blockIdx.y) * TOKENS;
        float row_lse[2], row_delta[2];
        row_stats(row_lse, row_delta, lse + stat, delta + stat, r0 + row);
        __syncthreads();
        float s[TILE / 8][4], dp[TILE / 8][4];
        F::scores<TILE>(s, sq, row, sk);
        F::scores<TILE>(dp, sdy, row, sv);
        pull_back<false>(s, dp, known, r0 + row, c0, scale * LOG2_E, nullptr, row_lse, row_delta);
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[j][e] += dp[j][e];
    }
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float* to = pairs + size_t(blockIdx.z * m.heads + blockIdx.y) * TOKENS * TOKENS;
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const unsigned i = r0 + row + g + 8 * (e / 2), c = c0 + 8 * j + 2 * t + e % 2;
            if (i < TOKENS && c < TOKENS) to[i * TOKENS + c] = sum[j][e];
        }
}

#endif

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
