//! Loads, stores and atomics, with their checks and counts.

use super::ast::{Space, Ty};
use super::counters::sectors;
use super::exec::{Block, Done, Trouble, fail, first, lanes};
use super::memory::{Alloc, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, WINDOW_SIZE};
use super::program::{Access, Inst, Op};
use super::warp::R64;

/// Where an address points.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    Global,
    Shared,
    Local,
    Param,
}

impl<'a> Block<'a> {
    /// Executes an instruction that may fail.
    pub fn other(&mut self, wi: usize, pc: u32, inst: &Inst, m: u32) -> Done {
        match &inst.op {
            Op::Ld(a) => self.access(wi, pc, a, m, true),
            Op::St(a) => self.access(wi, pc, a, m, false),
            Op::LdParam(a) => self.load_param(wi, a, m),
            Op::Atom(a) => self.atomic(wi, pc, a, m),
            Op::CpAsync(_)
            | Op::CpCommit
            | Op::CpWait(_)
            | Op::CpWaitAll
            | Op::LdMatrix(_)
            | Op::StMatrix(_)
            | Op::Mma(_) => self.tensor(wi, pc, inst, m),
            Op::Trap => fail(first(m), "trap"),
            Op::Fence | Op::Nop => Ok(()),
            _ => self.group(wi, inst, m),
        }
    }

    /// Effective addresses of all lanes.
    pub fn addresses(&self, wi: usize, slot: u32, wide: bool, off: i64) -> R64 {
        let w = &self.warps[wi];
        let off = off as u64;
        if wide {
            let a = w.r64(slot);
            std::array::from_fn(|l| a[l].wrapping_add(off))
        } else {
            let a = w.r(slot);
            std::array::from_fn(|l| u64::from(a[l].wrapping_add(off as u32)))
        }
    }

    fn load_param(&mut self, wi: usize, a: &Access, m: u32) -> Done {
        let addr = self.addresses(wi, a.addr, a.addr64, a.off);
        let n = a.ty.bytes();
        for k in 0..a.vec as usize {
            let at = addr[0] as usize + k * n;
            let Some(b) = self.g.params.get(at..at + n) else {
                return fail(
                    first(m),
                    format!(
                        "parameter at byte {at} is not there: {} were passed",
                        self.g.params.len()
                    ),
                );
            };
            let mut buf = [0; 8];
            buf[..n].copy_from_slice(b);
            let v = extend(u64::from_le_bytes(buf), a);
            let w = &mut self.warps[wi];
            if a.wide {
                w.put64(a.regs[k], m, &[v; 32]);
            } else {
                w.put(a.regs[k], m, &[v as u32; 32]);
            }
        }
        Ok(())
    }

    pub fn place(space: Space, addr: u64) -> (Place, u64) {
        match space {
            Space::Global | Space::Const => (Place::Global, addr),
            Space::Shared => (Place::Shared, addr),
            Space::Local => (Place::Local, addr),
            Space::Param => (Place::Param, addr),
            Space::Generic => {
                for (base, p) in [
                    (SHARED_WINDOW, Place::Shared),
                    (LOCAL_WINDOW, Place::Local),
                    (PARAM_WINDOW, Place::Param),
                ] {
                    if addr.wrapping_sub(base) < WINDOW_SIZE {
                        return (p, addr - base);
                    }
                }
                (Place::Global, addr)
            }
        }
    }

