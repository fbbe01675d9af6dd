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
    /// Neither its speed nor its training time is that of the network, which ran once before.
    features: bool,
    /// What it is trained on, as far as settings differ in that: `long_tail=0.1`. Only settings of the same are compared.
    on: String,
    /// Its name without that.
    label: String,
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
    let (mut all, mut images): (Vec<Group>, Vec<[String; 4]>) = (vec![], vec![]);
    for run in runs {
        match all.iter_mut().find(|g| g.name == run.group) {
            Some(g) => g.runs.push(run),
            None => {
                let c = run.config()?;
                all.push(Group {
                    name: &run.group,
                    runs: vec![run],
                    imbalanced: c.long_tail > 0.0 || c.step_imbalance > 0.0,
                    features: c.frozen_and_same(),
                    on: String::new(),
                    label: run.group.clone(),
                });
                images.push([
                    format!("data={}", c.data),
                    format!("subset={}", c.subset),
                    format!("long_tail={:?}", c.long_tail),
                    format!("step_imbalance={:?}", c.step_imbalance),
                ]);
            }
        }
    }
    for (g, own) in all.iter_mut().zip(&images) {
        let differ = (0..own.len()).filter(|&k| images.iter().any(|i| i[k] != own[k]));
        let own: Vec<&str> = differ.map(|k| own[k].as_str()).collect();
        g.on = own.join(" ");
        for part in own {
            g.label = g.label.replace(&format!(" {part}"), "");
        }
    }
    Ok(all)
}

/// The settings by what they are trained on.
fn by_images<'a, 'b>(groups: &'b [Group<'a>]) -> Vec<Vec<&'b Group<'a>>> {
    let mut all: Vec<Vec<&Group>> = vec![];
    for g in groups {
        match all.iter_mut().find(|same| same[0].on == g.on) {
            Some(same) => same.push(g),
            None => all.push(vec![g]),
        }
    }
    all
}

/// `57 runs are not finished: ...`: the first of them by name.
pub fn unfinished(missing: &[String]) -> String {
    const NAMED: usize = 4;
    let named = missing[..missing.len().min(NAMED)].join(", ");
    let more = match missing.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    match missing.len() {
        1 => format!("1 run is not finished: {named}"),
        n => format!("{n} runs are not finished: {named}{more}"),
    }
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
        cells.push(match g.features {
            true => "-".into(),
            false => number(g.of(|r| 1e3 / r.eval.images_per_second).mean, 2),
        });
        t.row(cells);
    }
    Ok(t)
}

/// The best setting against each other one on the same images, where they share at least two seeds.
fn tests(groups: &[Group]) -> Option<Table> {
    let sets = by_images(groups);
    let several = sets.len() > 1;
    let heads = [
        "best",
        "against",
        "difference in top-1",
        "seeds",
        "p (paired t)",
    ];
    let mut t = match several {
        true => Table::new(std::iter::once("trained on").chain(heads)).left(&[0, 1, 2]),
        false => Table::new(heads).left(&[0, 1]),
    };
    let top1 = |r: &Finished| r.eval.top1;
    for same in &sets {
        let best = same
            .iter()
            .max_by(|a, b| a.of(top1).mean.total_cmp(&b.of(top1).mean))?;
        for other in same.iter().filter(|g| g.name != best.name) {
            let pairs = best.runs.iter().filter_map(|a| {
                let b = other.runs.iter().find(|b| b.seed == a.seed)?;
                Some((a.eval.top1, b.eval.top1))
            });
            let (a, b): (Vec<f64>, Vec<f64>) = pairs.unzip();
            let Some(p) = paired_p(&a, &b) else { continue };
            let d: Vec<f64> = a.iter().zip(&b).map(|(x, y)| x - y).collect();
            let cells = [
                best.label.clone(),
                other.label.clone(),
                with_margin(summary(&d), 2),
                a.len().to_string(),
                match p < 0.001 {
                    true => "< 0.001".into(),
                    false => number(p, 3),
                },
            ];
            t.row(several.then(|| best.on.clone()).into_iter().chain(cells));
        }
    }
    (!t.rows().is_empty()).then_some(t)
}

