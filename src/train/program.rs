//! The compiled training graph: network, loss, gradients and update, with its first weights.

use super::config::TrainConfig;
use super::groups;
use crate::backend::{Backend, CompileOptions, Exec};
use crate::data::Batch;
use crate::graph::fuse::Purpose;
use crate::graph::train::{Update, UpdateSpec, add_ema, add_update};
use crate::graph::{Graph, Mode, Phase, Spec, Tid, fuse};
use crate::models::session::{load_net, write_parameters};
use crate::models::thin::Thinned;
use crate::models::{Model, ModelOptions, Net, head, init::initial_of};
use crate::ops::loss::{IGNORED, ScaleBy};
use crate::weights::{FileNames, FloatFormat, Loaded, WeightFile};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The compiled training graph with its tensors.
pub struct Program {
    /// The graph on its backend.
    pub exec: Box<dyn Exec>,
    /// Clipping and the update.
    pub update: Update,
    /// Images `[N, H, W, 3]`, or features `[N, D]` where the classifier is trained alone.
    pub input: Tid,
    /// What is to be learnt.
    pub targets: Targets,
    /// Maps of augmentation `[N, 6]`, where there is any on the device.
    pub affine: Option<Tid>,
    /// Key of dropout and drop path, where there is any.
    pub rng: Option<Tid>,
    /// Mean loss `[1]`.
    pub loss: Tid,
    /// `[N, classes]`.
    pub logits: Tid,
    /// How the weights' file names the parameters.
    pub names: FileNames,
    /// Elements of all parameters of the network, and of those that are trained.
    pub params: (usize, usize),
    /// Floating-point operations of the forward pass of one image.
    pub flops: u64,
    /// What recomputation saves, where it is asked for.
    pub recomputed: Option<crate::graph::recompute::Saving>,
    /// The network around a classifier that is trained alone.
    around: Option<Around>,
}

/// Tensors of the targets.
#[derive(Clone, Copy, Debug)]
pub struct Targets {
    /// Classes `[N]`.
    pub labels: Option<Tid>,
    /// Shares of each class `[N, classes]`, where samples are mixed.
    pub shares: Option<Tid>,
    /// The teacher's probabilities `[N, classes]`, or its classes `[N]`.
    pub teacher: Option<Tid>,
}

struct Around {
    graph: Graph,
    /// By parameter of the network; those of the classifier are brought up to date when they are asked for.
    values: Vec<Vec<f32>>,
    /// Where the classifier's parameters stand among them.
    places: Vec<usize>,
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
    /// The network that the weights are of, where `model` has fewer blocks.
    pub thinned: Option<&'a Thinned>,
    /// What augmentation fills with where it looks beyond the image: normalised black.
    pub fill: [f32; 3],
    /// Weight of each class in the loss.
    pub class_weights: Option<&'a [f32]>,
    /// Train the classifier alone, on features that were computed before.
    pub head_alone: bool,
}

/// The network with its loss, before it is fused and differentiated.
pub(super) struct Built {
    pub(super) net: Net,
    pub(super) loss: Tid,
    logits: Tid,
    loaded: Option<Loaded>,
    around: Option<Graph>,
    affine: Option<Tid>,
    targets: Targets,
    pub(super) params: (usize, usize),
    /// Inputs that stay as they are, with their values.
    constants: Vec<(Tid, Vec<f32>)>,
}

