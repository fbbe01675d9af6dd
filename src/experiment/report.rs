//! What came out of an experiment: rows, a table of settings, tests, a page.

use super::Finished;
use super::analyses::Done;
use super::matrix::Experiment;
use super::stats::{Summary, paired_p, summary};
use crate::analyze::{Findings, capital};
use crate::report::html::{Block, Document, accuracy_margin};
use crate::report::metrics::EvalReport;
use crate::report::plot::{self, Family, RunCurve, Setting, Svg};
use crate::report::table::{Table, duration, number, si};
use crate::{Error, Result};
use serde::Serialize;

/// Learning curves, confusion matrices and per-class plots are drawn for so many settings at most.
const MOST: usize = 8;

/// One run in `results.csv`; columns that timm's result files have, by their names.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Model id or spec.
    pub model: String,
    /// The setting's name.
    pub setting: String,
    /// Data set.
    pub data: String,
    /// Seed.
    pub seed: u64,
    /// Percent.
    pub top1: f64,
    /// Percent.
    pub top1_err: f64,
    /// Percent.
    pub top5: f64,
    /// Percent.
    pub top5_err: f64,
    /// Millions.
    pub param_count: f64,
    /// Pixels; 0 where the data's own size was taken.
    pub img_size: usize,
    /// Multiply-adds of one image's forward pass, in billions.
    pub gmacs: Option<f64>,
    /// Test loss.
    pub loss: f64,
    /// 0 to 1.
    pub macro_f1: f64,
    /// 0 to 1.
    pub weighted_f1: f64,
    /// Mean recall of the first half of the classes, percent.
    pub majority_recall: f64,
    /// Mean recall of the second half, percent.
    pub minority_recall: f64,
    /// Training top-1 of the last epoch, percent.
    pub train_top1: f64,
    /// Training minus test top-1, points.
    pub gap: f64,
    /// Epochs done.
    pub epochs: u64,
    /// Wall time of all epochs.
    pub train_seconds: f64,
    /// Images per second of the evaluation.
    pub infer_samples_per_sec: f64,
}

/// The row of a run.
///
/// # Errors
/// Its configuration cannot be read.
pub fn row(run: &Finished) -> Result<Row> {
    let c = run.config()?;
    let e = &run.eval;
    let (majority, minority) = run.majority_minority();
    Ok(Row {
        model: e.model.clone(),
        setting: run.group.clone(),
        data: c.data,
        seed: run.seed,
        top1: e.top1,
        top1_err: 100.0 - e.top1,
        top5: e.top5,
        top5_err: 100.0 - e.top5,
        param_count: run.params as f64 / 1e6,
        img_size: c.image_size,
        gmacs: run.flops.map(|f| f as f64 / 2e9),
        loss: e.loss,
        macro_f1: e.macro_f1,
        weighted_f1: e.weighted_f1,
        majority_recall: majority,
        minority_recall: minority,
        train_top1: run.epochs.last().map_or(f64::NAN, |r| r.train_top1),
        gap: run.gap(),
        epochs: run.epochs.last().map_or(0, |r| r.epoch),
        train_seconds: run.train_seconds,
        infer_samples_per_sec: e.images_per_second,
    })
}

/// The rows as CSV.
///
/// # Errors
/// A configuration cannot be read.
pub fn csv(runs: &[Finished]) -> Result<Vec<u8>> {
    let mut out = csv::Writer::from_writer(vec![]);
    for run in runs {
        out.serialize(row(run)?)
            .map_err(|e| Error::run(e.to_string()))?;
    }
    out.into_inner().map_err(|e| Error::run(e.to_string()))
}

/// The runs of one setting.
struct Group<'a> {
    name: &'a str,
    runs: Vec<&'a Finished>,
    imbalanced: bool,
}

