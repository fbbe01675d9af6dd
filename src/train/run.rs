//! One training run: build, step, evaluate, checkpoint, report.

use super::checkpoint::{Position, read_params, read_position, read_resume, write_resume};
use super::config::TrainConfig;
use super::evaluate::{Evaluator, Outcome};
use super::program::{Program, ProgramSpec};
use crate::backend::Backend;
use crate::data::{self, Images, Loader, LoaderOptions, OpenOptions, PerClass, Preprocess, Split};
use crate::graph::Phase;
use crate::models::session::options_for;
use crate::models::{self, Model, ModelOptions};
use crate::ops::loss::IGNORED;
use crate::report::html::{Provenance, RunReport, Sample};
use crate::report::metrics::Subject;
use crate::report::plot;
use crate::report::progress::Progress;
use crate::report::runlog::{EpochRow, EventLog, MetricsLog, StepEvent, read_metrics};
use crate::report::{remove_parts, write_atomic};
use crate::weights::registry::locate;
use crate::weights::{FloatFormat, WeightFile};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A checkpoint is written at least this often within an epoch.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);
/// Models made for images up to this size take the data's own size.
const SMALL: usize = 64;
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

/// The data of a run, at the network's size.
struct RunData {
    train: Arc<Images>,
    test: Arc<Images>,
    classes: Vec<String>,
    /// Images of each class in the training view.
    counts: Vec<usize>,
    notes: Vec<String>,
}

/// What is trained, resolved.
struct Job<'a> {
    config: &'a TrainConfig,
    model: Model,
    options: ModelOptions,
    size: usize,
    backend: &'a dyn Backend,
    init: Option<WeightFile>,
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
    let model = models::find(&config.model)?;
    let located = config
        .init
        .as_ref()
        .map(|p| locate(p.as_ref()))
        .transpose()?;
    let (init, record) = located.unzip();
    let init = init.map(WeightFile::open).transpose()?;
    let record = record.flatten();
    let sets = data::open(&config.data, OpenOptions { seed: config.seed })?;
    let size = match (config.image_size, sets.size) {
        (0, Some(s)) if model.image <= SMALL => s as usize,
        (0, _) => model.image,
        (s, _) => s,
    };
    let options = ModelOptions {
        classes: Some(sets.classes().len()),
        dropout: (config.dropout > 0.0).then_some(config.dropout),
        drop_path: config.drop_path,
        norm_eps: None,
        cls_mean: false,
    };
    let options = options_for(&options, init.as_ref(), config.replace_head);
    let preprocess = match (&init, record) {
        // Weights expect the input that they were trained on.
        (Some(_), Some(record)) => record.preprocess(size as u32),
        (Some(file), None) => {
            model.preprocess(crate::weights::Scheme::of(file).map(|s| s.naming), size)
        }
        (None, _) => sets.preprocess(size as u32),
    };
    let data = prepare(config, sets, preprocess)?;
    let job = Job {
        config,
        model,
        options,
        size,
        backend,
        init,
    };
    let mut program = job.compile(&data)?;
    let mut run = Run::open(config, place)?;
    if let Some((file, at)) = run.resumed.take() {
        read_resume(&file, program.exec.as_mut(), &program.update)?;
        run.at = at;
    }
    write_atomic(&run.dir.join("config.toml"), run.config.as_bytes())?;
    let batch = config.batch_size.min(data.test.len());
    let mut evaluator = Evaluator::new(job.backend, &job.model, &job.options, size, batch)?;
    let last = run.epochs(&job, &data, &mut program, &mut evaluator, stop)?;
    run.report(&job, place, &data, &program, last)
}

fn prepare(config: &TrainConfig, sets: data::Sets, preprocess: Preprocess) -> Result<RunData> {
    let mut train = sets.train;
    let mut test = sets.test;
    if config.val_share > 0.0 {
        (train, test) = train.split_off(config.val_share, config.seed)?;
    }
    if !config.subset.is_empty() {
        train = train.subset(config.subset.parse::<PerClass>()?, config.seed);
    }
    if config.long_tail > 0.0 {
        train = train.long_tail(config.long_tail, config.seed)?;
    }
    if config.step_imbalance > 0.0 {
        train = train.step_imbalance(config.step_imbalance, config.seed)?;
    }
    let limit = |s: Split, n: usize| if n > 0 { s.limit(n) } else { s };
    let (train, test) = (
        limit(train, config.limit_train),
        limit(test, config.limit_test),
    );
    let classes = train.classes().to_vec();
    let counts = train.counts();
    let train = Images::prepare(&train, preprocess, data::PrepareOptions::default())?;
    let test = Images::prepare(&test, preprocess, data::PrepareOptions::default())?;
    let mut notes = vec![];
    for (name, images) in [("training", &train), ("test", &test)] {
        let bad = images.bad();
        if let Some(first) = bad.first() {
            notes.push(format!(
                "{} {name} images could not be read and were left out, the first: {}",
                bad.len(),
                first.message
            ));
        }
    }
    Ok(RunData {
        train: Arc::new(train),
        test: Arc::new(test),
        classes,
        counts,
        notes,
    })
}

