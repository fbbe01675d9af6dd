//! Tilewright trains, fine-tunes, takes apart and times image classifiers with kernels written by hand.
//!
//! One way through the house: a [model builder](models) writes a static-shape [graph] of [ops]; the graph is
//! checked, differentiated and fused; a plan places every tensor and lists the launches; a [backend] runs it.

pub mod analyze;
pub mod backend;
pub mod bench;
pub mod data;
mod download;
pub mod error;
pub mod experiment;
pub mod graph;
pub mod models;
pub mod ops;
pub mod philox;
pub mod profile;
pub mod report;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
