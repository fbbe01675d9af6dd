//! The registry of known weights: what is on the hub, for which network, and how its images are prepared.

use super::hub::Hub;
use crate::data::{Interpolation, Preprocess, ResizeMode};
use crate::models::{self, Model};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The registry that is built in.
const BUILT_IN: &str = include_str!("../../weights/registry.toml");

/// One file of weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Name on the command line.
    pub name: String,
    /// The network's id.
    pub model: String,
    /// Repository on the Hugging Face hub.
    pub repo: String,
    /// File in it.
    pub file: String,
    /// Licence, as its card states it.
    pub license: String,
    /// Side of the input in pixels.
    pub image_size: u32,
    /// Share of the resized side that the centre crop keeps.
    pub crop_ratio: f32,
    /// How an image that is not square becomes one.
    #[serde(default = "shorter")]
    pub resize: ResizeMode,
    /// Filter of the resize.
    pub interpolation: Interpolation,
    /// Mean of red, green, blue.
    pub mean: [f32; 3],
    /// Standard deviation of red, green, blue.
    pub std: [f32; 3],
    /// Classes; 0: a backbone.
    pub classes: usize,
    /// Published accuracy on ImageNet's validation set, per cent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
    /// Of the file, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

fn shorter() -> ResizeMode {
    ResizeMode::Shorter
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    weights: Vec<Record>,
}

impl Record {
    /// The network.
    ///
    /// # Errors
    /// [`Error::Input`]: the record names none that is known.
    pub fn model(&self) -> Result<Model> {
        models::find(&self.model)
            .map_err(|e| e.context(format!("weights {} are for no known network", self.name)))
    }

    /// From an image to the network's input.
    pub fn preprocess(&self, size: u32) -> Preprocess {
        Preprocess {
            size,
            crop_ratio: self.crop_ratio,
            interpolation: self.interpolation,
            resize_mode: self.resize,
            mean: self.mean,
            std: self.std,
        }
    }

    /// Where the file lies, where it was fetched already.
    pub fn cached(&self, hub: &Hub) -> Option<PathBuf> {
        hub.cached(&self.repo, &self.file)
    }
}

/// Parses a registry; `origin` is its path, for messages.
///
/// # Errors
/// [`Error::Input`]: it is not TOML, a key is missing or unknown, a name is there twice, a checksum is none, or a
/// record is for no known network.
pub fn parse(text: &str, origin: &str) -> Result<Vec<Record>> {
    let all: Document =
        toml::from_str(text).map_err(|e| Error::input(format!("{origin}: {}", e.message())))?;
    for (i, r) in all.weights.iter().enumerate() {
        let bad = |why: String| Err(Error::input(format!("{origin}: weights {}: {why}", r.name)));
        if all.weights[..i].iter().any(|other| other.name == r.name) {
            return bad("this name is there twice".into());
        }
        let hex = |s: &String| s.len() == 64 && s.bytes().all(|b| b.is_ascii_hexdigit());
        if let Some(sum) = r.sha256.as_ref().filter(|s| !hex(s)) {
            return bad(format!("sha256 {sum:?} is not 64 hexadecimal digits"));
        }
        r.preprocess(r.image_size)
            .check()
            .and_then(|()| r.model().map(drop))
            .map_err(|e| e.context(origin))?;
    }
    Ok(all.weights)
}

/// The built-in records, or those of the file `path`.
///
/// # Errors
/// The file cannot be read, or as [`parse`].
pub fn records(path: Option<&Path>) -> Result<Vec<Record>> {
    match path {
        None => parse(BUILT_IN, "weights/registry.toml"),
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
            parse(&text, &path.display().to_string())
        }
    }
}

/// The record called `name`, by its name, its repository or its network's id (the first of several then).
pub fn find<'r>(all: &'r [Record], name: &str) -> Option<&'r Record> {
    let by = |key: fn(&Record) -> &String| all.iter().find(move |r| key(r) == name);
    by(|r| &r.name)
        .or_else(|| by(|r| &r.repo))
        .or_else(|| by(|r| &r.model))
}

/// What `--weights` names: a file or a folder as it is, or a registry name's file where it was fetched, with its record.
///
/// # Errors
/// [`Error::Input`]: the registry knows the name, but the file is not here: the message has the command that fetches it.
pub fn locate(given: &Path) -> Result<(PathBuf, Option<Record>)> {
    let as_it_is = || Ok((given.to_path_buf(), None));
    if given.exists() {
        return as_it_is();
    }
    let all = records(None)?;
    let Some(record) = given.to_str().and_then(|name| find(&all, name)) else {
        return as_it_is();
    };
    let hub = Hub::from_env();
    match record.cached(&hub) {
        Some(path) => Ok((path, Some(record.clone()))),
        None => Err(Error::input(format!(
            "the weights {} are not here yet (nothing in {}); fetch them: tilewright weights fetch {}",
            record.name,
            hub.cache.display(),
            record.name
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_record_is_whole() {
        let all = records(None).unwrap();
        assert!(all.len() > 40);
        for r in &all {
            let model = r.model().unwrap();
            assert!(r.repo.split('/').count() == 2 && r.file.ends_with(".safetensors"));
            assert_eq!(r.classes == 0, model.classes == 0, "{}", r.name);
            assert!(
                r.top1.is_none_or(|t| (50.0..95.0).contains(&t)),
                "{}",
                r.name
            );
        }
        assert_eq!(
            find(&all, "facebook/dinov2-small").unwrap().model,
            "dinov2_small"
        );
        assert_eq!(find(&all, "resnet50").unwrap().name, "resnet50.tv_in1k");
        assert!(find(&all, "resnet51").is_none());
    }

    #[test]
    fn bad_records_are_refused_by_name() {
        let good = |change: (&str, &str)| {
            let first = BUILT_IN.find("[[weights]]").unwrap();
            let second = first + 1 + BUILT_IN[first + 1..].find("[[weights]]").unwrap();
            let one = BUILT_IN[first..second].replace(change.0, change.1);
            parse(&one, "mine.toml")
                .map(|_| ())
                .map_err(|e| e.to_string())
        };
        good(("", "")).unwrap();
        let e = good(("model = \"resnet18\"", "model = \"resnot18\"")).unwrap_err();
        assert!(
            e.contains("resnet18.tv_in1k") && e.contains("resnot18"),
            "{e}"
        );
        let e = good(("classes = 1000", "classes = 1000\nsha256 = \"12\"")).unwrap_err();
        assert!(e.contains("64 hexadecimal"), "{e}");
        assert!(
            good(("license", "licence"))
                .unwrap_err()
                .contains("mine.toml")
        );
        assert!(good(("crop_ratio = 0.875", "crop_ratio = 1.5")).is_err());
        let twice = format!(
            "{BUILT_IN}{}",
            &BUILT_IN[BUILT_IN.find("[[weights]]").unwrap()..]
        );
        assert!(
            parse(&twice, "x")
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
    }
}
