//! `devices`.

use super::global::{Global, default_backend};
use super::output::{json, print};
use clap::Args;
use serde_json::{Value, json};
use std::fmt::Write;
use std::process::ExitCode;
use tilewright::Result;
use tilewright::backend::Backend;
use tilewright::backend::cpu::Cpu;
use tilewright::backend::cuda::{Nvrtc, cuda_devices};
use tilewright::backend::wgpu::{AdapterReport, adapters};

/// What there is to compute on.
#[derive(Args)]
#[command(after_help = "Example:\n  tilewright devices --json")]
pub struct Devices {}

fn adapter_json(a: &AdapterReport) -> Value {
    let t = &a.traits;
    json!({
        "name": a.name,
        "kind": a.kind,
        "api": a.api,
        "driver": a.driver,
        "subgroups": t.subgroups,
        "subgroup_size": [t.subgroup_size.0, t.subgroup_size.1],
        "f16": t.f16,
        "timestamps": t.timestamps,
        "max_binding_bytes": t.max_binding,
        "max_buffer_bytes": t.max_buffer,
        "workgroup_memory_bytes": t.workgroup_memory,
    })
}

fn adapter_text(out: &mut String, a: &AdapterReport) {
    let t = &a.traits;
    let mut can = vec![];
    if t.subgroups {
        let (low, high) = t.subgroup_size;
        can.push(match low == high {
            true => format!("subgroups of {low}"),
            false => format!("subgroups of {low} to {high}"),
        });
    }
    if t.f16 {
        can.push("f16".into());
    }
    if t.timestamps {
        can.push("timestamps".into());
    }
    can.push(format!("bindings to {} MiB", t.max_binding >> 20));
    can.push(format!("buffers to {} MiB", t.max_buffer >> 20));
    can.push(format!(
        "{} KiB of workgroup memory",
        t.workgroup_memory >> 10
    ));
    let _ = writeln!(
        out,
        "wgpu  {} ({}, {}, {})",
        a.name, a.kind, a.api, a.driver
    );
    let _ = writeln!(out, "      {}", can.join(", "));
}

impl Devices {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let cpu = Cpu::new().device();
        let default = default_backend();
        let found = adapters();
        if g.json {
            let wgpu = match &found {
                Ok(list) => json!({
                    "name": "wgpu",
                    "available": true,
                    "adapters": list.iter().map(adapter_json).collect::<Vec<_>>(),
                }),
                Err(e) => {
                    json!({"name": "wgpu", "available": false, "reason": e.to_string(), "adapters": []})
                }
            };
            let devices = cuda_devices();
            let nvrtc = Nvrtc::get();
            let cuda = json!({
                "name": "cuda",
                "available": devices.is_ok() && nvrtc.is_ok(),
                "reason": devices.as_ref().err().map(ToString::to_string),
                "devices": devices.as_deref().unwrap_or_default(),
                "nvrtc": match &nvrtc {
                    Ok(n) => json!({"version": n.version_text(), "path": n.path()}),
                    Err(e) => json!({"reason": e.to_string()}),
                },
            });
            let sim = json!({"name": "cuda:sim", "available": nvrtc.is_ok()});
            json(&json!({
                "default": default,
                "backends": [
                    {"name": "cpu", "available": true, "device": cpu, "threads": rayon::current_num_threads()},
                    wgpu,
                    cuda,
                    sim,
                ],
            }))?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut out = format!("cpu   {cpu}\n");
        match &found {
            Ok(list) => list.iter().for_each(|a| adapter_text(&mut out, a)),
            Err(e) => {
                let _ = writeln!(out, "wgpu  absent: {e}");
            }
        }
        match cuda_devices() {
            Ok(list) => list.iter().enumerate().for_each(|(i, d)| {
                let _ = writeln!(out, "cuda  {i}: {d}");
            }),
            Err(e) => {
                let _ = writeln!(out, "cuda  absent: {e}");
            }
        }
        let _ = match Nvrtc::get() {
            Ok(n) => writeln!(
                out,
                "      NVRTC {} at {}; cuda:sim runs the CUDA kernels on the processor, to check them",
                n.version_text(),
                n.path().display()
            ),
            Err(e) => writeln!(out, "      {e}"),
        };
        let why = match (default, &found) {
            ("cpu", Ok(_)) => {
                " (the adapters above compute on the processor, and its own backend does that faster)"
            }
            _ => "",
        };
        let _ = writeln!(out, "\nWithout --backend, {default} is used{why}.");
        print(&out)?;
        Ok(ExitCode::SUCCESS)
    }
}
