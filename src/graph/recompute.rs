//! Gradient checkpointing (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): what is computed inside a
//! block is not kept for the backward pass but computed again there, from the block's input. One more forward pass of the
//! blocks' insides is the price.

use super::plan::{Limits, Memory};
use super::{Graph, Kind, Node, Phase, Tid};
use crate::ops::batch_norm::BatchNormTrain;
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// What recomputation saves and costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Saving {
    /// Bytes of temporaries alive at once, at most, without it.
    pub before: usize,
    /// The same with it.
    pub after: usize,
    /// Floating-point operations that are done a second time.
    pub flops: u64,
}

/// The block that a parameter or a layer belongs to: `blocks.3`, `layer2.0`, `layers.1.blocks.0`; else its first part.
pub fn group_of(name: &str) -> &str {
    let parts: Vec<&str> = name.split('.').collect();
    let number = |i: usize| {
        parts
            .get(i)
            .is_some_and(|s| s.bytes().all(|b| b.is_ascii_digit()))
    };
    let last = match (number(1), parts[0] == "layers" && number(3)) {
        (_, true) => 4,
        (true, _) => 2,
        _ => 1,
    };
    let end: usize = parts.iter().take(last).map(|p| p.len() + 1).sum();
    &name[..(end - 1).min(name.len())]
}

/// Whether `group` (of [`group_of`]) is a block of a network.
pub fn is_block(group: &str) -> bool {
    group.starts_with("layer") || group.starts_with("blocks.")
}

/// Rewrites `graph`, whose backward and update nodes are there: each block's insides are computed again in the backward
/// phase.
///
/// # Errors
/// The network has no blocks.
pub fn apply(graph: &mut Graph) -> Result<Saving> {
    let before = peak(graph);
    let mut blocks: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for (i, n) in graph.nodes.iter().enumerate() {
        let group = group_of(&n.scope);
        if n.phase == Phase::Forward && is_block(group) {
            blocks.entry(group.to_string()).or_default().push(i);
        }
    }
    if blocks.is_empty() {
        return Err(Error::input(
            "this network has no blocks whose insides could be recomputed",
        ));
    }
    let mut flops = 0;
    // Where clones go: before the backward node of this place in the list as it was.
    let mut inserts: BTreeMap<usize, Vec<Node>> = BTreeMap::new();
    for inside in blocks.values() {
        let clones = recompute(graph, inside);
        let Some((at, nodes)) = clones else { continue };
        flops += nodes.iter().map(|n| graph.node_cost(n).flops).sum::<u64>();
        inserts.entry(at).or_default().extend(nodes);
    }
    let nodes = std::mem::take(&mut graph.nodes);
    for (i, node) in nodes.into_iter().enumerate() {
        graph.nodes.extend(inserts.remove(&i).unwrap_or_default());
        graph.nodes.push(node);
    }
    Ok(Saving {
        before,
        after: peak(graph),
        flops,
    })
}

fn peak(graph: &Graph) -> usize {
    let limits = Limits {
        align: 64,
        max_arena: usize::MAX,
    };
    4 * Memory::plan(graph, &vec![0; graph.nodes.len()], limits).peak
}

/// Makes the backward nodes read copies of what the forward nodes `inside` make, and returns the nodes that make the
/// copies, with the place of the first reader.
fn recompute(graph: &mut Graph, inside: &[usize]) -> Option<(usize, Vec<Node>)> {
    let own: HashSet<usize> = inside.iter().copied().collect();
    let root = |g: &Graph, t: Tid| g.root(t).0;
    // What leaves the block stays, and with it all that the same node makes.
    let read_outside: HashSet<Tid> = graph
        .nodes
        .iter()
        .enumerate()
        .filter(|(i, n)| n.phase == Phase::Forward && !own.contains(i))
        .flat_map(|(_, n)| n.inputs.iter().map(|&t| root(graph, t)))
        .collect();
    let stays = |n: &Node| {
        n.outputs.iter().any(|&o| {
            let o = root(graph, o);
            (read_outside.contains(&o) || graph.tensor(o).keep)
                && graph.tensor(o).kind == Kind::Temp
        })
    };
    let mut made: HashMap<Tid, usize> = HashMap::new();
    for &i in inside {
        let n = &graph.nodes[i];
        let in_place = !n.op.updates().is_empty() && n.op_as::<BatchNormTrain>().is_none();
        if stays(n) || in_place {
            continue;
        }
        for &o in &n.outputs {
            let o = root(graph, o);
            if graph.tensor(o).kind == Kind::Temp {
                made.insert(o, i);
            }
        }
    }
    // Backward readers, and everything that their operands are made of.
    let readers: Vec<usize> = (0..graph.nodes.len())
        .filter(|&i| graph.nodes[i].phase == Phase::Backward)
        .filter(|&i| {
            let n = &graph.nodes[i];
            n.inputs.iter().any(|&t| made.contains_key(&root(graph, t)))
        })
        .collect();
    let first = *readers.first()?;
    let mut wanted: Vec<Tid> = readers
        .iter()
        .flat_map(|&i| graph.nodes[i].inputs.iter().map(|&t| root(graph, t)))
        .filter(|t| made.contains_key(t))
        .collect();
    let mut again: HashSet<usize> = HashSet::new();
    while let Some(t) = wanted.pop() {
        if again.insert(made[&t]) {
            let inputs = &graph.nodes[made[&t]].inputs;
            let roots = inputs.iter().map(|&t| root(graph, t));
            wanted.extend(roots.filter(|t| made.contains_key(t)));
        }
    }
    let mut order: Vec<usize> = again.into_iter().collect();
    order.sort_unstable();
    let mut copies: HashMap<Tid, Tid> = HashMap::new();
    let mut clones = vec![];
    for i in order {
        let mut node = graph.nodes[i].clone();
        node.phase = Phase::Backward;
        if let Some(&op) = node.op_as::<BatchNormTrain>() {
            // The running statistics have seen this batch already.
            node.op = Arc::new(BatchNormTrain {
                momentum: 0.0,
                ..op
            });
        }
        for t in node.inputs.iter_mut().chain(&mut node.outputs) {
            *t = copy_of(graph, *t, &made, &mut copies);
        }
        clones.push(node);
    }
    for i in readers {
        for k in 0..graph.nodes[i].inputs.len() {
            let t = graph.nodes[i].inputs[k];
            graph.nodes[i].inputs[k] = copy_of(graph, t, &made, &mut copies);
        }
    }
    Some((first, clones))
}

