//! Launches of shaders/attention.wgsl.

use super::{Attention, AttentionBwd, Extents};
use crate::backend::wgpu::{Arg, Launch, WgpuCx, fold};
use crate::{Error, Result};

/// Names of the kernel variants.
pub(super) const VARIANTS: &[&str] = &["auto"];

/// Constants of the shader for a head size: items of four floats where it can be cut so.
fn consts(dim: usize) -> Vec<(&'static str, String)> {
    let width = if dim.is_multiple_of(4) { 4 } else { 1 };
    // Two tiles within 12 KB of workgroup memory.
    let tile = (12 * 1024 / (8 * dim)).clamp(1, 16);
    let mut consts = vec![
        ("WIDTH", width.to_string()),
        ("ITEMS", (dim / width).to_string()),
        ("TILE", tile.to_string()),
    ];
    if width == 1 {
        for (name, ty) in [("T", "f32"), ("I", "i32"), ("U", "u32")] {
            consts.push((name, ty.into()));
        }
    }
    consts
}

struct Heads {
    extents: Extents,
    consts: Vec<(&'static str, String)>,
}

impl Heads {
    fn new(extents: Extents) -> Self {
        let consts = consts(extents.dim);
        Heads { extents, consts }
    }

    fn launch(
        &self,
        cx: &mut WgpuCx,
        entry: &'static str,
        images: usize,
        args: Vec<Arg>,
        groups: [u32; 3],
    ) -> Result<()> {
        let e = self.extents;
        let sizes = [e.tokens, e.heads, images, groups[0] as usize];
        let mut params = sizes.map(|v| v as u32).to_vec();
        params.push(e.scale.to_bits());
        cx.launch(Launch {
            shader: "attention.wgsl",
            entry,
            consts: self.consts.clone(),
            args,
            params,
            groups,
        })
    }

    /// Workgroups of 64 queries or keys for every head of `images`.
    fn groups(&self, images: usize) -> [u32; 3] {
        let e = self.extents;
        [e.tokens.div_ceil(64) as u32, (images * e.heads) as u32, 1]
    }
}

pub(super) fn forward(op: &Attention, cx: &mut WgpuCx) -> Result<()> {
    let e = Extents::of(&cx.x[0], op.heads, op.scale).map_err(Error::run)?;
    let heads = Heads::new(e);
    let width = e.tokens * e.heads * e.dim;
    let rows = e.heads * e.tokens;
    let pairs = if op.probs { rows * e.tokens } else { 1 };
    for cut in cx.cuts(e.images, &[3 * width, width, rows, pairs])? {
        let qkv = cut.of(Arg::In(0), 3 * width);
        let (out, lse) = (cut.of(Arg::Out(0), width), cut.of(Arg::Out(1), rows));
        let groups = heads.groups(cut.rows);
        heads.launch(cx, "forward", cut.rows, vec![qkv, out, lse], groups)?;
        if op.probs {
            let probs = cut.of(Arg::Out(2), pairs);
            let groups = [groups[0], e.tokens as u32, groups[1]];
            let args = vec![qkv, out, lse, probs];
            heads.launch(cx, "probabilities", cut.rows, args, groups)?;
        }
    }
    Ok(())
}

pub(super) fn backward(op: &AttentionBwd, cx: &mut WgpuCx) -> Result<()> {
    let e = Extents::of(&cx.x[1], op.heads, op.scale).map_err(Error::run)?;
    let heads = Heads::new(e);
    let width = e.tokens * e.heads * e.dim;
    let rows = e.heads * e.tokens;
    let cuts = cx.cuts(e.images, &[3 * width, width, rows])?;
    let delta = Arg::Work(cx.workspace(cuts[0].rows * rows));
    for cut in cuts {
        let dout = cut.of(Arg::In(0), width);
        let qkv = cut.of(Arg::In(1), 3 * width);
        let out = cut.of(Arg::In(2), width);
        let lse = cut.of(Arg::In(3), rows);
        let dqkv = cut.of(Arg::Out(0), 3 * width);
        let args = vec![qkv, out, lse, dout, delta, dqkv];
        let lines = fold(cut.rows * rows, 64);
        heads.launch(cx, "deltas", cut.rows, args.clone(), lines)?;
        let groups = heads.groups(cut.rows);
        heads.launch(cx, "backward_q", cut.rows, args.clone(), groups)?;
        heads.launch(cx, "backward_kv", cut.rows, args, groups)?;
    }
    Ok(())
}
