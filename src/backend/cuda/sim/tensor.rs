//! Tensor-core instructions and what feeds them: `mma`, `ldmatrix`, `stmatrix`, `cp.async`.

use super::ast::Ty;
use super::exec::{Block, Done, Trouble, fail, first, lanes};
use super::float as fl;
use super::memory::Alloc;
use super::program::{CpAsync, Inst, Matrix, Mma, NONE, Op};
use super::warp::{Flight, R64, Warp};

impl Block<'_> {
    /// Executes one of them.
    pub fn tensor(&mut self, wi: usize, pc: u32, i: &Inst, m: u32) -> Done {
        match &i.op {
            Op::CpAsync(c) => self.cp_async(wi, pc, c, m),
            Op::CpCommit => {
                for l in lanes(m) {
                    self.warps[wi].commits[l] += 1;
                }
                Ok(())
            }
            Op::CpWait(n) => {
                self.land(wi, m, Some(*n));
                Ok(())
            }
            Op::CpWaitAll => {
                self.land(wi, m, None);
                Ok(())
            }
            op => {
                if m != u32::MAX {
                    let missing = first(!m);
                    return fail(
                        first(m),
                        format!("lane {missing} is not active in an instruction of the whole warp"),
                    );
                }
                match op {
                    Op::Mma(x) => mma(&mut self.warps[wi], x),
                    Op::LdMatrix(x) => self.matrix(wi, pc, x, true)?,
                    Op::StMatrix(x) => self.matrix(wi, pc, x, false)?,
                    _ => {}
                }
                Ok(())
            }
        }
    }

    fn cp_async(&mut self, wi: usize, pc: u32, c: &CpAsync, m: u32) -> Done {
        let dst = self.addresses(wi, c.dst, c.dst64, c.dst_off);
        let src = self.addresses(wi, c.src, true, c.src_off);
        let n = u32::from(c.bytes);
        self.shared_bounds(m, &dst, n, "cp.async")?;
        self.count_shared(pc, &dst, m, n);
        self.stats[pc as usize].bytes -= u64::from(n) * u64::from(m.count_ones());
        let ignore = if c.ignore == NONE {
            0
        } else {
            let p = self.warps[wi].p(c.ignore);
            if c.ignore_neg { !p } else { p }
        };
        let mut reading = 0u32;
        // The allocation that the last lane read: mostly the next one's, too.
        let mut near: Option<&Alloc> = None;
        for l in lanes(m) {
            let size = match c.src_size {
                _ if ignore >> l & 1 == 1 => 0,
                NONE => n,
                s => self.warps[wi].r(s)[l],
            };
            if size > n {
                return fail(
                    l as u32,
                    format!("cp.async reads {size} bytes for a copy of {n}"),
                );
            }
            let at = dst[l] as u32;
            for (what, x) in [("destination", dst[l]), ("source", src[l])] {
                if x & u64::from(n - 1) != 0 && (size > 0 || what == "destination") {
                    return Err(Box::new(Trouble {
                        lane: l as u32,
                        what: format!("misaligned {what} of a cp.async of {n} bytes: 0x{x:x}"),
                        address: Some(x),
                    }));
                }
            }
            let mut data = [0u32; 4];
            if size > 0 {
                reading |= 1 << l;
                let a = match near {
                    Some(a) if a.holds(src[l].wrapping_sub(a.base), u64::from(size)) => a,
                    _ => self.owner(l, src[l], u64::from(size), "cp.async")?,
                };
                near = Some(a);
                let off = src[l] - a.base;
                if self.g.checks && !a.all_init() {
                    let missing = |&k: &u64| !a.is_init(off + k, 1);
                    if let Some(k) = (0..u64::from(size)).find(missing) {
                        return Self::uninit(l, a, off + k, 1);
                    }
                }
                for k in 0..size / 4 {
                    data[k as usize] = a.read(off + u64::from(4 * k), 4) as u32;
                }
                for k in size & !3..size {
                    let byte = a.read(off + u64::from(k), 1) as u32;
                    data[(k / 4) as usize] |= byte << (8 * (k % 4));
                }
            }
            if self.g.checks {
                // Whoever still uses the destination without a barrier between is in a race with the copy.
                self.check_shared_write(wi, pc, l, at, n, false)?;
                self.shared.set_flight(at, n, true);
            }
            let w = &mut self.warps[wi];
            w.flights.push(Flight {
                lane: l as u8,
                bytes: n as u8,
                group: w.commits[l],
                dst: at,
                data,
                pc,
            });
        }
        if reading != 0 {
            self.count_global(pc, &src, reading, u64::from(n));
        }
        Ok(())
    }

    /// Completes the copies of the lanes in `m`: those but the last `keep` groups, or all.
    fn land(&mut self, wi: usize, m: u32, keep: Option<u32>) {
        let mut flights = std::mem::take(&mut self.warps[wi].flights);
        flights.retain(|f| {
            let done = m >> f.lane & 1 == 1
                && keep.is_none_or(|n| f.group + n < self.warps[wi].commits[f.lane as usize]);
            if !done {
                return true;
            }
            let n = u32::from(f.bytes);
            for k in 0..n / 4 {
                self.shared.write(f.dst + 4 * k, 4, f.data[k as usize]);
            }
            if self.g.checks {
                self.shared.set_flight(f.dst, n, false);
                self.shared.set_init(f.dst, n);
                // The write happens now, for this thread; others need a barrier from here on. It was checked at issue.
                let (who, lane) = (self.who(wi, f.pc), u32::from(f.lane));
                if !self.shared.write_piece(f.dst, n, lane, &who) {
                    for k in 0..n / 4 {
                        let _ = self.shared.note_write(f.dst / 4 + k, 15, lane, &who, false);
                    }
                }
            }
            false
        });
        self.warps[wi].flights = flights;
    }

    /// `ldmatrix` and `stmatrix`: lane `8 q + r` holds the address of row `r` of matrix `q`; of a row's eight elements,
    /// thread `4 r + c` holds elements `2 c` and `2 c + 1` (transposed: of a column's).
    fn matrix(&mut self, wi: usize, pc: u32, x: &Matrix, load: bool) -> Done {
        let addr = self.addresses(wi, x.addr, x.addr64, x.off);
        let mut addr: R64 = addr.map(|a| {
            let s = a.wrapping_sub(super::memory::SHARED_WINDOW);
            if s < super::memory::WINDOW_SIZE { s } else { a }
        });
        let rows = 8 * usize::from(x.num);
        let m = if rows == 32 {
            u32::MAX
        } else {
            (1u32 << rows) - 1
        };
        for a in &mut addr[rows..] {
            *a = 0;
        }
        let what = if load { "ldmatrix" } else { "stmatrix" };
        self.shared_bounds(m, &addr, 16, what)?;
        if let Some(l) = (0..rows).find(|&l| !addr[l].is_multiple_of(16)) {
            return fail(
                l as u32,
                format!(
                    "misaligned {what}: the row at {} is not aligned to 16 bytes",
                    addr[l]
                ),
            );
        }
        self.count_shared(pc, &addr, m, 16);
        if self.g.checks {
            for l in 0..rows {
                if load {
                    self.check_shared_read(wi, pc, l, NONE, addr[l] as u32, 16)?;
                } else {
                    self.check_shared_write(wi, pc, l, addr[l] as u32, 16, false)?;
                    self.shared.set_init(addr[l] as u32, 16);
                }
            }
        }
        for q in 0..usize::from(x.num) {
            let reg = x.regs[q];
            let mut mat = [[0u16; 8]; 8];
            if load {
                for (r, row) in mat.iter_mut().enumerate() {
                    let at = addr[8 * q + r] as u32;
                    for k in 0..4 {
                        let v = self.shared.read(at + 4 * k, 4);
                        row[2 * k as usize] = v as u16;
                        row[2 * k as usize + 1] = (v >> 16) as u16;
                    }
                }
                let d = self.warps[wi].r_mut(reg);
                for (l, d) in d.iter_mut().enumerate() {
                    let (r, c) = (l / 4, 2 * (l % 4));
                    let (a, b) = if x.trans {
                        (mat[c][r], mat[c + 1][r])
                    } else {
                        (mat[r][c], mat[r][c + 1])
                    };
                    *d = u32::from(a) | u32::from(b) << 16;
                }
            } else {
                let s = *self.warps[wi].r(reg);
                for (l, v) in s.iter().enumerate() {
                    let (r, c) = (l / 4, 2 * (l % 4));
                    if x.trans {
                        (mat[c][r], mat[c + 1][r]) = (*v as u16, (v >> 16) as u16);
                    } else {
                        (mat[r][c], mat[r][c + 1]) = (*v as u16, (v >> 16) as u16);
                    }
                }
                for (r, row) in mat.iter().enumerate() {
                    let at = addr[8 * q + r] as u32;
                    for k in 0..4 {
                        let v = u32::from(row[2 * k as usize])
                            | u32::from(row[2 * k as usize + 1]) << 16;
                        self.shared.write(at + 4 * k, 4, v);
                    }
                }
            }
        }
        Ok(())
    }
}

