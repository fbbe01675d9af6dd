//! `models` and `info`.

use super::global::Global;
use super::output::{json, print};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::fmt::Write;
use std::process::ExitCode;
use std::sync::Arc;
use tilewright::backend::CompileOptions;
use tilewright::graph::fuse::{Purpose, fuse};
use tilewright::graph::{Mode, Spec};
use tilewright::models::{ALIASES, Family, Model, ModelOptions, find, info::info, list};
use tilewright::report::table::{Table, si};
use tilewright::{Error, Result};

fn family(f: Family) -> &'static str {
    match f {
        Family::Cnn => "CNN",
        Family::Vit => "ViT",
    }
}

/// Every model known by name. GMACs are 10^9 multiply-adds of convolutions, linear layers and attention for one image
/// of the default size, as torchvision's and timm's tables count; GFLOPs count all floating-point operations, a
/// multiply-add as 2.
#[derive(Args)]
#[command(after_help = "Example:\n  tilewright models

A ViT of any size is written as a spec: vit:patch=4,dim=256,depth=8,heads=2,mlp=2 (also classes=, img=).
One with fewer blocks: resnet50:stages=3, vit_base_patch16_224:depth=8.")]
pub struct Models {}

impl Models {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let mut rows = vec![];
        for m in list() {
            let i = info(&m, 1, (m.image, m.image), &ModelOptions::default())?;
            let aliases: Vec<&str> = ALIASES
                .iter()
                .filter(|a| a.1 == m.id)
                .map(|a| a.0)
                .collect();
            rows.push((m, i, aliases));
        }
        if g.json {
            let rows: Vec<_> = rows
                .iter()
                .map(|(m, i, aliases)| {
                    json!({
                        "id": m.id, "aliases": aliases, "family": m.family(), "image_size": m.image,
                        "classes": m.classes, "params": i.params, "macs": i.macs, "flops": i.flops,
                    })
                })
                .collect();
            json(&rows)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut t = Table::new([
            "model",
            "family",
            "px",
            "classes",
            "params",
            "GMACs",
            "GFLOPs",
            "also called",
        ])
        .left(&[0, 1, 7]);
        for (m, i, aliases) in &rows {
            t.row([
                m.id.clone(),
                family(m.family()).into(),
                m.image.to_string(),
                if m.classes == 0 {
                    "-".into()
                } else {
                    m.classes.to_string()
                },
                si(i.params as f64),
                format!("{:.3}", i.macs as f64 / 1e9),
                format!("{:.3}", i.flops as f64 / 1e9),
                aliases.join(", "),
            ]);
        }
        print(&t.to_text())?;
        Ok(ExitCode::SUCCESS)
    }
}

/// What a memory plan is for.
#[derive(Clone, Copy, ValueEnum)]
enum PlanOf {
    /// Forward only, batch norm folded.
    Inference,
    /// Loss and every gradient.
    Gradients,
}

/// One model, layer by layer: results, parameters, multiply-adds. MACs are those of convolutions, linear layers and
/// attention; FLOPs count all floating-point operations, a multiply-add as 2.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright info resnet50 --image-size 288
  tilewright info vit:patch=4,dim=256,depth=8,heads=2,mlp=2 --classes 100 --batch 32 --plan=gradients")]
pub struct Info {
    /// Model id, alias or spec string
    #[arg(value_name = "MODEL")]
    model: String,
    /// Side of the images in pixels [default: the model's own]
    #[arg(long, value_name = "PX")]
    image_size: Option<usize>,
    /// Size of the classifier; 0: features only [default: the model's own]
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Images in a batch
    #[arg(long, default_value_t = 1, value_name = "N")]
    batch: usize,
    /// Print where every tensor lives, and the peak, on the backend
    #[arg(long, value_name = "OF", num_args = 0..=1, require_equals = true, default_missing_value = "inference")]
    plan: Option<PlanOf>,
}

