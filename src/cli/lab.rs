//! `lab`.

mod app;
mod draw;
mod inspect;
mod lines;
mod probe;
mod room;
mod screen;
mod versions;
mod watch;

use super::global::{Global, default_backend};
use super::output::note;
use clap::Args;
use probe::Probe;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use tilewright::{Error, Result};

/// Edit a kernel and see: the files in `shaders/` or `kernels/` (or `--shaders DIR`, `--kernels DIR`) are watched, and on
/// every save the case's kernels are compiled, checked against the reference and measured again, beside the version
/// before and the best so far. In a terminal this is a screen with keys (? explains them, q ends it); elsewhere, and
/// with --lines, a table a save until Ctrl-C.
#[derive(Args)]
#[command(after_help = "Examples:
  tilewright lab layer_norm --backend wgpu
  tilewright lab conv2d --case n=2,h=14,c=16,k=32,r=3,pad=1 --backend cuda:sim
  tilewright lab new relu6
  tilewright lab ptx layer_norm.cu
  tilewright lab wgsl gemm_tile.wgsl --case 'linear(m=64,i=32,o=64)'

`lab new OP` writes the skeleton of an op's room: src/ops/OP.rs, shaders/OP.wgsl, kernels/OP.cu and its registry lines,
with the example of docs/add-an-op.md as its body. `lab ptx|sass|wgsl|spirv FILE` prints what the compiler makes of a
kernel file, with its default constants or with those that a case launches it with.")]
pub struct Lab {
    /// An op (or a case `op(key=value,...)`) to work on; or one of new, ptx, sass, wgsl, spirv
    #[arg(value_name = "OP|new|ptx|sass|wgsl|spirv")]
    what: String,
    /// The new op's name, or a kernel's file
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// The op's case: its parameters [default: the op's first of middling size]
    #[arg(long, value_name = "PARAMS")]
    case: Option<String>,
    /// Compute capability, as in sm_90, of ptx and sass
    #[arg(long, default_value_t = 80, value_name = "N")]
    arch: u32,
    /// Check and measure once and end
    #[arg(long)]
    once: bool,
    /// Print lines in a terminal too
    #[arg(long)]
    lines: bool,
    /// End after this many saves
    #[arg(long, value_name = "N", hide = true)]
    saves: Option<usize>,
}

impl Lab {
    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let name = |what: &str| {
            self.name
                .as_deref()
                .ok_or_else(|| Error::input(format!("`lab {}` needs {what}", self.what)))
        };
        match self.what.as_str() {
            "new" => room::new(g, name("the op's name")?),
            kind @ ("ptx" | "sass" | "wgsl" | "spirv") => {
                let file = name("a kernel's file, as layer_norm.cu or layer_norm.wgsl")?;
                inspect::show(g, kind, file, self.case.as_deref(), self.arch)
            }
            _ => self.watch(g),
        }
    }

    fn watch(&self, g: &Global) -> Result<ExitCode> {
        let probe = self.probe(g)?;
        let saves = if self.once { Some(0) } else { self.saves };
        if !(self.lines || self.once || g.json) && screen::possible() {
            return screen::run(probe, saves);
        }
        note(&format!(
            "{}({}) on {}: watching {}; Ctrl-C ends",
            probe.room.name,
            probe.params,
            probe.name,
            probe.dir.display()
        ));
        // Nobody orders anything, and nobody goes away.
        let (_nobody, orders) = channel();
        let mut seen = versions::Versions::default();
        let good = watch::watch(probe, saves, &orders, &mut |event| match event {
            watch::Event::Done(version) => {
                seen.all.push(version);
                lines::print_version(&seen, g.json)
            }
            _ => Ok(()),
        })?;
        Ok(ExitCode::from(u8::from(!good)))
    }

    /// What is looked at, by the flags.
    fn probe(&self, g: &Global) -> Result<Probe> {
        let (room, params) = watch::parse_case(&self.what)?;
        let params = match self.case.clone().or(params) {
            Some(p) => p,
            None => watch::middling(room),
        };
        room.build(&params)?;
        let name = match &g.backend {
            Some(name) => name.clone(),
            None if default_backend() == "cuda" => "cuda".into(),
            None => "wgpu".into(),
        };
        let cuda = name.starts_with("cuda");
        if !cuda && !name.starts_with("wgpu") {
            return Err(Error::input(format!(
                "lab watches device kernels: --backend wgpu, cuda or cuda:sim, not {name}; Rust is rebuilt by cargo"
            )));
        }
        let (given, default) = match cuda {
            true => (&g.kernels, "kernels"),
            false => (&g.shaders, "shaders"),
        };
        let dir = given.clone().unwrap_or_else(|| default.into());
        if !dir.is_dir() {
            return Err(Error::input(format!(
                "{}: not a folder; run `lab` in a checkout of the sources or give --{default} DIR",
                dir.display()
            )));
        }
        Ok(Probe::new(g.clone(), room, params, name, dir))
    }
}
