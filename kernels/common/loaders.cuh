// Where the elements of a GEMM's operand tiles stand in memory. The core multiplies tiles of [ROWS] x [DEPTH] (rows of
// A or columns of B by positions of the sum) and asks a loader for the address of each granule of VEC neighbouring
// elements. An operand is contiguous along the sum (K_CONTIGUOUS: x and w of a forward product) or along the rows (both
// operands of a weight gradient). A granule never straddles an edge: the extent it runs along is a multiple of VEC.
//
//   PlainK   [rows, depth] matrix           PlainR   [depth, rows] matrix
//   PixelsK  rows are pixels of an output, the sum runs over taps and channels: implicit GEMM, no im2col buffer
//   PixelsR  the sum runs over pixels, rows are taps and channels: the weight gradient's right operand
//   FilterR  the sum runs over taps and filters, rows are channels: the weights in a data gradient
#pragma once

#include "common/div.cuh"

// A thread's share of a tile: granule `along` of lines line(0), line(1), ...; lines are rows where the operand is
// contiguous along the sum, else positions of the sum. PAIRED lets a warp cover two granules of 16 rows (whole 32-byte
// sectors) in place of all of a few rows, so that storing them transposed meets no bank twice.
template <class T_, int ROWS_, int DEPTH_, int VEC_, bool K_CONTIGUOUS_, int THREADS, bool PAIRED_ = false>
struct Share {
    using T = T_;
    static constexpr int ROWS = ROWS_, DEPTH = DEPTH_, VEC = VEC_;
    static constexpr bool K_CONTIGUOUS = K_CONTIGUOUS_;
    static constexpr int GRANULES = (K_CONTIGUOUS ? DEPTH : ROWS) / VEC;
    static constexpr int LINES = K_CONTIGUOUS ? ROWS : DEPTH;
    static constexpr int STEP = THREADS / GRANULES;
    static constexpr int ITEMS = (LINES + STEP - 1) / STEP;
    static constexpr bool PAIRED = PAIRED_ && K_CONTIGUOUS && VEC == 4;
    static_assert(THREADS % GRANULES == 0, "a pass covers whole lines");

    int first, along;

    __device__ Share() {
        const int t = threadIdx.x;
        if constexpr (PAIRED) {
            constexpr int PAIRS = GRANULES / 2;
            along = ((t & 1) + 2 * (t / 32 % PAIRS)) * VEC;
            first = t / 2 % 16 + 16 * (t / 32 / PAIRS);
        } else {
            along = t % GRANULES * VEC;
            first = t / GRANULES;
        }
    }
    __device__ int line(int i) const { return first + i * STEP; }
    // The i-th line is one of the tile's: always, but where there are more threads than granules.
    __device__ bool has(int i) const { return LINES % STEP == 0 || line(i) < LINES; }
};

// Every loader: slab(k0) moves to the slab of the sum that begins at k0; at(i) is the i-th granule's address, null where
// it lies outside the operand.

template <class S>
struct PlainK : S {
    const typename S::T* base;
    unsigned pitch, row0, rows, depth, k;
    __device__ PlainK(const typename S::T* base, unsigned pitch, unsigned row0, unsigned rows, unsigned depth)
        : base(base), pitch(pitch), row0(row0), rows(rows), depth(depth) {}
    __device__ void slab(unsigned k0) { k = k0 + this->along; }
    __device__ const typename S::T* at(int i) const {
        const unsigned row = row0 + this->line(i);
        return row < rows && k < depth ? base + size_t(row) * pitch + k : nullptr;
    }
};

// `base` is the thread's own column and `inside` whether there is one: two registers less through the product than
// column and extent beside the operand's start, which is what a tile of 128 x 128 has left.
template <class S>
struct PlainR : S {
    const typename S::T* base;
    unsigned pitch, depth, k0;
    bool inside;
    __device__ PlainR(const typename S::T* base, unsigned pitch, unsigned row0, unsigned rows, unsigned depth)
        : base(base + row0 + this->along), pitch(pitch), depth(depth), inside(row0 + this->along < rows) {}
    __device__ void slab(unsigned start) { k0 = start; }
    __device__ const typename S::T* at(int i) const {
        const unsigned k = k0 + this->line(i);
        return inside && k < depth ? base + size_t(k) * pitch : nullptr;
    }
};

