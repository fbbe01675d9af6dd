// Attention in the FlashAttention manner (Dao et al. 2022): out = softmax(scale Q K^T) V per image and head, no [T, T]
// in memory. qkv [N, T, 3, H, D], out and its gradient [N, T, H, D], lse and delta [N, H, T].
//
//   forward   a block owns 64 queries of one head; keys and values pass by in tiles, the softmax is online: a row's
//             maximum and sum are corrected as tiles come
//   deltas    delta = sum of dout * out per query
//   dq        a block owns BLOCK queries, keys and values pass by; probabilities are recomputed from lse
//   dkv       a block owns BLOCK keys, queries and gradients pass by. dq and dkv are one function: with rows and columns
//             exchanged, the same two products come first. Each result has one owner and one order: no atomics, the
//             same bits every time. The price is a second Q K^T and dout V^T (7 products in place of 5).
//   probs     the probabilities, for analysis: [N, H, T, T]
//
// Constants: RUNG; ROUND 0, 1 or 2 where rungs 0 and 1 round operands to nothing, tf32, bf16; D the head size, DP the same rounded up to 16 (the rest is zeros); VEC 4 where D is in fours, else
// 1; TILE columns that pass by at once, BLOCK rows of dq and dkv; for mma ELEMENT (float for tf32, bf16).
// Grid: blocks of rows of all heads, those of one head side by side, so that its keys stay in L2.
// The ladder:
//   0 naive  a warp owns a query (or key): for the scores a lane is a key, for the result every 32nd channel; two passes,
//            as softmax is defined. Any head size.
//   1 simt   float32. 256 threads as 16 x 16, a thread BLOCK/16 x TILE/16 scores in registers; every value loaded from
//            shared memory feeds four products. Probabilities change hands through shared memory.
//            Shared memory, D = 64: forward 72,704 bytes, dq 90,112, dkv 90,624.
//   2 mma    tensor cores. 4 warps of 16 rows; scores stay in registers and become, as they lie, the left operand of
//            the second product. Operands are rounded when staged, not in a pass before: each is staged by a few
//            blocks only, and q, k and v lie interleaved. Lines of a tile are 16 bytes longer than they need be, so
//            that eight of them begin in eight different groups of banks. Shared memory, D = 64, bf16: forward 27,648
//            bytes, dq 36,864, dkv 27,904.

#include "common/flash.cuh"

#ifndef RUNG
#define RUNG 2
#define D 64
#define DP 64
#define VEC 4
#define TILE 64
#define BLOCK 64
#define ELEMENT bf16
#endif

#ifndef ROUND
#define ROUND 0
#endif

__device__ __forceinline__ float rounded(float x) { return rounded_to<ROUND>(x); }

struct Heads {
    unsigned tokens, heads, rows;  // rows: of all heads and images
    float scale;
};

// One head of one image: where its tensors begin, and how far tokens are apart.
struct Head {
    unsigned index, width;  // width: H * D
    size_t qkv, out, row;
    __device__ Head(const Heads& h, unsigned index) : index(index), width(h.heads * D) {
        const unsigned image = index / h.heads, head = index % h.heads;
        qkv = size_t(image) * h.tokens * 3 * width + head * D;
        out = size_t(image) * h.tokens * width + head * D;
        row = size_t(index) * h.tokens;
    }
    // First channel of part (0 q, 1 k, 2 v) of a token.
    __device__ size_t at(unsigned part, unsigned token) const { return qkv + (size_t(token) * 3 + part) * width; }
    __device__ size_t at_out(unsigned token) const { return out + size_t(token) * width; }
};

// A warp per row; the same for every rung. dout is rounded as where dP is made of it, for the two cancel where one key has
// nearly all the weight. Grid: rows / 4, 128 threads.
extern "C" __global__ void __launch_bounds__(128)
attention_deltas(const float* __restrict__ dout, const float* __restrict__ out, float* __restrict__ delta, Heads h) {
    const unsigned row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= h.rows) return;
    const Head head(h, row / h.tokens);
    const size_t at = head.at_out(row % h.tokens);
    float sum = 0.0f;
    for (unsigned d = lane; d < D; d += 32) sum = fmaf(rounded(dout[at + d]), out[at + d], sum);
    sum = sum_of<32>(sum);
    if (lane == 0) delta[row] = sum;
}

