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

impl Step {
    fn record(&self, pass: &mut wgpu::ComputePass) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bindings, &[]);
        pass.dispatch_workgroups(self.groups[0], self.groups[1], self.groups[2]);
    }
}

/// When a step of a program ran.
#[derive(Clone, Copy, Debug)]
pub struct StepTime {
    /// Which.
    pub step: usize,
    /// From the start of the run.
    pub start: Duration,
    /// How long.
    pub time: Duration,
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

    /// Runs the steps that are `wanted`, a pass each, and returns when each ran by the device's own timestamps. Where the
    /// adapter has none they run one by one, by the clock around each submission, which is about 0.1 ms of the time.
    ///
    /// # Errors
    /// [`Error::Run`] where the device refused a launch.
    pub fn run_traced(
        &self,
        program: &Program,
        wanted: impl Fn(usize) -> bool,
    ) -> Result<Vec<StepTime>> {
        let wanted: Vec<usize> = (0..program.steps.len()).filter(|&i| wanted(i)).collect();
        self.wait()?;
        if self.traits().timestamps {
            return self.stamped(program, &wanted);
        }
        let begin = Instant::now();
        let mut times = Vec::with_capacity(wanted.len());
        for step in wanted {
            let start = begin.elapsed();
            self.submit(&[&program.steps[step]]);
            self.wait()?;
            times.push(StepTime {
                step,
                start,
                time: begin.elapsed() - start,
            });
        }
        Ok(times)
    }

    /// [`run_traced`](Self::run_traced) with two timestamps a pass.
    fn stamped(&self, program: &Program, wanted: &[usize]) -> Result<Vec<StepTime>> {
        let queries = 2 * wanted.len().max(1);
        let bytes = 8 * queries as u64;
        let buffer = |usage| {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("timestamps"),
                size: bytes,
                usage,
                mapped_at_creation: false,
            })
        };
        let resolved = buffer(wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC);
        let readable = buffer(wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST);
        // Resolved results start at multiples of 256 bytes: 32 stamps, which a full submission is a multiple of.
        for (part, steps) in wanted.chunks(PER_SUBMIT).enumerate() {
            let set = self.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: 2 * steps.len() as u32,
            });
            let mut encoder = self.device.create_command_encoder(&Default::default());
            for (i, &step) in steps.iter().enumerate() {
                let i = 2 * i as u32;
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: None,
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &set,
                        beginning_of_pass_write_index: Some(i),
                        end_of_pass_write_index: Some(i + 1),
                    }),
                });
                program.steps[step].record(&mut pass);
            }
            let at = (16 * PER_SUBMIT * part) as u64;
            encoder.resolve_query_set(&set, 0..2 * steps.len() as u32, &resolved, at);
            self.queue.submit([encoder.finish()]);
        }
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&resolved, 0, &readable, 0, bytes);
        self.queue.submit([encoder.finish()]);
        let slice = readable.slice(..);
        slice.map_async(wgpu::MapMode::Read, |_| {});
        self.wait()?;
        let view = slice
            .get_mapped_range()
            .map_err(|e| Error::run(format!("reading timestamps: {e}")))?;
        let stamps: &[u64] = bytemuck::cast_slice(&view);
        let tick = f64::from(self.queue.get_timestamp_period()) * 1e-9;
        let first = stamps[0];
        let seconds = |ticks: u64| Duration::from_secs_f64(ticks as f64 * tick);
        let time = |(&step, s): (&usize, &[u64])| StepTime {
            step,
            start: seconds(s[0].saturating_sub(first)),
            time: seconds(s[1].saturating_sub(s[0])),
        };
        Ok(wanted
            .iter()
            .zip(stamps.chunks_exact(2))
            .map(time)
            .collect())
    }

    fn submit(&self, steps: &[&Step]) {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        {
            let mut pass = encoder.begin_compute_pass(&Default::default());
            steps.iter().for_each(|s| s.record(&mut pass));
        }
        self.queue.submit([encoder.finish()]);
    }
}
