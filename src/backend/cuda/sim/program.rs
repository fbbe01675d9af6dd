//! The decoded program: registers resolved to slots, labels to indices, modifiers to fields.

use super::ast::{Loc, Space, Ty};

/// Index of a vector of 32 words in a frame; a 64-bit register takes two.
pub type Slot = u32;

/// No predicate, no register.
pub const NONE: u32 = u32::MAX;

/// Rounding of a result to the destination's precision, or of `cvt` to an integer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rnd {
    /// To nearest, ties to even.
    #[default]
    Near,
    /// To nearest, ties away from zero (`.rna`, to tf32).
    Away,
    /// Towards zero.
    Zero,
    /// Towards minus infinity.
    Down,
    /// Towards plus infinity.
    Up,
}

/// Comparisons of `setp` and `set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

/// How `setp` joins its comparison with a predicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoolOp {
    And,
    Or,
    Xor,
}

/// Arithmetic, logic and movement between registers: `d = op(a, b, c)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alu {
    Mov,
    Add,
    Sub,
    MulLo,
    MulHi,
    MulWide,
    MadLo,
    MadHi,
    MadWide,
    /// 24-bit multiplication, and with an addition.
    Mul24,
    Mad24,
    Sad,
    Div,
    Rem,
    Min,
    Max,
    Abs,
    Neg,
    Fma,
    And,
    Or,
    Xor,
    Not,
    Cnot,
    Shl,
    Shr,
    /// Funnel shifts; `wrap` is in [`Inst::flag`].
    ShfL,
    ShfR,
    Bfe,
    Bfi,
    Bfind,
    Brev,
    Clz,
    Popc,
    Prmt,
    Lop3(u8),
    Dp4a,
    /// `selp`: `c` is a predicate.
    Selp,
    /// `slct`: `c` holds the sign's source, of type `ty2`.
    Slct,
    CopySign,
    Rcp,
    Sqrt,
    Rsqrt,
    Ex2,
    Lg2,
    Sin,
    Cos,
    Tanh,
    Cvt,
    /// `d = {a, b}` as one 32-bit register of two 16-bit ones.
    Pack32,
    /// `d = {a, b}` as one 64-bit register of two 32-bit ones.
    Pack64,
    /// `{d, b} = a` (32 bits to 16 and 16).
    Unpack32,
    /// `{d, b} = a` (64 bits to 32 and 32).
    Unpack64,
    /// `cvt.rn.bf16x2.f32 d, a, b`: `a` in the upper half.
    CvtPack,
    /// `set`: all ones, or 1.0, where the comparison holds.
    Set(Cmp),
}

/// Operations on predicates: registers of 32 bits, one a lane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PredOp {
    Mov,
    Not,
    And,
    Or,
    Xor,
}

/// Lane exchange of `shfl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shfl {
    Up,
    Down,
    Bfly,
    Idx,
}

/// Votes over the lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vote {
    All,
    Any,
    Uni,
    Ballot,
}

/// Operators of `atom`, `red` and `redux`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// A load or store of one to four elements.
#[derive(Clone, Debug)]
pub struct Access {
    pub space: Space,
    pub ty: Ty,
    pub vec: u8,
    pub addr: Slot,
    /// The address register has 64 bits.
    pub addr64: bool,
    pub off: i64,
    pub regs: [Slot; 4],
    /// The data registers have 64 bits.
    pub wide: bool,
    /// The data registers have 16 bits.
    pub half: bool,
}

/// `atom` or `red`.
#[derive(Clone, Debug)]
pub struct Atomic {
    pub op: AtomOp,
    pub mem: Access,
    /// Destination; [`NONE`] for `red`.
    pub d: Slot,
    /// Operand, and the second one of `cas`.
    pub b: Slot,
    pub c: Slot,
}

/// `cp.async`.
#[derive(Clone, Debug)]
pub struct CpAsync {
    pub dst: Slot,
    pub dst64: bool,
    pub dst_off: i64,
    pub src: Slot,
    pub src_off: i64,
    pub bytes: u8,
    /// Register with the number of bytes to read, the rest is zero; [`NONE`] for all.
    pub src_size: Slot,
    /// Predicate to ignore the source, and its negation; [`NONE`] where there is none.
    pub ignore: u32,
    pub ignore_neg: bool,
}

/// A tensor-core multiplication: shape and types.
#[derive(Clone, Debug)]
pub struct Mma {
    pub k: u8,
    pub ty: Ty,
    /// Accumulator and result in f16 rather than f32.
    pub half_acc: bool,
    pub d: [Slot; 4],
    pub a: [Slot; 4],
    pub b: [Slot; 2],
    pub c: [Slot; 4],
}

/// `ldmatrix` and `stmatrix` of 8x8 matrices of 16-bit elements.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub num: u8,
    pub trans: bool,
    pub addr: Slot,
    pub addr64: bool,
    pub off: i64,
    pub regs: [Slot; 4],
}

