//! What the parser makes of PTX: directives resolved to structures, instructions still as written.

/// State spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Const,
    Param,
}

/// Fundamental and packed types of operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ty {
    B8,
    U8,
    S8,
    B16,
    U16,
    S16,
    F16,
    Bf16,
    B32,
    U32,
    S32,
    F32,
    Tf32,
    F16x2,
    Bf16x2,
    B64,
    U64,
    S64,
    F64,
    Pred,
}

impl Ty {
    /// The type that a modifier without its dot names.
    pub fn parse(s: &str) -> Option<Ty> {
        Some(match s {
            "b8" => Ty::B8,
            "u8" => Ty::U8,
            "s8" => Ty::S8,
            "b16" => Ty::B16,
            "u16" => Ty::U16,
            "s16" => Ty::S16,
            "f16" => Ty::F16,
            "bf16" => Ty::Bf16,
            "b32" => Ty::B32,
            "u32" => Ty::U32,
            "s32" => Ty::S32,
            "f32" => Ty::F32,
            "tf32" => Ty::Tf32,
            "f16x2" => Ty::F16x2,
            "bf16x2" => Ty::Bf16x2,
            "b64" => Ty::B64,
            "u64" => Ty::U64,
            "s64" => Ty::S64,
            "f64" => Ty::F64,
            "pred" => Ty::Pred,
            _ => return None,
        })
    }

    /// Size in bytes; a predicate has none.
    pub fn bytes(self) -> usize {
        match self {
            Ty::B8 | Ty::U8 | Ty::S8 => 1,
            Ty::B16 | Ty::U16 | Ty::S16 | Ty::F16 | Ty::Bf16 => 2,
            Ty::B32 | Ty::U32 | Ty::S32 | Ty::F32 | Ty::Tf32 | Ty::F16x2 | Ty::Bf16x2 => 4,
            Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => 8,
            Ty::Pred => 0,
        }
    }

    /// Whether it is a signed integer.
    pub fn signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }

    /// Whether it holds floating-point numbers.
    pub fn float(self) -> bool {
        matches!(
            self,
            Ty::F16 | Ty::Bf16 | Ty::F32 | Ty::Tf32 | Ty::F16x2 | Ty::Bf16x2 | Ty::F64
        )
    }
}

/// A literal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lit {
    Int(u64),
    F32(u32),
    F64(u64),
}

/// An operand as written.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A register, a special register, a variable, a label or a function.
    Name(String),
    /// `!%p1`.
    Not(String),
    Lit(Lit),
    /// `[base + offset]`; no base for an absolute address.
    Addr(Option<String>, i64),
    /// `{a, b}`.
    Vec(Vec<Arg>),
    /// `%p1|%p2`.
    Pair(Box<Arg>, Box<Arg>),
    /// `(a, b)` of a call.
    List(Vec<Arg>),
}

/// Where an instruction comes from in the CUDA source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loc {
    pub file: u32,
    pub line: u32,
    /// File and line of the outermost call that this was inlined into; file 0 where it was not.
    pub outer: (u32, u32),
}

/// An instruction as written.
#[derive(Clone, Debug)]
pub struct Instr {
    /// Guard predicate and whether it is negated.
    pub guard: Option<(String, bool)>,
    /// The opcode's parts: `["ld", "global", "f32"]`.
    pub op: Vec<String>,
    pub args: Vec<Arg>,
    pub line: u32,
    pub loc: Loc,
    /// The scope whose names it sees.
    pub scope: usize,
}

impl Instr {
    /// The opcode with its modifiers, as written.
    pub fn text(&self) -> String {
        self.op.join(".")
    }
}

/// What a scope declares.
#[derive(Clone, Debug, PartialEq)]
pub enum Decl {
    Reg(Ty),
    /// A variable: index into the function's or the module's list.
    Var(usize),
    /// `%r<10>`: names `%r0` to `%r9`.
    RegRange(Ty, u32),
}

/// A variable in memory.
#[derive(Clone, Debug)]
pub struct Var {
    pub name: String,
    pub space: Space,
    pub align: u64,
    pub size: u64,
    /// Initial bytes (zero-filled to `size`), where given.
    pub init: Option<Vec<u8>>,
    /// `(byte offset, name)` of addresses in the initialiser.
    pub init_addr: Vec<(usize, String)>,
    /// `.extern .shared x[]`: the dynamic shared memory.
    pub dynamic: bool,
}

/// A lexical scope of a function.
#[derive(Clone, Debug, Default)]
pub struct Scope {
    pub parent: Option<usize>,
    pub names: Vec<(String, Decl)>,
    /// Labels, with the index of the instruction they stand before.
    pub labels: Vec<(String, usize)>,
    /// `.branchtargets` lists.
    pub targets: Vec<(String, Vec<String>)>,
}

/// A kernel or a device function.
#[derive(Clone, Debug, Default)]
pub struct Func {
    pub name: String,
    pub entry: bool,
    /// Formal parameters in order, as variables of `vars`.
    pub params: Vec<usize>,
    /// Return values, as variables of `vars`.
    pub rets: Vec<usize>,
    pub vars: Vec<Var>,
    pub scopes: Vec<Scope>,
    pub body: Vec<Instr>,
    pub maxntid: Option<[u32; 3]>,
    /// Declared without a body.
    pub prototype: bool,
}

/// A whole PTX text.
#[derive(Clone, Debug, Default)]
pub struct Ptx {
    pub version: String,
    pub target: String,
    pub files: Vec<(u32, String)>,
    pub vars: Vec<Var>,
    pub funcs: Vec<Func>,
}
