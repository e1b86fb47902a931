//! Waits for a condition with a deadline, instead of sleeping for a fixed time.

use std::future::Future;
use std::panic::Location;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// The time between two calls of the probe.
const PAUSE: Duration = Duration::from_millis(20);

/// Calls `probe` until it returns `Ok`, and returns that value.
///
/// `what` completes the sentence "waited for …"; the probe's `Err` says what it saw instead.
///
/// # Panics
/// When `deadline` has passed, also if the probe hangs. The message contains the last value seen.
#[track_caller]
pub fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl AsyncFnMut() -> Result<T, String>,
) -> impl Future<Output = T> {
    let caller = Location::caller();
    async move {
        let end = Instant::now() + deadline;
        let mut last = "nothing: the first probe did not finish".to_owned();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match timeout(left, probe()).await {
                Ok(Ok(value)) => return value,
                Ok(Err(seen)) => last = seen,
                Err(_) => {}
            }
            assert!(
                Instant::now() < end,
                "{caller}: waited {deadline:?} for {what}; last seen: {last}"
            );
            sleep(PAUSE).await;
        }
    }
}
