//! Attention on the CPU: one task per image and head, whose Q, K and V are packed once into the thread's scratch (they
//! fit in L2 up to some hundred tokens); then blocks of rows of the score matrix, a tile at a time.
//!
//! A sum over channels or tokens runs in order whatever the tile, and a task owns all its results, so the bits do not
//! depend on the number of threads.

use super::kernel::{Kernels, Tile, available};
use super::{Attention, AttentionBwd, Extents};
use crate::backend::cpu::pack::Columns;
use crate::backend::cpu::parallel::{Shared, parallel_for, part};
use crate::backend::cpu::scratch::with_floats;
use crate::backend::cpu::{CpuCx, CpuKernel};
use crate::{Error, Result};
use std::f32::consts::LOG2_E;
use std::ops::Range;
use std::sync::LazyLock;

/// Floats of a thread's tile of scores.
const TILE: usize = 6 * 1024;

/// Names of the variants, the default first: the instruction sets that the processor has.
pub(in crate::ops) fn variants() -> &'static [&'static str] {
    static NAMES: LazyLock<Vec<&'static str>> =
        LazyLock::new(|| available().iter().map(|k| k.name).collect());
    &NAMES
}

pub(in crate::ops) fn choose(variant: Option<&str>) -> Result<&'static Kernels> {
    let Some(name) = variant else {
        return Ok(available()[0]);
    };
    let found = available().iter().copied().find(|k| k.name == name);
    found.ok_or_else(|| {
        Error::input(format!(
            "attention has no variant {name} on this processor; there are {}",
            variants().join(", ")
        ))
    })
}

/// Extents and derived sizes of a launch.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Plan {
    pub k: &'static Kernels,
    pub e: Extents,
    /// Tokens and channels in whole registers.
    pub tp: usize,
    pub dp: usize,
    /// Floats from a token's q, k or v to the next token's.
    pub ld: usize,
    /// Rows of a tile of scores.
    pub block: usize,
    /// Factor from a product to the exponent of two.
    pub c: f32,
}

impl Plan {
    pub fn new(k: &'static Kernels, e: Extents) -> Self {
        let tp = k.pad(e.tokens);
        Plan {
            k,
            e,
            tp,
            dp: k.pad(e.dim),
            ld: 3 * e.heads * e.dim,
            block: (TILE / tp).clamp(12, 96).min(e.tokens),
            c: e.scale * LOG2_E,
        }
    }

    /// Floats from a token's row of the result to the next.
    pub fn width(&self) -> usize {
        self.e.heads * self.e.dim
    }

    /// First element of q (0), k (1) or v (2) of a head in qkv.
    fn qkv(&self, head: usize, part: usize) -> usize {
        let (n, h) = (head / self.e.heads, head % self.e.heads);
        n * self.e.tokens * self.ld + (part * self.e.heads + h) * self.e.dim
    }

    /// First element of a head in out.
    fn out(&self, head: usize) -> usize {
        let (n, h) = (head / self.e.heads, head % self.e.heads);
        n * self.e.tokens * self.width() + h * self.e.dim
    }

    /// Rows `rows` of a head's matrix whose first element is `x[first]`, packed to `[rows, dp]`.
    fn pack(&self, x: &[f32], first: usize, ld: usize, rows: Range<usize>, dst: &mut [f32]) {
        let (from, n) = (first + rows.start * ld, rows.len());
        assert!(from + (n - 1) * ld + self.e.dim <= x.len() && n * self.dp <= dst.len());
        // SAFETY: asserted.
        unsafe { (self.k.pack)(x[from..].as_ptr(), ld, n, self.e.dim, dst.as_mut_ptr()) }
    }

