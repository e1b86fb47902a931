use super::*;

#[test]
fn trouble_is_logged_when_it_begins_and_not_per_request() {
    let (report, now) = (Report::new(), Instant::now());
    let logged = || {
        report
            .locked()
            .as_ref()
            .and_then(|failing| failing.logged.clone())
    };
    report.record_failure(&Trouble::NoAck, now);
    assert_eq!(logged(), Some(Trouble::NoAck));
    report.record_stored();
    assert_eq!(logged(), None);
    // The same trouble right afterwards is not logged yet: it would fill the log.
    report.record_failure(&Trouble::NoAck, now);
    assert_eq!(logged(), None);
}

#[test]
fn ingress_is_not_ready_while_nothing_has_been_stored_for_long() {
    let (report, begin) = (Report::new(), Instant::now());
    let fail = |at| report.record_failure(&Trouble::NoAck, begin + Duration::from_secs(at));
    let trouble = |at| report.lasting_trouble(begin + Duration::from_secs(at));
    fail(0);
    assert_eq!(trouble(59), None, "a single failure");
    fail(29);
    assert_eq!(trouble(29), None);
    fail(30);
    assert_eq!(trouble(30), Some(Trouble::NoAck));
    assert_eq!(trouble(89), Some(Trouble::NoAck));
    assert_eq!(
        trouble(90),
        None,
        "no delivery has come since, so another may succeed"
    );
    fail(91);
    report.record_stored();
    assert_eq!(trouble(91), None);
}
