//! The wgpu backend: adapters, arenas, pipelines, programs. What an op launches is described as data in
//! [`launch`]; the WGSL itself stands in `shaders/` and is found through [`shaders`].

pub mod device;
pub mod exec;
pub mod launch;
pub mod program;
pub mod shaders;

pub use device::{AdapterReport, AdapterTraits, WgpuDevice, WgpuOptions, adapters};
pub use exec::Wgpu;
pub use launch::{Arg, Cut, Launch, WgpuCx, WorkId, column_parts, fold, item_types};
pub use program::{Place, PlacedLaunch, Program, StepTime};

use super::Backend;
use crate::Result;

/// The best adapter.
///
/// # Errors
/// There is none: the message says what to install.
pub fn open() -> Result<Box<dyn Backend>> {
    Ok(Box::new(Wgpu::open(&WgpuOptions::default())?))
}
