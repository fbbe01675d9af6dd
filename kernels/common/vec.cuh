// Four floats at a time: loads and stores of 16 bytes where VEC is 4, of 4 bytes where it is 1.
#pragma once

#ifndef VEC
#define VEC 1
#endif

template <int N>
struct alignas(4 * N) Vec {
    float v[N];
};

// 16 bytes (or 4) from p[i], p counted in items of N floats.
template <int N>
__device__ __forceinline__ Vec<N> load_vec(const float* __restrict__ p, size_t i) {
    Vec<N> r;
    if constexpr (N == 4) {
        const float4 f = reinterpret_cast<const float4*>(p)[i];
        r.v[0] = f.x, r.v[1] = f.y, r.v[2] = f.z, r.v[3] = f.w;
    } else {
        static_assert(N == 1, "one float or four");
        r.v[0] = p[i];
    }
    return r;
}

template <int N>
__device__ __forceinline__ void store_vec(float* __restrict__ p, size_t i, const Vec<N>& r) {
    if constexpr (N == 4) {
        reinterpret_cast<float4*>(p)[i] = make_float4(r.v[0], r.v[1], r.v[2], r.v[3]);
    } else {
        static_assert(N == 1, "one float or four");
        p[i] = r.v[0];
    }
}
