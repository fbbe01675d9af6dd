//! What an op asks of a CUDA device, as data: launches over its inputs, its outputs and planned workspace.
//!
//! An op records [`CudaLaunch`]es in a [`CudaCx`] while a plan is made. The planner places tensors and workspace in
//! arenas and turns every pointer into an address; a run then replays the list without looking at shapes.

use crate::graph::Spec;
use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// Most blocks in a grid's y and z.
pub const MAX_GRID_YZ: u32 = 65_535;
/// Most threads in a block.
pub const MAX_THREADS: u32 = 1024;
/// Most dynamic and static shared memory of a block that every device from sm_80 on has (sm_86 and sm_89: 99 KiB).
pub const MAX_SMEM: u32 = 99 * 1024;
/// Floats per 256 bytes: every tensor and workspace starts at a multiple of this.
pub const ALIGN: usize = 64;
/// Bytes of parameters that a launch may have.
pub const MAX_PARAMS: usize = 4096;

/// What products of matrices, convolutions and attention compute in. Statistics, losses, master weights and
/// accumulators are float32 in all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// float32 throughout.
    #[default]
    F32,
    /// Operands rounded to tf32 (10 bits of mantissa) on tensor cores.
    Tf32,
    /// Operands rounded to bf16 (7 bits of mantissa) on tensor cores.
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
        })
    }
}

impl FromStr for Precision {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        match s {
            "f32" => Ok(Precision::F32),
            "tf32" => Ok(Precision::Tf32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err(Error::input(format!(
                "no precision is called {s}; there are f32, tf32 and bf16"
            ))),
        }
    }
}

/// What kernels' launch code needs to know of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Compute capability as in `sm_80`: 80, 86, 90, ...
    pub arch: u32,
    /// Multiprocessors.
    pub sms: u32,
    /// Shared memory that one block may have, in bytes.
    pub max_smem: u32,
}

impl Traits {
    /// Those of a device of `arch` where there is none to ask: NVIDIA's data-centre parts.
    pub fn assumed(arch: u32) -> Traits {
        let (sms, max_smem) = match arch {
            90.. => (132, 227 * 1024),
            80 => (108, 163 * 1024),
            _ => (72, MAX_SMEM),
        };
        Traits {
            arch,
            sms,
            max_smem,
        }
    }
}

/// Workspace of one node, by order of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WorkId(pub usize);

/// What a pointer points into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// The node's i-th input.
    In(usize),
    /// The node's i-th output.
    Out(usize),
    /// Workspace asked for with [`CudaCx::workspace`].
    Work(WorkId),
}

/// One parameter of a kernel, in the order of its signature.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arg {
    /// A device pointer to an element (4 bytes each) of a buffer.
    Ptr(Slot, usize),
    /// A null pointer, for an operand that is not there.
    Null,
    /// `unsigned`.
    U32(u32),
    /// `int`.
    I32(i32),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
}

#[allow(non_snake_case)] // read like variants: Arg::In(0), Arg::Out(0), Arg::Work(id)
impl Arg {
    /// A pointer to the node's i-th input.
    pub fn In(i: usize) -> Arg {
        Arg::Ptr(Slot::In(i), 0)
    }

    /// A pointer to the node's i-th output.
    pub fn Out(i: usize) -> Arg {
        Arg::Ptr(Slot::Out(i), 0)
    }

    /// A pointer to workspace.
    pub fn Work(id: WorkId) -> Arg {
        Arg::Ptr(Slot::Work(id), 0)
    }

    /// An `unsigned` from a size.
    pub fn n(n: usize) -> Arg {
        Arg::U32(n as u32)
    }

    /// The pointer moved by `elements` of 4 bytes; other parameters stay what they are.
    pub fn at(self, elements: usize) -> Arg {
        match self {
            Arg::Ptr(slot, offset) => Arg::Ptr(slot, offset + elements),
            other => other,
        }
    }

    /// A pointer to the node's i-th input where `there`, else null.
    pub fn in_if(there: bool, i: usize) -> Arg {
        if there { Arg::In(i) } else { Arg::Null }
    }

    /// Bytes of the parameter, which are its alignment too.
    pub fn bytes(self) -> usize {
        match self {
            Arg::Ptr(..) | Arg::Null | Arg::U64(_) => 8,
            Arg::U32(_) | Arg::I32(_) | Arg::F32(_) => 4,
        }
    }
}

