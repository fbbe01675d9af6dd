//! Device memory: allocations in one address space of their own, with guard zones and a record of what was written.
//!
//! Addresses are never used twice, so that an access through a freed pointer is always seen.

use super::ast::Space;
use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed};

/// First device address.
const BASE: u64 = 1 << 40;
/// Granule of the page table; every allocation starts on one and at least one granule lies between two.
const PAGE: u64 = 1 << 16;
/// Where the variables of modules lie.
pub const MODULE_BASE: u64 = 1 << 45;
/// Where shared and local memory and parameters lie in the generic address space.
pub const SHARED_WINDOW: u64 = 1 << 46;
pub const LOCAL_WINDOW: u64 = (1 << 46) + (1 << 40);
pub const PARAM_WINDOW: u64 = (1 << 46) + (2 << 40);
pub const WINDOW_SIZE: u64 = 1 << 32;

/// What is added to an address in `space` to make it generic.
pub fn window(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        _ => 0,
    }
}

/// A range of device memory with one owner.
///
/// Words are atomics because blocks run on several threads at once and kernels may race there.
#[derive(Debug)]
pub struct Alloc {
    pub base: u64,
    pub len: u64,
    pub label: String,
    data: Box<[AtomicU64]>,
    /// A bit for every byte that was written.
    init: Box<[AtomicU64]>,
    all_init: AtomicBool,
    touched: AtomicBool,
    pub freed: bool,
    /// Writing is an error.
    pub constant: bool,
}

impl Alloc {
    /// New memory, not initialised.
    pub fn new(base: u64, len: u64, label: &str) -> Alloc {
        let words = |n: u64| (0..n).map(|_| AtomicU64::new(0)).collect();
        Alloc {
            base,
            len,
            label: label.to_string(),
            data: words(len.div_ceil(16) * 2),
            init: words(len.div_ceil(64)),
            all_init: AtomicBool::new(len == 0),
            touched: AtomicBool::new(false),
            freed: false,
            constant: false,
        }
    }

    fn ptr(&self, off: u64) -> *mut u8 {
        debug_assert!(off <= self.len);
        self.data
            .as_ptr()
            .cast::<u8>()
            .cast_mut()
            .wrapping_add(off as usize)
    }

    /// Whether `off..off + n` lies inside.
    #[inline]
    pub fn holds(&self, off: u64, n: u64) -> bool {
        off <= self.len && n <= self.len - off
    }

    /// Reads `n` <= 8 bytes (a power of two, aligned to its size, inside).
    #[inline]
    pub fn read(&self, off: u64, n: usize) -> u64 {
        assert!(self.holds(off, n as u64) && off.is_multiple_of(n as u64));
        let p = self.ptr(off);
        // SAFETY: inside the allocation and aligned by the assertion; atomics may be shared.
        unsafe {
            match n {
                1 => u64::from(AtomicU8::from_ptr(p).load(Relaxed)),
                2 => u64::from(AtomicU16::from_ptr(p.cast()).load(Relaxed)),
                4 => u64::from(AtomicU32::from_ptr(p.cast()).load(Relaxed)),
                _ => AtomicU64::from_ptr(p.cast()).load(Relaxed),
            }
        }
    }

    /// Writes `n` <= 8 bytes, as [`read`](Self::read).
    #[inline]
    pub fn write(&self, off: u64, n: usize, v: u64) {
        assert!(self.holds(off, n as u64) && off.is_multiple_of(n as u64));
        let p = self.ptr(off);
        // SAFETY: as in `read`.
        unsafe {
            match n {
                1 => AtomicU8::from_ptr(p).store(v as u8, Relaxed),
                2 => AtomicU16::from_ptr(p.cast()).store(v as u16, Relaxed),
                4 => AtomicU32::from_ptr(p.cast()).store(v as u32, Relaxed),
                _ => AtomicU64::from_ptr(p.cast()).store(v, Relaxed),
            }
        }
    }

