//! Calibration: whether a network is right as often as it says (Guo, Pleiss, Sun & Weinberger 2017, "On Calibration of
//! Modern Neural Networks").

use super::classify::{answers, best};
use super::{Analysis, Context, Findings};
use crate::Result;
use crate::report::plot::{Reliability, reliability};
use crate::report::table::{Table, number};
use clap::builder::RangedU64ValueParser;
use serde::Serialize;
use serde_json::json;

/// Answers whose confidence lies in `(low, high]`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bin {
    /// Lower end, left out (but 0 belongs to the first bin).
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Answers.
    pub images: usize,
    /// Their mean confidence; 0 where there are none.
    pub confidence: f64,
    /// Share of them that are right; 0 where there are none.
    pub accuracy: f64,
}

/// How well confidence and accuracy agree.
#[derive(Clone, Debug, Serialize)]
pub struct Calibration {
    /// Bins of equal width.
    pub bins: Vec<Bin>,
    /// Images.
    pub images: usize,
    /// Share of right answers.
    pub accuracy: f64,
    /// Mean confidence.
    pub confidence: f64,
    /// Expected calibration error: the mean over the images of each bin's gap between confidence and accuracy.
    pub ece: f64,
    /// The largest gap of a bin.
    pub mce: f64,
    /// Mean over images of the squared distance of the probabilities from the truth (Brier 1950).
    pub brier: f64,
    /// Mean cross-entropy, in nats.
    pub nll: f64,
}

/// From each image's probabilities `[classes]` and true class, with `bins` bins.
pub fn calibration(answers: impl Iterator<Item = (Vec<f64>, usize)>, bins: usize) -> Calibration {
    let mut sums = vec![(0usize, 0.0f64, 0usize); bins];
    let (mut n, mut brier, mut nll) = (0, 0.0, 0.0);
    for (p, label) in answers {
        let (class, confidence) = best(&p);
        // (low, high]: a confidence on a border belongs to the lower bin.
        let bin = (confidence * bins as f64).ceil() as usize;
        let bin = &mut sums[bin.clamp(1, bins) - 1];
        bin.0 += 1;
        bin.1 += confidence;
        bin.2 += usize::from(class == label);
        let square = |(k, v): (usize, &f64)| (v - f64::from(u8::from(k == label))).powi(2);
        brier += p.iter().enumerate().map(square).sum::<f64>();
        nll -= p[label].max(f64::MIN_POSITIVE).ln();
        n += 1;
    }
    let ratio = |a: f64, b: usize| if b == 0 { 0.0 } else { a / b as f64 };
    let made: Vec<Bin> = sums
        .iter()
        .enumerate()
        .map(|(i, &(images, confidence, right))| Bin {
            low: i as f64 / bins as f64,
            high: (i + 1) as f64 / bins as f64,
            images,
            confidence: ratio(confidence, images),
            accuracy: ratio(right as f64, images),
        })
        .collect();
    let gap = |b: &Bin| (b.confidence - b.accuracy).abs();
    Calibration {
        images: n,
        accuracy: ratio(sums.iter().map(|s| s.2 as f64).sum(), n),
        confidence: ratio(sums.iter().map(|s| s.1).sum(), n),
        ece: ratio(made.iter().map(|b| gap(b) * b.images as f64).sum(), n),
        mce: made.iter().map(gap).fold(0.0, f64::max),
        brier: ratio(brier, n),
        nll: ratio(nll, n),
        bins: made,
    }
}

/// Whether the network is right as often as it says: expected calibration error, reliability diagram.
///
/// With several models their diagrams stand side by side.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze calibration -w runs/cnn -d cifar10
  tilewright analyze calibration -w runs/cnn --with runs/vit -d digits --plot reliability.svg")]
pub(super) struct Args {
    /// Bins of equal width
    #[arg(long, value_name = "N", default_value = "15", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    bins: usize,
}

