//! The optimizer's part of a training graph: parameters, gradients and state side by side in slabs, so that clipping
//! and the update are a few launches however many layers there are.

use super::{Graph, Kind, Phase, Spec, Tid};
use crate::backend::Exec;
use crate::ops::optim::{Accumulate, AdamW, Fill0, GradNorm, Sgd};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};

/// Elements after which a slab is closed: 32 MiB, so that a slab can be bound as one buffer on any GPU.
const SLAB: usize = 8 << 20;
/// Members of a slab start at multiples of this many elements (256 bytes, WebGPU's offset alignment).
const ALIGN: usize = 64;

/// Which update rule, as in torch.optim.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Optimizer {
    /// Loshchilov & Hutter 2019: decay apart from the gradient.
    AdamW {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// Kingma & Ba 2015: decay as L2 penalty.
    Adam {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// Momentum as in PyTorch (no dampening).
    Sgd {
        /// Factor on the velocity.
        momentum: f64,
        /// Sutskever et al. 2013.
        nesterov: bool,
    },
}

/// The settings of an update.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct UpdateSpec {
    /// Update rule.
    pub optimizer: Optimizer,
    /// For parameters with decay.
    pub weight_decay: f64,
    /// Global L2 norm that gradients are clipped to.
    pub clip: Option<f64>,
    /// Micro-batches whose gradients are averaged for one update.
    pub accumulate: usize,
}

