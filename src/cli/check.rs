//! `check`.

use super::case::{CaseText, case};
use super::global::Global;
use super::output::{json, note, print};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use tilewright::backend::cuda::{self, Count, Precision};
use tilewright::backend::wgpu::{Wgpu, WgpuOptions, adapters};
use tilewright::backend::{Backend, CompileOptions};
use tilewright::ops::check::{
    Finding, case_graph, case_seed, check_gradients, has_precisions, repeat_case, run_seeded,
    seed_of,
};
use tilewright::ops::coverage::coverage;
use tilewright::ops::fuzz::{random_case, shrink};
use tilewright::ops::{ROOMS, Room};
use tilewright::philox::Philox;
use tilewright::report::table::Table;
use tilewright::{Error, Result};

/// Every kernel on every backend present against its float64 reference, forward and backward, and the reference's
/// gradients against central differences. Results are poisoned before each launch, and marked memory stands between all
/// tensors. An error of 1 is the whole allowance.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright check
  tilewright check conv2d linear --backend wgpu --variants
  tilewright check layer_norm --fuzz 50 --seed 7
  tilewright check --determinism 10
  tilewright check --coverage
  tilewright check 'linear(m=5,i=7,o=3)'")]
pub struct Check {
    /// Ops, or cases of an op as `op(key=value,...)` [default: every case of every op]
    #[arg(value_name = "OP")]
    ops: Vec<String>,
    /// Check every kernel variant and, on cuda, every precision, not only what the default rule picks
    #[arg(long)]
    variants: bool,
    /// What each kernel did, as cuda:sim counts it: instructions, memory traffic, bank conflicts
    #[arg(long)]
    counters: bool,
    /// Also this many random cases of each op, within its shape rule; one that fails is made as small as it goes
    #[arg(long, value_name = "N", default_value_t = 0)]
    fuzz: usize,
    /// Run each case this many times, in two compilations, and compare the bits of every result, in place of the check
    #[arg(long, value_name = "N", value_parser = super::source::positive)]
    determinism: Option<usize>,
    /// List what has no test: kernels that no case launches, variants, ops of models, rooms without an edge case
    #[arg(long)]
    coverage: bool,
    /// List the cases and check nothing
    #[arg(long)]
    list: bool,
}

type Cases = Vec<(&'static Room, Vec<String>)>;

/// The rooms and cases that `ops` name, and the precision that `dtype=` in them stands for.
fn cases(ops: &[String]) -> Result<(Cases, Option<Precision>)> {
    let all = |r: &'static Room| (r, r.cases.iter().map(ToString::to_string).collect());
    if ops.is_empty() {
        return Ok((ROOMS.iter().map(|r| all(r)).collect(), None));
    }
    let told = ops.iter().map(|op| case(op)).collect::<Result<Vec<_>>>()?;
    let precision = told[0].precision;
    if told.iter().any(|c| c.precision != precision) {
        return Err(Error::input(
            "the cases differ in dtype; check each precision on its own",
        ));
    }
    let mut cases = vec![];
    for CaseText { room, params, .. } in told {
        let Some(params) = params else {
            cases.push(all(room));
            continue;
        };
        for p in &params {
            room.build(p)?;
        }
        cases.push((room, params));
    }
    Ok((cases, precision))
}

/// What is checked of an op on a backend.
#[derive(Default)]
struct Tally {
    cases: usize,
    runs: usize,
    tensors: usize,
    failed: usize,
    worst: Option<Finding>,
    /// The case of the worst.
    at: String,
    /// The seed of its values.
    seed: u64,
}

/// One run of a case, for messages.
struct Run<'a> {
    room: &'a Room,
    params: &'a str,
    /// ` on wgpu, conv2d variant tile`.
    how: String,
    /// The command that repeats it.
    repeat: String,
    seed: u64,
}