impl ProgramSpec<'_> {
    /// Whether the device resamples the images along their maps (else the loader does).
    pub fn moves_on_device(&self) -> bool {
        let c = self.config;
        c.augment.moves() && !self.moves_in_loader()
    }

    /// Whether what happens to the samples needs them resampled already: erasing, mixing, a teacher that looks at them.
    pub fn moves_in_loader(&self) -> bool {
        let c = self.config;
        c.augment.erase > 0.0 || c.mixes() || c.teacher.is_some()
    }

    fn load(&self, net: &Net) -> Result<Option<Loaded>> {
        let Some(file) = self.init else {
            return Ok(None);
        };
        let replace = self.config.replace_head;
        match self.thinned {
            Some(t) => t.load(net, (self.size, self.size), self.options, file, replace),
            None => load_net(self.model, net, file, replace),
        }
        .map(Some)
    }

    /// Builds the network and its loss.
    pub(super) fn build(&self) -> Result<Built> {
        let ProgramSpec { config, model, .. } = *self;
        let n = config.batch_size;
        let mut g = Graph::new();
        g.mode = Mode {
            batch_stats: true,
            random: true,
        };
        let mut constants = vec![];
        let mut input = g.input("input", Spec::f32([n, self.size, self.size, 3]));
        let mut x = input;
        let mut affine = None;
        if self.moves_on_device() {
            let m = g.input("affine", Spec::f32([n, 6]));
            let f = g.input("fill", Spec::f32([3]));
            x = g.affine_sample(x, m, f, true)?;
            affine = Some(m);
            constants.push((f, self.fill.to_vec()));
        }
        let heads = model.build(&mut g, x, self.options)?;
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
            grid: model.grid(self.size, self.size),
        };
        let loaded = self.load(&net)?;
        let g = &mut net.graph;
        groups::apply(config, g)?;
        let params = g.param_count();
        let mut around = None;
        if self.head_alone {
            let from = head::input_of(g);
            let from =
                from.ok_or_else(|| Error::run(format!("{} has not one classifier", model.id)))?;
            around = Some(g.clone());
            input = head::keep_after(g, from)?;
            net.input = input;
        }
        let classes = g.spec(logits).channels();
        let mut targets = Targets {
            labels: None,
            shares: None,
            teacher: None,
        };
        let target = if config.mixes() {
            let t = g.input("shares", Spec::f32([n, classes]));
            targets.shares = Some(t);
            t
        } else {
            let t = g.input("labels", Spec::u32([n]));
            targets.labels = Some(t);
            t
        };
        let weights = self.class_weights.map(|w| {
            let t = g.input("class_weights", Spec::f32([w.len()]));
            constants.push((t, w.to_vec()));
            t
        });
        // Each of two classifiers learns from its own: the labels, the teacher (Touvron et al. 2021, 3).
        let [labelled, taught] = match net.heads.taught {
            Some(two) if config.teacher.is_some() => two,
            _ => [logits; 2],
        };
        let mut loss = g.softmax_ce(
            labelled,
            target,
            weights,
            config.label_smoothing,
            config.focal,
        )?;
        if config.teacher.is_some() {
            let (t, of_teacher) = distillation(g, config, taught, &mut constants)?;
            targets.teacher = Some(t);
            let mut scaled = |g: &mut Graph, loss: Tid, by: f32| {
                let s = g.input("share_of_loss", Spec::f32([1]));
                constants.push((s, vec![by]));
                g.scoped("loss", |g| g.push1(ScaleBy, &[loss, s]))
            };
            let alpha = config.distill_alpha;
            let square = match config.distill_hard {
                true => 1.0,
                false => config.distill_temperature.powi(2),
            };
            let own = scaled(g, loss, 1.0 - alpha)?;
            let other = scaled(g, of_teacher, alpha * square)?;
            loss = g.scoped("loss", |g| g.add(own, other))?;
        }
        Ok(Built {
            net,
            loss,
            logits,
            loaded,
            around,
            affine,
            targets,
            params,
            constants,
        })
    }
}

/// The whole training graph, not yet compiled.
pub(super) struct Derived {
    pub(super) built: Built,
    update: Update,
    pub(super) recomputed: Option<crate::graph::recompute::Saving>,
    pub(super) flops: u64,
}

impl ProgramSpec<'_> {
    /// Builds, fuses and differentiates, and adds the update.
    pub(super) fn derive(&self) -> Result<Derived> {
        let config = self.config;
        let mut built = self.build()?;
        let (loss, logits) = (built.loss, built.logits);
        let g = &mut built.net.graph;
        g.keep(loss);
        g.keep(logits);
        fuse(g, Purpose::Gradients)?;
        let whole = built.around.as_ref().unwrap_or(g);
        let flops = whole.flops(Phase::Forward) / config.batch_size as u64;
        let grads = match config.teacher {
            // A sum of losses takes its gradient as an operand.
            Some(_) => {
                let one = g.input("one", Spec::f32([1]));
                built.constants.push((one, vec![1.0]));
                g.backward_from(&[(loss, one)], &[])?
            }
            None => g.backward(loss, &[])?,
        };
        let update = UpdateSpec {
            optimizer: config.optimizer(),
            weight_decay: config.weight_decay,
            clip: (config.clip > 0.0).then_some(config.clip),
            accumulate: config.accumulate,
        };
        let mut update = add_update(g, &grads, update)?;
        if config.ema > 0.0 {
            add_ema(g, &mut update)?;
        }
        let recomputed = match config.recompute {
            true => Some(crate::graph::recompute::apply(g)?),
            false => None,
        };
        Ok(Derived {
            built,
            update,
            recomputed,
            flops,
        })
    }
}

/// The teacher's part of the loss (Hinton et al. 2015): (input of what the teacher says, loss).
fn distillation(
    g: &mut Graph,
    config: &TrainConfig,
    logits: Tid,
    constants: &mut Vec<(Tid, Vec<f32>)>,
) -> Result<(Tid, Tid)> {
    let spec = g.spec(logits).clone();
    if config.distill_hard {
        let t = g.input("teacher", Spec::u32([spec.rows()]));
        return Ok((t, g.softmax_ce(logits, t, None, 0.0, 0.0)?));
    }
    let t = g.input("teacher", spec);
    let mut z = logits;
    if config.distill_temperature != 1.0 {
        let s = g.input("inverse_temperature", Spec::f32([1]));
        constants.push((s, vec![1.0 / config.distill_temperature]));
        z = g.scoped("loss", |g| g.push1(ScaleBy, &[logits, s]))?;
    }
    Ok((t, g.softmax_ce(z, t, None, 0.0, 0.0)?))
}

