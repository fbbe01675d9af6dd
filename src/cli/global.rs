//! Flags that every command takes, and the backend they choose.

use super::output::note;
use clap::Args;
use std::path::PathBuf;
use tilewright::backend::cpu::Cpu;
use tilewright::backend::cuda::{self, CudaOptions, KernelSource, Precision};
use tilewright::backend::wgpu::shaders::ShaderSource;
use tilewright::backend::wgpu::{AdapterReport, Wgpu, WgpuOptions, adapters};
use tilewright::backend::{self, Backend, tuned};
use tilewright::{Error, Result};

/// Flags that every command takes.
#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Where to compute: cpu, wgpu, wgpu:PART-OF-AN-ADAPTER'S-NAME, cuda, cuda:NUMBER, or cuda:sim, the simulator [default:
    /// cuda, else wgpu on a real GPU, else cpu]
    #[arg(
        long,
        global = true,
        value_name = "NAME",
        help_heading = "Global options"
    )]
    pub backend: Option<String>,
    /// Seed of everything that is drawn
    #[arg(
        long,
        global = true,
        default_value_t = 0,
        value_name = "N",
        help_heading = "Global options"
    )]
    pub seed: u64,
    /// Threads of the CPU backend and of decoding [default: all cores]
    #[arg(long, global = true, value_name = "N", help_heading = "Global options")]
    pub threads: Option<usize>,
    /// Print one JSON document on standard output, everything else on standard error
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Read the WGSL kernels from this folder in place of the built-in ones
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Global options"
    )]
    pub shaders: Option<PathBuf>,
    /// Read the CUDA kernels from this folder in place of the built-in ones
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Global options"
    )]
    pub kernels: Option<PathBuf>,
    /// What products are computed in on cuda: f32, tf32 or bf16 [default: f32]
    #[arg(long, global = true, value_name = "P", help_heading = "Global options")]
    pub precision: Option<Precision>,
    /// Use the kernel variants that `tune` chose, from this file
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    pub tuned: Option<PathBuf>,
    /// Launch kernel by kernel on cuda, in place of replaying a run as one CUDA graph
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_graph: bool,
}

impl Global {
    /// Puts the number of threads into force.
    ///
    /// # Errors
    /// The number is not possible.
    pub fn start(&self) -> Result<()> {
        let Some(n) = self.threads else { return Ok(()) };
        if !(1..=1024).contains(&n) {
            return Err(Error::input(format!("--threads {n}: give 1 to 1024")));
        }
        rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .build_global()
            .map_err(|e| Error::run(format!("cannot start {n} threads: {e}")))
    }

    /// The backend that `--backend` names, never another in its place; without it the best one present.
    ///
    /// # Errors
    /// The named backend has no device here, or `--shaders` is given to one that has no shaders.
    pub fn open_backend(&self) -> Result<Box<dyn Backend>> {
        self.open(&self.backend_name())
    }

    /// Name of the backend that `--backend` names, or of the best one present.
    pub fn backend_name(&self) -> String {
        let best = || default_backend().to_string();
        self.backend.clone().unwrap_or_else(best)
    }

    /// The backend called `name`, with the other global flags.
    ///
    /// # Errors
    /// As [`open_backend`](Self::open_backend).
    pub fn open(&self, name: &str) -> Result<Box<dyn Backend>> {
        let backend = self.open_plain(name)?;
        let Some(file) = &self.tuned else {
            return Ok(backend);
        };
        let backend = tuned::apply(backend, file)?;
        if backend.tuned().is_empty() {
            self.remark(&format!(
                "{} has nothing for {}: the ops' own rules choose",
                file.display(),
                backend.device()
            ));
        }
        Ok(backend)
    }

