//! The small interface between the backend and what executes kernels: NVIDIA's driver ([`real`](super::real)) or the
//! simulator.

use super::launch::Traits;
use super::nvrtc::Target;
use super::sim::Counters;
use crate::Result;
use std::ffi::c_void;
use std::fmt::Debug;
use std::time::Duration;

/// A loaded module, by order of loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModuleId(pub usize);

/// A kernel of a loaded module, by order of look-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelId(pub usize);

/// A recorded sequence of launches that replays as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GraphId(pub usize);

/// A launch with everything looked up.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The kernel.
    pub kernel: KernelId,
    /// `layer1.0.conv1 conv2d_wgrad conv2d.cu/conv_mma`: scope, op and kernel, for messages, traces and counts.
    pub label: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub smem: u32,
    /// The parameter block.
    pub params: Vec<u8>,
}

/// One step of a program, in stream order.
#[derive(Clone, Debug)]
pub enum Step {
    /// A kernel.
    Launch(Placed),
    /// `n` words at an address become unwritten: NaN, and where the driver keeps track of it, undefined.
    Poison(u64, usize),
}

/// What the launches of one kernel did.
#[derive(Clone, Debug, Default)]
pub struct Count {
    /// Launches.
    pub launches: u64,
    /// All of them together, without source lines.
    pub counters: Counters,
    /// What the simulation took.
    pub time: Duration,
}

/// What executes kernels. Calls are in stream order; the host waits in [`download`](Self::download) and
/// [`synchronize`](Self::synchronize).
pub trait Driver: Send + Sync + Debug {
    /// `cuda`, `cuda:sim`.
    fn name(&self) -> &'static str;

    /// The device, for people and for recorded results.
    fn device(&self) -> String;

    /// What launch code needs to know.
    fn traits(&self) -> &Traits;

    /// What kernels are compiled for.
    fn target(&self) -> Target;

    /// True where tensors should have allocations of their own, so that an access beyond one is seen.
    fn separate(&self) -> bool {
        false
    }

    /// Free and total bytes, where memory is bounded.
    fn memory(&self) -> Result<Option<(u64, u64)>>;

    /// Bytes at a multiple of 256, called `owner` in messages.
    ///
    /// # Errors
    /// Memory does not suffice.
    fn alloc(&self, bytes: usize, owner: &str) -> Result<u64>;

    /// Gives back what [`alloc`](Self::alloc) returned.
    fn free(&self, address: u64);

    /// Copies to the device.
    ///
    /// # Errors
    /// The device is lost.
    fn upload(&self, address: u64, bytes: &[u8]) -> Result<()>;

    /// Whether [`upload_beside`](Self::upload_beside) overlaps copies and kernels, so that memory for it pays.
    fn overlaps(&self) -> bool {
        false
    }

    /// Copies to `by`, from [`alloc`](Self::alloc) and used for this alone, while kernels that were launched before run,
    /// and on to `address` after them.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    fn upload_beside(&self, _by: u64, address: u64, bytes: &[u8]) -> Result<()> {
        self.upload(address, bytes)
    }

    /// Copies from the device, after all that was launched before.
    ///
    /// # Errors
    /// The device is lost or a kernel failed.
    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()>;

    /// Sets `n` words.
    ///
    /// # Errors
    /// The device is lost.
    fn fill(&self, address: u64, word: u32, n: usize) -> Result<()>;

    /// Loads an image made for [`target`](Self::target); `name` is its source, for messages.
    ///
    /// # Errors
    /// The driver refuses it.
    fn load(&self, image: &[u8], name: &str) -> Result<ModuleId>;

    /// A kernel that may be launched with `smem` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// The module has none of that name, or there is less shared memory.
    fn kernel(&self, module: ModuleId, entry: &str, smem: u32) -> Result<KernelId>;

    /// Whether somebody sees [`range`](Self::range).
    fn annotates(&self) -> bool {
        false
    }

    /// Begins a named range of the host's time line, for profilers, or ends the innermost one.
    fn range(&self, _name: Option<&str>) {}

    /// Runs one step.
    ///
    /// # Errors
    /// The launch was refused; a failure inside the kernel may show here or when the host waits.
    fn step(&self, step: &Step) -> Result<()>;

    /// Waits for everything.
    ///
    /// # Errors
    /// A kernel failed.
    fn synchronize(&self) -> Result<()>;

    /// Runs `steps` and returns the time each took on the device.
    ///
    /// # Errors
    /// A kernel failed, or the driver has no clock.
    fn timed(&self, steps: &[&Step]) -> Result<Vec<Duration>> {
        self.timed_calls(steps.len(), &mut |i| self.step(steps[i]))
    }

    /// The stream, for other libraries; none where there is no device.
    fn stream(&self) -> Option<*mut c_void> {
        None
    }

    /// Makes `n` calls, each of which puts work on [`stream`](Self::stream), and returns the time that each one's work
    /// took on the device.
    ///
    /// # Errors
    /// The first error of a call, or the driver has no clock.
    fn timed_calls(
        &self,
        n: usize,
        call: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Duration>>;

    /// Records `steps` as one graph; `None` where the driver has none.
    ///
    /// # Errors
    /// The driver refuses a step.
    fn capture(&self, _steps: &[&Step]) -> Result<Option<GraphId>> {
        Ok(None)
    }

    /// Launches a graph.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    fn replay(&self, graph: GraphId) -> Result<()>;

    /// Gives a graph's resources back.
    fn forget(&self, graph: GraphId);

    /// Whether [`take_counts`](Self::take_counts) has something after a launch, in place of [`timed`](Self::timed).
    fn counts(&self) -> bool {
        false
    }

    /// What was counted since the last call, by `op source/kernel`; empty where the driver does not count.
    fn take_counts(&self) -> Vec<(String, Count)> {
        vec![]
    }
}
