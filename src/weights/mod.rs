//! Weight files: reading and writing safetensors, what a file holds, and how its names and layouts become a model's.

pub mod convert;
pub mod file;
pub mod fill;
mod header;
pub mod hub;
pub mod inspect;
pub mod load;
mod mistaken;
pub mod naming;
pub mod registry;
pub mod save;
mod trained;

pub use file::{Dtype, Entry, WeightFile};
pub use inspect::Inspection;
pub use load::{FileNames, LoadOptions, Loaded, load};
pub use naming::{Naming, Scheme};
pub use save::{FloatFormat, SaveData, SaveTensor, save};
pub use trained::Trained;
