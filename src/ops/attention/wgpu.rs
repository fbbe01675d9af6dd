//! Launches of shaders/attention_lanes.wgsl (software adapters with 8 lanes) and shaders/attention.wgsl (GPUs, and head
//! sizes that are not a multiple of eight).

use super::{Attention, AttentionBwd, Extents};
use crate::backend::wgpu::{Arg, Launch, WgpuCx, fold};
use crate::{Error, Result};

/// Names of the kernel variants; the first stands for the rule in [`lanes`].
pub(super) const VARIANTS: &[&str] = &["auto", "lanes", "tile"];

type Consts = Vec<(&'static str, String)>;

fn set(name: &'static str, value: usize) -> (&'static str, String) {
    (name, value.to_string())
}

/// Constants of shaders/attention.wgsl for a head size: items of four floats where it can be cut so.
fn tile_consts(dim: usize) -> Consts {
    let width = if dim.is_multiple_of(4) { 4 } else { 1 };
    // Two tiles within 12 KB of workgroup memory.
    let tile = (12 * 1024 / (8 * dim)).clamp(1, 16);
    let mut consts = vec![
        set("WIDTH", width),
        set("ITEMS", dim / width),
        set("TILE", tile),
    ];
    if width == 1 {
        for (name, ty) in [("T", "f32"), ("I", "i32"), ("U", "u32")] {
            consts.push((name, ty.into()));
        }
    }
    consts
}

/// The choice between the two kernels.
fn lanes(cx: &WgpuCx, dim: usize) -> Result<bool> {
    let can = cx.traits.lanes8() && dim.is_multiple_of(8) && dim <= 128;
    match cx.variant {
        Some("tile") => Ok(false),
        Some("lanes") if !can => Err(Error::input(format!(
            "the lanes kernel wants an adapter with subgroups of 8 and a head size in eights up to 128, not {dim}"
        ))),
        _ => Ok(can),
    }
}

/// Octets of rows per tile, at most five: few rows beyond the tokens, but many rows for every load. (With more, what the
/// registers cannot hold costs more than loads: 197 tokens take 32.5 ms with five, 34.9 with seven against five.) An octet
/// more must save some 3 % for the time that it takes to compile.
fn octets(tokens: usize) -> usize {
    let cost = |n: usize| tokens.div_ceil(8 * n) * (8 * n * 2 + 24) * (100 + 3 * n);
    (1..=5).min_by_key(|&n| (cost(n), n)).unwrap_or(1)
}

/// A kernel, and its parameters beyond what all of them have: octets and quads of the lane kernels.
struct Kernel {
    shader: &'static str,
    entry: &'static str,
    consts: Consts,
    more: [usize; 2],
}

impl Kernel {
    fn tile(entry: &'static str, dim: usize) -> Self {
        Kernel {
            shader: "attention.wgsl",
            entry,
            consts: tile_consts(dim),
            more: [0; 2],
        }
    }
}

/// Launches over the heads of some images.
struct Heads {
    extents: Extents,
    lanes: bool,
}

impl Heads {
    /// One of the kernels over all queries (or keys): 64 to a workgroup, or for lanes up to five octets. `tiles` is the
    /// number of score tiles that the lane kernel keeps in workgroup memory.
    fn rows(
        &self,
        cx: &mut WgpuCx,
        entry: &'static str,
        images: usize,
        args: Vec<Arg>,
        tiles: usize,
    ) -> Result<()> {
        let Extents { tokens, dim, .. } = self.extents;
        let mut per_group = 64;
        let mut kernel = Kernel::tile(entry, dim);
        if self.lanes {
            let octets = octets(tokens);
            per_group = 8 * octets;
            let shrinks = octets * 32;
            let bytes = octets * octets * 256 * tiles + shrinks;
            let subs = tokens
                .div_ceil(8 * octets)
                .min((cx.traits.workgroup_memory as usize + shrinks) / bytes);
            // The largest even number of quads up to 8 that divides the head.
            let block = (1..=4).rev().find(|b| (dim / 8).is_multiple_of(*b));
            let block = 2 * block.unwrap_or(1);
            let consts = vec![
                set("D4", dim / 4),
                set("QG", octets),
                set("KO", octets),
                set("KQ", 2 * octets),
                set("SUBS", subs.max(1)),
                set("CB", block),
                set("VL", block / 2),
            ];
            kernel = Kernel {
                shader: "attention_lanes.wgsl",
                entry,
                consts,
                more: [octets, block],
            };
        }
        let groups = [
            tokens.div_ceil(per_group) as u32,
            (images * self.extents.heads) as u32,
            1,
        ];
        self.launch(cx, kernel, images, args, groups)
    }

    fn launch(
        &self,
        cx: &mut WgpuCx,
        kernel: Kernel,
        images: usize,
        args: Vec<Arg>,
        groups: [u32; 3],
    ) -> Result<()> {
        let e = self.extents;
        let sizes = [e.tokens, e.heads, images, groups[0] as usize];
        let mut params = sizes.map(|v| v as u32).to_vec();
        params.push(e.scale.to_bits());
        params.extend(kernel.more.map(|v| v as u32));
        cx.launch(Launch {
            shader: kernel.shader,
            entry: kernel.entry,
            consts: kernel.consts,
            args,
            params,
            groups,
        })
    }
}

pub(super) fn forward(op: &Attention, cx: &mut WgpuCx) -> Result<()> {
    let e = Extents::of(&cx.x[0], op.heads, op.scale).map_err(Error::run)?;
    let heads = Heads {
        extents: e,
        lanes: lanes(cx, e.dim)?,
    };
    let width = e.tokens * e.heads * e.dim;
    let rows = e.heads * e.tokens;
    let pairs = if op.probs { rows * e.tokens } else { rows };
    let cuts = cx.cuts(e.images, &[3 * width, width, rows, pairs])?;
    for cut in cuts {
        let qkv = cut.of(Arg::In(0), 3 * width);
        let (out, lse) = (cut.of(Arg::Out(0), width), cut.of(Arg::Out(1), rows));
        let args = vec![qkv, out, lse];
        heads.rows(cx, "forward", cut.rows, args, 1)?;
        if op.probs {
            let probs = cut.of(Arg::Out(2), pairs);
            let groups = [e.tokens.div_ceil(64), e.tokens, cut.rows * e.heads];
            let kernel = Kernel::tile("probabilities", e.dim);
            let args = vec![qkv, out, lse, probs];
            let groups = groups.map(|v| v as u32);
            heads.launch(cx, kernel, cut.rows, args, groups)?;
        }
    }
    Ok(())
}

pub(super) fn backward(op: &AttentionBwd, cx: &mut WgpuCx) -> Result<()> {
    let e = Extents::of(&cx.x[1], op.heads, op.scale).map_err(Error::run)?;
    let heads = Heads {
        extents: e,
        lanes: lanes(cx, e.dim)?,
    };
    let width = e.tokens * e.heads * e.dim;
    let rows = e.heads * e.tokens;
    let cuts = cx.cuts(e.images, &[3 * width, width, rows])?;
    let most = cuts[0].rows;
    let delta = Arg::Work(cx.workspace(most * rows));
    for cut in cuts {
        let dout = cut.of(Arg::In(0), width);
        let qkv = cut.of(Arg::In(1), 3 * width);
        let out = cut.of(Arg::In(2), width);
        let lse = cut.of(Arg::In(3), rows);
        let dqkv = cut.of(Arg::Out(0), 3 * width);
        let args = vec![qkv, out, lse, dout, delta, dqkv];
        let lines = fold(cut.rows * rows, 64);
        let kernel = Kernel::tile("deltas", e.dim);
        heads.launch(cx, kernel, cut.rows, args.clone(), lines)?;
        heads.rows(cx, "backward_q", cut.rows, args.clone(), 1)?;
        heads.rows(cx, "backward_kv", cut.rows, args, 2)?;
    }
    Ok(())
}
