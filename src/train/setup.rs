//! What a configuration means for its data and weights: the network, its input, and how they are opened.

use super::config::TrainConfig;
use crate::data::{self, Images, OpenOptions, PerClass, PrepareOptions, Preprocess, Split};
use crate::models::session::options_for;
use crate::models::thin::Thinned;
use crate::models::{self, Model, ModelOptions};
use crate::weights::load::{classes_of, model_of};
use crate::weights::registry::locate;
use crate::weights::{Scheme, WeightFile};
use crate::{Error, Result};
use std::sync::Arc;

/// Models made for images up to this size take the data's own size.
const SMALL: usize = 64;
/// The model where none is named.
const DEFAULT: &str = "cnn_r14";

/// A resolved run: nothing is open but the weights.
pub struct Setup {
    /// With everything filled in that the weights tell.
    pub config: TrainConfig,
    /// The network that is trained.
    pub model: Model,
    /// Where it has fewer blocks than the network that it comes from.
    pub thinned: Option<Thinned>,
    /// Its options.
    pub options: ModelOptions,
    /// Side of its input in pixels.
    pub size: usize,
    /// From an image to its input.
    pub preprocess: Preprocess,
    /// The weights that it starts from.
    pub init: Option<WeightFile>,
    /// Things that were decided, for people.
    pub notes: Vec<String>,
}

/// The model that `config` names; where it names none, the one that its weights are of.
///
/// # Errors
/// The weights are not there, or are of no known network.
pub fn model_name(config: &TrainConfig) -> Result<String> {
    if !config.model.is_empty() {
        return Ok(config.model.clone());
    }
    let Some(path) = &config.init else {
        return Ok(DEFAULT.into());
    };
    let (path, record) = locate(path)?;
    let file = WeightFile::open(path)?;
    let named = file.metadata().get("tilewright.model");
    let name = named
        .map(|n| n.trim_matches('"').to_string())
        .or(record.map(|r| r.model))
        .or(model_of(&file).map(|m| m.id));
    name.ok_or_else(|| {
        Error::input(format!(
            "which model is {}? give -m MODEL; `tilewright models` lists them",
            file.path().display()
        ))
    })
}

impl Setup {
    /// Resolves `config` for a data set of `classes` whose images have the side `side` (where all have the same), and
    /// that is usually normalised as `plain` says.
    ///
    /// # Errors
    /// A bad setting, an unknown model, weights that are not there.
    pub fn new(
        config: &TrainConfig,
        classes: usize,
        side: Option<u32>,
        plain: impl Fn(u32) -> Preprocess,
    ) -> Result<Setup> {
        config.check()?;
        let mut config = config.clone();
        let mut notes = vec![];
        config.model = model_name(&config)?;
        let whole = models::find(&config.model)?;
        let thinned = thin(&config, &whole)?;
        let model = thinned.as_ref().map_or(&whole, |t| &t.model).clone();
        let located = config
            .init
            .as_ref()
            .map(|p| locate(p.as_ref()))
            .transpose()?;
        let (init, record) = located.unzip();
        let init = init.map(WeightFile::open).transpose()?;
        let record = record.flatten();
        let headless = init.as_ref().and_then(classes_of) == Some(0);
        if headless && !config.replace_head {
            notes.push(format!(
                "the weights have no classifier: one of {classes} classes starts afresh"
            ));
            config.replace_head = true;
        }
        let size = match (config.image_size, side) {
            (0, Some(s)) if model.image <= SMALL => s as usize,
            (0, _) => model.image,
            (s, _) => s,
        };
        let options = ModelOptions {
            classes: Some(classes),
            dropout: (config.dropout > 0.0).then_some(config.dropout),
            drop_path: config.drop_path,
            norm_eps: None,
            cls_mean: false,
        };
        let options = options_for(&options, init.as_ref(), config.replace_head);
        let mut preprocess = match (&init, record) {
            // Weights expect the input that they were trained on.
            (Some(_), Some(record)) => record.preprocess(size as u32),
            (Some(file), None) => match trained(file, size) {
                Some(p) => p,
                None => model.preprocess(Scheme::of(file).map(|s| s.naming), size),
            },
            (None, _) => plain(size as u32),
        };
        if side.is_some_and(|s| (s as usize) < size) {
            // The crop is for photographs with a margin; small squares are filled by what they show.
            preprocess.crop_ratio = 1.0;
        }
        Ok(Setup {
            config,
            model,
            thinned,
            options,
            size,
            preprocess,
            init,
            notes,
        })
    }
}

