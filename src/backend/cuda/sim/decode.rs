//! From the syntax tree to the decoded program: names, scopes, constants, labels and control flow.
//! An opcode or modifier that is not known is an error here, so that a module which loads also runs.

use super::ast::{Arg, Decl, Func, Instr, Lit, Ptx, Space, Ty};
use super::flow;
use super::program::{Alu, Function, Inst, MaskKind, NONE, Op, Param, Program, Rnd, Slot, Special};
use crate::error::{Error, Result};
use std::collections::HashMap;

/// Module-level names.
pub struct Names<'a> {
    /// Addresses in their own spaces (shared: offset; global and const: device address).
    pub symbols: HashMap<&'a str, u64>,
    pub funcs: HashMap<&'a str, u32>,
    /// Bytes of the shared memory that is declared at module level.
    pub shared: u32,
}

fn align_up(x: u64, a: u64) -> u64 {
    x.div_ceil(a) * a
}

/// Bytes that parameters lie at, one after the other with their alignment.
fn layout(f: &Func, vars: &[usize]) -> Vec<Param> {
    let mut at = 0;
    vars.iter()
        .map(|&v| {
            let v = &f.vars[v];
            at = align_up(at, v.align);
            let p = Param {
                name: v.name.clone(),
                offset: at as usize,
                size: v.size as usize,
                align: v.align as usize,
            };
            at += v.size;
            p
        })
        .collect()
}

/// Decodes every function of `ptx`.
///
/// # Errors
/// The first instruction that is not known, with its line.
pub fn decode(ptx: &Ptx, names: &Names) -> Result<Program> {
    let mut prog = Program {
        files: ptx.files.clone(),
        ..Program::default()
    };
    // Slots of parameters and results are needed by callers before a callee is decoded: every function lays its
    // own out first, from slot 0 on.
    let funcs: Vec<&Func> = ptx.funcs.iter().filter(|f| !f.prototype).collect();
    let mut local = 0;
    let mut meta: Vec<FuncMeta> = Vec::new();
    for f in &funcs {
        let mut m = FuncMeta {
            slots: 0,
            vars: vec![NONE; f.vars.len()],
            local: vec![0; f.vars.len()],
        };
        if !f.entry {
            for &v in f.params.iter().chain(&f.rets) {
                m.vars[v] = m.slots;
                m.slots += f.vars[v].size.div_ceil(4) as u32;
            }
        }
        for (i, v) in f.vars.iter().enumerate() {
            if v.space == Space::Local {
                local = align_up(local, v.align.max(16));
                m.local[i] = local;
                local += v.size;
            }
        }
        meta.push(m);
    }
    let mut shared = Vec::new();
    for (i, f) in funcs.iter().enumerate() {
        let mut d = FnDecoder::new(f, &funcs, &meta, i, names, &mut prog);
        d.run()?;
        shared.push((d.shared_used, d.calls.clone()));
    }
    // An entry's shared memory is at least what the functions it calls declare.
    for i in 0..funcs.len() {
        let (mut seen, mut todo) = (vec![false; funcs.len()], vec![i]);
        let (mut size, mut ordered) = (0, false);
        while let Some(j) = todo.pop() {
            if std::mem::replace(&mut seen[j], true) {
                continue;
            }
            size = size.max(shared[j].0);
            ordered |= prog.funcs[j].ordered;
            todo.extend(shared[j].1.iter().map(|&c| c as usize));
            if j != i && shared[j].1.contains(&(j as u32)) || shared[i].1.contains(&(i as u32)) {
                return Err(Error::input(format!(
                    "PTX function `{}` calls itself: not supported",
                    funcs[j].name
                )));
            }
        }
        prog.funcs[i].shared = size;
        prog.funcs[i].local = local as u32;
        prog.funcs[i].ordered = ordered;
    }
    Ok(prog)
}

/// Where a function's variables lie, known before it is decoded.
pub struct FuncMeta {
    slots: u32,
    /// First slot of parameters and results.
    pub vars: Vec<Slot>,
    /// Offset in local memory.
    local: Vec<u64>,
}

/// A register: slot or predicate index, and type.
#[derive(Clone, Copy, Debug)]
pub struct Reg {
    pub slot: Slot,
    pub ty: Ty,
}