    /// Replaces `n` (4 or 8, or 2) bytes by `f` of them in one step; returns the old ones.
    pub fn update(&self, off: u64, n: usize, f: impl Fn(u64) -> u64) -> u64 {
        assert!(self.holds(off, n as u64) && off.is_multiple_of(n as u64));
        let p = self.ptr(off);
        // SAFETY: as in `read`.
        unsafe {
            match n {
                2 => u64::from(
                    AtomicU16::from_ptr(p.cast())
                        .fetch_update(Relaxed, Relaxed, |x| Some(f(u64::from(x)) as u16))
                        .unwrap_or_else(|x| x),
                ),
                4 => u64::from(
                    AtomicU32::from_ptr(p.cast())
                        .fetch_update(Relaxed, Relaxed, |x| Some(f(u64::from(x)) as u32))
                        .unwrap_or_else(|x| x),
                ),
                _ => AtomicU64::from_ptr(p.cast())
                    .fetch_update(Relaxed, Relaxed, |x| Some(f(x)))
                    .unwrap_or_else(|x| x),
            }
        }
    }

    /// Reads 32 words of 4 bytes from `off` on (aligned to 4, inside).
    #[inline]
    pub fn read_row(&self, off: u64, out: &mut [u32; 32]) {
        assert!(self.holds(off, 128) && off.is_multiple_of(4));
        let p = self.ptr(off).cast::<u32>();
        for (i, o) in out.iter_mut().enumerate() {
            // SAFETY: as in `read`.
            *o = unsafe { AtomicU32::from_ptr(p.add(i)) }.load(Relaxed);
        }
    }

    /// Writes 32 words of 4 bytes, as [`read_row`](Self::read_row).
    #[inline]
    pub fn write_row(&self, off: u64, v: &[u32; 32]) {
        assert!(self.holds(off, 128) && off.is_multiple_of(4));
        let p = self.ptr(off).cast::<u32>();
        for (i, x) in v.iter().enumerate() {
            // SAFETY: as in `read`.
            unsafe { AtomicU32::from_ptr(p.add(i)) }.store(*x, Relaxed);
        }
    }

    /// Panics unless every lane's `n` bytes are aligned to words and inside.
    #[inline(always)]
    fn check_lanes(&self, addr: &[u64; 32], n: u64) {
        let (mut or, mut most) = (0, 0);
        for a in addr {
            let off = a.wrapping_sub(self.base);
            or |= off;
            most = most.max(off);
        }
        assert!(self.holds(most, n) && or & 3 == 0);
    }

    /// Reads `N` words for each lane from its address on (aligned to 4, inside).
    #[inline]
    pub fn read_lanes<const N: usize>(&self, addr: &[u64; 32]) -> [[u32; 32]; N] {
        self.check_lanes(addr, 4 * N as u64);
        let mut to = [[0; 32]; N];
        for l in 0..32 {
            let p = self.ptr(addr[l] - self.base).cast::<u32>();
            for (k, t) in to.iter_mut().enumerate() {
                // SAFETY: as in `read`, by the assertion of `check_lanes`.
                t[l] = unsafe { AtomicU32::from_ptr(p.add(k)) }.load(Relaxed);
            }
        }
        to
    }

    /// Writes `N` words for each lane in `m`, as [`read_lanes`](Self::read_lanes).
    #[inline]
    pub fn write_lanes<const N: usize>(&self, addr: &[u64; 32], m: u32, v: [&[u32; 32]; N]) {
        self.check_lanes(addr, 4 * N as u64);
        for l in (0..32).filter(|l| m >> l & 1 == 1) {
            let p = self.ptr(addr[l] - self.base).cast::<u32>();
            for (k, v) in v.iter().enumerate() {
                // SAFETY: as in `read_lanes`.
                unsafe { AtomicU32::from_ptr(p.add(k)) }.store(v[l], Relaxed);
            }
        }
    }

    /// Whether every byte has been written.
    #[inline]
    pub fn all_init(&self) -> bool {
        self.all_init.load(Relaxed)
    }

