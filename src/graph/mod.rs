//! The static-shape graph: tensors, nodes, parameters; what everything else reads.
//!
//! A model builder appends nodes; shapes are checked as they are appended, so a mismatch names the layer and both
//! shapes. [`fuse`](fn@fuse) rewrites it, [`autodiff`] appends the backward nodes, [`plan`] places its tensors.

pub mod autodiff;
pub mod fuse;
pub mod plan;
pub mod recompute;
pub mod train;

use crate::ops::Op;
use crate::{Error, Result};
use std::sync::Arc;

pub use autodiff::Backward;
pub use fuse::fuse;

/// A tensor of a [`Graph`], by its place in [`Graph::tensors`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Tid(pub u32);

impl Tid {
    /// The place in [`Graph::tensors`].
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Element type. Every element is 4 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 32-bit unsigned integer: class labels, argmax positions, random-number keys.
    U32,
}

/// Shape and element type of an operand.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spec {
    /// Extents, outermost first; `[]` is not used (a scalar is `[1]`).
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

impl Spec {
    /// A float32 tensor of `shape`.
    pub fn f32(shape: impl Into<Vec<usize>>) -> Self {
        Spec {
            shape: shape.into(),
            dtype: DType::F32,
        }
    }

    /// A uint32 tensor of `shape`.
    pub fn u32(shape: impl Into<Vec<usize>>) -> Self {
        Spec {
            shape: shape.into(),
            dtype: DType::U32,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True when there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The innermost extent: channels of `[N, H, W, C]`, features of `[N, C]`.
    pub fn channels(&self) -> usize {
        *self.shape.last().expect("a tensor has at least one extent")
    }

    /// Rows of the tensor seen as a matrix `[rows, channels]`.
    pub fn rows(&self) -> usize {
        self.len() / self.channels().max(1)
    }
}

/// What a tensor is for, which decides where it lives and for how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Written by the host before a run; persistent.
    Input,
    /// A learnable parameter or a running statistic, described in [`Graph::params`]; persistent.
    Param(usize),
    /// Optimizer state, gradient slabs: persistent, made by the plan, zero at first.
    State,
    /// Made and used up within one run; placed by lifetime.
    Temp,
}

/// One tensor.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Scope and role, for messages, taps and traces.
    pub name: String,
    /// Shape and element type.
    pub spec: Spec,
    /// Role.
    pub kind: Kind,
    /// `Some((base, offset))`: not memory of its own but elements `offset..` of `base`.
    pub view: Option<(Tid, usize)>,
    /// Kept to the end of the run, so that the host can read it.
    pub keep: bool,
}

/// How a parameter's elements stand relative to PyTorch's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// The same order as in PyTorch.
    Plain,
    /// `[K, R, S, C]` here, `[K, C, R, S]` in PyTorch.
    Ohwi,
}

/// How a parameter starts when it is trained from scratch.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// One value.
    Const(f32),
    /// Normal with this standard deviation.
    Normal(f32),
    /// Normal cut at two standard deviations... of PyTorch's `trunc_normal_` (cut at +-2 absolute), this deviation.
    TruncNormal(f32),
    /// He et al. 2015: normal, std = sqrt(2 / fan_out).
    KaimingFanOut,
    /// PyTorch's default for Linear and Conv2d: uniform in +-1/sqrt(fan_in) with the given fan-in.
    UniformFanIn(usize),
    /// Glorot & Bengio 2010: uniform in +-sqrt(6 / (fan_in + fan_out)).
    XavierUniform,
}

/// A named learnable parameter or running statistic.
#[derive(Clone, Debug)]
pub struct Param {
    /// Name in this program's own naming (`layer1.0.conv1.weight`).
    pub name: String,
    /// Its tensor.
    pub tid: Tid,
    /// Order of the elements relative to PyTorch's.
    pub layout: Layout,
    /// Initial values.
    pub init: Init,
    /// Weight decay applies (matrices and filters; not norms, biases, tokens).
    pub decay: bool,
    /// False for running statistics and frozen parameters.
    pub trainable: bool,
    /// Factor on the learning rate (layer-wise decay).
    pub lr_scale: f32,
    /// True for BatchNorm's running statistics: saved and loaded, never differentiated.
    pub buffer: bool,
}

/// When a node runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Phase {
    /// Once after the parameters were written: BatchNorm folding, weight packing.
    Prepare,
    /// The network and its loss.
    Forward,
    /// Gradients.
    Backward,
    /// Clipping and the update.
    Optimizer,
}

