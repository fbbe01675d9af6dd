//! Window attention on the CPU, with attention's inner loops. A task gathers the rows of one window's head into its
//! scratch, a run of a window's row at a time; scores begin as `Q K^T`, get the bias, and in windows that wrap the
//! mask, both divided by the scale so that one factor serves for all.
//!
//! Every sum runs in an order that does not depend on the number of threads.

use super::{MASK, WindowAttention, WindowAttentionBwd, Windows};
use crate::backend::cpu::parallel::{Shared, parallel_for, part};
use crate::backend::cpu::scratch::{with_floats, with_indices};
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::ops::attention::cpu::{Plan, Scratch, choose};
use crate::{Error, Result, multiversion};
use std::f32::consts::LOG2_E;
use std::ops::Range;

/// Groups of windows whose gradients of the table are summed apart, at most; fewer windows than that share out their
/// heads.
const GROUPS: usize = 16;

/// A launch.
struct Job {
    g: Windows,
    p: Plan,
    /// For each way to wrap (rows, columns, both) `MASK / scale` or 0 by `[token, token]`, rows `tp` apart.
    masks: [Vec<f32>; 3],
}

multiversion! {
    fn add(a: &[f32], y: &mut [f32]) {
        for (y, a) in y.iter_mut().zip(a) {
            *y += a;
        }
    }
}

impl Job {
    fn new(g: Windows, variant: Option<&str>) -> Result<Self> {
        let p = Plan::new(choose(variant)?, g.extents());
        let tokens = g.tokens();
        let masks = [[true, false], [false, true], [true, true]].map(|wraps| {
            let mut mask = vec![0.0; tokens * p.tp];
            for (i, j) in (0..tokens).flat_map(|i| (0..tokens).map(move |j| (i, j))) {
                if g.apart(wraps, i, j) {
                    mask[i * p.tp + j] = MASK / g.scale();
                }
            }
            mask
        });
        Ok(Job { g, p, masks })
    }

    fn windows(&self) -> usize {
        self.g.images * self.g.per_image()
    }

    /// Floats of the expanded bias.
    fn bias_len(&self) -> usize {
        self.g.op.heads * self.g.tokens() * self.p.tp
    }

    /// `bias[head][i][j] = table[entry(i, j)][head] / scale`, or with i and j exchanged.
    fn expand(&self, table: &[f32], bias: &mut [f32], exchanged: bool) {
        let (g, tp) = (&self.g, self.p.tp);
        let (heads, tokens, entries) = (g.op.heads, g.tokens(), g.entries());
        let factor = 1.0 / g.scale();
        let bias = Shared::new(bias);
        parallel_for(heads, |head| {
            with_floats(entries, |column| {
                // The head's column of the table, backwards where i and j are not exchanged.
                for (e, c) in column.iter_mut().enumerate() {
                    let e = if exchanged { e } else { entries - 1 - e };
                    *c = table[e * heads + head] * factor;
                }
                for i in 0..tokens {
                    // SAFETY: a row of this task's head.
                    let row = unsafe {
                        std::slice::from_raw_parts_mut(bias.get().add((head * tokens + i) * tp), tp)
                    };
                    for j in self.window_rows() {
                        let entries = &column[g.entry(j.start, i)..][..j.len()];
                        row[j].copy_from_slice(entries);
                    }
                    row[tokens..].fill(0.0);
                }
            });
        });
    }

    /// A window's tokens by its rows: from one token of a row to the next, the entry of the table is the next one.
    fn window_rows(&self) -> impl Iterator<Item = Range<usize>> {
        let side = self.g.op.side;
        (0..side).map(move |r| r * side..(r + 1) * side)
    }

    /// The rows `rows` of a window's matrix of scores get bias and mask.
    fn add_bias(&self, window: usize, bias: &[f32], rows: Range<usize>, scores: &mut [f32]) {
        let tp = self.p.tp;
        let part = rows.start * tp..rows.end * tp;
        add(&bias[part.clone()], scores);
        let mask = match self.g.wraps(window) {
            [false, false] => return,
            [true, false] => 0,
            [false, true] => 1,
            [true, true] => 2,
        };
        add(&self.masks[mask][part], scores);
    }

    /// First element of q (0), k (1) or v (2) of a head in a pixel of qkv.
    fn part(&self, head: usize, part: usize) -> usize {
        (part * self.g.op.heads + head) * self.g.dim
    }

