//! Points in time on the command line.
//!
//! Owns how `--since`, `--from-time` and similar arguments are parsed, and that none lies in the
//! future.

use std::time::Duration;

use litestripe_contract::settings::{self, DURATION};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Parses a time in RFC 3339.
pub(crate) fn at(text: &str) -> Result<OffsetDateTime, String> {
    let moment = OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|_| "must be a time such as 2026-11-24T02:30:00Z (RFC 3339)".to_owned())?;
    if moment > OffsetDateTime::now_utc() {
        Err("lies in the future".to_owned())
    } else {
        Ok(moment)
    }
}

/// Parses an age such as `2h` and returns the time that long ago.
pub(crate) fn ago(text: &str) -> Result<OffsetDateTime, String> {
    let age: Duration = settings::duration(text).ok_or_else(|| format!("must be {DURATION}"))?;
    let age = time::Duration::try_from(age).map_err(|_| "lies too far back".to_owned())?;
    OffsetDateTime::now_utc()
        .checked_sub(age)
        .ok_or_else(|| "lies too far back".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_parsed_and_refused_in_the_future() {
        assert_eq!(
            at("2026-11-01T00:00:00Z").map(OffsetDateTime::unix_timestamp),
            Ok(1_793_491_200)
        );
        assert_eq!(
            at("2026-11-01T02:00:00+02:00").map(OffsetDateTime::unix_timestamp),
            Ok(1_793_491_200)
        );
        assert_eq!(
            at("9000-01-01T00:00:00Z"),
            Err("lies in the future".to_owned())
        );
        assert!(at("yesterday").is_err_and(|problem| problem.contains("RFC 3339")));
    }

    #[test]
    fn an_age_is_parsed() {
        let then = ago("2h").expect("an age");
        let two_hours = OffsetDateTime::now_utc() - then;
        assert!(
            (7200..7205).contains(&two_hours.whole_seconds()),
            "{two_hours}"
        );
        assert!(ago("-2h").is_err() && ago("soon").is_err());
    }
}
