//! `experiment`.

use super::global::Global;
use super::output::{json, note, print};
use super::train::command_line;
use clap::Args;
use serde_json::json;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::experiment::analyses::analyse;
use tilewright::experiment::estimate::{Source, estimate};
use tilewright::experiment::matrix::{Experiment, presets};
use tilewright::experiment::{Runs, Shard, collect, report, run};
use tilewright::report::plot::Svg;
use tilewright::report::table::{Table, duration, si};
use tilewright::report::write_atomic;
use tilewright::train::TrainConfig;
use tilewright::{Error, Result};

/// A whole comparison: a matrix of runs (models, data, settings, seeds), then a table, plots and a page about them.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright experiment --list
  tilewright experiment three-datasets --small
  tilewright experiment imbalance -o runs/imbalance --set data=cifar10:data/cifar-10-batches-bin --shard 2/8
  tilewright experiment imbalance -o runs/imbalance --merge other/imbalance

What is finished is not done again; a run that was cut off goes on where it was. The folder then holds a run directory
for each run, results.csv, results.json, table.md, plots and report.html.")]
pub struct ExperimentCommand {
    /// A built-in experiment (--list) or a file
    #[arg(required_unless_present = "list", value_name = "NAME|FILE")]
    name: Option<String>,
    /// The built-in experiments
    #[arg(long)]
    list: bool,
    /// The experiment's small setting: minutes in place of hours
    #[arg(long)]
    small: bool,
    /// Where the runs go [default: runs/NAME, or runs/NAME-small]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// A setting of every run, over the file's: epochs=5, data=cifar10:DIR, seed=[0,1]; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Only every N-th run, for several machines: 2/8 is the second of eight
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    shard: Shard,
    /// Runs under way at once. They share the CPU's threads or the GPU, so that this pays where one run leaves them idle
    #[arg(long, value_name = "N", default_value = "1")]
    jobs: NonZeroUsize,
    /// Print the runs with the memory and time that each would take, and do nothing else
    #[arg(long)]
    dry_run: bool,
    /// Do no run, only write the report, also from the runs in these folders
    #[arg(long, value_name = "DIR", num_args = 1..)]
    merge: Vec<PathBuf>,
}

