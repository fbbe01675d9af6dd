//! Launches of shaders/window_attention.wgsl.

use super::{WindowAttention, WindowAttentionBwd, Windows};
use crate::backend::wgpu::{Arg, Launch, WgpuCx, fold};
use crate::{Error, Result};

/// Parts in which the gradient of the table is summed over the windows, at most.
const PARTS: usize = 8;

/// Constants of the shader for a head and a window.
fn consts(g: &Windows) -> Vec<(&'static str, String)> {
    let width = if g.dim.is_multiple_of(4) { 4 } else { 1 };
    // Two tiles beside the head's part of the table and a tile's statistics, in 15 KB of workgroup memory.
    let room = (15 * 1024usize).saturating_sub(4 * g.entries());
    let most = (room / (8 * g.dim + 8)).clamp(1, 64);
    let tile = g.tokens().div_ceil(g.tokens().div_ceil(most));
    let mut consts = vec![
        ("WIDTH", width.to_string()),
        ("ITEMS", (g.dim / width).to_string()),
        ("TILE", tile.to_string()),
        ("SIDE", g.op.side.to_string()),
    ];
    if width == 1 {
        for (name, ty) in [("T", "f32"), ("I", "i32"), ("U", "u32")] {
            consts.push((name, ty.into()));
        }
    }
    consts
}

/// One launch; `windows` and the part that its sums go to, `parts` and `part`.
fn launch(
    g: &Windows,
    cx: &mut WgpuCx,
    entry: &'static str,
    windows: usize,
    (parts, part): (usize, usize),
    args: Vec<Arg>,
    groups: [u32; 3],
) -> Result<()> {
    let WindowAttention { heads, shift, .. } = g.op;
    let [y, x] = shift;
    let sizes = [
        windows,
        groups[0] as usize,
        heads,
        g.h,
        g.w,
        y,
        x,
        parts,
        part,
    ];
    let mut params = sizes.map(|v| v as u32).to_vec();
    params.push(g.scale().to_bits());
    cx.launch(Launch {
        shader: "window_attention.wgsl",
        entry,
        consts: consts(g),
        args,
        params,
        groups,
    })
}

/// Workgroups of 64 queries or keys for every head of `windows`.
fn groups(g: &Windows, windows: usize) -> [u32; 3] {
    fold(g.tokens().div_ceil(64) * g.op.heads * windows, 1)
}

/// Elements per image of out and of lse.
fn widths(g: &Windows) -> (usize, usize) {
    let rows = g.op.heads * g.h * g.w;
    (rows * g.dim, rows)
}

pub(super) fn forward(op: &WindowAttention, cx: &mut WgpuCx) -> Result<()> {
    let g = Windows::of(*op, &cx.x[0], &cx.x[1]).map_err(Error::run)?;
    let (width, rows) = widths(&g);
    for cut in cx.cuts(g.images, &[3 * width, width, rows])? {
        let qkv = cut.of(Arg::In(0), 3 * width);
        let (out, lse) = (cut.of(Arg::Out(0), width), cut.of(Arg::Out(1), rows));
        let windows = cut.rows * g.per_image();
        let args = vec![qkv, Arg::In(1), out, lse];
        let groups = groups(&g, windows);
        launch(&g, cx, "forward", windows, (0, 0), args, groups)?;
    }
    Ok(())
}

pub(super) fn backward(op: &WindowAttentionBwd, cx: &mut WgpuCx) -> Result<()> {
    let g = Windows::of(op.fwd, &cx.x[1], &cx.x[4]).map_err(Error::run)?;
    let (width, rows) = widths(&g);
    let (heads, pairs) = (g.op.heads, g.tokens().pow(2));
    let cuts = cx.cuts(g.images, &[3 * width, width, rows])?;
    let delta = Arg::Work(cx.workspace(cuts[0].rows * rows));
    // Few enough parts that their sums fit one binding.
    let fit = cx.max_elements() / (cuts.len() * heads * pairs).max(1);
    let each = PARTS.min(fit).min(cuts[0].rows * g.per_image()).max(1);
    let parts = each * cuts.len();
    let sums = Arg::Work(cx.workspace(parts * heads * pairs));
    for (c, cut) in cuts.iter().enumerate() {
        let dout = cut.of(Arg::In(0), width);
        let qkv = cut.of(Arg::In(1), 3 * width);
        let out = cut.of(Arg::In(2), width);
        let lse = cut.of(Arg::In(3), rows);
        let dqkv = cut.of(Arg::Out(0), 3 * width);
        let windows = cut.rows * g.per_image();
        let part = (each, c * each);
        let mut args = vec![qkv, Arg::In(4), out, lse, dout, delta, dqkv];
        let lines = fold(cut.rows * rows, 64);
        launch(&g, cx, "deltas", windows, part, args.clone(), lines)?;
        let all = groups(&g, windows);
        launch(&g, cx, "backward_q", windows, part, args.clone(), all)?;
        launch(&g, cx, "backward_kv", windows, part, args.clone(), all)?;
        args[6] = sums;
        let all = [pairs.div_ceil(64) as u32, heads as u32, each as u32];
        launch(&g, cx, "bias_pairs", windows, part, args, all)?;
    }
    let args = vec![sums, Arg::Out(1)];
    let entries = fold(g.entries() * heads, 64);
    launch(&g, cx, "bias_table", 0, (parts, 0), args, entries)
}