    fn access(&mut self, wi: usize, pc: u32, a: &Access, m: u32, load: bool) -> Done {
        let mut addr = self.addresses(wi, a.addr, a.addr64, a.off);
        let n = a.ty.bytes() * a.vec as usize;
        let f = first(m) as usize;
        // Inactive lanes take the first active one's address, so that whole-warp tests need no mask.
        if m != u32::MAX {
            let keep = addr[f];
            for (l, x) in addr.iter_mut().enumerate() {
                if m >> l & 1 == 0 {
                    *x = keep;
                }
            }
        }
        let (mut or, mut lo, mut hi) = (0, u64::MAX, 0);
        for &x in &addr {
            or |= x;
            lo = lo.min(x);
            hi = hi.max(x);
        }
        // Sizes are powers of two.
        if or & (n as u64 - 1) != 0 {
            let l = lanes(m)
                .find(|&l| !addr[l].is_multiple_of(n as u64))
                .unwrap_or(f);
            return self.misaligned(l, addr[l], n, load);
        }
        let (place, base) = Self::place(a.space, addr[f]);
        let delta = addr[f] - base;
        let same = a.space != Space::Generic
            || (Self::place(a.space, lo).0 == place && Self::place(a.space, hi).0 == place);
        if !same {
            // Lanes that point to different spaces: one after the other.
            for l in lanes(m) {
                let (p, b) = Self::place(a.space, addr[l]);
                let mut one = addr;
                one.fill(b);
                self.access_in(wi, pc, a, 1 << l, load, p, &one, (b, b))?;
            }
            return Ok(());
        }
        if delta != 0 {
            for x in &mut addr {
                *x -= delta;
            }
        }
        self.access_in(wi, pc, a, m, load, place, &addr, (lo - delta, hi - delta))
    }

    pub fn misaligned<T>(&self, lane: usize, addr: u64, n: usize, load: bool) -> Done<T> {
        Err(Box::new(Trouble {
            lane: lane as u32,
            what: format!(
                "misaligned {} of {n} bytes at 0x{addr:x}",
                if load { "read" } else { "write" }
            ),
            address: Some(addr),
        }))
    }

    #[allow(clippy::too_many_arguments)]
    fn access_in(
        &mut self,
        wi: usize,
        pc: u32,
        a: &Access,
        m: u32,
        load: bool,
        place: Place,
        addr: &R64,
        range: (u64, u64),
    ) -> Done {
        let n = a.ty.bytes() as u64 * u64::from(a.vec);
        match place {
            Place::Global => self.global(wi, pc, a, m, load, addr, range, n),
            Place::Shared => self.shared_access(wi, pc, a, m, load, addr, range, n as u32),
            Place::Local => self.local_access(wi, a, m, load, addr, range, n),
            Place::Param => {
                if !load {
                    return fail(first(m), "write to a kernel parameter");
                }
                for l in lanes(m) {
                    for k in 0..a.vec as usize {
                        let at = addr[l] as usize + k * a.ty.bytes();
                        let Some(b) = self.g.params.get(at..at + a.ty.bytes()) else {
                            return fail(l as u32, format!("parameter at byte {at} is not there"));
                        };
                        let mut buf = [0; 8];
                        buf[..b.len()].copy_from_slice(b);
                        self.set(wi, a, k, l, u64::from_le_bytes(buf));
                    }
                }
                Ok(())
            }
        }
    }

    /// Writes what a load brought for one lane into element `k`'s register.
    #[inline]
    pub fn set(&mut self, wi: usize, a: &Access, k: usize, l: usize, raw: u64) {
        let v = extend(raw, a);
        let w = &mut self.warps[wi];
        if a.wide {
            w.r64_mut(a.regs[k])[l] = v;
        } else {
            w.r_mut(a.regs[k])[l] = v as u32;
        }
    }

    #[inline]
    pub fn get(&self, wi: usize, a: &Access, k: usize, l: usize) -> u64 {
        let w = &self.warps[wi];
        if a.wide {
            w.r64(a.regs[k])[l]
        } else {
            u64::from(w.r(a.regs[k])[l])
        }
    }

