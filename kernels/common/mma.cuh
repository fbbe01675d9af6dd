// One wrapper per instruction that C++ has no name for, and the few type definitions that NVRTC alone lacks: no header
// of the CUDA toolkit is needed. All of it is there from sm_80 on.
#pragma once

// A bfloat16 in memory: the upper half of a float32.
struct bf16 {
    unsigned short bits;
};

// Two floats as a pair of bfloat16 in one register, rounded to nearest even; `low` stands first in memory.
__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// A float rounded to tf32 (10 bits of mantissa, to nearest, ties away from zero), still in a float's place.
__device__ __forceinline__ unsigned tf32_round(float x) {
    unsigned r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ unsigned shared_word(unsigned address) {
    unsigned word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 (16 bytes) of matrix
// l / 8; lane l receives of each matrix row l / 4, elements 2 (l % 4) and 2 (l % 4) + 1. Read as 8 x 4 matrices of
// 32-bit elements, lane l receives row l / 4, element l % 4, which is what tf32 fragments want.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// The same, each matrix transposed on the way (16-bit elements only).
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// d += a b: a 16 x 16 (row major), b 16 x 8 (column major), bf16 in, float32 out. With g = lane / 4, t = lane % 4:
// a: rows g, g + 8, g, g + 8 at columns 2t (first two), 2t + 8; b: column g, rows 2t, 2t + 8; d: (g, 2t), (g, 2t + 1),
// (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b: a 16 x 8, b 8 x 8, tf32 in. a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b: (t, g), (t + 4, g); d as
// above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// What the tensor-core kernels need to know of an operand type: elements of the sum per mma, and the mma.
template <class T>
struct Tensor;

template <>
struct Tensor<bf16> {
    static constexpr int DEPTH = 16;
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        mma_m16n8k16_bf16(d, a, b0, b1);
    }
};

template <>
struct Tensor<float> {
    static constexpr int DEPTH = 8;
    static __device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
        mma_m16n8k8_tf32(d, a, b0, b1);
    }
};

// A result fragment of an mma regrouped so that each lane holds four neighbouring columns of one row, for 16-byte
// stores: lanes of even t keep row g and take the partner's half of it, lanes of odd t row g + 8. The lane's element is
// (fragment_row(), fragment_column()) of the 16 x 8 fragment.
__device__ __forceinline__ void fragment_rows(float (&v)[4], const float (&d)[4]) {
    const bool odd = threadIdx.x & 1;
    const float x = __shfl_xor_sync(0xffffffffu, odd ? d[0] : d[2], 1);
    const float y = __shfl_xor_sync(0xffffffffu, odd ? d[1] : d[3], 1);
    v[0] = odd ? x : d[0];
    v[1] = odd ? y : d[1];
    v[2] = odd ? d[2] : x;
    v[3] = odd ? d[3] : y;
}

__device__ __forceinline__ int fragment_row() { return (threadIdx.x % 32) / 4 + 8 * (threadIdx.x & 1); }

__device__ __forceinline__ int fragment_column() { return 4 * ((threadIdx.x & 3) >> 1); }