/// The parameter block of a launch: every parameter at a multiple of its size, pointers looked up by `address`.
///
/// # Errors
/// Those of `address`.
pub fn pack(args: &[Arg], mut address: impl FnMut(Slot, usize) -> Result<u64>) -> Result<Vec<u8>> {
    let mut block = vec![];
    for &arg in args {
        block.resize(block.len().next_multiple_of(arg.bytes()), 0);
        match arg {
            Arg::Ptr(slot, offset) => {
                block.extend_from_slice(&address(slot, offset)?.to_le_bytes())
            }
            Arg::Null => block.extend_from_slice(&0u64.to_le_bytes()),
            Arg::U32(v) => block.extend_from_slice(&v.to_le_bytes()),
            Arg::I32(v) => block.extend_from_slice(&v.to_le_bytes()),
            Arg::U64(v) => block.extend_from_slice(&v.to_le_bytes()),
            Arg::F32(v) => block.extend_from_slice(&v.to_le_bytes()),
        }
    }
    Ok(block)
}

/// Constants of a launch: `-D NAME=VALUE` for the compiler.
pub type Consts = Vec<(&'static str, String)>;

/// One kernel launch.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaLaunch {
    /// File name in `kernels/`.
    pub source: &'static str,
    /// The kernel, declared `extern "C" __global__`.
    pub entry: &'static str,
    /// Compile-time constants; part of the module's key, so keep the number of different values small.
    pub consts: Consts,
    /// Parameters in the order of the kernel's signature.
    pub args: Vec<Arg>,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub smem: u32,
}

/// What an op sees while it describes its launches.
#[derive(Debug)]
pub struct CudaCx<'a> {
    /// The device the plan is for.
    pub traits: &'a Traits,
    /// Compute capability: 80, 86, 90, ...
    pub arch: u32,
    /// What products are computed in.
    pub precision: Precision,
    /// Operand specs.
    pub x: &'a [Spec],
    /// Result specs.
    pub y: &'a [Spec],
    /// The variant that was asked for; `None` leaves it to the op's rule.
    pub variant: Option<&'a str>,
    /// Launches recorded so far.
    pub launches: Vec<CudaLaunch>,
    /// Elements of each workspace asked for so far.
    pub work: Vec<usize>,
}

impl<'a> CudaCx<'a> {
    /// An empty recording for one node.
    pub fn new(
        traits: &'a Traits,
        precision: Precision,
        x: &'a [Spec],
        y: &'a [Spec],
        variant: Option<&'a str>,
    ) -> Self {
        CudaCx {
            traits,
            arch: traits.arch,
            precision,
            x,
            y,
            variant,
            launches: Vec::new(),
            work: Vec::new(),
        }
    }

    /// Workspace of `floats` elements (at least one) that lives for this node alone; it starts out unwritten.
    pub fn workspace(&mut self, floats: usize) -> WorkId {
        self.work.push(floats.max(1));
        WorkId(self.work.len() - 1)
    }

    /// Records one launch; a launch without blocks is dropped.
    ///
    /// # Errors
    /// [`Error::Run`] where the launch breaks a limit: a bug in the op, caught when the plan is made.
    pub fn launch(&mut self, launch: CudaLaunch) -> Result<()> {
        let CudaLaunch {
            source,
            entry,
            ref args,
            grid,
            block,
            smem,
            ..
        } = launch;
        if grid.contains(&0) {
            return Ok(());
        }
        let fail = |what: String| Err(Error::run(format!("{source}/{entry} {what}")));
        if grid[0] > i32::MAX as u32 || grid[1] > MAX_GRID_YZ || grid[2] > MAX_GRID_YZ {
            return fail(format!(
                "wants {grid:?} blocks, at most 2^31 - 1 and {MAX_GRID_YZ}"
            ));
        }
        let threads = block.iter().map(|&b| u64::from(b)).product::<u64>();
        if threads == 0 || threads > u64::from(MAX_THREADS) || block[2] > 64 {
            return fail(format!("wants blocks of {block:?} threads"));
        }
        if smem > self.traits.max_smem {
            return fail(format!(
                "wants {smem} bytes of shared memory, this device has {}",
                self.traits.max_smem
            ));
        }
        for &arg in args {
            if let Arg::Ptr(slot, offset) = arg {
                let len = self.slot_len(slot)?;
                if offset > len {
                    return fail(format!(
                        "points at element {offset} of {slot:?}, which has {len}"
                    ));
                }
            }
        }
        if pack(args, |_, _| Ok(0))?.len() > MAX_PARAMS {
            return fail(format!("has more than {MAX_PARAMS} bytes of parameters"));
        }
        self.launches.push(launch);
        Ok(())
    }