/// One op applied to tensors.
#[derive(Clone, Debug)]
pub struct Node {
    /// What is done.
    pub op: Arc<dyn Op>,
    /// Operands.
    pub inputs: Vec<Tid>,
    /// Results; a tensor that is also an input is updated in place.
    pub outputs: Vec<Tid>,
    /// The layer that it belongs to, as in the parameter names: `layer1.0.conv1`.
    pub scope: String,
    /// When it runs.
    pub phase: Phase,
}

/// A named intermediate result that users ask for: a stage's or a block's output.
#[derive(Clone, Debug)]
pub struct Tap {
    /// `stem`, `layer1`, `blocks.0`, ...
    pub name: String,
    /// The tensor.
    pub tid: Tid,
}

/// What the builder's layers do that behave differently in training and in evaluation.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Mode {
    /// Batch norm normalises by the batch's own statistics, and updates the running ones.
    pub batch_stats: bool,
    /// Dropout and drop path draw their masks.
    pub random: bool,
}

/// A network (and, after [`autodiff`], its gradients and update) as a list of nodes in order of execution.
#[derive(Clone, Debug, Default)]
pub struct Graph {
    /// Every tensor.
    pub tensors: Vec<Tensor>,
    /// Every node, in an order in which they can run.
    pub nodes: Vec<Node>,
    /// Parameters and running statistics, in the model's order.
    pub params: Vec<Param>,
    /// Stage and block outputs.
    pub taps: Vec<Tap>,
    /// How layers behave that differ between training and evaluation.
    pub mode: Mode,
    /// The random state that dropout and drop path read, where the graph has them.
    pub rng: Option<Tid>,
    /// The scope that new nodes get.
    scope: Vec<String>,
    /// The phase that new nodes get.
    phase: Option<Phase>,
}

impl Graph {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shape and type of `t`.
    pub fn spec(&self, t: Tid) -> &Spec {
        &self.tensors[t.index()].spec
    }

    /// Shape of `t`.
    pub fn shape(&self, t: Tid) -> &[usize] {
        &self.tensors[t.index()].spec.shape
    }

    /// The tensor `t`.
    pub fn tensor(&self, t: Tid) -> &Tensor {
        &self.tensors[t.index()]
    }

    /// The tensor `t`, to be changed.
    pub fn tensor_mut(&mut self, t: Tid) -> &mut Tensor {
        &mut self.tensors[t.index()]
    }

    /// Appends a tensor without a node.
    pub fn add_tensor(&mut self, name: impl Into<String>, spec: Spec, kind: Kind) -> Tid {
        self.tensors.push(Tensor {
            name: name.into(),
            spec,
            kind,
            view: None,
            keep: false,
        });
        Tid(self.tensors.len() as u32 - 1)
    }

    /// A tensor that the host writes before each run.
    pub fn input(&mut self, name: impl Into<String>, spec: Spec) -> Tid {
        self.add_tensor(name, spec, Kind::Input)
    }

    /// A learnable parameter under the current scope.
    pub fn param(
        &mut self,
        leaf: &str,
        shape: &[usize],
        layout: Layout,
        init: Init,
        decay: bool,
    ) -> Tid {
        self.add_param(leaf, shape, layout, init, decay, false)
    }

    /// A running statistic under the current scope.
    pub fn buffer(&mut self, leaf: &str, shape: &[usize], init: Init) -> Tid {
        self.add_param(leaf, shape, Layout::Plain, init, false, true)
    }

    fn add_param(
        &mut self,
        leaf: &str,
        shape: &[usize],
        layout: Layout,
        init: Init,
        decay: bool,
        buffer: bool,
    ) -> Tid {
        let name = self.path(leaf);
        let tid = self.add_tensor(
            name.clone(),
            Spec::f32(shape),
            Kind::Param(self.params.len()),
        );
        self.params.push(Param {
            name,
            tid,
            layout,
            init,
            decay,
            trainable: !buffer,
            lr_scale: 1.0,
            buffer,
        });
        tid
    }

    /// `leaf` under the current scope, joined by dots.
    pub fn path(&self, leaf: &str) -> String {
        let mut parts: Vec<&str> = self
            .scope
            .iter()
            .map(String::as_str)
            .filter(|s| !s.is_empty())
            .collect();
        if !leaf.is_empty() {
            parts.push(leaf);
        }
        parts.join(".")
    }

    /// Runs `body` with `name` appended to the scope.
    pub fn scoped<T>(
        &mut self,
        name: impl Into<String>,
        body: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        self.scope.push(name.into());
        let out = body(self);
        self.scope.pop();
        out
    }

    /// Runs `body` with this phase for new nodes (default: forward).
    pub fn in_phase<T>(
        &mut self,
        phase: Phase,
        body: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let before = self.phase.replace(phase);
        let out = body(self);
        self.phase = before;
        out
    }

