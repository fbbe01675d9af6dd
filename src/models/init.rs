//! Initial weights: a parameter's values are a function of the seed, its place among the parameters and its rule.

use crate::graph::{Graph, Init, Layout};
use crate::philox::Philox;
use rayon::prelude::*;

/// Philox streams below this belong to parameters (by their place), so that no other use draws the same numbers.
const STREAM: u32 = 0x1000_0000;

/// Initial values of every parameter and running statistic of `graph`, in the order of [`Graph::params`].
pub fn initial(graph: &Graph, seed: u64) -> Vec<Vec<f32>> {
    (0..graph.params.len())
        .into_par_iter()
        .map(|i| initial_of(graph, i, seed))
        .collect()
}

/// Initial values of parameter `i`.
pub fn initial_of(graph: &Graph, i: usize, seed: u64) -> Vec<f32> {
    let p = &graph.params[i];
    let shape = graph.shape(p.tid);
    let n = graph.spec(p.tid).len();
    let mut rng = Philox::with(seed, [STREAM, i as u32]);
    let (fan_in, fan_out) = fans(shape, p.layout);
    let mut normal = |std: f32| (0..n).map(|_| std * rng.normal()).collect();
    match p.init {
        Init::Zeros => vec![0.0; n],
        Init::Ones => vec![1.0; n],
        Init::Const(v) => vec![v; n],
        Init::Normal(std) => normal(std),
        Init::KaimingFanOut => normal((2.0 / fan_out).sqrt()),
        Init::TruncNormal(std) => (0..n)
            .map(|_| {
                loop {
                    let v = std * rng.normal();
                    if v.abs() <= 2.0 {
                        return v;
                    }
                }
            })
            .collect(),
        Init::UniformFanIn(fan_in) => uniform(&mut rng, n, 1.0 / (fan_in.max(1) as f32).sqrt()),
        Init::XavierUniform => uniform(&mut rng, n, (6.0 / (fan_in + fan_out)).sqrt()),
    }
}

fn uniform(rng: &mut Philox, n: usize, bound: f32) -> Vec<f32> {
    (0..n)
        .map(|_| bound * (2.0 * rng.uniform() - 1.0))
        .collect()
}

/// (fan-in, fan-out) as torch.nn.init counts them: channels times the kernel's area.
fn fans(shape: &[usize], layout: Layout) -> (f32, f32) {
    let (o, i, area) = match (layout, shape) {
        (Layout::Ohwi, &[k, r, s, c]) => (k, c, r * s),
        (_, &[o, i, ..]) => (o, i, shape[2..].iter().product()),
        (_, &[n]) => (n, n, 1),
        (_, &[]) => (1, 1, 1),
    };
    ((i * area) as f32, (o * area) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Standard deviations that torch.nn.init gives for a 3x3 convolution of 32 to 64 channels.
    #[test]
    fn deviations_are_pytorchs() {
        for (init, std) in [
            (Init::KaimingFanOut, (2.0f64 / (64.0 * 9.0)).sqrt()),
            (Init::TruncNormal(0.02), 0.02),
            (Init::UniformFanIn(288), (1.0f64 / 288.0 / 3.0).sqrt()),
            (Init::XavierUniform, (2.0f64 / (96.0 * 9.0)).sqrt()),
        ] {
            let mut g = Graph::new();
            g.param("w", &[64, 3, 3, 32], Layout::Ohwi, init, true);
            let v = &initial(&g, 3)[0];
            let var = v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / v.len() as f64;
            assert!(
                (var.sqrt() / std - 1.0).abs() < 0.02,
                "{init:?}: {} against {std}",
                var.sqrt()
            );
            assert_eq!(v, &initial(&g, 3)[0]);
            assert_ne!(v, &initial(&g, 4)[0]);
        }
    }
}
