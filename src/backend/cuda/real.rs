//! NVIDIA's driver, loaded at run time through cudarc: one device, its primary context, one stream for kernels
//! and one for inputs on their way.

use super::driver::{Driver, GraphId, KernelId, ModuleId, Placed, Step};
use super::launch::Traits;
use super::nvrtc::{Nvrtc, Target};
use super::nvtx::Nvtx;
use super::pinned::{Pinned, STAGED_FROM};
use crate::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::ffi::{CString, c_void};
use std::sync::Mutex;
use std::time::Duration;

/// `CU_LAUNCH_PARAM_BUFFER_POINTER` and `CU_LAUNCH_PARAM_BUFFER_SIZE` of the driver's interface.
const PARAM_BUFFER_POINTER: usize = 1;
const PARAM_BUFFER_SIZE: usize = 2;

/// A device of the machine, as the driver describes it without a context on it.
#[derive(Debug)]
pub struct Device {
    device: sys::CUdevice,
    name: String,
    version: i32,
    traits: Traits,
}

/// A device in use.
#[derive(Debug)]
pub struct Real {
    device: Device,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Mutex<Vec<sys::CUmodule>>,
    kernels: Mutex<Vec<sys::CUfunction>>,
    graphs: Mutex<Vec<Option<sys::CUgraphExec>>>,
    pinned: Mutex<Pinned>,
}

// SAFETY: the driver API is thread-safe; every call below makes the context current on its own thread first. Page-locked
// memory is the host's, behind a lock.
unsafe impl Send for Real {}
// SAFETY: as above.
unsafe impl Sync for Real {}

/// Whether there is a driver.
pub fn present() -> bool {
    // SAFETY: looks for the library and closes it again.
    unsafe { sys::is_culib_present() }
}

/// A driver error with what was being done.
fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| {
        let text = |s: Result<&std::ffi::CStr, DriverError>| {
            s.map_or_else(
                |_| format!("{:?}", e.0),
                |s| s.to_string_lossy().into_owned(),
            )
        };
        Error::run(format!(
            "CUDA: {what}: {} ({})",
            text(e.error_string()),
            text(e.error_name())
        ))
    }
}

/// NaN as a word.
const NAN: u32 = 0x7fff_ffff;

impl Device {
    /// Device number `ordinal`.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no driver, no such device, or one that the kernels cannot run on: what is missing
    /// and how to get it.
    pub fn find(ordinal: usize) -> Result<Device> {
        if !present() {
            return Err(Error::input(
                "there is no CUDA driver: looked for libcuda.so and libcuda.so.1 (Windows: nvcuda.dll) in the library \
                 path; it comes with NVIDIA's display driver. --backend cuda:sim runs the kernels without a GPU",
            ));
        }
        result::init().map_err(failed("starting the driver"))?;
        let count = result::device::get_count().map_err(failed("counting devices"))?;
        if ordinal >= count as usize {
            return Err(Error::input(format!(
                "there is no CUDA device {ordinal}: the driver shows {count} (CUDA_VISIBLE_DEVICES hides others)"
            )));
        }
        let device = result::device::get(ordinal as i32).map_err(failed("opening the device"))?;
        use sys::CUdevice_attribute as A;
        // SAFETY: a device that the driver returned.
        let attribute = |a| {
            unsafe { result::device::get_attribute(device, a) }.map_err(failed("asking the device"))
        };
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        let name = result::device::get_name(device).map_err(failed("asking the device"))?;
        let traits = Traits {
            arch: (10 * major + minor) as u32,
            sms: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            max_smem: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
        };
        if traits.arch < 80 {
            return Err(Error::input(format!(
                "{name} is sm_{}: the CUDA kernels need sm_80 or newer; --backend wgpu runs on it",
                traits.arch
            )));
        }
        let mut version = 0;
        // SAFETY: a place for the answer.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(failed("asking the driver"))?;
        Ok(Device {
            device,
            name,
            version,
            traits,
        })
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "{} (sm_{}, {} multiprocessors, driver for CUDA {}.{})",
            self.name,
            self.traits.arch,
            self.traits.sms,
            self.version / 1000,
            self.version % 1000 / 10
        )
    }
}

