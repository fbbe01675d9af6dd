//! One look at a case: its kernels compiled, checked and measured.

use super::super::global::Global;
use super::inspect::validated;
use serde::Serialize;
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;
use tilewright::Result;
use tilewright::backend::cuda::{self, CudaOptions};
use tilewright::backend::wgpu::shaders::ShaderSource;
use tilewright::backend::wgpu::{AdapterTraits, Wgpu, WgpuCx, adapters};
use tilewright::backend::{Backend, CompileOptions};
use tilewright::bench::kernel::{KernelOptions, count_case, time_case};
use tilewright::bench::{Ceilings, Limits, Sample, kept_ceilings};
use tilewright::graph::Graph;
use tilewright::ops::check::{case_graph, case_seed, run_seeded};
use tilewright::ops::{Cost, Room};
use tilewright::profile::Counted;

/// What one op of a case came to; nodes of one op together.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Figure {
    /// Milliseconds, or warp instructions.
    pub value: f64,
    /// Where it was timed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Sample>,
    /// Where it was counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counted: Option<Counted>,
    /// Operations as the definition counts them.
    pub flops: u64,
    /// Compulsory bytes.
    pub bytes: u64,
    /// Share of the roofline, where the device's limits have been measured before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roofline: Option<f64>,
}

/// By op.
pub type Figures = BTreeMap<String, Figure>;

/// What one version of the kernels came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Right, with the worst error over its allowance.
    Right { worst: f64, figures: Figures },
    /// Wrong, and where.
    Wrong(String),
    /// Does not compile, launch or end.
    Broken(String),
}

/// What a look is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Compiling,
    Checking,
    Measuring,
}

impl Stage {
    pub fn text(self) -> &'static str {
        match self {
            Stage::Compiling => "compiling",
            Stage::Checking => "checking",
            Stage::Measuring => "measuring",
        }
    }
}

/// A case on a backend whose kernels are read from a folder.
pub struct Probe {
    pub g: Global,
    pub room: &'static Room,
    pub params: String,
    /// `wgpu`, `cuda:sim`, ...
    pub name: String,
    /// What is watched.
    pub dir: PathBuf,
    /// The device, once it was opened.
    device: OnceCell<String>,
    /// The adapter that shaders are assembled for before a device is opened.
    traits: OnceCell<Option<AdapterTraits>>,
}

impl Probe {
    pub fn new(g: Global, room: &'static Room, params: String, name: String, dir: PathBuf) -> Self {
        Probe {
            g,
            room,
            params,
            name,
            dir,
            device: OnceCell::new(),
            traits: OnceCell::new(),
        }
    }

    /// The device's name, for people; empty before it was opened.
    pub fn device(&self) -> &str {
        self.device.get().map_or("", String::as_str)
    }

    /// Whether instructions are counted in place of time.
    pub fn counts(&self) -> bool {
        self.name == "cuda:sim"
    }

    fn open(&self) -> Result<Box<dyn Backend>> {
        let (kind, which) = match self.name.split_once(':') {
            Some((kind, which)) => (kind, Some(which)),
            None => (self.name.as_str(), None),
        };
        if kind == "cuda" {
            let mut options = self.g.cuda_options()?;
            options.source.0 = options.source.0.replaced_by(&self.dir)?;
            return cuda::open_device(
                which,
                CudaOptions {
                    graph: false,
                    ..options
                },
            );
        }
        let mut options = self.g.wgpu_options()?;
        options.shaders.0 = options.shaders.0.replaced_by(&self.dir)?;
        options.adapter = which.map(Into::into);
        Ok(Box::new(Wgpu::open(&options)?))
    }

    /// Compiles, checks and measures; tells what it is about.
    pub fn look(&self, tell: &mut dyn FnMut(Stage)) -> Outcome {
        tell(Stage::Compiling);
        if let Some(fault) = self.fault() {
            return Outcome::Broken(fault);
        }
        match self.measure(tell) {
            Ok(o) => o,
            Err(e) => Outcome::Broken(e.to_string()),
        }
    }

    fn measure(&self, tell: &mut dyn FnMut(Stage)) -> Result<Outcome> {
        let backend = self.open()?;
        let backend = backend.as_ref();
        self.device.get_or_init(|| backend.device());
        let options = CompileOptions {
            poison: true,
            ..CompileOptions::default()
        };
        let (room, params, seed) = (self.room, &self.params, self.g.seed);
        let cg = case_graph(&room.build(params)?, case_seed(room, params, seed))?;
        // Kernels are compiled once a device: the check finds them made.
        drop(backend.compile(cg.graph.clone(), &options)?);
        tell(Stage::Checking);
        let found = run_seeded(room, params, backend, &options, seed)?;
        let wrong: Vec<String> = found
            .iter()
            .filter(|f| !f.ok())
            .map(ToString::to_string)
            .collect();
        if !wrong.is_empty() {
            return Ok(Outcome::Wrong(wrong.join("\n")));
        }
        let worst = found.iter().map(|f| f.worst).fold(0.0, f64::max);
        tell(Stage::Measuring);
        let figures = if self.counts() {
            self.count(backend, &cg.graph, &options)?
        } else {
            self.time(backend, &cg.graph)?
        };
        Ok(Outcome::Right { worst, figures })
    }

