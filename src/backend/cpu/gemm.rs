//! Matrix multiplication, `C = epilogue(A B)`, for every layout that a linear layer's three products need.
//!
//! With `X[M, K]`, `W[N, K]` and `Y[M, N]`: the forward product is `X W^T` (NT), the input gradient `dY W` (NN),
//! the weight gradient `dY^T X` (TN). The blocking is Goto and van de Geijn's (2008): k is cut into blocks, B is
//! packed into panels that stay in L2, tasks take blocks of C. k is never shared between tasks and its blocks
//! depend on k alone, so the bits do not depend on the number of threads.

use super::kernel::{Kernels, MAX_MR, MAX_NR, Outer, Rows, kernels};
use super::pack::{pack_lines, pack_panel_cols, pack_panel_rows, packed_len};
use super::parallel::{Shared, for_each, parallel_for, part};
use super::scratch::{with_floats, with_indices};
use super::{Epilogue, Finish, RawEpilogue};
use std::ops::Range;

/// Longest block of k: a panel of B of this depth stays in L2 beside a block of A.
const MAX_KC: usize = 1024;
/// Floats of A that one task keeps in L2.
const A_BLOCK: usize = 96 * 1024;
/// Floats of B that stay in L2 while A and C pass by.
const B_BLOCK: usize = 80 * 1024;
/// Values of k for which a block of A is packed at a time.
const PACK_DEPTH: usize = 32;
/// Products with fewer multiply-adds than this stay on the calling thread: waking another takes as long as they do.
const SERIAL_MACS: usize = 1 << 21;

