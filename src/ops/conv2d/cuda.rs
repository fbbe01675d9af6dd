//! Launches of kernels/conv2d.cu, kernels/linear.cu and kernels/gemm.cu, for convolution and, as the 1x1 convolution
//! over rows, for linear.

use super::ConvShape;
use crate::backend::cuda::{Arg, Consts, CudaCx, CudaLaunch, Precision, vector};
use crate::{Error, Result};

/// Names of the kernel variants; the first stands for the rule in `rung`.
pub const VARIANTS: &[&str] = &["auto", "naive", "simt", "mma"];

/// What happens to a sum before it is stored.
#[derive(Clone, Copy, Debug)]
pub struct Epilogue {
    /// Bias `[K]`, or null.
    pub bias: Arg,
    /// Residual, or a gradient to add to: as the result, or null.
    pub addend: Arg,
    /// Also gets the value before the activation, or null.
    pub pre: Arg,
    /// [`Act::code`](crate::ops::act::Act::code); 0 is none.
    pub act: u32,
}

impl Epilogue {
    /// Nothing but an addend, or not even that.
    pub fn adding(addend: Option<Arg>) -> Self {
        Epilogue {
            bias: Arg::Null,
            addend: addend.unwrap_or(Arg::Null),
            pre: Arg::Null,
            act: 0,
        }
    }

    /// The kernels' `Epilogue`: y, bias, addend, pre.
    fn args(&self, y: Arg) -> [Arg; 4] {
        [y, self.bias, self.addend, self.pre]
    }
}

/// A rung of the kernels' ladder.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rung {
    Naive,
    Simt,
    Mma(Precision),
}

/// The rule: float32 runs on the ordinary units, tf32 and bf16 on tensor cores.
fn rung(cx: &CudaCx) -> Result<Rung> {
    match (cx.variant, cx.precision) {
        (Some("naive"), _) => Ok(Rung::Naive),
        (Some("simt"), _) | (None | Some("auto"), Precision::F32) => Ok(Rung::Simt),
        (Some("mma"), Precision::F32) => Err(Error::input(
            "the mma kernels compute in tf32 or bf16: ask for one of these precisions, or for simt",
        )),
        (None | Some("auto" | "mma"), precision) => Ok(Rung::Mma(precision)),
        (Some(other), _) => Err(Error::input(format!(
            "no CUDA variant is called {other}; there are {}",
            VARIANTS.join(", ")
        ))),
    }
}

fn set(name: &'static str, value: impl ToString) -> (&'static str, String) {
    (name, value.to_string())
}

/// The kernels' `Div` (kernels/common/div.cuh).
fn div(d: usize) -> [Arg; 3] {
    let d = d.max(1) as u64;
    let shift = d.next_power_of_two().trailing_zeros();
    let magic = ((1u64 << 32) * ((1u64 << shift) - d)) / d + 1;
    [Arg::U32(d as u32), Arg::U32(magic as u32), Arg::U32(shift)]
}

/// An operand as a kernel reads it: rows of `width` elements, zeros included that pad them, in granules of `vec`.
struct Operand {
    at: Arg,
    width: usize,
    vec: usize,
}

/// `x` `[rows, width]` for a rung: as it is for float32 and tf32 (which rounds in registers), and rounded to bf16 in
/// workspace, rows padded to fours, for bf16.
fn operand(cx: &mut CudaCx, rung: Rung, x: Arg, rows: usize, width: usize) -> Result<Operand> {
    if rung != Rung::Mma(Precision::Bf16) {
        return Ok(Operand {
            at: x,
            width,
            vec: vector(&[width]),
        });
    }
    let padded = width.next_multiple_of(4);
    let at = Arg::Work(cx.workspace(rows * padded / 2));
    let mut args = vec![x, at, Arg::n(width)];
    args.extend(div(padded / 4));
    let consts = vec![set("VEC_C", vector(&[width]))];
    cx.items(
        ("gemm.cu", "cast_bf16"),
        consts,
        rows * padded / 4,
        256,
        &args,
    )?;
    Ok(Operand {
        at,
        width: padded,
        vec: if padded.is_multiple_of(8) { 8 } else { 4 },
    })
}

