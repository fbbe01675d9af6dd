//! Images with labels, and views of them that copy no pixels.

use super::decode::{Rgb, decode};
use super::random::{Use, shuffle, stream};
use super::shards::Shards;
use crate::{Error, Result};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where the pixels are.
pub(crate) enum Pixels {
    /// Squares of `size` pixels, `[n, size, size, 3]`.
    Memory { size: u32, bytes: Vec<u8> },
    /// One file an image, decoded when asked for.
    Files(Vec<PathBuf>),
    /// Many files in a few archives, decoded when asked for.
    Shards(Shards),
}

impl Pixels {
    /// The image file at `index`; empty for images in memory, which are no files.
    pub(crate) fn bytes(&self, index: u32) -> Result<Vec<u8>> {
        match self {
            Pixels::Memory { .. } => Ok(vec![]),
            Pixels::Files(files) => {
                let path = &files[index as usize];
                std::fs::read(path).map_err(|e| Error::reading(path, e))
            }
            Pixels::Shards(shards) => shards.read(index),
        }
    }

    /// What an image is called in messages.
    pub(crate) fn name(&self, index: u32) -> String {
        match self {
            Pixels::Memory { .. } => format!("image {index}"),
            Pixels::Files(files) => files[index as usize].display().to_string(),
            Pixels::Shards(shards) => shards.name(index),
        }
    }

    /// Decodes the image file at `index`.
    pub(crate) fn decode(&self, index: u32) -> Result<Rgb> {
        decode(&self.bytes(index)?).map_err(|e| e.context(self.name(index)))
    }
}

/// All images of a split, shared by its views.
pub(crate) struct Source {
    pub(crate) pixels: Pixels,
    pub(crate) labels: Vec<u32>,
}

/// Images with labels: a view (a list of indices) of a data set's images. Cloning and all views are cheap.
#[derive(Clone)]
pub struct Split {
    pub(crate) source: Arc<Source>,
    pub(crate) indices: Arc<Vec<u32>>,
    classes: Arc<Vec<String>>,
}

/// How much of each class a subset keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PerClass {
    /// Up to this many images of each class.
    Count(usize),
    /// This share of each class, rounded, at least one image.
    Share(f64),
}

impl std::str::FromStr for PerClass {
    type Err = Error;
    /// `100` (images of each class) or `10%` (of each class).
    fn from_str(text: &str) -> Result<Self> {
        let bad = || {
            Error::input(format!(
                "`{text}` per class: give a number of images (100) or a percentage (10%)"
            ))
        };
        match text.strip_suffix('%') {
            None => text
                .parse()
                .ok()
                .filter(|n| *n > 0)
                .map(PerClass::Count)
                .ok_or_else(bad),
            Some(t) => t
                .trim()
                .parse::<f64>()
                .ok()
                .filter(|p| *p > 0.0 && *p <= 100.0)
                .map(|p| PerClass::Share(p / 100.0))
                .ok_or_else(bad),
        }
    }
}

impl std::fmt::Debug for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Split({} images, {} classes)",
            self.len(),
            self.classes.len()
        )
    }
}

impl Split {
    /// All of `pixels`. Labels must be below `classes.len()`, one an image.
    pub(crate) fn new(pixels: Pixels, labels: Vec<u32>, classes: Arc<Vec<String>>) -> Result<Self> {
        let images = match &pixels {
            Pixels::Memory { size, bytes } => {
                bytes.len() / (*size as usize * *size as usize * 3).max(1)
            }
            Pixels::Files(files) => files.len(),
            Pixels::Shards(shards) => shards.entries.len(),
        };
        if images != labels.len() || u32::try_from(images).is_err() {
            return Err(Error::input(format!(
                "{images} images with {} labels",
                labels.len()
            )));
        }
        if let Some((i, label)) = labels
            .iter()
            .enumerate()
            .find(|(_, l)| **l as usize >= classes.len())
        {
            return Err(Error::input(format!(
                "image {i} has label {label}, but there are {} classes (0 to {})",
                classes.len(),
                classes.len().saturating_sub(1)
            )));
        }
        let indices = Arc::new((0..images as u32).collect());
        Ok(Split {
            source: Arc::new(Source { pixels, labels }),
            indices,
            classes,
        })
    }

