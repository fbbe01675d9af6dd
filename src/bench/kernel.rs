//! Kernels by case string: an op's own case, forward and backward, variant by variant, checked before it is timed.

use super::ceiling::Ceilings;
use super::measure::{Limits, Sample};
use super::rival::Rivals;
use super::rival::task::Task;
use crate::backend::cuda::resources::{Footprint, Machine, paired};
use crate::backend::cuda::sim::Counters;
use crate::backend::tuned::case_of;
use crate::backend::{Backend, CompileOptions, Exec, Span};
use crate::graph::{Graph, Phase, Tid};
use crate::ops::check::{CaseGraph, case_graph, run_case, seed_of};
use crate::ops::{Cost, Room};
use crate::profile::Counted;
use crate::{Error, Result};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Which nodes of a case are timed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pass {
    /// The op itself.
    Forward,
    /// Its input's gradient.
    Dgrad,
    /// Its weights' gradient.
    Wgrad,
    /// Every backward node.
    Backward,
}

impl Pass {
    fn takes(self, phase: Phase, op: &str) -> bool {
        match self {
            Pass::Forward => phase == Phase::Forward,
            Pass::Dgrad => op.ends_with("_dgrad"),
            Pass::Wgrad => op.ends_with("_wgrad"),
            Pass::Backward => phase == Phase::Backward,
        }
    }
}

/// How kernels are timed.
#[derive(Clone, Debug)]
pub struct KernelOptions {
    /// Which nodes; empty: all.
    pub passes: Vec<Pass>,
    /// Every variant beside the default rule's choice.
    pub all_variants: bool,
    /// The same memory again and again, as a network's next layer finds it, in place of copies in turn that together
    /// are larger than the last-level cache.
    pub hot: bool,
    /// Other libraries' products too, where there are any ([`rival`](super::rival)).
    pub rivals: bool,
    /// What the kernels take of a multiprocessor too, on CUDA.
    pub machine: Option<Machine>,
    /// Repeats.
    pub limits: Limits,
}

/// One kernel's row.
#[derive(Clone, Debug, Serialize)]
pub struct KernelReport {
    /// `conv2d(n=8,...)`: an argument of `check` and `bench`.
    pub case: String,
    /// `conv2d_dgrad`.
    pub op: String,
    /// The op with the shapes of its operands and results: what a tuned variant goes by.
    pub signature: String,
    /// The variant; `auto` is the default rule's choice. Or another library's name.
    pub variant: String,
    /// Worst error over its allowance in the check before; none where the variant cannot run the case.
    pub error: f64,
    /// Time.
    pub time: Sample,
    /// Operations as the definition counts them.
    pub flops: u64,
    /// Operations that the kernel does.
    pub executed: u64,
    /// Compulsory bytes.
    pub bytes: u64,
    /// Operations (definition) a second.
    pub flops_per_second: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Operations per byte.
    pub intensity: f64,
    /// Share of the roofline that applies.
    pub roofline: f64,
    /// `arithmetic` or `memory`.
    pub bound: &'static str,
    /// Another library's ([`rival`](super::rival)).
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub rival: bool,
    /// Of the longest launch, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub footprint: Option<Footprint>,
}

/// What was measured, and what of it could not be.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// The rows.
    pub rows: Vec<KernelReport>,
    /// For people: which library is missing or wrong, what is not known.
    pub notes: Vec<String>,
}

impl Measured {
    /// Leaves out what another library seems to do in less time than the device can, with a note: our own kernels there
    /// would be an error, but what others do in their calls is not ours to find out.
    pub fn drop_rivals_above_the_ceiling(&mut self) {
        let above = |r: &KernelReport| r.rival && r.roofline > 1.0;
        for r in self.rows.iter().filter(|r| above(r)) {
            self.notes.push(format!(
                "{} {}: {} comes to {:.0} % of its roofline, which cannot be; it is left out",
                r.case,
                r.op,
                r.variant,
                100.0 * r.roofline
            ));
        }
        self.rows.retain(|r| !above(r));
    }
}

