//! The CPU backend: runs anywhere, on the threads of rayon's current pool.

mod epilogue;
pub mod gemm;
pub mod kernel;
pub mod multiversion;
pub(crate) mod pack;
pub mod par;
pub(crate) mod parallel;
pub(crate) mod scratch;
pub(crate) mod simd;
pub(crate) mod winograd;

pub use epilogue::Epilogue;
pub(crate) use epilogue::{Finish, RawEpilogue};

use super::{Backend, CompileOptions, Exec, Span};
use crate::graph::plan::{Limits, Memory, Place};
use crate::graph::{Graph, Kind, Phase, Spec, Tid};
use crate::{Error, Result};
use memmap2::MmapMut;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A kernel bound to shapes; it is given the operands' memory at each run.
pub type CpuKernel = Box<dyn Fn(&Args) + Send + Sync>;

/// What an op sees when its CPU kernel is made.
#[derive(Debug)]
pub struct CpuCx<'a> {
    /// Operand specs.
    pub x: &'a [Spec],
    /// Result specs.
    pub y: &'a [Spec],
    /// The variant that was asked for; `None` leaves it to the op's rule.
    pub variant: Option<&'a str>,
    constant: Vec<bool>,
    release: Vec<usize>,
    workspace: usize,
}

impl<'a> CpuCx<'a> {
    /// For operands `x` and results `y`.
    pub fn new(x: &'a [Spec], y: &'a [Spec], variant: Option<&'a str>) -> Self {
        CpuCx {
            x,
            y,
            variant,
            constant: vec![],
            release: vec![],
            workspace: 0,
        }
    }

    /// Whether operand `i` keeps its value from the first run on (weights at inference), so that a kernel may pack it
    /// once.
    pub fn constant(&self, i: usize) -> bool {
        self.constant.get(i).copied().unwrap_or(false)
    }

    /// Says that a constant operand is not read again after the kernel's first run: its memory is given back then, or
    /// piece by piece as the kernel calls [`Args::spent`].
    pub fn release(&mut self, i: usize) {
        self.release.push(i);
    }

    /// Asks for `floats` of scratch, planned by lifetime; [`Args::work`] gives it. Contents are undefined.
    pub fn workspace(&mut self, floats: usize) {
        self.workspace = self.workspace.max(floats);
    }
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    ptr: *mut f32,
    len: usize,
}

/// The memory of one launch.
///
/// The planner gives results and workspace memory that no operand of the same node overlaps, except results that an
/// op declares as [updates](crate::ops::Op::updates) of an operand: such an operand must be reached by
/// [`y`](Self::y) only.
#[derive(Debug)]
pub struct Args<'a> {
    x: &'a [Slot],
    y: &'a [Slot],
    work: Slot,
    /// By operand, whether this launch is the last to read it.
    last: &'a [bool],
}

// The slots point into arenas that the executor owns and that outlive the launch.
unsafe impl Sync for Args<'_> {}
unsafe impl Send for Slot {}
unsafe impl Sync for Slot {}

impl Slot {
    fn part(self, range: Range<usize>) -> Slot {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        Slot {
            // SAFETY: inside the slot, as was just checked.
            ptr: unsafe { self.ptr.add(range.start) },
            len: range.len(),
        }
    }
}