    /// Images in this view.
    #[must_use]
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether the view is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// Class names in label order.
    #[must_use]
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Positions in the whole split, in view order: the `indices` of a batch.
    #[must_use]
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// The label of the image at `position` of this view.
    #[must_use]
    pub fn label(&self, position: usize) -> u32 {
        self.source.labels[self.indices[position] as usize]
    }

    /// Labels in view order.
    #[must_use]
    pub fn labels(&self) -> Vec<u32> {
        (0..self.len()).map(|i| self.label(i)).collect()
    }

    /// Labels of all images of the split that this is a view of, by index.
    pub(crate) fn all_labels(&self) -> &[u32] {
        &self.source.labels
    }

    /// Adds to `hash` what tells this view from others: the pixels, or the files with their sizes and times; labels; order.
    pub(crate) fn identify(&self, hash: &mut Sha256) -> Result<()> {
        hash.update(bytemuck::cast_slice(&self.indices[..]));
        hash.update(bytemuck::cast_slice(&self.labels()[..]));
        match &self.source.pixels {
            Pixels::Memory { size, bytes } => {
                let one = *size as usize * *size as usize * 3;
                for &i in self.indices.iter() {
                    hash.update(&bytes[i as usize * one..(i as usize + 1) * one]);
                }
            }
            Pixels::Files(files) => {
                for &i in self.indices.iter() {
                    let path = &files[i as usize];
                    let about = std::fs::metadata(path).map_err(|e| Error::reading(path, e))?;
                    let time = about.modified().ok();
                    hash.update(format!("{} {} {time:?}\n", path.display(), about.len()));
                }
            }
            // The indices above and the shards' sizes and times tell which images these are.
            Pixels::Shards(shards) => hash.update(shards.identify()?),
        }
        Ok(())
    }

    /// Images of each class.
    #[must_use]
    pub fn counts(&self) -> Vec<usize> {
        let mut counts = vec![0; self.classes.len()];
        (0..self.len()).for_each(|i| counts[self.label(i) as usize] += 1);
        counts
    }

    /// The file of an image (`index` as in a batch), where the data set is made of files.
    #[must_use]
    pub fn path(&self, index: u32) -> Option<&Path> {
        match &self.source.pixels {
            Pixels::Files(files) => files.get(index as usize).map(PathBuf::as_path),
            Pixels::Memory { .. } | Pixels::Shards(_) => None,
        }
    }

    /// The image at `position` of this view, decoded, at its own size.
    ///
    /// # Errors
    /// [`Error::Input`] naming a file that cannot be read.
    pub fn image(&self, position: usize) -> Result<Rgb> {
        let index = self.indices[position];
        let Pixels::Memory { size, bytes } = &self.source.pixels else {
            return self.source.pixels.decode(index);
        };
        let one = *size as usize * *size as usize * 3;
        Ok(Rgb {
            width: *size,
            height: *size,
            pixels: bytes[index as usize * one..(index as usize + 1) * one].to_vec(),
        })
    }

    pub(crate) fn with_indices(&self, indices: Vec<u32>) -> Split {
        Split {
            indices: Arc::new(indices),
            ..self.clone()
        }
    }

    /// All images of the split that this is a view of.
    pub(crate) fn whole(&self) -> Split {
        self.with_indices((0..self.source.labels.len() as u32).collect())
    }

    /// Indices of each class, in view order.
    fn by_class(&self) -> Vec<Vec<u32>> {
        let mut classes = vec![Vec::new(); self.classes.len()];
        for (i, &index) in self.indices.iter().enumerate() {
            classes[self.label(i) as usize].push(index);
        }
        classes
    }

