//! What is to be asked of somebody else: the user lookup, or Stripe's API. Pure.
//!
//! Owns the kinds of questions and what each needs. May not know where they wait or who asks them.

use litestripe_contract::signal::EventReference;
use time::OffsetDateTime;

use crate::payment::{AccountId, PaymentIds};

/// A kind of question. One about the same subject is asked once.
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
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lookup, Self::Grace, Self::Fetch, Self::Erase];

    /// The kind as the table has it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Grace => "grace",
            Self::Fetch => "fetch",
            Self::Erase => "erase",
        }
    }

    /// The kind of which the table has the name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// What is asked, with what the asking needs. [`Kind`] says what each means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Details {
    Lookup {
        payment: PaymentIds,
        client_reference_id: String,
        is_paid: bool,
    },
    Grace {
        stripe_customer_id: Option<String>,
    },
    Fetch,
    Erase,
}

/// A question that waits for its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What it is about: the subscription's id, else the Checkout Session's; the customer's for an erasure.
    pub entity_id: String,
    pub details: Details,
    pub due_at: OffsetDateTime,
    /// How often it was asked without an answer.
    pub attempts: i32,
    pub stripe_account_id: Option<String>,
    pub livemode: bool,
    pub event: EventReference,
    /// That event's sequence in `STRIPE_EVENTS`.
    pub stream_sequence: u64,
}

impl Question {
    pub fn account(&self) -> Option<AccountId<'_>> {
        self.stripe_account_id.as_deref().map(AccountId)
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self.details {
            Details::Lookup { .. } => Kind::Lookup,
            Details::Grace { .. } => Kind::Grace,
            Details::Fetch => Kind::Fetch,
            Details::Erase => Kind::Erase,
        }
    }

    /// The payment it is about.
    pub fn payment(&self) -> PaymentIds {
        let entity_id = || Some(self.entity_id.clone());
        match &self.details {
            Details::Lookup { payment, .. } => payment.clone(),
            Details::Grace { stripe_customer_id } => PaymentIds {
                stripe_customer_id: stripe_customer_id.clone(),
                stripe_subscription_id: entity_id(),
                ..PaymentIds::default()
            },
            Details::Fetch => PaymentIds {
                stripe_subscription_id: entity_id(),
                ..PaymentIds::default()
            },
            Details::Erase => PaymentIds {
                stripe_customer_id: entity_id(),
                ..PaymentIds::default()
            },
        }
    }
}
