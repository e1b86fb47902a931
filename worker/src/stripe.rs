//! Stripe's API: its client, the endpoints that it delivers to, the request budget that workers
//! share, and the check of the key's mode.

use std::time::Duration;

use backon::BackoffBuilder as _;

pub(crate) mod api;
pub(crate) mod budget;
pub(crate) mod endpoint;
pub(crate) mod kv;
pub(crate) mod mode;
pub(crate) mod path;
pub(crate) mod probe;

/// Returns the pauses between attempts. Each doubles, up to `longest`, with jitter, so that workers
/// do not retry at the same moment.
fn pauses(first: Duration, longest: Duration) -> impl Iterator<Item = Duration> {
    backon::ExponentialBuilder::new()
        .with_min_delay(first)
        .with_max_delay(longest)
        .without_max_times()
        .with_jitter()
        .build()
}