/// Rows and columns of a block's tile: large where that leaves enough blocks to fill the device, no wider than the
/// result needs; without vector loads a thread has more addresses to hold, and the largest tile is out.
fn tile(cx: &CudaCx, rows: usize, columns: usize, groups: usize, vec: usize) -> (usize, usize) {
    let fills = |m: usize, n: usize| {
        rows > m / 2 && rows.div_ceil(m) * columns.div_ceil(n) * groups >= cx.traits.sms as usize
    };
    match columns {
        0..=32 => (128, 32),
        33..=64 if fills(128, 64) => (128, 64),
        65.. if vec > 1 && fills(128, 128) => (128, 128),
        _ => (64, 64),
    }
}

/// A product on its way to a launch; the fields are those of the kernels' `Product` (kernels/common/gemm_core.cuh).
struct Product<'a> {
    source: &'static str,
    mode: u32,
    a: &'a Operand,
    b: &'a Operand,
    /// Padded extents and real ones.
    rows: [usize; 2],
    columns: [usize; 2],
    depth: [usize; 2],
    groups: usize,
    /// From one group's operands and result to the next's.
    group_steps: [usize; 3],
    /// Elements of the whole result.
    length: usize,
    /// Elements between lines of the operands and the result.
    pitches: [usize; 3],
    /// Rows and first elements of the result are at multiples of this.
    align_c: usize,
    /// Extent of the bias.
    channels: usize,
    /// Arguments behind the product's.
    more: Vec<Arg>,
    /// Constants of this source alone.
    consts: Consts,
    /// The sum may be split over blocks.
    may_split: bool,
}

/// `y = C` or, where the sum is split so that there are blocks enough to fill the device, parts of C in workspace and
/// their sum in order.
fn multiply(cx: &mut CudaCx, rung: Rung, p: Product, y: Arg, ep: Epilogue) -> Result<()> {
    let (m, n) = tile(cx, p.rows[1], p.columns[0], p.groups, p.a.vec.min(p.b.vec));
    let unit = match rung {
        Rung::Mma(Precision::Bf16) => 32,
        Rung::Mma(_) => 16,
        _ => 8,
    };
    let tiles_n = p.columns[0].div_ceil(n);
    let tiles = p.rows[1].div_ceil(m) * tiles_n;
    // Two blocks a multiprocessor; a part is worth its traffic from some 256 positions on.
    let wanted = 2 * cx.traits.sms as usize / (tiles * p.groups).max(1);
    let parts = if p.may_split {
        wanted.clamp(1, (p.depth[0] / 256).max(1))
    } else {
        1
    };
    let per_part = p.depth[0].div_ceil(parts).next_multiple_of(unit).max(unit);
    let parts = p.depth[0].div_ceil(per_part).max(1);
    let (to, here) = if parts == 1 {
        (y, ep)
    } else {
        let work = cx.workspace(parts * p.length);
        (Arg::Work(work), Epilogue::adding(None))
    };
    let mut consts = vec![
        set("RUNG", if rung == Rung::Simt { 1 } else { 2 }),
        set("MODE", p.mode),
        set("TILE_M", m),
        set("TILE_N", n),
        set("VEC_A", p.a.vec),
        set("VEC_B", p.b.vec),
        set("VEC_C", vector(&[p.align_c])),
        set("ACT", here.act),
    ];
    let (mut block, mut smem) = (256, 0);
    if let Rung::Mma(precision) = rung {
        let (warp_m, warp_n) = if (m, n) == (128, 128) {
            (64, 32)
        } else {
            (32, 32)
        };
        let buffers = 4;
        let element = if precision == Precision::Bf16 {
            "bf16"
        } else {
            "float"
        };
        consts.extend([
            set("ELEMENT", element),
            set("WARP_M", warp_m),
            set("WARP_N", warp_n),
            set("BUFFERS", buffers),
        ]);
        block = 32 * (m / warp_m) * (n / warp_n);
        smem = buffers * (m + n) * 64;
    }
    consts.extend(p.consts);
    let mut args = vec![p.a.at, p.b.at];
    args.extend(here.args(to));
    let sizes = [
        p.rows[0],
        p.columns[0],
        p.depth[0],
        p.rows[1],
        p.columns[1],
        p.depth[1],
        per_part,
        tiles_n,
    ];
    args.extend(sizes.map(Arg::n));
    args.extend(p.group_steps.map(Arg::n));
    args.push(Arg::n(p.length));
    args.extend(p.pitches.map(Arg::n));
    args.extend(p.more);
    let entry = match (p.source, rung) {
        ("linear.cu", Rung::Simt) => "linear_simt",
        ("linear.cu", _) => "linear_mma",
        (_, Rung::Simt) => "conv_simt",
        _ => "conv_mma",
    };
    cx.launch(CudaLaunch {
        source: p.source,
        entry,
        consts,
        args,
        grid: [tiles as u32, p.groups as u32, parts as u32],
        block: [block as u32, 1, 1],
        smem: smem as u32,
    })?;
    if parts == 1 {
        return Ok(());
    }
    reduce(cx, to, y, ep, parts, p.length, p.channels)
}

