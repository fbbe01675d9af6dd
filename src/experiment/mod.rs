//! Experiments: a matrix of runs (models, data, settings, seeds), each a run directory of its own, and what came out of
//! all of them in one table and one page.

pub mod analyses;
pub mod estimate;
pub mod matrix;
pub mod report;
pub mod stats;

use crate::backend::Backend;
use crate::report::html::RunReport;
use crate::report::metrics::EvalReport;
use crate::report::progress::{named, say};
use crate::report::runlog::{EpochRow, read_metrics};
use crate::report::write_atomic;
use crate::train::TrainConfig;
use crate::train::run::{RunPlace, train};
use crate::{Error, Result};
use matrix::{Experiment, Planned};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// What is kept of a finished run, `result.json` in its directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finished {
    /// The setting: runs that differ in their seed alone share it.
    pub group: String,
    /// Seed.
    pub seed: u64,
    /// The configuration as planned, TOML.
    pub config: String,
    /// Parameters.
    pub params: u64,
    /// FLOPs of one image's forward pass.
    pub flops: Option<u64>,
    /// Wall time of all epochs, in seconds.
    pub train_seconds: f64,
    /// Result on the test images.
    pub eval: EvalReport,
    /// Device, version and time of the run, for the reader.
    pub made: String,
    /// Rows of `metrics.csv`; read from there.
    #[serde(skip)]
    pub epochs: Vec<EpochRow>,
}

impl Finished {
    fn of(planned: &Planned, config: String, run: &RunReport) -> Result<Finished> {
        let eval = run
            .eval
            .clone()
            .ok_or_else(|| Error::run(format!("{}: the run has no evaluation", planned.name())))?;
        let p = &run.provenance;
        Ok(Finished {
            group: planned.group.clone(),
            seed: planned.config.seed,
            config,
            params: run.params,
            flops: run.flops,
            train_seconds: run.train_seconds(),
            eval,
            made: format!("tilewright {}, {}, {}", p.version, p.device, p.finished),
            epochs: run.epochs.clone(),
        })
    }

    /// Reads the run in `dir`, if it is finished.
    ///
    /// # Errors
    /// The file is there but cannot be read.
    pub fn read(dir: &Path) -> Result<Option<Finished>> {
        let path = dir.join("result.json");
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read_to_string(&path).map_err(|e| Error::reading(&path, e))?;
        let mut it: Finished = serde_json::from_str(&text)
            .map_err(|e| Error::input(format!("{}: {e}", path.display())))?;
        it.epochs = read_metrics(&dir.join("metrics.csv"))?;
        Ok(Some(it))
    }

    /// The configuration of the run.
    ///
    /// # Errors
    /// It is not one.
    pub fn config(&self) -> Result<TrainConfig> {
        TrainConfig::parse(&self.config)
    }

    /// Top-1 of the last epoch's training images minus that of the test images, in points.
    pub fn gap(&self) -> f64 {
        let train = self.epochs.last().map_or(f64::NAN, |e| e.train_top1);
        train - self.eval.top1
    }

    /// Mean recall of the first half of the classes, which imbalance leaves whole, and of the others, in percent.
    pub fn majority_minority(&self) -> (f64, f64) {
        let classes = &self.eval.per_class;
        let half = classes.len().div_ceil(2);
        let mean = |c: &[crate::report::metrics::ClassMetrics]| {
            100.0 * c.iter().map(|c| c.recall).sum::<f64>() / c.len() as f64
        };
        (mean(&classes[..half]), mean(&classes[half..]))
    }
}

/// Which of the runs are this machine's: number `index` (from 0) of `of`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shard {
    /// From 0.
    pub index: usize,
    /// How many there are.
    pub of: usize,
}

impl std::str::FromStr for Shard {
    type Err = String;

    /// `2/8`, counted from 1 as SLURM arrays usually are.
    fn from_str(s: &str) -> Result<Self, String> {
        let parts = s.split_once('/');
        let parsed =
            parts.and_then(|(i, n)| Some((i.parse::<usize>().ok()?, n.parse::<usize>().ok()?)));
        match parsed {
            Some((i, n)) if (1..=n).contains(&i) => Ok(Shard {
                index: i - 1,
                of: n,
            }),
            _ => Err(format!("{s:?}: give the shard and their number, as 2/8")),
        }
    }
}

