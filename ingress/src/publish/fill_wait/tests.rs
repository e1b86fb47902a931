use tokio::time::Instant;

use super::FillWait;

/// Whether an open batch with `members` goes on waiting.
fn waits_with(members: usize, wait: &mut FillWait) -> bool {
    wait.end_if_enough(members);
    wait.is_waiting()
}

/// How many of `batches` wait if no answered client ever sends another event.
fn unsuccessful_waits(wait: &mut FillWait, batches: usize) -> usize {
    let run_batch = |wait: &mut FillWait| {
        wait.record_answered(32, 0, Instant::now());
        let waits = waits_with(1, wait);
        if waits {
            wait.record_timeout();
        }
        usize::from(waits)
    };
    (0..batches).map(|_| run_batch(wait)).sum()
}

#[test]
fn a_batch_waits_until_most_answered_clients_sent_their_next_event() {
    let mut wait = FillWait::new(256);
    wait.record_answered(32, 32, Instant::now());
    assert!(waits_with(32, &mut wait));
    assert!(waits_with(55, &mut wait));
    assert!(!waits_with(56, &mut wait));
    assert!(!waits_with(1, &mut wait), "a wait that ended stays ended");
}

#[test]
fn no_batch_waits_after_a_small_one() {
    let mut wait = FillWait::new(256);
    assert!(!waits_with(1, &mut wait), "before the first batch");
    wait.record_answered(7, 0, Instant::now());
    assert!(!waits_with(1, &mut wait));
}

#[test]
fn unsuccessful_waits_become_rare_until_one_succeeds() {
    let mut wait = FillWait::new(256);
    assert!(unsuccessful_waits(&mut wait, 1_000) < 25);
    while !wait.is_waiting() {
        wait.record_answered(32, 0, Instant::now());
    }
    assert!(!waits_with(28, &mut wait), "the clients sent new events");
    wait.record_answered(32, 0, Instant::now());
    assert!(waits_with(1, &mut wait), "the next batch waits again");
}