impl Real {
    /// Makes a context on device number `ordinal`.
    ///
    /// # Errors
    /// As [`Device::find`], or the driver's.
    pub fn open(ordinal: usize) -> Result<Real> {
        let device = Device::find(ordinal)?;
        // SAFETY: the context is retained once and released in drop; the stream belongs to it.
        let (context, stream) = unsafe {
            let context =
                result::primary_ctx::retain(device.device).map_err(failed("making a context"))?;
            result::ctx::set_current(context).map_err(failed("making a context"))?;
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking)
                .map_err(failed("making a stream"))?;
            (context, stream)
        };
        Ok(Real {
            device,
            context,
            stream,
            modules: Mutex::default(),
            kernels: Mutex::default(),
            graphs: Mutex::default(),
            pinned: Mutex::default(),
        })
    }

    fn current(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("entering the context"))
    }

    fn launch(&self, p: &Placed) -> Result<()> {
        let function = self.kernels.lock().unwrap_or_else(|e| e.into_inner())[p.kernel.0];
        // The parameters go as one block, so that a structure in a kernel's signature is its members in the list.
        let mut bytes = p.params.len();
        let mut extra: [*mut c_void; 5] = [
            PARAM_BUFFER_POINTER as *mut c_void,
            p.params.as_ptr() as *mut c_void,
            PARAM_BUFFER_SIZE as *mut c_void,
            (&raw mut bytes).cast(),
            std::ptr::null_mut(),
        ];
        let ([gx, gy, gz], [bx, by, bz]) = (p.grid, p.block);
        // SAFETY: the block is laid out as the kernel's signature is; the driver copies it before it returns. What the
        // kernel does with the addresses in it is the kernel's affair: `cuda:sim` checks it.
        unsafe {
            sys::cuLaunchKernel(
                function,
                gx,
                gy,
                gz,
                bx,
                by,
                bz,
                p.smem,
                self.stream,
                std::ptr::null_mut(),
                extra.as_mut_ptr(),
            )
        }
        .result()
        .map_err(failed(&p.label))
    }

    fn enqueue(&self, step: &Step) -> Result<()> {
        match step {
            Step::Launch(p) => self.launch(p),
            Step::Poison(address, n) => self.set(*address, NAN, *n),
        }
    }

    fn set(&self, address: u64, word: u32, n: usize) -> Result<()> {
        // SAFETY: a stretch of an allocation.
        unsafe { sys::cuMemsetD32Async(address, word, n, self.stream) }
            .result()
            .map_err(failed("filling memory"))
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        if self.current().is_err() {
            return;
        }
        // Errors on the way out have nobody to tell.
        // SAFETY: everything was made by this driver and nothing uses it any more.
        unsafe {
            let pinned = self.pinned.get_mut().unwrap_or_else(|e| e.into_inner());
            let _ = pinned.wait();
            let _ = result::stream::synchronize(self.stream);
            pinned.free();
            let graphs = self.graphs.get_mut().unwrap_or_else(|e| e.into_inner());
            for graph in graphs.drain(..).flatten() {
                let _ = result::graph::exec_destroy(graph);
            }
            let modules = self.modules.get_mut().unwrap_or_else(|e| e.into_inner());
            for module in modules.drain(..) {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device.device);
        }
    }
}

impl Driver for Real {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn device(&self) -> String {
        self.device.to_string()
    }

    fn traits(&self) -> &Traits {
        &self.device.traits
    }

    fn target(&self) -> Target {
        match Nvrtc::get() {
            Ok(nvrtc) => nvrtc.target(self.device.traits.arch),
            Err(_) => Target::Cubin(self.device.traits.arch),
        }
    }

    fn memory(&self) -> Result<Option<(u64, u64)>> {
        self.current()?;
        let (free, total) = result::mem_get_info().map_err(failed("asking for free memory"))?;
        Ok(Some((free as u64, total as u64)))
    }

