//! Decoding of memory accesses, barriers, lane exchange and tensor-core instructions.

use super::ast::{Arg, Space, Ty};
use super::decode::{FnDecoder, Mods};
use super::program::{
    Access, Alu, AtomOp, Atomic, BarRed, Barrier, CpAsync, Matrix, Mma, NONE, Op, Shfl, Slot, Vote,
};
use crate::error::Result;

fn space(m: &str) -> Option<Space> {
    Some(match m {
        "global" => Space::Global,
        "shared" | "shared::cta" => Space::Shared,
        "local" => Space::Local,
        "const" => Space::Const,
        "param" | "param::entry" | "param::func" => Space::Param,
        _ => return None,
    })
}

/// Cache and ordering hints: none changes what the interpreter does.
fn hint(m: &str) -> Option<()> {
    matches!(
        m,
        "ca" | "cg"
            | "cs"
            | "lu"
            | "cv"
            | "wb"
            | "wt"
            | "nc"
            | "weak"
            | "volatile"
            | "relaxed"
            | "acquire"
            | "release"
            | "acq_rel"
            | "cta"
            | "gpu"
            | "sys"
            | "cluster"
            | "L1::evict_normal"
            | "L1::evict_unchanged"
            | "L1::evict_first"
            | "L1::evict_last"
            | "L1::no_allocate"
            | "L2::cache_hint"
            | "L2::64B"
            | "L2::128B"
            | "L2::256B"
            | "L2::evict_first"
            | "L2::evict_last"
            | "L2::evict_normal"
    )
    .then_some(())
}

fn atom_op(m: &str) -> Option<AtomOp> {
    Some(match m {
        "add" => AtomOp::Add,
        "min" => AtomOp::Min,
        "max" => AtomOp::Max,
        "and" => AtomOp::And,
        "or" => AtomOp::Or,
        "xor" => AtomOp::Xor,
        "exch" => AtomOp::Exch,
        "cas" => AtomOp::Cas,
        "inc" => AtomOp::Inc,
        "dec" => AtomOp::Dec,
        _ => return None,
    })
}

