//! A split at a network's size: squares of bytes in memory where they fit, else decoded when they are needed.

use super::decode::decode;
use super::preprocess::{Preprocess, Squares};
use super::split::{Pixels, Split};
use crate::{Error, Result};
use rayon::prelude::*;
use std::sync::Mutex;

/// How many images may be unreadable before a run stops.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxBad {
    /// This share of the images.
    Share(f64),
    /// This many.
    Count(usize),
}

impl MaxBad {
    fn exceeded(self, bad: usize, of: usize) -> bool {
        match self {
            MaxBad::Share(share) => bad as f64 > of as f64 * share,
            MaxBad::Count(n) => bad > n,
        }
    }
}

impl std::fmt::Display for MaxBad {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            MaxBad::Share(share) => write!(f, "{} %", share * 100.0),
            MaxBad::Count(n) => write!(f, "{n}"),
        }
    }
}

/// How a split is made ready.
#[derive(Debug, Clone, Copy)]
pub struct PrepareOptions {
    /// Bytes of decoded images that may stay in memory; a larger split is decoded again in every epoch.
    pub memory: u64,
    /// Unreadable images that are dropped before the run stops.
    pub max_bad: MaxBad,
}

/// Of images in shards, which there may be millions of: decoded ones stay in memory only where they are few, and parts
/// that cannot be read are counted, reported and left out, up to a half.
const SHARDS: PrepareOptions = PrepareOptions {
    memory: 512 << 20,
    max_bad: MaxBad::Share(0.5),
};

impl Default for PrepareOptions {
    /// 4 GiB, 1 %.
    fn default() -> Self {
        PrepareOptions {
            memory: 4 << 30,
            max_bad: MaxBad::Share(0.01),
        }
    }
}

/// An image that cannot be read, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadImage {
    /// Its index in the split.
    pub index: u32,
    /// The file and what is wrong with it.
    pub message: String,
}

enum Store {
    /// The source's own squares, as they are.
    Native,
    /// `[len, size, size, 3]` in view order.
    Memory(Vec<u8>),
    /// Nothing kept.
    Demand,
}

/// A split's images at one size, ready for a loader.
pub struct Images {
    split: Split,
    store: Store,
    preprocess: Preprocess,
    options: PrepareOptions,
    bad: Mutex<Vec<BadImage>>,
}

impl Images {
    /// Makes `split` ready at `preprocess.size`, in parallel. Images that cannot be read are dropped from the view and
    /// listed by [`Images::bad`] (where a split does not fit in memory: found and skipped as the loader meets them).
    ///
    /// # Errors
    /// [`Error::Input`]: an empty split, a bad setting, or more unreadable images than `options.max_bad`.
    pub fn prepare(
        split: &Split,
        preprocess: Preprocess,
        mut options: PrepareOptions,
    ) -> Result<Images> {
        preprocess.check()?;
        if matches!(split.source.pixels, Pixels::Shards(_)) {
            options = PrepareOptions {
                memory: options.memory.min(SHARDS.memory),
                ..SHARDS
            };
        }
        if split.is_empty() {
            return Err(Error::input("the data set has no images in this split"));
        }
        let side = u64::from(preprocess.size);
        let fits = side * side * 3 * split.len() as u64 <= options.memory;
        let native = matches!(split.source.pixels, Pixels::Memory { size, .. } if size == preprocess.size)
            && preprocess.crop_ratio == 1.0;
        let mut images = Images {
            split: split.clone(),
            store: Store::Demand,
            preprocess,
            options,
            bad: Mutex::default(),
        };
        if native {
            images.store = Store::Native;
        } else if fits {
            images.decode_all()?;
        }
        Ok(images)
    }

    fn decode_all(&mut self) -> Result<()> {
        let bytes = Squares::new(&self.preprocess)?.bytes();
        let mut squares = vec![0u8; bytes * self.split.len()];
        let failed: Vec<(usize, BadImage)> = squares
            .par_chunks_exact_mut(bytes)
            .enumerate()
            .map_init(
                || Squares::new(&self.preprocess),
                |maker, (position, out)| {
                    let index = self.split.indices[position];
                    let made = match maker {
                        Ok(maker) => self.make(index, None, maker, out),
                        Err(e) => Err(Error::run(e.to_string())),
                    };
                    made.err().map(|e| {
                        (
                            position,
                            BadImage {
                                index,
                                message: e.to_string(),
                            },
                        )
                    })
                },
            )
            .flatten_iter()
            .collect();
        if !failed.is_empty() {
            // Close the gaps that the bad images leave, in place.
            let mut bad = failed.iter().map(|(position, _)| *position).peekable();
            let mut kept = Vec::with_capacity(self.split.len() - failed.len());
            for position in 0..self.split.len() {
                if bad.next_if_eq(&position).is_none() {
                    squares
                        .copy_within(position * bytes..(position + 1) * bytes, kept.len() * bytes);
                    kept.push(self.split.indices[position]);
                }
            }
            squares.truncate(kept.len() * bytes);
            self.bad = Mutex::new(failed.into_iter().map(|(_, bad)| bad).collect());
            self.check_bad()?;
            self.split = self.split.with_indices(kept);
            if self.split.is_empty() {
                return Err(Error::input("no image of this split can be read"));
            }
        }
        self.store = Store::Memory(squares);
        Ok(())
    }

