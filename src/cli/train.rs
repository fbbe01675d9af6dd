//! `train`: from images to a run directory, and several models side by side in one report.

use super::global::Global;
use super::output::{json, note, print};
use clap::Args;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::report::html::{CompareReport, RunReport};
use tilewright::report::write_atomic;
use tilewright::train::TrainConfig;
use tilewright::train::config::{OptimizerName, Schedule};
use tilewright::train::dry::plan;
use tilewright::train::run::{RunPlace, train};
use tilewright::train::setup::model_name;
use tilewright::{Error, Result};

/// Trains a model, from scratch or from weights, into a run directory.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright train -m cnn_r14 -d digits --epochs 10
  tilewright train -m cnn_r14 -m vit:patch=2,dim=64,depth=4,heads=4,mlp=2 -d digits -o runs/digits
  tilewright train -c configs/cnn_r14-cifar10.toml -d cifar10:data/cifar-10-batches-bin
  tilewright train --resume runs/digits

A run directory holds config.toml (everything resolved), metrics.csv (a row an epoch), events.jsonl (a line a step),
checkpoints/{last,best}.safetensors, plots/ and report.html. A run that was killed goes on with --resume and ends in
the same bits. Flags override the configuration file.")]
pub struct Train {
    /// Configuration file (TOML); flags override it
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Model id or spec string; given several times, each is trained and one report compares them
    #[arg(short, long, value_name = "MODEL")]
    model: Vec<String>,
    /// Data set: digits, synthetic[:CLASSESxSIZE], cifar10[:DIR], cifar100[:DIR], tiny-imagenet[:DIR], folder:DIR,
    /// shards:DIR|PATTERN (see `tilewright data list`)
    #[arg(short, long, value_name = "DATA")]
    data: Option<String>,
    /// Run directory [default: runs/MODEL]
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Go on with the run in this directory, with its own configuration
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "model", "data", "output"])]
    resume: Option<PathBuf>,
    /// Resolve and plan the run, print what it would be, and do nothing
    #[arg(long, conflicts_with = "resume")]
    dry_run: bool,
    #[command(flatten)]
    settings: Settings,
}

