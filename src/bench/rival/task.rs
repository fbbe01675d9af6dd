//! What a rival is asked for: one matrix product or one of a convolution's three sums, with a check of its own.

use crate::backend::cuda::Precision;
use crate::graph::Spec;
use crate::ops::check::F32_TOLERANCE;
use crate::ops::conv2d::{ConvShape, Pass, convolution};
use crate::ops::{Op, Product};

/// A sum of products of two operands' elements, by element of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A and B give the product.
    Product(Product),
    /// x and w give y, w and dy give dx, or x and dy give dw.
    Convolution(ConvShape, Pass),
}

impl Task {
    /// What `op` is but for its epilogue: nothing, a product, a convolution, or both.
    pub fn of(op: &dyn Op, x: &[Spec]) -> Vec<Task> {
        let product = op.product(x).map(Task::Product);
        let convolution = convolution(op, x).map(|(s, pass)| Task::Convolution(s, pass));
        product.into_iter().chain(convolution).collect()
    }

    /// Elements of both operands and the result.
    pub fn lengths(&self) -> [usize; 3] {
        match self {
            Task::Product(p) => [p.m * p.k, p.k * p.n, p.m * p.n],
            Task::Convolution(s, pass) => {
                let [x, w, y] = [s.input_len(), s.weight_len(), s.output_len()];
                match pass {
                    Pass::Fprop => [x, w, y],
                    Pass::Dgrad => [w, y, x],
                    Pass::Wgrad => [x, y, w],
                }
            }
        }
    }