    /// Keeps `keep(class, images of it)` images of each class, drawn by `seed`, in view order.
    fn keep_per_class(&self, seed: u64, keep: impl Fn(usize, usize) -> usize) -> (Split, Split) {
        let mut kept = vec![false; self.source.labels.len()];
        for (class, mut indices) in self.by_class().into_iter().enumerate() {
            let n = keep(class, indices.len()).min(indices.len());
            shuffle(&mut indices, &mut stream(seed, Use::Split, 0, class as u32));
            indices[..n].iter().for_each(|&i| kept[i as usize] = true);
        }
        let (chosen, rest): (Vec<u32>, Vec<u32>) =
            self.indices.iter().partition(|&&i| kept[i as usize]);
        (self.with_indices(chosen), self.with_indices(rest))
    }

    /// The first `n` images (of class folders, the first classes: use [`Split::subset`] for some of each).
    #[must_use]
    pub fn limit(&self, n: usize) -> Split {
        self.with_indices(self.indices[..n.min(self.len())].to_vec())
    }

    /// `n` images, evenly spaced over the view, so that class folders keep some of each class.
    #[must_use]
    pub fn spaced(&self, n: usize) -> Split {
        let (len, n) = (self.len(), n.min(self.len()));
        self.with_indices((0..n).map(|i| self.indices[i * len / n]).collect())
    }

