//! What no case tests: kernels that nothing launches, variants that no case suits, ops that models use and no case
//! reaches, rooms without an edge case.

use super::check::case_graph;
use super::{Op, ROOMS, Room};
use crate::Result;
use crate::backend::cuda::{CudaCx, KernelSource, Precision, Traits};
use crate::backend::wgpu::shaders::ShaderSource;
use crate::backend::wgpu::{AdapterTraits, WgpuCx};
use crate::graph::fuse::{Purpose, fuse};
use crate::graph::{Mode, Spec};
use crate::models::{ModelOptions, list};
use std::collections::{BTreeMap, BTreeSet};

/// Something without a test.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Gap {
    /// `kernel`, `variant`, `op`, `room`.
    pub kind: &'static str,
    /// Which.
    pub name: String,
    /// What it lacks.
    pub lacks: String,
}

/// What was counted, and what has no test.
#[derive(Clone, Debug, Default)]
pub struct Coverage {
    /// Kind and how many there are.
    pub counted: BTreeMap<&'static str, usize>,
    /// Those without a test.
    pub gaps: Vec<Gap>,
}

/// Devices that launch code chooses kernels by.
fn adapters() -> [AdapterTraits; 3] {
    let lanes = AdapterTraits {
        software: true,
        subgroups: true,
        subgroup_size: (8, 8),
        ..AdapterTraits::default()
    };
    let software = AdapterTraits {
        software: true,
        ..AdapterTraits::default()
    };
    [AdapterTraits::default(), software, lanes]
}

/// Kernels that the cases launch, and variants that some case suits.
#[derive(Default)]
struct Reached {
    ops: BTreeSet<&'static str>,
    /// Source and entry.
    kernels: BTreeSet<(String, String)>,
    /// Op, backend, variant: whether a case suits it.
    variants: BTreeMap<(&'static str, &'static str, &'static str), bool>,
}

impl Reached {
    fn take(&mut self, op: &dyn Op, x: &[Spec], y: &[Spec]) {
        self.ops.insert(op.name());
        for v in op.cpu_variants() {
            let mut cx = crate::backend::cpu::CpuCx::new(x, y, Some(*v).filter(|v| *v != "auto"));
            self.suits(op, "cpu", v, op.cpu(&mut cx).is_ok());
        }
        let named = |v: &'static str, i: usize| (i > 0).then_some(v);
        for traits in adapters() {
            for (i, v) in op.wgpu_variants().iter().enumerate() {
                let mut cx = WgpuCx::new(&traits, x, y, named(v, i));
                let good = op.wgpu(&mut cx).is_ok();
                self.suits(op, "wgpu", v, good);
                if good {
                    let launched = cx.launches.iter().map(|l| (l.shader, l.entry));
                    self.kernels(launched);
                }
            }
        }
        for arch in [80, 90] {
            let traits = Traits::assumed(arch);
            for precision in [Precision::F32, Precision::Tf32, Precision::Bf16] {
                for (i, v) in op.cuda_variants().iter().enumerate() {
                    let mut cx = CudaCx::new(&traits, precision, x, y, named(v, i));
                    let good = op.cuda(&mut cx).is_ok();
                    self.suits(op, "cuda", v, good);
                    if good {
                        let launched = cx.launches.iter().map(|l| (l.source, l.entry));
                        self.kernels(launched);
                    }
                }
            }
        }
    }

    fn kernels<'a>(&mut self, launched: impl Iterator<Item = (&'a str, &'a str)>) {
        let named = launched.map(|(s, e)| (s.to_string(), e.to_string()));
        self.kernels.extend(named);
    }

    fn suits(&mut self, op: &dyn Op, backend: &'static str, v: &'static str, good: bool) {
        *self.variants.entry((op.name(), backend, v)).or_default() |= good;
    }
}

/// The `@compute` entries of a shader.
fn wgsl_entries(text: &str) -> Vec<String> {
    let after = text.split("@compute").skip(1);
    let name = |part: &str| {
        Some(
            part.split_once("fn ")?
                .1
                .split_once('(')?
                .0
                .trim()
                .to_string(),
        )
    };
    after.filter_map(name).collect()
}

/// The `extern "C" __global__` entries of a CUDA source.
fn cuda_entries(text: &str) -> Vec<String> {
    let mut names = vec![];
    for part in text.split("__global__").skip(1) {
        let mut rest = part.trim_start().trim_start_matches("void").trim_start();
        if let Some(bounds) = rest.strip_prefix("__launch_bounds__") {
            rest = bounds.split_once(')').map_or("", |b| b.1).trim_start();
        }
        let name: String = rest
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        let plain = rest[name.len()..].starts_with('(');
        if plain && !name.is_empty() {
            names.push(name);
        }
    }
    names
}