/// Decodes one function.
pub struct FnDecoder<'a> {
    pub f: &'a Func,
    pub funcs: &'a [&'a Func],
    pub meta: &'a [FuncMeta],
    pub names: &'a Names<'a>,
    pub prog: &'a mut Program,
    slots: u32,
    preds: u32,
    regs: HashMap<(usize, String), Reg>,
    consts: HashMap<(u64, bool), Slot>,
    const_list: Vec<(Slot, u64, bool)>,
    specials: Vec<(Slot, Special)>,
    var_slots: Vec<Slot>,
    local: Vec<u64>,
    shared: Vec<u64>,
    pub shared_used: u32,
    pub calls: Vec<u32>,
    pub params: Vec<Param>,
    start: u32,
    /// First instruction of each statement.
    body_start: Vec<u32>,
    pub fix: Vec<(usize, Vec<usize>)>,
    ordered: bool,
    /// The instruction at hand, for messages and guards.
    pub cur: &'a Instr,
    guard: (u32, bool),
}

/// An instruction's modifiers; whoever knows one takes it, and what is left is an error.
pub struct Mods<'a> {
    pub rest: Vec<&'a str>,
}

impl<'a> Mods<'a> {
    /// Takes a modifier if it is there.
    pub fn take(&mut self, m: &str) -> bool {
        match self.rest.iter().position(|r| *r == m) {
            Some(i) => {
                self.rest.remove(i);
                true
            }
            None => false,
        }
    }

    /// Takes the first modifier that `f` knows.
    pub fn find<T>(&mut self, f: impl Fn(&str) -> Option<T>) -> Option<T> {
        let i = self.rest.iter().position(|r| f(r).is_some())?;
        f(self.rest.remove(i))
    }

    /// Takes the first type.
    pub fn ty(&mut self) -> Option<Ty> {
        self.find(Ty::parse)
    }

    /// Takes a rounding of floating-point results.
    pub fn rnd(&mut self) -> Option<Rnd> {
        self.find(|m| match m {
            "rn" => Some(Rnd::Near),
            "rz" => Some(Rnd::Zero),
            "rm" => Some(Rnd::Down),
            "rp" => Some(Rnd::Up),
            _ => None,
        })
    }
}

static NO_INSTR: std::sync::LazyLock<Instr> = std::sync::LazyLock::new(|| Instr {
    guard: None,
    op: Vec::new(),
    args: Vec::new(),
    line: 0,
    loc: Default::default(),
    scope: 0,
});

