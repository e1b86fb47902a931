use super::*;

#[test]
fn all_reasons_are_named_until_each_is_cleared() {
    let problems = Problems::default();
    assert_eq!(why_not_ready(None, &problems), None);
    let other = problems.clone();
    other.report("streams", "no limit".to_owned());
    other.report("batches", "permission denied".to_owned());
    let all = "waiting for NATS; batches: permission denied; streams: no limit";
    assert_eq!(why_not_ready(Some("NATS"), &problems).as_deref(), Some(all));
    other.report("batches", "table missing".to_owned());
    other.clear("streams");
    let rest = "batches: table missing";
    assert_eq!(why_not_ready(None, &problems).as_deref(), Some(rest));
    other.clear("batches");
    assert_eq!(why_not_ready(None, &problems), None);
}

#[test]
fn a_problem_with_an_end_is_forgotten_unless_it_is_reported_again() {
    let problems = Problems::default();
    let now = Instant::now();
    let end = now + Duration::from_secs(1);
    problems.report_until("batches", "refused".to_owned(), end);
    assert_eq!(problems.list(now).len(), 1);
    problems.report_until(
        "batches",
        "refused".to_owned(),
        end + Duration::from_secs(1),
    );
    assert_eq!(problems.list(end).len(), 1);
    assert_eq!(problems.list(end + Duration::from_secs(1)).len(), 0);
}