    /// The allocation that a global access falls in; everything else is a fault.
    pub fn owner(&self, lane: usize, addr: u64, n: u64, what: &str) -> Done<&'a Alloc> {
        let found = self.alloc_of(addr);
        if let Some(a) = found
            && !a.freed
            && addr >= a.base
            && a.holds(addr - a.base, n)
        {
            return Ok(a);
        }
        let text = match found {
            Some(a) if a.freed => format!(
                "{what} after free: {n} bytes at {} of `{}`",
                addr.wrapping_sub(a.base),
                a.label
            ),
            Some(a) => {
                let past = addr.wrapping_sub(a.base + a.len) as i64;
                match self.g.mem.next(addr) {
                    // Closer to the start of the next one: an index below zero.
                    Some(b) if past > 0 && b.base - addr < past as u64 => {
                        format!(
                            "out of bounds: {what} of {n} bytes, {} before `{}` ({} bytes)",
                            b.base - addr,
                            b.label,
                            b.len
                        )
                    }
                    _ if past < 0 => {
                        format!(
                            "out of bounds: {what} of {n} bytes at {} of `{}` ({} bytes)",
                            addr - a.base,
                            a.label,
                            a.len
                        )
                    }
                    _ => format!(
                        "out of bounds: {what} of {n} bytes at {past} past the end of `{}` ({} bytes)",
                        a.label, a.len
                    ),
                }
            }
            None if addr < 1 << 20 => format!("{what} of {n} bytes at 0x{addr:x}: a null pointer"),
            None => format!(
                "out of bounds: {what} of {n} bytes at 0x{addr:x}, which is no device memory"
            ),
        };
        Err(Box::new(Trouble {
            lane: lane as u32,
            what: text,
            address: Some(addr),
        }))
    }

    /// A read of bytes that nobody wrote.
    pub fn uninit<T>(lane: usize, a: &Alloc, off: u64, n: u64) -> Done<T> {
        Err(Box::new(Trouble {
            lane: lane as u32,
            what: format!(
                "uninitialised: nobody wrote all of the {n} bytes at {off} of `{}` ({} bytes)",
                a.label, a.len
            ),
            address: Some(a.base + off),
        }))
    }

    /// Counts a request to global memory.
    pub fn count_global(&mut self, pc: u32, addr: &R64, m: u32, n: u64) {
        let s = &mut self.stats[pc as usize];
        s.requests += 1;
        s.bytes += n * u64::from(m.count_ones());
        let (count, ideal) = if m == u32::MAX {
            // Rising addresses are the rule, and need no sorting.
            let (mut count, mut distinct, mut rising) = (1, 1, true);
            for l in 1..32 {
                rising &= addr[l] >= addr[l - 1];
                count += u64::from(addr[l] >> 5 != addr[l - 1] >> 5);
                distinct += u64::from(addr[l] != addr[l - 1]);
            }
            if rising {
                (count, (distinct * n).div_ceil(32))
            } else {
                sectors(&mut addr.clone(), n)
            }
        } else {
            let mut list = [0; 32];
            let mut k = 0;
            for l in lanes(m) {
                list[k] = addr[l];
                k += 1;
            }
            sectors(&mut list[..k], n)
        };
        s.a += count;
        s.b += ideal;
    }

    #[allow(clippy::too_many_arguments)]
    fn global(
        &mut self,
        wi: usize,
        pc: u32,
        a: &Access,
        m: u32,
        load: bool,
        addr: &R64,
        range: (u64, u64),
        n: u64,
    ) -> Done {
        self.count_global(pc, addr, m, n);
        let what = if load { "read" } else { "write" };
        let f = first(m) as usize;
        let checks = self.g.checks;
        let size = a.ty.bytes();
        // All lanes in one live allocation: one look-up for the whole warp.
        if let Some(al) = self.alloc_of(addr[f])
            && !al.freed
            && range.0 >= al.base
            && range.1 - al.base + n <= al.len
            && (load || !al.constant)
        {
            let base = al.base;
            let row = m == u32::MAX && n == 4 && (0..32).all(|l| addr[l] == addr[0] + 4 * l as u64);
            if load {
                if checks && !al.all_init() {
                    for l in lanes(m) {
                        if !al.is_init(addr[l] - base, n) {
                            return Self::uninit(l, al, addr[l] - base, n);
                        }
                    }
                }
                let w = &mut self.warps[wi];
                if row {
                    al.read_row(addr[0] - base, w.r_mut(a.regs[0]));
                } else if size == 4 && !a.wide {
                    match a.vec {
                        1 => w.put_all(&a.regs, m, &al.read_lanes::<1>(addr)),
                        2 => w.put_all(&a.regs, m, &al.read_lanes::<2>(addr)),
                        _ => w.put_all(&a.regs, m, &al.read_lanes::<4>(addr)),
                    }
                } else {
                    for k in 0..a.vec as usize {
                        for l in lanes(m) {
                            self.set(
                                wi,
                                a,
                                k,
                                l,
                                al.read(addr[l] - base + (size * k) as u64, size),
                            );
                        }
                    }
                }
            } else {
                let w = &self.warps[wi];
                if row && !a.wide {
                    al.write_row(addr[0] - base, w.r(a.regs[0]));
                } else if size == 4 && !a.wide {
                    match a.vec {
                        1 => al.write_lanes(addr, m, w.all::<1>(&a.regs)),
                        2 => al.write_lanes(addr, m, w.all::<2>(&a.regs)),
                        _ => al.write_lanes(addr, m, w.all::<4>(&a.regs)),
                    }
                } else {
                    for k in 0..a.vec as usize {
                        for l in lanes(m) {
                            al.write(
                                addr[l] - base + (size * k) as u64,
                                size,
                                self.get(wi, a, k, l),
                            );
                        }
                    }
                }
                if !al.all_init() {
                    for l in lanes(m) {
                        al.set_init(addr[l] - base, n);
                    }
                }
            }
            return Ok(());
        }
        for l in lanes(m) {
            let al = self.owner(l, addr[l], n, what)?;
            let off = addr[l] - al.base;
            if load {
                if checks && !al.all_init() && !al.is_init(off, n) {
                    return Self::uninit(l, al, off, n);
                }
                let mut raw = [0; 4];
                for k in 0..a.vec as usize {
                    raw[k] = al.read(off + (size * k) as u64, size);
                }
                for k in 0..a.vec as usize {
                    self.set(wi, a, k, l, raw[k]);
                }
            } else {
                if al.constant {
                    return fail(l as u32, format!("write to constant memory `{}`", al.label));
                }
                for k in 0..a.vec as usize {
                    al.write(off + (size * k) as u64, size, self.get(wi, a, k, l));
                }
                al.set_init(off, n);
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn local_access(
        &mut self,
        wi: usize,
        a: &Access,
        m: u32,
        load: bool,
        addr: &R64,
        range: (u64, u64),
        n: u64,
    ) -> Done {
        let len = self.local_words as u64 * 4;
        if range.1.checked_add(n).is_none_or(|e| e > len) {
            let l = lanes(m)
                .find(|&l| addr[l].saturating_add(n) > len)
                .unwrap_or(0);
            return fail(
                l as u32,
                format!(
                    "out of bounds: {n} bytes at {} of local memory ({len} bytes)",
                    addr[l] as i64
                ),
            );
        }
        let size = a.ty.bytes();
        for k in 0..a.vec as usize {
            for l in lanes(m) {
                let at = (wi * 32 + l) * self.local_words * 4 + addr[l] as usize + size * k;
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.local);
                if load {
                    let mut buf = [0; 8];
                    buf[..size].copy_from_slice(&bytes[at..at + size]);
                    self.set(wi, a, k, l, u64::from_le_bytes(buf));
                } else {
                    let v = self.get(wi, a, k, l).to_le_bytes();
                    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.local);
                    bytes[at..at + size].copy_from_slice(&v[..size]);
                }
            }
        }
        Ok(())
    }
}

/// What a load puts into the register: extended by the type's sign to the register's width.
#[inline(always)]
fn extend(raw: u64, a: &Access) -> u64 {
    let v = match a.ty {
        Ty::S8 => raw as u8 as i8 as i64 as u64,
        Ty::S16 => raw as u16 as i16 as i64 as u64,
        Ty::S32 => raw as u32 as i32 as i64 as u64,
        _ => raw,
    };
    if a.half { v & 0xffff } else { v }
}