impl Tally {
    /// Takes what a case came to; `false` where something is wrong, which is told on standard error.
    fn take(&mut self, run: &Run, found: Result<Vec<Finding>>) -> bool {
        let what = format!("{}({}){}", run.room.name, run.params, run.how);
        self.runs += 1;
        let seed = case_seed(run.room, run.params, run.seed);
        let found = match found {
            Ok(found) => found,
            Err(e) => {
                self.failed += 1;
                note(&format!("FAILED {what}: {e}\n  repeat: {}", run.repeat));
                return false;
            }
        };
        let mut good = true;
        self.tensors += found.len();
        for f in found {
            if !f.ok() {
                good = false;
                note(&format!(
                    "FAILED {what}: {f} (seed {seed:016x})\n  repeat: {}",
                    run.repeat
                ));
            }
            let before = self.worst.as_ref().map_or(-1.0, |w| w.worst);
            if f.worst.is_nan() || f.worst > before {
                self.worst = Some(f);
                self.at = format!("{}({})", run.room.name, run.params);
                self.seed = seed;
            }
        }
        self.failed += usize::from(!good);
        good
    }
}

/// The variants of each kind of node in a case's graph, the default rule's left out.
fn variants(
    room: &Room,
    params: &str,
    backend: &dyn Backend,
) -> Result<BTreeMap<&'static str, &'static [&'static str]>> {
    let case = room.build(params)?;
    let cg = case_graph(&case, seed_of(params))?;
    let of = |n: &tilewright::graph::Node| (n.op.name(), n.op.variants_on(backend.name()));
    Ok(cg
        .graph
        .nodes
        .iter()
        .map(of)
        .filter(|v| v.1.len() > 1)
        .collect())
}

impl Check {
    /// The backends to check: the named one, else all that are present.
    fn backends(&self, g: &Global) -> Result<Vec<(String, Box<dyn Backend>)>> {
        let names = match &g.backend {
            Some(name) => vec![name.clone()],
            None => {
                let mut names = vec!["cpu".to_string()];
                let wgpu = adapters().is_ok();
                let others = [
                    ("wgpu", wgpu),
                    ("cuda", cuda::present()),
                    ("cuda:sim", cuda::sim_present()),
                ];
                for (name, there) in others {
                    match there {
                        true => names.push(name.into()),
                        false => g.remark(&format!("{name} is absent here and not checked")),
                    }
                }
                names
            }
        };
        let open = |name: String| -> Result<(String, Box<dyn Backend>)> {
            let backend: Box<dyn Backend> = match name
                .split_once(':')
                .map_or((&*name, None), |(k, a)| (k, Some(a)))
            {
                // With bounds checks, so that a kernel that reads beyond a tensor cannot pass by luck.
                ("wgpu", adapter) => Box::new(Wgpu::open(&WgpuOptions {
                    adapter: adapter.map(Into::into),
                    checked: true,
                    ..g.wgpu_options()?
                })?),
                _ => g.open(&name)?,
            };
            Ok((name, backend))
        };
        names.into_iter().map(open).collect()
    }

    /// Flags that a command needs to repeat a run of this one.
    fn flags(&self, g: &Global) -> String {
        let mut out = String::new();
        let mut flag = |name: &str, value: Option<String>| {
            if let Some(v) = value {
                let _ = write!(out, " {name} {v}");
            }
        };
        let dir = |d: &Option<PathBuf>| d.as_ref().map(|d| d.display().to_string());
        flag("--shaders", dir(&g.shaders));
        flag("--kernels", dir(&g.kernels));
        flag("--seed", (g.seed != 0).then(|| g.seed.to_string()));
        out
    }

