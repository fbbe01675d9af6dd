//! CIFAR-10 and CIFAR-100 as their home page gives them: the binary records or the Python pickles, unpacked in a folder
//! or still in their `.tar.gz` (<https://www.cs.toronto.edu/~kriz/cifar.html>).

use super::pickle;
use super::split::{Pixels, Split};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Side of an image.
pub(crate) const SIZE: u32 = 32;
const PIXELS: usize = 32 * 32;
/// No file of either set is nearly as large; a larger one is not read.
const MAX_FILE: u64 = 1 << 30;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ten,
    Hundred,
}

/// Images of one file: `[n, 32, 32, 3]` and labels.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Records {
    pub(crate) pixels: Vec<u8>,
    pub(crate) labels: Vec<u32>,
}

/// One file of the set, read or not.
pub(crate) struct Part {
    /// Of the test split.
    pub(crate) test: bool,
    pub(crate) records: Result<Records>,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Ten => "CIFAR-10",
            Kind::Hundred => "CIFAR-100",
        }
    }

    pub(crate) fn classes(self) -> Vec<String> {
        let names = match self {
            Kind::Ten => CIFAR10_CLASSES,
            Kind::Hundred => CIFAR100_CLASSES,
        };
        names.split_whitespace().map(str::to_owned).collect()
    }

    /// Mean and standard deviation of the training images in `[0, 1]`.
    pub(crate) fn mean_std(self) -> ([f32; 3], [f32; 3]) {
        match self {
            Kind::Ten => ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
            Kind::Hundred => ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
        }
    }

    /// Unpacked folders and archives, as looked for in a data folder.
    fn places(self) -> [&'static str; 4] {
        match self {
            Kind::Ten => [
                "cifar-10-batches-bin",
                "cifar-10-batches-py",
                "cifar-10-binary.tar.gz",
                "cifar-10-python.tar.gz",
            ],
            Kind::Hundred => [
                "cifar-100-binary",
                "cifar-100-python",
                "cifar-100-binary.tar.gz",
                "cifar-100-python.tar.gz",
            ],
        }
    }

    /// Files that hold images: (name, is it test data), the training ones first.
    fn files(self) -> Vec<(String, bool)> {
        let owned = |v: &[(&str, bool)]| v.iter().map(|(n, t)| ((*n).to_owned(), *t)).collect();
        match self {
            Kind::Hundred => owned(&[
                ("train.bin", false),
                ("test.bin", true),
                ("train", false),
                ("test", true),
            ]),
            Kind::Ten => (1..=5)
                .flat_map(|i| [format!("data_batch_{i}.bin"), format!("data_batch_{i}")])
                .map(|n| (n, false))
                .chain(owned(&[("test_batch.bin", true), ("test_batch", true)]))
                .collect(),
        }
    }
}

/// The folder or archive that holds the set at or in `dir`.
pub(crate) fn locate(kind: Kind, dir: &Path) -> Result<PathBuf> {
    if dir.is_file() || kind.files().iter().any(|(f, _)| dir.join(f).is_file()) {
        return Ok(dir.to_path_buf());
    }
    if !dir.exists() {
        return Err(Error::input(format!(
            "no such folder: {}\n`tilewright data fetch` downloads {}.",
            dir.display(),
            kind.name()
        )));
    }
    kind.places()
        .iter()
        .map(|p| dir.join(p))
        .find(|p| p.exists())
        .ok_or_else(|| {
            Error::input(format!(
                "no {} in {}: looked for {} and their files\n`tilewright data fetch` downloads it.",
                kind.name(),
                dir.display(),
                kind.places().join(", ")
            ))
        })
}

/// Reads every file of the set at `place` (a folder or a `.tar.gz`).
pub(crate) fn read(kind: Kind, place: &Path) -> Result<Vec<Part>> {
    let files = kind.files();
    let mut parts = BTreeMap::new();
    let mut add = |name: String, position: usize, bytes: Result<Vec<u8>>| {
        let (file, test) = &files[position];
        let records = bytes
            .and_then(|b| parse(kind, file, &b))
            .map_err(|e| e.context(&name));
        parts.insert(
            position,
            Part {
                test: *test,
                records,
            },
        );
    };
    if place.is_dir() {
        for (position, (file, _)) in files.iter().enumerate() {
            let path = place.join(file);
            if path.is_file() {
                let bytes = std::fs::File::open(&path)
                    .and_then(read_bounded)
                    .map_err(|e| Error::reading(&path, e));
                add(path.display().to_string(), position, bytes);
            }
        }
    } else {
        let bad = |e: std::io::Error| Error::reading(place, e);
        let file = std::fs::File::open(place).map_err(bad)?;
        let gz = flate2::read::MultiGzDecoder::new(std::io::BufReader::new(file));
        let mut archive = tar::Archive::new(gz);
        for entry in archive.entries().map_err(bad)? {
            let mut entry = entry.map_err(bad)?;
            let path = entry.path().map_err(bad)?.into_owned();
            let name = path
                .file_name()
                .and_then(|n| n.to_str())
                .unwrap_or_default();
            if let Some(position) = files.iter().position(|(f, _)| f == name)
                && entry.header().entry_type().is_file()
            {
                let bytes = read_bounded(&mut entry).map_err(bad);
                add(
                    format!("{}: {}", place.display(), path.display()),
                    position,
                    bytes,
                );
            }
        }
    }
    if parts.is_empty() {
        return Err(Error::input(format!(
            "{} holds none of the files of {}",
            place.display(),
            kind.name()
        )));
    }
    Ok(parts.into_values().collect())
}