/// A call of a device function: pairs of slots to copy.
#[derive(Clone, Debug)]
pub struct Call {
    pub func: u32,
    /// `(caller's, callee's)`.
    pub args: Vec<(Slot, Slot)>,
    /// `(callee's, caller's)`.
    pub rets: Vec<(Slot, Slot)>,
}

/// What reduction a barrier does on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarRed {
    Popc,
    And,
    Or,
}

/// A barrier of the block.
#[derive(Clone, Debug)]
pub struct Barrier {
    /// Slots of the barrier's number and of the count of threads ([`NONE`]: all).
    pub id: Slot,
    pub count: Slot,
    /// `bar.arrive`: goes on without waiting.
    pub arrive: bool,
    /// `.aligned`: every thread of the warp executes it together.
    pub aligned: bool,
    /// Reduction: operator, destination (slot or predicate), source predicate, its negation.
    pub red: Option<(BarRed, u32, u32, bool)>,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub enum Op {
    Alu(Alu),
    Pred(PredOp),
    /// Compares `a` and `b`; `d` and `q` are predicates, joined with predicate `c` (negated by `flag`).
    Setp {
        cmp: Cmp,
        join: Option<BoolOp>,
        q: u32,
    },
    /// `d = clock`, of 32 or 64 bits.
    Clock,
    ActiveMask,
    Shfl {
        mode: Shfl,
        pred: u32,
        mask: Slot,
    },
    Vote {
        mode: Vote,
        neg: bool,
        mask: Slot,
    },
    MatchAny {
        mask: Slot,
    },
    MatchAll {
        pred: u32,
        mask: Slot,
    },
    Redux {
        op: AtomOp,
        mask: Slot,
    },
    Elect {
        pred: u32,
        mask: Slot,
    },
    /// Kernel parameters at a fixed offset: the same for every lane.
    LdParam(Box<Access>),
    Ld(Box<Access>),
    St(Box<Access>),
    Atom(Box<Atomic>),
    CpAsync(Box<CpAsync>),
    CpCommit,
    /// Waits until at most so many groups are in flight.
    CpWait(u32),
    CpWaitAll,
    LdMatrix(Box<Matrix>),
    StMatrix(Box<Matrix>),
    Mma(Box<Mma>),
    Bar(Box<Barrier>),
    WarpSync {
        mask: Slot,
    },
    /// Fences and prefetches: order is the interpreter's anyway.
    Fence,
    Nop,
    Bra {
        target: u32,
    },
    BrxIdx {
        targets: Box<[u32]>,
    },
    Call(Box<Call>),
    Ret,
    Exit,
    Trap,
}

/// One decoded instruction.
#[derive(Clone, Debug)]
pub struct Inst {
    pub op: Op,
    pub guard: u32,
    pub guard_neg: bool,
    pub ftz: bool,
    pub sat: bool,
    /// Variant bit: `.NaN` of min/max, `.wrap` of `shf`, `.relu`, the joined predicate's negation of `setp`.
    pub flag: bool,
    /// `cvt` rounds to an integer.
    pub int_rnd: bool,
    pub rnd: Rnd,
    pub ty: Ty,
    /// Source type where it differs.
    pub ty2: Ty,
    pub d: Slot,
    pub a: Slot,
    pub b: Slot,
    pub c: Slot,
    /// Where the lanes of a divergent branch meet again; [`NONE`]: not before they end.
    pub join: u32,
}

/// Values that are put into a frame's slots when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NWarpId,
    LaneMask(MaskKind),
    DynamicSmem,
    TotalSmem,
    Zero,
    One,
}

/// The `%lanemask_*` registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MaskKind {
    Eq,
    Le,
    Lt,
    Ge,
    Gt,
}

/// Classes that instructions are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    Integer,
    Float32,
    Float64,
    Half,
    /// Special functions: `ex2`, `rcp`, `sqrt`...
    Special,
    Convert,
    Move,
    Compare,
    Control,
    Barrier,
    Shuffle,
    Param,
    LoadGlobal,
    StoreGlobal,
    LoadShared,
    StoreShared,
    Local,
    Const,
    Atomic,
    AsyncCopy,
    Matrix,
    Tensor,
    Other,
}

impl Class {
    /// Every class, in order.
    pub const ALL: [Class; 23] = [
        Class::Integer,
        Class::Float32,
        Class::Float64,
        Class::Half,
        Class::Special,
        Class::Convert,
        Class::Move,
        Class::Compare,
        Class::Control,
        Class::Barrier,
        Class::Shuffle,
        Class::Param,
        Class::LoadGlobal,
        Class::StoreGlobal,
        Class::LoadShared,
        Class::StoreShared,
        Class::Local,
        Class::Const,
        Class::Atomic,
        Class::AsyncCopy,
        Class::Matrix,
        Class::Tensor,
        Class::Other,
    ];

