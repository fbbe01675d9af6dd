//! Launches of shaders/gemm_lanes.wgsl and shaders/gemm_tile.wgsl, for convolution and, as the 1x1 convolution over
//! rows, for linear.

use super::ConvShape;
use crate::backend::wgpu::launch::MAX_GROUPS;
use crate::backend::wgpu::{Arg, Launch, WgpuCx, fold};
use crate::ops::act::Act;
use crate::{Error, Result};

/// Names of the kernel variants; the first stands for the rule in `lanes`.
pub const VARIANTS: &[&str] = &["auto", "lanes", "tile"];

/// Those of wgrad; `panels`: lanes, with operands brought together first.
pub const WGRAD_VARIANTS: &[&str] = &["auto", "lanes", "tile", "panels"];

/// What happens to a sum before it is stored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue {
    /// Bias `[K]`.
    pub bias: Option<Arg>,
    /// Residual, or a gradient to add to: as the result.
    pub addend: Option<Arg>,
    /// Also gets the value before the activation.
    pub pre: Option<Arg>,
    /// [`Act::code`](crate::ops::act::Act::code); 0 is none.
    pub act: u32,
}

/// The choice between the two kernels: lanes on adapters that are a CPU's 8-lane SIMD unit, where the shape allows.
fn lanes(cx: &WgpuCx, fits: bool) -> Result<bool> {
    match cx.variant {
        Some("tile") => Ok(false),
        Some("lanes" | "panels") if !(cx.traits.lanes8() && fits) => Err(Error::input(
            "the lanes kernel wants an adapter with subgroups of 8, and the channels of each group in fours",
        )),
        _ => Ok(cx.traits.lanes8() && fits),
    }
}

/// The uniform block of shaders/gemm.wgsl, in its order.
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
struct Block {
    n: u32,
    h: u32,
    w: u32,
    c: u32,
    p: u32,
    q: u32,
    k: u32,
    r: u32,
    s: u32,
    sh: u32,
    sw: u32,
    ph: u32,
    pw: u32,
    ct: u32,
    kt: u32,
    rows: u32,
    groups_x: u32,
    tiles: u32,
    flags: u32,
    act: u32,
    cy: u32,
    cx: u32,
    hc: u32,
    wc: u32,
    r0: u32,
    s0: u32,
    oy: i32,
    ox: i32,
    pixels: u32,
    per_split: u32,
    k_tiles: u32,
    part0: u32,
    eights: u32,
    quads: u32,
    x_panel: u32,
    x_pixel: u32,
    dy_panel: u32,
    dy_pixel: u32,
}

impl Block {
    fn new(s: &ConvShape, images: usize) -> Self {
        Block {
            n: images as u32,
            h: s.h as u32,
            w: s.w as u32,
            c: s.cg() as u32,
            p: s.ho as u32,
            q: s.wo as u32,
            k: s.kg() as u32,
            r: s.r as u32,
            s: s.s as u32,
            sh: s.stride[0] as u32,
            sw: s.stride[1] as u32,
            ph: s.pad[0] as u32,
            pw: s.pad[1] as u32,
            ct: s.c as u32,
            kt: s.k as u32,
            ..Default::default()
        }
    }

    fn words(&self) -> Vec<u32> {
        bytemuck::cast_slice(std::slice::from_ref(self)).to_vec()
    }
}

/// A matrix product as a convolution over single pixels, so that rows can be cut anywhere.
fn flat(s: &ConvShape) -> ConvShape {
    if !s.is_matrix_product() {
        return *s;
    }
    ConvShape {
        n: s.n * s.h * s.w,
        h: 1,
        w: 1,
        ho: 1,
        wo: 1,
        ..*s
    }
}

fn cut(arg: Arg, whole: bool, start: usize, len: usize) -> Arg {
    if whole { arg } else { arg.part(start, len) }
}

