use super::{Mark, Seen};

/// A relay's look at the outbox: the first row above the mark, the last id of the sequence, the
/// transactions that have ended, and the next one.
fn seen(first_id: Option<i64>, last_id: i64, ended_below: i64, next_transaction: i64) -> Seen {
    Seen {
        server: 1,
        first_id,
        last_id,
        ended_below,
        next_transaction,
    }
}

#[test]
fn mark_rises_when_all_transactions_that_took_ids_have_ended() {
    let mut mark = Mark::default();
    mark.rise(seen(None, 10, 100, 100));
    // Transaction 99 may have taken id 10 after the first look's snapshot.
    mark.rise(seen(None, 12, 100, 101));
    assert_eq!(mark.id, 0);
    mark.rise(seen(None, 12, 100, 103));
    assert_eq!(mark.id, 0, "transaction 100 may still insert id 9");
    mark.rise(seen(None, 15, 101, 104));
    assert_eq!(mark.id, 10);
}

#[test]
fn mark_stays_below_the_first_waiting_signal() {
    let mut mark = Mark::default();
    mark.rise(seen(Some(4), 10, 100, 100));
    mark.rise(seen(Some(4), 10, 100, 100));
    mark.rise(seen(Some(4), 10, 100, 100));
    assert_eq!(mark.id, 3);
    for _ in 0..3 {
        mark.rise(seen(Some(11), 12, 100, 100));
    }
    assert_eq!(mark.id, 10, "up to 12 is not known to be deleted");
}

#[test]
fn mark_begins_anew_with_the_ids() {
    let mut mark = Mark::default();
    for _ in 0..3 {
        mark.rise(seen(None, 10, 100, 100));
    }
    assert_eq!(mark.id, 10);
    mark.rise(seen(Some(1), 1, 5, 5));
    assert_eq!(mark.id, 0);
}

#[test]
fn mark_begins_anew_at_another_server() {
    let mut mark = Mark::default();
    for _ in 0..3 {
        mark.rise(seen(None, 10, 100, 100));
    }
    assert_eq!(mark.id, 10);
    // A standby that lacked ids 9 and 10, and has given 11 and 12 since.
    let promoted = |first_id| Seen {
        server: 2,
        ..seen(first_id, 12, 200, 200)
    };
    mark.rise(promoted(Some(11)));
    assert_eq!(mark.id, 0);
    mark.rise(promoted(Some(9)));
    mark.rise(promoted(Some(9)));
    assert_eq!(mark.id, 8);
}