fn read_bounded(from: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(
            "larger than 1 GiB, which no file of this set is",
        ));
    }
    Ok(bytes)
}

/// Train and test from the files at `place`; a set with fewer files or records than the official one is taken as it is.
pub(crate) fn open(kind: Kind, place: &Path) -> Result<(Split, Split)> {
    let mut sets = [Records::default(), Records::default()];
    for part in read(kind, place)? {
        let records = part.records?;
        let set = &mut sets[usize::from(part.test)];
        set.pixels.extend_from_slice(&records.pixels);
        set.labels.extend_from_slice(&records.labels);
    }
    let classes = Arc::new(kind.classes());
    let [train, test] = sets.map(|s| {
        Split::new(
            Pixels::Memory {
                size: SIZE,
                bytes: s.pixels,
            },
            s.labels,
            classes.clone(),
        )
    });
    Ok((train?, test?))
}

fn parse(kind: Kind, file: &str, bytes: &[u8]) -> Result<Records> {
    let records = if file.ends_with(".bin") {
        parse_binary(kind, bytes)
    } else {
        parse_python(kind, bytes)
    }?;
    let classes = if kind == Kind::Ten { 10 } else { 100 };
    match records.labels.iter().position(|l| *l >= classes) {
        Some(i) => Err(Error::input(format!(
            "record {i} has label {}, but there are {classes} classes",
            records.labels[i]
        ))),
        None => Ok(records),
    }
}

/// Records of one label byte (CIFAR-100: coarse, then fine) and 3,072 bytes: red, green and blue planes.
pub(crate) fn parse_binary(kind: Kind, bytes: &[u8]) -> Result<Records> {
    let labels = if kind == Kind::Ten { 1 } else { 2 };
    let one = labels + 3 * PIXELS;
    if bytes.is_empty() || !bytes.len().is_multiple_of(one) {
        return Err(Error::input(format!(
            "{} bytes are not a whole number of records of {one} bytes: the file is cut short, or not {}",
            bytes.len(),
            kind.name()
        )));
    }
    let mut records = Records::default();
    for record in bytes.chunks_exact(one) {
        records.labels.push(u32::from(record[labels - 1]));
        interleave(&record[labels..], &mut records.pixels);
    }
    Ok(records)
}

/// A pickled dictionary: `data` [n, 3072] uint8, `labels` (CIFAR-100: `fine_labels`) a list of n.
pub(crate) fn parse_python(kind: Kind, bytes: &[u8]) -> Result<Records> {
    let dict = pickle::parse(bytes)?;
    let key = if kind == Kind::Ten {
        "labels"
    } else {
        "fine_labels"
    };
    let labels = dict.integers(key)?;
    let data = dict.bytes("data")?;
    if labels.is_empty() || data.len() != labels.len() * 3 * PIXELS {
        return Err(Error::input(format!(
            "`data` has {} bytes and `{key}` {} entries: expected 3072 bytes an entry",
            data.len(),
            labels.len()
        )));
    }
    let mut records = Records::default();
    for (image, label) in data.chunks_exact(3 * PIXELS).zip(labels) {
        records
            .labels
            .push(u32::try_from(label).unwrap_or(u32::MAX));
        interleave(image, &mut records.pixels);
    }
    Ok(records)
}

fn interleave(planes: &[u8], out: &mut Vec<u8>) {
    let (r, rest) = planes.split_at(PIXELS);
    let (g, b) = rest.split_at(PIXELS);
    out.extend(r.iter().zip(g).zip(b).flat_map(|((r, g), b)| [*r, *g, *b]));
}

const CIFAR10_CLASSES: &str = "airplane automobile bird cat deer dog frog horse ship truck";

const CIFAR100_CLASSES: &str = "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
    dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
    lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew
    skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television
    tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm";
