//! When the first signal of a row is sent.
//!
//! A rebuild may find a subscription but not its user, because the stream no longer holds the event
//! with the user. A first signal without the user would take a paying customer's access away. So
//! while a rebuild is open, the first signal of a row that is older than the rebuild is withheld
//! until the row is whole: [`Visible::is_whole`]. A row that is newer than the rebuild is signalled
//! at once.
//!
//! Owns this decision, at every write of a row and at the end of a replay. May not know how a
//! signal is built or stored. Invariant: it never withholds a signal of a row that subscribers
//! know.

use time::OffsetDateTime;

use super::{Signalling, Transition};
use crate::arrival::Arrival;
use crate::event::Body;
use crate::merge::Visible;
use crate::row::{LastSent, Row, Stored};

/// A row that subscribers do not know, after a batch was merged into it.
pub(super) struct Unknown<'r, 'a> {
    pub(super) sent_before: &'r LastSent,
    /// Whether the batch creates the row.
    pub(super) is_new: bool,
    pub(super) after: &'r Visible,
    pub(super) arrivals: &'r [&'a Arrival],
    pub(super) merged: &'r [Transition<'a>],
    /// The start of the open rebuild, if there is one.
    pub(super) rebuilding: Option<OffsetDateTime>,
}

/// What a batch does about the signals of a row.
#[derive(Debug, PartialEq)]
pub(super) enum Decision {
    /// Every change is signalled.
    SendChanges,
    /// The row is signalled once, as it is after the batch.
    SendRow,
    /// The row is signalled at the replay's end, unless subscribers know what it shows.
    Postpone,
    /// What the row shows counts as sent.
    Skip,
    /// Nothing is sent of a row that subscribers do not know.
    Keep(LastSent),
}

/// Decides about a row's signals after a batch. `unknown` is the row if subscribers do not know it.
pub(super) fn decide(signalling: Signalling, unknown: Option<Unknown<'_, '_>>) -> Decision {
    match (signalling, unknown) {
        (Signalling::Now, None) => Decision::SendChanges,
        (Signalling::Now, Some(row)) => row.after_live_events(),
        (Signalling::Later, _) => Decision::Postpone,
        (Signalling::Never, None) => Decision::Skip,
        (Signalling::Never, Some(row)) => Decision::Keep(row.after_silent_replay()),
    }
}

impl Unknown<'_, '_> {
    /// Decides for a batch of live events.
    fn after_live_events(&self) -> Decision {
        let is_whole = self.after.is_whole();
        let is_old = self.is_older_than_rebuild();
        let is_current = self.brings_current_snapshot();
        match self.sent_before {
            LastSent::Withheld if is_whole => Decision::SendRow,
            LastSent::Withheld => Decision::Keep(LastSent::Withheld),
            LastSent::Silent if is_whole && (is_current || !is_old) => Decision::SendRow,
            // Until the silent replay ends, the row may be in any earlier state.
            LastSent::Silent if is_whole => Decision::Keep(LastSent::Nothing),
            // A live event changed it, so its signal is sent even if a silent replay makes
            // it whole.
            LastSent::Silent if is_current => Decision::Keep(LastSent::Withheld),
            LastSent::Silent => Decision::Keep(LastSent::Silent),
            _ if !is_old => Decision::SendChanges,
            _ if is_whole && (is_current || self.is_new) => Decision::SendRow,
            _ if is_current || self.is_new => Decision::Keep(LastSent::Withheld),
            LastSent::Current if self.merged.is_empty() => Decision::Keep(LastSent::Current),
            // The replay has applied only some of the row's events. This one may complete the row,
            // but is not its current state. The signal is sent at the replay's end.
            _ => Decision::Keep(LastSent::Nothing),
        }
    }

    /// Returns `last_sent` after a batch of a replay that sends no signals.
    fn after_silent_replay(&self) -> LastSent {
        match self.sent_before {
            LastSent::Nothing | LastSent::Withheld => LastSent::Nothing,
            _ if self.after.is_whole() => LastSent::Current,
            LastSent::Silent => LastSent::Silent,
            _ if self.is_older_than_rebuild() => LastSent::Silent,
            _ => LastSent::Current,
        }
    }

    /// Whether a rebuild is open and the subscription is older than it, or of unknown age.
    fn is_older_than_rebuild(&self) -> bool {
        let oldest_session = || {
            let sessions = self.arrivals.iter().filter_map(|arrival| arrival.session());
            sessions.filter_map(|session| session.created).min()
        };
        let created = self.after.subscription.created;
        let created = created
            .map(|created| created.unix())
            .or_else(oldest_session);
        self.rebuilding
            .is_some_and(|started| created.is_none_or(|created| created < started.unix_timestamp()))
    }

    /// Whether the row shows the subscription as an event of the batch has it.
    fn brings_current_snapshot(&self) -> bool {
        let last = self.after.last_event.as_ref().map(|(id, _)| id);
        self.merged.iter().any(|transition| {
            let event = &transition.arrival.event;
            matches!(event.body, Body::Subscription(_)) && last == Some(&event.id)
        })
    }
}

/// A rebuild that has applied all its events.
#[derive(Debug, Clone, Copy)]
pub struct Rebuilt {
    pub started: OffsetDateTime,
    /// Whether it applied everything that the stream holds. If so, a subscription whose creation it
    /// applied without a session has none: the session would be in the stream too.
    pub covers_stream: bool,
}

/// Decides at the end of a rebuild whether the first signal of a row is sent or withheld. Returns
/// the row to write, or `None` if nothing changes.
pub fn plan_rebuilt(id: &str, stored: Stored, rebuilt: Rebuilt) -> Option<Row> {
    if stored.revision > 0 {
        return None;
    }
    let row = stored.state.visible();
    let is_known = row.subscription.status.is_some();
    let is_whole = row.is_whole() || (rebuilt.covers_stream && row.created_event_seen && is_known);
    let created = row.subscription.created;
    let is_newer = created.is_some_and(|created| created.get() >= rebuilt.started);
    let last_sent = match stored.last_sent {
        LastSent::Nothing if !is_whole && !is_newer => LastSent::Withheld,
        LastSent::Withheld if is_whole => LastSent::Nothing,
        LastSent::Silent if is_whole => LastSent::Current,
        _ => return None,
    };
    Some(
        Stored {
            last_sent,
            ..stored
        }
        .into_row(id),
    )
}
