//! Where every tensor lives: persistent tensors side by side, temporaries placed by lifetime into reusable arenas.

use super::{Graph, Kind, Phase, Tid};
use std::fmt::Write;

/// A stretch of memory: `len` elements of 4 bytes from `offset` in arena `arena`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Which arena.
    pub arena: usize,
    /// First element.
    pub offset: usize,
    /// Number of elements.
    pub len: usize,
}

/// What a backend's memory can be.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Every place starts at a multiple of this many elements.
    pub align: usize,
    /// An arena has at most this many elements, unless one tensor alone is larger.
    pub max_arena: usize,
}

/// Places of all tensors of a graph, and of each node's workspace.
#[derive(Clone, Debug)]
pub struct Memory {
    /// By tensor; `None` for a temporary that no node touches.
    places: Vec<Option<Place>>,
    /// By node: its workspace.
    pub work: Vec<Option<Place>>,
    /// Sizes of the arenas in elements.
    pub arenas: Vec<usize>,
    /// Elements of inputs, parameters and state.
    pub persistent: usize,
    /// The most elements of temporaries and workspace alive at once.
    pub peak: usize,
    /// The node at which that is.
    pub peak_node: usize,
    /// What the temporaries would take with a place each.
    pub unshared: usize,
}

struct Life {
    first: usize,
    last: usize,
    len: usize,
    owner: Owner,
}

#[derive(Clone, Copy)]
enum Owner {
    Tensor(usize),
    Work(usize),
}

impl Memory {
    /// Plans `graph`, whose node `i` needs `work[i]` elements of scratch.
    ///
    /// Temporaries are placed by size, largest first, each at the lowest offset free over its whole life (greedy
    /// by size, as in Pisarchyk & Lee 2020, "Efficient Memory Management for Deep Neural Net Inference").
    pub fn plan(graph: &Graph, work: &[usize], limits: Limits) -> Self {
        let end = graph.nodes.len();
        let mut span: Vec<Option<(usize, usize)>> = vec![None; graph.tensors.len()];
        for (i, node) in graph.nodes.iter().enumerate() {
            for &t in node.inputs.iter().chain(&node.outputs) {
                let (root, _) = graph.root(t);
                let s = span[root.index()].get_or_insert((i, i));
                s.1 = i;
            }
        }
        let mut places: Vec<Option<Place>> = vec![None; graph.tensors.len()];
        let mut arenas: Vec<usize> = vec![];
        let mut persistent = 0;
        let mut lives = vec![];
        for (i, t) in graph.tensors.iter().enumerate() {
            if t.view.is_some() {
                continue;
            }
            let len = t.spec.len().next_multiple_of(limits.align);
            if t.kind != Kind::Temp {
                // Side by side, in as few arenas as the limit allows.
                let arena = match arenas.last() {
                    Some(&used) if used + len <= limits.max_arena => arenas.len() - 1,
                    _ => {
                        arenas.push(0);
                        arenas.len() - 1
                    }
                };
                places[i] = Some(Place {
                    arena,
                    offset: arenas[arena],
                    len: t.spec.len(),
                });
                arenas[arena] += len;
                persistent += len;
            } else if let Some((first, last)) = span[i] {
                lives.push(Life {
                    first,
                    last: if t.keep { end } else { last },
                    len,
                    owner: Owner::Tensor(i),
                });
            }
        }
        for (i, &w) in work.iter().enumerate().filter(|w| *w.1 > 0) {
            lives.push(Life {
                first: i,
                last: i,
                len: w.next_multiple_of(limits.align),
                owner: Owner::Work(i),
            });
        }
        let unshared = lives.iter().map(|l| l.len).sum();
        let (peak, peak_node) = peak(&lives, end);
        let mut work_places = vec![None; graph.nodes.len()];
        lives.sort_by_key(|l| std::cmp::Reverse(l.len));
        let base = arenas.len();
        let mut placed: Vec<Vec<(usize, usize, usize, usize)>> = vec![]; // per arena: first, last, offset, end
        for l in &lives {
            let mut arena = 0;
            let offset = loop {
                if arena == placed.len() {
                    placed.push(vec![]);
                    arenas.push(0);
                }
                let mut busy: Vec<(usize, usize)> = placed[arena]
                    .iter()
                    .filter(|p| p.0 <= l.last && l.first <= p.1)
                    .map(|p| (p.2, p.3))
                    .collect();
                busy.sort_unstable();
                let mut at = 0;
                for (from, to) in busy {
                    if at + l.len <= from {
                        break;
                    }
                    at = at.max(to);
                }
                if at + l.len <= limits.max_arena || at == 0 {
                    break at;
                }
                arena += 1;
            };
            placed[arena].push((l.first, l.last, offset, offset + l.len));
            arenas[base + arena] = arenas[base + arena].max(offset + l.len);
            match l.owner {
                Owner::Tensor(i) => {
                    let len = graph.tensors[i].spec.len();
                    places[i] = Some(Place {
                        arena: base + arena,
                        offset,
                        len,
                    });
                }
                Owner::Work(i) => {
                    work_places[i] = Some(Place {
                        arena: base + arena,
                        offset,
                        len: work[i],
                    })
                }
            }
        }
        for i in 0..graph.tensors.len() {
            if graph.tensors[i].view.is_some() {
                let (root, offset) = graph.root(Tid(i as u32));
                places[i] = places[root.index()].map(|p| Place {
                    offset: p.offset + offset,
                    len: graph.tensors[i].spec.len(),
                    ..p
                });
            }
        }
        Memory {
            places,
            work: work_places,
            arenas,
            persistent,
            peak,
            peak_node,
            unshared,
        }
    }

