//! Whole training and inference steps of a model on synthetic images: time, work, memory, and where the time goes.

use super::ceiling::{Ceilings, present_share};
use super::measure::{Limits, Sample};
use crate::backend::{Backend, Exec, Span};
use crate::graph::plan::Memory;
use crate::graph::{Graph, Phase, Spec, Tid};
use crate::models::session::{Session, SessionOptions};
use crate::models::{Model, ModelOptions};
use crate::ops::Cost;
use crate::ops::act::Act;
use crate::ops::attention::Attention;
use crate::ops::conv2d::{Conv2d, Window};
use crate::ops::linear::Linear;
use crate::philox::Philox;
use crate::train::config::OptimizerName;
use crate::train::{Program, ProgramSpec, TrainConfig};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What a step does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Forward, backward, update.
    Train,
    /// Forward with folded norms and constant weights.
    Infer,
}

/// Which step of a model.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// Images in a step.
    pub batch: usize,
    /// Side of the images in pixels. Default: the model's own.
    pub image: Option<usize>,
    /// Classes. Default: the model's own, or 1000 for a backbone.
    pub classes: Option<usize>,
    /// Dropout, where the model has such layers. Default: the model's own.
    pub dropout: Option<f32>,
    /// Update rule.
    pub optimizer: OptimizerName,
    /// Of weights and images.
    pub seed: u64,
}

/// A step that is ready to run: compiled, with weights and data.
pub struct Step {
    exec: Box<dyn Exec>,
    direction: Direction,
    /// What the host writes before a run.
    data: Vec<(Tid, Vec<f32>)>,
    labels: Option<(Tid, Vec<u32>)>,
    /// What the host reads after it.
    result: Tid,
    image: usize,
    classes: usize,
}

impl Step {
    /// Builds and compiles.
    ///
    /// # Errors
    /// The image does not suit the model, or the backend cannot run it.
    pub fn new(
        backend: &dyn Backend,
        model: &Model,
        direction: Direction,
        options: &StepOptions,
    ) -> Result<Step> {
        if options.batch == 0 {
            return Err(Error::input("batch size is 0; give at least 1"));
        }
        let image = options.image.unwrap_or(model.image);
        let classes = match options.classes.unwrap_or(model.classes) {
            0 => 1000,
            n => n,
        };
        let chosen = ModelOptions {
            classes: Some(classes),
            dropout: options.dropout,
            ..ModelOptions::default()
        };
        let mut rng = Philox::new(options.seed, 77);
        let images: Vec<f32> = (0..options.batch * image * image * 3)
            .map(|_| rng.normal())
            .collect();
        if direction == Direction::Infer {
            let session = SessionOptions {
                model: chosen,
                seed: options.seed,
                ..SessionOptions::new(options.batch, (image, image))
            };
            let session = Session::open(backend, model, None, &session)?;
            let (exec, input, result) = session.into_parts();
            return Ok(Step {
                exec,
                direction,
                data: vec![(input, images)],
                labels: None,
                result,
                image,
                classes,
            });
        }
        let config = TrainConfig {
            model: model.id.clone(),
            batch_size: options.batch,
            optimizer: options.optimizer,
            seed: options.seed,
            ..TrainConfig::default()
        };
        let mut p = Program::compile(
            backend,
            &ProgramSpec {
                config: &config,
                model,
                options: &chosen,
                size: image,
                init: None,
                fill: [0.0; 3],
                class_weights: None,
                thinned: None,
                head_alone: false,
            },
        )?;
        if let Some(rng) = p.rng {
            p.exec.write_u32(rng, &[options.seed as u32, 0, 0, 0])?;
        }
        let hyper = p.update.hyper_values(1, config.lr).to_vec();
        let labels = (0..options.batch).map(|_| rng.below(classes as u32));
        Ok(Step {
            exec: p.exec,
            direction,
            data: vec![(p.input, images), (p.update.hyper, hyper)],
            labels: p.targets.labels.map(|t| (t, labels.collect())),
            result: p.loss,
            image,
            classes,
        })
    }

    /// The compiled graph.
    pub fn graph(&self) -> &Graph {
        self.exec.graph()
    }

    /// Where everything lives.
    pub fn memory(&self) -> &Memory {
        self.exec.memory()
    }

