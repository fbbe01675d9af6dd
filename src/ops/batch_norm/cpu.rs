//! CPU kernels of batch norm. All of them walk `x` seen as `[rows, C]` in chunks that stay in the second-level cache.
//!
//! Few channels are seen as *wide rows*: `k` rows of `C` side by side, a multiple of 16 lanes, so that the loops run
//! over whole vectors whatever `C` is; element `i` of the flat tensor belongs to lane `i % lanes` and to channel
//! `i % C`. Sums are kept per lane and chunk, and merged in float64 in a fixed order: the same bits with any number of
//! threads.

use crate::backend::cpu::par::{self, SharedMut};
use crate::multiversion;

/// Elements of a chunk: 128 KiB, so that a second pass over it comes from the second-level cache.
const CHUNK: usize = 32 * 1024;

/// How `[rows, C]` is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    rows: usize,
    channels: usize,
    /// Channels times the rows that make one wide row.
    lanes: usize,
    /// Elements of a chunk: a multiple of `lanes`.
    chunk: usize,
    /// Number of chunks.
    pub chunks: usize,
}

impl Cut {
    /// For `rows` rows of `channels`.
    pub fn new(rows: usize, channels: usize) -> Self {
        let mut lanes = channels.max(1);
        if channels < 128 {
            let twos = channels.trailing_zeros().min(4);
            lanes *= 16 >> twos;
            lanes *= 128usize.div_ceil(lanes);
        }
        let chunk = (CHUNK / lanes).max(1) * lanes;
        Cut {
            rows,
            channels,
            lanes,
            chunk,
            chunks: (rows * channels).div_ceil(chunk).max(1),
        }
    }

    fn range(&self, i: usize) -> (usize, usize) {
        let from = i * self.chunk;
        (from, self.chunk.min(self.rows * self.channels - from))
    }

    /// Scratch of [`statistics`].
    pub fn statistics_scratch(&self) -> usize {
        3 * self.lanes * self.chunks
    }

    /// Scratch of [`backward_sums`].
    pub fn sums_scratch(&self) -> usize {
        2 * self.lanes * self.chunks
    }

    /// Scratch of [`normalize`] and of the backward passes for per-lane copies of channel values.
    pub fn lane_scratch(&self) -> usize {
        6 * self.lanes
    }
}

multiversion! {
    /// One chunk: `mean` per lane (equal in all lanes of a channel), then the sums of deviations and of their squares.
    fn chunk_moments(x: &[f32], channels: usize, mean: &mut [f32], s1: &mut [f32], s2: &mut [f32]) {
        let lanes = mean.len();
        mean.fill(0.0);
        for row in x.chunks(lanes) {
            for (m, &v) in mean.iter_mut().zip(row) {
                *m += v;
            }
        }
        let per = (x.len() / channels) as f32;
        for c in 0..channels {
            let mut sum = 0.0;
            for m in mean[c..].iter().step_by(channels) {
                sum += m;
            }
            mean[c] = sum / per;
        }
        let (first, rest) = mean.split_at_mut(channels);
        for copy in rest.chunks_mut(channels) {
            copy.copy_from_slice(first);
        }
        s1.fill(0.0);
        s2.fill(0.0);
        for row in x.chunks(lanes) {
            for (((&v, &m), a), b) in row.iter().zip(mean.iter()).zip(s1.iter_mut()).zip(s2.iter_mut()) {
                let d = v - m;
                *a += d;
                *b += d * d;
            }
        }
    }
}