#if RUNG == 0

constexpr int ITEMS = (D + 31) / 32;

// A lane's channels: every 32nd.
struct Channels {
    float v[ITEMS] = {};
    static __device__ int channel(int i) { return threadIdx.x % 32 + 32 * i; }
    __device__ void add(float factor, const float* from) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
            if (channel(i) < D) v[i] = fmaf(factor, rounded(from[channel(i)]), v[i]);
    }
    __device__ void store(float* to, float factor) const {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i)
            if (channel(i) < D) to[channel(i)] = v[i] * factor;
    }
};

// In the order of the simt rung, so that scores of one rung fit the lse of another to the last bit.
__device__ __forceinline__ float dot(const float* a, const float* b) {
    float sum = 0.0f;
    for (int d = 0; d < D; d += 4)
#pragma unroll
        for (int e = 3; e >= 0; --e)
            if (d + e < D) sum = fmaf(rounded(a[d + e]), rounded(b[d + e]), sum);
    return sum;
}

extern "C" __global__ void __launch_bounds__(128)
attention_forward(const float* __restrict__ qkv, float* __restrict__ out, float* __restrict__ lse, Heads h) {
    const unsigned row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= h.rows) return;
    const Head head(h, row / h.tokens);
    const float* q = qkv + head.at(0, row % h.tokens);
    float top = LOWEST, sum = 0.0f;
    for (unsigned j = lane; j < h.tokens; j += 32) top = fmaxf(top, h.scale * dot(q, qkv + head.at(1, j)));
    top = max_of<32>(top);
    Channels o;
    for (unsigned j0 = 0; j0 < h.tokens; j0 += 32) {
        const unsigned j = j0 + lane;
        const float e = j < h.tokens ? expf(h.scale * dot(q, qkv + head.at(1, j)) - top) : 0.0f;
        sum += e;
        for (unsigned i = 0; i < min(32u, h.tokens - j0); ++i) o.add(__shfl_sync(0xffffffffu, e, i), qkv + head.at(2, j0 + i));
    }
    sum = sum_of<32>(sum);
    o.store(out + head.at_out(row % h.tokens), 1.0f / sum);
    if (lane == 0) lse[row] = top + logf(sum);
}

extern "C" __global__ void __launch_bounds__(128)
attention_probs(const float* __restrict__ qkv, const float* __restrict__ lse, float* __restrict__ probs, Heads h) {
    const unsigned row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= h.rows) return;
    const Head head(h, row / h.tokens);
    const float* q = qkv + head.at(0, row % h.tokens);
    for (unsigned j = threadIdx.x % 32; j < h.tokens; j += 32)
        probs[size_t(row) * h.tokens + j] = expf(h.scale * dot(q, qkv + head.at(1, j)) - lse[row]);
}

extern "C" __global__ void __launch_bounds__(128)
attention_dq(const float* __restrict__ qkv, const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dqkv, Heads h) {
    const unsigned row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= h.rows) return;
    const Head head(h, row / h.tokens);
    const float *q = qkv + head.at(0, row % h.tokens), *g = dout + head.at_out(row % h.tokens);
    Channels dq;
    for (unsigned j0 = 0; j0 < h.tokens; j0 += 32) {
        const unsigned j = j0 + threadIdx.x % 32;
        float ds = 0.0f;
        if (j < h.tokens) {
            const float p = expf(h.scale * dot(q, qkv + head.at(1, j)) - lse[row]);
            ds = p * (dot(g, qkv + head.at(2, j)) - delta[row]);
        }
        for (unsigned i = 0; i < min(32u, h.tokens - j0); ++i) dq.add(__shfl_sync(0xffffffffu, ds, i), qkv + head.at(1, j0 + i));
    }
    dq.store(dqkv + head.at(0, row % h.tokens), h.scale);
}