    fn alloc(&self, bytes: usize, owner: &str) -> Result<u64> {
        self.current()?;
        // SAFETY: freed once, by `free`.
        unsafe { result::malloc_sync(bytes) }
            .map_err(failed(&format!("allocating {bytes} bytes for {owner}")))
    }

    fn free(&self, address: u64) {
        if self.current().is_ok() {
            let mut pinned = self.pinned.lock().unwrap_or_else(|e| e.into_inner());
            // SAFETY: from `alloc`; the waits make sure that no kernel and no copy still uses it.
            unsafe {
                let _ = pinned.wait();
                let _ = result::stream::synchronize(self.stream);
                pinned.forget(address);
                let _ = result::free_sync(address);
            }
        }
    }

    fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.current()?;
        let copied = if bytes.len() < STAGED_FROM {
            // From pageable memory the driver copies to a staging buffer of its own before it returns, so `bytes` need
            // not outlive the call.
            // SAFETY: a stretch of an allocation.
            unsafe { result::memcpy_htod_async(address, bytes, self.stream) }
        } else {
            let mut pinned = self.pinned.lock().unwrap_or_else(|e| e.into_inner());
            // SAFETY: a stretch of an allocation; the context is current, and there is one stream.
            unsafe { pinned.upload(address, bytes, self.stream) }
        };
        copied.map_err(failed("copying to the device"))
    }

    fn overlaps(&self) -> bool {
        true
    }

    fn upload_beside(&self, by: u64, address: u64, bytes: &[u8]) -> Result<()> {
        self.current()?;
        let mut pinned = self.pinned.lock().unwrap_or_else(|e| e.into_inner());
        // SAFETY: stretches of allocations; the context is current, and there is one stream beside that of the copies.
        unsafe { pinned.upload_beside(by, address, bytes, self.stream) }
            .map_err(failed("copying to the device"))
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.current()?;
        // SAFETY: a stretch of an allocation; waited for below, before `bytes` goes back to the caller.
        unsafe { result::memcpy_dtoh_async(bytes, address, self.stream) }
            .map_err(failed("running kernels or copying from the device"))?;
        self.synchronize()
    }

    fn fill(&self, address: u64, word: u32, n: usize) -> Result<()> {
        self.current()?;
        self.set(address, word, n)
    }

    fn load(&self, image: &[u8], name: &str) -> Result<ModuleId> {
        self.current()?;
        // PTX is a C string; a cubin carries its own length.
        // SAFETY: an image of the compiler, which ends PTX with a zero.
        let module = unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(|e| {
            let e = failed(&format!("loading {name}"))(e);
            match Nvrtc::get() {
                Ok(nvrtc) if nvrtc.version() / 1000 > self.device.version / 1000 => {
                    let (mine, its) = (nvrtc.version_text(), self.device.version / 1000);
                    let advice = format!(
                        "the kernel was made by NVRTC {mine}, which this driver for CUDA {its} is too old for: update the \
                         driver, or `pip install nvidia-cuda-nvrtc-cu{its}` and name its folder in TILEWRIGHT_NVRTC"
                    );
                    Error::run(format!("{e}; {advice}"))
                }
                _ => e,
            }
        })?;
        let mut modules = self.modules.lock().unwrap_or_else(|e| e.into_inner());
        modules.push(module);
        Ok(ModuleId(modules.len() - 1))
    }

    fn kernel(&self, module: ModuleId, entry: &str, smem: u32) -> Result<KernelId> {
        self.current()?;
        let module = self.modules.lock().unwrap_or_else(|e| e.into_inner())[module.0];
        let name = CString::new(entry).map_err(|_| Error::run("a kernel's name holds a zero"))?;
        // SAFETY: a loaded module.
        let function =
            unsafe { result::module::get_function(module, name) }.map_err(failed(entry))?;
        if smem > 48 << 10 {
            use sys::CUfunction_attribute as A;
            let a = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // It is the function's, not the launch's, so that it may only grow.
            // SAFETY: a function of a loaded module.
            unsafe {
                result::function::get_function_attribute(function, a).and_then(|allowed| {
                    let wanted = allowed.max(smem as i32);
                    result::function::set_function_attribute(function, a, wanted)
                })
            }
            .map_err(failed(&format!(
                "{entry} with {smem} bytes of shared memory"
            )))?;
        }
        let mut kernels = self.kernels.lock().unwrap_or_else(|e| e.into_inner());
        kernels.push(function);
        Ok(KernelId(kernels.len() - 1))
    }

    fn annotates(&self) -> bool {
        Nvtx::get().is_some()
    }

    fn range(&self, name: Option<&str>) {
        match (Nvtx::get(), name) {
            (Some(nvtx), Some(name)) => nvtx.push(name),
            (Some(nvtx), None) => nvtx.pop(),
            (None, _) => {}
        }
    }

    fn step(&self, step: &Step) -> Result<()> {
        self.current()?;
        self.enqueue(step)
    }

    fn synchronize(&self) -> Result<()> {
        self.current()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("running kernels"))
    }

    fn stream(&self) -> Option<*mut c_void> {
        Some(self.stream.cast())
    }

    fn timed_calls(
        &self,
        n: usize,
        call: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Duration>> {
        self.current()?;
        let event = || {
            result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
                .map_err(failed("making an event"))
        };
        let mut events = vec![];
        for _ in 0..=n {
            events.push(event()?);
        }
        let mut run = || -> Result<Vec<Duration>> {
            // SAFETY: live events on a live stream.
            unsafe {
                result::event::record(events[0], self.stream).map_err(failed("timing"))?;
                for i in 0..n {
                    call(i)?;
                    result::event::record(events[i + 1], self.stream).map_err(failed("timing"))?;
                }
                self.synchronize()?;
                events
                    .windows(2)
                    .map(|e| {
                        let ms = result::event::elapsed(e[0], e[1]).map_err(failed("timing"))?;
                        Ok(Duration::from_secs_f64(f64::from(ms) * 1e-3))
                    })
                    .collect()
            }
        };
        let times = run();
        for e in events {
            // SAFETY: made above, destroyed once.
            unsafe {
                let _ = result::event::destroy(e);
            }
        }
        times
    }

    fn capture(&self, steps: &[&Step]) -> Result<Option<GraphId>> {
        self.current()?;
        let what = failed("recording a step as a CUDA graph");
        // SAFETY: the stream is this driver's own; a capture that was begun is ended whatever happens.
        let graph = unsafe {
            result::stream::begin_capture(
                self.stream,
                sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
            )
            .map_err(&what)?;
            let all = steps.iter().try_for_each(|s| self.enqueue(s));
            let graph = result::stream::end_capture(self.stream).map_err(&what);
            all?;
            let graph = graph?;
            let exec = sys::CUgraphInstantiate_flags(0);
            let exec = result::graph::instantiate(graph, exec).map_err(&what);
            let _ = result::graph::destroy(graph);
            exec?
        };
        let mut graphs = self.graphs.lock().unwrap_or_else(|e| e.into_inner());
        graphs.push(Some(graph));
        Ok(Some(GraphId(graphs.len() - 1)))
    }

    fn replay(&self, graph: GraphId) -> Result<()> {
        self.current()?;
        let graph = self.graphs.lock().unwrap_or_else(|e| e.into_inner())[graph.0]
            .ok_or_else(|| Error::run("a CUDA graph was used after it was given back"))?;
        // SAFETY: an instantiated graph of this driver.
        unsafe { result::graph::launch(graph, self.stream) }.map_err(failed("launching a graph"))
    }

    fn forget(&self, graph: GraphId) {
        let taken = self.graphs.lock().unwrap_or_else(|e| e.into_inner())[graph.0].take();
        if let Some(graph) = taken
            && self.synchronize().is_ok()
        {
            // SAFETY: taken out, so destroyed once; nothing runs it any more.
            unsafe {
                let _ = result::graph::exec_destroy(graph);
            }
        }
    }
}
