//! Compiling a graph for a CUDA device: ops describe their launches, the planner places tensors, the compiler makes
//! their kernels, and a run replays the list.

use super::compile::Compiler;
use super::driver::{Count, Driver, GraphId, KernelId, ModuleId, Placed, Step};
use super::launch::{ALIGN, Consts, CudaCx, CudaLaunch, Precision, Slot, WorkId, pack};
use super::nvrtc::Target;
use super::pinned::STAGED_FROM;
use super::resources::{Footprint, Machine, resources};
use super::sources::KernelSource;
use crate::backend::{Backend, CompileOptions, Exec, Span};
use crate::graph::plan::{Limits, Memory};
use crate::graph::{Graph, Kind, Node, Phase, Tid};
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Choices that are made when the backend is opened.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Where kernels come from.
    pub source: KernelSource,
    /// What products are computed in, where a compilation does not say.
    pub precision: Precision,
    /// Replay a run as one CUDA graph from the second time on.
    pub graph: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        CudaOptions {
            source: KernelSource::default(),
            precision: Precision::F32,
            graph: true,
        }
    }
}

/// A source with its constants: what becomes one module.
type Variant = (&'static str, Consts);

impl CudaLaunch {
    fn variant(&self) -> Variant {
        (self.source, self.consts.clone())
    }
}

#[derive(Debug, Default)]
struct Loaded {
    modules: HashMap<Variant, ModuleId>,
    kernels: HashMap<(ModuleId, &'static str, bool, u32), KernelId>,
}

/// A device as a backend. Graphs compiled by it share its stream and its compiled kernels.
#[derive(Debug)]
pub struct Cuda {
    driver: Arc<dyn Driver>,
    compiler: Compiler,
    options: CudaOptions,
    loaded: Mutex<Loaded>,
}

impl Cuda {
    /// A backend on `driver`.
    ///
    /// # Errors
    /// There is no NVRTC.
    pub fn new(driver: Arc<dyn Driver>, options: CudaOptions) -> Result<Self> {
        let compiler = Compiler::new(options.source.clone(), driver.target())?;
        Ok(Cuda {
            driver,
            compiler,
            options,
            loaded: Mutex::default(),
        })
    }

    /// The compiler.
    pub fn compiler(&self) -> &Compiler {
        &self.compiler
    }

    /// The same device with kernels of another precision.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_precision(&self, precision: Precision) -> Result<Self> {
        let options = CudaOptions {
            precision,
            ..self.options.clone()
        };
        Cuda::new(self.driver.clone(), options)
    }

    /// Compiles (on all threads) and loads what `launches` need and has not been loaded.
    fn load<'a>(&self, launches: impl Iterator<Item = &'a CudaLaunch>) -> Result<()> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        let mut seen = HashSet::new();
        let wanted: Vec<Variant> = launches
            .map(CudaLaunch::variant)
            .filter(|v| !loaded.modules.contains_key(v) && seen.insert(v.clone()))
            .collect();
        let images = wanted
            .par_iter()
            .map(|(source, consts)| self.compiler.image(source, consts))
            .collect::<Result<Vec<_>>>()?;
        for (variant, image) in wanted.into_iter().zip(images) {
            let module = self.driver.load(&image, variant.0)?;
            loaded.modules.insert(variant, module);
        }
        Ok(())
    }

    /// What every node launches.
    fn describe(&self, graph: &Graph, options: &CompileOptions) -> Result<Vec<Described>> {
        let precision = options.precision.unwrap_or(self.options.precision);
        let describe = |node: &Node| {
            let (x, y) = graph.node_specs(node);
            let variant = options.variant(self.name(), node.op.as_ref(), (&x, &y))?;
            let mut cx = CudaCx::new(self.driver.traits(), precision, &x, &y, variant);
            node.op.cuda(&mut cx).map_err(|e| e.context(&node.scope))?;
            Ok(Described {
                launches: cx.launches,
                work: cx.work,
            })
        };
        graph.nodes.iter().map(describe).collect()
    }

    fn kernel(&self, launch: &CudaLaunch) -> Result<KernelId> {
        let mut loaded = self.loaded.lock().unwrap_or_else(|e| e.into_inner());
        let module = loaded.modules[&launch.variant()];
        let large = launch.smem > 48 << 10;
        let key = (
            module,
            launch.entry,
            large,
            if large { launch.smem } else { 0 },
        );
        if let Some(&kernel) = loaded.kernels.get(&key) {
            return Ok(kernel);
        }
        let kernel = self
            .driver
            .kernel(module, launch.entry, launch.smem)
            .map_err(|e| e.context(launch.source))?;
        loaded.kernels.insert(key, kernel);
        Ok(kernel)
    }
}

