//! Recorded results: what was measured, on what, by which commit; compared by the medians' intervals.

use super::ceiling::Ceilings;
use super::kernel::KernelReport;
use super::measure::Sample;
use super::model::StepReport;
use crate::backend::Backend;
use crate::report::write_atomic;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

/// Where results stand by their name.
pub const FOLDER: &str = "benches/results";

/// What a result was made with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Version of the program.
    pub version: String,
    /// Commit of its sources, `+` where they were changed since; empty where it is not known.
    pub commit: String,
    /// `cpu`, `wgpu`, `cuda`, `cuda:sim`.
    pub backend: String,
    /// The device, its driver and precision as the backend tells them.
    pub device: String,
    /// The file of tuned variants that was in force, or empty.
    #[serde(default)]
    pub tuned: String,
    /// Operating system and architecture.
    pub system: String,
    /// When, `2026-11-21T11:05:00Z`.
    pub when: String,
}

impl Origin {
    /// Here and now.
    pub fn of(backend: &dyn Backend) -> Origin {
        let now = SystemTime::now();
        let second = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let now = UNIX_EPOCH + std::time::Duration::from_secs(second);
        Origin {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: commit(),
            backend: backend.name().into(),
            device: backend.device(),
            tuned: backend.tuned(),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            when: humantime::format_rfc3339_seconds(now).to_string(),
        }
    }
}

/// The commit: as the build was told by `TILEWRIGHT_COMMIT`, else as git tells it of the sources.
fn commit() -> String {
    if let Some(told) = option_env!("TILEWRIGHT_COMMIT") {
        return told.into();
    }
    let git = Command::new("git")
        .args(["-C", env!("CARGO_MANIFEST_DIR")])
        .args(["describe", "--always", "--dirty=+", "--abbrev=12"])
        .output();
    match git {
        Ok(o) if o.status.success() => String::from_utf8_lossy(&o.stdout).trim().to_string(),
        _ => String::new(),
    }
}

/// One measured thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `conv2d(n=8,...) conv2d_dgrad`, or `resnet50 train batch 8 x 224 px`.
    pub case: String,
    /// The kernel variant; `auto` is the op's own rule.
    pub variant: String,
    /// Time.
    pub time: Sample,
    /// Operations as the definition counts them.
    pub flops: u64,
    /// Operations that the kernel does.
    pub executed: u64,
    /// Compulsory bytes.
    pub bytes: u64,
    /// Share of the roofline.
    pub roofline: f64,
}

impl From<&KernelReport> for Row {
    fn from(r: &KernelReport) -> Row {
        Row {
            case: format!("{} {}", r.case, r.op),
            variant: r.variant.clone(),
            time: r.time,
            flops: r.flops,
            executed: r.executed,
            bytes: r.bytes,
            roofline: r.roofline,
        }
    }
}

impl From<&StepReport> for Row {
    fn from(r: &StepReport) -> Row {
        let way = format!("{:?}", r.direction).to_lowercase();
        Row {
            case: format!("{} {way} batch {} x {} px", r.model, r.batch, r.image),
            variant: "auto".into(),
            time: r.step,
            flops: r.flops,
            executed: r.executed,
            bytes: r.phases.iter().map(|p| p.bytes).sum(),
            roofline: r.roofline,
        }
    }
}

/// Results of one run of `bench`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What they were made with.
    pub origin: Origin,
    /// The device's measured limits.
    pub ceilings: Ceilings,
    /// The results.
    pub rows: Vec<Row>,
}

/// A name stands for `benches/results/NAME.json`; what looks like a path is one.
pub fn path_of(name: &str) -> PathBuf {
    let path = Path::new(name);
    if path.extension().is_some_and(|e| e == "json") || path.components().count() > 1 {
        return path.to_path_buf();
    }
    Path::new(FOLDER).join(format!("{name}.json"))
}

