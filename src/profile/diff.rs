//! Two recorded profiles side by side.

use super::{Launch, Profile};
use serde::Serialize;
use std::collections::BTreeMap;

/// One node (layer, op and shape) in both profiles.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Change {
    /// `backward layer1.0.conv1 conv2d_dgrad`.
    pub name: String,
    /// Operands and results.
    pub shape: String,
    /// Kernels before, where the device names them.
    pub kernels: [String; 2],
    /// Seconds before and after; `None` where it is not there.
    pub seconds: [Option<f64>; 2],
    /// Warp instructions before and after, on the simulator.
    pub instructions: [u64; 2],
}

impl Change {
    /// Seconds after less seconds before.
    pub fn delta(&self) -> f64 {
        self.seconds[1].unwrap_or(0.0) - self.seconds[0].unwrap_or(0.0)
    }

    fn weight(&self) -> f64 {
        let [a, b] = self.instructions;
        self.delta().abs() + 1e-12 * a.abs_diff(b) as f64
    }
}

/// What changed from `a` to `b`, the largest first.
pub fn diff(a: &Profile, b: &Profile) -> Vec<Change> {
    let mut all: BTreeMap<(String, String, usize), Change> = BTreeMap::new();
    for (side, p) in [a, b].into_iter().enumerate() {
        let mut seen: BTreeMap<(String, String), (usize, usize)> = BTreeMap::new();
        for l in &p.launches {
            let name = format!("{} {} {}", l.phase, l.scope, l.op);
            // The n-th node of that name; a node's launches count together.
            let known = (name.clone(), l.shape.clone());
            let turn = seen.entry(known).or_insert((0, l.node));
            if turn.1 != l.node {
                *turn = (turn.0 + 1, l.node);
            }
            let key = (name.clone(), l.shape.clone(), turn.0);
            let change = all.entry(key).or_default();
            change.name = name;
            change.shape.clone_from(&l.shape);
            add(change, side, l);
        }
    }
    let mut changes: Vec<Change> = all.into_values().collect();
    changes.sort_by(|x, y| y.weight().total_cmp(&x.weight()));
    changes
}

fn add(change: &mut Change, side: usize, l: &Launch) {
    *change.seconds[side].get_or_insert(0.0) += l.seconds;
    change.instructions[side] += l.counted.as_ref().map_or(0, |c| c.instructions);
    let kernels = &mut change.kernels[side];
    if !kernels.is_empty() {
        kernels.push_str(" + ");
    }
    kernels.push_str(&l.kernel);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::model::Direction;

    #[test]
    fn the_largest_change_comes_first() {
        let a = crate::profile::tests::tiny(Direction::Infer);
        let mut b = a.clone();
        b.launches[2].seconds += 1.0;
        let changes = diff(&a, &b);
        assert_eq!(changes.len(), a.launches.len());
        assert!(changes[0].name.contains(&a.launches[2].op));
        assert!((changes[0].delta() - 1.0).abs() < 1e-9);
        assert_eq!(changes[1].delta(), 0.0);
        b.launches.pop();
        assert!(diff(&a, &b).iter().any(|c| c.seconds[1].is_none()));
    }
}