    /// The transpose of `src` `[tp, dp]` as panels for [`product`](Self::product).
    pub fn transpose(&self, src: &[f32], dst: &mut [f32]) {
        assert!(src.len().min(dst.len()) >= self.tp * self.dp);
        for (j, n) in panels(self.k, self.tp) {
            let at = j * self.dp;
            let columns = Columns {
                data: src[at..].as_ptr(),
                col_stride: self.dp,
                cols: n,
                depth: self.dp,
                nr: n,
                out: dst[at..].as_mut_ptr(),
            };
            // SAFETY: asserted; a panel is `n` tokens, whole registers, of `dp` channels on both sides.
            unsafe { (self.k.pack_columns)(&columns) };
        }
    }

    /// `c[m, tp] = a[m, dim] B`, with B from [`transpose`](Self::transpose).
    pub fn scores(&self, m: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
        assert!(a.len() >= m * self.dp && b.len() >= self.tp * self.dp && c.len() >= m * self.tp);
        for (j, n) in panels(self.k, self.tp) {
            let t = Tile {
                a: a.as_ptr(),
                lda: self.dp,
                b: b[j * self.dp..].as_ptr(),
                ldb: n,
                depth: self.e.dim,
                c: c[j..].as_mut_ptr(),
                ldc: self.tp,
            };
            // SAFETY: asserted.
            unsafe { row_tiles(self.k, m, n, self.dp, false, t) };
        }
    }

    /// `c[m, dp] = a[m, tokens] b[tokens, dp]`, where rows of `a` are `tp` apart.
    pub fn combine(&self, m: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
        assert!(
            a.len() >= m * self.tp && b.len() >= self.e.tokens * self.dp && c.len() >= m * self.dp
        );
        for (j, n) in panels(self.k, self.dp) {
            let t = Tile {
                a: a.as_ptr(),
                lda: self.tp,
                b: b[j..].as_ptr(),
                ldb: self.dp,
                depth: self.e.tokens,
                c: c[j..].as_mut_ptr(),
                ldc: self.dp,
            };
            // SAFETY: asserted.
            unsafe { row_tiles(self.k, m, n, self.tp, false, t) };
        }
    }

    /// `c[tokens, dp] += a^T b`, for `a` `[m, tp]` and `b` `[m, dp]`.
    pub fn accumulate(&self, m: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
        assert!(
            a.len() >= m * self.tp && b.len() >= m * self.dp && c.len() >= self.e.tokens * self.dp
        );
        for (j, n) in panels(self.k, self.dp) {
            let t = Tile {
                a: a.as_ptr(),
                lda: self.tp,
                b: b[j..].as_ptr(),
                ldb: self.dp,
                depth: m,
                c: c[j..].as_mut_ptr(),
                ldc: self.dp,
            };
            // SAFETY: asserted.
            unsafe { row_tiles(self.k, self.e.tokens, n, 1, true, t) };
        }
    }

    /// Rows of `src` `[.., dp]`, each times its factor, to a head's matrix whose first element is `first`.
    ///
    /// # Safety
    /// The matrix lies in `dst`, and no other task writes it.
    unsafe fn unpack(
        &self,
        src: &[f32],
        factor: Option<&[f32]>,
        dst: Shared,
        first: usize,
        ld: usize,
        rows: Range<usize>,
    ) {
        assert!(src.len() >= rows.len() * self.dp && factor.is_none_or(|f| f.len() >= rows.len()));
        let factor = factor.map_or(std::ptr::null(), |f| f.as_ptr());
        // SAFETY: asserted, and the caller's promise.
        unsafe {
            let to = dst.get().add(first + rows.start * ld);
            (self.k.unpack)(src.as_ptr(), factor, rows.len(), self.e.dim, to, ld);
        }
    }
}

/// The panels of `width` floats (whole registers): first column and columns of each.
fn panels(k: &Kernels, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let (lanes, registers) = (k.lanes, width / k.lanes);
    let n = registers.div_ceil(k.rows.len());
    (0..n)
        .map(move |i| part(registers, n, i))
        .map(move |r| (r.start * lanes, r.len() * lanes))
}

