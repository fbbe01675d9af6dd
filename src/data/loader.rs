//! Batches, made by threads ahead of the step that takes them.
//!
//! What a batch holds depends on (seed, epoch, step) alone: any number of threads, and a run that is resumed in the
//! middle of an epoch, give the same batches bit for bit.

use super::augment::{Affine, Augment};
use super::images::Images;
use super::random::{Use, shuffle, stream};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// How a loader walks its images.
#[derive(Debug, Clone, Copy)]
pub struct LoaderOptions {
    /// Images in a batch.
    pub batch: usize,
    /// Another order in every epoch, drawn from (seed, epoch); else view order.
    pub shuffle: bool,
    /// Leave out the last, short batch (else it is padded).
    pub drop_last: bool,
    /// Of the order and of the augmentation.
    pub seed: u64,
    /// Draw an affine map for every sample.
    pub augment: Option<Augment>,
    /// Threads that make batches; 0: one for images in memory, else as many as the machine has cores.
    pub threads: usize,
    /// Batches made ahead.
    pub ahead: usize,
}

impl LoaderOptions {
    /// For training: shuffled, whole batches only.
    #[must_use]
    pub fn train(batch: usize, seed: u64) -> Self {
        LoaderOptions {
            batch,
            shuffle: true,
            drop_last: true,
            seed,
            augment: None,
            threads: 0,
            ahead: 3,
        }
    }

    /// For evaluation: in order, every image once.
    #[must_use]
    pub fn eval(batch: usize) -> Self {
        LoaderOptions {
            batch,
            shuffle: false,
            drop_last: false,
            seed: 0,
            augment: None,
            threads: 0,
            ahead: 3,
        }
    }
}

/// A batch of a fixed shape. Slots from `valid` on repeat earlier ones, so that a static graph can run on them; an
/// evaluation counts the first `valid` only.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Counts from 0.
    pub epoch: u32,
    /// Counts from 0 within the epoch.
    pub step: usize,
    /// Slots that hold an image of their own.
    pub valid: usize,
    /// `[batch, size, size, 3]`, normalised.
    pub images: Vec<f32>,
    /// `[batch]`
    pub labels: Vec<u32>,
    /// `[batch]`: index of each image in the data set's split (see [`super::Split::indices`]).
    pub indices: Vec<u32>,
    /// `[batch]`: where each output pixel lies in the input; empty without augmentation.
    pub affine: Vec<Affine>,
}

#[derive(Default)]
struct Queue {
    /// The batch that the next free thread makes, counted over all epochs.
    next: u64,
    /// The batch that the consumer takes next.
    take: u64,
    ready: BTreeMap<u64, Result<Batch>>,
    free: Vec<Batch>,
    /// Counts jumps: what was begun before one is thrown away.
    generation: u64,
    orders: BTreeMap<u32, Arc<Vec<u32>>>,
    stop: bool,
}

struct Shared {
    images: Arc<Images>,
    options: LoaderOptions,
    steps: usize,
    levels: [[f32; 256]; 3],
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Makes batches on threads of its own; dropping it ends them.
pub struct Loader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Whether the last epoch's end has been told.
    ended: bool,
}

impl Loader {
    /// Starts at epoch 0, step 0.
    ///
    /// # Errors
    /// [`Error::Input`]: a batch of 0, one above the number of images with `drop_last`, or a bad augmentation.
    pub fn new(images: Arc<Images>, options: LoaderOptions) -> Result<Loader> {
        let n = images.len();
        if options.batch == 0 || options.batch > 1 << 20 {
            return Err(Error::input(format!(
                "batch size {}: give 1 or more",
                options.batch
            )));
        }
        let steps = if options.drop_last {
            n / options.batch
        } else {
            n.div_ceil(options.batch)
        };
        if steps == 0 {
            return Err(Error::input(format!(
                "batch size {} is more than the {n} images there are: give a smaller one",
                options.batch
            )));
        }
        if let Some(augment) = &options.augment {
            augment.check()?;
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let count = match options.threads {
            0 if images.in_memory() => 1,
            0 => cores,
            t => t.min(64),
        };
        let levels = images.preprocess().levels();
        let queue = Mutex::default();
        let shared = Arc::new(Shared {
            images,
            options,
            steps,
            levels,
            queue,
            changed: Condvar::new(),
        });
        let mut loader = Loader {
            shared,
            threads: Vec::new(),
            ended: true,
        };
        for i in 0..count {
            let shared = loader.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("loader-{i}"))
                .spawn(move || shared.work())
                .map_err(|e| Error::run(format!("cannot start a loader thread: {e}")))?;
            loader.threads.push(thread);
        }
        Ok(loader)
    }

