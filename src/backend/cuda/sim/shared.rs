//! A block's shared memory, with a record of who touched each word last, to find races.
//!
//! Order between warps comes from barriers: every warp has a clock that moves on at each barrier it passes, and
//! `known[w][v]` is the last clock of warp `v` whose accesses happened before what warp `w` does now. Within a warp,
//! order between lanes comes from `bar.warp.sync` (and block barriers), counted by `sub`. Two accesses to the same
//! byte, one of them a write, by different threads without such an order are a race.

use super::exec::lanes;
use super::program::NONE;
use super::warp::{R32, R64};

/// A lane that stands for several ones.
const MANY: u32 = 63;
/// Every byte of a word.
const WHOLE: u32 = 15;
/// Serial numbers of [`Shared::stamps`] begin again here: five bits below them say which piece it was.
const SERIALS: u32 = 1 << 27;
/// Lanes with disjoint bytes of one word: no statement about lanes of the same warp.
const UNKNOWN: u32 = 62;

/// The last accesses of one kind to a word.
#[derive(Clone, Copy, Default)]
struct Rec {
    epoch: u32,
    /// Warps that did.
    warps: u32,
    /// Count of warp-level barriers and lane of the last one: `sub << 6 | lane`.
    sub_lane: u32,
    /// Instruction, whether it was atomic, and the bytes touched: `pc << 5 | atomic << 4 | bytes`.
    pc_bytes: u32,
}

#[derive(Clone, Copy, Default)]
struct Cell {
    w: Rec,
    r: Rec,
}

/// Two accesses without order.
#[derive(Clone, Copy, Debug)]
pub struct Race {
    /// The earlier access was a write.
    pub write: bool,
    /// Its warp, its lane if known, and its instruction.
    pub warp: u32,
    pub lane: Option<u32>,
    pub pc: u32,
}

/// Who accesses.
#[derive(Clone, Copy)]
pub struct Who {
    pub warp: u32,
    pub sub: u32,
    pub pc: u32,
}

/// Shared memory of one block.
pub struct Shared {
    data: Vec<u32>,
    init: Vec<u64>,
    flight: Vec<u64>,
    flights: u32,
    cells: Vec<Cell>,
    start: u32,
    known: Vec<[u32; 32]>,
    /// By warp: what happened up to this clock, whoever did it, happened before what the warp does now. Nearly every
    /// access passes this one comparison; only the others are looked at warp by warp.
    settled: Vec<u32>,
    /// By word: the last request that began a piece there, `serial << 5 | number of the piece`.
    stamps: Vec<u32>,
    serial: u32,
    /// Size in bytes.
    pub len: u32,
    checks: bool,
}

/// The lowest `n` < 64 bits.
#[inline(always)]
fn bits(n: u32) -> u64 {
    (1 << n) - 1
}

impl Shared {
    /// Memory of `len` bytes for blocks of `warps` warps.
    pub fn new(len: u32, warps: usize, checks: bool) -> Shared {
        let words = len.div_ceil(16) as usize * 4;
        Shared {
            data: vec![0; words],
            init: vec![0; words.div_ceil(16)],
            flight: vec![0; words.div_ceil(16)],
            flights: 0,
            cells: if checks {
                vec![Cell::default(); words]
            } else {
                Vec::new()
            },
            start: 0,
            known: vec![[0; 32]; warps],
            settled: vec![0; warps],
            stamps: vec![0; if checks { words } else { 0 }],
            serial: 0,
            len,
            checks,
        }
    }

    /// A new block begins: nothing is written and nothing touched.
    pub fn reset(&mut self) {
        self.init.fill(0);
        self.flight.fill(0);
        self.flights = 0;
        let last = (0..self.known.len())
            .map(|w| self.known[w][w])
            .max()
            .unwrap_or(0);
        if last > 1 << 30 {
            self.cells.fill(Cell::default());
            self.start = 1;
        } else {
            // Older records are of another block.
            self.start = last + 1;
        }
        for (w, k) in self.known.iter_mut().enumerate() {
            k.fill(0);
            k[w] = self.start;
        }
        self.settle();
    }

