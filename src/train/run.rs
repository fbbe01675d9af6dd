//! One training run: build, step, evaluate, checkpoint, report.

use super::checkpoint::{Position, read_params, read_position, read_resume, write_resume};
use super::config::TrainConfig;
use super::diagnose::first_not_finite;
use super::evaluate::{Evaluator, Outcome, Subject as Evaluated};
use super::features::Frozen;
use super::program::{Program, ProgramSpec};
use super::setup::{RunData, Setup, open_data, prepare};
use super::teacher::Teacher;
use crate::backend::Backend;
use crate::data::{Batch, Feed, Images, LoaderOptions, Mix};
use crate::graph::Phase;
use crate::graph::train::Update;
use crate::models::head;
use crate::report::html::{Provenance, RunReport, Sample};
use crate::report::metrics::Subject;
use crate::report::plot;
use crate::report::progress::{Progress, say};
use crate::report::runlog::{EpochRow, EventLog, MetricsLog, StepEvent, read_metrics};
use crate::report::{remove_parts, write_atomic};
use crate::weights::WeightFile;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A checkpoint is written at least this often within an epoch.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);
/// Sample predictions in a report.
const SAMPLES: usize = 32;

/// Where a run lives and how it starts.
#[derive(Clone, Debug)]
pub struct RunPlace {
    /// The run directory.
    pub dir: PathBuf,
    /// Go on from its last checkpoint.
    pub resume: bool,
    /// The command line, for the report.
    pub command: String,
}

/// What is trained, resolved.
struct Job<'a> {
    setup: &'a Setup,
    data: &'a RunData,
    backend: &'a dyn Backend,
    class_weights: Option<Vec<f32>>,
    /// Train the classifier alone, on features.
    head_alone: bool,
}

/// Trains as `config` says in `place` and returns the report of the run.
///
/// # Errors
/// Bad settings, data or weights ([`Error::Input`]); a lost device, a full disk, a loss that is not finite or an
/// interruption ([`Error::Run`]). The run directory keeps the last good checkpoint.
pub fn train(
    config: &TrainConfig,
    backend: &dyn Backend,
    place: &RunPlace,
    stop: &AtomicBool,
) -> Result<RunReport> {
    config.check()?;
    if !place.resume && place.dir.join("metrics.csv").exists() {
        return Err(Error::input(format!(
            "{} holds a run already; go on with --resume, or name another directory",
            place.dir.display()
        )));
    }
    let sets = open_data(config)?;
    let (classes, side) = (sets.classes().len(), sets.size);
    let setup = Setup::new(config, classes, side, |size| sets.preprocess(size))?;
    let config = &setup.config;
    let head_alone = may_keep_features(&setup)?;
    let data = prepare(config, sets, setup.preprocess, !head_alone)?;
    let job = Job {
        setup: &setup,
        data: &data,
        backend,
        class_weights: config
            .class_weights
            .then(|| inverse_frequency(&data.counts)),
        head_alone,
    };
    let mut program = Program::compile(backend, &job.spec())?;
    setup.notes.iter().for_each(|n| say(n));
    let (all, trained) = program.params;
    say(&format!(
        "{}: {all} parameters, {trained} of them trained",
        setup.model.id
    ));
    if let Some(saving) = program.recomputed {
        say(&format!(
            "recomputation: activations take {:.1} MB in place of {:.1} MB, for {:.1} % more work in a step",
            saving.after as f64 / 1e6,
            saving.before as f64 / 1e6,
            100.0 * saving.flops as f64 / (3 * program.flops * config.batch_size as u64) as f64
        ));
    }
    let (train, test) = job.subjects(stop)?;
    let feed = train.feed(job.loader())?;
    let steps = feed.steps_per_epoch();
    let batches = (steps / config.accumulate * config.accumulate) as u64;
    if batches == 0 {
        return Err(Error::input(format!(
            "{} images make {steps} batches of {}, fewer than the {} of one update; lower --batch-size or --accumulate",
            train.len(),
            config.batch_size,
            config.accumulate
        )));
    }
    let batch = config.batch_size.min(test.len());
    let (model, options, size) = (&setup.model, &setup.options, setup.size);
    let mut parts = Parts {
        feed,
        batches,
        teacher: Teacher::open(config, backend, data.train.preprocess(), classes)?,
        evaluator: match head_alone {
            true => Evaluator::of_head(backend, model, options, size, batch)?,
            false => {
                Evaluator::new(backend, model, options, size, batch)?.flipped(config.test_flip)
            }
        },
        test,
    };
    let mut run = Run::open(config, place)?;
    if let Some((file, at)) = run.resumed.take() {
        read_resume(&file, program.exec.as_mut(), &program.update)?;
        if head_alone {
            run.best = read_best(&file, &mut program)?;
        }
        run.at = at;
    }
    write_atomic(&run.dir.join("config.toml"), run.config.as_bytes())?;
    let last = run.epochs(&job, &mut program, &mut parts, stop)?;
    run.report(&job, place, &program, last)
}

