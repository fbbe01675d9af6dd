//! Guard zones: a case's tensors stand in one stretch of memory with marked words between them, so that a kernel that
//! writes beside a tensor, or into an operand, is found.

use super::check::{CaseGraph, Finding};
use crate::Result;
use crate::backend::{Backend, Exec};
use crate::graph::{DType, Graph, Kind, Spec, Tid};
use std::sync::Arc;

/// A NaN of its own: what a kernel reads beside a tensor shows in its result, and what it writes there shows here.
const MARK: u32 = 0x7fc0_dead;
/// Words of a zone, at least: 4 KiB.
const ZONE: usize = 1024;
/// Tensors start at multiples of this many words.
const ALIGN: usize = 64;

/// A case's graph with guard zones.
pub struct Guarded {
    /// The graph to compile; tensors have the same ids as before.
    pub graph: Arc<Graph>,
    base: Option<Base>,
}

struct Base {
    tid: Tid,
    /// Tensors in order with their first word and length.
    tensors: Vec<(String, usize, usize)>,
}

impl Guarded {
    /// With zones, except on the simulator, which sees every access by itself where tensors have their own allocations.
    pub fn new(cg: &CaseGraph, backend: &dyn Backend) -> Guarded {
        if backend.name() == "cuda:sim" {
            return Guarded {
                graph: cg.graph.clone(),
                base: None,
            };
        }
        let mut graph = (*cg.graph).clone();
        let names = cg.inputs.iter().map(|(t, ..)| *t);
        let results = cg.outputs.iter().map(|(_, t)| *t);
        let mut roots: Vec<Tid> = names.chain(results).map(|t| graph.root(t).0).collect();
        roots.sort_unstable();
        roots.dedup();
        let mut at = ZONE;
        let mut tensors = vec![];
        let places: Vec<(Tid, usize)> = roots
            .into_iter()
            .map(|t| {
                let len = graph.spec(t).len();
                tensors.push((graph.tensor(t).name.clone(), at, len));
                let start = at;
                at = (at + len + ZONE).next_multiple_of(ALIGN);
                (t, start)
            })
            .collect();
        let tid = graph.add_tensor("guarded memory", Spec::f32([at]), Kind::State);
        for (t, start) in places {
            graph.tensor_mut(t).view = Some((tid, start));
        }
        Guarded {
            graph: Arc::new(graph),
            base: Some(Base { tid, tensors }),
        }
    }

    /// Marks all of the memory; inputs are written after this.
    ///
    /// # Errors
    /// The device is lost.
    pub fn prepare(&self, exec: &mut dyn Exec) -> Result<()> {
        let Some(base) = &self.base else {
            return Ok(());
        };
        let n = self.graph.spec(base.tid).len();
        exec.write_u32(base.tid, &vec![MARK; n])
    }

    /// Words between tensors that are no longer marked, and operands that are not what was written: findings, all of
    /// them failures.
    ///
    /// # Errors
    /// The device is lost.
    pub fn damage(&self, exec: &mut dyn Exec, cg: &CaseGraph) -> Result<Vec<Finding>> {
        let mut findings = vec![];
        let updated: Vec<Tid> = cg.outputs.iter().map(|(_, t)| *t).collect();
        for (t, data, dtype) in &cg.inputs {
            if updated.contains(t) || exec.memory().place(*t).is_none() {
                continue;
            }
            let now = exec.read_u32(*t)?;
            let before: &[u32] = bytemuck::cast_slice(data);
            let changed = now.iter().zip(before).position(|(a, b)| a != b);
            if let Some(index) = changed {
                let value = |bits: u32| match dtype {
                    DType::F32 => f64::from(f32::from_bits(bits)),
                    DType::U32 => f64::from(bits),
                };
                findings.push(Finding {
                    tensor: format!("operand {}", self.graph.tensor(*t).name),
                    worst: f64::INFINITY,
                    index,
                    got: value(now[index]),
                    want: value(before[index]),
                    allowed: 0.0,
                    shape: self.graph.shape(*t).to_vec(),
                });
            }
        }
        let Some(base) = &self.base else {
            return Ok(findings);
        };
        let words = exec.read_u32(base.tid)?;
        let mut from = 0;
        let mut before = "the first tensor";
        let ends = base
            .tensors
            .iter()
            .map(|(name, at, len)| (name.as_str(), *at, at + len));
        for (name, at, end) in ends.chain([("", words.len(), words.len())]) {
            if let Some(k) = words[from..at].iter().position(|&w| w != MARK) {
                let side = if from == 0 { "before" } else { "after" };
                findings.push(Finding {
                    tensor: format!("memory {side} {before}"),
                    worst: f64::INFINITY,
                    index: k,
                    got: f64::from(f32::from_bits(words[from + k])),
                    want: f64::from(f32::from_bits(MARK)),
                    allowed: 0.0,
                    shape: vec![at - from],
                });
            }
            (from, before) = (end, name);
        }
        Ok(findings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{CompileOptions, open};
    use crate::ops::check::case_graph;
    use crate::ops::room;

    #[test]
    fn what_stands_between_tensors_is_watched() {
        let case = room("add").unwrap().build("n=3,c=5").unwrap();
        let cg = case_graph(&case, 1).unwrap();
        let cpu = open("cpu").unwrap();
        let guarded = Guarded::new(&cg, cpu.as_ref());
        let options = CompileOptions::default();
        let mut exec = cpu.compile(guarded.graph.clone(), &options).unwrap();
        guarded.prepare(exec.as_mut()).unwrap();
        cg.write(exec.as_mut()).unwrap();
        assert!(guarded.damage(exec.as_mut(), &cg).unwrap().is_empty());
        let base = guarded.base.as_ref().unwrap();
        let (name, at, len) = &base.tensors[1];
        let mut words = exec.read_u32(base.tid).unwrap();
        words[at + len] = 7;
        exec.write_u32(base.tid, &words).unwrap();
        let found = guarded.damage(exec.as_mut(), &cg).unwrap();
        assert_eq!(found.len(), 1);
        assert!(!found[0].ok());
        assert_eq!(found[0].place(), format!("memory after {name}[0]"));
        exec.write(cg.inputs[0].0, &[0.0; 15]).unwrap();
        let found = guarded.damage(exec.as_mut(), &cg).unwrap();
        assert!(found[0].tensor.starts_with("operand x0"), "{found:?}");
    }
}
