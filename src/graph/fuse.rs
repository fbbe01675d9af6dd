//! Operator fusion: a readable pass over the forward nodes, before gradients are derived.
//!
//! Each rule looks at a node and the only reader of its result, and writes one node in place of the two:
//!
//! | pair | becomes |
//! |---|---|
//! | batch_norm, add | batch_norm with residual |
//! | batch_norm, relu | batch_norm with ReLU |
//! | linear, add | linear with residual |
//! | linear, activation | linear with activation (in training it also keeps the value before it) |
//! | layer_scale, add | layer_scale with residual |
//! | conv2d, batch_norm by running statistics (inference) | conv2d with bias, residual, ReLU; weights folded once, in place |

use super::{Graph, Kind, Node, Phase, Tid};
use crate::Result;
use crate::ops::Op;
use crate::ops::act::{Act, ActFwd};
use crate::ops::batch_norm::{BatchNormEval, BatchNormTrain, FoldBatchNorm};
use crate::ops::conv2d::Conv2d;
use crate::ops::elementwise::Add;
use crate::ops::layer_scale::LayerScale;
use crate::ops::linear::Linear;
use std::sync::Arc;

/// What the fused graph is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// Gradients will be derived: what a backward rule reads stays.
    Gradients,
    /// Forward only: BatchNorm is folded into the convolution before it.
    Inference,
}

/// Rewrites `graph` where a rule holds and nothing else reads the value in between.
///
/// # Errors
/// A fused op's shape rule does not hold, which would be a defect of the pass.
pub fn fuse(graph: &mut Graph, purpose: Purpose) -> Result<()> {
    let mut i = 0;
    while i < graph.nodes.len() {
        match only_reader(graph, i)
            .map(|second| rule(graph, i, second, purpose))
            .transpose()?
            .flatten()
        {
            Some(node) => {
                // The new node stands where the second stood, when all its operands are there; it may pair up again.
                let second = only_reader(graph, i).expect("just found");
                graph.nodes[second] = node;
                graph.nodes.remove(i);
            }
            None => i += 1,
        }
    }
    // What is prepared runs first.
    graph.nodes.sort_by_key(|n| n.phase != Phase::Prepare);
    Ok(())
}

/// The one node that reads the first result of node `i`, where there is exactly one and the host does not read it.
fn only_reader(graph: &Graph, i: usize) -> Option<usize> {
    let node = &graph.nodes[i];
    let y = node.outputs[0];
    if node.phase != Phase::Forward || graph.tensor(y).keep {
        return None;
    }
    let mut readers = graph
        .nodes
        .iter()
        .enumerate()
        .flat_map(|(k, n)| n.inputs.iter().map(move |&t| (k, t)));
    let mut of_y = readers.by_ref().filter(|&(_, t)| graph.root(t).0 == y);
    match (of_y.next(), of_y.next()) {
        (Some((k, t)), None) if t == y => Some(k),
        _ => None,
    }
}