    /// Side of the images in pixels.
    pub fn image(&self) -> usize {
        self.image
    }

    /// What runs in a step.
    pub fn phases(&self) -> &'static [Phase] {
        match self.direction {
            Direction::Train => &[Phase::Forward, Phase::Backward, Phase::Optimizer],
            Direction::Infer => &[Phase::Forward],
        }
    }

    fn write(&mut self) -> Result<()> {
        for (t, values) in &self.data {
            self.exec.write(*t, values)?;
        }
        if let Some((t, values)) = &self.labels {
            self.exec.write_u32(*t, values)?;
        }
        Ok(())
    }

    /// One step: data in, run, loss or logits out.
    ///
    /// # Errors
    /// The device is lost, or the result is not finite.
    pub fn run(&mut self) -> Result<()> {
        self.write()?;
        self.exec.run(self.phases())?;
        self.read()
    }

    /// One step with every launch.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn traced(&mut self) -> Result<Traced> {
        let clock = Instant::now();
        let mut lap = {
            let mut last = 0.0;
            move || {
                let now = clock.elapsed().as_secs_f64();
                now - std::mem::replace(&mut last, now)
            }
        };
        self.write()?;
        let write = lap();
        let spans = self.exec.run_traced(self.phases())?;
        let run = lap();
        self.read()?;
        Ok(Traced {
            write,
            run,
            read: lap(),
            spans,
        })
    }

    fn read(&mut self) -> Result<()> {
        let result = self.exec.read(self.result)?;
        match result.iter().find(|v| !v.is_finite()) {
            None => Ok(()),
            Some(v) => Err(Error::run(format!(
                "{} became {v}; what is not right is not timed",
                self.exec.graph().tensor(self.result).name
            ))),
        }
    }
}

/// A step taken apart: seconds of the host, and every launch.
#[derive(Clone, Debug)]
pub struct Traced {
    /// Data in.
    pub write: f64,
    /// From the first launch to the end of the last.
    pub run: f64,
    /// Result out.
    pub read: f64,
    /// The launches.
    pub spans: Vec<Span>,
}

impl Traced {
    /// The whole step.
    pub fn seconds(&self) -> f64 {
        self.write + self.run + self.read
    }
}

/// Time and work of a part of a step.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Part {
    /// Phase, op or layer.
    pub name: String,
    /// Launches.
    pub count: usize,
    /// Median seconds.
    pub seconds: f64,
    /// Operations as the definition counts them (direct convolution).
    pub flops: u64,
    /// Operations that the kernels do (Winograd's are fewer).
    pub executed: u64,
    /// Compulsory bytes.
    pub bytes: u64,
    /// Seconds at the ceilings: the sum over launches of executed operations over the peak or bytes over the bandwidth,
    /// whichever is longer.
    pub floor: f64,
}

impl Part {
    /// Adds one launch.
    pub(crate) fn add(&mut self, seconds: f64, cost: Cost, executed: u64, floor: f64) {
        self.count += 1;
        self.seconds += seconds;
        self.flops += cost.flops;
        self.executed += executed;
        self.bytes += cost.bytes;
        self.floor += floor;
    }

    /// Share of the roofline: floor over time.
    pub fn share(&self) -> f64 {
        if self.seconds > 0.0 {
            self.floor / self.seconds
        } else {
            0.0
        }
    }
}

