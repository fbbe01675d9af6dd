//! A case as a graph with its values.

use super::compare::round_to;
use crate::backend::Exec;
use crate::backend::cuda::Precision;
use crate::graph::{DType, Graph, Kind, Phase, Tid};
use crate::ops::case::{Case, Fill, Operand};
use crate::ops::reference::{Host, Values, interpret};
use crate::philox::Philox;
use crate::{Error, Result};
use std::sync::Arc;

/// A case as a graph: forward, cotangents, backward.
pub struct CaseGraph {
    /// The graph.
    pub graph: Arc<Graph>,
    /// Its inputs with their values (operands and cotangents).
    pub inputs: Vec<(Tid, Vec<f32>, DType)>,
    /// What is compared, with its name.
    pub outputs: Vec<(String, Tid)>,
    /// Operands that are differentiated, with their gradients.
    pub grads: Vec<(usize, Tid, Tid)>,
    /// Differentiable results with their cotangents.
    pub cotangents: Vec<(Tid, Tid)>,
}

/// The seed of a case: its name's hash (FNV-1a), so that a case always has the same values.
pub fn seed_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    })
}

fn fill(o: &Operand, seed: u64, stream: u32) -> Vec<f32> {
    let n = o.spec.len();
    let mut rng = Philox::new(seed, stream);
    match &o.fill {
        Fill::Normal(scale) => (0..n).map(|_| rng.normal() * scale).collect(),
        Fill::Uniform(a, b) => (0..n).map(|_| a + (b - a) * rng.uniform()).collect(),
        Fill::Labels(classes) => (0..n)
            .map(|_| f32::from_bits(rng.below(*classes)))
            .collect(),
        Fill::F32(v) => v.clone(),
        Fill::U32(v) => v.iter().map(|&u| f32::from_bits(u)).collect(),
    }
}

/// Builds the graph of a case.
///
/// # Errors
/// A shape rule does not hold, or a backward rule is missing.
pub fn case_graph(case: &Case, seed: u64) -> Result<CaseGraph> {
    let mut g = Graph::new();
    let mut inputs = vec![];
    let updates = case.op.updates();
    let mut ids = vec![];
    for (i, o) in case.operands.iter().enumerate() {
        let t = g.input(format!("x{i}"), o.spec.clone());
        g.tensor_mut(t).keep = true;
        inputs.push((t, fill(o, seed, i as u32), o.spec.dtype));
        ids.push(t);
    }
    let outs = g.push_arc(case.op.clone(), &ids)?;
    let mut outputs = vec![];
    for (i, &t) in outs.iter().enumerate() {
        g.keep(t);
        outputs.push((format!("y{i}"), t));
    }
    let mut cotangents = vec![];
    for &k in &case.differentiable {
        let spec = g.spec(outs[k]).clone();
        let c = g.input(format!("cotangent{k}"), spec.clone());
        let o = Operand {
            spec,
            fill: Fill::Normal(1.0),
            grad: false,
        };
        inputs.push((c, fill(&o, seed, 1000 + k as u32), DType::F32));
        cotangents.push((outs[k], c));
    }
    let mut grads = vec![];
    if !cotangents.is_empty() {
        let wanted: Vec<Tid> = case
            .operands
            .iter()
            .zip(&ids)
            .filter(|(o, _)| o.grad)
            .map(|(_, &t)| t)
            .collect();
        let found = g.backward_from(&cotangents, &wanted)?;
        for (i, (o, t)) in case.operands.iter().zip(&ids).enumerate() {
            if !o.grad {
                continue;
            }
            let d = *found.get(t).ok_or_else(|| {
                Error::run(format!("no gradient for operand {i} of {}", case.op.name()))
            })?;
            g.keep(d);
            outputs.push((format!("d{i}"), d));
            grads.push((i, *t, d));
        }
    }
    debug_assert!(
        updates
            .iter()
            .all(|u| g.tensor(outs[u.0]).kind == Kind::Input)
    );
    Ok(CaseGraph {
        graph: Arc::new(g),
        inputs,
        outputs,
        grads,
        cotangents,
    })
}

impl CaseGraph {
    /// The inputs in float64.
    pub fn values(&self) -> Values {
        let mut v = Values::new();
        for (t, data, dtype) in &self.inputs {
            let shape = self.graph.shape(*t);
            let data = match dtype {
                DType::F32 => data.iter().map(|&x| f64::from(x)).collect(),
                DType::U32 => data.iter().map(|x| f64::from(x.to_bits())).collect(),
            };
            v.insert(
                *t,
                Host {
                    shape: shape.to_vec(),
                    data,
                },
            );
        }
        v
    }

    /// Sets every input that the compiled graph reads.
    ///
    /// # Errors
    /// The device is lost.
    pub fn write(&self, exec: &mut dyn Exec) -> Result<()> {
        for (t, data, dtype) in &self.inputs {
            if exec.memory().place(*t).is_none() {
                continue;
            }
            match dtype {
                DType::F32 => exec.write(*t, data)?,
                DType::U32 => exec.write_u32(*t, bytemuck::cast_slice(data))?,
            }
        }
        Ok(())
    }

    /// Everything computed by the references.
    pub fn reference(&self) -> Values {
        let mut v = self.values();
        interpret(&self.graph, &[Phase::Forward, Phase::Backward], &mut v);
        v
    }

    /// Everything computed by the references from operands that are rounded to `precision`.
    pub(super) fn reference_of_rounded(&self, precision: Precision) -> Values {
        let mut v = self.values();
        for (t, _, dtype) in &self.inputs {
            if *dtype == DType::F32
                && let Some(host) = v.get_mut(t)
            {
                host.data
                    .iter_mut()
                    .for_each(|x| *x = round_to(*x, precision));
            }
        }
        interpret(&self.graph, &[Phase::Forward, Phase::Backward], &mut v);
        v
    }
}
