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