/// Flags of single settings, each over the file's.
#[derive(Args)]
struct Settings {
    /// Passes over the training images
    #[arg(long, value_name = "N", help_heading = "Schedule")]
    epochs: Option<u64>,
    /// Images of one forward and backward pass
    #[arg(long, value_name = "N", help_heading = "Schedule")]
    batch_size: Option<usize>,
    /// Batches whose gradients are averaged for one update
    #[arg(long, value_name = "N", help_heading = "Schedule")]
    accumulate: Option<usize>,
    /// Learning rate after the warm-up
    #[arg(long, value_name = "RATE", help_heading = "Schedule")]
    lr: Option<f64>,
    /// Lowest rate of the cosine
    #[arg(long, value_name = "RATE", help_heading = "Schedule")]
    min_lr: Option<f64>,
    /// Shape of the schedule
    #[arg(long, value_name = "NAME", help_heading = "Schedule")]
    schedule: Option<Schedule>,
    /// Epochs of linear warm-up
    #[arg(long, value_name = "N", help_heading = "Schedule")]
    warmup_epochs: Option<f64>,
    /// Epochs without a better top-1 after which the run ends
    #[arg(long, value_name = "N", help_heading = "Schedule")]
    patience: Option<u64>,
    /// Update rule
    #[arg(long, value_name = "NAME", help_heading = "Optimizer")]
    optimizer: Option<OptimizerName>,
    /// Of matrices and filters (norms, biases and tokens have none)
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    weight_decay: Option<f64>,
    /// Of SGD
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    momentum: Option<f64>,
    /// The rate of each block is this times that of the block after it (0.75 in BEiT)
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    layer_decay: Option<f64>,
    /// Factor on the rate of the parameters whose names begin so; may be given several times
    #[arg(long, value_name = "LAYER=FACTOR", value_parser = factor, help_heading = "Optimizer")]
    lr_scale: Vec<(String, f64)>,
    /// Decay of the moving average of the weights, which is evaluated and saved in their place
    #[arg(long, value_name = "X", help_heading = "Optimizer")]
    ema: Option<f64>,
    /// Largest global norm of the gradient; 0: no clipping
    #[arg(long, value_name = "NORM", help_heading = "Optimizer")]
    clip: Option<f64>,
    /// Share of the target spread over all classes
    #[arg(long, value_name = "X", help_heading = "Loss")]
    label_smoothing: Option<f32>,
    /// Exponent of the focal loss
    #[arg(long, value_name = "X", help_heading = "Loss")]
    focal: Option<f32>,
    /// Weigh classes by the inverse of their frequency
    #[arg(long, help_heading = "Loss")]
    class_weights: bool,
    /// Weights of a teacher, whose predictions are learnt beside the labels
    #[arg(long, value_name = "FILE", help_heading = "Loss")]
    teacher: Option<PathBuf>,
    /// The teacher's model [default: what its weights tell]
    #[arg(long, value_name = "MODEL", help_heading = "Loss")]
    teacher_model: Option<String>,
    /// Share of the teacher in the loss
    #[arg(long, value_name = "X", help_heading = "Loss")]
    distill_alpha: Option<f32>,
    /// Temperature of both softmaxes
    #[arg(long, value_name = "T", help_heading = "Loss")]
    distill_temperature: Option<f32>,
    /// Learn the teacher's most probable class, in place of its probabilities
    #[arg(long, help_heading = "Loss")]
    distill_hard: bool,
    /// Dropout, in models that have it
    #[arg(long, value_name = "P", help_heading = "Model")]
    dropout: Option<f32>,
    /// Drop path of the last block, in ViTs
    #[arg(long, value_name = "P", help_heading = "Model")]
    drop_path: Option<f32>,
    /// Side of the input in pixels [default: the data's for small models, else the model's]
    #[arg(long, value_name = "PX", help_heading = "Model")]
    image_size: Option<usize>,
    /// Weights to start from
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    init: Option<PathBuf>,
    /// Start the classifier afresh where the weights have another class count
    #[arg(long, help_heading = "Model")]
    replace_head: bool,
    /// Train the classifier alone
    #[arg(long, help_heading = "Model")]
    freeze_backbone: bool,
    /// Train from this layer on and nothing before it: blocks.8, layer4
    #[arg(long, value_name = "LAYER", help_heading = "Model")]
    unfreeze_from: Option<String>,
    /// Cut off so many of a ResNet's last stages
    #[arg(long, value_name = "N", help_heading = "Model")]
    drop_stages: Option<usize>,
    /// Cut off so many of a ViT's last blocks
    #[arg(long, value_name = "N", help_heading = "Model")]
    drop_blocks: Option<usize>,
    /// Keep these blocks of a ViT: 0-3,8-11
    #[arg(long, value_name = "LIST", help_heading = "Model")]
    keep_blocks: Option<String>,
    /// Compute the inside of each block again in the backward pass: less memory, more time
    #[arg(long, help_heading = "Model")]
    recompute: bool,
    /// Mirror half of the images
    #[arg(long, help_heading = "Augmentation")]
    flip: bool,
    /// Pad by this many pixels, then crop anywhere
    #[arg(long, value_name = "PX", help_heading = "Augmentation")]
    crop_pad: Option<u32>,
    /// Rotate by up to this much either way
    #[arg(long, value_name = "DEGREES", help_heading = "Augmentation")]
    rotate: Option<f32>,
    /// Shift by up to this share of the size either way
    #[arg(long, value_name = "SHARE", help_heading = "Augmentation")]
    translate: Option<f32>,
    /// Cut out this share of the image or more, stretched to the size (random resized crop)
    #[arg(long, value_name = "SHARE", help_heading = "Augmentation")]
    crop_scale: Option<f32>,
    /// Brightness, contrast, saturation by up to 1 +- so much, and hue by up to so much of the circle
    #[arg(long, value_name = "B,C,S,H", value_parser = jitter, help_heading = "Augmentation")]
    colour_jitter: Option<Jitter>,
    /// RandAugment: operations a sample, and their strength from 0 to 30
    #[arg(long, value_name = "OPS,STRENGTH", value_parser = rand_augment, help_heading = "Augmentation")]
    rand_augment: Option<RandAugment>,
    /// Probability that a rectangle is erased
    #[arg(long, value_name = "P", help_heading = "Augmentation")]
    erase: Option<f32>,
    /// Parameter of mixup's beta distribution
    #[arg(long, value_name = "ALPHA", help_heading = "Augmentation")]
    mixup: Option<f32>,
    /// Parameter of CutMix's beta distribution
    #[arg(long, value_name = "ALPHA", help_heading = "Augmentation")]
    cutmix: Option<f32>,
    /// Each image comes this often in an epoch, under other augmentation each time
    #[arg(long, value_name = "N", help_heading = "Augmentation")]
    repeats: Option<u32>,
    /// Evaluate the mean of each image and its mirror image
    #[arg(long, help_heading = "Augmentation")]
    test_flip: bool,
    /// Part of each class: 100 images or 10%
    #[arg(long, value_name = "N|P%", help_heading = "Data")]
    subset: Option<String>,
    /// First N training images only
    #[arg(long, value_name = "N", help_heading = "Data")]
    limit_train: Option<usize>,
    /// First N test images only
    #[arg(long, value_name = "N", help_heading = "Data")]
    limit_test: Option<usize>,
    /// Hold this share of the training images out, to evaluate on them in place of the test images
    #[arg(long, value_name = "SHARE", help_heading = "Data")]
    val_share: Option<f64>,
    /// Exponential long tail: smallest class over largest
    #[arg(long, value_name = "RATIO", help_heading = "Data")]
    long_tail: Option<f64>,
    /// Half of the classes keep this share
    #[arg(long, value_name = "RATIO", help_heading = "Data")]
    step_imbalance: Option<f64>,
    /// Draw classes equally often
    #[arg(long, help_heading = "Data")]
    balanced: bool,
}

