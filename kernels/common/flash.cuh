// What attention kernels share: rounding, sums over lanes, rows of channels in and out of global memory, and the two
// products of the FlashAttention scheme on tensor cores, scores = rows times columns and result += scores times columns.
#pragma once

#include "common/mma.cuh"

#define LOWEST __uint_as_float(0xff800000u)  // minus infinity

constexpr float LOG2_E = 1.44269504f;

// An operand in the run's precision: TO 0 as it is, 1 tf32, 2 bf16. Every rung rounds alike: with one's lse and
// another's scores, probabilities would not sum to one where scores are large.
template <int TO>
__device__ __forceinline__ float rounded_to(float x) {
    if constexpr (TO == 1) return __uint_as_float(tf32_round(x));
    if constexpr (TO == 2) return __uint_as_float(bf16_pair(0.0f, x) & 0xffff0000u);
    return x;
}

template <int LANES>
__device__ __forceinline__ float sum_of(float v) {
#pragma unroll
    for (int m = LANES / 2; m > 0; m /= 2) v += __shfl_xor_sync(0xffffffffu, v, m);
    return v;
}

template <int LANES>
__device__ __forceinline__ float max_of(float v) {
#pragma unroll
    for (int m = LANES / 2; m > 0; m /= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, m));
    return v;
}

// Four of a row's DIM channels, from channel d on; WIDTH 4 where rows are in fours. (__stwb is an ordinary store that stays
// one of 16 bytes; written as an assignment the compiler takes some of these apart.)
template <int DIM, int WIDTH>
__device__ __forceinline__ void store_channels(float* row, int d, const float (&v)[4]) {
    if constexpr (WIDTH == 4) {
        if (d < DIM) __stwb(reinterpret_cast<float4*>(row + d), make_float4(v[0], v[1], v[2], v[3]));
    } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (d + e < DIM) row[d + e] = v[e];
    }
}

// The same in, of a row that is `there`; else zeros.
template <int DIM, int WIDTH>
__device__ __forceinline__ float4 load_channels(const float* row, int d, bool there) {
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (!there) return v;
    if constexpr (WIDTH == 4) {
        if (d < DIM) v = *reinterpret_cast<const float4*>(row + d);
    } else {
        if (d < DIM) v.x = row[d];
        if (d + 1 < DIM) v.y = row[d + 1];
        if (d + 2 < DIM) v.z = row[d + 2];
        if (d + 3 < DIM) v.w = row[d + 3];
    }
    return v;
}

// Tiles of rows of PADDED (a multiple of 16) channels as T in shared memory, and what a warp does with them. Lines of a tile
// are 16 bytes longer than they need be, so that eight of them begin in eight different groups of banks.
template <class T, int PADDED>
struct Flash {
    static constexpr int DEPTH = Tensor<T>::DEPTH;
    static constexpr int PITCH = PADDED * int(sizeof(T)) + 16;  // bytes of a line

    // Four channels from channel d on of a tile's row, rounded.
    static __device__ __forceinline__ void put(char* tile, int row, int d, float4 v) {
        char* at = tile + row * PITCH + d * int(sizeof(T));
        if constexpr (sizeof(T) == 2) {
            *reinterpret_cast<uint2*>(at) = make_uint2(bf16_pair(v.x, v.y), bf16_pair(v.z, v.w));
        } else {
            *reinterpret_cast<uint4*>(at) = make_uint4(tf32_round(v.x), tf32_round(v.y), tf32_round(v.z), tf32_round(v.w));
        }
    }