impl Group<'_> {
    fn of(&self, value: impl Fn(&Finished) -> f64) -> Summary {
        summary(&self.runs.iter().map(|r| value(r)).collect::<Vec<_>>())
    }

    fn family(&self) -> Family {
        Family::of(&self.runs[0].eval.model)
    }

    /// Half the interval of the accuracy: over seeds, or of a single run over its images.
    fn margin(&self) -> f64 {
        let over_seeds = self.of(|r| r.eval.top1);
        match over_seeds.n {
            1 => accuracy_margin(over_seeds.mean, self.runs[0].eval.images),
            _ => over_seeds.half,
        }
    }
}

fn groups(runs: &[Finished]) -> Result<Vec<Group<'_>>> {
    let mut all: Vec<Group> = vec![];
    for run in runs {
        match all.iter_mut().find(|g| g.name == run.group) {
            Some(g) => g.runs.push(run),
            None => {
                let c = run.config()?;
                all.push(Group {
                    name: &run.group,
                    runs: vec![run],
                    imbalanced: c.long_tail > 0.0 || c.step_imbalance > 0.0,
                });
            }
        }
    }
    Ok(all)
}

fn with_margin(s: Summary, decimals: usize) -> String {
    match s.half.is_finite() {
        true => format!(
            "{} ± {}",
            number(s.mean, decimals),
            number(s.half, decimals)
        ),
        false => number(s.mean, decimals),
    }
}

/// One row a setting: means over its seeds, with 95 % intervals.
///
/// # Errors
/// A configuration cannot be read.
pub fn table(runs: &[Finished]) -> Result<Table> {
    let groups = groups(runs)?;
    let imbalanced = groups.iter().any(|g| g.imbalanced);
    let mut heads = vec![
        "setting",
        "params",
        "FLOPs/image",
        "seeds",
        "top-1 %",
        "loss",
        "macro F1",
    ];
    if imbalanced {
        heads.extend(["majority recall %", "minority recall %"]);
    }
    heads.extend(["train-test gap", "training time", "ms/image"]);
    let mut t = Table::new(heads).left(&[0]);
    for g in &groups {
        let first = g.runs[0];
        let mut cells = vec![
            g.name.to_string(),
            si(first.params as f64),
            first.flops.map_or("-".into(), |f| si(f as f64)),
            g.runs.len().to_string(),
            with_margin(g.of(|r| r.eval.top1), 2),
            with_margin(g.of(|r| r.eval.loss), 3),
            with_margin(g.of(|r| r.eval.macro_f1), 3),
        ];
        if imbalanced {
            cells.push(with_margin(g.of(|r| r.majority_minority().0), 1));
            cells.push(with_margin(g.of(|r| r.majority_minority().1), 1));
        }
        cells.push(number(g.of(Finished::gap).mean, 2));
        cells.push(duration(g.of(|r| r.train_seconds).mean));
        cells.push(number(g.of(|r| 1e3 / r.eval.images_per_second).mean, 2));
        t.row(cells);
    }
    Ok(t)
}

/// The best setting against each other one, where they share at least two seeds.
fn tests(groups: &[Group]) -> Option<Table> {
    let best = groups.iter().max_by(|a, b| {
        a.of(|r| r.eval.top1)
            .mean
            .total_cmp(&b.of(|r| r.eval.top1).mean)
    })?;
    let mut t = Table::new([
        "best",
        "against",
        "difference in top-1",
        "seeds",
        "p (paired t)",
    ])
    .left(&[0, 1]);
    for other in groups.iter().filter(|g| g.name != best.name) {
        let pairs: Vec<(f64, f64)> = best
            .runs
            .iter()
            .filter_map(|a| {
                let b = other.runs.iter().find(|b| b.seed == a.seed)?;
                Some((a.eval.top1, b.eval.top1))
            })
            .collect();
        let (a, b): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
        let Some(p) = paired_p(&a, &b) else { continue };
        let d: Vec<f64> = a.iter().zip(&b).map(|(x, y)| x - y).collect();
        t.row([
            best.name.to_string(),
            other.name.to_string(),
            with_margin(summary(&d), 2),
            a.len().to_string(),
            if p < 0.001 {
                "< 0.001".into()
            } else {
                number(p, 3)
            },
        ]);
    }
    (!t.rows().is_empty()).then_some(t)
}

