//! Measuring: kernels and whole steps against the device's own limits.
//!
//! Every time is a [`Sample`]: a median with its interval. Every share is against a ceiling that was measured on the
//! same device ([`Ceilings`]).

pub mod ceiling;
pub mod kernel;
pub mod measure;
pub mod model;
pub mod record;
pub mod rival;

pub use ceiling::{Ceilings, ceilings, kept_ceilings, present_share};
pub use measure::{Limits, Sample, measure};
