//! Checkpoints. `resume.safetensors` alone holds all that a run needs to go on (parameters, optimizer state and the
//! counters, in one file that is replaced whole), so a kill at any point leaves a consistent one; `last` and `best`
//! hold the weights for everybody else.

use super::program::Program;
use crate::backend::Exec;
use crate::graph::Graph;
use crate::graph::train::Update;
use crate::weights::{FloatFormat, SaveTensor, WeightFile, save};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Where a run stands. Sums are kept as they are, so that a resumed epoch ends in the same metrics.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Position {
    /// Epochs done.
    pub epoch: u64,
    /// Batches done in the epoch under way.
    pub batch: u64,
    /// Updates done in all.
    pub step: u64,
    /// Sum of batch losses of the epoch under way.
    pub loss_sum: f64,
    /// Right predictions of the epoch under way.
    pub right: u64,
    /// Images of the epoch under way.
    pub images: u64,
    /// Seconds of training in the epoch under way.
    pub seconds: f64,
    /// Best validation top-1 so far, percent.
    pub best: f64,
    /// Epochs since then.
    #[serde(default)]
    pub stale: u64,
    /// Seconds of training in all, validation left out.
    pub train_seconds: f64,
}

/// Writes everything that is needed to go on; `best` are the best values of all parameters, where no file has them.
///
/// # Errors
/// The file cannot be written; the one before stays.
pub fn write_resume(
    path: &Path,
    program: &mut Program,
    at: &Position,
    config: &str,
    best: Option<&[Vec<f32>]>,
) -> Result<()> {
    let (exec, update) = (program.exec.as_mut(), &program.update);
    let graph = exec.graph().clone();
    let mut tensors = vec![];
    for (p, values) in graph.params.iter().zip(best.unwrap_or_default()) {
        let shape = graph.shape(p.tid).to_vec();
        tensors.push((format!("best/{}", p.name), shape, values.clone()));
    }
    for p in graph.params.iter().filter(|p| p.buffer || !p.trainable) {
        tensors.push((
            format!("param/{}", p.name),
            graph.shape(p.tid).to_vec(),
            exec.read(p.tid)?,
        ));
    }
    for slab in &update.slabs {
        for (kind, t) in std::iter::once(("param", slab.param)).chain(slab.state.iter().copied()) {
            let all = exec.read(t)?;
            for &(i, offset) in &slab.members {
                let p = &graph.params[i];
                let values = all[offset..offset + graph.spec(p.tid).len()].to_vec();
                tensors.push((
                    format!("{kind}/{}", p.name),
                    graph.shape(p.tid).to_vec(),
                    values,
                ));
            }
        }
    }
    let tensors: Vec<SaveTensor> = tensors
        .into_iter()
        .map(|(n, s, v)| SaveTensor::f32(n, &s, v))
        .collect();
    let position = serde_json::to_string(at).map_err(|e| Error::run(e.to_string()))?;
    let metadata = BTreeMap::from([
        ("position".to_string(), position),
        ("config".to_string(), config.to_string()),
    ]);
    save(path, &tensors, &metadata, FloatFormat::F32)
}

/// The position and configuration in a file of [`write_resume`].
///
/// # Errors
/// The file is not one of ours.
pub fn read_position(file: &WeightFile) -> Result<(Position, String)> {
    let not_ours = || {
        Error::input(format!(
            "{} is not a checkpoint to resume from",
            file.path().display()
        ))
    };
    let position = file.metadata().get("position").ok_or_else(not_ours)?;
    let position = serde_json::from_str(position).map_err(|_| not_ours())?;
    Ok((
        position,
        file.metadata().get("config").cloned().unwrap_or_default(),
    ))
}

/// Puts the parameters and the optimizer state of a file of [`write_resume`] back.
///
/// # Errors
/// A tensor is missing or has another size.
pub fn read_resume(file: &WeightFile, exec: &mut dyn Exec, update: &Update) -> Result<()> {
    let graph: Graph = exec.graph().clone();
    for p in graph.params.iter().filter(|p| p.buffer || !p.trainable) {
        exec.write(p.tid, &file.read_f32(&format!("param/{}", p.name))?)?;
    }
    for slab in &update.slabs {
        for (kind, t) in std::iter::once(("param", slab.param)).chain(slab.state.iter().copied()) {
            let mut all = vec![0.0; graph.spec(t).len()];
            for &(i, offset) in &slab.members {
                let p = &graph.params[i];
                let to = &mut all[offset..offset + graph.spec(p.tid).len()];
                file.read_f32_into(&format!("{kind}/{}", p.name), to)?;
            }
            exec.write(t, &all)?;
        }
    }
    Ok(())
}

/// Every parameter and running statistic, in the graph's order.
///
/// # Errors
/// The device is lost.
pub fn read_params(exec: &mut dyn Exec) -> Result<Vec<Vec<f32>>> {
    let ids: Vec<crate::graph::Tid> = exec.graph().params.iter().map(|p| p.tid).collect();
    ids.into_iter().map(|t| exec.read(t)).collect()
}