/// Whether the network before the classifier gives the same for an image every time, so that it need run only once.
pub(super) fn may_keep_features(setup: &Setup) -> Result<bool> {
    if !setup.config.frozen_and_same() {
        return Ok(false);
    }
    let mode = crate::graph::Mode {
        batch_stats: false,
        random: true,
    };
    let image = (setup.size, setup.size);
    let graph = setup.model.net(1, image, mode, &setup.options)?.graph;
    Ok(head::input_of(&graph).is_some_and(|from| !head::random_before(&graph, from)))
}

impl Job<'_> {
    fn config(&self) -> &TrainConfig {
        &self.setup.config
    }

    fn spec(&self) -> ProgramSpec<'_> {
        ProgramSpec {
            config: self.config(),
            model: &self.setup.model,
            options: &self.setup.options,
            size: self.setup.size,
            init: self.setup.init.as_ref(),
            thinned: self.setup.thinned.as_ref(),
            fill: self.data.train.preprocess().black(),
            class_weights: self.class_weights.as_deref(),
            head_alone: self.head_alone,
        }
    }

    /// What is trained on, and what is evaluated: images, or their features.
    fn subjects(&self, stop: &AtomicBool) -> Result<(Evaluated, Evaluated)> {
        let (train, test) = (&self.data.train, &self.data.test);
        if !self.head_alone {
            let images = |i: &std::sync::Arc<Images>| Evaluated::Images(i.clone());
            return Ok((images(train), images(test)));
        }
        let frozen = Frozen {
            backend: self.backend,
            model: &self.setup.model,
            options: &self.setup.options,
            weights: self.setup.init.as_ref(),
            thinned: self.setup.thinned.as_ref(),
            seed: self.config().seed,
        };
        let rows = |i, what| -> Result<Evaluated> {
            Ok(Evaluated::Rows(frozen.features(i, what, stop)?.into()))
        };
        Ok((rows(train, "training")?, rows(test, "test")?))
    }

    fn loader(&self) -> LoaderOptions {
        let c = self.config();
        let mut options = LoaderOptions::train(c.batch_size, c.seed);
        options.augment = (!c.augment.is_none()).then_some(c.augment);
        options.balanced = c.balanced;
        options.repeats = c.repeats;
        let spec = self.spec();
        // What happens to a sample's place is done there too, unless the device does it.
        options.resample = (!spec.moves_on_device()).then_some(spec.fill);
        options.mix = c.mixes().then_some(Mix {
            mixup: c.mixup,
            cutmix: c.cutmix,
            classes: self.data.classes.len(),
        });
        options
    }

    /// What a weight file of this run says about itself, so that it can be used without its run directory.
    fn metadata(&self) -> Result<BTreeMap<String, String>> {
        let p = self.data.test.preprocess();
        let json = |v: serde_json::Value| v.to_string();
        let of = |key: &str, value: String| (format!("tilewright.{key}"), value);
        Ok(BTreeMap::from([
            of("model", self.setup.model.id.clone()),
            of("data", self.config().data.clone()),
            of("size", p.size.to_string()),
            of("mean", json(serde_json::json!(p.mean))),
            of("std", json(serde_json::json!(p.std))),
            of("classes", json(serde_json::json!(self.data.classes))),
        ]))
    }
}

