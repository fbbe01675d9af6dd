//! `libcuda.so` with the simulator for a device: the CUDA driver API as far as Tilewright calls it, so that the code which
//! talks to NVIDIA's driver runs, and is held to the driver's rules, on machines that have none.
//!
//! It is stricter than a driver where that finds mistakes. Work is done only when the host waits for it, so that host memory
//! which changes before then shows; what is captured can only be launched; what the documentation forbids is refused with
//! the documented code, and named on standard error after `driver model:`. The device is newer than every NVRTC, so that
//! kernels come as PTX, which the simulator executes.
//!
//! `DRIVER_MODEL_MEMORY` is the device's memory in bytes. With `DRIVER_MODEL_SEED`, a number above zero, streams get ahead of
//! the host and of each other by chance, so that an order which only waiting ensures is tried in others.

// The names are the driver's. The signatures are those of cuda.h; pointers are the caller's, used as the driver API
// documents it, and nothing else in a process defines these names where this library is looked up.
#![allow(non_snake_case, unsafe_op_in_unsafe_fn)]

mod device;
mod kernels;
mod machine;
mod memory;
mod streams;

use cudarc::driver::sys::CUresult as R;
use machine::{Done, Machine};
use std::cell::Cell;
use std::sync::{Mutex, MutexGuard};

/// The primary context.
const CONTEXT: usize = 0xc0;

struct State {
    started: bool,
    retained: usize,
    machine: Option<Machine>,
}

static STATE: Mutex<State> = Mutex::new(State {
    started: false,
    retained: 0,
    machine: None,
});

thread_local! {
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(|e| e.into_inner())
}

/// `code`, with what was wrong told.
fn refused<T>(code: R, what: impl std::fmt::Display) -> Result<T, R> {
    eprintln!("driver model: {what} ({code:?})");
    Err(code)
}

fn code(done: Done) -> R {
    done.err().unwrap_or(R::CUDA_SUCCESS)
}

/// A call that needs the driver started.
fn started(call: &str, f: impl FnOnce(&mut State) -> Done) -> R {
    let mut state = state();
    code(match state.started {
        true => f(&mut state),
        false => refused(
            R::CUDA_ERROR_NOT_INITIALIZED,
            format!("{call} before cuInit"),
        ),
    })
}

/// A call that needs a context on its thread.
fn inside(call: &str, f: impl FnOnce(&mut Machine) -> Done) -> R {
    started(call, |state| {
        if CURRENT.get() != CONTEXT {
            return refused(
                R::CUDA_ERROR_INVALID_CONTEXT,
                format!("{call} with no context current"),
            );
        }
        match state.machine.as_mut() {
            None => refused(
                R::CUDA_ERROR_CONTEXT_IS_DESTROYED,
                format!("{call} after the context's release"),
            ),
            Some(m) if m.broken => Err(R::CUDA_ERROR_LAUNCH_FAILED),
            Some(m) => f(m),
        }
    })
}

/// A call that may wait or change memory behind the back of a capture by the same thread.
fn inside_no_capture(call: &str, f: impl FnOnce(&mut Machine) -> Done) -> R {
    inside(call, |m| {
        let own = std::thread::current().id();
        let captures = m.streams.values_mut().filter_map(|s| s.capture.as_mut());
        let mut captures = captures.filter(|c| c.thread == own).peekable();
        if captures.peek().is_some() {
            captures.for_each(|c| c.broken = true);
            return refused(
                R::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                format!("{call} while capturing"),
            );
        }
        f(m)
    })
}

/// Puts a result at `to`.
///
/// # Safety
/// `to` is null or a place for a `T`.
unsafe fn give<T>(to: *mut T, value: T) -> Done {
    if to.is_null() {
        return refused(R::CUDA_ERROR_INVALID_VALUE, "a null place for a result");
    }
    // SAFETY: by the caller.
    unsafe { to.write(value) };
    Ok(())
}
