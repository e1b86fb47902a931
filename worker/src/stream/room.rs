//! How much room streams and the account have. Pure.

use async_nats::jetstream::account::{Account, Limits};

/// Returns the most bytes that the account may store in files. `None` if only the server limits it.
///
/// An account with tiers has its limits there; of one of several tiers, all storage counts.
pub(crate) fn storage_max(account: &Account) -> Option<u64> {
    let tiers = account.tiers.values().map(|tier| tier.limits);
    let limits: Vec<Limits> = if account.tiers.is_empty() {
        vec![account.limits]
    } else {
        tiers.collect()
    };
    let max: Option<i64> = limits.iter().map(|limits| limits.max_storage).sum();
    u64::try_from(max?).ok()
}

/// Returns the limit of a stream in bytes. `None` if it has none.
pub(crate) fn stream_max(max_bytes: i64) -> Option<u64> {
    u64::try_from(max_bytes).ok().filter(|max| *max > 0)
}

/// Returns how much of `max`, which is not 0, is used, rounded down.
pub(crate) fn percent(bytes: u64, max: u64) -> u64 {
    // In 128 bits, because a hundred times a size may not fit in 64.
    let percent = u128::from(bytes) * 100 / u128::from(max);
    u64::try_from(percent).unwrap_or(u64::MAX)
}
