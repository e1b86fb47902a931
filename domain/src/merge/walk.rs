//! Where a walk ended, told from its steps in no particular order.
//!
//! Owns the rule of DESIGN's "The last of a second". Knows nodes and steps, not what they stand for.
//!
//! Why it holds: a walk that takes every step once leaves each node as often as it enters it, but for
//! its first, left once more, and its last, entered once more. So if some walk explains the steps,
//! all that do end in the same node. That needs each step to be a change of its own, hence none
//! twice (Stripe may make two events of one change), and the steps to hang together, steps in place
//! included, or one between them is missing.

use std::collections::{BTreeMap, BTreeSet};

/// A step: from a node, or from nothing, to a node. From a node to itself it stays in place.
pub(super) type Step<N> = (Option<N>, N);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End<N> {
    /// Every walk that takes these steps ends here.
    Certain(N),
    /// The one node entered once more than left, though no walk takes these steps once each.
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
    let mut once_more_entered = balance.iter().filter(|(_, balance)| **balance == 1);
    let (Some((Some(end), _)), None) = (once_more_entered.next(), once_more_entered.next()) else {
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

/// How much more often each node is entered than left. Nothing is a node, too.
fn balance<N: Copy + Ord>(steps: &[Step<N>]) -> BTreeMap<Option<N>, i32> {
    let mut balance = BTreeMap::new();
    for (from, to) in steps {
        *balance.entry(*from).or_default() -= 1;
        *balance.entry(Some(*to)).or_default() += 1;
    }
    balance
}

/// Whether two steps are the same. Steps in place may be: they lead nowhere.
fn has_repeated_step<N: Copy + Ord>(steps: &[Step<N>]) -> bool {
    let mut seen = BTreeSet::new();
    let moves = steps.iter().filter(|(from, to)| *from != Some(*to));
    moves.copied().any(|step| !seen.insert(step))
}

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
