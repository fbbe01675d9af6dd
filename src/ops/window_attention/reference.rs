//! Window attention as it is defined, in float64, with the whole matrix of token pairs of a window.

use super::{MASK, WindowAttention, WindowAttentionBwd, Windows};
use crate::graph::Spec;
use crate::ops::Host;

/// One head of one window.
struct Head<'a> {
    g: Windows,
    qkv: &'a Host,
    table: &'a Host,
    window: usize,
    head: usize,
}

impl Head<'_> {
    /// Element `d` of Q (`part` 0), K (1) or V (2) of token `t`.
    fn at(&self, part: usize, t: usize, d: usize) -> usize {
        let heads = self.g.op.heads;
        let pixel = self.g.pixel(self.window, t);
        ((pixel * 3 + part) * heads + self.head) * self.g.dim + d
    }

    /// Element `d` of the result of token `t`.
    fn out(&self, t: usize, d: usize) -> usize {
        (self.g.pixel(self.window, t) * self.g.op.heads + self.head) * self.g.dim + d
    }

    fn row(&self, t: usize) -> usize {
        (self.window * self.g.op.heads + self.head) * self.g.tokens() + t
    }

    /// The table's element for query `i` and key `j`.
    fn bias(&self, i: usize, j: usize) -> usize {
        self.g.entry(i, j) * self.g.op.heads + self.head
    }

    fn score(&self, i: usize, j: usize) -> f64 {
        let terms = (0..self.g.dim)
            .map(|d| self.qkv.data[self.at(0, i, d)] * self.qkv.data[self.at(1, j, d)]);
        let apart = self.g.apart(self.g.wraps(self.window), i, j);
        let mask = if apart { f64::from(MASK) } else { 0.0 };
        f64::from(self.g.scale()) * terms.sum::<f64>() + self.table.data[self.bias(i, j)] + mask
    }
}

fn heads<'a>(op: WindowAttention, qkv: &'a Host, table: &'a Host) -> Vec<Head<'a>> {
    let spec = |h: &Host| Spec::f32(h.shape.clone());
    let g = Windows::of(op, &spec(qkv), &spec(table)).expect("the shape rule was checked");
    let windows = 0..g.images * g.per_image();
    let all = windows.flat_map(|window| (0..op.heads).map(move |head| (window, head)));
    all.map(|(window, head)| Head {
        g,
        qkv,
        table,
        window,
        head,
    })
    .collect()
}

pub(super) fn forward(op: &WindowAttention, x: &[&Host], y: &mut [Host]) {
    for h in heads(*op, x[0], x[1]) {
        let tokens = h.g.tokens();
        for i in 0..tokens {
            let s: Vec<f64> = (0..tokens).map(|j| h.score(i, j)).collect();
            let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let lse = max + s.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
            y[1].data[h.row(i)] = lse;
            for (j, s) in s.iter().enumerate() {
                for d in 0..h.g.dim {
                    y[0].data[h.out(i, d)] += (s - lse).exp() * x[0].data[h.at(2, j, d)];
                }
            }
        }
    }
}

pub(super) fn backward(op: &WindowAttentionBwd, x: &[&Host], y: &mut [Host]) {
    let [dout, qkv, out, lse] = [x[0], x[1], x[2], x[3]];
    let (dqkv, dtable) = y.split_at_mut(1);
    let (dqkv, dtable) = (&mut dqkv[0].data, &mut dtable[0].data);
    for h in heads(op.fwd, qkv, x[4]) {
        let (tokens, dim) = (h.g.tokens(), h.g.dim);
        for i in 0..tokens {
            let dot = |f: &dyn Fn(usize) -> f64| {
                (0..dim).map(|d| dout.data[h.out(i, d)] * f(d)).sum::<f64>()
            };
            let delta = dot(&|d| out.data[h.out(i, d)]);
            for j in 0..tokens {
                let p = (h.score(i, j) - lse.data[h.row(i)]).exp();
                let ds = p * (dot(&|d| qkv.data[h.at(2, j, d)]) - delta);
                dtable[h.bias(i, j)] += ds;
                let ds = f64::from(h.g.scale()) * ds;
                for d in 0..dim {
                    dqkv[h.at(0, i, d)] += ds * qkv.data[h.at(1, j, d)];
                    dqkv[h.at(1, j, d)] += ds * qkv.data[h.at(0, i, d)];
                    dqkv[h.at(2, j, d)] += p * dout.data[h.out(i, d)];
                }
            }
        }
    }
}
