// Philox4x32-10 (Salmon et al. 2011): the same bits as on every other backend.
#pragma once

__device__ __forceinline__ uint4 philox(uint4 c, uint2 k) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned a_lo = c.x * 0xD2511F53u, a_hi = __umulhi(c.x, 0xD2511F53u);
        const unsigned b_lo = c.z * 0xCD9E8D57u, b_hi = __umulhi(c.z, 0xCD9E8D57u);
        c = make_uint4(b_hi ^ c.y ^ k.x, b_lo, a_hi ^ c.w ^ k.y, a_lo);
        k.x += 0x9E3779B9u;
        k.y += 0xBB67AE85u;
    }
    return c;
}

// Uniform in [0, 1) with 24 bits.
__device__ __forceinline__ float unit(unsigned word) { return static_cast<float>(word >> 8) * (1.0f / 16777216.0f); }

// Block number `block` of mask `id`; rng = (seed low, seed high, step, 0).
__device__ __forceinline__ uint4 draw(const unsigned* __restrict__ rng, unsigned id, unsigned block) {
    return philox(make_uint4(block, 0u, id, rng[2]), make_uint2(rng[0], rng[1]));
}
