//! Atomics (`atom`, `red`) on global and shared memory.

use super::ast::Ty;
use super::exec::{Block, Done, fail, lanes};
use super::ldst::Place;
use super::program::{AtomOp, Atomic, NONE};
use super::warp::R64;

impl Block<'_> {
    /// Executes an atomic: lane after lane, in an order that the seed decides.
    pub fn atomic(&mut self, wi: usize, pc: u32, a: &Atomic, m: u32) -> Done {
        let addr = self.addresses(wi, a.mem.addr, a.mem.addr64, a.mem.off);
        let n = a.mem.ty.bytes();
        // The order of lanes is that of the seed: a rotation, so that every lane may be the first.
        let turn = (self.g.seed % 32) as u32;
        let order = lanes(m.rotate_right(turn)).map(|l| (l + turn as usize) % 32);
        let (mut global, mut shared) = (0, 0);
        let mut at: R64 = [0; 32];
        for l in order {
            if !addr[l].is_multiple_of(n as u64) {
                return self.misaligned(l, addr[l], n, false);
            }
            let w = &self.warps[wi];
            let operand = |s: u32| match (s, n) {
                (NONE, _) => 0,
                (s, 8) => w.r64(s)[l],
                (s, _) => u64::from(w.r(s)[l]),
            };
            let (b, c) = (operand(a.b), operand(a.c));
            let (place, x) = Self::place(a.mem.space, addr[l]);
            at[l] = x;
            let old = match place {
                Place::Global => {
                    global |= 1 << l;
                    let al = self.owner(l, x, n as u64, "atomic")?;
                    let off = x - al.base;
                    if al.constant {
                        return fail(
                            l as u32,
                            format!("atomic on constant memory `{}`", al.label),
                        );
                    }
                    if self.g.checks && !al.all_init() && !al.is_init(off, n as u64) {
                        return Self::uninit(l, al, off, n as u64);
                    }
                    al.update(off, n, |o| apply(a.op, a.mem.ty, o, b, c))
                }
                Place::Shared => {
                    shared |= 1 << l;
                    self.shared_bounds(1 << l, &at, n as u32, "atomic")?;
                    let s = x as u32;
                    if self.g.checks {
                        if !self.shared.is_init(s, n as u32) {
                            return fail(
                                l as u32,
                                format!(
                                    "uninitialised: atomic on {n} bytes at {s} of shared memory"
                                ),
                            );
                        }
                        self.check_shared_write(wi, pc, l, s, n as u32, true)?;
                    }
                    let mut old = u64::from(self.shared.read(s, n.min(4) as u32));
                    if n == 8 {
                        old |= u64::from(self.shared.read(s + 4, 4)) << 32;
                    }
                    let new = apply(a.op, a.mem.ty, old, b, c);
                    self.shared.write(s, n.min(4) as u32, new as u32);
                    if n == 8 {
                        self.shared.write(s + 4, 4, (new >> 32) as u32);
                    }
                    old
                }
                _ => return fail(l as u32, "atomic on local memory or parameters"),
            };
            if a.d != NONE {
                let w = &mut self.warps[wi];
                if n == 8 {
                    w.r64_mut(a.d)[l] = old;
                } else {
                    w.r_mut(a.d)[l] = old as u32;
                }
            }
        }
        if global != 0 {
            self.count_global(pc, &at, global, n as u64);
        }
        if shared != 0 {
            self.count_shared(pc, &at, shared, n as u32);
        }
        Ok(())
    }
}

/// The new value of an atomic's memory.
fn apply(op: AtomOp, ty: Ty, old: u64, b: u64, c: u64) -> u64 {
    let (s, t) = (old as u32 as i32, b as u32 as i32);
    match (op, ty) {
        (AtomOp::Add, Ty::F32) => {
            u64::from((f32::from_bits(old as u32) + f32::from_bits(b as u32)).to_bits())
        }
        (AtomOp::Add, Ty::F64) => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
        (AtomOp::Add, Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2) => {
            let bf = matches!(ty, Ty::Bf16 | Ty::Bf16x2);
            let one = |sh: u32| {
                let f = |x: u64| {
                    let h = (x >> sh) as u32 & 0xffff;
                    f64::from(if bf {
                        super::float::from_bf16(h)
                    } else {
                        super::float::from_f16(h)
                    })
                };
                u64::from(super::float::f64_to_half(f(old) + f(b), bf)) << sh
            };
            one(0) | if ty.bytes() == 4 { one(16) } else { 0 }
        }
        (AtomOp::Add, _) => old.wrapping_add(b),
        (AtomOp::Min, Ty::S32) => s.min(t) as u32 as u64,
        (AtomOp::Max, Ty::S32) => s.max(t) as u32 as u64,
        (AtomOp::Min, Ty::S64) => (old as i64).min(b as i64) as u64,
        (AtomOp::Max, Ty::S64) => (old as i64).max(b as i64) as u64,
        (AtomOp::Min, _) => old.min(b),
        (AtomOp::Max, _) => old.max(b),
        (AtomOp::And, _) => old & b,
        (AtomOp::Or, _) => old | b,
        (AtomOp::Xor, _) => old ^ b,
        (AtomOp::Exch, _) => b,
        (AtomOp::Cas, _) => {
            if old == b {
                c
            } else {
                old
            }
        }
        (AtomOp::Inc, _) => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        (AtomOp::Dec, _) => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
    }
}