impl ExperimentCommand {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        if self.list {
            return list(g);
        }
        let name = self.name.as_deref().unwrap_or_default();
        let mut experiment = Experiment::open(name)?;
        if self.small {
            experiment = experiment.made_small();
        }
        for s in &self.set {
            experiment.set(s)?;
        }
        if let Some(backend) = &g.backend {
            experiment.set(&format!("backend={backend:?}"))?;
        }
        if self.dry_run {
            return dry_run(g, &experiment, self.jobs.get());
        }
        let stem = Path::new(name)
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy();
        let small = if self.small { "-small" } else { "" };
        let dir = self
            .output
            .clone()
            .unwrap_or_else(|| PathBuf::from("runs").join(format!("{stem}{small}")));
        let open = |c: &TrainConfig| g.open_with(&c.backend, &c.precision);
        if self.merge.is_empty() {
            let runs = Runs {
                dir: &dir,
                shard: self.shard,
                jobs: self.jobs.get(),
            };
            run(&experiment, runs, open, super::end_in_order())?;
        }
        if let Some(none) = self.merge.iter().find(|d| !d.is_dir()) {
            return Err(Error::input(format!(
                "--merge {}: there is no such folder",
                none.display()
            )));
        }
        let mut dirs = vec![dir.clone()];
        dirs.extend(self.merge.iter().cloned());
        let (runs, missing) = collect(&experiment, &dirs)?;
        // Analyses are over all models: they wait for the last shard.
        let analyses = match missing.is_empty() {
            true => analyse(&experiment, &dir, &dirs, open, note)?,
            false => vec![],
        };
        let command = command_line();
        let (page, plots) = report::page(&experiment, &runs, &missing, &analyses, &command)?;
        write_atomic(&dir.join("report.html"), page.to_html()?.as_bytes())?;
        write_plots(&dir.join("plots"), &plots)?;
        write_atomic(&dir.join("results.csv"), &report::csv(&runs)?)?;
        let rows = runs.iter().map(report::row).collect::<Result<Vec<_>>>()?;
        let result = json!({"title": experiment.title, "answer": page.answer, "missing": missing, "runs": rows});
        let text = serde_json::to_string_pretty(&result).map_err(|e| Error::run(e.to_string()))?;
        write_atomic(&dir.join("results.json"), text.as_bytes())?;
        let table = report::table(&runs)?;
        write_atomic(&dir.join("table.md"), table.to_markdown().as_bytes())?;
        if g.json {
            json(&result)?;
        } else {
            print(&format!(
                "{}\n\n{}\n{}\n",
                experiment.title,
                table.to_text(),
                page.answer
            ))?;
            if !missing.is_empty() {
                note(&report::unfinished(&missing));
            }
            note(&format!("report: {}", dir.join("report.html").display()));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Writes `plots` into `dir`, in place of those that an earlier report left there.
fn write_plots(dir: &Path, plots: &[(String, Svg)]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
    let new: Vec<PathBuf> = plots
        .iter()
        .map(|(name, _)| dir.join(format!("{name}.svg")))
        .collect();
    let there = std::fs::read_dir(dir).map_err(|e| Error::reading(dir, e))?;
    for old in there.flatten().map(|e| e.path()) {
        if old.extension().is_some_and(|x| x == "svg") && !new.contains(&old) {
            std::fs::remove_file(&old).map_err(|e| Error::writing(&old, e))?;
        }
    }
    for (path, (_, svg)) in new.iter().zip(plots) {
        write_atomic(path, svg.standalone().as_bytes())?;
    }
    Ok(())
}

fn list(g: &Global) -> Result<ExitCode> {
    let all = presets();
    if g.json {
        let rows: Vec<_> = all
            .iter()
            .map(|(n, t)| json!({"name": n, "title": t}))
            .collect();
        json(&json!(rows))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut t = Table::new(["experiment", "what it compares"]).left(&[0, 1]);
    for (name, title) in all {
        t.row([name, title]);
    }
    print(&t.to_text())?;
    Ok(ExitCode::SUCCESS)
}

/// Prints every run with what it would take.
fn dry_run(g: &Global, experiment: &Experiment, jobs: usize) -> Result<ExitCode> {
    let planned = experiment.planned()?;
    let open = |c: &TrainConfig| g.open_with(&c.backend, &c.precision);
    let estimates = estimate(&planned, open)?;
    let good = || estimates.iter().flatten();
    let known: Vec<f64> = good().filter_map(|e| e.seconds).collect();
    let total: f64 = known.iter().sum();
    let mut memory: Vec<usize> = good().map(|e| e.memory).collect();
    memory.sort_unstable_by(|a, b| b.cmp(a));
    let most: usize = memory.iter().take(jobs).sum();
    let both = || planned.iter().zip(&estimates);
    if g.json {
        let rows = both().map(|(p, e)| match e {
            Ok(e) => json!({"run": p.name(), "config": p.config, "params": e.plan.params, "flops": e.plan.flops,
                "memory_bytes": e.memory, "seconds": e.seconds, "time_from": e.source}),
            Err(e) => json!({"run": p.name(), "config": p.config, "error": e.to_string()}),
        });
        let rows: Vec<_> = rows.collect();
        json(
            &json!({"title": experiment.title, "runs": rows, "seconds": total, "runs_timed": known.len(),
            "memory_bytes": most}),
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut t = Table::new([
        "run", "model", "data", "epochs", "batch", "seed", "params", "memory", "time", "from",
    ])
    .left(&[0, 1, 2, 9]);
    for (p, e) in both() {
        let c = &p.config;
        let e = e.as_ref().ok();
        let plain = |of: Option<String>| of.unwrap_or_else(|| "-".into());
        t.row([
            p.name(),
            e.map_or(c.model.clone(), |e| e.plan.model.id.clone()),
            c.data.clone(),
            c.epochs.to_string(),
            c.batch_size.to_string(),
            c.seed.to_string(),
            plain(e.map(|e| si(e.plan.params as f64))),
            plain(e.map(|e| format!("{}B", si(e.memory as f64)))),
            plain(e.and_then(|e| e.seconds).map(duration)),
            plain(e.filter(|e| e.seconds.is_some()).map(|e| match e.source {
                Source::Steps => "steps".into(),
                Source::Flops => "FLOPs".into(),
            })),
        ]);
    }
    let missing = match planned.len() - known.len() {
        0 => String::new(),
        n => format!(", {n} of them without their data and so without a time"),
    };
    let takes = match known.is_empty() {
        true => String::new(),
        false => format!(", one after the other: about {}", duration(total)),
    };
    let mut text = format!(
        "{}\n{} runs{missing}{takes}; {jobs} at once at most {}B\n\n{}\n\
         time: images of all epochs at the speed of a few steps timed here just now (steps), or, for networks too large to \
         be built for that, their operations at the rate of those steps (FLOPs); loading and augmentation left out\n",
        experiment.title,
        planned.len(),
        si(most as f64),
        t.to_text()
    );
    // What many runs have in common is said once.
    let mut notes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (p, e) in both() {
        match e {
            Ok(e) => {
                for n in &e.plan.notes {
                    notes.entry(n.clone()).or_default();
                }
            }
            Err(e) => {
                let (name, said) = (p.name(), e.to_string());
                let cause = said.strip_prefix(&format!("{name}: ")).unwrap_or(&said);
                notes.entry(cause.to_string()).or_default().push(name);
            }
        }
    }
    for (n, runs) in notes {
        let of = match runs.as_slice() {
            [] => String::new(),
            [one] => format!("{one}: "),
            many => format!("{} runs: ", many.len()),
        };
        text += &format!("note: {of}{n}\n");
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