    /// Appends a node and makes its outputs.
    ///
    /// # Errors
    /// The op's shape rule does not hold: the message names the layer, the op and the shapes.
    pub fn push(&mut self, op: impl Op, inputs: &[Tid]) -> Result<Vec<Tid>> {
        self.push_arc(Arc::new(op), inputs)
    }

    /// [`push`](Self::push) for an op with exactly one output of interest: its first.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push1(&mut self, op: impl Op, inputs: &[Tid]) -> Result<Tid> {
        Ok(self.push(op, inputs)?[0])
    }

    /// [`push`](Self::push) for a shared op.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn push_arc(&mut self, op: Arc<dyn Op>, inputs: &[Tid]) -> Result<Vec<Tid>> {
        let scope = self.path("");
        let specs: Vec<Spec> = inputs.iter().map(|&t| self.spec(t).clone()).collect();
        let results = op.infer(&specs).map_err(|why| {
            let shapes: Vec<String> = specs.iter().map(|s| format!("{:?}", s.shape)).collect();
            let layer = if scope.is_empty() {
                "the graph"
            } else {
                &scope
            };
            Error::input(format!(
                "{layer}: {} {why} (operands {})",
                op.name(),
                shapes.join(", ")
            ))
        })?;
        let updates = op.updates();
        let mut outputs = Vec::with_capacity(results.len());
        for (i, spec) in results.into_iter().enumerate() {
            match updates.iter().find(|u| u.0 == i) {
                Some(&(_, input)) => outputs.push(inputs[input]),
                None => {
                    let name = if i == 0 {
                        format!("{scope}:{}", op.name())
                    } else {
                        format!("{scope}:{}.{i}", op.name())
                    };
                    outputs.push(self.add_tensor(name, spec, Kind::Temp));
                }
            }
        }
        let phase = self.phase.unwrap_or(Phase::Forward);
        self.nodes.push(Node {
            op,
            inputs: inputs.to_vec(),
            outputs: outputs.clone(),
            scope,
            phase,
        });
        Ok(outputs)
    }

    /// The same elements under another shape; no copy.
    ///
    /// # Errors
    /// The number of elements differs.
    pub fn view(&mut self, t: Tid, shape: &[usize]) -> Result<Tid> {
        let from = self.tensor(t).clone();
        if from.spec.len() != shape.iter().product::<usize>() {
            return Err(Error::input(format!(
                "{}: cannot see {:?} as {shape:?}: the number of elements differs",
                from.name, from.spec.shape
            )));
        }
        let id = self.add_tensor(
            from.name,
            Spec {
                shape: shape.to_vec(),
                dtype: from.spec.dtype,
            },
            from.kind,
        );
        self.tensor_mut(id).view = Some((t, 0));
        Ok(id)
    }

    /// The tensor that owns the memory of `t`, and the offset in elements in it.
    pub fn root(&self, mut t: Tid) -> (Tid, usize) {
        let mut offset = 0;
        while let Some((base, o)) = self.tensor(t).view {
            offset += o;
            t = base;
        }
        (t, offset)
    }

    /// Names `t` as a stage's or a block's output. It is kept only when a caller asks for the taps.
    pub fn tap(&mut self, name: impl Into<String>, t: Tid) {
        self.taps.push(Tap {
            name: name.into(),
            tid: t,
        });
    }

    /// Marks `t` (its memory's owner) as read by the host after the run.
    pub fn keep(&mut self, t: Tid) {
        let (root, _) = self.root(t);
        self.tensor_mut(root).keep = true;
        self.tensor_mut(t).keep = true;
    }

    /// Learnable parameters: (number of elements, of which trainable).
    pub fn param_count(&self) -> (usize, usize) {
        let count = |f: &dyn Fn(&Param) -> bool| {
            self.params
                .iter()
                .filter(|p| !p.buffer && f(p))
                .map(|p| self.spec(p.tid).len())
                .sum()
        };
        (count(&|_| true), count(&|p| p.trainable))
    }

    /// Floating-point operations of the nodes in `phase` (a multiply-add is 2).
    pub fn flops(&self, phase: Phase) -> u64 {
        self.nodes
            .iter()
            .filter(|n| n.phase == phase)
            .map(|n| self.node_cost(n).flops)
            .sum()
    }

    /// FLOPs and compulsory bytes of one node.
    pub fn node_cost(&self, node: &Node) -> crate::ops::Cost {
        let (i, o) = self.node_specs(node);
        node.op.cost(&i, &o)
    }

    /// Operand and result specs of one node.
    pub fn node_specs(&self, node: &Node) -> (Vec<Spec>, Vec<Spec>) {
        let of = |ids: &[Tid]| ids.iter().map(|&t| self.spec(t).clone()).collect();
        (of(&node.inputs), of(&node.outputs))
    }
}
