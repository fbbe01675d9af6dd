//! Shards out: tar files whose bytes depend on their members alone, and a description beside them.

use crate::report::write_atomic_with;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// What is written beside shards about them all.
const ABOUT: &str = "dataset.json";
/// In its place, where other tools wrote the shards: a name a line.
const NAMES: &str = "classes.txt";

/// What is known about the shards in a folder, its `dataset.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct About {
    /// Names in label order; empty: as the labels are.
    pub classes: Vec<String>,
    /// Usual mean for training, in `[0, 1]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean: Option<[f32; 3]>,
    /// Usual standard deviation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub std: Option<[f32; 3]>,
}

pub(super) fn has_about(dir: &Path) -> bool {
    dir.join(ABOUT).is_file() || dir.join(NAMES).is_file()
}

/// The description in `dir`, or an empty one.
///
/// # Errors
/// [`Error::Input`] where it is there but is none.
pub(crate) fn read_about(dir: &Path) -> Result<About> {
    let read = |path: &PathBuf| std::fs::read_to_string(path).map_err(|e| Error::reading(path, e));
    let (about, names) = (dir.join(ABOUT), dir.join(NAMES));
    if about.is_file() {
        return serde_json::from_str(&read(&about)?)
            .map_err(|e| Error::input(format!("{}: {e}", about.display())));
    }
    if names.is_file() {
        let classes = read(&names)?.lines().map(|l| l.trim().to_owned()).collect();
        return Ok(About {
            classes,
            ..About::default()
        });
    }
    Ok(About::default())
}

/// Writes the description of the shards in `dir`.
///
/// # Errors
/// The folder cannot be written.
pub(crate) fn write_about(dir: &Path, about: &About) -> Result<()> {
    let json = serde_json::to_vec_pretty(about).map_err(|e| Error::run(e.to_string()))?;
    crate::report::write_atomic(&dir.join(ABOUT), &json)
}

/// One sample of a shard.
pub(crate) struct Member {
    /// Name of its files up to the dot.
    pub key: String,
    /// Of the image, without a dot.
    pub extension: &'static str,
    /// The image file.
    pub image: Vec<u8>,
    /// Class number.
    pub label: u32,
    /// The `.json` member, where there is one.
    pub json: Option<Vec<u8>>,
}

/// Writes `dir/SPLIT-NUMBER.tar`, whole or not at all, from samples as they come; returns its path.
///
/// # Errors
/// What `samples` gives, or the folder cannot be written.
pub(crate) fn write_shard(
    dir: &Path,
    split: &str,
    number: usize,
    samples: impl Iterator<Item = Result<Member>>,
) -> Result<PathBuf> {
    let path = dir.join(format!("{split}-{number:06}.tar"));
    write_atomic_with(&path, |out| {
        let fail = |e| Error::writing(&path, e);
        let mut tar = tar::Builder::new(out);
        let mut add = |name: String, bytes: &[u8]| {
            // Nothing of this machine, user or time: equal members make equal shards.
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, bytes)
        };
        for sample in samples {
            let s = sample?;
            add(format!("{}.{}", s.key, s.extension), &s.image).map_err(fail)?;
            add(format!("{}.cls", s.key), s.label.to_string().as_bytes()).map_err(fail)?;
            if let Some(json) = &s.json {
                add(format!("{}.json", s.key), json).map_err(fail)?;
            }
        }
        tar.finish().map_err(fail)
    })?;
    Ok(path)
}