    /// After the clocks have moved.
    fn settle(&mut self) {
        let warps = self.known.len();
        for (w, (settled, known)) in self.settled.iter_mut().zip(&self.known).enumerate() {
            // A warp's own accesses at its present clock are ordered only by what else happens within the warp.
            let before = |v: usize| known[v] - u32::from(v == w);
            let all = (0..warps).map(before).min().unwrap_or(0);
            // Older records are of another block.
            *settled = all.max(self.start - 1);
        }
    }

    /// Reads `n` <= 4 bytes inside (aligned).
    #[inline]
    pub fn read(&self, at: u32, n: u32) -> u32 {
        let w = self.data[(at / 4) as usize];
        match n {
            4 => w,
            2 => (w >> (at % 4 * 8)) & 0xffff,
            _ => (w >> (at % 4 * 8)) & 0xff,
        }
    }

    /// Reads `N` words for each lane from its address on (aligned to 4, inside).
    #[inline]
    pub fn read_lanes<const N: usize>(&self, addr: &R64) -> [R32; N] {
        let mut to = [[0; 32]; N];
        for l in 0..32 {
            let i = (addr[l] as u32 / 4) as usize;
            for (t, v) in to.iter_mut().zip(&self.data[i..i + N]) {
                t[l] = *v;
            }
        }
        to
    }

    /// Writes `n` <= 4 bytes inside (aligned).
    #[inline]
    pub fn write(&mut self, at: u32, n: u32, v: u32) {
        let w = &mut self.data[(at / 4) as usize];
        match n {
            4 => *w = v,
            _ => {
                let m = (bits(n * 8) as u32) << (at % 4 * 8);
                *w = (*w & !m) | ((v << (at % 4 * 8)) & m);
            }
        }
    }

    /// Whether `n` <= 16 bytes at `at`, aligned to `n`, are written.
    #[inline]
    pub fn is_init(&self, at: u32, n: u32) -> bool {
        let b = bits(n) << (at % 64);
        self.init[(at / 64) as usize] & b == b
    }

    /// Records that they are.
    #[inline]
    pub fn set_init(&mut self, at: u32, n: u32) {
        self.init[(at / 64) as usize] |= bits(n) << (at % 64);
    }

    /// Whether an asynchronous copy to any of `n` bytes is still in flight.
    #[inline]
    pub fn in_flight(&self, at: u32, n: u32) -> bool {
        self.flights > 0 && self.flight[(at / 64) as usize] & (bits(n) << (at % 64)) != 0
    }

    /// Marks the destination of an asynchronous copy, or takes the mark away.
    pub fn set_flight(&mut self, at: u32, n: u32, on: bool) {
        let b = bits(n) << (at % 64);
        let w = &mut self.flight[(at / 64) as usize];
        if on {
            *w |= b;
            self.flights += 1;
        } else {
            *w &= !b;
            self.flights -= 1;
        }
    }

    #[inline]
    fn unordered(
        known: &[[u32; 32]],
        start: u32,
        rec: &Rec,
        who: &Who,
        lane: u32,
        bytes: u32,
    ) -> bool {
        if rec.epoch < start || rec.pc_bytes & bytes == 0 {
            return false;
        }
        let me = 1u32 << who.warp;
        if rec.warps == me {
            let l = rec.sub_lane & 63;
            return rec.sub_lane >> 6 == who.sub & 0x03ff_ffff
                && rec.epoch == known[who.warp as usize][who.warp as usize]
                && (l == MANY || (l != lane && l != UNKNOWN && lane != UNKNOWN));
        }
        if rec.warps & me != 0 && rec.epoch == known[who.warp as usize][who.warp as usize] {
            // Several warps share the word, this one among them: of a part of it, only its own bytes may be meant.
            return bytes == 15;
        }
        let mut others = rec.warps & !me;
        while others != 0 {
            let v = others.trailing_zeros() as usize;
            others &= others - 1;
            if known[who.warp as usize][v] < rec.epoch {
                return true;
            }
        }
        false
    }

    fn race(rec: &Rec, who: &Who, write: bool) -> Race {
        let other = rec.warps & !(1 << who.warp);
        let warp = if other != 0 {
            other.trailing_zeros()
        } else {
            who.warp
        };
        let lane = rec.sub_lane & 63;
        Race {
            write,
            warp,
            lane: (lane < 32).then_some(lane),
            pc: rec.pc_bytes >> 5,
        }
    }

