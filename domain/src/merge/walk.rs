//! Finds where a walk ended, from its steps in no particular order.
//!
//! Owns the rule of DESIGN's "The last of a second". Knows nodes and steps, not what they stand
//! for.
//!
//! Why it works: a walk that takes every step once enters each node as often as it leaves it. The
//! exceptions are its first node, which it leaves once more, and its last, which it enters once
//! more. So all walks that explain the steps, if there are any, end at the same node. (If the walk
//! ends where it began, every node balances and the end is unknown.) This needs
//! two conditions. Each step must be a separate change, so no step may occur twice (Stripe may
//! create two events for one change). And the steps, including steps in place, must be connected,
//! or a step between them is missing.

use std::collections::{BTreeMap, BTreeSet};

/// A step from a node, or from nothing, to a node. A step from a node to itself stays in place.
pub(super) type Step<N> = (Option<N>, N);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End<N> {
    /// Every walk that takes these steps ends here.
    Certain(N),
    /// The only node that is entered once more than left, but the steps do not make up a walk: one
    /// is missing or occurs twice.
    Likely(N),
    /// Any of the nodes may be the last.
    Unknown,
}

pub(super) fn end<N: Copy + Ord>(steps: &[Step<N>]) -> End<N> {
    let mut ends = steps.iter().map(|(_, to)| *to);
    let Some(first) = ends.next() else {
        return End::Unknown;
    };
    if ends.all(|end| end == first) {
        return End::Certain(first);
    }
    let balance = balance(steps);
    let mut entered_once_more = balance.iter().filter(|(_, balance)| **balance == 1);
    let (Some((Some(end), _)), None) = (entered_once_more.next(), entered_once_more.next()) else {
        return End::Unknown;
    };
    let unbalanced = balance.values().filter(|balance| **balance != 0).count();
    // The balances sum to 0: if there are two of them and one is 1, the other is -1.
    if unbalanced == 2 && !has_repeated_step(steps) && is_connected(steps) {
        End::Certain(*end)
    } else {
        End::Likely(*end)
    }
}

/// Counts how much more often each node is entered than left. Nothing (`None`) is a node, too.
fn balance<N: Copy + Ord>(steps: &[Step<N>]) -> BTreeMap<Option<N>, i32> {
    let mut balance = BTreeMap::new();
    for (from, to) in steps {
        *balance.entry(*from).or_default() -= 1;
        *balance.entry(Some(*to)).or_default() += 1;
    }
    balance
}

/// Returns whether a step occurs twice. Steps in place may: they lead nowhere.
fn has_repeated_step<N: Copy + Ord>(steps: &[Step<N>]) -> bool {
    let mut seen = BTreeSet::new();
    let moves = steps.iter().filter(|(from, to)| *from != Some(*to));
    moves.copied().any(|step| !seen.insert(step))
}

/// Returns whether the steps connect all their nodes, in whatever direction.
fn is_connected<N: Copy + Ord>(steps: &[Step<N>]) -> bool {
    let mut reached: BTreeSet<Option<N>> =
        steps.first().map(|(from, _)| *from).into_iter().collect();
    let mut left: Vec<&Step<N>> = steps.iter().collect();
    loop {
        let before = left.len();
        left.retain(|(from, to)| {
            let touches = reached.contains(from) || reached.contains(&Some(*to));
            if touches {
                reached.extend([*from, Some(*to)]);
            }
            !touches
        });
        if left.is_empty() || left.len() == before {
            return left.is_empty();
        }
    }
}
