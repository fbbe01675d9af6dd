//! What there is and whether it is whole: `data list` and `data verify`.

use super::split::{Pixels, Split};
use super::{OpenOptions, Spec, cifar, data_dir, open, tiny_imagenet_dir};
use crate::Result;
use rayon::prelude::*;
use std::path::PathBuf;

/// What [`verify`] found.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// What was asked for.
    pub spec: String,
    /// Training images that are whole.
    pub train: usize,
    /// Test images that are whole.
    pub test: usize,
    /// Classes.
    pub classes: usize,
    /// Every broken file with what is wrong with it.
    pub bad: Vec<String>,
    /// Remarks.
    pub notes: Vec<String>,
}

/// Reads every image of a data set to its end.
///
/// # Errors
/// [`crate::Error::Input`] where the data set cannot be opened at all; broken files are in the report.
pub fn verify(spec: &str) -> Result<Report> {
    let parsed: Spec = spec.parse()?;
    if let Spec::Cifar10(dir) | Spec::Cifar100(dir) = &parsed {
        let kind = parsed.cifar_kind();
        let place = cifar::locate(kind, &dir.clone().unwrap_or_else(data_dir))?;
        return verify_cifar(spec, kind, &place);
    }
    let sets = open(spec, OpenOptions::default())?;
    let classes = sets.classes().len();
    let mut report = Report {
        spec: spec.to_owned(),
        train: 0,
        test: 0,
        classes,
        bad: sets.broken.clone(),
        notes: sets.notes.clone(),
    };
    report.train = check(&sets.train, &mut report.bad);
    report.test = check(&sets.test, &mut report.bad);
    Ok(report)
}

/// Decodes the images of a split; how many are whole.
fn check(split: &Split, bad: &mut Vec<String>) -> usize {
    let pixels = &split.source.pixels;
    if matches!(pixels, Pixels::Memory { .. }) {
        return split.len();
    }
    let found: Vec<String> = split
        .indices
        .par_iter()
        .filter_map(|&i| pixels.decode(i).err())
        .map(|e| e.to_string())
        .collect();
    let whole = split.len() - found.len();
    bad.extend(found);
    whole
}

fn verify_cifar(spec: &str, kind: cifar::Kind, place: &std::path::Path) -> Result<Report> {
    let mut report = Report {
        spec: spec.to_owned(),
        train: 0,
        test: 0,
        classes: kind.classes().len(),
        bad: Vec::new(),
        notes: vec![format!("{} from {}", kind.name(), place.display())],
    };
    for part in cifar::read(kind, place)? {
        match part.records {
            Ok(records) if part.test => report.test += records.labels.len(),
            Ok(records) => report.train += records.labels.len(),
            Err(e) => report.bad.push(e.to_string()),
        }
    }
    if (report.train, report.test) != (50_000, 10_000) {
        report.notes.push(format!(
            "{} training and {} test images; the official set has 50,000 and 10,000",
            report.train, report.test
        ));
    }
    Ok(report)
}

/// A data set that can be named.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Listing {
    /// How to ask for it.
    pub spec: &'static str,
    /// What it is.
    pub about: &'static str,
    /// Classes; 0 where it depends.
    pub classes: usize,
    /// Side of its images; 0 where it depends.
    pub size: u32,
    /// Where it lies, if it is in the data folder.
    pub found: Option<PathBuf>,
    /// Whether `data fetch` can download it.
    pub fetch: bool,
}

/// Every data set that can be named, and which are there.
#[must_use]
pub fn list() -> Vec<Listing> {
    let dir = data_dir();
    let cifar = |kind| cifar::locate(kind, &dir).ok();
    let row = |spec, about, classes, size, found, fetch| Listing {
        spec,
        about,
        classes,
        size,
        found,
        fetch,
    };
    vec![
        row(
            "digits",
            "1,797 handwritten digits, built in",
            10,
            8,
            None,
            false,
        ),
        row(
            "synthetic[:CLASSESxSIZE]",
            "made-up patterns with noise, built in",
            0,
            0,
            None,
            false,
        ),
        row(
            "cifar10[:DIR]",
            "60,000 photographs",
            10,
            32,
            cifar(cifar::Kind::Ten),
            true,
        ),
        row(
            "cifar100[:DIR]",
            "60,000 photographs",
            100,
            32,
            cifar(cifar::Kind::Hundred),
            true,
        ),
        row(
            "tiny-imagenet[:DIR]",
            "110,000 photographs",
            200,
            64,
            tiny_imagenet_dir(None).ok(),
            true,
        ),
        row(
            "folder:DIR",
            "one folder of images for each class, optionally under train/ and test|val/",
            0,
            0,
            None,
            false,
        ),
        row(
            "shards:DIR|PATTERN",
            "tar files of images as WebDataset has them; `data build` and `data pack` write some",
            0,
            0,
            None,
            false,
        ),
        row(
            "packed:DATA",
            "any of these, written as shards to the cache once and read from there",
            0,
            0,
            None,
            false,
        ),
    ]
}
