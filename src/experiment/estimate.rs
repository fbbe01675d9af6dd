//! What the runs of an experiment would take, from timed steps of their networks.

use super::matrix::Planned;
use crate::Result;
use crate::backend::Backend;
use crate::bench::model::{Direction, Step, StepOptions};
use crate::train::TrainConfig;
use crate::train::dry::{Plan, plan};
use serde::Serialize;
use std::collections::HashMap;
use std::time::Instant;

/// Networks above this many parameters are not built to be timed.
const LARGEST: usize = 60_000_000;
/// A timed step has about this many operations: a second or two of a small CPU.
const FLOPS: u64 = 40_000_000_000;

/// Where a time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Timed steps of this network.
    Steps,
    /// The operations of this network at the rate of the timed ones (of all of them together).
    Flops,
}

/// What a run would take.
#[derive(Clone, Debug)]
pub struct Estimate {
    /// The run, planned.
    pub plan: Plan,
    /// Weights, gradients, optimizer state, inputs and activations, in bytes.
    pub memory: usize,
    /// Seconds of all its epochs, with evaluation; `None` where the data are not there yet.
    pub seconds: Option<f64>,
    /// Where the time comes from.
    pub source: Source,
}

/// Seconds per image of the steps that were timed, and where each comes from.
#[derive(Default)]
struct Clock {
    timed: HashMap<(String, usize, bool), f64>,
    flops: f64,
    seconds: f64,
}

/// Operations of one image: a training step's are about three forward passes'.
fn work(plan: &Plan, train: bool) -> f64 {
    plan.flops as f64 * if train { 3.0 } else { 1.0 }
}

impl Clock {
    /// Times a step of the network of `plan`, if it is small enough to be built for that.
    fn time(&mut self, backend: &dyn Backend, plan: &Plan, train: bool) -> Result<()> {
        let key = (plan.model.id.clone(), plan.size, train);
        if plan.params > LARGEST || self.timed.contains_key(&key) {
            return Ok(());
        }
        let most = (FLOPS as f64 / work(plan, train).max(1.0)) as usize;
        let batch = most.clamp(1, plan.config.batch_size);
        let options = StepOptions {
            batch,
            image: Some(plan.size),
            classes: Some(plan.classes),
            dropout: None,
            optimizer: plan.config.optimizer,
            seed: 0,
        };
        let direction = if train {
            Direction::Train
        } else {
            Direction::Infer
        };
        let mut step = Step::new(backend, &plan.model, direction, &options)?;
        step.run()?;
        let (clock, mut steps) = (Instant::now(), 0);
        while steps < 3 && clock.elapsed().as_secs_f64() < 0.5 {
            step.run()?;
            steps += 1;
        }
        let each = clock.elapsed().as_secs_f64() / f64::from(steps) / batch as f64;
        self.flops += work(plan, train);
        self.seconds += each;
        self.timed.insert(key, each);
        Ok(())
    }

    /// Seconds per image.
    fn each(&self, plan: &Plan, train: bool) -> (f64, Source) {
        match self.timed.get(&(plan.model.id.clone(), plan.size, train)) {
            Some(&s) => (s, Source::Steps),
            None => (work(plan, train) * self.seconds / self.flops, Source::Flops),
        }
    }
}

/// Plans `runs` and times a training step (of a frozen backbone: an inference step) of each of their networks. What cannot
/// be planned yet, because its data are not there, has its reason in place of an estimate.
///
/// # Errors
/// There is no such backend, or a step fails.
pub fn estimate(
    runs: &[Planned],
    open: impl Fn(&TrainConfig) -> Result<Box<dyn Backend>>,
) -> Result<Vec<Result<Estimate>>> {
    let plans: Vec<Result<Plan>> = runs
        .iter()
        .map(|r| plan(&r.config).map_err(|e| e.context(r.name())))
        .collect();
    let mut clock = Clock::default();
    let mut backends: Vec<(String, String, Box<dyn Backend>)> = vec![];
    for plan in plans.iter().flatten() {
        let c = &plan.config;
        let same = |b: &(String, String, Box<dyn Backend>)| b.0 == c.backend && b.1 == c.precision;
        let place = match backends.iter().position(same) {
            Some(i) => i,
            None => {
                backends.push((c.backend.clone(), c.precision.clone(), open(c)?));
                backends.len() - 1
            }
        };
        let backend = backends[place].2.as_ref();
        // The gradient of a frozen backbone is not taken.
        if !c.freeze_backbone {
            clock.time(backend, plan, true)?;
        }
        clock.time(backend, plan, false)?;
    }
    let each = |plan: Plan| {
        let frozen = plan.config.freeze_backbone;
        let (train, source) = clock.each(&plan, !frozen);
        let (infer, _) = clock.each(&plan, false);
        let seconds = plan.epoch.map(|(images, _)| {
            let passes = match plan.features_once {
                true => 1.0,
                false => plan.config.epochs as f64,
            };
            passes * (images as f64 * train + plan.test as f64 * infer)
        });
        Estimate {
            memory: plan.persistent + plan.activations,
            // Without any timed network there is no rate.
            seconds: seconds.filter(|s| s.is_finite()),
            source,
            plan,
        }
    };
    Ok(plans.into_iter().map(|p| p.map(each)).collect())
}