    /// Rows of the pixels `at`, `ld` floats a pixel, from element `first` of each: packed to `[rows, dp]`.
    fn pack(&self, x: &[f32], at: &[usize], first: usize, ld: usize, dst: &mut [f32]) {
        let (p, dim) = (&self.p, self.g.dim);
        for run in runs(at) {
            let from = at[run.start] * ld + first;
            assert!(from + (run.len() - 1) * ld + dim <= x.len() && run.end * p.dp <= dst.len());
            // SAFETY: asserted.
            unsafe {
                (p.k.pack)(
                    x[from..].as_ptr(),
                    ld,
                    run.len(),
                    dim,
                    dst[run.start * p.dp..].as_mut_ptr(),
                )
            }
        }
    }

    /// The way back, each row times its factor.
    ///
    /// # Safety
    /// The rows lie in `dst`, and no other task writes them.
    unsafe fn unpack(
        &self,
        src: &[f32],
        factor: Option<&[f32]>,
        dst: Shared,
        at: &[usize],
        first: usize,
        ld: usize,
    ) {
        let (p, dim) = (&self.p, self.g.dim);
        assert!(src.len() >= at.len() * p.dp && factor.is_none_or(|f| f.len() >= at.len()));
        for run in runs(at) {
            let factor = factor.map_or(std::ptr::null(), |f| f[run.start..].as_ptr());
            // SAFETY: asserted, and the caller's promise.
            unsafe {
                let to = dst.get().add(at[run.start] * ld + first);
                (p.k.unpack)(
                    src[run.start * p.dp..].as_ptr(),
                    factor,
                    run.len(),
                    dim,
                    to,
                    ld,
                );
            }
        }
    }
}

/// Stretches of neighbouring pixels.
fn runs(at: &[usize]) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next;
        if start == at.len() {
            return None;
        }
        next += 1;
        while next < at.len() && at[next] == at[next - 1] + 1 {
            next += 1;
        }
        Some(start..next)
    })
}

pub(super) fn forward(op: &WindowAttention, cx: &mut CpuCx) -> Result<CpuKernel> {
    let g = Windows::of(*op, &cx.x[0], &cx.x[1]).map_err(Error::input)?;
    let job = Job::new(g, cx.variant)?;
    cx.workspace(job.bias_len());
    Ok(Box::new(move |a| {
        let bias = a.work();
        job.expand(a.x(1), bias, false);
        let (out, lse) = (Shared::new(a.y(0)), Shared::new(a.y(1)));
        // A window's heads are done together, as its pixels lie together, unless there are too few windows.
        let shares = if job.windows() < GROUPS {
            g.op.heads
        } else {
            1
        };
        parallel_for(job.windows() * shares, |task| {
            let window = task / shares;
            with_indices(g.tokens(), |at| {
                at.iter_mut()
                    .enumerate()
                    .for_each(|(t, at)| *at = g.pixel(window, t));
                for head in part(g.op.heads, shares, task % shares) {
                    forward_head(&job, a.x(0), bias, (window, head), at, out, lse);
                }
            });
        });
    }))
}

fn forward_head(
    job: &Job,
    qkv: &[f32],
    bias: &[f32],
    (window, head): (usize, usize),
    at: &[usize],
    out: Shared,
    lse: Shared,
) {
    let (p, tokens) = (&job.p, at.len());
    let whole = p.tp * p.dp;
    let sizes = [
        whole,
        whole,
        p.block * p.dp,
        p.block * p.tp,
        p.block,
        p.block,
    ];
    with_floats(Scratch::size(&sizes), |s| {
        let mut s = Scratch::new(s);
        let [kt, v, q, tile, max, sum] = sizes.map(|n| s.take(n));
        job.pack(qkv, at, job.part(head, 1), p.ld, v);
        v[tokens * p.dp..].fill(0.0);
        p.transpose(v, kt);
        job.pack(qkv, at, job.part(head, 2), p.ld, v);
        let bias = &bias[head * tokens * p.tp..][..tokens * p.tp];
        let blocks = tokens.div_ceil(p.block);
        for b in 0..blocks {
            let rows = part(tokens, blocks, b);
            let (m, at) = (rows.len(), &at[rows.clone()]);
            job.pack(qkv, at, job.part(head, 0), p.ld, q);
            p.scores(m, q, kt, tile);
            job.add_bias(window, bias, rows.clone(), &mut tile[..m * p.tp]);
            // SAFETY: the tile has `m` rows of `tp` scores.
            unsafe {
                (p.k.softmax)(
                    tile.as_mut_ptr(),
                    m,
                    tokens,
                    p.c,
                    max.as_mut_ptr(),
                    sum.as_mut_ptr(),
                )
            };
            p.combine(m, tile, v, q);
            let first = (window * job.g.op.heads + head) * tokens + rows.start;
            for r in 0..m {
                // SAFETY: this task's rows.
                unsafe { *lse.get().add(first + r) = p.e.scale * max[r] + sum[r].ln() };
                sum[r] = 1.0 / sum[r];
            }
            // SAFETY: this task's rows.
            unsafe { job.unpack(q, Some(sum), out, at, head * job.g.dim, p.width()) };
        }
    });
}