/// What a step came to.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Model id.
    pub model: String,
    /// Training or inference.
    pub direction: Direction,
    /// `cpu`, `wgpu`.
    pub backend: &'static str,
    /// The device.
    pub device: String,
    /// Images.
    pub batch: usize,
    /// Side in pixels.
    pub image: usize,
    /// Classes.
    pub classes: usize,
    /// Elements of all parameters.
    pub params: usize,
    /// Seconds to build, differentiate, plan and compile, weights and data included.
    pub prepare: f64,
    /// Seconds of the first step.
    pub first: f64,
    /// A step, data in and result out.
    pub step: Sample,
    /// Images a second.
    pub images_per_second: f64,
    /// Operations of a step as the definition counts them.
    pub flops: u64,
    /// Operations that the kernels do.
    pub executed: u64,
    /// Definition's operations over time: what a user gets.
    pub flops_per_second: f64,
    /// Share of the measured peak: operations done over time and peak.
    pub mfu: f64,
    /// Share of the roofline: sum of the launches' floors over the step's time.
    pub roofline: f64,
    /// Sum of the parts' times over the step's.
    pub accounted: f64,
    /// Share of the measured peak that the device gave just before and after: below 1 where it was busy or hot.
    pub present: [f64; 2],
    /// Planned bytes in all.
    pub planned_bytes: usize,
    /// Of which inputs, parameters, optimizer state.
    pub persistent_bytes: usize,
    /// Most bytes of temporaries alive at once.
    pub temporaries_bytes: usize,
    /// Most resident memory of the process while this step was made and run, where the system tells.
    pub peak_rss: Option<u64>,
    /// Data, forward, backward, optimizer, result.
    pub phases: Vec<Part>,
    /// By kind of op, most costly first.
    pub ops: Vec<Part>,
    /// By kind of op and shapes, most costly first.
    pub shapes: Vec<Part>,
    /// By launch, the most above its floor first.
    pub launches: Vec<Part>,
}

/// `conv2d [8, 56, 56, 64] [64, 3, 3, 64] -> [8, 56, 56, 64]`; vectors (biases, statistics) are left out.
pub(crate) fn signature(op: &str, x: &[Spec], y: &[Spec]) -> String {
    let list = |specs: &[Spec]| -> String {
        let shown = specs.iter().filter(|s| s.shape.len() > 1);
        shown.map(|s| format!(" {:?}", s.shape)).collect()
    };
    match (list(x), list(y)) {
        (x, y) if y.is_empty() => format!("{op}{x}"),
        (x, y) => format!("{op}{x} ->{y}"),
    }
}

/// The distinct convolutions, linear layers and attentions of `model`'s step as case strings of their rooms: (room,
/// parameters).
///
/// # Errors
/// As [`Step::new`].
pub fn layer_cases(
    backend: &dyn Backend,
    model: &Model,
    options: &StepOptions,
) -> Result<Vec<(&'static str, String)>> {
    let step = Step::new(backend, model, Direction::Train, options)?;
    let graph = step.graph();
    let mut cases = vec![];
    for node in graph.nodes.iter().filter(|n| n.phase == Phase::Forward) {
        let x = graph.node_specs(node).0;
        let case = if let Some(op) = node.op_as::<Conv2d>() {
            let ([n, h, w, c], [k, r, s, _]) = (four(&x[0]), four(&x[1]));
            let Window {
                stride,
                pad,
                groups,
            } = op.window;
            let [bias, residual, relu] = [op.bias, op.residual, op.relu].map(u8::from);
            format!(
                "n={n},h={h},w={w},c={c},k={k},r={r},s={s},stride={},stride_w={},pad={},pad_w={},groups={groups},\
                 bias={bias},residual={residual},relu={relu}",
                stride[0], stride[1], pad[0], pad[1]
            )
        } else if let Some(op) = node.op_as::<Linear>() {
            let act = match op.act {
                None => "none",
                Some(Act::Relu) => "relu",
                Some(Act::Gelu) => "gelu",
                Some(Act::GeluTanh) => "gelu_tanh",
            };
            let [bias, residual] = [op.bias, op.residual].map(u8::from);
            let (m, i, o) = (x[0].rows(), x[0].channels(), x[1].rows());
            format!("m={m},i={i},o={o},bias={bias},residual={residual},act={act}")
        } else if let Some(op) = node.op_as::<Attention>() {
            let [n, t, width] = x[0].shape[..] else {
                continue;
            };
            format!("n={n},t={t},h={},d={}", op.heads, width / 3 / op.heads)
        } else {
            continue;
        };
        let case = (node.op.name(), case);
        if !cases.contains(&case) {
            cases.push(case);
        }
    }
    Ok(cases)
}

fn four(s: &Spec) -> [usize; 4] {
    std::array::from_fn(|i| s.shape.get(i).copied().unwrap_or(1))
}

pub(crate) fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "prepare",
        Phase::Forward => "forward",
        Phase::Backward => "backward",
        Phase::Optimizer => "optimizer",
    }
}

