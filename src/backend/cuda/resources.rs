//! What a kernel takes of a multiprocessor, read from its machine code, and how many of its blocks fit at once: the
//! theoretical occupancy, by the rules of NVIDIA's `cuda_occupancy.h`.

use super::nvrtc::Target;
use crate::backend::Span;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What the compiler gave a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Static shared memory of a block in bytes, without what the system keeps.
    pub shared: u32,
    /// Local memory of a thread in bytes: spilled registers, and arrays that are indexed at run time.
    pub local: u32,
}

/// A launch's share of a multiprocessor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Footprint {
    /// `conv2d.cu/fprop`.
    pub kernel: String,
    /// Compute capability of the machine code: 80, 90, ...
    pub arch: u32,
    /// Registers of a thread.
    pub registers: u32,
    /// Static and dynamic shared memory of a block in bytes.
    pub shared: u32,
    /// Local memory of a thread in bytes: spilled registers, and arrays that are indexed at run time.
    pub local: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Where the limits of the compute capability are known.
    pub occupancy: Option<Occupancy>,
}

/// How full of a kernel's warps a multiprocessor can be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Occupancy {
    /// Blocks at once.
    pub blocks: u32,
    /// Their warps over the most that it can hold.
    pub share: f64,
    /// What keeps a further block out.
    pub limit: Limit,
}

/// A multiprocessor's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Warps at once.
    Warps,
    /// The register file.
    Registers,
    /// Shared memory.
    SharedMemory,
    /// Blocks at once.
    Blocks,
}

/// Shared memory that the system keeps of every block.
const RESERVED: u32 = 1024;
/// Registers are given to a warp in this unit.
const REGISTER_UNIT: u32 = 256;
/// Shared memory is given to a block in this unit.
const SHARED_UNIT: u32 = 128;
/// Registers of a multiprocessor, in four equal parts.
const REGISTERS: u32 = 65_536;
const PARTS: u32 = 4;

/// Most warps and blocks at once and shared memory in KiB of a multiprocessor (CUDA Programming Guide, "Compute
/// Capabilities").
fn limits(arch: u32) -> Option<[u32; 3]> {
    Some(match arch {
        80 => [64, 32, 164],
        86 => [48, 16, 100],
        87 => [48, 16, 164],
        89 => [48, 24, 100],
        90 | 100 | 103 => [64, 32, 228],
        110 => [48, 24, 228],
        120 | 121 => [48, 24, 100],
        _ => return None,
    })
}

impl Occupancy {
    /// Of blocks of `threads` with `shared` bytes; `None` for a compute capability whose limits are not known here.
    pub fn of(arch: u32, registers: u32, shared: u32, threads: u32) -> Option<Occupancy> {
        let [most_warps, most_blocks, kib] = limits(arch)?;
        let warps = threads.div_ceil(32).max(1);
        let per_warp = (32 * registers.max(1)).next_multiple_of(REGISTER_UNIT);
        let by_registers = match per_warp * warps.next_multiple_of(PARTS) <= REGISTERS {
            true => REGISTERS / PARTS / per_warp * PARTS / warps,
            false => 0,
        };
        let per_block = (shared + RESERVED).next_multiple_of(SHARED_UNIT);
        let (blocks, limit) = [
            (most_warps / warps, Limit::Warps),
            (by_registers, Limit::Registers),
            (kib * 1024 / per_block, Limit::SharedMemory),
            (most_blocks, Limit::Blocks),
        ]
        .into_iter()
        .min_by_key(|l| l.0)?;
        Some(Occupancy {
            blocks,
            share: f64::from(blocks * warps) / f64::from(most_warps),
            limit,
        })
    }
}

impl Footprint {
    /// Of a launch of `kernel` with blocks of `threads` and `dynamic` bytes of shared memory.
    pub fn new(arch: u32, kernel: String, r: Resources, threads: u32, dynamic: u32) -> Footprint {
        let shared = r.shared + dynamic;
        Footprint {
            kernel,
            arch,
            registers: r.registers,
            shared,
            local: r.local,
            threads,
            occupancy: Occupancy::of(arch, r.registers, shared, threads),
        }
    }
}

/// Which architecture [`Backend::footprints`](crate::backend::Backend::footprints) is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// The device's own.
    Own,
    /// A compute capability: 80, 90, ...
    Arch(u32),
}

impl Machine {
    /// The compute capability, on a device whose kernels are compiled for `own`.
    pub fn arch(self, own: Target) -> u32 {
        match (self, own) {
            (Machine::Arch(arch), _) | (_, Target::Ptx(arch) | Target::Cubin(arch)) => arch,
        }
    }
}

/// The footprint of each launch of a run; none for what is no kernel. Both lists are in the graph's order.
pub fn paired<'a>(
    spans: &[Span],
    footprints: &'a [(usize, Footprint)],
) -> Vec<Option<&'a Footprint>> {
    let mut rest = footprints.iter();
    let pair = |s: &Span| {
        let mut ahead = rest.clone();
        let found = ahead.find(|(node, f)| *node == s.node && f.kernel == s.kernel)?;
        rest = ahead;
        Some(&found.1)
    };
    spans.iter().map(pair).collect()
}

