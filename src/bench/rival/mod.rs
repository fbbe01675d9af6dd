//! Other libraries on the sums that our kernels compute, timed in the same run: on the CPU the `gemm` crate, oneDNN, MKL,
//! BLIS and OpenBLAS, on CUDA cuBLAS and cuDNN. All but the crate are looked for at run time.
//!
//! A rival does the product or the convolution alone, without bias, activation or residual, on operands that are in the
//! precision already; where that is bf16 they, and the result, have half the bytes of ours.

mod cpu;
mod cublas;
mod cudnn;
mod device;
#[cfg(test)]
mod host;
pub mod task;

use super::kernel::ROTATED;
use super::measure::{Limits, Sample, measure_by};
use crate::backend::Backend;
use crate::backend::cuda::Precision;
use crate::ops::check::round_to;
use crate::philox::Philox;
use crate::{Error, Result};
use task::Task;

/// A library.
trait Library {
    /// `gemm`, `oneDNN`, `cuBLAS`...
    fn name(&self) -> &'static str;

    /// Whether it has something for such a task.
    fn takes(&self, task: &Task) -> bool;

    /// A task that it takes, with its operands in `copies` places of memory.
    fn prepare<'a>(
        &'a self,
        task: &Task,
        operands: [&[f32]; 2],
        copies: usize,
    ) -> Result<Box<dyn Run + 'a>>;
}

/// A prepared task.
trait Run {
    /// Computes one copy and returns the seconds it took.
    fn run(&mut self, copy: usize) -> Result<f64>;

    /// The result of copy 0.
    fn result(&mut self) -> Result<Vec<f32>>;

    /// Whether it does every product of the definition: Winograd's algorithm and Fourier transforms do fewer, how many
    /// is not known.
    fn direct(&self) -> bool {
        true
    }
}

/// The libraries for a backend's kernels.
pub struct Rivals<'a> {
    libraries: Vec<Box<dyn Library + 'a>>,
    precision: Precision,
    /// What is missing and how to get it.
    pub missing: Vec<String>,
}

/// A rival's time.
#[derive(Clone, Copy, Debug)]
pub struct Timed {
    /// The library.
    pub name: &'static str,
    /// Worst error over its allowance.
    pub error: f64,
    /// Time.
    pub time: Sample,
    /// Whether it does every product of the definition.
    pub direct: bool,
    /// Bytes of the operands and the result.
    pub bytes: u64,
}

impl<'a> Rivals<'a> {
    /// Those for `backend`; none on the simulator and on wgpu.
    pub fn of(backend: &'a dyn Backend) -> Rivals<'a> {
        let precision = backend.precision();
        let mut rivals = Rivals {
            libraries: vec![],
            precision,
            missing: vec![],
        };
        if backend.name() == "cpu" {
            for library in cpu::libraries() {
                rivals.libraries.push(Box::new(library));
            }
        }
        if let Some(stream) = backend
            .driver()
            .and_then(|d| device::Stream::of(d, precision))
        {
            // In this order: cuDNN uses cuBLAS.
            rivals.take(cublas::Cublas::open(stream));
            rivals.take(cudnn::Cudnn::open(stream));
        }
        rivals
    }

    fn take(&mut self, library: Result<impl Library + 'a>) {
        match library {
            Ok(l) => self.libraries.push(Box::new(l)),
            Err(e) => self.missing.push(e.to_string()),
        }
    }

    /// Times what there is for `task`, each after a look at some of its results; `hot`: on the same memory each time. An
    /// error is one library's: its results are wrong, or it failed.
    pub fn time(&self, task: &Task, hot: bool, limits: Limits) -> Vec<Result<Timed>> {
        let precision = self.precision;
        let libraries = self.libraries.iter().filter(|l| l.takes(task));
        let libraries: Vec<&dyn Library> = libraries.map(Box::as_ref).collect();
        if libraries.is_empty() {
            return vec![];
        }
        let bytes = match precision {
            Precision::Bf16 => 2 * task.lengths().iter().sum::<usize>(),
            _ => 4 * task.lengths().iter().sum::<usize>(),
        };
        let copies = match hot {
            true => 1,
            false => (ROTATED / bytes.max(1) + 1).min(64),
        };
        let mut rng = Philox::new(0x7269_7661, 0);
        let mut random = |n: usize| -> Vec<f32> {
            (0..n)
                .map(|_| round_to(f64::from(rng.normal()), precision) as f32)
                .collect()
        };
        let [la, lb, _] = task.lengths();
        let (a, b) = (random(la), random(lb));
        let time = |library: &dyn Library| -> Result<Timed> {
            let mut run = library.prepare(task, [&a, &b], copies)?;
            run.run(0)?;
            let error = task.error([&a, &b], &run.result()?, precision);
            if error.is_nan() || error > 1.0 {
                return Err(Error::run(format!(
                    "its result is {error} times its allowance off; what is not right is not timed"
                )));
            }
            let mut turn = 0;
            let time = measure_by(limits, || {
                turn = (turn + 1) % copies;
                run.run(turn)
            })?;
            Ok(Timed {
                name: library.name(),
                error,
                time,
                direct: run.direct(),
                bytes: bytes as u64,
            })
        };
        let named = |l: &dyn Library| time(l).map_err(|e| e.context(l.name()));
        libraries.into_iter().map(named).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Product;
    use std::time::Duration;

    /// Every library here gives the product, however the operands are stored; strides that swap rows and columns show.
    #[test]
    fn rivals_multiply() {
        let limits = Limits {
            warm_up: 0,
            min_runs: 1,
            precision: 1.0,
            time: Duration::ZERO,
        };
        let cpu = crate::backend::open("cpu").unwrap();
        let rivals = Rivals::of(cpu.as_ref());
        assert!(rivals.missing.is_empty());
        for (ta, tb) in [(false, true), (false, false), (true, false)] {
            let (m, n, k) = (5, 7, 19);
            let task = Task::Product(Product { m, n, k, ta, tb });
            let timed = rivals.time(&task, true, limits);
            assert!(timed.iter().any(|t| t.as_ref().unwrap().name == "gemm"));
            assert!(timed.iter().all(|t| t.as_ref().unwrap().error <= 1.0));
        }
    }
}
