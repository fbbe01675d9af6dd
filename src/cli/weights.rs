//! `weights list` and `weights inspect`.

use super::global::Global;
use super::output::{json, note, print};
use clap::{Args, Subcommand};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::report::table::{Table, si};
use tilewright::weights::WeightFile;
use tilewright::weights::load::{classes_of, identify};
use tilewright::{Error, Result};

/// Contents of weight files.
#[derive(Args)]
pub struct Weights {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    List(List),
    Inspect(Inspect),
}

impl Weights {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        match self.command {
            Command::List(c) => c.run(g),
            Command::Inspect(c) => c.run(g),
        }
    }
}

/// The weight files of a folder, and which network each seems to hold
#[derive(Args)]
#[command(after_help = "Example:\n  tilewright weights list ~/models")]
struct List {
    /// Folder to look in (not below it)
    #[arg(default_value = ".", value_name = "DIR")]
    dir: PathBuf,
}

fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![];
    for entry in std::fs::read_dir(dir).map_err(|e| Error::reading(dir, e))? {
        let path = entry.map_err(|e| Error::reading(dir, e))?.path();
        if path.extension().is_some_and(|x| x == "safetensors") {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(Error::input(format!(
            "no .safetensors file in {}",
            dir.display()
        )));
    }
    Ok(found)
}

impl List {
    fn run(self, g: &Global) -> Result<ExitCode> {
        let mut rows = vec![];
        let mut t = Table::new(["file", "parameters", "bytes", "holds"]).left(&[0, 3]);
        let mut broken = false;
        for path in weight_files(&self.dir)? {
            let file = match WeightFile::open(&path) {
                Ok(f) => f,
                Err(e) => {
                    broken = true;
                    note(&format!("error: {e}"));
                    continue;
                }
            };
            let found = file.inspect();
            let holds = identify(&file);
            t.row([
                path.file_name()
                    .unwrap_or_default()
                    .to_string_lossy()
                    .into_owned(),
                si(found.parameters as f64),
                found.file_bytes.to_string(),
                holds
                    .clone()
                    .unwrap_or_else(|| "names like no network known here".into()),
            ]);
            rows.push(json!({
                "path": found.path, "parameters": found.parameters, "bytes": found.file_bytes,
                "holds": holds, "classes": classes_of(&file),
            }));
        }
        match g.json {
            true => json(&rows)?,
            false => print(&t.to_text())?,
        }
        Ok(ExitCode::from(if broken { 2 } else { 0 }))
    }
}

/// Every tensor of a safetensors file, the totals, and which network it seems to hold
#[derive(Args)]
#[command(after_help = "Example:\n  tilewright weights inspect resnet18.safetensors")]
struct Inspect {
    /// The safetensors file
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Inspect {
    fn run(self, g: &Global) -> Result<ExitCode> {
        let file = WeightFile::open(&self.file)?;
        let found = file.inspect();
        let holds = identify(&file);
        if g.json {
            let mut v = serde_json::to_value(&found).map_err(|e| Error::run(e.to_string()))?;
            v["holds"] = json!(holds);
            v["classes"] = json!(classes_of(&file));
            json(&v)?;
        } else {
            let holds = match holds {
                Some(h) => format!("It looks like {h}.\n"),
                None => "Its entries are named like no network known here.\n".into(),
            };
            print(&format!("{found}{holds}"))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
