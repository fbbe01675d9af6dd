//! `eval`.

use super::global::Global;
use super::output::{json, print};
use super::source::{ModelArgs, PreprocessArgs, Source, positive, softmax};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;
use tilewright::backend::Backend;
use tilewright::data::{
    self, Batch, Feed, Images, Loader, LoaderOptions, OpenOptions, PrepareOptions, Preprocess, Sets,
};
use tilewright::models::session::Session;
use tilewright::models::{ModelOptions, info::info};
use tilewright::report::html::{Provenance, RunReport, Sample};
use tilewright::report::metrics::{EvalReport, Evaluation, Subject};
use tilewright::report::plot::{self, Family};
use tilewright::report::progress::Progress;
use tilewright::report::write_atomic;
use tilewright::{Error, Result};

/// Images shown in an HTML report.
const SAMPLES: usize = 40;

/// Accuracy, loss, per-class precision, recall and F1, and the confusion matrix on a data set.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright eval -m resnet20 -w resnet20.safetensors -d cifar10:data/cifar-10-batches-bin
  tilewright eval -w runs/digits -d digits --report eval.html --json")]
pub struct Eval {
    #[command(flatten)]
    source: ModelArgs,
    /// digits, synthetic[:CLASSESxSIZE], cifar10[:DIR], cifar100[:DIR], tiny-imagenet[:DIR], folder:DIR or
    /// shards:DIR|PATTERN
    #[arg(short, long, value_name = "DATA")]
    data: String,
    /// Which images
    #[arg(long, value_enum, default_value_t = Part::Test)]
    split: Part,
    /// Images in a batch [default: 128 up to 64 pixels, else 16]
    #[arg(long, value_name = "N", value_parser = positive)]
    batch_size: Option<usize>,
    /// Only this many images, evenly from all of them
    #[arg(long, value_name = "N", value_parser = positive)]
    limit: Option<usize>,
    /// Draw the confusion matrix into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    /// Write a page with the matrix, the classes and sample predictions
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Show every class, however many there are
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    preprocess: PreprocessArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Part {
    /// The test or validation images
    Test,
    /// The training images
    Train,
}

/// Refuses weights for another number of classes than the data has.
fn check_classes(source: &Source, sets: &Sets) -> Result<()> {
    let labels = sets.classes().len();
    match source.classes() {
        Some(n) if n != labels && n != 0 => Err(Error::input(format!(
            "{} with {} has {n} classes, the data set {} has {labels}: they cannot be compared",
            source.model.id,
            source.weights(),
            sets.spec
        ))),
        _ => Ok(()),
    }
}

/// Pixels of a normalised image, for showing.
fn shown(pixels: &[f32], p: &Preprocess) -> Vec<u8> {
    let byte = |(i, v): (usize, &f32)| (255.0 * (v * p.std[i % 3] + p.mean[i % 3])).round() as u8;
    pixels.iter().enumerate().map(byte).collect()
}

/// Sample predictions, evenly from the whole evaluation.
struct Samples<'a> {
    every: usize,
    seen: usize,
    names: &'a [String],
    preprocess: Preprocess,
    made: Vec<Sample>,
}

impl Samples<'_> {
    fn add(&mut self, batch: &Batch, logits: &[f32], classes: usize) -> Result<()> {
        let one = batch.images.len() / batch.labels.len();
        for i in 0..batch.valid {
            self.seen += 1;
            if !(self.seen - 1).is_multiple_of(self.every) {
                continue;
            }
            let p = softmax(&logits[i * classes..(i + 1) * classes]);
            let (class, confidence) =
                p.iter()
                    .enumerate()
                    .fold((0, f64::NEG_INFINITY), |best, (c, &v)| {
                        if v > best.1 { (c, v) } else { best }
                    });
            let label = batch.labels[i] as usize;
            let rgb = shown(&batch.images[i * one..(i + 1) * one], &self.preprocess);
            let side = self.preprocess.size;
            let (truth, predicted) = (&self.names[label], &self.names[class]);
            self.made.push(Sample::new(
                &rgb,
                side,
                side,
                truth,
                predicted,
                label == class,
                confidence,
            )?);
        }
        Ok(())
    }
}

/// Runs all images; the sums, and the seconds they took.
fn evaluate(
    session: &mut Session,
    images: Arc<Images>,
    mut samples: Option<&mut Samples>,
) -> Result<(Evaluation, f64)> {
    let classes = session.outputs();
    let mut evaluation = Evaluation::new(classes);
    let mut loader = Loader::new(images, LoaderOptions::eval(session.batch()))?;
    let mut progress = Progress::new("eval", loader.steps_per_epoch() as u64);
    let start = Instant::now();
    while let Some(batch) = loader.next_batch()? {
        let logits = session.run(&batch.images)?;
        evaluation.add(
            &logits[..batch.valid * classes],
            &batch.labels[..batch.valid],
        )?;
        if let Some(s) = samples.as_deref_mut() {
            s.add(&batch, &logits, classes)?;
        }
        progress.step(batch.valid as u64, evaluation.loss(), evaluation.top1());
        loader.recycle(batch);
    }
    progress.finish("");
    Ok((evaluation, start.elapsed().as_secs_f64()))
}