/// Strengths of colour jitter, as a type of its own so that the flag parser does not take it for a list.
#[derive(Clone, Copy, Debug)]
struct Jitter([f32; 4]);

/// Operations and strength.
#[derive(Clone, Copy, Debug)]
struct RandAugment(u32, f32);

fn jitter(text: &str) -> Result<Jitter, String> {
    let numbers: Result<Vec<f32>, _> = text.split(',').map(|p| p.trim().parse()).collect();
    match numbers.as_deref() {
        Ok(&[b, c, s, h]) => Ok(Jitter([b, c, s, h])),
        Ok(&[b, c, s]) => Ok(Jitter([b, c, s, 0.0])),
        Ok(&[v]) => Ok(Jitter([v, v, v, 0.0])),
        _ => Err("give brightness, contrast, saturation and hue, as 0.4,0.4,0.4,0.1".into()),
    }
}

fn rand_augment(text: &str) -> Result<RandAugment, String> {
    let numbers = text.split_once(',').unwrap_or((text, "9"));
    match (numbers.0.trim().parse(), numbers.1.trim().parse()) {
        (Ok(ops), Ok(strength)) => Ok(RandAugment(ops, strength)),
        _ => Err("give the number of operations and their strength, as 2,9".into()),
    }
}

fn factor(text: &str) -> Result<(String, f64), String> {
    let parts = text.split_once('=');
    parts
        .and_then(|(name, v)| Some((name.to_string(), v.parse().ok()?)))
        .ok_or_else(|| "give a layer and a factor, as head=10".into())
}

impl Settings {
    fn apply(self, c: &mut TrainConfig) {
        macro_rules! take {
            ($($name:ident),*) => { $(if let Some(v) = self.$name { c.$name = v; })* };
        }
        take!(
            epochs,
            batch_size,
            accumulate,
            lr,
            min_lr,
            schedule,
            warmup_epochs,
            optimizer,
            weight_decay,
            momentum
        );
        take!(
            clip,
            label_smoothing,
            focal,
            dropout,
            drop_path,
            image_size,
            subset,
            limit_train,
            limit_test
        );
        take!(
            val_share,
            long_tail,
            step_imbalance,
            patience,
            layer_decay,
            ema
        );
        take!(mixup, cutmix, repeats, teacher_model, distill_alpha);
        take!(
            distill_temperature,
            unfreeze_from,
            drop_stages,
            drop_blocks,
            keep_blocks
        );
        c.lr_scale.extend(self.lr_scale);
        c.teacher = self.teacher.or(c.teacher.take());
        c.distill_hard |= self.distill_hard;
        c.recompute |= self.recompute;
        c.test_flip |= self.test_flip;
        c.balanced |= self.balanced;
        c.augment.crop_scale = self.crop_scale.unwrap_or(c.augment.crop_scale);
        c.augment.erase = self.erase.unwrap_or(c.augment.erase);
        if let Some(Jitter([b, t, s, h])) = self.colour_jitter {
            let a = &mut c.augment;
            (a.brightness, a.contrast, a.saturation, a.hue) = (b, t, s, h);
        }
        if let Some(RandAugment(ops, strength)) = self.rand_augment {
            (c.augment.rand_ops, c.augment.rand_magnitude) = (ops, strength);
        }
        c.init = self.init.or(c.init.take());
        c.class_weights |= self.class_weights;
        c.replace_head |= self.replace_head;
        c.freeze_backbone |= self.freeze_backbone;
        c.augment.hflip |= self.flip;
        c.augment.crop_pad = self.crop_pad.unwrap_or(c.augment.crop_pad);
        c.augment.rotate_degrees = self.rotate.unwrap_or(c.augment.rotate_degrees);
        c.augment.translate = self.translate.unwrap_or(c.augment.translate);
    }
}