/// `y = act(sum of the parts + bias + addend)`, the parts in order.
fn reduce(
    cx: &mut CudaCx,
    parts_at: Arg,
    y: Arg,
    ep: Epilogue,
    parts: usize,
    length: usize,
    channels: usize,
) -> Result<()> {
    let vec = vector(&[length, channels]);
    let mut args = vec![parts_at];
    args.extend(ep.args(y));
    args.extend([parts, length, channels].map(Arg::n));
    let consts = vec![set("VEC_C", vec), set("ACT", ep.act)];
    cx.items(
        ("gemm.cu", "reduce_parts"),
        consts,
        length / vec,
        256,
        &args,
    )
}

/// The definition, an output a thread; `sizes` are those of its `Shape` or, for a plain product, its three extents.
fn naive(
    cx: &mut CudaCx,
    s: &ConvShape,
    mode: u32,
    [a, b, y]: [Arg; 3],
    outputs: usize,
    ep: Epilogue,
) -> Result<()> {
    let mut args = vec![a, b];
    args.extend(ep.args(y));
    let (source, entry) = if s.is_matrix_product() {
        let pixels = s.n * s.h * s.w;
        args.extend(
            match mode {
                0 => [pixels, s.k, s.c],
                1 => [pixels, s.c, s.k],
                _ => [s.k, s.c, pixels],
            }
            .map(Arg::n),
        );
        ("linear.cu", "linear_naive")
    } else {
        let sizes = [
            s.n,
            s.h,
            s.w,
            s.cg(),
            s.ho,
            s.wo,
            s.kg(),
            s.r,
            s.s,
            s.groups,
            s.stride[0],
            s.stride[1],
            s.pad[0],
            s.pad[1],
        ];
        args.extend(sizes.map(Arg::n));
        ("conv2d.cu", "conv_naive")
    };
    cx.launch(CudaLaunch {
        source,
        entry,
        consts: vec![set("RUNG", 0), set("MODE", mode), set("ACT", ep.act)],
        args,
        grid: [outputs.div_ceil(256) as u32, 1, 1],
        block: [256, 1, 1],
        smem: 0,
    })
}

/// How a window moves, for the kernels' `Window`.
struct Window {
    grid: [usize; 2],
    step: [usize; 2],
    origin: [i64; 2],
    sign: i32,
    extent: [usize; 2],
    pitch: usize,
    channels: usize,
    taps_w: usize,
}

impl Window {
    /// Over an input whose groups have `channels` channels, from output pixels.
    fn forward(s: &ConvShape, channels: usize) -> Self {
        Window {
            grid: [s.ho, s.wo],
            step: s.stride,
            origin: s.pad.map(|p| -(p as i64)),
            sign: 1,
            extent: [s.h, s.w],
            pitch: s.groups * channels,
            channels,
            taps_w: s.s,
        }
    }

    fn args(&self) -> Vec<Arg> {
        let mut args = vec![];
        args.extend(div(self.grid[0]));
        args.extend(div(self.grid[1]));
        args.extend(self.step.map(Arg::n));
        args.extend(self.origin.map(|o| Arg::I32(o as i32)));
        args.push(Arg::I32(self.sign));
        args.extend(self.extent.map(Arg::n));
        args.push(Arg::n(self.pitch));
        args.extend(div(self.channels));
        args.extend(div(self.taps_w));
        args
    }
}

/// The kernels' `Filter` and `Lattice`, which only a data gradient reads.
const UNUSED: [Arg; 26] = [Arg::U32(0); 26];