/// What the trainer wrote into its own weight files about their input.
fn trained(file: &WeightFile, size: usize) -> Option<Preprocess> {
    let get = |key: &str| serde_json::from_str(file.metadata().get(key)?).ok();
    Some(Preprocess {
        mean: get("tilewright.mean")?,
        std: get("tilewright.std")?,
        ..Preprocess::new(size as u32)
    })
}

fn thin(config: &TrainConfig, model: &Model) -> Result<Option<Thinned>> {
    let asked = [
        config.drop_stages > 0,
        config.drop_blocks > 0,
        !config.keep_blocks.is_empty(),
    ];
    if asked.iter().filter(|&&a| a).count() > 1 {
        return Err(Error::input(
            "give one of --drop-stages, --drop-blocks and --keep-blocks",
        ));
    }
    Ok(match asked {
        [true, _, _] => Some(Thinned::drop_stages(model, config.drop_stages)?),
        [_, true, _] => Some(Thinned::drop_blocks(model, config.drop_blocks)?),
        [_, _, true] => Some(Thinned::keep_blocks(model, &config.keep_blocks)?),
        _ => None,
    })
}

/// The data of a run, at the network's size.
pub(super) struct RunData {
    pub train: Arc<Images>,
    pub test: Arc<Images>,
    pub classes: Vec<String>,
    /// Images of each class in the training view.
    pub counts: Vec<usize>,
    pub notes: Vec<String>,
}

/// The data set of `config`.
///
/// # Errors
/// As [`data::open`].
pub fn open_data(config: &TrainConfig) -> Result<data::Sets> {
    data::open(&config.data, OpenOptions { seed: config.seed })
}

/// What `config` makes of a data set's training and test images: validation share, subset, imbalance, limits.
pub(super) fn views(config: &TrainConfig, train: Split, test: Split) -> Result<(Split, Split)> {
    let (mut train, mut test) = (train, test);
    if config.val_share > 0.0 {
        (train, test) = train.split_off(config.val_share, config.seed)?;
    }
    if !config.subset.is_empty() {
        train = train.subset(config.subset.parse::<PerClass>()?, config.seed);
    }
    if config.long_tail > 0.0 {
        train = train.long_tail(1.0 / config.long_tail, config.seed)?;
    }
    if config.step_imbalance > 0.0 {
        train = train.step_imbalance(1.0 / config.step_imbalance, config.seed)?;
    }
    let limit = |s: Split, n: usize| if n > 0 { s.limit(n) } else { s };
    Ok((
        limit(train, config.limit_train),
        limit(test, config.limit_test),
    ))
}

/// Makes the splits of `sets` ready; with `memory` false nothing is decoded before it is asked for.
pub(super) fn prepare(
    config: &TrainConfig,
    sets: data::Sets,
    preprocess: Preprocess,
    memory: bool,
) -> Result<RunData> {
    let mut notes = sets.notes;
    let (train, test) = views(config, sets.train, sets.test)?;
    let classes = train.classes().to_vec();
    let counts = train.counts();
    let mut options = PrepareOptions::default();
    if !memory {
        options.memory = 0;
    }
    let train = Images::prepare(&train, preprocess, options)?;
    let test = Images::prepare(&test, preprocess, options)?;
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
