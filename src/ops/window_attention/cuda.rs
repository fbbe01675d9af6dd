//! Launches of kernels/window_attention.cu.

use super::{WindowAttention, WindowAttentionBwd, Windows};
use crate::backend::cuda::{Arg, Consts, CudaCx, CudaLaunch, vector};
use crate::{Error, Result};

/// Threads of a block.
const THREADS: usize = 64;
/// Bytes of shared memory for the two tiles.
const TILES: usize = 40 * 1024;
/// Parts in which the gradient of the table is summed over the windows, at most.
const PARTS: usize = 32;

fn consts(g: &Windows) -> Consts {
    let vec = vector(&[g.dim]);
    let tile = (TILES / (8 * g.dim)).clamp(1, g.tokens());
    [
        ("VEC", vec),
        ("ITEMS", g.dim / vec),
        ("TILE", tile),
        ("SIDE", g.op.side),
    ]
    .map(|(k, v)| (k, v.to_string()))
    .to_vec()
}

/// The kernels' `Map`.
fn map(g: &Windows) -> Vec<Arg> {
    let [y, x] = g.op.shift;
    [g.op.heads, g.h, g.w, y, x].map(Arg::n).to_vec()
}

fn launch(
    g: &Windows,
    cx: &mut CudaCx,
    entry: &'static str,
    args: Vec<Arg>,
    grid: [usize; 3],
) -> Result<()> {
    cx.launch(CudaLaunch {
        source: "window_attention.cu",
        entry,
        consts: consts(g),
        args,
        grid: grid.map(|n| n as u32),
        block: [THREADS as u32, 1, 1],
        smem: 0,
    })
}

/// Heads too wide for a thread's registers are refused: Swin's are 32.
fn windows(op: WindowAttention, cx: &CudaCx, qkv: usize, table: usize) -> Result<Windows> {
    let g = Windows::of(op, &cx.x[qkv], &cx.x[table]).map_err(Error::run)?;
    if g.dim > 64 {
        return Err(Error::input(format!(
            "window attention on cuda takes heads of up to 64 channels, not {}",
            g.dim
        )));
    }
    Ok(g)
}

/// Blocks of 64 queries or keys for every head of every window.
fn blocks(g: &Windows) -> usize {
    g.tokens().div_ceil(THREADS) * g.op.heads * g.images * g.per_image()
}

pub(super) fn forward(op: &WindowAttention, cx: &mut CudaCx) -> Result<()> {
    let g = windows(*op, cx, 0, 1)?;
    let mut args = map(&g);
    args.extend([Arg::F32(g.scale()), Arg::In(0), Arg::In(1)]);
    args.extend([Arg::Out(0), Arg::Out(1)]);
    launch(&g, cx, "forward", args, [blocks(&g), 1, 1])
}

pub(super) fn backward(op: &WindowAttentionBwd, cx: &mut CudaCx) -> Result<()> {
    let g = windows(op.fwd, cx, 1, 4)?;
    let (heads, pairs) = (g.op.heads, g.tokens().pow(2));
    let windows = g.images * g.per_image();
    let rows = windows * heads * g.tokens();
    let parts = PARTS.min(windows);
    let delta = Arg::Work(cx.workspace(rows));
    let sums = Arg::Work(cx.workspace(parts * heads * pairs));
    let (dout, qkv, out, lse, table) = (Arg::In(0), Arg::In(1), Arg::In(2), Arg::In(3), Arg::In(4));
    let with = |more: &[Arg]| [&map(&g)[..], more].concat();
    let args = with(&[Arg::n(rows), out, dout, delta]);
    launch(&g, cx, "deltas", args, [rows.div_ceil(THREADS), 1, 1])?;
    let scale = Arg::F32(g.scale());
    let operands = [qkv, table, lse, dout, delta];
    for entry in ["backward_q", "backward_kv"] {
        let mut args = with(&[scale]);
        args.extend(operands);
        args.push(Arg::Out(0));
        launch(&g, cx, entry, args, [blocks(&g), 1, 1])?;
    }
    let mut args = with(&[Arg::n(windows), scale]);
    args.extend(operands);
    args.push(sums);
    let grid = [pairs.div_ceil(THREADS), heads, parts];
    launch(&g, cx, "bias_pairs", args, grid)?;
    let n = g.entries() * heads;
    let mut args = [n, heads, parts].map(Arg::n).to_vec();
    args.extend([sums, Arg::Out(1)]);
    launch(&g, cx, "bias_table", args, [n.div_ceil(THREADS), 1, 1])
}