/// `y = act(x * w + bias + addend)`.
///
/// # Errors
/// The variant does not exist or cannot compute in this precision.
pub fn fprop(cx: &mut CudaCx, s: &ConvShape, x: Arg, w: Arg, y: Arg, ep: Epilogue) -> Result<()> {
    let rung = rung(cx)?;
    if rung == Rung::Naive {
        return naive(cx, s, 0, [x, w, y], s.output_len(), ep);
    }
    let a = &operand(cx, rung, x, s.n * s.h * s.w * s.groups, s.cg())?;
    let b = &operand(cx, rung, w, s.k * s.r * s.s, s.cg())?;
    let pixels = s.n * s.ho * s.wo;
    let depth = s.r * s.s * a.width;
    let mut p = Product {
        source: "linear.cu",
        mode: 0,
        a,
        b,
        rows: [pixels; 2],
        columns: [s.kg(); 2],
        depth: [depth; 2],
        groups: s.groups,
        group_steps: [a.width, s.kg() * depth, s.kg()],
        length: s.output_len(),
        pitches: [a.width, depth, s.k],
        align_c: s.kg(),
        channels: s.k,
        more: vec![],
        consts: vec![],
        may_split: true,
    };
    if !s.is_matrix_product() {
        p.source = "conv2d.cu";
        p.more = Window::forward(s, a.width).args();
        p.more.extend(UNUSED);
        p.consts = vec![set("LATTICE", 0)];
    }
    multiply(cx, rung, p, y, ep)
}

/// `dx = dy * w (+ addend)`. With a stride, input pixels fall into classes that different taps reach; each class is a
/// launch of its own, so that no multiply-add is spent on taps that do not meet the pixel.
///
/// # Errors
/// As [`fprop`].
pub fn dgrad(
    cx: &mut CudaCx,
    s: &ConvShape,
    dy: Arg,
    w: Arg,
    dx: Arg,
    addend: Option<Arg>,
) -> Result<()> {
    let rung = rung(cx)?;
    let ep = Epilogue::adding(addend);
    if rung == Rung::Naive {
        return naive(cx, s, 1, [dy, w, dx], s.input_len(), ep);
    }
    let a = &operand(cx, rung, dy, s.n * s.ho * s.wo * s.groups, s.kg())?;
    let b = &operand(cx, rung, w, s.k * s.r * s.s, s.cg())?;
    let product = |rows: usize, taps: usize| Product {
        source: "linear.cu",
        mode: 1,
        a,
        b,
        rows: [rows; 2],
        columns: [b.width, s.cg()],
        depth: [taps * a.width, taps * s.kg()],
        groups: s.groups,
        group_steps: [a.width, s.kg() * s.r * s.s * b.width, s.cg()],
        length: s.input_len(),
        pitches: [a.width, b.width, s.c],
        align_c: s.cg(),
        channels: s.c,
        more: vec![],
        consts: vec![],
        may_split: true,
    };
    if s.is_matrix_product() {
        return multiply(cx, rung, product(s.n * s.h * s.w, 1), dx, ep);
    }
    let classes = [s.stride[0].min(s.h), s.stride[1].min(s.w)];
    let lattice = classes != [1, 1];
    for y in 0..classes[0] {
        for x in 0..classes[1] {
            let at = [y, x];
            let by_axis = |f: &dyn Fn(usize) -> usize| [f(0), f(1)];
            let (extent, kernel, taps_of) = ([s.h, s.w], [s.r, s.s], s.stride);
            let grid = by_axis(&|i| (extent[i] - at[i]).div_ceil(s.stride[i]));
            // The first tap that meets the class, and the output pixel that it comes from.
            let first = by_axis(&|i| (at[i] + s.pad[i]) % s.stride[i]);
            let origin = [0, 1].map(|i| ((at[i] + s.pad[i] - first[i]) / s.stride[i]) as i64);
            let taps = by_axis(&|i| kernel[i].saturating_sub(first[i]).div_ceil(taps_of[i]));
            let window = Window {
                grid,
                step: [1, 1],
                origin,
                sign: -1,
                extent: [s.ho, s.wo],
                pitch: s.groups * a.width,
                channels: a.width,
                taps_w: taps[1],
            };
            let mut p = product(s.n * grid[0] * grid[1], taps[0] * taps[1]);
            p.source = "conv2d.cu";
            p.more = window.args();
            p.more.extend(div(a.width));
            p.more.extend(div(taps[1]));
            let filter = [s.kg(), s.r, s.s, b.width];
            p.more.extend(filter.map(Arg::n));
            p.more.extend(s.stride.map(Arg::n));
            p.more.extend(first.map(Arg::n));
            p.more.extend(div(grid[0]));
            p.more.extend(div(grid[1]));
            p.more.extend([s.h, s.w].map(Arg::n));
            p.more.extend(s.stride.map(Arg::n));
            p.more.extend(at.map(Arg::n));
            p.consts = vec![set("LATTICE", u32::from(lattice))];
            p.may_split = !lattice;
            multiply(cx, rung, p, dx, ep)?;
        }
    }
    Ok(())
}