const EI_CLASS: usize = 4;
const ELF64: u8 = 2;
/// Size of a section header.
const HEADER: usize = 64;
/// Attributes in `.nv.info` that have a value of their own length.
const SIZED: u8 = 4;
/// `EIATTR_FRAME_SIZE`, `EIATTR_REGCOUNT`: a function's symbol and a number.
const FRAME_SIZE: u8 = 0x11;
const REGISTER_COUNT: u8 = 0x2f;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(four.try_into().ok()?))
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    let two = bytes.get(at..at.checked_add(2)?)?;
    Some(usize::from(u16::from_le_bytes(two.try_into().ok()?)))
}

fn long(bytes: &[u8], at: usize) -> Option<usize> {
    let eight = bytes.get(at..at.checked_add(8)?)?;
    usize::try_from(u64::from_le_bytes(eight.try_into().ok()?)).ok()
}

struct Section<'a> {
    name: &'a str,
    info: u32,
    size: usize,
    /// Empty where the section has none in the file.
    bytes: &'a [u8],
}

fn sections(elf: &[u8]) -> Option<Vec<Section<'_>>> {
    const NOBITS: u32 = 8;
    if elf.get(..4)? != b"\x7fELF" || *elf.get(EI_CLASS)? != ELF64 {
        return None;
    }
    let (table, count, names) = (long(elf, 40)?, half(elf, 60)?, half(elf, 62)?);
    let header = |i: usize| table.checked_add(HEADER * i);
    let names = elf.get(long(elf, header(names)? + 24)?..)?;
    let section = |i: usize| {
        let at = header(i)?;
        let (offset, size) = (long(elf, at + 24)?, long(elf, at + 32)?);
        let name = names.get(word(elf, at)? as usize..)?;
        let end = name.iter().position(|&b| b == 0)?;
        Some(Section {
            name: std::str::from_utf8(&name[..end]).ok()?,
            info: word(elf, at + 44)?,
            size,
            bytes: match word(elf, at + 4)? {
                NOBITS => &[],
                _ => elf.get(offset..offset.checked_add(size)?)?,
            },
        })
    };
    (0..count).map(section).collect()
}

/// The numbers of `.nv.info` by attribute and symbol.
fn attributes(info: &[u8]) -> Option<BTreeMap<(u8, u32), u32>> {
    let mut all = BTreeMap::new();
    let mut at = 0;
    while at < info.len() {
        let (format, attribute, size) = (info[at], *info.get(at + 1)?, half(info, at + 2)?);
        at += 4;
        if format != SIZED {
            continue;
        }
        if size == 8 {
            all.insert((attribute, word(info, at)?), word(info, at + 4)?);
        }
        at += size;
    }
    Some(all)
}