impl Train {
    /// Runs the command.
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let stop = super::end_in_order();
        let command = command_line();
        if let Some(dir) = &self.resume {
            let mut config = TrainConfig::read(&dir.join("config.toml"))?;
            let epochs = self.settings.epochs;
            config.epochs = epochs.unwrap_or(config.epochs);
            let backend = g.open_with(&config.backend, &config.precision)?;
            let place = RunPlace {
                dir: dir.clone(),
                resume: true,
                command,
            };
            return show(
                g,
                dir,
                &[train(&config, backend.as_ref(), &place, stop)?],
                None,
            );
        }
        let mut config = match &self.config {
            Some(path) => TrainConfig::read(path)?,
            None => TrainConfig::default(),
        };
        self.settings.apply(&mut config);
        if let Some(d) = self.data {
            config.data = d;
        }
        if self.dry_run {
            return dry_run(g, config, &self.model);
        }
        let backend = match (&g.backend, &self.config) {
            (None, Some(_)) => g.open_with(&config.backend, &config.precision)?,
            _ => g.open_with(&g.backend_name(), &config.precision)?,
        };
        config.backend = g
            .backend
            .clone()
            .unwrap_or_else(|| backend.name().to_string());
        config.precision = backend.precision().to_string();
        if g.seed != 0 {
            config.seed = g.seed;
        }
        let models = if self.model.is_empty() {
            vec![model_name(&config)?]
        } else {
            self.model
        };
        let root = self
            .output
            .unwrap_or_else(|| PathBuf::from("runs").join(folder(&models.join("-"))));
        let mut reports = vec![];
        for model in &models {
            let dir = if models.len() > 1 {
                root.join(folder(model))
            } else {
                root.clone()
            };
            note(&format!(
                "training {model} on {} into {}",
                config.data,
                dir.display()
            ));
            let config = TrainConfig {
                model: model.clone(),
                ..config.clone()
            };
            let place = RunPlace {
                dir,
                resume: false,
                command: command.clone(),
            };
            reports.push(train(&config, backend.as_ref(), &place, stop)?);
        }
        show(g, &root, &reports, (models.len() > 1).then_some(&command))
    }
}

/// Prints what each run would be.
fn dry_run(g: &Global, config: TrainConfig, models: &[String]) -> Result<ExitCode> {
    let named = models.iter().map(|m| TrainConfig {
        model: m.clone(),
        ..config.clone()
    });
    let all = match models {
        [] => vec![config.clone()],
        _ => named.collect(),
    };
    for config in &all {
        let plan = plan(config)?;
        match g.json {
            true => json(&plan.config)?,
            false => print(&plan.to_text()?)?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A model's name as a folder's.
fn folder(model: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '_'
        }
    };
    model.chars().map(plain).collect()
}

/// The command that was given, for reports.
pub fn command_line() -> String {
    let quoted = |a: String| if a.contains(' ') { format!("'{a}'") } else { a };
    std::iter::once("tilewright".to_string())
        .chain(std::env::args().skip(1).map(quoted))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Prints the results; several runs are compared on a page of their own.
fn show(
    g: &Global,
    root: &Path,
    reports: &[RunReport],
    compare: Option<&String>,
) -> Result<ExitCode> {
    let page = root.join("report.html");
    let runs = CompareReport {
        title: "Comparison".into(),
        question: format!(
            "{} trained alike on {}: which is more accurate, and at what cost?",
            reports
                .iter()
                .map(|r| r.name.as_str())
                .collect::<Vec<_>>()
                .join(" and "),
            reports.first().map_or("", |r| r.data.as_str())
        ),
        runs: reports.to_vec(),
        command: compare.cloned().unwrap_or_default(),
    };
    if compare.is_some() {
        write_atomic(&page, runs.to_html()?.as_bytes())?;
    }
    if g.json {
        let evals: Vec<_> = reports.iter().filter_map(|r| r.eval.as_ref()).collect();
        let value = |v: &_| serde_json::to_value(v).map_err(|e| Error::run(e.to_string()));
        match &evals[..] {
            [one] => json(&value(&serde_json::json!(one))?)?,
            many => json(&value(&serde_json::json!(many))?)?,
        }
    } else {
        print(&runs.table().to_text())?;
        print(&format!("\nreport: {}\n", page.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}
