//! Batches, made by threads ahead of the step that takes them.
//!
//! What a batch holds depends on (seed, epoch, step) alone: any number of threads, and a run that is resumed in the
//! middle of an epoch, give the same batches bit for bit.

use super::augment::{Affine, Augment, IDENTITY};
use super::colour::Colour;
use super::images::Images;
use super::mix::Mix;
use super::random::{Use, shuffle, stream};
use super::shards::stream::{Lease, Stream};
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
    /// Another order, where classes come equally often: as many draws with replacement as there are images
    /// (`WeightedRandomSampler` by the inverse of the classes' counts).
    pub balanced: bool,
    /// Each image comes this often in an epoch, under another augmentation each time, and only one in so many images
    /// comes at all (repeated augmentation, Hoffer et al. 2020).
    pub repeats: u32,
    /// Draw an affine map and changes of colour for every sample.
    pub augment: Option<Augment>,
    /// Resample the images along their maps here, with this (normalised) colour beyond their edges; else the batch
    /// holds the maps, for the device.
    pub resample: Option<[f32; 3]>,
    /// Mix pairs of samples; needs `resample` where the geometry is augmented.
    pub mix: Option<Mix>,
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
            balanced: false,
            repeats: 1,
            augment: None,
            resample: None,
            mix: None,
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
            balanced: false,
            repeats: 1,
            augment: None,
            resample: None,
            mix: None,
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
    /// `[batch]`: where each output pixel lies in the input; empty without augmentation, and where it is done already.
    pub affine: Vec<Affine>,
    /// `[batch, classes]`: what each sample is made of, where samples are mixed; else empty. Zeros from `valid` on.
    pub targets: Vec<f32>,
}

