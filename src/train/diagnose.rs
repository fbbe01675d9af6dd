//! Where the first value that is not finite came from, when a loss is not.

use super::program::{Program, ProgramSpec};
use crate::Result;
use crate::backend::{Backend, CompileOptions};
use crate::graph::{DType, Kind, Phase, Tid};
use std::collections::HashMap;
use std::sync::Arc;

/// Looks for the first value that is not finite in the step that `program` has just run forward, and says where it is: a
/// weight (and then the gradient that made it so), an input, or a layer's output. `step` is the number of the update
/// that was under way, from 1.
///
/// # Errors
/// The device is lost, or there is no memory for every layer's output.
pub fn first_not_finite(
    backend: &dyn Backend,
    spec: &ProgramSpec,
    program: &mut Program,
    step: u64,
) -> Result<String> {
    let params = super::checkpoint::read_params(program.exec.as_mut())?;
    // Running statistics are of this step already: they tell nothing of what was before it.
    let of_update = |i: usize| !program.exec.graph().params[i].buffer;
    let broken = |v: &Vec<f32>| v.iter().any(|v| !v.is_finite());
    let bad = (0..params.len()).find(|&i| of_update(i) && broken(&params[i]));
    if let Some(bad) = bad {
        let name = program.exec.graph().params[bad].name.clone();
        let made = format!("weights of update {}", step.saturating_sub(1));
        if step < 2 {
            return Ok(format!("{name} of the weights that the run starts from"));
        }
        return Ok(match last_gradient(program)? {
            // Gradients are made from the last layer to the first.
            Some(gradient) => format!(
                "{name} among the {made}; before it, the gradient of {gradient} in that update"
            ),
            None => format!("{name} among the {made}, whose step was too large"),
        });
    }
    let built = spec.build()?;
    let mut graph = built.net.graph;
    let outputs: Vec<Tid> = graph.nodes.iter().flat_map(|n| n.outputs.clone()).collect();
    for t in outputs {
        graph.keep(t);
    }
    let graph = Arc::new(graph);
    let mut exec = backend.compile(graph.clone(), &CompileOptions::default())?;
    for (p, values) in graph.params.iter().zip(&params) {
        exec.write(p.tid, values)?;
    }
    // Inputs go by their names: the training graph has the same ones, and more.
    let trained = program.exec.graph().clone();
    let mut inputs: HashMap<&str, Vec<Tid>> = HashMap::new();
    for (i, t) in trained.tensors.iter().enumerate() {
        if t.kind == Kind::Input && t.view.is_none() {
            inputs.entry(&t.name).or_default().push(Tid(i as u32));
        }
    }
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for (i, t) in graph.tensors.iter().enumerate() {
        let here = t.kind == Kind::Input && t.view.is_none();
        let number = seen.entry(&t.name).or_default();
        let from = inputs.get(t.name.as_str()).and_then(|all| all.get(*number));
        let Some(&from) = from.filter(|_| here) else {
            continue;
        };
        *number += 1;
        let to = Tid(i as u32);
        if t.spec.dtype == DType::U32 {
            let values = program.exec.read_u32(from)?;
            exec.write_u32(to, &values)?;
            continue;
        }
        let values = program.exec.read(from)?;
        if values.iter().any(|v| !v.is_finite()) {
            return Ok(format!("the input called {}", t.name));
        }
        exec.write(to, &values)?;
    }
    exec.run(&[Phase::Prepare, Phase::Forward])?;
    for node in graph.nodes.iter().filter(|n| n.phase == Phase::Forward) {
        for &t in &node.outputs {
            if graph.spec(t).dtype == DType::F32 && exec.read(t)?.iter().any(|v| !v.is_finite()) {
                let layer = match node.scope.as_str() {
                    "" => "the loss",
                    scope => scope,
                };
                return Ok(format!("the output of {layer} ({})", node.op.name()));
            }
        }
    }
    Ok("the loss alone: every layer's output is finite when computed again".into())
}

/// The last parameter, in the model's order, whose gradient of the last update is not finite; gradients of several
/// batches are cleared after the update.
fn last_gradient(program: &mut Program) -> Result<Option<String>> {
    let mut last: Option<usize> = None;
    for slab in program.update.slabs.clone() {
        let all = program.exec.read(slab.grad)?;
        let graph = program.exec.graph();
        for &(i, offset) in &slab.members {
            let len = graph.spec(graph.params[i].tid).len();
            if all[offset..offset + len].iter().any(|v| !v.is_finite()) {
                last = last.max(Some(i));
            }
        }
    }
    Ok(last.map(|i| program.exec.graph().params[i].name.clone()))
}
