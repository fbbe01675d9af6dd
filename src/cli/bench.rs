//! `bench`.

mod results;

use super::case::{CaseText, case};
use super::global::Global;
use super::occupancy::{self, OccupancyFlag};
use super::output::{json, note, print};
use super::step::StepFlags;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Write;
use std::io::{BufRead, BufReader, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use tilewright::backend::cuda::Machine;
use tilewright::backend::{Backend, CompileOptions};
use tilewright::bench::kernel::{KernelOptions, Pass, measure_case};
use tilewright::bench::model::{
    Direction, Part, Step, StepOptions, StepReport, layer_cases, measure_step,
};
use tilewright::bench::record::{Origin, Record, Row, path_of};
use tilewright::bench::{Ceilings, Limits, Sample, ceilings};
use tilewright::models::{Model, find};
use tilewright::ops::check::run_case;
use tilewright::ops::{ROOMS, room};
use tilewright::report::table::{Table, number, si};
use tilewright::{Error, Result};

/// Time of kernels, or of a model's training and inference steps on synthetic images by phase, op and shape, against the
/// device's own limits. The limits are measured once per device and kept in the user's cache folder.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright bench resnet18 --batch 16
  tilewright bench vit_b_16 --batch 1:64:x2 --infer --csv
  tilewright bench cnn_r14 --batch 128 --train --cold
  tilewright bench --model resnet50 --batch 8
  tilewright bench 'conv2d(n=8,h=56,c=64,k=64,r=3,pad=1)' --direction fwd,dgrad,wgrad --variant all
  tilewright bench attention --variant all --html attention.html
  tilewright bench conv2d --save before; tilewright bench conv2d --compare before
  tilewright bench history --html history.html

FLOPs count a multiply-add as 2 and convolutions as their definition does. Shares of the peak and of the roofline
count the operations that the chosen algorithm really does (Winograd's are fewer), so none is above 100 %.")]
pub struct Bench {
    /// A model (see `tilewright models`), a case `op(key=value,...)` as `check` takes it, an op for its own cases, or
    /// `history` for what was recorded with --save
    #[arg(
        value_name = "MODEL|CASE|OP|history",
        required_unless_present = "model"
    )]
    target: Option<String>,
    /// A model's steps by distinct layer shape, its convolutions, linear layers and attentions checked before
    #[arg(long, value_name = "MODEL", conflicts_with = "target")]
    model: Option<String>,
    /// Of a case: fwd, dgrad, wgrad or bwd (every backward kernel) [default: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    direction: Vec<Way>,
    /// Of a case: the default rule's choice, or `all` kernel variants
    #[arg(long, value_enum, default_value = "auto")]
    variant: Which,
    /// Of a case: the same memory again and again, in place of copies in turn that are larger than the caches
    #[arg(long)]
    hot: bool,
    /// Images in a step; several as 1,8,32 or 1:64:x2
    #[arg(long, value_name = "N", default_value = "8", value_parser = batches)]
    batch: Sweep,
    #[command(flatten)]
    occupancy: OccupancyFlag,
    #[command(flatten)]
    step: StepFlags,
    /// Time from the start of a process to the end of its first step, with empty caches and with filled ones
    #[arg(long)]
    cold: bool,
    /// Repeat until the median's 95 % interval is this many percent wide, either side
    #[arg(long, value_name = "PERCENT", default_value_t = 1.0)]
    interval: f64,
    /// Stop repeating after this many seconds
    #[arg(long, value_name = "S", default_value_t = 10.0)]
    seconds: f64,
    /// Also list this many launches, those furthest above their floor first
    #[arg(long, value_name = "N", default_value_t = 0)]
    top: usize,
    /// Record the results as benches/results/NAME.json, or in a file by its path
    #[arg(long, value_name = "NAME")]
    save: Option<String>,
    /// Compare with recorded results: faster, slower or within noise, by the medians' intervals
    #[arg(long, value_name = "NAME")]
    compare: Option<String>,
    /// Write a page with the roofline plot, the ladder of variants and the table
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// One row per batch size with timm's column names
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Measure the device's limits again
    #[arg(long)]
    remeasure: bool,
    /// Run one step, say so and end: what --cold starts
    #[arg(long, hide = true)]
    first_step: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    Fwd,
    Dgrad,
    Wgrad,
    Bwd,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    Auto,
    All,
}

/// Values of a sweep, as a type of its own so that the flag parser does not take it for a list.
#[derive(Clone, Debug, PartialEq)]
struct Sweep(Vec<usize>);

fn batches(text: &str) -> Result<Sweep, String> {
    super::case::sweep(text).map(Sweep)
}

