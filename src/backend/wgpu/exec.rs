//! Compiling a graph for an adapter: ops describe their launches, the planner places tensors, a program binds both.

use super::device::{WgpuDevice, WgpuOptions};
use super::launch::{ALIGN, Arg, Launch, Slot, WgpuCx, WorkId, fold};
use super::program::{Place, PlacedLaunch, Program, StepTime};
use crate::backend::{Backend, CompileOptions, Exec, Span};
use crate::graph::plan::{self, Limits, Memory};
use crate::graph::{Graph, Node, Phase, Tid};
use crate::{Error, Result};
use std::sync::{Arc, Mutex, MutexGuard};

/// An adapter as a backend. Graphs compiled by it share its device and its compiled kernels.
#[derive(Debug)]
pub struct Wgpu {
    device: Arc<WgpuDevice>,
}

impl Wgpu {
    /// Opens an adapter.
    ///
    /// # Errors
    /// There is none, or none of that name.
    pub fn open(options: &WgpuOptions) -> Result<Self> {
        Ok(Wgpu {
            device: Arc::new(WgpuDevice::open(options)?),
        })
    }

    /// The device.
    pub fn wgpu_device(&self) -> &WgpuDevice {
        &self.device
    }
}

/// Launches of one node, and the start of each of its workspaces within the node's.
struct Described {
    launches: Vec<Launch>,
    starts: Vec<(usize, usize)>,
    work: usize,
}

impl Backend for Wgpu {
    fn name(&self) -> &'static str {
        "wgpu"
    }

    fn device(&self) -> String {
        let r = self.device.report();
        format!("{} ({}, {}, {})", r.name, r.kind, r.api, r.driver)
    }

    fn launches(
        &self,
        graph: &Graph,
        node: &Node,
        variant: Option<&str>,
    ) -> Result<Option<String>> {
        let (x, y) = graph.node_specs(node);
        let mut cx = WgpuCx::new(self.device.traits(), &x, &y, variant);
        node.op.wgpu(&mut cx)?;
        Ok(Some(format!("{:?}", cx.launches)))
    }

    fn compile(&self, graph: Arc<Graph>, options: &CompileOptions) -> Result<Box<dyn Exec>> {
        let traits = self.device.traits();
        let mut described = Vec::with_capacity(graph.nodes.len());
        for node in &graph.nodes {
            let (x, y) = graph.node_specs(node);
            let variant = options.variant(self.name(), node.op.as_ref(), (&x, &y))?;
            let mut cx = WgpuCx::new(traits, &x, &y, variant);
            node.op.wgpu(&mut cx).map_err(|e| e.context(&node.scope))?;
            let mut work = 0;
            let mut starts = vec![];
            for &len in &cx.work {
                starts.push((work, len));
                work += len.next_multiple_of(ALIGN);
            }
            described.push(Described {
                launches: cx.launches,
                starts,
                work,
            });
        }
        let work: Vec<usize> = described.iter().map(|d| d.work).collect();
        let limits = Limits {
            align: ALIGN,
            max_arena: traits.max_buffer / 4 / ALIGN * ALIGN,
        };
        let memory = Memory::plan(&graph, &work, limits);
        let arenas = memory
            .arenas
            .iter()
            .map(|&elements| self.device.arena(4 * elements))
            .collect::<Result<Vec<_>>>()?;
        let mut placed = vec![];
        let mut nodes = vec![];
        for (i, (node, d)) in graph.nodes.iter().zip(&described).enumerate() {
            let place = |arg: &Arg| -> Result<Place> {
                let whole = match arg.slot {
                    Slot::In(k) => memory.place(node.inputs[k]),
                    Slot::Out(k) => memory.place(node.outputs[k]),
                    Slot::Work(WorkId(k)) => memory.work[i].map(|p| plan::Place {
                        offset: p.offset + d.starts[k].0,
                        len: d.starts[k].1,
                        ..p
                    }),
                };
                let whole = whole.ok_or_else(|| {
                    Error::run(format!("{}: {:?} has no memory", node.scope, arg.slot))
                })?;
                if whole.offset % ALIGN != 0 {
                    return Err(Error::run(format!(
                        "{}: {:?} starts at element {}, which is not a multiple of {ALIGN}",
                        node.scope, arg.slot, whole.offset
                    )));
                }
                Ok(Place::from(whole).part(arg.part))
            };
            if options.poison {
                let updated = node.op.updates();
                let outputs = (0..node.outputs.len())
                    .filter(|k| !updated.iter().any(|u| u.0 == *k))
                    .map(Arg::Out);
                let works = (0..d.starts.len()).map(|k| Arg::Work(WorkId(k)));
                for arg in outputs.chain(works) {
                    let place = place(&arg)?;
                    placed.extend(poison(place, traits.max_binding));
                }
                nodes.resize(placed.len(), i);
            }
            for launch in &d.launches {
                let places = launch.args.iter().map(place).collect::<Result<_>>()?;
                placed.push(PlacedLaunch {
                    launch: launch.clone(),
                    places,
                });
            }
            nodes.resize(placed.len(), i);
        }
        let program = self.device.program(&placed, &arenas)?;
        let label = |p: &PlacedLaunch| format!("{}/{}", p.launch.shader, p.launch.entry);
        let labels = placed.iter().map(label).collect();
        Ok(Box::new(WgpuExec {
            graph,
            memory,
            device: self.device.clone(),
            arenas,
            program,
            nodes,
            labels,
            staging: Mutex::default(),
        }))
    }
}

