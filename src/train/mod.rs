//! Training: from a configuration to a run directory with metrics, checkpoints and a report.

pub mod checkpoint;
pub mod config;
pub mod evaluate;
pub mod program;
pub mod run;

pub use config::TrainConfig;
pub use program::{Program, ProgramSpec};
