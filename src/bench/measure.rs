//! Repeating something until its median is known well enough.

use crate::Result;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// When to stop repeating.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Runs before the first that counts.
    pub warm_up: usize,
    /// Runs that count, at least; three where they take more than three times `time`.
    pub min_runs: usize,
    /// The interval of the median is narrow enough at this share of the median, either side.
    pub precision: f64,
    /// Runs end after this time, narrow or not (but not before `min_runs`).
    pub time: Duration,
}

impl Limits {
    /// Whether `times` in seconds of runs that began `since` ago are enough.
    pub fn enough(&self, times: &[f64], since: Duration) -> bool {
        const FEW: usize = 3;
        let long = times.len() >= FEW && since >= 3 * self.time;
        let many = times.len() >= self.min_runs.max(1);
        let narrow = || Sample::of(times.to_vec()).spread() <= self.precision;
        many && (since >= self.time || narrow()) || long && self.time > Duration::ZERO
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            warm_up: 2,
            min_runs: 7,
            precision: 0.01,
            time: Duration::from_secs(10),
        }
    }
}

/// A measured time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Median, in seconds.
    pub median: f64,
    /// Lower end of the median's 95 % interval (order statistics, no assumption about the distribution).
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// The shortest run.
    pub min: f64,
    /// Runs.
    pub runs: usize,
}

impl Sample {
    /// From the times of single runs in seconds.
    pub fn of(mut times: Vec<f64>) -> Sample {
        times.sort_by(f64::total_cmp);
        let n = times.len();
        if n == 0 {
            return Sample::default();
        }
        let median = (times[(n - 1) / 2] + times[n / 2]) / 2.0;
        // Ranks of the binomial interval of the median, by its normal approximation.
        let half = 0.98 * (n as f64).sqrt();
        let at = |rank: f64| times[(rank.max(0.0) as usize).min(n - 1)];
        Sample {
            median,
            low: at((n as f64 / 2.0 - half).floor()),
            high: at((n as f64 / 2.0 + half).ceil() - 1.0).max(median),
            min: times[0],
            runs: n,
        }
    }

    /// Half the interval's width as a share of the median.
    pub fn spread(&self) -> f64 {
        if self.median > 0.0 {
            (self.high - self.low) / 2.0 / self.median
        } else {
            0.0
        }
    }

    /// The median in milliseconds.
    pub fn ms(&self) -> f64 {
        1e3 * self.median
    }
}

/// Times `run` until the interval of its median is narrow or the time is up.
///
/// # Errors
/// The first error of `run`.
pub fn measure(limits: Limits, mut run: impl FnMut() -> Result<()>) -> Result<Sample> {
    measure_by(limits, || {
        let clock = Instant::now();
        run()?;
        Ok(clock.elapsed().as_secs_f64())
    })
}

/// [`measure`] for a run that knows itself how many seconds it took.
///
/// # Errors
/// The first error of `run`.
pub fn measure_by(limits: Limits, mut run: impl FnMut() -> Result<f64>) -> Result<Sample> {
    for _ in 0..limits.warm_up {
        run()?;
    }
    let begin = Instant::now();
    let mut times = vec![];
    loop {
        times.push(run()?);
        if limits.enough(&times, begin.elapsed()) {
            return Ok(Sample::of(times));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_median_and_interval() {
        let s = Sample::of((0..101).rev().map(f64::from).collect());
        assert_eq!(s.median, 50.0);
        // The 95 % interval of the median of 101 values: ranks 41 to 61.
        assert!(
            (s.low - 40.0).abs() <= 1.0 && (s.high - 60.0).abs() <= 1.0,
            "{s:?}"
        );
        assert_eq!((s.min, s.runs), (0.0, 101));
        assert_eq!(Sample::of(vec![3.0]).median, 3.0);
        assert_eq!(Sample::of(vec![]), Sample::default());
    }

    #[test]
    fn repeats_until_narrow_or_out_of_time() {
        let mut n = 0;
        let limits = Limits {
            warm_up: 3,
            min_runs: 5,
            precision: 1e9,
            time: Duration::ZERO,
        };
        let s = measure(limits, || {
            n += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!((n, s.runs), (8, 5));
    }
}
