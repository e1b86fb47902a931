use time::macros::datetime;

use super::received_at;

#[test]
fn the_time_of_receipt_is_written_in_utc_with_milliseconds() {
    assert_eq!(
        received_at(datetime!(2026-11-23 16:47:05.0609 UTC)),
        "2026-11-23T16:47:05.060Z"
    );
    assert_eq!(
        received_at(datetime!(2026-01-01 01:00 +02:00)),
        "2025-12-31T23:00:00.000Z"
    );
}
