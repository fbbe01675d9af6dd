// Where a GEMM's results go. Every target: store(m, n, v) takes WIDTH neighbouring columns of one row of C, of which
// some or all may lie outside. When the sum is split, each part is a whole copy of the result in workspace, and the
// epilogue waits for the kernel that adds the parts (gemm.cu: reduce_parts).
#pragma once

#include "common/div.cuh"
#include "common/epilogue.cuh"

// y[row, first + n], rows `pitch` floats apart.
template <int F, bool ALIGNED>
struct MatrixTarget {
    Epilogue epilogue;
    unsigned rows, columns, pitch, first;
    template <int WIDTH>
    __device__ __forceinline__ void store(unsigned m, unsigned n, float (&v)[WIDTH]) const {
        if (m >= rows) return;
        epilogue.store<F, ALIGNED>(size_t(m) * pitch + first + n, first + n, int(columns) - int(n), v);
    }
};

// Rows are the pixels of one class of a strided data gradient: pixel (y * step_y + origin_y, ...) of [images, height,
// width, pitch].
struct Lattice {
    Div grid_h, grid_w;
    unsigned height, width, step_y, step_x, origin_y, origin_x;
};

template <bool ALIGNED>
struct PixelTarget {
    Epilogue epilogue;
    const Lattice& lattice;
    unsigned rows, columns, pitch, first;
    template <int WIDTH>
    __device__ __forceinline__ void store(unsigned m, unsigned n, float (&v)[WIDTH]) const {
        if (m >= rows) return;
        unsigned line, x, image, y;
        divide(m, lattice.grid_w, line, x);
        divide(line, lattice.grid_h, image, y);
        y = y * lattice.step_y + lattice.origin_y;
        x = x * lattice.step_x + lattice.origin_x;
        const size_t pixel = (image * lattice.height + y) * lattice.width + x;
        epilogue.store<ACT_NONE, ALIGNED>(pixel * pitch + first + n, first + n, int(columns) - int(n), v);
    }
};

// Rows are filters, columns taps of `padded` channels of which `channels` are real: dw[filter, tap, channel].
template <bool ALIGNED>
struct FilterTarget {
    float* dw;
    unsigned rows, columns, channels, pitch;
    Div padded;
    template <int WIDTH>
    __device__ __forceinline__ void store(unsigned m, unsigned n, float (&v)[WIDTH]) const {
        if (m >= rows || n >= columns) return;
        const Epilogue plain = {dw, nullptr, nullptr, nullptr};
        unsigned tap, channel;
        if constexpr (ALIGNED) {
            // Channels are in fours, and so not padded.
            plain.store<ACT_NONE, true>(size_t(m) * pitch + n, 0, int(columns) - int(n), v);
        } else {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                divide(n + j, padded, tap, channel);
                if (n + j < columns && channel < channels) dw[size_t(m) * pitch + tap * channels + channel] = v[j];
            }
        }
    }
};