/// Fills a place with NaN, for tests that look for elements nobody wrote.
fn poison(place: Place, max_binding: usize) -> Vec<PlacedLaunch> {
    let n = place.bytes as usize / 4;
    let step = max_binding / 4 / ALIGN * ALIGN;
    (0..n)
        .step_by(step)
        .map(|start| {
            let len = step.min(n - start);
            let groups = fold(len, 64);
            PlacedLaunch {
                launch: Launch {
                    shader: "fill.wgsl",
                    entry: "fill",
                    consts: vec![],
                    args: vec![Arg::Out(0)],
                    params: vec![len as u32, groups[0], f32::NAN.to_bits()],
                    groups,
                },
                places: vec![place.part(Some((start, len)))],
            }
        })
        .collect()
}

impl From<plan::Place> for Place {
    fn from(p: plan::Place) -> Place {
        Place {
            arena: p.arena,
            offset: 4 * p.offset as u64,
            bytes: 4 * p.len as u64,
        }
    }
}

struct WgpuExec {
    graph: Arc<Graph>,
    memory: Memory,
    device: Arc<WgpuDevice>,
    arenas: Vec<wgpu::Buffer>,
    program: Program,
    /// The node of each step of the program.
    nodes: Vec<usize>,
    /// `gemm_tile.wgsl/tile` of each step.
    labels: Vec<String>,
    staging: Mutex<Option<wgpu::Buffer>>,
}

impl WgpuExec {
    fn place(&self, t: Tid) -> Result<Place> {
        self.memory.place(t).map(Place::from).ok_or_else(|| {
            let name = &self.graph.tensor(t).name;
            Error::run(format!("{name} is not used by the graph and has no memory"))
        })
    }

    fn set<T: bytemuck::Pod>(&mut self, t: Tid, data: &[T]) -> Result<()> {
        let place = self.place(t)?;
        if data.len() as u64 * 4 != place.bytes {
            let name = &self.graph.tensor(t).name;
            return Err(Error::run(format!(
                "{name} has {} elements, {} were given",
                place.bytes / 4,
                data.len()
            )));
        }
        self.device.write(&self.arenas, place, data);
        Ok(())
    }

    fn get<T: bytemuck::Pod>(&mut self, t: Tid) -> Result<Vec<T>> {
        let place = self.place(t)?;
        let mut staging: MutexGuard<_> = self.staging.lock().unwrap_or_else(|p| p.into_inner());
        self.device.read(&self.arenas, place, &mut staging)
    }
}

impl Exec for WgpuExec {
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
        let wanted = |step: usize| phases.contains(&self.graph.nodes[self.nodes[step]].phase);
        self.device.run(&self.program, wanted)?;
        self.device.wait()
    }

    fn run_traced(&mut self, phases: &[Phase]) -> Result<Vec<Span>> {
        let wanted = |step: usize| phases.contains(&self.graph.nodes[self.nodes[step]].phase);
        let times = self.device.run_traced(&self.program, wanted)?;
        let span = |t: StepTime| Span {
            node: self.nodes[t.step],
            kernel: self.labels[t.step].clone(),
            start: t.start,
            time: t.time,
            count: None,
        };
        Ok(times.into_iter().map(span).collect())
    }
}
