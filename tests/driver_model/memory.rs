//! Memory of the device, page-locked memory of the host, and copies.

use super::machine::{Work, known};
use super::{R, give, inside, inside_no_capture, refused};
use cudarc::driver::sys;
use std::alloc::Layout;
use std::ffi::{c_uint, c_void};
use tilewright::backend::cuda::Driver;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> R {
    inside("cuMemGetInfo", |m| unsafe {
        give(free, m.free() as usize)?;
        give(total, m.total as usize)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut sys::CUdeviceptr, bytes: usize) -> R {
    inside_no_capture("cuMemAlloc", |m| {
        if bytes == 0 {
            return refused(R::CUDA_ERROR_INVALID_VALUE, "cuMemAlloc of nothing");
        }
        if bytes as u64 > m.free() {
            return Err(R::CUDA_ERROR_OUT_OF_MEMORY);
        }
        let found = m
            .simulator
            .alloc(bytes, "an allocation")
            .map_err(|_| R::CUDA_ERROR_OUT_OF_MEMORY)?;
        m.allocations.insert(found, bytes as u64);
        unsafe { give(address, found) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFree_v2(address: sys::CUdeviceptr) -> R {
    inside_no_capture("cuMemFree", |m| {
        m.drain_all()?;
        if m.allocations.remove(&address).is_none() {
            return refused(
                R::CUDA_ERROR_INVALID_VALUE,
                format!("cuMemFree of {address:#x}, which is no allocation"),
            );
        }
        m.simulator.free(address);
        Ok(())
    })
}

fn page(bytes: usize) -> Layout {
    Layout::from_size_align(bytes, 4096).expect("a size in memory")
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(memory: *mut *mut c_void, bytes: usize, _flags: c_uint) -> R {
    inside_no_capture("cuMemHostAlloc", |m| {
        if bytes == 0 {
            return refused(R::CUDA_ERROR_INVALID_VALUE, "cuMemHostAlloc of nothing");
        }
        // SAFETY: not empty; filled before anybody reads it.
        let found = unsafe {
            let found = std::alloc::alloc(page(bytes));
            assert!(!found.is_null(), "the host's memory does not suffice");
            found.write_bytes(0xab, bytes);
            found
        };
        m.pinned.insert(found as usize, bytes);
        unsafe { give(memory, found.cast()) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeHost(memory: *mut c_void) -> R {
    inside_no_capture("cuMemFreeHost", |m| {
        let from = memory as usize;
        let Some(bytes) = m.pinned.remove(&from) else {
            return refused(
                R::CUDA_ERROR_INVALID_VALUE,
                "cuMemFreeHost of what cuMemHostAlloc did not return",
            );
        };
        let reads =
            |w: &Work| matches!(w, Work::CopyPinned(_, at, _) if (from..from + bytes).contains(at));
        if m.streams.values().any(|s| s.queue.iter().any(reads)) {
            m.pinned.insert(from, bytes);
            return refused(
                R::CUDA_ERROR_INVALID_VALUE,
                "cuMemFreeHost of memory that a queued copy reads",
            );
        }
        // SAFETY: from cuMemHostAlloc with the same layout, taken out of the table, so freed once.
        unsafe { std::alloc::dealloc(memory.cast(), page(bytes)) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: sys::CUdeviceptr,
    from: *const c_void,
    bytes: usize,
    stream: sys::CUstream,
) -> R {
    inside("cuMemcpyHtoDAsync", |m| {
        m.owned(to, bytes as u64)?;
        let at = from as usize;
        let pinned = m.pinned.range(..=at).next_back();
        if pinned.is_some_and(|(start, size)| at + bytes <= start + size) {
            return m.enqueue(stream as usize, Work::CopyPinned(to, at, bytes));
        }
        if let Some(capture) = &mut known(&mut m.streams, stream as usize, "stream")?.capture {
            capture.broken = true;
            return refused(
                R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                "a copy of pageable memory while capturing",
            );
        }
        // SAFETY: `bytes` of the caller's.
        let staged = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) }.to_vec();
        m.enqueue(stream as usize, Work::CopyStaged(to, staged))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut c_void,
    from: sys::CUdeviceptr,
    bytes: usize,
    stream: sys::CUstream,
) -> R {
    inside("cuMemcpyDtoHAsync", |m| {
        m.owned(from, bytes as u64)?;
        m.enqueue(stream as usize, Work::CopyOut(from, to as usize, bytes))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: sys::CUdeviceptr,
    from: sys::CUdeviceptr,
    bytes: usize,
    stream: sys::CUstream,
) -> R {
    inside("cuMemcpyDtoDAsync", |m| {
        m.owned(from, bytes as u64)?;
        m.owned(to, bytes as u64)?;
        m.enqueue(stream as usize, Work::CopyWithin(to, from, bytes))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD32Async(
    address: sys::CUdeviceptr,
    word: c_uint,
    n: usize,
    stream: sys::CUstream,
) -> R {
    inside("cuMemsetD32Async", |m| {
        if !address.is_multiple_of(4) {
            return refused(
                R::CUDA_ERROR_INVALID_VALUE,
                "cuMemsetD32 of words that are not aligned",
            );
        }
        m.owned(address, 4 * n as u64)?;
        m.enqueue(stream as usize, Work::Set(address, word, n))
    })
}