    fn count(
        &self,
        backend: &dyn Backend,
        graph: &Graph,
        options: &CompileOptions,
    ) -> Result<Figures> {
        let costs = costs(graph, backend.name());
        let counted = count_case(backend, self.room, &self.params, options)?;
        let figure = |(op, c): (String, Counted)| {
            let cost = costs.get(op.as_str()).map(|c| c.0).unwrap_or_default();
            let figure = Figure {
                value: c.instructions as f64,
                counted: Some(c),
                flops: cost.flops,
                bytes: cost.bytes,
                ..Figure::default()
            };
            (op, figure)
        };
        Ok(counted.into_iter().map(figure).collect())
    }

    fn time(&self, backend: &dyn Backend, graph: &Graph) -> Result<Figures> {
        let options = KernelOptions {
            passes: vec![],
            all_variants: false,
            hot: true,
            rivals: false,
            machine: None,
            limits: Limits {
                warm_up: 2,
                min_runs: 9,
                precision: 0.02,
                time: Duration::from_millis(250),
            },
        };
        let costs = costs(graph, backend.name());
        let ceilings = kept_ceilings(backend);
        let mut figures = Figures::new();
        for (op, t) in time_case(backend, self.room, &self.params, &options)? {
            let f = figures.entry(op).or_default();
            f.value += t.ms();
            f.time = Some(match f.time {
                None => t,
                Some(a) => Sample {
                    median: a.median + t.median,
                    low: a.low + t.low,
                    high: a.high + t.high,
                    min: a.min + t.min,
                    runs: a.runs.min(t.runs),
                },
            });
        }
        for (op, f) in &mut figures {
            let Some((cost, executed)) = costs.get(op.as_str()) else {
                continue;
            };
            (f.flops, f.bytes) = (cost.flops, cost.bytes);
            let floor = |c: &Ceilings| c.floor(*executed);
            f.roofline = ceilings.as_ref().map(|c| 1e3 * floor(c) / f.value);
        }
        Ok(figures)
    }

    /// What naga says of the case's shaders, with the file and line that the text came from. NVRTC tells them itself.
    fn fault(&self) -> Option<String> {
        if self.name.starts_with("cuda") {
            return None;
        }
        let source = ShaderSource(
            self.g
                .wgpu_options()
                .ok()?
                .shaders
                .0
                .replaced_by(&self.dir)
                .ok()?,
        );
        let first = || Some(adapters().ok()?.into_iter().next()?.traits);
        let traits = self.traits.get_or_init(first).as_ref()?;
        let cg = case_graph(&self.room.build(&self.params).ok()?, 1).ok()?;
        let mut seen = BTreeSet::new();
        for node in &cg.graph.nodes {
            let (x, y) = cg.graph.node_specs(node);
            let mut cx = WgpuCx::new(traits, &x, &y, None);
            node.op.wgpu(&mut cx).ok()?;
            for l in cx.launches {
                if !seen.insert((l.shader, l.consts.clone())) {
                    continue;
                }
                let text = match source.assemble(l.shader, &l.consts) {
                    Ok(text) => text,
                    Err(e) => return Some(e.to_string()),
                };
                if let Err(f) = validated(l.shader, &text) {
                    let line = f.line.and_then(|n| text.lines().nth(n as usize - 1));
                    let place = line.and_then(|l| self.place(&f.file, l));
                    let place = place.unwrap_or_else(|| f.file.clone());
                    let line = line.map_or(String::new(), |l| format!("\n  | {}", l.trim()));
                    return Some(format!("{place}: {}{line}", f.message));
                }
            }
        }
        None
    }

    /// `layer_norm.wgsl:41` of a line of assembled text: the line of the file, or of one that it includes, that is the
    /// same up to numbers, which unrolling puts in.
    fn place(&self, file: &str, line: &str) -> Option<String> {
        let mut files = vec![file.to_string()];
        let mut i = 0;
        while let Some(name) = files.get(i).cloned() {
            let text = std::fs::read_to_string(self.dir.join(&name)).ok()?;
            for (n, l) in text.lines().enumerate() {
                if plain(l) == plain(line) {
                    let path = self.dir.join(&name);
                    return Some(format!("{}:{}", path.display(), n + 1));
                }
                let include = l.trim().strip_prefix("//#include \"");
                if let Some(inc) = include.and_then(|l| l.strip_suffix('"')) {
                    files.push(inc.to_string());
                }
            }
            i += 1;
        }
        None
    }
}

/// What an op's nodes cost: as the definition counts, and as their kernels do it.
fn costs<'a>(graph: &'a Graph, backend: &str) -> BTreeMap<&'a str, (Cost, Cost)> {
    let mut costs = BTreeMap::<&str, (Cost, Cost)>::new();
    for node in &graph.nodes {
        let (x, y) = graph.node_specs(node);
        let cost = node.op.cost(&x, &y);
        let c = costs.entry(node.op.name()).or_default();
        for (sum, flops) in [
            (&mut c.0, cost.flops),
            (&mut c.1, node.op.executed(backend, None, &x, &y)),
        ] {
            sum.flops += flops;
            sum.bytes += cost.bytes;
        }
    }
    costs
}

/// A line with every number and every `${i}` as `#`.
fn plain(line: &str) -> String {
    let mut out = String::new();
    let mut rest = line.trim();
    while let Some(c) = rest.chars().next() {
        let placeholder = rest.strip_prefix("${").and_then(|r| r.split_once('}'));
        if let Some((_, after)) = placeholder {
            rest = after;
        } else if c.is_ascii_digit() {
            rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        }
        if !out.ends_with('#') {
            out.push('#');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unrolled_lines_are_found_again() {
        assert_eq!(
            plain("  let a${i} = b[${i} + 1u];"),
            plain("let a3 = b[3 + 1u];")
        );
        assert_ne!(plain("let a = b;"), plain("let a = c;"));
    }
}