impl FnDecoder<'_> {
    /// An address operand: register, whether it has 64 bits, offset.
    fn address(&mut self, a: &Arg) -> Result<(Slot, bool, i64)> {
        let Arg::Addr(base, off) = a else {
            return self.err("expected an address");
        };
        let Some(name) = base else {
            return Ok((self.constant(0, true), true, *off));
        };
        if let Some(r) = self.reg(name) {
            return match r.ty.bytes() {
                8 => Ok((r.slot, true, *off)),
                4 => Ok((r.slot, false, *off)),
                _ => self.err(format!("register '{name}' cannot hold an address")),
            };
        }
        match self.symbol(name) {
            Some(a) => Ok((self.constant(a, true), true, *off)),
            None => self.err(format!("unknown name '{name}'")),
        }
    }

    /// Data registers of a load or store: slots, 64 bits, 16 bits.
    fn data(&mut self, list: &Arg, ty: Ty, vec: u8, load: bool) -> Result<([Slot; 4], bool, bool)> {
        let items: Vec<&Arg> = match list {
            Arg::Vec(v) => v.iter().collect(),
            a => vec![a],
        };
        if items.len() != vec as usize {
            return self.err(format!("{vec} registers expected, {} found", items.len()));
        }
        let mut regs = [NONE; 4];
        let (mut wide, mut half) = (ty.bytes() == 8, false);
        for a in &items {
            if let Arg::Name(n) = a
                && n != "_"
                && let Some(r) = self.reg(n)
            {
                wide = r.ty.bytes() == 8;
                half = r.ty.bytes() <= 2;
            }
        }
        for (slot, a) in regs.iter_mut().zip(items) {
            *slot = match a {
                Arg::Name(n) if load && n == "_" => self.temp(wide),
                a if load => self.dst(a, wide)?,
                a => self.src_any(a, if wide { Ty::B64 } else { ty }, true)?.0,
            };
        }
        Ok((regs, wide, half))
    }

    fn vec_mod(m: &mut Mods) -> u8 {
        if m.take("v2") {
            2
        } else if m.take("v4") {
            4
        } else {
            1
        }
    }

    /// Decodes loads, stores, atomics and asynchronous copies; false if `op` is none.
    pub fn decode_mem(&mut self, op: &str, m: &mut Mods) -> Result<bool> {
        match op {
            "ld" | "ldu" | "st" => {
                let load = op != "st";
                let sp = m.find(space).unwrap_or(Space::Generic);
                while m.find(hint).is_some() {}
                let vec = Self::vec_mod(m);
                let ty = self.need_ty(m)?;
                let (data, addr) = if load { (0, 1) } else { (1, 0) };
                if sp == Space::Param
                    && self.param_access(load, ty, vec, self.arg(data)?, self.arg(addr)?)?
                {
                    return Ok(true);
                }
                let (a, addr64, off) = self.address(self.arg(addr)?)?;
                let (regs, wide, half) = self.data(self.arg(data)?, ty, vec, load)?;
                let acc = Box::new(Access {
                    space: sp,
                    ty,
                    vec,
                    addr: a,
                    addr64,
                    off,
                    regs,
                    wide,
                    half,
                });
                self.emit(if load { Op::Ld(acc) } else { Op::St(acc) });
            }
            "atom" | "red" => {
                let sp = m.find(space).unwrap_or(Space::Generic);
                let Some(aop) = m.find(atom_op) else {
                    return self.err("unknown operation");
                };
                while m.find(hint).is_some() {}
                m.take("noftz");
                let vec = Self::vec_mod(m);
                let ty = self.need_ty(m)?;
                let fits = match aop {
                    AtomOp::Add => !matches!(ty, Ty::B32 | Ty::B64 | Ty::B16),
                    AtomOp::Min | AtomOp::Max => {
                        matches!(ty, Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64)
                    }
                    AtomOp::And | AtomOp::Or | AtomOp::Xor | AtomOp::Exch | AtomOp::Cas => {
                        matches!(
                            ty,
                            Ty::B32 | Ty::B64 | Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64
                        )
                    }
                    AtomOp::Inc | AtomOp::Dec => ty == Ty::U32,
                };
                if vec != 1 || !fits || ty.bytes() < 2 {
                    return self.err("the simulator does not know this atomic's type");
                }
                let at = usize::from(op == "atom");
                let (a, addr64, off) = self.address(self.arg(at)?)?;
                let wide = ty.bytes() == 8;
                let d = if op == "atom" {
                    self.dst(self.arg(0)?, wide)?
                } else {
                    NONE
                };
                let b = self.src(self.arg(at + 1)?, ty)?;
                let c = if aop == AtomOp::Cas {
                    self.src(self.arg(at + 2)?, ty)?
                } else {
                    NONE
                };
                self.count(at + 2 + usize::from(aop == AtomOp::Cas))?;
                // The result depends on who comes first: where one is returned, and where sums round.
                if sp != Space::Shared && (op == "atom" || ty.float()) {
                    self.set_ordered();
                }
                let mem = Access {
                    space: sp,
                    ty,
                    vec: 1,
                    addr: a,
                    addr64,
                    off,
                    regs: [NONE; 4],
                    wide,
                    half: false,
                };
                self.emit(Op::Atom(Box::new(Atomic {
                    op: aop,
                    mem,
                    d,
                    b,
                    c,
                })));
            }
            "cp" => self.cp_async(m)?,
            "ldmatrix" | "stmatrix" => {
                if !(m.take("sync") && m.take("aligned") && m.take("m8n8")) {
                    return self.err("only .sync.aligned.m8n8 is known");
                }
                let num = [("x1", 1), ("x2", 2), ("x4", 4)]
                    .iter()
                    .find(|n| m.take(n.0))
                    .map_or(0, |n| n.1);
                let trans = m.take("trans");
                let _ = m.take("shared") || m.take("shared::cta");
                if num == 0 || m.ty() != Some(Ty::B16) {
                    return self.err("only .x1, .x2 and .x4 of .b16 are known");
                }
                let load = op == "ldmatrix";
                let (r, a) = if load { (0, 1) } else { (1, 0) };
                let (addr, addr64, off) = self.address(self.arg(a)?)?;
                let (regs, _, _) = self.data(self.arg(r)?, Ty::B32, num, load)?;
                let x = Box::new(Matrix {
                    num,
                    trans,
                    addr,
                    addr64,
                    off,
                    regs,
                });
                self.emit(if load {
                    Op::LdMatrix(x)
                } else {
                    Op::StMatrix(x)
                });
            }
            "mma" => self.mma(m)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Parameters: of a kernel (read at a fixed offset), or of a call (registers). False where an address is computed.
    fn param_access(
        &mut self,
        load: bool,
        ty: Ty,
        vec: u8,
        data: &Arg,
        addr: &Arg,
    ) -> Result<bool> {
        let Arg::Addr(Some(name), off) = addr else {
            return Ok(false);
        };
        if let Some(first) = self.param_slots(name) {
            let (regs, wide, _) = self.data(data, ty, vec, load)?;
            let bytes = ty.bytes() as i64;
            for (k, &r) in regs.iter().enumerate().take(vec as usize) {
                let at = off + bytes * k as i64;
                if at < 0 || at % bytes != 0 {
                    return self.err("misaligned parameter");
                }
                let slot = first + (at / 4) as u32;
                self.param_word(load, ty, wide, r, slot, (at % 4) as u64 * 8)?;
            }
            return Ok(true);
        }
        if self.reg(name).is_some() {
            return Ok(false);
        }
        let (addr, addr64, off) = self.address(addr)?;
        if !load {
            return self.err("a kernel cannot write its parameters");
        }
        let (regs, wide, half) = self.data(data, ty, vec, true)?;
        let acc = Access {
            space: Space::Param,
            ty,
            vec,
            addr,
            addr64,
            off,
            regs,
            wide,
            half,
        };
        self.emit(Op::LdParam(Box::new(acc)));
        Ok(true)
    }

    /// Moves one element between a register and the words of a call's parameter.
    fn param_word(
        &mut self,
        load: bool,
        ty: Ty,
        wide: bool,
        r: Slot,
        slot: Slot,
        shift: u64,
    ) -> Result<()> {
        match (ty.bytes(), load) {
            (8, true) => {
                self.alu(Alu::Pack64, Ty::B64, r, &[slot, slot + 1]);
            }
            (8, false) => self.alu(Alu::Unpack64, Ty::B64, slot, &[r]).b = slot + 1,
            // A narrower parameter in a 64-bit register: through a 32-bit one.
            (_, true) if wide => {
                let t = self.temp(false);
                self.param_word(load, ty, false, t, slot, shift)?;
                let to = if ty.signed() { Ty::S64 } else { Ty::U64 };
                self.alu(Alu::Cvt, to, r, &[t]).ty2 = if ty.signed() { Ty::S32 } else { Ty::U32 };
            }
            (_, false) if wide => {
                let t = self.temp(false);
                self.alu(Alu::Unpack64, Ty::B64, t, &[r]).b = NONE;
                self.param_word(load, ty, false, t, slot, shift)?;
            }
            (4, true) => {
                self.alu(Alu::Mov, Ty::B32, r, &[slot]);
            }
            (4, false) => {
                self.alu(Alu::Mov, Ty::B32, slot, &[r]);
            }
            (n, true) => {
                let (pos, len) = (
                    self.constant(shift, false),
                    self.constant(n as u64 * 8, false),
                );
                let t = if ty.signed() { Ty::S32 } else { Ty::U32 };
                self.alu(Alu::Bfe, t, r, &[slot, pos, len]);
            }
            (n, false) => {
                let (pos, len) = (
                    self.constant(shift, false),
                    self.constant(n as u64 * 8, false),
                );
                self.bfi(Ty::B32, slot, r, slot, pos, len);
            }
        }
        Ok(())
    }

    fn cp_async(&mut self, m: &mut Mods) -> Result<()> {
        if !m.take("async") {
            return self.err("only cp.async is known");
        }
        if m.take("commit_group") {
            self.emit(Op::CpCommit);
            return Ok(());
        }
        if m.take("wait_all") {
            self.emit(Op::CpWaitAll);
            return Ok(());
        }
        if m.take("wait_group") {
            let n = self.imm(self.arg(0)?)? as u32;
            self.emit(Op::CpWait(n));
            return Ok(());
        }
        let cg = m.take("cg");
        if !cg && !m.take("ca") {
            return self.err("the simulator does not know this form");
        }
        if !((m.take("shared") || m.take("shared::cta")) && m.take("global")) {
            return self.err("only global to shared is known");
        }
        let cached = m.rest.contains(&"L2::cache_hint");
        while m.find(hint).is_some() {}
        let (dst, dst64, dst_off) = self.address(self.arg(0)?)?;
        let (src, src64, src_off) = self.address(self.arg(1)?)?;
        let bytes = self.imm(self.arg(2)?)?;
        if !src64 || !matches!((bytes, cg), (16, _) | (4 | 8, false)) {
            return self.err("cp.async copies 4, 8 or 16 bytes (.cg: 16)");
        }
        let (mut src_size, mut ignore, mut ignore_neg) = (NONE, NONE, false);
        let rest = self.cur.args.len() - usize::from(cached);
        if rest > 4 {
            return self.err("too many operands");
        }
        if rest == 4 {
            match self.arg(3)? {
                Arg::Not(_) => (ignore, ignore_neg) = self.pred(self.arg(3)?)?,
                Arg::Name(n) if self.reg(n).is_some_and(|r| r.ty == Ty::Pred) => {
                    (ignore, ignore_neg) = self.pred(self.arg(3)?)?;
                }
                a => src_size = self.src(a, Ty::U32)?,
            }
        }
        let c = CpAsync {
            dst,
            dst64,
            dst_off,
            src,
            src_off,
            bytes: bytes as u8,
            src_size,
            ignore,
            ignore_neg,
        };
        self.emit(Op::CpAsync(Box::new(c)));
        Ok(())
    }

    fn mma(&mut self, m: &mut Mods) -> Result<()> {
        if !(m.take("sync") && m.take("aligned")) {
            return self.err("only .sync.aligned is known");
        }
        let Some(k) = m.find(|s| s.strip_prefix("m16n8k").and_then(|k| k.parse::<u8>().ok()))
        else {
            return self.err("the simulator knows the shapes m16n8k4, k8 and k16 only");
        };
        if !(m.take("row") && m.take("col")) {
            return self.err("only .row.col is known");
        }
        let types: Vec<Ty> = std::iter::from_fn(|| m.ty()).collect();
        let half_acc = match types[..] {
            [Ty::F32, a, b, Ty::F32] if a == b => false,
            [Ty::F16, Ty::F16, Ty::F16, Ty::F16] => true,
            _ => return self.err("the simulator does not know these types"),
        };
        let ty = types[1];
        let (na, nb) = match (ty, k) {
            (Ty::Bf16 | Ty::F16, 16) => (4, 2),
            (Ty::Bf16 | Ty::F16, 8) => (2, 1),
            (Ty::Tf32, 8) => (4, 2),
            (Ty::Tf32, 4) => (2, 1),
            _ => return self.err("the simulator does not know this shape for these types"),
        };
        self.count(4)?;
        let nc = if half_acc { 2 } else { 4 };
        let (d, ..) = self.data(self.arg(0)?, Ty::B32, nc, true)?;
        let (a, ..) = self.data(self.arg(1)?, Ty::B32, na, false)?;
        let (b, ..) = self.data(self.arg(2)?, Ty::B32, nb, false)?;
        let (c, ..) = self.data(self.arg(3)?, Ty::B32, nc, false)?;
        self.emit(Op::Mma(Box::new(Mma {
            k,
            ty,
            half_acc,
            d,
            a,
            b: [b[0], b[1]],
            c,
        })));
        Ok(())
    }

    /// Decodes barriers and lane exchange; false if `op` is none.
    pub fn decode_warp(&mut self, op: &str, m: &mut Mods) -> Result<bool> {
        match op {
            "bar" | "barrier" => self.barrier(op == "bar", m)?,
            "shfl" => {
                if !(m.take("sync") && m.take("b32")) {
                    return self.err("only shfl.sync of .b32 is known");
                }
                let Some(mode) = m.find(|s| {
                    Some(match s {
                        "up" => Shfl::Up,
                        "down" => Shfl::Down,
                        "bfly" => Shfl::Bfly,
                        "idx" => Shfl::Idx,
                        _ => return None,
                    })
                }) else {
                    return self.err("no mode");
                };
                self.count(5)?;
                let (d, pred) = self.dst_pair(Ty::B32)?;
                let a = self.src(self.arg(1)?, Ty::B32)?;
                let b = self.src(self.arg(2)?, Ty::U32)?;
                let c = self.src(self.arg(3)?, Ty::U32)?;
                let mask = self.src(self.arg(4)?, Ty::B32)?;
                let i = self.emit(Op::Shfl { mode, pred, mask });
                (i.d, i.a, i.b, i.c) = (d, a, b, c);
            }
            "vote" => {
                if !m.take("sync") {
                    return self.err("only vote.sync is known");
                }
                let mode = m.find(|s| {
                    Some(match s {
                        "all" => Vote::All,
                        "any" => Vote::Any,
                        "uni" => Vote::Uni,
                        "ballot" => Vote::Ballot,
                        _ => return None,
                    })
                });
                let (Some(mode), Some(_)) = (mode, m.ty()) else {
                    return self.err("no mode");
                };
                self.count(3)?;
                let d = if mode == Vote::Ballot {
                    self.dst(self.arg(0)?, false)?
                } else {
                    self.pred_dst(self.arg(0)?)?
                };
                let (a, neg) = self.pred(self.arg(1)?)?;
                let mask = self.src(self.arg(2)?, Ty::B32)?;
                let i = self.emit(Op::Vote { mode, neg, mask });
                (i.d, i.a) = (d, a);
            }
            "match" => {
                let all = m.take("all");
                if !(all || m.take("any")) || !m.take("sync") {
                    return self.err("only match.any.sync and match.all.sync are known");
                }
                let ty = self.need_ty(m)?;
                self.count(3)?;
                let (d, pred) = self.dst_pair(Ty::B32)?;
                let a = self.src(self.arg(1)?, ty)?;
                let mask = self.src(self.arg(2)?, Ty::B32)?;
                let i = self.emit(if all {
                    Op::MatchAll { pred, mask }
                } else {
                    Op::MatchAny { mask }
                });
                (i.d, i.a, i.ty) = (d, a, ty);
            }
            "redux" => {
                let op = if m.take("sync") {
                    m.find(atom_op)
                } else {
                    None
                };
                let Some(
                    op @ (AtomOp::Add
                    | AtomOp::Min
                    | AtomOp::Max
                    | AtomOp::And
                    | AtomOp::Or
                    | AtomOp::Xor),
                ) = op
                else {
                    return self.err("unknown operation");
                };
                let ty = self.need_ty(m)?;
                if ty.bytes() != 4 || ty.float() {
                    return self.err("the simulator does not know this type");
                }
                self.count(3)?;
                let d = self.dst(self.arg(0)?, false)?;
                let a = self.src(self.arg(1)?, ty)?;
                let mask = self.src(self.arg(2)?, Ty::B32)?;
                let i = self.emit(Op::Redux { op, mask });
                (i.d, i.a, i.ty) = (d, a, ty);
            }
            "elect" => {
                m.take("sync");
                let (d, pred) = self.dst_pair(Ty::B32)?;
                let mask = self.src(self.arg(1)?, Ty::B32)?;
                self.emit(Op::Elect { pred, mask }).d = d;
            }
            "activemask" => {
                m.take("b32");
                let d = self.dst(self.arg(0)?, false)?;
                self.emit(Op::ActiveMask).d = d;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// `d|p` or `d`.
    fn dst_pair(&mut self, ty: Ty) -> Result<(Slot, u32)> {
        let wide = ty.bytes() == 8;
        match self.arg(0)? {
            Arg::Pair(d, p) => Ok((self.dst(d, wide)?, self.pred_dst(p)?)),
            d => Ok((self.dst(d, wide)?, NONE)),
        }
    }

    fn barrier(&mut self, bar: bool, m: &mut Mods) -> Result<()> {
        m.take("cta");
        if bar && m.take("warp") {
            m.take("sync");
            self.count(1)?;
            let mask = self.src(self.arg(0)?, Ty::B32)?;
            self.emit(Op::WarpSync { mask });
            return Ok(());
        }
        // `bar.X` is `barrier.X.aligned`.
        let aligned = m.take("aligned") || bar;
        let n = self.cur.args.len();
        if m.take("red") {
            let Some(red) = m.find(|s| {
                Some(match s {
                    "popc" => BarRed::Popc,
                    "and" => BarRed::And,
                    "or" => BarRed::Or,
                    _ => return None,
                })
            }) else {
                return self.err("unknown reduction");
            };
            let _ = m.ty();
            if !(3..=4).contains(&n) {
                return self.err("3 or 4 operands expected");
            }
            let d = if red == BarRed::Popc {
                self.dst(self.arg(0)?, false)?
            } else {
                self.pred_dst(self.arg(0)?)?
            };
            let id = self.src(self.arg(1)?, Ty::U32)?;
            let count = if n == 4 {
                self.src(self.arg(2)?, Ty::U32)?
            } else {
                NONE
            };
            let (p, neg) = self.pred(self.arg(n - 1)?)?;
            let b = Barrier {
                id,
                count,
                arrive: false,
                aligned,
                red: Some((red, d, p, neg)),
            };
            self.emit(Op::Bar(Box::new(b)));
            return Ok(());
        }
        let arrive = m.take("arrive");
        if !arrive && !m.take("sync") {
            return self.err("the simulator does not know this barrier");
        }
        let id = self.src(self.arg(0)?, Ty::U32)?;
        let count = if n > 1 {
            self.src(self.arg(1)?, Ty::U32)?
        } else {
            NONE
        };
        if arrive && count == NONE {
            return self.err("bar.arrive needs a count of threads");
        }
        self.emit(Op::Bar(Box::new(Barrier {
            id,
            count,
            arrive,
            aligned,
            red: None,
        })));
        Ok(())
    }
}