/// A matrix operand: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major, `[rows, cols]` with `cols` contiguous.
    pub fn new(data: &'a [f32], cols: usize) -> Self {
        Mat {
            data,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// The transpose of a row-major `[rows, cols]`: a matrix `[cols, rows]`.
    pub fn transposed(data: &'a [f32], cols: usize) -> Self {
        Mat {
            data,
            row_stride: 1,
            col_stride: cols,
        }
    }

    fn check(&self, rows: usize, cols: usize, name: &str) {
        let last = (rows.max(1) - 1) * self.row_stride + (cols.max(1) - 1) * self.col_stride;
        assert!(
            rows * cols == 0 || last < self.data.len(),
            "gemm: {name} [{rows}, {cols}] reaches element {last} of {}",
            self.data.len()
        );
    }
}

/// A B operand `[k, n]` packed once, for weights that do not change between calls.
pub struct PackedB {
    kernels: &'static Kernels,
    k: usize,
    n: usize,
    data: Vec<f32>,
}

impl PackedB {
    /// Packs the weights `w[n, k]` of a linear layer. `spent` hears which of them were read for the last time.
    pub fn new(k: usize, n: usize, w: &[f32], spent: impl Fn(Range<usize>)) -> Self {
        Self::with(kernels(), k, n, Mat::transposed(w, k), |columns| {
            spent(columns.start * k..columns.end * k)
        })
    }

    /// Packs `b` as `[k, n]`, panel after panel: `spent` hears of each panel's columns when they are packed.
    fn with(
        kernels: &'static Kernels,
        k: usize,
        n: usize,
        b: Mat,
        spent: impl Fn(Range<usize>),
    ) -> Self {
        b.check(k, n, "B");
        let mut data = vec![0.0; packed_len(kernels, k, n)];
        for j in (0..n).step_by(kernels.nr()) {
            for ks in k_blocks(k) {
                let at = packed_len(kernels, ks.start, n) + j * ks.len();
                let len = ks.len() * kernels.panel(n, j);
                pack_panel(kernels, b, &ks, n, j, &mut data[at..at + len]);
            }
            spent(j..n.min(j + kernels.nr()));
        }
        PackedB {
            kernels,
            k,
            n,
            data,
        }
    }

    /// Rows and columns of the operand.
    pub fn shape(&self) -> [usize; 2] {
        [self.k, self.n]
    }
}

/// `C[m, n] = epilogue(A[m, k] B[k, n])`, or with `accumulate` the product is added to what `C` holds first.
///
/// Row `i` of C is `c[i * ldc ..][.. n]`; the epilogue's `addend` and `preact` are laid out as C.
///
/// # Panics
/// When an operand is smaller than its shape says: the graph checks shapes before anything runs.
#[allow(clippy::too_many_arguments)]
pub fn gemm(
    m: usize,
    n: usize,
    k: usize,
    a: Mat,
    b: Mat,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
    ep: Epilogue,
) {
    b.check(k, n, "B");
    gemm_with(
        kernels(),
        m,
        n,
        k,
        a,
        Operand::Plain(b),
        c,
        ldc,
        accumulate,
        ep,
    );
}

/// [`gemm()`] with a B that was packed before.
pub fn gemm_packed(
    m: usize,
    a: Mat,
    b: &PackedB,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
    ep: Epilogue,
) {
    gemm_with(
        b.kernels,
        m,
        b.n,
        b.k,
        a,
        Operand::Packed(b),
        c,
        ldc,
        accumulate,
        ep,
    );
}

/// Sums of the columns of `x[m, n]` (a bias gradient), added to `out[n]` if `accumulate`, else stored.
///
/// Rows are summed in fixed groups and the groups in order, so the bits do not depend on the number of threads.
pub fn column_sums(m: usize, n: usize, x: &[f32], out: &mut [f32], accumulate: bool) {
    assert!(
        x.len() >= m * n && out.len() >= n,
        "column_sums: [{m}, {n}] from {} to {}",
        x.len(),
        out.len()
    );
    let groups = (m / 64).clamp(1, 64);
    with_floats(groups * n, |partial| {
        let shared = Shared::new(partial);
        parallel_for(groups, |g| {
            // SAFETY: group g alone writes row g.
            let sums = unsafe { std::slice::from_raw_parts_mut(shared.get().add(g * n), n) };
            sums.fill(0.0);
            for row in x[..m * n]
                .chunks_exact(n.max(1))
                .take(part(m, groups, g).end)
                .skip(part(m, groups, g).start)
            {
                sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
            }
        });
        if !accumulate {
            out[..n].fill(0.0);
        }
        for sums in partial.chunks_exact(n.max(1)) {
            out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
        }
    });
}

enum Operand<'a> {
    Plain(Mat<'a>),
    Packed(&'a PackedB),
}

/// The blocks of k, nearly equal and at most [`MAX_KC`] long.
fn k_blocks(k: usize) -> impl Iterator<Item = Range<usize>> {
    let blocks = k.div_ceil(MAX_KC);
    (0..blocks).map(move |i| part(k, blocks, i))
}

/// Packs rows `ks` of B, `[panel][k][nr]`.
fn pack_block(
    kernels: &Kernels,
    b: Mat,
    ks: Range<usize>,
    n: usize,
    out: &mut [f32],
    parallel: bool,
) {
    let shared = Shared::new(out);
    for_each(parallel, n.div_ceil(kernels.nr()), |p| {
        let j = p * kernels.nr();
        let len = ks.len() * kernels.panel(n, j);
        // SAFETY: panel p alone writes these floats, which `packed_len` counted.
        let out = unsafe { std::slice::from_raw_parts_mut(shared.get().add(j * ks.len()), len) };
        pack_panel(kernels, b, &ks, n, j, out);
    });
}

/// Packs rows `ks` of the panel of B that begins at column `j`, `[k][nr]`.
fn pack_panel(kernels: &Kernels, b: Mat, ks: &Range<usize>, n: usize, j: usize, out: &mut [f32]) {
    let nr = kernels.panel(n, j);
    if b.col_stride == 1 {
        pack_panel_rows(out, j, n, nr, |k| &b.data[(ks.start + k) * b.row_stride..]);
    } else if b.row_stride == 1 {
        pack_panel_cols(kernels, out, &b.data[ks.start..], b.col_stride, j, n, nr);
    } else {
        for (k, line) in out.chunks_exact_mut(nr).enumerate() {
            let row = (ks.start + k) * b.row_stride;
            for (jj, v) in line.iter_mut().enumerate() {
                *v = if j + jj < n {
                    b.data[row + (j + jj) * b.col_stride]
                } else {
                    0.0
                };
            }
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn gemm_with(
    kernels: &'static Kernels,
    m: usize,
    n: usize,
    k: usize,
    a: Mat,
    b: Operand,
    c: &mut [f32],
    ldc: usize,
    accumulate: bool,
    ep: Epilogue,
) {
    if m == 0 || n == 0 {
        return;
    }
    a.check(m, k, "A");
    let c_len = (m - 1) * ldc + n;
    assert!(
        c.len() >= c_len && ldc >= n,
        "gemm: C [{m}, {n}] with row stride {ldc} in {} floats",
        c.len()
    );
    assert!(
        ep.bias.is_none_or(|s| s.len() >= n),
        "gemm: the bias is shorter than {n}"
    );
    assert!(
        ep.addend.is_none_or(|s| s.len() >= c_len),
        "gemm: the addend is smaller than C"
    );
    assert!(
        ep.preact.as_ref().is_none_or(|s| s.len() >= c_len),
        "gemm: the pre-activation is smaller than C"
    );
    let ep = RawEpilogue::new(ep);
    let c = Shared::new(c);
    let parallel = m * n * k >= SERIAL_MACS;
    let blocks = k.div_ceil(MAX_KC).max(1);
    for i in 0..blocks {
        let ks = part(k, blocks, i);
        let last = i + 1 == blocks;
        let job = Job {
            kernels,
            m,
            n,
            a,
            c,
            ldc,
            accumulate: accumulate || i > 0,
            ep: if last { ep } else { RawEpilogue::PLAIN },
            parallel,
        };
        let len = packed_len(kernels, ks.len(), n);
        match &b {
            Operand::Plain(b) => with_floats(len, |packed| {
                pack_block(kernels, *b, ks.clone(), n, packed, parallel);
                job.run(ks, packed);
            }),
            Operand::Packed(b) => {
                let at = packed_len(kernels, ks.start, n);
                job.run(ks, &b.data[at..at + len]);
            }
        }
    }
}

/// One block of k, for all of C.
struct Job<'a> {
    kernels: &'static Kernels,
    m: usize,
    n: usize,
    a: Mat<'a>,
    c: Shared,
    ldc: usize,
    accumulate: bool,
    ep: RawEpilogue,
    parallel: bool,
}

impl Job<'_> {
    fn run(&self, ks: Range<usize>, b: &[f32]) {
        let full = self.kernels.mr();
        let panels = self.n.div_ceil(self.kernels.nr());
        let rows = (A_BLOCK / ks.len().max(1)).clamp(full, 16 * full) / full * full;
        let threads = rayon::current_num_threads();
        let split = self.parallel && threads > 1;
        let outer = self.a.col_stride != 1;
        let mut m_blocks = self.m.div_ceil(rows);
        if outer && split {
            // Each task packs its rows of A: only where there are too few rows do tasks share them out by columns.
            m_blocks = m_blocks.max((4 * threads).min(self.m.div_ceil(2 * full)));
        }
        let n_blocks = if split {
            let tasks = if outer { 2 * threads } else { 4 * threads };
            tasks.div_ceil(m_blocks).min(panels)
        } else {
            1
        };
        let task = |t: usize| {
            let is = part(self.m, m_blocks, t % m_blocks);
            let js = part(panels, n_blocks, t / m_blocks);
            if outer {
                self.task_outer(is, js, ks.clone(), b);
            } else {
                self.task_rows(is, js, ks.clone(), b);
            }
        };
        for_each(self.parallel, m_blocks * n_blocks, task);
    }

    /// Rows `is` of C and panels `js`, where A is contiguous along k.
    fn task_rows(&self, is: Range<usize>, js: Range<usize>, ks: Range<usize>, b: &[f32]) {
        let kc = ks.len();
        // Where the panels all stay in L2, C costs more than B: whole rows of C are written in one go.
        let row_order = kc * js.len() * self.kernels.nr() <= B_BLOCK;
        // Rows a multiple of 2 KiB apart share a few sets of L1; a copy with another stride does not.
        let stride = self.a.row_stride;
        let collide = stride.is_multiple_of(512) && is.len() > 4 && js.len() > 1;
        let padded = kc.next_multiple_of(16) + 16;
        with_floats(if collide { is.len() * padded } else { 0 }, |copy| {
            let (data, stride) = if collide {
                for (line, i) in copy.chunks_exact_mut(padded).zip(is.clone()) {
                    line[..kc].copy_from_slice(&self.a.data[i * stride + ks.start..][..kc]);
                }
                (&*copy, padded)
            } else {
                (
                    self.a
                        .data
                        .get(is.start * stride + ks.start..)
                        .unwrap_or_default(),
                    stride,
                )
            };
            self.tiles(is, js, row_order, |mr, nr, i, j, out| {
                let row: [usize; MAX_MR] = std::array::from_fn(|r| (i + r) * stride);
                let args = Rows {
                    a: data.as_ptr(),
                    row: &row[..mr],
                    seg_a: &[0],
                    seg_b: &[j * kc],
                    len: kc,
                    b: b.as_ptr(),
                    out,
                };
                // SAFETY: A and the packed B cover these rows and this panel; `out` holds a full tile.
                unsafe { self.kernels.rows(nr, &args) }
            });
        });
    }

    /// Rows `is` of C and panels `js`, where A is contiguous along its rows (or along nothing): packed as `[tile][k][mr]`.
    fn task_outer(&self, is: Range<usize>, js: Range<usize>, ks: Range<usize>, b: &[f32]) {
        let kc = ks.len();
        with_floats(is.len() * kc, |packed| {
            // Rows i .. i + mr begin at packed[i * kc]; within a tile, k by k.
            let tiles = is.len().div_ceil(self.kernels.mr());
            let [step, stride] = [self.a.col_stride, self.a.row_stride];
            // Some values of k for all tiles, so that lines of A that two tiles share are fetched once.
            for k in (0..kc).step_by(PACK_DEPTH) {
                let depth = PACK_DEPTH.min(kc - k);
                for rows in (0..tiles).map(|t| part(is.len(), tiles, t)) {
                    let mr = rows.len();
                    let out = &mut packed[rows.start * kc + k * mr..][..depth * mr];
                    let first = (is.start + rows.start) * stride + (ks.start + k) * step;
                    let source = &self.a.data[first..];
                    if stride == 1 {
                        pack_lines(out, source, mr, step);
                    } else {
                        for (line, at) in out.chunks_exact_mut(mr).zip((0..).step_by(step)) {
                            for (i, v) in line.iter_mut().enumerate() {
                                *v = source[at + i * stride];
                            }
                        }
                    }
                }
            }
            with_indices(kc, |b_row| {
                let mut table_nr = 0;
                self.tiles(is, js, false, |mr, nr, i, j, out| {
                    if table_nr != nr {
                        table_nr = nr;
                        b_row.iter_mut().enumerate().for_each(|(k, v)| *v = k * nr);
                    }
                    let args = Outer {
                        a: packed[i * kc..].as_ptr(),
                        a_step: mr,
                        b: b[j * kc..].as_ptr(),
                        b_row,
                        out,
                    };
                    // SAFETY: the packed A and B cover these rows and this panel; `out` holds a full tile.
                    unsafe { self.kernels.outer(mr, nr, &args) }
                });
            });
        });
    }

    /// Calls `multiply(mr, nr, row - is.start, column, out)` for every tile, and stores what it leaves in `out`.
    ///
    /// Panel by panel, or with `row_order` tile by tile, which writes whole rows of C.
    fn tiles(
        &self,
        is: Range<usize>,
        js: Range<usize>,
        row_order: bool,
        mut multiply: impl FnMut(usize, usize, usize, usize, *mut f32),
    ) {
        let mut tile = [0.0f32; MAX_MR * MAX_NR];
        let tiles = is.len().div_ceil(self.kernels.mr());
        for step in 0..tiles * js.len() {
            let (t, p) = if row_order {
                (step / js.len(), step % js.len())
            } else {
                (step % tiles, step / tiles)
            };
            let j = (js.start + p) * self.kernels.nr();
            let nr = self.kernels.panel(self.n, j);
            let rows = part(is.len(), tiles, t);
            multiply(rows.len(), nr, rows.start, j, tile.as_mut_ptr());
            let row: [usize; MAX_MR] =
                std::array::from_fn(|r| (is.start + rows.start + r) * self.ldc);
            let args = Finish {
                tile: tile.as_ptr(),
                nr,
                row: &row[..rows.len()],
                col: j,
                cols: nr.min(self.n - j),
                c: self.c.get(),
                accumulate: self.accumulate,
                ep: self.ep,
            };
            // SAFETY: the sizes were checked in `gemm_with`; this task alone writes these elements.
            unsafe { self.kernels.finish(&args) }
        }
    }
}

#[cfg(test)]
#[path = "gemm_tests.rs"]
mod tests;
