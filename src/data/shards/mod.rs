//! `shards:` — images in tar files, as WebDataset writes and reads them: members of one sample follow each other and share
//! a name up to its first dot (`000001.jpg`, `000001.cls`, `000001.json`).
//!
//! The headers are read once, for the place of every image and its label ([`index`]); images are then read in long
//! pieces, ahead of the batches ([`stream`]). Nothing but the index (16 bytes an image) stays in memory.

mod index;
mod pack;
pub(crate) mod stream;
mod write;

#[cfg(test)]
mod tests;

pub(crate) use pack::packed;
pub use pack::{PackReport, pack};
pub(crate) use write::{About, Member, read_about, write_about, write_shard};

use super::folder::{Found, TEST_SHARE};
use super::split::{Pixels, Split};
use crate::{Error, Result};
use index::{Label, Scan, scan};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The most classes that labels may count to.
const MAX_CLASSES: u64 = 1 << 20;
/// What is told of things that cannot be used, before "and N more".
const TELL: usize = 3;

/// Where an image lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Entry {
    /// First byte of the image in its shard.
    pub(crate) at: u64,
    /// Its bytes.
    pub(crate) len: u32,
    /// Number of its shard.
    pub(crate) shard: u32,
}

/// The images of some shards, by shard and place.
pub(crate) struct Shards {
    pub(crate) files: Vec<PathBuf>,
    pub(crate) entries: Vec<Entry>,
}

impl Shards {
    /// The bytes `from..to` of a shard.
    pub(crate) fn piece(&self, shard: u32, from: u64, to: u64) -> Result<Vec<u8>> {
        let path = &self.files[shard as usize];
        let read = || {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(from))?;
            let mut bytes = vec![0; (to - from) as usize];
            file.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        read().map_err(|e| Error::reading(path, e))
    }

    /// The bytes of an image.
    pub(crate) fn read(&self, index: u32) -> Result<Vec<u8>> {
        let e = self.entries[index as usize];
        self.piece(e.shard, e.at, e.at + u64::from(e.len))
    }

    /// Shard and member, for messages: the name stands in the block before the image.
    pub(crate) fn name(&self, index: u32) -> String {
        let e = self.entries[index as usize];
        let path = self.files[e.shard as usize].display();
        let header = self.piece(e.shard, e.at.saturating_sub(512), e.at);
        let name = header.ok().and_then(|h| {
            let name = h.split(|b| *b == 0).next()?;
            Some(String::from_utf8_lossy(name).into_owned())
        });
        match name.filter(|n| !n.is_empty()) {
            Some(name) => format!("{path}: {name}"),
            None => format!("{path}: byte {}", e.at),
        }
    }

    /// Name, size and time of every shard, in a line each.
    pub(crate) fn identify(&self) -> Result<String> {
        let line = |path: &PathBuf| {
            let about = std::fs::metadata(path).map_err(|e| Error::reading(path, e))?;
            let time = about.modified().ok();
            Ok(format!("{} {} {time:?}\n", path.display(), about.len()))
        };
        self.files.iter().map(line).collect()
    }
}

