// Zeros at the bottom and at the right of [N, H, W, C], or what lies there cut off. A thread moves one item of VEC
// channels; `c` counts items.

#include "common/vec.cuh"

extern "C" __global__ void __launch_bounds__(256)
pad2d(unsigned n, unsigned h, unsigned w, unsigned oh, unsigned ow, unsigned c, const float* __restrict__ x,
      float* __restrict__ y) {
    const unsigned e = blockIdx.x * blockDim.x + threadIdx.x;
    if (e >= n) return;
    const unsigned pixel = e / c, k = e - pixel * c, line = pixel / ow, j = pixel - line * ow, image = line / oh,
                   i = line - image * oh;
    Vec<VEC> v = {};
    if (i < h && j < w) v = load_vec<VEC>(x, ((size_t(image) * h + i) * w + j) * c + k);
    store_vec<VEC>(y, e, v);
}
