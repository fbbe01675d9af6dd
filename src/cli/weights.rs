//! `weights list`, `fetch`, `inspect` and `convert`.

use super::global::Global;
use super::output::{json, note, print};
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::models::find;
use tilewright::report::table::{Table, si};
use tilewright::weights::convert::{Library, convert, model_of};
use tilewright::weights::hub::Hub;
use tilewright::weights::load::{classes_of, identify};
use tilewright::weights::registry::{self, Record};
use tilewright::weights::{Dtype, FloatFormat, WeightFile, save};
use tilewright::{Error, Result};

/// Weights that are known and how to get them, contents of weight files, other libraries' names.
#[derive(Args)]
pub struct Weights {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    List(List),
    Fetch(Fetch),
    Inspect(Inspect),
    Convert(Convert),
}

impl Weights {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        match self.command {
            Command::List(c) => c.run(g),
            Command::Fetch(c) => c.run(g),
            Command::Inspect(c) => c.run(g),
            Command::Convert(c) => c.run(g),
        }
    }
}

/// The known weights: network, accuracy, licence, and which of them are here; or the weight files of a folder, and which
/// network each seems to hold
#[derive(Args)]
#[command(after_help = "Examples:\n  tilewright weights list\n  tilewright weights list ~/models")]
struct List {
    /// Folder to look in (not below it) [default: the registry]
    #[arg(value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Another registry than the built-in one
    #[arg(long, value_name = "FILE", conflicts_with = "dir")]
    registry: Option<PathBuf>,
}

/// Gets known weights from the Hugging Face hub into its own cache, where Python finds them too. What is there is not
/// fetched again; a download that broke off goes on where it stopped. The hub's variables hold: HF_HUB_CACHE, HF_HOME,
/// HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright weights fetch resnet50.tv_in1k
  tilewright predict -w resnet50.tv_in1k cat.jpg")]
struct Fetch {
    /// A name, repository or network of `weights list`
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
    /// Another registry than the built-in one
    #[arg(long, value_name = "FILE")]
    registry: Option<PathBuf>,
}

impl Fetch {
    fn run(self, g: &Global) -> Result<ExitCode> {
        let all = registry::records(self.registry.as_deref())?;
        let hub = Hub::from_env();
        let wanted = self.names.iter().map(|name| {
            registry::find(&all, name).ok_or_else(|| {
                Error::input(format!(
                    "no weights are called {name:?}; `tilewright weights list` has all {}",
                    all.len()
                ))
            })
        });
        let wanted: Vec<&Record> = wanted.collect::<Result<_>>()?;
        let mut rows = vec![];
        for r in wanted {
            let path = hub.fetch(&r.repo, &r.file, r.sha256.as_deref())?;
            if !g.json {
                print(&format!("{}: {}\n", r.name, path.display()))?;
            }
            rows.push(json!({"name": r.name, "path": path}));
        }
        if g.json {
            json(&rows)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    Torchvision,
    Timm,
    Hf,
}

/// The same weights under another library's names, so that its load_state_dict takes them; floats stay as they are unless
/// --dtype says otherwise
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright weights convert swin_t.safetensors --to timm -o swin_timm.safetensors
  tilewright weights convert vit.safetensors --to hf --dtype f16 -o vit-f16.safetensors")]
struct Convert {
    /// The safetensors file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Whose names
    #[arg(long, value_name = "LIBRARY")]
    to: To,
    /// f32, f16 or bf16 [default: the file's]
    #[arg(long, value_name = "TYPE")]
    dtype: Option<FloatFormat>,
    /// The file that is written
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// The network [default: what the file tells]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<String>,
}

impl Convert {
    fn run(self, g: &Global) -> Result<ExitCode> {
        let file = WeightFile::open(&self.file)?;
        let model = match &self.model {
            Some(name) => find(name)?,
            None => model_of(&file)?,
        };
        let library = match self.to {
            To::Torchvision => Library::Torchvision,
            To::Timm => Library::Timm,
            To::Hf => Library::Hf,
        };
        let (tensors, dropped) = convert(&model, &file, library)?;
        let stored = file.entries().iter().find(|e| e.is_float());
        let floats = self.dtype.unwrap_or(match stored.map(|e| e.dtype) {
            Some(Dtype::F16) => FloatFormat::F16,
            Some(Dtype::BF16) => FloatFormat::BF16,
            _ => FloatFormat::F32,
        });
        save(&self.output, &tensors, &BTreeMap::new(), floats)?;
        for name in &dropped {
            note(&format!("{name} has no name there and is left out"));
        }
        if g.json {
            json(&json!({
                "model": model.id, "output": self.output, "tensors": tensors.len(), "dropped": dropped,
            }))?;
        } else {
            print(&format!(
                "{}: {} tensors written to {}\n",
                model.id,
                tensors.len(),
                self.output.display()
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }
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
        match &self.dir {
            Some(dir) => Self::folder(g, dir),
            None => Self::known(g, &registry::records(self.registry.as_deref())?),
        }
    }

    fn known(g: &Global, all: &[Record]) -> Result<ExitCode> {
        let hub = Hub::from_env();
        let mut t = Table::new([
            "weights", "model", "px", "classes", "top-1", "licence", "here",
        ]);
        t = t.left(&[0, 1, 5, 6]);
        let mut rows = vec![];
        for r in all {
            let path = r.cached(&hub);
            t.row([
                r.name.clone(),
                r.model.clone(),
                r.image_size.to_string(),
                match r.classes {
                    0 => "-".into(),
                    n => n.to_string(),
                },
                r.top1.map_or("-".into(), |t| format!("{t:.1}")),
                r.license.clone(),
                if path.is_some() { "yes" } else { "" }.into(),
            ]);
            let mut row = serde_json::to_value(r).map_err(|e| Error::run(e.to_string()))?;
            row["path"] = json!(path);
            rows.push(row);
        }
        match g.json {
            true => json(&rows)?,
            false => print(&t.to_text())?,
        }
        Ok(ExitCode::SUCCESS)
    }

    fn folder(g: &Global, dir: &Path) -> Result<ExitCode> {
        let mut rows = vec![];
        let mut t = Table::new(["file", "parameters", "bytes", "holds"]).left(&[0, 3]);
        let mut broken = false;
        for path in weight_files(dir)? {
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
