//! Evaluation of a network on a split.

use crate::backend::{Backend, CompileOptions, Exec};
use crate::data::{Batch, Feed, Images, Loader, LoaderOptions, RowLoader, Rows};
use crate::graph::fuse::Purpose;
use crate::graph::{Mode, Phase, Tid, fuse};
use crate::models::{Model, ModelOptions, head};
use crate::report::metrics::Evaluation;
use crate::report::progress::Progress;
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// A network compiled for inference at one batch size.
pub struct Evaluator {
    exec: Box<dyn Exec>,
    input: Tid,
    logits: Tid,
    batch: usize,
    classes: usize,
    flip: bool,
}

/// What is evaluated.
#[derive(Clone)]
pub enum Subject {
    /// Images, by the whole network.
    Images(Arc<Images>),
    /// Features of images, by the classifier alone.
    Rows(Arc<Rows>),
}

impl Subject {
    /// Images.
    pub fn len(&self) -> usize {
        match self {
            Subject::Images(i) => i.len(),
            Subject::Rows(r) => r.labels.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Batches of it.
    ///
    /// # Errors
    /// As [`Loader::new`].
    pub fn feed(&self, options: LoaderOptions) -> Result<Box<dyn Feed>> {
        Ok(match self {
            Subject::Images(i) => Box::new(Loader::new(i.clone(), options)?),
            Subject::Rows(r) => Box::new(RowLoader::new(r.clone(), options)?),
        })
    }
}

/// The prediction for one image.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Prediction {
    /// Class with the largest logit.
    pub class: u32,
    /// Its softmax probability.
    pub probability: f32,
    /// True class.
    pub label: u32,
    /// Index of the image in its split.
    pub index: u32,
}

/// What an evaluation gives.
pub struct Outcome {
    /// Sums of every metric.
    pub evaluation: Evaluation,
    /// In the view's order.
    pub predictions: Vec<Prediction>,
    /// Wall time, data included.
    pub seconds: f64,
}

impl Evaluator {
    /// Compiles `model` for batches of `batch` images of `size` pixels.
    ///
    /// # Errors
    /// The model does not take that size or has no classifier, or the backend cannot run it.
    pub fn new(
        backend: &dyn Backend,
        model: &Model,
        options: &ModelOptions,
        size: usize,
        batch: usize,
    ) -> Result<Self> {
        Self::compile(backend, model, options, size, batch, false)
    }

    /// [`new`](Self::new) for the classifier alone, over the features that it reads.
    ///
    /// # Errors
    /// As [`new`](Self::new), or the model has not one classifier.
    pub fn of_head(
        backend: &dyn Backend,
        model: &Model,
        options: &ModelOptions,
        size: usize,
        batch: usize,
    ) -> Result<Self> {
        Self::compile(backend, model, options, size, batch, true)
    }

    /// Evaluate the mean of the logits of each image and its mirror image.
    pub fn flipped(self, flip: bool) -> Self {
        Evaluator { flip, ..self }
    }

    fn compile(
        backend: &dyn Backend,
        model: &Model,
        options: &ModelOptions,
        size: usize,
        batch: usize,
        head_alone: bool,
    ) -> Result<Self> {
        let mut net = model.net(batch, (size, size), Mode::default(), options)?;
        let Some(logits) = net.heads.logits else {
            return Err(Error::input(format!(
                "{} has no classifier to evaluate",
                model.id
            )));
        };
        net.graph.keep(logits);
        let classes = net.graph.spec(logits).channels();
        if head_alone {
            let from = head::input_of(&net.graph);
            let from =
                from.ok_or_else(|| Error::run(format!("{} has not one classifier", model.id)))?;
            net.input = head::keep_after(&mut net.graph, from)?;
        }
        fuse(&mut net.graph, Purpose::Inference)?;
        let exec = backend.compile(Arc::new(net.graph), &CompileOptions::default())?;
        Ok(Evaluator {
            exec,
            input: net.input,
            logits,
            batch,
            classes,
            flip: false,
        })
    }

    /// Sets every parameter and running statistic, in the graph's order.
    ///
    /// # Errors
    /// The device is lost.
    pub fn set_params(&mut self, values: &[Vec<f32>]) -> Result<()> {
        let params: Vec<Tid> = self.exec.graph().params.iter().map(|p| p.tid).collect();
        for (t, v) in params.into_iter().zip(values) {
            // A parameter that only training uses has no memory here.
            if self.exec.memory().place(t).is_some() {
                self.exec.write(t, v)?;
            }
        }
        self.exec.run(&[Phase::Prepare])
    }

    /// Runs over all of `subject`.
    ///
    /// # Errors
    /// Too many unreadable images, a label out of range, or the device is lost; [`Error::Run`] when `stop` is set.
    pub fn run(
        &mut self,
        subject: &Subject,
        label: &str,
        stop: Option<&AtomicBool>,
    ) -> Result<Outcome> {
        let total = subject.len();
        let mut feed = subject.feed(LoaderOptions::eval(self.batch))?;
        let mut evaluation = Evaluation::new(self.classes);
        let mut predictions = Vec::with_capacity(total);
        let mut progress = Progress::new(label, feed.steps_per_epoch() as u64);
        let start = Instant::now();
        while let Some(batch) = feed.next_batch()? {
            if stop.is_some_and(|s| s.load(Ordering::Relaxed)) {
                progress.finish("");
                return Err(Error::run("interrupted"));
            }
            let logits = self.logits(&batch)?;
            let labels = &batch.labels[..batch.valid];
            let valid = &logits[..batch.valid * self.classes];
            evaluation.add(valid, labels)?;
            predictions.extend(
                valid
                    .chunks(self.classes)
                    .zip(labels.iter().zip(&batch.indices))
                    .map(|(row, (&l, &i))| prediction(row, l, i)),
            );
            progress.step(batch.valid as u64, evaluation.loss(), evaluation.top1());
            feed.recycle(batch);
        }
        progress.finish("");
        Ok(Outcome {
            evaluation,
            predictions,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        self.exec.write(self.input, &batch.images)?;
        self.exec.run(&[Phase::Forward])?;
        let mut logits = self.exec.read(self.logits)?;
        let &[_, _, width, channels] = self.exec.graph().shape(self.input) else {
            return Ok(logits);
        };
        if self.flip {
            let mut mirrored = Vec::with_capacity(batch.images.len());
            for row in batch.images.chunks_exact(width * channels) {
                mirrored.extend(row.chunks_exact(channels).rev().flatten());
            }
            self.exec.write(self.input, &mirrored)?;
            self.exec.run(&[Phase::Forward])?;
            let other = self.exec.read(self.logits)?;
            for (a, b) in logits.iter_mut().zip(other) {
                *a = 0.5 * (*a + b);
            }
        }
        Ok(logits)
    }
}

fn prediction(row: &[f32], label: u32, index: u32) -> Prediction {
    let (class, top) = row
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (i, &v)| {
            if v > best.1 { (i, v) } else { best }
        });
    let sum: f32 = row.iter().map(|v| (v - top).exp()).sum();
    Prediction {
        class: class as u32,
        probability: 1.0 / sum,
        label,
        index,
    }
}
