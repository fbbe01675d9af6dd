//! A program: launches bound to memory once, run many times.

use super::device::WgpuDevice;
use super::launch::Launch;
use crate::{Error, Result};
use std::time::{Duration, Instant};

/// Bytes of one launch's parameter block, and the alignment of uniform offsets.
const BLOCK: u64 = 256;
/// Launches per submission: software adapters run a submission to its end before they answer.
const PER_SUBMIT: usize = 128;

/// Where a tensor lies: bytes `offset .. offset + bytes` of an arena, the offset a multiple of 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which of the program's arenas.
    pub arena: usize,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Place {
    /// The elements `start .. start + len` of this tensor (4 bytes each).
    pub fn part(self, part: Option<(usize, usize)>) -> Place {
        match part {
            None => self,
            Some((start, len)) => Place {
                offset: self.offset + 4 * start as u64,
                bytes: 4 * len as u64,
                ..self
            },
        }
    }
}

/// A launch and the place of each of its arguments (parts already applied).
#[derive(Clone, Debug)]
pub struct PlacedLaunch {
    /// The launch.
    pub launch: Launch,
    /// One place per `launch.args`.
    pub places: Vec<Place>,
}

#[derive(Debug)]
struct Step {
    pipeline: wgpu::ComputePipeline,
    bindings: wgpu::BindGroup,
    groups: [u32; 3],
}

/// Pipelines, bind groups and parameters of a list of launches.
#[derive(Debug)]
pub struct Program {
    steps: Vec<Step>,
}

impl WgpuDevice {
    /// Compiles and binds `launches`, in order.
    ///
    /// # Errors
    /// [`Error::Run`] where a shader does not compile or a place is outside its arena.
    pub fn program(&self, launches: &[PlacedLaunch], arenas: &[wgpu::Buffer]) -> Result<Program> {
        let params = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("params"),
            size: BLOCK * launches.len().max(1) as u64,
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut words = vec![0u32; launches.len().max(1) * BLOCK as usize / 4];
        let mut steps = Vec::with_capacity(launches.len());
        for (i, PlacedLaunch { launch, places }) in launches.iter().enumerate() {
            let at = i * BLOCK as usize / 4;
            if launch.params.len() > BLOCK as usize / 4 {
                return Err(Error::run(format!(
                    "{}/{} has {} parameters, at most 64",
                    launch.shader,
                    launch.entry,
                    launch.params.len()
                )));
            }
            words[at..at + launch.params.len()].copy_from_slice(&launch.params);
            let pipeline = self.pipeline(launch)?;
            let bind = |binding: u32, buffer, offset, bytes| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer,
                    offset,
                    size: wgpu::BufferSize::new(bytes),
                }),
            };
            let mut entries = vec![bind(0, &params, i as u64 * BLOCK, BLOCK)];
            for (b, place) in places.iter().enumerate() {
                entries.push(bind(
                    b as u32 + 1,
                    &arenas[place.arena],
                    place.offset,
                    place.bytes.next_multiple_of(16),
                ));
            }
            let bindings = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(launch.entry),
                layout: self.layout(places.len()),
                entries: &entries,
            });
            steps.push(Step {
                pipeline,
                bindings,
                groups: launch.groups,
            });
        }
        self.queue
            .write_buffer(&params, 0, bytemuck::cast_slice(&words));
        self.check()?;
        Ok(Program { steps })
    }

    /// Submits the steps that are `wanted`, in order. Does not wait.
    ///
    /// # Errors
    /// [`Error::Run`] where the device refused a launch.
    pub fn run(&self, program: &Program, wanted: impl Fn(usize) -> bool) -> Result<()> {
        let steps: Vec<&Step> = (0..program.steps.len())
            .filter(|&i| wanted(i))
            .map(|i| &program.steps[i])
            .collect();
        for steps in steps.chunks(PER_SUBMIT) {
            self.submit(steps);
        }
        self.check()
    }

    /// Runs the steps that are `wanted` one by one and returns the time of each by the clock around its submission,
    /// about 0.1 ms of which is the submission itself.
    ///
    /// # Errors
    /// [`Error::Run`] where the device refused a launch.
    pub fn run_timed(
        &self,
        program: &Program,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Vec<(usize, Duration)>> {
        let mut times = Vec::with_capacity(program.steps.len());
        self.wait()?;
        for (i, step) in program.steps.iter().enumerate().filter(|s| wanted(s.0)) {
            let start = Instant::now();
            self.submit(&[step]);
            self.wait()?;
            times.push((i, start.elapsed()));
        }
        Ok(times)
    }

    fn submit(&self, steps: &[&Step]) {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            for step in steps {
                pass.set_pipeline(&step.pipeline);
                pass.set_bind_group(0, &step.bindings, &[]);
                pass.dispatch_workgroups(step.groups[0], step.groups[1], step.groups[2]);
            }
        }
        self.queue.submit([encoder.finish()]);
    }
}
