use std::io;

use super::*;

const THING: Awaited = Awaited {
    begins: "waiting for a thing",
    ends: "the thing is back",
    first: Duration::from_millis(10),
    longest: Duration::from_millis(40),
    shown: None,
};

fn gone() -> io::Error {
    io::Error::other("gone")
}

#[test]
fn pauses_grow_up_to_the_longest_and_start_over_after_a_success() {
    let mut wait = Wait::new(THING);
    let pauses: Vec<_> = (0..5).map(|_| wait.failed(&gone())).collect();
    // Jitter adds up to the pause itself.
    assert!(pauses[0] < Duration::from_millis(20), "{pauses:?}");
    assert!(
        pauses[4] >= THING.longest && pauses[4] <= 2 * THING.longest,
        "{pauses:?}"
    );
    assert!(wait.is_waiting());
    wait.succeeded();
    assert!(!wait.is_waiting());
    assert!(wait.failed(&gone()) < Duration::from_millis(20));
}

#[test]
fn only_the_last_of_several_waits_reports_the_end() {
    let all = Arc::new(Waiting::default());
    let (mut one, mut other) = (
        Wait::with_others(THING, Arc::clone(&all)),
        Wait::with_others(THING, Arc::clone(&all)),
    );
    one.failed(&gone());
    other.failed(&gone());
    other.failed(&gone());
    assert!(!one.end());
    assert!(other.end());
    assert!(!other.end(), "it has ended already");
    one.failed(&gone());
    drop(one);
    assert_eq!(
        all.0.load(Ordering::Relaxed),
        0,
        "a dropped wait no longer counts"
    );
}
