//! NVTX, NVIDIA's annotations for profilers (Nsight Systems), loaded at run time: without the library ranges cost nothing.

use super::find;
use std::ffi::{CString, c_char, c_int};
use std::sync::OnceLock;

/// Names of the library, newest first: NVTX 3's functions as symbols, and NVTX 2.
#[cfg(not(windows))]
const NAMES: &[&str] = &[
    "libnvtx3interop.so.1",
    "libnvtx3interop.so",
    "libnvToolsExt.so.1",
    "libnvToolsExt.so",
];
/// Names of the library, newest first.
#[cfg(windows)]
const NAMES: &[&str] = &["nvtx3interop.dll", "nvToolsExt64_1.dll"];

/// The two functions that are used.
#[derive(Debug)]
pub struct Nvtx {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

impl Nvtx {
    /// The library, where a profiler may look and there is one.
    pub fn get() -> Option<&'static Nvtx> {
        static LOADED: OnceLock<Option<Nvtx>> = OnceLock::new();
        LOADED.get_or_init(Nvtx::load).as_ref()
    }

    fn load() -> Option<Nvtx> {
        // Nsight and other tools name what they inject; without one there is nobody to tell.
        std::env::var_os("NVTX_INJECTION64_PATH")?;
        let library = find::load(NAMES, &find::folders(&["cu13", "nvtx"]))?;
        // SAFETY: the types are those of nvToolsExt.h; the library is never unloaded.
        unsafe {
            Some(Nvtx {
                push: *library.get(b"nvtxRangePushA").ok()?,
                pop: *library.get(b"nvtxRangePop").ok()?,
            })
        }
    }

    /// Begins a range inside the present one of this thread.
    pub fn push(&self, name: &str) {
        if let Ok(name) = CString::new(name) {
            // SAFETY: the library copies the string.
            unsafe { (self.push)(name.as_ptr()) };
        }
    }

    /// Ends the innermost range.
    pub fn pop(&self) {
        // SAFETY: no operand; without a range it does nothing.
        unsafe { (self.pop)() };
    }
}