    /// Calls `f` with the places in the operands of every product that is summed for element `at` of the result.
    fn terms(&self, at: usize, mut f: impl FnMut(usize, usize)) {
        match self {
            Task::Product(p) => {
                let (i, j) = (at / p.n, at % p.n);
                for l in 0..p.k {
                    let a = if p.ta { l * p.m + i } else { i * p.k + l };
                    f(a, if p.tb { j * p.k + l } else { l * p.n + j });
                }
            }
            Task::Convolution(s, pass) => {
                let x = |n, h, w, c| ((n * s.h + h) * s.w + w) * s.c + c;
                let y = |n, p, q, k| ((n * s.ho + p) * s.wo + q) * s.k + k;
                let weight = |k, r, t, c| ((k * s.r + r) * s.s + t) * s.cg() + c;
                // Where a tap meets the input, if not in the padding.
                let hit = |d: usize, out: usize, tap: usize, size: usize| {
                    let place = (out * s.stride[d] + tap).checked_sub(s.pad[d])?;
                    (place < size).then_some(place)
                };
                match pass {
                    Pass::Fprop => {
                        let (k, q, p, n) = split(at, [s.k, s.wo, s.ho]);
                        for (r, t) in grid(s.r, s.s) {
                            let (Some(h), Some(w)) = (hit(0, p, r, s.h), hit(1, q, t, s.w)) else {
                                continue;
                            };
                            for c in 0..s.cg() {
                                f(x(n, h, w, k / s.kg() * s.cg() + c), weight(k, r, t, c));
                            }
                        }
                    }
                    Pass::Dgrad => {
                        let (c, w, h, n) = split(at, [s.c, s.w, s.h]);
                        let group = c / s.cg();
                        let rows = grid(s.ho, s.r).filter(|&(p, r)| hit(0, p, r, s.h) == Some(h));
                        for (p, r) in rows {
                            let all = grid(s.wo, s.s);
                            for (q, t) in all.filter(|&(q, t)| hit(1, q, t, s.w) == Some(w)) {
                                for k in group * s.kg()..(group + 1) * s.kg() {
                                    f(weight(k, r, t, c % s.cg()), y(n, p, q, k));
                                }
                            }
                        }
                    }
                    Pass::Wgrad => {
                        let (c, t, r, k) = split(at, [s.cg(), s.s, s.r]);
                        let c = k / s.kg() * s.cg() + c;
                        for n in 0..s.n {
                            for (p, q) in grid(s.ho, s.wo) {
                                if let (Some(h), Some(w)) = (hit(0, p, r, s.h), hit(1, q, t, s.w)) {
                                    f(x(n, h, w, c), y(n, p, q, k));
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// The worst error of some sixty elements of the result, over what sums in float32 of operands that `precision` can
    /// hold are allowed, and the rounding of the result to bf16; NaN where there is one.
    pub fn error(&self, [a, b]: [&[f32]; 2], c: &[f32], precision: Precision) -> f64 {
        let rounding = match precision {
            Precision::Bf16 => 2f64.powi(-8),
            _ => 0.0,
        };
        // A step that no extent divides, so that rows and columns are all met.
        let step = (c.len() / 61).max(1) | 1;
        let mut worst = 0.0;
        for at in (0..c.len()).step_by(step) {
            let (mut sum, mut squares, mut terms) = (0.0, 0.0, 0.0);
            self.terms(at, |i, j| {
                let product = f64::from(a[i]) * f64::from(b[j]);
                sum += product;
                squares += product * product;
                terms += 1.0f64;
            });
            let sums = F32_TOLERANCE * terms.sqrt() * (squares.sqrt() + sum.abs());
            let allowed = sums + rounding * sum.abs() + 1e-30;
            let error = (f64::from(c[at]) - sum).abs() / allowed;
            if error.is_nan() || error > worst {
                worst = error;
            }
        }
        worst
    }
}

/// `at` as digits, the fastest first.
fn split(at: usize, [a, b, c]: [usize; 3]) -> (usize, usize, usize, usize) {
    (at % a, at / a % b, at / a / b % c, at / a / b / c)
}

fn grid(a: usize, b: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..a).flat_map(move |i| (0..b).map(move |j| (i, j)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Phase;
    use crate::ops::check::{case_graph, seed_of};
    use crate::ops::reference::{Values, fetch, interpret};
    use crate::ops::room;

    /// The sums are those of the ops' own references, forward and backward, and what is wrong is seen.
    #[test]
    fn tasks_are_what_the_ops_define() {
        let mut kinds = vec![];
        for (op, params) in [
            ("linear", "m=5,i=7,o=3"),
            ("conv2d", "n=2,h=5,w=4,c=6,k=4,r=1"),
            ("conv2d", "n=2,h=7,w=6,c=6,k=4,r=3,s=2,stride=2,pad=1"),
            ("conv2d", "n=1,h=5,c=6,k=9,r=3,pad=1,groups=3"),
            ("conv2d", "n=1,h=8,c=3,k=5,r=4,stride=4"),
        ] {
            let case = room(op).unwrap().build(params).unwrap();
            let cg = case_graph(&case, seed_of(params)).unwrap();
            let mut values: Values = cg.values();
            interpret(&cg.graph, &[Phase::Forward, Phase::Backward], &mut values);
            let data = |t| -> Vec<f32> {
                let host = fetch(&cg.graph, &values, t);
                host.data.iter().map(|&v| v as f32).collect()
            };
            for node in &cg.graph.nodes {
                let (x, _) = cg.graph.node_specs(node);
                for task in Task::of(node.op.as_ref(), &x) {
                    let mut operands = [data(node.inputs[0]), data(node.inputs[1])];
                    let swapped = match task {
                        Task::Product(_) => node.op.name().ends_with("_wgrad"),
                        Task::Convolution(_, pass) => pass == Pass::Dgrad,
                    };
                    if swapped {
                        operands.reverse();
                    }
                    let mut y = data(node.outputs[0]);
                    let [a, b] = [&operands[0][..], &operands[1][..]];
                    assert_eq!(task.lengths(), [a.len(), b.len(), y.len()], "{task:?}");
                    let error = |y: &[f32], p| task.error([a, b], y, p);
                    assert!(error(&y, Precision::F32) <= 1.0, "{op}({params}) {task:?}");
                    y.iter_mut().for_each(|v| *v *= 1.001);
                    assert!(error(&y, Precision::Tf32) > 1.0, "{op}({params}) {task:?}");
                    assert!(error(&y, Precision::Bf16) <= 1.0, "{op}({params}) {task:?}");
                    y.fill(f32::NAN);
                    assert!(error(&y, Precision::Bf16).is_nan());
                    kinds.push(task);
                }
            }
        }
        let products = kinds.iter().filter(|t| matches!(t, Task::Product(_)));
        assert_eq!((products.count(), kinds.len()), (6, 18));
    }
}