    // s = rows row .. row + 15 of tile a times the lines of tile b, over the channels.
    template <int COLUMNS>
    static __device__ __forceinline__ void scores(float (&s)[COLUMNS / 8][4], unsigned a, int row, unsigned b) {
        const int l = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
#pragma unroll 2
        for (int k = 0; k < PADDED / DEPTH; ++k) {
            unsigned fa[4];
            ldmatrix_x4(fa, a + (row + l % 16) * PITCH + (2 * k + l / 16) * 16);
#pragma unroll
            for (int j = 0; j < COLUMNS / 16; ++j) {
                unsigned fb[4];
                ldmatrix_x4(fb, b + (16 * j + l % 8 + l / 16 * 8) * PITCH + (2 * k + l / 8 % 2) * 16);
                Tensor<T>::mma(s[2 * j], fa, fb[0], fb[1]);
                Tensor<T>::mma(s[2 * j + 1], fa, fb[2], fb[3]);
            }
        }
    }

    // o += s b: s as the first product left it. A bf16 fragment a is two result fragments side by side, rounded; a tf32
    // fragment a is one whose columns 2t and 2t + 1 are called t and t + 4, and so are then the lines of b: a sum does
    // not mind the order of its terms.
    template <int COLUMNS>
    static __device__ __forceinline__ void apply(float (&o)[PADDED / 8][4], const float (&s)[COLUMNS / 8][4], unsigned b) {
        const int l = threadIdx.x % 32;
#pragma unroll
        for (int k = 0; k < COLUMNS / DEPTH; ++k) {
            unsigned fa[4];
            if constexpr (sizeof(T) == 2) {
                fa[0] = bf16_pair(s[2 * k][0], s[2 * k][1]), fa[1] = bf16_pair(s[2 * k][2], s[2 * k][3]);
                fa[2] = bf16_pair(s[2 * k + 1][0], s[2 * k + 1][1]), fa[3] = bf16_pair(s[2 * k + 1][2], s[2 * k + 1][3]);
            } else {
                fa[0] = tf32_round(s[k][0]), fa[1] = tf32_round(s[k][2]);
                fa[2] = tf32_round(s[k][1]), fa[3] = tf32_round(s[k][3]);
            }
#pragma unroll
            for (int n = 0; n < PADDED / 16; ++n) {
                unsigned fb[4];
                if constexpr (sizeof(T) == 2) {
                    ldmatrix_x4_trans(fb, b + (16 * k + l % 16) * PITCH + (2 * n + l / 16) * 16);
                } else {
                    const unsigned at = b + (8 * k + 2 * (l % 4)) * PITCH + (16 * n + l / 4) * 4;
                    fb[0] = shared_word(at), fb[1] = shared_word(at + PITCH);
                    fb[2] = shared_word(at + 32), fb[3] = shared_word(at + PITCH + 32);
                }
                Tensor<T>::mma(o[2 * n], fa, fb[0], fb[1]);
                Tensor<T>::mma(o[2 * n + 1], fa, fb[2], fb[3]);
            }
        }
    }

    // A warp's fragments of 16 rows to memory: to(row) is where row 0 to 15 goes, null for one that does not exist.
    template <int DIM, int WIDTH, class To>
    static __device__ __forceinline__ void put_rows(const float (&o)[PADDED / 8][4], To to) {
        float* row = to(fragment_row());
#pragma unroll
        for (int n = 0; n < PADDED / 8; ++n) {
            float v[4];
            fragment_rows(v, o[n]);
            if (row) store_channels<DIM, WIDTH>(row, 8 * n + fragment_column(), v);
        }
    }

    // A tile's probabilities e^(s - top) in place of its scores (in units of log 2) for the rows g (half 0) and g + 8 of
    // a fragment: the row's maximum and sum, and what was added up with the old maximum, are corrected.
    template <int COLUMNS>
    static __device__ __forceinline__ void soften(float (&s)[COLUMNS / 8][4], int half, float& top, float& sum, float (&o)[PADDED / 8][4]) {
        float most = top;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j) most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        most = max_of<4>(most);
        const float shrink = exp2f(top - most);
        top = most;
        sum *= shrink;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e) {
                s[j][e] = exp2f(s[j][e] - most);
                sum += s[j][e];
            }
#pragma unroll
        for (int n = 0; n < PADDED / 8; ++n) o[n][2 * half] *= shrink, o[n][2 * half + 1] *= shrink;
    }
};