/// `dw = dy^T * x`: the sum over pixels is split over blocks, and the parts added in order.
///
/// # Errors
/// As [`fprop`].
pub fn wgrad(cx: &mut CudaCx, s: &ConvShape, x: Arg, dy: Arg, dw: Arg) -> Result<()> {
    let rung = rung(cx)?;
    let ep = Epilogue::adding(None);
    if rung == Rung::Naive {
        return naive(cx, s, 2, [dy, x, dw], s.weight_len(), ep);
    }
    let pixels = s.n * s.ho * s.wo;
    let a = &operand(cx, rung, dy, pixels * s.groups, s.kg())?;
    let b = &operand(cx, rung, x, s.n * s.h * s.w * s.groups, s.cg())?;
    let taps = s.r * s.s;
    let mut p = Product {
        source: "linear.cu",
        mode: 2,
        a,
        b,
        rows: [a.width, s.kg()],
        columns: [taps * b.width, s.cg()],
        depth: [pixels; 2],
        groups: s.groups,
        group_steps: [a.width, b.width, s.kg() * taps * s.cg()],
        length: s.weight_len(),
        pitches: [s.groups * a.width, b.width, taps * s.cg()],
        align_c: s.cg(),
        channels: s.weight_len(),
        more: vec![],
        consts: vec![],
        may_split: true,
    };
    if !s.is_matrix_product() {
        p.source = "conv2d.cu";
        p.more = Window::forward(s, b.width).args();
        p.more.extend(UNUSED);
        p.consts = vec![set("LATTICE", 0)];
    }
    multiply(cx, rung, p, dw, ep)
}

/// Sums of the columns of `x` `[rows, columns]` (a bias's gradient): parts of the rows first, then the parts in order.
///
/// # Errors
/// The launch breaks a limit.
pub fn column_sums(cx: &mut CudaCx, x: Arg, y: Arg, rows: usize, columns: usize) -> Result<()> {
    let blocks = columns.div_ceil(32);
    let wanted = 4 * cx.traits.sms as usize / blocks;
    let per_part = rows
        .div_ceil(wanted.clamp(1, rows.div_ceil(64).max(1)))
        .max(1);
    let parts = rows.div_ceil(per_part).max(1);
    let to = if parts == 1 {
        y
    } else {
        Arg::Work(cx.workspace(parts * columns))
    };
    cx.launch(CudaLaunch {
        source: "gemm.cu",
        entry: "column_sums",
        consts: vec![],
        args: vec![x, to, Arg::n(rows), Arg::n(columns), Arg::n(per_part)],
        grid: [blocks as u32, parts as u32, 1],
        block: [256, 1, 1],
        smem: 0,
    })?;
    if parts == 1 {
        return Ok(());
    }
    reduce(cx, to, y, Epilogue::adding(None), parts, columns, columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn division_by_multiplication_is_exact() {
        let u = |a: Arg| match a {
            Arg::U32(v) => u64::from(v),
            _ => unreachable!("a Div is made of unsigned numbers"),
        };
        for d in [
            1usize,
            2,
            3,
            5,
            7,
            64,
            65,
            147,
            1000,
            12_544,
            1 << 30,
            (1 << 31) - 1,
        ] {
            let [_, magic, shift] = div(d).map(u);
            let edges = [
                0,
                1,
                d as u64 - 1,
                d as u64,
                5 * d as u64 / 2,
                (1 << 31) - 1,
            ];
            for n in edges.into_iter().filter(|&n| n < 1 << 31) {
                let q = (((n * magic) >> 32) + n) >> shift;
                assert_eq!(q, n / d as u64, "{n} / {d}");
            }
        }
    }
}
