//! What a launch did, counted exactly and independent of host threads.

use super::program::{Class, Op, Program};
use std::collections::BTreeMap;

/// Raw counts of one instruction.
#[derive(Clone, Copy, Debug, Default)]
pub struct PcStat {
    /// Times a warp executed it.
    pub warps: u64,
    /// Lanes that took part.
    pub lanes: u64,
    /// Memory: sectors (global) or wavefronts (shared); branches: times it diverged.
    pub a: u64,
    /// Memory: the fewest sectors or wavefronts possible for the bytes that were asked for.
    pub b: u64,
    /// Memory: bytes that were asked for, lane by lane.
    pub bytes: u64,
    /// Memory: requests that accessed something in the counted space.
    pub requests: u64,
    /// Of generic accesses and asynchronous copies: wavefronts in shared memory, and the fewest possible.
    pub shared_a: u64,
    pub shared_b: u64,
    pub shared_requests: u64,
}

impl PcStat {
    /// Adds another's counts.
    pub fn add(&mut self, o: &PcStat) {
        self.warps += o.warps;
        self.lanes += o.lanes;
        self.a += o.a;
        self.b += o.b;
        self.bytes += o.bytes;
        self.requests += o.requests;
        self.shared_a += o.shared_a;
        self.shared_b += o.shared_b;
        self.shared_requests += o.shared_requests;
    }
}

/// Requests to a memory and what they cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Warp-wide requests.
    pub requests: u64,
    /// 32-byte sectors (global memory) or wavefronts (shared memory) that they took.
    pub units: u64,
    /// The fewest that the bytes asked for could take.
    pub ideal: u64,
    /// Bytes asked for, summed over lanes.
    pub bytes: u64,
}

impl Traffic {
    fn add(&mut self, requests: u64, units: u64, ideal: u64, bytes: u64) {
        self.requests += requests;
        self.units += units;
        self.ideal += ideal;
        self.bytes += bytes;
    }

    fn merge(&mut self, o: &Traffic) {
        self.add(o.requests, o.units, o.ideal, o.bytes);
    }

    /// Ideal over actual: 1 is perfect.
    pub fn efficiency(&self) -> f64 {
        if self.units == 0 {
            1.0
        } else {
            self.ideal as f64 / self.units as f64
        }
    }
}

/// Counts of one source line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LineCounters {
    pub file: String,
    pub line: u32,
    /// Warp instructions.
    pub instructions: u64,
    pub global: Traffic,
    pub shared: Traffic,
}

/// Counts of one launch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub blocks: u64,
    pub threads: u64,
    /// Warp instructions, and of all lanes.
    pub instructions: u64,
    pub lane_instructions: u64,
    /// Warp instructions by class.
    pub by_class: BTreeMap<Class, u64>,
    /// Warp-wide `mma` instructions and their floating-point operations (a multiply-add is 2).
    pub mma: u64,
    pub mma_flops: u64,
    pub global_load: Traffic,
    pub global_store: Traffic,
    pub global_atomic: Traffic,
    pub shared_load: Traffic,
    pub shared_store: Traffic,
    /// Block-wide barriers, counted once a warp.
    pub barriers: u64,
    pub branches: u64,
    pub divergent_branches: u64,
    /// By source line, in order of first occurrence; empty without `-lineinfo`.
    pub lines: Vec<LineCounters>,
}

impl Counters {
    /// Bytes that went to and from global memory: whole sectors.
    pub fn global_bytes(&self) -> u64 {
        32 * (self.global_load.units + self.global_store.units + self.global_atomic.units)
    }

    /// Extra wavefronts that shared-memory bank conflicts cost.
    pub fn bank_conflicts(&self) -> u64 {
        (self.shared_load.units - self.shared_load.ideal)
            + (self.shared_store.units - self.shared_store.ideal)
    }