extern "C" __global__ void __launch_bounds__(128)
attention_dkv(const float* __restrict__ qkv, const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dqkv, Heads h) {
    const unsigned row = blockIdx.x * 4 + threadIdx.x / 32;
    if (row >= h.rows) return;
    const Head head(h, row / h.tokens);
    const float *k = qkv + head.at(1, row % h.tokens), *v = qkv + head.at(2, row % h.tokens);
    Channels dk, dv;
    for (unsigned i0 = 0; i0 < h.tokens; i0 += 32) {
        const unsigned query = i0 + threadIdx.x % 32;
        float p = 0.0f, ds = 0.0f;
        if (query < h.tokens) {
            p = expf(h.scale * dot(qkv + head.at(0, query), k) - lse[head.row + query]);
            ds = p * (dot(dout + head.at_out(query), v) - delta[head.row + query]);
        }
        for (unsigned i = 0; i < min(32u, h.tokens - i0); ++i) {
            dv.add(__shfl_sync(0xffffffffu, p, i), dout + head.at_out(i0 + i));
            dk.add(__shfl_sync(0xffffffffu, ds, i), qkv + head.at(0, i0 + i));
        }
    }
    dk.store(dqkv + head.at(1, row % h.tokens), h.scale);
    dv.store(dqkv + head.at(2, row % h.tokens), 1.0f);
}

#else

// The block's rows: `first` and on, of one head.
struct Rows {
    Head head;
    unsigned first;
    __device__ Rows(const Heads& h, unsigned block) : Rows(h, (h.tokens + block - 1) / block, block) {}

private:
    __device__ Rows(const Heads& h, unsigned blocks, unsigned block)
        : head(h, blockIdx.x / blocks), first(blockIdx.x % blocks * block) {}
};

// Passing queries' lse (times `factor`) and delta, COUNT each, into shared memory; zeros beyond the last token.
template <int COUNT>
__device__ __forceinline__ void stage_stats(float* to, const float* lse, const float* delta, float factor, unsigned first, unsigned tokens) {
    for (int i = threadIdx.x; i < COUNT; i += blockDim.x) {
        const bool there = first + i < tokens;
        to[i] = there ? lse[first + i] * factor : 0.0f;
        to[COUNT + i] = there ? delta[first + i] : 0.0f;
    }
}

#endif

#if RUNG == 1

constexpr int PITCH = DP + 4;           // of a tile [rows][DP]: an odd number of 16-byte groups
constexpr int SCORE_PITCH = TILE + 16;  // rows t and t + 1 begin half the banks apart
constexpr int PIECE = DP % 64 == 0 ? 4 : DP % 32 == 0 ? 2 : 1;
constexpr int PIECES = DP / 16 / PIECE;  // a thread owns channels PIECE * (tx + 16 i) and up

template <int ROWS>
__device__ __forceinline__ void stage(float* to, const float* from, size_t stride, unsigned first, unsigned tokens) {
#pragma unroll 2
    for (int i = threadIdx.x; i < ROWS * (DP / 4); i += 256) {
        const int row = i / (DP / 4), d = i % (DP / 4) * 4;
        const float4 v = load_channels<D, VEC>(from + (first + row) * stride, d, first + row < tokens);
        *reinterpret_cast<float4*>(to + row * PITCH + d) = make_float4(rounded(v.x), rounded(v.y), rounded(v.z), rounded(v.w));
    }
}

// s[i][j] = a[ty + 16 i] . b[tx + 16 j] over the channels.
template <int TR, int TC>
__device__ __forceinline__ void scores(float (&s)[TR][TC], const float* a, const float* b) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < TR; ++i)
#pragma unroll
        for (int j = 0; j < TC; ++j) s[i][j] = 0.0f;
#pragma unroll 2
    for (int d = 0; d < DP; d += 4) {
        float4 u[TR], v[TC];
#pragma unroll
        for (int i = 0; i < TR; ++i) u[i] = *reinterpret_cast<const float4*>(a + (ty + 16 * i) * PITCH + d);
#pragma unroll
        for (int j = 0; j < TC; ++j) v[j] = *reinterpret_cast<const float4*>(b + (tx + 16 * j) * PITCH + d);
#pragma unroll
        for (int i = 0; i < TR; ++i)
#pragma unroll
            for (int j = 0; j < TC; ++j)
                s[i][j] = fmaf(u[i].x, v[j].x, fmaf(u[i].y, v[j].y, fmaf(u[i].z, v[j].z, fmaf(u[i].w, v[j].w, s[i][j]))));
    }
}