/// The variant that stands for the op's own rule.
pub const RULE: &str = "auto";

/// The last-level caches of today's processors are smaller.
pub(super) const ROTATED: usize = 256 << 20;
/// How long a kernel runs before its times count, unless the limits give it no time: threads that the check left asleep
/// wake up late at first.
const WARM_UP: Duration = Duration::from_millis(50);
/// Operations of a case that the float64 reference is asked to do; above, the check takes a smaller batch.
const CHECKED: u64 = 300_000_000;

/// A search for the fastest variant, where times of slow ones are of no interest: of the kernels only those are measured
/// that have a choice on the device, and a variant is given up as soon as it is clearly behind.
pub struct Contest<'a> {
    /// Variants beside the rule's choice; empty: all.
    pub only: &'a [String],
    /// Told before each variant: its name, and the share of the variants that are done.
    pub told: &'a mut dyn FnMut(&str, f64),
}

/// Times the kernels of `room(params)`.
///
/// # Errors
/// The case is malformed, a kernel is wrong (what is not right is not timed), or a result is above its ceiling.
pub fn measure_case(
    backend: &dyn Backend,
    room: &Room,
    params: &str,
    options: &KernelOptions,
    ceilings: &Ceilings,
    mut contest: Option<Contest>,
) -> Result<Measured> {
    let case = room.build(params)?;
    let cg = case_graph(&case, seed_of(params))?;
    let nodes = &cg.graph.nodes;
    let wanted = wanted(&cg, options);
    if wanted.is_empty() {
        return Err(Error::input(format!(
            "{}({params}) has no kernel in that direction",
            room.name
        )));
    }
    let name = format!("{}({params})", room.name);
    let report = |i: usize, variant: &'static str, measured, (cost, executed)| {
        let op = nodes[i].op.name();
        let (x, y) = cg.graph.node_specs(&nodes[i]);
        row(
            name.clone(),
            (op, case_of(op, &x, &y)),
            variant,
            measured,
            (cost, executed),
            (ceilings, options.hot),
        )
    };
    let Measured {
        mut rows,
        mut notes,
    } = Measured::default();
    let mut variants = match &contest {
        None => variants(&cg, &wanted, backend, options),
        Some(c) => candidates(&cg, &wanted, backend, c.only)?,
    };
    // Seconds by node, for the others to beat: the rule's choice first.
    let mut best: BTreeMap<usize, f64> = BTreeMap::new();
    let all = variants.len();
    let rule = variants.remove_entry(RULE).into_iter();
    for (done, (variant, those)) in rule.chain(variants).enumerate() {
        if let Some(c) = &mut contest {
            (c.told)(variant, done as f64 / all as f64);
        }
        let compile = compile_as(&cg, &those, variant);
        let Some(error) = checked(backend, room, params, variant, &compile)? else {
            continue;
        };
        // A time is good without them.
        let mut footprints = longest(backend, &cg, &compile, options).unwrap_or_else(|e| {
            notes.push(format!("registers and occupancy are not known: {e}"));
            BTreeMap::new()
        });
        let beat = if contest.is_some() {
            best.clone()
        } else {
            BTreeMap::new()
        };
        for (i, time) in time_nodes(backend, &cg, &compile, &those, options, &beat)? {
            let b = best.entry(i).or_insert(f64::INFINITY);
            *b = b.min(time.median);
            let (x, y) = cg.graph.node_specs(&nodes[i]);
            let named = Some(variant).filter(|v| *v != RULE);
            let executed = nodes[i].op.executed(backend.name(), named, &x, &y);
            let work = (cg.graph.node_cost(&nodes[i]), executed);
            rows.push(KernelReport {
                footprint: footprints.remove(&i),
                ..report(i, variant, (error, time), work)
            });
        }
    }
    let tasks: Vec<(usize, Task)> = wanted
        .iter()
        .filter(|_| options.rivals)
        .flat_map(|&i| {
            let (x, _) = cg.graph.node_specs(&nodes[i]);
            let tasks = Task::of(nodes[i].op.as_ref(), &x);
            tasks.into_iter().map(move |t| (i, t))
        })
        .collect();
    if !tasks.is_empty() {
        let rivals = Rivals::of(backend);
        notes.extend(rivals.missing.clone());
        for (i, task) in tasks {
            for timed in rivals.time(&task, options.hot, options.limits) {
                match timed {
                    Ok(t) => {
                        let cost = Cost {
                            bytes: t.bytes,
                            ..cg.graph.node_cost(&nodes[i])
                        };
                        // What Winograd or Fourier do is not known: such a row is held to memory alone.
                        let executed = if t.direct { cost.flops } else { 0 };
                        rows.push(KernelReport {
                            rival: true,
                            ..report(i, t.name, (t.error, t.time), (cost, executed))
                        });
                    }
                    Err(e) => notes.push(format!("{name} {}: {e}", nodes[i].op.name())),
                }
            }
        }
    }
    Ok(Measured { rows, notes })
}

