//! Launches of kernels/window_attention.cu.

use super::{WindowAttention, WindowAttentionBwd, Windows};
use crate::backend::cuda::{Arg, Consts, CudaCx, CudaLaunch, Precision, vector};
use crate::{Error, Result};

/// Names of the kernel variants; the first stands for the rule in `Rung::of`.
pub(super) const VARIANTS: &[&str] = &["auto", "plain", "mma"];

/// Rows (queries or keys) of a block.
const ROWS: usize = 64;
/// Threads of a block of the plain kernels, and of those that every rung has.
const THREADS: usize = 64;
/// Threads of a block on tensor cores.
const MMA_THREADS: usize = 128;
/// Bytes of shared memory for the plain kernels' two tiles.
const TILES: usize = 40 * 1024;
/// Parts in which the gradient of the table is summed over the windows, at most.
const PARTS: usize = 32;
/// Widest heads: their vectors lie in registers.
const MAX_DIM: usize = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Rung {
    Plain,
    Mma(Precision),
}

impl Rung {
    /// The rule: float32 on the ordinary units, tf32 and bf16 on tensor cores.
    fn of(cx: &CudaCx) -> Result<Self> {
        match (cx.variant, cx.precision) {
            (Some("plain"), _) | (None | Some("auto"), Precision::F32) => Ok(Rung::Plain),
            (Some("mma"), Precision::F32) => Err(Error::input(
                "the mma kernels compute in tf32 or bf16: ask for one of these precisions, or for plain",
            )),
            (None | Some("auto" | "mma"), precision) => Ok(Rung::Mma(precision)),
            (Some(other), _) => Err(Error::input(format!(
                "no CUDA variant is called {other}; there are {}",
                VARIANTS.join(", ")
            ))),
        }
    }
}

/// A pass over the windows, and how it is launched.
struct Pass {
    g: Windows,
    rung: Rung,
}

impl Pass {
    fn new(op: WindowAttention, cx: &CudaCx, qkv: usize, table: usize) -> Result<Self> {
        let g = Windows::of(op, &cx.x[qkv], &cx.x[table]).map_err(Error::run)?;
        if g.dim > MAX_DIM {
            return Err(Error::input(format!(
                "window attention on cuda takes heads of up to {MAX_DIM} channels, not {}",
                g.dim
            )));
        }
        let rung = Rung::of(cx)?;
        Ok(Pass { g, rung })
    }

    /// The kernels' `Map`, then `more`.
    fn args(&self, more: &[Arg]) -> Vec<Arg> {
        let [y, x] = self.g.op.shift;
        let map = [self.g.op.heads, self.g.h, self.g.w, y, x].map(Arg::n);
        [&map[..], more].concat()
    }

    /// Columns that pass by at once on tensor cores: fewer where dK and dV of wide heads lie in registers beside the
    /// scores.
    fn mma_tile(&self, entry: &str) -> usize {
        if entry == "backward_kv" && self.g.dim > 32 {
            32
        } else {
            64
        }
    }

    fn consts(&self, cx: &CudaCx, entry: &str) -> Consts {
        let set = |name, value: usize| (name, value.to_string());
        let vec = vector(&[self.g.dim]);
        let round = match cx.precision {
            Precision::F32 => 0,
            Precision::Tf32 => 1,
            Precision::Bf16 => 2,
        };
        let mut consts = vec![
            set("VEC", vec),
            set("ITEMS", self.g.dim / vec),
            set("SIDE", self.g.op.side),
            set("ROUND", round),
        ];
        match self.rung {
            Rung::Plain => consts.extend([
                set("RUNG", 0),
                set("TILE", (TILES / (8 * self.g.dim)).clamp(1, self.g.tokens())),
            ]),
            Rung::Mma(precision) => {
                let element = match precision {
                    Precision::Bf16 => "bf16",
                    _ => "float",
                };
                consts.extend([
                    set("RUNG", 1),
                    set("TILE", self.mma_tile(entry)),
                    set("DP", self.g.dim.next_multiple_of(16)),
                    ("ELEMENT", element.into()),
                ]);
            }
        }
        consts
    }

