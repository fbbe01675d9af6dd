//! The CUDA backend: NVRTC, drivers, planned memory, replay. What an op launches is described as data in [`launch`]; the CUDA C++ itself stands in `kernels/`
//! and is found through [`sources`].

pub mod compile;
pub mod driver;
pub mod exec;
pub mod find;
pub mod launch;
pub mod nvrtc;
pub mod real;
pub mod shape;
pub mod sources;

pub use compile::Compiler;
pub use exec::{Cuda, CudaOptions};
pub use launch::{Arg, Consts, CudaCx, CudaLaunch, Precision, Slot, Traits, WorkId, vector};
pub use nvrtc::{Nvrtc, Target};
pub use shape::{Columns, Rows};
pub use sources::KernelSource;

use super::Backend;
use crate::Result;
use std::sync::Arc;

/// The first device of the machine.
///
/// # Errors
/// There is no driver, no device or no NVRTC: the message says what to install.
pub fn open(options: CudaOptions) -> Result<Box<dyn Backend>> {
    let driver = Arc::new(real::Real::open(0)?);
    Ok(Box::new(Cuda::new(driver, options)?))
}
