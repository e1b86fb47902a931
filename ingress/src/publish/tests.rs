use std::time::Duration;

use super::{RETRY_AFTER_MAX, RETRY_AFTER_MIN, backoff};

#[test]
fn retry_delays_grow_up_to_the_maximum() {
    let delays: Vec<_> = backoff(RETRY_AFTER_MIN, RETRY_AFTER_MAX).take(50).collect();
    assert_eq!(delays.len(), 50, "the delays never end");
    // Jitter adds up to one minimum.
    assert!(
        delays.iter().all(|delay| *delay <= RETRY_AFTER_MAX * 2),
        "{delays:?}"
    );
    assert!(
        delays[0] < Duration::from_millis(150) && delays[49] >= RETRY_AFTER_MAX,
        "{delays:?}"
    );
}
