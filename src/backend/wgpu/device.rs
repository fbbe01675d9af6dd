//! Adapters and the device: what is there, what it can do, buffers in and out, pipelines made once.

use super::launch::{Launch, MAX_STORAGE};
use super::program::Place;
use super::shaders::{Consts, ShaderSource};
use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

/// What [`WgpuDevice::open`] is asked for.
#[derive(Clone, Debug, Default)]
pub struct WgpuOptions {
    /// Part of an adapter's name, in any case; `None` takes the best adapter.
    pub adapter: Option<String>,
    /// Where the WGSL comes from.
    pub shaders: ShaderSource,
    /// Compile shaders with bounds checks and loop guards, at about half the speed on a software adapter. Tests do.
    pub checked: bool,
    /// Use the kernels meant for real GPUs on a software adapter too, for tests.
    pub gpu_kernels: bool,
    /// At most this many bytes to a binding, however many the adapter takes, for tests.
    pub max_binding: Option<usize>,
}

/// What kernels are chosen by.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterTraits {
    /// Runs on the CPU (llvmpipe, WARP): lanes are SIMD, barriers and divergent loads are expensive.
    pub software: bool,
    /// Subgroup operations are enabled in WGSL.
    pub subgroups: bool,
    /// Smallest and largest subgroup.
    pub subgroup_size: (u32, u32),
    /// `f16` is enabled in WGSL.
    pub f16: bool,
    /// Timestamps around compute passes.
    pub timestamps: bool,
    /// Bytes of the largest storage binding.
    pub max_binding: usize,
    /// Bytes of the largest buffer.
    pub max_buffer: usize,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
}

impl AdapterTraits {
    /// A CPU's SIMD unit seen as subgroups of 8 (llvmpipe): the kernels named `lanes` are made for it.
    pub fn lanes8(&self) -> bool {
        self.software && self.subgroups && self.subgroup_size == (8, 8)
    }
}

impl Default for AdapterTraits {
    /// WebGPU's default limits and no optional feature.
    fn default() -> Self {
        AdapterTraits {
            software: false,
            subgroups: false,
            subgroup_size: (4, 128),
            f16: false,
            timestamps: false,
            max_binding: 128 << 20,
            max_buffer: 256 << 20,
            workgroup_memory: 16 << 10,
        }
    }
}

/// One adapter as `devices` prints it.
#[derive(Clone, Debug)]
pub struct AdapterReport {
    /// Name given by the driver.
    pub name: String,
    /// `discrete GPU`, `integrated GPU`, `virtual GPU`, `software` or `other`.
    pub kind: &'static str,
    /// API: Vulkan, Metal, Dx12.
    pub api: String,
    /// Driver and its version.
    pub driver: String,
    /// Features and limits kernels are chosen by.
    pub traits: AdapterTraits,
}

const NO_ADAPTER: &str = "no GPU adapter found: no Vulkan driver is installed or none can be used. Install your GPU's driver, or software Vulkan \
     with: apt install mesa-vulkan-drivers libvulkan1";

fn instance() -> wgpu::Instance {
    let mut desc = wgpu::InstanceDescriptor::new_without_display_handle();
    desc.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    // Validation layers belong to the tests of wgpu itself; naga checks every shader anyway.
    desc.flags = wgpu::InstanceFlags::empty();
    wgpu::Instance::new(desc)
}

fn kind(t: wgpu::DeviceType) -> (&'static str, u32) {
    match t {
        wgpu::DeviceType::DiscreteGpu => ("discrete GPU", 0),
        wgpu::DeviceType::IntegratedGpu => ("integrated GPU", 1),
        wgpu::DeviceType::VirtualGpu => ("virtual GPU", 2),
        wgpu::DeviceType::Cpu => ("software", 4),
        wgpu::DeviceType::Other => ("other", 3),
    }
}

fn wanted_features(adapter: &wgpu::Adapter) -> wgpu::Features {
    adapter.features()
        & (wgpu::Features::SUBGROUP | wgpu::Features::SHADER_F16 | wgpu::Features::TIMESTAMP_QUERY)
}

fn traits(adapter: &wgpu::Adapter) -> AdapterTraits {
    let (info, limits, features) = (
        adapter.get_info(),
        adapter.limits(),
        wanted_features(adapter),
    );
    AdapterTraits {
        software: info.device_type == wgpu::DeviceType::Cpu,
        subgroups: features.contains(wgpu::Features::SUBGROUP),
        subgroup_size: (info.subgroup_min_size, info.subgroup_max_size),
        f16: features.contains(wgpu::Features::SHADER_F16),
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        // Shaders index with u32 and drivers are least tested above 2 GiB.
        max_binding: (limits.max_storage_buffer_binding_size as usize).min((2 << 30) - 256),
        max_buffer: limits.max_buffer_size as usize,
        workgroup_memory: limits.max_compute_workgroup_storage_size,
    }
}

fn sorted_adapters() -> Vec<wgpu::Adapter> {
    let mut found = pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()));
    found.sort_by_key(|a| kind(a.get_info().device_type).1);
    found
}

