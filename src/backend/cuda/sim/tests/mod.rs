//! Kernels in CUDA C++, compiled by NVRTC and run here: wrong ones that must be caught, and right ones whose results
//! are computed in another way.

mod control;
mod conversions;
mod counting;
mod faults;
mod instructions;
mod tensor;

use super::super::nvrtc::{Nvrtc, Target};
use super::{Counters, Fault, LaunchOptions, Memory, Module, launch};

/// Compiles CUDA C++ with line information; none (and a word about it) where there is no NVRTC.
fn module(source: &str) -> Option<Module> {
    let nvrtc = match Nvrtc::get() {
        Ok(n) => n,
        Err(e) => {
            assert!(std::env::var("CI").is_err(), "{e}");
            println!("skipped: no NVRTC");
            return None;
        }
    };
    let options = ["-lineinfo".to_string(), "--std=c++17".to_string()];
    let files = [("test.cu".to_string(), source)];
    let ptx = nvrtc
        .compile(&files, &options, Target::Ptx(80))
        .expect("the source compiles");
    let ptx = String::from_utf8(ptx).expect("PTX is text");
    Some(Module::parse(ptx.trim_end_matches('\0')).expect("the simulator knows the PTX"))
}

/// A device with buffers.
struct Bench {
    mem: Memory,
    params: Vec<u8>,
    buffers: Vec<(u64, usize)>,
}

impl Bench {
    fn new() -> Bench {
        Bench {
            mem: Memory::new(),
            params: Vec::new(),
            buffers: Vec::new(),
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        while !self.params.len().is_multiple_of(bytes.len()) {
            self.params.push(0);
        }
        self.params.extend(bytes);
    }

    /// A buffer with contents, passed as the next parameter.
    fn buffer<T: bytemuck::Pod>(mut self, label: &str, data: &[T]) -> Bench {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let a = self.mem.alloc(bytes.len() as u64, label);
        self.mem.write(a, bytes).expect("the buffer is there");
        self.buffers.push((a, bytes.len()));
        self.push(&a.to_le_bytes());
        self
    }

    /// A buffer that nobody wrote.
    fn empty(mut self, label: &str, bytes: usize) -> Bench {
        let a = self.mem.alloc(bytes as u64, label);
        self.buffers.push((a, bytes));
        self.push(&a.to_le_bytes());
        self
    }

    fn int(mut self, v: i32) -> Bench {
        self.push(&v.to_le_bytes());
        self
    }

    fn run_with(
        &self,
        m: &Module,
        name: &str,
        grid: u32,
        block: u32,
        o: &LaunchOptions,
    ) -> Result<Counters, Box<Fault>> {
        launch(
            m,
            name,
            [grid, 1, 1],
            [block, 1, 1],
            0,
            &self.params,
            &self.mem,
            o,
        )
    }

    fn run(&self, m: &Module, name: &str, grid: u32, block: u32) -> Result<Counters, Box<Fault>> {
        self.run_with(m, name, grid, block, &LaunchOptions::default())
    }

    fn read<T: bytemuck::Pod>(&self, buffer: usize) -> Vec<T> {
        let (a, n) = self.buffers[buffer];
        let mut out = vec![T::zeroed(); n / size_of::<T>()];
        self.mem
            .read(a, bytemuck::cast_slice_mut(&mut out))
            .expect("the buffer is there");
        out
    }
}

/// A stream of well mixed bits.
fn bits(seed: u64) -> impl Iterator<Item = u32> {
    let mut s = seed;
    std::iter::from_fn(move || {
        s = s.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (s ^ (s >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Some((z >> 32) as u32)
    })
}

/// Numbers in [-1, 1).
fn numbers(seed: u64, n: usize) -> Vec<f32> {
    bits(seed)
        .take(n)
        .map(|b| b as i32 as f32 / 2_147_483_648.0)
        .collect()
}
