//! What was seen so far: a case's versions, and what the newest is compared with.

use super::probe::{Figure, Figures, Outcome};
use serde::Serialize;
use tilewright::bench::record::Verdict;

/// One version of the kernels, looked at once.
#[derive(Clone, Debug, Serialize)]
pub struct Version {
    /// `layer_norm(n=2,...)`.
    pub case: String,
    /// The files that were saved, `as it is` or `again`.
    pub what: String,
    /// What it came to.
    pub outcome: Outcome,
    /// From the save to the outcome.
    pub seconds: f64,
    /// The device's name; empty where none was opened.
    pub device: String,
}

impl Version {
    pub fn figures(&self) -> Option<&Figures> {
        match &self.outcome {
            Outcome::Right { figures, .. } => Some(figures),
            _ => None,
        }
    }

    /// Of all ops.
    pub fn total(&self) -> Option<f64> {
        Some(self.figures()?.values().map(|f| f.value).sum())
    }
}

/// The versions of a case, oldest first.
#[derive(Default)]
pub struct Versions {
    pub all: Vec<Version>,
    /// The one that others are compared with, in place of the one before.
    pub base: Option<usize>,
}

impl Versions {
    /// The newest that is right.
    pub fn newest_right(&self) -> Option<usize> {
        self.right_before(self.all.len())
    }

    fn right_before(&self, end: usize) -> Option<usize> {
        (0..end).rev().find(|&i| self.all[i].figures().is_some())
    }

    /// What version `i` is compared with: the base, else the right one before it.
    pub fn reference(&self, i: usize) -> Option<usize> {
        match self.base {
            Some(base) => Some(base).filter(|&b| b != i),
            None => self.right_before(i),
        }
    }

    /// The best figure of an op before version `i`.
    pub fn best_before(&self, i: usize, op: &str) -> Option<&Figure> {
        let figures = self.all[..i].iter().filter_map(|v| v.figures()?.get(op));
        figures.min_by(|a, b| a.value.total_cmp(&b.value))
    }

    /// The version with the least total.
    pub fn best(&self) -> Option<usize> {
        let totals = self.all.iter().enumerate();
        let totals = totals.filter_map(|(i, v)| Some((i, v.total()?)));
        totals.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(i, _)| i)
    }
}

/// `+2.5 %`.
pub fn change(now: f64, then: Option<f64>) -> String {
    match then {
        Some(t) if t > 0.0 => format!("{:+.1} %", 100.0 * (now / t - 1.0)),
        _ => "-".into(),
    }
}

/// Whether a figure is better than one before: by the intervals of times, counts exactly.
pub fn verdict(then: &Figure, now: &Figure) -> Verdict {
    match (&then.time, &now.time) {
        (Some(then), Some(now)) => Verdict::of(then, now),
        _ if now.value < then.value => Verdict::Faster,
        _ if now.value > then.value => Verdict::Slower,
        _ => Verdict::WithinNoise,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use tilewright::bench::Sample;

    pub fn right(what: &str, ms: &[(&str, f64)]) -> Version {
        let figure = |&(op, ms): &(&str, f64)| {
            let at = |share: f64| ms * share / 1e3;
            let figure = Figure {
                value: ms,
                time: Some(Sample {
                    median: at(1.0),
                    low: at(0.99),
                    high: at(1.01),
                    min: at(0.98),
                    runs: 9,
                }),
                flops: 1_000_000,
                bytes: 80_000,
                roofline: Some(0.25),
                ..Figure::default()
            };
            (op.to_string(), figure)
        };
        let figures = ms.iter().map(figure).collect();
        version(
            what,
            Outcome::Right {
                worst: 0.125,
                figures,
            },
        )
    }

    pub fn version(what: &str, outcome: Outcome) -> Version {
        Version {
            case: "layer_norm(n=2,t=3,c=5)".into(),
            what: what.into(),
            outcome,
            seconds: 0.31,
            device: "llvmpipe".into(),
        }
    }

    #[test]
    fn versions_are_compared_with_the_right_ones() {
        let mut v = Versions::default();
        v.all.push(right("as it is", &[("a", 2.0), ("b", 1.0)]));
        v.all.push(version("x.wgsl", Outcome::Wrong("y0".into())));
        v.all.push(right("x.wgsl", &[("a", 3.0), ("b", 0.5)]));
        v.all.push(right("x.wgsl", &[("a", 1.0), ("b", 2.0)]));
        assert_eq!(v.newest_right(), Some(3));
        assert_eq!((v.reference(3), v.reference(2)), (Some(2), Some(0)));
        assert_eq!((v.reference(0), v.best()), (None, Some(0)));
        let best = |i, op| v.best_before(i, op).map(|f| f.value);
        assert_eq!((best(3, "a"), best(3, "b")), (Some(2.0), Some(0.5)));
        assert_eq!(best(0, "a"), None);
        v.base = Some(0);
        assert_eq!((v.reference(3), v.reference(0)), (Some(0), None));
        let of = |i: usize| &v.all[i].figures().unwrap()["a"];
        assert_eq!(verdict(of(0), of(3)), Verdict::Faster);
        assert_eq!(verdict(of(0), of(2)), Verdict::Slower);
        assert_eq!(verdict(of(0), of(0)), Verdict::WithinNoise);
        assert_eq!(change(3.0, Some(2.0)), "+50.0 %");
        assert_eq!(change(3.0, None), "-");
    }
}
