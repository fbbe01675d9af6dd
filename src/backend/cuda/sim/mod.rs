//! A simulator of PTX: the compiled CUDA kernels run on the CPU, checked and counted.
//!
//! [`Module::parse`] decodes what NVRTC made of a `.cu` file; [`launch`] runs a kernel of it on [`Memory`], one block
//! at a time per host thread and 32 lanes at a time. Registers are vectors of 32 lanes; divergent paths are kept on a
//! stack and meet at the branch's immediate post-dominator. A launch returns [`Counters`] or the first [`Fault`].
//!
//! What is checked: bounds (with guard zones around every allocation), alignment, use after free, reads of global and
//! shared memory that nobody wrote, races in shared memory between barriers (and between lanes without `__syncwarp`),
//! reads of a `cp.async` destination before the wait, barriers that not all threads reach, and exchange with inactive
//! lanes. Semantics follow the PTX ISA document, version 9.0; approximate instructions give correctly rounded results
//! or nearly so.

// Lanes are numbered: loops over them index several registers at once.
#![allow(clippy::needless_range_loop)]

mod alu;
mod ast;
mod atomic;
mod compare;
mod counters;
mod cvt;
mod decode;
mod decode_alu;
mod decode_flow;
mod decode_mem;
mod exec;
mod fault;
mod float;
mod flow;
mod group;
mod launch;
mod ldst;
mod ldst_shared;
mod lex;
mod memory;
mod module;
mod parse;
mod program;
mod shared;
mod tensor;
mod warp;

pub use counters::{Counters, LineCounters, Traffic};
pub use fault::Fault;
pub use launch::{LaunchOptions, launch};
pub use memory::Memory;
pub use module::{Entry, Module};
pub use program::{Class, Param};

#[cfg(test)]
mod tests;
