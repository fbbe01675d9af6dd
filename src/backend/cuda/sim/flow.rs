//! Where the lanes of a divergent branch meet again: immediate post-dominators.
//!
//! Paths on which lanes end do not count: a branch to a lone `ret` becomes a predicated `exit`, and of several
//! exits the last one in the text that a block can reach is its way out. Otherwise an early `return` in one arm
//! would keep the other lanes from meeting before the end, and every barrier after it would look divergent.

use super::program::{Inst, NONE, Op};

/// Turns branches to exits into exits, and sets `join` of every branch in `insts[start..end]`.
pub fn analyse(insts: &mut [Inst], start: u32, end: u32) {
    let (start, end) = (start as usize, end as usize);
    for i in start..end {
        if let Op::Bra { target } = insts[i].op {
            let to = &insts[target as usize];
            if matches!(to.op, Op::Exit | Op::Ret) && to.guard == NONE {
                insts[i].op = to.op.clone();
            }
        }
    }
    let mut leader = vec![false; end - start + 1];
    leader[0] = true;
    for i in start..end {
        match &insts[i].op {
            Op::Bra { target } => {
                leader[*target as usize - start] = true;
                leader[i + 1 - start] = true;
            }
            Op::BrxIdx { targets } => {
                for t in targets {
                    leader[*t as usize - start] = true;
                }
                leader[i + 1 - start] = true;
            }
            Op::Exit | Op::Ret | Op::Trap if insts[i].guard == NONE => leader[i + 1 - start] = true,
            _ => {}
        }
    }
    let firsts: Vec<usize> = (start..end).filter(|i| leader[i - start]).collect();
    let mut block = vec![0usize; end - start];
    for (b, &f) in firsts.iter().enumerate() {
        let last = firsts.get(b + 1).copied().unwrap_or(end);
        block[f - start..last - start].fill(b);
    }
    let n = firsts.len();
    let last = |b: usize| firsts.get(b + 1).copied().unwrap_or(end) - 1;
    let succ: Vec<Vec<usize>> = (0..n)
        .map(|b| {
            let i = &insts[last(b)];
            let mut s = match &i.op {
                Op::Bra { target } => vec![block[*target as usize - start]],
                Op::BrxIdx { targets } => {
                    targets.iter().map(|t| block[*t as usize - start]).collect()
                }
                _ => vec![],
            };
            let ends = matches!(
                i.op,
                Op::Bra { .. } | Op::BrxIdx { .. } | Op::Exit | Op::Ret | Op::Trap
            );
            if (!ends || i.guard != NONE) && b + 1 < n {
                s.push(b + 1);
            }
            s.sort_unstable();
            s.dedup();
            s
        })
        .collect();

    // The last exit that each block can reach; NONE for a loop without a way out. A trap is no way out.
    let mut way: Vec<Option<usize>> = (0..n)
        .map(|b| {
            let i = &insts[last(b)];
            (matches!(i.op, Op::Exit | Op::Ret) && i.guard == NONE).then_some(b)
        })
        .collect();
    loop {
        let mut changed = false;
        for b in (0..n).rev() {
            let w = succ[b].iter().map(|&s| way[s]).fold(way[b], Option::max);
            changed |= w != way[b];
            way[b] = w;
        }
        if !changed {
            break;
        }
    }
    let succ: Vec<Vec<usize>> = (0..n)
        .map(|b| {
            succ[b]
                .iter()
                .copied()
                .filter(|&s| way[s] == way[b])
                .collect()
        })
        .collect();

    // Post-dominators by iteration over the reversed graph (Cooper, Harvey and Kennedy), each exit being its own root.
    let mut pred = vec![Vec::new(); n];
    for (b, s) in succ.iter().enumerate() {
        for &t in s {
            pred[t].push(b);
        }
    }
    let mut order = Vec::new(); // postorder of the reversed graph
    let mut seen = vec![false; n];
    for root in (0..n).filter(|&b| way[b] == Some(b)) {
        let mut stack = vec![(root, 0)];
        seen[root] = true;
        while let Some((b, i)) = stack.pop() {
            if let Some(&p) = pred[b].get(i) {
                stack.push((b, i + 1));
                if !std::mem::replace(&mut seen[p], true) {
                    stack.push((p, 0));
                }
            } else {
                order.push(b);
            }
        }
    }
    let mut number = vec![0; n];
    for (i, &b) in order.iter().enumerate() {
        number[b] = i;
    }
    let mut idom: Vec<Option<usize>> = (0..n).map(|b| (way[b] == Some(b)).then_some(b)).collect();
    loop {
        let mut changed = false;
        for &b in order.iter().rev() {
            if way[b] == Some(b) {
                continue;
            }
            let mut new: Option<usize> = None;
            for &s in succ[b].iter().filter(|&&s| idom[s].is_some()) {
                new = Some(match new {
                    None => s,
                    Some(mut x) => {
                        let mut y = s;
                        while x != y {
                            while number[x] < number[y] {
                                x = idom[x].expect("numbered blocks have one");
                            }
                            while number[y] < number[x] {
                                y = idom[y].expect("numbered blocks have one");
                            }
                        }
                        x
                    }
                });
            }
            if new != idom[b] {
                idom[b] = new;
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    for b in 0..n {
        let i = last(b);
        if matches!(insts[i].op, Op::Bra { .. } | Op::BrxIdx { .. }) {
            insts[i].join = match idom[b] {
                Some(d) if d != b => firsts[d] as u32,
                _ => NONE,
            };
        }
    }
}