/// What the longest launch of each node takes of a multiprocessor; empty where it is not asked for.
fn longest(
    backend: &dyn Backend,
    cg: &CaseGraph,
    compile: &CompileOptions,
    options: &KernelOptions,
) -> Result<BTreeMap<usize, Footprint>> {
    let Some(machine) = options.machine else {
        return Ok(BTreeMap::new());
    };
    let footprints = backend.footprints(&cg.graph, compile, machine)?;
    Ok(longest_of(&traced(backend, cg, compile)?, &footprints))
}

/// By time, or by instructions where there is none.
fn longest_of(spans: &[Span], footprints: &[(usize, Footprint)]) -> BTreeMap<usize, Footprint> {
    let length = |s: &Span| (s.time, s.count.as_ref().map(|c| c.counters.instructions));
    let mut longest = BTreeMap::new();
    for (s, footprint) in spans.iter().zip(paired(spans, footprints)) {
        let best = longest.entry(s.node).or_insert((length(s), footprint));
        if length(s) > best.0 {
            *best = (length(s), footprint);
        }
    }
    let known = longest.into_iter();
    known
        .filter_map(|(node, (_, f))| Some((node, f?.clone())))
        .collect()
}

/// One run of the case, launch by launch.
fn traced(backend: &dyn Backend, cg: &CaseGraph, compile: &CompileOptions) -> Result<Vec<Span>> {
    let mut exec = backend.compile(cg.graph.clone(), compile)?;
    cg.write(exec.as_mut())?;
    exec.run_traced(&[Phase::Forward, Phase::Backward])
}

fn row(
    case: String,
    (op, signature): (&str, String),
    variant: &str,
    (error, time): (f64, Sample),
    (cost, executed): (Cost, u64),
    (ceilings, hot): (&Ceilings, bool),
) -> KernelReport {
    let rate = if hot {
        ceilings.bandwidth(cost.bytes)
    } else {
        ceilings.memory()
    };
    let (arithmetic, memory) = (executed as f64 / ceilings.flops, cost.bytes as f64 / rate);
    KernelReport {
        case,
        op: op.into(),
        signature,
        variant: variant.into(),
        error,
        flops: cost.flops,
        executed,
        bytes: cost.bytes,
        flops_per_second: cost.flops as f64 / time.median,
        bytes_per_second: cost.bytes as f64 / time.median,
        intensity: cost.flops as f64 / cost.bytes.max(1) as f64,
        roofline: arithmetic.max(memory) / time.median,
        bound: if arithmetic >= memory {
            "arithmetic"
        } else {
            "memory"
        },
        time,
        rival: false,
        footprint: None,
    }
}

/// Operations of a case's op itself, forward.
///
/// # Errors
/// The case is malformed.
pub fn case_flops(room: &Room, params: &str) -> Result<u64> {
    let case = room.build(params)?;
    let specs: Vec<_> = case.operands.iter().map(|o| o.spec.clone()).collect();
    let y = case.op.infer(&specs).map_err(Error::input)?;
    Ok(case.op.cost(&specs, &y).flops)
}

