use std::time::{Duration, Instant};

use super::Throttle;

#[test]
fn one_line_per_interval_counts_the_omitted_lines() {
    let throttle = Throttle::new(Duration::from_secs(60));
    let start = Instant::now();
    let at = |seconds| throttle.admit(start + Duration::from_secs(seconds));
    assert_eq!(at(0), Some(0));
    assert_eq!(at(1), None);
    assert_eq!(at(59), None);
    assert_eq!(at(60), Some(2));
    assert_eq!(at(119), None);
    assert_eq!(at(120), Some(1));
}