    /// Adds another launch's counts (lines by file and number).
    pub fn merge(&mut self, o: &Counters) {
        self.blocks += o.blocks;
        self.threads += o.threads;
        self.instructions += o.instructions;
        self.lane_instructions += o.lane_instructions;
        for (c, n) in &o.by_class {
            *self.by_class.entry(*c).or_default() += n;
        }
        self.mma += o.mma;
        self.mma_flops += o.mma_flops;
        self.global_load.merge(&o.global_load);
        self.global_store.merge(&o.global_store);
        self.global_atomic.merge(&o.global_atomic);
        self.shared_load.merge(&o.shared_load);
        self.shared_store.merge(&o.shared_store);
        self.barriers += o.barriers;
        self.branches += o.branches;
        self.divergent_branches += o.divergent_branches;
        for l in &o.lines {
            match self
                .lines
                .iter_mut()
                .find(|m| m.line == l.line && m.file == l.file)
            {
                Some(m) => {
                    m.instructions += l.instructions;
                    m.global.merge(&l.global);
                    m.shared.merge(&l.shared);
                }
                None => self.lines.push(l.clone()),
            }
        }
    }

    /// Sums up what was counted by instruction.
    pub fn from_stats(prog: &Program, stats: &[PcStat], blocks: u64, threads: u64) -> Counters {
        let mut c = Counters {
            blocks,
            threads,
            ..Counters::default()
        };
        let mut lines: BTreeMap<(u32, u32), LineCounters> = BTreeMap::new();
        for (pc, s) in stats.iter().enumerate().filter(|s| s.1.warps > 0) {
            let inst = &prog.insts[pc];
            let class = inst.class();
            c.instructions += s.warps;
            c.lane_instructions += s.lanes;
            *c.by_class.entry(class).or_default() += s.warps;
            let (mut global, mut shared) = (Traffic::default(), Traffic::default());
            match &inst.op {
                Op::Mma(m) => {
                    c.mma += s.warps;
                    c.mma_flops += s.warps * 2 * 16 * 8 * u64::from(m.k);
                }
                Op::Bar(_) => c.barriers += s.warps,
                Op::Bra { .. } | Op::BrxIdx { .. } => {
                    c.branches += s.warps;
                    c.divergent_branches += s.a;
                }
                Op::Ld(_)
                | Op::St(_)
                | Op::Atom(_)
                | Op::CpAsync(_)
                | Op::LdMatrix(_)
                | Op::StMatrix(_) => {
                    global.add(
                        s.requests,
                        s.a,
                        s.b,
                        if s.requests > 0 { s.bytes } else { 0 },
                    );
                    let bytes = if s.shared_requests > 0 { s.bytes } else { 0 };
                    shared.add(s.shared_requests, s.shared_a, s.shared_b, bytes);
                    let (g, h) = match &inst.op {
                        Op::Ld(_) => (&mut c.global_load, &mut c.shared_load),
                        Op::St(_) => (&mut c.global_store, &mut c.shared_store),
                        Op::CpAsync(_) => (&mut c.global_load, &mut c.shared_store),
                        Op::LdMatrix(_) => (&mut c.global_load, &mut c.shared_load),
                        Op::StMatrix(_) => (&mut c.global_store, &mut c.shared_store),
                        _ => (&mut c.global_atomic, &mut c.shared_store),
                    };
                    g.merge(&global);
                    h.merge(&shared);
                }
                _ => {}
            }
            let loc = prog.locs[pc];
            if loc.line != 0 {
                let l = lines
                    .entry((loc.file, loc.line))
                    .or_insert_with(|| LineCounters {
                        file: prog
                            .files
                            .iter()
                            .find(|f| f.0 == loc.file)
                            .map(|f| f.1.clone())
                            .unwrap_or_default(),
                        line: loc.line,
                        ..LineCounters::default()
                    });
                l.instructions += s.warps;
                l.global.merge(&global);
                l.shared.merge(&shared);
            }
        }
        c.lines = lines.into_values().collect();
        c
    }
}

/// Distinct 32-byte sectors that accesses of `n` bytes at `addrs` touch, and the fewest that their distinct bytes
/// could take. Accesses are aligned to their size.
pub fn sectors(addrs: &mut [u64], n: u64) -> (u64, u64) {
    if addrs.is_empty() {
        return (0, 0);
    }
    if !addrs.is_sorted() {
        addrs.sort_unstable();
    }
    let (mut count, mut distinct) = (1, 1);
    for w in addrs.windows(2) {
        count += u64::from(w[0] / 32 != w[1] / 32);
        distinct += u64::from(w[0] != w[1]);
    }
    (count, (distinct * n).div_ceil(32))
}

