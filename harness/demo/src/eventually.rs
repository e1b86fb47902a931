//! Waiting for a condition instead of sleeping and hoping.

use std::future::Future;
use std::panic::Location;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

/// How long to wait between two looks.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks again and again until `probe` answers `Ok`, and returns what it answered.
///
/// `what` finishes the sentence "waited for …"; the probe's `Err` says what was seen instead.
///
/// # Panics
/// When `deadline` has passed, with the last value seen. A probe that hangs counts as well.
#[track_caller]
pub fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut probe: impl AsyncFnMut() -> Result<T, String>,
) -> impl Future<Output = T> {
    let caller = Location::caller();
    async move {
        let end = Instant::now() + deadline;
        let mut last = "nothing yet: the first look did not end".to_owned();
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
