//! Stripe's API: how it is called, within which budget, and for which mode.

use std::time::Duration;

use backon::BackoffBuilder as _;

pub(crate) mod api;
pub(crate) mod budget;
pub(crate) mod kv;
pub(crate) mod mode;

/// Pauses between tries. Each doubles, up to `longest`, with jitter: no two workers try at the same moment.
fn pauses(first: Duration, longest: Duration) -> impl Iterator<Item = Duration> {
    backon::ExponentialBuilder::new()
        .with_min_delay(first)
        .with_max_delay(longest)
        .without_max_times()
        .with_jitter()
        .build()
}