/// The case with a batch that the reference can do in a second: `n` (images) or `m` (rows) cut down.
fn smaller(room: &Room, params: &str) -> Result<String> {
    let flops = case_flops(room, params)?;
    if flops <= CHECKED {
        return Ok(params.into());
    }
    let cut = |part: &str| match part.split_once('=') {
        Some((key @ ("n" | "m"), v)) => {
            let v: u64 = v.trim().parse().unwrap_or(1);
            format!("{key}={}", (v * CHECKED / flops).max(1))
        }
        _ => part.to_string(),
    };
    let parts: Vec<String> = params.split(',').map(str::trim).map(cut).collect();
    Ok(parts.join(","))
}

/// The times of a case's kernels by op, unchecked; nodes of one op together.
///
/// # Errors
/// The case is malformed or the device failed.
pub fn time_case(
    backend: &dyn Backend,
    room: &Room,
    params: &str,
    options: &KernelOptions,
) -> Result<Vec<(String, Sample)>> {
    let cg = case_graph(&room.build(params)?, seed_of(params))?;
    let all: Vec<usize> = (0..cg.graph.nodes.len()).collect();
    let beat = BTreeMap::new();
    let times = time_nodes(
        backend,
        &cg,
        &CompileOptions::default(),
        &all,
        options,
        &beat,
    )?;
    let op = |i: usize| cg.graph.nodes[i].op.name().to_string();
    Ok(times.into_iter().map(|(i, t)| (op(i), t)).collect())
}

/// What a case's kernels did on the simulator, by op, unchecked.
///
/// # Errors
/// As [`time_case`].
pub fn count_case(
    backend: &dyn Backend,
    room: &Room,
    params: &str,
    compile: &CompileOptions,
) -> Result<BTreeMap<String, Counted>> {
    let cg = case_graph(&room.build(params)?, seed_of(params))?;
    Ok(counted(&cg, &traced(backend, &cg, compile)?))
}

fn counted(cg: &CaseGraph, spans: &[Span]) -> BTreeMap<String, Counted> {
    let mut counts: BTreeMap<String, Counters> = BTreeMap::new();
    for s in spans {
        let op = cg.graph.nodes[s.node].op.name().to_string();
        if let Some(c) = &s.count {
            counts.entry(op).or_default().merge(&c.counters);
        }
    }
    let counted = counts.into_iter().map(|(op, c)| (op, Counted::of(&c)));
    counted.collect()
}

/// What one kernel variant did on the simulator.
#[derive(Clone, Debug, Serialize)]
pub struct CountReport {
    /// `linear(m=256,...)`.
    pub case: String,
    /// `linear_dgrad`.
    pub op: String,
    /// The variant; `auto` is the default rule's choice. Or another library's name.
    pub variant: String,
    /// Worst error over its allowance in the check before.
    pub error: f64,
    /// Operations as the definition counts them.
    pub flops: u64,
    /// Compulsory bytes.
    pub bytes: u64,
    /// The counts.
    pub counted: Counted,
    /// Of the longest launch, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub footprint: Option<Footprint>,
}

/// Counts the kernels of `room(params)` in the simulator, variant by variant, each checked before.
///
/// # Errors
/// The case is malformed, or a kernel is wrong.
pub fn count_variants(
    backend: &dyn Backend,
    room: &Room,
    params: &str,
    options: &KernelOptions,
) -> Result<Vec<CountReport>> {
    let cg = case_graph(&room.build(params)?, seed_of(params))?;
    let wanted = wanted(&cg, options);
    let mut rows = vec![];
    for (variant, those) in variants(&cg, &wanted, backend, options) {
        let compile = compile_as(&cg, &those, variant);
        let Some(error) = checked(backend, room, params, variant, &compile)? else {
            continue;
        };
        let spans = traced(backend, &cg, &compile)?;
        let counts = counted(&cg, &spans);
        let footprints = match options.machine {
            Some(machine) => backend.footprints(&cg.graph, &compile, machine)?,
            None => vec![],
        };
        let mut footprints = longest_of(&spans, &footprints);
        for &i in &those {
            let node = &cg.graph.nodes[i];
            let Some(counted) = counts.get(node.op.name()) else {
                continue;
            };
            let cost = cg.graph.node_cost(node);
            rows.push(CountReport {
                case: format!("{}({params})", room.name),
                op: node.op.name().into(),
                variant: variant.into(),
                error,
                flops: cost.flops,
                bytes: cost.bytes,
                counted: counted.clone(),
                footprint: footprints.remove(&i),
            });
        }
    }
    Ok(rows)
}