impl<'a> Args<'a> {
    /// Operand `i`.
    pub fn x(&self, i: usize) -> &'a [f32] {
        let s = self.x[i];
        // SAFETY: the slot lies in a live arena, and nothing writes an operand during the launch (see the type).
        unsafe { std::slice::from_raw_parts(s.ptr, s.len) }
    }

    /// Operand `i` where the op has one there.
    pub fn x_if(&self, present: bool, i: usize) -> Option<&'a [f32]> {
        present.then(|| self.x(i))
    }

    /// Operand `i` as uint32.
    pub fn xu(&self, i: usize) -> &'a [u32] {
        bytemuck::cast_slice(self.x(i))
    }

    /// Result `i`. Call it once per result and launch: two live slices of one result would alias.
    #[allow(clippy::mut_from_ref)] // disjointness is the planner's promise, see the type
    pub fn y(&self, i: usize) -> &'a mut [f32] {
        let s = self.y[i];
        // SAFETY: the slot lies in a live arena and is disjoint from the other slots of this launch (see the type).
        unsafe { std::slice::from_raw_parts_mut(s.ptr, s.len) }
    }

    /// Result `i` as uint32.
    #[allow(clippy::mut_from_ref)]
    pub fn yu(&self, i: usize) -> &'a mut [u32] {
        bytemuck::cast_slice_mut(self.y(i))
    }

    /// Says that elements `range` of operand `i` are not read again, so that the pages of a
    /// [released](CpuCx::release) operand can go while the rest is still being packed: else a layer's weights lie in
    /// memory twice.
    pub fn spent(&self, i: usize, range: Range<usize>) {
        if self.last[i] {
            give_back(self.x[i].part(range));
        }
    }

    /// The workspace, as long as was asked for.
    #[allow(clippy::mut_from_ref)]
    pub fn work(&self) -> &'a mut [f32] {
        // SAFETY: as for `y`.
        unsafe { std::slice::from_raw_parts_mut(self.work.ptr, self.work.len) }
    }
}

/// Zeroed memory at page boundaries; pages that nobody touches cost nothing.
#[derive(Debug)]
struct Arena {
    /// Kept for its memory, which `ptr` points to.
    _map: MmapMut,
    ptr: *mut f32,
}

unsafe impl Send for Arena {}

impl Arena {
    /// With `large` pages, where the system has them, many runs are faster by some per cent; to make them may take it
    /// longer than one run does.
    fn new(elements: usize, large: bool) -> Result<Self> {
        let none = |e| {
            Error::run(format!(
                "the plan wants {elements} elements of memory, more than there can be: {e}"
            ))
        };
        let bytes = elements.max(16).saturating_mul(4);
        let mut map = MmapMut::map_anon(bytes).map_err(none)?;
        #[cfg(target_os = "linux")]
        if large {
            // Advice that is refused costs time and nothing else.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        #[cfg(not(target_os = "linux"))]
        let _ = large;
        Ok(Arena {
            ptr: map.as_mut_ptr().cast(),
            _map: map,
        })
    }

    fn slot(&self, p: Place) -> Slot {
        // SAFETY: the planner's places lie inside their arena.
        Slot {
            ptr: unsafe { self.ptr.add(p.offset) },
            len: p.len,
        }
    }
}

/// The CPU.
#[derive(Debug, Default)]
pub struct Cpu;

impl Cpu {
    /// The CPU backend; it is always there.
    pub fn new() -> Self {
        Cpu
    }
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn device(&self) -> String {
        format!("{}, {} threads", processor(), rayon::current_num_threads())
    }