/// Weights by the inverse of each class's count, mean 1 over the classes that occur.
fn inverse_frequency(counts: &[usize]) -> Vec<f32> {
    let inverse: Vec<f64> = counts
        .iter()
        .map(|&c| if c > 0 { 1.0 / c as f64 } else { 0.0 })
        .collect();
    let mean =
        inverse.iter().sum::<f64>() / counts.iter().filter(|&&c| c > 0).count().max(1) as f64;
    inverse.iter().map(|v| (v / mean) as f32).collect()
}

/// What a run steps through, asks and is measured by.
struct Parts {
    feed: Box<dyn Feed>,
    /// Of an epoch, whole updates only.
    batches: u64,
    teacher: Option<Teacher>,
    evaluator: Evaluator,
    test: Evaluated,
}

/// The state of a run between steps, and its files.
struct Run {
    dir: PathBuf,
    at: Position,
    /// Taken once the program is there to receive it.
    resumed: Option<(WeightFile, Position)>,
    metrics: MetricsLog,
    events: EventLog,
    config: String,
    /// The classifier's best values, where it is trained alone: they go into files at the end, with the network.
    best: Option<Vec<Vec<f32>>>,
}

impl Run {
    fn open(config: &TrainConfig, place: &RunPlace) -> Result<Self> {
        let dir = place.dir.clone();
        let text = config.to_toml()?;
        let checkpoint = dir.join("checkpoints/resume.safetensors");
        let mut resumed = None;
        if place.resume && checkpoint.exists() {
            let file = WeightFile::open(&checkpoint)?;
            let (at, before) = read_position(&file)?;
            let before =
                TrainConfig::parse(&before).map_err(|e| e.context(checkpoint.display()))?;
            if (TrainConfig {
                epochs: config.epochs,
                ..before
            }) != *config
            {
                return Err(Error::input(format!(
                    "{} was made with another configuration; resume with the one in {}",
                    checkpoint.display(),
                    dir.join("config.toml").display()
                )));
            }
            resumed = Some((file, at));
        }
        for d in [&dir, &dir.join("checkpoints"), &dir.join("plots")] {
            std::fs::create_dir_all(d).map_err(|e| Error::writing(d, e))?;
            remove_parts(d)?;
        }
        let at = resumed.as_ref().map(|r| r.1.clone()).unwrap_or_default();
        let metrics = MetricsLog::open(&dir.join("metrics.csv"), at.epoch)?;
        let events = EventLog::open(&dir.join("events.jsonl"), at.step)?;
        Ok(Run {
            dir,
            at: Position::default(),
            resumed,
            metrics,
            events,
            config: text,
            best: None,
        })
    }

    fn save(&mut self, program: &mut Program) -> Result<()> {
        self.events.sync()?;
        let path = self.dir.join("checkpoints/resume.safetensors");
        write_resume(&path, program, &self.at, &self.config, self.best.as_deref())
    }

    fn done(&self, config: &TrainConfig) -> bool {
        self.at.epoch >= config.epochs || (config.patience > 0 && self.at.stale >= config.patience)
    }