/// What one node launches.
struct Described {
    launches: Vec<CudaLaunch>,
    work: Vec<usize>,
}

/// Memory of a compiled graph: arenas, or on a driver that looks at every access, an allocation per tensor.
struct Allocations {
    driver: Arc<dyn Driver>,
    addresses: Vec<u64>,
}

impl Allocations {
    fn add(&mut self, elements: usize, owner: &str) -> Result<u64> {
        let address = self.driver.alloc(4 * elements.max(1), owner)?;
        self.addresses.push(address);
        Ok(address)
    }
}

impl Drop for Allocations {
    fn drop(&mut self) {
        self.addresses.iter().for_each(|&a| self.driver.free(a));
    }
}

/// Addresses of everything a graph's launches point at.
struct Addresses {
    tensors: Vec<Option<u64>>,
    /// By node, by workspace.
    work: Vec<Vec<u64>>,
}

fn allocate(
    graph: &Graph,
    memory: &Memory,
    described: &[Described],
    allocations: &mut Allocations,
) -> Result<Addresses> {
    let driver = allocations.driver.clone();
    let ids = || (0..graph.tensors.len()).map(|i| Tid(i as u32));
    if driver.separate() {
        let mut roots = HashMap::new();
        for t in ids().filter(|&t| graph.tensor(t).view.is_none() && memory.place(t).is_some()) {
            let tensor = graph.tensor(t);
            let address = allocations.add(tensor.spec.len(), &tensor.name)?;
            if tensor.kind == Kind::State {
                driver.fill(address, 0, tensor.spec.len())?;
            }
            roots.insert(t, address);
        }
        let tensors = ids()
            .map(|t| {
                let (root, offset) = graph.root(t);
                roots.get(&root).map(|a| a + 4 * offset as u64)
            })
            .collect();
        let mut work = vec![];
        for (node, d) in graph.nodes.iter().zip(described) {
            let mut of_node = vec![];
            for (k, &len) in d.work.iter().enumerate() {
                let owner = format!("workspace {k} of {} {}", node.scope, node.op.name());
                of_node.push(allocations.add(len, &owner)?);
            }
            work.push(of_node);
        }
        return Ok(Addresses { tensors, work });
    }
    let mut arenas = vec![];
    for (i, &elements) in memory.arenas.iter().enumerate() {
        arenas.push(allocations.add(elements, &format!("arena {i}"))?);
    }
    for (&address, &elements) in arenas.iter().zip(&memory.arenas) {
        driver.fill(address, 0, elements)?;
    }
    let tensors = ids()
        .map(|t| {
            memory
                .place(t)
                .map(|p| arenas[p.arena] + 4 * p.offset as u64)
        })
        .collect();
    let mut work = vec![];
    for (i, d) in described.iter().enumerate() {
        let mut of_node = vec![];
        let mut at = 0;
        for &len in &d.work {
            let p = memory.work[i].ok_or_else(|| Error::run("workspace without memory"))?;
            of_node.push(arenas[p.arena] + 4 * (p.offset + at) as u64);
            at += len.next_multiple_of(ALIGN);
        }
        work.push(of_node);
    }
    Ok(Addresses { tensors, work })
}

