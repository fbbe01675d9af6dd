// The GEMM core: C[m, n] = sum over k of A(m, k) B(n, k), tile by tile, for linear layers and for convolution alike. The
// operands come through loaders (common/loaders.cuh), the results leave through a target (common/targets.cuh). Two
// rungs of one ladder:
//
//   simt_tile  float32 on the ordinary units. A block of 256 threads owns BM x BN of C, a thread BM/16 x BN/16 of it in
//              registers. Slabs of 8 positions of the sum pass through two buffers in shared memory: while one is
//              multiplied, the next is on its way in registers.
//              Shared memory: 2 * 8 * (BM + BN + 8) * 4 bytes (128 x 128: 16,896).
//   mma_tile   tensor cores, operands bf16 or tf32, sums float32. A warp owns WM x WN of C. Slabs of 64 bytes a row
//              (32 bf16, 16 floats) pass through STAGES buffers that cp.async fills without registers, several slabs
//              ahead; fragments come by ldmatrix; 16-byte chunks are swizzled so that neither side meets a bank twice.
//              Shared memory: STAGES * (BM + BN) * 64 bytes (128 x 128, 4 stages: 65,536).
#pragma once

#include "common/cp_async.cuh"
#include "common/loaders.cuh"

// Sizes of a product (one group of it). Extents that a cast padded with zeros have their real value beside; pitches and
// steps are in elements. group_*: from one group's operand or result to the next's. length: of a whole result, the step
// from part to part of a split sum.
struct Product {
    unsigned rows, columns, depth, real_rows, real_columns, real_depth;
    unsigned per_part, tiles_n;
    unsigned group_a, group_b, group_c, length;
    unsigned pitch_a, pitch_b, pitch_c;
};

// A block's work: the tile's first row and column, the stretch of the sum, and whose they are. Neighbouring blocks are
// neighbouring columns, so that they meet the same rows of A (the larger operand, mostly) in L2.
template <int BM, int BN>
struct Work {
    unsigned m0, n0, start, stop, group, part;
    __device__ explicit Work(const Product& p)
        : m0(blockIdx.x / p.tiles_n * BM),
          n0(blockIdx.x % p.tiles_n * BN),
          start(blockIdx.z * p.per_part),
          stop(min(p.depth, start + p.per_part)),
          group(blockIdx.y),
          part(blockIdx.z) {}
};

// ---------------------------------------------------------------------------------------------------------- float32

constexpr int SIMT_THREADS = 256;
constexpr int SIMT_DEPTH = 8;

// One operand's two buffers [DEPTH][ROWS], rows of the tile innermost, whichever way the operand lies in memory. Four
// floats of padding put the four positions of a granule into different banks when it is stored transposed.
template <class L>
struct SimtBuffer {
    static constexpr int PITCH = L::ROWS + 4;
    float slab[2][L::DEPTH][PITCH];

    __device__ __forceinline__ void store(int which, const L& l, const float (&r)[L::ITEMS][L::VEC]) {
#pragma unroll
        for (int i = 0; i < L::ITEMS; ++i) {
            if (!l.has(i)) break;
            if constexpr (L::K_CONTIGUOUS) {
#pragma unroll
                for (int j = 0; j < L::VEC; ++j) slab[which][l.along + j][l.line(i)] = r[i][j];
            } else if constexpr (L::VEC == 4) {
                *reinterpret_cast<float4*>(&slab[which][l.line(i)][l.along]) = make_float4(r[i][0], r[i][1], r[i][2], r[i][3]);
            } else {
                slab[which][l.line(i)][l.along] = r[i][0];
            }
        }
    }
};

// One slab from global memory into registers; zeros outside.
template <class L>
__device__ __forceinline__ void fetch(const L& l, float (&r)[L::ITEMS][L::VEC]) {
#pragma unroll
    for (int i = 0; i < L::ITEMS; ++i) {
        const float* p = l.has(i) ? l.at(i) : nullptr;
        if constexpr (L::VEC == 4) {
            float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (p) v = *reinterpret_cast<const float4*>(p);
            r[i][0] = v.x, r[i][1] = v.y, r[i][2] = v.z, r[i][3] = v.w;
        } else {
            r[i][0] = p ? *p : 0.0f;
        }
    }
}

// The COUNT values of a thread out of one line of a slab: fours at 4 t and, where there are eight, at ROWS / 2 + 4 t, so
// that a warp's 16-byte reads lie side by side.
template <int ROWS, int COUNT>
__device__ __forceinline__ void simt_fragment(float (&f)[COUNT], const float* line, int t) {
    if constexpr (COUNT == 2) {
        const float2 v = *reinterpret_cast<const float2*>(line + 2 * t);
        f[0] = v.x, f[1] = v.y;
    } else {
#pragma unroll
        for (int h = 0; h < COUNT / 4; ++h) {
            const float4 v = *reinterpret_cast<const float4*>(line + h * (ROWS / 2) + 4 * t);
            f[4 * h] = v.x, f[4 * h + 1] = v.y, f[4 * h + 2] = v.z, f[4 * h + 3] = v.w;
        }
    }
}

