//! Attention as it is defined, in float64, with the whole matrix of token pairs.

use super::{Attention, AttentionBwd, Extents};
use crate::graph::Spec;
use crate::ops::Host;

/// One image's head: element `(t, i)` of Q (`part` 0), K (1) or V (2).
struct Head {
    extents: Extents,
    image: usize,
    head: usize,
}

impl Head {
    fn at(&self, part: usize, t: usize, i: usize) -> usize {
        let Extents {
            tokens, heads, dim, ..
        } = self.extents;
        ((self.image * tokens + t) * 3 + part) * heads * dim + self.head * dim + i
    }

    fn out(&self, t: usize, i: usize) -> usize {
        let Extents {
            tokens, heads, dim, ..
        } = self.extents;
        (self.image * tokens + t) * heads * dim + self.head * dim + i
    }

    fn row(&self, t: usize) -> usize {
        (self.image * self.extents.heads + self.head) * self.extents.tokens + t
    }

    /// `scale * q . k` for query `i` and key `j`.
    fn score(&self, qkv: &Host, i: usize, j: usize) -> f64 {
        let terms =
            (0..self.extents.dim).map(|d| qkv.data[self.at(0, i, d)] * qkv.data[self.at(1, j, d)]);
        f64::from(self.extents.scale) * terms.sum::<f64>()
    }
}

fn heads(qkv: &Host, heads: usize, scale: Option<f32>) -> Vec<Head> {
    let extents = Extents::of(&Spec::f32(qkv.shape.clone()), heads, scale)
        .expect("the shape rule was checked");
    let all = (0..extents.images).flat_map(|image| (0..heads).map(move |head| (image, head)));
    all.map(|(image, head)| Head {
        extents,
        image,
        head,
    })
    .collect()
}

pub(super) fn forward(op: &Attention, x: &[&Host], y: &mut [Host]) {
    for h in heads(x[0], op.heads, op.scale) {
        let Extents { tokens, dim, .. } = h.extents;
        for i in 0..tokens {
            let s: Vec<f64> = (0..tokens).map(|j| h.score(x[0], i, j)).collect();
            let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            y[1].data[h.row(i)] = lse;
            for (j, s) in s.iter().enumerate() {
                let p = (s - lse).exp();
                for d in 0..dim {
                    y[0].data[h.out(i, d)] += p * x[0].data[h.at(2, j, d)];
                }
                if op.probs {
                    y[2].data[h.row(i) * tokens + j] = p;
                }
            }
        }
    }
}

pub(super) fn backward(op: &AttentionBwd, x: &[&Host], y: &mut [Host]) {
    let [dout, qkv, out, lse] = [x[0], x[1], x[2], x[3]];
    let dqkv = &mut y[0].data;
    for h in heads(qkv, op.heads, op.scale) {
        let Extents {
            tokens, dim, scale, ..
        } = h.extents;
        for i in 0..tokens {
            let dot = |f: &dyn Fn(usize) -> f64| {
                (0..dim).map(|d| dout.data[h.out(i, d)] * f(d)).sum::<f64>()
            };
            let delta = dot(&|d| out.data[h.out(i, d)]);
            for j in 0..tokens {
                let p = (h.score(qkv, i, j) - lse.data[h.row(i)]).exp();
                let dp = dot(&|d| qkv.data[h.at(2, j, d)]);
                let ds = f64::from(scale) * p * (dp - delta);
                for d in 0..dim {
                    dqkv[h.at(0, i, d)] += ds * qkv.data[h.at(1, j, d)];
                    dqkv[h.at(1, j, d)] += ds * qkv.data[h.at(0, i, d)];
                    dqkv[h.at(2, j, d)] += p * dout.data[h.out(i, d)];
                }
            }
        }
    }
}
