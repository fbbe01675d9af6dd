//! What became of every row.

use super::{BuildOptions, Cause, Lost};
use crate::report::table::Table;
use crate::report::write_atomic;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

/// A shard that is done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Done {
    pub images: u64,
    pub bytes: u64,
    /// Images of each class, by its number.
    pub classes: BTreeMap<u32, u64>,
    pub lost: Vec<Lost>,
}

/// Smallest, middle and largest of some numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Smallest.
    pub min: u64,
    /// Middle.
    pub median: u64,
    /// Largest.
    pub max: u64,
}

/// What `data build` did, and what was lost on the way: `rows` is `train` and `test` and everything in `lost`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct BuildReport {
    /// Where the shards are.
    pub dir: PathBuf,
    /// Rows of the tables.
    pub rows: u64,
    /// Rows that were tried.
    pub candidates: u64,
    /// Training images.
    pub train: u64,
    /// Test images.
    pub test: u64,
    /// Rows that gave no image, by cause.
    pub lost: BTreeMap<Cause, u64>,
    /// Classes.
    pub classes: usize,
    /// Which label of several was kept.
    pub reduce: String,
    /// Training images of a class.
    pub per_class: Spread,
    /// Classes without a training image.
    pub empty_classes: Vec<String>,
    /// Shards of both splits.
    pub shards: usize,
    /// Their bytes.
    pub bytes: u64,
    /// Candidates settled by this process.
    pub settled: u64,
    /// Wall time of this process.
    pub seconds: f64,
}

impl BuildReport {
    /// Adds what a shard of `split` holds.
    pub(super) fn add(&mut self, split: &str, done: &Done) {
        match split {
            "train" => self.train += done.images,
            _ => self.test += done.images,
        }
        self.shards += 1;
        self.bytes += done.bytes;
        for l in &done.lost {
            *self.lost.entry(l.cause).or_default() += 1;
        }
    }

    /// Sets what is known of the classes from their training images.
    pub(super) fn count(&mut self, names: &[String], images: &[u64]) {
        let mut sorted = images.to_vec();
        sorted.sort();
        self.per_class = Spread {
            min: sorted.first().copied().unwrap_or(0),
            median: sorted.get(sorted.len() / 2).copied().unwrap_or(0),
            max: sorted.last().copied().unwrap_or(0),
        };
        let empty = names.iter().zip(images).filter(|(_, n)| **n == 0);
        self.empty_classes = empty.map(|(name, _)| name.clone()).collect();
    }

    /// For people.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut t = Table::new(["rows", "%", "what became of them"]).left(&[2]);
        let share = |n: u64| format!("{:.1}", 100.0 * n as f64 / self.rows.max(1) as f64);
        let mut row = |n: u64, what: String| t.row([n.to_string(), share(n), what]);
        row(self.rows, "in the tables".into());
        for (cause, n) in &self.lost {
            row(*n, format!("lost: {} [{}]", cause.about(), cause.name()));
        }
        if self.shards > 0 {
            row(self.train, "training images".into());
            row(self.test, "test images".into());
        } else {
            row(self.candidates, "to be tried".into());
        }
        let mut out = t.to_text();
        let _ = writeln!(
            out,
            "{} classes; of several labels: {}",
            self.classes, self.reduce
        );
        if self.shards == 0 {
            return out;
        }
        let s = self.per_class;
        let _ = writeln!(
            out,
            "training images of a class: {} to {}, half of the classes have {} or more",
            s.min, s.max, s.median
        );
        if let Some(first) = self.empty_classes.first() {
            let n = self.empty_classes.len();
            let _ = writeln!(
                out,
                "{n} classes have no training image, the first: {first}"
            );
        }
        let _ = writeln!(
            out,
            "{} shards, {:.1} MB",
            self.shards,
            self.bytes as f64 / 1e6
        );
        out
    }

    /// Writes `report.txt`, `report.json` and `failures.csv` beside the shards.
    pub(super) fn write(&self, options: &BuildOptions, lost: &[Lost]) -> Result<()> {
        let path = |name: &str| options.dir.join(name);
        write_atomic(&path("report.txt"), self.to_text().as_bytes())?;
        let json = serde_json::to_vec_pretty(self).map_err(|e| Error::run(e.to_string()))?;
        write_atomic(&path("report.json"), &json)?;
        let mut csv = csv::Writer::from_writer(vec![]);
        let fail = |e: &dyn std::fmt::Display| Error::run(e.to_string());
        // Of an empty list a file with its heads, too.
        if lost.is_empty() {
            csv.write_record(["row", "url", "cause", "detail"])
                .map_err(|e| fail(&e))?;
        }
        for l in lost {
            csv.serialize(l).map_err(|e| fail(&e))?;
        }
        let bytes = csv.into_inner().map_err(|e| fail(&e))?;
        write_atomic(&path("failures.csv"), &bytes)
    }
}