    /// Where `t` is.
    pub fn place(&self, t: Tid) -> Option<Place> {
        self.places[t.index()]
    }

    /// Bytes that the arenas take in all.
    pub fn bytes(&self) -> usize {
        4 * self.arenas.iter().sum::<usize>()
    }

    /// The plan for people: a line per node with its results' places, then the totals.
    pub fn describe(&self, graph: &Graph) -> String {
        let mut out = String::new();
        for (i, node) in graph.nodes.iter().enumerate() {
            let o: Vec<String> = node
                .outputs
                .iter()
                .filter_map(|&t| {
                    let p = self.place(t)?;
                    Some(format!(
                        "{:?} @{}+{}",
                        graph.shape(t),
                        p.arena,
                        4 * p.offset
                    ))
                })
                .collect();
            let phase = match node.phase {
                Phase::Prepare => "prepare",
                Phase::Forward => "forward",
                Phase::Backward => "backward",
                Phase::Optimizer => "optimizer",
            };
            let _ = writeln!(
                out,
                "{i:5} {phase:9} {:28} {:22} {}",
                node.scope,
                node.op.name(),
                o.join("  ")
            );
        }
        let mb = |n: usize| n as f64 * 4.0 / 1e6;
        let _ = writeln!(
            out,
            "persistent {:.1} MB; temporaries {:.1} MB in arenas, {:.1} MB alive at most (at node {}), {:.1} MB without reuse; {:.1} MB in all",
            mb(self.persistent),
            mb(self.arenas.iter().sum::<usize>() - self.persistent),
            mb(self.peak),
            self.peak_node,
            mb(self.unshared),
            mb(self.arenas.iter().sum::<usize>()),
        );
        out
    }
}

fn peak(lives: &[Life], end: usize) -> (usize, usize) {
    let mut change = vec![0isize; end + 2];
    for l in lives {
        change[l.first] += l.len as isize;
        change[l.last + 1] -= l.len as isize;
    }
    let (mut now, mut best) = (0, (0, 0));
    for (i, c) in change.iter().enumerate() {
        now += c;
        if now as usize > best.0 {
            best = (now as usize, i);
        }
    }
    best
}
