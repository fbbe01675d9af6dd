//! 2-D convolution.

pub mod cpu;
pub mod shape;

pub use shape::ConvShape;
