//! Decoding of arithmetic, logic, comparisons, conversions and moves.

use super::ast::{Arg, Space, Ty};
use super::decode::{FnDecoder, Mods};
use super::program::{Alu, BoolOp, Cmp, NONE, Op, PredOp, Rnd};
use crate::error::Result;

fn cmp(m: &str) -> Option<Cmp> {
    Some(match m {
        "eq" => Cmp::Eq,
        "ne" => Cmp::Ne,
        "lt" | "lo" => Cmp::Lt,
        "le" | "ls" => Cmp::Le,
        "gt" | "hi" => Cmp::Gt,
        "ge" | "hs" => Cmp::Ge,
        "equ" => Cmp::Equ,
        "neu" => Cmp::Neu,
        "ltu" => Cmp::Ltu,
        "leu" => Cmp::Leu,
        "gtu" => Cmp::Gtu,
        "geu" => Cmp::Geu,
        "num" => Cmp::Num,
        "nan" => Cmp::Nan,
        _ => return None,
    })
}

fn bool_op(m: &str) -> Option<BoolOp> {
    Some(match m {
        "and" => BoolOp::And,
        "or" => BoolOp::Or,
        "xor" => BoolOp::Xor,
        _ => return None,
    })
}

fn is_int(t: Ty) -> bool {
    matches!(t, Ty::U16 | Ty::S16 | Ty::U32 | Ty::S32 | Ty::U64 | Ty::S64)
}

fn is_float(t: Ty) -> bool {
    t.float() && t != Ty::Tf32
}

fn is_bits(t: Ty) -> bool {
    matches!(t, Ty::B16 | Ty::B32 | Ty::B64)
}

