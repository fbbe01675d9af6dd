//! Random cases of a room within its shape rule, and the smallest of a case that fails.
//!
//! A room's own cases say which keys it has and what values they take; a random case is one of them with some values
//! changed. What the shape rule refuses is drawn again.

use super::Room;
use crate::philox::Philox;
use std::collections::BTreeMap;

/// Operations of a random case, at most, as its definition counts them.
const MAX_FLOPS: u64 = 1_000_000;
/// Elements of its operands and results, at most.
const MAX_ELEMENTS: usize = 1 << 15;
/// Extents on which kernels fall apart: one, primes, and one either side of tiles and vectors.
const EXTENTS: &[u64] = &[
    1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 17, 20, 28, 31, 32, 33, 48, 49, 63, 64, 65, 96, 100,
    127, 128, 129, 191, 255, 256, 257,
];

type Values = BTreeMap<String, String>;

fn parse(params: &str) -> Values {
    params
        .split(',')
        .filter_map(|p| p.split_once('='))
        .map(|(k, v)| (k.trim().to_string(), v.trim().to_string()))
        .collect()
}

fn text(values: &Values) -> String {
    let parts: Vec<String> = values.iter().map(|(k, v)| format!("{k}={v}")).collect();
    parts.join(",")
}

/// Whether the shape rule takes the case and it is small enough for the reference.
fn fits(room: &Room, params: &str) -> bool {
    let Ok(case) = room.build(params) else {
        return false;
    };
    let specs: Vec<_> = case.operands.iter().map(|o| o.spec.clone()).collect();
    let Ok(y) = case.op.infer(&specs) else {
        return false;
    };
    let elements: usize = specs.iter().chain(&y).map(|s| s.len()).sum();
    elements <= MAX_ELEMENTS
        && specs.iter().chain(&y).all(|s| !s.is_empty())
        && case.op.cost(&specs, &y).flops <= MAX_FLOPS
}

/// A random case of `room`: its parameters.
pub fn random_case(room: &Room, rng: &mut Philox) -> Option<String> {
    const TRIES: usize = 400;
    let corpus: Vec<Values> = room.cases.iter().map(|c| parse(c)).collect();
    let mut seen: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (k, v) in corpus.iter().flatten() {
        let all = seen.entry(k).or_default();
        if !all.contains(&v.as_str()) {
            all.push(v);
        }
    }
    let pick = |rng: &mut Philox, n: usize| rng.below(n as u32) as usize;
    for _ in 0..TRIES {
        let mut values = corpus.get(pick(rng, corpus.len().max(1)))?.clone();
        for (&key, known) in &seen {
            if rng.uniform() < 0.5 {
                continue;
            }
            let numbers = known.iter().all(|v| v.parse::<u64>().is_ok());
            let switch = known.iter().all(|v| matches!(*v, "0" | "1"));
            // A key that only ever was a small number is a stride, a padding or a switch.
            let small = known.iter().all(|v| v.parse::<u64>().is_ok_and(|v| v <= 4));
            let value = match (numbers, switch, small) {
                (true, true, _) => rng.below(2).to_string(),
                (true, _, true) => (rng.below(4) + 1).to_string(),
                (true, ..) => EXTENTS[pick(rng, EXTENTS.len())].to_string(),
                _ => known[pick(rng, known.len())].to_string(),
            };
            values.insert(key.to_string(), value);
        }
        let params = text(&values);
        if fits(room, &params) {
            return Some(params);
        }
    }
    None
}

/// The smallest case found below `params` that still `fails`: keys left out, numbers made smaller.
pub fn shrink(room: &Room, params: &str, mut fails: impl FnMut(&str) -> bool) -> String {
    let mut now = parse(params);
    loop {
        let mut smaller: Vec<Values> = vec![];
        for (key, value) in &now {
            let mut without = now.clone();
            without.remove(key);
            smaller.push(without);
            if let Ok(v) = value.parse::<u64>() {
                for less in [1, v / 2, v.saturating_sub(1)] {
                    if less > 0 && less < v {
                        let mut with = now.clone();
                        with.insert(key.clone(), less.to_string());
                        smaller.push(with);
                    }
                }
            }
        }
        // Leaving out a key may bring back a large default: only what has fewer elements is smaller.
        let size = |v: &Values| elements(room, &text(v));
        let limit = (size(&now), now.len());
        let next = smaller.into_iter().find(|v| {
            let this = (size(v), v.len());
            this < limit && fits(room, &text(v)) && fails(&text(v))
        });
        match next {
            Some(v) => now = v,
            None => return text(&now),
        }
    }
}

fn elements(room: &Room, params: &str) -> usize {
    room.build(params).map_or(usize::MAX, |c| {
        c.operands.iter().map(|o| o.spec.len()).sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{ROOMS, room};

    #[test]
    fn every_room_has_random_cases_within_its_rule() {
        for room in ROOMS {
            let mut rng = Philox::new(3, 0);
            let mut new = 0;
            for _ in 0..20 {
                let params = random_case(room, &mut rng)
                    .unwrap_or_else(|| panic!("{} has no random case", room.name));
                assert!(fits(room, &params));
                new += usize::from(!room.cases.contains(&params.as_str()));
            }
            assert!(new > 0, "{}", room.name);
        }
    }

    #[test]
    fn the_smallest_failing_case_is_found() {
        let conv = room("conv2d").unwrap();
        // As if everything with more than 4 output channels and a stride failed.
        let fails = |p: &str| {
            let v = parse(p);
            let get = |k: &str| v.get(k).and_then(|v| v.parse::<u64>().ok());
            get("k").is_some_and(|k| k > 4) && get("stride") == Some(2)
        };
        let small = shrink(
            conv,
            "n=3,h=17,w=12,c=8,k=31,r=3,pad=1,stride=2,bias=1",
            fails,
        );
        let v = parse(&small);
        assert_eq!(
            (v["k"].as_str(), v["stride"].as_str()),
            ("5", "2"),
            "{small}"
        );
        assert!(
            !v.contains_key("bias") && v.get("n").is_none_or(|n| n == "1"),
            "{small}"
        );
    }
}
