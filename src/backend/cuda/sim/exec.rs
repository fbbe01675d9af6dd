//! Running one block: warps in turn, each until it waits, ends or has had its share.

use super::alu;
use super::compare::compare;
use super::counters::PcStat;
use super::memory::{Alloc, Memory};
use super::module::Module;
use super::program::{
    BarRed, Barrier, BoolOp, Cmp, Function, Inst, MaskKind, NONE, Op, PredOp, Special,
};
use super::shared::{Race, Shared, Who};
use super::warp::{Path, R32, State, V, Warp};

/// Instructions that a warp executes before the next one has its turn.
const SLICE: u64 = 20_000;

/// Something that went wrong, before it is known where.
#[derive(Debug)]
pub struct Trouble {
    pub lane: u32,
    pub what: String,
    pub address: Option<u64>,
}

/// `Ok`, or what went wrong.
pub type Done<T = ()> = Result<T, Box<Trouble>>;

/// A failure of `lane`.
pub fn fail<T>(lane: u32, what: impl Into<String>) -> Done<T> {
    Err(Box::new(Trouble {
        lane,
        what: what.into(),
        address: None,
    }))
}

/// Number of the first lane in a mask.
pub fn first(m: u32) -> u32 {
    m.trailing_zeros() & 31
}

/// The lanes of a mask, in order.
pub fn lanes(mut m: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (m != 0).then(|| {
            let l = m.trailing_zeros() as usize;
            m &= m - 1;
            l
        })
    })
}

/// What a launch fixes for all its blocks.
pub struct Grid<'a> {
    pub module: &'a Module,
    pub mem: &'a Memory,
    pub func: &'a Function,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub dynamic: u32,
    pub params: &'a [u8],
    pub checks: bool,
    pub seed: u64,
    /// Warp instructions that a block may execute.
    pub budget: u64,
}

/// Threads at a barrier.
#[derive(Clone, Default)]
struct BarState {
    waiting: u32,
    /// Warps that arrived without waiting, and threads in all.
    heard: u32,
    threads: u32,
    expected: u32,
    red: Option<BarRed>,
    votes: u32,
}

/// Runs blocks, one after the other, on one host thread.
pub struct Block<'a> {
    pub g: &'a Grid<'a>,
    pub id: [u32; 3],
    pub warps: Vec<Warp>,
    pub shared: Shared,
    pub local: Vec<u32>,
    /// Words of local memory a lane.
    pub local_words: usize,
    pub stats: Vec<PcStat>,
    bars: Vec<BarState>,
    /// The failing instruction, for the fault.
    pub fault_pc: u32,
}

