//! The CUDA backend. What an op launches is described as data in [`launch`]; the CUDA C++ itself stands in `kernels/`
//! and is found through [`sources`].

pub mod launch;
pub mod sources;

pub use launch::{Arg, Consts, CudaCx, CudaLaunch, Precision, Slot, Traits, WorkId, vector};
pub use sources::KernelSource;