    /// [`open`](Self::open) without `--tuned`.
    ///
    /// # Errors
    /// As [`open_backend`](Self::open_backend).
    pub fn open_plain(&self, name: &str) -> Result<Box<dyn Backend>> {
        let (kind, adapter) = match name.split_once(':') {
            Some((kind, adapter)) => (kind, Some(adapter.to_string())),
            None => (name, None),
        };
        if kind == "cuda" {
            self.refuse(&self.shaders, "--shaders", kind, "wgpu")?;
            return cuda::open_device(adapter.as_deref(), self.cuda_options()?);
        }
        self.refuse(&self.kernels, "--kernels", kind, "cuda")?;
        if let Some(p) = self.precision.filter(|&p| p != Precision::F32) {
            return Err(Error::input(format!(
                "--precision {p} is for the cuda backend; {kind} computes in f32"
            )));
        }
        if kind == "wgpu" {
            return Ok(Box::new(Wgpu::open(&WgpuOptions {
                adapter,
                ..self.wgpu_options()?
            })?));
        }
        self.refuse(&self.shaders, "--shaders", kind, "wgpu")?;
        if name == "cpu" {
            return Ok(Box::new(Cpu::new()));
        }
        backend::open(name)
    }

    /// The backend `name` as a run's configuration wants it: in its `precision` where no flag gives another.
    ///
    /// # Errors
    /// As [`open`](Self::open), or the precision is none.
    pub fn open_with(&self, name: &str, precision: &str) -> Result<Box<dyn Backend>> {
        let wanted = match self.precision {
            Some(p) => p,
            None => precision.parse()?,
        };
        Global {
            precision: Some(wanted),
            ..self.clone()
        }
        .open(name)
    }

    /// A folder of kernels for a backend that is not the one in use.
    fn refuse(&self, dir: &Option<PathBuf>, flag: &str, kind: &str, right: &str) -> Result<()> {
        match dir {
            Some(dir) => Err(Error::input(format!(
                "{flag} {} is for the {right} backend, not {kind}; add --backend {right}",
                dir.display()
            ))),
            None => Ok(()),
        }
    }

    /// Options of the cuda backend.
    ///
    /// # Errors
    /// `--kernels` is not a folder.
    pub fn cuda_options(&self) -> Result<CudaOptions> {
        let mut source = KernelSource::default();
        if let Some(dir) = &self.kernels {
            source.0 = source
                .0
                .replaced_by(dir)
                .map_err(|e| e.context("--kernels"))?;
        }
        Ok(CudaOptions {
            source,
            precision: self.precision.unwrap_or_default(),
            graph: !self.no_graph,
        })
    }

    /// Options of the wgpu backend.
    ///
    /// # Errors
    /// `--shaders` is not a folder.
    pub fn wgpu_options(&self) -> Result<WgpuOptions> {
        let mut shaders = ShaderSource::default();
        if let Some(dir) = &self.shaders {
            shaders.0 = shaders
                .0
                .replaced_by(dir)
                .map_err(|e| e.context("--shaders"))?;
        }
        Ok(WgpuOptions {
            shaders,
            ..WgpuOptions::default()
        })
    }

    /// A remark for people on standard error.
    pub fn remark(&self, line: &str) {
        note(&format!("note: {line}"));
    }
}

/// Whether an adapter computes on a GPU: software Vulkan is slower than the CPU backend.
pub fn is_gpu(adapter: &AdapterReport) -> bool {
    !adapter.traits.software
}

/// What runs where no backend is named.
pub fn default_backend() -> &'static str {
    if cuda::present() {
        return "cuda";
    }
    let gpu = may_have_gpu() && adapters().is_ok_and(|a| a.first().is_some_and(is_gpu));
    if gpu { "wgpu" } else { "cpu" }
}

/// Whether it is worth asking the drivers, which takes a tenth of a second: Linux shows every GPU as a device file.
fn may_have_gpu() -> bool {
    if cfg!(not(target_os = "linux")) {
        return true;
    }
    [
        "/dev/dri",
        "/dev/nvidiactl",
        "/dev/dxg",
        "/dev/kfd",
        "/dev/mali0",
    ]
    .iter()
    .any(|p| std::path::Path::new(p).exists())
}
