//! Which model, which weights, and how images become their input: flags that `predict` and `eval` share.

use super::global::Global;
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use tilewright::analyze::Subject;
use tilewright::backend::Backend;
use tilewright::data::{Interpolation, Preprocess, Sets};
use tilewright::models::session::{Session, SessionOptions};
use tilewright::models::{Model, ModelOptions, find};
use tilewright::weights::load::{classes_of, identify};
use tilewright::weights::registry::{Record, locate};
use tilewright::weights::{Scheme, Trained, WeightFile};
use tilewright::{Error, Result};

/// In place of a weight file: initialised from the seed.
const RANDOM: &str = "random";

/// The model and its weights.
#[derive(Args)]
pub struct ModelArgs {
    /// Model id, alias or spec string (see `tilewright models`) [default: what the weights' metadata names]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
    /// A safetensors file, a run directory (its best checkpoint), a name of `tilewright weights list`, or `random` (drawn
    /// from --seed)
    #[arg(short, long, value_name = "FILE")]
    weights: String,
    /// Size of the classifier [default: the weights']
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
}

impl ModelArgs {
    /// For a second model beside this one: what is not given is as here. Its classes are those of its weights.
    pub fn other(&self, model: Option<String>, weights: Option<String>) -> ModelArgs {
        let same_weights = weights.is_none();
        ModelArgs {
            model: model.or_else(|| self.model.clone().filter(|_| same_weights)),
            weights: weights.unwrap_or_else(|| self.weights.clone()),
            classes: self.classes.filter(|_| same_weights),
        }
    }
}

/// From an image to the model's input. What is not given is what the weights were trained with, as far as their
/// metadata or their naming tells.
#[derive(Args)]
pub struct PreprocessArgs {
    /// Side of the input in pixels
    #[arg(long, value_name = "PX", help_heading = "Preprocessing")]
    image_size: Option<u32>,
    /// Share of the resized side that the centre crop keeps (0.875 is 224 of 256)
    #[arg(long, value_name = "RATIO", help_heading = "Preprocessing")]
    crop: Option<f32>,
    /// Filter of the resize
    #[arg(long, value_name = "FILTER", help_heading = "Preprocessing")]
    interpolation: Option<Filter>,
    /// Subtracted from red, green, blue in [0, 1]: R,G,B or one number
    #[arg(long, value_name = "R,G,B", value_parser = triple, allow_hyphen_values = true, help_heading = "Preprocessing")]
    mean: Option<Triple>,
    /// Divides what is left: R,G,B or one number
    #[arg(long, value_name = "R,G,B", value_parser = triple, help_heading = "Preprocessing")]
    std: Option<Triple>,
}

/// Three channels' values, as a type of its own so that the flag parser does not take it for a list.
#[derive(Clone, Copy, Debug)]
struct Triple([f32; 3]);

#[derive(Clone, Copy, ValueEnum)]
enum Filter {
    Nearest,
    Bilinear,
    Bicubic,
}

fn triple(text: &str) -> Result<Triple, String> {
    let numbers: Result<Vec<f32>, _> = text.split(',').map(|p| p.trim().parse()).collect();
    match numbers.as_deref() {
        Ok(&[v]) => Ok(Triple([v; 3])),
        Ok(&[r, g, b]) => Ok(Triple([r, g, b])),
        _ => Err("give three numbers, as 0.485,0.456,0.406, or one for all channels".into()),
    }
}

/// A number of images that is at least 1, as a flag.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("give 1 or more".into()),
        Ok(n) => Ok(n),
        Err(_) => Err("give a whole number of 1 or more".into()),
    }
}

/// A model with its weights, not yet compiled.
pub struct Source {
    /// The model.
    pub model: Model,
    /// Its weights; `None`: random ones.
    pub file: Option<WeightFile>,
    trained: Trained,
    record: Option<Record>,
    classes: Option<usize>,
    /// Seed of random weights.
    pub seed: u64,
}

/// The file that a `--weights` names, with its record in the registry where it is known by a name of that: a run
/// directory stands for its best checkpoint.
///
/// # Errors
/// The registry knows the name, but the file was not fetched yet.
pub fn weights_path(given: &Path) -> Result<(PathBuf, Option<Record>)> {
    for name in [
        "checkpoints/best.safetensors",
        "checkpoints/last.safetensors",
    ] {
        let inside = given.join(name);
        if inside.is_file() {
            return Ok((inside, None));
        }
    }
    locate(given)
}

