//! `report.html`: one self-contained page about a run, or about several compared. Data in, text out; no scripts, no
//! network, light and dark by the reader's own setting.

mod bench;
mod compare;
mod document;
mod page;
mod sample;

pub use bench::{BenchPage, BenchSection};
pub use compare::CompareReport;
pub use document::{Block, Document};
pub use page::escape;
pub use sample::Sample;

use super::metrics::{EvalReport, SMALL, class_table};
use super::plot::{self, Family, RunCurve};
use super::runlog::EpochRow;
use super::table::{Table, duration, number, si};
use crate::Result;
use page::{Page, code, facts, figure, notes, pixels, table_html};
use sample::{SAMPLES, samples_html};

/// What a result was made with.
#[derive(Clone, Debug, Default)]
pub struct Provenance {
    /// Version of the program.
    pub version: String,
    /// Commit it was built from, or empty.
    pub commit: String,
    /// Backend and device, `cpu: AMD EPYC, 2 threads`.
    pub device: String,
    /// Seed of the run.
    pub seed: u64,
    /// When it ended, as text (`2026-11-21 11:05 UTC`), or empty.
    pub finished: String,
}

/// One run: everything its page shows.
#[derive(Clone, Debug)]
pub struct RunReport {
    /// Short name in tables and legends.
    pub name: String,
    /// Model id or spec.
    pub model: String,
    /// Its family: colour and line style.
    pub family: Family,
    /// Data set.
    pub data: String,
    /// Number of parameters.
    pub params: u64,
    /// FLOPs of one image's forward pass (a multiply-add is 2), where known.
    pub flops: Option<u64>,
    /// Rows of `metrics.csv`; empty for a page about an evaluation alone.
    pub epochs: Vec<EpochRow>,
    /// Result on the test (or validation) images.
    pub eval: Option<EvalReport>,
    /// Predictions to show, in this order; at most 64 are shown.
    pub samples: Vec<Sample>,
    /// The resolved configuration, TOML.
    pub config: String,
    /// The command line that reproduces the run.
    pub command: String,
    /// Version, commit, device, seed.
    pub provenance: Provenance,
    /// Things the reader must know: corrupt images skipped, a fallback taken.
    pub notes: Vec<String>,
}

/// Half the width of the 95 % interval of an accuracy in percent over `images` images (Wilson's score interval, which
/// stays sensible near 0 and 100 %), in points.
pub fn accuracy_margin(top1: f64, images: u64) -> f64 {
    let (p, n, z) = (top1 / 100.0, images as f64, 1.96);
    100.0 * z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt()
}

const CURVES: &str = "Training values are means over the epoch while the weights change and images are augmented; \
    validation values are taken at its end, without augmentation.";
const MATRIX: &str = "Each row is divided by the images of its true class: a cell is the share (in percent) that \
    was predicted as the column's class. Right answers are on the diagonal.";