/// The node that takes the place of `first` and `second`, where a rule holds.
fn rule(graph: &mut Graph, first: usize, second: usize, purpose: Purpose) -> Result<Option<Node>> {
    let (a, b) = (graph.nodes[first].clone(), graph.nodes[second].clone());
    let (mid, y) = (a.outputs[0], b.outputs[0]);
    let extra = a.outputs[1..].to_vec();
    let make = |op: Arc<dyn Op>, inputs: Vec<Tid>, extra: Vec<Tid>| {
        let outputs = std::iter::once(y).chain(extra).collect();
        Ok(Some(Node {
            op,
            inputs,
            outputs,
            scope: a.scope.clone(),
            phase: Phase::Forward,
        }))
    };
    let relu = b.op_as::<ActFwd>().is_some_and(|o| o.act == Act::Relu);
    let addend = b.op_as::<Add>().map(|_| {
        if b.inputs[0] == mid {
            b.inputs[1]
        } else {
            b.inputs[0]
        }
    });
    let with = |t: Tid| a.inputs.iter().copied().chain([t]).collect::<Vec<_>>();

    if let Some(&op) = a.op_as::<BatchNormTrain>().filter(|o| !o.relu) {
        if let Some(t) = addend.filter(|_| !op.residual) {
            return make(
                Arc::new(BatchNormTrain {
                    residual: true,
                    ..op
                }),
                with(t),
                extra,
            );
        }
        if relu {
            return make(
                Arc::new(BatchNormTrain { relu: true, ..op }),
                a.inputs.clone(),
                extra,
            );
        }
    }
    if let Some(&op) = a.op_as::<BatchNormEval>().filter(|o| !o.relu) {
        if let Some(t) = addend.filter(|_| !op.residual) {
            return make(
                Arc::new(BatchNormEval {
                    residual: true,
                    ..op
                }),
                with(t),
                extra,
            );
        }
        if relu {
            return make(
                Arc::new(BatchNormEval { relu: true, ..op }),
                a.inputs.clone(),
                extra,
            );
        }
    }
    if let Some(&op) = a.op_as::<Conv2d>().filter(|o| !o.relu) {
        let norm = b
            .op_as::<BatchNormEval>()
            .filter(|n| !n.relu && !n.residual && !op.residual);
        // Folding changes the weights where they stand: nothing else may want them.
        let (w, _) = graph.root(a.inputs[1]);
        let readers = graph.nodes.iter().flat_map(|n| &n.inputs);
        let own = !graph.tensor(w).keep && readers.filter(|&&t| graph.root(t).0 == w).count() == 1;
        let fold = own && purpose == Purpose::Inference;
        if let Some(&BatchNormEval { eps, .. }) = norm.filter(|_| fold) {
            let mut operands = a.inputs[1..].to_vec();
            operands.extend(&b.inputs[1..5]);
            let folded = graph.scoped(a.scope.clone(), |g| {
                g.in_phase(Phase::Prepare, |g| {
                    g.push(FoldBatchNorm { eps, bias: op.bias }, &operands)
                })
            })?;
            // Made once, read by every run.
            graph.tensor_mut(folded[1]).kind = Kind::State;
            return make(
                Arc::new(Conv2d { bias: true, ..op }),
                vec![a.inputs[0], folded[0], folded[1]],
                vec![],
            );
        }
        if let Some(t) = addend.filter(|_| !op.residual) {
            return make(
                Arc::new(Conv2d {
                    residual: true,
                    ..op
                }),
                with(t),
                extra,
            );
        }
        if relu {
            return make(
                Arc::new(Conv2d { relu: true, ..op }),
                a.inputs.clone(),
                extra,
            );
        }
    }
    if let Some(&op) = a.op_as::<Linear>().filter(|o| o.act.is_none()) {
        if let Some(t) = addend.filter(|_| !op.residual) {
            return make(
                Arc::new(Linear {
                    residual: true,
                    ..op
                }),
                with(t),
                extra,
            );
        }
        if let Some(&ActFwd { act }) = b.op_as::<ActFwd>() {
            let keep_pre = purpose == Purpose::Gradients && act != Act::Relu;
            let pre = if keep_pre { vec![mid] } else { vec![] };
            return make(
                Arc::new(Linear {
                    act: Some(act),
                    keep_pre,
                    ..op
                }),
                a.inputs.clone(),
                pre,
            );
        }
    }
    if let (Some(&LayerScale { residual: false }), Some(t)) = (a.op_as::<LayerScale>(), addend) {
        return make(Arc::new(LayerScale { residual: true }), with(t), extra);
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Spec;
    use crate::ops::conv2d::ConvLayer;
    use crate::ops::linear::LinearLayer;
    use crate::ops::reference::{Host, Values, fetch, interpret};
    use crate::weights::fill::fill;

    /// A residual block with every pattern of the table, and a linear head.
    fn network(g: &mut Graph) -> Result<(Tid, Tid)> {
        let input = g.input("input", Spec::f32([2, 6, 5, 4]));
        let x = g.conv2d(input, "conv1", ConvLayer::new(8, 3, 1))?;
        let x = g.batch_norm(x, "bn1", 1e-5)?;
        let x = g.relu(x)?;
        let y = g.conv2d(
            x,
            "conv2",
            ConvLayer {
                bias: true,
                ..ConvLayer::new(8, 3, 1)
            },
        )?;
        let y = g.batch_norm(y, "bn2", 1e-5)?;
        let s = g.conv2d(x, "down", ConvLayer::new(8, 1, 1))?;
        let s = g.batch_norm(s, "bn3", 1e-5)?;
        let y = g.add(y, s)?;
        let x = g.relu(y)?;
        let h = g.linear(x, "fc1", LinearLayer::new(8, 12))?;
        let h = g.act(Act::Gelu, h)?;
        let h = g.linear(h, "fc2", LinearLayer::new(12, 8))?;
        Ok((input, g.add(x, h)?))
    }

    fn values(g: &Graph) -> Values {
        let tensors = g
            .tensors
            .iter()
            .enumerate()
            .filter(|(_, t)| t.kind == Kind::Input);
        let inputs = tensors.map(|(i, t)| (Tid(i as u32), t.name.clone()));
        let params = g.params.iter().map(|p| (p.tid, p.name.clone()));
        inputs
            .chain(params)
            .map(|(t, n)| (t, Host::from_f32(g.shape(t), &fill(&n, g.shape(t)))))
            .collect()
    }

    fn close(a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        assert!(a.iter().any(|v| *v != 0.0));
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-6 * (1.0 + b.abs()), "{a} {b}");
        }
    }

    /// Results and gradients by the references, with the names of the nodes that ran.
    fn run(batch_stats: bool, fused: Option<Purpose>) -> (Vec<Vec<f64>>, Vec<&'static str>) {
        let mut g = Graph::new();
        g.mode.batch_stats = batch_stats;
        let (_, y) = network(&mut g).unwrap();
        g.keep(y);
        let gradients = fused != Some(Purpose::Inference);
        if let Some(p) = fused {
            fuse(&mut g, p).unwrap();
        }
        let names = g.nodes.iter().map(|n| n.op.name()).collect();
        let mut out = vec![];
        let shape = g.shape(y).to_vec();
        let c = g.input("cotangent", Spec::f32(shape));
        let grads = if gradients {
            g.backward_from(&[(y, c)], &[]).unwrap()
        } else {
            Default::default()
        };
        let mut v = values(&g);
        interpret(
            &g,
            &[Phase::Prepare, Phase::Forward, Phase::Backward],
            &mut v,
        );
        out.push(fetch(&g, &v, y).data);
        if gradients {
            out.extend(
                g.params
                    .iter()
                    .filter(|p| p.trainable)
                    .map(|p| fetch(&g, &v, grads[&p.tid]).data),
            );
        }
        (out, names)
    }

    #[test]
    fn fused_training_graphs_compute_the_same() {
        for batch_stats in [true, false] {
            let (plain, before) = run(batch_stats, None);
            let (fused, after) = run(batch_stats, Some(Purpose::Gradients));
            assert_eq!((before.len(), after.len()), (13, 8), "{after:?}");
            assert!(!after.contains(&"add") && !after.contains(&"act"));
            plain.iter().zip(&fused).for_each(|(a, b)| close(a, b));
        }
    }

    #[test]
    fn inference_folds_batch_norm_into_the_convolution() {
        let (plain, _) = run(false, None);
        let (fused, names) = run(false, Some(Purpose::Inference));
        assert_eq!(names.iter().filter(|n| **n == "fold_batch_norm").count(), 3);
        assert_eq!(names.len(), 3 + 5, "{names:?}");
        close(&plain[0], &fused[0]);
    }

    /// Folding is in place: weights that something else wants, the host or a second convolution, stay as they are.
    #[test]
    fn weights_with_another_reader_are_not_folded() {
        let folds = |change: fn(&mut Graph)| {
            let mut g = Graph::new();
            network(&mut g).unwrap();
            change(&mut g);
            fuse(&mut g, Purpose::Inference).unwrap();
            let names = g.nodes.iter().map(|n| n.op.name());
            names.filter(|n| *n == "fold_batch_norm").count()
        };
        assert_eq!(folds(|_| ()), 3);
        assert_eq!(folds(|g| g.keep(g.params[0].tid)), 2);
        assert_eq!(
            folds(|g| {
                let first = g.nodes[0].clone();
                g.push_arc(first.op, &first.inputs).unwrap();
            }),
            2
        );
    }
}
