//! The most confused pairs of classes, with their images.

use super::classify::{answers, best};
use super::picture::{Cell, captioned};
use super::{Analysis, Context, Findings};
use crate::Result;
use crate::report::metrics::{Evaluation, Subject};
use crate::report::plot;
use crate::report::table::{Table, number};
use clap::builder::RangedU64ValueParser;
use serde_json::json;

/// The pairs of classes that are confused most often, with images of each pair, and the whole matrix.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze confusion -w runs/cnn -d cifar10 -o confusion
  tilewright analyze confusion -w runs/vit -d tiny-imagenet --pairs 20 --each 12 -o confusion")]
pub(super) struct Args {
    /// How many pairs
    #[arg(long, value_name = "N", default_value = "8", value_parser = RangedU64ValueParser::<usize>::new().range(1..=200))]
    pairs: usize,
    /// Images shown of each pair, the surest mistakes first
    #[arg(long, value_name = "N", default_value = "8", value_parser = RangedU64ValueParser::<usize>::new().range(1..=40))]
    each: usize,
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let subject = cx.subject();
        let a = answers(cx, subject)?;
        let mut sums = Evaluation::new(a.classes);
        sums.add(&a.logits, &a.labels)?;
        let about = Subject {
            model: subject.name.clone(),
            data: cx.data(),
            backend: cx.backend.name().into(),
        };
        let report = sums.finish(about, &a.names, 0.0)?;
        let predicted: Vec<(usize, f64)> =
            (0..a.len()).map(|i| best(&a.probabilities(i))).collect();
        let mut t =
            Table::new(["true class", "predicted as", "images", "% of the class"]).left(&[0, 1]);
        let (mut cells, mut pairs) = (vec![], vec![]);
        for (truth, wrong, count) in report.most_confused(self.pairs) {
            let share = 100.0 * count as f64 / report.per_class[truth].support as f64;
            let (is, said) = (&a.names[truth], &a.names[wrong]);
            t.row([
                is.clone(),
                said.clone(),
                count.to_string(),
                number(share, 1),
            ]);
            let mut of_pair: Vec<usize> = (0..a.len())
                .filter(|&i| a.labels[i] as usize == truth && predicted[i].0 == wrong)
                .collect();
            of_pair.sort_by(|&x, &y| predicted[y].1.total_cmp(&predicted[x].1).then(x.cmp(&y)));
            of_pair.truncate(self.each);
            let mut row = vec![];
            for &i in &of_pair {
                let lines = [
                    format!("is {is}"),
                    format!("said {said}"),
                    format!("{:.0} % sure", 100.0 * predicted[i].1),
                ];
                row.push(Cell::new(a.picture(i)?, lines));
            }
            // A pair a row: what is missing of it stays white.
            let white = image::RgbImage::from_pixel(1, 1, image::Rgb([255; 3]));
            row.resize_with(self.each, || Cell::new(white.clone(), []));
            cells.extend(row);
            let indices: Vec<u32> = of_pair.iter().map(|&i| a.place(i).0).collect();
            pairs.push(
                json!({"truth": is, "predicted": said, "images": count, "share": share / 100.0,
                "shown": indices}),
            );
        }
        let heading = format!(
            "{} is right on {:.2} % of {} images of {}; the pairs that it confuses most often",
            subject.name,
            report.top1,
            a.len(),
            cx.data()
        );
        let data = json!({"model": subject.name, "data": cx.data(), "images": a.len(), "top1": report.top1,
            "classes": a.names, "pairs": pairs, "confusion": report.confusion});
        let mut found = Findings::new(heading, data).table("", t).plot(
            "confusion",
            "Share of each true class (row) by predicted class (column).",
            plot::confusion(&report)?,
        );
        if !cells.is_empty() {
            found = found.picture(
                "confused",
                "A pair of classes a row, most often confused first; in it the surest mistakes first.",
                captioned(&cells, self.each),
            );
        }
        Ok(found)
    }
}
