//! The worst mistakes: what the network was surest of and wrong about, as one sheet.

use super::classify::{answers, best};
use super::picture::{Cell, captioned};
use super::{Analysis, Context, Findings};
use crate::Result;
use crate::report::table::{Table, number};
use clap::builder::RangedU64ValueParser;
use serde::Serialize;
use serde_json::json;

/// The images that the network is most wrong about, by their loss: a sheet with the true and the predicted class.
///
/// A wrong label in the data set shows up here first.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze errors -w runs/cnn -d cifar10 -o errors
  tilewright analyze errors -m resnet20 -w resnet20.safetensors -d cifar10 --most 60 -o errors")]
pub(super) struct Args {
    /// How many
    #[arg(long, value_name = "N", default_value = "36", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    most: usize,
}

/// One mistake.
#[derive(Clone, Debug, Serialize, PartialEq)]
struct Mistake {
    index: u32,
    file: String,
    truth: String,
    predicted: String,
    probability: f64,
    loss: f64,
}

/// The wrong ones among `answers` (probabilities, true class), worst loss first, at most `most`: (place, predicted,
/// probability of that, loss).
fn worst(
    answers: impl Iterator<Item = (Vec<f64>, usize)>,
    most: usize,
) -> (usize, Vec<(usize, usize, f64, f64)>) {
    let wrong = answers.enumerate().filter_map(|(i, (p, label))| {
        let (class, probability) = best(&p);
        let loss = -p[label].max(f64::MIN_POSITIVE).ln();
        (class != label).then_some((i, class, probability, loss))
    });
    let mut wrong: Vec<_> = wrong.collect();
    let count = wrong.len();
    wrong.sort_by(|a, b| b.3.total_cmp(&a.3).then(a.0.cmp(&b.0)));
    wrong.truncate(most);
    (count, wrong)
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let a = answers(cx, subject)?;
        let each = (0..a.len()).map(|i| (a.probabilities(i), a.labels[i] as usize));
        let (count, wrong) = worst(each, self.most);
        let mut t = Table::new([
            "image",
            "true class",
            "predicted",
            "probability %",
            "loss",
            "file",
        ])
        .left(&[1, 2, 5]);
        let (mut cells, mut mistakes) = (vec![], vec![]);
        for (i, class, probability, loss) in wrong {
            let (index, file) = a.place(i);
            let one = Mistake {
                index,
                file,
                truth: a.names[a.labels[i] as usize].clone(),
                predicted: a.names[class].clone(),
                probability,
                loss,
            };
            t.row([
                one.index.to_string(),
                one.truth.clone(),
                one.predicted.clone(),
                number(100.0 * one.probability, 1),
                number(one.loss, 2),
                one.file.clone(),
            ]);
            let lines = [
                format!("is {}", one.truth),
                format!("said {}", one.predicted),
                format!("{:.0} % sure", 100.0 * one.probability),
            ];
            cells.push(Cell::new(a.picture(i)?, lines));
            mistakes.push(one);
        }
        let heading = format!(
            "{} is wrong on {count} of {} images of {}; the {} worst by loss",
            subject.name,
            a.len(),
            cx.data(),
            mistakes.len()
        );
        let data = json!({"model": subject.name, "data": cx.data(), "images": a.len(), "wrong": count,
            "mistakes": mistakes});
        let mut found = Findings::new(heading, data).table("", t);
        if !cells.is_empty() {
            let caption =
                "Worst first: the true class, what the network said, and how sure it was.";
            found = found.picture("errors", caption, captioned(&cells, 9));
        }
        found.csv("errors", mistakes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_surest_mistake_comes_first() {
        let answers = [
            (vec![0.9, 0.1], 0),   // right
            (vec![0.6, 0.4], 1),   // wrong, loss 0.92
            (vec![0.99, 0.01], 1), // wrong, loss 4.6
            (vec![0.3, 0.7], 0),   // wrong, loss 1.2
        ];
        let (count, got) = worst(answers.into_iter(), 2);
        assert_eq!(count, 3);
        let places: Vec<usize> = got.iter().map(|w| w.0).collect();
        assert_eq!(places, [2, 3]);
        assert!((got[0].3 - 100f64.ln()).abs() < 1e-12 && got[0].2 == 0.99);
    }
}
