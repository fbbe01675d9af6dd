//! One step taken apart: every launch with its time against the device's limits, memory over time, and a trace.
//!
//! A profile is recorded as JSON and read again by `profile --diff`.

pub mod diff;
pub mod memory;
pub mod trace;

use crate::backend::cuda::Machine;
use crate::backend::cuda::resources::{Footprint, paired};
use crate::backend::cuda::sim::Counters;
use crate::backend::{Backend, CompileOptions, Span};
use crate::bench::model::{Direction, Part, Step, StepOptions, Traced, phase_name, signature};
use crate::bench::record::Origin;
use crate::bench::{Ceilings, Sample};
use crate::graph::{Graph, Phase};
use crate::models::Model;
use crate::ops::Cost;
use crate::{Error, Result};
use memory::Usage;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What the simulator counted in one launch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counted {
    /// Warp instructions.
    pub instructions: u64,
    /// Warp-wide `mma` instructions.
    pub mma: u64,
    /// Bytes to and from global memory, in whole sectors.
    pub global_bytes: u64,
    /// Sectors that a warp's load takes, on average: 4 where 32 lanes read neighbours.
    #[serde(default)]
    pub sectors_per_load: f64,
    /// Ideal number of sectors of loads over the actual one.
    pub load_efficiency: f64,
    /// The same of stores.
    pub store_efficiency: f64,
    /// Extra wavefronts of shared memory.
    pub bank_conflicts: u64,
    /// Barriers, once a warp.
    pub barriers: u64,
    /// Branches in which a warp parted.
    pub divergent_branches: u64,
}

impl Counted {
    /// From counters.
    pub fn of(c: &Counters) -> Counted {
        Counted {
            instructions: c.instructions,
            mma: c.mma,
            global_bytes: c.global_bytes(),
            sectors_per_load: c.global_load.units as f64 / c.global_load.requests.max(1) as f64,
            load_efficiency: c.global_load.efficiency(),
            store_efficiency: c.global_store.efficiency(),
            bank_conflicts: c.bank_conflicts(),
            barriers: c.barriers,
            divergent_branches: c.divergent_branches,
        }
    }
}

/// One launch of the step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Launch {
    /// Its node's place in the graph.
    pub node: usize,
    /// `forward`, `backward`, `optimizer`.
    pub phase: String,
    /// The layer, as in the parameter names.
    pub scope: String,
    /// `conv2d_dgrad`.
    pub op: String,
    /// The variant that was asked for; `auto` is the op's own rule.
    pub variant: String,
    /// `gemm_tile.wgsl/tile`; empty on the CPU, where a node is one call.
    pub kernel: String,
    /// Operands and results.
    pub shape: String,
    /// Seconds from the start of the run.
    pub start: f64,
    /// Seconds.
    pub seconds: f64,
    /// Seconds from the end of the launch before.
    pub gap: f64,
    /// Operations as the definition counts them. A node of several launches has them at its longest one.
    pub flops: u64,
    /// Operations that the kernel does.
    pub executed: u64,
    /// Compulsory bytes.
    pub bytes: u64,
    /// Seconds at the roofline; 0 where no limits were measured.
    pub floor: f64,
    /// `arithmetic` or `memory`.
    pub bound: String,
    /// In place of the time, on the simulator.
    pub counted: Option<Counted>,
    /// What it takes of a multiprocessor, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub footprint: Option<Footprint>,
}

impl Launch {
    /// What can be had at most by a better kernel.
    pub fn to_gain(&self) -> f64 {
        (self.seconds - self.floor).max(0.0)
    }

    /// Floor over time.
    pub fn share(&self) -> f64 {
        if self.seconds > 0.0 {
            self.floor / self.seconds
        } else {
            0.0
        }
    }
}

/// A profiled step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Profile {
    /// What it was made with.
    pub origin: Origin,
    /// Model id.
    pub model: String,
    /// `train` or `infer`.
    pub direction: Direction,
    /// Images.
    pub batch: usize,
    /// Side in pixels.
    pub image: usize,
    /// Steps that were traced; this is the one of median length.
    pub steps: usize,
    /// Seconds of the step without a trace.
    pub untraced: f64,
    /// Seconds in which the host wrote the data.
    pub write: f64,
    /// Seconds from the first launch to the end of the last, by the host's clock.
    pub run: f64,
    /// Seconds in which the host read the result.
    pub read: f64,
    /// Every launch, in order.
    pub launches: Vec<Launch>,
    /// Memory by node.
    pub memory: Usage,
}

/// By what launches are put together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Group {
    /// Layer: the launch's scope.
    Layer,
    /// Kind of op.
    Op,
    /// Forward, backward, optimizer.
    Phase,
    /// Kernel source and entry.
    Kernel,
}