fn report(adapter: &wgpu::Adapter) -> AdapterReport {
    let info = adapter.get_info();
    AdapterReport {
        name: info.name,
        kind: kind(info.device_type).0,
        api: format!("{:?}", info.backend),
        driver: format!("{} {}", info.driver, info.driver_info)
            .trim()
            .to_string(),
        traits: traits(adapter),
    }
}

/// All adapters, best first.
///
/// # Errors
/// [`Error::Run`] saying what to install where there is none.
pub fn adapters() -> Result<Vec<AdapterReport>> {
    let found = sorted_adapters();
    if found.is_empty() {
        return Err(Error::run(NO_ADAPTER));
    }
    Ok(found.iter().map(report).collect())
}

/// A compiled kernel, as found by its shader, entry and constants.
pub type PipelineKey = (&'static str, &'static str, Consts);

/// An open device: queue, buffers, compile cache.
#[derive(Debug)]
pub struct WgpuDevice {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    report: AdapterReport,
    shaders: ShaderSource,
    checked: bool,
    layouts: Vec<(wgpu::BindGroupLayout, wgpu::PipelineLayout)>,
    pipelines: Mutex<HashMap<PipelineKey, wgpu::ComputePipeline>>,
    modules: Mutex<HashMap<(&'static str, Consts), wgpu::ShaderModule>>,
    lost: Arc<Mutex<Option<String>>>,
}

impl WgpuDevice {
    /// Opens the best adapter, or the one named in `options`.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no adapter or none has that name; [`Error::Run`] where it refuses.
    pub fn open(options: &WgpuOptions) -> Result<WgpuDevice> {
        let found = sorted_adapters();
        if found.is_empty() {
            return Err(Error::input(NO_ADAPTER));
        }
        let adapter = match &options.adapter {
            None => &found[0],
            Some(want) => found
                .iter()
                .find(|a| {
                    a.get_info()
                        .name
                        .to_lowercase()
                        .contains(&want.to_lowercase())
                })
                .ok_or_else(|| {
                    let names: Vec<String> = found.iter().map(|a| a.get_info().name).collect();
                    Error::input(format!(
                        "no adapter is named like \"{want}\"; there are: {}",
                        names.join(", ")
                    ))
                })?,
        };
        let mut report = report(adapter);
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("tilewright"),
            required_features: wanted_features(adapter),
            required_limits: adapter.limits(),
            ..Default::default()
        }))
        .map_err(|e| Error::run(format!("the adapter {} gave no device: {e}", report.name)))?;
        let lost = Arc::new(Mutex::new(None));
        let slot = lost.clone();
        device.on_uncaptured_error(Arc::new(move |e: wgpu::Error| {
            slot.lock()
                .unwrap_or_else(|p| p.into_inner())
                .get_or_insert(e.to_string());
        }));
        let slot = lost.clone();
        device.set_device_lost_callback(move |reason, why| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                slot.lock()
                    .unwrap_or_else(|p| p.into_inner())
                    .get_or_insert(format!("the device was lost: {why}"));
            }
        });
        if let Some(most) = options.max_binding {
            report.traits.max_binding = report.traits.max_binding.min(most);
        }
        if options.gpu_kernels {
            report.traits.software = false;
            report.traits.subgroups = false;
        }
        let layouts = (0..=MAX_STORAGE).map(|n| layout(&device, n)).collect();
        Ok(WgpuDevice {
            device,
            queue,
            report,
            shaders: options.shaders.clone(),
            checked: options.checked,
            layouts,
            pipelines: Mutex::default(),
            modules: Mutex::default(),
            lost,
        })
    }

    /// What this device is.
    pub fn report(&self) -> &AdapterReport {
        &self.report
    }

    /// What kernels are chosen by.
    pub fn traits(&self) -> &AdapterTraits {
        &self.report.traits
    }

    /// A buffer of at least `bytes`, zero at first.
    ///
    /// # Errors
    /// [`Error::Run`] where the device has not that much memory.
    pub fn arena(&self, bytes: usize) -> Result<wgpu::Buffer> {
        let size = bytes.next_multiple_of(256).max(256);
        if size > self.traits().max_buffer {
            return Err(Error::run(format!(
                "an arena of {size} bytes is over this adapter's {} for a buffer",
                self.traits().max_buffer
            )));
        }
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("arena"),
            size: size as u64,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        if let Some(e) = pollster::block_on(scope.pop()) {
            return Err(Error::run(format!(
                "out of device memory for an arena of {} MiB: {e}",
                size >> 20
            )));
        }
        Ok(buffer)
    }

    pub(super) fn layout(&self, storage: usize) -> &wgpu::BindGroupLayout {
        &self.layouts[storage].0
    }

    /// Writes 32-bit words into `place`; takes effect before the next run.
    pub fn write<T: bytemuck::Pod>(&self, arenas: &[wgpu::Buffer], place: Place, data: &[T]) {
        self.queue.write_buffer(
            &arenas[place.arena],
            place.offset,
            bytemuck::cast_slice(data),
        );
    }

    /// Reads `place` back by way of `staging` (made or enlarged where needed), waiting for everything submitted before.
    ///
    /// # Errors
    /// [`Error::Run`] where the device is lost or an earlier launch failed.
    pub fn read<T: bytemuck::Pod>(
        &self,
        arenas: &[wgpu::Buffer],
        place: Place,
        staging: &mut Option<wgpu::Buffer>,
    ) -> Result<Vec<T>> {
        if staging.as_ref().is_some_and(|b| b.size() < place.bytes) {
            *staging = None;
        }
        let buffer = &*staging.get_or_insert_with(|| {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("staging"),
                size: place.bytes.next_multiple_of(4096),
                usage: wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ,
                mapped_at_creation: false,
            })
        });
        let mut encoder = self.device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(&arenas[place.arena], place.offset, buffer, 0, place.bytes);
        self.queue.submit([encoder.finish()]);
        let slice = buffer.slice(..place.bytes);
        slice.map_async(wgpu::MapMode::Read, |_| {});
        self.wait()?;
        let view = slice
            .get_mapped_range()
            .map_err(|e| Error::run(format!("reading back from the device: {e}")))?;
        let mut out = vec![T::zeroed(); place.bytes as usize / size_of::<T>()];
        bytemuck::cast_slice_mut::<T, u8>(&mut out).copy_from_slice(&view);
        drop(view);
        buffer.unmap();
        Ok(out)
    }

    /// Waits until all that was submitted is done.
    ///
    /// # Errors
    /// [`Error::Run`] where the device is lost or a launch was refused.
    pub fn wait(&self) -> Result<()> {
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|e| Error::run(format!("waiting for the device: {e}")))?;
        self.check()
    }

    /// The first error the device reported on its own, if any.
    pub(super) fn check(&self) -> Result<()> {
        match self.lost.lock().unwrap_or_else(|p| p.into_inner()).take() {
            Some(e) => Err(Error::run(format!("{}: {e}", self.report.name))),
            None => Ok(()),
        }
    }

    /// The pipeline of a launch, compiled at most once.
    ///
    /// # Errors
    /// [`Error::Run`] with the compiler's message.
    pub(super) fn pipeline(&self, launch: &Launch) -> Result<wgpu::ComputePipeline> {
        let key = (launch.shader, launch.entry, launch.consts.clone());
        if let Some(p) = self
            .pipelines
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .get(&key)
        {
            return Ok(p.clone());
        }
        let module = self.module(launch)?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let pipeline = self
            .device
            .create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(launch.entry),
                layout: Some(&self.layouts[launch.args.len()].1),
                module: &module,
                entry_point: Some(launch.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    zero_initialize_workgroup_memory: false,
                    ..Default::default()
                },
                cache: None,
            });
        if let Some(e) = pollster::block_on(scope.pop()) {
            return Err(Error::run(format!(
                "{} entry {}: {e}",
                launch.shader, launch.entry
            )));
        }
        self.pipelines
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .insert(key, pipeline.clone());
        Ok(pipeline)
    }

    fn module(&self, launch: &Launch) -> Result<wgpu::ShaderModule> {
        let key = (launch.shader, launch.consts.clone());
        if let Some(m) = self
            .modules
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .get(&key)
        {
            return Ok(m.clone());
        }
        let text = self.shaders.assemble(launch.shader, &launch.consts)?;
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let desc = wgpu::ShaderModuleDescriptor {
            label: Some(launch.shader),
            source: wgpu::ShaderSource::Wgsl(text.into()),
        };
        let module = if self.checked {
            self.device.create_shader_module(desc)
        } else {
            // SAFETY: kernels guard every access by the sizes in their parameters and loop over those sizes only; the
            // checked build of the same source passes the same op cases.
            unsafe {
                self.device
                    .create_shader_module_trusted(desc, wgpu::ShaderRuntimeChecks::unchecked())
            }
        };
        if let Some(e) = pollster::block_on(scope.pop()) {
            return Err(Error::run(format!("{}: {e}", launch.shader)));
        }
        self.modules
            .lock()
            .unwrap_or_else(|p| p.into_inner())
            .insert(key, module.clone());
        Ok(module)
    }
}

/// The layout of a launch with `n` storage buffers: parameters at 0, buffers from 1, all read-write, because wgpu
/// tracks the use of a buffer as a whole and most bindings of a launch lie in one arena.
fn layout(device: &wgpu::Device, n: usize) -> (wgpu::BindGroupLayout, wgpu::PipelineLayout) {
    let entry = |binding, ty| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    };
    let mut entries = vec![entry(0, wgpu::BufferBindingType::Uniform)];
    entries.extend(
        (1..=n as u32).map(|b| entry(b, wgpu::BufferBindingType::Storage { read_only: false })),
    );
    let group = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: None,
        entries: &entries,
    });
    let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: None,
        bind_group_layouts: &[Some(&group)],
        immediate_size: 0,
    });
    (group, pipeline)
}