impl Info {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let model = find(&self.model)?;
        let side = self.image_size.unwrap_or(model.image);
        let options = ModelOptions {
            classes: self.classes,
            ..ModelOptions::default()
        };
        let info = info(&model, self.batch, (side, side), &options)?;
        let plan = self
            .plan
            .map(|of| self.plan_text(g, &model, side, &options, of))
            .transpose()?;
        if g.json {
            let mut v = serde_json::to_value(&info).map_err(|e| Error::run(e.to_string()))?;
            if let Some((_, plan)) = plan {
                v["plan"] = plan;
            }
            json(&v)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut t =
            Table::new(["layer", "op", "output", "params", "MACs", "FLOPs"]).left(&[0, 1, 2]);
        let count = |n: f64| if n == 0.0 { "-".into() } else { si(n) };
        for l in &info.layers {
            t.row([
                l.scope.clone(),
                l.op.into(),
                format!("{:?}", l.output),
                if l.params == 0 {
                    "-".into()
                } else {
                    l.params.to_string()
                },
                count(l.macs as f64),
                count(l.flops as f64),
            ]);
        }
        let mut out = t.to_text();
        let _ = writeln!(
            out,
            "\n{} ({}): {:?} to {:?}\n{} parameters ({:.1} MB in float32), {} elements of running statistics\n\
             {} multiply-adds, {} floating-point operations in a forward pass of {}",
            info.model,
            family(info.family),
            info.input,
            info.output,
            info.params,
            info.params as f64 * 4.0 / 1e6,
            info.buffers,
            si(info.macs as f64),
            si(info.flops as f64),
            if self.batch == 1 {
                "one image".into()
            } else {
                format!("{} images", self.batch)
            },
        );
        if let Some((text, _)) = plan {
            let _ = write!(out, "\n{text}");
        }
        print(&out)?;
        Ok(ExitCode::SUCCESS)
    }

    /// The memory plan, for people and as JSON.
    fn plan_text(
        &self,
        g: &Global,
        model: &Model,
        side: usize,
        options: &ModelOptions,
        of: PlanOf,
    ) -> Result<(String, serde_json::Value)> {
        let backend = g.open_backend()?;
        let training = matches!(of, PlanOf::Gradients);
        let mode = Mode {
            batch_stats: training,
            ..Mode::default()
        };
        let mut net = model.net(self.batch, (side, side), mode, options)?;
        let mut graph = net.graph;
        if training {
            let logits = net.heads.logits.take().ok_or_else(|| {
                Error::input(format!(
                    "{} has no classifier, so there is no loss; give --classes N",
                    model.id
                ))
            })?;
            let labels = graph.input("labels", Spec::u32([self.batch]));
            let loss = graph.scoped("loss", |g| g.softmax_ce(logits, labels, None, 0.0, 0.0))?;
            graph.keep(loss);
            fuse(&mut graph, Purpose::Gradients)?;
            let grads = graph.backward(loss, &[])?;
            grads.values().for_each(|&d| graph.keep(d));
        } else {
            graph.keep(net.heads.output());
            fuse(&mut graph, Purpose::Inference)?;
        }
        let exec = backend.compile(Arc::new(graph), &CompileOptions::default())?;
        let memory = exec.memory();
        let text = format!(
            "memory plan for {} on {} (place: @arena+byte)\n{}peak: {} bytes\n",
            if training { "gradients" } else { "inference" },
            backend.name(),
            memory.describe(exec.graph()),
            memory.bytes()
        );
        let plan = json!({
            "backend": backend.name(),
            "purpose": if training { "gradients" } else { "inference" },
            "peak_bytes": memory.bytes(),
            "persistent_bytes": 4 * memory.persistent,
            "temporary_peak_bytes": 4 * memory.peak,
            "temporary_unshared_bytes": 4 * memory.unshared,
            "arena_bytes": memory.arenas.iter().map(|a| 4 * a).collect::<Vec<_>>(),
        });
        Ok((text, plan))
    }
}
