//! The two logs of a run directory: `metrics.csv` (one row an epoch) and `events.jsonl` (one line a step).
//!
//! Both are only ever appended to, a whole line with one write, and cut back on resume to what the checkpoint
//! knows: lines after it, and a last line that a kill left unfinished, are removed, so that no row occurs twice.
//! The trainer writes an epoch's row *before* the checkpoint that contains the epoch, so that none is missing.

use super::metrics::null_is_nan;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// One row of `metrics.csv`. A value that was not measured (no validation in this epoch) is NaN and an empty cell.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRow {
    /// Epoch, from 1.
    pub epoch: u64,
    /// Mean training loss over the epoch (with label smoothing and the like).
    #[serde(deserialize_with = "null_is_nan")]
    pub train_loss: f64,
    /// Training top-1 in percent, on the augmented images, while the weights change.
    #[serde(deserialize_with = "null_is_nan")]
    pub train_top1: f64,
    /// Mean validation cross-entropy.
    #[serde(deserialize_with = "null_is_nan")]
    pub val_loss: f64,
    /// Validation top-1 in percent.
    #[serde(deserialize_with = "null_is_nan")]
    pub val_top1: f64,
    /// Validation top-5 in percent.
    #[serde(deserialize_with = "null_is_nan")]
    pub val_top5: f64,
    /// Learning rate of the epoch's last step.
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    /// Training images per second, validation not counted.
    #[serde(deserialize_with = "null_is_nan")]
    pub images_per_second: f64,
    /// Wall time of the epoch in seconds, validation included.
    #[serde(deserialize_with = "null_is_nan")]
    pub seconds: f64,
}

/// One line of `events.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepEvent {
    /// Optimizer step of the whole run, from 1.
    pub step: u64,
    /// Epoch, from 1.
    pub epoch: u64,
    /// Mean loss of the batch.
    #[serde(deserialize_with = "null_is_nan")]
    pub loss: f64,
    /// Top-1 of the batch in percent.
    #[serde(deserialize_with = "null_is_nan")]
    pub top1: f64,
    /// Learning rate.
    #[serde(deserialize_with = "null_is_nan")]
    pub lr: f64,
    /// Global gradient norm before clipping, where it was computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Wall time of the step in seconds.
    #[serde(deserialize_with = "null_is_nan")]
    pub seconds: f64,
}

const COLUMNS: [&str; 9] = [
    "epoch",
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "lr",
    "images_per_second",
    "seconds",
];

impl EpochRow {
    fn to_csv(&self) -> String {
        let values = [
            self.train_loss,
            self.train_top1,
            self.val_loss,
            self.val_top1,
            self.val_top5,
            self.lr,
            self.images_per_second,
            self.seconds,
        ];
        let mut line = self.epoch.to_string();
        for v in values {
            line.push(',');
            // Rust prints the shortest text that reads back as the same f64; infinity is kept, NaN is "not measured".
            if !v.is_nan() {
                line.push_str(&v.to_string());
            }
        }
        line.push('\n');
        line
    }

    fn from_csv(line: &str) -> Option<Self> {
        let cells: Vec<&str> = line.split(',').collect();
        if cells.len() != COLUMNS.len() {
            return None;
        }
        let number = |i: usize| {
            if cells[i].is_empty() {
                Some(f64::NAN)
            } else {
                cells[i].parse().ok()
            }
        };
        Some(EpochRow {
            epoch: cells[0].parse().ok()?,
            train_loss: number(1)?,
            train_top1: number(2)?,
            val_loss: number(3)?,
            val_top1: number(4)?,
            val_top5: number(5)?,
            lr: number(6)?,
            images_per_second: number(7)?,
            seconds: number(8)?,
        })
    }
}

/// `metrics.csv`, open for appending.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
}

