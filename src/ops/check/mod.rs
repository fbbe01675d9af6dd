//! `check`: every case of every room on a backend against the float64 reference, forward and backward, and the
//! reference's own gradients against central differences.

mod compare;
mod graph;

pub(crate) use compare::round_to;
pub use compare::{F32_TOLERANCE, Finding, ROUNDING_FACTOR, compare};
pub use graph::{CaseGraph, case_graph, seed_of};

use super::Room;
use super::guard::Guarded;
use super::reference::{Values, fetch, interpret, store};
use crate::backend::cuda::{CudaCx, Precision, Traits};
use crate::backend::{Backend, CompileOptions, Exec};
use crate::graph::{DType, Graph, Phase, Tid};
use crate::philox::Philox;
use crate::{Error, Result};
use compare::{compare_rounded, unit};

/// Whether any node of a graph launches something else in `precision` than in float32.
fn rounds(graph: &Graph, precision: Precision, options: &CompileOptions) -> Result<bool> {
    let traits = Traits::assumed(80);
    for node in &graph.nodes {
        let (x, y) = graph.node_specs(node);
        let variant = options.variants.get(node.op.name()).map(String::as_str);
        let launches = |p| {
            let mut cx = CudaCx::new(&traits, p, &x, &y, variant);
            match node.op.cuda(&mut cx) {
                Ok(()) => Ok(Some(cx.launches)),
                // A variant that float32 does not have.
                Err(Error::Input(_)) if variant.is_some() => Ok(None),
                Err(e) => Err(e),
            }
        };
        if launches(Precision::F32)? != launches(precision)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The seed of a room's case: its name's hash, varied by the program's `--seed`.
pub fn case_seed(room: &Room, params: &str, seed: u64) -> u64 {
    seed_of(&format!("{}({params})", room.name)) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Runs one case on a backend and compares every result and gradient with the reference.
///
/// # Errors
/// The case cannot be built or the backend fails. A wrong value is a [`Finding`], not an error.
pub fn run_case(
    room: &Room,
    params: &str,
    backend: &dyn Backend,
    options: &CompileOptions,
) -> Result<Vec<Finding>> {
    run_seeded(room, params, backend, options, 0)
}

/// [`run_case`] with the values of another seed than 0.
///
/// # Errors
/// As [`run_case`].
pub fn run_seeded(
    room: &Room,
    params: &str,
    backend: &dyn Backend,
    options: &CompileOptions,
    seed: u64,
) -> Result<Vec<Finding>> {
    let case = room.build(params)?;
    let cg = case_graph(&case, case_seed(room, params, seed))?;
    let reference = cg.reference();
    let guarded = Guarded::new(&cg, backend);
    let mut exec = backend.compile(guarded.graph.clone(), options)?;
    guarded.prepare(exec.as_mut())?;
    cg.write(exec.as_mut())?;
    exec.run(&[Phase::Forward, Phase::Backward])?;
    let mut findings = guarded.damage(exec.as_mut(), &cg)?;
    // Sums of k terms in float32 drift like sqrt(k); the longest sum of an op is bounded by its FLOPs per result.
    let terms = cg.graph.nodes.iter().map(|n| {
        let (_, y) = cg.graph.node_specs(n);
        let smallest = y.iter().map(|s| s.len()).max().unwrap_or(1).max(1);
        cg.graph.node_cost(n).flops as f64 / smallest as f64
    });
    let tolerance = F32_TOLERANCE * terms.fold(1.0, f64::max).sqrt() * case.condition;
    let rounded = match options.precision.unwrap_or(backend.precision()) {
        Precision::F32 => None,
        // Nothing is rounded: what holds in float32 holds here.
        p if !rounds(&cg.graph, p, options)? => None,
        p => Some((unit(p), cg.reference_of_rounded(p))),
    };
    for (name, t) in &cg.outputs {
        let want = fetch(&cg.graph, &reference, *t);
        let got = read_f64(exec.as_mut(), *t)?;
        let mut finding = match &rounded {
            None => compare(name, &got, &want.data, tolerance),
            Some((unit, rounded)) => {
                let other = fetch(&cg.graph, rounded, *t).data;
                compare_rounded(name, &got, &want.data, &other, *unit, tolerance)
            }
        };
        finding.shape = want.shape;
        findings.push(finding);
    }
    Ok(findings)
}

fn read_f64(exec: &mut dyn Exec, t: Tid) -> Result<Vec<f64>> {
    Ok(match exec.graph().spec(t).dtype {
        DType::F32 => exec.read(t)?.iter().map(|&v| f64::from(v)).collect(),
        DType::U32 => exec.read_u32(t)?.iter().map(|&v| f64::from(v)).collect(),
    })
}

/// A result that was not the same in every run.
#[derive(Clone, Debug)]
pub struct Unsteady {
    /// `y0`, `d1`.
    pub tensor: String,
    /// First element that differs.
    pub index: usize,
    /// The run, from 2, in which it did.
    pub run: usize,
}

/// Runs one case `runs` times, half of them in a second compilation, and compares the bits of every result.
///
/// # Errors
/// As [`run_case`].
pub fn repeat_case(
    room: &Room,
    params: &str,
    backend: &dyn Backend,
    options: &CompileOptions,
    runs: usize,
) -> Result<Option<Unsteady>> {
    let cg = case_graph(&room.build(params)?, case_seed(room, params, 0))?;
    let mut first: Option<Vec<Vec<u32>>> = None;
    let mut run = 0;
    for part in [runs.div_ceil(2), runs / 2] {
        let mut exec = backend.compile(cg.graph.clone(), options)?;
        for _ in 0..part {
            run += 1;
            cg.write(exec.as_mut())?;
            exec.run(&[Phase::Forward, Phase::Backward])?;
            let bits = cg.outputs.iter().map(|(_, t)| exec.read_u32(*t));
            let bits = bits.collect::<Result<Vec<_>>>()?;
            let Some(first) = &first else {
                first = Some(bits);
                continue;
            };
            for ((name, _), (a, b)) in cg.outputs.iter().zip(first.iter().zip(&bits)) {
                if let Some(index) = a.iter().zip(b).position(|(a, b)| a != b) {
                    return Ok(Some(Unsteady {
                        tensor: name.clone(),
                        index,
                        run,
                    }));
                }
            }
        }
    }
    Ok(None)
}

/// Whether any node of a case launches something else on CUDA in bf16 than in float32.
///
/// # Errors
/// The case cannot be built, or a launch is beyond the limits.
pub fn has_precisions(room: &Room, params: &str) -> Result<bool> {
    let cg = case_graph(&room.build(params)?, 1)?;
    rounds(&cg.graph, Precision::Bf16, &CompileOptions::default())
}

/// Holds the reference's gradients of one case to central differences of `v . f(x)` along random directions, one per
/// differentiated operand plus single elements.
///
/// # Errors
/// The case cannot be built. A wrong gradient is a [`Finding`].
pub fn check_gradients(room: &Room, params: &str, seed: u64) -> Result<Vec<Finding>> {
    let case = room.build(params)?;
    let seed = case_seed(room, params, seed);
    let cg = case_graph(&case, seed)?;
    let at = cg.reference();
    // A case that says nothing, whatever a kernel does right: filters that meet only padding.
    for (name, t) in &cg.outputs {
        let want = fetch(&cg.graph, &at, *t);
        if want.data.len() > 4 && want.data.iter().all(|&v| v == 0.0) {
            return Err(Error::run(format!(
                "the reference of {}({params}) gives only zeros for {name}",
                room.name
            )));
        }
    }
    let dot = |values: &Values| -> f64 {
        cg.cotangents
            .iter()
            .map(|&(y, c)| {
                let (y, c) = (fetch(&cg.graph, values, y), fetch(&cg.graph, values, c));
                y.data.iter().zip(&c.data).map(|(a, b)| a * b).sum::<f64>()
            })
            .sum()
    };
    let mut findings = vec![];
    for &(i, x, d) in &cg.grads {
        let grad = fetch(&cg.graph, &at, d);
        let base = fetch(&cg.graph, &cg.values(), x);
        let mut rng = Philox::new(seed, 5000 + i as u32);
        let mut probes: Vec<Vec<f64>> = (0..2)
            .map(|_| base.data.iter().map(|_| f64::from(rng.normal())).collect())
            .collect();
        for _ in 0..2 {
            let mut e = vec![0.0; base.data.len()];
            e[rng.below(base.data.len() as u32) as usize] = 1.0;
            probes.push(e);
        }
        let norm = grad.data.iter().map(|v| v * v).sum::<f64>().sqrt();
        for p in &probes {
            let side = |sign: f64| {
                let mut v = cg.values();
                let mut moved = base.clone();
                for (m, p) in moved.data.iter_mut().zip(p) {
                    *m += sign * case.step * p;
                }
                store(&cg.graph, &mut v, x, moved);
                interpret(&cg.graph, &[Phase::Forward], &mut v);
                dot(&v)
            };
            let numeric = (side(1.0) - side(-1.0)) / (2.0 * case.step);
            let analytic: f64 = grad.data.iter().zip(p).map(|(a, b)| a * b).sum();
            let scale = 1e-5 * (norm * p.iter().map(|v| v * v).sum::<f64>().sqrt() + 1e-6);
            findings.push(Finding {
                tensor: format!("d{i}"),
                worst: (numeric - analytic).abs() / scale,
                index: 0,
                got: analytic,
                want: numeric,
                allowed: scale,
                shape: vec![],
            });
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::ROOMS;
    use std::sync::Arc;

    fn report(problems: &[String]) {
        assert!(
            problems.is_empty(),
            "{} problems:\n{}",
            problems.len(),
            problems.join("\n")
        );
    }

    fn all_cases(mut f: impl FnMut(&Room, &str) -> Result<Vec<Finding>>) {
        let mut problems = vec![];
        let only = std::env::var("TILEWRIGHT_CASE").unwrap_or_default();
        for room in ROOMS {
            for params in room.cases {
                let name = format!("{}({params})", room.name);
                if !name.contains(&only) {
                    continue;
                }
                match f(room, params) {
                    Ok(findings) => {
                        for w in findings.iter().filter(|w| !w.ok()) {
                            problems.push(format!(
                                "{name} {}: error {:.3} of the allowance at {}: {} for {}",
                                w.tensor, w.worst, w.index, w.got, w.want
                            ));
                        }
                    }
                    Err(e) => problems.push(format!("{name}: {e}")),
                }
            }
        }
        report(&problems);
    }

    #[test]
    fn reference_gradients_follow_central_differences() {
        all_cases(|room, params| check_gradients(room, params, 0));
    }

    #[test]
    fn cpu_follows_the_reference() {
        let options = CompileOptions {
            poison: true,
            ..Default::default()
        };
        let cpu = crate::backend::open("cpu").unwrap();
        all_cases(|room, params| run_case(room, params, cpu.as_ref(), &options));
    }

    /// On whatever adapter there is; checked and trusted shaders, kernels for software adapters and for GPUs.
    #[test]
    fn wgpu_follows_the_reference() {
        use crate::backend::wgpu::{Wgpu, WgpuOptions};
        if let Err(e) = crate::backend::wgpu::adapters() {
            assert!(std::env::var("CI").is_err(), "{e}");
            println!("skipped: {e}");
            return;
        }
        let options = CompileOptions {
            poison: true,
            ..Default::default()
        };
        for gpu_kernels in [false, true] {
            for checked in [false, true] {
                let wgpu = Wgpu::open(&WgpuOptions {
                    checked,
                    gpu_kernels,
                    ..Default::default()
                })
                .unwrap();
                all_cases(|room, params| run_case(room, params, &wgpu, &options));
            }
        }
    }

    /// Tensors larger than one binding are worked on in parts, never refused.
    #[test]
    fn wgpu_splits_what_a_binding_cannot_hold() {
        use crate::backend::wgpu::{Wgpu, WgpuOptions};
        if let Err(e) = crate::backend::wgpu::adapters() {
            assert!(std::env::var("CI").is_err(), "{e}");
            println!("skipped: {e}");
            return;
        }
        for gpu_kernels in [false, true] {
            let wgpu = Wgpu::open(&WgpuOptions {
                checked: true,
                gpu_kernels,
                max_binding: Some(128 << 10),
                ..Default::default()
            })
            .unwrap();
            for (op, params) in [
                ("conv2d", "n=32,h=16,c=8,k=16,r=3,pad=1,stride=2"),
                ("linear", "m=2400,i=32,o=64,bias=1,act=gelu"),
                ("layer_norm", "n=120,t=5,c=64"),
                ("batch_norm", "n=16,h=16,w=16,c=16,relu=1"),
                ("attention", "n=24,t=16,h=3,d=16"),
            ] {
                let room = crate::ops::room(op).unwrap();
                let options = CompileOptions {
                    poison: true,
                    ..Default::default()
                };
                for f in run_case(room, params, &wgpu, &options).unwrap() {
                    assert!(
                        f.ok(),
                        "{op}({params}) {}: {} for {} at {}",
                        f.tensor,
                        f.got,
                        f.want,
                        f.index
                    );
                }
            }
        }
    }

    /// The real CUDA kernels with their real launch code, compiled by NVRTC, in the simulator: every variant.
    fn cuda_kernels_follow_the_reference(precision: Precision) {
        use crate::backend::cuda::{Cuda, CudaOptions, Nvrtc, Simulated};
        if let Err(e) = Nvrtc::get() {
            assert!(std::env::var("CI").is_err(), "{e}");
            println!("skipped: {e}");
            return;
        }
        let cuda = Cuda::new(Arc::new(Simulated::default()), CudaOptions::default()).unwrap();
        let options = CompileOptions {
            poison: true,
            precision: Some(precision),
            ..Default::default()
        };
        all_cases(|room, params| {
            let cg = case_graph(&room.build(params)?, 1)?;
            // Where nothing is rounded the kernels are those of float32.
            if precision != Precision::F32 && !rounds(&cg.graph, precision, &options)? {
                return Ok(vec![]);
            }
            let mut findings = run_case(room, params, &cuda, &options)?;
            for (op, variant) in cuda_variants(&cg.graph) {
                let mut options = options.clone();
                options.variants.insert(op.into(), variant.into());
                match run_case(room, params, &cuda, &options) {
                    // A variant need not support every shape or precision, and says so.
                    Err(Error::Input(_)) => {}
                    found => findings.extend(found.map_err(|e| e.context(variant))?),
                }
            }
            Ok(findings)
        });
    }

    #[test]
    fn cuda_kernels_follow_the_reference_in_f32() {
        cuda_kernels_follow_the_reference(Precision::F32);
    }

    #[test]
    fn cuda_kernels_follow_the_reference_in_tf32() {
        cuda_kernels_follow_the_reference(Precision::Tf32);
    }

    #[test]
    fn cuda_kernels_follow_the_reference_in_bf16() {
        cuda_kernels_follow_the_reference(Precision::Bf16);
    }

    /// Rounded operands have an allowance of 2.5 times what rounding costs, in the worst element and on average.
    #[test]
    fn rounding_has_its_allowance_and_no_more() {
        let want: Vec<f64> = (0..1000).map(|i| f64::from(i) - 500.5).collect();
        let off = |by: f64| -> Vec<f64> {
            want.iter()
                .enumerate()
                .map(|(i, w)| w + if i % 2 == 0 { by } else { -by })
                .collect()
        };
        let other = off(1e-2);
        let ratio = |got: &[f64]| compare_rounded("t", got, &want, &other, 1e-2, 0.0).worst;
        assert!((ratio(&off(2e-2)) - 0.8).abs() < 1e-6);
        assert!(ratio(&off(2.6e-2)) > 1.0);
        // One element far off, and a small error everywhere: each is seen.
        let mut one = want.clone();
        one[7] += 0.03;
        assert!(ratio(&one) > 1.0);
    }

    /// The nodes of a case that have more than one CUDA variant, with each but the default.
    fn cuda_variants(graph: &Graph) -> Vec<(&'static str, &'static str)> {
        let all = graph.nodes.iter().flat_map(|n| {
            let named = n.op.cuda_variants().iter().skip(1);
            named.map(|&v| (n.op.name(), v))
        });
        all.collect()
    }

    #[test]
    fn shape_rules_refuse() {
        for room in ROOMS {
            for params in room.refused {
                assert!(
                    room.build(params).is_err(),
                    "{}({params}) was accepted",
                    room.name
                );
            }
        }
    }

    #[test]
    fn comparison_sees_nan_and_infinity_by_place() {
        let ok = |g: &[f64], w: &[f64]| compare("t", g, w, 1e-6).ok();
        assert!(ok(&[1.0, f64::NAN], &[1.0, f64::NAN]));
        assert!(!ok(&[f64::NAN, 1.0], &[1.0, 1.0]));
        assert!(!ok(&[1.0, 1.0], &[1.0, f64::NAN]));
        assert!(!ok(&[f64::INFINITY], &[f64::NEG_INFINITY]));
        assert!(!ok(&[1.00001, 1.0], &[1.0, 1.0]));
    }
}
