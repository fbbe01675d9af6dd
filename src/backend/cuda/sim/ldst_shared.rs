//! Loads and stores in shared memory: bounds, races and other checks, bank conflicts, and the data.

use super::counters::wavefronts;
use super::exec::{Block, Done, Trouble, first, lanes};
use super::program::{Access, NONE};
use super::warp::R64;

/// The numbers of the lanes.
const ALL_LANES: [u8; 32] = {
    let mut t = [0; 32];
    let mut l = 0;
    while l < 32 {
        t[l] = l as u8;
        l += 1;
    }
    t
};

impl Block<'_> {
    /// Counts a request to shared memory.
    pub fn count_shared(&mut self, pc: u32, addr: &R64, m: u32, n: u32) {
        let (mut a, mut ln) = ([0; 32], [0; 32]);
        let mut k = 0;
        if m == u32::MAX {
            (a, ln, k) = (addr.map(|x| x as u32), ALL_LANES, 32);
        } else {
            for l in lanes(m) {
                a[k] = addr[l] as u32;
                ln[k] = l as u8;
                k += 1;
            }
        }
        let (count, ideal) = wavefronts(&a[..k], &ln[..k], n);
        let s = &mut self.stats[pc as usize];
        s.shared_requests += 1;
        s.bytes += u64::from(n) * k as u64;
        s.shared_a += count;
        s.shared_b += ideal;
    }

    /// Fails where an access leaves shared memory.
    pub fn shared_bounds(&self, m: u32, addr: &R64, n: u32, what: &str) -> Done {
        let len = u64::from(self.shared.len);
        for l in lanes(m) {
            if addr[l].checked_add(u64::from(n)).is_none_or(|e| e > len) {
                return Err(Box::new(Trouble {
                    lane: l as u32,
                    what: format!(
                        "out of bounds: {what} of {n} bytes at {} of shared memory ({len} bytes)",
                        addr[l] as i64
                    ),
                    address: Some(addr[l]),
                }));
            }
        }
        Ok(())
    }

    /// Checks a read of shared memory by one lane (or [`NONE`], the warp, on behalf of `l`).
    pub fn check_shared_read(
        &mut self,
        wi: usize,
        pc: u32,
        l: usize,
        as_lane: u32,
        at: u32,
        n: u32,
    ) -> Done {
        let who = self.who(wi, pc);
        if self.shared.read_piece(at, n, as_lane, &who) {
            return Ok(());
        }
        if self.shared.in_flight(at, n) {
            return self.in_flight(l, at, n, "read");
        }
        if !self.shared.is_init(at, n) {
            return Err(Box::new(Trouble {
                lane: l as u32,
                what: format!(
                    "uninitialised: nobody wrote all of the {n} bytes at {at} of shared memory"
                ),
                address: Some(u64::from(at)),
            }));
        }
        let mut b = at;
        while b < at + n {
            let k = (4 - b % 4).min(at + n - b);
            if let Some(r) = self
                .shared
                .note_read(b / 4, ((1 << k) - 1) << (b % 4), as_lane, &who)
            {
                return Err(self.race(&r, wi, l as u32, false, b));
            }
            b += k;
        }
        Ok(())
    }

    fn in_flight<T>(&self, l: usize, at: u32, n: u32, what: &str) -> Done<T> {
        Err(Box::new(Trouble {
            lane: l as u32,
            what: format!(
                "{what} of {n} bytes at {at} of shared memory while a cp.async to them is in flight (no wait_group before)"
            ),
            address: Some(u64::from(at)),
        }))
    }

    /// Checks a write to shared memory by one lane, or an asynchronous one at its issue.
    pub fn check_shared_write(
        &mut self,
        wi: usize,
        pc: u32,
        l: usize,
        at: u32,
        n: u32,
        atomic: bool,
    ) -> Done {
        if self.shared.in_flight(at, n) {
            return self.in_flight(l, at, n, "write");
        }
        let who = self.who(wi, pc);
        if !atomic && self.shared.write_piece(at, n, l as u32, &who) {
            return Ok(());
        }
        let mut b = at;
        while b < at + n {
            let k = (4 - b % 4).min(at + n - b);
            if let Some(r) =
                self.shared
                    .note_write(b / 4, ((1 << k) - 1) << (b % 4), l as u32, &who, atomic)
            {
                return Err(self.race(&r, wi, l as u32, true, b));
            }
            b += k;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    pub fn shared_access(
        &mut self,
        wi: usize,
        pc: u32,
        a: &Access,
        m: u32,
        load: bool,
        addr: &R64,
        range: (u64, u64),
        n: u32,
    ) -> Done {
        if range
            .1
            .checked_add(u64::from(n))
            .is_none_or(|e| e > u64::from(self.shared.len))
        {
            self.shared_bounds(m, addr, n, if load { "read" } else { "write" })?;
        }
        self.count_shared(pc, addr, m, n);
        let size = a.ty.bytes() as u32;
        let checks = self.g.checks;
        if checks && load {
            if range.0 == range.1 {
                // One address for all: one note.
                let as_lane = if m.is_power_of_two() { first(m) } else { NONE };
                self.check_shared_read(wi, pc, first(m) as usize, as_lane, range.0 as u32, n)?;
            } else if !self.shared.read_pieces(addr, m, n, &self.who(wi, pc)) {
                for l in lanes(m) {
                    self.check_shared_read(wi, pc, l, l as u32, addr[l] as u32, n)?;
                }
            }
        }
        if load {
            let w = &mut self.warps[wi];
            if size == 4 && !a.wide {
                match a.vec {
                    1 => w.put_all(&a.regs, m, &self.shared.read_lanes::<1>(addr)),
                    2 => w.put_all(&a.regs, m, &self.shared.read_lanes::<2>(addr)),
                    _ => w.put_all(&a.regs, m, &self.shared.read_lanes::<4>(addr)),
                }
                return Ok(());
            }
            for k in 0..u32::from(a.vec) {
                for l in lanes(m) {
                    let at = addr[l] as u32 + size * k;
                    let low = u64::from(self.shared.read(at, size.min(4)));
                    let v = match size {
                        8 => low | u64::from(self.shared.read(at + 4, 4)) << 32,
                        _ => low,
                    };
                    self.set(wi, a, k as usize, l, v);
                }
            }
            return Ok(());
        }
        // Addresses that differ modulo 64 pieces differ: the usual case, told apart without comparing all pairs.
        let shift = n.trailing_zeros();
        let seen = lanes(m).fold(0u64, |s, l| s | 1 << (addr[l] >> shift & 63));
        let distinct = seen.count_ones() == m.count_ones();
        for l in lanes(m) {
            let at = addr[l] as u32;
            if checks {
                // Lanes that write the same value to one place in one instruction are no race.
                let before = m & ((1 << l) - 1);
                let mut same = lanes(if distinct { 0 } else { before })
                    .filter(|&o| addr[o] == addr[l])
                    .peekable();
                let twin = same.peek().is_some()
                    && same.all(|o| {
                        (0..a.vec as usize).all(|k| {
                            let keep = if size == 8 {
                                u64::MAX
                            } else {
                                (1 << (8 * size)) - 1
                            };
                            self.get(wi, a, k, o) & keep == self.get(wi, a, k, l) & keep
                        })
                    });
                if twin {
                    continue;
                }
                self.check_shared_write(wi, pc, l, at, n, false)?;
                self.shared.set_init(at, n);
            }
            for k in 0..u32::from(a.vec) {
                let v = self.get(wi, a, k as usize, l);
                if size == 8 {
                    self.shared.write(at + 8 * k, 4, v as u32);
                    self.shared.write(at + 8 * k + 4, 4, (v >> 32) as u32);
                } else {
                    self.shared.write(at + size * k, size, v as u32);
                }
            }
        }
        Ok(())
    }
}
