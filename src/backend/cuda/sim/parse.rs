//! Tokens to [`Ptx`]: directives, declarations, labels and instructions with their operands.

use super::ast::{Arg, Decl, Func, Instr, Lit, Loc, Ptx, Scope, Space, Ty, Var};
use super::lex::{Tok, Token, lex};
use crate::error::{Error, Result};

/// Parses PTX text.
///
/// # Errors
/// Text that is not PTX or a directive that is not known; the message names the line.
pub fn parse(text: &str) -> Result<Ptx> {
    let mut p = Parser {
        toks: lex(text)?,
        at: 0,
        loc: Loc::default(),
    };
    p.module()
}

struct Parser {
    toks: Vec<Token>,
    at: usize,
    loc: Loc,
}

fn is_directive(w: &str) -> bool {
    w.starts_with('.')
}

impl Parser {
    fn peek(&self) -> Option<&Tok> {
        self.toks.get(self.at).map(|t| &t.tok)
    }

    fn line(&self) -> u32 {
        self.toks
            .get(self.at)
            .or(self.toks.last())
            .map_or(0, |t| t.line)
    }

    fn err<T>(&self, m: impl std::fmt::Display) -> Result<T> {
        Err(Error::input(format!("PTX line {}: {m}", self.line())))
    }

    fn next(&mut self) -> Result<Tok> {
        match self.toks.get(self.at) {
            Some(t) => {
                self.at += 1;
                Ok(t.tok.clone())
            }
            None => self.err("the text ends in the middle of something"),
        }
    }

    fn eat(&mut self, c: char) -> bool {
        let yes = self.peek() == Some(&Tok::P(c));
        self.at += usize::from(yes);
        yes
    }

    fn expect(&mut self, c: char) -> Result<()> {
        if self.eat(c) {
            return Ok(());
        }
        let found = self.show();
        self.err(format!("expected '{c}', found {found}"))
    }

    fn show(&self) -> String {
        match self.peek() {
            None => "the end".into(),
            Some(Tok::Word(w)) => format!("'{w}'"),
            Some(Tok::Str(s)) => format!("\"{s}\""),
            Some(Tok::P(c)) => format!("'{c}'"),
        }
    }

    fn word(&mut self) -> Result<String> {
        match self.peek() {
            Some(Tok::Word(w)) => {
                let w = w.clone();
                self.at += 1;
                Ok(w)
            }
            _ => {
                let found = self.show();
                self.err(format!("expected a name, found {found}"))
            }
        }
    }

    fn peek_word(&self) -> Option<&str> {
        match self.peek() {
            Some(Tok::Word(w)) => Some(w),
            _ => None,
        }
    }

    fn eat_word(&mut self, w: &str) -> bool {
        let yes = self.peek_word() == Some(w);
        self.at += usize::from(yes);
        yes
    }

    fn int(&mut self) -> Result<i64> {
        let neg = self.eat('-');
        let w = self.word()?;
        match literal(&w) {
            Some(Lit::Int(v)) => Ok(if neg {
                (v as i64).wrapping_neg()
            } else {
                v as i64
            }),
            _ => self.err(format!("expected a number, found '{w}'")),
        }
    }

    fn module(&mut self) -> Result<Ptx> {
        let mut m = Ptx::default();
        while let Some(t) = self.peek() {
            let Tok::Word(w) = t.clone() else {
                let found = self.show();
                return self.err(format!("unexpected {found}"));
            };
            match w.as_str() {
                ".version" => {
                    self.at += 1;
                    m.version = self.word()?;
                }
                ".target" => {
                    self.at += 1;
                    m.target = self.word()?;
                    while self.eat(',') {
                        self.word()?;
                    }
                }
                ".address_size" => {
                    self.at += 1;
                    if self.int()? != 64 {
                        return self.err("only .address_size 64 is supported");
                    }
                }
                ".file" => {
                    self.at += 1;
                    let n = self.int()? as u32;
                    let Tok::Str(name) = self.next()? else {
                        return self.err("expected a file name");
                    };
                    while self.eat(',') {
                        self.int()?;
                    }
                    m.files.push((n, name));
                }
                ".section" => self.section()?,
                ".visible" | ".extern" | ".weak" | ".common" | ".global" | ".const" | ".shared"
                | ".entry" | ".func" => self.top(&mut m)?,
                _ => return self.err(format!("unknown directive '{w}'")),
            }
        }
        Ok(m)
    }

