//! `kernels`.

use super::global::Global;
use super::output::{json, print};
use clap::Args;
use serde_json::json;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use tilewright::backend::cuda::resources::resources;
use tilewright::backend::cuda::{
    Compiler, CudaCx, CudaLaunch, Footprint, Precision, Target, Traits,
};
use tilewright::ops::check::{case_graph, seed_of};
use tilewright::ops::{ROOMS, Room, room};
use tilewright::report::write_atomic;
use tilewright::{Error, Result};

/// Compiles the CUDA kernels that the bench cases of every op launch (the check cases with --all), each with its own
/// constants, and writes them as files beside an index.json.
#[derive(Args)]
#[command(after_help = "Example:\n  tilewright kernels --arch 90 -o kernels-sm_90")]
pub struct Kernels {
    /// An op [default: every op]
    #[arg(value_name = "OP")]
    op: Option<String>,
    /// Compute capability, as in sm_90
    #[arg(long, default_value_t = 80, value_name = "N")]
    arch: u32,
    /// PTX in place of machine code
    #[arg(long)]
    ptx: bool,
    /// What the check cases launch too
    #[arg(long)]
    all: bool,
    /// The folder
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

/// A module: source and constants; by entry, the launch with the most threads and shared memory.
type Modules =
    BTreeMap<(&'static str, String), (CudaLaunch, BTreeMap<&'static str, (CudaLaunch, String)>)>;

impl Kernels {
    /// Adds what a case launches, in every variant and precision.
    fn describe(
        &self,
        room: &Room,
        params: &str,
        traits: &Traits,
        all: &mut Modules,
    ) -> Result<()> {
        let cg = case_graph(&room.build(params)?, seed_of(params))?;
        for node in &cg.graph.nodes {
            let (x, y) = cg.graph.node_specs(node);
            for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
                let named = node.op.cuda_variants().iter().skip(1).map(|&v| Some(v));
                for variant in std::iter::once(None).chain(named) {
                    let mut cx = CudaCx::new(traits, precision, &x, &y, variant);
                    match node.op.cuda(&mut cx) {
                        // A variant need not support every shape.
                        Err(Error::Input(_)) if variant.is_some() => continue,
                        described => described?,
                    }
                    for l in cx.launches {
                        let consts: Vec<String> =
                            l.consts.iter().map(|(k, v)| format!("{k}={v}")).collect();
                        let module = all
                            .entry((l.source, consts.join(" ")))
                            .or_insert_with(|| (l.clone(), BTreeMap::new()));
                        let case = format!("{}({params})", room.name);
                        let known = module.1.entry(l.entry).or_insert((l.clone(), case));
                        known.0.smem = known.0.smem.max(l.smem);
                    }
                }
            }
        }
        Ok(())
    }

    pub fn run(self, g: &Global) -> Result<ExitCode> {
        let target = match self.ptx {
            true => Target::Ptx(self.arch),
            false => Target::Cubin(self.arch),
        };
        let compiler = Compiler::new(g.cuda_options()?.source, target)?;
        let traits = Traits::assumed(self.arch);
        let rooms: Vec<&Room> = match &self.op {
            Some(name) => vec![room(name)?],
            None => ROOMS.to_vec(),
        };
        let mut modules = Modules::new();
        for room in rooms {
            for params in room.bench {
                self.describe(room, params, &traits, &mut modules)?;
            }
            for params in room.cases.iter().filter(|_| self.all) {
                self.describe(room, params, &traits, &mut modules)?;
            }
        }
        let failed = |e| Error::writing(&self.output, e);
        std::fs::create_dir_all(&self.output).map_err(failed)?;
        let mut index = vec![];
        let mut out = String::new();
        for (i, ((source, consts), (launch, entries))) in modules.iter().enumerate() {
            let image = compiler.image(source, &launch.consts)?;
            let stem = source.trim_end_matches(".cu");
            let extension = if self.ptx { "ptx" } else { "cubin" };
            let file = format!("{i:03}-{stem}.{extension}");
            write_atomic(&self.output.join(&file), &image)?;
            let found = match self.ptx {
                true => BTreeMap::new(),
                false => resources(&image, self.arch).map_err(|e| e.context(source))?,
            };
            for (entry, (l, case)) in entries {
                let threads: u32 = l.block.iter().product();
                let _ = writeln!(out, "{file}  {entry}  {consts}");
                let footprint = found.get(*entry).map(|&r| {
                    Footprint::new(self.arch, format!("{source}/{entry}"), r, threads, l.smem)
                });
                index.push(json!({
                    "file": file, "source": source, "entry": entry, "constants": consts, "threads": threads,
                    "dynamic_smem": l.smem, "case": case, "footprint": footprint,
                }));
            }
        }
        let text = serde_json::to_vec_pretty(&json!({
            "arch": self.arch, "nvrtc": compiler.nvrtc().version_text(), "kernels": index,
        }))
        .map_err(|e| Error::run(format!("cannot write the index: {e}")))?;
        write_atomic(&self.output.join("index.json"), &text)?;
        match g.json {
            true => json(&index)?,
            false => print(&out)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
