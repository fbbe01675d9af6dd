//! What an analysis is given: models with their weights, and images.

use super::room::unknown;
use crate::backend::Backend;
use crate::data::{Images, PrepareOptions, Preprocess, Rgb, Split, decode_file};
use crate::models::session::{Session, SessionOptions};
use crate::models::{Model, ModelOptions, Net, find};
use crate::report::plot::Family;
use crate::weights::load::classes_of;
use crate::weights::{Trained, WeightFile};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model with its weights, not yet compiled.
pub struct Subject {
    /// In tables and plots.
    pub name: String,
    /// The model.
    pub model: Model,
    /// Its weights; `None`: drawn from the seed.
    pub file: Option<WeightFile>,
    /// Classes of its classifier, where they are asked for or the file tells.
    pub classes: Option<usize>,
    /// Their names, where the file tells.
    pub class_names: Option<Vec<String>>,
    /// From an image to its input.
    pub preprocess: Preprocess,
    /// Of random weights.
    pub seed: u64,
}

impl Subject {
    /// The best checkpoint of the run in `dir`.
    ///
    /// # Errors
    /// There is none, or it does not say what it was trained on.
    pub fn of_run(name: &str, dir: &Path) -> Result<Subject> {
        let file = WeightFile::open(dir.join("checkpoints/best.safetensors"))?;
        let trained = Trained::read(&file)?;
        let (Some(id), Some(size), Some(mean), Some(std)) =
            (&trained.model, trained.size, trained.mean, trained.std)
        else {
            return Err(Error::input(format!(
                "{}: its metadata do not say which model it is and what its images are like",
                file.path().display()
            )));
        };
        Ok(Subject {
            name: name.into(),
            model: find(id)?,
            classes: classes_of(&file),
            class_names: trained.classes,
            file: Some(file),
            preprocess: Preprocess {
                mean,
                std,
                ..Preprocess::new(size)
            },
            seed: 0,
        })
    }

    /// Colour and line style.
    pub fn family(&self) -> Family {
        match self.model.family() {
            crate::models::Family::Cnn => Family::Cnn,
            crate::models::Family::Vit => Family::Vit,
        }
    }

    /// Options of the model, with `classes` where neither flags nor file tell.
    pub fn options(&self, classes: Option<usize>) -> ModelOptions {
        ModelOptions {
            classes: self.classes.or(classes),
            ..ModelOptions::default()
        }
    }

    /// Height and width of the input.
    pub fn image(&self) -> (usize, usize) {
        let side = self.preprocess.size as usize;
        (side, side)
    }

    /// Compiled for batches of `batch`, after `change`; with `taps`, those are kept.
    ///
    /// # Errors
    /// As [`Session::open_with`].
    pub fn session<T>(
        &self,
        backend: &dyn Backend,
        (batch, classes): (usize, Option<usize>),
        taps: bool,
        change: impl FnOnce(&mut Net) -> Result<T>,
    ) -> Result<(Session, T)> {
        let options = SessionOptions {
            taps,
            model: self.options(classes),
            seed: self.seed,
            ..SessionOptions::new(batch, self.image())
        };
        Session::open_with(backend, &self.model, self.file.as_ref(), &options, change)
    }

    /// The message that it has no classifier.
    pub fn no_classifier(&self) -> Error {
        Error::input(format!(
            "{} has no classifier: it gives features, no classes",
            self.name
        ))
    }

    /// Name of class `k`.
    pub fn class_name(&self, k: usize) -> String {
        let names = self.class_names.as_ref();
        let name = names.and_then(|n| n.get(k)).cloned();
        name.unwrap_or_else(|| k.to_string())
    }

    /// The class that `text` names: its name or its number.
    ///
    /// # Errors
    /// It is neither.
    pub fn class(&self, text: &str, classes: usize) -> Result<usize> {
        if let Some(k) = text.parse().ok().filter(|&k: &usize| k < classes) {
            return Ok(k);
        }
        let names: Vec<String> = (0..classes).map(|k| self.class_name(k)).collect();
        if let Some(k) = names.iter().position(|n| n == text) {
            return Ok(k);
        }
        if self.class_names.is_none() || classes > 40 {
            return Err(Error::input(format!(
                "no class is called {text:?}: give a number from 0 to {}",
                classes.saturating_sub(1)
            )));
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Err(unknown("class", text, &names))
    }
}

/// The images of an analysis.
#[derive(Clone, Debug)]
pub enum Pictures {
    /// None.
    Nothing,
    /// A part of a data set.
    Data {
        /// The data set, for messages.
        spec: String,
        /// The images.
        split: Split,
    },
    /// Files.
    Files(Vec<PathBuf>),
}

/// One image, decoded, at its own size.
pub struct Photo {
    /// The file's stem, or its number in the data set.
    pub name: String,
    /// Its pixels.
    pub pixels: Rgb,
    /// Its class, where that is known.
    pub label: Option<u32>,
}

/// What an analysis is given.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// Where networks run.
    pub backend: &'a dyn Backend,
    /// The models, at least one.
    pub subjects: &'a [Subject],
    /// The images.
    pub pictures: &'a Pictures,
    /// Images in a batch.
    pub batch: usize,
    /// Of what is drawn.
    pub seed: u64,
}

impl<'a> Context<'a> {
    /// The first model.
    pub fn subject(&self) -> &'a Subject {
        &self.subjects[0]
    }

    /// The part of a data set.
    ///
    /// # Errors
    /// No data set was given.
    pub fn split(&self) -> Result<&'a Split> {
        match self.pictures {
            Pictures::Data { split, .. } => Ok(split),
            _ => Err(Error::input("give a data set: -d DATA")),
        }
    }

    /// Name of the data set, or how many files there are.
    pub fn data(&self) -> String {
        match self.pictures {
            Pictures::Nothing => "no images".into(),
            Pictures::Data { spec, .. } => spec.clone(),
            Pictures::Files(f) => format!("{} files", f.len()),
        }
    }

    /// The images of the data set as `subject` takes them.
    ///
    /// # Errors
    /// No data set was given, or too many images cannot be read.
    pub fn images(&self, subject: &Subject) -> Result<Arc<Images>> {
        let split = self.split()?;
        let images = Images::prepare(split, subject.preprocess, PrepareOptions::default())?;
        Ok(Arc::new(images))
    }

    /// Decodes the images.
    ///
    /// # Errors
    /// There are none, or one cannot be read.
    pub fn photos(&self) -> Result<Vec<Photo>> {
        match self.pictures {
            Pictures::Nothing => Err(Error::input("give image files, or a data set: -d DATA")),
            Pictures::Files(files) => files.iter().map(|f| photo_of(f)).collect(),
            Pictures::Data { split, .. } => (0..split.len())
                .map(|i| {
                    Ok(Photo {
                        name: format!("image-{}", split.indices()[i]),
                        pixels: split.image(i)?,
                        label: Some(split.label(i)),
                    })
                })
                .collect(),
        }
    }
}

fn photo_of(path: &Path) -> Result<Photo> {
    let stem = path.file_stem().unwrap_or_default();
    Ok(Photo {
        name: stem.to_string_lossy().into_owned(),
        pixels: decode_file(path)?,
        label: None,
    })
}
