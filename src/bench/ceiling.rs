//! What a device can do at most, measured: multiply-adds a second, and bytes a second by how much is touched.

use super::measure::{Limits, measure};
use crate::backend::cpu::multiversion::{Level, level};
#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::simd::{Avx2, Avx512};
use crate::backend::cpu::simd::{Portable, Simd};
use crate::backend::cpu::{CpuCx, CpuKernel, par};
use crate::backend::cuda::{self, CudaCx, Precision};
use crate::backend::wgpu::launch::{Launch, fold};
use crate::backend::wgpu::{Arg, WgpuCx};
use crate::backend::{Backend, CompileOptions};
use crate::graph::{Graph, Phase, Spec};
use crate::ops::{Cost, Host, Op};
use crate::report::write_atomic;
use crate::{Error, Result, ensure, op_common};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The measured limits of a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Multiply-adds in registers, as FLOP/s: float32, or on tensor cores where the backend's precision is less.
    pub flops: f64,
    /// `[bytes touched, bytes/s]`, the best of copying, reading and changing in place, repeated over the same memory: a
    /// small amount stays in a cache. By rising amount.
    pub bandwidth: Vec<[f64; 2]>,
    /// Seconds of a run that does next to nothing.
    pub launch: f64,
}

impl Ceilings {
    /// Bytes/s for work that touches `bytes`: the measured rate at the next smaller amount, so that no real pass is
    /// above it.
    pub fn bandwidth(&self, bytes: u64) -> f64 {
        let at = |p: &&[f64; 2]| p[0] <= bytes as f64;
        let point = self.bandwidth.iter().rev().find(at);
        point
            .or(self.bandwidth.first())
            .map_or(f64::INFINITY, |p| p[1])
    }

    /// Bytes/s of main memory.
    pub fn memory(&self) -> f64 {
        self.bandwidth.last().map_or(f64::INFINITY, |p| p[1])
    }

    /// The shortest time in which `cost` can be done.
    pub fn floor(&self, cost: Cost) -> f64 {
        let bytes = cost.bytes as f64 / self.bandwidth(cost.bytes);
        (cost.flops as f64 / self.flops).max(bytes)
    }

    /// Takes the better of both, point by point.
    fn raise(&mut self, other: Option<&Ceilings>) {
        let Some(o) = other.filter(|o| o.bandwidth.len() == self.bandwidth.len()) else {
            return;
        };
        self.flops = self.flops.max(o.flops);
        self.launch = self.launch.min(o.launch);
        for (a, b) in self.bandwidth.iter_mut().zip(&o.bandwidth) {
            a[1] = a[1].max(b[1]);
        }
    }

    /// Whether arithmetic (not memory) sets the floor of `cost`.
    pub fn compute_bound(&self, cost: Cost) -> bool {
        cost.flops as f64 / self.flops >= cost.bytes as f64 / self.bandwidth(cost.bytes)
    }
}

/// The ceilings of `backend`'s device: from the user's cache folder where they were measured before, else measured now
/// (some seconds) and kept there.
///
/// # Errors
/// The device failed. A cache that cannot be read or written is no error.
pub fn ceilings(backend: &dyn Backend, again: bool) -> Result<Ceilings> {
    let key = key_of(backend);
    let file = cache_file();
    let mut known = known();
    let before = known.get(&key).cloned();
    let measured = match before {
        Some(c) if !again => return Ok(c),
        before => {
            let mut c = measure_ceilings(backend)?;
            // A busy device seems slower than it is, never faster.
            c.raise(before.as_ref());
            c
        }
    };
    known.insert(key, measured.clone());
    if let Some(f) = file {
        let json = serde_json::to_vec_pretty(&known).map_err(|e| Error::run(e.to_string()))?;
        // Without a cache it is measured again the next time.
        let _ = f.parent().map(std::fs::create_dir_all);
        let _ = write_atomic(&f, &json);
    }
    Ok(measured)
}

/// The ceilings of `backend`'s device where they were measured before and kept.
pub fn kept_ceilings(backend: &dyn Backend) -> Option<Ceilings> {
    known().remove(&key_of(backend))
}

fn key_of(backend: &dyn Backend) -> String {
    format!("{} {}", backend.name(), backend.device())
}

