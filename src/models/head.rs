//! The classifier apart from the network before it: for a linear probe the network runs once over the images, and the
//! classifier alone is trained on what came out.

use crate::Result;
use crate::graph::{Graph, Kind, Tid};
use crate::weights::naming::is_classifier;
use std::collections::{HashMap, HashSet};

/// Whether the parameter `name` (`fc.weight`) belongs to the classifier.
pub fn is_head(name: &str) -> bool {
    name.rsplit_once('.')
        .is_some_and(|(path, _)| is_classifier(path))
}

/// What the classifier of `graph` reads, `[N, D]`; `None` where there are none or several (DeiT's two).
pub fn input_of(graph: &Graph) -> Option<Tid> {
    let heads: HashSet<Tid> = graph
        .params
        .iter()
        .filter(|p| is_head(&p.name))
        .map(|p| p.tid)
        .collect();
    let mut read = graph
        .nodes
        .iter()
        .filter(|n| n.inputs.iter().any(|t| heads.contains(t)))
        .map(|n| n.inputs[0]);
    let first = read.next()?;
    read.next().is_none().then_some(first)
}

/// Whether anything that `t` is made of is drawn at random (dropout, drop path).
pub fn random_before(graph: &Graph, t: Tid) -> bool {
    let mut wanted = HashSet::from([graph.root(t).0]);
    for node in graph.nodes.iter().rev() {
        if node
            .outputs
            .iter()
            .any(|&o| wanted.contains(&graph.root(o).0))
        {
            if graph.rng.is_some_and(|r| node.inputs.contains(&r)) {
                return true;
            }
            wanted.extend(node.inputs.iter().map(|&i| graph.root(i).0));
        }
    }
    false
}

/// Cuts `graph` down to what comes after `from`, and returns the input that takes its place. Parameters that are left
/// without a reader are dropped.
///
/// # Errors
/// Something after `from` reads more of what came before: it is not a classifier of one input.
pub fn keep_after(graph: &mut Graph, from: Tid) -> Result<Tid> {
    let spec = graph.spec(from).clone();
    let input = graph.input("features", spec);
    let mut after = HashSet::from([from]);
    let mut nodes = std::mem::take(&mut graph.nodes);
    nodes.retain(|n| {
        let kept = n.inputs.iter().any(|t| after.contains(t));
        if kept {
            after.extend(&n.outputs);
        }
        kept
    });
    let mut used = HashSet::from([input]);
    for node in &mut nodes {
        for t in node.inputs.iter_mut() {
            if *t == from {
                *t = input;
            }
            let own = graph.tensor(*t).kind;
            if own == Kind::Temp && !after.contains(t) {
                return Err(crate::Error::run(format!(
                    "{} reads more than the features",
                    node.scope
                )));
            }
            used.insert(*t);
        }
    }
    graph.nodes = nodes;
    graph.taps.clear();
    // What nobody reads any more takes no memory.
    for i in 0..graph.tensors.len() {
        if !used.contains(&Tid(i as u32)) {
            graph.tensors[i].kind = Kind::Temp;
        }
    }
    graph.params.retain(|p| used.contains(&p.tid));
    for i in 0..graph.params.len() {
        let t = graph.params[i].tid;
        graph.tensor_mut(t).kind = Kind::Param(i);
    }
    graph.rng = graph.rng.filter(|r| used.contains(r));
    Ok(input)
}

/// Where each parameter of `part` stands in `whole`, by name.
pub fn places(part: &Graph, whole: &Graph) -> Vec<usize> {
    let at: HashMap<&str, usize> = whole
        .params
        .iter()
        .enumerate()
        .map(|(i, p)| (p.name.as_str(), i))
        .collect();
    part.params.iter().map(|p| at[p.name.as_str()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Mode;
    use crate::models::{ModelOptions, find};

    #[test]
    fn every_network_but_the_distilled_has_one_classifier() {
        for (name, size, dim) in [
            ("resnet18", 64, 512),
            ("resnet20", 32, 64),
            ("cnn_r14", 32, 64),
            ("cnn_whiten", 32, 512),
            ("vit_tiny_patch16_224", 224, 192),
            ("dinov2_small_imagenet1k_1_layer", 224, 768),
            ("swin_t", 224, 768),
        ] {
            let net = find(name).unwrap();
            let net = net.net(2, (size, size), Mode::default(), &ModelOptions::default());
            let mut g = net.unwrap().graph;
            let from = input_of(&g).unwrap_or_else(|| panic!("{name}"));
            assert_eq!(g.shape(from), [2, dim], "{name}");
            assert!(!random_before(&g, from));
            let whole = g.clone();
            let input = keep_after(&mut g, from).unwrap();
            assert_eq!((g.nodes.len(), g.params.len()), (1, 2), "{name}");
            assert_eq!(g.nodes[0].inputs[0], input);
            let names: Vec<&str> = places(&g, &whole)
                .into_iter()
                .map(|i| whole.params[i].name.as_str())
                .collect();
            assert!(names.iter().all(|n| is_head(n)), "{names:?}");
        }
        let two = find("deit_tiny_distilled_patch16_224").unwrap();
        let two = two.net(1, (224, 224), Mode::default(), &ModelOptions::default());
        assert!(input_of(&two.unwrap().graph).is_none());
    }

    #[test]
    fn dropout_before_the_classifier_is_seen() {
        let random = Mode {
            batch_stats: false,
            random: true,
        };
        for (dropout, drop_path) in [(0.1, 0.0), (0.0, 0.1), (0.0, 0.0)] {
            let options = ModelOptions {
                dropout: Some(dropout),
                drop_path,
                ..Default::default()
            };
            let net = find("vit_p4_e128_d6").unwrap();
            let g = net.net(2, (32, 32), random, &options).unwrap().graph;
            let from = input_of(&g).unwrap();
            assert_eq!(random_before(&g, from), dropout + drop_path > 0.0);
        }
    }
}
