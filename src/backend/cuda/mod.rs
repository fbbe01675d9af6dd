//! The CUDA backend: NVRTC, drivers, planned memory, replay. What an op launches is described as data in [`launch`]; the
//! CUDA C++ itself stands in `kernels/` and is found through [`sources`].

pub mod compile;
pub mod driver;
pub mod exec;
pub mod find;
pub mod launch;
pub mod nvrtc;
pub mod nvtx;
mod pinned;
pub mod real;
pub mod resources;
pub mod shape;
pub mod sim;
pub mod simulated;
pub mod sources;

pub use compile::Compiler;
pub use driver::{Count, Driver};
pub use exec::{Cuda, CudaOptions};
pub use launch::{Arg, Consts, CudaCx, CudaLaunch, Precision, Slot, Traits, WorkId, vector};
pub use nvrtc::{Nvrtc, Target};
pub use real::Real;
pub use resources::{Footprint, Machine, Occupancy};
pub use shape::{Columns, Rows};
pub use simulated::Simulated;
pub use sources::KernelSource;

use super::Backend;
use crate::{Error, Result};
use std::sync::Arc;

/// The device `which`: a number (the first device is 0 and the default), or `sim`.
///
/// # Errors
/// There is no driver, no such device or no NVRTC: the message says what to install.
pub fn open_device(which: Option<&str>, options: CudaOptions) -> Result<Box<dyn Backend>> {
    let ordinal = match which {
        Some("sim") => {
            return Ok(Box::new(Cuda::new(
                Arc::new(Simulated::default()),
                options,
            )?));
        }
        None => 0,
        Some(n) => n.parse().map_err(|_| {
            Error::input(format!(
                "no CUDA device is called {n}; there are cuda, cuda:NUMBER and cuda:sim"
            ))
        })?,
    };
    Ok(Box::new(Cuda::new(
        Arc::new(Real::open(ordinal)?),
        options,
    )?))
}

/// Whether this machine has a device and a compiler for it.
pub fn present() -> bool {
    real::present() && Nvrtc::get().is_ok() && real::Device::find(0).is_ok()
}

/// Whether the simulator can run: it needs NVRTC alone.
pub fn sim_present() -> bool {
    Nvrtc::get().is_ok()
}

/// Every device of the machine, for people.
///
/// # Errors
/// There is no driver or no device.
pub fn cuda_devices() -> Result<Vec<String>> {
    let mut found = vec![real::Device::find(0)?.to_string()];
    while let Ok(next) = real::Device::find(found.len()) {
        found.push(next.to_string());
    }
    Ok(found)
}