impl Program {
    /// Builds, differentiates and compiles.
    ///
    /// # Errors
    /// The model does not take that size or has no classifier, the weights do not fit, or the backend cannot run it.
    pub fn compile(backend: &dyn Backend, spec: &ProgramSpec) -> Result<Program> {
        let config = spec.config;
        let Derived {
            built,
            update,
            recomputed,
            flops,
        } = spec.derive()?;
        let Built {
            net,
            loss,
            logits,
            loaded,
            around,
            affine,
            targets,
            params,
            constants,
        } = built;
        let g = &net.graph;
        let whole = around.as_ref().unwrap_or(g);
        let names = match &loaded {
            Some(l) => l.names.clone(),
            None => FileNames::plain(whole, spec.model.naming()),
        };
        let rng = g.rng;
        let mut exec = backend.compile(Arc::new(net.graph), &CompileOptions::default())?;
        for (t, values) in &constants {
            exec.write(*t, values)?;
        }
        let from: Option<(&Loaded, &WeightFile)> = loaded.as_ref().zip(spec.init);
        let around = match around {
            Some(graph) => Some(Around::new(graph, exec.as_mut(), from, config.seed)?),
            None => {
                write_parameters(exec.as_mut(), from, config.seed)?;
                None
            }
        };
        update.start_ema(exec.as_mut())?;
        Ok(Program {
            exec,
            update,
            input: net.input,
            targets,
            affine,
            rng,
            loss,
            logits,
            names,
            params,
            flops,
            recomputed,
            around,
        })
    }

    /// Writes a batch, and the key of what is drawn at random in it. `teacher` is what the teacher says of it.
    ///
    /// # Errors
    /// The device is lost.
    pub fn feed(&mut self, batch: &mut Batch, key: [u32; 4], teacher: Option<&Said>) -> Result<()> {
        let exec = self.exec.as_mut();
        exec.write(self.input, &batch.images)?;
        if let Some(t) = self.targets.labels {
            // Slots that only repeat an image (unreadable ones were left out) do not count.
            batch.labels[batch.valid..].fill(IGNORED);
            exec.write_u32(t, &batch.labels)?;
        }
        if let Some(t) = self.targets.shares {
            exec.write(t, &batch.targets)?;
        }
        match (self.targets.teacher, teacher) {
            (Some(t), Some(Said::Shares(shares))) => exec.write(t, shares)?,
            (Some(t), Some(Said::Classes(classes))) => exec.write_u32(t, classes)?,
            _ => {}
        }
        if let Some(m) = self.affine {
            exec.write(m, bytemuck::cast_slice(&batch.affine))?;
        }
        if let Some(rng) = self.rng {
            exec.write_u32(rng, &key)?;
        }
        Ok(())
    }

    /// The parameters and running statistics to evaluate, in the order of the compiled graph: their moving averages,
    /// where there are any.
    ///
    /// # Errors
    /// The device is lost.
    pub fn values(&mut self) -> Result<Vec<Vec<f32>>> {
        let mut values = super::checkpoint::read_params(self.exec.as_mut())?;
        for slab in &self.update.slabs {
            let Some(average) = slab.average() else {
                continue;
            };
            let all = self.exec.read(average)?;
            for &(i, offset) in &slab.members {
                let len = values[i].len();
                values[i].copy_from_slice(&all[offset..offset + len]);
            }
        }
        Ok(values)
    }

    /// Writes a weight file of the whole network with [`values`](Self::values) in it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(
        &mut self,
        path: &Path,
        values: &[Vec<f32>],
        steps: u64,
        metadata: &BTreeMap<String, String>,
    ) -> Result<()> {
        let (graph, values) = match &mut self.around {
            Some(a) => {
                for (&i, v) in a.places.iter().zip(values) {
                    a.values[i].clone_from(v);
                }
                (&a.graph, a.values.clone())
            }
            None => (self.exec.graph(), values.to_vec()),
        };
        let steps = steps as i64;
        self.names
            .save(path, graph, values, steps, metadata, FloatFormat::F32)
    }

    /// Whether only the classifier is compiled.
    pub fn head_alone(&self) -> bool {
        self.around.is_some()
    }
}

impl Around {
    /// Writes the classifier's parameters to `exec` and keeps the others.
    fn new(
        graph: Graph,
        exec: &mut dyn Exec,
        weights: Option<(&Loaded, &WeightFile)>,
        seed: u64,
    ) -> Result<Around> {
        let mut values = vec![];
        for i in 0..graph.params.len() {
            let from_file = match weights {
                Some((loaded, file)) => loaded.value(&graph, file, i)?,
                None => None,
            };
            values.push(from_file.unwrap_or_else(|| initial_of(&graph, i, seed)));
        }
        let places = head::places(exec.graph(), &graph);
        for (i, &place) in places.iter().enumerate() {
            let tid = exec.graph().params[i].tid;
            exec.write(tid, &values[place])?;
        }
        Ok(Around {
            graph,
            values,
            places,
        })
    }
}

/// What a teacher says of a batch.
#[derive(Clone, Debug)]
pub enum Said {
    /// Probabilities `[N, classes]`.
    Shares(Vec<f32>),
    /// The most probable classes `[N]`.
    Classes(Vec<u32>),
}
