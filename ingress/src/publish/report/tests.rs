use super::{Report, Trouble};

#[test]
fn trouble_is_announced_when_it_begins_and_not_per_request() {
    let report = Report::new();
    let announced = || report.last.lock().expect("nobody panics").clone();
    report.failed(&Trouble::NoAck);
    assert_eq!(announced(), Some(Trouble::NoAck));
    report.stored();
    assert_eq!(announced(), None);
    // Again at once: not announced yet, so that what comes and goes does not fill the log.
    report.failed(&Trouble::NoAck);
    assert_eq!(announced(), None);
}
