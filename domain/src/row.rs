//! A subscription's row as the core sees it. Pure.
//!
//! Owns what is read of a row before a batch and what is written after it. May not know SQL.

use litestripe_contract::signal::{EventReference, Subscription};
use time::OffsetDateTime;

use crate::merge::{State, Visible};

/// What a row is before a batch.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// What its columns are a function of.
    pub state: State,
    /// Grows with every write.
    pub version: i64,
    /// The revision of its last signal; 0 if there was none yet.
    pub revision: i64,
    /// When it was first written. None if it was not, or if that cannot be read.
    pub dt_created: Option<OffsetDateTime>,
    /// The signal that a replay owes, if it owes one.
    pub due: Option<Due>,
}

/// A row to be written.
#[derive(Debug, Default)]
pub struct Row {
    /// The key.
    pub stripe_subscription_id: String,
    /// What its columns are a function of.
    pub state: State,
    /// Its columns.
    pub visible: Visible,
    /// The version that was read, plus one.
    pub version: i64,
    /// The revision of its last signal, this batch's included.
    pub revision: i64,
}

/// A signal of a subscription that waits for the end of a replay.
#[derive(Debug, Clone, PartialEq)]
pub struct Due {
    /// The replay.
    pub replay: String,
    /// What subscribers were told last; None if nothing yet.
    pub told: Option<Subscription>,
    /// Whether it is sent even if nothing changed, under the existing revision.
    pub unchanged: bool,
    /// The event that led to it.
    pub event: EventReference,
}

/// A signal that becomes due.
#[derive(Debug, Clone)]
pub struct NewDue {
    /// The subscription's or orphan's id.
    pub entity_id: String,
    /// Where it will be published.
    pub subject: &'static str,
    /// The rest of it.
    pub due: Due,
}

/// A replay that has not reached its end, and will tell then what it changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilding {
    /// Its name; empty for the one without.
    pub replay: String,
    /// When it was started first.
    pub started: OffsetDateTime,
}