/// `d = a b + c` for a 16 x 8 tile; fragments as the PTX document's figures have them.
///
/// Products of bf16, f16 and tf32 are exact in f64; each element is `c` plus its products, k rising, in f64, and
/// is rounded to f32 once. Devices round more often (and toward zero), so this is what they approximate.
fn mma(w: &mut Warp, x: &Mma) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the processor has what the function was compiled for.
        unsafe { mma_avx2(w, x) };
        return;
    }
    mma_any(w, x);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn mma_avx2(w: &mut Warp, x: &Mma) {
    mma_any(w, x);
}

#[inline(always)]
fn mma_any(w: &mut Warp, x: &Mma) {
    let mut a = [[0f64; 16]; 16]; // [row][k]
    let mut b = [[0f64; 8]; 16]; // [k][column]
    let k = usize::from(x.k);
    if x.ty == Ty::Tf32 {
        // The low 13 bits of a tf32 operand do not take part.
        let f = |v: u32| f64::from(f32::from_bits(v & 0xffff_e000));
        for r in 0..k / 2 {
            let v = w.r(x.a[r]);
            let (row, col) = (8 * (r % 2), 4 * (r / 2));
            for l in 0..32 {
                a[row + l / 4][col + l % 4] = f(v[l]);
            }
        }
        for r in 0..k / 4 {
            let v = w.r(x.b[r]);
            for l in 0..32 {
                b[4 * r + l % 4][l / 4] = f(v[l]);
            }
        }
    } else {
        let bf = x.ty == Ty::Bf16;
        let f = |v: u32| {
            f64::from(if bf {
                fl::from_bf16(v & 0xffff)
            } else {
                fl::from_f16(v & 0xffff)
            })
        };
        for r in 0..k / 4 {
            let v = w.r(x.a[r]);
            let (row, col) = (8 * (r % 2), 8 * (r / 2));
            for l in 0..32 {
                a[row + l / 4][col + 2 * (l % 4)] = f(v[l]);
                a[row + l / 4][col + 2 * (l % 4) + 1] = f(v[l] >> 16);
            }
        }
        for r in 0..k / 8 {
            let v = w.r(x.b[r]);
            for l in 0..32 {
                b[8 * r + 2 * (l % 4)][l / 4] = f(v[l]);
                b[8 * r + 2 * (l % 4) + 1][l / 4] = f(v[l] >> 16);
            }
        }
    }
    let mut d = [[0f64; 8]; 16];
    if x.half_acc {
        for r in 0..2 {
            let v = w.r(x.c[r]);
            for l in 0..32 {
                d[8 * r + l / 4][2 * (l % 4)] = f64::from(fl::from_f16(v[l] & 0xffff));
                d[8 * r + l / 4][2 * (l % 4) + 1] = f64::from(fl::from_f16(v[l] >> 16));
            }
        }
    } else {
        for r in 0..4 {
            let v = w.r(x.c[r]);
            for l in 0..32 {
                d[8 * (r / 2) + l / 4][2 * (l % 4) + r % 2] = f64::from(f32::from_bits(v[l]));
            }
        }
    }
    // Four rows at a time, so that there are enough independent sums.
    for r in (0..16).step_by(4) {
        let mut acc = [d[r], d[r + 1], d[r + 2], d[r + 3]];
        for (k, b) in b.iter().enumerate().take(k) {
            for i in 0..4 {
                for n in 0..8 {
                    acc[i][n] = a[r + i][k].mul_add(b[n], acc[i][n]);
                }
            }
        }
        d[r..r + 4].copy_from_slice(&acc);
    }
    if x.half_acc {
        for r in 0..2 {
            let o = w.r_mut(x.d[r]);
            for l in 0..32 {
                let h = |c: usize| fl::f64_to_half(d[8 * r + l / 4][2 * (l % 4) + c], false);
                o[l] = h(0) | h(1) << 16;
            }
        }
    } else {
        for r in 0..4 {
            let o = w.r_mut(x.d[r]);
            for l in 0..32 {
                o[l] = (d[8 * (r / 2) + l / 4][2 * (l % 4) + r % 2] as f32).to_bits();
            }
        }
    }
}