pub(super) fn backward(op: &WindowAttentionBwd, cx: &mut CpuCx) -> Result<CpuKernel> {
    let g = Windows::of(op.fwd, &cx.x[1], &cx.x[4]).map_err(Error::input)?;
    let job = Job::new(g, cx.variant)?;
    let (heads, entries) = (g.op.heads, g.entries());
    let groups = job.windows().min(GROUPS);
    cx.workspace(job.bias_len() + groups * heads * entries);
    Ok(Box::new(move |a| {
        let (bias, sums) = a.work().split_at_mut(job.bias_len());
        job.expand(a.x(4), bias, true);
        let x = [a.x(0), a.x(1), a.x(2), a.x(3)];
        let (dqkv, shared) = (Shared::new(a.y(0)), Shared::new(sums));
        parallel_for(groups * heads, |task| {
            // SAFETY: this task's entries.
            let sums = unsafe {
                std::slice::from_raw_parts_mut(shared.get().add(task * entries), entries)
            };
            let windows = part(job.windows(), groups, task / heads);
            backward_head(&job, x, bias, windows, task % heads, dqkv, sums);
        });
        let dtable = a.y(1);
        dtable.fill(0.0);
        for (task, sums) in sums.chunks_exact(entries).enumerate() {
            for (d, s) in dtable[task % heads..].iter_mut().step_by(heads).zip(sums) {
                *d += s;
            }
        }
    }))
}

