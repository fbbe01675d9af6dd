//! Launches of kernels/attention.cu.

use super::{Attention, AttentionBwd, Extents};
use crate::backend::cuda::{Arg, Consts, CudaCx, CudaLaunch, Precision, vector};
use crate::{Error, Result};

/// Names of the kernel variants; the first stands for the rule in `Heads::new`.
pub(super) const VARIANTS: &[&str] = &["auto", "naive", "simt", "mma"];

/// Largest head size of the tiled kernels: with more, tiles do not fit in shared memory.
const MAX_TILED: usize = 128;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Rung {
    Naive,
    Simt,
    Mma(Precision),
}

struct Heads {
    e: Extents,
    rung: Rung,
}

impl Heads {
    /// The rule: float32 on the ordinary units, tf32 and bf16 on tensor cores, heads over 128 channels by a warp a row.
    fn new(cx: &CudaCx, e: Extents) -> Result<Self> {
        let tiled = e.dim <= MAX_TILED;
        let rung = match (cx.variant, cx.precision) {
            (Some("naive"), _) => Rung::Naive,
            (None | Some("auto"), _) if !tiled => Rung::Naive,
            (Some("simt" | "mma"), _) if !tiled => {
                return Err(Error::input(format!(
                    "the tiled attention kernels take heads of at most {MAX_TILED} channels, these have {}: use naive",
                    e.dim
                )));
            }
            (Some("mma"), Precision::F32) => {
                return Err(Error::input(
                    "the mma kernels compute in tf32 or bf16: ask for one of these precisions, or for simt",
                ));
            }
            (Some("simt"), _) | (None | Some("auto"), Precision::F32) => Rung::Simt,
            (None | Some("auto" | "mma"), precision) => Rung::Mma(precision),
            (Some(other), _) => {
                return Err(Error::input(format!(
                    "no CUDA variant is called {other}; there are {}",
                    VARIANTS.join(", ")
                )));
            }
        };
        Ok(Heads { e, rung })
    }

    /// The head size as tiles hold it.
    fn padded(&self) -> usize {
        self.e.dim.next_multiple_of(16)
    }

    fn rows(&self) -> usize {
        self.e.images * self.e.heads * self.e.tokens
    }

    /// Records a kernel over blocks of `block` rows with tiles of `tile` columns; `tiles` and `score` say how many
    /// tiles of rows and of columns it holds, and whether probabilities pass through shared memory.
    fn launch(
        &self,
        cx: &mut CudaCx,
        entry: &'static str,
        mut args: Vec<Arg>,
        [block, tile]: [usize; 2],
        [row_tiles, column_tiles]: [usize; 2],
    ) -> Result<()> {
        let e = self.e;
        let set = |name, value: usize| (name, value.to_string());
        let mut consts: Consts = vec![
            set("D", e.dim),
            set("DP", self.padded()),
            set("VEC", vector(&[e.dim])),
            set("TILE", tile),
            set("BLOCK", block),
        ];
        let round = match cx.precision {
            Precision::F32 => 0,
            Precision::Tf32 => 1,
            Precision::Bf16 => 2,
        };
        consts.push(set("ROUND", round));
        let lines = row_tiles * block + column_tiles * tile;
        // lse and delta of the queries that pass by.
        let stats = if entry == "attention_dkv" {
            8 * tile
        } else {
            0
        };
        let pitch = |size: usize| self.padded() * size + 16;
        let (rung, threads, smem) = match self.rung {
            Rung::Naive => (0, 128, 0),
            Rung::Simt => (1, 256, lines * pitch(4) + block * (tile + 16) * 4 + stats),
            Rung::Mma(precision) => {
                let (element, size) = if precision == Precision::Bf16 {
                    ("bf16", 2)
                } else {
                    ("float", 4)
                };
                consts.push(("ELEMENT", element.into()));
                (2, 128, lines * pitch(size) + stats)
            }
        };
        consts.push(set("RUNG", rung));
        let blocks = if rung == 0 {
            self.rows().div_ceil(4)
        } else {
            e.images * e.heads * e.tokens.div_ceil(block)
        };
        args.extend([e.tokens, e.heads, self.rows()].map(Arg::n));
        args.push(Arg::F32(e.scale));
        cx.launch(CudaLaunch {
            source: "attention.cu",
            entry,
            consts,
            args,
            grid: [blocks as u32, 1, 1],
            block: [threads, 1, 1],
            smem: smem as u32,
        })
    }

    /// Rows of a block and columns of a tile of the forward kernels: what fits in shared memory.
    fn forward_tile(&self) -> [usize; 2] {
        let wide = self.rung == Rung::Simt && self.padded() > 64;
        [64, if wide { 32 } else { 64 }]
    }

    /// The same of the backward kernels; tensor-core kernels hold dK and dV in registers beside the scores.
    fn backward_tile(&self, keys: bool) -> [usize; 2] {
        let wide = self.padded() > 64;
        match self.rung {
            Rung::Mma(_) => [64, if wide || keys { 32 } else { 64 }],
            _ if wide => [32, 32],
            _ => [64, 64],
        }
    }
}

pub(super) fn forward(op: &Attention, cx: &mut CudaCx) -> Result<()> {
    let e = Extents::of(&cx.x[0], op.heads, op.scale).map_err(Error::run)?;
    let heads = Heads::new(cx, e)?;
    let (qkv, lse) = (Arg::In(0), Arg::Out(1));
    let args = vec![qkv, Arg::Out(0), lse];
    heads.launch(cx, "attention_forward", args, heads.forward_tile(), [1, 2])?;
    if !op.probs {
        return Ok(());
    }
    // For looking at, not for speed: no tensor cores in any precision.
    let exact = Heads {
        rung: if heads.rung == Rung::Naive {
            Rung::Naive
        } else {
            Rung::Simt
        },
        ..heads
    };
    let args = vec![qkv, lse, Arg::Out(2)];
    exact.launch(cx, "attention_probs", args, exact.forward_tile(), [1, 1])
}

pub(super) fn backward(op: &AttentionBwd, cx: &mut CudaCx) -> Result<()> {
    let e = Extents::of(&cx.x[1], op.heads, op.scale).map_err(Error::run)?;
    let heads = Heads::new(cx, e)?;
    let (dout, qkv, out, lse) = (Arg::In(0), Arg::In(1), Arg::In(2), Arg::In(3));
    let delta = Arg::Work(cx.workspace(heads.rows()));
    // A warp a row, in every rung.
    let rows = Heads {
        rung: Rung::Naive,
        ..heads
    };
    rows.launch(
        cx,
        "attention_deltas",
        vec![dout, out, delta],
        [64, 64],
        [0, 0],
    )?;
    for (entry, keys) in [("attention_dq", false), ("attention_dkv", true)] {
        let args = vec![qkv, dout, lse, delta, Arg::Out(0)];
        heads.launch(cx, entry, args, heads.backward_tile(keys), [2, 2])?;
    }
    Ok(())
}