impl RunReport {
    fn curve(&self) -> RunCurve<'_> {
        RunCurve {
            name: &self.name,
            family: self.family,
            epochs: &self.epochs,
        }
    }

    /// Wall time of all epochs in seconds.
    pub fn train_seconds(&self) -> f64 {
        self.epochs
            .iter()
            .map(|r| r.seconds)
            .filter(|s| s.is_finite())
            .sum()
    }

    /// Median over the epochs of training images per second; NaN without epochs.
    pub fn train_rate(&self) -> f64 {
        let mut rates: Vec<f64> = self
            .epochs
            .iter()
            .map(|r| r.images_per_second)
            .filter(|r| r.is_finite())
            .collect();
        rates.sort_by(f64::total_cmp);
        rates.get(rates.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// The page.
    ///
    /// # Errors
    /// [`crate::Error`] where parts of the report contradict each other (a matrix without classes).
    pub fn to_html(&self) -> Result<String> {
        let about = format!(
            "<p class=\"soft\">{} on {}{}</p>\n",
            escape(&self.model),
            escape(&self.data),
            if self.provenance.finished.is_empty() {
                String::new()
            } else {
                format!(", {}", escape(&self.provenance.finished))
            }
        );
        let mut page = Page::new(&self.name, about + &self.in_short());
        page.section("Summary", facts(&self.summary()) + &notes(&self.notes));
        if !self.epochs.is_empty() {
            page.section(
                "Learning curves",
                figure(&plot::learning_curves(&[self.curve()])?, CURVES),
            );
            page.more(figure(
                &plot::learning_rate(&[self.curve()])?,
                "Learning rate of each epoch's last step.",
            ));
            page.more(epochs_table(&self.epochs));
        }
        if let Some(eval) = &self.eval {
            page.section("Per class", String::new());
            page.more(figure(
                &plot::class_f1(&[(&self.name, self.family, eval)])?,
                F1,
            ));
            page.more(per_class(eval));
            page.section("Confusion matrix", figure(&plot::confusion(eval)?, MATRIX));
            page.more(confused(eval));
        }
        if !self.samples.is_empty() {
            page.section(
                "Sample predictions",
                format!("<p class=\"soft\">{SHEET}</p>\n"),
            );
            page.more(samples_html(&self.samples, SAMPLES));
        }
        page.section("Configuration", code(&self.config));
        page.section(
            "Reproduce",
            code(&self.command) + &facts(&self.provenance.facts()),
        );
        Ok(page.finish())
    }

    /// The plots of the run as files: name (`learning_curves.svg`) and content.
    ///
    /// # Errors
    /// As [`RunReport::to_html`].
    pub fn plots(&self) -> Result<Vec<(&'static str, String)>> {
        let mut files = Vec::new();
        if !self.epochs.is_empty() {
            files.push((
                "learning_curves.svg",
                plot::learning_curves(&[self.curve()])?.standalone(),
            ));
            files.push((
                "learning_rate.svg",
                plot::learning_rate(&[self.curve()])?.standalone(),
            ));
        }
        if let Some(eval) = &self.eval {
            files.push(("confusion.svg", plot::confusion(eval)?.standalone()));
            files.push((
                "class_f1.svg",
                plot::class_f1(&[(&self.name, self.family, eval)])?.standalone(),
            ));
        }
        Ok(files)
    }

    fn in_short(&self) -> String {
        match &self.eval {
            Some(e) => format!(
                "<p class=\"short\">Right on <strong>{:.2} %</strong> of {} images (95&nbsp;% interval ±&nbsp;{:.1}&nbsp;points), \
                 macro F1 {:.3}{}.</p>\n",
                e.top1,
                e.images,
                accuracy_margin(e.top1, e.images),
                e.macro_f1,
                if self.epochs.is_empty() {
                    String::new()
                } else {
                    format!(
                        ", after {} epochs in {}",
                        self.epochs.last().map_or(0, |r| r.epoch),
                        duration(self.train_seconds())
                    )
                }
            ),
            None => String::new(),
        }
    }

    fn summary(&self) -> Vec<(&'static str, String)> {
        let mut rows = vec![
            ("Model", self.model.clone()),
            ("Data", self.data.clone()),
            ("Parameters", si(self.params as f64)),
            (
                "FLOPs per image, forward",
                self.flops.map_or(String::new(), |f| si(f as f64)),
            ),
        ];
        if let Some(e) = &self.eval {
            rows.extend([
                ("Evaluated on", format!("{}, {} images", e.data, e.images)),
                ("Top-1", format!("{:.2} %", e.top1)),
                ("Top-5", format!("{:.2} %", e.top5)),
                ("Loss (cross-entropy)", number(e.loss, 4)),
                ("Macro F1", number(e.macro_f1, 4)),
                ("Weighted F1", number(e.weighted_f1, 4)),
                (
                    "Evaluation speed",
                    format!("{} images/s", number(e.images_per_second, 0)),
                ),
            ]);
        }
        if let Some(last) = self.epochs.last() {
            rows.extend([
                ("Epochs", last.epoch.to_string()),
                ("Training time", duration(self.train_seconds())),
                (
                    "Training speed",
                    format!("{} images/s (median epoch)", number(self.train_rate(), 0)),
                ),
            ]);
        }
        rows.push(("Device", self.provenance.device.clone()));
        rows
    }
}

const F1: &str = "F1 is the harmonic mean of precision (how many predictions of a class are right) and recall (how \
    many of its images are found).";
const SHEET: &str = "✓ and a full line: right; ✗ and a dashed line: wrong, with the true class below. The percentage \
    is the probability that the model gave to its answer.";

impl Provenance {
    fn facts(&self) -> Vec<(&'static str, String)> {
        vec![
            ("Version", self.version.clone()),
            ("Commit", self.commit.clone()),
            ("Device", self.device.clone()),
            ("Seed", self.seed.to_string()),
            ("Finished", self.finished.clone()),
        ]
    }
}

/// Every epoch's row, folded away.
fn epochs_table(epochs: &[EpochRow]) -> String {
    let mut table = Table::new([
        "epoch",
        "train loss",
        "train top-1 %",
        "val loss",
        "val top-1 %",
        "val top-5 %",
        "learning rate",
        "images/s",
        "time",
    ]);
    for r in epochs {
        table.row([
            r.epoch.to_string(),
            number(r.train_loss, 4),
            number(r.train_top1, 2),
            number(r.val_loss, 4),
            number(r.val_top1, 2),
            number(r.val_top5, 2),
            if r.lr.is_finite() {
                format!("{:.2e}", r.lr)
            } else {
                "-".into()
            },
            number(r.images_per_second, 0),
            duration(r.seconds),
        ]);
    }
    format!(
        "<details><summary>All epochs as numbers</summary>\n{}</details>\n",
        table_html(&table)
    )
}

/// The per-class table: all classes up to 20, else worst and best ten, and all folded away.
fn per_class(eval: &EvalReport) -> String {
    let all = table_html(&class_table(&eval.per_class.iter().collect::<Vec<_>>()));
    if eval.per_class.len() <= SMALL {
        return all;
    }
    let (worst, best) = eval.extremes(10);
    format!(
        "<h3>The ten worst classes by F1</h3>\n{}<h3>The ten best</h3>\n{}<details><summary>All {} classes</summary>\n{all}</details>\n",
        table_html(&class_table(&worst)),
        table_html(&class_table(&best)),
        eval.per_class.len()
    )
}

fn confused(eval: &EvalReport) -> String {
    let pairs = eval.most_confused(10);
    if pairs.is_empty() {
        return "<p>No image was mistaken for another class.</p>\n".into();
    }
    let mut table =
        Table::new(["true class", "predicted as", "images", "% of the class"]).left(&[0, 1]);
    for (t, p, n) in pairs {
        let (truth, predicted) = (&eval.per_class[t], &eval.per_class[p]);
        let share = 100.0 * n as f64 / truth.support as f64;
        table.row([
            truth.name.clone(),
            predicted.name.clone(),
            n.to_string(),
            format!("{share:.1}"),
        ]);
    }
    format!("<h3>Most frequent mistakes</h3>\n{}", table_html(&table))
}

#[cfg(test)]
mod tests {
    use super::super::metrics::{Evaluation, Subject};
    use super::*;

    const EVIL: &str = "<script>alert('1')</script>&\"";

    /// `wrong` in ten images are mistaken for the next class.
    fn eval(k: usize, wrong: usize, name: &str) -> EvalReport {
        let mut e = Evaluation::new(k);
        for i in 0..4 * k {
            let (label, mut row) = (i % k, vec![0f32; k]);
            let guess = if i % 10 < wrong { label + 1 } else { label };
            row[guess % k] = 1.0;
            e.add(&row, &[label as u32]).unwrap();
        }
        let subject = Subject {
            model: name.into(),
            data: name.into(),
            backend: "cpu".into(),
        };
        e.finish(
            subject,
            &(0..k).map(|c| format!("{name}{c}")).collect::<Vec<_>>(),
            1.0,
        )
        .unwrap()
    }

    fn run(k: usize, wrong: usize, text: &str) -> RunReport {
        let row = |epoch| EpochRow {
            epoch,
            train_loss: 1.0,
            train_top1: 90.0,
            val_loss: f64::NAN,
            val_top1: 80.0,
            val_top5: 99.0,
            lr: 0.1,
            images_per_second: epoch as f64,
            seconds: 2.0,
        };
        // A multiplicative hash: noise, which a PNG cannot shrink.
        let noise: Vec<u8> = (0..200 * 100 * 3u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 9) as u8)
            .collect();
        let sample = Sample::new(&noise, 200, 100, text, text, false, 0.5).unwrap();
        RunReport {
            name: text.into(),
            model: text.into(),
            family: Family::Cnn,
            data: text.into(),
            params: 11_689_512,
            flops: Some(3_600_000_000),
            epochs: (1..=3).map(row).collect(),
            eval: Some(eval(k, wrong, text)),
            samples: vec![sample; 100],
            config: text.into(),
            command: text.into(),
            provenance: Provenance {
                version: text.into(),
                commit: text.into(),
                device: text.into(),
                seed: 7,
                finished: text.into(),
            },
            notes: vec![text.into()],
        }
    }

    /// No script, nothing that a browser would load, every section, each element closed.
    fn check(page: &str, sections: &[&str]) {
        assert!(page.len() < 5_000_000, "{} bytes", page.len());
        assert!(!page.contains("<script") && !page.contains("alert('1')"));
        for (at, _) in page.match_indices("http") {
            assert!(
                page[at..].starts_with("http://www.w3.org/2000/svg\""),
                "{}",
                &page[at..at + 60]
            );
        }
        for attribute in [" src=\"", " href=\""] {
            for (at, _) in page.match_indices(attribute) {
                let value = &page[at + attribute.len()..][..10];
                assert!(
                    value.starts_with("data:image") || value.starts_with('#'),
                    "{value}"
                );
            }
        }
        for (i, s) in sections.iter().enumerate() {
            assert!(
                page.contains(&format!("<a href=\"#s{i}\">{s}</a>")),
                "{s} in the contents"
            );
            assert!(page.contains(&format!("<h2 id=\"s{i}\">{s}</h2>")), "{s}");
        }
        for tag in [
            "section", "figure", "table", "details", "svg", "ul", "li", "pre", "p",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            assert_eq!(
                opened,
                page.matches(&format!("</{tag}>")).count(),
                "<{tag}>"
            );
        }
    }

    #[test]
    fn a_run_page_is_whole_and_safe() {
        let r = run(10, 3, EVIL);
        let page = r.to_html().unwrap();
        let sections = [
            "Summary",
            "Learning curves",
            "Per class",
            "Confusion matrix",
            "Sample predictions",
            "Configuration",
            "Reproduce",
        ];
        check(&page, &sections);
        assert!(page.contains("11.7 M") && page.contains("3.60 G") && page.contains("70.00 %"));
        assert_eq!(page.matches("<li class=\"no\">").count(), SAMPLES);
        assert_eq!((r.train_seconds(), r.train_rate()), (6.0, 2.0));
        let names: Vec<_> = r.plots().unwrap().into_iter().map(|p| p.0).collect();
        assert_eq!(
            names,
            [
                "learning_curves.svg",
                "learning_rate.svg",
                "confusion.svg",
                "class_f1.svg"
            ]
        );
        let alone = RunReport {
            epochs: vec![],
            eval: None,
            samples: vec![],
            ..r
        };
        check(
            &alone.to_html().unwrap(),
            &["Summary", "Configuration", "Reproduce"],
        );
    }

    #[test]
    fn a_comparison_is_whole_and_safe() {
        let mut other = run(10, 3, "vit");
        other.family = Family::Vit;
        let runs = vec![run(10, 1, EVIL), run(10, 5, EVIL), other];
        let mut c = CompareReport {
            title: EVIL.into(),
            question: EVIL.into(),
            runs,
            command: EVIL.into(),
        };
        let page = c.to_html().unwrap();
        let sections = [
            "Summary",
            "Learning curves",
            "Per class",
            "Confusion matrices",
            "Sample predictions",
            "Configurations",
            "Reproduce",
        ];
        check(&page, &sections);
        // The third was evaluated on other images, so that no winner is named.
        assert!(
            !page.contains("is right most often")
                && page.contains("Not shown, with other classes: vit")
        );
        c.runs.pop();
        let page = c.to_html().unwrap();
        assert!(
            page.contains("90.00 % of 40 images, 40.00 points before")
                && !page.contains("may be chance")
        );
        c.runs.clear();
        assert!(c.to_html().is_err());
    }

    #[test]
    fn a_page_stays_small() {
        let mut big = run(300, 6, "class");
        big.config = "x".repeat(3_000_000);
        let runs = vec![big; 3];
        let page = CompareReport {
            title: "t".into(),
            question: String::new(),
            runs,
            command: "c".into(),
        }
        .to_html()
        .unwrap();
        check(&page, &["Summary"]);
        assert!(page.contains("Left out here") && page.contains("<h2 id=\"s6\">Reproduce"));
    }

    #[test]
    fn wilson_interval() {
        // 50 of 100 gives 0.4038 to 0.5962.
        assert!((accuracy_margin(50.0, 100) - 9.617).abs() < 1e-3);
        assert!(accuracy_margin(100.0, 100) > 1.0);
    }
}