/// What each kernel of a cubin takes, by its name.
///
/// # Errors
/// It is no cubin of a kind that is known here.
pub fn resources(cubin: &[u8], arch: u32) -> Result<BTreeMap<String, Resources>> {
    let read = || {
        let sections = sections(cubin)?;
        let info = sections.iter().find(|s| s.name == ".nv.info")?;
        let numbers = attributes(info.bytes)?;
        let mut all = BTreeMap::new();
        for text in &sections {
            let Some(name) = text.name.strip_prefix(".text.") else {
                continue;
            };
            // The lower bits of a code section's info are its symbol.
            let of = |attribute| numbers.get(&(attribute, text.info & 0xff_ffff)).copied();
            let shared = sections
                .iter()
                .find(|s| s.name.strip_prefix(".nv.shared.") == Some(name));
            let shared = shared.map_or(0, |s| s.size as u32);
            // From Hopper on what the system keeps stands in front of the kernel's own and is counted in.
            let kept = if arch >= 90 { RESERVED } else { 0 };
            let resources = Resources {
                registers: of(REGISTER_COUNT)?,
                shared: shared.saturating_sub(kept),
                local: of(FRAME_SIZE).unwrap_or(0),
            };
            all.insert(name.to_string(), resources);
        }
        Some(all)
    };
    read().ok_or_else(|| {
        Error::run(
            "the registers of a kernel cannot be read: its machine code is laid out in a way that is not known here",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::nvrtc::tests::present;
    use super::*;

    /// As `cudaOccMaxActiveBlocksPerMultiprocessor` of cuda_occupancy.h (CUDA 13.0) says.
    #[test]
    fn occupancy_is_that_of_nvidias_calculator() {
        // Architecture, registers, static and dynamic shared memory, threads: blocks.
        const KNOWN: &[[u32; 5]] = &[
            [80, 97, 98304, 384, 1],
            [80, 24, 73728, 192, 2],
            [80, 255, 98304, 1024, 0],
            [80, 41, 8704, 384, 3],
            [80, 33, 8704, 128, 12],
            [86, 40, 8704, 768, 2],
            [86, 40, 73728, 512, 1],
            [86, 65, 65536, 1024, 0],
            [86, 80, 8704, 32, 10],
            [86, 24, 32768, 96, 3],
            [87, 40, 98304, 384, 1],
            [87, 65, 1200, 160, 5],
            [87, 80, 16896, 256, 3],
            [87, 64, 8704, 128, 8],
            [87, 96, 16896, 1024, 0],
            [89, 32, 81920, 64, 1],
            [89, 200, 8704, 64, 4],
            [89, 16, 33792, 96, 2],
            [89, 96, 1024, 32, 20],
            [89, 40, 0, 128, 12],
            [90, 65, 73728, 512, 1],
            [90, 129, 73728, 512, 0],
            [90, 48, 16896, 256, 5],
            [90, 72, 65536, 128, 3],
            [90, 48, 0, 512, 2],
            [100, 65, 1024, 384, 2],
            [100, 128, 1024, 160, 3],
            [100, 80, 33792, 128, 6],
            [100, 168, 16896, 768, 0],
            [100, 128, 1200, 32, 16],
            [103, 121, 49152, 256, 2],
            [103, 80, 1200, 1024, 0],
            [103, 80, 73728, 128, 3],
            [103, 41, 32768, 192, 6],
            [103, 16, 16896, 32, 13],
            [110, 41, 49152, 256, 4],
            [110, 96, 32768, 32, 6],
            [110, 97, 8704, 1024, 0],
            [110, 48, 98304, 1024, 1],
            [110, 80, 81920, 32, 2],
            [120, 128, 16896, 768, 0],
            [120, 41, 33792, 160, 2],
            [120, 41, 1200, 1024, 1],
            [120, 40, 0, 192, 8],
            [120, 24, 32768, 288, 3],
            [121, 65, 0, 256, 3],
            [121, 41, 73728, 64, 1],
            [121, 64, 16896, 160, 5],
            [121, 24, 8704, 768, 2],
            [121, 129, 0, 32, 12],
        ];
        for &[arch, registers, shared, threads, blocks] in KNOWN {
            let o = Occupancy::of(arch, registers, shared, threads).unwrap();
            assert_eq!(
                o.blocks, blocks,
                "sm_{arch}, {registers} registers, {shared} bytes, {threads} threads: {o:?}"
            );
        }
        let o = Occupancy::of(80, 128, 0, 256).unwrap();
        assert_eq!((o.share, o.limit), (0.25, Limit::Registers));
        let o = Occupancy::of(80, 32, 80 << 10, 128).unwrap();
        assert_eq!((o.blocks, o.limit), (2, Limit::SharedMemory));
        assert_eq!(Occupancy::of(90, 16, 0, 32).unwrap().limit, Limit::Blocks);
        assert_eq!(Occupancy::of(75, 32, 0, 256), None);
    }

    #[test]
    fn resources_are_those_of_the_machine_code() {
        let Some(nvrtc) = present() else { return };
        let text = r#"
            extern "C" __global__ void plain(float* x) { x[threadIdx.x] = 1; }
            extern "C" __global__ void fixed(float* x) {
                __shared__ float s[300];
                s[threadIdx.x] = x[threadIdx.x];
                __syncthreads();
                x[threadIdx.x] = s[threadIdx.x ^ 1];
            }
            extern "C" __global__ void asked(float* x) {
                extern __shared__ float s[];
                s[threadIdx.x] = x[threadIdx.x];
                __syncthreads();
                x[threadIdx.x] = s[threadIdx.x ^ 1];
            }
            extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {
                float v[200];
                for (int i = 0; i < 200; i++) v[i] = x[i * 1024 + threadIdx.x];
                __syncthreads();
                for (int i = 0; i < 200; i++) x[i * 1024 + threadIdx.x] = v[i] + v[199 - i];
            }"#;
        let files = [("t.cu".to_string(), text)];
        for arch in [80, 86, 89, 90, 100, 120] {
            let cubin = nvrtc.compile(&files, &[], Target::Cubin(arch)).unwrap();
            let all = resources(&cubin, arch).unwrap();
            let names: Vec<&str> = all.keys().map(String::as_str).collect();
            assert_eq!(names, ["asked", "fixed", "plain", "spills"]);
            assert!(all.values().all(|r| (8..=64).contains(&r.registers)));
            assert_eq!((all["plain"].shared, all["plain"].local), (0, 0));
            assert_eq!((all["fixed"].shared, all["fixed"].local), (1200, 0));
            assert_eq!(all["asked"].shared, 0, "sm_{arch}");
            assert!(all["spills"].local >= 64, "sm_{arch}: {:?}", all["spills"]);
            for cut in [0, 3, 63, 64, cubin.len() / 2] {
                assert!(resources(&cubin[..cut], arch).is_err(), "{cut}");
            }
        }
    }
}