impl Profile {
    /// Profiles one step of `model`: `steps` are traced after two that are not, and the one of median length is kept.
    /// With `machine`, every CUDA launch has its footprint.
    ///
    /// # Errors
    /// As [`Step::new`], [`Step::run`] and [`Backend::footprints`].
    pub fn record(
        backend: &dyn Backend,
        model: &Model,
        direction: Direction,
        options: &StepOptions,
        steps: usize,
        machine: Option<Machine>,
    ) -> Result<Profile> {
        let mut step = Step::new(backend, model, direction, options)?;
        let counts = backend.name() == "cuda:sim";
        let mut untraced = vec![];
        if !counts {
            for _ in 0..3 {
                let clock = std::time::Instant::now();
                step.run()?;
                untraced.push(clock.elapsed().as_secs_f64());
            }
        }
        let mut traced: Vec<Traced> = vec![];
        for _ in 0..if counts { 1 } else { steps.max(1) } {
            traced.push(step.traced()?);
        }
        traced.sort_by(|a, b| a.seconds().total_cmp(&b.seconds()));
        let kept = traced.swap_remove(traced.len() / 2);
        let mut launches = launches(backend.name(), step.graph(), &kept.spans);
        if let Some(machine) = machine {
            let footprints =
                backend.footprints(step.graph(), &CompileOptions::default(), machine)?;
            let paired = paired(&kept.spans, &footprints);
            for (launch, footprint) in launches.iter_mut().zip(paired) {
                launch.footprint = footprint.cloned();
            }
        }
        Ok(Profile {
            origin: Origin::of(backend),
            model: model.id.clone(),
            direction,
            batch: options.batch,
            image: step.image(),
            steps: traced.len() + 1,
            untraced: Sample::of(untraced).median,
            write: kept.write,
            run: kept.run,
            read: kept.read,
            launches,
            memory: memory::usage(step.graph(), step.memory(), step.phases()),
        })
    }

    /// Puts every launch under the device's measured limits.
    pub fn hold_to(&mut self, ceilings: &Ceilings) {
        for l in self.launches.iter_mut().filter(|l| l.bytes > 0) {
            let done = Cost {
                flops: l.executed,
                bytes: l.bytes,
            };
            l.floor = ceilings.floor(done);
            let arithmetic = ceilings.compute_bound(done);
            l.bound = if arithmetic { "arithmetic" } else { "memory" }.into();
        }
    }

    /// Whether a kind of op seems faster than its ceiling, which was then measured too low (the device was busy).
    pub fn above_ceiling(&self) -> bool {
        let groups = self.grouped(Group::Op);
        groups.iter().any(|g| g.0.share() > 1.0)
    }

    /// Sum of the launches' times.
    pub fn busy(&self) -> f64 {
        self.launches.iter().map(|l| l.seconds).sum()
    }

    /// Whether there are counts in place of times.
    pub fn counted(&self) -> bool {
        self.launches.iter().any(|l| l.counted.is_some())
    }

    /// The launches put together, most costly first (by instructions where there are no times), with the sum of what
    /// was counted.
    pub fn grouped(&self, by: Group) -> Vec<(Part, Counted)> {
        let mut parts: BTreeMap<&str, (Part, Counted)> = BTreeMap::new();
        for l in &self.launches {
            let name = match by {
                Group::Layer => &l.scope,
                Group::Op => &l.op,
                Group::Phase => &l.phase,
                Group::Kernel => &l.kernel,
            };
            let (part, counted) = parts.entry(name).or_default();
            part.name.clone_from(name);
            let cost = Cost {
                flops: l.flops,
                bytes: l.bytes,
            };
            part.add(l.seconds, cost, l.executed, l.floor);
            if let Some(c) = &l.counted {
                counted.instructions += c.instructions;
                counted.mma += c.mma;
                counted.global_bytes += c.global_bytes;
                counted.bank_conflicts += c.bank_conflicts;
                counted.barriers += c.barriers;
                counted.divergent_branches += c.divergent_branches;
            }
        }
        let mut parts: Vec<(Part, Counted)> = parts.into_values().collect();
        parts.sort_by(|a, b| {
            let time = b.0.seconds.total_cmp(&a.0.seconds);
            time.then(b.1.instructions.cmp(&a.1.instructions))
        });
        parts
    }

    /// The launches from which a better kernel would gain most, at most `n`; by instructions where there are no times.
    pub fn to_fix_first(&self, n: usize) -> Vec<&Launch> {
        let mut all: Vec<&Launch> = self.launches.iter().collect();
        let instructions = |l: &Launch| l.counted.as_ref().map_or(0, |c| c.instructions);
        all.sort_by(|a, b| {
            let gain = b.to_gain().total_cmp(&a.to_gain());
            gain.then(instructions(b).cmp(&instructions(a)))
        });
        all.truncate(n);
        all
    }

