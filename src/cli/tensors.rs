//! `forward` and `grad`: tensors in, tensors out, to be held against another framework's.

use super::global::Global;
use super::output::{json, print};
use super::source::{positive, weights_path};
use clap::Args;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::models::forward::forward;
use tilewright::models::grad::{GradOptions, grad};
use tilewright::models::session::SessionOptions;
use tilewright::models::{Model, ModelOptions, find};
use tilewright::report::table::Table;
use tilewright::weights::{FloatFormat, SaveData, SaveTensor, WeightFile, save};
use tilewright::{Error, Result};

/// What both commands take.
#[derive(Args)]
struct Common {
    /// Model id, alias or spec string
    #[arg(short, long, value_name = "MODEL")]
    model: String,
    /// Its weights, safetensors
    #[arg(short, long, value_name = "FILE")]
    weights: PathBuf,
    /// safetensors with `input` [N, 3, H, W], float32, already normalised (and `labels` [N], int64, for gradients)
    #[arg(short, long, value_name = "FILE")]
    input: PathBuf,
    /// safetensors file to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Size of the classifier; 0: features only [default: the weights']
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Start with a new classifier, drawn from --seed, whatever the weights have
    #[arg(long)]
    replace_head: bool,
}

/// Refuses an output path that cannot be written, before any work is done.
///
/// # Errors
/// Its folder does not exist, or it is a folder itself.
pub fn check_writable(path: &Path) -> Result<()> {
    let dir = path
        .parent()
        .filter(|d| !d.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    if !dir.is_dir() {
        return Err(Error::input(format!(
            "cannot write {}: there is no folder {}",
            path.display(),
            dir.display()
        )));
    }
    if path.is_dir() {
        return Err(Error::input(format!(
            "cannot write {}: it is a folder",
            path.display()
        )));
    }
    Ok(())
}

impl Common {
    fn open(&self) -> Result<(Model, WeightFile, WeightFile)> {
        let model = find(&self.model)?;
        check_writable(&self.output)?;
        let weights = WeightFile::open(weights_path(&self.weights)?.0)?;
        Ok((model, weights, WeightFile::open(&self.input)?))
    }

    fn options(&self) -> ModelOptions {
        ModelOptions {
            classes: self.classes,
            ..ModelOptions::default()
        }
    }

    fn write(&self, g: &Global, backend: &str, tensors: &[SaveTensor]) -> Result<ExitCode> {
        save(&self.output, tensors, &BTreeMap::new(), FloatFormat::F32)?;
        let loss = tensors
            .iter()
            .find(|t| t.name == "loss")
            .and_then(|t| match &t.data {
                SaveData::F32(v) => v.first().copied(),
                SaveData::I64(_) => None,
            });
        if g.json {
            let rows: Vec<Value> = tensors
                .iter()
                .map(|t| json!({"name": t.name, "shape": t.shape}))
                .collect();
            let mut v = json!({"model": self.model, "backend": backend, "output": self.output, "tensors": rows});
            if let Some(loss) = loss {
                v["loss"] = json!(loss);
            }
            json(&v)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut t = Table::new(["tensor", "shape"]).left(&[0, 1]);
        for s in tensors {
            t.row([s.name.to_string(), format!("{:?}", s.shape)]);
        }
        let loss = loss.map_or(String::new(), |l| format!("loss {l}\n"));
        print(&format!(
            "{}\n{loss}{} tensors written to {}\n",
            t.to_text(),
            tensors.len(),
            self.output.display()
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Normalised images through a model: writes `logits` [N, classes] (`features` [N, dim] for a backbone) and, with
/// --taps, one tensor per stage or block, in PyTorch's axis order.
#[derive(Args)]
#[command(after_help = "Example:
  tilewright forward -m vit_b_16 -w vit_b_16.safetensors -i images.safetensors -o logits.safetensors --taps")]
pub struct Forward {
    #[command(flatten)]
    common: Common,
    /// Write the result of every stage or block too
    #[arg(long)]
    taps: bool,
    /// Images that are computed at once
    #[arg(long, default_value = "16", value_name = "N", value_parser = positive)]
    batch_size: usize,
}

impl Forward {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let (model, weights, input) = self.common.open()?;
        let options = SessionOptions {
            model: self.common.options(),
            taps: self.taps,
            replace_head: self.common.replace_head,
            seed: g.seed,
            ..SessionOptions::new(self.batch_size, (model.image, model.image))
        };
        let backend = g.open_backend()?;
        let out = forward(backend.as_ref(), &model, &weights, &input, &options)?;
        self.common.write(g, backend.name(), &out)
    }
}

/// Loss (mean cross-entropy) and gradients of labelled images, in training mode with dropout and drop path off: writes
/// `loss`, `logits`, `grad.NAME` for every parameter under the weights' own names and axis order, and the running
/// statistics after the step.
#[derive(Args)]
#[command(after_help = "Example:
  tilewright grad -m resnet18 -w resnet18.safetensors -i batch.safetensors -o gradients.safetensors")]
pub struct Grad {
    #[command(flatten)]
    common: Common,
    /// Batch norm uses its running statistics, and leaves them
    #[arg(long)]
    eval: bool,
}

impl Grad {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let (model, weights, input) = self.common.open()?;
        let options = GradOptions {
            model: self.common.options(),
            eval: self.eval,
            replace_head: self.common.replace_head,
            seed: g.seed,
        };
        let backend = g.open_backend()?;
        let out = grad(backend.as_ref(), &model, &weights, &input, &options)?;
        self.common.write(g, backend.name(), &out)
    }
}