fn set(name: &'static str, value: usize) -> (&'static str, String) {
    (name, value.to_string())
}

/// Register tile of the lane kernels: octets of rows by quads of columns; narrow results get tall tiles.
fn lane_tile(columns: usize) -> (usize, usize, Vec<(&'static str, String)>) {
    if columns <= 16 {
        return (8, 4, vec![set("RG", 8), set("CQ", 4), set("CO", 2)]);
    }
    (4, 8, vec![])
}

/// Writes `rows` rows of `from` elements as rows of `to`: cut off, or with zeros behind.
fn repitch(cx: &mut WgpuCx, x: Arg, y: Arg, rows: usize, from: usize, to: usize) -> Result<()> {
    let groups = fold(rows * to, 64);
    let mut params = [0; 8];
    params[0] = (rows * to) as u32;
    params[1] = groups[0];
    params[4] = from as u32;
    params[5] = to as u32;
    cx.launch(Launch {
        shader: "reduce.wgsl",
        entry: "repitch",
        consts: vec![],
        args: vec![x, y],
        params: params.to_vec(),
        groups,
    })
}

/// A copy of `x` in the workspace, `rows` rows of `from` elements as rows of `to`.
fn repitched(cx: &mut WgpuCx, x: Arg, rows: usize, from: usize, to: usize) -> Result<Arg> {
    let y = Arg::Work(cx.workspace(rows * to));
    repitch(cx, x, y, rows, from, to)?;
    Ok(y)
}

/// Weights `[K, R, S, C]` of `real` with the channels of `s`, zeros behind.
fn padded_weights(cx: &mut WgpuCx, w: Arg, real: &ConvShape, s: &ConvShape) -> Result<Arg> {
    let mut w = w;
    if s.c != real.c {
        w = repitched(cx, w, real.k * s.r * s.s, real.c, s.c)?;
    }
    if s.k != real.k {
        let row = s.r * s.s * s.c;
        w = repitched(cx, w, 1, real.k * row, s.k * row)?;
    }
    Ok(w)
}

/// The shape that is computed: for the lane kernels channels of one group in fours (the three of an image, the ten
/// classes of a head), so that other shapes need no kernel of their own.
fn computed(s: &ConvShape, lanes: bool) -> ConvShape {
    if !lanes || s.groups > 1 {
        return *s;
    }
    ConvShape {
        c: s.c.next_multiple_of(4),
        k: s.k.next_multiple_of(4),
        ..*s
    }
}

/// Cuts the images for several launches, where `real` and what is computed of it have other pitches: see
/// [`WgpuCx::chunks`].
fn images(cx: &WgpuCx, real: &ConvShape, s: &ConvShape) -> Result<Vec<(usize, usize)>> {
    let (pixels_in, pixels_out) = (s.h * s.w, s.ho * s.wo);
    let widths = [
        pixels_in * s.c,
        pixels_in * real.c,
        pixels_out * s.k,
        pixels_out * real.k,
    ];
    cx.chunks(s.n, &widths)
}

/// Whether the lane kernels take `s`: its channels in fours, or padded to that.
fn fits(s: &ConvShape) -> bool {
    s.groups == 1 || s.cg().is_multiple_of(4) && s.kg().is_multiple_of(4)
}

/// Room for an operand of wgrad by panels of so many quads, as shaders/gemm_lanes.wgsl has them; none where it stays as
/// it is.
#[derive(Clone, Copy)]
struct Panels(Option<Arg>, usize);

impl Panels {
    /// Bytes of both operands from which on it pays to bring them together (found by trying: half the time from 6 MB on,
    /// a tenth more below 5 MB; the second-level TLB of the CPU that it was tried on reaches 8 MB).
    const LEAST: usize = 5 << 20;
    /// The same for how often an operand is read times its width in elements: few reads of few panels do not pay.
    const LEAST_READ: usize = 1024;

    fn new(cx: &mut WgpuCx, wanted: bool, pixels: usize, width: usize, quads: usize) -> Self {
        let elements = pixels * width.next_multiple_of(4 * quads);
        let wanted = wanted && elements <= cx.max_elements();
        Panels(wanted.then(|| Arg::Work(cx.workspace(elements))), quads)
    }

    /// `x` `[pixels, width]` as the kernel is to read it, and the strides of panel and pixel in quads.
    fn bring(
        self,
        cx: &mut WgpuCx,
        x: Arg,
        pixels: usize,
        width: usize,
    ) -> Result<(Arg, [u32; 2])> {
        let Panels(room, quads) = self;
        let Some(room) = room else {
            return Ok((x, [quads, width / 4].map(|v| v as u32)));
        };
        let n = pixels * width.div_ceil(4 * quads) * quads;
        let groups = fold(n, 64);
        let block = Block {
            n: n as u32,
            groups_x: groups[0],
            pixels: pixels as u32,
            c: (width / 4) as u32,
            k: quads as u32,
            ..Block::default()
        };
        cx.launch(Launch {
            shader: "gemm_lanes.wgsl",
            entry: "panels",
            consts: vec![],
            args: vec![x, room],
            params: block.words(),
            groups,
        })?;
        Ok((room, [pixels * quads, quads].map(|v| v as u32)))
    }
}

/// `y = act(x * w + bias + addend)`.
///
/// # Errors
/// The shapes are beyond the adapter's limits.
pub fn fprop(cx: &mut WgpuCx, s: &ConvShape, x: Arg, w: Arg, y: Arg, ep: Epilogue) -> Result<()> {
    let real = flat(s);
    let lanes = lanes(cx, fits(&real))?;
    let s = computed(&real, lanes);
    let (pixels_in, pixels_out) = (s.h * s.w, s.ho * s.wo);
    let chunks = images(cx, &real, &s)?;
    let whole = chunks.len() == 1;
    let most = chunks[0].1;
    let w = padded_weights(cx, w, &real, &s)?;
    let widened = s.k != real.k;
    let bias = match ep.bias {
        Some(b) if widened => Some(repitched(cx, b, 1, real.k, s.k)?),
        b => b,
    };
    // Room for what has another pitch here than outside.
    let xp = (s.c != real.c).then(|| Arg::Work(cx.workspace(most * pixels_in * s.c)));
    let mut room = |wanted: bool| {
        (wanted && widened).then(|| Arg::Work(cx.workspace(most * pixels_out * s.k)))
    };
    let (yp, addp, prep) = (
        room(true),
        room(ep.addend.is_some()),
        room(ep.pre.is_some()),
    );
    for (n0, n) in chunks {
        let (rows_in, rows_out) = (n * pixels_in, n * pixels_out);
        let mut x = cut(x, whole, n0 * pixels_in * real.c, rows_in * real.c);
        if let Some(xp) = xp {
            repitch(cx, x, xp, rows_in, real.c, s.c)?;
            x = xp;
        }
        let result = |a: Arg| cut(a, whole, n0 * pixels_out * real.k, rows_out * real.k);
        let (y, mut addend, pre) = (result(y), ep.addend.map(result), ep.pre.map(result));
        if let (Some(a), Some(wide)) = (addend, addp) {
            repitch(cx, a, wide, rows_out, real.k, s.k)?;
            addend = addp;
        }
        let mut block = Block::new(&s, n);
        block.rows = rows_out as u32;
        block.act = ep.act;
        block.flags = u32::from(bias.is_some())
            + 2 * u32::from(addend.is_some())
            + 4 * u32::from(pre.is_some());
        let out = yp.unwrap_or(y);
        let args = vec![
            x,
            w,
            out,
            bias.unwrap_or(out),
            addend.unwrap_or(out),
            prep.or(pre).unwrap_or(out),
        ];
        multiply(cx, &s, lanes, ("fprop", 0), block, s.kg(), args)?;
        for (wide, to) in [(yp, Some(y)), (prep, pre)] {
            if let (Some(wide), Some(to)) = (wide, to) {
                repitch(cx, wide, to, rows_out, s.k, real.k)?;
            }
        }
    }
    Ok(())
}

/// One launch of fprop or dgrad: row tiles in x and y, column tiles of each group in z.
fn multiply(
    cx: &mut WgpuCx,
    s: &ConvShape,
    lanes: bool,
    (entry, mode): (&'static str, usize),
    mut block: Block,
    columns: usize,
    args: Vec<Arg>,
) -> Result<()> {
    let rows = block.rows as usize;
    let (octets, quads, consts) = lane_tile(columns);
    let (tile_rows, tile_columns) = if lanes {
        (octets * 8, quads * 4)
    } else {
        (64, 64)
    };
    let tiles = columns.div_ceil(tile_columns);
    let mut groups = fold(rows, tile_rows);
    groups[2] = (tiles * s.groups) as u32;
    block.groups_x = groups[0];
    block.tiles = tiles as u32;
    block.eights = octets as u32;
    block.quads = quads as u32;
    let (shader, entry, consts) = if lanes {
        let mut consts = consts;
        if block.act > Act::Relu.code() {
            consts.push(set("SMOOTH", 1));
        }
        ("gemm_lanes.wgsl", entry, consts)
    } else {
        ("gemm_tile.wgsl", "tile", vec![set("MODE", mode)])
    };
    cx.launch(Launch {
        shader,
        entry,
        consts,
        args,
        params: block.words(),
        groups,
    })
}

/// `dx = dy * w (+ addend)`. With a stride, input pixels fall into classes that different taps reach; each class is a
/// launch of its own, so that no multiply-add is spent on taps that do not meet the pixel.
///
/// # Errors
/// The shapes are beyond the adapter's limits.
pub fn dgrad(
    cx: &mut WgpuCx,
    s: &ConvShape,
    dy: Arg,
    w: Arg,
    dx: Arg,
    addend: Option<Arg>,
) -> Result<()> {
    let real = flat(s);
    let lanes = lanes(cx, fits(&real))?;
    let s = computed(&real, lanes);
    let (pixels_in, pixels_out) = (s.h * s.w, s.ho * s.wo);
    let chunks = images(cx, &real, &s)?;
    let whole = chunks.len() == 1;
    let most = chunks[0].1;
    let w = padded_weights(cx, w, &real, &s)?;
    let dyp = (s.k != real.k).then(|| Arg::Work(cx.workspace(most * pixels_out * s.k)));
    let dxp = (s.c != real.c).then(|| Arg::Work(cx.workspace(most * pixels_in * s.c)));
    let addp = addend
        .filter(|_| s.c != real.c)
        .map(|_| Arg::Work(cx.workspace(most * pixels_in * s.c)));
    for (n0, n) in chunks {
        let mut dy = cut(dy, whole, n0 * pixels_out * real.k, n * pixels_out * real.k);
        if let Some(dyp) = dyp {
            repitch(cx, dy, dyp, n * pixels_out, real.k, s.k)?;
            dy = dyp;
        }
        let image = |a: Arg| {
            let (from, len) = (n0 * pixels_in * real.c, n * pixels_in * real.c);
            cut(a, whole, from, len)
        };
        let result = image(dx);
        let dx = dxp.unwrap_or(result);
        let mut add = addend.map_or(dx, image);
        if let Some(addp) = addp {
            repitch(cx, add, addp, n * pixels_in, real.c, s.c)?;
            add = addp;
        }
        for cy in 0..s.stride[0].min(s.h) {
            for cx_ in 0..s.stride[1].min(s.w) {
                let (hc, wc) = (
                    (s.h - cy).div_ceil(s.stride[0]),
                    (s.w - cx_).div_ceil(s.stride[1]),
                );
                let first = |at: usize, axis: usize| (at + s.pad[axis]) % s.stride[axis];
                let (r0, s0) = (first(cy, 0), first(cx_, 1));
                let mut block = Block::new(&s, n);
                block.rows = (n * hc * wc) as u32;
                block.flags = 2 * u32::from(addend.is_some());
                block.cy = cy as u32;
                block.cx = cx_ as u32;
                block.hc = hc as u32;
                block.wc = wc as u32;
                block.r0 = r0 as u32;
                block.s0 = s0 as u32;
                block.oy = ((cy + s.pad[0] - r0) / s.stride[0]) as i32;
                block.ox = ((cx_ + s.pad[1] - s0) / s.stride[1]) as i32;
                let args = vec![dy, w, dx, dx, add, dx];
                multiply(cx, &s, lanes, ("dgrad", 1), block, s.cg(), args)?;
            }
        }
        if let Some(dxp) = dxp {
            repitch(cx, dxp, result, n * pixels_in, s.c, real.c)?;
        }
    }
    Ok(())
}

/// Lines that the lane kernel cuts a plain list of rows into.
const LINE: usize = 64;

/// `dw = dy^T * x`: the sum over pixels is split over workgroups, and the parts added in order.
///
/// # Errors
/// The shapes are beyond the adapter's limits.
pub fn wgrad(cx: &mut WgpuCx, s: &ConvShape, x: Arg, dy: Arg, dw: Arg) -> Result<()> {
    let real = flat(s);
    let lanes = lanes(cx, fits(&real))?;
    let s = computed(&real, lanes);
    let pad = s.c != real.c;
    let (pixels_in, pixels_out) = (s.h * s.w, s.ho * s.wo);
    let chunks = images(cx, &real, &s)?;
    let whole = chunks.len() == 1;
    let columns = s.r * s.s * s.cg();
    let (k_tile, column_tile, consts) = match (lanes, s.kg() <= 16) {
        (true, true) => (16, 64, vec![set("CQ", 4), set("CO", 2), set("NC", 2)]),
        (true, false) => (32, 32, vec![]),
        (false, _) => (64, 64, vec![set("MODE", 2)]),
    };
    let (k_tiles, column_tiles) = (s.kg().div_ceil(k_tile), columns.div_ceil(column_tile));
    let tasks = k_tiles * column_tiles * s.groups;
    // Units of the sum: lines of output pixels for the lane kernel, pixels for the tile kernel.
    let is_flat = s.is_matrix_product();
    let units = |n: usize| match (lanes, is_flat) {
        (true, true) => n.div_ceil(LINE),
        (true, false) => n * s.ho,
        (false, _) => n * pixels_out,
    };
    let (wanted, least) = if lanes { (32, 1) } else { (512, 256) };
    let most = (cx.max_elements() / (s.k * columns) / chunks.len()).clamp(1, MAX_GROUPS as usize);
    let split = |n: usize| {
        let splits = (wanted / tasks)
            .clamp(1, units(n).div_ceil(least))
            .min(most);
        let per = units(n).div_ceil(splits);
        (units(n).div_ceil(per), per)
    };
    let parts: usize = chunks.iter().map(|&(_, n)| split(n).0).sum();
    let direct = parts == 1 && s.k == real.k && !pad;
    let out = if direct {
        dw
    } else {
        Arg::Work(cx.workspace(parts * s.k * columns))
    };
    let xp = pad.then(|| Arg::Work(cx.workspace(chunks[0].1 * pixels_in * s.c)));
    let most = chunks[0].1;
    let dyp = (s.k != real.k).then(|| Arg::Work(cx.workspace(most * pixels_out * s.k)));
    let apart = 4 * most * (pixels_in * s.c + pixels_out * s.k) >= Panels::LEAST;
    let variant = cx.variant;
    let pays = |readers: usize, width: usize| match variant {
        Some(name) => name == "panels",
        None => lanes && apart && readers * width >= Panels::LEAST_READ,
    };
    let wanted = pays(k_tiles * s.r * s.s, s.c);
    let x_panels = Panels::new(cx, wanted, most * pixels_in, s.c, 8);
    let wanted = pays(column_tiles, s.k);
    let dy_panels = Panels::new(cx, wanted, most * pixels_out, s.k, k_tile / 4);
    let mut part0 = 0;
    for (n0, n) in chunks {
        let mut x = cut(x, whole, n0 * pixels_in * real.c, n * pixels_in * real.c);
        if let Some(xp) = xp {
            repitch(cx, x, xp, n * pixels_in, real.c, s.c)?;
            x = xp;
        }
        let mut dy = cut(dy, whole, n0 * pixels_out * real.k, n * pixels_out * real.k);
        if let Some(dyp) = dyp {
            repitch(cx, dy, dyp, n * pixels_out, real.k, s.k)?;
            dy = dyp;
        }
        let (splits, per_split) = split(n);
        let mut block = Block::new(&s, n);
        if lanes && is_flat {
            block = Block {
                n: n.div_ceil(LINE) as u32,
                w: LINE as u32,
                q: LINE as u32,
                ..block
            };
        }
        let (x, [x_panel, x_pixel]) = x_panels.bring(cx, x, n * pixels_in, s.c)?;
        let (dy, [dy_panel, dy_pixel]) = dy_panels.bring(cx, dy, n * pixels_out, s.k)?;
        block = Block {
            x_panel,
            x_pixel,
            dy_panel,
            dy_pixel,
            ..block
        };
        block.pixels = (n * pixels_out) as u32;
        block.per_split = per_split as u32;
        block.k_tiles = k_tiles as u32;
        block.part0 = part0 as u32;
        block.quads = (k_tile / 4) as u32;
        let (shader, entry, args) = if lanes {
            ("gemm_lanes.wgsl", "wgrad", vec![x, dy, out])
        } else {
            ("gemm_tile.wgsl", "tile", vec![x, dy, out, out, out, out])
        };
        cx.launch(Launch {
            shader,
            entry,
            consts: consts.clone(),
            args,
            params: block.words(),
            groups: [
                column_tiles as u32,
                (k_tiles * s.groups) as u32,
                splits as u32,
            ],
        })?;
        part0 += splits;
    }
    if direct {
        return Ok(());
    }
    cx.sum_padded(
        out,
        dw,
        parts,
        s.k * columns,
        real.weight_len(),
        (real.cg(), s.cg()),
    )
}

/// Sums of the columns of `x` `[rows, columns]` (a bias's gradient): parts of the rows first, then the parts in order.
///
/// # Errors
/// The shapes are beyond the adapter's limits.
pub fn column_sums(cx: &mut WgpuCx, x: Arg, y: Arg, rows: usize, columns: usize) -> Result<()> {
    let chunks = cx.chunks(rows, &[columns])?;
    let whole = chunks.len() == 1;
    let per = |n: usize| n.div_ceil(64).max(32);
    let parts: usize = chunks.iter().map(|&(_, n)| n.div_ceil(per(n))).sum();
    let work = Arg::Work(cx.workspace(parts * columns));
    let mut part0 = 0;
    for (r0, n) in chunks {
        let here = n.div_ceil(per(n));
        let params = [columns, 0, part0, 0, 0, 0, n, per(n)];
        cx.launch(Launch {
            shader: "reduce.wgsl",
            entry: "column_sums",
            consts: vec![],
            args: vec![cut(x, whole, r0 * columns, n * columns), work],
            params: params.map(|v| v as u32).to_vec(),
            groups: [columns.div_ceil(64) as u32, here as u32, 1],
        })?;
        part0 += here;
    }
    cx.sum_parts(work, y, parts, columns, columns)
}