impl Eval {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        for path in [&self.plot, &self.report].into_iter().flatten() {
            super::tensors::check_writable(path)?;
        }
        let source = Source::open(g, &self.source)?;
        let sets = data::open(&self.data, OpenOptions { seed: g.seed })?;
        check_classes(&source, &sets)?;
        sets.notes.iter().for_each(|n| g.remark(n));
        let (split, part) = match self.split {
            Part::Test => (&sets.test, "test"),
            Part::Train => (&sets.train, "train"),
        };
        let split = self
            .limit
            .map_or_else(|| split.clone(), |n| split.spaced(n));
        let preprocess = source.preprocess(&self.preprocess, Some(&sets))?;
        g.remark(&format!(
            "input {} px, mean {:?}, std {:?}",
            preprocess.size, preprocess.mean, preprocess.std
        ));
        let usual = if preprocess.size <= 64 { 128 } else { 16 };
        let batch = self.batch_size.unwrap_or(usual).min(split.len().max(1));
        // The network first: it fails sooner than a large data set is decoded.
        let backend = g.open_backend()?;
        let classes = sets.classes().len();
        let mut session =
            source.session(backend.as_ref(), batch, preprocess.size, Some(classes))?;
        let images = Arc::new(Images::prepare(
            &split,
            preprocess,
            PrepareOptions::default(),
        )?);
        let mut samples = Samples {
            every: images.len().div_ceil(SAMPLES),
            seen: 0,
            names: sets.classes(),
            preprocess,
            made: vec![],
        };
        let wanted = self.report.is_some().then_some(&mut samples);
        let (evaluation, seconds) = evaluate(&mut session, images.clone(), wanted)?;
        let bad = images.bad();
        if let Some(first) = bad.first() {
            g.remark(&format!(
                "{} images could not be read and are left out: {} ...",
                bad.len(),
                first.message
            ));
        }
        let subject = Subject {
            model: source.model.id.clone(),
            data: format!("{} ({part})", sets.spec),
            backend: backend.name().into(),
        };
        let report = evaluation.finish(subject, sets.classes(), seconds)?;
        if let Some(path) = &self.plot {
            write_atomic(path, plot::confusion(&report)?.standalone().as_bytes())?;
            g.remark(&format!("confusion matrix: {}", path.display()));
        }
        if let Some(path) = &self.report {
            self.write_report(
                g,
                path,
                &source,
                backend.as_ref(),
                &report,
                &preprocess,
                samples.made,
            )?;
            g.remark(&format!("report: {}", path.display()));
        }
        match g.json {
            true => json(&report)?,
            false => print(&report.to_text(self.all))?,
        }
        Ok(ExitCode::SUCCESS)
    }

    #[allow(clippy::too_many_arguments)] // the parts of one page
    fn write_report(
        &self,
        g: &Global,
        path: &Path,
        source: &Source,
        backend: &dyn Backend,
        report: &EvalReport,
        preprocess: &Preprocess,
        samples: Vec<Sample>,
    ) -> Result<()> {
        let side = preprocess.size as usize;
        let options = ModelOptions {
            classes: Some(report.per_class.len()),
            ..ModelOptions::default()
        };
        let info = info(&source.model, 1, (side, side), &options)?;
        let config = format!(
            "model = {:?}\nweights = {:?}\ndata = {:?}\nbackend = {:?}\n\n[preprocess]\n{}",
            source.model.id,
            source.weights(),
            report.data,
            report.backend,
            toml::to_string(preprocess).map_err(|e| Error::run(e.to_string()))?
        );
        let words = std::env::args().map(|a| if a.contains(' ') { format!("'{a}'") } else { a });
        let page = RunReport {
            name: source.model.id.clone(),
            model: source.model.id.clone(),
            family: Family::of(&source.model.id),
            data: report.data.clone(),
            params: info.params as u64,
            flops: Some(info.flops),
            epochs: vec![],
            eval: Some(report.clone()),
            samples,
            config,
            command: words.collect::<Vec<_>>().join(" "),
            provenance: Provenance {
                version: env!("CARGO_PKG_VERSION").into(),
                commit: String::new(),
                device: format!("{}: {}", backend.name(), backend.device()),
                seed: g.seed,
                finished: String::new(),
            },
            notes: vec![],
        };
        write_atomic(path, page.to_html()?.as_bytes())
    }
}