impl Bench {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        if !(self.interval > 0.0 && self.seconds >= 0.0 && self.seconds.is_finite()) {
            return Err(Error::input("--interval and --seconds are numbers above 0"));
        }
        // What is not there is said before anything is measured.
        if let Some(name) = &self.compare {
            Record::load(&path_of(name))?;
        }
        let name = match (&self.model, &self.target) {
            (Some(m), _) => m,
            (_, Some(t)) if t.contains('(') || ROOMS.iter().any(|r| r.name == t) => {
                return self.kernels(g, t);
            }
            (_, Some(t)) if t == "history" => return results::history(g, self.html.as_deref()),
            (_, Some(t)) => t,
            _ => return Err(Error::input("name a model, a case or an op")),
        };
        if self.occupancy.given() {
            return Err(Error::input(format!(
                "--occupancy is of a case or an op here; `tilewright profile {name} --occupancy` shows a model's kernels"
            )));
        }
        let model = find(name)?;
        let directions = self.step.directions();
        if self.first_step {
            let backend = g.open_backend()?;
            let options = self.step.options(g, self.batch.0[0]);
            Step::new(backend.as_ref(), &model, directions[0], &options)?.run()?;
            print("done\n")?;
            return Ok(ExitCode::SUCCESS);
        }
        if self.cold {
            return self.cold(g, &model, directions);
        }
        let backend = g.open_backend()?;
        let mut limits = ceilings(backend.as_ref(), self.remeasure)?;
        if self.model.is_some() {
            self.check_layers(g, &model, backend.as_ref())?;
        }
        let mut reports = vec![];
        for &batch in &self.batch.0 {
            for &direction in directions {
                let options = self.step.options(g, batch);
                let one = self.measure(backend.as_ref(), &model, direction, &options, &mut limits);
                match one {
                    Ok(r) => {
                        if !g.json && !self.csv {
                            print(&self.text(&r, &limits))?;
                        }
                        reports.push(r);
                    }
                    // The sweep goes up to what fits.
                    Err(e) if reports.is_empty() => return Err(e),
                    Err(e) => note(&format!("batch {batch}: {e}")),
                }
            }
        }
        let rows: Vec<Row> = reports.iter().map(Row::from).collect();
        let after = self.keep(backend.as_ref(), &limits, rows)?;
        if g.json {
            json(&json!({
                "origin": Origin::of(backend.as_ref()), "ceilings": limits, "results": reports,
                "compared": after.compared,
            }))?;
        } else if self.csv {
            print(&csv(&reports))?;
        } else {
            let all = match reports.len() > 2 {
                true => summary(&reports),
                false => String::new(),
            };
            print(&(all + &after.text))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// One step's report. Where a part is faster than its ceiling, the ceilings were measured on a busy device: they are
    /// measured again, and the step too.
    fn measure(
        &self,
        backend: &dyn Backend,
        model: &Model,
        direction: Direction,
        options: &StepOptions,
        limits: &mut Ceilings,
    ) -> Result<StepReport> {
        const TRIES: usize = 3;
        let mut tries = 0;
        loop {
            let r = measure_step(backend, model, direction, options, self.limits(), limits)?;
            tries += 1;
            if tries == TRIES || !r.above_ceiling() {
                return Ok(r);
            }
            note("a part is faster than its ceiling: the ceilings are measured again");
            *limits = ceilings(backend, true)?;
        }
    }

    /// Checks every distinct layer of the model, on few images: what is not right is not timed.
    fn check_layers(&self, g: &Global, model: &Model, backend: &dyn Backend) -> Result<()> {
        let once = StepOptions {
            image: self.step.image,
            ..self.step.options(g, 1)
        };
        let cases = layer_cases(backend, model, &once)?;
        let n = cases.len();
        for (i, (op, params)) in cases.into_iter().enumerate() {
            if std::io::stderr().is_terminal() {
                note(&format!("checking {}/{n}: {op}({params})", i + 1));
            }
            let found = run_case(room(op)?, &params, backend, &CompileOptions::default())?;
            if let Some(bad) = found.iter().find(|f| !f.ok()) {
                return Err(Error::run(format!(
                    "{} is {} times its allowance off; what is not right is not timed (repeat: tilewright check \
                     '{op}({params})')",
                    bad.tensor, bad.worst
                )));
            }
        }
        note(&format!(
            "{n} distinct layers checked against the reference"
        ));
        Ok(())
    }

    /// Cases of one op.
    fn kernels(&self, g: &Global, target: &str) -> Result<ExitCode> {
        let CaseText {
            room,
            params,
            precision,
        } = case(target)?;
        // `dtype=` stands for --precision.
        let g = &Global {
            precision: precision.or(g.precision),
            ..g.clone()
        };
        let all = params.unwrap_or_else(|| room.bench.iter().map(|c| c.to_string()).collect());
        let cases: Vec<&str> = all.iter().map(String::as_str).collect();
        let backend = g.open_backend()?;
        let pass = |w: &Way| match w {
            Way::Fwd => Pass::Forward,
            Way::Dgrad => Pass::Dgrad,
            Way::Wgrad => Pass::Wgrad,
            Way::Bwd => Pass::Backward,
        };
        let options = KernelOptions {
            passes: self.direction.iter().map(pass).collect(),
            all_variants: self.variant == Which::All,
            hot: self.hot,
            rivals: true,
            machine: self
                .occupancy
                .machine(backend.as_ref())?
                .or((backend.name() == "cuda").then_some(Machine::Own)),
            limits: Limits {
                min_runs: 15,
                ..self.limits()
            },
        };
        if backend.name() == "cuda:sim" {
            return results::counts(g, backend.as_ref(), room, &cases, &options);
        }
        let mut limits = ceilings(backend.as_ref(), self.remeasure)?;
        let mut rows = vec![];
        let mut told = BTreeSet::new();
        for case in cases {
            let mut found = measure_case(backend.as_ref(), room, case, &options, &limits, None)?;
            if found.rows.iter().any(|r| r.roofline > 1.0) {
                // The ceilings were measured on a busy device, or this is an artefact: measured again, it must be below.
                note("a kernel is faster than its ceiling: the ceilings are measured again");
                limits = ceilings(backend.as_ref(), true)?;
                found = measure_case(backend.as_ref(), room, case, &options, &limits, None)?;
            }
            found.drop_rivals_above_the_ceiling();
            if let Some(r) = found.rows.iter().find(|r| r.roofline > 1.0) {
                return Err(Error::run(format!(
                    "{} {} comes to {:.0} % of its roofline, which cannot be; measure the limits again on an idle device \
                     (--remeasure), or without --hot",
                    r.case,
                    r.op,
                    100.0 * r.roofline
                )));
            }
            for line in found.notes {
                if told.insert(line.clone()) {
                    note(&line);
                }
            }
            rows.extend(found.rows);
        }
        let after = self.keep(
            backend.as_ref(),
            &limits,
            rows.iter().map(Row::from).collect(),
        )?;
        if g.json {
            json(&json!({
                "backend": backend.name(), "device": backend.device(), "origin": Origin::of(backend.as_ref()),
                "ceilings": limits, "results": rows, "compared": after.compared,
            }))?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut headings = vec![
            "case",
            "op",
            "variant",
            "ms",
            "+- %",
            "GFLOP/s",
            "GB/s",
            "FLOP/byte",
            "% of roofline",
            "bound by",
            "error",
        ];
        let footprints = rows.iter().any(|r| r.footprint.is_some());
        if footprints {
            headings.extend(occupancy::HEADINGS);
        }
        let mut t = Table::new(headings.clone()).left(&[0, 1, 2, 9]);
        for r in &rows {
            let mut row = vec![
                r.case.clone(),
                r.op.clone(),
                r.variant.clone(),
                number(r.time.ms(), 3),
                number(100.0 * r.time.spread(), 1),
                number(r.flops_per_second / 1e9, 1),
                number(r.bytes_per_second / 1e9, 1),
                number(r.intensity, 1),
                number(100.0 * r.roofline, 1),
                r.bound.into(),
                number(r.error, 3),
            ];
            if footprints {
                row.extend(occupancy::cells(r.footprint.as_ref()));
            }
            t.row(row);
        }
        print(&match self.csv {
            false => t.to_text() + &after.text,
            true => {
                let quoted = |row: &[String]| {
                    let cells: Vec<String> = row.iter().map(|c| format!("\"{c}\"")).collect();
                    cells.join(",") + "\n"
                };
                let body: String = t.rows().iter().map(|r| quoted(r)).collect();
                headings.join(",") + "\n" + &body
            }
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn limits(&self) -> Limits {
        Limits {
            precision: self.interval / 100.0,
            time: Duration::from_secs_f64(self.seconds.min(1e6)),
            ..Limits::default()
        }
    }

    /// Starts this program again and again and waits for the end of its first step.
    fn cold(self, g: &Global, model: &Model, directions: &[Direction]) -> Result<ExitCode> {
        const RUNS: usize = 5;
        let mut rows: Vec<(Direction, usize, &str, Sample)> = vec![];
        for &direction in directions {
            for &batch in &self.batch.0 {
                let mut empty = vec![];
                let mut filled = vec![];
                for _ in 0..RUNS {
                    let cache = tempfile::tempdir()
                        .map_err(|e| Error::run(format!("no temporary folder: {e}")))?;
                    empty.push(self.first(g, model, direction, batch, cache.path())?);
                    filled.push(self.first(g, model, direction, batch, cache.path())?);
                }
                rows.push((direction, batch, "empty", Sample::of(empty)));
                rows.push((direction, batch, "filled", Sample::of(filled)));
            }
        }
        if g.json {
            let row = |(direction, batch, caches, s): &(Direction, usize, &str, Sample)| {
                json!({
                    "model": model.id, "direction": direction, "batch": batch, "caches": caches,
                    "process_start_to_first_step": s,
                })
            };
            json(&rows.iter().map(row).collect::<Vec<Value>>())?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut t = Table::new([
            "step",
            "batch",
            "caches",
            "start to first step ms",
            "best",
            "runs",
        ])
        .left(&[0, 2]);
        for (direction, batch, caches, s) in &rows {
            t.row([
                format!("{direction:?}").to_lowercase(),
                batch.to_string(),
                caches.to_string(),
                number(s.ms(), 0),
                number(1e3 * s.min, 0),
                s.runs.to_string(),
            ]);
        }
        print(&t.to_text())?;
        Ok(ExitCode::SUCCESS)
    }

    /// Seconds from the start of a process to the end of its first step, with driver and program caches in `cache`.
    fn first(
        &self,
        g: &Global,
        model: &Model,
        direction: Direction,
        batch: usize,
        cache: &Path,
    ) -> Result<f64> {
        let fail = |e: std::io::Error| Error::run(format!("cannot start this program again: {e}"));
        let exe = std::env::current_exe().map_err(fail)?;
        let mut command = Command::new(exe);
        command.args(["bench", &model.id, "--first-step"]);
        command.arg(match direction {
            Direction::Train => "--train",
            Direction::Infer => "--infer",
        });
        command.args(["--batch", &batch.to_string()]);
        command.args(["--seed", &g.seed.to_string()]);
        let mut flag = |name: &str, value: Option<String>| {
            if let Some(v) = value {
                command.args([name, &v]);
            }
        };
        flag("--image", self.step.image.map(|v| v.to_string()));
        flag("--classes", self.step.classes.map(|v| v.to_string()));
        flag("--dropout", self.step.dropout.map(|v| v.to_string()));
        flag("--backend", g.backend.clone());
        flag("--threads", g.threads.map(|v| v.to_string()));
        let shaders = g.shaders.as_ref().map(|d| d.display().to_string());
        flag("--shaders", shaders);
        command
            .env("XDG_CACHE_HOME", cache)
            .env("MESA_SHADER_CACHE_DIR", cache)
            .env("CUDA_CACHE_PATH", cache)
            .stdout(Stdio::piped());
        let clock = Instant::now();
        let mut child = command.spawn().map_err(fail)?;
        let mut line = String::new();
        if let Some(out) = child.stdout.take() {
            BufReader::new(out).read_line(&mut line).map_err(fail)?;
        }
        let seconds = clock.elapsed().as_secs_f64();
        let status = child.wait().map_err(fail)?;
        if line.trim() != "done" || !status.success() {
            return Err(Error::run(format!("the first step failed ({status})")));
        }
        Ok(seconds)
    }

    /// One step's report for people.
    fn text(&self, r: &StepReport, c: &Ceilings) -> String {
        let mut out = String::new();
        let gflops = |v: f64| number(v / 1e9, 1);
        let mb = |v: usize| number(v as f64 / 1e6, 1);
        let percent = |v: f64| number(100.0 * v, 1);
        let _ = writeln!(
            out,
            "{}, {}, batch {} x {} px, {} classes, {} parameters\n{}: {}\nceilings measured: {} GFLOP/s, memory {} GB/s",
            r.model,
            format!("{:?}", r.direction).to_lowercase(),
            r.batch,
            r.image,
            r.classes,
            si(r.params as f64),
            r.backend,
            r.device,
            gflops(c.flops),
            gflops(c.memory()),
        );
        let _ = writeln!(
            out,
            "step {} ms (95 %: {} to {}, {} runs), {} images/s; prepared in {} ms, first step {} ms",
            number(r.step.ms(), 2),
            number(1e3 * r.step.low, 2),
            number(1e3 * r.step.high, 2),
            r.step.runs,
            number(r.images_per_second, 1),
            number(1e3 * r.prepare, 0),
            number(1e3 * r.first, 0),
        );
        let _ = writeln!(
            out,
            "{} GFLOP by definition: {} GFLOP/s; {} GFLOP done: {} % of the peak; {} % of the roofline",
            gflops(r.flops as f64),
            gflops(r.flops_per_second),
            gflops(r.executed as f64),
            percent(r.mfu),
            percent(r.roofline),
        );
        let present = r.present[0].min(r.present[1]);
        if present < 0.9 {
            let _ = writeln!(
                out,
                "the device gave only {} % of its measured peak just now: it is busy or hot, and times are long",
                percent(present)
            );
        }
        let rss = r.peak_rss.map_or(String::new(), |b| {
            format!("; process at most {} MB", mb(b as usize))
        });
        let _ = writeln!(
            out,
            "memory {} MB planned: {} MB inputs, parameters and state, temporaries {} MB at most{rss}\n",
            mb(r.planned_bytes),
            mb(r.persistent_bytes),
            mb(r.temporaries_bytes),
        );
        let table = |what: &str, parts: &[Part]| {
            let mut t = Table::new([
                what,
                "launches",
                "ms",
                "% of step",
                "GFLOP",
                "GFLOP/s",
                "GB/s",
                "floor ms",
                "% of roofline",
            ])
            .left(&[0]);
            for p in parts {
                let rate = |v: u64| number(v as f64 / p.seconds / 1e9, 1);
                t.row([
                    p.name.clone(),
                    p.count.to_string(),
                    number(1e3 * p.seconds, 3),
                    percent(p.seconds / r.step.median),
                    number(p.flops as f64 / 1e9, 2),
                    rate(p.flops),
                    rate(p.bytes),
                    number(1e3 * p.floor, 3),
                    percent(p.share()),
                ]);
            }
            t.to_text()
        };
        let _ = writeln!(out, "{}", table("phase", &r.phases));
        let _ = writeln!(out, "{}", table("op", &r.ops));
        if self.model.is_some() {
            let _ = writeln!(out, "{}", table("shape", &r.shapes));
        }
        if self.top > 0 {
            let top = &r.launches[..self.top.min(r.launches.len())];
            let _ = writeln!(out, "{}", table("furthest above the floor", top));
        }
        let _ = writeln!(
            out,
            "the parts come to {} % of the step\n",
            percent(r.accounted)
        );
        out
    }
}

/// The reports in one table.
fn summary(reports: &[StepReport]) -> String {
    let mut t = Table::new([
        "step",
        "batch",
        "px",
        "ms",
        "+- %",
        "images/s",
        "GFLOP/s",
        "% of peak",
        "MB planned",
    ])
    .left(&[0]);
    for r in reports {
        t.row([
            format!("{:?}", r.direction).to_lowercase(),
            r.batch.to_string(),
            r.image.to_string(),
            number(r.step.ms(), 2),
            number(100.0 * r.step.spread(), 1),
            number(r.images_per_second, 1),
            number(r.flops_per_second / 1e9, 1),
            number(100.0 * r.mfu, 1),
            number(r.planned_bytes as f64 / 1e6, 1),
        ]);
    }
    t.to_text()
}

/// Training and inference of a batch size side by side, under the names of timm's result files. Step times are in
/// milliseconds, parameters in millions, multiply-adds in units of 10^9 for one image.
fn csv(reports: &[StepReport]) -> String {
    let mut out = String::from(
        "model,infer_samples_per_sec,infer_step_time,infer_batch_size,infer_img_size,infer_gmacs,\
         train_samples_per_sec,train_step_time,train_batch_size,train_img_size,param_count\n",
    );
    let mut batches: Vec<usize> = reports.iter().map(|r| r.batch).collect();
    batches.dedup();
    for batch in batches {
        let of = |d: Direction| {
            reports
                .iter()
                .find(|r| r.batch == batch && r.direction == d)
        };
        let [infer, train] = [Direction::Infer, Direction::Train].map(of);
        let cells = |r: Option<&StepReport>, macs: bool| match r {
            None => vec![String::new(); if macs { 5 } else { 4 }],
            Some(r) => {
                let mut c = vec![
                    number(r.images_per_second, 2),
                    number(r.step.ms(), 3),
                    r.batch.to_string(),
                    r.image.to_string(),
                ];
                if macs {
                    c.push(number(r.flops as f64 / 2e9 / r.batch as f64, 3));
                }
                c
            }
        };
        let Some(any) = infer.or(train) else { continue };
        let mut row = vec![any.model.clone()];
        row.extend(cells(infer, true));
        row.extend(cells(train, false));
        row.push(number(any.params as f64 / 1e6, 2));
        let _ = writeln!(out, "{}", row.join(","));
    }
    out
}
