//! The state of a warp: registers of 32 lanes, the stack of divergent paths, copies in flight.

use super::program::{Function, NONE, Slot};

/// One register of 32 lanes.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub struct V(pub [u32; 32]);

/// A register of 32 bits, all lanes.
pub type R32 = [u32; 32];
/// A register of 64 bits, all lanes.
pub type R64 = [u64; 32];

/// Where some lanes are: a path of a divergent branch, or a call.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    pub pc: u32,
    pub mask: u32,
    /// Where this path ends because others join it there.
    pub join: u32,
    /// Index in [`Warp::frames`].
    pub frame: u32,
    /// The path is a call's body: its end is a `ret`.
    pub call: bool,
}

/// A function's registers on a warp's register stack.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    pub base: u32,
    pub pred_base: u32,
    /// The instruction that called; [`NONE`] for the kernel itself.
    pub call_pc: u32,
}

/// A cp.async of one lane that has not been waited for.
#[derive(Clone, Copy)]
pub struct Flight {
    pub lane: u8,
    pub bytes: u8,
    /// The lane's group that it belongs to.
    pub group: u32,
    pub dst: u32,
    pub data: [u32; 4],
    pub pc: u32,
}

/// What a warp is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Ready,
    /// Waits at the barrier with this number.
    Waiting(u32),
    Done,
}

/// One warp.
pub struct Warp {
    pub id: u32,
    pub regs: Vec<V>,
    pub preds: Vec<u32>,
    pub base: usize,
    pub pred_base: usize,
    pub frames: Vec<Frame>,
    pub stack: Vec<Path>,
    /// Lanes that exist, and of these the ones that have not ended.
    pub lanes: u32,
    pub alive: u32,
    pub state: State,
    /// Instructions executed; also the clock.
    pub clock: u64,
    /// Count of warp-level barriers.
    pub sub: u32,
    pub flights: Vec<Flight>,
    pub commits: [u32; 32],
    /// Values for special registers.
    pub tid: [R32; 3],
}

impl Warp {
    /// The register at `s`.
    #[inline]
    pub fn r(&self, s: Slot) -> &R32 {
        &self.regs[self.base + s as usize].0
    }

    /// The register at `s`, to write.
    #[inline]
    pub fn r_mut(&mut self, s: Slot) -> &mut R32 {
        &mut self.regs[self.base + s as usize].0
    }

    /// The 64-bit register at `s`.
    #[inline]
    pub fn r64(&self, s: Slot) -> &R64 {
        let i = self.base + s as usize;
        let v: &[u64] = bytemuck::cast_slice(&self.regs[i..i + 2]);
        v.try_into()
            .expect("two registers of 32 words are 32 double words")
    }

    /// The 64-bit register at `s`, to write.
    #[inline]
    pub fn r64_mut(&mut self, s: Slot) -> &mut R64 {
        let i = self.base + s as usize;
        let v: &mut [u64] = bytemuck::cast_slice_mut(&mut self.regs[i..i + 2]);
        v.try_into()
            .expect("two registers of 32 words are 32 double words")
    }

    /// Writes the lanes in `m`.
    #[inline(always)]
    pub fn put(&mut self, s: Slot, m: u32, v: &R32) {
        let d = self.r_mut(s);
        if m == u32::MAX {
            *d = *v;
        } else {
            for l in 0..32 {
                d[l] = if m >> l & 1 == 1 { v[l] } else { d[l] };
            }
        }
    }

    /// Writes the lanes in `m` of the first `N` of four registers.
    #[inline]
    pub fn put_all<const N: usize>(&mut self, regs: &[Slot; 4], m: u32, v: &[R32; N]) {
        for (s, v) in regs.iter().zip(v) {
            self.put(*s, m, v);
        }
    }

    /// The first `N` of four registers.
    #[inline]
    pub fn all<const N: usize>(&self, regs: &[Slot; 4]) -> [&R32; N] {
        std::array::from_fn(|k| self.r(regs[k]))
    }

    /// Writes the lanes in `m` of a 64-bit register.
    #[inline(always)]
    pub fn put64(&mut self, s: Slot, m: u32, v: &R64) {
        let d = self.r64_mut(s);
        if m == u32::MAX {
            *d = *v;
        } else {
            for l in 0..32 {
                d[l] = if m >> l & 1 == 1 { v[l] } else { d[l] };
            }
        }
    }

    /// A predicate.
    #[inline]
    pub fn p(&self, i: u32) -> u32 {
        self.preds[self.pred_base + i as usize]
    }

    /// Writes a predicate's lanes in `m`.
    #[inline]
    pub fn put_p(&mut self, i: u32, m: u32, v: u32) {
        if i != NONE {
            let p = &mut self.preds[self.pred_base + i as usize];
            *p = (*p & !m) | (v & m);
        }
    }

    /// Makes room for a function's registers above the present ones and enters it.
    pub fn push_frame(
        &mut self,
        f: &Function,
        call_pc: u32,
        specials: impl Fn(&Warp, super::program::Special) -> R32,
    ) {
        let (base, pred_base) = match self.frames.last() {
            None => (0, 0),
            Some(_) => (self.regs.len(), self.preds.len()),
        };
        self.regs.resize(base + f.slots as usize, V([0; 32]));
        self.preds.resize(pred_base + f.preds as usize, 0);
        self.frames.push(Frame {
            base: base as u32,
            pred_base: pred_base as u32,
            call_pc,
        });
        (self.base, self.pred_base) = (base, pred_base);
        for &(s, v, wide) in &f.consts {
            if wide {
                *self.r64_mut(s) = [v; 32];
            } else {
                *self.r_mut(s) = [v as u32; 32];
            }
        }
        for &(s, sp) in &f.specials {
            let v = specials(self, sp);
            *self.r_mut(s) = v;
        }
    }

    /// Leaves the last function.
    pub fn pop_frame(&mut self) {
        if let Some(f) = self.frames.pop() {
            self.regs.truncate(f.base as usize);
            self.preds.truncate(f.pred_base as usize);
        }
        if let Some(f) = self.frames.last() {
            (self.base, self.pred_base) = (f.base as usize, f.pred_base as usize);
        }
    }
}