    fn slot_len(&self, slot: Slot) -> Result<usize> {
        let len = match slot {
            Slot::In(i) => self.x.get(i).map(Spec::len),
            Slot::Out(i) => self.y.get(i).map(Spec::len),
            Slot::Work(WorkId(i)) => self.work.get(i).copied(),
        };
        len.ok_or_else(|| {
            Error::run(format!(
                "a launch names {slot:?}, which the node does not have"
            ))
        })
    }

    /// Records a launch over `n` items with blocks of `threads`, one item a thread. The kernel's parameters are
    /// `unsigned n`, then `args`.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn items(
        &mut self,
        (source, entry): (&'static str, &'static str),
        consts: Consts,
        n: usize,
        threads: u32,
        args: &[Arg],
    ) -> Result<()> {
        let mut all = vec![Arg::n(n)];
        all.extend_from_slice(args);
        self.launch(CudaLaunch {
            source,
            entry,
            consts,
            args: all,
            grid: [n.div_ceil(threads as usize) as u32, 1, 1],
            block: [threads, 1, 1],
            smem: 0,
        })
    }

    /// Records a map over tensors of `n` elements each: float4 a thread where `n` is a multiple of four, else one
    /// float (`VEC` is 4 or 1). The kernel's parameters are the number of items, then `args`.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn map(
        &mut self,
        kernel: (&'static str, &'static str),
        mut consts: Consts,
        n: usize,
        args: &[Arg],
    ) -> Result<()> {
        let vec = vector(&[n]);
        consts.push(("VEC", vec.to_string()));
        self.items(kernel, consts, n / vec, 256, args)
    }
}

/// 4 where every one of `widths` is a multiple of four, so that 16 bytes can go at once; else 1.
pub fn vector(widths: &[usize]) -> usize {
    if widths.iter().all(|w| w.is_multiple_of(4)) {
        4
    } else {
        1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traits() -> Traits {
        Traits {
            arch: 80,
            sms: 108,
            max_smem: MAX_SMEM,
        }
    }

    #[test]
    fn parameters_are_aligned_by_their_size() {
        let args = [Arg::U32(1), Arg::In(0).at(3), Arg::F32(1.0), Arg::U64(7)];
        let block = pack(&args, |slot, offset| {
            assert_eq!((slot, offset), (Slot::In(0), 3));
            Ok(0x100 + 4 * offset as u64)
        })
        .unwrap();
        assert_eq!(block.len(), 32);
        assert_eq!(block[..4], 1u32.to_le_bytes());
        assert_eq!(block[8..16], 0x10cu64.to_le_bytes());
        assert_eq!(block[16..20], 1f32.to_le_bytes());
        assert_eq!(block[24..], 7u64.to_le_bytes());
    }

    #[test]
    fn launches_beyond_a_limit_are_refused() {
        let traits = traits();
        let (x, y) = ([Spec::f32([8])], [Spec::f32([8])]);
        let launch = |args: Vec<Arg>, grid, block, smem| {
            let mut cx = CudaCx::new(&traits, Precision::F32, &x, &y, None);
            cx.launch(CudaLaunch {
                source: "t.cu",
                entry: "t",
                consts: vec![],
                args,
                grid,
                block,
                smem,
            })?;
            Ok::<_, Error>(cx.launches.len())
        };
        assert_eq!(launch(vec![Arg::In(0)], [1; 3], [32, 1, 1], 0).unwrap(), 1);
        assert_eq!(launch(vec![], [0, 1, 1], [32, 1, 1], 0).unwrap(), 0);
        assert!(launch(vec![Arg::In(1)], [1; 3], [32, 1, 1], 0).is_err());
        assert!(launch(vec![Arg::In(0).at(9)], [1; 3], [32, 1, 1], 0).is_err());
        assert!(launch(vec![], [1, 70_000, 1], [32, 1, 1], 0).is_err());
        assert!(launch(vec![], [1; 3], [2048, 1, 1], 0).is_err());
        assert!(launch(vec![], [1; 3], [32, 1, 1], 1 << 20).is_err());
        assert!(launch(vec![Arg::U64(0); 600], [1; 3], [32, 1, 1], 0).is_err());
    }
}
