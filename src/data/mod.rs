//! Real images in: data sets, decoding, resizing, splits and views, batches ahead of the step.
//!
//! [`open`] finds a data set by its spec and gives a train and a test [`Split`]; views of a split copy nothing;
//! [`Images::prepare`] brings a split to a network's size; a [`Loader`] makes batches of it.

mod augment;
mod build;
mod cifar;
mod colour;
mod decode;
mod digits;
mod fetch;
mod folder;
#[cfg(test)]
mod fuzz;
mod images;
mod loader;
mod mix;
mod pickle;
mod preprocess;
mod random;
mod rows;
mod shards;
mod split;
mod synthetic;
#[cfg(test)]
mod tests;
mod verify;

pub use augment::{Affine, Augment, Drawn, IDENTITY};
pub use build::{BuildOptions, BuildReport, Cause, Fields, Reduce, Spread, build};
pub use colour::Colour;
pub use decode::{Rgb, decode, decode_file};
pub use fetch::{MIRROR_VARIABLE, fetch};
pub use images::{BadImage, Images, MaxBad, PrepareOptions};
pub use loader::{Batch, Feed, Loader, LoaderOptions};
pub use mix::Mix;
pub use preprocess::{IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocess, ResizeMode};
pub use rows::{RowLoader, Rows};
pub use shards::{PackReport, pack};
pub use split::{PerClass, Split};
pub use verify::{Listing, Report, list, verify};

use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// The folder of test material (real data, weights, PyTorch's answers): `TILEWRIGHT_SHARED` if set, else `../shared`
/// beside the crate. `None` where it is absent; tests then say `skipped: no ../shared`.
pub fn shared_dir() -> Option<PathBuf> {
    let dir = match std::env::var_os("TILEWRIGHT_SHARED") {
        Some(d) => PathBuf::from(d),
        None => PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"),
    };
    dir.is_dir().then_some(dir)
}

/// Where `data fetch` puts data sets and where they are looked for: `$XDG_CACHE_HOME/tilewright`, else
/// `~/.cache/tilewright`.
#[must_use]
pub fn data_dir() -> PathBuf {
    let set = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|h| h.join(".cache")));
    cache.unwrap_or_else(std::env::temp_dir).join("tilewright")
}

/// A data set as named on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Spec {
    /// `digits`
    Digits,
    /// `synthetic[:CLASSESxSIZE]`
    Synthetic {
        /// Classes.
        classes: u32,
        /// Side of the images in pixels.
        size: u32,
    },
    /// `cifar10[:DIR]`
    Cifar10(Option<PathBuf>),
    /// `cifar100[:DIR]`
    Cifar100(Option<PathBuf>),
    /// `tiny-imagenet[:DIR]`
    TinyImagenet(Option<PathBuf>),
    /// `folder:DIR`
    Folder(PathBuf),
    /// `shards:PATTERN`
    Shards(String),
    /// `packed:DATA`
    Packed(Box<Spec>),
}

const KNOWN: &str = "digits, synthetic[:CLASSESxSIZE], cifar10[:DIR], cifar100[:DIR], tiny-imagenet[:DIR], folder:DIR, shards:DIR|PATTERN, packed:DATA";

impl std::str::FromStr for Spec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = match text.split_once(':') {
            Some((name, rest)) => (name, Some(rest)),
            None => (text, None),
        };
        if rest == Some("") {
            return Err(Error::input(format!(
                "data set `{text}`: nothing after the colon; known are {KNOWN}"
            )));
        }
        let dir = rest.map(PathBuf::from);
        match (name, dir) {
            ("digits", None) => Ok(Spec::Digits),
            ("synthetic", None) => Ok(Spec::Synthetic {
                classes: 10,
                size: 32,
            }),
            ("synthetic", Some(_)) => parse_synthetic(rest.unwrap_or_default()),
            ("cifar10", dir) => Ok(Spec::Cifar10(dir)),
            ("cifar100", dir) => Ok(Spec::Cifar100(dir)),
            ("tiny-imagenet", dir) => Ok(Spec::TinyImagenet(dir)),
            ("folder", Some(dir)) => Ok(Spec::Folder(dir)),
            ("shards", Some(_)) => Ok(Spec::Shards(rest.unwrap_or_default().to_owned())),
            ("packed", Some(_)) => match rest.unwrap_or_default().parse()? {
                Spec::Shards(_) | Spec::Packed(_) => Err(Error::input(format!(
                    "data set `{text}`: these are shards already"
                ))),
                inner => Ok(Spec::Packed(Box::new(inner))),
            },
            _ => Err(Error::input(format!(
                "no data set is called `{text}`; known are {KNOWN}"
            ))),
        }
    }
}