impl MetricsLog {
    /// Opens `path` (created with its heading where it is missing) and keeps the rows of epochs up to
    /// `epochs_done`: 0 starts afresh.
    ///
    /// # Errors
    /// [`Error::Run`] where the file cannot be written; [`Error::Input`] where it is not a `metrics.csv`.
    pub fn open(path: &Path, epochs_done: u64) -> Result<Self> {
        let heading = COLUMNS.join(",");
        let mut first = true;
        let file = open_cut(path, epochs_done == 0, |line| {
            if std::mem::take(&mut first) {
                return if line == heading {
                    Ok(true)
                } else {
                    Err(format!("its first line is not `{heading}`"))
                };
            }
            let row = EpochRow::from_csv(line).ok_or(format!("cannot read the row `{line}`"))?;
            Ok(row.epoch <= epochs_done)
        })?;
        let mut log = MetricsLog {
            file,
            path: path.to_path_buf(),
        };
        if log
            .file
            .stream_position()
            .map_err(|e| Error::writing(path, e))?
            == 0
        {
            log.write(&(heading + "\n"))?;
        }
        Ok(log)
    }

    /// Appends a row and waits until it is on the disk.
    ///
    /// # Errors
    /// [`Error::Run`] where the file cannot be written.
    pub fn append(&mut self, row: &EpochRow) -> Result<()> {
        self.write(&row.to_csv())
    }

    fn write(&mut self, line: &str) -> Result<()> {
        let fail = |e| Error::writing(&self.path, e);
        self.file.write_all(line.as_bytes()).map_err(fail)?;
        self.file.sync_data().map_err(fail)
    }
}

/// Reads a whole `metrics.csv`; an unfinished last line is left out.
///
/// # Errors
/// [`Error::Input`] where it cannot be read or is not a `metrics.csv`.
pub fn read_metrics(path: &Path) -> Result<Vec<EpochRow>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
    let mut lines = text
        .split_inclusive('\n')
        .filter_map(|l| l.strip_suffix('\n'));
    if lines.next() != Some(&COLUMNS.join(",")) {
        return Err(Error::input(format!(
            "{} is not a metrics.csv: it has another heading",
            path.display()
        )));
    }
    lines
        .map(|l| {
            EpochRow::from_csv(l).ok_or_else(|| {
                Error::input(format!("{}: cannot read the row `{l}`", path.display()))
            })
        })
        .collect()
}

/// `events.jsonl`, open for appending.
#[derive(Debug)]
pub struct EventLog {
    file: File,
    path: PathBuf,
    line: Vec<u8>,
}

impl EventLog {
    /// Opens `path` (created where it is missing) and keeps the lines of steps up to `steps_done`: 0 starts afresh.
    ///
    /// # Errors
    /// [`Error::Run`] where the file cannot be written; [`Error::Input`] where it is not an `events.jsonl`.
    pub fn open(path: &Path, steps_done: u64) -> Result<Self> {
        let file = open_cut(path, steps_done == 0, |line| {
            let event: StepEvent = serde_json::from_str(line)
                .map_err(|e| format!("cannot read the line `{line}` ({e})"))?;
            Ok(event.step <= steps_done)
        })?;
        Ok(EventLog {
            file,
            path: path.to_path_buf(),
            line: Vec::with_capacity(256),
        })
    }

    /// Appends a line. It survives the death of the process at once, and that of the machine after [`EventLog::sync`].
    ///
    /// # Errors
    /// [`Error::Run`] where the file cannot be written.
    pub fn append(&mut self, event: &StepEvent) -> Result<()> {
        self.line.clear();
        serde_json::to_writer(&mut self.line, event)
            .map_err(|e| Error::run(format!("cannot write {}: {e}", self.path.display())))?;
        self.line.push(b'\n');
        self.file
            .write_all(&self.line)
            .map_err(|e| Error::writing(&self.path, e))
    }

    /// Waits until all lines are on the disk; to be called before a checkpoint is written.
    ///
    /// # Errors
    /// [`Error::Run`] where the disk is full or gone.
    pub fn sync(&mut self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(|e| Error::writing(&self.path, e))
    }
}

