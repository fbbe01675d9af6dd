//! Batches of rows that were computed once (features of a frozen network), in the order in which a [`Loader`] would
//! give their images.
//!
//! [`Loader`]: super::Loader

use super::loader::{Batch, Feed, LoaderOptions, draw_order};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// A row of features for each image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    /// `[n, width]`
    pub values: Vec<f32>,
    /// Elements of a row.
    pub width: usize,
    /// `[n]`
    pub labels: Vec<u32>,
    /// `[n]`: index of each image in the data set's split.
    pub indices: Vec<u32>,
}

impl Rows {
    /// The rows of these images, in this order; `None` where one of them is missing.
    #[must_use]
    pub fn pick(&self, indices: &[u32]) -> Option<Rows> {
        let places: HashMap<u32, usize> = self.indices.iter().copied().zip(0..).collect();
        let places: Vec<usize> = indices
            .iter()
            .map(|i| places.get(i).copied())
            .collect::<Option<_>>()?;
        let row = |&p: &usize| &self.values[p * self.width..(p + 1) * self.width];
        Some(Rows {
            values: places.iter().flat_map(row).copied().collect(),
            width: self.width,
            labels: places.iter().map(|&p| self.labels[p]).collect(),
            indices: indices.to_vec(),
        })
    }
}

/// Makes batches of [`Rows`].
pub struct RowLoader {
    rows: Arc<Rows>,
    options: LoaderOptions,
    steps: usize,
    order: Option<(u32, Vec<u32>)>,
    epoch: u32,
    step: usize,
    free: Vec<Batch>,
}

impl RowLoader {
    /// Starts at epoch 0, step 0. Augmentation in `options` is for images and does nothing here.
    ///
    /// # Errors
    /// [`Error::Input`]: a batch of 0, or one above the number of rows with `drop_last`.
    pub fn new(rows: Arc<Rows>, options: LoaderOptions) -> Result<RowLoader> {
        let n = rows.labels.len();
        let batch = options.batch.max(1);
        let steps = match options.drop_last {
            true => n / batch,
            false => n.div_ceil(batch),
        };
        if options.batch == 0 || steps == 0 {
            return Err(Error::input(format!(
                "batch size {}: give 1 to {n}, the number of images",
                options.batch
            )));
        }
        Ok(RowLoader {
            rows,
            options,
            steps,
            order: None,
            epoch: 0,
            step: 0,
            free: vec![],
        })
    }
}

impl Feed for RowLoader {
    fn steps_per_epoch(&self) -> usize {
        self.steps
    }

    fn skip_to(&mut self, epoch: u32, step: usize) -> Result<()> {
        (self.epoch, self.step) = (epoch, step);
        Ok(())
    }

    fn next_batch(&mut self) -> Result<Option<Batch>> {
        if self.step == self.steps {
            (self.epoch, self.step) = (self.epoch + 1, 0);
            return Ok(None);
        }
        let (rows, n, w) = (&self.rows, self.options.batch, self.rows.width);
        if self.order.as_ref().is_none_or(|o| o.0 != self.epoch) {
            self.order = Some((
                self.epoch,
                draw_order(&self.options, &rows.labels, self.epoch),
            ));
        }
        let order = &self.order.as_ref().expect("just made").1;
        let mut b = self.free.pop().unwrap_or_default();
        let taken = &order[self.step * n..order.len().min((self.step + 1) * n)];
        (b.epoch, b.step, b.valid) = (self.epoch, self.step, taken.len());
        b.images.clear();
        b.labels.clear();
        b.indices.clear();
        // Slots beyond the rows repeat earlier ones.
        for slot in 0..n {
            let i = taken[slot % taken.len()] as usize;
            b.images.extend(&rows.values[i * w..(i + 1) * w]);
            b.labels.push(rows.labels[i]);
            b.indices.push(rows.indices[i]);
        }
        self.step += 1;
        Ok(Some(b))
    }

    fn recycle(&mut self, batch: Batch) {
        self.free.push(batch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(n: u32) -> Arc<Rows> {
        Arc::new(Rows {
            values: (0..n).flat_map(|i| [i as f32, -(i as f32)]).collect(),
            width: 2,
            labels: (0..n).map(|i| i % 3).collect(),
            indices: (100..100 + n).collect(),
        })
    }

    #[test]
    fn rows_are_picked_by_the_index_of_their_image() {
        let picked = rows(10).pick(&[104, 101]).unwrap();
        let wanted = Rows {
            values: vec![4.0, -4.0, 1.0, -1.0],
            width: 2,
            labels: vec![1, 1],
            indices: vec![104, 101],
        };
        assert_eq!(picked, wanted);
        assert_eq!(rows(10).pick(&[104, 110]), None);
    }

    #[test]
    fn every_row_comes_once_an_epoch_and_a_place_can_be_gone_to() {
        let mut all = RowLoader::new(rows(10), LoaderOptions::train(3, 5)).unwrap();
        let mut epochs = vec![];
        for _ in 0..2 {
            let mut batches = vec![];
            while let Some(b) = all.next_batch().unwrap() {
                assert_eq!(b.images[0], (b.indices[0] - 100) as f32);
                assert_eq!(b.labels[2], (b.indices[2] - 100) % 3);
                batches.push(b);
            }
            let mut seen: Vec<u32> = batches.iter().flat_map(|b| b.indices.clone()).collect();
            seen.sort();
            seen.dedup();
            assert_eq!((batches.len(), seen.len()), (3, 9));
            epochs.push(batches);
        }
        assert_ne!(epochs[0], epochs[1]);
        let mut late = RowLoader::new(rows(10), LoaderOptions::train(3, 5)).unwrap();
        late.skip_to(1, 2).unwrap();
        assert_eq!(late.next_batch().unwrap().as_ref(), epochs[1].get(2));
        let mut eval = RowLoader::new(rows(10), LoaderOptions::eval(4)).unwrap();
        for _ in 0..2 {
            assert_eq!(eval.next_batch().unwrap().unwrap().valid, 4);
        }
        let last = eval.next_batch().unwrap().unwrap();
        assert_eq!((last.valid, last.indices), (2, vec![108, 109, 108, 109]));
        assert!(RowLoader::new(rows(2), LoaderOptions::train(3, 0)).is_err());
    }
}
