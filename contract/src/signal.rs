//! The signals that subscribers receive.
//!
//! Owns the JSON bodies and the meaning of their fields; the schemas under `docs/signals` are
//! generated from these types. Invariant: no field can hold an email, a name or an address.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use crate::event::{EventId, EventType};

/// A subscription's row, as subscribers see it. A null is a value: it means that there is none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Subscription {
    /// Stripe's customer. Null if Stripe's object has none, as for customers that are accounts.
    pub stripe_customer_id: Option<String>,
    /// The application's id of the user, taken from the Checkout Session or an
    /// operator's resolution.
    pub client_reference_id: Option<String>,
    /// Stripe's status. A status that Litestripe does not know is passed on unchanged. Null until
    /// the first subscription event arrives.
    pub status: Option<String>,
    /// When the subscription was created.
    pub created: Option<Timestamp>,
    /// When it first started. Earlier than `created` if the subscription was backdated.
    pub start_date: Option<Timestamp>,
    /// When it will be canceled.
    pub cancel_at: Option<Timestamp>,
    /// When its cancellation was requested.
    pub canceled_at: Option<Timestamp>,
    /// Why it was or will be canceled: Stripe's `cancellation_details.reason`.
    pub cancellation_reason: Option<String>,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// When its trial began.
    pub trial_start: Option<Timestamp>,
    /// When its trial ends or ended.
    pub trial_end: Option<Timestamp>,
    /// The earliest start of its items' current periods.
    pub current_period_start: Option<Timestamp>,
    /// The latest end of its items' current periods.
    pub current_period_end: Option<Timestamp>,
    /// Whether it is canceled at the end of the period. See also `cancel_at`: either may be set.
    pub cancel_at_period_end: bool,
    /// How invoices are paid: `charge_automatically` or `send_invoice`.
    pub collection_method: Option<String>,
    /// Set while invoices are not collected. `status` and `access` do not change with it.
    pub pause_collection: Option<PauseCollection>,
    /// The subscribed items.
    pub items: Vec<Item>,
    /// Metadata of the newest event of each type, under `<event type>.<key>`.
    pub metadata: BTreeMap<String, String>,
    /// The subscription's own metadata.
    pub subscription_metadata: BTreeMap<String, String>,
    /// Whether it exists in live mode. False until known.
    pub livemode: bool,
    /// The connected account that the events came from, if any.
    pub stripe_account_id: Option<String>,
    /// Whether the row may not show the latest state: Stripe created several events in the same
    /// second, and their order cannot be determined, or the newest event had only some of the
    /// items.
    pub uncertain: bool,
}

/// How the collection of payments is paused.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct PauseCollection {
    /// What happens to invoices: `keep_as_draft`, `mark_uncollectible` or `void`.
    pub behavior: Option<String>,
    /// When the collection resumes by itself.
    pub resumes_at: Option<Timestamp>,
}

/// One item of a subscription.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Item {
    /// The price's id.
    pub price: Option<String>,
    /// The product's id.
    pub product: Option<String>,
    /// Null for metered prices.
    pub quantity: Option<i64>,
    /// The price's lookup key.
    pub lookup_key: Option<String>,
}

/// What a status means for the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// `trialing`, `active`.
    Granted,
    /// `past_due`: a payment failed and Stripe retries it.
    Grace,
    /// Every other status, including unknown statuses and null.
    Revoked,
}

impl Access {
    /// Returns what `status` means for the application.
    pub fn from_status(status: Option<&str>) -> Self {
        match status {
            Some("trialing" | "active") => Self::Granted,
            Some("past_due") => Self::Grace,
            _ => Self::Revoked,
        }
    }
}

/// The event that led to a signal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EventReference {
    /// Stripe's id of the event.
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub id: EventId,
    /// Stripe's type of the event.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "schema", schemars(with = "String"))]
    pub event_type: EventType,
    /// When Stripe created it, in whole seconds.
    pub created: Timestamp,
}

