//! `data list`, `data verify`, `data fetch`, `data pack` and `data build`.

use super::build::{BUILD_HELP, BuildArgs};
use super::global::Global;
use super::output::{json, print};
use super::source::positive;
use clap::{Args, Subcommand};
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::Result;
use tilewright::data::{self, OpenOptions};
use tilewright::report::table::Table;

/// Data sets: what there is, whether it is whole, download.
#[derive(Args)]
pub struct Data {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The data sets that can be named, and which are there
    #[command(after_help = "Example:\n  tilewright data list")]
    List,
    /// Read every image to its end and name each broken file (exit status 1 where there is one)
    #[command(after_help = "Example:\n  tilewright data verify folder:photos")]
    Verify {
        /// digits, synthetic[:CLASSESxSIZE], cifar10[:DIR], cifar100[:DIR], tiny-imagenet[:DIR], folder:DIR or shards:DIR
        #[arg(value_name = "DATA")]
        data: String,
    },
    /// Download cifar10, cifar100 or tiny-imagenet from its home page, with checksum; a broken download goes on
    #[command(after_help = "Example:\n  tilewright data fetch cifar10")]
    Fetch {
        /// cifar10[:DIR], cifar100[:DIR] or tiny-imagenet[:DIR]
        #[arg(value_name = "DATA")]
        data: String,
    },
    /// From a table of URLs and labels to shards: downloads, checks, resizes; goes on where it was stopped
    #[command(after_help = BUILD_HELP)]
    Build(Box<BuildArgs>),
    /// Write any data set as shards: tar files that WebDataset reads, and `-d shards:DIR`
    #[command(after_help = "Example:\n  tilewright data pack -d folder:photos -o photo-shards")]
    Pack {
        /// The data set (see `tilewright data list`)
        #[arg(short, long, value_name = "DATA")]
        data: String,
        /// Folder for the shards
        #[arg(short, long, value_name = "DIR")]
        output: PathBuf,
        /// Images in a shard
        #[arg(long, value_name = "N", default_value_t = 1000, value_parser = positive)]
        per_shard: usize,
    },
}

impl Data {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        match self.command {
            Command::List => list(g),
            Command::Verify { data } => verify(g, &data),
            Command::Fetch { data } => fetch(g, &data),
            Command::Build(args) => args.run(g),
            Command::Pack {
                data,
                output,
                per_shard,
            } => pack(g, &data, &output, per_shard),
        }
    }
}

fn list(g: &Global) -> Result<ExitCode> {
    let found = data::list();
    if g.json {
        json(&found)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut t = Table::new(["data", "classes", "px", "what", "where"]).left(&[0, 3, 4]);
    let count = |n: usize| if n == 0 { "any".into() } else { n.to_string() };
    for l in found {
        let place = match (&l.found, l.fetch) {
            (Some(p), _) => p.display().to_string(),
            (None, true) => "not here; `data fetch` downloads it".into(),
            (None, false) => String::new(),
        };
        t.row([
            l.spec.to_string(),
            count(l.classes),
            count(l.size as usize),
            l.about.to_string(),
            place,
        ]);
    }
    print(&t.to_text())?;
    Ok(ExitCode::SUCCESS)
}

fn verify(g: &Global, spec: &str) -> Result<ExitCode> {
    let r = data::verify(spec)?;
    if g.json {
        json(&r)?;
    } else {
        let mut out = String::new();
        for b in &r.bad {
            let _ = writeln!(out, "broken: {b}");
        }
        for n in &r.notes {
            let _ = writeln!(out, "note: {n}");
        }
        let _ = writeln!(
            out,
            "{}: {} training and {} test images of {} classes are whole, {} files are broken",
            r.spec,
            r.train,
            r.test,
            r.classes,
            r.bad.len()
        );
        print(&out)?;
    }
    Ok(ExitCode::from(u8::from(!r.bad.is_empty())))
}

fn fetch(g: &Global, spec: &str) -> Result<ExitCode> {
    let place = data::fetch(spec)?;
    match g.json {
        true => json(&json!({"data": spec, "path": place}))?,
        false => print(&format!("{spec} is in {}\n", place.display()))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn pack(g: &Global, spec: &str, dir: &Path, per_shard: usize) -> Result<ExitCode> {
    let r = data::pack(spec, dir, per_shard, OpenOptions { seed: g.seed })?;
    for bad in r.bad.iter().take(3) {
        g.remark(&format!("left out: {bad}"));
    }
    if r.bad.len() > 3 {
        g.remark(&format!("and {} more are left out", r.bad.len() - 3));
    }
    match g.json {
        true => json(&r)?,
        false => print(&format!(
            "{}: {} training and {} test images in {} shards, {:.1} MB, {} left out\ntilewright train -d shards:{0}\n",
            dir.display(),
            r.train,
            r.test,
            r.shards,
            r.bytes as f64 / 1e6,
            r.bad.len()
        ))?,
    }
    Ok(ExitCode::SUCCESS)
}