/// Times of the parts of single steps, in seconds.
#[derive(Default)]
struct Times {
    step: Vec<f64>,
    write: Vec<f64>,
    read: Vec<f64>,
    nodes: BTreeMap<usize, Vec<f64>>,
}

impl Times {
    /// One whole step, then one with a time for every launch.
    fn take(&mut self, step: &mut Step) -> Result<()> {
        let seconds = |t: Duration| t.as_secs_f64();
        let clock = Instant::now();
        step.run()?;
        self.step.push(seconds(clock.elapsed()));
        let traced = step.traced()?;
        self.write.push(traced.write);
        self.read.push(traced.read);
        let mut nodes: BTreeMap<usize, f64> = BTreeMap::new();
        for s in traced.spans {
            *nodes.entry(s.node).or_default() += seconds(s.time);
        }
        for (node, t) in nodes {
            self.nodes.entry(node).or_default().push(t);
        }
        Ok(())
    }
}

/// Measures steps of `model` as `options` say.
///
/// # Errors
/// As [`Step::new`] and [`Step::run`].
pub fn measure_step(
    backend: &dyn Backend,
    model: &Model,
    direction: Direction,
    options: &StepOptions,
    limits: Limits,
    ceilings: &Ceilings,
) -> Result<StepReport> {
    reset_peak_rss();
    let clock = Instant::now();
    let mut step = Step::new(backend, model, direction, options)?;
    let prepare = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    step.run()?;
    let first = clock.elapsed().as_secs_f64();
    let peak_rss = peak_rss();
    // The first step is a warm-up too, and enough where steps are long.
    for _ in 1..limits.warm_up {
        if first < limits.time.as_secs_f64() {
            step.run()?;
        }
    }
    let before = present_share(backend, ceilings)?;
    let begin = Instant::now();
    let mut times = Times::default();
    let sample = loop {
        times.take(&mut step)?;
        if limits.enough(&times.step, begin.elapsed()) {
            break Sample::of(times.step.clone());
        }
    };
    let mut report = StepReport {
        model: model.id.clone(),
        direction,
        backend: backend.name(),
        device: backend.device(),
        batch: options.batch,
        image: step.image,
        classes: step.classes,
        params: step.graph().param_count().0,
        prepare,
        first,
        images_per_second: options.batch as f64 / sample.median,
        step: sample,
        flops: 0,
        executed: 0,
        flops_per_second: 0.0,
        mfu: 0.0,
        roofline: 0.0,
        accounted: 0.0,
        present: [before, present_share(backend, ceilings)?],
        planned_bytes: step.exec.memory().bytes(),
        persistent_bytes: 4 * step.exec.memory().persistent,
        temporaries_bytes: 4 * step.exec.memory().peak,
        peak_rss,
        phases: vec![],
        ops: vec![],
        shapes: vec![],
        launches: vec![],
    };
    report.split(backend.name(), step.graph(), times, ceilings);
    Ok(report)
}

impl StepReport {
    /// Whether something seems faster than its ceiling, which was then measured too low (the device was busy).
    pub fn above_ceiling(&self) -> bool {
        let parts = self.phases.iter().chain(&self.ops).chain(&self.shapes);
        self.present.iter().any(|&p| p > 1.05) || parts.into_iter().any(|p| p.share() > 1.0)
    }

