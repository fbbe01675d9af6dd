//! What a run would do, without doing it: everything is resolved, built and planned, nothing is read but headers.

use super::config::TrainConfig;
use super::program::ProgramSpec;
use super::run::may_keep_features;
use super::setup::{Setup, open_data, views};
use crate::data::{IMAGENET_MEAN, IMAGENET_STD, Preprocess};
use crate::graph::plan::{Limits, Memory};
use crate::models::Model;
use crate::weights::registry::{find, locate, records};
use crate::{Error, Result};

/// What a run would be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Every setting, resolved.
    pub config: TrainConfig,
    /// Elements of all parameters.
    pub params: usize,
    /// Those of them that are trained.
    pub trained: usize,
    /// Floating-point operations of the forward pass of one image.
    pub flops: u64,
    /// Bytes of parameters, gradients, optimizer state and inputs.
    pub persistent: usize,
    /// Bytes of activations alive at once, at most, workspace left out.
    pub activations: usize,
    /// The same without recomputation, where it is asked for.
    pub unsaved: Option<usize>,
    /// Training images and updates of an epoch, where the data are there.
    pub epoch: Option<(usize, usize)>,
    /// Test images, where the data are there.
    pub test: usize,
    /// The model, without what was dropped of it.
    pub model: Model,
    /// Side of the images in pixels.
    pub size: usize,
    /// Classes.
    pub classes: usize,
    /// Whether the network before the classifier runs only once over the images.
    pub features_once: bool,
    /// What is not there yet, and what was decided.
    pub notes: Vec<String>,
}

/// Plans the run of `config`. Data and weights that are not there yet are noted, not refused.
///
/// # Errors
/// [`Error::Input`]: the run could not start even with them.
pub fn plan(config: &TrainConfig) -> Result<Plan> {
    config.check()?;
    let mut config = config.clone();
    let mut notes = vec![];
    if let Some(path) = &config.init
        && let Err(e) = locate(path)
    {
        notes.push(format!("weights to start from: {e}"));
        if config.model.is_empty() {
            let name = path.to_string_lossy();
            let all = records(None)?;
            // Only what the registry knows is ever missing in this way.
            config.model = find(&all, &name).ok_or(e)?.model.clone();
        }
        config.init = None;
    }
    let sets = match open_data(&config) {
        Ok(sets) => Some(sets),
        Err(e) => {
            notes.push(format!("data: {e}"));
            None
        }
    };
    let spec: crate::data::Spec = config.data.parse()?;
    let (classes, side) = match (&sets, spec.known()) {
        (Some(s), _) => (s.classes().len(), s.size),
        (None, Some((classes, side))) => (classes, side),
        (None, None) => {
            return Err(Error::input(format!(
                "{}: how many classes it has is not known before its folder is there",
                config.data
            )));
        }
    };
    let setup = Setup::new(&config, classes, side, |size| Preprocess {
        mean: IMAGENET_MEAN,
        std: IMAGENET_STD,
        ..Preprocess::new(size)
    })?;
    let weights = vec![1.0; classes];
    let spec = ProgramSpec {
        config: &setup.config,
        model: &setup.model,
        options: &setup.options,
        size: setup.size,
        init: setup.init.as_ref(),
        thinned: setup.thinned.as_ref(),
        fill: [0.0; 3],
        class_weights: setup.config.class_weights.then_some(&weights[..]),
        head_alone: false,
    };
    let derived = spec.derive()?;
    let limits = Limits {
        align: 64,
        max_arena: usize::MAX,
    };
    let graph = &derived.built.net.graph;
    let memory = Memory::plan(graph, &vec![0; graph.nodes.len()], limits);
    let batch = setup.config.batch_size;
    let accumulate = setup.config.accumulate;
    let updates = |n: usize| n / batch / accumulate;
    notes.extend(setup.notes.iter().cloned());
    let views = sets
        .map(|s| views(&setup.config, s.train, s.test))
        .transpose()?;
    let features_once = may_keep_features(&setup)?;
    Ok(Plan {
        params: derived.built.params.0,
        trained: derived.built.params.1,
        flops: derived.flops,
        persistent: 4 * memory.persistent,
        activations: 4 * memory.peak,
        unsaved: derived.recomputed.map(|s| s.before),
        epoch: views.as_ref().map(|v| (v.0.len(), updates(v.0.len()))),
        test: views.as_ref().map_or(0, |v| v.1.len()),
        model: setup.model,
        size: setup.size,
        classes,
        features_once,
        notes,
        config: setup.config,
    })
}

impl Plan {
    /// For people: a few lines, then the configuration as TOML.
    ///
    /// # Errors
    /// None in practice.
    pub fn to_text(&self) -> Result<String> {
        let mb = |b: usize| format!("{:.1} MB", b as f64 / 1e6);
        let c = &self.config;
        let mut text = format!(
            "{}: {} parameters, {} of them trained; {:.3} GFLOP an image forward\n\
             memory: {} of weights, gradients, optimizer state and inputs, {} of activations at batch {}{}\n",
            c.model,
            self.params,
            self.trained,
            self.flops as f64 / 1e9,
            mb(self.persistent),
            mb(self.activations),
            c.batch_size,
            match self.unsaved {
                Some(b) => format!(" ({} without recomputation)", mb(b)),
                None => String::new(),
            }
        );
        if let Some((images, updates)) = self.epoch {
            text += &format!(
                "{images} training images, {updates} updates an epoch, {} epochs\n",
                c.epochs
            );
            let total = c.epochs * updates.max(1) as u64;
            let at = |share: f64| c.lr_at((share * (total - 1) as f64) as u64, updates as u64);
            let rates: Vec<String> = [0.0, 0.25, 0.5, 0.75, 1.0]
                .iter()
                .map(|&s| format!("{:.3e}", at(s)))
                .collect();
            text += &format!("learning rate along the run: {}\n", rates.join(", "));
        }
        for note in &self.notes {
            text += &format!("note: {note}\n");
        }
        Ok(text + "\n" + &c.to_toml()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the weights were fetched or not, a run that names nothing else is planned.
    #[test]
    fn weights_of_the_registry_name_the_model() {
        let text = "init = 'resnet18.tv_in1k'\ndata = 'digits'\nimage_size = 32\nfreeze_backbone = true\n\
                    replace_head = true\nsubset = '10%'";
        let plan = plan(&TrainConfig::parse(text).unwrap()).unwrap();
        assert_eq!((plan.model.id.as_str(), plan.size), ("resnet18", 32));
        assert!(plan.features_once && plan.trained == 512 * 10 + 10);
        // 144 or so of the 1,437 training images.
        assert!((130..160).contains(&plan.epoch.unwrap().0) && plan.test > 300);
    }
}