/// What does not fit, and what would.
fn check_memory(graph: &Graph, memory: &Memory, free: u64, total: u64) -> Result<()> {
    let wanted = memory.bytes() as u64;
    if wanted <= free {
        return Ok(());
    }
    let persistent = 4 * memory.persistent as u64;
    let mb = |b: u64| b as f64 / 1e6;
    let batch = graph
        .tensors
        .iter()
        .find(|t| t.kind == Kind::Input && t.spec.shape.len() > 1)
        .map_or(1, |t| t.spec.shape[0] as u64);
    // Temporaries grow with the batch, the rest does not.
    let fits = (free.saturating_sub(persistent) as u128 * u128::from(batch)
        / u128::from((wanted - persistent).max(1))) as u64;
    let advice = match fits {
        0 => "not even a batch of 1 fits: use a smaller model or image".to_string(),
        n => format!("a batch of {n} would fit instead of {batch}"),
    };
    Err(Error::run(format!(
        "the device's memory does not suffice: {:.0} MB wanted ({:.0} MB of parameters, state and inputs, {:.0} MB of \
         temporaries as planned), {:.0} MB free of {:.0} MB; {advice}",
        mb(wanted),
        mb(persistent),
        mb(wanted - persistent),
        mb(free),
        mb(total)
    )))
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        self.driver.name()
    }

    fn device(&self) -> String {
        format!("{}, {}", self.driver.device(), self.options.precision)
    }

    fn precision(&self) -> Precision {
        self.options.precision
    }

    fn take_counts(&self) -> Vec<(String, Count)> {
        self.driver.take_counts()
    }

    fn driver(&self) -> Option<&dyn Driver> {
        Some(self.driver.as_ref())
    }

    fn launches(
        &self,
        graph: &Graph,
        node: &Node,
        variant: Option<&str>,
    ) -> Result<Option<String>> {
        let (x, y) = graph.node_specs(node);
        let precision = self.options.precision;
        let mut cx = CudaCx::new(self.driver.traits(), precision, &x, &y, variant);
        node.op.cuda(&mut cx)?;
        Ok(Some(format!("{:?}", cx.launches)))
    }

    fn footprints(
        &self,
        graph: &Graph,
        options: &CompileOptions,
        machine: Machine,
    ) -> Result<Vec<(usize, Footprint)>> {
        let described = self.describe(graph, options)?;
        let launches = || described.iter().flat_map(|d| &d.launches);
        let arch = machine.arch(self.driver.target());
        // On a device these are what it runs, out of the cache.
        let compiler = self.compiler.with_target(Target::Cubin(arch));
        let variants: HashSet<Variant> = launches().map(CudaLaunch::variant).collect();
        let known = variants
            .into_par_iter()
            .map(|v| {
                let image = compiler.image(v.0, &v.1)?;
                let found = resources(&image, arch).map_err(|e| e.context(v.0))?;
                Ok((v, found))
            })
            .collect::<Result<HashMap<_, _>>>()?;
        let footprint = |l: &CudaLaunch| -> Result<Footprint> {
            let kernel = format!("{}/{}", l.source, l.entry);
            let found = known.get(&l.variant()).and_then(|m| m.get(l.entry));
            let found = found.ok_or_else(|| {
                Error::run(format!(
                    "the machine code of {} has no {}",
                    l.source, l.entry
                ))
            })?;
            let threads = l.block.iter().product();
            Ok(Footprint::new(arch, kernel, *found, threads, l.smem))
        };
        let nodes = described.iter().enumerate();
        let all = nodes.flat_map(|(i, d)| d.launches.iter().map(move |l| (i, l)));
        all.map(|(i, l)| Ok((i, footprint(l)?))).collect()
    }

    fn compile(&self, graph: Arc<Graph>, options: &CompileOptions) -> Result<Box<dyn Exec>> {
        let described = self.describe(&graph, options)?;
        let work: Vec<usize> = described
            .iter()
            .map(|d| d.work.iter().map(|w| w.next_multiple_of(ALIGN)).sum())
            .collect();
        let limits = Limits {
            align: ALIGN,
            max_arena: usize::MAX / 8,
        };
        let memory = Memory::plan(&graph, &work, limits);
        if let Some((free, total)) = self.driver.memory()? {
            check_memory(&graph, &memory, free, total)?;
        }
        self.load(described.iter().flat_map(|d| &d.launches))?;
        let mut allocations = Allocations {
            driver: self.driver.clone(),
            addresses: vec![],
        };
        let addresses = allocate(&graph, &memory, &described, &mut allocations)?;
        let mut steps = vec![];
        let mut nodes = vec![];
        for (i, (node, d)) in graph.nodes.iter().zip(&described).enumerate() {
            let address = |slot: Slot, offset: usize| -> Result<u64> {
                let base = match slot {
                    Slot::In(k) => addresses.tensors[node.inputs[k].index()],
                    Slot::Out(k) => addresses.tensors[node.outputs[k].index()],
                    Slot::Work(WorkId(k)) => Some(addresses.work[i][k]),
                };
                let base = base
                    .ok_or_else(|| Error::run(format!("{}: {slot:?} has no memory", node.scope)))?;
                Ok(base + 4 * offset as u64)
            };
            if options.poison {
                let updated = node.op.updates();
                for k in (0..node.outputs.len()).filter(|k| !updated.iter().any(|u| u.0 == *k)) {
                    let n = graph.spec(node.outputs[k]).len();
                    steps.push(Step::Poison(address(Slot::Out(k), 0)?, n));
                }
                for (k, &n) in d.work.iter().enumerate() {
                    steps.push(Step::Poison(address(Slot::Work(WorkId(k)), 0)?, n));
                }
            }
            for launch in &d.launches {
                steps.push(Step::Launch(Placed {
                    kernel: self.kernel(launch)?,
                    label: format!(
                        "{} {} {}/{}",
                        node.scope,
                        node.op.name(),
                        launch.source,
                        launch.entry
                    )
                    .trim_start()
                    .into(),
                    grid: launch.grid,
                    block: launch.block,
                    smem: launch.smem,
                    params: pack(&launch.args, address)?,
                }));
            }
            nodes.resize(steps.len(), i);
        }
        Ok(Box::new(CudaExec {
            graph,
            memory,
            driver: self.driver.clone(),
            addresses: addresses.tensors,
            steps,
            nodes,
            capture: self.options.graph,
            ran: HashMap::new(),
            ways: HashMap::new(),
            full: false,
            allocations,
        }))
    }
}

