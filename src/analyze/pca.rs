//! The first principal components, by subspace iteration (Halko, Martinsson & Tropp 2011, "Finding Structure with
//! Randomness", algorithm 4.4 with a Rayleigh-Ritz step).

use crate::backend::cpu::Epilogue;
use crate::backend::cpu::gemm::{Mat, gemm};
use crate::philox::Philox;

/// Directions beyond those asked for, which make the iteration converge.
const SPARE: usize = 8;
const ITERATIONS: usize = 60;

/// The first components of some rows.
pub struct Pca {
    /// `[k, d]`, unit length, most variance first; the entry of the largest magnitude is positive.
    pub components: Vec<f32>,
    /// `[n, k]`: the centred rows along the components.
    pub scores: Vec<f32>,
    /// Share of the whole variance that each component holds.
    pub explained: Vec<f64>,
}

/// The first `k` principal components of the rows of `x` `[n, d]`; fewer where the rows span fewer.
pub fn pca(x: &[f32], n: usize, k: usize) -> Pca {
    let d = x.len() / n.max(1);
    let mut means = vec![0.0f64; d];
    for row in x.chunks_exact(d) {
        let sums = means.iter_mut().zip(row);
        sums.for_each(|(m, &v)| *m += f64::from(v) / n as f64);
    }
    let centred = x.chunks_exact(d).flat_map(|row| {
        let less = row.iter().zip(&means);
        less.map(|(&v, m)| (f64::from(v) - m) as f32)
    });
    let x: Vec<f32> = centred.collect();
    let whole: f64 = x.iter().map(|&v| f64::from(v).powi(2)).sum();
    let m = (k + SPARE).min(d).min(n);
    let mut draw = Philox::new(0, 0);
    // Columns of an orthonormal basis `[d, m]`.
    let mut q: Vec<f32> = (0..d * m).map(|_| draw.normal()).collect();
    orthonormalise(&mut q, m);
    let mut along = vec![0.0; n * m];
    let project = |q: &[f32], along: &mut [f32]| {
        let (a, b) = (Mat::new(&x, d), Mat::new(q, m));
        gemm(n, m, d, a, b, along, m, false, Epilogue::default());
    };
    for _ in 0..ITERATIONS {
        project(&q, &mut along);
        let (a, b) = (Mat::transposed(&x, d), Mat::new(&along, m));
        gemm(d, m, n, a, b, &mut q, m, false, Epilogue::default());
        orthonormalise(&mut q, m);
    }
    project(&q, &mut along);
    // The covariance within the basis, and its eigenvectors.
    let mut small = vec![0.0f64; m * m];
    for row in along.chunks_exact(m) {
        for i in 0..m {
            for j in 0..m {
                small[i * m + j] += f64::from(row[i]) * f64::from(row[j]);
            }
        }
    }
    let vectors = jacobi(&mut small, m);
    let mut order: Vec<usize> = (0..m).collect();
    order.sort_by(|&a, &b| small[b * m + b].total_cmp(&small[a * m + a]));
    order.truncate(k);
    order.retain(|&i| small[i * m + i] > 1e-9 * whole);
    let k = order.len();
    let turned = |rows: &[f32], i: usize| -> Vec<f64> {
        let along = |row: &[f32]| (0..m).map(|j| f64::from(row[j]) * vectors[j * m + i]).sum();
        rows.chunks_exact(m).map(along).collect()
    };
    let (mut components, mut scores) = (vec![0.0; k * d], vec![0.0; n * k]);
    for (to, &i) in order.iter().enumerate() {
        let direction = turned(&q, i);
        let largest = direction
            .iter()
            .copied()
            .fold(0.0, |a: f64, b| if b.abs() > a.abs() { b } else { a });
        let sign = largest.signum();
        for (c, v) in components[to * d..(to + 1) * d].iter_mut().zip(&direction) {
            *c = (sign * v) as f32;
        }
        for (row, v) in turned(&along, i).into_iter().enumerate() {
            scores[row * k + to] = (sign * v) as f32;
        }
    }
    Pca {
        components,
        scores,
        explained: order.iter().map(|&i| small[i * m + i] / whole).collect(),
    }
}

