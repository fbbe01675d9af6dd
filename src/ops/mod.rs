//! The op rooms. An op is the unit of extension: its definition, float64 reference, backward rule, CPU, WGSL and CUDA
//! launch code and its test and bench cases stand together in one room.
//!
//! To add one: a room here, `shaders/NAME.wgsl`, `kernels/NAME.cu`, and a line in [`ROOMS`]. `check` and the tests then
//! run its cases on every backend against the reference, and the reference's gradients against finite differences.

pub mod act;
pub mod attention;
pub mod augment;
pub mod batch_norm;
pub mod case;
pub mod check;
pub mod conv2d;
pub mod coverage;
pub mod elementwise;
pub mod fuzz;
pub mod global_avg_pool;
pub mod guard;
pub mod layer_norm;
pub mod layer_scale;
pub mod linear;
pub mod loss;
pub mod max_pool;
pub mod optim;
pub mod pad2d;
pub mod patch_merge;
pub mod random;
pub mod reference;
pub mod subsample;
pub mod tokens;
pub mod window_attention;

use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::backend::cuda::CudaCx;
use crate::backend::wgpu::WgpuCx;
use crate::graph::autodiff::{Backward, Fwd};
use crate::graph::{Node, Spec};
use crate::{Error, Result};
pub use case::{Case, Fill, Params};
pub use reference::Host;
use std::fmt::Debug;

/// Floating-point operations and compulsory memory traffic of one node.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Cost {
    /// A multiply-add is 2.
    pub flops: u64,
    /// Every operand read once and every result written once.
    pub bytes: u64,
}

/// An op as one product of matrices: `y [m, n] = A [m, k] B [k, n]`, with `[k, m]` or `[n, k]` in memory where transposed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Product {
    /// Rows of the result.
    pub m: usize,
    /// Columns of the result.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// A is stored transposed.
    pub ta: bool,
    /// B is stored transposed.
    pub tb: bool,
}

impl Product {
    /// Whether slices of these lengths hold A, B and the result.
    pub fn fits(&self, a: usize, b: usize, c: usize) -> bool {
        a == self.m * self.k && b == self.k * self.n && c == self.m * self.n
    }
}

/// Which places of its first operand a place of an op's result depends on, along height and width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// The same place, whatever happens along the channels.
    Same,
    /// Place `i` depends on `size` places from `i * stride - pad` on, for height and width.
    Window {
        /// Places of the operand that one place depends on.
        size: [usize; 2],
        /// Places of the operand between two places of the result.
        stride: [usize; 2],
        /// Places before the operand's first.
        pad: [usize; 2],
    },
    /// Blocks of places that do not slide with the result (windows of attention).
    Blocks,
    /// Every place.
    All,
}

/// One kind of node. Its attributes are the fields of the type that implements this.
pub trait Op: Debug + Send + Sync + 'static {
    /// `conv2d`, `conv2d_dgrad`: unique over all rooms.
    fn name(&self) -> &'static str;

    /// The shape rule: the results' specs.
    ///
    /// # Errors
    /// A sentence part (after the op's name) that says which operand does not fit and why.
    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String>;

    /// `(output, input)` pairs that are one and the same persistent tensor, updated in place.
    fn updates(&self) -> &'static [(usize, usize)] {
        &[]
    }

    /// FLOPs and compulsory bytes. The default counts one operation per result element.
    fn cost(&self, x: &[Spec], y: &[Spec]) -> Cost {
        let flops = y.iter().map(|s| s.len() as u64).sum();
        Cost {
            flops,
            bytes: traffic(x, y),
        }
    }

    /// Which places of the first operand a place of the result depends on, for receptive fields.
    fn reach(&self, _x: &[Spec]) -> Reach {
        Reach::Same
    }

    /// The op as one product of its first operand and its second, or the other way round, where it is one but for the
    /// epilogue: what a BLAS can be asked for.
    fn product(&self, _x: &[Spec]) -> Option<Product> {
        None
    }

    /// Floating-point operations that a variant (`None`: the rule's choice) on the backend called `backend` does: fewer
    /// than [`cost`](Self::cost) counts where an algorithm saves some (Winograd).
    fn executed(&self, _backend: &str, _variant: Option<&str>, x: &[Spec], y: &[Spec]) -> u64 {
        self.cost(x, y).flops
    }

    /// Appends the backward nodes of one forward node.
    ///
    /// # Errors
    /// The op has no derivative (the default), or a shape rule does not hold.
    fn backward(&self, _node: &Fwd, _b: &mut Backward) -> Result<()> {
        Err(Error::run(format!("{} has no backward rule", self.name())))
    }

    /// The naive float64 definition that every kernel is held to. `y` has the results' shapes; an updated result
    /// comes in holding the operand's value.
    fn reference(&self, x: &[&Host], y: &mut [Host]);

    /// The CPU kernel for these shapes.
    ///
    /// # Errors
    /// A variant that does not support them was asked for.
    fn cpu(&self, cx: &mut CpuCx) -> Result<CpuKernel>;

    /// The WGSL launches for these shapes.
    ///
    /// # Errors
    /// The shapes are beyond the adapter's limits.
    fn wgpu(&self, _cx: &mut WgpuCx) -> Result<()> {
        Err(Error::run(format!("{} has no WGSL kernel", self.name())))
    }

    /// The CUDA launches for these shapes.
    ///
    /// # Errors
    /// A variant that does not support them was asked for, or they are beyond the device's limits.
    fn cuda(&self, _cx: &mut CudaCx) -> Result<()> {
        Err(Error::run(format!("{} has no CUDA kernel", self.name())))
    }

    /// Names of the kernel variants that the CPU backend has for this op; the first is the default rule's.
    fn cpu_variants(&self) -> &'static [&'static str] {
        &["auto"]
    }

    /// Names of the kernel variants that the wgpu backend has for this op.
    fn wgpu_variants(&self) -> &'static [&'static str] {
        &["auto"]
    }

    /// Names of the kernel variants that the CUDA backend has for this op; the first is the default rule's.
    fn cuda_variants(&self) -> &'static [&'static str] {
        &["auto"]
    }

    /// For the fusion pass, which looks at concrete ops.
    fn as_any(&self) -> &dyn std::any::Any;
}