    /// Whether `n` <= 16 bytes at `off`, aligned to `n`, have been written.
    #[inline]
    pub fn is_init(&self, off: u64, n: u64) -> bool {
        let bits = ((1 << n) - 1) << (off % 64);
        self.init[(off / 64) as usize].load(Relaxed) & bits == bits
    }

    /// Records that `n` <= 16 bytes at `off`, aligned to `n`, are written.
    #[inline]
    pub fn set_init(&self, off: u64, n: u64) {
        let bits = ((1 << n) - 1) << (off % 64);
        let w = &self.init[(off / 64) as usize];
        if w.load(Relaxed) & bits != bits {
            w.fetch_or(bits, Relaxed);
            if !self.touched.load(Relaxed) {
                self.touched.store(true, Relaxed);
            }
        }
    }

    fn mark(&self, off: u64, len: u64, init: bool) {
        if init && off == 0 && len == self.len {
            self.all_init.store(true, Relaxed);
        }
        if !init && len > 0 {
            self.all_init.store(false, Relaxed);
        }
        let end = off + len;
        let mut at = off;
        while at < end {
            let n = (64 - at % 64).min(end - at);
            let bits = (((1u128 << n) - 1) as u64) << (at % 64);
            let w = &self.init[(at / 64) as usize];
            if init {
                w.fetch_or(bits, Relaxed);
            } else {
                w.fetch_and(!bits, Relaxed);
            }
            at += n;
        }
        self.touched.store(true, Relaxed);
    }

    /// After a launch: notes whether everything is written by now, so that reads need no look at the bits.
    pub fn settle(&self) {
        if self.freed || self.all_init() || !self.touched.swap(false, Relaxed) {
            return;
        }
        let full = (self.len / 64) as usize;
        let rest = self.len % 64;
        let done = self.init[..full]
            .iter()
            .all(|w| w.load(Relaxed) == u64::MAX)
            && (rest == 0 || self.init[full].load(Relaxed) & ((1 << rest) - 1) == (1 << rest) - 1);
        if done {
            self.all_init.store(true, Relaxed);
        }
    }

    fn copy_in(&self, off: u64, bytes: &[u8]) {
        assert!(self.holds(off, bytes.len() as u64));
        // SAFETY: inside by the assertion; the memory is exclusively the host's between launches.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.ptr(off), bytes.len()) };
        self.mark(off, bytes.len() as u64, true);
    }

    /// Sets the contents and marks them constant or not.
    pub fn with_data(mut self, bytes: &[u8], constant: bool) -> Alloc {
        self.copy_in(0, bytes);
        self.constant = constant;
        self
    }
}

/// The device's memory.
#[derive(Debug, Default)]
pub struct Memory {
    allocs: Vec<Alloc>,
    /// Index of the allocation that a granule belongs to (guard zones belong to the one before).
    pages: Vec<u32>,
    used: u64,
}

impl Memory {
    /// Empty memory.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Reserves `len` bytes, not initialised, aligned to 256 bytes and more, for `label`.
    pub fn alloc(&mut self, len: u64, label: &str) -> u64 {
        let base = BASE + self.pages.len() as u64 * PAGE;
        // A guard of at least one granule, and of as much as the allocation up to 1 MiB: overruns end up in it.
        let guard = PAGE + len.min(1 << 20);
        let n = (len + guard).div_ceil(PAGE);
        self.pages
            .extend(std::iter::repeat_n(self.allocs.len() as u32, n as usize));
        self.allocs.push(Alloc::new(base, len, label));
        self.used += len;
        base
    }

    /// Frees the allocation that starts at `addr`; a later access is a fault that names it.
    ///
    /// # Errors
    /// No allocation starts there, or it is free already.
    pub fn free(&mut self, addr: u64) -> Result<()> {
        match self.index(addr) {
            Some(i) if self.allocs[i].base == addr && !self.allocs[i].freed => {
                let a = &mut self.allocs[i];
                a.freed = true;
                a.data = Box::new([]);
                a.init = Box::new([]);
                self.used -= a.len;
                Ok(())
            }
            Some(i) if self.allocs[i].freed => Err(Error::run(format!(
                "`{}` is freed twice",
                self.allocs[i].label
            ))),
            _ => Err(Error::run(format!(
                "free of 0x{addr:x}, where no allocation starts"
            ))),
        }
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used
    }

