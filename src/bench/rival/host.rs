//! For tests: a driver whose device memory is the host's, so that what the libraries are given can be looked at.

use crate::Result;
use crate::backend::cuda::driver::{GraphId, KernelId, ModuleId, Step};
use crate::backend::cuda::{Driver, Target, Traits};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;
use std::time::Duration;

#[derive(Debug)]
pub struct Host {
    traits: Traits,
    memory: Mutex<HashMap<u64, Box<[u64]>>>,
}

impl Default for Host {
    fn default() -> Self {
        Host {
            traits: Traits::assumed(80),
            memory: Mutex::default(),
        }
    }
}

impl Host {
    /// Allocations that were not given back.
    pub fn alive(&self) -> usize {
        self.memory.lock().unwrap().len()
    }
}

impl Driver for Host {
    fn name(&self) -> &'static str {
        "host"
    }
    fn device(&self) -> String {
        "host".into()
    }
    fn traits(&self) -> &Traits {
        &self.traits
    }
    fn target(&self) -> Target {
        Target::Cubin(80)
    }
    fn memory(&self) -> Result<Option<(u64, u64)>> {
        Ok(None)
    }
    fn alloc(&self, bytes: usize, _owner: &str) -> Result<u64> {
        let place = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
        let address = place.as_ptr() as u64;
        self.memory.lock().unwrap().insert(address, place);
        Ok(address)
    }
    fn free(&self, address: u64) {
        assert!(self.memory.lock().unwrap().remove(&address).is_some());
    }
    fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let mut memory = self.memory.lock().unwrap();
        let place: &mut [u8] = bytemuck::cast_slice_mut(memory.get_mut(&address).unwrap());
        place[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let memory = self.memory.lock().unwrap();
        let place: &[u8] = bytemuck::cast_slice(&memory[&address]);
        bytes.copy_from_slice(&place[..bytes.len()]);
        Ok(())
    }
    fn fill(&self, address: u64, word: u32, n: usize) -> Result<()> {
        self.upload(address, &word.to_le_bytes().repeat(n))
    }
    fn load(&self, _image: &[u8], _name: &str) -> Result<ModuleId> {
        unreachable!("other libraries bring their own code")
    }
    fn kernel(&self, _module: ModuleId, _entry: &str, _smem: u32) -> Result<KernelId> {
        unreachable!("other libraries bring their own code")
    }
    fn step(&self, _step: &Step) -> Result<()> {
        unreachable!("other libraries bring their own code")
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    fn stream(&self) -> Option<*mut c_void> {
        Some(std::ptr::null_mut())
    }
    fn timed_calls(
        &self,
        n: usize,
        call: &mut dyn FnMut(usize) -> Result<()>,
    ) -> Result<Vec<Duration>> {
        (0..n)
            .map(|i| call(i).map(|()| Duration::from_micros(i as u64 + 1)))
            .collect()
    }
    fn replay(&self, _graph: GraphId) -> Result<()> {
        unreachable!("other libraries record nothing")
    }
    fn forget(&self, _graph: GraphId) {}
}