// How a window moves over a tensor [images, height, width, pitch]: pixel (y, x) of a grid [images, grid_h, grid_w] meets
// at tap (r, s) the tensor's pixel (y * step_y + origin_y + sign * r, ...). Forward: the grid is the output, origin is
// minus the padding. Data gradient: the grid is one class of input pixels, sign is -1.
struct Window {
    Div grid_h, grid_w;
    int step_y, step_x, origin_y, origin_x, sign;
    unsigned height, width, pitch;
    Div channels, taps_w;
};

struct Place {
    unsigned image;
    int y, x;
    Place() = default;
    __device__ Place(const Window& w, unsigned pixel) {
        unsigned line, column, row;
        divide(pixel, w.grid_w, line, column);
        divide(line, w.grid_h, image, row);
        y = int(row) * w.step_y + w.origin_y;
        x = int(column) * w.step_x + w.origin_x;
    }
};

// Tap and channel of a position (tap * channels + channel), the tap as an offset in pixels.
struct Tap {
    int y, x;
    unsigned channel;
    Tap() = default;
    __device__ Tap(const Window& w, unsigned position) {
        unsigned tap, r, s;
        divide(position, w.channels, tap, channel);
        divide(tap, w.taps_w, r, s);
        y = w.sign * int(r);
        x = w.sign * int(s);
    }
};

template <class T>
__device__ __forceinline__ const T* meet(const T* base, const Window& w, const Place& p, const Tap& t) {
    const int y = p.y + t.y, x = p.x + t.x;
    if (unsigned(y) >= w.height || unsigned(x) >= w.width) return nullptr;
    return base + size_t((p.image * w.height + y) * w.width + x) * w.pitch + t.channel;
}

template <class S>
struct PixelsK : S {
    const typename S::T* base;
    const Window& window;
    unsigned depth;
    bool inside;
    Place places[S::ITEMS];
    Tap tap;
    __device__ PixelsK(const typename S::T* base, const Window& window, unsigned row0, unsigned rows, unsigned depth)
        : base(base), window(window), depth(depth) {
#pragma unroll
        for (int i = 0; i < S::ITEMS; ++i) {
            const unsigned row = row0 + this->line(i);
            places[i] = Place(window, row);
            if (row >= rows) places[i].y = -(1 << 30);  // a row that is above every image
        }
    }
    __device__ void slab(unsigned k0) {
        const unsigned k = k0 + this->along;
        inside = k < depth;
        tap = Tap(window, k);
    }
    __device__ const typename S::T* at(int i) const { return inside ? meet(base, window, places[i], tap) : nullptr; }
};

template <class S>
struct PixelsR : S {
    const typename S::T* base;
    const Window& window;
    unsigned depth, k0;
    bool inside;
    Tap tap;
    __device__ PixelsR(const typename S::T* base, const Window& window, unsigned row0, unsigned rows, unsigned depth)
        : base(base), window(window), depth(depth), inside(row0 + this->along < rows), tap(window, row0 + this->along) {}
    __device__ void slab(unsigned start) { k0 = start; }
    __device__ const typename S::T* at(int i) const {
        const unsigned k = k0 + this->line(i);
        return inside && k < depth ? meet(base, window, Place(window, k), tap) : nullptr;
    }
};

// The taps of weights [filters, height, width, pitch] that a class of input pixels meets: every step-th from origin on.
// `channels` counts a tap's filters with the zeros that pad them, `filters` without.
struct Filter {
    Div channels, taps_w;
    unsigned filters, height, width, pitch, step_y, step_x, origin_y, origin_x;
};

template <class S>
struct FilterR : S {
    const typename S::T* base;
    const Filter& filter;
    unsigned row, rows, depth, k0;
    __device__ FilterR(const typename S::T* base, const Filter& filter, unsigned row0, unsigned rows, unsigned depth)
        : base(base), filter(filter), row(row0 + this->along), rows(rows), depth(depth) {}
    __device__ void slab(unsigned start) { k0 = start; }
    __device__ const typename S::T* at(int i) const {
        const unsigned k = k0 + this->line(i);
        unsigned tap, r, s, channel;
        divide(k, filter.channels, tap, channel);
        divide(tap, filter.taps_w, r, s);
        if (row >= rows || k >= depth || channel >= filter.filters) return nullptr;
        const unsigned y = filter.origin_y + r * filter.step_y, x = filter.origin_x + s * filter.step_x;
        return base + size_t((channel * filter.height + y) * filter.width + x) * filter.pitch + row;
    }
};
