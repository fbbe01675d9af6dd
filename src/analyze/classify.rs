//! What a network answers for every image of a data set.

use super::{Context, Subject, for_batches};
use crate::data::Images;
use crate::{Error, Result};
use std::sync::Arc;

/// The answers to all images that could be read.
pub(super) struct Answers {
    /// The images, those left out that cannot be read.
    pub images: Arc<Images>,
    /// Classes.
    pub classes: usize,
    /// Of each class.
    pub names: Vec<String>,
    /// `[images, classes]`
    pub logits: Vec<f32>,
    /// Position in the view, of each image.
    pub positions: Vec<usize>,
    /// True class of each image.
    pub labels: Vec<u32>,
}

/// Softmax in float64; all NaN where a logit is.
pub(super) fn softmax(logits: &[f32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f64> = logits.iter().map(|&v| f64::from(v - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|v| v / sum).collect()
}

/// The largest of `p` and its place, the first of equals.
pub(super) fn best(p: &[f64]) -> (usize, f64) {
    let first = (0, f64::NEG_INFINITY);
    p.iter().enumerate().fold(
        first,
        |best, (i, &v)| {
            if v > best.1 { (i, v) } else { best }
        },
    )
}

/// Refuses a model without a classifier, or for another number of classes than the data set has.
pub(super) fn check_classes(cx: &Context, subject: &Subject) -> Result<usize> {
    let labels = cx.split()?.classes().len();
    match subject.classes {
        Some(0) => Err(subject.no_classifier()),
        Some(n) if n != labels => Err(Error::input(format!(
            "{} has {n} classes, the data set {} has {labels}: they cannot be compared",
            subject.name,
            cx.data()
        ))),
        _ => Ok(labels),
    }
}

/// Runs all images of the data set through `subject`.
pub(super) fn answers(cx: &Context, subject: &Subject) -> Result<Answers> {
    let classes = check_classes(cx, subject)?;
    let images = cx.images(subject)?;
    let batch = cx.batch.min(images.len());
    let ((mut session, ()), names) = (
        subject.session(cx.backend, (batch, Some(classes)), false, |_| Ok(()))?,
        images.split().classes().to_vec(),
    );
    if !session.classifies() {
        return Err(subject.no_classifier());
    }
    let output = session.output();
    let (mut logits, mut positions, mut labels) = (vec![], vec![], vec![]);
    let mut at = std::collections::HashMap::new();
    for (position, &index) in images.split().indices().iter().enumerate() {
        at.insert(index, position);
    }
    for_batches(&mut session, images.clone(), &subject.name, 1, |s, b| {
        let all = s.read(output)?;
        logits.extend_from_slice(&all[..b.valid * classes]);
        labels.extend_from_slice(&b.labels[..b.valid]);
        positions.extend(b.indices[..b.valid].iter().map(|i| at[i]));
        Ok(())
    })?;
    Ok(Answers {
        images,
        classes,
        names,
        logits,
        positions,
        labels,
    })
}

impl Answers {
    /// Probabilities of image `i`.
    pub fn probabilities(&self, i: usize) -> Vec<f64> {
        softmax(&self.logits[i * self.classes..(i + 1) * self.classes])
    }

    /// Images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Image `i`, decoded, at its own size.
    ///
    /// # Errors
    /// It cannot be read (any more).
    pub fn picture(&self, i: usize) -> Result<image::RgbImage> {
        let rgb = self.images.split().image(self.positions[i])?;
        Ok(super::picture::of(&rgb))
    }

    /// Index of image `i` in its data set, and its file where it has one.
    pub fn place(&self, i: usize) -> (u32, String) {
        let split = self.images.split();
        let index = split.indices()[self.positions[i]];
        let file = split.path(index).map(|p| p.display().to_string());
        (index, file.unwrap_or_default())
    }
}
