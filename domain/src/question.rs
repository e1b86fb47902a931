//! Questions: what the worker has to find out outside a batch. Pure.
//!
//! The events of a batch do not answer everything: whether a client reference id belongs to a user
//! (the application's user lookup knows), whether a Checkout Session arrives within the grace
//! period (only time tells), what an uncertain subscription is now (Stripe's API knows). A batch
//! does not wait for these answers. It stores each as a *question*, a row that stays until it is
//! answered, and commits; a task of the worker asks later.
//!
//! A question is *open* until it is answered. It is *due* when `due_at` has passed, and then it is
//! *asked*. An attempt that brings no answer is *retried*: `attempts` grows and `due_at` moves.
//! Once it is *answered*, what follows from the answer is written and the row is deleted. Erasing a
//! deleted customer is stored as a question too: it asks for no information, but has to be retried
//! until it is done.
//!
//! Owns the kinds of questions and the data that each needs. May not know how they are stored or
//! asked.

use litestripe_contract::signal::EventReference;
use time::OffsetDateTime;

use crate::payment::{AccountId, PaymentIds};

/// A kind of question. There is at most one open question of a kind about the same entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Whether a client reference id belongs to a user. Asks the user lookup.
    Lookup,
    /// Whether a subscription's Checkout Session arrived within the grace period. Due at its end.
    Grace,
    /// What the current state of an uncertain subscription is. Asks Stripe's API.
    Fetch,
    /// No information: the data of a customer that was deleted at Stripe is to be erased.
    Erase,
}

impl Kind {
    pub const ALL: [Self; 4] = [Self::Lookup, Self::Grace, Self::Fetch, Self::Erase];

    /// Returns the name of the kind in the table and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Grace => "grace",
            Self::Fetch => "fetch",
            Self::Erase => "erase",
        }
    }

    /// Parses the name of a kind.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == name)
    }
}

/// The kind of a question with the data that asking it needs. [`Kind`] explains each.
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

/// An open question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The id of the subscription that it is about, else of the Checkout Session. For an erasure,
    /// the customer's id.
    pub entity_id: String,
    pub details: Details,
    pub due_at: OffsetDateTime,
    /// How many attempts brought no answer.
    pub attempts: i32,
    pub stripe_account_id: Option<String>,
    pub livemode: bool,
    /// The event that led to the question.
    pub event: EventReference,
    /// That event's sequence in `STRIPE_EVENTS`.
    pub stream_sequence: u64,
}

impl Question {
    pub fn account(&self) -> Option<AccountId<'_>> {
        self.stripe_account_id.as_deref().map(AccountId)
    }

    pub fn kind(&self) -> Kind {
        match self.details {
            Details::Lookup { .. } => Kind::Lookup,
            Details::Grace { .. } => Kind::Grace,
            Details::Fetch => Kind::Fetch,
            Details::Erase => Kind::Erase,
        }
    }

    /// Returns the ids of the payment that it is about.
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