    #[inline(always)]
    fn record(
        rec: &mut Rec,
        epoch: u32,
        who: &Who,
        lane: u32,
        bytes: u32,
        atomic: bool,
        keep: bool,
    ) {
        let sub_lane = who.sub << 6 | lane;
        let me = 1u32 << who.warp;
        let pc_bytes = who.pc << 5 | u32::from(atomic) << 4 | bytes;
        if rec.epoch != epoch {
            *rec = Rec {
                epoch,
                warps: me,
                sub_lane,
                pc_bytes,
            };
            return;
        }
        let same_sub = rec.warps == me && rec.sub_lane >> 6 == sub_lane >> 6;
        let disjoint = rec.pc_bytes & 15 & !bytes != 0;
        if keep || disjoint {
            let l = if !same_sub || rec.sub_lane == sub_lane {
                lane
            } else if disjoint {
                UNKNOWN
            } else {
                MANY
            };
            rec.warps |= me;
            rec.sub_lane = who.sub << 6 | l;
            rec.pc_bytes = pc_bytes | rec.pc_bytes & 15;
        } else {
            *rec = Rec {
                epoch,
                warps: me,
                sub_lane,
                pc_bytes,
            };
        }
    }

    /// The records of `N` words, from byte `at` on.
    #[inline(always)]
    fn words<const N: usize>(&mut self, at: u32) -> &mut [Cell; N] {
        let i = (at / 4) as usize;
        (&mut self.cells[i..i + N])
            .try_into()
            .expect("N words are N words")
    }

    /// Records that `lane` ([`NONE`]: the whole warp) reads `N` whole words that are written and not in flight, if no
    /// write may be in a race with it; else nothing happens, and [`note_read`](Self::note_read) has to look closer.
    #[inline(always)]
    fn quick_read<const N: usize>(&mut self, at: u32, lane: u32, who: &Who) -> bool {
        let w = who.warp as usize;
        let (settled, epoch) = (self.settled[w], self.known[w][w]);
        let lane = if lane == NONE { MANY } else { lane };
        let cells = self.words::<N>(at);
        if cells.iter().any(|c| c.w.epoch > settled) {
            return false;
        }
        for c in cells {
            Self::record(&mut c.r, epoch, who, lane, WHOLE, false, true);
        }
        true
    }

    /// A read of `n` bytes as one piece, aligned to its size; false where it needs a closer look.
    #[inline]
    pub fn read_piece(&mut self, at: u32, n: u32, lane: u32, who: &Who) -> bool {
        if self.in_flight(at, n) || !self.is_init(at, n) {
            return false;
        }
        match n {
            4 => self.quick_read::<1>(at, lane, who),
            8 => self.quick_read::<2>(at, lane, who),
            16 => self.quick_read::<4>(at, lane, who),
            _ => false,
        }
    }

    /// Records that `lane` writes `n` bytes as one piece, if nothing may be in a race with it; else nothing happens.
    #[inline]
    pub fn write_piece(&mut self, at: u32, n: u32, lane: u32, who: &Who) -> bool {
        match n {
            4 => self.quick_write::<1>(at, lane, who),
            8 => self.quick_write::<2>(at, lane, who),
            16 => self.quick_write::<4>(at, lane, who),
            _ => false,
        }
    }

    #[inline(always)]
    fn quick_write<const N: usize>(&mut self, at: u32, lane: u32, who: &Who) -> bool {
        let w = who.warp as usize;
        let (settled, epoch) = (self.settled[w], self.known[w][w]);
        let cells = self.words::<N>(at);
        if cells
            .iter()
            .any(|c| c.w.epoch > settled || c.r.epoch > settled)
        {
            return false;
        }
        for c in cells {
            Self::record(&mut c.w, epoch, who, lane, WHOLE, false, false);
        }
        true
    }

