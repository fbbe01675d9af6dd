// Affine resampling of images [N, H, W, C]: a thread makes one output pixel of all channels, so that the map is followed
// once per pixel.

// Products and sums are rounded one by one, as on the other backends: a fused multiply-add could pick another pixel.
__device__ __forceinline__ float along(const float* __restrict__ m, float u, float v) {
    return __fadd_rn(__fadd_rn(__fmul_rn(m[0], u), __fmul_rn(m[1], v)), m[2]);
}

struct Image {
    const float* x;
    const float* outside;
    unsigned h, w, c;

    // The pixel at a whole column and row, or what stands outside.
    __device__ __forceinline__ const float* pixel(float col, float row) const {
        if (col >= 0.0f && row >= 0.0f && col < static_cast<float>(w) && row < static_cast<float>(h))
            return x + (static_cast<size_t>(row) * w + static_cast<size_t>(col)) * c;
        return outside;
    }
};

extern "C" __global__ void __launch_bounds__(256)
affine(unsigned n, unsigned h, unsigned w, unsigned c, unsigned bilinear, const float* __restrict__ x,
       const float* __restrict__ matrix, const float* __restrict__ outside, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned line = i / w, image = line / h;
    const float col = static_cast<float>(i - line * w), row = static_cast<float>(line - image * h);
    const float* m = matrix + 6 * image;
    const float u = along(m, col, row), v = along(m + 3, col, row);
    const Image from{x + static_cast<size_t>(image) * h * w * c, outside, h, w, c};
    float* to = y + static_cast<size_t>(i) * c;
    if (!bilinear) {
        const float* p = from.pixel(rintf(u), rintf(v));
        for (unsigned k = 0; k < c; ++k) to[k] = p[k];
        return;
    }
    const float u0 = floorf(u), v0 = floorf(v), du = u - u0, dv = v - v0;
    const float *p00 = from.pixel(u0, v0), *p10 = from.pixel(u0 + 1.0f, v0);
    const float *p01 = from.pixel(u0, v0 + 1.0f), *p11 = from.pixel(u0 + 1.0f, v0 + 1.0f);
    const float w00 = (1.0f - du) * (1.0f - dv), w10 = du * (1.0f - dv), w01 = (1.0f - du) * dv, w11 = du * dv;
    for (unsigned k = 0; k < c; ++k) to[k] = w00 * p00[k] + w10 * p10[k] + w01 * p01[k] + w11 * p11[k];
}