/// The nodes that are measured.
fn wanted(cg: &CaseGraph, options: &KernelOptions) -> Vec<usize> {
    let nodes = &cg.graph.nodes;
    (0..nodes.len())
        .filter(|&i| {
            let (phase, op) = (nodes[i].phase, nodes[i].op.name());
            options.passes.is_empty() || options.passes.iter().any(|p| p.takes(phase, op))
        })
        .collect()
}

/// The rule's choice and, where they are wanted, all variants, each with the nodes that have it: not every op of a case
/// has every variant of the others.
fn variants(
    cg: &CaseGraph,
    wanted: &[usize],
    backend: &dyn Backend,
    options: &KernelOptions,
) -> BTreeMap<&'static str, Vec<usize>> {
    let mut variants = BTreeMap::from([(RULE, wanted.to_vec())]);
    if options.all_variants {
        for &i in wanted {
            let of_op = cg.graph.nodes[i].op.variants_on(backend.name());
            for &v in of_op.iter().filter(|v| **v != RULE) {
                variants.entry(v).or_default().push(i);
            }
        }
    }
    variants
}

/// Variants (of `only`, where it names some) that launch something else than the rule's choice, which stands beside them,
/// each with the nodes where it does.
fn candidates(
    cg: &CaseGraph,
    wanted: &[usize],
    backend: &dyn Backend,
    only: &[String],
) -> Result<BTreeMap<&'static str, Vec<usize>>> {
    let mut variants: BTreeMap<&'static str, Vec<usize>> = BTreeMap::new();
    for &i in wanted {
        let node = &cg.graph.nodes[i];
        let rule = backend.launches(&cg.graph, node, None)?;
        let mut choice = false;
        for &v in node.op.variants_on(backend.name()) {
            if v == RULE || !(only.is_empty() || only.iter().any(|o| o == v)) {
                continue;
            }
            match backend.launches(&cg.graph, node, Some(v)) {
                Ok(same) if same.is_some() && same == rule => {}
                Ok(_) => {
                    choice = true;
                    variants.entry(v).or_default().push(i);
                }
                // A variant need not support every shape, and says so.
                Err(Error::Input(_)) => {}
                Err(e) => return Err(e),
            }
        }
        if choice {
            variants.entry(RULE).or_default().push(i);
        }
    }
    Ok(variants)
}

fn compile_as(cg: &CaseGraph, wanted: &[usize], variant: &str) -> CompileOptions {
    let mut compile = CompileOptions::default();
    if variant != RULE {
        for &i in wanted {
            let op = cg.graph.nodes[i].op.name();
            compile.variants.insert(op.into(), variant.into());
        }
    }
    compile
}

/// The worst error of the case (of a smaller batch, where the reference would take long) over its allowance; `None`
/// where the variant does not support it.
fn checked(
    backend: &dyn Backend,
    room: &Room,
    params: &str,
    variant: &str,
    compile: &CompileOptions,
) -> Result<Option<f64>> {
    let small = smaller(room, params)?;
    let findings = match run_case(room, &small, backend, compile) {
        Ok(f) => f,
        // A variant need not support every shape, and says so.
        Err(Error::Input(_)) if variant != RULE => return Ok(None),
        Err(e) => return Err(e),
    };
    if let Some(bad) = findings.iter().find(|f| !f.ok()) {
        return Err(Error::run(format!(
            "{}({small}), variant {variant}: {} is {} times its allowance off; what is not right is not timed \
             (tilewright check '{}({small})' --variants)",
            room.name, bad.tensor, bad.worst, room.name
        )));
    }
    Ok(Some(findings.iter().map(|f| f.worst).fold(0.0, f64::max)))
}

