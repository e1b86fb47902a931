//! Whether the clocks of this program, the database, the broker and Stripe agree.
//!
//! Owns the comparison and its log lines. A clock that is ahead decides nothing early, because the
//! earliest clock counts; one that is behind delays orphans and the erasure of emails, and this
//! says so.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use async_nats::jetstream;
use litestripe_contract::stream::Finding;
use time::OffsetDateTime;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::metrics;
use crate::store::{self, Store};
use crate::stream::progress;
use crate::wait::pause;

/// How far clocks may differ before that is reported: further than synchronised clocks ever do.
const DIFFERENCE_MAX: time::Duration = time::Duration::seconds(60);

/// How the broker's clock is named.
pub(crate) const BROKER: &str = "the broker";

/// How often they are compared.
const CHECK_EVERY: Duration = Duration::from_secs(20);

/// A clock that differs from this program's by more than [`DIFFERENCE_MAX`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Difference {
    /// Whose clock it is, such as `the broker`.
    of: &'static str,
    ahead: time::Duration,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.ahead.whole_seconds();
        let direction = if seconds < 0 { "behind" } else { "ahead of" };
        write!(
            f,
            "{}'s clock is {} s {direction} this program's",
            self.of,
            seconds.unsigned_abs()
        )
    }
}

impl From<Difference> for Finding {
    fn from(difference: Difference) -> Self {
        Self {
            what: difference.to_string(),
            mend: "synchronise the hosts' clocks (NTP)".to_owned(),
        }
    }
}

/// A clock that showed `at` at some moment from `began` to `ended` of ours.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    /// Whose clock it is, such as `the broker`.
    of: &'static str,
    at: OffsetDateTime,
    began: OffsetDateTime,
    ended: OffsetDateTime,
}

impl Reading {
    /// Reads a clock. `None` if `read` cannot.
    pub(crate) async fn take(
        of: &'static str,
        read: impl Future<Output = Option<OffsetDateTime>>,
    ) -> Option<Self> {
        let began = OffsetDateTime::now_utc();
        let at = read.await?;
        Some(Self::new(of, at, began, OffsetDateTime::now_utc()))
    }

    /// A clock that showed `at` between `began` and `ended` of ours.
    pub(crate) fn new(
        of: &'static str,
        at: OffsetDateTime,
        began: OffsetDateTime,
        ended: OffsetDateTime,
    ) -> Self {
        Self {
            of,
            at,
            began,
            ended,
        }
    }

    pub(crate) fn of(&self) -> &'static str {
        self.of
    }

    /// Returns how far the clock differs beyond what the time it took to read it explains.
    fn difference(&self) -> Option<Difference> {
        let ahead = if self.at < self.began {
            self.at - self.began
        } else {
            (self.at - self.ended).max(time::Duration::ZERO)
        };
        (ahead.abs() > DIFFERENCE_MAX).then_some(Difference { of: self.of, ahead })
    }
}

/// Returns what is wrong with the clocks that were read. If several were and all differ in the same
/// direction, this program's is the wrong one.
pub(crate) fn findings(readings: &[Reading]) -> Vec<Finding> {
    let differences: Vec<_> = readings.iter().filter_map(Reading::difference).collect();
    let (first, others) = match differences.as_slice() {
        [first, others @ ..] if !others.is_empty() && differences.len() == readings.len() => {
            (first, others)
        }
        few => return few.iter().copied().map(Finding::from).collect(),
    };
    let is_behind = |difference: &Difference| difference.ahead.is_negative();
    if others
        .iter()
        .any(|other| is_behind(other) != is_behind(first))
    {
        return differences.into_iter().map(Finding::from).collect();
    }
    let all: Vec<_> = differences.iter().map(|differing| differing.of).collect();
    let direction = if is_behind(first) {
        "ahead of"
    } else {
        "behind"
    };
    vec![Finding {
        what: format!(
            "this host's clock is {} s {direction} those of {}",
            first.ahead.whole_seconds().unsigned_abs(),
            all.join(", ")
        ),
        mend: "synchronise this host's clock (NTP)".to_owned(),
    }]
}

/// Logs when the clocks begin to differ and when they agree again, until `shutdown`.
pub(crate) async fn watch(
    store: Store,
    jetstream: jetstream::Context,
    shutdown: CancellationToken,
) {
    let mut differing = BTreeSet::new();
    loop {
        let change = record(&mut differing, compare(&store, &jetstream).await);
        metrics::waiting_for_clocks(!differing.is_empty());
        for difference in change.begun {
            warn!(
                "{difference}: until the clocks agree, grace periods and the erasure of old emails may end late. \
                 Synchronise the hosts' clocks (NTP)"
            );
        }
        if change.all_agree_again {
            info!("the clocks agree again");
        }
        if pause(CHECK_EVERY, &shutdown).await.is_none() {
            return;
        }
    }
}

/// What a comparison has changed.
#[derive(Debug, Default)]
struct Change {
    /// Clocks that agreed before, or were not known to differ.
    begun: Vec<Difference>,
    all_agree_again: bool,
}

/// Records a comparison in `differing`, the clocks that differ. One that was not read is as before.
fn record(differing: &mut BTreeSet<&'static str>, compared: Vec<Comparison>) -> Change {
    let any_differed = !differing.is_empty();
    let mut begun = Vec::new();
    for Comparison { of, difference } in compared {
        match difference {
            Some(difference) if differing.insert(of) => begun.push(difference),
            Some(_) => {}
            None => drop(differing.remove(of)),
        }
    }
    Change {
        begun,
        all_agree_again: any_differed && differing.is_empty(),
    }
}

