//! Means over seeds with their intervals, and whether two settings differ.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// Mean, spread and interval of some values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// How many.
    pub n: usize,
    /// Mean.
    pub mean: f64,
    /// Standard deviation of the sample (n - 1); NaN for one value.
    pub std: f64,
    /// Half the width of the 95 % interval of the mean by Student's t; NaN for one value.
    pub half: f64,
}

/// The summary of `values`, of which there is at least one.
pub fn summary(values: &[f64]) -> Summary {
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n as f64;
    if n < 2 {
        return Summary {
            n,
            mean,
            std: f64::NAN,
            half: f64::NAN,
        };
    }
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    let std = (squares / (n - 1) as f64).sqrt();
    let t = StudentsT::new(0.0, 1.0, (n - 1) as f64).map_or(f64::NAN, |d| d.inverse_cdf(0.975));
    Summary {
        n,
        mean,
        std,
        half: t * std / (n as f64).sqrt(),
    }
}

/// The two-sided p value of Student's paired t-test that `a` and `b`, which belong together pair by pair, have one mean;
/// `None` for fewer than two pairs.
pub fn paired_p(a: &[f64], b: &[f64]) -> Option<f64> {
    let d: Vec<f64> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    let s = summary(&d);
    if s.n < 2 {
        return None;
    }
    if s.std == 0.0 {
        return Some(if s.mean == 0.0 { 1.0 } else { 0.0 });
    }
    let t = s.mean / (s.std / (s.n as f64).sqrt());
    let student = StudentsT::new(0.0, 1.0, (s.n - 1) as f64).ok()?;
    Some(2.0 * (1.0 - student.cdf(t.abs())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of scipy.stats: t.interval and ttest_rel.
    #[test]
    fn as_scipy_has_it() {
        let a = [81.2, 80.7, 82.0, 81.1];
        let b = [79.9, 80.1, 80.6, 80.9];
        let s = summary(&a);
        assert!((s.mean - 81.25).abs() < 1e-12);
        assert!((s.std - 0.5446711546122726).abs() < 1e-9, "{}", s.std);
        assert!((s.half - 0.8666933517952202).abs() < 1e-6, "{}", s.half);
        assert!((paired_p(&a, &b).unwrap() - 0.05541871667464236).abs() < 1e-6);
        assert!(summary(&[1.0]).half.is_nan());
        assert_eq!(paired_p(&[1.0], &[2.0]), None);
    }
}