/// Which runs are done, how many at a time, and where.
#[derive(Clone, Copy, Debug)]
pub struct Runs<'a> {
    /// The experiment's directory.
    pub dir: &'a Path,
    /// This machine's share.
    pub shard: Shard,
    /// Runs under way at once, at least 1.
    pub jobs: usize,
}

/// Runs what is not finished yet of `experiment`, in the order of the matrix; a run that was cut off goes on where it
/// was. `open` gives the backend of a configuration, one to each run. Returns how many runs were done now.
///
/// # Errors
/// A run fails: those before it stay, and those under way beside it are ended as usual. A finished run was made with
/// another configuration: found before any is begun.
pub fn run(
    experiment: &Experiment,
    runs: Runs,
    open: impl Fn(&TrainConfig) -> Result<Box<dyn Backend>> + Sync,
    stop: &AtomicBool,
) -> Result<usize> {
    let Runs { dir, shard, jobs } = runs;
    let all = experiment.planned()?;
    let mine: Vec<&Planned> = all.iter().skip(shard.index).step_by(shard.of).collect();
    let mut open_runs = vec![];
    for (i, planned) in mine.iter().enumerate() {
        let place = dir.join(planned.name());
        match Finished::read(&place)? {
            None => open_runs.push((i + 1, *planned, place)),
            Some(before) if before.config == planned.config.to_toml()? => {}
            Some(_) => {
                return Err(Error::input(format!(
                    "{} was made with another configuration: give another folder with -o, or remove it",
                    place.display()
                )));
            }
        }
    }
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<usize> {
        let mut done = 0;
        while !failed.load(Ordering::Relaxed) {
            let Some((number, planned, place)) =
                open_runs.get(next.fetch_add(1, Ordering::Relaxed))
            else {
                break;
            };
            let name = planned.name();
            say(&format!("run {number} of {}: {name}", mine.len()));
            let run = || run_one(planned, place, &open, stop);
            let result = if jobs > 1 { named(&name, run) } else { run() };
            result.map_err(|e| {
                failed.store(true, Ordering::Relaxed);
                e.context(name)
            })?;
            done += 1;
        }
        Ok(done)
    };
    if jobs <= 1 {
        return work();
    }
    let results = std::thread::scope(|s| {
        let workers: Vec<_> = (0..jobs.min(open_runs.len()))
            .map(|_| s.spawn(work))
            .collect();
        let join = |w: std::thread::ScopedJoinHandle<_>| {
            w.join().unwrap_or_else(|p| std::panic::resume_unwind(p))
        };
        workers.into_iter().map(join).collect::<Vec<_>>()
    });
    results.into_iter().sum()
}

fn run_one(
    planned: &Planned,
    place: &Path,
    open: impl Fn(&TrainConfig) -> Result<Box<dyn Backend>>,
    stop: &AtomicBool,
) -> Result<()> {
    let backend = open(&planned.config)?;
    let how = RunPlace {
        dir: place.to_path_buf(),
        resume: true,
        command: format!(
            "tilewright train -c {}",
            place.join("config.toml").display()
        ),
    };
    let report = train(&planned.config, backend.as_ref(), &how, stop)?;
    let finished = Finished::of(planned, planned.config.to_toml()?, &report)?;
    let text = serde_json::to_string_pretty(&finished).map_err(|e| Error::run(e.to_string()))?;
    write_atomic(&place.join("result.json"), text.as_bytes())
}

/// The finished runs of `experiment` in any of `dirs`, in the order of the matrix, and the names of those that are missing.
///
/// # Errors
/// A result cannot be read.
pub fn collect(experiment: &Experiment, dirs: &[PathBuf]) -> Result<(Vec<Finished>, Vec<String>)> {
    let (mut found, mut missing) = (vec![], vec![]);
    for planned in experiment.planned()? {
        let mut here = None;
        for dir in dirs {
            here = here.or(Finished::read(&dir.join(planned.name()))?);
        }
        match here {
            Some(f) => found.push(f),
            None => missing.push(planned.name()),
        }
    }
    Ok((found, missing))
}
