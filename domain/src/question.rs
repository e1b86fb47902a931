//! Questions: what the worker has to find out outside a batch. Pure.
//!
//! The events of a batch do not answer everything: whether a client reference id belongs to a user
//! (the application's user lookup knows), whether a Checkout Session arrives within the grace
//! period (only time shows), what an uncertain subscription is now, or an object that a thin event
//! names (Stripe's API knows). A batch does not wait for these answers. It stores each as a
//! *question*, a row that stays until it is answered, and commits; a task of the worker asks later.
//!
//! A question is *open* until it is answered. It is *due* when `due_at` has passed, and then it is
//! *asked*. An attempt that brings no answer is *retried*: `attempts` grows and `due_at` moves.
//! Once it is *answered*, what follows from the answer is written and the row is deleted. Erasing a
//! deleted customer is stored as a question too, and so is removing a late message of an erased
//! one: they ask for no information, but have to be retried until they are done.
//!
//! Owns the kinds of questions and the data that each needs. May not know how they are stored or
//! asked.

use std::collections::BTreeMap;
use std::time::Duration;

use litestripe_contract::event::EventType;
use litestripe_contract::signal::EventReference;
use litestripe_contract::trace::TraceContext;
use time::OffsetDateTime;

use crate::arrival::Arrival;
use crate::event::{Body, NotifiedObject};
use crate::payment::{AccountId, PaymentIds};
use crate::signal;

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
    /// The current state of an object that changed according to thin events. Asks Stripe's API.
    Notification,
    /// No information: a late message of an erased person is to be removed from its stream.
    Removal,
}

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Lookup,
        Self::Grace,
        Self::Fetch,
        Self::Erase,
        Self::Notification,
        Self::Removal,
    ];

    /// Returns the name of the kind in the table and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Grace => "grace",
            Self::Fetch => "fetch",
            Self::Erase => "erase",
            Self::Notification => "notification",
            Self::Removal => "removal",
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
    Notification(Notified),
    Removal,
}

/// What is needed to ask about the object of thin events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notified {
    pub object: NotifiedObject,
    /// The account that has to be named to fetch it: see `event::Notification`.
    pub context: Option<String>,
    /// The thin events, by type the one that was received last.
    pub notifications: BTreeMap<EventType, EventReference>,
    /// When the question is asked at the latest, however many more thin events come.
    pub ask_by: OffsetDateTime,
}

impl Notified {
    pub fn references(&self) -> Vec<EventReference> {
        self.notifications.values().cloned().collect()
    }
}

/// How long a question waits for more thin events about its object: one change at Stripe often
/// sends several, and one call answers them all.
pub const GATHER: Duration = Duration::from_millis(500);

/// How long it waits if they keep coming.
const GATHER_MAX: Duration = Duration::from_secs(5);

/// Returns the question that a thin event leads to.
pub(crate) fn notification(arrival: &Arrival, now: OffsetDateTime) -> Option<Question> {
    let Body::Notification(notification) = &arrival.event.body else {
        return None;
    };
    let event = signal::reference(&arrival.event);
    let details = Details::Notification(Notified {
        object: notification.object.clone(),
        context: notification.context.clone(),
        notifications: [(event.event_type.clone(), event.clone())].into(),
        ask_by: later(now, GATHER_MAX),
    });
    Some(Question {
        entity_id: notification.object.id().to_owned(),
        details,
        due_at: later(now, GATHER),
        attempts: 0,
        stripe_account_id: arrival.event.stripe_account_id.clone(),
        livemode: arrival.event.livemode,
        event,
        trace: arrival.trace.clone(),
        position: arrival.position(),
    })
}

/// Returns `at` plus `delay`, at most the end of the calendar: an event or a wrong clock may have
/// any date.
pub fn later(at: OffsetDateTime, delay: Duration) -> OffsetDateTime {
    at.saturating_add(time::Duration::try_from(delay).unwrap_or(time::Duration::MAX))
}

/// An open question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The id of the subscription that it is about, else of the Checkout Session. For an erasure,
    /// the customer's id; for a removal, the message's stream and sequence.
    pub entity_id: String,
    pub details: Details,
    pub due_at: OffsetDateTime,
    /// How many attempts brought no answer.
    pub attempts: i32,
    pub stripe_account_id: Option<String>,
    pub livemode: bool,
    /// The event that led to the question.
    pub event: EventReference,
    /// The trace that it belongs to.
    pub trace: Option<TraceContext>,
    /// That event's position: see [`StreamId::position`](crate::arrival::StreamId::position).
    pub position: u64,
}

impl Question {
    /// Returns the account that has to be named to ask Stripe.
    pub fn account(&self) -> Option<AccountId<'_>> {
        let context = match &self.details {
            Details::Notification(notified) => notified.context.as_deref(),
            _ => None,
        };
        context.map(AccountId).or(self.stripe_account())
    }

    /// Returns the connected account that the entity belongs to.
    pub fn stripe_account(&self) -> Option<AccountId<'_>> {
        self.stripe_account_id.as_deref().map(AccountId)
    }

    pub fn kind(&self) -> Kind {
        match self.details {
            Details::Lookup { .. } => Kind::Lookup,
            Details::Grace { .. } => Kind::Grace,
            Details::Fetch => Kind::Fetch,
            Details::Erase => Kind::Erase,
            Details::Notification(_) => Kind::Notification,
            Details::Removal => Kind::Removal,
        }
    }

    /// Replaces the question by a later one of the same kind about the same entity. The thin events
    /// of both are kept.
    pub fn replace(&mut self, mut later: Self) {
        if let (Details::Notification(held), Details::Notification(newer)) =
            (&mut self.details, &mut later.details)
        {
            let notifications = std::mem::take(&mut newer.notifications);
            newer.notifications = std::mem::take(&mut held.notifications);
            newer.notifications.extend(notifications);
            newer.ask_by = newer.ask_by.min(held.ask_by);
            // A redelivered thin event is older than those that came before it.
            later.position = later.position.max(self.position);
        }
        *self = later;
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
            Details::Notification(Notified {
                object: NotifiedObject::CheckoutSession(_),
                ..
            }) => PaymentIds {
                checkout_session_id: entity_id(),
                ..PaymentIds::default()
            },
            Details::Fetch | Details::Notification(_) => PaymentIds {
                stripe_subscription_id: entity_id(),
                ..PaymentIds::default()
            },
            Details::Erase => PaymentIds {
                stripe_customer_id: entity_id(),
                ..PaymentIds::default()
            },
            Details::Removal => PaymentIds::default(),
        }
    }
}