/// Opens a log and cuts it after the last line of its beginning that `keep` wants; an unfinished last line goes too.
/// The file is left positioned at its end.
fn open_cut(
    path: &Path,
    fresh: bool,
    mut keep: impl FnMut(&str) -> Result<bool, String>,
) -> Result<File> {
    let fail = |e| Error::writing(path, e);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(fail)?;
    let mut end = 0;
    if !fresh {
        let mut reader = BufReader::new(&file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let n = reader
                .read_until(b'\n', &mut line)
                .map_err(|e| Error::reading(path, e))?;
            let Some((b'\n', body)) = line.split_last() else {
                break;
            };
            let kept = match std::str::from_utf8(body) {
                Ok(text) => keep(text),
                Err(_) => Err("it is not UTF-8 text".into()),
            };
            match kept {
                Ok(true) => end += n as u64,
                Ok(false) => break,
                Err(why) => {
                    return Err(Error::input(format!(
                        "cannot resume {}: {why}; move the file away to go on without its history",
                        path.display()
                    )));
                }
            }
        }
    }
    file.set_len(end).map_err(fail)?;
    file.seek(SeekFrom::Start(end)).map_err(fail)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(epoch: u64) -> EpochRow {
        let e = epoch as f64;
        EpochRow {
            epoch,
            train_loss: 1.0 / 3.0 / e,
            train_top1: 50.0 + e,
            val_loss: if epoch == 2 { f64::NAN } else { 0.1 + 0.2 },
            val_top1: 60.0,
            val_top5: 99.0,
            lr: 1e-3,
            images_per_second: 1234.5,
            seconds: 7.25,
        }
    }

    fn event(step: u64) -> StepEvent {
        let loss = if step == 3 { f64::NAN } else { 0.5 };
        StepEvent {
            step,
            epoch: 1,
            loss,
            top1: 10.0,
            lr: 1e-3,
            grad_norm: None,
            seconds: 0.01,
        }
    }

    #[test]
    fn a_resumed_csv_has_each_row_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.csv");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        for e in 1..=4 {
            log.append(&row(e)).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        // Killed in the middle of a row, with a checkpoint of epoch 2: at any byte.
        let start = 2 + whole.windows(3).position(|w| w == b"\n3,").unwrap();
        for cut in [start, start + 1, start + 20, whole.len() - 1, whole.len()] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut log = MetricsLog::open(&path, 2).unwrap();
            log.append(&row(3)).unwrap();
            log.append(&row(4)).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), whole, "cut at {cut}");
        }
        let rows = read_metrics(&path).unwrap();
        assert_eq!(rows[2], row(3));
        assert!(rows[1].val_loss.is_nan() && rows[1].val_top1 == 60.0);
        assert!(
            String::from_utf8(whole)
                .unwrap()
                .lines()
                .nth(2)
                .unwrap()
                .contains(",,60,99,0.001,")
        );
        // Afresh: only the heading stays.
        MetricsLog::open(&path, 0).unwrap();
        assert_eq!(read_metrics(&path).unwrap(), []);
    }

    #[test]
    fn a_resumed_jsonl_has_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.jsonl");
        let mut log = EventLog::open(&path, 0).unwrap();
        for s in 1..=5 {
            log.append(&event(s)).unwrap();
        }
        log.sync().unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        let mut log = EventLog::open(&path, 3).unwrap();
        log.append(&event(4)).unwrap();
        log.append(&event(5)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
    }

    #[test]
    fn a_foreign_file_is_refused_and_untouched() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["a,b\n1,2\n", "\u{0}\n"] {
            let path = dir.path().join("metrics.csv");
            std::fs::write(&path, text).unwrap();
            assert!(
                MetricsLog::open(&path, 1)
                    .unwrap_err()
                    .to_string()
                    .contains("cannot resume")
            );
            assert!(read_metrics(&path).is_err());
            assert!(EventLog::open(&path, 1).is_err());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        let missing = dir.path().join("no/metrics.csv");
        assert!(
            MetricsLog::open(&missing, 0)
                .unwrap_err()
                .to_string()
                .contains("cannot write")
        );
    }
}