fn answer(groups: &[Group]) -> String {
    let mut ranked: Vec<&Group> = groups.iter().collect();
    ranked.sort_by(|a, b| {
        b.of(|r| r.eval.top1)
            .mean
            .total_cmp(&a.of(|r| r.eval.top1).mean)
    });
    let [first, second, ..] = ranked[..] else {
        return String::new();
    };
    let (a, b) = (
        first.of(|r| r.eval.top1).mean,
        second.of(|r| r.eval.top1).mean,
    );
    let unsure = a - b < first.margin().hypot(second.margin());
    let seeds = match first.runs.len() {
        1 => "one seed".to_string(),
        n => format!("{n} seeds"),
    };
    format!(
        "{} is right most often: {a:.2} % of the test images ({seeds}), {:.2} points before {}{}.",
        first.name,
        a - b,
        second.name,
        if unsure {
            "; the intervals overlap, so that this may be chance"
        } else {
            ""
        }
    )
}

/// Recall and precision of each class in each setting; `None` where there are more classes than a table is read for.
fn class_table(settings: &[(&str, Family, &EvalReport)]) -> Option<Table> {
    const ROWS: usize = 20;
    let classes = &settings.first()?.2.per_class;
    if classes.len() > ROWS {
        return None;
    }
    let names = settings
        .iter()
        .map(|s| format!("{}: recall / precision %", s.0));
    let mut t = Table::new(std::iter::once("class".to_string()).chain(names)).left(&[0]);
    for (i, class) in classes.iter().enumerate() {
        let cell = |s: &(&str, Family, &EvalReport)| {
            let c = &s.2.per_class[i];
            let percent = |v: f64| number(100.0 * v, 1);
            format!("{} / {}", percent(c.recall), percent(c.precision))
        };
        t.row(std::iter::once(class.name.clone()).chain(settings.iter().map(cell)));
    }
    Some(t)
}