    /// Debug sections: skipped.
    fn section(&mut self) -> Result<()> {
        while !self.eat('{') {
            self.next()?;
        }
        let mut depth = 1;
        while depth > 0 {
            match self.next()? {
                Tok::P('{') => depth += 1,
                Tok::P('}') => depth -= 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn top(&mut self, m: &mut Ptx) -> Result<()> {
        let mut external = false;
        loop {
            match self.peek_word() {
                Some(".visible" | ".weak" | ".common") => self.at += 1,
                Some(".extern") => {
                    external = true;
                    self.at += 1;
                }
                Some(".entry" | ".func") => return self.func(m),
                Some(".global") => return self.vars(Space::Global, external, &mut m.vars),
                Some(".const") => return self.vars(Space::Const, external, &mut m.vars),
                Some(".shared") => return self.vars(Space::Shared, external, &mut m.vars),
                _ => {
                    let found = self.show();
                    return self.err(format!("unexpected {found}"));
                }
            }
        }
    }

    /// A variable declaration after its linkage; the cursor is on the space.
    fn vars(&mut self, space: Space, external: bool, out: &mut Vec<Var>) -> Result<()> {
        self.at += 1;
        loop {
            let v = self.var(space, external)?;
            out.push(v);
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')
    }

    /// `.align 4 .b8 name[16] = {...}`.
    fn var(&mut self, space: Space, external: bool) -> Result<Var> {
        let mut align = 0;
        let mut vec = 1;
        let ty = loop {
            let w = self.word()?;
            match w.as_str() {
                ".align" => align = self.int()? as u64,
                ".v2" => vec = 2,
                ".v4" => vec = 4,
                ".ptr" | ".global" | ".const" | ".shared" | ".local" | ".managed" => {}
                _ => match w.strip_prefix('.').and_then(Ty::parse) {
                    Some(t) => break t,
                    None => return self.err(format!("unknown directive '{w}' in a declaration")),
                },
            }
        };
        // `.param .u64 .ptr .global .align 16 name`: attributes of a pointer may follow the type.
        let name = loop {
            let w = self.word()?;
            match w.as_str() {
                ".ptr" | ".global" | ".const" | ".shared" | ".local" => {}
                ".align" => {
                    self.int()?;
                }
                _ if is_directive(&w) => {
                    return self.err(format!("unknown directive '{w}' in a declaration"));
                }
                _ => break w,
            }
        };
        let elem = ty.bytes() as u64 * vec;
        let mut size = elem;
        let mut dynamic = false;
        while self.eat('[') {
            if self.eat(']') {
                size = 0;
                dynamic = true;
            } else {
                size *= self.int()? as u64;
                self.expect(']')?;
            }
        }
        let (mut init, mut init_addr) = (None, Vec::new());
        if self.eat('=') {
            let mut bytes = Vec::new();
            self.init(ty, &mut bytes, &mut init_addr)?;
            if dynamic {
                size = bytes.len() as u64;
                dynamic = false;
            }
            if bytes.len() as u64 > size {
                return self.err(format!("`{name}` has more initial values than room"));
            }
            bytes.resize(size as usize, 0);
            init = Some(bytes);
        }
        if dynamic && !(external && space == Space::Shared) {
            return self.err(format!("`{name}` has no size"));
        }
        Ok(Var {
            name,
            space,
            align: align.max(elem.max(1)),
            size,
            init,
            init_addr,
            dynamic,
        })
    }

    fn init(&mut self, ty: Ty, out: &mut Vec<u8>, addrs: &mut Vec<(usize, String)>) -> Result<()> {
        if self.eat('{') {
            if self.eat('}') {
                return Ok(());
            }
            loop {
                self.init(ty, out, addrs)?;
                if !self.eat(',') {
                    break;
                }
            }
            return self.expect('}');
        }
        let neg = self.eat('-');
        let w = self.word()?;
        let v = match literal(&w) {
            Some(Lit::Int(v)) => {
                if neg {
                    v.wrapping_neg()
                } else {
                    v
                }
            }
            Some(Lit::F32(b)) => u64::from(b) ^ if neg { 1 << 31 } else { 0 },
            Some(Lit::F64(b)) => b ^ if neg { 1 << 63 } else { 0 },
            None if w == "generic" => {
                self.expect('(')?;
                let name = self.word()?;
                self.expect(')')?;
                addrs.push((out.len(), name));
                0
            }
            None => {
                addrs.push((out.len(), w));
                0
            }
        };
        out.extend_from_slice(&v.to_le_bytes()[..ty.bytes()]);
        Ok(())
    }

    fn params(&mut self, f: &mut Func) -> Result<Vec<usize>> {
        let mut out = Vec::new();
        self.expect('(')?;
        if self.eat(')') {
            return Ok(out);
        }
        loop {
            let reg = match self.word()?.as_str() {
                ".param" => false,
                ".reg" => true,
                w => return self.err(format!("expected .param, found '{w}'")),
            };
            if reg {
                return self.err("parameters in registers (.reg) are not supported");
            }
            let v = self.var(Space::Param, true)?;
            f.scopes[0]
                .names
                .push((v.name.clone(), Decl::Var(f.vars.len())));
            out.push(f.vars.len());
            f.vars.push(v);
            if !self.eat(',') {
                break;
            }
        }
        self.expect(')')?;
        Ok(out)
    }

    fn func(&mut self, m: &mut Ptx) -> Result<()> {
        let mut f = Func {
            entry: self.word()? == ".entry",
            ..Func::default()
        };
        f.scopes.push(Scope::default());
        if self.peek() == Some(&Tok::P('(')) {
            f.rets = self.params(&mut f)?;
        }
        f.name = self.word()?;
        if self.peek() == Some(&Tok::P('(')) {
            f.params = self.params(&mut f)?;
        }
        while let Some(w) = self.peek_word().map(str::to_string) {
            self.at += 1;
            match w.as_str() {
                ".maxntid" | ".reqntid" => {
                    let mut n = [1; 3];
                    for (i, d) in n.iter_mut().enumerate() {
                        if i == 0 || self.eat(',') {
                            *d = self.int()? as u32;
                        }
                    }
                    f.maxntid = Some(n);
                }
                ".minnctapersm" | ".maxnreg" | ".maxclusterrank" => {
                    self.int()?;
                }
                ".noreturn" => {}
                _ => return self.err(format!("unknown directive '{w}' of function `{}`", f.name)),
            }
        }
        if self.eat(';') {
            f.prototype = true;
        } else {
            self.expect('{')?;
            self.body(&mut f)?;
        }
        m.funcs.push(f);
        Ok(())
    }

    fn body(&mut self, f: &mut Func) -> Result<()> {
        let mut scope = 0;
        self.loc = Loc::default();
        loop {
            if self.eat('{') {
                f.scopes.push(Scope {
                    parent: Some(scope),
                    ..Scope::default()
                });
                scope = f.scopes.len() - 1;
                continue;
            }
            if self.eat('}') {
                match f.scopes[scope].parent {
                    Some(p) => scope = p,
                    None => return Ok(()),
                }
                continue;
            }
            if self.eat(';') {
                continue;
            }
            if self.eat('@') {
                let neg = self.eat('!');
                let p = self.word()?;
                self.instr(f, scope, Some((p, neg)))?;
                continue;
            }
            let Some(w) = self.peek_word().map(str::to_string) else {
                let found = self.show();
                return self.err(format!("unexpected {found}"));
            };
            if is_directive(&w) {
                self.directive(f, scope, &w)?;
            } else if self.toks.get(self.at + 1).map(|t| &t.tok) == Some(&Tok::P(':')) {
                self.at += 2;
                if self.eat_word(".branchtargets") {
                    let mut list = vec![self.word()?];
                    while self.eat(',') {
                        list.push(self.word()?);
                    }
                    self.expect(';')?;
                    f.scopes[scope].targets.push((w, list));
                } else {
                    f.scopes[scope].labels.push((w, f.body.len()));
                }
            } else {
                self.instr(f, scope, None)?;
            }
        }
    }

    fn directive(&mut self, f: &mut Func, scope: usize, w: &str) -> Result<()> {
        match w {
            ".reg" => {
                self.at += 1;
                self.reg(f, scope)
            }
            ".local" | ".shared" | ".param" => {
                let space = match w {
                    ".local" => Space::Local,
                    ".shared" => Space::Shared,
                    _ => Space::Param,
                };
                let first = f.vars.len();
                self.vars(space, true, &mut f.vars)?;
                for i in first..f.vars.len() {
                    let name = f.vars[i].name.clone();
                    f.scopes[scope].names.push((name, Decl::Var(i)));
                }
                Ok(())
            }
            ".loc" => {
                self.at += 1;
                self.source_line()
            }
            ".pragma" => {
                while !self.eat(';') {
                    self.next()?;
                }
                Ok(())
            }
            _ => self.err(format!("unknown directive '{w}'")),
        }
    }

    /// `.loc file line column[, function_name label+n, inlined_at file line column]`.
    fn source_line(&mut self) -> Result<()> {
        let mut l = Loc {
            file: self.int()? as u32,
            line: self.int()? as u32,
            outer: (0, 0),
        };
        self.int()?;
        while self.eat(',') {
            if self.eat_word("function_name") {
                self.word()?;
                if self.eat('+') {
                    self.int()?;
                }
            } else if self.eat_word("inlined_at") {
                l.outer = (self.int()? as u32, self.int()? as u32);
                self.int()?;
            } else {
                let found = self.show();
                return self.err(format!("unexpected {found} in .loc"));
            }
        }
        // Line 0 is code without a source line (the compiler's own): keep the last one that had it.
        if l.line != 0 {
            self.loc = l;
        }
        Ok(())
    }

    fn reg(&mut self, f: &mut Func, scope: usize) -> Result<()> {
        let w = self.word()?;
        let Some(ty) = w.strip_prefix('.').and_then(Ty::parse) else {
            return self.err(format!("registers of type '{w}' are not supported"));
        };
        loop {
            let name = self.word()?;
            if self.eat('<') {
                let n = self.int()? as u32;
                self.expect('>')?;
                f.scopes[scope].names.push((name, Decl::RegRange(ty, n)));
            } else {
                f.scopes[scope].names.push((name, Decl::Reg(ty)));
            }
            if !self.eat(',') {
                break;
            }
        }
        self.expect(';')
    }

    fn instr(&mut self, f: &mut Func, scope: usize, guard: Option<(String, bool)>) -> Result<()> {
        let line = self.line();
        let op: Vec<String> = self.word()?.split('.').map(str::to_string).collect();
        let mut args = Vec::new();
        if !self.eat(';') {
            loop {
                args.push(self.arg()?);
                if !self.eat(',') {
                    break;
                }
            }
            self.expect(';')?;
        }
        f.body.push(Instr {
            guard,
            op,
            args,
            line,
            loc: self.loc,
            scope,
        });
        Ok(())
    }

    fn list(&mut self, close: char) -> Result<Vec<Arg>> {
        let mut v = Vec::new();
        if self.eat(close) {
            return Ok(v);
        }
        loop {
            v.push(self.arg()?);
            if !self.eat(',') {
                break;
            }
        }
        self.expect(close)?;
        Ok(v)
    }

    fn arg(&mut self) -> Result<Arg> {
        if self.eat('{') {
            return Ok(Arg::Vec(self.list('}')?));
        }
        if self.eat('(') {
            return Ok(Arg::List(self.list(')')?));
        }
        if self.eat('!') {
            return Ok(Arg::Not(self.word()?));
        }
        if self.eat('[') {
            return self.address();
        }
        let neg = self.eat('-');
        let w = self.word()?;
        let a = match literal(&w) {
            Some(Lit::Int(v)) => Arg::Lit(Lit::Int(if neg { v.wrapping_neg() } else { v })),
            Some(Lit::F32(b)) => Arg::Lit(Lit::F32(if neg { b ^ (1 << 31) } else { b })),
            Some(Lit::F64(b)) => Arg::Lit(Lit::F64(if neg { b ^ (1 << 63) } else { b })),
            None if neg => return self.err(format!("'-' before '{w}'")),
            None => Arg::Name(w),
        };
        if self.eat('|') {
            let b = self.arg()?;
            return Ok(Arg::Pair(Box::new(a), Box::new(b)));
        }
        if let Arg::Name(n) = &a
            && self.peek() == Some(&Tok::P('+'))
        {
            // `mov.u64 %rd1, table+8;`
            self.at += 1;
            let off = self.int()?;
            return Ok(Arg::Addr(Some(n.clone()), off));
        }
        Ok(a)
    }

    fn address(&mut self) -> Result<Arg> {
        let mut base = None;
        let mut off = 0i64;
        let mut sign = if self.eat('-') { -1 } else { 1 };
        loop {
            let neg = self.eat('-');
            let w = self.word()?;
            match literal(&w) {
                Some(Lit::Int(v)) => {
                    let v = if neg {
                        (v as i64).wrapping_neg()
                    } else {
                        v as i64
                    };
                    off = off.wrapping_add(v.wrapping_mul(sign));
                }
                Some(_) => return self.err(format!("'{w}' in an address")),
                None if base.is_none() && !neg && sign == 1 => base = Some(w),
                None => return self.err(format!("'{w}' in an address")),
            }
            if self.eat('+') {
                sign = 1;
            } else if self.eat('-') {
                sign = -1;
            } else {
                break;
            }
        }
        self.expect(']')?;
        Ok(Arg::Addr(base, off))
    }
}

/// A number as PTX writes it: `12`, `0x1F`, `0b101`, `0f3F800000`, `0d...`, `1.5`.
pub fn literal(w: &str) -> Option<Lit> {
    if !w.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (head, rest) = w.split_at(w.len().min(2));
    match head {
        "0f" | "0F" if rest.len() == 8 => return hex(rest).map(|v| Lit::F32(v as u32)),
        "0d" | "0D" if rest.len() == 16 => return hex(rest).map(Lit::F64),
        "0x" | "0X" => return hex(rest.trim_end_matches('U')).map(Lit::Int),
        "0b" | "0B" => {
            return u64::from_str_radix(rest.trim_end_matches('U'), 2)
                .ok()
                .map(Lit::Int);
        }
        _ => {}
    }
    let digits = w.trim_end_matches('U');
    if digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|c| c.is_ascii_digit()) {
        return u64::from_str_radix(digits, 8).ok().map(Lit::Int);
    }
    if let Ok(v) = digits.parse::<u64>() {
        return Some(Lit::Int(v));
    }
    w.parse::<f64>().ok().map(|v| Lit::F64(v.to_bits()))
}