/// Mean and biased variance of each channel: every chunk by two passes while it is cached, chunks merged as in Chan,
/// Golub & LeVeque 1979 in float64. `done(channel, mean, variance)` is called for each channel in order.
pub fn statistics(
    cut: &Cut,
    x: &[f32],
    scratch: &mut [f32],
    mut done: impl FnMut(usize, f64, f64),
) {
    let (lanes, channels) = (cut.lanes, cut.channels);
    let shared = SharedMut::new(scratch);
    par::for_each(cut.chunks, |i| {
        let (from, len) = cut.range(i);
        // SAFETY: each chunk has its own stretch.
        let s = unsafe { shared.slice(i * 3 * lanes, 3 * lanes) };
        let (mean, s) = s.split_at_mut(lanes);
        let (s1, s2) = s.split_at_mut(lanes);
        chunk_moments(&x[from..from + len], channels, mean, s1, s2);
    });
    const BLOCK: usize = 16;
    for c0 in (0..channels).step_by(BLOCK) {
        let width = BLOCK.min(channels - c0);
        let (mut mean, mut m2, mut n) = ([0f64; BLOCK], [0f64; BLOCK], 0f64);
        for (i, s) in scratch.chunks(3 * lanes).take(cut.chunks).enumerate() {
            let ni = (cut.range(i).1 / channels) as f64;
            for j in 0..width {
                let (mut a, mut b) = (0f64, 0f64);
                for lane in (c0 + j..lanes).step_by(channels) {
                    a += f64::from(s[lanes + lane]);
                    b += f64::from(s[2 * lanes + lane]);
                }
                let delta = f64::from(s[c0 + j]) + a / ni - mean[j];
                m2[j] += b - a * a / ni + delta * delta * (n * ni / (n + ni));
                mean[j] += delta * (ni / (n + ni));
            }
            n += ni;
        }
        for j in 0..width {
            done(c0 + j, mean[j], m2[j].max(0.0) / n);
        }
    }
}

/// Copies `from` (one value per channel) to every lane.
fn spread<'s>(cut: &Cut, from: impl Fn(usize) -> f32, scratch: &mut &'s mut [f32]) -> &'s [f32] {
    let (to, rest) = std::mem::take(scratch).split_at_mut(cut.lanes);
    *scratch = rest;
    for (lane, v) in to.iter_mut().enumerate() {
        *v = from(lane % cut.channels);
    }
    to
}

/// ReLU that lets NaN through, as PyTorch's does.
#[inline(always)]
fn relu(v: f32) -> f32 {
    if v < 0.0 { 0.0 } else { v }
}

multiversion! {
    fn normalize_chunk<const RELU: bool, const ADD: bool>(
        x: &[f32], add: &[f32], mean: &[f32], scale: &[f32], beta: &[f32], y: &mut [f32],
    ) {
        let lanes = mean.len();
        for (i, (y, x)) in y.chunks_mut(lanes).zip(x.chunks(lanes)).enumerate() {
            let add = if ADD { &add[i * lanes..][..x.len()] } else { x };
            for (((((y, &x), &a), &m), &s), &b) in
                y.iter_mut().zip(x).zip(add).zip(mean).zip(scale).zip(beta)
            {
                let mut v = (x - m) * s + b;
                if ADD {
                    v += a;
                }
                *y = if RELU { relu(v) } else { v };
            }
        }
    }
}

/// Per-channel values of one norm.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// Mean.
    pub mean: &'a [f32],
    /// 1 / sqrt(variance + eps).
    pub rstd: &'a [f32],
    /// Scale.
    pub gamma: &'a [f32],
    /// Offset.
    pub beta: &'a [f32],
    /// Mean and variance are those of this batch.
    pub batch: bool,
}

/// `y = (x - mean) * (rstd * gamma) + beta`, plus `add`, then ReLU.
pub fn normalize(
    cut: &Cut,
    x: &[f32],
    norm: Norm,
    add: Option<&[f32]>,
    relu: bool,
    y: &mut [f32],
    mut scratch: &mut [f32],
) {
    let mean = spread(cut, |c| norm.mean[c], &mut scratch);
    let scale = spread(cut, |c| norm.rstd[c] * norm.gamma[c], &mut scratch);
    let beta = spread(cut, |c| norm.beta[c], &mut scratch);
    let shared = SharedMut::new(y);
    // Backwards: what the pass before read last is still cached.
    par::for_each(cut.chunks, |i| {
        let (from, len) = cut.range(cut.chunks - 1 - i);
        let x = &x[from..from + len];
        let a = add.map_or(x, |a| &a[from..from + len]);
        // SAFETY: each chunk has its own stretch.
        let y = unsafe { shared.slice(from, len) };
        match (relu, add.is_some()) {
            (false, false) => normalize_chunk::<false, false>(x, a, mean, scale, beta, y),
            (true, false) => normalize_chunk::<true, false>(x, a, mean, scale, beta, y),
            (false, true) => normalize_chunk::<false, true>(x, a, mean, scale, beta, y),
            (true, true) => normalize_chunk::<true, true>(x, a, mean, scale, beta, y),
        }
    });
}