    fn index(&self, addr: u64) -> Option<usize> {
        let page = addr.checked_sub(BASE)? / PAGE;
        self.pages.get(page as usize).map(|&i| i as usize)
    }

    /// The allocation that an address belongs to, guard zones and freed ones included.
    #[inline]
    pub fn find(&self, addr: u64) -> Option<&Alloc> {
        self.index(addr).map(|i| &self.allocs[i])
    }

    /// The allocation after that of `addr`: the owner that an address just below its start was meant for.
    pub fn next(&self, addr: u64) -> Option<&Alloc> {
        self.allocs.get(self.index(addr)? + 1)
    }

    fn range(&self, addr: u64, len: usize, what: &str) -> Result<(&Alloc, u64)> {
        match self.find(addr) {
            Some(a) if a.freed => Err(Error::run(format!(
                "{what} of `{}` after it was freed",
                a.label
            ))),
            Some(a) if a.holds(addr - a.base, len as u64) => Ok((a, addr - a.base)),
            Some(a) => Err(Error::run(format!(
                "{what} of {len} bytes at {} of `{}` ({} bytes)",
                addr - a.base,
                a.label,
                a.len
            ))),
            None => Err(Error::run(format!(
                "{what} of {len} bytes at 0x{addr:x}, which is no device memory"
            ))),
        }
    }

    /// Copies from the host.
    ///
    /// # Errors
    /// The range is not inside one live allocation.
    pub fn write(&mut self, addr: u64, bytes: &[u8]) -> Result<()> {
        let (a, off) = self.range(addr, bytes.len(), "copy to the device")?;
        a.copy_in(off, bytes);
        Ok(())
    }

    /// Copies to the host; bytes that were never written read as zero.
    ///
    /// # Errors
    /// The range is not inside one live allocation.
    pub fn read(&self, addr: u64, out: &mut [u8]) -> Result<()> {
        let (a, off) = self.range(addr, out.len(), "copy from the device")?;
        // SAFETY: inside by `range`; no launch runs while the host reads.
        unsafe { std::ptr::copy_nonoverlapping(a.ptr(off), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Copies within the device.
    ///
    /// # Errors
    /// A range is not inside one live allocation.
    pub fn copy(&mut self, dst: u64, src: u64, len: usize) -> Result<()> {
        let mut buf = vec![0; len];
        self.read(src, &mut buf)?;
        self.write(dst, &buf)
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// The range is not inside one live allocation.
    pub fn fill(&mut self, addr: u64, value: u8, len: usize) -> Result<()> {
        let (a, off) = self.range(addr, len, "fill")?;
        // SAFETY: inside by `range`; the memory is exclusively the host's between launches.
        unsafe { std::ptr::write_bytes(a.ptr(off), value, len) };
        a.mark(off, len as u64, true);
        Ok(())
    }

    /// Forgets that a range was ever written: for memory that is used again for something else.
    ///
    /// # Errors
    /// The range is not inside one live allocation.
    pub fn mark_uninit(&mut self, addr: u64, len: usize) -> Result<()> {
        let (a, off) = self.range(addr, len, "marking")?;
        a.mark(off, len as u64, false);
        Ok(())
    }

    /// The first byte of a range that was never written.
    ///
    /// # Errors
    /// The range is not inside one live allocation.
    pub fn first_uninit(&self, addr: u64, len: usize) -> Result<Option<u64>> {
        let (a, off) = self.range(addr, len, "look")?;
        Ok((off..off + len as u64)
            .find(|&o| !a.is_init(o, 1))
            .map(|o| o - off))
    }

    /// After a launch.
    pub fn settle(&self) {
        for a in &self.allocs {
            a.settle();
        }
    }
}
