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
    let pause = || refusals.all_refused(1, now, "refused", now);
    let pauses: Vec<_> = (0..8).map(|_| pause().as_secs()).collect();
    assert_eq!(pauses, [0, 0, 1, 2, 4, 8, 10, 10]);
    refusals.committed(true, now);
    assert_eq!(refusals.all_refused(1, now, "refused", now), Duration::ZERO);
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

    refusals.all_refused(1, began, "permission denied", later);
    assert!(!is_ready(&problems));
    refusals.committed(false, later);
    assert!(!is_ready(&problems), "nothing was written");
    refusals.committed(true, later);
    assert!(is_ready(&problems));
}

#[test]
fn a_fault_of_the_database_makes_no_event_hopeless() {
    let (refusals, now) = (Refusals::default(), Instant::now());
    refusals.committed(true, now);
    assert!(!refusals.is_hopeless(Disposition::Broken, true, 1_000, now));
}

#[test]
fn deliveries_of_a_time_in_which_everything_was_refused_do_not_count() {
    let is_hopeless_after = |count, lasted| {
        let (refusals, began) = (Refusals::default(), Instant::now());
        let ended = began + lasted;
        refusals.all_refused(count, began, "refused", ended);
        // The fault is mended in part.
        move |later| {
            refusals.committed(true, ended + later);
            refusals.is_hopeless(Disposition::Refused, true, 1_000, ended + later)
        }
    };
    let long = is_hopeless_after(EVERYTHING, NOT_WORKING_AFTER);
    assert!(!long(SECOND));
    assert!(!long(TRIED_ANEW - SECOND));
    assert!(long(TRIED_ANEW));
    let first_to_last: Duration = (1..DELIVERIES_MAX).map(redelivery_delay).sum();
    assert!(TRIED_ANEW > first_to_last);

    // A quiet installation, in which one refused event comes alone.
    assert!(is_hopeless_after(1, NOT_WORKING_AFTER)(SECOND));
    assert!(is_hopeless_after(EVERYTHING, SECOND)(SECOND));
}

#[test]
fn readiness_names_refusals_beside_accepted_events_once_they_last() {
    let problems = Problems::default();
    let (refusals, began) = (Refusals::new(problems.clone()), Instant::now());
    let refuse = |at| {
        refusals.committed(true, at);
        refusals.some_refused(1, "permission denied", at);
        refusals.committed(true, at);
        problems.list(at)
    };
    assert!(refuse(began).is_empty());
    let named = ["refused events: permission denied".to_owned()];
    let later = began + NOT_WORKING_AFTER;
    assert_eq!(refuse(later), named);
    assert!(problems.list(later + REFUSAL_LASTS).is_empty());
    assert!(
        refuse(later + REFUSAL_LASTS).is_empty(),
        "others, much later"
    );
}