/// Returns the clocks that differ, of those that can be read now.
pub(crate) async fn differences(store: &Store, jetstream: &jetstream::Context) -> Vec<Difference> {
    let compared = compare(store, jetstream).await;
    compared
        .into_iter()
        .filter_map(|clock| clock.difference)
        .collect()
}

/// A clock that was read.
#[derive(Debug, Clone, Copy)]
struct Comparison {
    of: &'static str,
    difference: Option<Difference>,
}

/// Compares the clocks that can be read now.
async fn compare(store: &Store, jetstream: &jetstream::Context) -> Vec<Comparison> {
    let compared = |reading: Reading| Comparison {
        of: reading.of,
        difference: reading.difference(),
    };
    let read = [read_database(store).await, read_broker(jetstream).await];
    read.into_iter().flatten().map(compared).collect()
}

/// Reads the database's clock.
pub(crate) async fn read_database(store: &Store) -> Option<Reading> {
    let now = async { store::clock::now(store.connection()).await.ok() };
    Reading::take("the database", now).await
}

/// Reads the broker's clock. `None` if the workers' consumer does not exist.
pub(crate) async fn read_broker(jetstream: &jetstream::Context) -> Option<Reading> {
    let now = async { progress::broker_time(jetstream).await.ok().flatten() };
    Reading::take(BROKER, now).await
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use time::macros::datetime;

    use super::{Comparison, Difference, Reading, findings, record};

    #[test]
    fn clocks_agree_again_only_when_they_were_read() {
        let clock = |of, seconds| Comparison {
            of,
            difference: (seconds > 60).then_some(Difference {
                of,
                ahead: time::Duration::seconds(seconds),
            }),
        };
        let mut differing = BTreeSet::new();
        let mut check = |compared: &[Comparison], begun: &[&str], all_agree_again| {
            let change = record(&mut differing, compared.to_vec());
            let found: Vec<_> = change
                .begun
                .iter()
                .map(|difference| difference.of)
                .collect();
            assert_eq!(found, begun, "{compared:?}");
            assert_eq!(change.all_agree_again, all_agree_again, "{compared:?}");
        };
        check(&[clock("database", 0), clock("broker", 0)], &[], false);
        check(
            &[clock("database", 90), clock("broker", 0)],
            &["database"],
            false,
        );
        check(
            &[clock("database", 91), clock("broker", 90)],
            &["broker"],
            false,
        );
        check(&[clock("broker", 0)], &[], false);
        check(&[], &[], false);
        check(&[clock("database", 0)], &[], true);
        check(&[clock("database", 0), clock("broker", 0)], &[], false);
    }

    #[test]
    fn clocks_differ_by_what_no_delay_of_the_answer_explains() {
        let (began, ended) = (
            datetime!(2026-11-29 12:00 UTC),
            datetime!(2026-11-29 12:02 UTC),
        );
        let check = |at, expected: Option<&str>| {
            let found = Reading::new("the broker", at, began, ended).difference();
            let found = found.map(|found| found.to_string());
            assert_eq!(found.as_deref(), expected, "{at}");
        };
        check(datetime!(2026-11-29 11:59 UTC), None);
        check(datetime!(2026-11-29 12:01 UTC), None);
        check(datetime!(2026-11-29 12:03 UTC), None);
        check(
            datetime!(2026-11-29 11:58 UTC),
            Some("the broker's clock is 120 s behind this program's"),
        );
        check(
            datetime!(2026-11-29 13:02 UTC),
            Some("the broker's clock is 3600 s ahead of this program's"),
        );
        for at in [
            datetime!(1970-01-01 00:00 UTC),
            datetime!(9999-12-31 23:59 UTC),
        ] {
            let differs =
                |at, began, ended| Reading::new("the broker", at, began, ended).difference();
            assert!(differs(at, began, ended).is_some());
            assert!(differs(began, at, at).is_some());
        }
    }

    #[test]
    fn if_all_others_differ_in_one_direction_the_own_clock_is_wrong() {
        let now = datetime!(2026-11-29 12:00 UTC);
        let check = |seconds: &[i64], expected: &[&str]| {
            let of = ["the database", "the broker", "Stripe"].into_iter();
            let readings = of.zip(seconds).map(|(of, seconds)| {
                Reading::new(of, now + time::Duration::seconds(*seconds), now, now)
            });
            let found = findings(&Vec::from_iter(readings));
            let found: Vec<_> = found.iter().map(|found| found.what.as_str()).collect();
            assert_eq!(found, expected, "{seconds:?}");
        };
        check(&[0, 0, 0], &[]);
        check(
            &[-7200, -7200, -7201],
            &["this host's clock is 7200 s ahead of those of the database, the broker, Stripe"],
        );
        check(
            &[0, 0, 90],
            &["Stripe's clock is 90 s ahead of this program's"],
        );
        check(
            &[-90, 90],
            &[
                "the database's clock is 90 s behind this program's",
                "the broker's clock is 90 s ahead of this program's",
            ],
        );
        check(
            &[-90],
            &["the database's clock is 90 s behind this program's"],
        );
    }
}
