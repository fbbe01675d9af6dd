//! `lab ptx|sass|wgsl|spirv`: what the compiler makes of a kernel file.

use super::super::global::Global;
use super::super::output::{json, print};
use super::watch::parse_case;
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::process::{Command, ExitCode};
use tilewright::backend::cuda::{Compiler, CudaCx, Target, Traits};
use tilewright::backend::wgpu::{AdapterTraits, WgpuCx, adapters};
use tilewright::ops::check::case_graph;
use tilewright::{Error, Result};
use wgpu::naga;

/// Constants of the launches of `file` in a case; the default ones without a case.
fn constants(
    g: &Global,
    file: &str,
    case: Option<&str>,
    arch: u32,
) -> Result<Vec<(&'static str, String)>> {
    let Some(case) = case else { return Ok(vec![]) };
    let (room, params) = parse_case(case)?;
    let params = params.unwrap_or_default();
    let cg = case_graph(&room.build(&params)?, 1)?;
    let found = adapters().unwrap_or_default();
    let adapter = found
        .first()
        .map_or(AdapterTraits::default(), |a| a.traits.clone());
    let traits = Traits::assumed(arch);
    let mut sources = vec![];
    for node in &cg.graph.nodes {
        let (x, y) = cg.graph.node_specs(node);
        let mut cx = WgpuCx::new(&adapter, &x, &y, None);
        if node.op.wgpu(&mut cx).is_ok() {
            sources.extend(cx.launches.into_iter().map(|l| (l.shader, l.consts)));
        }
        let precision = g.precision.unwrap_or_default();
        let mut cx = CudaCx::new(&traits, precision, &x, &y, None);
        if node.op.cuda(&mut cx).is_ok() {
            sources.extend(cx.launches.into_iter().map(|l| (l.source, l.consts)));
        }
    }
    let found = sources.iter().find(|s| s.0 == file).map(|s| s.1.clone());
    found.ok_or_else(|| {
        let mut names: Vec<&str> = sources.iter().map(|s| s.0).collect();
        names.sort_unstable();
        names.dedup();
        Error::input(format!(
            "{case} does not launch {file}; it launches {}",
            names.join(", ")
        ))
    })
}

/// Runs a disassembler on `bytes`.
fn disassemble(tool: &str, install: &str, args: &[&str], bytes: &[u8]) -> Result<String> {
    let failed = |e: std::io::Error| Error::run(format!("{tool}: {e}"));
    let mut file = tempfile::NamedTempFile::new().map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    let run = Command::new(tool).args(args).arg(file.path()).output();
    let out = run.map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            Error::input(format!("{tool} is not here; it comes with {install}"))
        }
        _ => failed(e),
    })?;
    match out.status.success() {
        true => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
        false => Err(Error::run(format!(
            "{tool}: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        ))),
    }
}

/// Prints it.
pub fn show(g: &Global, kind: &str, file: &str, case: Option<&str>, arch: u32) -> Result<ExitCode> {
    let right = if matches!(kind, "ptx" | "sass") {
        "cu"
    } else {
        "wgsl"
    };
    if Path::new(file).extension().is_none_or(|e| e != right) {
        return Err(Error::input(format!(
            "{file}: {kind} is made of a .{right} file"
        )));
    }
    let file = if right == "cu" {
        cuda_name(g, file)?
    } else {
        wgsl_name(g, file)?
    };
    let consts = constants(g, &file, case, arch)?;
    let text = match kind {
        "ptx" | "sass" => {
            let target = match kind {
                "ptx" => Target::Ptx(arch),
                _ => Target::Cubin(arch),
            };
            let image = Compiler::new(g.cuda_options()?.source, target)?.image(&file, &consts)?;
            match kind {
                "ptx" => String::from_utf8_lossy(&image)
                    .trim_end_matches('\0')
                    .to_string(),
                _ => disassemble(
                    "nvdisasm",
                    "NVIDIA's CUDA toolkit",
                    &["--print-line-info"],
                    &image,
                )?,
            }
        }
        _ => {
            let wgsl = g.wgpu_options()?.shaders.assemble(&file, &consts)?;
            match kind {
                "wgsl" => wgsl,
                _ => {
                    let words = spirv(&file, &wgsl)?;
                    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
                    disassemble(
                        "spirv-dis",
                        "the package spirv-tools",
                        &["--no-color"],
                        &bytes,
                    )?
                }
            }
        }
    };
    match g.json {
        true => {
            let consts: Vec<String> = consts.iter().map(|(k, v)| format!("{k}={v}")).collect();
            json(&json!({"kind": kind, "file": file, "constants": consts, "text": text}))?;
        }
        false => print(&(text.trim_end().to_string() + "\n"))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn cuda_name(g: &Global, file: &str) -> Result<String> {
    let source = g.cuda_options()?.source;
    source.0.read(file).map(|_| file.to_string())
}

fn wgsl_name(g: &Global, file: &str) -> Result<String> {
    let source = g.wgpu_options()?.shaders;
    source.0.read(file).map(|_| file.to_string())
}

/// WGSL through naga, validated.
pub fn validated(file: &str, wgsl: &str) -> Result<(naga::Module, naga::valid::ModuleInfo), Fault> {
    let fault = |message: String, line: Option<u32>| Fault {
        file: file.into(),
        line,
        message,
    };
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| {
        let line = e.location(wgsl).map(|l| l.line_number);
        fault(e.message().to_string(), line)
    })?;
    let info = naga::valid::Validator::new(
        naga::valid::ValidationFlags::all(),
        naga::valid::Capabilities::all(),
    )
    .subgroup_stages(naga::valid::ShaderStages::COMPUTE)
    .subgroup_operations(naga::valid::SubgroupOperationSet::all())
    .validate(&module)
    .map_err(|e| {
        let line = e.location(wgsl).map(|l| l.line_number);
        let mut text = e.to_string();
        let mut cause = std::error::Error::source(e.as_inner());
        while let Some(c) = cause {
            text += &format!(": {c}");
            cause = c.source();
        }
        fault(text, line)
    })?;
    Ok((module, info))
}

/// What naga does not take.
#[derive(Debug)]
pub struct Fault {
    /// The shader.
    pub file: String,
    /// Line of the assembled text.
    pub line: Option<u32>,
    /// Why.
    pub message: String,
}

fn spirv(file: &str, wgsl: &str) -> Result<Vec<u32>> {
    let (module, info) =
        validated(file, wgsl).map_err(|f| Error::input(format!("{}: {}", f.file, f.message)))?;
    let options = naga::back::spv::Options::default();
    naga::back::spv::write_vec(&module, &info, &options, None)
        .map_err(|e| Error::run(format!("{file}: {e}")))
}
