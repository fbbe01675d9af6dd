//! `tune`.

use super::case::case;
use super::global::{Global, default_backend};
use super::output::{json, note, print};
use super::step::StepFlags;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tilewright::backend::tuned::{Choice, TunedFile};
use tilewright::bench::kernel::{
    Contest, KernelOptions, KernelReport, RULE, case_flops, measure_case,
};
use tilewright::bench::model::layer_cases;
use tilewright::bench::record::Verdict;
use tilewright::bench::{Limits, ceilings};
use tilewright::models::find;
use tilewright::ops::room;
use tilewright::report::table::{Table, number};
use tilewright::{Error, Result};

/// Measures every kernel variant of an op's or a model's shapes on this device and writes the fastest of each, where it
/// beats the op's own rule by more than the noise, to a file that --tuned applies. Variants are checked before.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright tune conv2d --backend wgpu
  tilewright tune 'linear(m=1576,i=768,o=3072)' -o tuned.toml
  tilewright tune --model resnet50 --batch 8 -o tuned.toml
  tilewright bench resnet50 --tuned tuned.toml")]
pub struct Tune {
    /// An op for its bench cases, or one case as `op(key=value,...)`
    #[arg(value_name = "OP|CASE", required_unless_present = "model")]
    target: Option<String>,
    /// The convolutions, linear layers and attentions of a model
    #[arg(long, value_name = "MODEL", conflicts_with = "target")]
    model: Option<String>,
    /// Images in the model's step
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = super::source::positive)]
    batch: usize,
    #[command(flatten)]
    step: StepFlags,
    /// The file; what it has for other shapes and devices stays
    #[arg(short, long, value_name = "FILE", default_value = "tuned.toml")]
    output: PathBuf,
    /// Stop repeating a kernel after this many seconds
    #[arg(long, value_name = "S", default_value_t = 2.0)]
    seconds: f64,
}

impl Tune {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        if !(self.seconds > 0.0 && self.seconds < 1e6) {
            return Err(Error::input("--seconds is a number above 0"));
        }
        // As the rules choose: what was tuned before must not stand for the rule.
        let name = g
            .backend
            .clone()
            .unwrap_or_else(|| default_backend().into());
        let backend = g.open_plain(&name)?;
        if backend.name() == "cuda:sim" {
            return Err(Error::input(
                "cuda:sim counts and does not time, so it cannot say which kernel is fastest; tune on a device",
            ));
        }
        let cases: Vec<(&str, String)> = match (&self.model, &self.target) {
            (Some(m), _) => {
                let options = self.step.options(g, self.batch);
                layer_cases(backend.as_ref(), &find(m)?, &options)?
            }
            (_, Some(t)) => {
                let c = case(t)?;
                let all = || c.room.bench.iter().map(|c| c.to_string()).collect();
                let params: Vec<String> = c.params.unwrap_or_else(all);
                params.into_iter().map(|p| (c.room.name, p)).collect()
            }
            _ => return Err(Error::input("name an op, a case or a model")),
        };
        let limits = ceilings(backend.as_ref(), false)?;
        let options = KernelOptions {
            passes: vec![],
            all_variants: true,
            hot: true,
            rivals: false,
            machine: None,
            limits: Limits {
                min_runs: 9,
                precision: 0.02,
                time: Duration::from_secs_f64(self.seconds),
                ..Limits::default()
            },
        };
        let mut file = match self.output.exists() {
            true => TunedFile::load(&self.output)?,
            false => TunedFile::default(),
        };
        let mut choices = vec![];
        let mut kernels = 0;
        let n = cases.len();
        // Time goes with the operations of a case, more or less.
        let flops = |(op, params): &(&str, String)| case_flops(room(op)?, params);
        let flops = cases.iter().map(flops).collect::<Result<Vec<u64>>>()?;
        let bar = bar(flops.iter().sum());
        for (i, (op, params)) in cases.iter().enumerate() {
            let case = format!("{}/{n}: {op}({params})", i + 1);
            if bar.is_hidden() {
                note(&case);
            }
            let before: u64 = flops[..i].iter().sum();
            let measure = |only: &[String], from: f64, to: f64| {
                let mut told = |variant: &str, share: f64| {
                    let done = (from + (to - from) * share) * flops[i] as f64;
                    bar.set_position(before + done as u64);
                    bar.set_message(format!("{case} {variant}"));
                };
                let contest = Contest {
                    only,
                    told: &mut told,
                };
                let room = room(op)?;
                measure_case(
                    backend.as_ref(),
                    room,
                    params,
                    &options,
                    &limits,
                    Some(contest),
                )
            };
            let rows = measure(&[], 0.0, 0.8)?.rows;
            kernels += rows.iter().filter(|r| r.variant == RULE).count();
            let mut found = chosen(&rows);
            if !found.is_empty() {
                // A disturbance in the first round is no reason for a choice.
                let only: Vec<String> = found.iter().map(|c| c.variant.clone()).collect();
                let again = chosen(&measure(&only, 0.8, 1.0)?.rows);
                found.retain(|c| {
                    again
                        .iter()
                        .any(|a| (&a.case, &a.variant) == (&c.case, &c.variant))
                });
            }
            for choice in found {
                file.table_of(backend.as_ref()).set(choice.clone());
                choices.push(choice);
            }
            // After every case, so that a run that is interrupted leaves what it found.
            file.save(&self.output)?;
        }
        bar.finish_and_clear();
        if g.json {
            json(&choices)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut t = Table::new(["case", "variant", "ms", "ms by the rule", "gain %"]).left(&[0, 1]);
        for c in &choices {
            t.row([
                c.case.clone(),
                c.variant.clone(),
                number(c.ms, 3),
                number(c.rule_ms, 3),
                number(100.0 * (1.0 - c.ms / c.rule_ms), 1),
            ]);
        }
        print(&format!(
            "{}\n{} of {kernels} kernels with a choice have a variant that beats the rule; {}\n",
            t.to_text(),
            choices.len(),
            self.output.display()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A bar on standard error where that is a terminal, hidden elsewhere.
fn bar(length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length);
    let style = "{bar:24} {percent:>3} % {msg}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.enable_steady_tick(Duration::from_secs(1));
    bar
}

/// A gain that is worth an entry.
const LEAST_GAIN: f64 = 0.03;

/// By op and shapes, the fastest variant where it beats the rule by more than the noise, and by enough.
fn chosen(rows: &[KernelReport]) -> Vec<Choice> {
    let rules = rows.iter().filter(|r| r.variant == RULE);
    rules
        .filter_map(|rule| {
            let same = rows.iter().filter(|r| r.signature == rule.signature);
            let best = same.min_by(|a, b| a.time.median.total_cmp(&b.time.median))?;
            let better = Verdict::of(&rule.time, &best.time) == Verdict::Faster
                && best.time.median < (1.0 - LEAST_GAIN) * rule.time.median;
            better.then(|| Choice {
                case: best.signature.clone(),
                variant: best.variant.clone(),
                ms: best.time.ms(),
                rule_ms: rule.time.ms(),
            })
        })
        .collect()
}