    /// Trains to the end and returns the last evaluation.
    fn epochs(
        &mut self,
        job: &Job,
        program: &mut Program,
        parts: &mut Parts,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        let config = job.config();
        let batches = parts.batches;
        let mut outcome = None;
        while !self.done(config) {
            let (epoch, batch) = (self.at.epoch as u32, self.at.batch as usize);
            parts.feed.skip_to(epoch, batch)?;
            self.epoch(job, program, parts, stop)?;
            let clock = Instant::now();
            let values = program.values()?;
            if values.iter().flatten().any(|v| !v.is_finite()) {
                return Err(self.diverged(job, program, "a weight"));
            }
            parts.evaluator.set_params(&values)?;
            let result = parts.evaluator.run(&parts.test, "evaluating", Some(stop))?;
            let top1 = result.evaluation.top1();
            let row = self.row(config, batches, &result, clock.elapsed().as_secs_f64());
            say(&format!(
                "epoch {}/{}  train loss {:.4}  top-1 {:.2} %  |  test loss {:.4}  top-1 {:.2} %  |  {:.0} images/s",
                row.epoch,
                config.epochs,
                row.train_loss,
                row.train_top1,
                row.val_loss,
                row.val_top1,
                row.images_per_second
            ));
            self.metrics.append(&row)?;
            let better = top1 > self.at.best || self.at.epoch == 0;
            let done = Position {
                epoch: self.at.epoch + 1,
                step: self.at.step,
                best: if better { top1 } else { self.at.best },
                stale: if better { 0 } else { self.at.stale + 1 },
                train_seconds: self.at.train_seconds + self.at.seconds,
                ..Default::default()
            };
            self.at = done;
            if program.head_alone() {
                // The network around it would be written again each time: files come at the end.
                if better {
                    self.best = Some(values);
                }
            } else {
                for name in std::iter::once("last").chain(better.then_some("best")) {
                    self.write_weights(job, program, name, &values)?;
                }
            }
            self.save(program)?;
            outcome = Some(result);
        }
        if self.at.epoch < config.epochs {
            say(&format!(
                "no better top-1 for {} epochs: the run ends early",
                self.at.stale
            ));
        }
        let values = program.values()?;
        if program.head_alone() {
            self.write_weights(job, program, "last", &values)?;
            let best = self.best.take();
            self.write_weights(job, program, "best", best.as_ref().unwrap_or(&values))?;
            self.best = best;
        }
        match outcome {
            Some(o) => Ok(o),
            // Resumed when all epochs were done: only the report is made again.
            None => {
                parts.evaluator.set_params(&values)?;
                parts.evaluator.run(&parts.test, "evaluating", Some(stop))
            }
        }
    }

    fn write_weights(
        &self,
        job: &Job,
        program: &mut Program,
        name: &str,
        values: &[Vec<f32>],
    ) -> Result<()> {
        let path = self.dir.join(format!("checkpoints/{name}.safetensors"));
        program.save(&path, values, self.at.step, &job.metadata()?)
    }

    fn row(
        &self,
        config: &TrainConfig,
        batches: u64,
        result: &Outcome,
        evaluation: f64,
    ) -> EpochRow {
        let at = &self.at;
        EpochRow {
            epoch: at.epoch + 1,
            train_loss: at.loss_sum / batches as f64,
            train_top1: 100.0 * at.right as f64 / at.images.max(1) as f64,
            val_loss: result.evaluation.loss(),
            val_top1: result.evaluation.top1(),
            val_top5: result.evaluation.top5(),
            lr: config.lr_at(
                at.step.saturating_sub(1),
                batches / config.accumulate as u64,
            ),
            images_per_second: at.images as f64 / at.seconds.max(1e-9),
            seconds: at.seconds + evaluation,
        }
    }

    /// The error of a run that cannot go on because `what` is not finite.
    fn diverged(&self, job: &Job, program: &mut Program, what: &str) -> Error {
        let step = self.at.step + 1;
        let place = format!(
            "{what} is not finite at step {step} (epoch {}, batch {})",
            self.at.epoch + 1,
            self.at.batch + 1
        );
        let first = match first_not_finite(job.backend, &job.spec(), program, step) {
            Ok(found) => format!("the first value that is not is {found}"),
            Err(e) => format!("where the first such value is could not be found: {e}"),
        };
        let kept = if self.dir.join("checkpoints/resume.safetensors").exists() {
            format!(
                "The last good checkpoint is kept in {}.",
                self.dir.join("checkpoints").display()
            )
        } else {
            "No checkpoint had been written yet.".to_string()
        };
        Error::run(format!(
            "{place}; {first}.\n{kept} Try a lower --lr, --warmup-epochs or --clip 1."
        ))
    }

