//! Accuracy under corruptions of the images, of one network or of several side by side.

use super::classify::check_classes;
use super::corrupt::{Corruption, reduced};
use super::picture::{self, Cell, captioned};
use super::{Analysis, Context, Findings, Subject};
use crate::Result;
use crate::data::{Rgb, Split};
use crate::models::session::Session;
use crate::philox::Philox;
use crate::report::metrics::Evaluation;
use crate::report::plot::{Multiple, multiples};
use crate::report::progress::Progress;
use crate::report::table::{Table, number};
use clap::builder::RangedU64ValueParser;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

/// Accuracy under JPEG compression, blur, noise, rotation, translation, patch shuffling and occlusion, at several levels
/// each; with several models side by side on the same corrupted images.
///
/// Images are corrupted as decoded (photographs reduced to 256 pixels on the shorter side first), before they are resized
/// and normalised for a network.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  tilewright analyze robustness -w runs/cnn --with runs/vit -d cifar10 -o robustness
  tilewright analyze robustness -w runs/vit -d digits --only blur,noise --levels 3")]
pub(super) struct Args {
    /// Only these corruptions
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    only: Vec<Corruption>,
    /// How many levels of each, spread from the mildest to the strongest
    #[arg(long, value_name = "N", default_value = "5", value_parser = RangedU64ValueParser::<usize>::new().range(1..=5))]
    levels: usize,
}

/// A corruption at a level; `None`: the images as they are.
type Setting = Option<(Corruption, f64)>;

/// Accuracy of one model under one corruption.
#[derive(Clone, Debug, Serialize)]
struct Row {
    model: String,
    /// `clean` for the images as they are.
    corruption: String,
    level: f64,
    unit: &'static str,
    top1: f64,
    loss: f64,
    images: u64,
}

/// Image `i` under `setting`; its draws depend on the seed, the setting and its place alone.
fn corrupted(image: &Rgb, i: usize, setting: Setting, seed: u64) -> Result<Rgb> {
    let Some((kind, level)) = setting else {
        return Ok(image.clone());
    };
    let mut draw = Philox::with(seed, [kind as u32 * 1000 + level as u32, i as u32]);
    kind.apply(image, level, &mut draw)
}

/// Runs `images` under `setting` through `session`.
fn evaluate(
    session: &mut Session,
    subject: &Subject,
    (images, labels): (&[Rgb], &[u32]),
    setting: Setting,
    seed: u64,
) -> Result<Evaluation> {
    let (batch, classes) = (session.batch(), session.outputs());
    let mut sums = Evaluation::new(classes);
    for (n, chunk) in images.chunks(batch).enumerate() {
        let one = |(i, image): (usize, &Rgb)| {
            subject
                .preprocess
                .apply(&corrupted(image, n * batch + i, setting, seed)?)
        };
        let made: Result<Vec<Vec<f32>>> = chunk.par_iter().enumerate().map(one).collect();
        let mut input = made?.concat();
        // The last batch is filled up with what does not count.
        input.resize(input.len() / chunk.len() * batch, 0.0);
        let logits = session.run(&input)?;
        let valid = chunk.len();
        sums.add(&logits[..valid * classes], &labels[n * batch..][..valid])?;
    }
    Ok(sums)
}

/// The images of `split`, decoded and reduced.
fn decoded(split: &Split) -> Result<Vec<Rgb>> {
    (0..split.len())
        .into_par_iter()
        .map(|i| reduced(split.image(i)?))
        .collect()
}

/// One image under every setting: a row a corruption.
fn samples(image: &Rgb, kinds: &[(Corruption, Vec<f64>)], seed: u64) -> Result<image::RgbImage> {
    let mut cells = vec![];
    let columns = 1 + kinds.iter().map(|k| k.1.len()).max().unwrap_or(0);
    for (kind, levels) in kinds {
        cells.push(Cell::new(picture::of(image), [kind.about().0.to_string()]));
        for &level in levels {
            let shown = corrupted(image, 0, Some((*kind, level)), seed)?;
            cells.push(Cell::new(picture::of(&shown), [format!("{level}")]));
        }
    }
    Ok(captioned(&cells, columns))
}

impl Args {
    /// Corruptions and their levels, as asked for.
    fn kinds(&self) -> Vec<(Corruption, Vec<f64>)> {
        let wanted = Corruption::ALL.into_iter();
        let wanted = wanted.filter(|k| self.only.is_empty() || self.only.contains(k));
        let spread = |k: Corruption| {
            let all = k.levels();
            let at = |i: usize| match self.levels {
                1 => all.len() / 2,
                n => i * (all.len() - 1) / (n - 1),
            };
            (0..self.levels).map(|i| all[at(i)]).collect()
        };
        wanted.map(|k| (k, spread(k))).collect()
    }
}