impl<'a> Block<'a> {
    /// Room for blocks of the grid.
    pub fn new(g: &'a Grid<'a>) -> Block<'a> {
        let threads: u32 = g.block.iter().product();
        let n = threads.div_ceil(32) as usize;
        let local_words = g.func.local.div_ceil(16) as usize * 4;
        let warps = (0..n as u32)
            .map(|id| {
                let t = |l: usize| id * 32 + l as u32;
                Warp {
                    id,
                    regs: Vec::new(),
                    preds: Vec::new(),
                    base: 0,
                    pred_base: 0,
                    frames: Vec::new(),
                    stack: Vec::new(),
                    lanes: if threads - id * 32 >= 32 {
                        u32::MAX
                    } else {
                        (1 << (threads - id * 32)) - 1
                    },
                    alive: 0,
                    state: State::Done,
                    clock: 0,
                    sub: 0,
                    flights: Vec::new(),
                    commits: [0; 32],
                    tid: [
                        std::array::from_fn(|l| t(l) % g.block[0]),
                        std::array::from_fn(|l| t(l) / g.block[0] % g.block[1]),
                        std::array::from_fn(|l| t(l) / g.block[0] / g.block[1]),
                    ],
                }
            })
            .collect();
        Block {
            g,
            id: [0; 3],
            warps,
            shared: Shared::new(g.func.shared.next_multiple_of(16) + g.dynamic, n, g.checks),
            local: vec![0; local_words * 32 * n],
            local_words,
            stats: vec![PcStat::default(); g.module.program().insts.len()],
            bars: vec![BarState::default(); 16],
            fault_pc: 0,
        }
    }

    fn special(g: &Grid, id: [u32; 3], w: &Warp, s: Special) -> R32 {
        let threads: u32 = g.block.iter().product();
        match s {
            Special::Tid(d) => w.tid[d as usize],
            Special::Ntid(d) => [g.block[d as usize]; 32],
            Special::Ctaid(d) => [id[d as usize]; 32],
            Special::Nctaid(d) => [g.grid[d as usize]; 32],
            Special::LaneId => std::array::from_fn(|l| l as u32),
            Special::WarpId => [w.id; 32],
            Special::NWarpId => [threads.div_ceil(32); 32],
            Special::LaneMask(k) => std::array::from_fn(|l| {
                let bit = 1u32 << l;
                match k {
                    MaskKind::Eq => bit,
                    MaskKind::Le => bit | (bit - 1),
                    MaskKind::Lt => bit - 1,
                    MaskKind::Ge => !(bit - 1),
                    MaskKind::Gt => !(bit | (bit - 1)),
                }
            }),
            Special::DynamicSmem => [g.dynamic; 32],
            Special::TotalSmem => [g.func.shared + g.dynamic; 32],
            Special::Zero => [0; 32],
            Special::One => [1; 32],
        }
    }

    /// Runs the block at `id` to its end.
    ///
    /// # Errors
    /// What went wrong, and the warp it happened in.
    pub fn run(&mut self, id: [u32; 3]) -> Result<(), (usize, Box<Trouble>)> {
        self.id = id;
        self.shared.reset();
        self.local.fill(0);
        for b in &mut self.bars {
            *b = BarState::default();
        }
        let (g, f) = (self.g, self.g.func);
        for w in &mut self.warps {
            w.frames.clear();
            w.stack.clear();
            w.regs.clear();
            w.preds.clear();
            w.push_frame(f, NONE, |w, s| Self::special(g, id, w, s));
            w.stack.push(Path {
                pc: f.start,
                mask: w.lanes,
                join: NONE,
                frame: 0,
                call: false,
            });
            w.alive = w.lanes;
            w.state = State::Ready;
            w.clock = 0;
            w.sub = 0;
            w.flights.clear();
            w.commits = [0; 32];
        }
        let mut used = 0u64;
        loop {
            let mut ran = false;
            for i in 0..self.warps.len() {
                if self.warps[i].state == State::Ready {
                    ran = true;
                    let before = self.warps[i].clock;
                    self.warp(i).map_err(|t| (i, t))?;
                    used += self.warps[i].clock - before;
                }
            }
            if !ran {
                break;
            }
            if used > g.budget {
                let i = self
                    .warps
                    .iter()
                    .position(|w| w.state != State::Done)
                    .unwrap_or(0);
                let what = format!(
                    "the block has executed {used} instructions and is not done: an endless loop?"
                );
                return Err((
                    i,
                    Box::new(Trouble {
                        lane: first(self.warps[i].alive),
                        what,
                        address: None,
                    }),
                ));
            }
        }
        // Every warp is done or waits for one that never comes.
        if let Some((i, bar)) = self
            .warps
            .iter()
            .enumerate()
            .find_map(|(i, w)| match w.state {
                State::Waiting(b) => Some((i, b)),
                _ => None,
            })
        {
            let b = &self.bars[bar as usize];
            let what = format!(
                "barrier {bar} is never reached by all threads: {} of {} arrived",
                b.threads, b.expected
            );
            let w = &self.warps[i];
            self.fault_pc = w.stack.last().map_or(0, |p| p.pc.saturating_sub(1));
            return Err((
                i,
                Box::new(Trouble {
                    lane: first(w.alive),
                    what,
                    address: None,
                }),
            ));
        }
        Ok(())
    }

    /// Runs a warp until it has to wait or its slice is over.
    fn warp(&mut self, wi: usize) -> Done {
        let prog = self.g.module.program();
        let stop = self.warps[wi].clock + SLICE;
        loop {
            let w = &mut self.warps[wi];
            let Some(top) = w.stack.last() else {
                w.state = State::Done;
                return Ok(());
            };
            let (mut pc, path_mask, join) = (top.pc, top.mask, top.join);
            if w.clock >= stop {
                return Ok(());
            }
            // Straight-line code: no instruction here changes the stack.
            loop {
                if pc == join {
                    w_pop(&mut self.warps[wi]);
                    break;
                }
                let inst = &prog.insts[pc as usize];
                let w = &mut self.warps[wi];
                let mut m = path_mask;
                if inst.guard != NONE {
                    let p = w.p(inst.guard);
                    m &= if inst.guard_neg { !p } else { p };
                }
                w.clock += 1;
                let s = &mut self.stats[pc as usize];
                s.warps += 1;
                // Counting bits takes a dozen instructions where the processor's own may not be used.
                s.lanes += u64::from(if m == u32::MAX { 32 } else { m.count_ones() });
                match &inst.op {
                    Op::Alu(a) => {
                        if m != 0 {
                            alu::exec(w, *a, inst, m);
                        }
                    }
                    Op::Setp { cmp, join, q } => {
                        if m != 0 {
                            setp(w, inst, *cmp, *join, *q, m);
                        }
                    }
                    Op::Pred(p) => {
                        let (a, b) = (w.p(inst.a), w.p(inst.b));
                        let r = match p {
                            PredOp::Mov => a,
                            PredOp::Not => !a,
                            PredOp::And => a & b,
                            PredOp::Or => a | b,
                            PredOp::Xor => a ^ b,
                        };
                        w.put_p(inst.d, m, r);
                    }
                    Op::Bra { .. } | Op::BrxIdx { .. } | Op::Call(_) | Op::Ret | Op::Exit => {
                        self.control(wi, pc, inst, m);
                        break;
                    }
                    Op::Bar(b) => {
                        self.warps[wi]
                            .stack
                            .last_mut()
                            .expect("a running warp has a path")
                            .pc = pc + 1;
                        self.fault_pc = pc;
                        if m != 0 && self.barrier(wi, b, m)? {
                            return Ok(());
                        }
                        break;
                    }
                    _ => {
                        if m != 0
                            && let Err(t) = self.other(wi, pc, inst, m)
                        {
                            self.fault_pc = pc;
                            return Err(t);
                        }
                    }
                }
                pc += 1;
            }
        }
    }

    fn control(&mut self, wi: usize, pc: u32, inst: &Inst, m: u32) {
        let (g, id) = (self.g, self.id);
        let w = &mut self.warps[wi];
        let top = w.stack.last_mut().expect("a running warp has a path");
        match &inst.op {
            Op::Bra { target } => {
                let rest = top.mask & !m;
                if rest == 0 {
                    top.pc = *target;
                } else if m == 0 {
                    top.pc = pc + 1;
                } else {
                    self.stats[pc as usize].a += 1;
                    diverge(w, inst.join, &[(pc + 1, rest), (*target, m)]);
                }
            }
            Op::BrxIdx { targets } => {
                let rest = top.mask & !m;
                let mut paths: Vec<(u32, u32)> = Vec::new();
                if rest != 0 {
                    paths.push((pc + 1, rest));
                }
                let a = *w.r(inst.a);
                for l in lanes(m) {
                    let t = targets[(a[l] as usize).min(targets.len() - 1)];
                    match paths.iter_mut().find(|p| p.0 == t) {
                        Some(p) => p.1 |= 1 << l,
                        None => paths.push((t, 1 << l)),
                    }
                }
                if let [(t, _)] = paths[..] {
                    w.stack.last_mut().expect("a running warp has a path").pc = t;
                } else {
                    self.stats[pc as usize].a += 1;
                    diverge(w, inst.join, &paths);
                }
            }
            Op::Call(c) => {
                top.pc = pc + 1;
                if m == 0 {
                    return;
                }
                let f = &g.module.program().funcs[c.func as usize];
                let from = w.base;
                let args: Vec<V> = c.args.iter().map(|a| w.regs[from + a.0 as usize]).collect();
                w.push_frame(f, pc, |w, s| Self::special(g, id, w, s));
                for (a, v) in c.args.iter().zip(args) {
                    *w.r_mut(a.1) = v.0;
                }
                let frame = w.frames.len() as u32 - 1;
                w.stack.push(Path {
                    pc: f.start,
                    mask: m,
                    join: NONE,
                    frame,
                    call: true,
                });
            }
            Op::Ret => {
                top.pc = pc + 1;
                let frame = top.frame as usize;
                let call_pc = w.frames[frame].call_pc;
                if let Op::Call(c) = &g.module.program().insts[call_pc as usize].op {
                    let caller = w.frames[frame - 1].base as usize;
                    for &(from, to) in &c.rets {
                        let v = w.regs[w.base + from as usize].0;
                        let d = &mut w.regs[caller + to as usize].0;
                        for l in lanes(m) {
                            d[l] = v[l];
                        }
                    }
                }
                // The lanes leave every path of this call.
                for p in w.stack.iter_mut().rev() {
                    p.mask &= !m;
                    if p.call {
                        break;
                    }
                }
                drop_empty(w);
            }
            Op::Exit => {
                top.pc = pc + 1;
                for p in &mut w.stack {
                    p.mask &= !m;
                }
                w.alive &= !m;
                drop_empty(w);
                if w.stack.is_empty() {
                    w.state = State::Done;
                    w.flights.clear();
                    self.release_after_exit();
                }
            }
            _ => {}
        }
    }

    fn thread_name(&self, wi: usize, lane: usize) -> String {
        let t = &self.warps[wi].tid;
        format!("({}, {}, {})", t[0][lane], t[1][lane], t[2][lane])
    }

    /// Arrives at a barrier; true if the warp has to wait.
    fn barrier(&mut self, wi: usize, b: &Barrier, m: u32) -> Done<bool> {
        let w = &self.warps[wi];
        let lane = first(m) as usize;
        let id = w.r(b.id)[lane];
        if id >= 16 {
            return fail(lane as u32, format!("barrier {id}: there are 16"));
        }
        if m != w.alive && (b.aligned || b.count == NONE) {
            let missing = first(w.alive & !m) as usize;
            return fail(
                lane as u32,
                format!(
                    "barrier {id} in divergent code: {} of {} threads of the warp are here, thread {} is not",
                    m.count_ones(),
                    w.alive.count_ones(),
                    self.thread_name(wi, missing)
                ),
            );
        }
        let threads: u32 = self.g.block.iter().product();
        let whole = b.count == NONE;
        let expected = if whole { threads } else { w.r(b.count)[lane] };
        if !whole
            && (expected == 0 || expected % 32 != 0 || expected > threads.next_multiple_of(32))
        {
            return fail(
                lane as u32,
                format!("barrier {id} for {expected} threads in a block of {threads}"),
            );
        }
        if whole && m != w.lanes {
            let gone = first(w.lanes & !m) as usize;
            return fail(
                lane as u32,
                format!(
                    "barrier {id} is not reached by all threads: thread {} has ended",
                    self.thread_name(wi, gone)
                ),
            );
        }
        let vote = b.red.map(|(_, _, p, neg)| {
            let p = self.warps[wi].p(p);
            (if neg { !p } else { p }) & m
        });
        let s = &mut self.bars[id as usize];
        if s.threads > 0 && s.expected != expected {
            return fail(
                lane as u32,
                format!(
                    "barrier {id} is used for {} and for {expected} threads",
                    s.expected
                ),
            );
        }
        s.expected = expected;
        // A partial last warp counts whole where a count is given.
        s.threads += if whole { m.count_ones() } else { 32 };
        if let (Some(v), Some((op, ..))) = (vote, b.red) {
            if s.red.is_none() {
                s.votes = if op == BarRed::And { 1 } else { 0 };
                s.red = Some(op);
            }
            match op {
                BarRed::Popc => s.votes += v.count_ones(),
                BarRed::And => s.votes &= u32::from(v == m),
                BarRed::Or => s.votes |= u32::from(v != 0),
            }
        }
        if b.arrive {
            s.heard |= 1 << wi;
        } else {
            s.waiting |= 1 << wi;
            self.warps[wi].state = State::Waiting(id);
        }
        if s.threads >= expected {
            self.open(id);
        }
        Ok(self.warps[wi].state != State::Ready)
    }

    /// Lets everyone at a barrier go on.
    fn open(&mut self, id: u32) {
        let s = std::mem::take(&mut self.bars[id as usize]);
        self.shared.join(s.waiting, s.heard);
        let prog = self.g.module.program();
        for l in lanes(s.waiting) {
            let w = &mut self.warps[l];
            w.state = State::Ready;
            w.sub += 1;
            // The result of a reduction goes to every thread.
            let (pc, m) = w.stack.last().map_or((0, 0), |p| (p.pc - 1, p.mask));
            if let Op::Bar(b) = &prog.insts[pc as usize].op
                && let Some((op, d, ..)) = b.red
            {
                if op == BarRed::Popc {
                    w.put(d, m, &[s.votes; 32]);
                } else {
                    w.put_p(d, m, if s.votes != 0 { u32::MAX } else { 0 });
                }
            }
        }
    }

    /// Without checks, threads that have ended count as arrived, as on the device.
    fn release_after_exit(&mut self) {
        if self.g.checks {
            return;
        }
        let alive: u32 = self.warps.iter().map(|w| w.alive.count_ones()).sum();
        for id in 0..16 {
            let s = &self.bars[id];
            if s.waiting != 0 && s.threads >= alive {
                self.open(id as u32);
            }
        }
    }

    /// The source line of an instruction, for messages.
    pub fn line_of(&self, pc: u32) -> String {
        let prog = self.g.module.program();
        let l = prog.locs[pc as usize];
        match prog.files.iter().find(|f| f.0 == l.file) {
            Some((_, name)) if l.line != 0 => {
                format!(
                    "{}:{}",
                    name.rsplit(['/', '\\']).next().unwrap_or(name),
                    l.line
                )
            }
            _ => format!("PTX line {}", prog.lines[pc as usize]),
        }
    }

    /// A race as an error of `lane`.
    pub fn race(&self, r: &Race, wi: usize, lane: u32, write: bool, at: u32) -> Box<Trouble> {
        let other = match r.lane {
            Some(l) => format!("thread {}", self.thread_name(r.warp as usize, l as usize)),
            None => format!("warp {}", r.warp),
        };
        let how = if r.warp as usize == wi {
            "without a __syncwarp between them"
        } else {
            "without a barrier between them"
        };
        Box::new(Trouble {
            lane,
            what: format!(
                "race in shared memory: this {} of byte {at} and the {} by {other} at {}, {how}",
                if write { "write" } else { "read" },
                if r.write { "write" } else { "read" },
                self.line_of(r.pc)
            ),
            address: Some(u64::from(at)),
        })
    }

    /// Who is running, for the record of shared memory.
    pub fn who(&self, wi: usize, pc: u32) -> Who {
        Who {
            warp: wi as u32,
            sub: self.warps[wi].sub,
            pc,
        }
    }

    /// The allocation that a global address belongs to: the device's or the module's.
    #[inline]
    pub fn alloc_of(&self, addr: u64) -> Option<&'a Alloc> {
        let g = self.g;
        if addr >= super::memory::MODULE_BASE {
            g.module.global(addr)
        } else {
            g.mem.find(addr)
        }
    }
}

