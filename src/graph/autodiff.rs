//! Backward nodes, derived per op in reverse order and stopping where nothing trainable lies before.

use super::{Graph, Kind, Node, Phase, Tid};
use crate::ops::Op;
use crate::ops::elementwise::Add;
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;

/// The state of one derivation; op rooms write their backward rule against it.
pub struct Backward<'g> {
    /// The graph that grows.
    pub graph: &'g mut Graph,
    /// The gradient of each tensor so far.
    grads: HashMap<Tid, Tid>,
    /// Tensors whose gradient is needed: trainable parameters, asked-for inputs and what depends on them.
    wanted: Vec<bool>,
    /// Outputs whose gradient is one: a scalar loss at the root.
    unit: Vec<Tid>,
}

/// What an op's backward rule is given about its node.
#[derive(Clone, Debug)]
pub struct Fwd {
    /// Operands of the forward node.
    pub inputs: Vec<Tid>,
    /// Results of the forward node.
    pub outputs: Vec<Tid>,
}

impl Graph {
    /// Appends the backward nodes of `loss` (a scalar, gradient 1) and returns the gradient of each wanted tensor:
    /// every trainable parameter, and `also` (inputs, or activations for saliency).
    ///
    /// # Errors
    /// An op on the way cannot be differentiated.
    pub fn backward(&mut self, loss: Tid, also: &[Tid]) -> Result<HashMap<Tid, Tid>> {
        self.derive(&[], &[loss], also)
    }

    /// Appends the backward nodes for the given cotangents (output, cotangent of the same shape).
    ///
    /// # Errors
    /// An op on the way cannot be differentiated.
    pub fn backward_from(
        &mut self,
        cotangents: &[(Tid, Tid)],
        also: &[Tid],
    ) -> Result<HashMap<Tid, Tid>> {
        self.derive(cotangents, &[], also)
    }

    fn derive(
        &mut self,
        cotangents: &[(Tid, Tid)],
        unit: &[Tid],
        also: &[Tid],
    ) -> Result<HashMap<Tid, Tid>> {
        let mut wanted = vec![false; self.tensors.len()];
        for p in self.params.iter().filter(|p| p.trainable) {
            wanted[p.tid.index()] = true;
        }
        for t in also {
            wanted[t.index()] = true;
        }
        // Views carry the wish of their base; a node's results are wanted when any operand is.
        let spread = |wanted: &mut Vec<bool>, tensors: &[super::Tensor]| {
            for (i, t) in tensors.iter().enumerate() {
                if let Some((base, _)) = t.view {
                    wanted[i] |= wanted[base.index()];
                }
            }
        };
        let forward: Vec<Node> = self
            .nodes
            .iter()
            .filter(|n| n.phase == Phase::Forward)
            .cloned()
            .collect();
        spread(&mut wanted, &self.tensors);
        for n in &forward {
            if n.inputs.iter().any(|t| wanted[t.index()]) {
                for (i, o) in n.outputs.iter().enumerate() {
                    if !n.op.updates().iter().any(|u| u.0 == i) {
                        wanted[o.index()] = true;
                    }
                }
                spread(&mut wanted, &self.tensors);
            }
        }
        let mut cx = Backward {
            graph: self,
            grads: HashMap::new(),
            wanted,
            unit: unit.to_vec(),
        };
        for &(t, g) in cotangents {
            cx.give(t, g)?;
        }
        for n in forward.iter().rev() {
            let reached = n
                .outputs
                .iter()
                .any(|o| cx.grads.contains_key(o) || cx.unit.contains(o));
            if !reached || !n.inputs.iter().any(|&t| cx.wants(t)) {
                continue;
            }
            let fwd = Fwd {
                inputs: n.inputs.clone(),
                outputs: n.outputs.clone(),
            };
            let scope = std::mem::replace(&mut cx.graph.scope, vec![n.scope.clone()]);
            let phase = cx.graph.phase.replace(Phase::Backward);
            let done = n.op.backward(&fwd, &mut cx);
            cx.graph.scope = scope;
            cx.graph.phase = phase;
            done.map_err(|e| e.context(format!("{} ({})", n.scope, n.op.name())))?;
        }
        Ok(cx.grads)
    }
}

impl Backward<'_> {
    /// Whether the gradient of `t` is needed.
    pub fn wants(&self, t: Tid) -> bool {
        self.wanted.get(t.index()).copied().unwrap_or(false)
    }

    /// The gradient of a forward result, where one arrived.
    pub fn grad(&self, t: Tid) -> Option<Tid> {
        self.grads.get(&t).copied()
    }

    /// The gradient of a forward result that must have one.
    ///
    /// # Errors
    /// Nothing downstream gave one: the graph uses an output that is not differentiable through here.
    pub fn need(&self, t: Tid) -> Result<Tid> {
        self.grad(t)
            .ok_or_else(|| Error::run(format!("no gradient reached {}", self.graph.tensor(t).name)))
    }

    /// True where `t` is the scalar loss that the derivation started from (gradient 1).
    pub fn is_unit(&self, t: Tid) -> bool {
        self.unit.contains(&t) && !self.grads.contains_key(&t)
    }

    /// Takes the gradient that `t` has so far, for an op that can fold it in as an addend; the op must [`give`] the sum.
    ///
    /// [`give`]: Self::give
    pub fn take_partial(&mut self, t: Tid) -> Option<Tid> {
        // A view's gradient is kept with its base.
        if self.graph.tensor(t).view.is_some() {
            None
        } else {
            self.grads.remove(&t)
        }
    }

    /// Adds `g` to the gradient of `t`.
    ///
    /// # Errors
    /// Shapes differ.
    pub fn give(&mut self, t: Tid, g: Tid) -> Result<()> {
        if !self.wants(t) {
            return Ok(());
        }
        if let Some((base, _)) = self.graph.tensor(t).view {
            let shape = self.graph.shape(base).to_vec();
            let g = if self.graph.shape(g) == shape {
                g
            } else {
                self.graph.view(g, &shape)?
            };
            return self.give(base, g);
        }
        let sum = match self.grads.remove(&t) {
            Some(before) => self.emit1(Add::new(false), &[before, g])?,
            None => g,
        };
        self.grads.insert(t, sum);
        // Views of `t` made for later readers see the same gradient under their own shape.
        Ok(())
    }

    /// Appends a backward node.
    ///
    /// # Errors
    /// The op's shape rule does not hold.
    pub fn emit(&mut self, op: impl Op, inputs: &[Tid]) -> Result<Vec<Tid>> {
        let out = self.graph.push_arc(Arc::new(op), inputs)?;
        self.wanted.resize(self.graph.tensors.len(), false);
        Ok(out)
    }

    /// [`emit`](Self::emit) for the first output.
    ///
    /// # Errors
    /// As [`emit`](Self::emit).
    pub fn emit1(&mut self, op: impl Op, inputs: &[Tid]) -> Result<Tid> {
        Ok(self.emit(op, inputs)?[0])
    }

    /// True where `t` is a parameter's tensor.
    pub fn is_param(&self, t: Tid) -> bool {
        matches!(self.graph.tensor(t).kind, Kind::Param(_))
    }
}
