//! Centred kernel alignment (Kornblith, Norouzi, Lee & Hinton 2019, "Similarity of Neural Network Representations
//! Revisited") with linear kernels, over minibatches by the unbiased estimator of HSIC (Song et al. 2012, eq. 5; Nguyen,
//! Raghu & Kornblith 2021, section 3, whose sums over minibatches these are).

use super::{Analysis, Context, Findings, Subject, for_batches};
use crate::backend::cpu::Epilogue;
use crate::backend::cpu::gemm::{Mat, gemm};
use crate::report::plot::heat_map;
use crate::report::table::{Table, number};
use crate::{Error, Result};
use serde_json::{Value, json};

/// Fewest images of a batch: the estimator divides by `n (n - 3)`.
pub const LEAST: usize = 4;

/// The Gram matrix `X X^T` `[n, n]` of the rows of `x` `[n, p]`, in float64, with a zero diagonal. Columns are centred
/// first, which changes no HSIC but spares digits.
pub fn gram(x: &[f32], n: usize) -> Vec<f64> {
    let p = x.len() / n.max(1);
    let mut means = vec![0.0f64; p];
    for row in x.chunks_exact(p.max(1)) {
        means
            .iter_mut()
            .zip(row)
            .for_each(|(m, &v)| *m += f64::from(v));
    }
    let mut centred = Vec::with_capacity(x.len());
    for row in x.chunks_exact(p.max(1)) {
        let less = row.iter().zip(&means);
        centred.extend(less.map(|(&v, m)| (f64::from(v) - m / n as f64) as f32));
    }
    let mut k = vec![0.0f32; n * n];
    let (a, b) = (Mat::new(&centred, p), Mat::transposed(&centred, p));
    gemm(n, n, p, a, b, &mut k, n, false, Epilogue::default());
    let mut k: Vec<f64> = k.into_iter().map(f64::from).collect();
    for i in 0..n {
        k[i * n + i] = 0.0;
    }
    k
}

/// The unbiased estimate of HSIC of two Gram matrices `[n, n]` with zero diagonals; it may be negative.
pub fn hsic(k: &[f64], l: &[f64], n: usize) -> f64 {
    let rows = |m: &[f64]| -> Vec<f64> { m.chunks_exact(n).map(|r| r.iter().sum()).collect() };
    let (rk, rl) = (rows(k), rows(l));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let (sk, sl): (f64, f64) = (rk.iter().sum(), rl.iter().sum());
    let m = n as f64;
    (dot(k, l) + sk * sl / ((m - 1.0) * (m - 2.0)) - 2.0 / (m - 2.0) * dot(&rk, &rl))
        / (m * (m - 3.0))
}

/// Sums over minibatches for every pair of a layer of one network and a layer of another.
pub struct Cka {
    cross: Vec<f64>,
    left: Vec<f64>,
    right: Vec<f64>,
}

impl Cka {
    /// For `left` by `right` layers.
    pub fn new(left: usize, right: usize) -> Cka {
        Cka {
            cross: vec![0.0; left * right],
            left: vec![0.0; left],
            right: vec![0.0; right],
        }
    }

    /// Adds a batch: the [`gram`] matrices of each network's layers over the same `n` images.
    pub fn add(&mut self, left: &[Vec<f64>], right: &[Vec<f64>], n: usize) {
        for (i, k) in left.iter().enumerate() {
            self.left[i] += hsic(k, k, n);
            for (j, l) in right.iter().enumerate() {
                self.cross[i * right.len() + j] += hsic(k, l, n);
            }
        }
        for (j, l) in right.iter().enumerate() {
            self.right[j] += hsic(l, l, n);
        }
    }

    /// `[left, right]`. Layers whose own HSIC is not positive (too few images for noise to cancel, or a constant layer)
    /// have no CKA: NaN.
    pub fn matrix(&self) -> Vec<f64> {
        let columns = self.right.len();
        let one = |i: usize| {
            let (k, l) = (self.left[i / columns], self.right[i % columns]);
            if k <= 0.0 || l <= 0.0 {
                return f64::NAN;
            }
            self.cross[i] / (k.sqrt() * l.sqrt())
        };
        (0..self.cross.len()).map(one).collect()
    }
}

/// Similarity of the representations of every two layers: linear centred kernel alignment, by minibatches with the
/// unbiased estimator, of a network with itself or with another one.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze cka -m resnet18 -w resnet18.safetensors -d cifar10 --plot cka.svg
  tilewright analyze cka -w runs/cnn --with runs/vit -d digits --limit 512 --batch-size 64 -o cka")]
pub(super) struct Args {
    /// With several models: also each with itself
    #[arg(long)]
    within: bool,
}

/// By batch and by layer, `[batch, batch]`.
type Grams = Vec<Vec<Vec<f64>>>;

