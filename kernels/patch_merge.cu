// The channels of 2x2 neighbouring pixels side by side, and back. h, w, c are those of the map that is merged; a thread
// moves one item of VEC channels, `c` counts items.

#include "common/vec.cuh"

// y[n, i, j, q * c + k] = x[n, 2 i + q % 2, 2 j + q / 2, k], 0 outside
extern "C" __global__ void __launch_bounds__(256)
merge(unsigned n, unsigned h, unsigned w, unsigned c, const float* __restrict__ x, float* __restrict__ y) {
    const unsigned e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= n) return;
    const unsigned oh = (h + 1) / 2, ow = (w + 1) / 2;
    const unsigned part = e / c, k = e - part * c, q = part % 4, pixel = part / 4, line = pixel / ow,
                   image = line / oh;
    const unsigned i = 2 * (line - image * oh) + q % 2, j = 2 * (pixel - line * ow) + q / 2;
    Vec<VEC> v = {};
    if (i < h && j < w) v = load_vec<VEC>(x, ((size_t(image) * h + i) * w + j) * c + k);
    store_vec<VEC>(y, e, v);
}

extern "C" __global__ void __launch_bounds__(256)
merge_bwd(unsigned n, unsigned h, unsigned w, unsigned c, const float* __restrict__ dy, float* __restrict__ dx) {
    const unsigned e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= n) return;
    const unsigned pixel = e / c, k = e - pixel * c, line = pixel / w, j = pixel - line * w, image = line / h,
                   i = line - image * h;
    const size_t at = (size_t(image) * ((h + 1) / 2) + i / 2) * ((w + 1) / 2) + j / 2;
    store_vec<VEC>(dx, e, load_vec<VEC>(dy, (4 * at + 2 * (j % 2) + i % 2) * c + k));
}