impl Record {
    /// Writes the record; its folder is made where it is not there.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
        }
        let mut json = serde_json::to_vec_pretty(self).map_err(|e| Error::run(e.to_string()))?;
        json.push(b'\n');
        write_atomic(path, &json)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`Error::Input`] where there is none or it is malformed.
    pub fn load(path: &Path) -> Result<Record> {
        let bytes = std::fs::read(path).map_err(|e| Error::reading(path, e))?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::input(format!(
                "{}: not a record of results ({e}); `tilewright bench ... --save NAME` makes one",
                path.display()
            ))
        })
    }

    /// Every record of `dir`, oldest first.
    ///
    /// # Errors
    /// The folder cannot be read, or one of its JSON files is no record.
    pub fn all(dir: &Path) -> Result<Vec<(String, Record)>> {
        let entries = std::fs::read_dir(dir).map_err(|e| Error::reading(dir, e))?;
        let mut all = vec![];
        for entry in entries {
            let path = entry.map_err(|e| Error::reading(dir, e))?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            all.push((name.into_owned(), Record::load(&path)?));
        }
        all.sort_by(|a, b| a.1.origin.when.cmp(&b.1.origin.when));
        Ok(all)
    }
}

/// What a comparison says of a case.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The interval is wholly below the one before.
    Faster,
    /// Wholly above.
    Slower,
    /// They overlap.
    #[serde(rename = "within noise")]
    WithinNoise,
    /// Not there before.
    New,
}

impl Verdict {
    /// By the 95 % intervals of two medians.
    pub fn of(before: &Sample, now: &Sample) -> Verdict {
        if now.high < before.low {
            Verdict::Faster
        } else if now.low > before.high {
            Verdict::Slower
        } else {
            Verdict::WithinNoise
        }
    }

    /// In words.
    pub fn text(self) -> &'static str {
        match self {
            Verdict::Faster => "faster",
            Verdict::Slower => "slower",
            Verdict::WithinNoise => "within noise",
            Verdict::New => "new",
        }
    }
}

/// Each row of `now` with the same case and variant of `before`.
pub fn compare<'a>(before: &'a Record, now: &'a [Row]) -> Vec<(&'a Row, Option<&'a Row>, Verdict)> {
    let same = |r: &Row| {
        let found = before.rows.iter();
        let mut found = found.filter(|b| b.case == r.case && b.variant == r.variant);
        found.next()
    };
    now.iter()
        .map(|r| match same(r) {
            Some(b) => (r, Some(b), Verdict::of(&b.time, &r.time)),
            None => (r, None, Verdict::New),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(case: &str, times: &[f64]) -> Row {
        Row {
            case: case.into(),
            variant: "auto".into(),
            time: Sample::of(times.to_vec()),
            flops: 1,
            executed: 1,
            bytes: 1,
            roofline: 0.5,
        }
    }

    fn record(rows: Vec<Row>) -> Record {
        let cpu = crate::backend::open("cpu").unwrap();
        Record {
            origin: Origin::of(cpu.as_ref()),
            ceilings: Ceilings {
                flops: 1e9,
                bandwidth: vec![[1.0, 1e9]],
                launch: 0.0,
            },
            rows,
        }
    }

    #[test]
    fn verdicts_go_by_intervals() {
        let times = |from: f64| {
            (0..20)
                .map(|i| from + 0.01 * f64::from(i))
                .collect::<Vec<_>>()
        };
        let before = record(vec![
            row("a", &times(1.0)),
            row("b", &times(1.0)),
            row("c", &times(1.0)),
        ]);
        let now = [
            row("a", &times(0.5)),
            row("b", &times(1.05)),
            row("c", &times(2.0)),
            row("d", &times(1.0)),
        ];
        let verdicts: Vec<Verdict> = compare(&before, &now).iter().map(|c| c.2).collect();
        let want = [
            Verdict::Faster,
            Verdict::WithinNoise,
            Verdict::Slower,
            Verdict::New,
        ];
        assert_eq!(verdicts, want);
    }

    #[test]
    fn records_are_read_as_written_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("new");
        let mut old = record(vec![row("a", &[1.0])]);
        let new = old.clone();
        old.origin.when = "2020-01-01T00:00:00Z".into();
        new.save(&folder.join("a.json")).unwrap();
        old.save(&folder.join("b.json")).unwrap();
        std::fs::write(folder.join("notes.txt"), "x").unwrap();
        let all = Record::all(&folder).unwrap();
        let names: Vec<&str> = all.iter().map(|r| r.0.as_str()).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(all[1].1, new);
        assert_eq!(new.origin.when.len(), 20);
        assert_eq!(path_of("main"), Path::new("benches/results/main.json"));
        assert_eq!(path_of("x.json"), Path::new("x.json"));
    }
}
