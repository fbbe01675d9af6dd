//! Weight files: reading and writing safetensors, and what a file holds.

pub mod file;
pub mod fill;
mod header;
pub mod inspect;
mod mistaken;
pub mod save;

pub use file::{Dtype, Entry, WeightFile};
pub use inspect::Inspection;
pub use save::{FloatFormat, SaveData, SaveTensor, save};
