//! The analyses of an experiment, over the trained models of its runs.

use super::matrix::{Experiment, Planned};
use crate::analyze::{Context, Findings, Pictures, Room, Subject, find};
use crate::backend::Backend;
use crate::train::TrainConfig;
use crate::train::setup::open_data;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// One `[[analyses]]` entry of an experiment file: `kind` (as `analyze` names it), `runs` (settings, by the names of
/// `[[runs]]`; default: all), `title`, `limit`, `batch_size`, and the analysis's own flags as keys.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Heading in the report.
    pub title: String,
    /// The analysis.
    pub kind: String,
    runs: Option<Vec<String>>,
    limit: Option<usize>,
    batch: usize,
    flags: Table,
}

/// What an analysis found, for the report.
pub struct Done {
    /// Heading.
    pub title: String,
    /// What was found: one for each data set.
    pub found: Vec<Findings>,
}

fn count(key: &str, value: Value) -> Result<usize> {
    let n = value.as_integer().and_then(|n| usize::try_from(n).ok());
    n.filter(|n| *n > 0)
        .ok_or_else(|| Error::input(format!("analyses: {key} = {value}: give 1 or more")))
}

impl Wanted {
    /// Reads an entry.
    ///
    /// # Errors
    /// [`Error::Input`]: no such analysis, or a key or a value that is none of it.
    pub fn read(entry: &Table) -> Result<Wanted> {
        let mut flags = entry.clone();
        let Some(Value::String(kind)) = flags.remove("kind") else {
            return Err(Error::input(
                "analyses: each entry wants a kind, as kind = \"cka\"",
            ));
        };
        let room = find(&kind)?;
        let title = match flags.remove("title") {
            Some(Value::String(t)) => t,
            Some(v) => {
                return Err(Error::input(format!(
                    "analyses: title = {v}: a text is wanted"
                )));
            }
            None => kind.replace('-', " "),
        };
        let runs = match flags.remove("runs") {
            None => None,
            Some(Value::Array(all)) => {
                let names = all.into_iter().map(|v| match v {
                    Value::String(s) => Ok(s),
                    v => Err(Error::input(format!("analyses: runs: {v} is no name"))),
                });
                Some(names.collect::<Result<Vec<_>>>()?)
            }
            Some(v) => {
                return Err(Error::input(format!(
                    "analyses: runs = {v}: a list is wanted"
                )));
            }
        };
        let limit = flags
            .remove("limit")
            .map(|v| count("limit", v))
            .transpose()?;
        let batch = flags.remove("batch_size").map(|v| count("batch_size", v));
        room.from_table(&flags)?;
        Ok(Wanted {
            title,
            kind,
            runs,
            limit: limit.or(room.limit),
            batch: batch.transpose()?.unwrap_or(32),
            flags,
        })
    }

    /// The settings that it is over: the first run (lowest seed in the file's order) of each.
    ///
    /// # Errors
    /// A name is no setting's.
    fn of<'a>(&self, planned: &'a [Planned]) -> Result<Vec<&'a Planned>> {
        let mut first: Vec<&Planned> = vec![];
        for p in planned {
            if !first.iter().any(|f| f.group == p.group) {
                first.push(p);
            }
        }
        let Some(runs) = &self.runs else {
            return Ok(first);
        };
        // A matrix adds its values to the names: `CNN data=digits`.
        let is = |p: &Planned, name: &String| {
            p.group == *name || p.group.starts_with(&format!("{name} ")) && p.group.contains('=')
        };
        for name in runs {
            if !first.iter().any(|p| is(p, name)) {
                let all: Vec<&str> = first.iter().map(|p| p.group.as_str()).collect();
                return Err(Error::input(format!(
                    "analysis {}: no run is called {name:?}; there are {}",
                    self.kind,
                    all.join(", ")
                )));
            }
        }
        first.retain(|p| runs.iter().any(|name| is(p, name)));
        Ok(first)
    }

    /// Over the runs in `dirs`, data set by data set.
    fn run(
        &self,
        planned: &[Planned],
        dirs: &[PathBuf],
        open: &dyn Fn(&TrainConfig) -> Result<Box<dyn Backend>>,
    ) -> Result<Done> {
        let room = find(&self.kind)?;
        let analysis = room.from_table(&self.flags)?;
        let mut left = self.of(planned)?;
        let mut found = vec![];
        while let Some(first) = left.first().copied() {
            let data = &first.config.data;
            let (here, others) = left.into_iter().partition(|p| p.config.data == *data);
            left = others;
            found.push(self.over(&room, analysis.as_ref(), here, dirs, open)?);
        }
        Ok(Done {
            title: self.title.clone(),
            found,
        })
    }

    /// Over runs that share their data set.
    fn over(
        &self,
        room: &Room,
        analysis: &dyn crate::analyze::Analysis,
        runs: Vec<&Planned>,
        dirs: &[PathBuf],
        open: &dyn Fn(&TrainConfig) -> Result<Box<dyn Backend>>,
    ) -> Result<Findings> {
        let config = &runs[0].config;
        let sets = open_data(config)?;
        let split = self
            .limit
            .map_or_else(|| sets.test.clone(), |n| sets.test.spaced(n));
        let pictures = Pictures::Data {
            spec: config.data.clone(),
            split,
        };
        let subjects = runs.iter().map(|p| {
            let inside = |d: &PathBuf| d.join(p.name());
            let dir = dirs
                .iter()
                .map(inside)
                .find(|d| d.join("checkpoints").is_dir());
            let dir = dir.ok_or_else(|| Error::input(format!("{}: no checkpoints", p.name())))?;
            Subject::of_run(&p.group, &dir)
        });
        let subjects = subjects.collect::<Result<Vec<_>>>()?;
        let backend = open(config)?;
        let cx = Context {
            backend: backend.as_ref(),
            subjects: &subjects,
            pictures: &pictures,
            batch: self.batch,
            seed: config.seed,
        };
        let found = room.run(analysis, &cx);
        found.map_err(|e| e.context(format!("analysis {}", self.kind)))
    }
}

/// Does every analysis of `experiment` over the finished runs in `dirs`, and writes its figures and numbers into
/// `analyses` in `dir`.
///
/// # Errors
/// An analysis does not suit its models, or a file cannot be written.
pub fn analyse(
    experiment: &Experiment,
    dir: &Path,
    dirs: &[PathBuf],
    open: impl Fn(&TrainConfig) -> Result<Box<dyn Backend>>,
    mut say: impl FnMut(&str),
) -> Result<Vec<Done>> {
    let planned = experiment.planned()?;
    let wanted = experiment.analyses()?;
    let mut all = vec![];
    for (i, one) in wanted.iter().enumerate() {
        say(&format!(
            "analysis {} of {}: {}",
            i + 1,
            wanted.len(),
            one.kind
        ));
        let done = one.run(&planned, dirs, &open)?;
        let place = dir.join("analyses").join(format!("{}-{}", i + 1, one.kind));
        for (j, found) in done.found.iter().enumerate() {
            let place = if j == 0 {
                place.clone()
            } else {
                place.join(j.to_string())
            };
            found.write(&place, &one.kind)?;
        }
        all.push(done);
    }
    Ok(all)
}
