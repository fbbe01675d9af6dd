// Max pooling, global average pooling and the option A shortcut over [N, H, W, C], forward and backward: a gather in both
// directions, VEC channels a thread; `c` counts items of VEC channels.

#include "common/reduce.cuh"


// The first of equal maxima wins and the last NaN, as in PyTorch. arg is the pixel within the image.
extern "C" __global__ void __launch_bounds__(256)
max_pool(unsigned n, unsigned h, unsigned w, unsigned c, unsigned oh, unsigned ow, unsigned kernel, unsigned stride,
         unsigned pad, const float* __restrict__ x, float* __restrict__ y, float* __restrict__ arg) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned pixel = i / c, k = i - pixel * c, row = pixel / ow, q = pixel - row * ow, image = row / oh,
                   o = row - image * oh;
    Vec<VEC> best = {}, at = {};
    bool any = false;
    for (unsigned r = 0; r < kernel; ++r) {
        const unsigned yy = o * stride + r - pad;  // wraps below zero, and then is not below h
        if (yy >= h) continue;
        for (unsigned s = 0; s < kernel; ++s) {
            const unsigned xx = q * stride + s - pad;
            if (xx >= w) continue;
            const Vec<VEC> v = load_vec<VEC>(x, ((size_t(image) * h + yy) * w + xx) * c + k);
            const float place = __uint_as_float(yy * w + xx);
#pragma unroll
            for (int j = 0; j < VEC; ++j) {
                // !(v <= best) would take a number over a NaN.
                if (!any || v.v[j] > best.v[j] || isnan(v.v[j])) best.v[j] = v.v[j], at.v[j] = place;
            }
            any = true;
        }
    }
    store_vec<VEC>(y, i, best);
    store_vec<VEC>(arg, i, at);
}

// dx[pixel] = sum of dy over the windows whose argmax is this pixel.
extern "C" __global__ void __launch_bounds__(256)
max_pool_bwd(unsigned n, unsigned h, unsigned w, unsigned c, unsigned oh, unsigned ow, unsigned kernel, unsigned stride,
             unsigned pad, const float* __restrict__ dy, const float* __restrict__ arg, float* __restrict__ dx) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned pixel = i / c, k = i - pixel * c, line = pixel / w, col = pixel - line * w, image = line / h,
                   row = line - image * h;
    const unsigned o1 = min((row + pad) / stride + 1, oh), q1 = min((col + pad) / stride + 1, ow);
    const unsigned o0 = (max(row + pad + stride, kernel) - kernel) / stride;
    const unsigned q0 = (max(col + pad + stride, kernel) - kernel) / stride;
    Vec<VEC> sum = {};
    for (unsigned o = o0; o < o1; ++o) {
        for (unsigned q = q0; q < q1; ++q) {
            const size_t at = ((size_t(image) * oh + o) * ow + q) * c + k;
            const Vec<VEC> d = load_vec<VEC>(dy, at), a = load_vec<VEC>(arg, at);
#pragma unroll
            for (int j = 0; j < VEC; ++j) sum.v[j] += __float_as_uint(a.v[j]) == row * w + col ? d.v[j] : 0.0f;
        }
    }
    store_vec<VEC>(dx, i, sum);
}

// y[n, c] = scale * sum over the pixels of x[n, :, c]: a block has blockDim.x columns of one image, its rows of threads
// share the pixels.
extern "C" __global__ void __launch_bounds__(256)
average(unsigned pixels, unsigned c, float scale, const float* __restrict__ x, float* __restrict__ y) {
    __shared__ Vec<VEC> scratch[256];
    const unsigned k = blockIdx.y * blockDim.x + threadIdx.x;
    Vec<VEC> sum = {};
    if (k < c) {
        for (unsigned j = threadIdx.y; j < pixels; j += blockDim.y) {
            const Vec<VEC> v = load_vec<VEC>(x, (size_t(blockIdx.x) * pixels + j) * c + k);
#pragma unroll
            for (int e = 0; e < VEC; ++e) sum.v[e] += v.v[e];
        }
    }
    sum = column_sum<VEC>(sum, scratch);
    if (k >= c || threadIdx.y != 0) return;
#pragma unroll
    for (int e = 0; e < VEC; ++e) sum.v[e] *= scale;
    store_vec<VEC>(y, size_t(blockIdx.x) * c + k, sum);
}

// dx[n, :, c] = scale * dy[n, c]
extern "C" __global__ void __launch_bounds__(256)
average_bwd(unsigned n, unsigned pixels, unsigned c, float scale, const float* __restrict__ dy, float* __restrict__ dx) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned pixel = i / c;
    Vec<VEC> v = load_vec<VEC>(dy, size_t(pixel / pixels) * c + i - pixel * c);
#pragma unroll
    for (int e = 0; e < VEC; ++e) v.v[e] *= scale;
    store_vec<VEC>(dx, i, v);
}

// Every stride-th pixel, zero channels around: y[.., low + c] = x[.., c]. VEC divides low too.
extern "C" __global__ void __launch_bounds__(256)
subsample(unsigned n, unsigned h, unsigned w, unsigned c, unsigned oh, unsigned ow, unsigned c_out, unsigned low,
          unsigned stride, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned pixel = i / c_out, k = i - pixel * c_out - low;  // wraps below the first channel
    const unsigned row = pixel / ow, q = pixel - row * ow, image = row / oh, o = row - image * oh;
    Vec<VEC> v = {};
    if (k < c) v = load_vec<VEC>(x, ((size_t(image) * h + o * stride) * w + q * stride) * c + k);
    store_vec<VEC>(y, i, v);
}

extern "C" __global__ void __launch_bounds__(256)
subsample_bwd(unsigned n, unsigned h, unsigned w, unsigned c, unsigned oh, unsigned ow, unsigned c_out, unsigned low,
              unsigned stride, const float* __restrict__ dy, float* __restrict__ dx) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned pixel = i / c, k = i - pixel * c, line = pixel / w, col = pixel - line * w, image = line / h,
                   row = line - image * h;
    Vec<VEC> v = {};
    if (row % stride == 0 && col % stride == 0)
        v = load_vec<VEC>(dy, ((size_t(image) * oh + row / stride) * ow + col / stride) * c_out + k + low);
    store_vec<VEC>(dx, i, v);
}