    /// Writes the profile as JSON.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_vec(self).map_err(|e| Error::run(e.to_string()))?;
        crate::report::write_atomic(path, &json)
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::Input`] where it is not a recorded profile.
    pub fn load(path: &Path) -> Result<Profile> {
        let bytes = std::fs::read(path).map_err(|e| Error::reading(path, e))?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Error::input(format!(
                "{}: not a recorded profile ({e}); `tilewright profile MODEL --save FILE` makes one",
                path.display()
            ))
        })
    }
}

/// The launches of a traced run. A node's work stands at its longest launch: what its other launches do (packing,
/// partial sums) is not in its definition.
fn launches(backend: &str, graph: &Graph, spans: &[Span]) -> Vec<Launch> {
    let mut out: Vec<Launch> = vec![];
    let mut longest: BTreeMap<usize, usize> = BTreeMap::new();
    let mut end = 0.0;
    for s in spans {
        let node = &graph.nodes[s.node];
        let (x, y) = graph.node_specs(node);
        let start = s.start.as_secs_f64();
        let counted = s.count.as_ref().map(|c| Counted::of(&c.counters));
        let work = |l: &Launch| {
            let instructions = l.counted.as_ref().map_or(0, |c| c.instructions);
            (l.seconds, instructions as f64)
        };
        let launch = Launch {
            node: s.node,
            phase: phase_name(node.phase).into(),
            scope: node.scope.clone(),
            op: node.op.name().into(),
            variant: "auto".into(),
            kernel: s.kernel.clone(),
            shape: signature("", &x, &y).trim().into(),
            start,
            seconds: s.time.as_secs_f64(),
            gap: (start - end).max(0.0),
            counted,
            ..Launch::default()
        };
        end = f64::max(end, start + launch.seconds);
        let i = out.len();
        let best = longest.entry(s.node).or_insert(i);
        if *best != i && work(&launch) > work(&out[*best]) {
            *best = i;
        }
        out.push(launch);
    }
    for (node, i) in longest {
        let node = &graph.nodes[node];
        let (x, y) = graph.node_specs(node);
        let cost = node.op.cost(&x, &y);
        let l = &mut out[i];
        (l.flops, l.bytes) = (cost.flops, cost.bytes);
        l.executed = node.op.executed(backend, None, &x, &y);
    }
    out
}

/// Phases by the names that launches have.
pub const PHASES: [Phase; 3] = [Phase::Forward, Phase::Backward, Phase::Optimizer];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::find;
    use crate::train::config::OptimizerName;

    pub fn tiny(direction: Direction) -> Profile {
        let cpu = crate::backend::open("cpu").unwrap();
        let options = StepOptions {
            batch: 2,
            image: Some(8),
            classes: Some(3),
            dropout: None,
            optimizer: OptimizerName::Adamw,
            seed: 1,
        };
        let ceilings = Ceilings {
            flops: 1e15,
            bandwidth: vec![[1.0, 1e15]],
            launch: 0.0,
        };
        let model = find("cnn_r14").unwrap();
        let mut p = Profile::record(cpu.as_ref(), &model, direction, &options, 3, None).unwrap();
        p.hold_to(&ceilings);
        p
    }

    #[test]
    fn groups_hold_every_launch_once() {
        let p = tiny(Direction::Train);
        for by in [Group::Layer, Group::Op, Group::Phase, Group::Kernel] {
            let parts = p.grouped(by);
            let count: usize = parts.iter().map(|g| g.0.count).sum();
            let seconds: f64 = parts.iter().map(|g| g.0.seconds).sum();
            assert_eq!(count, p.launches.len());
            assert!((seconds - p.busy()).abs() < 1e-9);
        }
        let phases: Vec<String> = p
            .grouped(Group::Phase)
            .into_iter()
            .map(|g| g.0.name)
            .collect();
        assert_eq!(phases.len(), PHASES.len(), "{phases:?}");
        // Launches and gaps fill the run; on a busy machine the thread may be held up just after it.
        assert!((0..10).any(|_| {
            let p = tiny(Direction::Train);
            let gaps: f64 = p.launches.iter().map(|l| l.gap).sum();
            p.busy() + gaps <= p.run && p.busy() + gaps > 0.9 * p.run
        }));
        let first = p.to_fix_first(3);
        assert!(first.windows(2).all(|w| w[0].to_gain() >= w[1].to_gain()));
    }

    #[test]
    fn profiles_are_read_as_they_were_written() {
        let p = tiny(Direction::Infer);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.json");
        p.save(&file).unwrap();
        let q = Profile::load(&file).unwrap();
        assert_eq!(p.launches, q.launches);
        std::fs::write(&file, "{}").unwrap();
        assert!(matches!(Profile::load(&file), Err(Error::Input(_))));
    }
}
