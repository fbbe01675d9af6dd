//! Page-locked host memory through which tensors go to the device: the copy engine reads it directly, and the host goes
//! on while it does.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ptr::null_mut;

/// Buffers that take turns: while one is on its way, the next is filled.
const BUFFERS: usize = 2;
/// Smaller copies go by the driver's own staging, which needs no turn.
pub const SMALLEST: usize = 64 << 10;

/// One page-locked buffer, and the event behind the last copy out of it.
#[derive(Debug)]
struct Buffer {
    memory: *mut u8,
    bytes: usize,
    event: sys::CUevent,
    busy: bool,
}

impl Default for Buffer {
    fn default() -> Self {
        Buffer {
            memory: null_mut(),
            bytes: 0,
            event: null_mut(),
            busy: false,
        }
    }
}

/// The buffers of one stream. They grow to the largest copy and stay.
#[derive(Debug, Default)]
pub struct Pinned {
    buffers: [Buffer; BUFFERS],
    next: usize,
}

impl Buffer {
    /// Waits for the last copy out of this buffer.
    ///
    /// # Safety
    /// The buffer's context is current.
    unsafe fn wait(&mut self) -> Result<(), DriverError> {
        if self.busy {
            // SAFETY: a live event; the caller's context.
            unsafe { result::event::synchronize(self.event)? };
            self.busy = false;
        }
        Ok(())
    }

    /// Room for `bytes`.
    ///
    /// # Safety
    /// As [`wait`](Self::wait), which has been called.
    unsafe fn grow(&mut self, bytes: usize) -> Result<(), DriverError> {
        if self.event.is_null() {
            self.event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        }
        if self.bytes < bytes {
            // SAFETY: no copy is under way; a pointer from malloc_host is freed once.
            unsafe {
                if !self.memory.is_null() {
                    result::free_host(self.memory.cast())?;
                    (self.memory, self.bytes) = (null_mut(), 0);
                }
                self.memory = result::malloc_host(bytes, 0)?.cast();
            }
            self.bytes = bytes;
        }
        Ok(())
    }
}

impl Pinned {
    /// Copies `bytes` to device address `to`, in order with what is on `stream`; returns while the copy is under way.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// `to` is a stretch of an allocation, and the context of `stream` is current, the same in every call.
    pub unsafe fn upload(
        &mut self,
        to: sys::CUdeviceptr,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        let buffer = &mut self.buffers[self.next];
        self.next = (self.next + 1) % BUFFERS;
        // SAFETY: by the caller; the buffer is as large as the copy and nobody else writes to it until its event.
        unsafe {
            buffer.wait()?;
            buffer.grow(bytes.len())?;
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.memory, bytes.len());
            let staged = std::slice::from_raw_parts(buffer.memory, bytes.len());
            result::memcpy_htod_async(to, staged, stream)?;
            result::event::record(buffer.event, stream)?;
        }
        buffer.busy = true;
        Ok(())
    }

    /// Gives the memory back.
    ///
    /// # Safety
    /// The context is current and no copy is under way.
    pub unsafe fn free(&mut self) {
        for buffer in &mut self.buffers {
            let b = std::mem::take(buffer);
            // Errors on the way out have nobody to tell.
            // SAFETY: made by `grow`, given back once.
            unsafe {
                if !b.event.is_null() {
                    let _ = result::event::destroy(b.event);
                }
                if !b.memory.is_null() {
                    let _ = result::free_host(b.memory.cast());
                }
            }
        }
    }
}
