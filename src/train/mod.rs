//! Training: from a configuration to a run directory with metrics, checkpoints and a report.

pub mod checkpoint;
pub mod config;
mod diagnose;
pub mod dry;
pub mod evaluate;
pub mod features;
mod groups;
pub mod program;
pub mod run;
pub mod setup;
mod teacher;

pub use config::TrainConfig;
pub use program::{Program, ProgramSpec};
