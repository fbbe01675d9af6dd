//! The driver, its device and the context.

use super::machine::Machine;
use super::{CONTEXT, CURRENT, R, code, give, refused, started, state};
use cudarc::driver::sys;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_uint};
use std::sync::Mutex;
use tilewright::backend::cuda::Traits;

/// The only device.
const DEVICE: c_int = 0;
/// Compute capability 99.0.
const MAJOR: c_int = 99;
/// CUDA 13.0.
const VERSION: c_int = 13000;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuInit(flags: c_uint) -> R {
    state().started = true;
    code(match flags {
        0 => Ok(()),
        _ => refused(R::CUDA_ERROR_INVALID_VALUE, "cuInit with flags"),
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> R {
    code(unsafe { give(version, VERSION) })
}

fn text_of(error: R, name: bool) -> *const c_char {
    static KNOWN: Mutex<BTreeMap<(u32, bool), &'static CStr>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(|e| e.into_inner());
    let text = known.entry((error as u32, name)).or_insert_with(|| {
        let text = match name {
            true => format!("{error:?}\0"),
            false => format!("the driver model's {error:?}\0"),
        };
        CStr::from_bytes_with_nul(Box::leak(text.into_bytes().into_boxed_slice()))
            .expect("one zero, at the end")
    });
    text.as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(error: R, text: *mut *const c_char) -> R {
    code(unsafe { give(text, text_of(error, true)) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: R, text: *mut *const c_char) -> R {
    code(unsafe { give(text, text_of(error, false)) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> R {
    started("cuDeviceGetCount", |_| unsafe { give(count, 1) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut sys::CUdevice, ordinal: c_int) -> R {
    started("cuDeviceGet", |_| match ordinal {
        0 => unsafe { give(device, DEVICE) },
        _ => refused(
            R::CUDA_ERROR_INVALID_DEVICE,
            format!("there is no device {ordinal}"),
        ),
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: sys::CUdevice) -> R {
    started("cuDeviceGetName", |_| {
        let text = b"driver model\0";
        let n = text.len().min(len as usize);
        // SAFETY: `len` bytes are the caller's.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), n) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: sys::CUdevice_attribute,
    _device: sys::CUdevice,
) -> R {
    use sys::CUdevice_attribute as A;
    started("cuDeviceGetAttribute", |_| {
        let a100 = Traits::assumed(80);
        let found = match attribute {
            A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR => MAJOR,
            A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR => 0,
            A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT => a100.sms as c_int,
            A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN => a100.max_smem as c_int,
            other => {
                return refused(
                    R::CUDA_ERROR_INVALID_VALUE,
                    format!("{other:?} is not modelled"),
                );
            }
        };
        unsafe { give(value, found) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(
    context: *mut sys::CUcontext,
    _device: sys::CUdevice,
) -> R {
    started("cuDevicePrimaryCtxRetain", |state| {
        state.retained += 1;
        state.machine.get_or_insert_with(Machine::new);
        unsafe { give(context, CONTEXT as sys::CUcontext) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(_device: sys::CUdevice) -> R {
    started("cuDevicePrimaryCtxRelease", |state| {
        if state.retained == 0 {
            return refused(
                R::CUDA_ERROR_INVALID_CONTEXT,
                "a context was released more often than retained",
            );
        }
        state.retained -= 1;
        if state.retained == 0
            && let Some(machine) = state.machine.take()
        {
            machine.report();
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetCurrent(context: sys::CUcontext) -> R {
    started("cuCtxSetCurrent", |state| match context as usize {
        CONTEXT if state.machine.is_some() => {
            CURRENT.set(CONTEXT);
            Ok(())
        }
        0 => {
            CURRENT.set(0);
            Ok(())
        }
        _ => refused(
            R::CUDA_ERROR_INVALID_CONTEXT,
            "an unknown or released context was made current",
        ),
    })
}