template <int TR, int TC>
__device__ __forceinline__ void put_scores(float* to, const float (&s)[TR][TC]) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < TR; ++i)
#pragma unroll
        for (int j = 0; j < TC; ++j) to[(ty + 16 * i) * SCORE_PITCH + tx + 16 * j] = s[i][j];
}

// o[i] += sum over the tile's columns c of s[ty + 16 i][c] b[c].
template <int TR>
__device__ __forceinline__ void apply(float (&o)[TR][PIECES * PIECE], const float* s, const float* b) {
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 2
    for (int c = 0; c < TILE; c += 4) {
        float p[TR][4];
#pragma unroll
        for (int i = 0; i < TR; ++i) {
            const float4 v = *reinterpret_cast<const float4*>(s + (ty + 16 * i) * SCORE_PITCH + c);
            p[i][0] = v.x, p[i][1] = v.y, p[i][2] = v.z, p[i][3] = v.w;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
            for (int n = 0; n < PIECES; ++n) {
                const float* at = b + (c + e) * PITCH + PIECE * (tx + 16 * n);
                float v[PIECE];
                if constexpr (PIECE == 4) {
                    const float4 f = *reinterpret_cast<const float4*>(at);
                    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
                } else if constexpr (PIECE == 2) {
                    const float2 f = *reinterpret_cast<const float2*>(at);
                    v[0] = f.x, v[1] = f.y;
                } else {
                    v[0] = *at;
                }
#pragma unroll
                for (int i = 0; i < TR; ++i)
#pragma unroll
                    for (int k = 0; k < PIECE; ++k) o[i][n * PIECE + k] = fmaf(p[i][e], v[k], o[i][n * PIECE + k]);
            }
    }
}

// A thread's channels of one row.
__device__ __forceinline__ void put_row(float* row, const float (&o)[PIECES * PIECE], float factor) {
    const int tx = threadIdx.x % 16;
#pragma unroll
    for (int n = 0; n < PIECES; ++n) {
        const int d = PIECE * (tx + 16 * n);
        if constexpr (PIECE == 4) {
            const float v[4] = {o[4 * n] * factor, o[4 * n + 1] * factor, o[4 * n + 2] * factor, o[4 * n + 3] * factor};
            store_channels<D, VEC>(row, d, v);
        } else {
#pragma unroll
            for (int k = 0; k < PIECE; ++k)
                if (d + k < D) row[d + k] = o[n * PIECE + k] * factor;
        }
    }
}

extern __shared__ float4 attention_shared[];

extern "C" __global__ void __launch_bounds__(256, 2)
attention_forward(const float* __restrict__ qkv, float* __restrict__ out, float* __restrict__ lse, Heads h) {
    constexpr int TR = 4, TC = TILE / 16, OWN = PIECES * PIECE;
    float* q = reinterpret_cast<float*>(attention_shared);
    float* k = q + 64 * PITCH;
    float* v = k + TILE * PITCH;
    float* p = v + TILE * PITCH;
    const Rows rows(h, 64);
    const Head& head = rows.head;
    const size_t stride = 3 * size_t(head.width);
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    stage<64>(q, qkv + head.at(0, 0), stride, rows.first, h.tokens);
    float o[TR][OWN] = {}, top[TR], sum[TR];
#pragma unroll
    for (int i = 0; i < TR; ++i) top[i] = LOWEST, sum[i] = 0.0f;
    for (unsigned c0 = 0; c0 < h.tokens; c0 += TILE) {
        __syncthreads();  // the tile before is done with
        stage<TILE>(k, qkv + head.at(1, 0), stride, c0, h.tokens);
        stage<TILE>(v, qkv + head.at(2, 0), stride, c0, h.tokens);
        __syncthreads();
        float s[TR][TC];
        scores(s, q, k);
#pragma unroll
        for (int i = 0; i < TR; ++i) {
            float most = top[i];
#pragma unroll
            for (int j = 0; j < TC; ++j) {
                s[i][j] = c0 + tx + 16 * j < h.tokens ? s[i][j] * h.scale : LOWEST;
                most = fmaxf(most, s[i][j]);
            }
            most = max_of<16>(most);
            const float shrink = expf(top[i] - most);
            top[i] = most;
            sum[i] *= shrink;
#pragma unroll
            for (int j = 0; j < TC; ++j) {
                s[i][j] = expf(s[i][j] - most);
                sum[i] += s[i][j];
            }
#pragma unroll
            for (int n = 0; n < OWN; ++n) o[i][n] *= shrink;
        }
        put_scores(p, s);
        __syncthreads();
        apply(o, p, v);
    }
#pragma unroll
    for (int i = 0; i < TR; ++i) {
        const unsigned token = rows.first + ty + 16 * i;
        const float all = sum_of<16>(sum[i]);
        if (token >= h.tokens) continue;
        put_row(out + head.at_out(token), o[i], 1.0f / all);
        if (tx == 0) lse[head.row + token] = top[i] + logf(all);
    }
}

// KEYS: rows are keys, columns queries; else the other way round.
template <bool KEYS>
__device__ __forceinline__ void backward(const float* __restrict__ qkv, const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dqkv, const Heads& h) {
    constexpr int TR = BLOCK / 16, TC = TILE / 16, OWN = PIECES * PIECE;
    float* a = reinterpret_cast<float*>(attention_shared);  // q or k
    float* ga = a + BLOCK * PITCH;                          // dout or v
    float* b = ga + BLOCK * PITCH;                          // k or q
    float* gb = b + TILE * PITCH;                           // v or dout
    float* p = gb + TILE * PITCH;
    float* stats = p + BLOCK * SCORE_PITCH;                 // of the passing queries
    const Rows rows(h, BLOCK);
    const Head& head = rows.head;
    const size_t stride = 3 * size_t(head.width);
    const float *q = qkv + head.at(0, 0), *k = qkv + head.at(1, 0), *v = qkv + head.at(2, 0), *g = dout + head.at_out(0);
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    stage<BLOCK>(a, KEYS ? k : q, stride, rows.first, h.tokens);
    stage<BLOCK>(ga, KEYS ? v : g, KEYS ? stride : head.width, rows.first, h.tokens);
    float da[TR][OWN] = {}, dv[KEYS ? TR : 1][OWN] = {}, row_lse[TR], row_delta[TR];
    if constexpr (!KEYS) {
#pragma unroll
        for (int i = 0; i < TR; ++i) {
            const unsigned row = min(rows.first + ty + 16 * i, h.tokens - 1);
            row_lse[i] = lse[head.row + row], row_delta[i] = delta[head.row + row];
        }
    }
    for (unsigned c0 = 0; c0 < h.tokens; c0 += TILE) {
        __syncthreads();
        stage<TILE>(b, KEYS ? q : k, stride, c0, h.tokens);
        stage<TILE>(gb, KEYS ? g : v, KEYS ? head.width : stride, c0, h.tokens);
        if constexpr (KEYS) stage_stats<TILE>(stats, lse + head.row, delta + head.row, 1.0f, c0, h.tokens);
        __syncthreads();
        float s[TR][TC], dp[TR][TC];
        scores(s, a, b);
        scores(dp, ga, gb);
#pragma unroll
        for (int i = 0; i < TR; ++i)
#pragma unroll
            for (int j = 0; j < TC; ++j) {
                const unsigned row = rows.first + ty + 16 * i, column = c0 + tx + 16 * j;
                const bool pair = row < h.tokens && column < h.tokens;
                const float e = pair ? expf(s[i][j] * h.scale - (KEYS ? stats[tx + 16 * j] : row_lse[i])) : 0.0f;
                dp[i][j] = pair ? e * (dp[i][j] - (KEYS ? stats[TILE + tx + 16 * j] : row_delta[i])) : 0.0f;
                s[i][j] = e;
            }
        if constexpr (KEYS) {
            put_scores(p, s);
            __syncthreads();
            apply(dv, p, gb);
            __syncthreads();
        }
        put_scores(p, dp);
        __syncthreads();
        apply(da, p, b);
    }
#pragma unroll
    for (int i = 0; i < TR; ++i) {
        const unsigned token = rows.first + ty + 16 * i;
        if (token >= h.tokens) continue;
        put_row(dqkv + head.at(KEYS ? 1 : 0, token), da[i], h.scale);
        if constexpr (KEYS) put_row(dqkv + head.at(2, token), dv[i], 1.0f);
    }
}

constexpr int THREADS = 256, BLOCKS = 1;  // shared memory allows no second block

#elif RUNG == 2

using T = ELEMENT;
constexpr int THREADS = 128, BLOCKS = 2;
using F = Flash<T, DP>;
constexpr int PITCH = F::PITCH;

extern __shared__ uint4 attention_shared[];

template <int ROWS>
__device__ __forceinline__ void stage(char* to, const float* from, size_t stride, unsigned first, unsigned tokens) {
#pragma unroll 2
    for (int i = threadIdx.x; i < ROWS * (DP / 4); i += THREADS) {
        const int row = i / (DP / 4), d = i % (DP / 4) * 4;
        F::put(to, row, d, load_channels<D, VEC>(from + (first + row) * stride, d, first + row < tokens));
    }
}

// Fragments of 16 rows, the first of which is token `first`, to memory; `base` is token 0, channel 0.
__device__ __forceinline__ void put_rows(float* base, size_t stride, unsigned first, unsigned tokens, const float (&o)[DP / 8][4]) {
    F::put_rows<D, VEC>(o, [&](int row) { return first + row < tokens ? base + (first + row) * stride : nullptr; });
}

extern "C" __global__ void __launch_bounds__(THREADS, 3)
attention_forward(const float* __restrict__ qkv, float* __restrict__ out, float* __restrict__ lse, Heads h) {
    char* q = reinterpret_cast<char*>(attention_shared);
    char* k = q + 64 * PITCH;
    char* v = k + TILE * PITCH;
    const unsigned sq = shared_address(q), sk = shared_address(k), sv = shared_address(v);
    const Rows rows(h, 64);
    const Head& head = rows.head;
    const size_t stride = 3 * size_t(head.width);
    const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    stage<64>(q, qkv + head.at(0, 0), stride, rows.first, h.tokens);
    const float factor = h.scale * LOG2_E;
    float o[DP / 8][4] = {}, top[2] = {LOWEST, LOWEST}, sum[2] = {};  // of rows g and g + 8
    for (unsigned c0 = 0; c0 < h.tokens; c0 += TILE) {
        __syncthreads();
        stage<TILE>(k, qkv + head.at(1, 0), stride, c0, h.tokens);
        stage<TILE>(v, qkv + head.at(2, 0), stride, c0, h.tokens);
        __syncthreads();
        float s[TILE / 8][4];
        F::scores<TILE>(s, sq, row, sk);
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[j][e] = c0 + 8 * j + 2 * t + e % 2 < h.tokens ? s[j][e] * factor : LOWEST;
#pragma unroll
        for (int half = 0; half < 2; ++half) F::soften<TILE>(s, half, top[half], sum[half], o);
        F::apply<TILE>(o, s, sv);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float all = sum_of<4>(sum[half]);
        const unsigned token = rows.first + row + g + 8 * half;
        if (t == 0 && token < h.tokens) lse[head.row + token] = top[half] / LOG2_E + logf(all);
#pragma unroll
        for (int n = 0; n < DP / 8; ++n) o[n][2 * half] /= all, o[n][2 * half + 1] /= all;
    }
    put_rows(out + head.at_out(0), head.width, rows.first + row, h.tokens, o);
}

// As the float32 rung's.
template <bool KEYS>
__device__ __forceinline__ void backward(const float* __restrict__ qkv, const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dqkv, const Heads& h) {
    char* a = reinterpret_cast<char*>(attention_shared);
    char* ga = a + BLOCK * PITCH;
    char* b = ga + BLOCK * PITCH;
    char* gb = b + TILE * PITCH;
    float* stats = reinterpret_cast<float*>(gb + TILE * PITCH);  // of the passing queries
    const unsigned sa = shared_address(a), sga = shared_address(ga), sb = shared_address(b), sgb = shared_address(gb);
    const Rows rows(h, BLOCK);
    const Head& head = rows.head;
    const size_t stride = 3 * size_t(head.width);
    const float *q = qkv + head.at(0, 0), *k = qkv + head.at(1, 0), *v = qkv + head.at(2, 0), *dy = dout + head.at_out(0);
    const int row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    stage<BLOCK>(a, KEYS ? k : q, stride, rows.first, h.tokens);
    stage<BLOCK>(ga, KEYS ? v : dy, KEYS ? stride : head.width, rows.first, h.tokens);
    const float factor = h.scale * LOG2_E;
    float da[DP / 8][4] = {}, dv[KEYS ? DP / 8 : 1][4] = {}, row_lse[2], row_delta[2];
    if constexpr (!KEYS) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned r = min(rows.first + row + g + 8 * half, h.tokens - 1);
            row_lse[half] = lse[head.row + r] * LOG2_E, row_delta[half] = delta[head.row + r];
        }
    }
    for (unsigned c0 = 0; c0 < h.tokens; c0 += TILE) {
        __syncthreads();
        stage<TILE>(b, KEYS ? q : k, stride, c0, h.tokens);
        stage<TILE>(gb, KEYS ? dy : v, KEYS ? head.width : stride, c0, h.tokens);
        if constexpr (KEYS) stage_stats<TILE>(stats, lse + head.row, delta + head.row, LOG2_E, c0, h.tokens);
        __syncthreads();
        float s[TILE / 8][4], dp[TILE / 8][4];
        F::scores<TILE>(s, sa, row, sb);
        F::scores<TILE>(dp, sga, row, sgb);
#pragma unroll
        for (int j = 0; j < TILE / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int at = 8 * j + 2 * t + e % 2;
                const bool pair = rows.first + row + g + e / 2 * 8 < h.tokens && c0 + at < h.tokens;
                const float p = pair ? exp2f(s[j][e] * factor - (KEYS ? stats[at] : row_lse[e / 2])) : 0.0f;
                dp[j][e] = pair ? p * (dp[j][e] - (KEYS ? stats[TILE + at] : row_delta[e / 2])) : 0.0f;
                s[j][e] = p;
            }
        if constexpr (KEYS) F::apply<TILE>(dv, s, sgb);
        F::apply<TILE>(da, dp, sb);
    }