struct CudaExec {
    graph: Arc<Graph>,
    memory: Memory,
    driver: Arc<dyn Driver>,
    addresses: Vec<Option<u64>>,
    steps: Vec<Step>,
    /// The node of each step.
    nodes: Vec<usize>,
    capture: bool,
    /// Phases that ran before, with their graph once it is recorded.
    ran: HashMap<Vec<Phase>, Option<GraphId>>,
    /// How large inputs that were written before come.
    ways: HashMap<Tid, Way>,
    /// There was no memory for another way.
    full: bool,
    allocations: Allocations,
}

/// How an input comes to the device when it is written again.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// To where it lies, in order with the kernels.
    Direct,
    /// By other memory, beside kernels that still run.
    By(u64),
}

impl CudaExec {
    fn place(&self, t: Tid) -> Result<(u64, usize)> {
        let tensor = self.graph.tensor(t);
        self.addresses[t.index()]
            .map(|a| (a, tensor.spec.len()))
            .ok_or_else(|| {
                Error::run(format!(
                    "{} is not used by the graph and has no memory",
                    tensor.name
                ))
            })
    }

    fn set<T: bytemuck::Pod>(&mut self, t: Tid, data: &[T]) -> Result<()> {
        let (address, n) = self.place(t)?;
        if data.len() != n {
            let name = &self.graph.tensor(t).name;
            return Err(Error::run(format!(
                "{name} has {n} elements, {} were given",
                data.len()
            )));
        }
        let bytes = bytemuck::cast_slice(data);
        match self.way(t, bytes.len()) {
            Way::Direct => self.driver.upload(address, bytes),
            Way::By(by) => self.driver.upload_beside(by, address, bytes),
        }
    }

    /// How `t` comes now. What is written but once, weights or a benchmark's operands, needs no memory beside its own;
    /// where there is none left, neither does the rest.
    fn way(&mut self, t: Tid, bytes: usize) -> Way {
        let input = self.graph.tensor(t).kind == Kind::Input;
        if !self.driver.overlaps() || !input || bytes < STAGED_FROM {
            return Way::Direct;
        }
        let way = match self.ways.get(&t) {
            None => Way::Direct,
            Some(Way::By(by)) => return Way::By(*by),
            Some(Way::Direct) if self.full => return Way::Direct,
            Some(Way::Direct) => {
                let found = self.allocations.add(bytes / 4, &self.graph.tensor(t).name);
                self.full = found.is_err();
                found.map_or(Way::Direct, Way::By)
            }
        };
        self.ways.insert(t, way);
        way
    }

    fn get<T: bytemuck::Pod>(&mut self, t: Tid) -> Result<Vec<T>> {
        let (address, n) = self.place(t)?;
        let mut out = vec![T::zeroed(); n];
        self.driver
            .download(address, bytemuck::cast_slice_mut(&mut out))
            .map_err(|e| e.context(&self.graph.tensor(t).name))?;
        Ok(out)
    }

    /// `run` as a range called `name()` in a profiler's time line.
    fn annotated(
        &self,
        name: impl FnOnce() -> String,
        run: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if !self.driver.annotates() {
            return run();
        }
        self.driver.range(Some(&name()));
        let done = run();
        self.driver.range(None);
        done
    }

    fn wanted(&self, phases: &[Phase]) -> Vec<usize> {
        (0..self.steps.len())
            .filter(|&i| phases.contains(&self.graph.nodes[self.nodes[i]].phase))
            .collect()
    }
}