    /// Dynamic shared memory of a tiled kernel: what it knows of the window, two tiles of columns and, where the pass
    /// goes back, four, and the statistics of passing queries.
    fn smem(&self, entry: &str) -> usize {
        let Rung::Mma(precision) = self.rung else {
            return 0;
        };
        let size = if precision == Precision::Bf16 { 2 } else { 4 };
        let tile = self.mma_tile(entry);
        let known =
            4 * self.g.entries().next_multiple_of(4) + 8 * self.g.tokens().next_multiple_of(ROWS);
        let rows = if entry == "forward" { 1 } else { 2 };
        let stats = if entry == "backward_kv" { 8 * tile } else { 0 };
        let pitch = self.g.dim.next_multiple_of(16) * size + 16;
        known.next_multiple_of(16) + (rows * ROWS + 2 * tile) * pitch + stats
    }

    /// Records a kernel that walks over windows.
    fn tiled(
        &self,
        cx: &mut CudaCx,
        entry: &'static str,
        args: Vec<Arg>,
        grid: [usize; 3],
    ) -> Result<()> {
        let threads = match self.rung {
            Rung::Plain => THREADS,
            Rung::Mma(_) => MMA_THREADS,
        };
        cx.launch(CudaLaunch {
            source: "window_attention.cu",
            entry,
            consts: self.consts(cx, entry),
            args,
            grid: grid.map(|n| n as u32),
            block: [threads as u32, 1, 1],
            smem: self.smem(entry) as u32,
        })
    }

    /// Records a kernel that is the same in every rung.
    fn simple(
        &self,
        cx: &mut CudaCx,
        entry: &'static str,
        args: Vec<Arg>,
        blocks: usize,
    ) -> Result<()> {
        cx.launch(CudaLaunch {
            source: "window_attention.cu",
            entry,
            consts: self.consts(cx, "forward"),
            args,
            grid: [blocks as u32, 1, 1],
            block: [THREADS as u32, 1, 1],
            smem: 0,
        })
    }

    /// Windows of all images.
    fn windows(&self) -> usize {
        self.g.images * self.g.per_image()
    }

    /// Blocks of queries or keys for every head of every window.
    fn blocks(&self) -> usize {
        self.g.tokens().div_ceil(ROWS) * self.g.op.heads * self.windows()
    }
}

pub(super) fn forward(op: &WindowAttention, cx: &mut CudaCx) -> Result<()> {
    let pass = Pass::new(*op, cx, 0, 1)?;
    let scale = Arg::F32(pass.g.scale());
    let args = pass.args(&[scale, Arg::In(0), Arg::In(1), Arg::Out(0), Arg::Out(1)]);
    pass.tiled(cx, "forward", args, [pass.blocks(), 1, 1])
}

pub(super) fn backward(op: &WindowAttentionBwd, cx: &mut CudaCx) -> Result<()> {
    let pass = Pass::new(op.fwd, cx, 1, 4)?;
    let (heads, tokens) = (pass.g.op.heads, pass.g.tokens());
    let rows = pass.windows() * heads * tokens;
    let parts = PARTS.min(pass.windows());
    let delta = Arg::Work(cx.workspace(rows));
    let sums = Arg::Work(cx.workspace(parts * heads * tokens.pow(2)));
    let (dout, qkv, out, lse, table) = (Arg::In(0), Arg::In(1), Arg::In(2), Arg::In(3), Arg::In(4));
    let args = pass.args(&[Arg::n(rows), out, dout, delta]);
    pass.simple(cx, "deltas", args, rows.div_ceil(THREADS / 32))?;
    let scale = Arg::F32(pass.g.scale());
    let operands = [qkv, table, lse, dout, delta];
    for entry in ["backward_q", "backward_kv"] {
        let mut args = pass.args(&[scale]);
        args.extend(operands);
        args.push(Arg::Out(0));
        pass.tiled(cx, entry, args, [pass.blocks(), 1, 1])?;
    }
    let mut args = pass.args(&[Arg::n(pass.windows()), scale]);
    args.extend(operands);
    args.push(sums);
    let blocks = match pass.rung {
        Rung::Plain => tokens.pow(2).div_ceil(THREADS),
        Rung::Mma(_) => tokens.div_ceil(ROWS) * tokens.div_ceil(pass.mma_tile("bias_pairs")),
    };
    pass.tiled(cx, "bias_pairs", args, [blocks, heads, parts])?;
    let n = pass.g.entries() * heads;
    let mut args = [n, heads, parts].map(Arg::n).to_vec();
    args.extend([sums, Arg::Out(1)]);
    pass.simple(cx, "bias_table", args, n.div_ceil(THREADS))
}
