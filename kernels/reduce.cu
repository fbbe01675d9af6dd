// Sums of partial results, in a fixed order.

#include "common/reduce.cuh"

// y[i] = sum over parts of x[part * stride + i] for n items of VEC floats (stride in items too). A block has 32 columns
// by 8 rows of parts; each thread adds every eighth part, then the eight sums are added as a tree.
extern "C" __global__ void __launch_bounds__(256)
sum_parts(unsigned n, unsigned parts, unsigned stride, const float* __restrict__ x, float* __restrict__ y) {
    __shared__ Vec<VEC> scratch[256];
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    Vec<VEC> sum = {};
    if (i < n) {
        for (unsigned part = threadIdx.y; part < parts; part += blockDim.y) {
            const Vec<VEC> v = load_vec<VEC>(x, size_t(part) * stride + i);
#pragma unroll
            for (int k = 0; k < VEC; ++k) sum.v[k] += v.v[k];
        }
    }
    sum = column_sum<VEC>(sum, scratch);
    if (i < n && threadIdx.y == 0) store_vec<VEC>(y, i, sum);
}