/// The names of a network's taps, and their Gram matrices over whole batches.
fn grams(cx: &Context, subject: &Subject) -> Result<(Vec<String>, Grams)> {
    let images = cx.images(subject)?;
    if images.len() < cx.batch {
        return Err(Error::input(format!(
            "{} has {} images here, fewer than a batch of {}",
            cx.data(),
            images.len(),
            cx.batch
        )));
    }
    let (mut session, ()) = subject.session(cx.backend, (cx.batch, None), true, |_| Ok(()))?;
    let taps = session.taps();
    let mut all = vec![];
    for_batches(&mut session, images, &subject.name, cx.batch, |s, _| {
        let one = |i: usize| Ok(gram(&s.tap(i)?, cx.batch));
        all.push((0..taps.len()).map(one).collect::<Result<Vec<_>>>()?);
        Ok(())
    })?;
    Ok((taps.into_iter().map(|t| t.0).collect(), all))
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        if cx.batch < LEAST {
            return Err(Error::input(format!(
                "CKA wants batches of at least {LEAST} images, not {}",
                cx.batch
            )));
        }
        // Gram matrices are small: the networks need not be in memory at once.
        let all = cx.subjects.iter().map(|s| grams(cx, s));
        let all = all.collect::<Result<Vec<_>>>()?;
        let n = all.len();
        let own = self.within || n == 1;
        let pairs = (0..n).flat_map(|i| (i..n).map(move |j| (i, j)));
        let mut found = Findings::default();
        let mut data = vec![];
        for (i, j) in pairs.filter(|(i, j)| i != j || own) {
            let (a, b) = (&cx.subjects[i].name, &cx.subjects[j].name);
            let ((rows, left), (columns, right)) = (&all[i], &all[j]);
            let mut sums = Cka::new(rows.len(), columns.len());
            for (l, r) in left.iter().zip(right) {
                sums.add(l, r, cx.batch);
            }
            let matrix = sums.matrix();
            let used = left.len() * cx.batch;
            let between = match i == j {
                true => format!("{a} and each other"),
                false => format!("{a} (rows) and those of {b} (columns)"),
            };
            let title = format!("CKA of {a} and {b}");
            let svg = heat_map(&title, (rows, columns), (a, b), &matrix)?;
            let name = match (n, i == j) {
                (1 | 2, false) | (1, _) => "cka".to_string(),
                _ => format!(
                    "cka-{}-{}",
                    super::findings::plain(a),
                    super::findings::plain(b)
                ),
            };
            found = found.plot(
                name,
                format!(
                    "Linear CKA between the layers of {between}: 1 (yellow) where they hold the same up to rotation and \
                     scale, 0 (violet) where they have nothing in common."
                ),
                svg,
            );
            let heads = std::iter::once(String::new()).chain(columns.clone());
            let mut t = Table::new(heads).left(&[0]);
            for (row, line) in rows.iter().zip(matrix.chunks(columns.len())) {
                t.row(std::iter::once(row.clone()).chain(line.iter().map(|v| number(*v, 2))));
            }
            found = found.table(
                format!(
                    "linear CKA, {a} (rows) and {b} (columns), {used} images of {}, batches of {}",
                    cx.data(),
                    cx.batch
                ),
                t,
            );
            let lines: Vec<&[f64]> = matrix.chunks(columns.len()).collect();
            data.push(
                json!({"models": [a, b], "data": cx.data(), "images": used, "batch": cx.batch,
                "rows": rows, "columns": columns, "cka": lines}),
            );
        }
        found.data = match data.len() {
            1 => data.swap_remove(0),
            _ => json!({"pairs": Value::Array(data)}),
        };
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(len: usize, seed: u64) -> Vec<f32> {
        let mut x = seed;
        (0..len)
            .map(|_| {
                x = x
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                (x >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    fn cka(a: &[f32], b: &[f32], n: usize) -> f64 {
        let mut c = Cka::new(1, 1);
        c.add(&[gram(a, n)], &[gram(b, n)], n);
        c.matrix()[0]
    }

    #[test]
    fn one_with_itself_symmetric_and_blind_to_rotation_scale_and_shift() {
        let n = 24;
        let (a, b) = (random(n * 10, 1), random(n * 7, 2));
        assert!((cka(&a, &a, n) - 1.0).abs() < 1e-9);
        assert!((cka(&a, &b, n) - cka(&b, &a, n)).abs() < 1e-12);
        // A rotation in the plane of every two neighbouring features, a scale and a shift.
        let (s, c) = 0.7f32.sin_cos();
        let mut turned = a.clone();
        for pair in turned.chunks_exact_mut(2) {
            let (x, y) = (pair[0], pair[1]);
            pair.copy_from_slice(&[3.0 * (c * x - s * y) + 5.0, 3.0 * (s * x + c * y) - 2.0]);
        }
        assert!((cka(&turned, &b, n) - cka(&a, &b, n)).abs() < 1e-5);
        assert!(cka(&vec![1.0; n * 4], &a, n).is_nan());
    }

    /// Independent representations have none in expectation, which the biased estimator misses by far.
    #[test]
    fn independent_noise_is_near_zero() {
        let (n, mut c) = (32, Cka::new(1, 1));
        for i in 0..40 {
            let (a, b) = (random(n * 64, 2 * i + 11), random(n * 64, 2 * i + 12));
            c.add(&[gram(&a, n)], &[gram(&b, n)], n);
        }
        assert!(c.matrix()[0].abs() < 0.05, "{}", c.matrix()[0]);
    }

    /// Values of the definition written out with numpy: HSIC_1 of Song et al. from `K - diag K` and ones, on
    /// `X[i, j] = sin(3 i + j)`, `Y[i, j] = cos(i * j + 1)`, 6 rows, 3 and 2 columns.
    #[test]
    fn a_fixed_case() {
        let x: Vec<f32> = (0..18)
            .map(|e| ((3 * (e / 3) + e % 3) as f32).sin())
            .collect();
        let y: Vec<f32> = (0..12)
            .map(|e| ((e / 2 * (e % 2) + 1) as f32).cos())
            .collect();
        let (k, l) = (gram(&x, 6), gram(&y, 6));
        for (got, want) in [
            (hsic(&k, &l, 6), -0.256179611),
            (hsic(&k, &k, 6), 3.028254301),
            (hsic(&l, &l, 6), 0.302529005),
        ] {
            assert!((got - want).abs() < 1e-6, "{got} for {want}");
        }
    }
}