/// What the cache has, by device.
fn known() -> BTreeMap<String, Ceilings> {
    let read = |f: PathBuf| serde_json::from_slice(&std::fs::read(f).ok()?).ok();
    cache_file().and_then(read).unwrap_or_default()
}

/// `ceilings.json` in the user's cache folder.
fn cache_file() -> Option<PathBuf> {
    let dir = |name: &str| {
        std::env::var_os(name)
            .filter(|v| !v.is_empty())
            .map(PathBuf::from)
    };
    let cache = dir("XDG_CACHE_HOME")
        .or_else(|| dir("LOCALAPPDATA"))
        .or_else(|| dir("HOME").map(|h| h.join(".cache")))?;
    Some(cache.join("tilewright/ceilings.json"))
}

/// The share of the peak that the device gives just now, when it is asked for nothing else: below 1 where something
/// else is running, or where it is hot.
///
/// # Errors
/// The device failed.
pub fn present_share(backend: &dyn Backend, ceilings: &Ceilings) -> Result<f64> {
    Ok(peak(backend, 0.01, 5)? / ceilings.flops)
}

/// Multiply-adds a second, as FLOP/s: the best of `runs` of at least `seconds` each.
fn peak(backend: &dyn Backend, seconds: f64, runs: usize) -> Result<f64> {
    // Enough chains for every lane of the device, long enough to hide the start.
    let n = if backend.name() == "cuda" {
        1 << 18
    } else {
        1 << 12
    };
    let precision = backend.precision();
    let mut rounds = 1 << 8;
    loop {
        let (t, flops) = match precision {
            Precision::F32 => {
                let op = FmaChains { rounds };
                (best(backend, op, n, runs)?, op.flops(n))
            }
            _ => {
                let op = MmaChains { rounds, precision };
                (best(backend, op, n, runs)?, op.flops(n))
            }
        };
        if t >= seconds || rounds >= 1 << 22 {
            return Ok(flops as f64 / t);
        }
        rounds *= 4;
    }
}

/// The best of several rounds, some time apart: a ceiling is what the device can do undisturbed.
fn measure_ceilings(backend: &dyn Backend) -> Result<Ceilings> {
    const ROUNDS: usize = 4;
    let mut ceilings = measure_once(backend)?;
    for _ in 1..ROUNDS {
        ceilings.raise(Some(&measure_once(backend)?));
    }
    Ok(ceilings)
}

fn measure_once(backend: &dyn Backend) -> Result<Ceilings> {
    let flops = peak(backend, 0.03, 5)?;
    let mut bandwidth = vec![];
    for shift in (16..=28).step_by(2) {
        let both = 1usize << (shift - 3);
        // One binding is 128 MiB at most by WebGPU's default limits.
        let read = 1usize << (shift - 2).min(25);
        let repeats = (1usize << 27 >> shift).clamp(3, 50);
        let rate = |pass, n, bytes: usize| -> Result<f64> {
            Ok((bytes * n) as f64 / best(backend, pass, n, repeats)?)
        };
        let rates = [
            rate(Stream::Copy, both, 8)?,
            rate(Stream::Sum, read, 4)?,
            rate(Stream::Update, both, 8)?,
        ];
        bandwidth.push([
            (1u64 << shift) as f64,
            rates.into_iter().fold(0.0, f64::max),
        ]);
    }
    // More memory is never faster; where it seems so, the smaller amount was held up by the start of the run.
    for i in (0..bandwidth.len() - 1).rev() {
        bandwidth[i][1] = f64::max(bandwidth[i][1], bandwidth[i + 1][1]);
    }
    let launch = best(backend, Stream::Copy, 64, 30)?;
    Ok(Ceilings {
        flops,
        bandwidth,
        launch,
    })
}

fn best(backend: &dyn Backend, op: impl Op, n: usize, runs: usize) -> Result<f64> {
    let mut g = Graph::new();
    let x = g.input("x", Spec::f32([n]));
    let y = g.push1(op, &[x])?;
    g.keep(y);
    let mut exec = backend.compile(Arc::new(g), &CompileOptions::default())?;
    exec.write(x, &vec![0.5; n])?;
    let limits = Limits {
        warm_up: 1,
        min_runs: runs,
        precision: f64::INFINITY,
        time: Duration::ZERO,
    };
    // The device's own clock where it has one: it leaves out the time of submitting.
    let mut device = f64::INFINITY;
    let wall = measure(limits, || {
        let times = exec.run_timed(&[Phase::Forward])?;
        device = device.min(times.iter().map(|t| t.1.as_secs_f64()).sum());
        Ok(())
    })?;
    Ok(if device > 0.0 {
        device.min(wall.min)
    } else {
        wall.min
    })
}