    fn check_bad(&self) -> Result<()> {
        let bad = self.bad();
        let of = self.split.len();
        if !self.options.max_bad.exceeded(bad.len(), of) {
            return Ok(());
        }
        let first: Vec<&str> = bad.iter().take(3).map(|b| b.message.as_str()).collect();
        let more = if bad.len() > 3 {
            format!("; and {} more", bad.len() - 3)
        } else {
            String::new()
        };
        Err(Error::input(format!(
            "{} of {of} images cannot be read (limit: {}): {}{more}\nRemove or replace them (`tilewright data verify` lists all), or raise the limit.",
            bad.len(),
            self.options.max_bad,
            first.join("; ")
        )))
    }

    /// One square from the source, or from what was read of it before.
    fn make(
        &self,
        index: u32,
        read: Option<Result<Vec<u8>>>,
        maker: &mut Squares,
        out: &mut [u8],
    ) -> Result<()> {
        match &self.split.source.pixels {
            Pixels::Memory { size, bytes } => {
                let one = *size as usize * *size as usize * 3;
                let at = index as usize * one;
                maker.make_from(*size, *size, &bytes[at..at + one], out)
            }
            pixels => {
                let bytes = read.unwrap_or_else(|| pixels.bytes(index))?;
                decode(&bytes)
                    .and_then(|image| maker.make(&image, out))
                    .map_err(|e| e.context(pixels.name(index)))
            }
        }
    }

    /// The view, without the images that were dropped.
    #[must_use]
    pub fn split(&self) -> &Split {
        &self.split
    }

    /// Images in the view.
    #[must_use]
    pub fn len(&self) -> usize {
        self.split.len()
    }

    /// Never: [`Images::prepare`] refuses an empty split.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.split.is_empty()
    }

    /// Whether batches are made from memory, without decoding.
    #[must_use]
    pub fn in_memory(&self) -> bool {
        !matches!(self.store, Store::Demand)
    }

    /// What was done to every image.
    #[must_use]
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// Images that could not be read so far.
    #[must_use]
    pub fn bad(&self) -> Vec<BadImage> {
        self.bad.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Runs `f` on the bytes (`[size, size, 3]`) of the image at `position` of the view. `scratch` is kept between
    /// calls. `Ok(None)`: the image cannot be read, and not too many are.
    pub(crate) fn with_square<R>(
        &self,
        position: usize,
        scratch: &mut Scratch,
        f: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>> {
        self.with_square_of(position, None, scratch, f)
    }

    /// [`with_square`](Self::with_square) of an image file that was `read` already.
    pub(crate) fn with_square_of<R>(
        &self,
        position: usize,
        read: Option<Result<Vec<u8>>>,
        scratch: &mut Scratch,
        f: impl FnOnce(&[u8]) -> R,
    ) -> Result<Option<R>> {
        let one = scratch.square.len();
        let index = self.split.indices[position];
        match (&self.store, &self.split.source.pixels) {
            (Store::Memory(squares), _) => {
                Ok(Some(f(&squares[position * one..(position + 1) * one])))
            }
            (Store::Native, Pixels::Memory { bytes, .. }) => {
                let at = index as usize * one;
                Ok(Some(f(&bytes[at..at + one])))
            }
            _ => match self.make(index, read, &mut scratch.maker, &mut scratch.square) {
                Ok(()) => Ok(Some(f(&scratch.square))),
                Err(e) => {
                    let bad = BadImage {
                        index,
                        message: e.to_string(),
                    };
                    {
                        let mut all = self.bad.lock().unwrap_or_else(|e| e.into_inner());
                        if !all.contains(&bad) {
                            all.push(bad);
                        }
                    }
                    self.check_bad()?;
                    Ok(None)
                }
            },
        }
    }

    pub(crate) fn scratch(&self) -> Result<Scratch> {
        let maker = Squares::new(&self.preprocess)?;
        Ok(Scratch {
            square: vec![0; maker.bytes()],
            maker,
        })
    }
}

/// What a thread needs to make squares.
pub(crate) struct Scratch {
    maker: Squares,
    square: Vec<u8>,
}