    /// The batches of the epoch under way that are left.
    fn epoch(
        &mut self,
        job: &Job,
        program: &mut Program,
        parts: &mut Parts,
        stop: &AtomicBool,
    ) -> Result<()> {
        let config = job.config();
        let batches = parts.batches;
        let per_epoch = batches / config.accumulate as u64;
        let mut progress = Progress::new(
            &format!("epoch {}/{}", self.at.epoch + 1, config.epochs),
            batches - self.at.batch,
        );
        let mut saved = Instant::now();
        while self.at.batch < batches {
            let clock = Instant::now();
            let Some(mut batch) = parts.feed.next_batch()? else {
                return Err(Error::run("the data ended before the epoch did"));
            };
            let said = match &mut parts.teacher {
                Some(t) => Some(t.ask(&batch.images)?),
                None => None,
            };
            let number = self.at.epoch * batches + self.at.batch;
            let seed = [config.seed as u32, (config.seed >> 32) as u32];
            let key = [seed[0], seed[1], number as u32, 0];
            program.feed(&mut batch, key, said.as_ref())?;
            let update = (self.at.batch + 1).is_multiple_of(config.accumulate as u64);
            let lr = config.lr_at(self.at.step, per_epoch);
            let done = self.step(job, program, &batch, lr, update)?;
            let at = &mut self.at;
            at.batch += 1;
            at.loss_sum += done.loss;
            at.right += done.right as u64;
            at.images += batch.valid as u64;
            at.seconds += clock.elapsed().as_secs_f64();
            let top1 = 100.0 * done.right as f64 / batch.valid.max(1) as f64;
            if update {
                at.step += 1;
                let event = StepEvent {
                    step: at.step,
                    epoch: at.epoch + 1,
                    loss: done.loss,
                    top1,
                    lr,
                    grad_norm: done.norm,
                    seconds: clock.elapsed().as_secs_f64(),
                };
                self.events.append(&event)?;
            }
            progress.step(
                batch.valid as u64,
                self.at.loss_sum / self.at.batch as f64,
                top1,
            );
            parts.feed.recycle(batch);
            let stopped = stop.load(Ordering::Relaxed);
            if update && self.at.batch < batches && (stopped || saved.elapsed() > CHECKPOINT_EVERY)
            {
                if read_params(program.exec.as_mut())?
                    .iter()
                    .flatten()
                    .any(|v| !v.is_finite())
                {
                    return Err(self.diverged(job, program, "a weight"));
                }
                self.save(program)?;
                saved = Instant::now();
            }
            if stopped && (update || self.at.batch >= batches) {
                progress.finish("");
                return Err(Error::run(format!(
                    "interrupted in epoch {}; go on with: tilewright train --resume {}",
                    self.at.epoch + 1,
                    self.dir.display()
                )));
            }
        }
        progress.finish("");
        Ok(())
    }

    /// Forward, and where the loss is finite backward and the update. (A weight that an update made worse is found by
    /// the next forward pass, before another update.)
    fn step(
        &self,
        job: &Job,
        program: &mut Program,
        batch: &Batch,
        lr: f64,
        update: bool,
    ) -> Result<Done> {
        program.exec.run(&[Phase::Forward])?;
        let loss = f64::from(program.exec.read(program.loss)?[0]);
        if !loss.is_finite() {
            return Err(self.diverged(job, program, &format!("the loss ({loss})")));
        }
        let logits = program.exec.read(program.logits)?;
        let right = count_right(
            &logits,
            &batch.labels[..batch.valid],
            logits.len() / batch.labels.len(),
        );
        if !update {
            program.exec.run(&[Phase::Backward])?;
            let norm = None;
            return Ok(Done { loss, right, norm });
        }
        let number = self.at.step + 1;
        let hyper = program.update.hyper_values(number, lr);
        program.exec.write(program.update.hyper, &hyper)?;
        if let Some(ema) = program.update.ema {
            let values = Update::ema_values(job.config().ema, number);
            program.exec.write(ema, &values)?;
        }
        program.exec.run(&[Phase::Backward, Phase::Optimizer])?;
        let norm = match program.update.norm {
            Some(t) => Some(f64::from(program.exec.read(t)?[0])),
            None => None,
        };
        Ok(Done { loss, right, norm })
    }