    /// One case on a backend, by the default rule or in every variant and precision; `true` where all is right.
    fn check_case(
        &self,
        tally: &mut Tally,
        g: &Global,
        (room, params): (&Room, &str),
        (name, backend): (&str, &dyn Backend),
    ) -> bool {
        tally.cases += 1;
        let case = format!("{}({params})", room.name);
        let all = self.variants && g.precision.is_none() && name.starts_with("cuda");
        let precisions = match all && has_precisions(room, params).unwrap_or(false) {
            true => &[Precision::F32, Precision::Tf32, Precision::Bf16][..],
            false => &[g.precision.unwrap_or(Precision::F32)][..],
        };
        let mut good = true;
        for &precision in precisions {
            let mut options = CompileOptions {
                poison: true,
                precision: name.starts_with("cuda").then_some(precision),
                ..CompileOptions::default()
            };
            let (mut how, mut flags) = (format!(" on {name}"), self.flags(g));
            if precision != Precision::F32 {
                how += &format!(" in {precision}");
                flags += &format!(" --precision {precision}");
            }
            let mut run = Run {
                room,
                params,
                how: how.clone(),
                repeat: format!("tilewright check '{case}' --backend {name}{flags}"),
                seed: g.seed,
            };
            good &= tally.take(&run, run_seeded(room, params, backend, &options, g.seed));
            if !self.variants {
                continue;
            }
            run.repeat += " --variants";
            for (op, list) in variants(room, params, backend).unwrap_or_default() {
                for variant in &list[1..] {
                    options.variants = [(op.to_string(), variant.to_string())].into();
                    match run_seeded(room, params, backend, &options, g.seed) {
                        // A variant need not support every shape, and says so.
                        Err(Error::Input(_)) => {}
                        found => {
                            run.how = format!("{how}, {op} variant {variant}");
                            good &= tally.take(&run, found);
                        }
                    }
                }
            }
        }
        good
    }

    /// Random cases of a room on a backend.
    fn fuzz_room(
        &self,
        tally: &mut Tally,
        g: &Global,
        room: &Room,
        (name, backend): (&str, &dyn Backend),
    ) {
        let mut rng = Philox::new(seed_of(room.name), g.seed as u32);
        for _ in 0..self.fuzz {
            let Some(params) = random_case(room, &mut rng) else {
                return;
            };
            if self.check_case(tally, g, (room, &params), (name, backend)) {
                continue;
            }
            let options = CompileOptions {
                poison: true,
                ..CompileOptions::default()
            };
            let small = shrink(room, &params, |p| {
                match run_seeded(room, p, backend, &options, g.seed) {
                    Ok(found) => found.iter().any(|f| !f.ok()),
                    Err(e) => !matches!(e, Error::Input(_)),
                }
            });
            if small != params {
                note(&format!(
                    "  smallest: tilewright check '{}({small})' --backend {name}{}",
                    room.name,
                    self.flags(g)
                ));
            }
            return;
        }
    }

    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let (cases, precision) = cases(&self.ops)?;
        let g = &Global {
            precision: precision.or(g.precision),
            ..g.clone()
        };
        if self.list {
            return list(g, &cases);
        }
        if self.coverage {
            return show_coverage(g);
        }
        let backends = self.backends(g)?;
        if let Some(runs) = self.determinism {
            return determinism(g, &cases, &backends, runs);
        }
        let mut rows: Vec<(&str, String, Tally)> = vec![];
        for (room, cases) in &cases {
            let mut tally = Tally::default();
            for params in cases {
                tally.cases += 1;
                let run = Run {
                    room,
                    params,
                    how: ": the reference's gradient".into(),
                    repeat: format!(
                        "tilewright check '{}({params})'{}",
                        room.name,
                        self.flags(g)
                    ),
                    seed: g.seed,
                };
                tally.take(&run, check_gradients(room, params, g.seed));
            }
            rows.push((room.name, "gradient".into(), tally));
            for (name, backend) in &backends {
                let mut tally = Tally::default();
                let on = (name.as_str(), backend.as_ref());
                for params in cases {
                    self.check_case(&mut tally, g, (room, params), on);
                }
                self.fuzz_room(&mut tally, g, room, on);
                rows.push((room.name, name.clone(), tally));
            }
        }
        let failed: usize = rows.iter().map(|r| r.2.failed).sum();
        let counts: Vec<(String, Count)> = match self.counters {
            true => backends.iter().flat_map(|b| b.1.take_counts()).collect(),
            false => vec![],
        };
        if self.counters {
            note(&simulated(&counts));
        }
        if g.json {
            let rows: Vec<Value> = rows
                .iter()
                .map(|(op, on, t)| {
                    let worst = t.worst.as_ref();
                    json!({
                        "op": op, "checked": on, "cases": t.cases, "runs": t.runs, "tensors": t.tensors,
                        "failed": t.failed, "worst": worst.map(|w| w.worst), "worst_at": t.at,
                        "place": worst.map(Finding::place), "error": worst.map(error), "allowed":
                        worst.map(|w| w.allowed), "seed": format!("{:016x}", t.seed),
                    })
                })
                .collect();
            let counts: Vec<Value> = counts.iter().map(count_json).collect();
            json(&json!({"failed": failed, "results": rows, "counters": counts}))?;
        } else {
            let mut t = Table::new([
                "op", "checked", "cases", "runs", "tensors", "failed", "worst", "error", "allowed",
                "place", "case", "seed",
            ])
            .left(&[0, 1, 9, 10, 11]);
            for (op, on, tally) in &rows {
                let mut row = vec![
                    op.to_string(),
                    on.clone(),
                    tally.cases.to_string(),
                    tally.runs.to_string(),
                    tally.tensors.to_string(),
                    tally.failed.to_string(),
                ];
                if let Some(w) = &tally.worst {
                    row.extend([
                        format!("{:.3}", w.worst),
                        format!("{:.1e}", error(w)),
                        format!("{:.1e}", w.allowed),
                        w.place(),
                        tally.at.clone(),
                        format!("{:016x}", tally.seed),
                    ]);
                }
                t.row(row);
            }
            let mut out = t.to_text();
            if self.counters {
                out.push('\n');
                out.push_str(&count_table(&counts));
            }
            let _ = match failed {
                0 => writeln!(out, "\nall good"),
                n => writeln!(out, "\n{n} failed"),
            };
            print(&out)?;
        }
        Ok(ExitCode::from(u8::from(failed > 0)))
    }
}

