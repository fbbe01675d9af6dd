//! The packed form of a B operand: panels of `nr` columns, `[panel][k][nr]`, padded with zeros.

use super::kernel::{Kernels, MAX_MR};
use super::simd::Simd;

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
    kernels: &Kernels,
    out: &mut [f32],
    data: &[f32],
    col_stride: usize,
    j: usize,
    n: usize,
    nr: usize,
) {
    let (cols, depth) = (nr.min(n - j), out.len() / nr);
    let data = &data[j * col_stride..];
    assert!(out.len() == depth * nr && (cols - 1) * col_stride + depth <= data.len());
    let columns = Columns {
        data: data.as_ptr(),
        col_stride,
        cols,
        depth,
        nr,
        out: out.as_mut_ptr(),
    };
    // SAFETY: asserted, and a panel is whole registers.
    unsafe { kernels.pack_columns(&columns) };
}

/// Arguments of the kernel `pack_columns`: column `j` of `cols` is `data[j * col_stride ..][.. depth]`, `out` holds
/// `[depth, nr]`, `nr` being whole registers; columns from `cols` on become zero.
pub(crate) struct Columns {
    pub data: *const f32,
    pub col_stride: usize,
    pub cols: usize,
    pub depth: usize,
    pub nr: usize,
    pub out: *mut f32,
}

/// # Safety
/// As [`Columns`] says, and the processor has the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn columns<S: Simd>(t: &Columns) {
    for j in (0..t.nr).step_by(S::LANES) {
        let cols = t.cols.saturating_sub(j).min(S::LANES);
        let squares = if cols == S::LANES {
            t.depth / S::LANES * S::LANES
        } else {
            0
        };
        // SAFETY: `cols` columns of `depth` floats from column `j` on, and as many rows of `out`.
        unsafe {
            let data = t.data.wrapping_add(j * t.col_stride);
            for k in (0..squares).step_by(S::LANES) {
                let to = t.out.add(k * t.nr + j);
                S::transpose(data.add(k), t.col_stride, to, t.nr);
            }
            for k in squares..t.depth {
                for l in 0..S::LANES {
                    let v = if l < cols {
                        *data.add(l * t.col_stride + k)
                    } else {
                        0.0
                    };
                    *t.out.add(k * t.nr + j + l) = v;
                }
            }
        }
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
