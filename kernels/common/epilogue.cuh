// What happens to a sum before it is stored: y = f(sum + bias + addend), the operand of f stored too where wanted.
#pragma once

#include "common/math.cuh"

struct Epilogue {
    float* y;
    const float* bias;    // by channel, or null
    const float* addend;  // as y: a residual, or a gradient that is already there; or null
    float* pre;           // as y: gets the value before the activation; or null

    // WIDTH (2 or 4) neighbouring results at element `at`, of which `left` exist; the first is of channel `channel`.
    // ALIGNED: rows are multiples of four floats, so that WIDTH go at once and none or all exist.
    template <int F, bool ALIGNED, int WIDTH>
    __device__ __forceinline__ void store(size_t at, unsigned channel, int left, float (&v)[WIDTH]) const {
        if constexpr (ALIGNED) {
            if (left <= 0) return;
            if (bias) add(v, bias + channel);
            if (addend) add(v, addend + at);
            if (pre) put(pre + at, v);
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) v[j] = act_value<F>(v[j]);
            put(y + at, v);
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                if (j >= left) return;
                float r = v[j];
                if (bias) r += bias[channel + j];
                if (addend) r += addend[at + j];
                if (pre) pre[at + j] = r;
                y[at + j] = act_value<F>(r);
            }
        }
    }

private:
    static __device__ __forceinline__ void add(float (&v)[4], const float* p) {
        const float4 a = *reinterpret_cast<const float4*>(p);
        v[0] += a.x, v[1] += a.y, v[2] += a.z, v[3] += a.w;
    }
    static __device__ __forceinline__ void add(float (&v)[2], const float* p) {
        const float2 a = *reinterpret_cast<const float2*>(p);
        v[0] += a.x, v[1] += a.y;
    }
    static __device__ __forceinline__ void put(float* p, const float (&v)[4]) {
        *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
    }
    static __device__ __forceinline__ void put(float* p, const float (&v)[2]) {
        *reinterpret_cast<float2*>(p) = make_float2(v[0], v[1]);
    }
};
