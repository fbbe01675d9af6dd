//! `data pack`: any data set written as shards; and `packed:DATA`, which packs it once into the cache.

use super::{About, Member, write_about, write_shard};
use crate::data::random::{Use, shuffle, stream};
use crate::data::split::{Pixels, Split};
use crate::data::{IMAGENET_MEAN, OpenOptions, Sets, data_dir, open};
use crate::{Error, Result};
use image::{ExtendedColorType, ImageEncoder, ImageFormat};
use indicatif::ProgressBar;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Images in a shard of [`packed`].
const PER_SHARD: usize = 1000;

/// What [`pack`] wrote.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct PackReport {
    /// Where.
    pub dir: PathBuf,
    /// Training images.
    pub train: usize,
    /// Test images.
    pub test: usize,
    /// Shards of both splits.
    pub shards: usize,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Images that cannot be read and are left out, and why.
    pub bad: Vec<String>,
}

/// Writes `spec`'s splits as shards of `per_shard` images into `dir`: JPEG, PNG and WebP files as they are, any other
/// image as PNG, which loses nothing. The training images come in a random order, so that each shard is a sample of all
/// classes.
///
/// # Errors
/// [`Error::Input`]: no such data set, or `dir` holds shards already; [`Error::Run`]: `dir` cannot be written.
pub fn pack(spec: &str, dir: &Path, per_shard: usize, options: OpenOptions) -> Result<PackReport> {
    write_sets(&open(spec, options)?, dir, per_shard, options.seed, true)
}

fn write_sets(
    sets: &Sets,
    dir: &Path,
    per_shard: usize,
    seed: u64,
    show: bool,
) -> Result<PackReport> {
    std::fs::create_dir_all(dir).map_err(|e| Error::writing(dir, e))?;
    if !super::tars(dir)?.is_empty() {
        return Err(Error::input(format!(
            "{} holds shards already; name an empty folder",
            dir.display()
        )));
    }
    let mut report = PackReport {
        dir: dir.to_path_buf(),
        ..PackReport::default()
    };
    let mut order: Vec<u32> = sets.train.indices().to_vec();
    shuffle(&mut order, &mut stream(seed, Use::Shards, 0, 0));
    let train = sets.train.with_indices(order);
    for (name, split) in [("train", &train), ("test", &sets.test)] {
        let shards = split.len().div_ceil(per_shard);
        let bar = match show {
            true => ProgressBar::new(shards as u64).with_message(format!("packing {name}")),
            false => ProgressBar::hidden(),
        };
        for number in 0..shards {
            let range = number * per_shard..split.len().min((number + 1) * per_shard);
            let made: Vec<Result<Member>> = range
                .into_par_iter()
                .map(|position| member(split, position))
                .collect();
            let (good, bad): (Vec<_>, Vec<_>) = made.into_iter().partition(Result::is_ok);
            let bad = bad.into_iter().filter_map(Result::err);
            report.bad.extend(bad.map(|e| e.to_string()));
            let count = good.len();
            let path = write_shard(dir, name, number, good.into_iter())?;
            report.bytes += std::fs::metadata(&path).map_or(0, |m| m.len());
            match name {
                "train" => report.train += count,
                _ => report.test += count,
            }
            bar.inc(1);
        }
        report.shards += shards;
        bar.finish_and_clear();
    }
    let own = sets.mean != IMAGENET_MEAN;
    let about = About {
        classes: sets.classes().to_vec(),
        mean: own.then_some(sets.mean),
        std: own.then_some(sets.std),
    };
    write_about(dir, &about)?;
    Ok(report)
}

fn member(split: &Split, position: usize) -> Result<Member> {
    let index = split.indices()[position];
    let (extension, image) = match &split.source.pixels {
        Pixels::Memory { size, bytes } => {
            let one = *size as usize * *size as usize * 3;
            let at = index as usize * one;
            ("png", png(*size, *size, &bytes[at..at + one])?)
        }
        Pixels::Files(_) | Pixels::Shards(_) => {
            let bytes = split.source.pixels.bytes(index)?;
            match image::guess_format(&bytes) {
                Ok(ImageFormat::Jpeg) => ("jpg", bytes),
                Ok(ImageFormat::Png) => ("png", bytes),
                Ok(ImageFormat::WebP) => ("webp", bytes),
                _ => {
                    let named = |e: Error| e.context(split.source.pixels.name(index));
                    let rgb = crate::data::decode(&bytes).map_err(named)?;
                    ("png", png(rgb.width, rgb.height, &rgb.pixels)?)
                }
            }
        }
    };
    Ok(Member {
        key: format!("{index:08}"),
        extension,
        image,
        label: split.label(position),
        json: None,
    })
}

fn png(width: u32, height: u32, pixels: &[u8]) -> Result<Vec<u8>> {
    let mut out = vec![];
    image::codecs::png::PngEncoder::new(&mut out)
        .write_image(pixels, width, height, ExtendedColorType::Rgb8)
        .map_err(|e| Error::run(format!("PNG: {e}")))?;
    Ok(out)
}

/// The folder in the cache that holds `spec` as shards; written now where it is not there. Another seed or another state
/// of the files has another folder.
///
/// # Errors
/// As [`pack`].
pub(crate) fn packed(spec: &str, options: OpenOptions) -> Result<PathBuf> {
    let sets = open(spec, options)?;
    let mut hash = Sha256::new();
    hash.update(format!(
        "{} {PER_SHARD} {}",
        env!("CARGO_PKG_VERSION"),
        options.seed
    ));
    hash.update(sets.classes().join("\n"));
    sets.train.identify(&mut hash)?;
    sets.test.identify(&mut hash)?;
    let all = data_dir().join("packed");
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = spec.chars().take(40).map(plain).collect();
    let dir = all.join(format!("{name}-{:.16}", format!("{:x}", hash.finalize())));
    if dir.is_dir() {
        return Ok(dir);
    }
    std::fs::create_dir_all(&all).map_err(|e| Error::writing(&all, e))?;
    let part = tempfile::Builder::new()
        .prefix(".packing-")
        .tempdir_in(&all)
        .map_err(|e| Error::writing(&all, e))?;
    write_sets(&sets, part.path(), PER_SHARD, options.seed, false)?;
    match std::fs::rename(part.path(), &dir) {
        // Gone to its place: nothing is left to remove.
        Ok(()) => _ = part.keep(),
        // Another process was quicker.
        Err(_) if dir.is_dir() => {}
        Err(e) => return Err(Error::writing(&dir, e)),
    }
    Ok(dir)
}
