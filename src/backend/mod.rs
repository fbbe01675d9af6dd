//! Backends: device, memory, launch, timing. What a kernel computes is the ops' affair.

pub mod cpu;
pub mod cuda;
pub mod source;
pub mod tuned;
pub mod wgpu;

use crate::graph::plan::Memory;
use crate::graph::{Graph, Node, Phase, Spec, Tid};
use crate::ops::Op;
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Choices that are made when a graph is compiled.
#[derive(Clone, Debug, Default)]
pub struct CompileOptions {
    /// Kernel variant by op name, in place of the default rule's choice.
    pub variants: HashMap<String, String>,
    /// Variants by op and shapes, where [`variants`](Self::variants) does not name the op.
    pub tuned: Option<Arc<tuned::Tuned>>,
    /// What products are computed in, on backends that know more than float32; `None` leaves it to the backend.
    pub precision: Option<cuda::Precision>,
    /// Fill temporaries with NaN before every run, so that an output that nobody writes shows.
    pub poison: bool,
    /// Parameters keep the values they have at the first run (inference): kernels may pack them once and give the
    /// plain copy's memory back. Writing one after the first run is an error then.
    pub constant_params: bool,
}

impl CompileOptions {
    /// The variant that a node is to have on the backend called `backend`; `None` leaves it to the op's rule.
    ///
    /// # Errors
    /// The tuned choice is one that the op does not have.
    pub fn variant(
        &self,
        backend: &str,
        op: &dyn Op,
        (x, y): (&[Spec], &[Spec]),
    ) -> Result<Option<&str>> {
        if let Some(named) = self.variants.get(op.name()) {
            return Ok(Some(named));
        }
        let tuned = self.tuned.as_ref().and_then(|t| t.variant(op.name(), x, y));
        match tuned {
            Some(v) if !op.variants_on(backend).contains(&v) => Err(Error::input(format!(
                "the tuned file has variant {v:?} for {}, which is not among those on {backend} ({}): tune again",
                tuned::case_of(op.name(), x, y),
                op.variants_on(backend).join(", ")
            ))),
            v => Ok(v),
        }
    }
}

/// A device that compiles graphs.
pub trait Backend: Send + Sync {
    /// `cpu`, `wgpu`, `cuda`, `cuda:sim`.
    fn name(&self) -> &'static str;

    /// The device, for people and for recorded results.
    fn device(&self) -> String;

    /// What products are computed in where [`CompileOptions::precision`] does not say.
    fn precision(&self) -> cuda::Precision {
        cuda::Precision::F32
    }

    /// What each kernel did since the last call, by `op source/kernel`; empty where the device does not count.
    fn take_counts(&self) -> Vec<(String, cuda::Count)> {
        vec![]
    }

    /// CUDA's driver, for other libraries on the same device.
    fn driver(&self) -> Option<&dyn cuda::Driver> {
        None
    }

    /// The file of tuned variants in force (see [`tuned`]), or empty.
    fn tuned(&self) -> String {
        String::new()
    }

    /// What `node` launches in a variant (`None`: the rule's choice), as text that is the same where the launches are;
    /// `None` where that is not known before it runs.
    ///
    /// # Errors
    /// The variant does not support the node's shapes.
    fn launches(
        &self,
        _graph: &Graph,
        _node: &Node,
        _variant: Option<&str>,
    ) -> Result<Option<String>> {
        Ok(None)
    }

    /// What every launch of `graph` takes of a multiprocessor, with its node, in order; empty where there are none.
    ///
    /// # Errors
    /// As [`compile`](Self::compile), or a kernel's machine code cannot be made or read.
    fn footprints(
        &self,
        _graph: &Graph,
        _options: &CompileOptions,
        _machine: cuda::Machine,
    ) -> Result<Vec<(usize, cuda::Footprint)>> {
        Ok(vec![])
    }

    /// Plans memory and prepares every launch of `graph`.
    ///
    /// # Errors
    /// A node cannot run on this backend, or memory does not suffice: the message names the layer.
    fn compile(&self, graph: Arc<Graph>, options: &CompileOptions) -> Result<Box<dyn Exec>>;
}

/// One launch of a traced run.
#[derive(Clone, Debug, Default)]
pub struct Span {
    /// The node.
    pub node: usize,
    /// `conv2d.cu/fprop`; empty where a node is one call (the CPU).
    pub kernel: String,
    /// When it began, from the start of the run, by the clock that timed it.
    pub start: Duration,
    /// How long it took; zero on a device that counts and does not time.
    pub time: Duration,
    /// What it did, where the device counts.
    pub count: Option<cuda::Count>,
}

/// A compiled graph: planned once, run many times, without allocation in a run.
pub trait Exec: Send {
    /// The graph that was compiled.
    fn graph(&self) -> &Graph;

    /// Where everything lives.
    fn memory(&self) -> &Memory;

    /// Sets a tensor.
    ///
    /// # Errors
    /// The length differs from the tensor's, or the device is lost.
    fn write(&mut self, t: Tid, data: &[f32]) -> Result<()>;

    /// Sets a uint32 tensor.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    fn write_u32(&mut self, t: Tid, data: &[u32]) -> Result<()>;

    /// Reads a tensor: an input, parameter or state, or a temporary that was marked to be kept.
    ///
    /// # Errors
    /// The device is lost.
    fn read(&mut self, t: Tid) -> Result<Vec<f32>>;

    /// Reads a uint32 tensor.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    fn read_u32(&mut self, t: Tid) -> Result<Vec<u32>>;

    /// Runs the nodes of `phases`, in the graph's order. A device may still be at it when this returns, so that the host
    /// can prepare what comes next; what is written comes after it, and reading waits.
    ///
    /// # Errors
    /// The device is lost or a kernel failed; where the device is not waited for, [`read`](Self::read) says it.
    fn run(&mut self, phases: &[Phase]) -> Result<()>;

    /// Runs the nodes of `phases` and returns every launch with its time (or what it did, on the simulator), in order.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    fn run_traced(&mut self, phases: &[Phase]) -> Result<Vec<Span>>;

    /// Runs the nodes of `phases` and returns the time each took, by node.
    ///
    /// # Errors
    /// As [`run`](Self::run), or the device cannot time.
    fn run_timed(&mut self, phases: &[Phase]) -> Result<Vec<(usize, Duration)>> {
        let mut times: Vec<(usize, Duration)> = vec![];
        for s in self.run_traced(phases)? {
            if s.count.is_some() {
                return Err(Error::input(
                    "cuda:sim counts and does not time: `tilewright profile --backend cuda:sim` and `check --counters` \
                     show the counts",
                ));
            }
            match times.last_mut() {
                Some(last) if last.0 == s.node => last.1 += s.time,
                _ => times.push((s.node, s.time)),
            }
        }
        Ok(times)
    }
}

/// The backend called `name` (`cpu`, `wgpu`, `cuda` or `cuda:sim`), never another in its place.
///
/// # Errors
/// The name is unknown, or the backend has no device here: the message says what is missing and how to get it.
pub fn open(name: &str) -> Result<Box<dyn Backend>> {
    match name {
        "cpu" => Ok(Box::new(cpu::Cpu::new())),
        "wgpu" => wgpu::open(),
        "cuda" => cuda::open_device(None, cuda::CudaOptions::default()),
        "cuda:sim" => cuda::open_device(Some("sim"), cuda::CudaOptions::default()),
        other => Err(Error::input(format!(
            "no backend is called {other}; there are cpu, wgpu, cuda and cuda:sim"
        ))),
    }
}