/// The copy of `t`, or `t` itself where it is not made again.
fn copy_of(
    graph: &mut Graph,
    t: Tid,
    made: &HashMap<Tid, usize>,
    copies: &mut HashMap<Tid, Tid>,
) -> Tid {
    if !made.contains_key(&graph.root(t).0) {
        return t;
    }
    if let Some(&c) = copies.get(&t) {
        return c;
    }
    let from = graph.tensor(t).clone();
    let view = from
        .view
        .map(|(base, offset)| (copy_of(graph, base, made, copies), offset));
    let copy = graph.add_tensor(from.name, from.spec, from.kind);
    graph.tensor_mut(copy).view = view;
    copies.insert(t, copy);
    copy
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::fuse::{Purpose, fuse};
    use crate::graph::{Mode, Spec};
    use crate::models::{ModelOptions, find};
    use crate::ops::reference::{Host, Values, fetch, interpret};
    use crate::weights::fill::fill;

    /// Loss, gradients and running statistics by the references, and the saving.
    fn run(model: &str, size: usize, again: bool) -> (Vec<Vec<f64>>, Option<Saving>) {
        let mode = Mode {
            batch_stats: true,
            random: true,
        };
        let dropout = model.starts_with("vit").then_some(0.2);
        let options = ModelOptions {
            dropout,
            ..Default::default()
        };
        let net = find(model).unwrap().net(2, (size, size), mode, &options);
        let net = net.unwrap();
        let (mut g, logits) = (net.graph, net.heads.logits.unwrap());
        let labels = g.input("labels", Spec::u32([2]));
        let loss = g.softmax_ce(logits, labels, None, 0.0, 0.0).unwrap();
        g.keep(loss);
        fuse(&mut g, Purpose::Gradients).unwrap();
        let grads = g.backward(loss, &[]).unwrap();
        let saving = again.then(|| apply(&mut g).unwrap());
        let mut values: Values = (0..g.tensors.len() as u32)
            .map(Tid)
            .filter(|&t| matches!(g.tensor(t).kind, Kind::Input | Kind::Param(_)))
            .map(|t| {
                let shape = g.shape(t);
                let name = g.tensor(t).name.clone();
                let host = match name.as_str() {
                    "labels" => Host {
                        shape: vec![2],
                        data: vec![1.0, 0.0],
                    },
                    _ if Some(t) == g.rng => Host {
                        shape: vec![4],
                        data: vec![7.0, 0.0, 3.0, 0.0],
                    },
                    _ => Host::from_f32(shape, &fill(&name, shape)),
                };
                (t, host)
            })
            .collect();
        interpret(&g, &[Phase::Forward, Phase::Backward], &mut values);
        let mut out = vec![fetch(&g, &values, loss).data];
        for p in &g.params {
            let t = if p.buffer { p.tid } else { grads[&p.tid] };
            out.push(fetch(&g, &values, t).data);
        }
        (out, saving)
    }

    #[test]
    fn gradients_are_the_same_with_less_memory() {
        for (model, size) in [
            ("vit:patch=4,dim=16,depth=3,heads=2,mlp=2", 16),
            ("cnn_r14", 16),
        ] {
            let (plain, _) = run(model, size, false);
            let (again, saving) = run(model, size, true);
            let saving = saving.unwrap();
            assert!(
                saving.after < saving.before && saving.flops > 0,
                "{saving:?}"
            );
            assert_eq!(plain, again, "{model}");
        }
    }
}