/// One head of some windows: its part of dqkv, and the sums of its gradients of the bias by entry of the table.
///
/// Tiles are over (key, query), as in attention's backward pass.
fn backward_head(
    job: &Job,
    x: [&[f32]; 4],
    bias: &[f32],
    windows: Range<usize>,
    head: usize,
    dqkv: Shared,
    sums: &mut [f32],
) {
    let [dout, qkv, out, lse] = x;
    let (p, g) = (&job.p, &job.g);
    let (tokens, dim) = (g.tokens(), g.dim);
    let (whole, tile) = (p.tp * p.dp, p.block * p.tp);
    let rows = p.block * p.dp;
    let sizes = [
        whole,
        whole,
        whole,
        whole,
        whole,
        whole,
        rows,
        rows,
        tile,
        tile,
        2 * p.tp,
        tokens * p.tp,
    ];
    let bias = &bias[head * tokens * p.tp..][..tokens * p.tp];
    with_indices(tokens, |at| {
        with_floats(Scratch::size(&sizes), |s| {
            let mut s = Scratch::new(s);
            let [q, qt, d, dt, o, dq, rows, grads, ps, ds, stats, dbias] = sizes.map(|n| s.take(n));
            dbias.fill(0.0);
            for window in windows {
                at.iter_mut()
                    .enumerate()
                    .for_each(|(t, at)| *at = g.pixel(window, t));
                job.pack(qkv, at, job.part(head, 0), p.ld, q);
                q[tokens * p.dp..].fill(0.0);
                p.transpose(q, qt);
                job.pack(dout, at, head * dim, p.width(), d);
                d[tokens * p.dp..].fill(0.0);
                p.transpose(d, dt);
                dq.fill(0.0);
                // Padding queries get the probability zero.
                let (lse2, delta) = stats.split_at_mut(p.tp);
                lse2.fill(1e30);
                delta.fill(0.0);
                let first = (window * g.op.heads + head) * tokens;
                for (l2, l) in lse2.iter_mut().zip(&lse[first..][..tokens]) {
                    *l2 = l * LOG2_E;
                }
                job.pack(out, at, head * dim, p.width(), o);
                // SAFETY: `tokens` rows of `dp` floats on both sides.
                unsafe {
                    (p.k.dots)(
                        o.as_ptr(),
                        d.as_ptr(),
                        p.dp,
                        tokens,
                        dim,
                        delta.as_mut_ptr(),
                    )
                };
                let blocks = tokens.div_ceil(p.block);
                for b in 0..blocks {
                    let keys = part(tokens, blocks, b);
                    let (m, at) = (keys.len(), &at[keys.clone()]);
                    job.pack(qkv, at, job.part(head, 2), p.ld, rows);
                    p.scores(m, rows, dt, ds);
                    job.pack(qkv, at, job.part(head, 1), p.ld, rows);
                    p.scores(m, rows, qt, ps);
                    job.add_bias(window, bias, keys.clone(), &mut ps[..m * p.tp]);
                    // SAFETY: both tiles have `m` rows of `tp`, the statistics two.
                    unsafe {
                        (p.k.gradient)(
                            ps.as_mut_ptr(),
                            ds.as_mut_ptr(),
                            m,
                            p.tp,
                            stats.as_ptr(),
                            p.c,
                            p.e.scale,
                        )
                    };
                    add(&ds[..m * p.tp], &mut dbias[keys.start * p.tp..][..m * p.tp]);
                    p.accumulate(m, ds, rows, dq);
                    p.combine(m, ps, d, grads);
                    // SAFETY: this task's head of these pixels.
                    unsafe { job.unpack(grads, None, dqkv, at, job.part(head, 2), p.ld) };
                    p.combine(m, ds, q, grads);
                    // SAFETY: as above.
                    unsafe { job.unpack(grads, None, dqkv, at, job.part(head, 1), p.ld) };
                }
                // SAFETY: as above.
                unsafe { job.unpack(dq, None, dqkv, at, job.part(head, 0), p.ld) };
            }
            // The gradient of a score is the scale times that of the bias.
            let factor = 1.0 / p.e.scale;
            sums.fill(0.0);
            for (j, dbias) in dbias.chunks_exact(p.tp).enumerate() {
                for i in job.window_rows() {
                    let sums = sums[g.entry(i.start, j)..].iter_mut();
                    sums.zip(&dbias[i]).for_each(|(s, d)| *s += d * factor);
                }
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::{Backend, CompileOptions};
    use crate::graph::{Graph, Phase, Spec};
    use crate::ops::attention::cpu::variants;
    use crate::ops::check::run_case;
    use crate::ops::window_attention::ROOM;
    use crate::philox::Philox;
    use std::sync::Arc;

    #[test]
    fn every_variant_follows_the_reference() {
        for variant in variants() {
            let mut options = CompileOptions {
                poison: true,
                ..Default::default()
            };
            for op in ["window_attention", "window_attention_bwd"] {
                options.variants.insert(op.into(), (*variant).into());
            }
            for case in [
                "side=7,h=14,w=7,heads=2,d=32,shift=3,shift_w=0",
                "side=5,heads=1,d=20,shift=2",
            ] {
                for f in run_case(&ROOM, case, &Cpu::new(), &options).unwrap() {
                    assert!(f.ok(), "{variant} {case}: {f:?}");
                }
            }
        }
    }

    /// Forward and backward on `threads` threads.
    fn bits(threads: usize) -> Vec<u32> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let mut g = Graph::new();
            let qkv = g.input("qkv", Spec::f32([3, 14, 14, 3 * 2 * 32]));
            let table = g.input("table", Spec::f32([169, 2]));
            let op = WindowAttention {
                heads: 2,
                side: 7,
                shift: [3, 3],
            };
            let y = g.window_attention(op, qkv, table).unwrap();
            let dy = g.input("dy", g.spec(y).clone());
            let grads = g.backward_from(&[(y, dy)], &[qkv, table]).unwrap();
            let kept = [y, grads[&qkv], grads[&table]];
            kept.iter().for_each(|&t| g.keep(t));
            let mut exec = Cpu::new()
                .compile(Arc::new(g), &CompileOptions::default())
                .unwrap();
            let mut rng = Philox::new(5, 0);
            for t in [qkv, table, dy] {
                let len = exec.graph().spec(t).len();
                let v: Vec<f32> = (0..len).map(|_| rng.normal()).collect();
                exec.write(t, &v).unwrap();
            }
            exec.run(&[Phase::Forward, Phase::Backward]).unwrap();
            let all = kept.iter().flat_map(|&t| exec.read(t).unwrap());
            all.map(f32::to_bits).collect()
        })
    }

    #[test]
    fn same_bits_on_any_number_of_threads() {
        let one = bits(1);
        assert_eq!(one, bits(2));
        assert_eq!(one, bits(7));
    }
}