fn parse_synthetic(text: &str) -> Result<Spec> {
    let (classes, size) = text
        .split_once('x')
        .map_or((None, None), |(c, s)| (c.parse().ok(), s.parse().ok()));
    match (classes, size) {
        (Some(classes @ 1..=10_000), Some(size @ 1..=1024)) => {
            // All images are made at once: 120 of each class.
            if u64::from(classes) * 120 * u64::from(size) * u64::from(size) * 3 > 4 << 30 {
                return Err(Error::input(format!(
                    "synthetic:{text} would take more than 4 GiB: fewer or smaller images"
                )));
            }
            Ok(Spec::Synthetic { classes, size })
        }
        _ => Err(Error::input(format!(
            "synthetic:{text}: expected CLASSESxSIZE, such as synthetic:10x32 (up to 10000 classes, 1024 pixels)"
        ))),
    }
}

impl std::fmt::Display for Spec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut with = |name: &str, dir: &Option<PathBuf>| match dir {
            Some(dir) => write!(f, "{name}:{}", dir.display()),
            None => f.write_str(name),
        };
        match self {
            Spec::Digits => f.write_str("digits"),
            Spec::Synthetic { classes, size } => write!(f, "synthetic:{classes}x{size}"),
            Spec::Cifar10(dir) => with("cifar10", dir),
            Spec::Cifar100(dir) => with("cifar100", dir),
            Spec::TinyImagenet(dir) => with("tiny-imagenet", dir),
            Spec::Folder(dir) => write!(f, "folder:{}", dir.display()),
            Spec::Shards(pattern) => write!(f, "shards:{pattern}"),
            Spec::Packed(inner) => write!(f, "packed:{inner}"),
        }
    }
}

/// How a data set is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions {
    /// Of a random test split (class folders without one) and of `synthetic`.
    pub seed: u64,
}

/// A data set: train and test (or validation) images.
#[derive(Debug, Clone)]
pub struct Sets {
    /// What was asked for.
    pub spec: Spec,
    /// Training images.
    pub train: Split,
    /// Test images.
    pub test: Split,
    /// Side of the images where all of them are squares of one size.
    pub size: Option<u32>,
    /// Usual mean for training on this set, in `[0, 1]` (ImageNet's where it has none of its own).
    pub mean: [f32; 3],
    /// Usual standard deviation.
    pub std: [f32; 3],
    /// Remarks for the user: how a split was made, say.
    pub notes: Vec<String>,
    /// What cannot be used and was left out, a line each (of shards; files are not opened before they are needed).
    pub broken: Vec<String>,
}

impl Sets {
    /// Class names in label order.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        self.train.classes()
    }

    /// No crop, bilinear, at `size`, with this set's own mean and standard deviation.
    #[must_use]
    pub fn preprocess(&self, size: u32) -> Preprocess {
        Preprocess {
            mean: self.mean,
            std: self.std,
            ..Preprocess::new(size)
        }
    }
}