/// Wavefronts that accesses of `n` bytes at shared-memory offsets `addrs` take, and the fewest possible.
///
/// 32 banks of 4 bytes; lanes that ask for the same word share it. Accesses of 8 bytes go by half warps, of 16 bytes
/// by quarters: `lanes` gives the lane of each address.
pub fn wavefronts(addrs: &[u32], lanes: &[u8], n: u32) -> (u64, u64) {
    // Lanes of a group, as a shift; pieces are at least a word.
    let group = match n {
        16 => 3,
        8 => 4,
        _ => 5,
    };
    let piece = n.max(4).trailing_zeros();
    let words = (n / 4).max(1);
    let (mut total, mut ideal, mut i) = (0, 0, 0);
    while i < addrs.len() {
        let g = lanes[i] >> group;
        let end = if addrs.len() == 32 {
            i + (1 << group)
        } else {
            i + lanes[i..].iter().take_while(|&&l| l >> group == g).count()
        };
        // Lanes whose aligned pieces fall on different banks, or are the same, need one wavefront: neighbours always.
        let slots = 128 >> piece;
        let (low, high) = addrs[i..end]
            .iter()
            .fold((u32::MAX, 0), |(low, high), &a| (low.min(a), high.max(a)));
        let free = (high >> piece) - (low >> piece) < slots || {
            let mut table = [u32::MAX; 32];
            addrs[i..end].iter().all(|a| {
                let p = a >> piece;
                let t = &mut table[(p & (slots - 1)) as usize];
                let ok = *t == u32::MAX || *t == p;
                *t = p;
                ok
            })
        };
        if free {
            total += 1;
            ideal += 1;
            i = end;
            continue;
        }
        // The deepest bank decides. Words seen are few: a small table by bank with a chain through the entries.
        let mut depth = [0u8; 32];
        let mut seen: [[u32; 4]; 32] = [[0; 4]; 32];
        let mut more: Vec<u32> = Vec::new();
        let mut max = 0;
        for &a in &addrs[i..end] {
            for w in 0..words {
                let word = a / 4 + w;
                let bank = (word % 32) as usize;
                let d = depth[bank] as usize;
                if seen[bank][..d.min(4)].contains(&word) || (d > 4 && more.contains(&word)) {
                    continue;
                }
                if d < 4 {
                    seen[bank][d] = word;
                } else {
                    more.push(word);
                }
                depth[bank] += 1;
                max = max.max(depth[bank]);
            }
        }
        total += u64::from(max);
        ideal += 1;
        i = end;
    }
    (total, ideal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// By the definition: a group's distinct words, bank by bank.
    fn by_definition(addrs: &[u32], lanes: &[u8], n: u32) -> (u64, u64) {
        let group = match n {
            16 => 8,
            8 => 16,
            _ => 32,
        };
        let (mut total, mut groups) = (0, 0);
        for g in 0..32 / group {
            let mut banks = vec![BTreeSet::new(); 32];
            for (a, l) in addrs.iter().zip(lanes) {
                if l / group == g {
                    for word in a / 4..(a + n).div_ceil(4) {
                        banks[word as usize % 32].insert(word);
                    }
                }
            }
            let depth = banks.iter().map(BTreeSet::len).max().unwrap_or(0);
            total += depth as u64;
            groups += u64::from(depth > 0);
        }
        (total, groups)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Addresses among a few neighbours, some beyond one line of all banks, and all over the place.
        #[test]
        fn wavefronts_are_those_of_the_definition(
            size in 0u32..5,
            span in 2u32..13,
            base in 0u32..64,
            m in prop_oneof![Just(u32::MAX), any::<u32>()],
            places in proptest::array::uniform32(any::<u32>()),
        ) {
            let n = 1 << size;
            let lanes: Vec<u8> = (0..32).filter(|l| m >> l & 1 == 1).collect();
            let place = |&l: &u8| 16 * base + (places[l as usize] & ((1 << span) - 1)) / n * n;
            let addrs: Vec<u32> = lanes.iter().map(place).collect();
            prop_assert_eq!(wavefronts(&addrs, &lanes, n), by_definition(&addrs, &lanes, n));
        }
    }
}
