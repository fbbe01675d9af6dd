//! Shapes of blocks that several rooms' kernels share.

use super::launch::{Arg, Consts, CudaCx, CudaLaunch, vector};
use crate::Result;

/// Threads of a block in all of these.
const THREADS: usize = 256;
/// Rows that a thread of a map over columns handles.
const ROWS: usize = 4;

/// A tensor `[rows, channels]` under blocks of `block[0]` columns (items of `vec` channels) by `block[1]` rows of threads;
/// see kernels/batch_norm.cu.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Rows.
    pub rows: usize,
    /// Channels.
    pub channels: usize,
    /// Channels of an item: 4 or 1.
    pub vec: usize,
    /// Items of a row.
    pub items: usize,
    /// Threads of a block.
    pub block: [u32; 3],
    /// Parts that a sum over rows is made of.
    pub parts: usize,
    /// Rows of a part.
    pub per_part: usize,
}

impl Columns {
    /// For a device: sums over rows are cut so that every multiprocessor has four blocks, where there are the rows.
    pub fn new(cx: &CudaCx, rows: usize, channels: usize) -> Self {
        let vec = vector(&[channels]);
        let items = channels / vec;
        let bx = items.next_power_of_two().min(32);
        let by = THREADS / bx;
        let blocks = items.div_ceil(bx);
        let wanted = (4 * cx.traits.sms as usize).div_ceil(blocks);
        let parts = wanted.min(rows.div_ceil(ROWS * by)).max(1);
        let per_part = rows.div_ceil(parts).next_multiple_of(by);
        Columns {
            rows,
            channels,
            vec,
            items,
            block: [bx as u32, by as u32, 1],
            parts: rows.div_ceil(per_part),
            per_part,
        }
    }

    /// Blocks of columns.
    fn across(&self) -> u32 {
        self.items.div_ceil(self.block[0] as usize) as u32
    }

    /// Blocks of a sum over rows: a part in x, columns in y.
    pub fn sum_grid(&self) -> [u32; 3] {
        [self.parts as u32, self.across(), 1]
    }

    /// Blocks of a map: rows in x, columns in y.
    pub fn map_grid(&self) -> [u32; 3] {
        let per_block = ROWS * self.block[1] as usize;
        [self.rows.div_ceil(per_block) as u32, self.across(), 1]
    }

    /// Blocks of what makes one vector over channels out of the parts.
    pub fn vector_grid(&self) -> [u32; 3] {
        [self.across(), 1, 1]
    }

    /// `VEC`.
    pub fn consts(&self) -> Consts {
        vec![("VEC", self.vec.to_string())]
    }

    /// A launch with these blocks.
    ///
    /// # Errors
    /// As [`CudaCx::launch`].
    pub fn launch(
        &self,
        cx: &mut CudaCx,
        (source, entry): (&'static str, &'static str),
        consts: &Consts,
        grid: [u32; 3],
        args: Vec<Arg>,
    ) -> Result<()> {
        cx.launch(CudaLaunch {
            source,
            entry,
            consts: consts.clone(),
            args,
            grid,
            block: self.block,
            smem: 0,
        })
    }
}

/// Rows of `channels` that stay in registers: see kernels/layer_norm.cu.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Channels of an item.
    pub vec: usize,
    /// Items of a row.
    pub items: usize,
    /// Items of a lane.
    per_lane: usize,
    /// Warps that share a row: 1 or 8.
    warps: usize,
}

impl Rows {
    /// One warp a row up to `most` floats a lane, then eight.
    pub fn new(channels: usize, most: usize) -> Self {
        let vec = vector(&[channels]);
        let items = channels / vec;
        let warps = if items.div_ceil(32) * vec <= most {
            1
        } else {
            8
        };
        Rows {
            vec,
            items,
            per_lane: items.div_ceil(32 * warps),
            warps,
        }
    }

    /// Floats that a lane holds of a row.
    pub fn floats(&self) -> usize {
        self.per_lane * self.vec
    }

    /// Rows of a block.
    pub fn per_block(&self) -> usize {
        8 / self.warps
    }

    /// `VEC`, `ITEMS`, `WARPS`.
    pub fn consts(&self) -> Consts {
        vec![
            ("VEC", self.vec.to_string()),
            ("ITEMS", self.per_lane.to_string()),
            ("WARPS", self.warps.to_string()),
        ]
    }
}

impl CudaCx<'_> {
    /// `y[i] = sum over parts of x[part * stride + i]` for `n` elements, in an order that is always the same.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    pub fn sum_parts(
        &mut self,
        x: Arg,
        y: Arg,
        parts: usize,
        stride: usize,
        n: usize,
    ) -> Result<()> {
        let vec = vector(&[stride, n]);
        let items = n / vec;
        let sizes = [items, parts, stride / vec].map(Arg::n);
        self.launch(CudaLaunch {
            source: "reduce.cu",
            entry: "sum_parts",
            consts: vec![("VEC", vec.to_string())],
            args: sizes.into_iter().chain([x, y]).collect(),
            grid: [items.div_ceil(32) as u32, 1, 1],
            block: [32, 8, 1],
            smem: 0,
        })
    }
}