    /// Short name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Class::Integer => "integer",
            Class::Float32 => "f32",
            Class::Float64 => "f64",
            Class::Half => "half",
            Class::Special => "special",
            Class::Convert => "convert",
            Class::Move => "move",
            Class::Compare => "compare",
            Class::Control => "control",
            Class::Barrier => "barrier",
            Class::Shuffle => "shuffle",
            Class::Param => "param",
            Class::LoadGlobal => "ld.global",
            Class::StoreGlobal => "st.global",
            Class::LoadShared => "ld.shared",
            Class::StoreShared => "st.shared",
            Class::Local => "local",
            Class::Const => "const",
            Class::Atomic => "atomic",
            Class::AsyncCopy => "cp.async",
            Class::Matrix => "ldmatrix",
            Class::Tensor => "mma",
            Class::Other => "other",
        }
    }
}

/// The class of an access to a state space.
fn access_class(space: Space, load: bool) -> Class {
    match (space, load) {
        (Space::Global | Space::Generic, true) => Class::LoadGlobal,
        (Space::Global | Space::Generic, false) => Class::StoreGlobal,
        (Space::Shared, true) => Class::LoadShared,
        (Space::Shared, false) => Class::StoreShared,
        (Space::Local, _) => Class::Local,
        (Space::Const, _) => Class::Const,
        (Space::Param, _) => Class::Param,
    }
}

impl Inst {
    /// What the instruction is counted as.
    pub fn class(&self) -> Class {
        let by_type = |ty: Ty| match ty {
            Ty::F32 | Ty::Tf32 => Class::Float32,
            Ty::F64 => Class::Float64,
            Ty::F16 | Ty::Bf16 | Ty::F16x2 | Ty::Bf16x2 => Class::Half,
            _ => Class::Integer,
        };
        match &self.op {
            Op::Alu(a) => match a {
                Alu::Mov
                | Alu::Selp
                | Alu::Slct
                | Alu::Pack32
                | Alu::Pack64
                | Alu::Unpack32
                | Alu::Unpack64 => Class::Move,
                Alu::Cvt | Alu::CvtPack => Class::Convert,
                Alu::Set(_) => Class::Compare,
                Alu::Rcp
                | Alu::Sqrt
                | Alu::Rsqrt
                | Alu::Ex2
                | Alu::Lg2
                | Alu::Sin
                | Alu::Cos
                | Alu::Tanh => Class::Special,
                Alu::Div if self.ty.float() => Class::Special,
                _ => by_type(self.ty),
            },
            Op::Pred(_) | Op::Setp { .. } => Class::Compare,
            Op::Clock | Op::ActiveMask | Op::Nop => Class::Other,
            Op::Shfl { .. }
            | Op::Vote { .. }
            | Op::MatchAny { .. }
            | Op::MatchAll { .. }
            | Op::Redux { .. }
            | Op::Elect { .. } => Class::Shuffle,
            Op::LdParam(_) => Class::Param,
            Op::Ld(m) => access_class(m.space, true),
            Op::St(m) => access_class(m.space, false),
            Op::Atom(_) => Class::Atomic,
            Op::CpAsync(_) | Op::CpCommit | Op::CpWait(_) | Op::CpWaitAll => Class::AsyncCopy,
            Op::LdMatrix(_) | Op::StMatrix(_) => Class::Matrix,
            Op::Mma(_) => Class::Tensor,
            Op::Bar(_) | Op::WarpSync { .. } | Op::Fence => Class::Barrier,
            Op::Bra { .. } | Op::BrxIdx { .. } | Op::Call(_) | Op::Ret | Op::Exit | Op::Trap => {
                Class::Control
            }
        }
    }
}

/// A decoded function; instructions of all functions of a module lie in one list.
#[derive(Clone, Debug)]
pub struct Function {
    pub name: String,
    pub entry: bool,
    /// First instruction.
    pub start: u32,
    pub end: u32,
    /// Words of 32 lanes that a frame takes, and predicates.
    pub slots: u32,
    pub preds: u32,
    /// `(slot, value, 64 bits)`.
    pub consts: Vec<(Slot, u64, bool)>,
    pub specials: Vec<(Slot, Special)>,
    /// Static shared memory of an entry and of all it may call, in bytes.
    pub shared: u32,
    /// Local memory a thread.
    pub local: u32,
    pub maxntid: Option<[u32; 3]>,
    /// Some instruction's result depends on the order of blocks: they run one after the other.
    pub ordered: bool,
    pub params: Vec<Param>,
}

/// A kernel's parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    pub name: String,
    pub offset: usize,
    pub size: usize,
    pub align: usize,
}

/// Everything that runs.
#[derive(Clone, Debug, Default)]
pub struct Program {
    pub insts: Vec<Inst>,
    pub locs: Vec<Loc>,
    /// Line of the PTX text, by instruction.
    pub lines: Vec<u32>,
    pub funcs: Vec<Function>,
    pub files: Vec<(u32, String)>,
}