/// Opens the shards that `pattern` names: a folder, a file, or a path with `*`, `?`, `[...]` and `{a,b}` or
/// `{000000..000009}`.
///
/// Beside the images come the description of the shards and what cannot be used of them, a line each.
///
/// # Errors
/// [`Error::Input`]: nothing there, or no image with a label in it.
pub(crate) fn open(pattern: &str, seed: u64) -> Result<(Found, About, Vec<String>)> {
    let (dir, files) = find(pattern)?;
    let about = read_about(&dir)?;
    let scans: Vec<Scan> = files.par_iter().map(|f| scan(f)).collect();
    let mut broken: Vec<String> = vec![];
    let mut unlabelled = 0;
    let mut samples: Vec<(u32, index::Sample)> = vec![];
    for (shard, scan) in scans.into_iter().enumerate() {
        broken.extend(scan.broken);
        unlabelled += scan.unlabelled;
        samples.extend(scan.samples.into_iter().map(|s| (shard as u32, s)));
    }
    if samples.is_empty() {
        let first = broken.first().map(|b| format!(" ({b})"));
        let why = match unlabelled {
            0 => format!("no images{}", first.unwrap_or_default()),
            n => format!(
                "{n} images, but none with a label: a member .cls, .json (with `label`) or .txt of the same name is expected"
            ),
        };
        return Err(Error::input(format!(
            "shards:{pattern}: {} shards, {why}",
            files.len()
        )));
    }
    let classes = Arc::new(classes(pattern, &samples, &about)?);
    let ids: BTreeMap<&str, u32> = (0..)
        .zip(classes.iter())
        .map(|(i, c)| (c.as_str(), i))
        .collect();
    // Shards say by their names which split they are of.
    let test = |shard: u32| kind(&files[shard as usize]) == Some(Kind::Test);
    let none = || Shards {
        files: files.clone(),
        entries: vec![],
    };
    let mut parts = [(none(), vec![]), (none(), vec![])];
    for (shard, s) in samples {
        let label = match &s.label {
            Label::Number(n) if *n < classes.len() as u64 => Some(*n as u32),
            Label::Number(_) => None,
            Label::Name(name) => ids.get(name.as_str()).copied(),
        };
        let Some(label) = label else {
            broken.push(format!(
                "{}: byte {}: label {} is none of the {} classes",
                files[shard as usize].display(),
                s.at,
                s.label,
                classes.len()
            ));
            continue;
        };
        let (shards, labels) = &mut parts[usize::from(test(shard))];
        shards.entries.push(Entry {
            at: s.at,
            len: s.len,
            shard,
        });
        labels.push(label);
    }
    let mut notes = vec![];
    if unlabelled > 0 {
        notes.push(format!(
            "{unlabelled} images have no label and are left out"
        ));
    }
    if !broken.is_empty() {
        let shown = broken.iter().take(TELL).cloned().collect::<Vec<_>>();
        let more = match broken.len() {
            n if n > TELL => format!("; and {} more", n - TELL),
            _ => String::new(),
        };
        notes.push(format!(
            "{} parts of the shards are broken and left out: {}{more}",
            broken.len(),
            shown.join("; ")
        ));
    }
    let [train, test] = parts
        .map(|(s, l)| (!l.is_empty()).then(|| Split::new(Pixels::Shards(s), l, classes.clone())));
    let (train, test) = match (train, test) {
        (Some(train), Some(test)) => (train?, test?),
        (Some(all), None) => {
            notes.push(format!(
                "no shards named test or val: a stratified {:.0} % of the images, drawn by seed {seed}, is the test split",
                TEST_SHARE * 100.0
            ));
            all?.split_off(TEST_SHARE, seed)?
        }
        (None, Some(all)) => {
            notes.push("no shards for training: the test shards stand for both splits".into());
            let all = all?;
            (all.clone(), all)
        }
        (None, None) => {
            return Err(Error::input(format!(
                "shards:{pattern}: no image has a label of the {} classes",
                classes.len()
            )));
        }
    };
    Ok((Found { train, test, notes }, about, broken))
}

/// Names of the classes: as written beside the shards, else the names among the labels in order, else the numbers up to
/// the largest.
fn classes(pattern: &str, samples: &[(u32, index::Sample)], about: &About) -> Result<Vec<String>> {
    if !about.classes.is_empty() {
        return Ok(about.classes.clone());
    }
    let mut names = BTreeSet::new();
    let (mut most, mut numbers) = (0, 0);
    for (_, s) in samples {
        match &s.label {
            Label::Number(n) => (most, numbers) = (most.max(*n), numbers + 1),
            Label::Name(name) => _ = names.insert(name.as_str()),
        }
    }
    let bad = |why: String| Err(Error::input(format!("shards:{pattern}: {why}")));
    match (numbers, names.len()) {
        (0, n) if n as u64 > MAX_CLASSES || (n > 100 && n * 2 > samples.len()) => bad(format!(
            "{n} different labels of {} images: these are captions, not classes",
            samples.len()
        )),
        (0, _) => Ok(names.into_iter().map(str::to_owned).collect()),
        (_, 0) if most >= MAX_CLASSES => bad(format!(
            "a label is {most}, above the {MAX_CLASSES} classes that there may be"
        )),
        (_, 0) => Ok((0..=most).map(|n| n.to_string()).collect()),
        (n, names) => bad(format!(
            "{n} labels are numbers and {names} different ones are names: one kind is expected (or dataset.json with `classes`)"
        )),
    }
}