    /// Fills in work and parts.
    fn split(&mut self, backend: &str, graph: &Graph, times: Times, ceilings: &Ceilings) {
        let named = |name: &str, seconds: f64| Part {
            name: name.into(),
            seconds,
            ..Part::default()
        };
        let mut phases = vec![named("data", Sample::of(times.write).median)];
        let mut ops: BTreeMap<&str, Part> = BTreeMap::new();
        let mut shapes: BTreeMap<String, Part> = BTreeMap::new();
        for (i, t) in times.nodes {
            let node = &graph.nodes[i];
            let seconds = Sample::of(t).median;
            let (x, y) = graph.node_specs(node);
            let cost = node.op.cost(&x, &y);
            let executed = node.op.executed(backend, None, &x, &y);
            let floor = ceilings.floor(Cost {
                flops: executed,
                ..cost
            });
            let phase = phase_name(node.phase);
            if phases.last().is_some_and(|p| p.name != phase) {
                phases.push(named(phase, 0.0));
            }
            let (op, signature) = (node.op.name(), signature(node.op.name(), &x, &y));
            let mut launch = named(format!("{} {signature}", node.scope).trim(), 0.0);
            let of_op = ops.entry(op).or_insert_with(|| named(op, 0.0));
            let of_shape = shapes
                .entry(signature.clone())
                .or_insert_with(|| named(&signature, 0.0));
            let of_phase = phases.last_mut().into_iter();
            for p in of_phase.chain([of_op, of_shape, &mut launch]) {
                p.add(seconds, cost, executed, floor);
            }
            self.launches.push(launch);
        }
        phases.push(named("result", Sample::of(times.read).median));
        let sum = |f: fn(&Part) -> f64| phases.iter().map(f).sum::<f64>();
        let whole = self.step.median;
        self.flops = phases.iter().map(|p| p.flops).sum();
        self.executed = phases.iter().map(|p| p.executed).sum();
        self.flops_per_second = self.flops as f64 / whole;
        self.mfu = self.executed as f64 / whole / ceilings.flops;
        self.roofline = sum(|p| p.floor) / whole;
        self.accounted = sum(|p| p.seconds) / whole;
        self.phases = phases;
        self.ops = ops.into_values().collect();
        self.shapes = shapes.into_values().collect();
        for parts in [&mut self.ops, &mut self.shapes] {
            parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        }
        let above = |p: &Part| p.seconds - p.floor;
        self.launches.sort_by(|a, b| above(b).total_cmp(&above(a)));
    }
}

/// Most resident memory of this process since the last measurement began, in bytes, where the system tells (Linux).
pub fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(1024 * kib)
}

/// Starts [`peak_rss`] anew, where the system can.
fn reset_peak_rss() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::find;

    fn tiny() -> (Limits, Ceilings, StepOptions) {
        let limits = Limits {
            warm_up: 1,
            min_runs: 2,
            precision: 1.0,
            time: Duration::ZERO,
        };
        let ceilings = Ceilings {
            flops: 1e15,
            bandwidth: vec![[1.0, 1e15]],
            launch: 0.0,
        };
        let options = StepOptions {
            batch: 2,
            image: Some(8),
            classes: Some(3),
            dropout: None,
            optimizer: OptimizerName::Adamw,
            seed: 1,
        };
        (limits, ceilings, options)
    }

    #[test]
    fn parts_sum_up() {
        let cpu = crate::backend::open("cpu").unwrap();
        let (limits, ceilings, options) = tiny();
        let model = find("cnn_r14").unwrap();
        for direction in [Direction::Train, Direction::Infer] {
            let r = measure_step(cpu.as_ref(), &model, direction, &options, limits, &ceilings);
            let r = r.unwrap();
            let sum = |parts: &[Part], f: fn(&Part) -> u64| parts.iter().map(f).sum::<u64>();
            for f in [
                |p: &Part| p.flops,
                |p: &Part| p.executed,
                |p: &Part| p.bytes,
            ] {
                assert_eq!(sum(&r.phases, f), sum(&r.ops, f));
                assert_eq!(sum(&r.ops, f), sum(&r.launches, f));
            }
            assert!(r.executed <= r.flops && r.executed > 0);
            assert!(r.mfu > 0.0 && r.mfu < 1.0 && r.roofline < 1.0);
            let names: Vec<&str> = r.phases.iter().map(|p| p.name.as_str()).collect();
            match direction {
                Direction::Train => assert_eq!(
                    names,
                    ["data", "forward", "backward", "optimizer", "result"]
                ),
                Direction::Infer => assert_eq!(names, ["data", "forward", "result"]),
            }
        }
    }

    #[test]
    fn what_cannot_run_is_said() {
        let cpu = crate::backend::open("cpu").unwrap();
        let (_, _, options) = tiny();
        let model = find("vit_base_patch16_224").unwrap();
        let e = Step::new(cpu.as_ref(), &model, Direction::Infer, &options).err();
        assert!(e.unwrap().to_string().contains("patch_embed"));
        let none = StepOptions {
            batch: 0,
            ..options
        };
        assert!(Step::new(cpu.as_ref(), &model, Direction::Infer, &none).is_err());
    }
}
