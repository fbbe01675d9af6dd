//! Modules, kernels and launches.

use super::machine::{Function, Work, known, take};
use super::{R, give, inside, inside_no_capture, refused};
use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use tilewright::backend::cuda::driver::Placed;
use tilewright::backend::cuda::sim::Module;
use tilewright::backend::cuda::{Driver, Traits};

/// Dynamic shared memory that a kernel has without asking.
const DEFAULT_SHARED: u32 = 48 << 10;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut sys::CUmodule, image: *const c_void) -> R {
    inside_no_capture("cuModuleLoadData", |m| {
        // SAFETY: PTX is a C string, and machine code begins with four bytes that are none of it.
        let text = unsafe { CStr::from_ptr(image.cast()) }.to_bytes();
        let loaded = match text.starts_with(b"\x7fELF") {
            true => {
                return refused(
                    R::CUDA_ERROR_NO_BINARY_FOR_GPU,
                    "machine code: the simulator executes PTX",
                );
            }
            false => m.simulator.load(text, "a module"),
        };
        let text = String::from_utf8_lossy(text);
        let (Ok(id), Ok(parsed)) = (loaded, Module::parse(&text)) else {
            return refused(
                R::CUDA_ERROR_INVALID_PTX,
                "PTX that the simulator does not know",
            );
        };
        let handle = m.handle();
        m.modules.insert(handle, (id, parsed));
        unsafe { give(module, handle as sys::CUmodule) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleUnload(module: sys::CUmodule) -> R {
    inside_no_capture("cuModuleUnload", |m| {
        take(&mut m.modules, module as usize, "module")?;
        m.functions.retain(|_, f| f.module != module as usize);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut sys::CUfunction,
    module: sys::CUmodule,
    name: *const c_char,
) -> R {
    inside("cuModuleGetFunction", |m| {
        // SAFETY: a C string of the caller's.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let (id, parsed) = known(&mut m.modules, module as usize, "module")?;
        let Some(entry) = parsed.entry(&name).cloned() else {
            return Err(R::CUDA_ERROR_NOT_FOUND);
        };
        let id = *id;
        // The same kernel is the same function, whose attributes are shared by all who ask for it.
        let known = m
            .functions
            .iter()
            .find(|(_, f)| f.module == module as usize && f.entry.name == name);
        if let Some((&handle, _)) = known {
            return unsafe { give(function, handle as sys::CUfunction) };
        }
        let kernel = m
            .simulator
            .kernel(id, &name, 0)
            .map_err(|_| R::CUDA_ERROR_NOT_FOUND)?;
        let dynamic = DEFAULT_SHARED.saturating_sub(entry.static_shared);
        let handle = m.handle();
        let found = Function {
            module: module as usize,
            kernel,
            entry,
            dynamic,
        };
        m.functions.insert(handle, found);
        unsafe { give(function, handle as sys::CUfunction) }
    })
}

/// The only attribute that is modelled.
const DYNAMIC: sys::CUfunction_attribute =
    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetAttribute(
    value: *mut c_int,
    attribute: sys::CUfunction_attribute,
    function: sys::CUfunction,
) -> R {
    inside("cuFuncGetAttribute", |m| {
        let f = known(&mut m.functions, function as usize, "function")?;
        match attribute == DYNAMIC {
            true => unsafe { give(value, f.dynamic as c_int) },
            false => refused(
                R::CUDA_ERROR_INVALID_VALUE,
                format!("{attribute:?} is not modelled"),
            ),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetAttribute(
    function: sys::CUfunction,
    attribute: sys::CUfunction_attribute,
    value: c_int,
) -> R {
    inside("cuFuncSetAttribute", |m| {
        let f = known(&mut m.functions, function as usize, "function")?;
        let most = Traits::assumed(80)
            .max_smem
            .saturating_sub(f.entry.static_shared);
        match attribute == DYNAMIC && (0..=most as c_int).contains(&value) {
            true => f.dynamic = value as u32,
            false => {
                return refused(
                    R::CUDA_ERROR_INVALID_VALUE,
                    format!("{attribute:?} of {value}, at most {most}"),
                );
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments)]
unsafe extern "C" fn cuLaunchKernel(
    function: sys::CUfunction,
    gx: c_uint,
    gy: c_uint,
    gz: c_uint,
    bx: c_uint,
    by: c_uint,
    bz: c_uint,
    shared: c_uint,
    stream: sys::CUstream,
    params: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> R {
    inside("cuLaunchKernel", |m| {
        let f = known(&mut m.functions, function as usize, "function")?;
        let name = &f.entry.name;
        let (grid, block) = ([gx, gy, gz], [bx, by, bz]);
        let threads: u64 = block.iter().map(|&n| u64::from(n)).product();
        let most = f
            .entry
            .max_threads
            .map_or(1024, |t| t.iter().map(|&n| u64::from(n)).product());
        let invalid =
            |what: String| refused(R::CUDA_ERROR_INVALID_VALUE, format!("{name}: {what}"));
        if grid.contains(&0) || gx > i32::MAX as u32 || gy > 65535 || gz > 65535 {
            return invalid(format!("a grid of {grid:?}"));
        }
        if threads == 0 || threads > most || bx > 1024 || by > 1024 || bz > 64 {
            return invalid(format!("blocks of {block:?}, at most {most} threads"));
        }
        if shared > f.dynamic {
            return invalid(format!(
                "{shared} bytes of dynamic shared memory, {} allowed",
                f.dynamic
            ));
        }
        if !params.is_null() || extra.is_null() {
            return invalid("parameters are taken as one block".into());
        }
        // SAFETY: the list that cuLaunchKernel documents, up to its end mark.
        let (block_of, size) = unsafe {
            let keys = [0, 2, 4].map(|i| *extra.add(i) as usize);
            if keys != [1, 2, 0] {
                return invalid(format!("keys {keys:?} in `extra`"));
            }
            (*extra.add(1) as *const u8, *(*extra.add(3)).cast::<usize>())
        };
        if size != f.entry.param_bytes {
            return invalid(format!(
                "{size} bytes of parameters, it has {}",
                f.entry.param_bytes
            ));
        }
        // SAFETY: as many bytes as the list says.
        let params = unsafe { std::slice::from_raw_parts(block_of, size) }.to_vec();
        let placed = Placed {
            kernel: f.kernel,
            label: name.clone(),
            grid,
            block,
            smem: shared,
            params,
        };
        m.enqueue(stream as usize, Work::Kernel(placed))
    })
}