fn error(f: &Finding) -> f64 {
    (f.got - f.want).abs()
}

/// The bits of every result, over repeats.
fn determinism(
    g: &Global,
    cases: &Cases,
    backends: &[(String, Box<dyn Backend>)],
    runs: usize,
) -> Result<ExitCode> {
    let mut t = Table::new(["op", "on", "cases", "runs each", "differing"]).left(&[0, 1]);
    let mut rows: Vec<Value> = vec![];
    let mut failed = 0;
    for (room, cases) in cases {
        for (name, backend) in backends {
            // Large shapes too, which need no reference here: that is where threads and blocks race.
            let large = match name.as_str() {
                "cuda:sim" => &[][..],
                _ => room.bench,
            };
            let cases = cases
                .iter()
                .map(String::as_str)
                .chain(large.iter().copied());
            let (mut count, mut differing) = (0, 0);
            for params in cases {
                count += 1;
                let options = CompileOptions::default();
                let what = format!("{}({params}) on {name}", room.name);
                match repeat_case(room, params, backend.as_ref(), &options, runs)? {
                    None => {}
                    Some(u) => {
                        differing += 1;
                        note(&format!(
                            "FAILED {what}: run {} gave other bits for {}, first at element {}",
                            u.run, u.tensor, u.index
                        ));
                    }
                }
            }
            failed += differing;
            let numbers = [count, runs, differing].map(|v: usize| v.to_string());
            t.row(
                [room.name.to_string(), name.clone()]
                    .into_iter()
                    .chain(numbers),
            );
            rows.push(json!({"op": room.name, "on": name, "cases": count, "runs": runs, "differing": differing}));
        }
    }
    match g.json {
        true => json(&json!({"failed": failed, "results": rows}))?,
        false => print(&format!(
            "{}\n{}\n",
            t.to_text(),
            match failed {
                0 => "the same bits every time".to_string(),
                n => format!("{n} differ"),
            }
        ))?,
    }
    Ok(ExitCode::from(u8::from(failed > 0)))
}

