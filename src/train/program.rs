//! The compiled training graph: network, loss, gradients and update, with its first weights.

use super::config::TrainConfig;
use crate::backend::{Backend, CompileOptions, Exec};
use crate::graph::fuse::Purpose;
use crate::graph::train::{Update, UpdateSpec, add_update};
use crate::graph::{Graph, Mode, Phase, Spec, Tid, fuse};
use crate::models::session::{load_net, write_parameters};
use crate::models::{Model, ModelOptions, Net};
use crate::weights::naming::is_classifier;
use crate::weights::{FileNames, Loaded, WeightFile};
use crate::{Error, Result};
use std::sync::Arc;

/// The compiled training graph with its tensors.
pub struct Program {
    /// The graph on its backend.
    pub exec: Box<dyn Exec>,
    /// Clipping and the update.
    pub update: Update,
    /// Images `[N, H, W, 3]`.
    pub input: Tid,
    /// Class labels `[N]`.
    pub labels: Tid,
    /// Maps of augmentation `[N, 6]`, where there is any.
    pub affine: Option<Tid>,
    /// Key of dropout and drop path, where there is any.
    pub rng: Option<Tid>,
    /// Mean loss `[1]`.
    pub loss: Tid,
    /// `[N, classes]`.
    pub logits: Tid,
    /// How the weights' file names the parameters.
    pub names: FileNames,
    /// Elements of all parameters.
    pub params: usize,
    /// Floating-point operations of the forward pass of one image.
    pub flops: u64,
}

/// What a [`Program`] is made of beside its configuration.
#[derive(Clone, Copy)]
pub struct ProgramSpec<'a> {
    /// Batch size, optimizer, loss, augmentation, seed.
    pub config: &'a TrainConfig,
    /// The network.
    pub model: &'a Model,
    /// Its options.
    pub options: &'a ModelOptions,
    /// Side of the images in pixels.
    pub size: usize,
    /// Weights to start from.
    pub init: Option<&'a WeightFile>,
    /// What augmentation fills with where it looks beyond the image: normalised black.
    pub fill: [f32; 3],
    /// Weight of each class in the loss.
    pub class_weights: Option<&'a [f32]>,
}

impl Program {
    /// Builds, differentiates and compiles.
    ///
    /// # Errors
    /// The model does not take that size or has no classifier, the weights do not fit, or the backend cannot run it.
    pub fn compile(backend: &dyn Backend, spec: &ProgramSpec) -> Result<Program> {
        let ProgramSpec { config, model, .. } = *spec;
        let n = config.batch_size;
        let mut g = Graph::new();
        g.mode = Mode {
            batch_stats: true,
            random: true,
        };
        let input = g.input("input", Spec::f32([n, spec.size, spec.size, 3]));
        let mut x = input;
        let (mut affine, mut fill) = (None, None);
        if !config.augment.is_none() {
            let m = g.input("affine", Spec::f32([n, 6]));
            let f = g.input("fill", Spec::f32([3]));
            x = g.affine_sample(x, m, f, true)?;
            (affine, fill) = (Some(m), Some(f));
        }
        let heads = model.build(&mut g, x, spec.options)?;
        let Some(logits) = heads.logits else {
            return Err(Error::input(format!(
                "{} has no classifier to train; give --classes",
                model.id
            )));
        };
        let mut net = Net {
            graph: g,
            input,
            heads,
            grid: model.grid(spec.size, spec.size),
        };
        let loaded = spec
            .init
            .map(|f| load_net(model, &net, f, config.replace_head))
            .transpose()?;
        let g = &mut net.graph;
        if config.freeze_backbone {
            for p in g.params.iter_mut().filter(|p| !is_classifier(&p.name)) {
                p.trainable = false;
            }
        }
        let labels = g.input("labels", Spec::u32([n]));
        let weights = spec
            .class_weights
            .map(|w| g.input("class_weights", Spec::f32([w.len()])));
        let loss = g.softmax_ce(
            logits,
            labels,
            weights,
            config.label_smoothing,
            config.focal,
        )?;
        g.keep(loss);
        g.keep(logits);
        fuse(g, Purpose::Gradients)?;
        let grads = g.backward(loss, &[])?;
        let update = UpdateSpec {
            optimizer: config.optimizer(),
            weight_decay: config.weight_decay,
            clip: (config.clip > 0.0).then_some(config.clip),
            accumulate: config.accumulate,
        };
        let update = add_update(g, &grads, update)?;
        let names = match &loaded {
            Some(l) => l.names.clone(),
            None => FileNames::plain(g, model.naming()),
        };
        let (params, rng) = (g.param_count().0, g.rng);
        let flops = g.flops(Phase::Forward) / n as u64;
        let mut exec = backend.compile(Arc::new(net.graph), &CompileOptions::default())?;
        if let Some(f) = fill {
            exec.write(f, &spec.fill)?;
        }
        if let Some((t, values)) = weights.zip(spec.class_weights) {
            exec.write(t, values)?;
        }
        let from: Option<(&Loaded, &WeightFile)> = loaded.as_ref().zip(spec.init);
        write_parameters(exec.as_mut(), from, config.seed)?;
        Ok(Program {
            exec,
            update,
            input,
            labels,
            affine,
            rng,
            loss,
            logits,
            names,
            params,
            flops,
        })
    }
}
