//! The way of tensors to the device: through page-locked host memory, which the copy engine reads directly while the host
//! goes on, and for a step's inputs by a stream of their own, beside the kernels that still run.

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ptr::null_mut;

/// Buffers that take turns: while one is on its way, the next is filled.
const BUFFERS: usize = 2;
/// Smaller copies go by the driver's own staging, which needs no turn.
pub const STAGED_FROM: usize = 64 << 10;

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

/// Device memory where an input arrives beside running kernels.
#[derive(Debug)]
struct Landing {
    /// Behind the last copy to it.
    arrived: sys::CUevent,
    /// Behind the last copy from it.
    left: sys::CUevent,
}

/// The buffers, and the stream of copies beside another one. Buffers grow to the largest copy and stay.
#[derive(Debug, Default)]
pub struct Pinned {
    buffers: [Buffer; BUFFERS],
    next: usize,
    beside: Option<sys::CUstream>,
    landings: HashMap<sys::CUdeviceptr, Landing>,
}

fn event() -> Result<sys::CUevent, DriverError> {
    result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
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
            self.event = event()?;
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

    /// Copies `bytes` to device address `by` beside what is on `stream`, and from there to `to` in order with it; returns
    /// while both copies are under way.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Safety
    /// As [`upload`](Self::upload), for both addresses; `by` is used by these calls alone, until [`forget`](Self::forget).
    pub unsafe fn upload_beside(
        &mut self,
        by: sys::CUdeviceptr,
        to: sys::CUdeviceptr,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> Result<(), DriverError> {
        let beside = match self.beside {
            Some(beside) => beside,
            None => *self.beside.insert(result::stream::create(
                result::stream::StreamKind::NonBlocking,
            )?),
        };
        if let Entry::Vacant(free) = self.landings.entry(by) {
            let (arrived, left) = (event()?, event()?);
            free.insert(Landing { arrived, left });
        }
        let no_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: by the caller; streams and events are this object's own. An event that was never recorded is waited
        // for by nobody.
        unsafe {
            let left = self.landings[&by].left;
            result::stream::wait_event(beside, left, no_flags)?;
            self.upload(by, bytes, beside)?;
            let landing = &self.landings[&by];
            result::event::record(landing.arrived, beside)?;
            result::stream::wait_event(stream, landing.arrived, no_flags)?;
            result::memcpy_dtod_async(to, by, bytes.len(), stream)?;
            result::event::record(landing.left, stream)
        }
    }

    /// Address `by` of [`upload_beside`](Self::upload_beside) is given back.
    ///
    /// # Safety
    /// The context is current and nothing copies to or from it.
    pub unsafe fn forget(&mut self, by: sys::CUdeviceptr) {
        if let Some(landing) = self.landings.remove(&by) {
            // SAFETY: made by `upload_beside`, destroyed once.
            unsafe {
                let _ = result::event::destroy(landing.arrived);
                let _ = result::event::destroy(landing.left);
            }
        }
    }

    /// Waits for copies beside the other stream.
    ///
    /// # Errors
    /// A copy failed.
    ///
    /// # Safety
    /// The context is current.
    pub unsafe fn wait(&self) -> Result<(), DriverError> {
        match self.beside {
            // SAFETY: by the caller; the stream is this object's own.
            Some(beside) => unsafe { result::stream::synchronize(beside) },
            None => Ok(()),
        }
    }

    /// Gives the memory back.
    ///
    /// # Safety
    /// The context is current and no copy is under way.
    pub unsafe fn free(&mut self) {
        let landings: Vec<sys::CUdeviceptr> = self.landings.keys().copied().collect();
        for by in landings {
            // SAFETY: by the caller.
            unsafe { self.forget(by) };
        }
        if let Some(beside) = self.beside.take() {
            // SAFETY: made by `upload_beside`, destroyed once.
            let _ = unsafe { result::stream::destroy(beside) };
        }
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
