//! Decoding of one instruction: who knows it, and control flow.

use super::ast::{Arg, Ty};
use super::decode::{FnDecoder, Mods};
use super::program::{Call, NONE, Op};
use crate::error::Result;

impl FnDecoder<'_> {
    /// Decodes the instruction at hand.
    pub fn instr(&mut self) -> Result<()> {
        let i = self.cur;
        let mut m = Mods {
            rest: i.op[1..].iter().map(String::as_str).collect(),
        };
        if self.decode_alu(&i.op[0], &mut m)?
            || self.decode_mem(&i.op[0], &mut m)?
            || self.decode_warp(&i.op[0], &mut m)?
        {
            return self.done(&m);
        }
        match i.op[0].as_str() {
            "bra" => {
                m.take("uni");
                let Arg::Name(l) = self.arg(0)? else {
                    return self.err("expected a label");
                };
                let to = self.label(l)?;
                self.fix.push((self.prog.insts.len(), vec![to]));
                self.emit(Op::Bra { target: NONE });
            }
            "brx" => {
                if !m.take("idx") {
                    return self.err("only brx.idx is known");
                }
                m.take("uni");
                let a = self.src(self.arg(0)?, Ty::U32)?;
                let Arg::Name(l) = self.arg(1)? else {
                    return self.err("expected a list of labels");
                };
                let mut scope = Some(i.scope);
                let mut list = None;
                while let Some(s) = scope {
                    list = list.or(self.f.scopes[s]
                        .targets
                        .iter()
                        .find(|t| &t.0 == l)
                        .map(|t| &t.1));
                    scope = self.f.scopes[s].parent;
                }
                let Some(list) = list else {
                    return self.err(format!("no .branchtargets '{l}'"));
                };
                let to = list
                    .iter()
                    .map(|l| self.label(l))
                    .collect::<Result<Vec<_>>>()?;
                self.fix.push((self.prog.insts.len(), to));
                self.emit(Op::BrxIdx {
                    targets: Box::new([]),
                })
                .a = a;
            }
            "call" => {
                m.take("uni");
                self.call()?;
            }
            "ret" => {
                m.take("uni");
                let op = if self.f.entry { Op::Exit } else { Op::Ret };
                self.emit(op);
            }
            "exit" => {
                self.emit(Op::Exit);
            }
            "trap" | "brkpt" => {
                self.emit(Op::Trap);
            }
            "membar" => {
                m.find(|x| matches!(x, "cta" | "gl" | "sys").then_some(()));
                self.emit(Op::Fence);
            }
            "fence" => {
                m.find(|x| matches!(x, "sc" | "acq_rel").then_some(()));
                m.find(|x| matches!(x, "cta" | "gpu" | "sys").then_some(()));
                self.emit(Op::Fence);
            }
            "prefetch" | "prefetchu" => {
                m.rest.clear();
                self.emit(Op::Nop);
            }
            "nanosleep" => {
                m.take("u32");
                self.emit(Op::Nop);
            }
            o => return self.err(format!("the simulator does not know instruction '{o}'")),
        }
        self.done(&m)
    }

    fn label(&self, name: &str) -> Result<usize> {
        let mut scope = Some(self.cur.scope);
        while let Some(s) = scope {
            if let Some((_, at)) = self.f.scopes[s].labels.iter().find(|l| l.0 == name) {
                return Ok(*at);
            }
            scope = self.f.scopes[s].parent;
        }
        self.err(format!("unknown label '{name}'"))
    }

    fn call(&mut self) -> Result<()> {
        let i = self.cur;
        let (mut rets, mut args, mut name) = (&[][..], &[][..], None);
        for a in &i.args {
            match a {
                Arg::List(l) if name.is_none() => rets = l,
                Arg::List(l) => args = l,
                Arg::Name(n) if name.is_none() => name = Some(n),
                _ => return self.err("indirect calls are not supported"),
            }
        }
        let Some(name) = name else {
            return self.err("no function named");
        };
        let Some(&id) = self.names.funcs.get(name.as_str()) else {
            return self.err(format!("function '{name}' has no body in this module"));
        };
        let (callee, meta) = (self.funcs[id as usize], &self.meta[id as usize]);
        if args.len() != callee.params.len() || rets.len() != callee.rets.len() {
            return self.err(format!("'{name}' takes {} arguments", callee.params.len()));
        }
        let mut call = Call {
            func: id,
            args: Vec::new(),
            rets: Vec::new(),
        };
        for (list, vars, is_ret) in [(args, &callee.params, false), (rets, &callee.rets, true)] {
            for (a, &v) in list.iter().zip(vars) {
                let words = callee.vars[v].size.div_ceil(4) as u32;
                let from = match a {
                    Arg::Name(n) => self.param_slots(n),
                    _ => None,
                };
                let Some(from) = from else {
                    return self.err("arguments must be .param variables");
                };
                for w in 0..words {
                    if is_ret {
                        call.rets.push((meta.vars[v] + w, from + w));
                    } else {
                        call.args.push((from + w, meta.vars[v] + w));
                    }
                }
            }
        }
        self.calls.push(id);
        self.emit(Op::Call(Box::new(call)));
        Ok(())
    }
}