fn w_pop(w: &mut Warp) {
    w.stack.pop();
    drop_empty(w);
}

/// The registers in use follow the path on top.
fn enter_top(w: &mut Warp) {
    if let Some(p) = w.stack.last() {
        let frame = p.frame as usize;
        while w.frames.len() > frame + 1 {
            w.pop_frame();
        }
    }
}

fn drop_empty(w: &mut Warp) {
    while w.stack.last().is_some_and(|p| p.mask == 0) {
        w.stack.pop();
    }
    enter_top(w);
}

/// Splits the path on top: the paths run one after the other, the last one first, and meet at `join`.
fn diverge(w: &mut Warp, join: u32, paths: &[(u32, u32)]) {
    let top = w.stack.last_mut().expect("a running warp has a path");
    let (frame, outer) = (top.frame, top.join);
    if join == NONE {
        // They never meet: each goes its own way to the end of the path.
        top.mask = 0;
        // A call's first path stays as its mark.
        if !top.call {
            w.stack.pop();
        }
        for &(pc, mask) in paths {
            w.stack.push(Path {
                pc,
                mask,
                join: outer,
                frame,
                call: false,
            });
        }
        return;
    }
    top.pc = join;
    for &(pc, mask) in paths {
        if pc != join {
            w.stack.push(Path {
                pc,
                mask,
                join,
                frame,
                call: false,
            });
        }
    }
}

fn setp(w: &mut Warp, i: &Inst, c: Cmp, join: Option<BoolOp>, q: u32, m: u32) {
    let t = compare(w, i, i.ty, c);
    let (mut p, mut n) = (t, !t);
    if let Some(op) = join {
        let c = w.p(i.c);
        let c = if i.flag { !c } else { c };
        let f = |x: u32| match op {
            BoolOp::And => x & c,
            BoolOp::Or => x | c,
            BoolOp::Xor => x ^ c,
        };
        (p, n) = (f(p), f(n));
    }
    w.put_p(i.d, m, p);
    w.put_p(q, m, n);
}
