//! `predict`.

use super::global::Global;
use super::output::{json, note, print};
use super::source::{ModelArgs, PreprocessArgs, Source, positive, softmax};
use clap::Args;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tilewright::data::{Preprocess, decode_file};
use tilewright::{Error, Result};

/// Most images in one run of the network.
const BATCH: usize = 16;

/// The most likely classes of images. An image that cannot be read is named on standard error, the others are
/// answered all the same, and the exit status is 2.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright predict -m resnet18 -w resnet18.safetensors --classes-file imagenet.txt cat.jpg dog.png
  tilewright predict -w runs/digits scan.png --top 3")]
pub struct Predict {
    #[command(flatten)]
    source: ModelArgs,
    #[command(flatten)]
    preprocess: PreprocessArgs,
    /// How many classes to show
    #[arg(long, default_value = "5", value_name = "K", value_parser = positive)]
    top: usize,
    /// Text file with the name of a class on each line, in order [default: names in the weights' metadata, else numbers]
    #[arg(long, value_name = "FILE")]
    classes_file: Option<PathBuf>,
    /// Image files: JPEG, PNG, BMP, GIF, WebP, TIFF, PNM
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Class {
    class: usize,
    name: String,
    probability: f64,
}

#[derive(Serialize)]
struct Prediction {
    image: String,
    top: Vec<Class>,
}

fn read_names(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::reading(path, e))?;
    Ok(text.lines().map(|l| l.trim().to_string()).collect())
}

fn read_image(path: &Path, preprocess: &Preprocess) -> Result<Vec<f32>> {
    let image = decode_file(path)?;
    preprocess
        .apply(&image)
        .map_err(|e| e.context(path.display()))
}

fn best(logits: &[f32], k: usize, names: Option<&[String]>) -> Vec<Class> {
    let p = softmax(logits);
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    let class = |&i: &usize| Class {
        class: i,
        name: names.map_or_else(|| i.to_string(), |n| n[i].clone()),
        probability: p[i],
    };
    order.iter().take(k).map(class).collect()
}

impl Predict {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let source = Source::open(g, &self.source)?;
        let preprocess = source.preprocess(&self.preprocess, None)?;
        let given = self.classes_file.as_deref().map(read_names).transpose()?;
        let mut readable = vec![];
        let mut pixels = vec![];
        let mut errors = vec![];
        // Images are small beside a network: all are decoded before any is answered.
        let read = |path: &PathBuf| read_image(path, &preprocess);
        let decoded: Vec<Result<Vec<f32>>> = match self.images.as_slice() {
            [one] => vec![read(one)],
            many => many.par_iter().map(read).collect(),
        };
        for (path, image) in self.images.iter().zip(decoded) {
            match image {
                Ok(p) => {
                    readable.push(path.display().to_string());
                    pixels.push(p);
                }
                Err(e) => {
                    note(&format!("error: {e}"));
                    errors.push(e.to_string());
                }
            }
        }
        if pixels.is_empty() {
            return Ok(ExitCode::from(2));
        }
        let backend = g.open_backend()?;
        let batch = pixels.len().min(BATCH);
        let mut session = source.session(backend.as_ref(), batch, preprocess.size, None)?;
        let classes = session.outputs();
        let names = given.as_deref().or(source.class_names());
        if let Some(n) = names.filter(|n| n.len() != classes) {
            return Err(Error::input(format!(
                "{} class names for the {classes} classes of {} with {}",
                n.len(),
                source.model.id,
                source.weights()
            )));
        }
        let mut predictions = vec![];
        let mut input = vec![0.0; batch * pixels[0].len()];
        for (chunk, paths) in pixels.chunks(batch).zip(readable.chunks(batch)) {
            for (to, from) in input.chunks_mut(pixels[0].len()).zip(chunk) {
                to.copy_from_slice(from);
            }
            let logits = session.run(&input)?;
            for (row, path) in logits.chunks(classes).zip(paths) {
                if row.iter().any(|v| v.is_nan()) {
                    return Err(Error::run(format!(
                        "{path}: the logits hold NaN; are the weights damaged?"
                    )));
                }
                predictions.push(Prediction {
                    image: path.clone(),
                    top: best(row, self.top, names),
                });
            }
        }
        if g.json {
            json(&json!({
                "model": source.model.id,
                "weights": source.weights(),
                "backend": backend.name(),
                "preprocess": preprocess,
                "predictions": predictions,
                "errors": errors,
            }))?;
        } else {
            print(&text(&predictions))?;
        }
        Ok(ExitCode::from(if errors.is_empty() { 0 } else { 2 }))
    }
}

fn text(predictions: &[Prediction]) -> String {
    let mut out = String::new();
    for p in predictions {
        let _ = writeln!(out, "{}", p.image);
        for c in &p.top {
            let number = c.class.to_string();
            let name = match c.name == number {
                true => number,
                false => format!("{} ({number})", c.name),
            };
            let _ = writeln!(out, "  {:6.2} %  {name}", 100.0 * c.probability);
        }
    }
    out
}