impl Job<'_> {
    /// The training graph on the backend, with its first weights.
    fn compile(&self, data: &RunData) -> Result<Program> {
        let class_weights = self
            .config
            .class_weights
            .then(|| inverse_frequency(&data.counts));
        Program::compile(
            self.backend,
            &ProgramSpec {
                config: self.config,
                model: &self.model,
                options: &self.options,
                size: self.size,
                init: self.init.as_ref(),
                fill: data.train.preprocess().black(),
                class_weights: class_weights.as_deref(),
            },
        )
    }

    /// What a weight file of this run says about itself, so that it can be used without its run directory.
    fn metadata(&self, data: &RunData) -> Result<BTreeMap<String, String>> {
        let p = data.test.preprocess();
        let json = |v: serde_json::Value| v.to_string();
        Ok(BTreeMap::from([
            ("tilewright.model".to_string(), self.model.id.clone()),
            ("tilewright.data".to_string(), self.config.data.clone()),
            ("tilewright.size".to_string(), p.size.to_string()),
            (
                "tilewright.mean".to_string(),
                json(serde_json::json!(p.mean)),
            ),
            ("tilewright.std".to_string(), json(serde_json::json!(p.std))),
            (
                "tilewright.classes".to_string(),
                json(serde_json::json!(data.classes)),
            ),
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

/// The state of a run between steps, and its files.
struct Run {
    dir: PathBuf,
    at: Position,
    /// Taken once the program is there to receive it.
    resumed: Option<(WeightFile, Position)>,
    metrics: MetricsLog,
    events: EventLog,
    config: String,
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
        } else if !place.resume && dir.join("metrics.csv").exists() {
            return Err(Error::input(format!(
                "{} holds a run already; go on with --resume, or name another directory",
                dir.display()
            )));
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
        })
    }

    fn save(&mut self, program: &mut Program) -> Result<()> {
        self.events.sync()?;
        let path = self.dir.join("checkpoints/resume.safetensors");
        write_resume(
            &path,
            program.exec.as_mut(),
            &program.update,
            &self.at,
            &self.config,
        )
    }

    /// Trains to the end and returns the last evaluation.
    fn epochs(
        &mut self,
        job: &Job,
        data: &RunData,
        program: &mut Program,
        evaluator: &mut Evaluator,
        stop: &AtomicBool,
    ) -> Result<Outcome> {
        let config = job.config;
        let mut options = LoaderOptions::train(config.batch_size, config.seed);
        options.augment = (!config.augment.is_none()).then_some(config.augment);
        let mut loader = Loader::new(data.train.clone(), options)?;
        let batches = (loader.steps_per_epoch() / config.accumulate * config.accumulate) as u64;
        if batches == 0 {
            return Err(Error::input(format!(
                "{} images make {} batches of {}, fewer than the {} of one update; lower --batch-size or --accumulate",
                data.train.len(),
                loader.steps_per_epoch(),
                config.batch_size,
                config.accumulate
            )));
        }
        let mut outcome = None;
        while self.at.epoch < config.epochs {
            loader.skip_to(self.at.epoch as u32, self.at.batch as usize)?;
            self.epoch(config, program, &mut loader, batches, stop)?;
            let clock = Instant::now();
            let values = read_params(program.exec.as_mut())?;
            evaluator.set_params(&values)?;
            let result = evaluator.run(data.test.clone(), "evaluating", Some(stop))?;
            let top1 = result.evaluation.top1();
            let row = self.row(config, batches, &result, clock.elapsed().as_secs_f64());
            eprintln!(
                "epoch {}/{}  train loss {:.4}  top-1 {:.2} %  |  test loss {:.4}  top-1 {:.2} %  |  {:.0} images/s",
                row.epoch,
                config.epochs,
                row.train_loss,
                row.train_top1,
                row.val_loss,
                row.val_top1,
                row.images_per_second
            );
            self.metrics.append(&row)?;
            let better = top1 > self.at.best || self.at.epoch == 0;
            let done = Position {
                epoch: self.at.epoch + 1,
                step: self.at.step,
                best: if better { top1 } else { self.at.best },
                train_seconds: self.at.train_seconds + self.at.seconds,
                ..Default::default()
            };
            self.at = done;
            let (graph, metadata) = (program.exec.graph().clone(), job.metadata(data)?);
            for name in std::iter::once("last").chain(better.then_some("best")) {
                let path = self.dir.join(format!("checkpoints/{name}.safetensors"));
                let steps = self.at.step as i64;
                program.names.save(
                    &path,
                    &graph,
                    values.clone(),
                    steps,
                    &metadata,
                    FloatFormat::F32,
                )?;
            }
            self.save(program)?;
            outcome = Some(result);
        }
        match outcome {
            Some(o) => Ok(o),
            // Resumed when all epochs were done: only the report is made again.
            None => {
                evaluator.set_params(&read_params(program.exec.as_mut())?)?;
                evaluator.run(data.test.clone(), "evaluating", Some(stop))
            }
        }
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

    /// The batches of the epoch under way that are left.
    fn epoch(
        &mut self,
        config: &TrainConfig,
        program: &mut Program,
        loader: &mut Loader,
        batches: u64,
        stop: &AtomicBool,
    ) -> Result<()> {
        let per_epoch = batches / config.accumulate as u64;
        let mut progress = Progress::new(
            &format!("epoch {}/{}", self.at.epoch + 1, config.epochs),
            batches - self.at.batch,
        );
        let mut saved = Instant::now();
        while self.at.batch < batches {
            let clock = Instant::now();
            let Some(mut batch) = loader.next_batch()? else {
                return Err(Error::run("the data ended before the epoch did"));
            };
            // Slots that only repeat an image (unreadable ones were left out) do not count.
            batch.labels[batch.valid..].fill(IGNORED);
            let exec = program.exec.as_mut();
            exec.write(program.input, &batch.images)?;
            exec.write_u32(program.labels, &batch.labels)?;
            if let Some(m) = program.affine {
                exec.write(m, bytemuck::cast_slice(&batch.affine))?;
            }
            let number = self.at.epoch * batches + self.at.batch;
            if let Some(rng) = program.rng {
                exec.write_u32(
                    rng,
                    &[
                        config.seed as u32,
                        (config.seed >> 32) as u32,
                        number as u32,
                        0,
                    ],
                )?;
            }
            let update = (self.at.batch + 1).is_multiple_of(config.accumulate as u64);
            let lr = config.lr_at(self.at.step, per_epoch);
            if update {
                exec.write(
                    program.update.hyper,
                    &program.update.hyper_values(self.at.step + 1, lr),
                )?;
                exec.run(&[Phase::Forward, Phase::Backward, Phase::Optimizer])?;
            } else {
                exec.run(&[Phase::Forward, Phase::Backward])?;
            }
            let loss = f64::from(exec.read(program.loss)?[0]);
            let logits = exec.read(program.logits)?;
            let classes = logits.len() / batch.labels.len();
            let right = count_right(&logits, &batch.labels[..batch.valid], classes);
            let norm = match program.update.norm.filter(|_| update) {
                Some(t) => Some(f64::from(exec.read(t)?[0])),
                None => None,
            };
            if !loss.is_finite() {
                return Err(Error::run(format!(
                    "the loss became {loss} at epoch {}, batch {}; the checkpoint before it is kept (try a lower --lr or --clip 1)",
                    self.at.epoch + 1,
                    self.at.batch + 1
                )));
            }
            let at = &mut self.at;
            at.batch += 1;
            at.loss_sum += loss;
            at.right += right as u64;
            at.images += batch.valid as u64;
            at.seconds += clock.elapsed().as_secs_f64();
            let top1 = 100.0 * right as f64 / batch.valid.max(1) as f64;
            if update {
                at.step += 1;
                let event = StepEvent {
                    step: at.step,
                    epoch: at.epoch + 1,
                    loss,
                    top1,
                    lr,
                    grad_norm: norm,
                    seconds: clock.elapsed().as_secs_f64(),
                };
                self.events.append(&event)?;
            }
            progress.step(
                batch.valid as u64,
                self.at.loss_sum / self.at.batch as f64,
                top1,
            );
            loader.recycle(batch);
            let stopped = stop.load(Ordering::Relaxed);
            if update && self.at.batch < batches && (stopped || saved.elapsed() > CHECKPOINT_EVERY)
            {
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

    fn report(
        self,
        job: &Job,
        place: &RunPlace,
        data: &RunData,
        program: &Program,
        last: Outcome,
    ) -> Result<RunReport> {
        let config = job.config;
        let subject = Subject {
            model: job.model.id.clone(),
            data: format!("{} (test)", config.data),
            backend: job.backend.name().into(),
        };
        let report = RunReport {
            name: job.model.id.clone(),
            model: job.model.id.clone(),
            family: plot::Family::of(&job.model.id),
            data: config.data.clone(),
            params: program.params as u64,
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
    let mut out = vec![];
    for i in chosen {
        let q = p[i];
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
