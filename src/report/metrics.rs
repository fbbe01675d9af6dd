//! Classification metrics from logits: accuracy, cross-entropy, precision, recall, F1 and the confusion matrix.
//!
//! Definitions are scikit-learn's (`precision_recall_fscore_support`, `f1_score`, `confusion_matrix`, with
//! `zero_division=0`); the averages run over the classes that occur among the labels or the predictions, as its
//! default does.

use super::table::{Table, number};
use crate::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt::Write;

/// Sums over an evaluation, fed batch by batch; holds `classes * classes` counts and no logits.
#[derive(Clone, Debug)]
pub struct Evaluation {
    classes: usize,
    confusion: Vec<u64>,
    support: Vec<u64>,
    images: u64,
    hits1: u64,
    hits5: u64,
    loss: f64,
}

/// What was evaluated: the words that head a result.
#[derive(Clone, Debug, Default)]
pub struct Subject {
    /// Model id, `resnet20`.
    pub model: String,
    /// Data set and split, `cifar10 (test)`.
    pub data: String,
    /// Backend, `cpu`.
    pub backend: String,
}

/// The result of an evaluation; serialised, it is the document that `eval --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// Model id.
    pub model: String,
    /// Data set and split.
    pub data: String,
    /// Backend that computed the logits.
    pub backend: String,
    /// Images evaluated.
    pub images: u64,
    /// Top-1 accuracy in percent.
    #[serde(deserialize_with = "null_is_nan")]
    pub top1: f64,
    /// Top-5 accuracy in percent (top-k with k = classes where there are fewer than five).
    #[serde(deserialize_with = "null_is_nan")]
    pub top5: f64,
    /// Mean softmax cross-entropy in nats, without label smoothing; `null` in JSON where a logit was not finite.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Unweighted mean of the F1 of the classes that occur, 0 to 1.
    #[serde(deserialize_with = "null_is_nan")]
    pub macro_f1: f64,
    /// Mean of F1 weighted by support, 0 to 1.
    #[serde(deserialize_with = "null_is_nan")]
    pub weighted_f1: f64,
    /// One entry a class, in class order.
    pub per_class: Vec<ClassMetrics>,
    /// `confusion[t][p]`: images of class `t` predicted as `p`. An image with a NaN logit has no prediction and is in
    /// no column, so that its row sums to less than the support.
    pub confusion: Vec<Vec<u64>>,
    /// Images per second over the time given to [`Evaluation::finish`].
    #[serde(deserialize_with = "null_is_nan")]
    pub images_per_second: f64,
}

/// One class of an [`EvalReport`]; ratios from 0 to 1, a ratio of nothing is 0.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassMetrics {
    /// Index of the class.
    pub class: usize,
    /// Its name.
    pub name: String,
    /// Right predictions over all predictions of this class.
    pub precision: f64,
    /// Right predictions over all images of this class.
    pub recall: f64,
    /// Harmonic mean of both.
    pub f1: f64,
    /// Images of this class.
    pub support: u64,
}