#pragma unroll
    for (int n = 0; n < DP / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) da[n][e] *= h.scale;
    put_rows(dqkv + head.at(KEYS ? 1 : 0, 0), stride, rows.first + row, h.tokens, da);
    if constexpr (KEYS) put_rows(dqkv + head.at(2, 0), stride, rows.first + row, h.tokens, dv);
}

#endif

#if RUNG > 0

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_dq(const float* __restrict__ qkv, const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dqkv, Heads h) {
    backward<false>(qkv, dout, lse, delta, dqkv, h);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_dkv(const float* __restrict__ qkv, const float* __restrict__ dout, const float* __restrict__ lse, const float* __restrict__ delta, float* __restrict__ dqkv, Heads h) {
    backward<true>(qkv, dout, lse, delta, dqkv, h);
}

#endif

#if RUNG == 1

// Probabilities of 64 queries, all keys: the first half of forward, with lse known.
extern "C" __global__ void __launch_bounds__(256, 2)
attention_probs(const float* __restrict__ qkv, const float* __restrict__ lse, float* __restrict__ probs, Heads h) {
    constexpr int TR = 4, TC = TILE / 16;
    float* q = reinterpret_cast<float*>(attention_shared);
    float* k = q + 64 * PITCH;
    const Rows rows(h, 64);
    const Head& head = rows.head;
    const size_t stride = 3 * size_t(head.width);
    const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    stage<64>(q, qkv + head.at(0, 0), stride, rows.first, h.tokens);
    for (unsigned c0 = 0; c0 < h.tokens; c0 += TILE) {
        __syncthreads();
        stage<TILE>(k, qkv + head.at(1, 0), stride, c0, h.tokens);
        __syncthreads();
        float s[TR][TC];
        scores(s, q, k);
#pragma unroll
        for (int i = 0; i < TR; ++i)
#pragma unroll
            for (int j = 0; j < TC; ++j) {
                const unsigned row = rows.first + ty + 16 * i, column = c0 + tx + 16 * j;
                if (row < h.tokens && column < h.tokens)
                    probs[(head.row + row) * h.tokens + column] = expf(s[i][j] * h.scale - lse[head.row + row]);
            }
    }
}

#endif