    fn report(
        self,
        job: &Job,
        place: &RunPlace,
        program: &Program,
        last: Outcome,
    ) -> Result<RunReport> {
        let (config, data, model) = (job.config(), job.data, &job.setup.model);
        let subject = Subject {
            model: model.id.clone(),
            data: format!("{} (test)", config.data),
            backend: job.backend.name().into(),
        };
        let report = RunReport {
            name: model.id.clone(),
            model: model.id.clone(),
            family: plot::Family::of(&model.id),
            data: config.data.clone(),
            params: program.params.0 as u64,
            flops: Some(program.flops),
            epochs: read_metrics(&self.dir.join("metrics.csv"))?,
            samples: samples(&data.test, &last, &data.classes)?,
            eval: Some(
                last.evaluation
                    .finish(subject, &data.classes, last.seconds)?,
            ),
            config: self.config.clone(),
            command: place.command.clone(),
            provenance: provenance(job.backend, config.seed),
            notes: data.notes.clone(),
        };
        write_atomic(&self.dir.join("report.html"), report.to_html()?.as_bytes())?;
        for (name, svg) in report.plots()? {
            write_atomic(&self.dir.join("plots").join(name), svg.as_bytes())?;
        }
        if let Some(e) = &report.eval {
            let json = serde_json::to_vec_pretty(e).map_err(|e| Error::run(e.to_string()))?;
            write_atomic(&self.dir.join("eval.json"), &json)?;
        }
        Ok(report)
    }
}

/// What came of a batch.
struct Done {
    loss: f64,
    right: usize,
    norm: Option<f64>,
}

/// The best values of a classifier that is trained alone, from a file of [`write_resume`].
fn read_best(file: &WeightFile, program: &mut Program) -> Result<Option<Vec<Vec<f32>>>> {
    let graph = program.exec.graph();
    let names: Vec<String> = graph
        .params
        .iter()
        .map(|p| format!("best/{}", p.name))
        .collect();
    if !names.iter().all(|n| file.has(n)) {
        return Ok(None);
    }
    names
        .iter()
        .map(|n| file.read_f32(n))
        .collect::<Result<_>>()
        .map(Some)
}

/// Rows of `[rows, classes]` logits whose largest is at the label. NaN is never right.
fn count_right(logits: &[f32], labels: &[u32], classes: usize) -> usize {
    let right = |(row, &label): (&[f32], &u32)| {
        let Some(&own) = row.get(label as usize) else {
            return false;
        };
        row.iter()
            .enumerate()
            .all(|(i, &v)| v < own || (v == own && i >= label as usize))
    };
    logits
        .chunks(classes)
        .zip(labels)
        .filter(|&r| right(r))
        .count()
}

/// Predictions to look at: the most confident mistakes first, then right ones.
fn samples(images: &Images, outcome: &Outcome, classes: &[String]) -> Result<Vec<Sample>> {
    let mut order: Vec<usize> = (0..outcome.predictions.len()).collect();
    let p = &outcome.predictions;
    order.sort_by(|&a, &b| {
        let key = |i: usize| (p[i].class == p[i].label, -p[i].probability);
        key(a)
            .partial_cmp(&key(b))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let wrong = order
        .iter()
        .take_while(|&&i| p[i].class != p[i].label)
        .count();
    let mistakes = order.iter().take(wrong.min(SAMPLES / 2));
    // Right ones by position, not by confidence: a fair look.
    let right = (0..p.len()).filter(|&i| p[i].class == p[i].label);
    let chosen: Vec<usize> = mistakes.copied().chain(right).take(SAMPLES).collect();
    let side = images.preprocess().size;
    let name = |c: u32| classes.get(c as usize).map_or("?", String::as_str);
    let mut scratch = images.scratch()?;
    // An image that could not be read has no prediction: places differ.
    let place: HashMap<u32, usize> = images
        .split()
        .indices()
        .iter()
        .enumerate()
        .map(|(at, &i)| (i, at))
        .collect();
    let mut out = vec![];
    for q in chosen.into_iter().map(|i| p[i]) {
        let Some(&i) = place.get(&q.index) else {
            continue;
        };
        let right = q.class == q.label;
        let made = images.with_square(i, &mut scratch, |rgb| {
            Sample::new(
                rgb,
                side,
                side,
                name(q.label),
                name(q.class),
                right,
                f64::from(q.probability),
            )
        })?;
        out.extend(made.transpose()?);
    }
    Ok(out)
}

/// Version, commit, device and seed of what is done now.
pub fn provenance(backend: &dyn Backend, seed: u64) -> Provenance {
    Provenance {
        version: env!("CARGO_PKG_VERSION").into(),
        commit: option_env!("TILEWRIGHT_COMMIT").unwrap_or_default().into(),
        device: format!("{}: {}", backend.name(), backend.device()),
        seed,
        finished: humantime::format_rfc3339_seconds(std::time::SystemTime::now()).to_string(),
    }
}