/// JSON has no NaN: serde_json writes it as `null`, and this reads it back.
pub(super) fn null_is_nan<'de, D: Deserializer<'de>>(d: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

impl Evaluation {
    /// An empty evaluation over `classes` classes.
    pub fn new(classes: usize) -> Self {
        Evaluation {
            classes,
            confusion: vec![0; classes * classes],
            support: vec![0; classes],
            images: 0,
            hits1: 0,
            hits5: 0,
            loss: 0.0,
        }
    }

    /// Adds a batch: `logits` `[n, classes]` row by row, `labels` `[n]`.
    ///
    /// The prediction is the first of the largest logits. A row with a NaN is a wrong answer for top-1 and top-5
    /// and makes the mean loss NaN.
    ///
    /// # Errors
    /// [`Error::Input`] where the sizes disagree or a label is not below `classes`; nothing is added then.
    pub fn add(&mut self, logits: &[f32], labels: &[u32]) -> Result<()> {
        let k = self.classes;
        if logits.len() != labels.len() * k {
            return Err(Error::input(format!(
                "evaluation: {} logits for {} labels and {k} classes; expected {}",
                logits.len(),
                labels.len(),
                labels.len() * k
            )));
        }
        if let Some((i, label)) = labels.iter().enumerate().find(|(_, l)| **l as usize >= k) {
            return Err(Error::input(format!(
                "evaluation: image {} has label {label}, but the model has {k} classes (0 to {}); check --classes and the data set",
                self.images + i as u64,
                k as i64 - 1
            )));
        }
        for (row, &label) in logits.chunks_exact(k.max(1)).zip(labels) {
            self.add_row(row, label as usize);
        }
        Ok(())
    }

    fn add_row(&mut self, row: &[f32], label: usize) {
        self.images += 1;
        self.support[label] += 1;
        self.loss += cross_entropy(row, label);
        if row.iter().any(|v| v.is_nan()) {
            return;
        }
        let mut predicted = 0;
        for (i, &v) in row.iter().enumerate() {
            if v > row[predicted] {
                predicted = i;
            }
        }
        // Ties go to the lower index, so that rank 0 and `predicted` agree.
        let own = row[label];
        let rank = row
            .iter()
            .enumerate()
            .filter(|&(i, &v)| v > own || (v == own && i < label))
            .count();
        self.hits1 += u64::from(rank == 0);
        self.hits5 += u64::from(rank < 5);
        self.confusion[label * self.classes + predicted] += 1;
    }

    /// Images so far.
    pub fn images(&self) -> u64 {
        self.images
    }

    /// Top-1 accuracy so far in percent; NaN before the first image.
    pub fn top1(&self) -> f64 {
        100.0 * self.hits1 as f64 / self.images as f64
    }

    /// Top-5 accuracy so far in percent; NaN before the first image.
    pub fn top5(&self) -> f64 {
        100.0 * self.hits5 as f64 / self.images as f64
    }

    /// Mean cross-entropy so far in nats; NaN before the first image.
    pub fn loss(&self) -> f64 {
        self.loss / self.images as f64
    }

    /// The result after all batches; `names[class]` (a missing name is the class's number), `seconds` the time
    /// that the images took.
    ///
    /// # Errors
    /// [`Error::Input`] where no image was added.
    pub fn finish(&self, subject: Subject, names: &[String], seconds: f64) -> Result<EvalReport> {
        if self.images == 0 {
            return Err(Error::input(format!(
                "evaluation of {} on {}: no images",
                subject.model, subject.data
            )));
        }
        let k = self.classes;
        let cell = |t: usize, p: usize| self.confusion[t * k + p];
        let predicted: Vec<u64> = (0..k).map(|p| (0..k).map(|t| cell(t, p)).sum()).collect();
        let ratio = |a: u64, b: u64| if b == 0 { 0.0 } else { a as f64 / b as f64 };
        let per_class: Vec<ClassMetrics> = (0..k)
            .map(|c| ClassMetrics {
                class: c,
                name: names.get(c).cloned().unwrap_or_else(|| c.to_string()),
                precision: ratio(cell(c, c), predicted[c]),
                recall: ratio(cell(c, c), self.support[c]),
                f1: ratio(2 * cell(c, c), predicted[c] + self.support[c]),
                support: self.support[c],
            })
            .collect();
        let occurs = |c: &&ClassMetrics| c.support + predicted[c.class] > 0;
        let occurring = per_class.iter().filter(occurs).count();
        Ok(EvalReport {
            model: subject.model,
            data: subject.data,
            backend: subject.backend,
            images: self.images,
            top1: self.top1(),
            top5: self.top5(),
            loss: self.loss(),
            macro_f1: per_class.iter().map(|c| c.f1).sum::<f64>() / occurring as f64,
            weighted_f1: per_class
                .iter()
                .map(|c| c.f1 * c.support as f64)
                .sum::<f64>()
                / self.images as f64,
            confusion: self
                .confusion
                .chunks_exact(k)
                .map(<[u64]>::to_vec)
                .collect(),
            images_per_second: if seconds > 0.0 {
                self.images as f64 / seconds
            } else {
                f64::NAN
            },
            per_class,
        })
    }
}

/// `logsumexp(row) - row[label]` in f64.
fn cross_entropy(row: &[f32], label: usize) -> f64 {
    let max = row.iter().fold(
        f32::NEG_INFINITY,
        |m, &v| if v > m || v.is_nan() { v } else { m },
    );
    let sum: f64 = row
        .iter()
        .map(|&v| (f64::from(v) - f64::from(max)).exp())
        .sum();
    f64::from(max) + sum.ln() - f64::from(row[label])
}

/// Most classes for which a confusion matrix is shown with its numbers.
pub(super) const SMALL: usize = 20;

impl EvalReport {
    /// For a terminal: the totals, the per-class table and, for up to 20 classes, the confusion matrix. With more
    /// classes only the ten worst and ten best by F1 are listed, unless `all` is set.
    pub fn to_text(&self, all: bool) -> String {
        let mut out = format!("{} on {} ({})\n", self.model, self.data, self.backend);
        let _ = writeln!(
            out,
            "{} images  top-1 {:.2} %  top-5 {:.2} %  loss {}  macro F1 {:.4}  weighted F1 {:.4}  {} images/s\n",
            self.images,
            self.top1,
            self.top5,
            number(self.loss, 4),
            self.macro_f1,
            self.weighted_f1,
            number(self.images_per_second, 1)
        );
        if all || self.per_class.len() <= SMALL {
            out.push_str(&class_table(&self.per_class.iter().collect::<Vec<_>>()).to_text());
        } else {
            let (worst, best) = self.extremes(10);
            let _ = writeln!(
                out,
                "the 10 worst of {} classes by F1",
                self.per_class.len()
            );
            out.push_str(&class_table(&worst).to_text());
            out.push_str("\nthe 10 best\n");
            out.push_str(&class_table(&best).to_text());
        }
        let unread = self.without_prediction();
        if unread > 0 {
            let _ = writeln!(
                out,
                "\n{unread} images had a NaN among their logits: counted as wrong"
            );
        }
        if self.per_class.len() <= SMALL {
            out.push_str("\nconfusion (rows: true class, columns: predicted)\n");
            out.push_str(&self.confusion_table().to_text());
        }
        out
    }

    /// The `n` worst (worst first) and `n` best (best first) classes by F1, of those that have images.
    pub fn extremes(&self, n: usize) -> (Vec<&ClassMetrics>, Vec<&ClassMetrics>) {
        let mut by_f1: Vec<&ClassMetrics> =
            self.per_class.iter().filter(|c| c.support > 0).collect();
        by_f1.sort_by(|a, b| a.f1.total_cmp(&b.f1).then(a.class.cmp(&b.class)));
        let worst = by_f1.iter().take(n).copied().collect();
        let best = by_f1.iter().rev().take(n).copied().collect();
        (worst, best)
    }

    /// The confusion matrix as a table, rows and columns headed by class.
    pub fn confusion_table(&self) -> Table {
        // Columns are headed by number: names as wide as "automobile" would triple the table's width.
        let headings =
            std::iter::once(String::new()).chain((0..self.per_class.len()).map(|c| c.to_string()));
        let mut table = Table::new(headings).left(&[0]);
        for (class, row) in self.per_class.iter().zip(&self.confusion) {
            let number = class.class.to_string();
            let head = if class.name == number {
                number
            } else {
                format!("{number} {}", class.name)
            };
            table.row(std::iter::once(head).chain(row.iter().map(|n| n.to_string())));
        }
        table
    }

    /// The `n` most frequent mistakes as (true class, predicted class, images), most frequent first.
    pub fn most_confused(&self, n: usize) -> Vec<(usize, usize, u64)> {
        let cells = self.confusion.iter().enumerate();
        let mut wrong: Vec<_> = cells
            .flat_map(|(t, row)| row.iter().enumerate().map(move |(p, &n)| (t, p, n)))
            .filter(|&(t, p, n)| t != p && n > 0)
            .collect();
        wrong.sort_by_key(|&(t, p, n)| (std::cmp::Reverse(n), t, p));
        wrong.truncate(n);
        wrong
    }

    /// Images without a prediction: those with a NaN among their logits.
    pub fn without_prediction(&self) -> u64 {
        self.images - self.confusion.iter().flatten().sum::<u64>()
    }
}

/// Per-class rows as a table: class, precision, recall, F1, support.
pub fn class_table(classes: &[&ClassMetrics]) -> Table {
    let mut table =
        Table::new(["class", "name", "precision", "recall", "F1", "support"]).left(&[1]);
    for c in classes {
        table.row([
            c.class.to_string(),
            c.name.clone(),
            format!("{:.4}", c.precision),
            format!("{:.4}", c.recall),
            format!("{:.4}", c.f1),
            c.support.to_string(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn subject() -> Subject {
        Subject {
            model: "m".into(),
            data: "d".into(),
            backend: "cpu".into(),
        }
    }

    fn floats(v: &Value) -> Vec<f64> {
        v.as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    }

    /// Fed in uneven batches, the fixture made by real scikit-learn (fixtures/make_fixture.py) comes out.
    #[test]
    fn agrees_with_scikit_learn() {
        let want: Value = serde_json::from_str(include_str!("fixtures/sklearn.json")).unwrap();
        let k = want["classes"].as_u64().unwrap() as usize;
        let logits: Vec<f32> = floats(&want["logits"]).iter().map(|&v| v as f32).collect();
        let labels: Vec<u32> = floats(&want["labels"]).iter().map(|&v| v as u32).collect();
        let mut e = Evaluation::new(k);
        for (l, y) in logits.chunks(k * 37).zip(labels.chunks(37)) {
            e.add(l, y).unwrap();
        }
        let r = e.finish(subject(), &["zero".to_string()], 2.0).unwrap();
        for (name, got) in [
            ("loss", r.loss),
            ("top1", r.top1),
            ("top5", r.top5),
            ("macro_f1", r.macro_f1),
            ("weighted_f1", r.weighted_f1),
        ] {
            let want = want[name].as_f64().unwrap();
            assert!(
                (got - want).abs() < 1e-12 * want.abs().max(1.0),
                "{name}: {got} against {want}"
            );
        }
        for (name, get) in [
            ("precision", (|c| c.precision) as fn(&ClassMetrics) -> f64),
            ("recall", |c| c.recall),
            ("f1", |c| c.f1),
            ("support", |c| c.support as f64),
        ] {
            for (c, want) in r.per_class.iter().zip(floats(&want[name])) {
                assert!(
                    (get(c) - want).abs() < 1e-12,
                    "{name} of class {}: {} against {want}",
                    c.class,
                    get(c)
                );
            }
        }
        for (got, want) in r
            .confusion
            .iter()
            .zip(want["confusion"].as_array().unwrap())
        {
            assert_eq!(
                got.iter().map(|&n| n as f64).collect::<Vec<_>>(),
                floats(want)
            );
        }
        assert_eq!(r.images_per_second, 45.0);
        assert_eq!(
            (r.per_class[0].name.as_str(), r.per_class[1].name.as_str()),
            ("zero", "1")
        );
        assert_eq!(r.most_confused(1)[0].2, 4);
    }

    #[test]
    fn json_has_exactly_the_documented_keys() {
        let mut e = Evaluation::new(2);
        e.add(&[1.0, 0.0], &[0]).unwrap();
        let v = serde_json::to_value(e.finish(subject(), &[], 1.0).unwrap()).unwrap();
        let keys: Vec<_> = v.as_object().unwrap().keys().map(String::as_str).collect();
        let want = "model data backend images top1 top5 loss macro_f1 weighted_f1 per_class confusion images_per_second";
        assert_eq!(keys, want.split(' ').collect::<Vec<_>>());
        let keys: Vec<_> = v["per_class"][0]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys,
            ["class", "name", "precision", "recall", "f1", "support"]
        );
    }

    #[test]
    fn nan_is_never_right_and_survives_json() {
        let mut e = Evaluation::new(3);
        e.add(
            &[f32::NAN, 0.0, 0.0, 5.0, f32::NAN, 0.0, 0.0, 1.0, 0.0],
            &[0, 0, 1],
        )
        .unwrap();
        let r = e.finish(subject(), &[], 1.0).unwrap();
        assert!((r.top1 - 100.0 / 3.0).abs() < 1e-12 && (r.top5 - 100.0 / 3.0).abs() < 1e-12);
        assert!(r.loss.is_nan());
        assert_eq!((r.without_prediction(), r.per_class[0].support), (2, 2));
        assert!(r.to_text(false).contains("2 images had a NaN"));
        let back: EvalReport = serde_json::from_str(&serde_json::to_string(&r).unwrap()).unwrap();
        assert!(back.loss.is_nan() && back.per_class == r.per_class);
    }

    #[test]
    fn infinities_ties_and_few_classes() {
        let mut e = Evaluation::new(3);
        // A masked class is an answer like any other; a tie goes to the first class, as argmax does.
        e.add(&[f32::NEG_INFINITY, 0.0, 0.0], &[1]).unwrap();
        assert_eq!((e.top1(), e.top5()), (100.0, 100.0));
        assert!((e.loss() - 2f64.ln()).abs() < 1e-15);
        e.add(&[0.0; 3], &[2]).unwrap();
        assert_eq!((e.top1(), e.top5()), (50.0, 100.0));
        // No overflow with large logits.
        let mut e = Evaluation::new(2);
        e.add(&[3e38, -3e38], &[0]).unwrap();
        assert_eq!(e.loss(), 0.0);
    }

    #[test]
    fn bad_input_is_refused_whole() {
        let mut e = Evaluation::new(10);
        let m = e.add(&[0.0; 20], &[3, 10]).unwrap_err().to_string();
        assert!(
            m.contains("image 1 has label 10") && m.contains("10 classes"),
            "{m}"
        );
        assert!(e.add(&[0.0; 19], &[3, 4]).is_err());
        assert_eq!(e.images(), 0);
        assert!(e.finish(subject(), &[], 1.0).is_err());
    }

    #[test]
    fn many_classes_are_summarised() {
        let mut e = Evaluation::new(30);
        for c in 0..30u32 {
            let mut row = [0f32; 30];
            row[if c < 12 { 29 } else { c as usize }] = 1.0;
            e.add(&row, &[c]).unwrap();
        }
        let r = e.finish(subject(), &[], 1.0).unwrap();
        let text = r.to_text(false);
        assert!(text.contains("10 worst of 30") && !text.contains("confusion"));
        assert!(text.lines().count() < 30);
        assert!(r.to_text(true).lines().count() > 30);
        let (worst, best) = r.extremes(10);
        assert_eq!((worst[0].class, best[0].class), (0, 28));
    }
}