impl<'a> FnDecoder<'a> {
    fn new(
        f: &'a Func,
        funcs: &'a [&'a Func],
        meta: &'a [FuncMeta],
        index: usize,
        names: &'a Names<'a>,
        prog: &'a mut Program,
    ) -> Self {
        let m = &meta[index];
        FnDecoder {
            f,
            funcs,
            meta,
            names,
            start: prog.insts.len() as u32,
            prog,
            slots: m.slots,
            preds: 0,
            regs: HashMap::new(),
            consts: HashMap::new(),
            const_list: Vec::new(),
            specials: Vec::new(),
            var_slots: m.vars.clone(),
            local: m.local.clone(),
            shared: vec![0; f.vars.len()],
            shared_used: 0,
            calls: Vec::new(),
            params: if f.entry {
                layout(f, &f.params)
            } else {
                Vec::new()
            },
            body_start: Vec::new(),
            fix: Vec::new(),
            ordered: false,
            cur: &NO_INSTR,
            guard: (NONE, false),
        }
    }

    fn run(&mut self) -> Result<()> {
        let f = self.f;
        let mut at = u64::from(self.names.shared);
        for (i, v) in f.vars.iter().enumerate() {
            match v.space {
                Space::Shared => {
                    at = align_up(at, v.align);
                    self.shared[i] = at;
                    at += v.size;
                }
                // Parameters of calls inside a body.
                Space::Param
                    if self.var_slots[i] == NONE && !(f.entry && f.params.contains(&i)) =>
                {
                    self.var_slots[i] = self.new_slots(v.size.div_ceil(4) as u32);
                }
                _ => {}
            }
        }
        self.shared_used = at as u32;
        for instr in &f.body {
            self.body_start.push(self.prog.insts.len() as u32);
            self.cur = instr;
            self.guard = match &instr.guard {
                None => (NONE, false),
                Some((p, neg)) => (self.pred_name(p)?, *neg),
            };
            self.instr()?;
        }
        self.body_start.push(self.prog.insts.len() as u32);
        // Falling off the end returns.
        self.cur = f.body.last().unwrap_or(&NO_INSTR);
        self.guard = (NONE, false);
        self.emit(if f.entry { Op::Exit } else { Op::Ret });
        for (i, targets) in std::mem::take(&mut self.fix) {
            let to: Vec<u32> = targets.iter().map(|&t| self.body_start[t]).collect();
            match &mut self.prog.insts[i].op {
                Op::Bra { target } => *target = to[0],
                Op::BrxIdx { targets } => *targets = to.into(),
                _ => {}
            }
        }
        let end = self.prog.insts.len() as u32;
        flow::analyse(&mut self.prog.insts, self.start, end);
        self.prog.funcs.push(Function {
            name: f.name.clone(),
            entry: f.entry,
            start: self.start,
            end,
            slots: self.slots,
            preds: self.preds,
            consts: std::mem::take(&mut self.const_list),
            specials: std::mem::take(&mut self.specials),
            shared: 0,
            local: 0,
            maxntid: f.maxntid,
            ordered: self.ordered,
            params: std::mem::take(&mut self.params),
        });
        Ok(())
    }

    /// An error about the instruction at hand.
    pub fn err<T>(&self, m: impl std::fmt::Display) -> Result<T> {
        Err(Error::input(format!(
            "PTX line {}: `{}` in `{}`: {m}",
            self.cur.line,
            self.cur.text(),
            self.f.name
        )))
    }

    /// Refuses modifiers that nobody took.
    pub fn done(&self, m: &Mods) -> Result<()> {
        match m.rest.first() {
            None => Ok(()),
            Some(r) => self.err(format!(
                "the simulator does not know modifier '.{r}' of `{}`",
                self.cur.op[0]
            )),
        }
    }

    /// Takes a type or fails.
    pub fn need_ty(&self, m: &mut Mods) -> Result<Ty> {
        match m.ty() {
            Some(t) => Ok(t),
            None => self.err("no type"),
        }
    }

    /// Appends an instruction with the guard of the one at hand; fields are filled in by the caller.
    pub fn emit(&mut self, op: Op) -> &mut Inst {
        self.prog.locs.push(self.cur.loc);
        self.prog.lines.push(self.cur.line);
        self.prog.insts.push(Inst {
            op,
            guard: self.guard.0,
            guard_neg: self.guard.1,
            ftz: false,
            sat: false,
            flag: false,
            int_rnd: false,
            rnd: Rnd::Near,
            ty: Ty::B32,
            ty2: Ty::B32,
            d: NONE,
            a: NONE,
            b: NONE,
            c: NONE,
            join: NONE,
        });
        self.prog.insts.last_mut().expect("just pushed")
    }

    /// Appends `d = alu(a, b, c)`.
    pub fn alu(&mut self, alu: Alu, ty: Ty, d: Slot, srcs: &[Slot]) -> &mut Inst {
        let i = self.emit(Op::Alu(alu));
        i.ty = ty;
        i.ty2 = ty;
        i.d = d;
        let get = |n: usize| srcs.get(n).copied().unwrap_or(srcs[0]);
        (i.a, i.b, i.c) = (get(0), get(1), get(2));
        i
    }

    /// Marks the function as one whose blocks must run in order.
    pub fn set_ordered(&mut self) {
        self.ordered = true;
    }

    fn new_slots(&mut self, n: u32) -> Slot {
        let s = self.slots;
        self.slots += n;
        s
    }

    /// A new 64-bit slot or 32-bit slot.
    pub fn temp(&mut self, wide: bool) -> Slot {
        self.new_slots(if wide { 2 } else { 1 })
    }

    /// The slot of a constant.
    pub fn constant(&mut self, v: u64, wide: bool) -> Slot {
        if let Some(&s) = self.consts.get(&(v, wide)) {
            return s;
        }
        let s = self.temp(wide);
        self.consts.insert((v, wide), s);
        self.const_list.push((s, v, wide));
        s
    }

    fn special(&mut self, sp: Special) -> Slot {
        if let Some(&(s, _)) = self.specials.iter().find(|s| s.1 == sp) {
            return s;
        }
        let s = self.new_slots(1);
        self.specials.push((s, sp));
        s
    }

    /// The register that a name means here.
    pub fn reg(&mut self, name: &str) -> Option<Reg> {
        let mut scope = Some(self.cur.scope);
        while let Some(s) = scope {
            if let Some(&r) = self.regs.get(&(s, name.to_string())) {
                return Some(r);
            }
            for (n, d) in &self.f.scopes[s].names {
                let ty = match d {
                    Decl::Reg(t) if n == name => *t,
                    Decl::RegRange(t, count)
                        if name
                            .strip_prefix(n.as_str())
                            .and_then(|x| x.parse::<u32>().ok())
                            .is_some_and(|i| i < *count) =>
                    {
                        *t
                    }
                    _ => continue,
                };
                let slot = if ty == Ty::Pred {
                    self.preds += 1;
                    self.preds - 1
                } else {
                    self.temp(ty.bytes() == 8)
                };
                let r = Reg { slot, ty };
                self.regs.insert((s, name.to_string()), r);
                return Some(r);
            }
            scope = self.f.scopes[s].parent;
        }
        None
    }

    /// A variable of the function by name: its index.
    fn var(&self, name: &str) -> Option<usize> {
        let mut scope = Some(self.cur.scope);
        while let Some(s) = scope {
            for (n, d) in &self.f.scopes[s].names {
                if let Decl::Var(i) = d
                    && n == name
                {
                    return Some(*i);
                }
            }
            scope = self.f.scopes[s].parent;
        }
        None
    }

    /// Address of a variable in its own space.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        if let Some(i) = self.var(name) {
            let addr = match self.f.vars[i].space {
                Space::Shared => self.shared[i],
                Space::Local => self.local[i],
                Space::Param => {
                    let at = self.f.params.iter().position(|&p| p == i)?;
                    self.params.get(at)?.offset as u64
                }
                _ => return None,
            };
            return Some(addr);
        }
        self.names.symbols.get(name).copied()
    }

    /// First slot of a `.param` variable of a call or of a device function.
    pub fn param_slots(&self, name: &str) -> Option<Slot> {
        let s = self.var_slots[self.var(name)?];
        (s != NONE).then_some(s)
    }

    /// The predicate that a name means.
    pub fn pred_name(&mut self, name: &str) -> Result<u32> {
        match self.reg(name) {
            Some(r) if r.ty == Ty::Pred => Ok(r.slot),
            _ => self.err(format!("'{name}' is not a predicate")),
        }
    }

    /// A predicate operand and its negation.
    pub fn pred(&mut self, a: &Arg) -> Result<(u32, bool)> {
        match a {
            Arg::Name(n) => Ok((self.pred_name(n)?, false)),
            Arg::Not(n) => Ok((self.pred_name(n)?, true)),
            Arg::Lit(Lit::Int(v)) => {
                // A constant predicate: one that is made of a comparison of constants.
                let (zero, v) = (self.constant(0, false), self.constant(*v & 1, false));
                let p = self.preds;
                self.preds += 1;
                let guard = std::mem::replace(&mut self.guard, (NONE, false));
                let i = self.emit(Op::Setp {
                    cmp: super::program::Cmp::Ne,
                    join: None,
                    q: NONE,
                });
                (i.ty, i.d, i.a, i.b) = (Ty::U32, p, v, zero);
                self.guard = guard;
                Ok((p, false))
            }
            _ => self.err("expected a predicate"),
        }
    }

    /// A destination predicate; `_` is none.
    pub fn pred_dst(&mut self, a: &Arg) -> Result<u32> {
        match a {
            Arg::Name(n) if n == "_" => Ok(NONE),
            Arg::Name(n) => self.pred_name(n),
            _ => self.err("expected a predicate"),
        }
    }

    /// The operand at `i`.
    pub fn arg(&self, i: usize) -> Result<&'a Arg> {
        match self.cur.args.get(i) {
            Some(a) => Ok(a),
            None => self.err(format!("operand {} is missing", i + 1)),
        }
    }

    /// Checks the number of operands.
    pub fn count(&self, n: usize) -> Result<()> {
        if self.cur.args.len() == n {
            return Ok(());
        }
        self.err(format!(
            "{n} operands expected, {} found",
            self.cur.args.len()
        ))
    }

    /// A destination register of the width of `ty`; `_` gets a slot that nobody reads.
    pub fn dst(&mut self, a: &Arg, wide: bool) -> Result<Slot> {
        match a {
            Arg::Name(n) if n == "_" => Ok(self.temp(wide)),
            Arg::Name(n) => match self.reg(n) {
                Some(r) if r.ty != Ty::Pred && (r.ty.bytes() == 8) == wide => Ok(r.slot),
                Some(_) => self.err(format!("register '{n}' has the wrong width")),
                None => self.err(format!("unknown register '{n}'")),
            },
            _ => self.err("expected a register as destination"),
        }
    }

    fn special_reg(&mut self, n: &str) -> Option<Slot> {
        let (base, dim) = match n.rsplit_once('.') {
            Some((b, d)) => (b, "xyz".find(d).filter(|_| d.len() == 1)? as u8),
            None => (n, 0),
        };
        let sp = match base {
            "%tid" => Special::Tid(dim),
            "%ntid" => Special::Ntid(dim),
            "%ctaid" => Special::Ctaid(dim),
            "%nctaid" => Special::Nctaid(dim),
            "%laneid" => Special::LaneId,
            "%warpid" => Special::WarpId,
            "%nwarpid" => Special::NWarpId,
            "%lanemask_eq" => Special::LaneMask(MaskKind::Eq),
            "%lanemask_le" => Special::LaneMask(MaskKind::Le),
            "%lanemask_lt" => Special::LaneMask(MaskKind::Lt),
            "%lanemask_ge" => Special::LaneMask(MaskKind::Ge),
            "%lanemask_gt" => Special::LaneMask(MaskKind::Gt),
            "%dynamic_smem_size" => Special::DynamicSmem,
            "%total_smem_size" => Special::TotalSmem,
            "%smid" | "%clusterid" | "%cluster_ctaid" | "%cluster_ctarank" => Special::Zero,
            "%nsmid" | "%cluster_nctaid" | "%cluster_nctarank" => Special::One,
            _ => return None,
        };
        Some(self.special(sp))
    }

    /// A source operand of type `ty`.
    pub fn src(&mut self, a: &Arg, ty: Ty) -> Result<Slot> {
        self.src_any(a, ty, false).map(|s| s.0)
    }

    /// A source operand whose register may be wider than `ty` where `loose`; whether it has 64 bits comes along.
    pub fn src_any(&mut self, a: &Arg, ty: Ty, loose: bool) -> Result<(Slot, bool)> {
        let wide = ty.bytes() == 8;
        match a {
            Arg::Name(n) => {
                if let Some(r) = self.reg(n) {
                    let reg_wide = r.ty.bytes() == 8;
                    if r.ty == Ty::Pred || (reg_wide != wide && !(loose && reg_wide)) {
                        return self.err(format!("register '{n}' has the wrong width"));
                    }
                    return Ok((r.slot, reg_wide));
                }
                if n == "WARP_SZ" {
                    return Ok((self.constant(32, wide), wide));
                }
                if let Some(s) = self.special_reg(n) {
                    if wide {
                        let d = self.temp(true);
                        let guard = std::mem::replace(&mut self.guard, (NONE, false));
                        let i = self.alu(Alu::Cvt, Ty::U64, d, &[s]);
                        i.ty2 = Ty::U32;
                        self.guard = guard;
                        return Ok((d, true));
                    }
                    return Ok((s, false));
                }
                match self.symbol(n) {
                    Some(a) => Ok((self.constant(a, wide), wide)),
                    None => self.err(format!("unknown name '{n}'")),
                }
            }
            Arg::Addr(Some(n), off) => match self.symbol(n) {
                Some(a) => Ok((self.constant(a.wrapping_add(*off as u64), wide), wide)),
                None => self.err(format!("unknown variable '{n}'")),
            },
            Arg::Lit(l) => Ok((self.literal(*l, ty), wide)),
            _ => self.err("this kind of operand does not fit here"),
        }
    }

    fn literal(&mut self, l: Lit, ty: Ty) -> Slot {
        let bits = match (l, ty) {
            (Lit::Int(v), _) => v,
            (Lit::F32(b), Ty::F64) => f64::from(f32::from_bits(b)).to_bits(),
            (Lit::F32(b), _) => u64::from(b),
            (Lit::F64(b), Ty::F32) => u64::from((f64::from_bits(b) as f32).to_bits()),
            (Lit::F64(b), _) => b,
        };
        match ty.bytes() {
            8 => self.constant(bits, true),
            4 => self.constant(bits & 0xffff_ffff, false),
            _ => self.constant(bits & 0xffff, false),
        }
    }

    /// An immediate number.
    pub fn imm(&self, a: &Arg) -> Result<u64> {
        match a {
            Arg::Lit(Lit::Int(v)) => Ok(*v),
            _ => self.err("expected a constant"),
        }
    }
}
