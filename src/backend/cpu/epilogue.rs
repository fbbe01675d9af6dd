//! What happens to a tile of sums on its way to memory: bias, addend, activation, and a copy before the activation.

use super::simd::Simd;
use crate::for_act;
use crate::ops::act::Act;

/// What is done to each sum before it is stored: `pre = sum + bias[column] + addend`, `out = act(pre)`.
///
/// `addend` and `preact` are laid out as the output is.
#[derive(Default)]
pub struct Epilogue<'a> {
    pub bias: Option<&'a [f32]>,
    /// A residual branch (forward) or the gradient that is already there (backward).
    pub addend: Option<&'a [f32]>,
    pub act: Option<Act>,
    /// Where to keep `pre`, which the backward pass of a GELU needs.
    pub preact: Option<&'a mut [f32]>,
}

/// The epilogue as raw pointers (null: absent), shared by the threads that write disjoint tiles.
#[derive(Clone, Copy)]
pub(crate) struct RawEpilogue {
    pub bias: *const f32,
    pub addend: *const f32,
    pub preact: *mut f32,
    pub act: Option<Act>,
}

// SAFETY: the pointers are read, or written at elements that belong to one tile and so to one thread.
unsafe impl Send for RawEpilogue {}
// SAFETY: as above.
unsafe impl Sync for RawEpilogue {}

impl RawEpilogue {
    /// Stores the sums as they are.
    pub const PLAIN: Self = RawEpilogue {
        bias: std::ptr::null(),
        addend: std::ptr::null(),
        preact: std::ptr::null_mut(),
        act: None,
    };

    pub fn new(e: Epilogue) -> Self {
        RawEpilogue {
            bias: e.bias.map_or(std::ptr::null(), |s| s.as_ptr()),
            addend: e.addend.map_or(std::ptr::null(), |s| s.as_ptr()),
            preact: e.preact.map_or(std::ptr::null_mut(), |s| s.as_mut_ptr()),
            act: e.act,
        }
    }
}

/// One tile to store: `c[row[i] + col + j]` from `tile[i * nr + j]`, for `j` in `0..cols`.
///
/// Every such element of `c`, of `addend` and `preact` where present, and `bias[col + j]` must be valid.
pub(crate) struct Finish<'a> {
    pub tile: *const f32,
    pub nr: usize,
    pub row: &'a [usize],
    pub col: usize,
    pub cols: usize,
    pub c: *mut f32,
    /// Add to what `c` holds.
    pub accumulate: bool,
    pub ep: RawEpilogue,
}

/// # Safety
/// The contract of [`Finish`].
#[inline(always)]
pub(crate) unsafe fn finish<S: Simd>(t: &Finish) {
    // SAFETY: passed on.
    unsafe {
        if !t.cols.is_multiple_of(S::LANES) {
            return finish_cols(t, t.cols);
        }
        finish_vectors::<S>(t);
        if let Some(act @ (Act::Gelu | Act::GeluTanh)) = t.ep.act {
            for row in t.row {
                let out = std::slice::from_raw_parts_mut(t.c.add(row + t.col), t.cols);
                for_act!(act, |f| out.iter_mut().for_each(|o| *o = f.value_f32(*o)));
            }
        }
    }
}

/// Whole vectors, all but a GELU: each result is stored once.
#[inline(always)]
unsafe fn finish_vectors<S: Simd>(t: &Finish) {
    for (i, &row) in t.row.iter().enumerate() {
        for j in (0..t.cols).step_by(S::LANES) {
            let at = row + t.col + j;
            // SAFETY: the contract of `Finish`.
            unsafe {
                let mut v = S::load(t.tile.add(i * t.nr + j));
                if t.accumulate {
                    v = S::add(S::load(t.c.add(at)), v);
                }
                if !t.ep.bias.is_null() {
                    v = S::add(v, S::load(t.ep.bias.add(t.col + j)));
                }
                if !t.ep.addend.is_null() {
                    v = S::add(v, S::load(t.ep.addend.add(at)));
                }
                if !t.ep.preact.is_null() {
                    S::store(t.ep.preact.add(at), v);
                }
                if t.ep.act == Some(Act::Relu) {
                    v = S::max(S::splat(0.0), v); // a NaN stays
                }
                S::store(t.c.add(at), v);
            }
        }
    }
}

#[inline(always)]
unsafe fn finish_cols(t: &Finish, cols: usize) {
    use std::slice::{from_raw_parts, from_raw_parts_mut};
    for (i, &row) in t.row.iter().enumerate() {
        let at = row + t.col;
        // SAFETY: the contract of `Finish`; `tile` is a buffer of its own, and `preact` is another tensor than `c`.
        unsafe {
            let sums = from_raw_parts(t.tile.add(i * t.nr), cols);
            let out = from_raw_parts_mut(t.c.add(at), cols);
            if t.accumulate {
                out.iter_mut().zip(sums).for_each(|(o, s)| *o += s);
            } else {
                out.copy_from_slice(sums);
            }
            if !t.ep.bias.is_null() {
                let bias = from_raw_parts(t.ep.bias.add(t.col), cols);
                out.iter_mut().zip(bias).for_each(|(o, b)| *o += b);
            }
            if !t.ep.addend.is_null() {
                let addend = from_raw_parts(t.ep.addend.add(at), cols);
                out.iter_mut().zip(addend).for_each(|(o, a)| *o += a);
            }
            if !t.ep.preact.is_null() {
                from_raw_parts_mut(t.ep.preact.add(at), cols).copy_from_slice(out);
            }
            if let Some(act) = t.ep.act {
                for_act!(act, |f| out.iter_mut().for_each(|o| *o = f.value_f32(*o)));
            }
        }
    }
}
