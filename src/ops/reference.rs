//! Float64 tensors on the host, and the interpreter that runs a graph by its ops' references.

use crate::graph::{Graph, Phase, Spec, Tid};
use std::collections::HashMap;

/// A tensor in float64. Unsigned integers are held exactly.
#[derive(Clone, PartialEq, Debug)]
pub struct Host {
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// Row-major elements.
    pub data: Vec<f64>,
}

impl Host {
    /// All zero.
    pub fn zeros(shape: &[usize]) -> Self {
        Host {
            shape: shape.to_vec(),
            data: vec![0.0; shape.iter().product()],
        }
    }

    /// From float32 values.
    pub fn from_f32(shape: &[usize], data: &[f32]) -> Self {
        Host {
            shape: shape.to_vec(),
            data: data.iter().map(|&v| f64::from(v)).collect(),
        }
    }

    /// Innermost extent.
    pub fn channels(&self) -> usize {
        *self.shape.last().expect("a tensor has at least one extent")
    }

    /// Rows of the tensor seen as `[rows, channels]`.
    pub fn rows(&self) -> usize {
        self.data.len() / self.channels()
    }

    /// Row `r` of the tensor seen as `[rows, channels]`.
    pub fn row(&self, r: usize) -> &[f64] {
        let c = self.channels();
        &self.data[r * c..(r + 1) * c]
    }

    /// Row `r`, to be written.
    pub fn row_mut(&mut self, r: usize) -> &mut [f64] {
        let c = self.channels();
        &mut self.data[r * c..(r + 1) * c]
    }
}

/// Values of a graph's tensors in float64, by the owner of their memory.
pub type Values = HashMap<Tid, Host>;

/// Runs the nodes of `phases` by their references. `values` holds inputs, parameters and state; results are added.
pub fn interpret(graph: &Graph, phases: &[Phase], values: &mut Values) {
    for node in graph.nodes.iter().filter(|n| phases.contains(&n.phase)) {
        let inputs: Vec<Host> = node
            .inputs
            .iter()
            .map(|&t| fetch(graph, values, t))
            .collect();
        let refs: Vec<&Host> = inputs.iter().collect();
        let updates = node.op.updates();
        let mut outputs: Vec<Host> = node
            .outputs
            .iter()
            .enumerate()
            .map(|(i, &t)| match updates.iter().find(|u| u.0 == i) {
                Some(&(_, input)) => inputs[input].clone(),
                None => Host::zeros(graph.shape(t)),
            })
            .collect();
        node.op.reference(&refs, &mut outputs);
        for (&t, v) in node.outputs.iter().zip(outputs) {
            store(graph, values, t, v);
        }
    }
}

/// The value of `t`, seen through its view where it is one.
pub fn fetch(graph: &Graph, values: &Values, t: Tid) -> Host {
    let (root, offset) = graph.root(t);
    let spec: &Spec = graph.spec(t);
    let base = values
        .get(&root)
        .unwrap_or_else(|| panic!("{} has no value", graph.tensor(root).name));
    Host {
        shape: spec.shape.clone(),
        data: base.data[offset..offset + spec.len()].to_vec(),
    }
}

/// Sets the value of `t`, through its view where it is one.
pub fn store(graph: &Graph, values: &mut Values, t: Tid, v: Host) {
    let (root, offset) = graph.root(t);
    let base = values
        .entry(root)
        .or_insert_with(|| Host::zeros(graph.shape(root)));
    base.data[offset..offset + v.data.len()].copy_from_slice(&v.data);
}