/// What has no test.
fn show_coverage(g: &Global) -> Result<ExitCode> {
    let found = coverage(&g.cuda_options()?.source, &g.wgpu_options()?.shaders)?;
    if g.json {
        let gaps = found.gaps.iter();
        let gaps: Vec<Value> = gaps
            .map(|x| json!({"kind": x.kind, "name": x.name, "lacks": x.lacks}))
            .collect();
        json(&json!({"counted": found.counted, "gaps": gaps}))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut t = Table::new(["kind", "there are", "without a test"]).left(&[0]);
    for (kind, n) in &found.counted {
        let lacking = found.gaps.iter().filter(|x| x.kind == *kind).count();
        t.row([kind.to_string(), n.to_string(), lacking.to_string()]);
    }
    let mut out = t.to_text() + "\n";
    for x in &found.gaps {
        let _ = writeln!(out, "{} {} lacks {}", x.kind, x.name, x.lacks);
    }
    print(&out)?;
    Ok(ExitCode::SUCCESS)
}

fn count_json((kernel, count): &(String, Count)) -> Value {
    let c = &count.counters;
    let classes: BTreeMap<&str, u64> = c.by_class.iter().map(|(k, &n)| (k.name(), n)).collect();
    json!({
        "kernel": kernel, "launches": count.launches, "warp_instructions": c.instructions, "by_class": classes,
        "mma": c.mma, "mma_flops": c.mma_flops, "global_bytes": c.global_bytes(),
        "load_efficiency": c.global_load.efficiency(), "store_efficiency": c.global_store.efficiency(),
        "bank_conflicts": c.bank_conflicts(), "barriers": c.barriers,
        "divergent_branches": c.divergent_branches,
    })
}

/// What the simulation took: of interest to who works on the simulator, and not the same twice.
fn simulated(counts: &[(String, Count)]) -> String {
    let total: u64 = counts.iter().map(|c| c.1.counters.instructions).sum();
    let seconds: f64 = counts.iter().map(|c| c.1.time.as_secs_f64()).sum();
    format!(
        "{:.1} million warp instructions simulated in {seconds:.2} s: {:.1} million a second on {} threads",
        total as f64 * 1e-6,
        total as f64 * 1e-6 / seconds.max(1e-9),
        rayon::current_num_threads()
    )
}

/// Loads and stores are the ideal number of 32-byte sectors over the actual one.
fn count_table(counts: &[(String, Count)]) -> String {
    let mut t = Table::new([
        "kernel",
        "launches",
        "instructions",
        "mma",
        "bytes",
        "loads",
        "stores",
        "conflicts",
        "barriers",
        "diverged",
    ])
    .left(&[0]);
    for (kernel, count) in counts {
        let c = &count.counters;
        let percent = |e: f64| format!("{:.0} %", 100.0 * e);
        t.row([
            kernel.clone(),
            count.launches.to_string(),
            c.instructions.to_string(),
            c.mma.to_string(),
            c.global_bytes().to_string(),
            percent(c.global_load.efficiency()),
            percent(c.global_store.efficiency()),
            c.bank_conflicts().to_string(),
            c.barriers.to_string(),
            c.divergent_branches.to_string(),
        ]);
    }
    t.to_text()
}

fn list(g: &Global, cases: &Cases) -> Result<ExitCode> {
    let named = |(room, list): &(&'static Room, Vec<String>)| {
        list.iter()
            .map(|p| format!("{}({p})", room.name))
            .collect::<Vec<_>>()
    };
    let all: Vec<String> = cases.iter().flat_map(named).collect();
    match g.json {
        true => json(&all)?,
        false => print(&(all.join("\n") + "\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}