impl Source {
    /// Opens what the flags name.
    ///
    /// # Errors
    /// There is no such model or file, or no model is named at all.
    pub fn open(g: &Global, args: &ModelArgs) -> Result<Source> {
        let (file, record) = match args.weights.as_str() {
            RANDOM => (None, None),
            path => {
                let (path, record) = weights_path(Path::new(path))?;
                (Some(WeightFile::open(path)?), record)
            }
        };
        let trained = file
            .as_ref()
            .map(Trained::read)
            .transpose()?
            .unwrap_or_default();
        let known = record.as_ref().map(|r| &r.model);
        let Some(name) = args.model.as_ref().or(trained.model.as_ref()).or(known) else {
            let looks = file.as_ref().and_then(identify);
            let looks = looks.map_or(String::new(), |l| format!(" (the weights look like {l})"));
            return Err(Error::input(format!(
                "which model? give -m MODEL{looks}; `tilewright models` lists them"
            )));
        };
        Ok(Source {
            model: find(name)?,
            file,
            trained,
            record,
            classes: args.classes,
            seed: g.seed,
        })
    }

    /// Path of the weights, for messages and results.
    pub fn weights(&self) -> String {
        match &self.file {
            Some(f) => f.path().display().to_string(),
            None => RANDOM.into(),
        }
    }

    /// Names of the classes, where the weights tell them.
    pub fn class_names(&self) -> Option<&[String]> {
        self.trained.classes.as_deref()
    }

    /// Classes of the classifier: as asked for, else the file's.
    pub fn classes(&self) -> Option<usize> {
        self.classes
            .or_else(|| self.file.as_ref().and_then(classes_of))
    }

    /// From an image to the model's input, by the first of these that tells:
    ///
    /// 1. the flags;
    /// 2. the weights' metadata, which the trainer writes: its own size, mean and standard deviation, no crop;
    /// 3. their record in the registry;
    /// 4. for random weights, the data set's own mean and standard deviation;
    /// 5. what the usual weights of this model under the file's naming were trained with (ImageNet's for the CIFAR
    ///    ResNets).
    ///
    /// The size is the data's where a model for small images meets images of one small size.
    pub fn preprocess(&self, args: &PreprocessArgs, sets: Option<&Sets>) -> Result<Preprocess> {
        let small = |size: &u32| self.model.image <= 64 && *size <= 64;
        let of_data = sets.and_then(|s| s.size).filter(small);
        let size = args
            .image_size
            .or(self.trained.size)
            .or(self.record.as_ref().map(|r| r.image_size))
            .or(of_data)
            .unwrap_or(self.model.image as u32);
        let naming = self.file.as_ref().and_then(Scheme::of).map(|s| s.naming);
        let mut p = match (&self.file, sets) {
            (None, Some(sets)) => sets.preprocess(size),
            _ => self.model.preprocess(naming, size as usize),
        };
        if let Some(record) = &self.record {
            p = record.preprocess(size);
        }
        if let (Some(mean), Some(std)) = (self.trained.mean, self.trained.std) {
            p = Preprocess {
                mean,
                std,
                ..Preprocess::new(size)
            };
        }
        if let Some(crop) = args.crop {
            p.crop_ratio = crop;
        }
        if let Some(filter) = args.interpolation {
            p.interpolation = match filter {
                Filter::Nearest => Interpolation::Nearest,
                Filter::Bilinear => Interpolation::Bilinear,
                Filter::Bicubic => Interpolation::Bicubic,
            };
        }
        if let Some(Triple(mean)) = args.mean {
            p.mean = mean;
        }
        if let Some(Triple(std)) = args.std {
            p.std = std;
        }
        p.check()?;
        Ok(p)
    }

    /// As what is analysed, under a name for tables and plots.
    pub fn subject(self, name: String, preprocess: Preprocess) -> Subject {
        Subject {
            name,
            classes: self.classes(),
            class_names: self.trained.classes,
            model: self.model,
            file: self.file,
            preprocess,
            seed: self.seed,
        }
    }

    /// Compiles the model for batches of `batch` images of `size` pixels, with a classifier of `classes` where the flags
    /// and the file leave it open.
    ///
    /// # Errors
    /// The weights do not fit, the size does not suit the model, or the model has no classifier.
    pub fn session(
        &self,
        backend: &dyn Backend,
        batch: usize,
        size: u32,
        classes: Option<usize>,
    ) -> Result<Session> {
        let side = size as usize;
        let options = SessionOptions {
            model: ModelOptions {
                classes: self.classes().or(classes),
                ..ModelOptions::default()
            },
            seed: self.seed,
            ..SessionOptions::new(batch, (side, side))
        };
        let session = Session::open(backend, &self.model, self.file.as_ref(), &options)?;
        if !session.classifies() {
            return Err(Error::input(format!(
                "{} with {} has no classifier: it gives features, which `tilewright forward` writes",
                self.model.id,
                self.weights()
            )));
        }
        Ok(session)
    }
}

/// Softmax in float64.
pub fn softmax(logits: &[f32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f64> = logits.iter().map(|&v| f64::from(v - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|v| v / sum).collect()
}