impl dyn Op {
    /// Names of the kernel variants that the backend called `backend` has for this op.
    pub fn variants_on(&self, backend: &str) -> &'static [&'static str] {
        match backend {
            "wgpu" => self.wgpu_variants(),
            "cuda" | "cuda:sim" => self.cuda_variants(),
            _ => self.cpu_variants(),
        }
    }

    /// The op as its concrete type, where it is that.
    pub fn downcast<T: Op>(&self) -> Option<&T> {
        self.as_any().downcast_ref()
    }
}

impl Node {
    /// The node's op as its concrete type, where it is that.
    pub fn op_as<T: Op>(&self) -> Option<&T> {
        self.op.downcast()
    }
}

/// Bytes of reading every operand and writing every result once.
pub fn traffic(x: &[Spec], y: &[Spec]) -> u64 {
    x.iter().chain(y).map(|s| 4 * s.len() as u64).sum()
}

/// What a room shows to `check`, `bench` and the tests.
pub struct Room {
    /// `conv2d`: the name of the folder and of its case strings.
    pub name: &'static str,
    /// One line: what it computes.
    pub about: &'static str,
    /// Builds the op and its operands from a case's parameters (`n=2,h=14,...`).
    pub case: fn(&mut Params) -> Result<Case>,
    /// Parameter strings that `check` and the tests run: edge shapes first, then model shapes.
    pub cases: &'static [&'static str],
    /// Parameter strings that `bench` times by default.
    pub bench: &'static [&'static str],
    /// Parameter strings that the shape rule must refuse.
    pub refused: &'static [&'static str],
}

/// Every room. One line each.
pub const ROOMS: &[&Room] = &[
    &elementwise::ADD,
    &elementwise::SCALED_SUM,
    &act::ROOM,
    &conv2d::ROOM,
    &linear::ROOM,
    &layer_norm::ROOM,
    &layer_scale::ROOM,
    &random::DROPOUT,
    &random::DROP_PATH,
    &tokens::EMBED,
    &tokens::SELECT,
    &tokens::cls_mean::ROOM,
    &attention::ROOM,
    &window_attention::ROOM,
    &patch_merge::ROOM,
    &pad2d::ROOM,
    &batch_norm::ROOM,
    &batch_norm::eval::ROOM,
    &batch_norm::fold::ROOM,
    &max_pool::ROOM,
    &global_avg_pool::ROOM,
    &subsample::ROOM,
    &loss::ROOM,
    &optim::ADAMW,
    &optim::SGD,
    &optim::GRAD_NORM,
    &optim::ACCUMULATE,
    &optim::FILL0,
    &augment::ROOM,
];

/// The room called `name`.
///
/// # Errors
/// There is none: the message lists them.
pub fn room(name: &str) -> Result<&'static Room> {
    ROOMS
        .iter()
        .copied()
        .find(|r| r.name == name)
        .ok_or_else(|| {
            let all: Vec<&str> = ROOMS.iter().map(|r| r.name).collect();
            Error::input(format!(
                "no op is called {name}; there are {}",
                all.join(", ")
            ))
        })
}

/// Implements the parts of [`Op`] that are the same everywhere.
#[macro_export]
macro_rules! op_common {
    ($name:literal) => {
        fn name(&self) -> &'static str {
            $name
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    };
}

/// Checks in a shape rule: `ensure!(cond, "message {}", x)` returns the message as the rule's error.
#[macro_export]
macro_rules! ensure {
    ($cond:expr, $($message:tt)*) => {
        if !$cond {
            return Err(format!($($message)*));
        }
    };
}
