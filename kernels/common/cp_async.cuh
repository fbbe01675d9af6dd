// Copies from global to shared memory that pass no register and run beside the arithmetic (sm_80 on).
#pragma once

#include "common/mma.cuh"

// BYTES (4, 8 or 16) from `from` to the shared address `to`; zeros where not `there` (nothing is read then). 16 bytes
// go past L1, which keeps nothing that another block wants.
template <int BYTES>
__device__ __forceinline__ void cp_async(unsigned to, const void* from, bool there) {
    const unsigned bytes = there ? BYTES : 0;
    const unsigned long long address = __cvta_generic_to_global(from);
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(address), "r"(bytes) : "memory");
    } else if constexpr (BYTES == 8) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(address), "r"(bytes) : "memory");
    } else {
        static_assert(BYTES == 4, "cp.async moves 4, 8 or 16 bytes");
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(address), "r"(bytes) : "memory");
    }
}

// Ends a group of this thread's copies; an empty group is one too.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest N groups of this thread have landed.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
