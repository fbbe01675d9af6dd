//! The simulator as a driver: every tensor has an allocation of its own, so that the simulator sees an access beyond one.

use super::driver::{Count, Driver, GraphId, KernelId, ModuleId, Placed, Step};
use super::launch::Traits;
use super::nvrtc::Target;
use super::sim::{LaunchOptions, Memory, Module, launch};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

/// A simulated device of compute capability 8.0, as large as an A100, so that launch code chooses as it would there.
#[derive(Debug)]
pub struct Simulated {
    traits: Traits,
    memory: RwLock<Memory>,
    modules: Mutex<Vec<Arc<Module>>>,
    kernels: Mutex<Vec<(Arc<Module>, String)>>,
    counts: Mutex<BTreeMap<String, Count>>,
}

impl Default for Simulated {
    fn default() -> Self {
        Simulated {
            traits: Traits::assumed(80),
            memory: RwLock::new(Memory::new()),
            modules: Mutex::default(),
            kernels: Mutex::default(),
            counts: Mutex::default(),
        }
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Simulated {
    fn change<T>(&self, f: impl FnOnce(&mut Memory) -> T) -> T {
        f(&mut self.memory.write().unwrap_or_else(|e| e.into_inner()))
    }

    fn launch(&self, p: &Placed) -> Result<()> {
        let (module, entry) = lock(&self.kernels)[p.kernel.0].clone();
        let memory = self.memory.read().unwrap_or_else(|e| e.into_inner());
        let options = LaunchOptions::default();
        let start = Instant::now();
        let mut counters = launch(
            &module, &entry, p.grid, p.block, p.smem, &p.params, &memory, &options,
        )
        .map_err(|fault| Error::from(fault).context(&p.label))?;
        counters.lines.clear();
        // Op and kernel, without the scope.
        let kernel = match p.label.rmatch_indices(' ').nth(1) {
            Some((at, _)) => &p.label[at + 1..],
            None => &p.label,
        };
        let mut counts = lock(&self.counts);
        let count = counts.entry(kernel.to_string()).or_default();
        count.launches += 1;
        count.time += start.elapsed();
        count.counters.merge(&counters);
        Ok(())
    }
}

impl Driver for Simulated {
    fn name(&self) -> &'static str {
        "cuda:sim"
    }

    fn device(&self) -> String {
        format!(
            "simulator of sm_{} with {} multiprocessors",
            self.traits.arch, self.traits.sms
        )
    }

    fn traits(&self) -> &Traits {
        &self.traits
    }

    fn target(&self) -> Target {
        Target::Ptx(self.traits.arch)
    }

    fn separate(&self) -> bool {
        true
    }

    fn memory(&self) -> Result<Option<(u64, u64)>> {
        Ok(None)
    }

    fn alloc(&self, bytes: usize, owner: &str) -> Result<u64> {
        Ok(self.change(|m| m.alloc(bytes as u64, owner)))
    }

    fn free(&self, address: u64) {
        // Allocated by this driver and freed once: there is nobody to tell otherwise.
        let _ = self.change(|m| m.free(address));
    }

    fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.change(|m| m.write(address, bytes))
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.change(|m| {
            if let Some(at) = m.first_uninit(address, bytes.len())? {
                return Err(Error::run(format!(
                    "element {} was never written: a kernel leaves out part of its result",
                    at / 4
                )));
            }
            m.read(address, bytes)
        })
    }

    fn fill(&self, address: u64, word: u32, n: usize) -> Result<()> {
        let bytes: Vec<u8> = word.to_le_bytes().repeat(n);
        self.upload(address, &bytes)
    }

    fn load(&self, image: &[u8], name: &str) -> Result<ModuleId> {
        let text = std::str::from_utf8(image)
            .map_err(|_| Error::run(format!("{name}: the PTX is not text")))?;
        let module = Module::parse(text.trim_end_matches('\0')).map_err(|e| e.context(name))?;
        let mut modules = lock(&self.modules);
        modules.push(Arc::new(module));
        Ok(ModuleId(modules.len() - 1))
    }

    fn kernel(&self, module: ModuleId, entry: &str, _smem: u32) -> Result<KernelId> {
        let module = lock(&self.modules)[module.0].clone();
        if module.entry(entry).is_none() {
            return Err(Error::run(format!("there is no kernel called {entry}")));
        }
        let mut kernels = lock(&self.kernels);
        kernels.push((module, entry.to_string()));
        Ok(KernelId(kernels.len() - 1))
    }

    fn step(&self, step: &Step) -> Result<()> {
        match step {
            Step::Launch(p) => self.launch(p),
            Step::Poison(address, n) => self.change(|m| m.mark_uninit(*address, 4 * n)),
        }
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn timed_calls(
        &self,
        _n: usize,
        _call: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Duration>> {
        Err(Error::input(
            "cuda:sim counts and does not time; `check --counters` prints the counts",
        ))
    }

    fn replay(&self, _graph: GraphId) -> Result<()> {
        Err(Error::run("the simulator records no graphs"))
    }

    fn forget(&self, _graph: GraphId) {}

    fn counts(&self) -> bool {
        true
    }

    fn take_counts(&self) -> Vec<(String, Count)> {
        std::mem::take(&mut *lock(&self.counts))
            .into_iter()
            .collect()
    }
}
