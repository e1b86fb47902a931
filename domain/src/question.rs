//! What is to be asked of somebody else: the user lookup, or Stripe's API. Pure.
//!
//! Owns the kinds of questions and what each needs. May not know where they wait or who asks them.

use litestripe_contract::signal::EventReference;
use time::OffsetDateTime;

/// What is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Whether a client reference id is a user's.
    Lookup,
    /// Whether a subscription's Checkout Session came within the grace period.
    Grace,
    /// What Stripe says a subscription is, because its events left it open.
    Fetch,
    /// Nothing: a customer is to be erased.
    Erase,
}

impl Kind {
    /// The kind as the table has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Grace => "grace",
            Self::Fetch => "fetch",
            Self::Erase => "erase",
        }
    }
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// The subscription's id, else the Checkout Session's.
    pub entity_id: String,
    /// What is asked.
    pub kind: Kind,
    /// When it is asked.
    pub due_at: OffsetDateTime,
    /// Until when it is with whoever took it. A question that was put anew meanwhile has another
    /// time in the table, and is theirs no more.
    pub leased_until: OffsetDateTime,
    /// How often it was asked without an answer.
    pub attempts: i32,
    /// The Checkout Session it is about.
    pub checkout_session_id: Option<String>,
    /// Stripe's customer.
    pub stripe_customer_id: Option<String>,
    /// The subscription it is about.
    pub stripe_subscription_id: Option<String>,
    /// The connected account.
    pub stripe_account_id: Option<String>,
    /// The client reference id to look up.
    pub client_reference_id: Option<String>,
    /// Whether something was paid.
    pub is_paid: bool,
    /// Whether it is about live mode.
    pub livemode: bool,
    /// The event that led to it.
    pub event: EventReference,
    /// That event's sequence in `STRIPE_EVENTS`.
    pub stream_sequence: u64,
}
