// Activations and their slopes, in float32. Names and numbers as in the Rust side's `Act::code`.
#pragma once

#define ACT_NONE 0
#define ACT_RELU 1
#define ACT_GELU 2
#define ACT_GELU_TANH 3

constexpr float SQRT_2_OVER_PI = 0.79788456f;
constexpr float SQRT_HALF = 0.70710678f;
constexpr float INV_SQRT_2PI = 0.39894228f;

// max(x, 0) that lets NaN through, as PyTorch's does (fmaxf would drop it).
__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }

// f(x), f a compile-time constant.
template <int F>
__device__ __forceinline__ float act_value(float x) {
    if constexpr (F == ACT_RELU) return relu(x);
    if constexpr (F == ACT_GELU) return 0.5f * x * (1.0f + erff(x * SQRT_HALF));
    if constexpr (F == ACT_GELU_TANH) return 0.5f * x * (1.0f + tanhf(SQRT_2_OVER_PI * (x + 0.044715f * x * x * x)));
    return x;
}

// f'(x). For ReLU x may be the result as well as the operand.
template <int F>
__device__ __forceinline__ float act_slope(float x) {
    if constexpr (F == ACT_RELU) return x > 0.0f ? 1.0f : 0.0f;
    if constexpr (F == ACT_GELU) return 0.5f * (1.0f + erff(x * SQRT_HALF)) + x * expf(-0.5f * x * x) * INV_SQRT_2PI;
    if constexpr (F == ACT_GELU_TANH) {
        const float t = tanhf(SQRT_2_OVER_PI * (x + 0.044715f * x * x * x));
        const float inner = SQRT_2_OVER_PI * (1.0f + 3.0f * 0.044715f * x * x);
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
    }
    return 1.0f;
}
