//! `profile`.

use super::global::Global;
use super::occupancy::{self, OccupancyFlag};
use super::output::{json, note, print};
use super::step::StepFlags;
use clap::{Args, ValueEnum};
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::bench::ceilings;
use tilewright::bench::model::Direction;
use tilewright::models::find;
use tilewright::profile::diff::diff;
use tilewright::profile::trace::chrome;
use tilewright::profile::{Counted, Group, Launch, Profile};
use tilewright::report::table::{Table, number, si};
use tilewright::report::write_atomic;
use tilewright::{Error, Result};

/// One step of a model, launch by launch: time against the device's measured limits, what to fix first, memory over
/// time, and a trace for Perfetto. On cuda:sim counts take the place of times.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright profile cnn_r14 --batch 128
  tilewright profile vit_b_16 --batch 8 --infer --by layer --trace vit.trace.json
  tilewright profile cnn_r14 --batch 4 --image 16 --backend cuda:sim
  tilewright profile cnn_r14 --save before.json
  tilewright profile --diff before.json after.json")]
pub struct ProfileCommand {
    /// A model (see `tilewright models`)
    #[arg(value_name = "MODEL", required_unless_present = "diff")]
    model: Option<String>,
    /// Compare two recorded profiles
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["model", "trace", "save"])]
    diff: Option<Vec<PathBuf>>,
    /// Images in the step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = super::source::positive)]
    batch: usize,
    #[command(flatten)]
    occupancy: OccupancyFlag,
    #[command(flatten)]
    step: StepFlags,
    /// Tables of the launches put together by these
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "phase,op,layer",
        value_name = "LIST"
    )]
    by: Vec<By>,
    /// How many launches, and rows of a table, to show
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
    /// Every launch, in order
    #[arg(long)]
    launches: bool,
    /// Steps to trace; the one of median length is shown
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = super::source::positive)]
    steps: usize,
    /// Write a trace in Chrome's JSON format, which ui.perfetto.dev opens
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Record the profile as JSON, for --diff
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum By {
    Phase,
    Op,
    Layer,
    Kernel,
}

impl By {
    fn group(self) -> (&'static str, Group) {
        match self {
            By::Phase => ("phase", Group::Phase),
            By::Op => ("op", Group::Op),
            By::Layer => ("layer", Group::Layer),
            By::Kernel => ("kernel", Group::Kernel),
        }
    }
}

fn ms(seconds: f64) -> String {
    number(1e3 * seconds, 3)
}

fn percent(share: f64) -> String {
    number(100.0 * share, 1)
}

fn mb(bytes: u64) -> String {
    number(bytes as f64 / 1e6, 2)
}