#[derive(PartialEq)]
enum Kind {
    Train,
    Test,
}

/// The split that a shard's own name or its folder's tells.
fn kind(path: &Path) -> Option<Kind> {
    let of = |part: Option<&std::ffi::OsStr>| {
        let name = part?.to_string_lossy().to_ascii_lowercase();
        let mut words = name.split(|c: char| !c.is_ascii_alphabetic());
        words.find_map(|w| match w {
            "train" | "training" => Some(Kind::Train),
            "test" | "val" | "valid" | "validation" | "eval" => Some(Kind::Test),
            _ => None,
        })
    };
    of(path.file_name()).or_else(|| of(path.parent().and_then(Path::file_name)))
}

/// The shards of a pattern in order, and the folder that they are described in.
fn find(pattern: &str) -> Result<(PathBuf, Vec<PathBuf>)> {
    let none = |what: &str| Err(Error::input(format!("shards:{pattern}: {what}")));
    let dir = Path::new(pattern);
    if dir.is_dir() {
        let mut files = tars(dir)?;
        for split in ["train", "test", "val", "valid", "validation"] {
            let inside = dir.join(split);
            if inside.is_dir() {
                files.extend(tars(&inside)?);
            }
        }
        if files.is_empty() {
            return none(
                "no shards (*.tar) in this folder; `tilewright data build` and `data pack` write them",
            );
        }
        return Ok((dir.to_path_buf(), files));
    }
    let mut files = vec![];
    for one in braces(pattern)? {
        let bad = |e: glob::PatternError| {
            Error::input(format!("shards:{pattern}: not a pattern of paths: {e}"))
        };
        if Path::new(&one).is_file() {
            files.push(PathBuf::from(one));
            continue;
        }
        let found = glob::glob(&one).map_err(bad)?;
        files.extend(found.filter_map(Result::ok).filter(|p| p.is_file()));
    }
    if files.is_empty() {
        return none("no such folder, and no file fits it as a pattern");
    }
    let parent = files[0].parent().unwrap_or(Path::new(""));
    // Shards in train/ and val/ are described beside these folders.
    let above = parent.parent().filter(|_| !write::has_about(parent));
    let dir = above.filter(|d| write::has_about(d)).unwrap_or(parent);
    Ok((dir.to_path_buf(), files))
}

fn tars(dir: &Path) -> Result<Vec<PathBuf>> {
    let fail = |e| Error::reading(dir, e);
    let entries = std::fs::read_dir(dir).map_err(fail)?;
    let mut files = vec![];
    for entry in entries {
        let path = entry.map_err(fail)?.path();
        let hidden = path
            .file_name()
            .is_some_and(|n| n.as_encoded_bytes()[0] == b'.');
        if !hidden && path.extension().is_some_and(|e| e == "tar") && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// `a{b,c}{00..02}` as a shell expands it.
fn braces(pattern: &str) -> Result<Vec<String>> {
    let Some(open) = pattern.find('{') else {
        return Ok(vec![pattern.to_owned()]);
    };
    let bad = |why: &str| Error::input(format!("shards:{pattern}: {why}"));
    let Some(close) = pattern[open..].find('}').map(|c| open + c) else {
        return Err(bad("a brace that is not closed"));
    };
    let (before, inside, after) = (
        &pattern[..open],
        &pattern[open + 1..close],
        &pattern[close + 1..],
    );
    let middle: Vec<String> = match inside.split_once("..") {
        None => inside.split(',').map(str::to_owned).collect(),
        Some((first, last)) => {
            let (Ok(a), Ok(b)) = (first.parse::<u64>(), last.parse::<u64>()) else {
                return Err(bad("a range in braces is of numbers, as {000000..000009}"));
            };
            if b < a || b - a > 1_000_000 {
                return Err(bad("a range in braces goes up, by a million at most"));
            }
            let width = first.len();
            (a..=b).map(|n| format!("{n:0width$}")).collect()
        }
    };
    let rest = braces(after)?;
    Ok(middle
        .iter()
        .flat_map(|m| rest.iter().map(move |r| format!("{before}{m}{r}")))
        .collect())
}