    /// Batches in an epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> usize {
        self.shared.steps
    }

    /// What the batches are made of.
    #[must_use]
    pub fn images(&self) -> &Arc<Images> {
        &self.shared.images
    }

    /// Goes to a place in the run: the next batch is this one, and every later one as if none had been skipped.
    ///
    /// # Errors
    /// [`Error::Input`] where an epoch has fewer steps.
    pub fn skip_to(&mut self, epoch: u32, step: usize) -> Result<()> {
        // A checkpoint written after an epoch's last step names step `steps`: the start of the next one.
        if step > self.shared.steps {
            return Err(Error::input(format!(
                "step {step} of an epoch that has {}",
                self.shared.steps
            )));
        }
        let mut queue = self.shared.lock();
        queue.generation += 1;
        queue.take = u64::from(epoch) * self.shared.steps as u64 + step as u64;
        queue.next = queue.take;
        let dropped = std::mem::take(&mut queue.ready);
        queue.free.extend(dropped.into_values().flatten());
        drop(queue);
        self.ended = true;
        self.shared.changed.notify_all();
        Ok(())
    }

    /// The next batch of the epoch, or `None` at its end; the call after that begins the next epoch, whose first
    /// batches are being made already.
    ///
    /// # Errors
    /// [`Error::Input`] where too many images cannot be read.
    pub fn next_batch(&mut self) -> Result<Option<Batch>> {
        let mut queue = self.shared.lock();
        if queue.take.is_multiple_of(self.shared.steps as u64) && !self.ended {
            self.ended = true;
            return Ok(None);
        }
        loop {
            let take = queue.take;
            if let Some(batch) = queue.ready.remove(&take) {
                queue.take += 1;
                drop(queue);
                self.ended = false;
                self.shared.changed.notify_all();
                return batch.map(Some);
            }
            queue = self
                .shared
                .changed
                .wait(queue)
                .unwrap_or_else(|e| e.into_inner());
        }
    }

    /// Gives a batch's buffers back for another one.
    pub fn recycle(&mut self, batch: Batch) {
        self.shared.lock().free.push(batch);
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so; there is nothing left to do for it.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// A thread: claim the next batch, make it, put it down, until told to stop.
    fn work(&self) {
        let mut scratch = self.images.scratch();
        let mut queue = self.lock();
        loop {
            while !queue.stop && queue.next >= queue.take + self.options.ahead.max(1) as u64 {
                queue = self.changed.wait(queue).unwrap_or_else(|e| e.into_inner());
            }
            if queue.stop {
                return;
            }
            let (number, generation) = (queue.next, queue.generation);
            queue.next += 1;
            let mut batch = queue.free.pop().unwrap_or_default();
            let epoch = (number / self.steps as u64) as u32;
            let order = self.order(&mut queue, epoch);
            drop(queue);
            batch.epoch = epoch;
            batch.step = (number % self.steps as u64) as usize;
            let made = match &mut scratch {
                // A panic here would leave the consumer waiting for ever: it gets an error instead.
                Ok(scratch) => std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    self.fill(&mut batch, &order, scratch)
                }))
                .unwrap_or_else(|_| {
                    Err(Error::run(
                        "a loader thread failed; this is a defect, please report it",
                    ))
                }),
                Err(e) => Err(Error::run(e.to_string())),
            };
            queue = self.lock();
            if queue.generation == generation {
                queue.ready.insert(number, made.map(|()| batch));
                self.changed.notify_all();
            } else {
                queue.free.push(batch);
            }
        }
    }

    /// Positions of the view in the order of `epoch`; kept for the epochs that are in flight.
    fn order(&self, queue: &mut Queue, epoch: u32) -> Arc<Vec<u32>> {
        if let Some(order) = queue.orders.get(&epoch) {
            return order.clone();
        }
        let mut order: Vec<u32> = (0..self.images.len() as u32).collect();
        if self.options.shuffle {
            shuffle(
                &mut order,
                &mut stream(self.options.seed, Use::Shuffle, epoch, 0),
            );
        }
        while queue.orders.len() >= 2 {
            queue.orders.pop_first();
        }
        let order = Arc::new(order);
        queue.orders.insert(epoch, order.clone());
        order
    }

    fn fill(
        &self,
        batch: &mut Batch,
        order: &[u32],
        scratch: &mut super::images::Scratch,
    ) -> Result<()> {
        let n = self.options.batch;
        let size = self.images.preprocess().size;
        let pixels = size as usize * size as usize * 3;
        batch.images.resize(n * pixels, 0.0);
        batch.labels.resize(n, 0);
        batch.indices.resize(n, 0);
        batch.affine.clear();
        batch.valid = 0;
        let from = batch.step * n;
        for &position in &order[from..order.len().min(from + n)] {
            let slot = batch.valid;
            let out = &mut batch.images[slot * pixels..(slot + 1) * pixels];
            let made = self
                .images
                .with_square(position as usize, scratch, |square| {
                    let (source, _) = square.as_chunks::<3>();
                    let (target, _) = out.as_chunks_mut::<3>();
                    for (o, s) in target.iter_mut().zip(source) {
                        *o = std::array::from_fn(|c| self.levels[c][usize::from(s[c])]);
                    }
                })?;
            if made.is_some() {
                batch.labels[slot] = self.images.split().label(position as usize);
                batch.indices[slot] = self.images.split().indices()[position as usize];
                batch.valid += 1;
            }
        }
        if batch.valid == 0 {
            return Err(Error::input(format!(
                "none of the images of batch {} can be read",
                batch.step
            )));
        }
        for slot in batch.valid..n {
            let of = slot % batch.valid;
            batch
                .images
                .copy_within(of * pixels..(of + 1) * pixels, slot * pixels);
            batch.labels[slot] = batch.labels[of];
            batch.indices[slot] = batch.indices[of];
        }
        if let Some(augment) = &self.options.augment {
            let (seed, epoch) = (self.options.seed, batch.epoch);
            batch.affine.extend(
                batch
                    .indices
                    .iter()
                    .map(|&i| augment.affine(size, seed, epoch, i)),
            );
        }
        Ok(())
    }
}