/// A bin in `bins.csv`: model, bounds, images, mean confidence, accuracy.
#[derive(Serialize)]
struct Row<'a> {
    model: &'a str,
    low: f64,
    high: f64,
    images: usize,
    confidence: f64,
    accuracy: f64,
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let mut t = Table::new([
            "model",
            "images",
            "accuracy %",
            "confidence %",
            "ECE %",
            "largest gap %",
            "Brier",
            "loss",
        ])
        .left(&[0]);
        let mut all = vec![];
        for subject in cx.subjects {
            let a = answers(cx, subject)?;
            let each = (0..a.len()).map(|i| (a.probabilities(i), a.labels[i] as usize));
            let c = calibration(each, self.bins);
            t.row([
                subject.name.clone(),
                c.images.to_string(),
                number(100.0 * c.accuracy, 2),
                number(100.0 * c.confidence, 2),
                number(100.0 * c.ece, 2),
                number(100.0 * c.mce, 2),
                number(c.brier, 4),
                number(c.nll, 4),
            ]);
            all.push((subject, c));
        }
        let panels = all.iter().map(|(s, c)| Reliability {
            name: &s.name,
            family: s.family(),
            ece: c.ece,
            bins: c
                .bins
                .iter()
                .map(|b| (b.images, b.confidence, b.accuracy))
                .collect(),
        });
        let svg = reliability(&panels.collect::<Vec<_>>())?;
        let models = all
            .iter()
            .map(|(s, c)| json!({"model": s.name, "calibration": c}));
        let data = json!({"data": cx.data(), "models": models.collect::<Vec<_>>()});
        let row = |model, b: &Bin| Row {
            model,
            low: b.low,
            high: b.high,
            images: b.images,
            confidence: b.confidence,
            accuracy: b.accuracy,
        };
        let rows = all
            .iter()
            .flat_map(|(s, c)| c.bins.iter().map(move |b| row(s.name.as_str(), b)));
        Findings::new(format!("calibration on {}, {} bins", cx.data(), self.bins), data)
            .table("", t)
            .note("ECE: the mean over all images of the gap between confidence and accuracy in their bin.")
            .plot(
                "reliability",
                "Above: accuracy of the answers in each bin of confidence, in colour, and in grey its gap to their confidence; \
                 on the diagonal the network is right as often as it says, below it is too sure. Below: how many answers have that confidence.",
                svg,
            )
            .csv("bins", rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sklearn.calibration.calibration_curve` over whether an answer is right against its confidence, and
    /// `sklearn.metrics.log_loss`, on `p = softmax(4 sin(3 i + 5 k + i k))`, 200 images, 5 classes, label
    /// `(7 i) % 5`.
    #[test]
    fn as_scikit_learn_bins_it() {
        let one = |i: usize| {
            let z =
                |k: usize| (4.0 * (3.0 * i as f64 + 5.0 * k as f64 + (i * k) as f64).sin()).exp();
            let e: Vec<f64> = (0..5).map(z).collect();
            let sum: f64 = e.iter().sum();
            (e.iter().map(|v| v / sum).collect::<Vec<_>>(), 7 * i % 5)
        };
        let got = calibration((0..200).map(one), 15);
        for (got, want) in [
            (got.ece, 0.433584874746),
            (got.mce, 0.708518498077),
            (got.accuracy, 0.225000000000),
            (got.brier, 1.151750218050),
            (got.nll, 3.599326259312),
        ] {
            assert!((got - want).abs() < 1e-9, "{got} for {want}");
        }
        assert_eq!(got.bins.iter().map(|b| b.images).sum::<usize>(), 200);
    }

    #[test]
    fn borders_belong_to_the_lower_bin() {
        let p = |v: f64| vec![v, 1.0 - v];
        let c = calibration([(p(0.6), 0), (p(1.0), 0), (p(0.8), 1)].into_iter(), 5);
        let counts: Vec<usize> = c.bins.iter().map(|b| b.images).collect();
        assert_eq!(counts, [0, 0, 1, 1, 1]);
        // Gaps 0.4, 0.8 and 0.
        assert!((c.ece - 0.4).abs() < 1e-12 && (c.mce - 0.8).abs() < 1e-12);
    }
}