impl Analysis for Args {
    fn run(&self, cx: &Context) -> Result<Findings> {
        let kinds = self.kinds();
        let each = kinds
            .iter()
            .flat_map(|(k, levels)| levels.iter().map(|&l| Some((*k, l))));
        let settings: Vec<Setting> = std::iter::once(None).chain(each).collect();
        // What cannot be read is found, counted and left out as everywhere else.
        let split = cx.images(cx.subject())?.split().clone();
        let (images, labels) = (decoded(&split)?, split.labels());
        let mut rows: Vec<Vec<Row>> = vec![];
        for subject in cx.subjects {
            let classes = check_classes(cx, subject)?;
            let batch = cx.batch.min(images.len());
            let (mut session, ()) =
                subject.session(cx.backend, (batch, Some(classes)), false, |_| Ok(()))?;
            if !session.classifies() {
                return Err(subject.no_classifier());
            }
            let mut progress = Progress::new(&subject.name, settings.len() as u64);
            let mut of_model = vec![];
            for &setting in &settings {
                let all = (images.as_slice(), labels.as_slice());
                let e = evaluate(&mut session, subject, all, setting, cx.seed)?;
                progress.step(e.images(), e.loss(), e.top1());
                let (corruption, level, unit) = match setting {
                    Some((k, level)) => (k.id(), level, k.about().1),
                    None => ("clean".to_string(), 0.0, ""),
                };
                of_model.push(Row {
                    model: subject.name.clone(),
                    corruption,
                    level,
                    unit,
                    top1: e.top1(),
                    loss: e.loss(),
                    images: e.images(),
                });
            }
            progress.finish("");
            rows.push(of_model);
        }
        let heads = ["corruption".to_string(), "level".to_string()];
        let names = cx.subjects.iter().map(|s| format!("{} %", s.name));
        let mut t = Table::new(heads.into_iter().chain(names)).left(&[0]);
        let top1 = |i: usize| rows.iter().map(move |m| m[i].top1);
        let shown = |values: Vec<f64>| values.into_iter().map(|v| number(v, 1));
        t.row(
            ["clean".to_string(), String::new()]
                .into_iter()
                .chain(shown(top1(0).collect())),
        );
        let mut at = 1;
        let mut panels = vec![];
        for (kind, levels) in &kinds {
            let (name, unit) = kind.about();
            for (i, level) in levels.iter().enumerate() {
                let first = if i == 0 {
                    format!("{name}, {unit}")
                } else {
                    String::new()
                };
                let values = shown(top1(at + i).collect());
                t.row([first, level.to_string()].into_iter().chain(values));
            }
            let ticks =
                std::iter::once("none".to_string()).chain(levels.iter().map(f64::to_string));
            let line = |m: &Vec<Row>| {
                let after = m[at..at + levels.len()].iter().map(|r| r.top1);
                std::iter::once(m[0].top1).chain(after).collect()
            };
            panels.push(Multiple {
                heading: name.into(),
                x_title: unit.into(),
                ticks: ticks.collect(),
                lines: rows.iter().map(line).collect(),
            });
            at += levels.len();
        }
        // The mean over corruptions of the mean over their levels: all have as many.
        let mean = |m: &[Row]| m[1..].iter().map(|r| r.top1).sum::<f64>() / (m.len() - 1) as f64;
        let means: Vec<f64> = rows.iter().map(|m| mean(m)).collect();
        let heads = ["mean of all".to_string(), String::new()];
        t.row(heads.into_iter().chain(shown(means.clone())));
        let kept = rows.iter().zip(&means).map(|(m, v)| 100.0 * v / m[0].top1);
        let heads = ["kept of clean".to_string(), String::new()];
        t.row(heads.into_iter().chain(shown(kept.collect())));
        let series: Vec<_> = cx
            .subjects
            .iter()
            .map(|s| (s.name.as_str(), s.family()))
            .collect();
        let svg = multiples(
            "Accuracy under corruptions",
            ("top-1 (%)", 100.0),
            &series,
            &panels,
        )?;
        let models = rows.iter().zip(&means).map(|(m, mean)| {
            json!({"model": m[0].model, "clean": m[0].top1, "mean": mean, "rows": m[1..]})
        });
        let data = json!({"data": cx.data(), "images": images.len(), "seed": cx.seed,
            "models": models.collect::<Vec<_>>()});
        let heading = format!(
            "top-1 accuracy under corruptions, {} images of {}",
            images.len(),
            cx.data()
        );
        Findings::new(heading, data)
            .plot(
                "robustness",
                "Top-1 accuracy on the same images under each corruption, from none at the left to the strongest level.",
                svg,
            )
            .picture(
                "corruptions",
                "The first image, and what each corruption makes of it at each level.",
                samples(&images[0], &kinds, cx.seed)?,
            )
            .table("", t)
            .csv("robustness", rows.into_iter().flatten())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_spread_over_all_of_them() {
        let args = |levels| Args {
            only: vec![Corruption::Jpeg],
            levels,
        };
        assert_eq!(args(1).kinds()[0].1, [25.0]);
        assert_eq!(args(2).kinds()[0].1, [80.0, 5.0]);
        assert_eq!(args(5).kinds()[0].1, Corruption::Jpeg.levels());
    }
}