/// Which setting is right most often, for each of what settings are trained on.
fn answer(groups: &[Group]) -> String {
    let sentences = by_images(groups).into_iter().filter_map(|mut ranked| {
        let mean = |g: &Group| g.of(|r| r.eval.top1).mean;
        ranked.sort_by(|a, b| mean(b).total_cmp(&mean(a)));
        let [first, second, ..] = ranked[..] else {
            return None;
        };
        let (a, b) = (mean(first), mean(second));
        let unsure = a - b < first.margin().hypot(second.margin());
        let seeds = match first.runs.len() {
            1 => "one seed".to_string(),
            n => format!("{n} seeds"),
        };
        let on = match first.on.is_empty() {
            true => String::new(),
            false => format!("{}: ", first.on),
        };
        Some(format!(
            "{on}{} is right most often: {a:.2} % of the test images ({seeds}), {:.2} points before {}{}.",
            first.label,
            a - b,
            second.label,
            match unsure {
                true => "; the intervals overlap, so that this may be chance",
                false => "",
            }
        ))
    });
    sentences.collect::<Vec<_>>().join(" ")
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
        lead: experiment.lead(),
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
             this machine; of a frozen backbone, whose features are computed once, they are the classifier's alone."
                .into(),
        ),
        Block::Figure(
            accuracy,
            "Whiskers: the 95 % interval, over seeds, or of one run over its test images. Blue: CNNs; vermillion: transformers."
                .into(),
        ),
    ];
    if !missing.is_empty() {
        summary_of_all.push(Block::Text(format!("{}.", unfinished(missing))));
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
    let (mut curves, mut classes) = (vec![], vec![]);
    let mut matrices = vec![Block::Text(
        "Share of each true class (row) by predicted class (column), of the first seed.".into(),
    )];
    let sets = by_images(&groups);
    for (i, same) in sets.iter().enumerate() {
        let name = |what: &str| match sets.len() {
            1 => what.to_string(),
            _ => format!("{what}-{}", i + 1),
        };
        if sets.len() > 1 {
            let heading = || Block::Heading(same[0].on.clone());
            curves.push(heading());
            classes.push(heading());
            matrices.push(heading());
        }
        let shown = &same[..same.len().min(MOST)];
        let few = |what: &str| {
            (same.len() > MOST).then(|| {
                Block::Text(format!(
                    "{what} of the first {MOST} of {} settings.",
                    same.len()
                ))
            })
        };
        let with_epochs = shown.iter().filter(|g| !g.runs[0].epochs.is_empty());
        let lines: Vec<RunCurve> = with_epochs
            .map(|g| RunCurve {
                name: &g.label,
                family: g.family(),
                epochs: &g.runs[0].epochs,
            })
            .collect();
        if !lines.is_empty() {
            let svg = plot::learning_curves(&lines)?;
            plots.push((name("curves"), svg.clone()));
            curves.push(Block::Figure(svg, "The first seed of each setting.".into()));
            curves.extend(few("Curves"));
        }
        let names = |g: &Group| -> Vec<String> {
            let classes = &g.runs[0].eval.per_class;
            classes.iter().map(|c| c.name.clone()).collect()
        };
        let alike: Vec<(&str, Family, &_)> = shown
            .iter()
            .filter(|g| names(g) == names(same[0]))
            .map(|g| (g.label.as_str(), g.family(), &g.runs[0].eval))
            .collect();
        let svg = plot::class_f1(&alike)?;
        plots.push((name("classes"), svg.clone()));
        classes.push(Block::Figure(
            svg,
            "F1 of the first seed of each setting.".into(),
        ));
        classes.extend(class_table(&alike).map(Block::Table));
        let each = shown.iter().map(|g| {
            let svg = plot::confusion(&g.runs[0].eval)?;
            Ok((svg, g.label.clone()))
        });
        matrices.push(Block::SideBySide(each.collect::<Result<_>>()?));
        matrices.extend(few("Matrices"));
    }
    if !curves.is_empty() {
        d.sections.push(("Learning curves".into(), curves));
    }
    d.sections.push(("Per class".into(), classes));
    d.sections.push(("Confusion matrices".into(), matrices));
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