    /// Records that the lanes in `m` read `n` bytes each, aligned to their size and inside. Lanes that read the same
    /// piece count as one. False where something needs a closer look, lane by lane; then nothing has happened.
    pub fn read_pieces(&mut self, addr: &R64, m: u32, n: u32, who: &Who) -> bool {
        match n {
            4 => self.quick_reads::<1>(addr, m, who),
            8 => self.quick_reads::<2>(addr, m, who),
            16 => self.quick_reads::<4>(addr, m, who),
            _ => false,
        }
    }

    #[inline(always)]
    fn quick_reads<const N: usize>(&mut self, addr: &R64, m: u32, who: &Who) -> bool {
        self.serial += 1;
        if self.serial == SERIALS {
            self.stamps.fill(0);
            self.serial = 1;
        }
        let (mut pieces, mut readers) = ([0u32; 32], [0u32; 32]);
        let mut count = 0;
        let mut add = |l: usize| {
            let at = addr[l] as u32;
            let stamp = &mut self.stamps[(at / 4) as usize];
            if *stamp >> 5 == self.serial {
                readers[(*stamp & 31) as usize] = NONE;
            } else {
                *stamp = self.serial << 5 | count as u32;
                (pieces[count], readers[count]) = (at, l as u32);
                count += 1;
            }
        };
        if m == u32::MAX {
            for l in 0..32 {
                add(l);
            }
        } else {
            for l in lanes(m) {
                add(l);
            }
        }
        let settled = self.settled[who.warp as usize];
        let n = 4 * N as u32;
        let clear = pieces[..count].iter().all(|&at| {
            !self.in_flight(at, n)
                && self.is_init(at, n)
                && self.words::<N>(at).iter().all(|c| c.w.epoch <= settled)
        });
        if clear {
            for (&at, &lane) in pieces[..count].iter().zip(&readers) {
                self.quick_read::<N>(at, lane, who);
            }
        }
        clear
    }

    /// Records that `lane` ([`NONE`]: the whole warp) reads `bytes` (a mask) of a word.
    #[inline]
    pub fn note_read(&mut self, word: u32, bytes: u32, lane: u32, who: &Who) -> Option<Race> {
        if !self.checks {
            return None;
        }
        let lane = if lane == NONE { MANY } else { lane };
        let c = &mut self.cells[word as usize];
        if c.w.epoch >= self.start
            && Self::unordered(&self.known, self.start, &c.w, who, lane, bytes)
        {
            return Some(Self::race(&c.w, who, true));
        }
        let epoch = self.known[who.warp as usize][who.warp as usize];
        Self::record(&mut c.r, epoch, who, lane, bytes, false, true);
        None
    }

    /// Records that `lane` writes `bytes` (a mask) of a word.
    #[inline]
    pub fn note_write(
        &mut self,
        word: u32,
        bytes: u32,
        lane: u32,
        who: &Who,
        atomic: bool,
    ) -> Option<Race> {
        if !self.checks {
            return None;
        }
        let c = &mut self.cells[word as usize];
        if c.r.epoch >= self.start
            && Self::unordered(&self.known, self.start, &c.r, who, lane, bytes)
        {
            return Some(Self::race(&c.r, who, false));
        }
        let both_atomic = atomic && (c.w.pc_bytes >> 4) & 1 == 1;
        if c.w.epoch >= self.start
            && !both_atomic
            && Self::unordered(&self.known, self.start, &c.w, who, lane, bytes)
        {
            return Some(Self::race(&c.w, who, true));
        }
        let epoch = self.known[who.warp as usize][who.warp as usize];
        Self::record(&mut c.w, epoch, who, lane, bytes, atomic, both_atomic);
        None
    }

    /// The warps in `mask` have passed a barrier together; `heard` are those that had arrived without waiting.
    pub fn join(&mut self, mask: u32, heard: u32) {
        let mut all = [0u32; 32];
        for (w, known) in self.known.iter().enumerate() {
            if (mask | heard) >> w & 1 == 1 {
                for (a, k) in all.iter_mut().zip(known) {
                    *a = (*a).max(*k);
                }
            }
        }
        let next = all.iter().max().copied().unwrap_or(0) + 1;
        for (w, k) in self.known.iter_mut().enumerate() {
            if mask >> w & 1 == 1 {
                *k = all;
                k[w] = next;
            }
        }
        self.settle();
    }
}