impl FnDecoder<'_> {
    /// Decodes an instruction on registers; false if `op` is none.
    pub fn decode_alu(&mut self, op: &str, m: &mut Mods) -> Result<bool> {
        match op {
            "mov" => self.mov(m)?,
            "add" | "sub" | "min" | "max" => {
                let alu = match op {
                    "add" => Alu::Add,
                    "sub" => Alu::Sub,
                    "min" => Alu::Min,
                    _ => Alu::Max,
                };
                self.arith(alu, m, 2, |t| is_int(t) || is_float(t))?;
            }
            "mul" => {
                if let Some(alu) = self.int_mul(m, [Alu::MulLo, Alu::MulHi, Alu::MulWide]) {
                    self.arith(alu, m, 2, is_int)?;
                } else {
                    self.arith(Alu::MulLo, m, 2, is_float)?;
                }
            }
            "mad" => {
                if let Some(alu) = self.int_mul(m, [Alu::MadLo, Alu::MadHi, Alu::MadWide]) {
                    self.arith(alu, m, 3, is_int)?;
                } else {
                    self.arith(Alu::Fma, m, 3, is_float)?;
                }
            }
            "mul24" | "mad24" => {
                if !m.take("lo") {
                    return self.err("only the .lo form is known");
                }
                let (alu, n) = if op == "mul24" {
                    (Alu::Mul24, 2)
                } else {
                    (Alu::Mad24, 3)
                };
                self.arith(alu, m, n, |t| matches!(t, Ty::U32 | Ty::S32))?;
            }
            "fma" => self.arith(Alu::Fma, m, 3, is_float)?,
            "sad" => self.arith(Alu::Sad, m, 3, is_int)?,
            "div" => {
                // `.approx` and `.full` allow an error; the exact quotient is within it.
                let _ = m.take("approx") || m.take("full");
                self.arith(Alu::Div, m, 2, |t| {
                    is_int(t) || matches!(t, Ty::F32 | Ty::F64)
                })?;
            }
            "rem" => self.arith(Alu::Rem, m, 2, is_int)?,
            "abs" | "neg" => {
                let alu = if op == "abs" { Alu::Abs } else { Alu::Neg };
                self.arith(alu, m, 1, |t| is_int(t) || is_float(t))?;
            }
            "and" | "or" | "xor" | "not" if m.rest == ["pred"] => {
                m.rest.clear();
                self.pred_logic(op)?;
            }
            "and" => self.arith(Alu::And, m, 2, is_bits)?,
            "or" => self.arith(Alu::Or, m, 2, is_bits)?,
            "xor" => self.arith(Alu::Xor, m, 2, is_bits)?,
            "not" => self.arith(Alu::Not, m, 1, is_bits)?,
            "cnot" => self.arith(Alu::Cnot, m, 1, is_bits)?,
            "shl" | "shr" => {
                let ty = self.need_ty(m)?;
                if !(is_bits(ty) || is_int(ty)) {
                    return self.err("type does not fit");
                }
                self.count(3)?;
                let d = self.dst(self.arg(0)?, ty.bytes() == 8)?;
                let a = self.src(self.arg(1)?, ty)?;
                let b = self.src(self.arg(2)?, Ty::U32)?;
                self.alu(
                    if op == "shl" { Alu::Shl } else { Alu::Shr },
                    ty,
                    d,
                    &[a, b],
                );
            }
            "shf" => {
                let alu = if m.take("l") {
                    Alu::ShfL
                } else if m.take("r") {
                    Alu::ShfR
                } else {
                    return self.err("neither .l nor .r");
                };
                let wrap = m.take("wrap");
                if !wrap && !m.take("clamp") {
                    return self.err("neither .wrap nor .clamp");
                }
                self.arith_flag(alu, m, 3, |t| t == Ty::B32, wrap)?;
            }
            "bfe" | "bfi" => {
                let ty = self.need_ty(m)?;
                let n = self.cur.args.len();
                let d = self.dst(self.arg(0)?, ty.bytes() == 8)?;
                let a = self.src(self.arg(1)?, ty)?;
                if op == "bfe" {
                    self.count(4)?;
                    let b = self.src(self.arg(2)?, Ty::U32)?;
                    let c = self.src(self.arg(3)?, Ty::U32)?;
                    self.alu(Alu::Bfe, ty, d, &[a, b, c]);
                } else {
                    self.count(5)?;
                    let b = self.src(self.arg(2)?, ty)?;
                    let pos = self.src(self.arg(n - 2)?, Ty::U32)?;
                    let len = self.src(self.arg(n - 1)?, Ty::U32)?;
                    self.bfi(ty, d, a, b, pos, len);
                }
            }
            "bfind" => {
                let shift = m.take("shiftamt");
                self.count_bits(Alu::Bfind, m, shift)?;
            }
            "clz" => self.count_bits(Alu::Clz, m, false)?,
            "popc" => self.count_bits(Alu::Popc, m, false)?,
            "brev" => self.arith(Alu::Brev, m, 1, is_bits)?,
            "prmt" => self.arith(Alu::Prmt, m, 3, |t| t == Ty::B32)?,
            "lop3" => {
                let ty = self.need_ty(m)?;
                self.count(5)?;
                let table = self.imm(self.arg(4)?)? as u8;
                let d = self.dst(self.arg(0)?, false)?;
                let s = [1, 2, 3].map(|i| self.arg(i).and_then(|a| self.src(a, ty)));
                let [a, b, c] = s;
                self.alu(Alu::Lop3(table), ty, d, &[a?, b?, c?]);
            }
            "dp4a" => {
                let ty = self.need_ty(m)?;
                let ty2 = self.need_ty(m)?;
                self.count(4)?;
                let d = self.dst(self.arg(0)?, false)?;
                let a = self.src(self.arg(1)?, ty)?;
                let b = self.src(self.arg(2)?, ty2)?;
                let c = self.src(self.arg(3)?, Ty::B32)?;
                self.alu(Alu::Dp4a, ty, d, &[a, b, c]).ty2 = ty2;
            }
            "copysign" => self.arith(Alu::CopySign, m, 2, |t| matches!(t, Ty::F32 | Ty::F64))?,
            "selp" => {
                let ty = self.need_ty(m)?;
                self.count(4)?;
                let d = self.dst(self.arg(0)?, ty.bytes() == 8)?;
                let a = self.src(self.arg(1)?, ty)?;
                let b = self.src(self.arg(2)?, ty)?;
                let (p, neg) = self.pred(self.arg(3)?)?;
                let (a, b) = if neg { (b, a) } else { (a, b) };
                self.alu(Alu::Selp, ty, d, &[a, b, p]);
            }
            "slct" => {
                let ftz = m.take("ftz");
                let ty = self.need_ty(m)?;
                let ty2 = self.need_ty(m)?;
                self.count(4)?;
                let d = self.dst(self.arg(0)?, ty.bytes() == 8)?;
                let a = self.src(self.arg(1)?, ty)?;
                let b = self.src(self.arg(2)?, ty)?;
                let c = self.src(self.arg(3)?, ty2)?;
                let i = self.alu(Alu::Slct, ty, d, &[a, b, c]);
                (i.ty2, i.ftz) = (ty2, ftz);
            }
            "setp" | "set" => self.setp(op == "setp", m)?,
            "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => {
                m.take("approx");
                let alu = match op {
                    "rcp" => Alu::Rcp,
                    "sqrt" => Alu::Sqrt,
                    "rsqrt" => Alu::Rsqrt,
                    "ex2" => Alu::Ex2,
                    "lg2" => Alu::Lg2,
                    "sin" => Alu::Sin,
                    "cos" => Alu::Cos,
                    _ => Alu::Tanh,
                };
                self.arith(alu, m, 1, |t| match alu {
                    Alu::Rcp | Alu::Sqrt | Alu::Rsqrt => matches!(t, Ty::F32 | Ty::F64),
                    Alu::Ex2 | Alu::Tanh => {
                        matches!(t, Ty::F32 | Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2)
                    }
                    _ => t == Ty::F32,
                })?;
            }
            "cvt" => self.cvt(m)?,
            "cvta" => self.cvta(m)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn int_mul(&mut self, m: &mut Mods, ops: [Alu; 3]) -> Option<Alu> {
        ["lo", "hi", "wide"]
            .iter()
            .position(|w| m.take(w))
            .map(|i| ops[i])
    }

    fn arith(&mut self, alu: Alu, m: &mut Mods, n: usize, fits: impl Fn(Ty) -> bool) -> Result<()> {
        self.arith_flag(alu, m, n, fits, false)
    }

    /// `op.mods.type d, a, b, c` with everything of one type (a wide product's is twice as wide).
    fn arith_flag(
        &mut self,
        alu: Alu,
        m: &mut Mods,
        n: usize,
        fits: impl Fn(Ty) -> bool,
        flag: bool,
    ) -> Result<()> {
        let ftz = m.take("ftz");
        let sat = m.take("sat");
        let nan = m.take("NaN");
        let relu = m.take("relu");
        let rnd = m.rnd().unwrap_or_default();
        let ty = self.need_ty(m)?;
        if !fits(ty) {
            return self.err("the simulator does not know this type here");
        }
        if relu
            && !(matches!(alu, Alu::Fma)
                && matches!(ty, Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2))
        {
            return self.err("'.relu' is known for fma of half types only");
        }
        if sat && !matches!(ty, Ty::F32 | Ty::S32 | Ty::F16 | Ty::F16x2) {
            return self.err("'.sat' does not fit this type");
        }
        if rnd != Rnd::Near && !matches!(ty, Ty::F32 | Ty::F64) {
            return self.err("this rounding does not fit this type");
        }
        if rnd != Rnd::Near && ty == Ty::F64 {
            return self.err("directed rounding of f64 is not supported");
        }
        if nan && !matches!(alu, Alu::Min | Alu::Max) {
            return self.err("'.NaN' belongs to min and max");
        }
        self.count(n + 1)?;
        let wide_result = matches!(alu, Alu::MulWide | Alu::MadWide);
        let result = match ty {
            Ty::U32 | Ty::S32 if wide_result => Ty::U64,
            Ty::U16 | Ty::S16 if wide_result => Ty::U32,
            _ => ty,
        };
        let d = self.dst(self.arg(0)?, result.bytes() == 8)?;
        let mut s = [NONE; 3];
        for (k, s) in s.iter_mut().enumerate().take(n) {
            *s = self.src(self.arg(k + 1)?, if k == 2 { result } else { ty })?;
        }
        let i = self.alu(alu, ty, d, &s[..n]);
        (i.ftz, i.sat, i.rnd, i.flag) = (ftz, sat, rnd, flag || nan || relu);
        Ok(())
    }

    fn count_bits(&mut self, alu: Alu, m: &mut Mods, flag: bool) -> Result<()> {
        let ty = self.need_ty(m)?;
        self.count(2)?;
        let d = self.dst(self.arg(0)?, false)?;
        let a = self.src(self.arg(1)?, ty)?;
        self.alu(alu, ty, d, &[a]).flag = flag;
        Ok(())
    }

    /// `bfi` has four sources; the length and position are packed into one register first.
    pub fn bfi(&mut self, ty: Ty, d: u32, a: u32, b: u32, pos: u32, len: u32) {
        let packed = self.temp(false);
        let (eight, byte) = (self.constant(8, false), self.constant(255, false));
        self.alu(Alu::And, Ty::B32, packed, &[pos, byte]);
        self.bfi_len(packed, len, eight);
        self.alu(Alu::Bfi, ty, d, &[a, b, packed]);
    }

    fn bfi_len(&mut self, packed: u32, len: u32, eight: u32) {
        let byte = self.constant(255, false);
        let t = self.temp(false);
        self.alu(Alu::And, Ty::B32, t, &[len, byte]);
        self.alu(Alu::Shl, Ty::B32, t, &[t, eight]);
        self.alu(Alu::Or, Ty::B32, packed, &[packed, t]);
    }

    fn pred_logic(&mut self, op: &str) -> Result<()> {
        let unary = op == "not";
        self.count(if unary { 2 } else { 3 })?;
        let d = self.pred_dst(self.arg(0)?)?;
        let a = self.pred(self.arg(1)?)?;
        let b = if unary { a } else { self.pred(self.arg(2)?)? };
        if a.1 || b.1 {
            return self.err("negated operands are not known here");
        }
        let p = match op {
            "and" => PredOp::And,
            "or" => PredOp::Or,
            "xor" => PredOp::Xor,
            _ => PredOp::Not,
        };
        let i = self.emit(Op::Pred(p));
        (i.d, i.a, i.b) = (d, a.0, b.0);
        Ok(())
    }

    fn mov(&mut self, m: &mut Mods) -> Result<()> {
        let ty = self.need_ty(m)?;
        self.count(2)?;
        let (d, s) = (self.arg(0)?, self.arg(1)?);
        if ty == Ty::Pred {
            let dst = self.pred_dst(d)?;
            let (a, neg) = self.pred(s)?;
            let i = self.emit(Op::Pred(if neg { PredOp::Not } else { PredOp::Mov }));
            (i.d, i.a, i.b) = (dst, a, a);
            return Ok(());
        }
        let wide = ty.bytes() == 8;
        match (d, s) {
            (Arg::Vec(v), s) => {
                if v.len() != 2 || !matches!(ty.bytes(), 4 | 8) {
                    return self.err("only halves can be unpacked");
                }
                let a = self.src(s, ty)?;
                let lo = self.dst(&v[0], false)?;
                let hi = self.dst(&v[1], false)?;
                let i = self.alu(
                    if wide { Alu::Unpack64 } else { Alu::Unpack32 },
                    ty,
                    lo,
                    &[a],
                );
                i.b = hi;
            }
            (d, Arg::Vec(v)) => {
                if v.len() != 2 || !matches!(ty.bytes(), 4 | 8) {
                    return self.err("only halves can be packed");
                }
                let half = if wide { Ty::B32 } else { Ty::B16 };
                let a = self.src(&v[0], half)?;
                let b = self.src(&v[1], half)?;
                let d = self.dst(d, wide)?;
                self.alu(if wide { Alu::Pack64 } else { Alu::Pack32 }, ty, d, &[a, b]);
            }
            (d, Arg::Name(n))
                if matches!(
                    n.as_str(),
                    "%clock" | "%clock64" | "%clock_hi" | "%globaltimer"
                ) =>
            {
                let d = self.dst(d, wide)?;
                let i = self.emit(Op::Clock);
                (i.d, i.ty) = (d, ty);
            }
            (d, s) => {
                let a = self.src(s, ty)?;
                let d = self.dst(d, wide)?;
                self.alu(Alu::Mov, ty, d, &[a]);
            }
        }
        Ok(())
    }

    fn setp(&mut self, is_setp: bool, m: &mut Mods) -> Result<()> {
        let Some(c) = m.find(cmp) else {
            return self.err("no comparison");
        };
        let join = m.find(bool_op);
        let ftz = m.take("ftz");
        if !is_setp {
            if join.is_some() {
                return self.err("set with a joined predicate is not supported");
            }
            let dty = self.need_ty(m)?;
            let sty = self.need_ty(m)?;
            self.count(3)?;
            let d = self.dst(self.arg(0)?, false)?;
            let a = self.src(self.arg(1)?, sty)?;
            let b = self.src(self.arg(2)?, sty)?;
            let i = self.alu(Alu::Set(c), dty, d, &[a, b]);
            (i.ty2, i.ftz) = (sty, ftz);
            return Ok(());
        }
        let ty = self.need_ty(m)?;
        self.count(if join.is_some() { 4 } else { 3 })?;
        let (p, q) = match self.arg(0)? {
            Arg::Pair(p, q) => (self.pred_dst(p)?, self.pred_dst(q)?),
            a => (self.pred_dst(a)?, NONE),
        };
        let a = self.src(self.arg(1)?, ty)?;
        let b = self.src(self.arg(2)?, ty)?;
        let (jp, neg) = if join.is_some() {
            self.pred(self.arg(3)?)?
        } else {
            (NONE, false)
        };
        let i = self.emit(Op::Setp { cmp: c, join, q });
        (i.ty, i.ftz, i.d, i.a, i.b, i.c, i.flag) = (ty, ftz, p, a, b, jp, neg);
        Ok(())
    }

    fn cvt(&mut self, m: &mut Mods) -> Result<()> {
        let ftz = m.take("ftz");
        let sat = m.take("sat");
        let relu = m.take("relu");
        let rnd = m.find(|r| {
            Some(match r {
                "rn" => (Rnd::Near, false),
                "rz" => (Rnd::Zero, false),
                "rm" => (Rnd::Down, false),
                "rp" => (Rnd::Up, false),
                "rna" => (Rnd::Away, false),
                "rni" => (Rnd::Near, true),
                "rzi" => (Rnd::Zero, true),
                "rmi" => (Rnd::Down, true),
                "rpi" => (Rnd::Up, true),
                _ => return None,
            })
        });
        let dty = self.need_ty(m)?;
        let sty = self.need_ty(m)?;
        let (rnd, int_rnd) = rnd.unwrap_or((Rnd::Near, false));
        if matches!(dty, Ty::Bf16x2 | Ty::F16x2) {
            if sty != Ty::F32 || !matches!(rnd, Rnd::Near | Rnd::Zero) {
                return self.err("the simulator packs f32 with .rn or .rz only");
            }
            self.count(3)?;
            let d = self.dst(self.arg(0)?, false)?;
            let a = self.src(self.arg(1)?, Ty::F32)?;
            let b = self.src(self.arg(2)?, Ty::F32)?;
            let i = self.alu(Alu::CvtPack, dty, d, &[a, b]);
            (i.rnd, i.flag, i.ty2) = (rnd, relu, sty);
            return Ok(());
        }
        let scalar = |t: Ty| {
            !matches!(
                t,
                Ty::B8 | Ty::B16 | Ty::B32 | Ty::B64 | Ty::Pred | Ty::F16x2 | Ty::Bf16x2
            )
        };
        if !scalar(dty) || !scalar(sty) || (rnd == Rnd::Away && dty != Ty::Tf32) {
            return self.err("the simulator does not know this conversion");
        }
        self.count(2)?;
        // Registers may be wider than the types: the conversion takes the low bits and fills the rest.
        let (a, src_wide) = self.src_any(self.arg(1)?, sty, true)?;
        let Arg::Name(n) = self.arg(0)? else {
            return self.err("expected a register");
        };
        let Some(r) = self.reg(n) else {
            return self.err(format!("unknown register '{n}'"));
        };
        let dst_wide = r.ty.bytes() == 8;
        if r.ty == Ty::Pred || (dty.bytes() == 8 && !dst_wide) {
            return self.err(format!("register '{n}' has the wrong width"));
        }
        let a = if src_wide && sty.bytes() < 8 {
            let t = self.temp(false);
            self.alu(Alu::Unpack64, Ty::B64, t, &[a]).b = NONE;
            t
        } else {
            a
        };
        if dst_wide && dty.bytes() < 8 {
            // The narrow result, then widened by its sign.
            let t = self.temp(false);
            let i = self.alu(Alu::Cvt, dty, t, &[a]);
            (i.ty2, i.rnd, i.int_rnd, i.ftz, i.sat, i.flag) = (sty, rnd, int_rnd, ftz, sat, relu);
            let i = self.alu(
                Alu::Cvt,
                if dty.signed() { Ty::S64 } else { Ty::U64 },
                r.slot,
                &[t],
            );
            i.ty2 = if dty.signed() { Ty::S32 } else { Ty::U32 };
            return Ok(());
        }
        let narrow_reg = r.ty.bytes() == 2;
        let i = self.alu(Alu::Cvt, dty, r.slot, &[a]);
        (i.ty2, i.rnd, i.int_rnd, i.ftz, i.sat, i.flag) = (sty, rnd, int_rnd, ftz, sat, relu);
        i.b = u32::from(narrow_reg);
        Ok(())
    }

    fn cvta(&mut self, m: &mut Mods) -> Result<()> {
        let to = m.take("to");
        let Some(space) = m.find(|s| {
            Some(match s {
                "global" => Space::Global,
                "const" => Space::Const,
                "shared" | "shared::cta" => Space::Shared,
                "local" => Space::Local,
                "param" => Space::Param,
                _ => return None,
            })
        }) else {
            return self.err("no state space");
        };
        let ty = self.need_ty(m)?;
        if ty != Ty::U64 {
            return self.err("only 64-bit addresses are known");
        }
        self.count(2)?;
        let d = self.dst(self.arg(0)?, true)?;
        let a = self.src(self.arg(1)?, ty)?;
        let window = super::memory::window(space);
        let w = self.constant(window, true);
        match (window, to) {
            (0, _) => self.alu(Alu::Mov, ty, d, &[a]),
            (_, true) => self.alu(Alu::Sub, ty, d, &[a, w]),
            (_, false) => self.alu(Alu::Add, ty, d, &[a, w]),
        };
        Ok(())
    }
}