/// Ops of every model, in training and in inference, by name, with a model that has it.
fn ops_of_models() -> Result<BTreeMap<&'static str, String>> {
    let mut ops = BTreeMap::new();
    for model in list() {
        for train in [true, false] {
            let mode = Mode {
                batch_stats: train,
                random: train,
            };
            let options = ModelOptions {
                classes: Some(10),
                ..ModelOptions::default()
            };
            let mut net = model.net(2, (model.image, model.image), mode, &options)?;
            match net.heads.logits.filter(|_| train) {
                Some(logits) => {
                    let labels = net.graph.input("labels", Spec::u32([2]));
                    let loss = net.graph.softmax_ce(logits, labels, None, 0.1, 0.0)?;
                    fuse(&mut net.graph, Purpose::Gradients)?;
                    net.graph.backward(loss, &[])?;
                }
                None => {
                    net.graph.keep(net.heads.output());
                    fuse(&mut net.graph, Purpose::Inference)?;
                }
            }
            for node in &net.graph.nodes {
                ops.entry(node.op.name())
                    .or_insert_with(|| model.id.clone());
            }
        }
    }
    Ok(ops)
}

fn room_gaps(room: &Room) -> Result<Vec<Gap>> {
    let mut gaps = vec![];
    let mut lacks = |what: &str| {
        gaps.push(Gap {
            kind: "room",
            name: room.name.into(),
            lacks: what.into(),
        });
    };
    let mut edge = false;
    for params in room.cases {
        let case = room.build(params)?;
        edge |= case.operands.iter().any(|o| o.spec.shape.contains(&1));
    }
    if !edge {
        lacks("a case with an extent of 1");
    }
    if room.bench.is_empty() {
        lacks("a bench case");
    }
    Ok(gaps)
}

/// Everything that has no test, by the sources given.
///
/// # Errors
/// A case or a model cannot be built, or a source cannot be read.
pub fn coverage(kernels: &KernelSource, shaders: &ShaderSource) -> Result<Coverage> {
    let mut reached = Reached::default();
    let mut gaps = vec![];
    let mut cases = 0;
    for room in ROOMS {
        gaps.extend(room_gaps(room)?);
        for params in room.cases {
            cases += 1;
            let cg = case_graph(&room.build(params)?, 1)?;
            for node in &cg.graph.nodes {
                let (x, y) = cg.graph.node_specs(node);
                reached.take(node.op.as_ref(), &x, &y);
            }
        }
    }
    let mut entries = vec![];
    for name in shaders.0.names() {
        let found = wgsl_entries(&shaders.0.read(name)?);
        entries.extend(found.into_iter().map(|e| (name.to_string(), e)));
    }
    for name in kernels.0.names() {
        let found = cuda_entries(&kernels.0.read(name)?);
        entries.extend(found.into_iter().map(|e| (name.to_string(), e)));
    }
    // Not of an op: what measures a device, and what poisons.
    let tools = ["ceiling.cu", "ceiling.wgsl", "fill.wgsl"];
    entries.retain(|e| !tools.contains(&e.0.as_str()));
    let lacking = entries.iter().filter(|e| {
        // An entry in a shared file is launched under the name of the file that includes it.
        !reached.kernels.contains(e) && !reached.kernels.iter().any(|k| k.1 == e.1)
    });
    gaps.extend(lacking.map(|(file, entry)| Gap {
        kind: "kernel",
        name: format!("{file}/{entry}"),
        lacks: "a case that launches it".into(),
    }));
    let unsuited = reached.variants.iter().filter(|v| !v.1);
    gaps.extend(unsuited.map(|((op, backend, variant), _)| Gap {
        kind: "variant",
        name: format!("{op} {variant} on {backend}"),
        lacks: "a case that it supports".into(),
    }));
    let used = ops_of_models()?;
    let unknown = used.iter().filter(|(op, _)| !reached.ops.contains(*op));
    gaps.extend(unknown.map(|(op, model)| Gap {
        kind: "op",
        name: op.to_string(),
        lacks: format!("a case; {model} uses it"),
    }));
    let counted = [
        ("room", ROOMS.len()),
        ("case", cases),
        ("kernel", entries.len()),
        ("variant", reached.variants.len()),
        ("op", reached.ops.len()),
    ];
    Ok(Coverage {
        counted: counted.into(),
        gaps,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_off_the_sources() {
        let wgsl =
            "@compute @workgroup_size(64)\nfn forward(@builtin(x) l: u32) {}\nfn helper() {}\n";
        assert_eq!(wgsl_entries(wgsl), ["forward"]);
        let cuda = "extern \"C\" __global__ void __launch_bounds__(256)\nrelu(unsigned n) {}\n\
                    extern \"C\" __global__ void copy(int n) {}\n";
        assert_eq!(cuda_entries(cuda), ["relu", "copy"]);
    }

    /// Everything is launched by some case: a new kernel needs one.
    #[test]
    fn every_kernel_and_every_op_has_a_case() {
        let found = coverage(&KernelSource::default(), &ShaderSource::default()).unwrap();
        assert!(found.counted["kernel"] > 100, "{:?}", found.counted);
        let gaps: Vec<&Gap> = found.gaps.iter().filter(|g| g.kind != "room").collect();
        assert!(gaps.is_empty(), "{gaps:#?}");
    }
}
