//! `experiment`.

use super::global::Global;
use super::output::{json, note, print};
use super::train::command_line;
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::experiment::matrix::{Experiment, presets};
use tilewright::experiment::{Shard, collect, report, run};
use tilewright::report::table::Table;
use tilewright::report::write_atomic;
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
    /// A setting of every run, over the file's: epochs=5, data=cifar10:DIR; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Only every N-th run, for several machines: 2/8 is the second of eight
    #[arg(long, value_name = "I/N", default_value = "1/1")]
    shard: Shard,
    /// Print the runs with their size, and do nothing
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
            return dry_run(g, &experiment);
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
        if self.merge.is_empty() {
            let stop = super::end_in_order();
            let open = |c: &tilewright::train::TrainConfig| g.open_with(&c.backend, &c.precision);
            run(&experiment, &dir, self.shard, open, stop, note)?;
        }
        let mut dirs = vec![dir.clone()];
        dirs.extend(self.merge.iter().cloned());
        let (runs, missing) = collect(&experiment, &dirs)?;
        std::fs::create_dir_all(dir.join("plots")).map_err(|e| Error::writing(&dir, e))?;
        let (page, plots) = report::page(&experiment, &runs, &missing, &command_line())?;
        write_atomic(&dir.join("report.html"), page.to_html().as_bytes())?;
        for (name, svg) in plots {
            write_atomic(
                &dir.join("plots").join(format!("{name}.svg")),
                svg.standalone().as_bytes(),
            )?;
        }
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
                note(&format!(
                    "{} runs are not finished: {}",
                    missing.len(),
                    missing.join(", ")
                ));
            }
            note(&format!("report: {}", dir.join("report.html").display()));
        }
        Ok(ExitCode::SUCCESS)
    }
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

fn dry_run(g: &Global, experiment: &Experiment) -> Result<ExitCode> {
    let planned = experiment.planned()?;
    if g.json {
        let rows: Vec<_> = planned
            .iter()
            .map(|p| json!({"run": p.name(), "config": p.config}))
            .collect();
        json(&json!(rows))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut t = Table::new(["run", "model", "data", "epochs", "batch", "seed"]).left(&[0, 1, 2]);
    for p in &planned {
        let c = &p.config;
        t.row([
            p.name(),
            c.model.clone(),
            c.data.clone(),
            c.epochs.to_string(),
            c.batch_size.to_string(),
            c.seed.to_string(),
        ]);
    }
    print(&format!(
        "{}\n{} runs\n\n{}",
        experiment.title,
        planned.len(),
        t.to_text()
    ))?;
    Ok(ExitCode::SUCCESS)
}
