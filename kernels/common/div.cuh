// Division by a number known at launch: a multiplication and a shift (Granlund & Montgomery 1994). The host computes
// shift = ceil(log2(d)) and magic = 2^32 (2^shift - d) / d + 1. Right for n < 2^31.
#pragma once

struct Div {
    unsigned divisor, magic, shift;
};

__device__ __forceinline__ unsigned operator/(unsigned n, const Div& d) { return (__umulhi(n, d.magic) + n) >> d.shift; }

__device__ __forceinline__ void divide(unsigned n, const Div& d, unsigned& quotient, unsigned& rest) {
    quotient = n / d;
    rest = n - quotient * d.divisor;
}