/// The page about `runs` of `experiment`; `missing` are the runs that are not finished, `analyses` what was found in the
/// trained models.
///
/// # Errors
/// There is no run, or a plot cannot be drawn.
pub fn page(
    experiment: &Experiment,
    runs: &[Finished],
    missing: &[String],
    analyses: &[Done],
    command: &str,
) -> Result<(Document, Vec<(String, Svg)>)> {
    if runs.is_empty() {
        return Err(Error::input(format!(
            "{}: no run is finished",
            experiment.title
        )));
    }
    let groups = groups(runs)?;
    let mut d = Document {
        title: experiment.title.clone(),
        lead: experiment.question.clone(),
        answer: answer(&groups),
        sections: vec![],
    };
    let mut plots = vec![];
    let settings: Vec<Setting> = groups
        .iter()
        .map(|g| Setting {
            name: g.name,
            family: g.family(),
            mean: g.of(|r| r.eval.top1).mean,
            half: g.margin(),
        })
        .collect();
    let accuracy = plot::dots(
        "Accuracy of each setting",
        "top-1 on the test images (%)",
        (0.0, 100.0),
        &settings,
    )?;
    plots.push(("accuracy".to_string(), accuracy.clone()));
    let mut summary_of_all = vec![
        Block::Table(table(runs)?),
        Block::Text(
            "Means over seeds, ± half the 95 % interval by Student's t where there are several. The gap is the training \
             accuracy of the last epoch, on augmented images while the weights change, minus the test accuracy. Times are of \
             this machine."
                .into(),
        ),
        Block::Figure(
            accuracy,
            "Whiskers: the 95 % interval, over seeds, or of one run over its test images. Blue: CNNs; vermillion: transformers."
                .into(),
        ),
    ];
    if !missing.is_empty() {
        summary_of_all.push(Block::Text(format!(
            "Not finished: {}.",
            missing.join(", ")
        )));
    }
    d.sections.push(("Summary".into(), summary_of_all));
    if let Some(t) = tests(&groups) {
        let note = "The test is over seeds: each pair shares its seed. Many pairs are tested: small p values turn up by chance.";
        d.sections.push((
            "Are they different?".into(),
            vec![Block::Table(t), Block::Text(note.into())],
        ));
    }
    let params: Vec<(Setting, f64)> = settings
        .iter()
        .cloned()
        .zip(groups.iter().map(|g| g.runs[0].params as f64))
        .collect();
    if params.iter().any(|p| p.1 != params[0].1) {
        let against = plot::against(
            "Accuracy against size",
            ("parameters", "top-1 (%)"),
            &params,
        )?;
        plots.push(("size".into(), against.clone()));
        d.sections.push((
            "Accuracy against size".into(),
            vec![Block::Figure(
                against,
                "Up and to the left is better.".into(),
            )],
        ));
    }
    let shown: Vec<&Group> = groups.iter().take(MOST).collect();
    let few = |what: &str| {
        (groups.len() > MOST).then(|| {
            Block::Text(format!(
                "{what} of the first {MOST} of {} settings.",
                groups.len()
            ))
        })
    };
    let curves: Vec<RunCurve> = shown
        .iter()
        .filter(|g| !g.runs[0].epochs.is_empty())
        .map(|g| RunCurve {
            name: g.name,
            family: g.family(),
            epochs: &g.runs[0].epochs,
        })
        .collect();
    if !curves.is_empty() {
        let svg = plot::learning_curves(&curves)?;
        plots.push(("curves".into(), svg.clone()));
        let mut blocks = vec![Block::Figure(svg, "The first seed of each setting.".into())];
        blocks.extend(few("Curves"));
        d.sections.push(("Learning curves".into(), blocks));
    }
    let names = |g: &Group| -> Vec<String> {
        g.runs[0]
            .eval
            .per_class
            .iter()
            .map(|c| c.name.clone())
            .collect()
    };
    let alike: Vec<(&str, Family, &_)> = shown
        .iter()
        .filter(|g| names(g) == names(&groups[0]))
        .map(|g| (g.name, g.family(), &g.runs[0].eval))
        .collect();
    let svg = plot::class_f1(&alike)?;
    plots.push(("classes".into(), svg.clone()));
    let mut blocks = vec![Block::Figure(
        svg,
        "F1 of the first seed of each setting.".into(),
    )];
    blocks.extend(class_table(&alike).map(Block::Table));
    d.sections.push(("Per class".into(), blocks));
    let matrices = shown.iter().map(|g| {
        let svg = plot::confusion(&g.runs[0].eval)?;
        Ok((svg, g.name.to_string()))
    });
    let mut blocks = vec![
        Block::Text(
            "Share of each true class (row) by predicted class (column), of the first seed.".into(),
        ),
        Block::SideBySide(matrices.collect::<Result<_>>()?),
    ];
    blocks.extend(few("Matrices"));
    d.sections.push(("Confusion matrices".into(), blocks));
    for one in analyses {
        let blocks = one.found.iter().flat_map(Findings::blocks).collect();
        d.sections.push((capital(&one.title), blocks));
    }
    if !experiment.analyses()?.is_empty() && analyses.is_empty() {
        let note = "The analyses follow when every run is finished.";
        d.sections
            .push(("Analyses".into(), vec![Block::Text(note.into())]));
    }
    let mut blocks = vec![Block::Code(command.into())];
    let mut made: Vec<&str> = runs.iter().map(|r| r.made.as_str()).collect();
    made.dedup();
    blocks.push(Block::Text(format!("Made with: {}.", made.join("; "))));
    blocks.extend(
        groups
            .iter()
            .map(|g| Block::Folded(g.name.to_string(), g.runs[0].config.clone())),
    );
    d.sections.push(("Reproduce".into(), blocks));
    Ok((d, plots))
}
