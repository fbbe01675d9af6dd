//! Memory over a step: what is alive at each node, and whose it is at the peak.

use crate::graph::plan::Memory;
use crate::graph::{Graph, Kind, Phase};
use serde::{Deserialize, Serialize};

/// Something that holds memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Owner {
    /// Tensor's name, or the layer and op whose workspace it is.
    pub name: String,
    /// Shape; empty for workspace.
    pub shape: Vec<usize>,
    /// Bytes.
    pub bytes: u64,
    /// Node that makes it and last node that needs it.
    pub life: [usize; 2],
}

/// Planned memory of a step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Inputs, parameters and optimizer state, alive all the time.
    pub persistent: u64,
    /// Bytes of temporaries and workspace alive while each node runs, by node of the graph.
    pub temporaries: Vec<u64>,
    /// The node at which they are most.
    pub peak_node: usize,
    /// Who holds them there, most first.
    pub owners: Vec<Owner>,
    /// Bytes that the arenas take in all.
    pub planned: u64,
}

/// Memory of `graph` by its plan; nodes of other phases than `phases` hold what they hold but are never the peak.
pub fn usage(graph: &Graph, memory: &Memory, phases: &[Phase]) -> Usage {
    let end = graph.nodes.len().saturating_sub(1);
    let mut span: Vec<Option<[usize; 2]>> = vec![None; graph.tensors.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        for &t in node.inputs.iter().chain(&node.outputs) {
            span[graph.root(t).0.index()].get_or_insert([i, i])[1] = i;
        }
    }
    let tensors = graph.tensors.iter().zip(&span).filter_map(|(t, s)| {
        let [first, last] = (*s)?;
        let temporary = t.view.is_none() && t.kind == Kind::Temp;
        temporary.then(|| Owner {
            name: t.name.clone(),
            shape: t.spec.shape.clone(),
            bytes: 4 * t.spec.len() as u64,
            life: [first, if t.keep { end } else { last }],
        })
    });
    let work = graph.nodes.iter().zip(&memory.work).enumerate();
    let work = work.filter_map(|(i, (node, place))| {
        place.map(|p| Owner {
            name: format!("{} {} workspace", node.scope, node.op.name()),
            shape: vec![],
            bytes: 4 * p.len as u64,
            life: [i, i],
        })
    });
    let owners: Vec<Owner> = tensors.chain(work).collect();
    let mut temporaries = vec![0; graph.nodes.len()];
    for o in &owners {
        temporaries[o.life[0]..=o.life[1]]
            .iter_mut()
            .for_each(|b| *b += o.bytes);
    }
    let runs = |i: &usize| phases.contains(&graph.nodes[*i].phase);
    let peak_node = (0..temporaries.len())
        .filter(runs)
        .max_by_key(|&i| temporaries[i])
        .unwrap_or(0);
    let mut owners: Vec<Owner> = owners
        .into_iter()
        .filter(|o| (o.life[0]..=o.life[1]).contains(&peak_node))
        .collect();
    owners.sort_by_key(|o| std::cmp::Reverse(o.bytes));
    Usage {
        persistent: 4 * memory.persistent as u64,
        temporaries,
        peak_node,
        owners,
        planned: memory.bytes() as u64,
    }
}

impl Usage {
    /// Most bytes of temporaries alive at once.
    pub fn peak(&self) -> u64 {
        self.temporaries.get(self.peak_node).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Spec;
    use crate::graph::plan::Limits;
    use crate::ops::act::{Act, ActFwd};

    #[test]
    fn the_peak_has_its_owners() {
        let mut g = Graph::new();
        let x = g.input("x", Spec::f32([100]));
        let mut y = x;
        for _ in 0..3 {
            y = g.push1(ActFwd { act: Act::Relu }, &[y]).unwrap();
        }
        g.keep(y);
        let limits = Limits {
            align: 1,
            max_arena: usize::MAX,
        };
        let memory = Memory::plan(&g, &[0, 50, 0], limits);
        let u = usage(&g, &memory, &[Phase::Forward]);
        assert_eq!(u.persistent, 400);
        assert_eq!(u.temporaries, [400, 1000, 800]);
        assert_eq!((u.peak_node, u.peak()), (1, 1000));
        assert_eq!(u.peak(), 4 * memory.peak as u64);
        let bytes: Vec<u64> = u.owners.iter().map(|o| o.bytes).collect();
        assert_eq!(bytes, [400, 400, 200]);
    }
}