/// The part of a case's graph that the `wanted` nodes need, with its nodes' places in the whole.
fn part(cg: &CaseGraph, wanted: &[usize]) -> (Arc<Graph>, Vec<usize>) {
    let nodes = &cg.graph.nodes;
    let mut read: BTreeSet<Tid> = BTreeSet::new();
    let mut kept = vec![];
    for (i, node) in nodes.iter().enumerate().rev() {
        if wanted.contains(&i) || node.outputs.iter().any(|t| read.contains(t)) {
            read.extend(&node.inputs);
            kept.push(i);
        }
    }
    kept.reverse();
    if kept.len() == nodes.len() {
        return (cg.graph.clone(), kept);
    }
    let mut graph = Graph::clone(&cg.graph);
    graph.nodes = kept.iter().map(|&i| nodes[i].clone()).collect();
    (Arc::new(graph), kept)
}

/// A node whose first run takes this many times what it has to beat is given up.
const FAR_BEHIND: f64 = 3.0;
/// One whose second run still does, too.
const BEHIND: f64 = 1.5;

/// The time of each wanted node. Nodes that have to `beat` a time (in seconds) are given up once they are clearly behind.
fn time_nodes(
    backend: &dyn Backend,
    cg: &CaseGraph,
    compile: &CompileOptions,
    wanted: &[usize],
    options: &KernelOptions,
    beat: &BTreeMap<usize, f64>,
) -> Result<BTreeMap<usize, Sample>> {
    let (graph, places) = part(cg, wanted);
    let mut execs: Vec<Box<dyn Exec>> = vec![];
    let mut bytes = 0;
    while execs.is_empty() || (!options.hot && bytes < ROTATED && execs.len() < 64) {
        let mut exec = backend.compile(graph.clone(), compile)?;
        cg.write(exec.as_mut())?;
        bytes += exec.memory().bytes();
        execs.push(exec);
    }
    let phases = [Phase::Forward, Phase::Backward];
    let mut times: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    let mut cold: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    let limits = options.limits;
    let warm_up = WARM_UP.min(limits.time);
    let begin = Instant::now();
    for run in 0.. {
        let turn = run % execs.len();
        let spent = begin.elapsed();
        let many = run >= limits.warm_up.max(execs.len()) && spent >= warm_up;
        // One run that takes longer than all together should is warm-up enough.
        let long = run > 0 && spent >= limits.time && limits.time > Duration::ZERO;
        let sink = if many || long { &mut times } else { &mut cold };
        for (node, t) in execs[turn].run_timed(&phases)? {
            let node = places[node];
            if wanted.contains(&node) {
                sink.entry(node).or_default().push(t.as_secs_f64());
            }
        }
        let given_up = |node: &usize| {
            let mut all = [&cold, &times].into_iter().filter_map(|m| m.get(node));
            let least = all.try_fold(f64::INFINITY, |a, t| {
                t.iter().copied().reduce(f64::min).map(|b| a.min(b))
            });
            let factor = if run == 0 { FAR_BEHIND } else { BEHIND };
            beat.get(node)
                .zip(least)
                .is_some_and(|(b, least)| least > factor * b)
        };
        let seen = if times.is_empty() { &cold } else { &times };
        if !beat.is_empty() && !seen.is_empty() && seen.keys().all(given_up) {
            break;
        }
        let taken = times.values().map(Vec::len).min().unwrap_or(0);
        // Every interval is not computed after every run: short kernels have thousands.
        let due = taken < 8 || taken.is_multiple_of(8) || begin.elapsed() >= limits.time;
        let enough =
            |(node, t): (&usize, &Vec<f64>)| limits.enough(t, begin.elapsed()) || given_up(node);
        if taken > 0 && due && times.iter().all(enough) {
            break;
        }
    }
    let times = if times.is_empty() { cold } else { times };
    Ok(times.into_iter().map(|(i, t)| (i, Sample::of(t))).collect())
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod tests;
