//! `check`.

use super::global::Global;
use super::output::{json, note, print};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;
use tilewright::backend::cuda::{self, Count};
use tilewright::backend::wgpu::{Wgpu, WgpuOptions, adapters};
use tilewright::backend::{Backend, CompileOptions};
use tilewright::ops::check::{Finding, case_graph, check_gradients, run_case, seed_of};
use tilewright::ops::{ROOMS, Room, room};
use tilewright::report::table::Table;
use tilewright::{Error, Result};

/// Every kernel on every backend present against its float64 reference, forward and backward, and the reference's
/// gradients against central differences. An error of 1 is the whole allowance.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright check
  tilewright check conv2d --backend wgpu --variants
  tilewright check 'linear(n=5,c=7,k=3)'")]
pub struct Check {
    /// An op, or one case of an op as `op(key=value,...)` [default: every case of every op]
    #[arg(value_name = "OP")]
    op: Option<String>,
    /// Check every kernel variant, not only the one that the default rule picks
    #[arg(long)]
    variants: bool,
    /// What each kernel did, as cuda:sim counts it: instructions, memory traffic, bank conflicts
    #[arg(long)]
    counters: bool,
    /// List the cases and check nothing
    #[arg(long)]
    list: bool,
}

type Cases = Vec<(&'static Room, Vec<String>)>;

/// The rooms and cases that `op` names.
fn cases(op: Option<&str>) -> Result<Cases> {
    let all = |r: &'static Room| (r, r.cases.iter().map(ToString::to_string).collect());
    let Some(op) = op else {
        return Ok(ROOMS.iter().map(|r| all(r)).collect());
    };
    let Some((name, rest)) = op.split_once('(') else {
        return Ok(vec![all(room(op)?)]);
    };
    let params = rest.strip_suffix(')').ok_or_else(|| {
        Error::input(format!(
            "`{op}` has no closing bracket; a case is op(key=value,...)"
        ))
    })?;
    let room = room(name)?;
    room.build(params)?;
    Ok(vec![(room, vec![params.to_string()])])
}

/// What is checked of an op on a backend.
#[derive(Default)]
struct Tally {
    cases: usize,
    runs: usize,
    tensors: usize,
    failed: usize,
    worst: f64,
    at: String,
}

impl Tally {
    /// Takes what a case came to; `false` where something is wrong, which is told on standard error.
    fn take(&mut self, what: &str, found: Result<Vec<Finding>>, repeat: &str) -> bool {
        let found = match found {
            Ok(found) => found,
            Err(e) => {
                self.failed += 1;
                note(&format!("FAILED {what}: {e}\n  repeat: {repeat}"));
                return false;
            }
        };
        let mut good = true;
        for f in &found {
            self.tensors += 1;
            if f.worst.is_nan() || f.worst > self.worst {
                self.worst = f.worst;
                self.at = format!("{what} {}", f.tensor);
            }
            if !f.ok() {
                good = false;
                note(&format!(
                    "FAILED {what}: {} is {} times its allowance off at element {}: {}, the reference says {}\n  \
                     repeat: {repeat}",
                    f.tensor, f.worst, f.index, f.got, f.want
                ));
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
    let of = |n: &tilewright::graph::Node| match backend.name() {
        "wgpu" => (n.op.name(), n.op.wgpu_variants()),
        "cuda" | "cuda:sim" => (n.op.name(), n.op.cuda_variants()),
        _ => (n.op.name(), n.op.cpu_variants()),
    };
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

    fn check_room(
        &self,
        tally: &mut Tally,
        room: &Room,
        cases: &[String],
        name: &str,
        backend: &dyn Backend,
    ) {
        for params in cases {
            tally.cases += 1;
            let case = format!("{}({params})", room.name);
            let repeat = format!("tilewright check '{case}' --backend {name}");
            let mut options = CompileOptions {
                poison: true,
                ..CompileOptions::default()
            };
            tally.runs += 1;
            let found = run_case(room, params, backend, &options);
            tally.take(&format!("{case} on {name}"), found, &repeat);
            if !self.variants {
                continue;
            }
            for (op, list) in variants(room, params, backend).unwrap_or_default() {
                for variant in &list[1..] {
                    options.variants = [(op.to_string(), variant.to_string())].into();
                    match run_case(room, params, backend, &options) {
                        // A variant need not support every shape, and says so.
                        Err(Error::Input(_)) => {}
                        found => {
                            tally.runs += 1;
                            let what = format!("{case} on {name}, {op} variant {variant}");
                            tally.take(&what, found, &format!("{repeat} --variants"));
                        }
                    }
                }
            }
        }
    }

    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let cases = cases(self.op.as_deref())?;
        if self.list {
            return list(g, &cases);
        }
        let backends = self.backends(g)?;
        let mut rows: Vec<(&str, String, Tally)> = vec![];
        for (room, cases) in &cases {
            let mut tally = Tally::default();
            for params in cases {
                tally.cases += 1;
                tally.runs += 1;
                let case = format!("{}({params})", room.name);
                let what = format!("gradient of {case}");
                tally.take(
                    &what,
                    check_gradients(room, params),
                    &format!("tilewright check '{case}'"),
                );
            }
            rows.push((room.name, "gradient".into(), tally));
            for (name, backend) in &backends {
                let mut tally = Tally::default();
                self.check_room(&mut tally, room, cases, name, backend.as_ref());
                rows.push((room.name, name.clone(), tally));
            }
        }
        let failed: usize = rows.iter().map(|r| r.2.failed).sum();
        let counts: Vec<(String, Count)> = match self.counters {
            true => backends.iter().flat_map(|b| b.1.take_counts()).collect(),
            false => vec![],
        };
        if g.json {
            let rows: Vec<Value> = rows
                .iter()
                .map(|(op, on, t)| {
                    json!({
                        "op": op, "checked": on, "cases": t.cases, "runs": t.runs, "tensors": t.tensors,
                        "failed": t.failed, "worst": t.worst, "worst_at": t.at,
                    })
                })
                .collect();
            let counts: Vec<Value> = counts.iter().map(count_json).collect();
            json(&json!({"failed": failed, "results": rows, "counters": counts}))?;
        } else {
            let mut t = Table::new([
                "op", "checked", "cases", "runs", "tensors", "failed", "worst", "where",
            ])
            .left(&[0, 1, 7]);
            for (op, on, tally) in &rows {
                t.row([
                    op.to_string(),
                    on.clone(),
                    tally.cases.to_string(),
                    tally.runs.to_string(),
                    tally.tensors.to_string(),
                    tally.failed.to_string(),
                    format!("{:.3}", tally.worst),
                    tally.at.clone(),
                ]);
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