/// Where the fused ReLU passed.
#[derive(Clone, Copy, Debug)]
pub enum Mask<'a> {
    /// There is no ReLU.
    None,
    /// Recomputed from `x` and `beta`, with the forward pass's own operations: one tensor less to read.
    Recompute,
    /// The result of the forward pass: positive where it passed.
    Result(&'a [f32]),
}

const NO_MASK: u8 = 0;
const RECOMPUTE: u8 = 1;
const RESULT: u8 = 2;

#[inline(always)]
fn masked<const MASK: u8>(dy: f32, x: f32, y: f32, mean: f32, scale: f32, beta: f32) -> f32 {
    let pass = match MASK {
        RECOMPUTE => (x - mean) * scale + beta > 0.0,
        RESULT => y > 0.0,
        _ => true,
    };
    if pass { dy } else { 0.0 }
}

multiversion! {
    fn sums_chunk<const MASK: u8>(
        dy: &[f32], x: &[f32], y: &[f32], mean: &[f32], scale: &[f32], beta: &[f32], s: &mut [f32], t: &mut [f32],
    ) {
        let lanes = mean.len();
        s.fill(0.0);
        t.fill(0.0);
        for ((dy, x), y) in dy.chunks(lanes).zip(x.chunks(lanes)).zip(y.chunks(lanes)) {
            for (((((((&dy, &x), &y), &m), &k), &b), s), t) in
                dy.iter().zip(x).zip(y).zip(mean).zip(scale).zip(beta).zip(s.iter_mut()).zip(t.iter_mut())
            {
                let d = masked::<MASK>(dy, x, y, m, k, b);
                *s += d;
                *t += d * (x - m);
            }
        }
    }
}

multiversion! {
    fn dx_chunk<const MASK: u8, const DADD: bool>(
        dy: &[f32], x: &[f32], y: &[f32], mean: &[f32], scale: &[f32], beta: &[f32], a: &[f32], b: &[f32],
        dx: &mut [f32], dadd: &mut [f32],
    ) {
        let lanes = mean.len();
        for (i, (dx, x)) in dx.chunks_mut(lanes).zip(x.chunks(lanes)).enumerate() {
            let at = i * lanes..i * lanes + x.len();
            let (dy, y) = (&dy[at.clone()], &y[at.clone()]);
            let n = x.len();
            let (mean, scale, beta, a, b) = (&mean[..n], &scale[..n], &beta[..n], &a[..n], &b[..n]);
            if DADD {
                let dadd = &mut dadd[at];
                for l in 0..n {
                    let d = masked::<MASK>(dy[l], x[l], y[l], mean[l], scale[l], beta[l]);
                    dadd[l] = d;
                    dx[l] = (d - a[l] - (x[l] - mean[l]) * b[l]) * scale[l];
                }
            } else {
                for l in 0..n {
                    let d = masked::<MASK>(dy[l], x[l], y[l], mean[l], scale[l], beta[l]);
                    dx[l] = (d - a[l] - (x[l] - mean[l]) * b[l]) * scale[l];
                }
            }
        }
    }
}

/// Results of [`backward`].
#[derive(Debug)]
pub struct Grads<'a> {
    /// Gradient of x.
    pub dx: &'a mut [f32],
    /// Gradient of gamma.
    pub dgamma: &'a mut [f32],
    /// Gradient of beta.
    pub dbeta: &'a mut [f32],
    /// Gradient of the addend: the masked `dy`.
    pub dadd: Option<&'a mut [f32]>,
}