/// Runs the tile `t` (that of row 0) over `m` rows of a panel of `n` columns; rows of A are `step` apart.
///
/// # Safety
/// The operands cover these rows.
unsafe fn row_tiles(k: &Kernels, m: usize, n: usize, step: usize, outer: bool, t: Tile) {
    let table = if outer { k.outer } else { k.rows }[n / k.lanes - 1];
    let tiles = m.div_ceil(table.len());
    for i in 0..tiles {
        let rows = part(m, tiles, i);
        // SAFETY: the caller's promise; the table's kernel fits the tile.
        unsafe {
            table[rows.len() - 1](&Tile {
                a: t.a.add(rows.start * step),
                c: t.c.add(rows.start * t.ldc),
                ..t
            });
        }
    }
}

/// Cuts a thread's scratch into pieces at cache lines.
pub(in crate::ops) struct Scratch<'a>(&'a mut [f32]);

impl<'a> Scratch<'a> {
    const LINE: usize = 16;

    /// Floats that pieces of these sizes take.
    pub fn size(pieces: &[usize]) -> usize {
        Self::LINE
            + pieces
                .iter()
                .map(|n| n.next_multiple_of(Self::LINE))
                .sum::<usize>()
    }

    pub fn new(s: &'a mut [f32]) -> Self {
        let skip = s.as_ptr().align_offset(64);
        Scratch(&mut s[skip..])
    }

    pub fn take(&mut self, n: usize) -> &'a mut [f32] {
        let all = std::mem::take(&mut self.0);
        let (piece, rest) = all.split_at_mut(n.next_multiple_of(Self::LINE));
        self.0 = rest;
        &mut piece[..n]
    }
}

pub(super) fn forward(op: &Attention, cx: &CpuCx) -> Result<CpuKernel> {
    let e = Extents::of(&cx.x[0], op.heads, op.scale).map_err(Error::input)?;
    let (p, probs) = (Plan::new(choose(cx.variant)?, e), op.probs);
    Ok(Box::new(move |a| {
        let heads = e.images * e.heads;
        let (out, lse) = (Shared::new(a.y(0)), Shared::new(a.y(1)));
        let probs = probs.then(|| Shared::new(a.y(2)));
        // Few heads: several tasks share one, each with queries of its own.
        let wanted = 2 * rayon::current_num_threads();
        let parts = wanted.div_ceil(heads).min(e.tokens.div_ceil(12));
        parallel_for(heads * parts, |task| {
            let queries = part(e.tokens, parts, task % parts);
            forward_head(&p, a.x(0), task / parts, queries, out, lse, probs);
        });
    }))
}

fn forward_head(
    p: &Plan,
    qkv: &[f32],
    head: usize,
    queries: Range<usize>,
    out: Shared,
    lse: Shared,
    probs: Option<Shared>,
) {
    let Extents { tokens, scale, .. } = p.e;
    let sizes = [
        p.tp * p.dp,
        p.tp * p.dp,
        p.block * p.dp,
        p.block * p.tp,
        p.block,
        p.block,
    ];
    with_floats(Scratch::size(&sizes), |s| {
        let mut s = Scratch::new(s);
        let [kt, v, q, tile, max, sum] = sizes.map(|n| s.take(n));
        p.pack(qkv, p.qkv(head, 1), p.ld, 0..tokens, v);
        v[tokens * p.dp..].fill(0.0);
        p.transpose(v, kt);
        p.pack(qkv, p.qkv(head, 2), p.ld, 0..tokens, v);
        let blocks = queries.len().div_ceil(p.block);
        for b in 0..blocks {
            let block = part(queries.len(), blocks, b);
            let block = queries.start + block.start..queries.start + block.end;
            let m = block.len();
            p.pack(qkv, p.qkv(head, 0), p.ld, block.clone(), q);
            p.scores(m, q, kt, tile);
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
            for (r, i) in block.clone().enumerate() {
                // SAFETY: this task's rows.
                unsafe { *lse.get().add(head * tokens + i) = scale * max[r] + sum[r].ln() };
                sum[r] = 1.0 / sum[r];
            }
            // SAFETY: this task's rows.
            unsafe { p.unpack(q, Some(sum), out, p.out(head), p.width(), block.clone()) };
            if let Some(probs) = probs {
                // SAFETY: as above; rows of `tp` probabilities to rows of `tokens`.
                unsafe {
                    let to = probs.get().add((head * tokens + block.start) * tokens);
                    (p.k.unpack)(tile.as_ptr(), sum.as_ptr(), m, tokens, to, tokens);
                }
            }
        }
    });
}

