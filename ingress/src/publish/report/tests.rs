use super::{Report, Trouble};

#[test]
fn trouble_is_logged_when_it_begins_and_not_per_request() {
    let report = Report::new();
    let announced = || report.last.lock().expect("no thread panics").clone();
    report.record_failure(&Trouble::NoAck);
    assert_eq!(announced(), Some(Trouble::NoAck));
    report.record_stored();
    assert_eq!(announced(), None);
    // The same trouble right afterwards is not logged yet: it would fill the log.
    report.record_failure(&Trouble::NoAck);
    assert_eq!(announced(), None);
}