    fn compile(&self, graph: Arc<Graph>, options: &CompileOptions) -> Result<Box<dyn Exec>> {
        let mut kernels = Vec::with_capacity(graph.nodes.len());
        let mut work = Vec::with_capacity(graph.nodes.len());
        let mut releases = Vec::with_capacity(graph.nodes.len());
        for node in &graph.nodes {
            let (x, y) = graph.node_specs(node);
            let variant = options.variant(self.name(), node.op.as_ref(), (&x, &y))?;
            let mut cx = CpuCx::new(&x, &y, variant);
            cx.constant = node
                .inputs
                .iter()
                .map(|&t| options.constant_params && constant(&graph, t))
                .collect();
            kernels.push(node.op.cpu(&mut cx).map_err(|e| e.context(&node.scope))?);
            work.push(cx.workspace);
            releases.push(cx.release);
        }
        let memory = Memory::plan(
            &graph,
            &work,
            Limits {
                align: 16,
                max_arena: usize::MAX,
            },
        );
        let arenas = memory
            .arenas
            .iter()
            .map(|&n| Arena::new(n, !options.constant_params))
            .collect::<Result<Vec<_>>>()?;
        let none = Slot {
            ptr: std::ptr::NonNull::dangling().as_ptr(),
            len: 0,
        };
        let slot = |p: Option<Place>| p.map_or(none, |p| arenas[p.arena].slot(p));
        let drops = droppable(&graph, &releases, options.constant_params);
        let launches = kernels
            .into_iter()
            .enumerate()
            .map(|(i, kernel)| Launch {
                kernel,
                last: graph.nodes[i]
                    .inputs
                    .iter()
                    .map(|&t| drops[i].contains(&graph.root(t).0))
                    .collect(),
                x: graph.nodes[i]
                    .inputs
                    .iter()
                    .map(|&t| slot(memory.place(t)))
                    .collect(),
                y: graph.nodes[i]
                    .outputs
                    .iter()
                    .map(|&t| slot(memory.place(t)))
                    .collect(),
                work: slot(memory.work[i]),
            })
            .collect();
        Ok(Box::new(CpuExec {
            graph,
            memory,
            arenas,
            launches,
            drops,
            constant_params: options.constant_params,
            ran: false,
            poison: options.poison,
            dropped: HashSet::new(),
        }))
    }
}

/// Parameters, and what is made of them before the first run.
fn constant(graph: &Graph, t: Tid) -> bool {
    let (root, _) = graph.root(t);
    match graph.tensor(root).kind {
        Kind::Param(_) => true,
        _ => graph
            .nodes
            .iter()
            .any(|n| n.phase == Phase::Prepare && n.outputs.contains(&t)),
    }
}

/// By node, the constant operands whose memory can go after its first run: its kernel packed them, or nothing but
/// the preparation reads them, and no later node does.
fn droppable(graph: &Graph, released: &[Vec<usize>], constant_params: bool) -> Vec<Vec<Tid>> {
    let mut last = vec![None; graph.tensors.len()];
    let mut all = vec![constant_params; graph.tensors.len()];
    for (i, node) in graph.nodes.iter().enumerate() {
        for (k, &t) in node.inputs.iter().enumerate() {
            let (root, _) = graph.root(t);
            let once = node.phase == Phase::Prepare || released[i].contains(&k);
            all[root.index()] &= once && constant(graph, t) && !graph.tensor(root).keep;
            last[root.index()] = Some(i);
        }
    }
    let mut out = vec![vec![]; graph.nodes.len()];
    for (t, &i) in last.iter().enumerate() {
        if let Some(i) = i.filter(|_| all[t]) {
            out[i].push(Tid(t as u32));
        }
    }
    out
}

struct Launch {
    kernel: CpuKernel,
    x: Vec<Slot>,
    y: Vec<Slot>,
    work: Slot,
    last: Vec<bool>,
}

struct CpuExec {
    graph: Arc<Graph>,
    memory: Memory,
    arenas: Vec<Arena>,
    launches: Vec<Launch>,
    /// By node, the constants whose memory goes after its first run.
    drops: Vec<Vec<Tid>>,
    /// Constants whose memory is gone.
    dropped: HashSet<Tid>,
    constant_params: bool,
    ran: bool,
    poison: bool,
}

impl CpuExec {
    #[allow(clippy::mut_from_ref)]
    fn slice(&self, t: Tid) -> Result<&mut [f32]> {
        let place = self.memory.place(t).ok_or_else(|| {
            Error::run(format!(
                "{} is not used by the graph and has no memory",
                self.graph.tensor(t).name
            ))
        })?;
        let s = self.arenas[place.arena].slot(place);
        // SAFETY: inside a live arena; callers hold `&mut self` or only copy out.
        Ok(unsafe { std::slice::from_raw_parts_mut(s.ptr, s.len) })
    }

    fn set(&mut self, t: Tid, data: &[f32]) -> Result<()> {
        let name = || self.graph.tensor(t).name.clone();
        if self.ran && self.constant_params && matches!(self.graph.tensor(t).kind, Kind::Param(_)) {
            return Err(Error::run(format!(
                "{} was compiled as a constant and is already in use",
                name()
            )));
        }
        let to = self.slice(t)?;
        if to.len() != data.len() {
            return Err(Error::run(format!(
                "{} has {} elements, {} were given",
                name(),
                to.len(),
                data.len()
            )));
        }
        to.copy_from_slice(data);
        Ok(())
    }