/// A run of parameters with the same settings, contiguous in memory.
#[derive(Clone, Debug)]
pub struct Slab {
    /// Their values.
    pub param: Tid,
    /// Their gradients.
    pub grad: Tid,
    /// Optimizer state by name: `exp_avg`, `exp_avg_sq` or `momentum_buffer`, as torch.optim calls them; `average`.
    pub state: Vec<(&'static str, Tid)>,
    /// Places in [`Graph::params`] with the first element of each.
    pub members: Vec<(usize, usize)>,
}

impl Slab {
    /// The moving average of the values, where one is kept.
    pub fn average(&self) -> Option<Tid> {
        let state = self.state.iter().find(|(name, _)| *name == AVERAGE);
        state.map(|&(_, t)| t)
    }
}

/// Name of the moving average among a slab's state.
const AVERAGE: &str = "average";

/// The update that was added to a graph.
#[derive(Clone, Debug)]
pub struct Update {
    /// `[lr, bias correction 1, bias correction 2, gradient factor, 0...]`, written before each update.
    pub hyper: Tid,
    /// `[norm, factor]` of clipping.
    pub norm: Option<Tid>,
    /// Slabs.
    pub slabs: Vec<Slab>,
    /// Of the moving average, where one is kept: written before each update.
    pub ema: Option<Tid>,
    spec: UpdateSpec,
}

impl Update {
    /// The values of [`hyper`](Self::hyper) for update number `step` (from 1) at learning rate `lr`.
    pub fn hyper_values(&self, step: u64, lr: f64) -> [f32; 8] {
        let correction = |beta: f64| 1.0 - beta.powf(step as f64);
        let (c1, c2) = match self.spec.optimizer {
            Optimizer::AdamW { beta1, beta2, .. } | Optimizer::Adam { beta1, beta2, .. } => {
                (correction(beta1), correction(beta2))
            }
            // The first update sets the velocity to the gradient, as in PyTorch.
            Optimizer::Sgd { .. } => (1.0, 1.0),
        };
        let scale = 1.0 / self.spec.accumulate.max(1) as f64;
        [
            lr as f32,
            c1 as f32,
            c2 as f32,
            scale as f32,
            0.0,
            0.0,
            0.0,
            0.0,
        ]
    }
}

impl Update {
    /// The values of [`ema`](Self::ema) for update number `step` (from 1) with decay `decay`; the first updates have
    /// less, `(1 + step) / (10 + step)`, so that the average leaves the start behind.
    pub fn ema_values(decay: f64, step: u64) -> [f32; 8] {
        let step = step as f64;
        let decay = decay.min((1.0 + step) / (10.0 + step));
        [-(1.0 - decay) as f32, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    }

    /// Sets the moving averages to the parameters as they are.
    ///
    /// # Errors
    /// The device is lost.
    pub fn start_ema(&self, exec: &mut dyn Exec) -> Result<()> {
        for slab in &self.slabs {
            if let Some(average) = slab.average() {
                let values = exec.read(slab.param)?;
                exec.write(average, &values)?;
            }
        }
        Ok(())
    }
}

/// Adds a moving average of the parameters after `update`: `average += (1 - decay) (param - average)`, which is SGD with
/// the parameters in the gradient's place, weight decay -1 and the rate `-(1 - decay)`.
///
/// # Errors
/// None in practice.
pub fn add_ema(graph: &mut Graph, update: &mut Update) -> Result<()> {
    let hyper = graph.input("ema", Spec::f32([8]));
    for slab in &mut update.slabs {
        let len = graph.spec(slab.param).len();
        let name = format!("slab:{AVERAGE}");
        let average = graph.add_tensor(name, Spec::f32([len]), Kind::State);
        slab.state.push((AVERAGE, average));
        let op = Sgd {
            lr_scale: 1.0,
            weight_decay: -1.0,
            momentum: 0.0,
            nesterov: false,
            clip: false,
        };
        graph.in_phase(Phase::Optimizer, |g| {
            g.push(op, &[average, slab.param, hyper])
        })?;
    }
    update.ema = Some(hyper);
    Ok(())
}

/// Adds clipping, the update and gradient accumulation to `graph`, whose gradients are `grads`
/// (from [`Graph::backward`]).
///
/// # Errors
/// A trainable parameter has no gradient: it does not reach the loss.
pub fn add_update(
    graph: &mut Graph,
    grads: &HashMap<Tid, Tid>,
    spec: UpdateSpec,
) -> Result<Update> {
    let mut groups: BTreeMap<(bool, u32), Vec<Vec<usize>>> = BTreeMap::new();
    for (i, p) in graph.params.iter().enumerate().filter(|(_, p)| p.trainable) {
        if !grads.contains_key(&p.tid) {
            return Err(Error::run(format!(
                "{} is trainable but does not reach the loss",
                p.name
            )));
        }
        let size = |ids: &[usize]| ids.iter().map(|&i| padded(graph, i)).sum::<usize>();
        let slabs = groups.entry((!p.decay, p.lr_scale.to_bits())).or_default();
        match slabs.last_mut() {
            Some(last) if size(last) + padded(graph, i) <= SLAB => last.push(i),
            _ => slabs.push(vec![i]),
        }
    }
    if groups.is_empty() {
        return Err(Error::input(
            "there is nothing to train: every parameter is frozen",
        ));
    }
    let hyper = graph.input("hyper", Spec::f32([8]));
    let mut slabs = vec![];
    let mut settings = vec![];
    for ((no_decay, scale), members) in groups {
        for ids in members {
            let decay = if no_decay { 0.0 } else { spec.weight_decay };
            settings.push((decay, f64::from(f32::from_bits(scale))));
            slabs.push(make_slab(graph, grads, &spec, &ids)?);
        }
    }
    let norm = graph.in_phase(Phase::Optimizer, |g| {
        update_nodes(g, &slabs, &settings, &spec, hyper)
    })?;
    Ok(Update {
        hyper,
        norm,
        slabs,
        ema: None,
        spec,
    })
}

fn padded(graph: &Graph, param: usize) -> usize {
    graph
        .spec(graph.params[param].tid)
        .len()
        .next_multiple_of(ALIGN)
}

fn make_slab(
    graph: &mut Graph,
    grads: &HashMap<Tid, Tid>,
    spec: &UpdateSpec,
    ids: &[usize],
) -> Result<Slab> {
    let len: usize = ids.iter().map(|&i| padded(graph, i)).sum();
    let mut state_tensor =
        |name: &str| graph.add_tensor(format!("slab:{name}"), Spec::f32([len]), Kind::State);
    let param = state_tensor("param");
    let grad = state_tensor("grad");
    let names: &[&'static str] = match spec.optimizer {
        Optimizer::AdamW { .. } | Optimizer::Adam { .. } => &["exp_avg", "exp_avg_sq"],
        Optimizer::Sgd { momentum, .. } if momentum != 0.0 => &["momentum_buffer"],
        Optimizer::Sgd { .. } => &[],
    };
    let state = names.iter().map(|&n| (n, state_tensor(n))).collect();
    let mut members = vec![];
    let mut offset = 0;
    for &i in ids {
        let p = graph.params[i].clone();
        members.push((i, offset));
        graph.tensor_mut(p.tid).view = Some((param, offset));
        let (root, shift) = graph.root(grads[&p.tid]);
        let whole = shift == 0 && graph.spec(root).len() == graph.spec(p.tid).len();
        if spec.accumulate > 1 {
            let shape = graph.shape(p.tid).to_vec();
            let sum = graph.add_tensor(format!("{}.grad", p.name), Spec::f32(shape), Kind::State);
            graph.tensor_mut(sum).view = Some((grad, offset));
            let shape = graph.shape(p.tid).to_vec();
            let g = graph.view(grads[&p.tid], &shape)?;
            graph.scoped(p.name.clone(), |gr| {
                gr.in_phase(Phase::Backward, |gr| gr.push(Accumulate, &[sum, g]))
            })?;
        } else if whole && graph.tensor(root).kind == Kind::Temp {
            graph.tensor_mut(root).view = Some((grad, offset));
        } else {
            return Err(Error::run(format!(
                "the gradient of {} shares its memory with another's",
                p.name
            )));
        }
        offset += padded(graph, i);
    }
    Ok(Slab {
        param,
        grad,
        state,
        members,
    })
}

fn update_nodes(
    g: &mut Graph,
    slabs: &[Slab],
    settings: &[(f64, f64)],
    spec: &UpdateSpec,
    hyper: Tid,
) -> Result<Option<Tid>> {
    let norm = match spec.clip {
        Some(max_norm) => {
            let operands: Vec<Tid> = slabs.iter().map(|s| s.grad).chain([hyper]).collect();
            let n = g.push1(
                GradNorm {
                    max_norm,
                    scaled: true,
                },
                &operands,
            )?;
            g.keep(n);
            Some(n)
        }
        None => None,
    };
    for (s, &(weight_decay, lr_scale)) in slabs.iter().zip(settings) {
        let clip = norm.is_some();
        let operands: Vec<Tid> = [s.param, s.grad]
            .into_iter()
            .chain(s.state.iter().map(|x| x.1))
            .chain([hyper])
            .chain(norm)
            .collect();
        match spec.optimizer {
            Optimizer::AdamW { beta1, beta2, eps } => g.push(
                AdamW {
                    lr_scale,
                    weight_decay,
                    beta1,
                    beta2,
                    eps,
                    decoupled: true,
                    clip,
                },
                &operands,
            )?,
            Optimizer::Adam { beta1, beta2, eps } => g.push(
                AdamW {
                    lr_scale,
                    weight_decay,
                    beta1,
                    beta2,
                    eps,
                    decoupled: false,
                    clip,
                },
                &operands,
            )?,
            Optimizer::Sgd { momentum, nesterov } => g.push(
                Sgd {
                    lr_scale,
                    weight_decay,
                    momentum,
                    nesterov,
                    clip,
                },
                &operands,
            )?,
        };
        if spec.accumulate > 1 {
            g.push(Fill0, &[s.grad])?;
        }
    }
    Ok(norm)
}
