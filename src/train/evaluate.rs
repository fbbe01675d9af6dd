//! Evaluation of a network on a split.

use crate::backend::{Backend, CompileOptions, Exec};
use crate::data::{Images, Loader, LoaderOptions};
use crate::graph::fuse::Purpose;
use crate::graph::{Mode, Phase, Tid, fuse};
use crate::models::{Model, ModelOptions};
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
}

/// What an evaluation gives.
pub struct Outcome {
    /// Sums of every metric.
    pub evaluation: Evaluation,
    /// By position in the view.
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
        let mut net = model.net(batch, (size, size), Mode::default(), options)?;
        let Some(logits) = net.heads.logits else {
            return Err(Error::input(format!(
                "{} has no classifier to evaluate",
                model.id
            )));
        };
        net.graph.keep(logits);
        let classes = net.graph.spec(logits).channels();
        fuse(&mut net.graph, Purpose::Inference)?;
        let exec = backend.compile(Arc::new(net.graph), &CompileOptions::default())?;
        Ok(Evaluator {
            exec,
            input: net.input,
            logits,
            batch,
            classes,
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

    /// Runs over all images.
    ///
    /// # Errors
    /// Too many unreadable images, a label out of range, or the device is lost; [`Error::Run`] when `stop` is set.
    pub fn run(
        &mut self,
        images: Arc<Images>,
        label: &str,
        stop: Option<&AtomicBool>,
    ) -> Result<Outcome> {
        let total = images.len();
        let mut loader = Loader::new(images, LoaderOptions::eval(self.batch))?;
        let mut evaluation = Evaluation::new(self.classes);
        let mut predictions = Vec::with_capacity(total);
        let mut progress = Progress::new(label, loader.steps_per_epoch() as u64);
        let start = Instant::now();
        while let Some(batch) = loader.next_batch()? {
            if stop.is_some_and(|s| s.load(Ordering::Relaxed)) {
                progress.finish("");
                return Err(Error::run("interrupted"));
            }
            self.exec.write(self.input, &batch.images)?;
            self.exec.run(&[Phase::Forward])?;
            let logits = self.exec.read(self.logits)?;
            let labels = &batch.labels[..batch.valid];
            let valid = &logits[..batch.valid * self.classes];
            evaluation.add(valid, labels)?;
            predictions.extend(
                valid
                    .chunks(self.classes)
                    .zip(labels)
                    .map(|(row, &l)| prediction(row, l)),
            );
            progress.step(batch.valid as u64, evaluation.loss(), evaluation.top1());
            loader.recycle(batch);
        }
        progress.finish("");
        Ok(Outcome {
            evaluation,
            predictions,
            seconds: start.elapsed().as_secs_f64(),
        })
    }
}

fn prediction(row: &[f32], label: u32) -> Prediction {
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
    }
}