    /// Two views without a common image: the rest, and `share` of the images (rounded up) with the classes in proportion
    /// (largest remainders); a class of two or more is in both, a class of one in the first. The same seed gives the
    /// same views.
    ///
    /// # Errors
    /// [`Error::Input`] where `share` is not between 0 and 1.
    pub fn split_off(&self, share: f64, seed: u64) -> Result<(Split, Split)> {
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::input(format!(
                "a split of {share}: give a share between 0 and 1"
            )));
        }
        let counts = self.counts();
        let exact: Vec<f64> = counts.iter().map(|n| *n as f64 * share).collect();
        let mut take: Vec<usize> = exact.iter().map(|e| *e as usize).collect();
        // The small step back keeps 0.1 of 30 at 3.
        let total = (self.len() as f64 * share - 1e-6).ceil() as usize;
        let mut order: Vec<usize> = (0..counts.len()).collect();
        order.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
        let missing = total.saturating_sub(take.iter().sum());
        order
            .iter()
            .take(missing)
            .for_each(|&class| take[class] += 1);
        let (taken, rest) = self.keep_per_class(seed, |class, n| match n {
            0 | 1 => 0,
            _ => take[class].clamp(1, n - 1),
        });
        Ok((rest, taken))
    }

    /// Some images of each class. Subsets of one seed are nested: 10 % holds the images of 1 %.
    #[must_use]
    pub fn subset(&self, keep: PerClass, seed: u64) -> Split {
        self.keep_per_class(seed, |_, n| match keep {
            PerClass::Count(count) => count,
            PerClass::Share(share) => ((n as f64 * share).round() as usize).max(1),
        })
        .0
    }

    /// Long-tailed classes: class `c` of `C` keeps `n_max ratio^(-c / (C - 1))` images, so that the first has `ratio`
    /// times as many as the last (Cui et al., "Class-balanced loss based on effective number of samples", 2019).
    ///
    /// # Errors
    /// [`Error::Input`] where `ratio` is below 1.
    pub fn long_tail(&self, ratio: f64, seed: u64) -> Result<Split> {
        let (classes, most) = self.check_imbalance(ratio)?;
        let last = (classes - 1).max(1) as f64;
        let keep = |class: usize, _| (most as f64 * ratio.powf(-(class as f64) / last)) as usize;
        Ok(self
            .keep_per_class(seed, |class, n| keep(class, n).max(1))
            .0)
    }

    /// Step imbalance: the first half of the classes stays whole, the others keep `1 / ratio` of the largest class
    /// (Buda et al., "A systematic study of the class imbalance problem in convolutional neural networks", 2018).
    ///
    /// # Errors
    /// [`Error::Input`] where `ratio` is below 1.
    pub fn step_imbalance(&self, ratio: f64, seed: u64) -> Result<Split> {
        let (classes, most) = self.check_imbalance(ratio)?;
        let keep = |class: usize, n: usize| {
            if class < classes.div_ceil(2) {
                n
            } else {
                ((most as f64 / ratio) as usize).max(1)
            }
        };
        Ok(self.keep_per_class(seed, keep).0)
    }

    fn check_imbalance(&self, ratio: f64) -> Result<(usize, usize)> {
        if !(ratio >= 1.0 && ratio.is_finite()) {
            return Err(Error::input(format!(
                "imbalance ratio {ratio}: give 1 (balanced) or more"
            )));
        }
        Ok((
            self.classes.len(),
            self.counts().into_iter().max().unwrap_or(0),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(per_class: usize, classes: usize) -> Split {
        let labels: Vec<u32> = (0..per_class * classes)
            .map(|i| (i % classes) as u32)
            .collect();
        let names = Arc::new((0..classes).map(|c| format!("c{c}")).collect());
        Split::new(
            Pixels::Memory {
                size: 1,
                bytes: vec![0; labels.len() * 3],
            },
            labels,
            names,
        )
        .unwrap()
    }

    #[test]
    fn views_share_the_pixels_and_are_seeded() {
        let s = split(100, 10);
        let (train, val) = s.split_off(0.2, 1).unwrap();
        assert_eq!((train.counts(), val.counts()), (vec![80; 10], vec![20; 10]));
        assert!(train.indices().iter().all(|i| !val.indices().contains(i)));
        assert!(Arc::ptr_eq(&train.source, &s.source));
        assert_eq!(s.split_off(0.2, 1).unwrap().1.indices(), val.indices());
        assert_ne!(s.split_off(0.2, 2).unwrap().1.indices(), val.indices());
        let small = s.subset(PerClass::Share(0.01), 3);
        let large = s.subset(PerClass::Count(10), 3);
        assert_eq!(
            (small.counts(), large.counts()),
            (vec![1; 10], vec![10; 10])
        );
        assert!(
            small.indices().iter().all(|i| large.indices().contains(i)),
            "nested"
        );
        assert_eq!(s.limit(7).indices(), [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(s.limit(5000).len(), 1000);
    }

    #[test]
    fn imbalance_has_the_published_counts() {
        let s = split(5000, 10);
        // Long-tailed CIFAR-10 at ratio 100, as published.
        assert_eq!(
            s.long_tail(100.0, 0).unwrap().counts(),
            [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        );
        assert_eq!(
            s.step_imbalance(10.0, 0).unwrap().counts(),
            [5000, 5000, 5000, 5000, 5000, 500, 500, 500, 500, 500]
        );
        assert_eq!(s.long_tail(1.0, 0).unwrap().len(), 50_000);
        assert!(s.long_tail(0.5, 0).is_err() && s.split_off(1.0, 0).is_err());
    }

    #[test]
    fn bad_labels_and_settings_are_named() {
        let names = Arc::new(vec!["a".to_owned(); 10]);
        let pixels = || Pixels::Memory {
            size: 1,
            bytes: vec![0; 6],
        };
        let e = Split::new(pixels(), vec![3, 10], names.clone())
            .unwrap_err()
            .to_string();
        assert!(
            e.contains("image 1 has label 10") && e.contains("10 classes"),
            "{e}"
        );
        assert!(Split::new(pixels(), vec![3], names).is_err());
        assert_eq!("10%".parse::<PerClass>().unwrap(), PerClass::Share(0.1));
        assert_eq!("25".parse::<PerClass>().unwrap(), PerClass::Count(25));
        assert!("0".parse::<PerClass>().is_err() && "x%".parse::<PerClass>().is_err());
    }
}