// Row (or column) of the tile that a thread's i-th value belongs to.
template <int ROWS, int COUNT>
__device__ __forceinline__ int simt_place(int i, int t) {
    if constexpr (COUNT == 2) return 2 * t + i;
    return i / 4 * (ROWS / 2) + 4 * t + i % 4;
}

// A loader's tile for the SIMT core.
template <int ROWS, int VEC, bool K_CONTIGUOUS>
using SimtShare = Share<float, ROWS, SIMT_DEPTH, VEC, K_CONTIGUOUS, SIMT_THREADS, true>;

template <class LA, class LB, class W, class Target>
__device__ __forceinline__ void simt_tile(LA& a, LB& b, const W& work, const Target& target) {
    const unsigned start = work.start, stop = work.stop;
    constexpr int BM = LA::ROWS, BN = LB::ROWS, TM = BM / 16, TN = BN / 16;
    __shared__ __align__(16) SimtBuffer<LA> sa;
    __shared__ __align__(16) SimtBuffer<LB> sb;
    // A warp covers 4 x 8 threads of the 16 x 16: its reads of a line touch 16 + 32 neighbouring values.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int ty = warp / 2 * 4 + lane / 8, tx = warp % 2 * 8 + lane % 8;
    float acc[TM][TN] = {};
    float ra[LA::ITEMS][LA::VEC], rb[LB::ITEMS][LB::VEC];
    int now = 0;
    if (start < stop) {
        a.slab(start), b.slab(start);
        fetch(a, ra), fetch(b, rb);
        sa.store(0, a, ra), sb.store(0, b, rb);
    }
    __syncthreads();
    for (unsigned k0 = start; k0 < stop; k0 += SIMT_DEPTH) {
        const bool more = k0 + SIMT_DEPTH < stop;
        if (more) {
            a.slab(k0 + SIMT_DEPTH), b.slab(k0 + SIMT_DEPTH);
            fetch(a, ra), fetch(b, rb);
        }
#pragma unroll
        for (int k = 0; k < SIMT_DEPTH; ++k) {
            float fa[TM], fb[TN];
            simt_fragment<BM>(fa, sa.slab[now][k], ty);
            simt_fragment<BN>(fb, sb.slab[now][k], tx);
            // Columns outermost: values of B are done with one by one, which leaves room for the next ones to be on their way.
#pragma unroll
            for (int j = 0; j < TN; ++j)
#pragma unroll
                for (int i = 0; i < TM; ++i) acc[i][j] = fmaf(fa[i], fb[j], acc[i][j]);
        }
        if (more) sa.store(now ^ 1, a, ra), sb.store(now ^ 1, b, rb);
        __syncthreads();
        now ^= 1;
    }
    constexpr int WIDTH = TN < 4 ? TN : 4;
#pragma unroll
    for (int i = 0; i < TM; ++i)
#pragma unroll
        for (int j = 0; j < TN; j += WIDTH) {
            float v[WIDTH];
#pragma unroll
            for (int e = 0; e < WIDTH; ++e) v[e] = acc[i][j + e];
            target.store(work.m0 + simt_place<BM, TM>(i, ty), work.n0 + simt_place<BN, TN>(j, tx), v);
        }
}

// ----------------------------------------------------------------------------------------------------- tensor cores

constexpr int LINE_BYTES = 64;  // of a slab's row, where the operand is contiguous along the sum

// A loader's tile for the tensor cores.
template <class T, int ROWS, int VEC, bool K_CONTIGUOUS, int THREADS>
using MmaShare = Share<T, ROWS, LINE_BYTES / int(sizeof(T)), VEC, K_CONTIGUOUS, THREADS>;

// How a loader's tile lies in shared memory: as in global memory, 16-byte chunks of a line permuted by the line's
// number, so that the eight addresses of an ldmatrix (eight lines, one chunk), the 32 words of a tf32 fragment that is
// contiguous along rows (four lines, two chunks) and the copies (neighbouring chunks) each touch all 32 banks once.
template <class L>
struct Tile {
    using T = typename L::T;
    static constexpr int LINE = (L::K_CONTIGUOUS ? L::DEPTH : L::ROWS) * int(sizeof(T));
    static constexpr int BYTES = L::ROWS * LINE_BYTES;
    static constexpr bool WORDS = !L::K_CONTIGUOUS && sizeof(T) == 4;  // ldmatrix cannot transpose 32-bit elements

    static __device__ __forceinline__ unsigned offset(int line, int chunk) {
        const int turn = LINE == 64 ? line / 2 % 4 : WORDS ? line % 4 * 2 : line % 8;
        return line * LINE + (chunk ^ turn) * 16;
    }