/// `subscription.changed`: a subscription's row changed. Carries the whole row as it is now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SubscriptionChanged {
    /// Stripe's id of the subscription.
    pub stripe_subscription_id: String,
    /// What `status` means for the application.
    pub access: Access,
    /// The row.
    #[serde(flatten)]
    pub subscription: Subscription,
    /// Grows with every signalled change of this row. Ignore a signal if its revision is not above
    /// the highest one that you have seen for this subscription.
    pub revision: i64,
    /// The revision before this one. If you have not seen it, you missed a signal.
    pub previous_revision: Option<i64>,
    /// The names of the fields that changed.
    pub changed: Vec<String>,
    /// The previous values of the changed fields, by name, in the format of a signal.
    pub previous: serde_json::Map<String, serde_json::Value>,
    /// The event that led to the change.
    pub event: EventReference,
    /// True if no live event led to this signal: a replay changed the row, or the row is sent
    /// again.
    pub replayed: bool,
}

/// Why a payment belongs to no known user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum OrphanReason {
    /// A paid Checkout Session has no client reference id.
    MissingClientReferenceId,
    /// A paid Checkout Session has a client reference id that matches no user.
    UnknownClientReferenceId,
    /// No Checkout Session arrived for a subscription within the grace period.
    NoCheckoutSession,
}

impl OrphanReason {
    /// All reasons.
    pub const ALL: [Self; 3] = [
        Self::MissingClientReferenceId,
        Self::UnknownClientReferenceId,
        Self::NoCheckoutSession,
    ];

    /// Returns the name of the reason in signals and in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::MissingClientReferenceId => "missing_client_reference_id",
            Self::UnknownClientReferenceId => "unknown_client_reference_id",
            Self::NoCheckoutSession => "no_checkout_session",
        }
    }

    /// Parses the name of a reason.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name)
    }
}

/// `orphan.created` and `orphan.resolved`. The email stays in the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Orphan {
    /// The subscription's id, else the Checkout Session's.
    pub orphan_id: String,
    /// Why the payment is an orphan.
    pub reason: OrphanReason,
    /// The Checkout Session that was paid, if one is known.
    pub checkout_session_id: Option<String>,
    /// Stripe's customer, if known.
    pub stripe_customer_id: Option<String>,
    /// The subscription, if there is one.
    pub stripe_subscription_id: Option<String>,
    /// Whether the payment was made in live mode.
    pub livemode: bool,
    /// The event that led to the signal.
    pub event: EventReference,
}

/// A point in time, in UTC, written as RFC 3339 (`2026-11-23T10:00:00Z`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(#[serde(with = "time::serde::rfc3339")] OffsetDateTime);

/// The error for a time outside 0000-01-01 … 9999-12-31, the range that RFC 3339 can write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a point in time that RFC 3339 can write")]
pub struct OutOfRange;

impl Timestamp {
    /// Converts seconds since the Unix epoch, as Stripe writes times.
    pub fn from_unix(seconds: i64) -> Result<Self, OutOfRange> {
        match OffsetDateTime::from_unix_timestamp(seconds) {
            Ok(at) if (0..=9999).contains(&at.year()) => Ok(Self(at)),
            _ => Err(OutOfRange),
        }
    }

    /// Returns the seconds since the Unix epoch.
    pub fn unix(self) -> i64 {
        self.0.unix_timestamp()
    }

    pub fn get(self) -> OffsetDateTime {
        self.0
    }
}

impl std::fmt::Display for Timestamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = self
            .0
            .format(&time::format_description::well_known::Rfc3339)
            .map_err(|_| std::fmt::Error)?;
        f.write_str(&text)
    }
}

impl From<OffsetDateTime> for Timestamp {
    fn from(at: OffsetDateTime) -> Self {
        Self(at.to_offset(time::UtcOffset::UTC))
    }
}

#[cfg(feature = "schema")]
impl schemars::JsonSchema for Timestamp {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Timestamp".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "format": "date-time" })
    }
}