/// Positions of the view in the order of `epoch`.
pub(crate) fn draw_order(options: &LoaderOptions, labels: &[u32], epoch: u32) -> Vec<u32> {
    let n = labels.len();
    let mut random = stream(options.seed, Use::Shuffle, epoch, 0);
    let mut order: Vec<u32> = if options.balanced {
        let mut classes: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (i, &l) in labels.iter().enumerate() {
            classes.entry(l).or_default().push(i as u32);
        }
        let classes: Vec<Vec<u32>> = classes.into_values().collect();
        let mut draw = || {
            let class = &classes[random.below(classes.len() as u32) as usize];
            class[random.below(class.len() as u32) as usize]
        };
        (0..n).map(|_| draw()).collect()
    } else {
        let mut order = (0..n as u32).collect::<Vec<_>>();
        if options.shuffle {
            shuffle(&mut order, &mut random);
        }
        order
    };
    let repeats = options.repeats.max(1) as usize;
    if repeats > 1 {
        order = order
            .iter()
            .flat_map(|&i| std::iter::repeat_n(i, repeats))
            .take(n)
            .collect();
    }
    order
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
    labels: Vec<u32>,
    /// Reads ahead, where the images lie in shards and come once an epoch.
    stream: Option<Stream>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// Batches in the order of a run: of images, or of features that were computed once.
pub trait Feed {
    /// Batches in an epoch.
    fn steps_per_epoch(&self) -> usize;

    /// Goes to a place in the run: the next batch is this one, and every later one as if none had been skipped.
    ///
    /// # Errors
    /// [`Error::Input`] where an epoch has fewer steps.
    fn skip_to(&mut self, epoch: u32, step: usize) -> Result<()>;

    /// The next batch of the epoch, or `None` at its end; the call after that begins the next epoch.
    ///
    /// # Errors
    /// [`Error::Input`] where too many images cannot be read.
    fn next_batch(&mut self) -> Result<Option<Batch>>;

    /// Gives a batch's buffers back for another one.
    fn recycle(&mut self, batch: Batch);
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
        let labels = images.split().labels();
        let once = !images.in_memory() && !options.balanced && options.repeats <= 1;
        let stream = match once {
            true => {
                let seed = options.shuffle.then_some(options.seed);
                Stream::new(images.split(), options.batch, seed)?
            }
            false => None,
        };
        let queue = Mutex::default();
        let shared = Arc::new(Shared {
            images,
            options,
            steps,
            levels,
            labels,
            stream,
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

    /// What the batches are made of.
    #[must_use]
    pub fn images(&self) -> &Arc<Images> {
        &self.shared.images
    }
}

impl Feed for Loader {
    fn steps_per_epoch(&self) -> usize {
        self.shared.steps
    }

    fn skip_to(&mut self, epoch: u32, step: usize) -> Result<()> {
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
        if let Some(stream) = &self.shared.stream {
            stream.reset();
        }
        drop(queue);
        self.ended = true;
        self.shared.changed.notify_all();
        Ok(())
    }

    fn next_batch(&mut self) -> Result<Option<Batch>> {
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

    fn recycle(&mut self, batch: Batch) {
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
            batch.epoch = epoch;
            batch.step = (number % self.steps as u64) as usize;
            let (lease, order) = match &self.stream {
                Some(stream) => {
                    let oldest = (queue.take / self.steps as u64) as u32;
                    let (lease, order) = stream.begin(epoch, batch.step, oldest);
                    (Some(lease), order)
                }
                None => (None, self.order(&mut queue, epoch)),
            };
            drop(queue);
            let made = match &mut scratch {
                // A panic here would leave the consumer waiting for ever: it gets an error instead.
                Ok(scratch) => std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    self.fill(&mut batch, &order, lease, scratch)
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
        while queue.orders.len() >= 2 {
            queue.orders.pop_first();
        }
        let order = Arc::new(draw_order(&self.options, &self.labels, epoch));
        queue.orders.insert(epoch, order.clone());
        order
    }

    fn fill(
        &self,
        batch: &mut Batch,
        order: &[u32],
        lease: Option<Lease>,
        scratch: &mut super::images::Scratch,
    ) -> Result<()> {
        let n = self.options.batch;
        let size = self.images.preprocess().size;
        let pixels = size as usize * size as usize * 3;
        batch.images.resize(n * pixels, 0.0);
        batch.labels.resize(n, 0);
        batch.indices.resize(n, 0);
        batch.affine.clear();
        batch.targets.clear();
        batch.valid = 0;
        let from = batch.step * n;
        let (seed, epoch) = (self.options.seed, batch.epoch);
        let here = &order[from..order.len().min(from + n)];
        for (place, &position) in (from..).zip(here) {
            let slot = batch.valid;
            let index = self.images.split().indices()[position as usize];
            let repetition = place as u32 % self.options.repeats.max(1);
            let drawn = self
                .options
                .augment
                .map(|a| a.draw(size, seed, epoch | repetition << 24, index));
            let out = &mut batch.images[slot * pixels..(slot + 1) * pixels];
            let read = match self.stream.as_ref().zip(lease) {
                Some((stream, lease)) => match stream.take(lease, position) {
                    None => return Err(Error::run("the batch is not wanted any more")),
                    bytes => bytes,
                },
                None => None,
            };
            let made = self
                .images
                .with_square_of(position as usize, read, scratch, |square| {
                    let mut coloured = vec![];
                    let mut square = square;
                    if let Some(d) = drawn.as_ref().filter(|d| !d.colours.is_empty()) {
                        coloured.extend_from_slice(square);
                        Colour::apply_all(&d.colours, &mut coloured, size as usize);
                        square = &coloured;
                    }
                    let (source, _) = square.as_chunks::<3>();
                    let (target, _) = out.as_chunks_mut::<3>();
                    for (o, s) in target.iter_mut().zip(source) {
                        *o = std::array::from_fn(|c| self.levels[c][usize::from(s[c])]);
                    }
                })?;
            if made.is_none() {
                continue;
            }
            if let Some(d) = &drawn {
                match self.options.resample {
                    Some(fill) if d.map != IDENTITY => {
                        let plain = out.to_vec();
                        crate::ops::augment::resample(&plain, &fill, size as usize, &d.map, out);
                    }
                    Some(_) => {}
                    None => batch.affine.push(d.map),
                }
                if let Some([left, top, w, h]) = d.erase {
                    for y in top..top + h {
                        let at = (y * size + left) as usize * 3;
                        out[at..at + w as usize * 3].fill(0.0);
                    }
                }
            }
            batch.labels[slot] = self.labels[position as usize];
            batch.indices[slot] = index;
            batch.valid += 1;
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
            if !batch.affine.is_empty() {
                batch.affine.push(batch.affine[of]);
            }
        }
        if let Some(mix) = &self.options.mix {
            mix.apply(batch, size as usize, seed);
        }
        Ok(())
    }
}