impl Drop for CudaExec {
    fn drop(&mut self) {
        for graph in self.ran.values().flatten() {
            self.driver.forget(*graph);
        }
    }
}

impl Exec for CudaExec {
    fn graph(&self) -> &Graph {
        &self.graph
    }

    fn memory(&self) -> &Memory {
        &self.memory
    }

    fn write(&mut self, t: Tid, data: &[f32]) -> Result<()> {
        self.set(t, data)
    }

    fn write_u32(&mut self, t: Tid, data: &[u32]) -> Result<()> {
        self.set(t, data)
    }

    fn read(&mut self, t: Tid) -> Result<Vec<f32>> {
        self.get(t)
    }

    fn read_u32(&mut self, t: Tid) -> Result<Vec<u32>> {
        self.get(t)
    }

    fn run(&mut self, phases: &[Phase]) -> Result<()> {
        // The first run goes launch by launch: a driver may load kernels lazily, which cannot be recorded.
        let again = self.ran.contains_key(phases);
        if self.capture && again && self.ran[phases].is_none() {
            let wanted = self.wanted(phases);
            let steps: Vec<&Step> = wanted.iter().map(|&i| &self.steps[i]).collect();
            let graph = self.driver.capture(&steps)?;
            self.ran.insert(phases.to_vec(), graph);
        }
        if let Some(&Some(graph)) = self.ran.get(phases) {
            return self.annotated(|| format!("{phases:?}"), || self.driver.replay(graph));
        }
        let wanted = self.wanted(phases);
        let node = |&i: &usize| &self.graph.nodes[self.nodes[i]];
        for steps in wanted.chunk_by(|a, b| node(a).scope == node(b).scope) {
            self.annotated(
                || node(&steps[0]).scope.clone(),
                || {
                    steps
                        .iter()
                        .try_for_each(|&i| self.driver.step(&self.steps[i]))
                },
            )?;
        }
        self.ran.entry(phases.to_vec()).or_default();
        Ok(())
    }

    fn run_traced(&mut self, phases: &[Phase]) -> Result<Vec<Span>> {
        let wanted = self.wanted(phases);
        let span = |i: usize| Span {
            node: self.nodes[i],
            kernel: match &self.steps[i] {
                Step::Launch(p) => p.label.rsplit(' ').next().unwrap_or_default().to_string(),
                Step::Poison(..) => "poison".into(),
            },
            ..Span::default()
        };
        if self.driver.counts() {
            self.driver.take_counts();
            return wanted
                .into_iter()
                .map(|i| {
                    self.driver.step(&self.steps[i])?;
                    let count = self.driver.take_counts().pop().map(|c| c.1);
                    Ok(Span {
                        count: Some(count.unwrap_or_default()),
                        ..span(i)
                    })
                })
                .collect();
        }
        let steps: Vec<&Step> = wanted.iter().map(|&i| &self.steps[i]).collect();
        // From event to event: a launch's time has the gap before it.
        let mut start = Duration::ZERO;
        let times = wanted.iter().zip(self.driver.timed(&steps)?);
        let span = times.map(|(&i, time)| {
            start += time;
            Span {
                start: start - time,
                time,
                ..span(i)
            }
        });
        Ok(span.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Spec;
    use crate::ops::act::{Act, ActFwd};

    #[test]
    fn too_little_memory_says_what_would_fit() {
        let mut g = Graph::new();
        let x = g.input("images", Spec::f32([64, 1000]));
        let mut y = x;
        for _ in 0..3 {
            y = g.push1(ActFwd { act: Act::Relu }, &[y]).unwrap();
        }
        g.keep(y);
        let limits = Limits {
            align: ALIGN,
            max_arena: usize::MAX / 8,
        };
        let memory = Memory::plan(&g, &[0; 3], limits);
        let bytes = memory.bytes() as u64;
        check_memory(&g, &memory, bytes, bytes).unwrap();
        let persistent = 4 * memory.persistent as u64;
        let half = persistent + (bytes - persistent) / 2;
        let e = check_memory(&g, &memory, half, 2 * bytes).unwrap_err();
        assert!(
            e.to_string()
                .contains("a batch of 32 would fit instead of 64"),
            "{e}"
        );
        let e = check_memory(&g, &memory, persistent, bytes).unwrap_err();
        assert!(e.to_string().contains("not even a batch of 1"), "{e}");
    }
}