pub(super) fn backward(op: &AttentionBwd, cx: &CpuCx) -> Result<CpuKernel> {
    let e = Extents::of(&cx.x[1], op.heads, op.scale).map_err(Error::input)?;
    let p = Plan::new(choose(cx.variant)?, e);
    Ok(Box::new(move |a| {
        let dqkv = Shared::new(a.y(0));
        parallel_for(e.images * e.heads, |head| {
            backward_head(&p, [a.x(0), a.x(1), a.x(2), a.x(3)], head, dqkv);
        });
    }))
}

/// Tiles are over (key, query): every product then runs over contiguous rows but for dQ, which is summed over the
/// blocks of keys.
fn backward_head(p: &Plan, x: [&[f32]; 4], head: usize, dqkv: Shared) {
    let [dout, qkv, out, lse] = x;
    let Extents {
        tokens, dim, scale, ..
    } = p.e;
    let whole = p.tp * p.dp;
    let tile = p.block * p.tp;
    let sizes = [
        whole,
        whole,
        whole,
        whole,
        whole,
        p.block * p.dp,
        p.block * p.dp,
        tile,
        tile,
        2 * p.tp,
    ];
    with_floats(Scratch::size(&sizes), |s| {
        let mut s = Scratch::new(s);
        let [q, qt, d, dt, dq, rows, grads, ps, ds, stats] = sizes.map(|n| s.take(n));
        p.pack(qkv, p.qkv(head, 0), p.ld, 0..tokens, q);
        q[tokens * p.dp..].fill(0.0);
        p.transpose(q, qt);
        p.pack(dout, p.out(head), p.width(), 0..tokens, d);
        d[tokens * p.dp..].fill(0.0);
        p.transpose(d, dt);
        dq.fill(0.0);
        // Padding queries get the probability zero.
        let (lse2, delta) = stats.split_at_mut(p.tp);
        lse2.fill(1e30);
        delta.fill(0.0);
        for (l2, l) in lse2.iter_mut().zip(&lse[head * tokens..][..tokens]) {
            *l2 = l * LOG2_E;
        }
        let from = p.out(head);
        assert!(from + (tokens - 1) * p.width() + dim <= out.len().min(dout.len()));
        // SAFETY: asserted.
        unsafe {
            (p.k.dots)(
                out[from..].as_ptr(),
                dout[from..].as_ptr(),
                p.width(),
                tokens,
                dim,
                delta.as_mut_ptr(),
            )
        };
        let blocks = tokens.div_ceil(p.block);
        for b in 0..blocks {
            let keys = part(tokens, blocks, b);
            let m = keys.len();
            p.pack(qkv, p.qkv(head, 2), p.ld, keys.clone(), rows);
            p.scores(m, rows, dt, ds);
            p.pack(qkv, p.qkv(head, 1), p.ld, keys.clone(), rows);
            p.scores(m, rows, qt, ps);
            // SAFETY: both tiles have `m` rows of `tp`, the statistics two.
            unsafe {
                (p.k.gradient)(
                    ps.as_mut_ptr(),
                    ds.as_mut_ptr(),
                    m,
                    p.tp,
                    stats.as_ptr(),
                    p.c,
                    scale,
                )
            };
            p.accumulate(m, ds, rows, dq);
            p.combine(m, ps, d, grads);
            // SAFETY: this task's head.
            unsafe { p.unpack(grads, None, dqkv, p.qkv(head, 2), p.ld, keys.clone()) };
            p.combine(m, ds, q, grads);
            // SAFETY: as above.
            unsafe { p.unpack(grads, None, dqkv, p.qkv(head, 1), p.ld, keys) };
        }
        // SAFETY: as above.
        unsafe { p.unpack(dq, None, dqkv, p.qkv(head, 0), p.ld, 0..tokens) };
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::backend::{Backend, CompileOptions};
    use crate::graph::{Graph, Phase, Spec};
    use crate::ops::attention::ROOM;
    use crate::ops::check::run_case;
    use crate::philox::Philox;
    use std::sync::Arc;

    #[test]
    fn every_variant_follows_the_reference() {
        for variant in variants() {
            let mut options = CompileOptions {
                poison: true,
                ..Default::default()
            };
            for op in ["attention", "attention_bwd"] {
                options.variants.insert(op.into(), (*variant).into());
            }
            for t in [1, 2, 17, 49, 65, 197, 257] {
                for d in [16, 20, 32, 64, 80, 128] {
                    let h = 1 + (t * d) % 3;
                    let case = format!("n=1,t={t},h={h},d={d},probs={}", d % 3 / 2);
                    for f in run_case(&ROOM, &case, &Cpu::new(), &options).unwrap() {
                        assert!(f.ok(), "{variant} {case}: {f:?}");
                    }
                }
            }
        }
        let odd = CompileOptions {
            variants: [("attention".to_string(), "fast".to_string())].into(),
            ..Default::default()
        };
        assert!(run_case(&ROOM, "", &Cpu::new(), &odd).is_err());
    }

    /// Forward and backward on `threads` threads.
    fn bits(threads: usize, n: usize, t: usize, h: usize, d: usize) -> Vec<u32> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            let mut g = Graph::new();
            let qkv = g.input("qkv", Spec::f32([n, t, 3 * h * d]));
            let y = g.push(Attention::new(h), &[qkv]).unwrap();
            let dy = g.input("dy", g.spec(y[0]).clone());
            let grads = g.backward_from(&[(y[0], dy)], &[qkv]).unwrap();
            let kept = [y[0], y[1], grads[&qkv]];
            kept.iter().for_each(|&t| g.keep(t));
            let options = CompileOptions::default();
            let mut exec = Cpu::new().compile(Arc::new(g), &options).unwrap();
            let mut rng = Philox::new(5, 0);
            for t in [qkv, dy] {
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
        for (n, t, h, d) in [(1, 197, 3, 64), (3, 65, 2, 16), (1, 400, 1, 32)] {
            let one = bits(1, n, t, h, d);
            assert_eq!(one, bits(2, n, t, h, d));
            assert_eq!(one, bits(7, n, t, h, d));
        }
    }

    #[test]
    fn a_nan_comes_through() {
        let mut g = Graph::new();
        let qkv = g.input("qkv", Spec::f32([1, 3, 3 * 16]));
        let y = g.attention(qkv, 1).unwrap();
        g.keep(y);
        for variant in variants() {
            let options = CompileOptions {
                variants: [("attention".to_string(), variant.to_string())].into(),
                ..Default::default()
            };
            let mut exec = Cpu::new().compile(Arc::new(g.clone()), &options).unwrap();
            let mut v = vec![1.0; 3 * 48];
            v[0] = f32::NAN;
            exec.write(qkv, &v).unwrap();
            exec.run(&[Phase::Forward]).unwrap();
            let out = exec.read(y).unwrap();
            assert!(out[..16].iter().all(|v| v.is_nan()), "{variant}: {out:?}");
            assert!(
                out[16..].iter().all(|v| v.is_finite()),
                "{variant}: {out:?}"
            );
        }
    }
}