    // Starts the copies of a slab; zeros outside.
    static __device__ __forceinline__ void copy(const L& l, unsigned to) {
        constexpr int BYTES_EACH = L::VEC * int(sizeof(T));
#pragma unroll
        for (int i = 0; i < L::ITEMS; ++i) {
            if (!l.has(i)) break;
            const T* p = l.at(i);
            const int at = l.along * int(sizeof(T));
            cp_async<BYTES_EACH>(to + offset(l.line(i), at / 16) + at % 16, p ? p : l.base, p != nullptr);
        }
    }

    // Rows row .. row + 15 of the tile at step `step` of the slab as fragment a of an mma.
    static __device__ __forceinline__ void fragment_a(unsigned (&f)[4], unsigned tile, int row, int step) {
        const int l = threadIdx.x % 32;
        if constexpr (L::K_CONTIGUOUS) {
            ldmatrix_x4(f, tile + offset(row + l % 16, 2 * step + l / 16));
        } else if constexpr (!WORDS) {
            ldmatrix_x4_trans(f, tile + offset(16 * step + l % 8 + l / 16 * 8, row / 8 + l / 8 % 2));
        } else {
            const int g = l / 4, t = 8 * step + l % 4;
            f[0] = word(tile, t, row + g), f[1] = word(tile, t, row + g + 8);
            f[2] = word(tile, t + 4, row + g), f[3] = word(tile, t + 4, row + g + 8);
        }
        round(f);
    }

    // The same rows as two fragments b: columns 0 to 7 in f[0], f[1], columns 8 to 15 in f[2], f[3].
    static __device__ __forceinline__ void fragment_b(unsigned (&f)[4], unsigned tile, int row, int step) {
        const int l = threadIdx.x % 32;
        if constexpr (L::K_CONTIGUOUS) {
            ldmatrix_x4(f, tile + offset(row + l % 8 + l / 16 * 8, 2 * step + l / 8 % 2));
        } else if constexpr (!WORDS) {
            ldmatrix_x4_trans(f, tile + offset(16 * step + l % 16, row / 8 + l / 16));
        } else {
            const int g = l / 4, t = 8 * step + l % 4;
            f[0] = word(tile, t, row + g), f[1] = word(tile, t + 4, row + g);
            f[2] = word(tile, t, row + g + 8), f[3] = word(tile, t + 4, row + g + 8);
        }
        round(f);
    }

private:
    static __device__ __forceinline__ unsigned word(unsigned tile, int k, int row) {
        return shared_word(tile + offset(k, row / 4) + row % 4 * 4);
    }
    // The tensor core would cut tf32's excess bits off; rounding halves the error and takes away the bias.
    static __device__ __forceinline__ void round(unsigned (&f)[4]) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) f[i] = tf32_round(__uint_as_float(f[i]));
        }
    }
};

template <int WM, int WN, int STAGES, class LA, class LB, class W, class Target>
__device__ __forceinline__ void mma_tile(LA& a, LB& b, const W& work, const Target& target) {
    const unsigned start = work.start, stop = work.stop;
    using T = typename LA::T;
    using TA = Tile<LA>;
    using TB = Tile<LB>;
    constexpr int BN = LB::ROWS, DEPTH = LA::DEPTH, STAGE = TA::BYTES + TB::BYTES;
    constexpr int STEPS = DEPTH / Tensor<T>::DEPTH;
    extern __shared__ uint4 mma_shared[];
    const unsigned shared = shared_address(mma_shared);
    const int warp = threadIdx.x / 32;
    const int row = warp / (BN / WN) * WM, column = warp % (BN / WN) * WN;
    const int slabs = start < stop ? int((stop - start + DEPTH - 1) / DEPTH) : 0;

    // Slab s goes to buffer s % STAGES. A group is closed every time, so that the count of groups is the count of slabs.
    const auto issue = [&](int s) {
        if (s < slabs) {
            const unsigned to = shared + s % STAGES * STAGE;
            a.slab(start + s * DEPTH), b.slab(start + s * DEPTH);
            TA::copy(a, to);
            TB::copy(b, to + TA::BYTES);
        }
        cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) issue(s);

    float acc[WM / 16][WN / 8][4] = {};
    for (int s = 0; s < slabs; ++s) {
        cp_async_wait<STAGES - 2>();
        // Everyone's part of slab s has landed, and everyone is done with slab s - 1, whose buffer is filled next.
        __syncthreads();
        issue(s + STAGES - 1);
        const unsigned ta = shared + s % STAGES * STAGE, tb = ta + TA::BYTES;
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            unsigned fa[WM / 16][4], fb[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; ++i) TA::fragment_a(fa[i], ta, row + 16 * i, k);
#pragma unroll
            for (int j = 0; j < WN / 16; ++j) TB::fragment_b(fb[j], tb, column + 16 * j, k);
#pragma unroll
            for (int i = 0; i < WM / 16; ++i)
#pragma unroll
                for (int j = 0; j < WN / 8; ++j) Tensor<T>::mma(acc[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < WN / 8; ++j) {
            float v[4];
            fragment_rows(v, acc[i][j]);
            target.store(work.m0 + row + 16 * i + fragment_row(), work.n0 + column + 8 * j + fragment_column(), v);
        }
}