    /// Runs the launches of `phases` in order, and `after` each.
    fn each(&mut self, phases: &[Phase], after: impl FnMut(usize) + Send) -> Result<()> {
        // On a thread of the pool: from any other thread each parallel loop would hand itself over to the pool, sleep
        // and be woken again.
        rayon::scope(|_| self.each_here(phases, after))
    }

    fn each_here(&mut self, phases: &[Phase], mut after: impl FnMut(usize)) -> Result<()> {
        if phases.contains(&Phase::Prepare) && !self.dropped.is_empty() {
            return Err(Error::run(
                "constants were prepared already and their plain copies are gone",
            ));
        }
        self.ran = true;
        for i in 0..self.launches.len() {
            let node = &self.graph.nodes[i];
            if !phases.contains(&node.phase) {
                continue;
            }
            let l = &self.launches[i];
            if self.poison {
                let updates = node.op.updates();
                let fresh =
                    l.y.iter()
                        .enumerate()
                        .filter(|(k, _)| !updates.iter().any(|u| u.0 == *k));
                for s in fresh.map(|(_, y)| y).chain([&l.work]) {
                    // SAFETY: results and workspace of this launch, about to be written by it.
                    unsafe { std::slice::from_raw_parts_mut(s.ptr, s.len) }.fill(f32::NAN);
                }
            }
            (l.kernel)(&Args {
                x: &l.x,
                y: &l.y,
                work: l.work,
                last: &l.last,
            });
            after(i);
            for &t in &self.drops[i] {
                if self.dropped.insert(t)
                    && let Some(p) = self.memory.place(t)
                {
                    give_back(self.arenas[p.arena].slot(p));
                }
            }
        }
        Ok(())
    }
}

/// Lets the system have the whole pages of `s` again; they read as zero from then on.
fn give_back(s: Slot) {
    #[cfg(unix)]
    {
        const PAGE: usize = 4096;
        let from = (s.ptr as usize).next_multiple_of(PAGE);
        let to = (s.ptr as usize + 4 * s.len) / PAGE * PAGE;
        if from < to {
            // SAFETY: private anonymous pages of an arena that holds nothing else; nothing reads them again.
            unsafe { libc::madvise(from as *mut libc::c_void, to - from, libc::MADV_DONTNEED) };
        }
    }
    #[cfg(not(unix))]
    let _ = s;
}

impl Exec for CpuExec {
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
        self.set(t, bytemuck::cast_slice(data))
    }

    fn read(&mut self, t: Tid) -> Result<Vec<f32>> {
        if self.dropped.contains(&self.graph.root(t).0) {
            let name = &self.graph.tensor(t).name;
            return Err(Error::run(format!(
                "{name} was packed and its plain copy is gone"
            )));
        }
        Ok(self.slice(t)?.to_vec())
    }

    fn read_u32(&mut self, t: Tid) -> Result<Vec<u32>> {
        Ok(bytemuck::cast_slice(self.slice(t)?).to_vec())
    }

    fn run(&mut self, phases: &[Phase]) -> Result<()> {
        self.each(phases, |_| ())
    }

    fn run_traced(&mut self, phases: &[Phase]) -> Result<Vec<Span>> {
        let mut spans = vec![];
        let begin = Instant::now();
        let mut last = Duration::ZERO;
        self.each(phases, |node| {
            let now = begin.elapsed();
            spans.push(Span {
                node,
                start: last,
                time: now - last,
                ..Span::default()
            });
            last = now;
        })?;
        Ok(spans)
    }
}

/// The processor's name and vector extensions.
fn processor() -> String {
    let name = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|s| {
        let line = s.lines().find(|l| l.starts_with("model name"))?;
        Some(line.split_once(':')?.1.trim().to_string())
    });
    let name = name.unwrap_or_else(|| std::env::consts::ARCH.to_string());
    #[cfg(target_arch = "x86_64")]
    {
        let simd = if is_x86_feature_detected!("avx512f") {
            "AVX-512"
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            "AVX2"
        } else {
            "SSE2"
        };
        format!("{name} ({simd})")
    }
    #[cfg(not(target_arch = "x86_64"))]
    name
}