impl ProfileCommand {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        if let Some(files) = &self.diff {
            return self.compare(g, &files[0], &files[1]);
        }
        let Some(model) = &self.model else {
            return Err(Error::input("name a model, or two profiles with --diff"));
        };
        let model = find(model)?;
        let backend = g.open_backend()?;
        let direction = match self.step.infer {
            true => Direction::Infer,
            false => Direction::Train,
        };
        let options = self.step.options(g, self.batch);
        let machine = self.occupancy.machine(backend.as_ref())?;
        let mut p = Profile::record(
            backend.as_ref(),
            &model,
            direction,
            &options,
            self.steps,
            machine,
        )?;
        if !p.counted() {
            p.hold_to(&ceilings(backend.as_ref(), false)?);
            if p.above_ceiling() {
                note("an op is faster than its ceiling: the ceilings are measured again");
                p.hold_to(&ceilings(backend.as_ref(), true)?);
            }
        }
        if let Some(path) = &self.trace {
            let text = serde_json::to_vec(&chrome(&p)?).map_err(|e| Error::run(e.to_string()))?;
            write_atomic(path, &text)?;
            note(&format!("trace written to {}", path.display()));
        }
        if let Some(path) = &self.save {
            p.save(path)?;
            note(&format!("profile recorded in {}", path.display()));
        }
        match g.json {
            true => json(&p)?,
            false => print(&self.text(&p))?,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn text(&self, p: &Profile) -> String {
        let mut out = String::new();
        let _ = writeln!(
            out,
            "{}, {}, batch {} x {} px on {}: {}",
            p.model,
            format!("{:?}", p.direction).to_lowercase(),
            p.batch,
            p.image,
            p.origin.backend,
            p.origin.device
        );
        if p.counted() {
            self.counts(&mut out, p);
        } else {
            self.times(&mut out, p);
        }
        let m = &p.memory;
        let _ = writeln!(
            out,
            "memory: {} MB inputs, parameters and state; temporaries {} MB at most, in node {} of {}; {} MB planned",
            mb(m.persistent),
            mb(m.peak()),
            m.peak_node,
            m.temporaries.len(),
            mb(m.planned)
        );
        let mut t =
            Table::new(["alive at the peak", "shape", "MB", "%", "from node", "to"]).left(&[0, 1]);
        for o in m.owners.iter().take(self.top) {
            t.row([
                o.name.clone(),
                match o.shape.is_empty() {
                    true => String::new(),
                    false => format!("{:?}", o.shape),
                },
                mb(o.bytes),
                percent(o.bytes as f64 / m.peak().max(1) as f64),
                o.life[0].to_string(),
                o.life[1].to_string(),
            ]);
        }
        let _ = writeln!(out, "{}", t.to_text());
        out
    }

    fn times(&self, out: &mut String, p: &Profile) {
        let whole = p.write + p.run + p.read;
        let gaps: f64 = p.launches.iter().map(|l| l.gap).sum();
        let floor: f64 = p.launches.iter().map(|l| l.floor).sum();
        let _ = writeln!(
            out,
            "step {} ms traced ({} untraced, median of {} steps): data {}, launches {} ({} of them), gaps {}, result {}; \
             {} ms at the roofline\n",
            ms(whole),
            ms(p.untraced),
            p.steps,
            ms(p.write),
            ms(p.busy()),
            p.launches.len(),
            ms(gaps),
            ms(p.read),
            ms(floor),
        );
        let mut t = Table::new([
            "what to fix first",
            "shape",
            "kernel",
            "ms",
            "at the roofline",
            "to gain",
            "% of roofline",
            "bound by",
        ])
        .left(&[0, 1, 2, 7]);
        for l in p.to_fix_first(self.top) {
            t.row([
                title(l),
                l.shape.clone(),
                l.kernel.clone(),
                ms(l.seconds),
                ms(l.floor),
                ms(l.to_gain()),
                percent(l.share()),
                l.bound.clone(),
            ]);
        }
        let _ = writeln!(out, "{}", t.to_text());
        for (heading, group) in self.by.iter().map(|b| b.group()) {
            let headings = [
                heading,
                "launches",
                "ms",
                "% of step",
                "GFLOP",
                "GFLOP/s",
                "GB/s",
                "at the roofline",
                "% of roofline",
            ];
            let mut t = Table::new(headings).left(&[0]);
            for (part, _) in p.grouped(group).into_iter().take(self.rows(group)) {
                let rate = |v: u64| number(v as f64 / part.seconds / 1e9, 1);
                t.row([
                    part.name.clone(),
                    part.count.to_string(),
                    ms(part.seconds),
                    percent(part.seconds / whole),
                    number(part.flops as f64 / 1e9, 3),
                    rate(part.flops),
                    rate(part.bytes),
                    ms(part.floor),
                    percent(part.share()),
                ]);
            }
            let _ = writeln!(out, "{}", t.to_text());
        }
        if self.launches {
            let mut headings = vec![
                "at ms",
                "gap us",
                "us",
                "phase",
                "layer",
                "op",
                "variant",
                "kernel",
                "shape",
                "MFLOP",
                "MB",
                "% of roofline",
            ];
            let footprints = p.launches.iter().any(|l| l.footprint.is_some());
            if footprints {
                headings.extend(occupancy::HEADINGS);
            }
            let mut t = Table::new(headings).left(&[3, 4, 5, 6, 7, 8]);
            for l in &p.launches {
                let mut row = vec![
                    ms(l.start),
                    number(1e6 * l.gap, 1),
                    number(1e6 * l.seconds, 1),
                    l.phase.clone(),
                    l.scope.clone(),
                    l.op.clone(),
                    l.variant.clone(),
                    l.kernel.clone(),
                    l.shape.clone(),
                    number(l.flops as f64 / 1e6, 3),
                    number(l.bytes as f64 / 1e6, 3),
                    percent(l.share()),
                ];
                if footprints {
                    row.extend(occupancy::cells(l.footprint.as_ref()));
                }
                t.row(row);
            }
            let _ = writeln!(out, "{}", t.to_text());
        }
    }

    fn counts(&self, out: &mut String, p: &Profile) {
        let total = |f: fn(&Counted) -> u64| -> f64 {
            let counted = p.launches.iter().filter_map(|l| l.counted.as_ref());
            counted.map(f).sum::<u64>() as f64
        };
        let instructions = total(|c| c.instructions).max(1.0);
        let _ = writeln!(
            out,
            "{} launches, {} warp instructions, {} mma, {}B of global memory, {} bank conflicts\n",
            p.launches.len(),
            si(instructions),
            si(total(|c| c.mma)),
            si(total(|c| c.global_bytes)),
            si(total(|c| c.bank_conflicts)),
        );
        let cells = |c: &Counted| {
            [
                c.instructions.to_string(),
                percent(c.instructions as f64 / instructions),
                c.mma.to_string(),
                mb(c.global_bytes),
                c.bank_conflicts.to_string(),
                c.divergent_branches.to_string(),
            ]
        };
        let headings = ["instructions", "%", "mma", "MB", "conflicts", "diverged"];
        let named = |first: &[&str]| -> Vec<String> {
            first
                .iter()
                .chain(&headings)
                .map(ToString::to_string)
                .collect()
        };
        let list: Vec<&Launch> = match self.launches {
            true => p.launches.iter().collect(),
            false => p.to_fix_first(self.top),
        };
        let footprints = p.launches.iter().any(|l| l.footprint.is_some());
        let mut heads = named(&["launch", "shape", "kernel"]);
        if footprints {
            heads.extend(occupancy::HEADINGS.map(String::from));
        }
        let mut t = Table::new(heads).left(&[0, 1, 2]);
        for l in list {
            let names = [title(l), l.shape.clone(), l.kernel.clone()];
            let counted = l.counted.clone().unwrap_or_default();
            let mut row: Vec<String> = names.into_iter().chain(cells(&counted)).collect();
            if footprints {
                row.extend(occupancy::cells(l.footprint.as_ref()));
            }
            t.row(row);
        }
        let _ = writeln!(out, "{}", t.to_text());
        for (heading, group) in self.by.iter().map(|b| b.group()) {
            let mut t = Table::new(named(&[heading, "launches"])).left(&[0]);
            for (part, c) in p.grouped(group).into_iter().take(self.rows(group)) {
                let names = [part.name.clone(), part.count.to_string()];
                t.row(names.into_iter().chain(cells(&c)));
            }
            let _ = writeln!(out, "{}", t.to_text());
        }
    }

    /// Layers and kernels may be many; phases and ops are few.
    fn rows(&self, group: Group) -> usize {
        match group {
            Group::Layer | Group::Kernel => self.top,
            Group::Op | Group::Phase => usize::MAX,
        }
    }

    fn compare(&self, g: &Global, a: &Path, b: &Path) -> Result<ExitCode> {
        let (before, after) = (Profile::load(a)?, Profile::load(b)?);
        let changes = diff(&before, &after);
        if g.json {
            json(&json!({
                "before": before.origin, "after": after.origin, "seconds": [before.busy(), after.busy()],
                "changes": changes,
            }))?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut out = String::new();
        for (p, file) in [(&before, a), (&after, b)] {
            let _ = writeln!(
                out,
                "{}: {} batch {} on {}, commit {}, {}",
                file.display(),
                p.model,
                p.batch,
                p.origin.device,
                p.origin.commit,
                p.origin.when
            );
        }
        let counted = before.counted() || after.counted();
        let unit = if counted { "instructions" } else { "ms" };
        let mut t = Table::new([
            "launch",
            "shape",
            &format!("{unit} before"),
            "after",
            "change",
            "%",
            "kernels before",
            "after",
        ])
        .left(&[0, 1, 6, 7]);
        for c in changes.iter().take(self.top) {
            let mut row = vec![c.name.clone(), c.shape.clone()];
            if counted {
                let [x, y] = c.instructions;
                let change = y as f64 - x as f64;
                row.extend([
                    x.to_string(),
                    y.to_string(),
                    format!("{change:+.0}"),
                    format!("{:+.1}", 100.0 * change / (x as f64).max(1.0)),
                ]);
            } else {
                let cell = |s: Option<f64>| s.map_or("-".into(), ms);
                row.extend([
                    cell(c.seconds[0]),
                    cell(c.seconds[1]),
                    format!("{:+.3}", 1e3 * c.delta()),
                    c.seconds[0].map_or("-".into(), |s| format!("{:+.1}", 100.0 * c.delta() / s)),
                ]);
            }
            row.extend(c.kernels.clone());
            t.row(row);
        }
        let _ = writeln!(
            out,
            "\n{}\nall launches: {} ms before, {} ms after ({:+.1} %)",
            t.to_text(),
            ms(before.busy()),
            ms(after.busy()),
            100.0 * (after.busy() / before.busy().max(1e-30) - 1.0)
        );
        print(&out)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn title(l: &Launch) -> String {
    format!("{} {} {}", l.phase, l.scope, l.op)
}
