//! Flags in, results out. One file per group of subcommands; what is common to all stands in [`global`] and
//! [`output`].
//!
//! Exit status: 0 good, 1 a check or a run failed, 2 bad usage or input, 130 after Ctrl-C. Results go to standard
//! output, everything else to standard error.

mod analyze;
mod bench;
mod build;
mod case;
mod check;
mod data;
mod devices;
mod eval;
mod experiment;
mod failure;
mod global;
mod kernels;
mod lab;
mod models;
mod occupancy;
mod output;
mod predict;
mod profile;
mod source;
mod step;
mod tensors;
mod train;
mod tune;
mod weights;

use clap::{Parser, Subcommand};
use global::Global;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use tilewright::Result;

/// Set by the first Ctrl-C of a command that ends in order (see [`end_in_order`]).
pub static STOP: AtomicBool = AtomicBool::new(false);

/// Whether the command under way looks at [`STOP`].
static IN_ORDER: AtomicBool = AtomicBool::new(false);

/// Says that the command under way looks at [`STOP`] and ends in order by itself: the first Ctrl-C sets it, the second
/// ends the program. Other commands end at the first.
pub fn end_in_order() -> &'static AtomicBool {
    IN_ORDER.store(true, Ordering::Relaxed);
    &STOP
}

/// Trains, fine-tunes, takes apart and times image classifiers with hand-written kernels.
#[derive(Parser)]
#[command(
    name = "tilewright",
    version,
    max_term_width = 110,
    subcommand_required = true
)]
#[command(after_help = "Examples:
  tilewright models
  tilewright predict -m resnet18 -w resnet18.safetensors cat.jpg
  tilewright eval -m resnet20 -w resnet20.safetensors -d cifar10:data/cifar-10-batches-bin

Exit status: 0 good; 1 a run or a check failed; 2 bad usage or input; 130 interrupted.")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The CPU and the adapters found, what each can do, and why a backend is absent
    Devices(devices::Devices),
    /// Every model known by name, with its parameters and multiply-adds
    Models(models::Models),
    /// One model, layer by layer, at a resolution
    Info(models::Info),
    /// Contents of weight files
    Weights(weights::Weights),
    /// Data sets: what there is, whether it is whole, download
    Data(data::Data),
    /// The most likely classes of images
    Predict(predict::Predict),
    /// Accuracy, loss, per-class metrics and confusion matrix on a data set
    Eval(eval::Eval),
    /// Train from scratch or from weights; several models side by side in one report
    Train(Box<train::Train>),
    /// A whole comparison: a matrix of runs, and a page about them
    Experiment(Box<experiment::ExperimentCommand>),
    /// Tensors through a model: logits or features, and taps
    Forward(tensors::Forward),
    /// Loss and every gradient for labelled tensors
    Grad(tensors::Grad),
    /// The CUDA kernels compiled to files, with what launches them: for disassemblers and for a look
    Kernels(kernels::Kernels),
    /// Every kernel against its float64 reference, and every gradient against finite differences
    Check(check::Check),
    /// What a network looks at, what its layers hold, and where it errs
    #[command(subcommand)]
    Analyze(analyze::Analyze),
    /// Time of training and inference steps, against the device's measured limits
    Bench(Box<bench::Bench>),
    /// One step, launch by launch: what to fix first, memory over time, a trace for Perfetto
    Profile(Box<profile::ProfileCommand>),
    /// Edit a kernel and see: compiled, checked and measured on every save
    Lab(lab::Lab),
    /// The fastest kernel variant per op and shape on this device, into a file that --tuned applies
    Tune(tune::Tune),
}

fn run(cli: Cli) -> Result<ExitCode> {
    cli.global.start()?;
    let g = &cli.global;
    match cli.command {
        Command::Devices(c) => c.run(g),
        Command::Models(c) => c.run(g),
        Command::Info(c) => c.run(g),
        Command::Weights(c) => c.run(g),
        Command::Data(c) => c.run(g),
        Command::Predict(c) => c.run(g),
        Command::Eval(c) => c.run(g),
        Command::Train(c) => c.run(g),
        Command::Experiment(c) => c.run(g),
        Command::Forward(c) => c.run(g),
        Command::Grad(c) => c.run(g),
        Command::Kernels(c) => c.run(g),
        Command::Check(c) => c.run(g),
        Command::Analyze(c) => c.run(g),
        Command::Bench(c) => c.run(g),
        Command::Profile(c) => c.run(g),
        Command::Lab(c) => c.run(g),
        Command::Tune(c) => c.run(g),
    }
}

/// The whole program.
pub fn main() -> ExitCode {
    failure::guard(|| {
        // Without a handler Ctrl-C ends the program just the same, only with another status.
        let _ = ctrlc::set_handler(|| {
            if IN_ORDER.load(Ordering::Relaxed) && !STOP.swap(true, Ordering::Relaxed) {
                output::note("interrupted: ending in order; Ctrl-C again ends at once");
            } else {
                output::leave(130);
            }
        });
        let cli = match Cli::try_parse() {
            Ok(cli) => cli,
            Err(e) => return failure::usage(&e),
        };
        run(cli).unwrap_or_else(|e| {
            output::note(&format!("error: {e}"));
            ExitCode::from(e.exit_code() as u8)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn look(c: &clap::Command, path: &str) {
            if c.get_subcommands().next().is_none() {
                let help = c
                    .get_after_help()
                    .map(ToString::to_string)
                    .unwrap_or_default();
                assert!(help.contains("tilewright "), "{path} has no example");
            }
            for sub in c.get_subcommands() {
                look(sub, &format!("{path} {}", sub.get_name()));
            }
        }
        look(&Cli::command(), "tilewright");
    }
}