/// `dbeta = sum d`, `dgamma = sum d xhat`, and with statistics of this batch (n values a channel)
/// `dx = (d - dbeta / n - xhat dgamma / n) rstd gamma` (Ioffe & Szegedy 2015), else `dx = d rstd gamma`; `d` is `dy`
/// where the ReLU passed. One pass of sums, one pass of writing.
pub fn backward(
    cut: &Cut,
    dy: &[f32],
    x: &[f32],
    norm: Norm,
    mask: Mask,
    out: Grads,
    scratch: &mut [f32],
) {
    let (lanes, channels) = (cut.lanes, cut.channels);
    let (partial, mut scratch) = scratch.split_at_mut(cut.sums_scratch());
    let mean = spread(cut, |c| norm.mean[c], &mut scratch);
    let scale = spread(cut, |c| norm.rstd[c] * norm.gamma[c], &mut scratch);
    let beta = match mask {
        Mask::Recompute => spread(cut, |c| norm.beta[c], &mut scratch),
        _ => mean,
    };
    let shared = SharedMut::new(partial);
    par::for_each(cut.chunks, |i| {
        let (from, len) = cut.range(i);
        let (dy, x) = (&dy[from..from + len], &x[from..from + len]);
        // SAFETY: each chunk has its own stretch.
        let s = unsafe { shared.slice(i * 2 * lanes, 2 * lanes) };
        let (s, t) = s.split_at_mut(lanes);
        match mask {
            Mask::None => sums_chunk::<NO_MASK>(dy, x, x, mean, scale, beta, s, t),
            Mask::Recompute => sums_chunk::<RECOMPUTE>(dy, x, x, mean, scale, beta, s, t),
            Mask::Result(y) => {
                sums_chunk::<RESULT>(dy, x, &y[from..from + len], mean, scale, beta, s, t);
            }
        }
    });
    for c in 0..channels {
        let (mut s, mut t) = (0f64, 0f64);
        for p in partial.chunks(2 * lanes).take(cut.chunks) {
            for lane in (c..lanes).step_by(channels) {
                s += f64::from(p[lane]);
                t += f64::from(p[lanes + lane]);
            }
        }
        out.dbeta[c] = s as f32;
        out.dgamma[c] = (t * f64::from(norm.rstd[c])) as f32;
    }
    let n = if norm.batch {
        cut.rows as f32
    } else {
        f32::INFINITY
    };
    let a = spread(cut, |c| out.dbeta[c] / n, &mut scratch);
    let b = spread(cut, |c| out.dgamma[c] * norm.rstd[c] / n, &mut scratch);
    let dx = SharedMut::new(out.dx);
    let dadd = out.dadd.map(SharedMut::new);
    par::for_each(cut.chunks, |i| {
        let (from, len) = cut.range(cut.chunks - 1 - i);
        let (dy, x) = (&dy[from..from + len], &x[from..from + len]);
        // SAFETY: each chunk has its own stretch.
        let dx = unsafe { dx.slice(from, len) };
        let y = match mask {
            Mask::Result(y) => &y[from..from + len],
            _ => x,
        };
        macro_rules! pass {
            ($mask:ident) => {
                match &dadd {
                    // SAFETY: as above.
                    Some(d) => {
                        dx_chunk::<$mask, true>(dy, x, y, mean, scale, beta, a, b, dx, unsafe {
                            d.slice(from, len)
                        })
                    }
                    None => {
                        dx_chunk::<$mask, false>(dy, x, y, mean, scale, beta, a, b, dx, &mut [])
                    }
                }
            };
        }
        match mask {
            Mask::None => pass!(NO_MASK),
            Mask::Recompute => pass!(RECOMPUTE),
            Mask::Result(_) => pass!(RESULT),
        }
    });
}
