//! The packed form of a B operand: panels of `nr` columns, `[panel][k][nr]`, padded with zeros.

use super::kernel::{Kernels, MAX_MR};

/// Floats in the packed form of a `[k, n]` operand.
pub(crate) fn packed_len(kernels: &Kernels, k: usize, n: usize) -> usize {
    k * n.next_multiple_of(kernels.lanes)
}

/// Packs columns `j .. j + nr` of an operand whose row `k` lies contiguous at `row(k)`, a slice of `n` floats.
pub(crate) fn pack_panel_rows<'a>(
    out: &mut [f32],
    j: usize,
    n: usize,
    nr: usize,
    row: impl Fn(usize) -> &'a [f32],
) {
    let cols = nr.min(n - j);
    for (k, line) in out.chunks_exact_mut(nr).enumerate() {
        line[..cols].copy_from_slice(&row(k)[j..j + cols]);
        line[cols..].fill(0.0);
    }
}

/// Packs columns `j .. j + nr` of an operand whose column `j` lies contiguous along k at `data[j * col_stride ..]`.
pub(crate) fn pack_panel_cols(
    out: &mut [f32],
    data: &[f32],
    col_stride: usize,
    j: usize,
    n: usize,
    nr: usize,
) {
    // Small blocks of k, so that the cache lines being written stay in L1.
    const BLOCK: usize = 16;
    let cols = nr.min(n - j);
    let mut k0 = 0;
    for block in out.chunks_mut(BLOCK * nr) {
        let depth = block.len() / nr;
        for jj in 0..cols {
            let column = &data[(j + jj) * col_stride + k0..][..depth];
            for (line, &v) in block.chunks_exact_mut(nr).zip(column) {
                line[jj] = v;
            }
        }
        if cols < nr {
            block
                .chunks_exact_mut(nr)
                .for_each(|line| line[cols..].fill(0.0));
        }
        k0 += depth;
    }
}

/// Copies lines of `width` floats (at most [`MAX_MR`]) that lie `step` apart in `from`, one after the other.
pub(crate) fn pack_lines(out: &mut [f32], from: &[f32], width: usize, step: usize) {
    // A copy of a known length is a few moves; one of any length is a call.
    fn lines<const N: usize>(out: &mut [f32], from: &[f32], step: usize) {
        for (line, at) in out
            .as_chunks_mut::<N>()
            .0
            .iter_mut()
            .zip((0..).step_by(step))
        {
            line.copy_from_slice(&from[at..at + N]);
        }
    }
    macro_rules! by_width {
        ($($n:literal)*) => {
            match width {
                $($n => lines::<$n>(out, from, step),)*
                _ => unreachable!("tiles have at most {MAX_MR} rows"),
            }
        };
    }
    by_width!(1 2 3 4 5 6 7 8 9 10 11 12 13 14)
}
