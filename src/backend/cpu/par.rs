//! Splitting work over the threads of rayon's current pool, in chunks that do not depend on how many there are: the
//! same bits come out with any number of threads.

use rayon::prelude::*;

/// Elements of a task.
const GRAIN: usize = 16 * 1024;
/// Elements below which work is not worth waking another thread.
const SERIAL: usize = 2 * GRAIN;

/// A raw pointer that may be shared between threads which write disjoint elements through it.
#[derive(Clone, Copy, Debug)]
pub struct SharedMut(*mut f32, usize);

unsafe impl Send for SharedMut {}
unsafe impl Sync for SharedMut {}

impl SharedMut {
    /// For the elements of `s`.
    pub fn new(s: &mut [f32]) -> Self {
        SharedMut(s.as_mut_ptr(), s.len())
    }

    /// Elements `from..from + len`.
    ///
    /// # Safety
    /// No other thread may hold an overlapping stretch.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, from: usize, len: usize) -> &mut [f32] {
        assert!(from + len <= self.1);
        unsafe { std::slice::from_raw_parts_mut(self.0.add(from), len) }
    }
}

/// Calls `f(i)` for `0..n` on all threads.
pub fn for_each(n: usize, f: impl Fn(usize) + Send + Sync) {
    if n <= 1 {
        (0..n).for_each(f);
    } else {
        (0..n).into_par_iter().for_each(f);
    }
}

/// Rows per chunk for rows of `width` elements.
pub fn rows_per_chunk(width: usize) -> usize {
    (GRAIN / width.max(1)).max(1)
}

/// Calls `f(first_row, rows)` on chunks of whole rows of `y` (each row `width` long).
pub fn rows(y: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Send + Sync) {
    let per = rows_per_chunk(width);
    if y.len() <= SERIAL {
        for (i, c) in y.chunks_mut(per * width.max(1)).enumerate() {
            f(i * per, c);
        }
    } else {
        y.par_chunks_mut(per * width)
            .enumerate()
            .for_each(|(i, c)| f(i * per, c));
    }
}

/// `y[i] = f(a[i])`.
pub fn map(a: &[f32], y: &mut [f32], f: impl Fn(f32) -> f32 + Send + Sync) {
    rows(y, 1, |at, y| {
        for (y, &a) in y.iter_mut().zip(&a[at..]) {
            *y = f(a);
        }
    });
}

/// `y[i] = f(a[i], b[i])`.
pub fn map2(a: &[f32], b: &[f32], y: &mut [f32], f: impl Fn(f32, f32) -> f32 + Send + Sync) {
    rows(y, 1, |at, y| {
        for ((y, &a), &b) in y.iter_mut().zip(&a[at..]).zip(&b[at..]) {
            *y = f(a, b);
        }
    });
}

/// Column sums of per-row terms, in a fixed order: rows are cut into chunks of a fixed size, each chunk is summed by
/// `f(row, sums)` into `width` sums, and the chunks' sums are added in order. `partial` is scratch of
/// [`column_sums_scratch`] elements.
pub fn column_sums(
    rows: usize,
    width: usize,
    partial: &mut [f32],
    out: &mut [f32],
    f: impl Fn(usize, &mut [f32]) + Send + Sync,
) {
    let per = column_chunk(rows, width);
    let chunks = rows.div_ceil(per).max(1);
    let partial = &mut partial[..chunks * width];
    let body = |(i, sums): (usize, &mut [f32])| {
        sums.fill(0.0);
        for r in i * per..rows.min((i + 1) * per) {
            f(r, sums);
        }
    };
    if rows * width <= SERIAL {
        partial.chunks_mut(width).enumerate().for_each(body);
    } else {
        partial.par_chunks_mut(width).enumerate().for_each(body);
    }
    out.copy_from_slice(&partial[..width]);
    for c in partial.chunks(width).skip(1) {
        for (o, v) in out.iter_mut().zip(c) {
            *o += v;
        }
    }
}

/// Scratch elements that [`column_sums`] needs.
pub fn column_sums_scratch(rows: usize, width: usize) -> usize {
    rows.div_ceil(column_chunk(rows, width)).max(1) * width
}

/// At most 64 chunks, and none smaller than is worth a task.
fn column_chunk(rows: usize, width: usize) -> usize {
    rows.div_ceil(64).max(GRAIN / 4 / width.max(1)).max(1)
}