/// Makes the `m` columns of `q` `[d, m]` orthonormal (Gram-Schmidt, each column twice). A column that depends on those
/// before it becomes zero.
fn orthonormalise(q: &mut [f32], m: usize) {
    let d = q.len() / m;
    let mut columns: Vec<Vec<f64>> = (0..m)
        .map(|j| (0..d).map(|i| f64::from(q[i * m + j])).collect())
        .collect();
    for j in 0..m {
        let (before, rest) = columns.split_at_mut(j);
        let own = &mut rest[0];
        let length = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
        let start = length(own);
        for _ in 0..2 {
            for other in before.iter() {
                let dot: f64 = own.iter().zip(other).map(|(a, b)| a * b).sum();
                own.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
            }
        }
        let end = length(own);
        let scale = if end > 1e-9 * start { 1.0 / end } else { 0.0 };
        own.iter_mut().for_each(|v| *v *= scale);
    }
    for (j, column) in columns.iter().enumerate() {
        column
            .iter()
            .enumerate()
            .for_each(|(i, &v)| q[i * m + j] = v as f32);
    }
}

/// Diagonalises the symmetric `a` `[m, m]` by Jacobi's rotations; returns the eigenvectors as columns.
fn jacobi(a: &mut [f64], m: usize) -> Vec<f64> {
    let mut v = vec![0.0; m * m];
    (0..m).for_each(|i| v[i * m + i] = 1.0);
    for _ in 0..60 {
        let off: f64 = (0..m * m)
            .filter(|e| e / m != e % m)
            .map(|e| a[e] * a[e])
            .sum();
        let on: f64 = (0..m).map(|i| a[i * m + i] * a[i * m + i]).sum();
        if off <= 1e-24 * on {
            break;
        }
        for p in 0..m {
            for q in p + 1..m {
                if a[p * m + q] == 0.0 {
                    continue;
                }
                let theta = (a[q * m + q] - a[p * m + p]) / (2.0 * a[p * m + q]);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let t = if theta == 0.0 { 1.0 } else { t };
                let c = 1.0 / (t * t + 1.0).sqrt();
                let s = t * c;
                for k in 0..m {
                    let (x, y) = (a[k * m + p], a[k * m + q]);
                    (a[k * m + p], a[k * m + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..m {
                    let (x, y) = (a[p * m + k], a[q * m + k]);
                    (a[p * m + k], a[q * m + k]) = (c * x - s * y, s * x + c * y);
                    let (x, y) = (v[k * m + p], v[k * m + q]);
                    (v[k * m + p], v[k * m + q]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    v
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of `sklearn.decomposition.PCA(2)` on `x[i, j] = sin(i (j + 1)) + j cos(3 i)`, 12 rows, 5 columns; signs as
    /// this program has them.
    #[test]
    fn as_scikit_learn_has_it() {
        let x: Vec<f32> = (0..60)
            .map(|e| {
                let (i, j) = (f64::from(e / 5), f64::from(e % 5));
                ((i * (j + 1.0)).sin() + j * (3.0 * i).cos()) as f32
            })
            .collect();
        let got = pca(&x, 12, 2);
        for (g, w) in got.explained.iter().zip(EXPLAINED) {
            assert!((g - w).abs() < 1e-6, "{g} for {w}");
        }
        for (g, w) in got.components.iter().zip(COMPONENTS) {
            assert!((f64::from(*g) - w).abs() < 1e-5, "{g} for {w}");
        }
        for (g, w) in got.scores.iter().zip(SCORES) {
            assert!((f64::from(*g) - w).abs() < 1e-4, "{g} for {w}");
        }
    }

    #[test]
    fn there_are_no_more_components_than_directions() {
        // Rows along one line.
        let x: Vec<f32> = (0..40)
            .map(|e| (e / 4) as f32 * [1.0, 2.0, 0.0, -2.0][e % 4])
            .collect();
        let got = pca(&x, 10, 3);
        assert_eq!(got.explained.len(), 1);
        assert!((got.explained[0] - 1.0).abs() < 1e-6);
        assert!((got.components[1].abs() - 2.0 / 3.0).abs() < 1e-5);
        assert!(pca(&[1.0; 12], 4, 2).explained.is_empty());
    }

    const EXPLAINED: [f64; 2] = [0.89356154, 0.03384024];
    const COMPONENTS: [f64; 10] = [
        -0.01045868,
        0.15638863,
        0.25568806,
        0.58747437,
        0.75161871,
        0.61156901,
        -0.49302304,
        0.06076393,
        -0.43805615,
        0.43281194,
    ];
    const SCORES: [f64; 6] = [
        5.24958351,
        0.08806167,
        -6.56519621,
        -0.01127434,
        5.00606039,
        0.32963357,
    ];
}
