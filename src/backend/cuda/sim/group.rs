//! Exchange between the lanes of a warp: shuffles, votes, matches, reductions, and the warp barrier.

use super::exec::{Block, Done, fail, first, lanes};
use super::program::{AtomOp, Inst, Op, Shfl, Vote};
use super::warp::R32;

impl Block<'_> {
    /// The lanes of a member mask that have to be here; `m` must be these.
    fn members(&self, wi: usize, mask: u32, m: u32, what: &str) -> Done<u32> {
        let w = &self.warps[wi];
        let lane = first(m);
        let set = w.r(mask)[lane as usize];
        if let Some(l) = lanes(m).find(|&l| set >> l & 1 == 0) {
            return fail(
                l as u32,
                format!("{what}: the executing lane {l} is not in the member mask 0x{set:08x}"),
            );
        }
        if let Some(l) = lanes(m).find(|&l| w.r(mask)[l] != set) {
            return fail(
                l as u32,
                format!("{what}: lanes {lane} and {l} name different member masks"),
            );
        }
        let missing = set & w.alive & !m;
        if self.g.checks && missing != 0 {
            return fail(
                lane,
                format!(
                    "{what}: lane {} is in the member mask 0x{set:08x} but not active here",
                    first(missing)
                ),
            );
        }
        Ok(set)
    }

    /// Executes an exchange.
    pub fn group(&mut self, wi: usize, i: &Inst, m: u32) -> Done {
        match &i.op {
            Op::Shfl { mode, pred, mask } => self.shuffle(wi, i, *mode, *pred, *mask, m)?,
            Op::Vote { mode, neg, mask } => {
                let set = self.members(wi, *mask, m, "vote")? & m;
                let w = &mut self.warps[wi];
                let p = if *neg { !w.p(i.a) } else { w.p(i.a) } & set;
                let all = |b: bool| if b { u32::MAX } else { 0 };
                match mode {
                    Vote::Ballot => w.put(i.d, m, &[p; 32]),
                    Vote::All => w.put_p(i.d, m, all(p == set)),
                    Vote::Any => w.put_p(i.d, m, all(p != 0)),
                    Vote::Uni => w.put_p(i.d, m, all(p == 0 || p == set)),
                }
            }
            Op::MatchAny { mask } => {
                let set = self.members(wi, *mask, m, "match")? & m;
                let a = self.wide_values(wi, i);
                let mut t: R32 = [0; 32];
                for l in lanes(set) {
                    t[l] = lanes(set)
                        .filter(|&o| a[o] == a[l])
                        .fold(0, |s, o| s | 1 << o);
                }
                self.warps[wi].put(i.d, m, &t);
            }
            Op::MatchAll { pred, mask } => {
                let set = self.members(wi, *mask, m, "match")? & m;
                let a = self.wide_values(wi, i);
                let f = first(set) as usize;
                let same = lanes(set).all(|l| a[l] == a[f]);
                let w = &mut self.warps[wi];
                w.put(i.d, m, &[if same { set } else { 0 }; 32]);
                w.put_p(*pred, m, if same { u32::MAX } else { 0 });
            }
            Op::Redux { op, mask } => {
                let set = self.members(wi, *mask, m, "redux")? & m;
                let w = &mut self.warps[wi];
                let a = *w.r(i.a);
                let signed = i.ty.signed();
                let r = lanes(set).map(|l| a[l]).reduce(|x, y| match op {
                    AtomOp::Add => x.wrapping_add(y),
                    AtomOp::Min if signed => (x as i32).min(y as i32) as u32,
                    AtomOp::Max if signed => (x as i32).max(y as i32) as u32,
                    AtomOp::Min => x.min(y),
                    AtomOp::Max => x.max(y),
                    AtomOp::And => x & y,
                    AtomOp::Or => x | y,
                    _ => x ^ y,
                });
                w.put(i.d, m, &[r.unwrap_or(0); 32]);
            }
            Op::Elect { pred, mask } => {
                let set = self.members(wi, *mask, m, "elect")? & m;
                let w = &mut self.warps[wi];
                w.put(i.d, m, &[first(set); 32]);
                w.put_p(*pred, m, 1 << first(set));
            }
            Op::WarpSync { mask } => {
                self.members(wi, *mask, m, "__syncwarp")?;
                self.warps[wi].sub += 1;
            }
            Op::ActiveMask => self.warps[wi].put(i.d, m, &[m; 32]),
            Op::Clock => {
                let w = &mut self.warps[wi];
                let t = w.clock;
                if i.ty.bytes() == 8 {
                    w.put64(i.d, m, &[t; 32]);
                } else {
                    w.put(i.d, m, &[t as u32; 32]);
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn wide_values(&self, wi: usize, i: &Inst) -> [u64; 32] {
        let w = &self.warps[wi];
        if i.ty.bytes() == 8 {
            *w.r64(i.a)
        } else {
            w.r(i.a).map(u64::from)
        }
    }

    /// `shfl.sync`: segments and clamps as the PTX document's pseudocode has them.
    fn shuffle(&mut self, wi: usize, i: &Inst, mode: Shfl, pred: u32, mask: u32, m: u32) -> Done {
        self.members(wi, mask, m, "shuffle")?;
        let w = &self.warps[wi];
        let (a, b, c) = (w.r(i.a), w.r(i.b), w.r(i.c));
        let (mut t, mut ok): (R32, u32) = ([0; 32], 0);
        for l in lanes(m) {
            let lane = l as u32;
            let bval = b[l] & 31;
            let cval = c[l] & 31;
            let seg = c[l] >> 8 & 31;
            let max = (lane & seg) | (cval & !seg);
            let min = lane & seg;
            let (j, p) = match mode {
                Shfl::Up => {
                    let j = lane as i32 - bval as i32;
                    (j, j >= max as i32)
                }
                Shfl::Down => ((lane + bval) as i32, lane + bval <= max),
                Shfl::Bfly => ((lane ^ bval) as i32, lane ^ bval <= max),
                Shfl::Idx => {
                    let j = min | (bval & !seg);
                    (j as i32, j <= max)
                }
            };
            let j = if p { j as usize } else { l };
            if p {
                ok |= 1 << l;
                if m >> j & 1 == 0 && self.g.checks {
                    return fail(
                        lane,
                        format!("shuffle: lane {l} reads from lane {j}, which is not active"),
                    );
                }
            }
            t[l] = a[j];
        }
        let w = &mut self.warps[wi];
        w.put(i.d, m, &t);
        w.put_p(pred, m, ok);
        Ok(())
    }
}