/// Opens a data set by its spec (see [`Spec`]). Images in files are listed, not yet decoded.
///
/// # Errors
/// [`Error::Input`]: an unknown spec (naming the known ones), a missing folder, a file that is cut short, a class
/// folder without images.
pub fn open(spec: &str, options: OpenOptions) -> Result<Sets> {
    let spec: Spec = spec.parse()?;
    let sets = |train, test, size, (mean, std), notes| Sets {
        spec: spec.clone(),
        train,
        test,
        size,
        mean,
        std,
        notes,
        broken: Vec::new(),
    };
    let imagenet = (IMAGENET_MEAN, IMAGENET_STD);
    match &spec {
        Spec::Digits => {
            let (train, test) = digits::open()?;
            Ok(sets(
                train,
                test,
                Some(digits::SIZE),
                ([digits::MEAN; 3], [digits::STD; 3]),
                Vec::new(),
            ))
        }
        Spec::Synthetic { classes, size } => {
            let (train, test) = synthetic::open(*classes, *size, options.seed)?;
            Ok(sets(
                train,
                test,
                Some(*size),
                ([0.5; 3], [0.25; 3]),
                Vec::new(),
            ))
        }
        Spec::Cifar10(dir) | Spec::Cifar100(dir) => {
            let kind = spec.cifar_kind();
            let place = cifar::locate(kind, &dir.clone().unwrap_or_else(data_dir))?;
            let (train, test) = cifar::open(kind, &place)?;
            let notes = vec![format!("{} from {}", kind.name(), place.display())];
            Ok(sets(train, test, Some(cifar::SIZE), kind.mean_std(), notes))
        }
        Spec::TinyImagenet(dir) => {
            let place = tiny_imagenet_dir(dir.as_deref())?;
            let found = folder::open_tiny_imagenet(&place)?;
            Ok(sets(
                found.train,
                found.test,
                Some(64),
                imagenet,
                found.notes,
            ))
        }
        Spec::Folder(dir) => {
            if !dir.is_dir() {
                return Err(Error::input(format!("no such folder: {}", dir.display())));
            }
            let found = folder::open(dir, options.seed)?;
            let size = common_size(&found.train);
            Ok(sets(found.train, found.test, size, imagenet, found.notes))
        }
        Spec::Shards(pattern) => {
            let (found, about, broken) = shards::open(pattern, options.seed)?;
            let size = common_size(&found.train);
            let own = (
                about.mean.unwrap_or(IMAGENET_MEAN),
                about.std.unwrap_or(IMAGENET_STD),
            );
            Ok(Sets {
                broken,
                ..sets(found.train, found.test, size, own, found.notes)
            })
        }
        Spec::Packed(inner) => {
            let dir = shards::packed(&inner.to_string(), options)?;
            let packed = open(&format!("shards:{}", dir.display()), options)?;
            Ok(Sets {
                spec: spec.clone(),
                ..packed
            })
        }
    }
}

impl Spec {
    /// Classes and the side of the images where these are known without the data.
    #[must_use]
    pub fn known(&self) -> Option<(usize, Option<u32>)> {
        match self {
            Spec::Digits => Some((10, Some(digits::SIZE))),
            Spec::Synthetic { classes, size } => Some((*classes as usize, Some(*size))),
            Spec::Cifar10(_) => Some((10, Some(cifar::SIZE))),
            Spec::Cifar100(_) => Some((100, Some(cifar::SIZE))),
            Spec::TinyImagenet(_) => Some((200, Some(64))),
            Spec::Packed(inner) => inner.known(),
            Spec::Folder(_) | Spec::Shards(_) => None,
        }
    }

    fn cifar_kind(&self) -> cifar::Kind {
        if matches!(self, Spec::Cifar100(_)) {
            cifar::Kind::Hundred
        } else {
            cifar::Kind::Ten
        }
    }
}

fn tiny_imagenet_dir(dir: Option<&Path>) -> Result<PathBuf> {
    let given = dir.map_or_else(data_dir, Path::to_path_buf);
    let inside = given.join("tiny-imagenet-200");
    [&given, &inside].into_iter().find(|d| d.join("wnids.txt").is_file()).cloned().ok_or_else(|| {
        Error::input(format!(
            "no Tiny ImageNet in {} (no wnids.txt, and none in tiny-imagenet-200)\n`tilewright data fetch` downloads it.",
            given.display()
        ))
    })
}

/// The side that images of files seem to have: a few are looked at, of each part of the set.
fn common_size(split: &Split) -> Option<u32> {
    let step = (split.len() / 8).max(1);
    let mut sizes = split.indices().iter().step_by(step).map(|&i| {
        let file = std::io::Cursor::new(split.source.pixels.bytes(i).ok()?);
        let reader = image::ImageReader::new(file).with_guessed_format().ok()?;
        reader.into_dimensions().ok()
    });
    let (w, h) = sizes.next()??;
    (w == h && sizes.all(|s| s == Some((w, h)))).then_some(w)
}
