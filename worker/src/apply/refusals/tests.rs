use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn is_ready(problems: &Problems) -> bool {
    problems.list(Instant::now()).is_empty()
}

#[test]
fn an_event_refused_sixteen_times_is_hopeless_only_if_others_were_written_lately() {
    let (refusals, now) = (Refusals::default(), Instant::now());
    let is_hopeless =
        |deliveries, now| refusals.is_hopeless(Disposition::Refused, true, deliveries, now);
    assert!(!is_hopeless(1_000, now));
    refusals.committed(false, now);
    assert!(!is_hopeless(1_000, now), "nothing was written");
    refusals.committed(true, now);
    assert!(!is_hopeless(DELIVERIES_MAX - 1, now));
    assert!(is_hopeless(DELIVERIES_MAX, now));
    assert!(!is_hopeless(DELIVERIES_MAX, now + PROOF_LASTS));
    refusals.committed(true, now + SECOND);
    assert!(
        !is_hopeless(DELIVERIES_MAX, now),
        "written after the refusal"
    );
}

#[test]
fn an_event_of_impossible_values_is_hopeless_at_once_if_its_batch_was_written() {
    let (refusals, now) = (Refusals::default(), Instant::now());
    refusals.committed(true, now);
    let is_hopeless =
        |after_others| refusals.is_hopeless(Disposition::Poison, after_others, 1, now);
    assert!(is_hopeless(true));
    assert!(!is_hopeless(false), "everything may be refused since");
}

#[test]
fn the_proof_is_younger_than_the_first_refusal() {
    let first_to_last: Duration = (1..DELIVERIES_MAX).map(redelivery_delay).sum();
    assert_eq!(first_to_last, 331 * SECOND);
    assert!(first_to_last > PROOF_LASTS + DELAY_MAX);
}

#[test]
fn pauses_grow_up_to_their_limits() {
    let (refusals, now) = (Refusals::default(), Instant::now());
    let pause = || refusals.all_refused(now, "refused", now);
    let pauses: Vec<_> = (0..8).map(|_| pause().as_secs()).collect();
    assert_eq!(pauses, [0, 0, 1, 2, 4, 8, 10, 10]);
    refusals.committed(true, now);
    assert_eq!(refusals.all_refused(now, "refused", now), Duration::ZERO);
    assert_eq!(redelivery_delay(1), SECOND);
    assert_eq!(redelivery_delay(u64::MAX), DELAY_MAX);
}

#[test]
fn the_worker_is_not_ready_once_batches_have_failed_for_long() {
    let problems = Problems::default();
    let (refusals, began) = (Refusals::new(problems.clone()), Instant::now());
    let later = began + NOT_WORKING_AFTER;
    refusals.unavailable(began, "read-only", later - SECOND);
    assert!(is_ready(&problems));
    // The beginning counts, not the latest attempt.
    refusals.unavailable(later - SECOND, "read-only", later);
    assert!(!is_ready(&problems));
    refusals.committed(false, later);
    assert!(is_ready(&problems));

    refusals.all_refused(began, "permission denied", later);
    assert!(!is_ready(&problems));
    refusals.committed(false, later);
    assert!(!is_ready(&problems), "nothing was written");
    refusals.committed(true, later);
    assert!(is_ready(&problems));
}