/// Independent multiply-adds in registers: `x[i]` starts [`CHAINS`] chains of 16 x `rounds` multiply-adds each, whose
/// sum is `y[i]`.
#[derive(Clone, Copy, Debug)]
struct FmaChains {
    rounds: usize,
}

/// Chains per element: latency 4, two units.
const CHAINS: usize = 8;
/// Multiply-adds of a chain in a round.
const DEPTH: usize = 16;
const FACTOR: f32 = 0.999;
const ADDEND: f32 = 1e-3;

impl FmaChains {
    fn flops(self, n: usize) -> u64 {
        2 * (n * CHAINS * DEPTH * self.rounds) as u64
    }
}

impl Op for FmaChains {
    op_common!("fma_chains");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        Ok(vec![x[0].clone()])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        for (y, &x) in y[0].data.iter_mut().zip(&x[0].data) {
            let chain = |k: usize| {
                let start = x + k as f64;
                (0..self.rounds * DEPTH)
                    .fold(start, |v, _| v * f64::from(FACTOR) + f64::from(ADDEND))
            };
            *y = (0..CHAINS).map(chain).sum();
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let rounds = self.rounds;
        Ok(Box::new(move |a| {
            let (x, y) = (a.x(0), par::SharedMut::new(a.y(0)));
            par::for_each(x.len().div_ceil(LANES), |i| {
                let from = i * LANES;
                let len = LANES.min(x.len() - from);
                // SAFETY: each task has elements of its own.
                fma_chains(rounds, &x[from..from + len], unsafe { y.slice(from, len) });
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let n = cx.y[0].len();
        let groups = fold(n, 64);
        cx.launch(Launch {
            shader: "ceiling.wgsl",
            entry: "fma_chains",
            consts: vec![],
            args: vec![Arg::In(0), Arg::Out(0)],
            params: vec![n as u32, groups[0], self.rounds as u32],
            groups,
        })
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let args = [Arg::n(self.rounds), Arg::In(0), Arg::Out(0)];
        cx.items(
            ("ceiling.cu", "fma_chains"),
            vec![],
            cx.y[0].len(),
            256,
            &args,
        )
    }
}

/// Products of small constant matrices on tensor cores: every lane keeps [`CHAINS`] accumulators that start at
/// `x[i] + 0 ..` and get `rounds` products each; `y[i]` is one element's sum over them.
#[derive(Clone, Copy, Debug)]
struct MmaChains {
    rounds: usize,
    precision: Precision,
}

impl MmaChains {
    /// Length of the sum in one product.
    fn depth(self) -> usize {
        if self.precision == Precision::Bf16 {
            16
        } else {
            8
        }
    }

    fn flops(self, n: usize) -> u64 {
        2 * (n / 32 * CHAINS * self.rounds * 16 * 8 * self.depth()) as u64
    }
}

impl Op for MmaChains {
    op_common!("mma_chains");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        ensure!(x[0].len().is_multiple_of(32), "takes whole warps");
        Ok(vec![x[0].clone()])
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let each = (self.rounds * self.depth()) as f64 / 1024.0;
        for (y, &x) in y[0].data.iter_mut().zip(&x[0].data) {
            *y = (0..CHAINS).map(|k| x + k as f64 + each).sum();
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        Err(Error::run(
            "tensor cores are CUDA's; the CPU computes in float32",
        ))
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let consts = vec![("OPERAND", self.depth().to_string())];
        let args = [Arg::n(self.rounds), Arg::In(0), Arg::Out(0)];
        cx.items(
            ("ceiling.cu", "mma_chains"),
            consts,
            cx.y[0].len(),
            256,
            &args,
        )
    }
}

/// One vector register of the widest kind.
const LANES: usize = 16;

/// [`FmaChains`] on up to [`LANES`] elements.
fn fma_chains(rounds: usize, x: &[f32], y: &mut [f32]) {
    let mut lanes = [0.0; LANES];
    lanes[..x.len()].copy_from_slice(x);
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,fma")]
        fn avx512(rounds: usize, lanes: &mut [f32; LANES]) {
            // SAFETY: inside a function that has the instructions; one register is all of `lanes`.
            unsafe { chains::<Avx512>(rounds, lanes.as_mut_ptr()) }
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(rounds: usize, lanes: &mut [f32; LANES]) {
            for half in lanes.chunks_exact_mut(Avx2::LANES) {
                // SAFETY: as above, for half of them.
                unsafe { chains::<Avx2>(rounds, half.as_mut_ptr()) }
            }
        }
        match level() {
            // SAFETY: `level` saw that the processor has these instructions.
            Level::Avx512 => unsafe { avx512(rounds, &mut lanes) },
            // SAFETY: as above.
            Level::Avx2 => unsafe { avx2(rounds, &mut lanes) },
            Level::Base => base(rounds, &mut lanes),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    base(rounds, &mut lanes);
    let n = y.len();
    y.copy_from_slice(&lanes[..n]);
}

fn base(rounds: usize, lanes: &mut [f32; LANES]) {
    for part in lanes.chunks_exact_mut(Portable::LANES) {
        // SAFETY: plain Rust; one register is all of `part`.
        unsafe { chains::<Portable>(rounds, part.as_mut_ptr()) }
    }
}

/// [`CHAINS`] registers, each multiplied and added to over and over.
///
/// # Safety
/// As the methods of [`Simd`]; `lanes` points to one register's floats.
#[inline(always)]
unsafe fn chains<S: Simd>(rounds: usize, lanes: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let (factor, addend) = (S::splat(FACTOR), S::splat(ADDEND));
        let x = S::load(lanes);
        let mut v: [S::V; CHAINS] = std::array::from_fn(|k| S::add(x, S::splat(k as f32)));
        for _ in 0..rounds * DEPTH {
            for v in &mut v {
                *v = S::fma(*v, factor, addend);
            }
        }
        let sum = v[1..].iter().fold(v[0], |a, &b| S::add(a, b));
        S::store(lanes, sum);
    }
}

/// One pass over memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stream {
    /// Every element to another place.
    Copy,
    /// A sum per [`RUN`] elements: reads.
    Sum,
    /// Every element changed in place: unlike a copy, what is written was read before and need not be fetched for it.
    Update,
}

/// Elements that a sum of [`Stream`] reads.
const RUN: usize = 64;

impl Op for Stream {
    op_common!("stream");

    fn infer(&self, x: &[Spec]) -> Result<Vec<Spec>, String> {
        ensure!(x.len() == 1, "takes one operand");
        let n = x[0].len();
        ensure!(n.is_multiple_of(RUN), "takes a multiple of {RUN} elements");
        Ok(vec![Spec::f32([if *self == Stream::Sum {
            n / RUN
        } else {
            n
        }])])
    }

    fn updates(&self) -> &'static [(usize, usize)] {
        match self {
            Stream::Update => &[(0, 0)],
            _ => &[],
        }
    }

    fn reference(&self, x: &[&Host], y: &mut [Host]) {
        let n = y[0].data.len();
        for (i, y) in y[0].data.iter_mut().enumerate() {
            *y = match self {
                Stream::Copy => x[0].data[i],
                Stream::Sum => (0..RUN).map(|k| x[0].data[k * n + i]).sum(),
                Stream::Update => x[0].data[i] * f64::from(FACTOR),
            };
        }
    }

    fn cpu(&self, _cx: &mut CpuCx) -> Result<CpuKernel> {
        let pass = *self;
        Ok(Box::new(move |a| {
            let out = a.y(0);
            let n = out.len();
            let y = par::SharedMut::new(out);
            let threads = rayon::current_num_threads();
            let chunk = n.div_ceil(threads).next_multiple_of(RUN);
            par::for_each(n.div_ceil(chunk), |i| {
                let from = i * chunk;
                let len = chunk.min(n - from);
                // SAFETY: each task has elements of its own.
                let y = unsafe { y.slice(from, len) };
                match pass {
                    Stream::Copy => y.copy_from_slice(&a.x(0)[from..from + len]),
                    Stream::Sum => sum_runs(n, from, a.x(0), y),
                    Stream::Update => y.iter_mut().for_each(|y| *y *= FACTOR),
                }
            });
        }))
    }

    fn wgpu(&self, cx: &mut WgpuCx) -> Result<()> {
        let (entry, per) = self.kernel();
        let n = cx.y[0].len() / per;
        let groups = fold(n, 64);
        let mut args = vec![Arg::In(0), Arg::Out(0)];
        if *self == Stream::Update {
            args.pop();
        }
        cx.launch(Launch {
            shader: "ceiling.wgsl",
            entry,
            consts: vec![],
            args,
            params: vec![n as u32, groups[0], 0],
            groups,
        })
    }

    fn cuda(&self, cx: &mut CudaCx) -> Result<()> {
        use cuda::Arg;
        let (entry, per) = self.kernel();
        let n = cx.y[0].len() / per;
        let args = [Arg::In(0), Arg::Out(0)];
        let args = &args[usize::from(*self == Stream::Update)..];
        cx.items(("ceiling.cu", entry), vec![], n, 256, args)
    }
}

impl Stream {
    /// The kernel's name, and results per thread.
    fn kernel(self) -> (&'static str, usize) {
        match self {
            Stream::Copy => ("copy", 4),
            Stream::Sum => ("sum_runs", 1),
            Stream::Update => ("update", 4),
        }
    }
}

crate::multiversion! {
    /// `y[i] = sum over k of x[k * n + from + i]`, a block of `y` at a time so that it stays in the first cache.
    fn sum_runs(n: usize, from: usize, x: &[f32], y: &mut [f32]) {
        const BLOCK: usize = 1024;
        for (b, y) in y.chunks_mut(BLOCK).enumerate() {
            y.fill(0.0);
            for k in 0..RUN {
                let x = &x[k * n + from + b * BLOCK..][..y.len()];
                for (y, &x) in y.iter_mut().zip(x) {
                    *y += x;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::{Values, interpret};

    fn follows(backend: &dyn Backend, op: impl Op, n: usize) {
        let mut g = Graph::new();
        let x = g.input("x", Spec::f32([n]));
        let y = g.push1(op, &[x]).unwrap();
        g.keep(y);
        let data: Vec<f32> = (0..n).map(|i| (i % 97) as f32 / 97.0).collect();
        let mut values = Values::new();
        let host = Host {
            shape: vec![n],
            data: data.iter().map(|&v| f64::from(v)).collect(),
        };
        values.insert(x, host);
        interpret(&g, &[Phase::Forward], &mut values);
        let want = values[&y].data.clone();
        let mut exec = backend
            .compile(Arc::new(g), &CompileOptions::default())
            .unwrap();
        exec.write(x, &data).unwrap();
        exec.run(&[Phase::Forward]).unwrap();
        for (got, want) in exec.read(y).unwrap().iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-4 * want.abs().max(1.0));
        }
    }

    #[test]
    fn ceilings_are_measured_on_kernels_that_do_their_work() {
        let mut names = vec!["cpu"];
        if crate::backend::wgpu::adapters().is_ok() {
            names.push("wgpu");
        }
        if cuda::sim_present() {
            names.push("cuda:sim");
            let sim = crate::backend::open("cuda:sim").unwrap();
            for precision in [Precision::Tf32, Precision::Bf16] {
                let op = MmaChains {
                    rounds: 3,
                    precision,
                };
                follows(sim.as_ref(), op, 96);
            }
        }
        for name in names {
            let backend = crate::backend::open(name).unwrap();
            follows(backend.as_ref(), FmaChains { rounds: 3 }, 100);
            follows(backend.as_ref(), Stream::Copy, 640);
            follows(backend.as_ref(), Stream::Sum, 64 * 70);
            follows(backend.as_ref(), Stream::Update, 640);
        }
    }

    #[test]
    fn the_floor_is_the_slower_of_arithmetic_and_memory() {
        let c = Ceilings {
            flops: 100.0,
            bandwidth: vec![[10.0, 50.0], [100.0, 10.0]],
            launch: 0.0,
        };
        let floor = |flops, bytes| c.floor(Cost { flops, bytes });
        assert_eq!(floor(200, 10), 2.0);
        assert_eq!(floor(0, 99), 99.0 / 50.0);
        assert_eq!(floor(0, 100), 10.0);
        assert_eq!(c.bandwidth(1), 50.0);
    }
}
