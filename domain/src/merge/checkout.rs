//! What Checkout Sessions say about a subscription: its user, and the session it came from.
//!
//! Owns the client reference id and the session. Both are last-writer-wins registers. A session
//! without a client reference id does not write that register, so it never erases the id. An
//! operator's resolution of an orphan writes it as a session would.

use litestripe_contract::event::EventId;
use serde::{Deserialize, Serialize};

use super::Latest;
use crate::event::{CheckoutSession, Event};

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Registers {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    client_reference_id: Option<Latest<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    session: Option<Latest<Session>>,
    /// Whether any session was paid. If so, the payment must belong to a user.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    paid: bool,
}

/// The newest session. Its customer, mode and account are shown until a subscription event arrives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Session {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) customer: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) livemode: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) account: Option<String>,
}

impl Registers {
    pub(super) fn merge_session(&mut self, event: &Event, session: &CheckoutSession) -> bool {
        let moved = Latest::merge(&mut self.session, event, || Session {
            id: session.id.clone(),
            customer: session.stripe_customer_id.clone(),
            livemode: event.livemode,
            account: event.stripe_account_id.clone(),
        });
        let first_paid = session.is_paid() && !self.paid;
        self.paid |= first_paid;
        let reference = session.client_reference_id.as_ref();
        moved
            | first_paid
            | reference.is_some_and(|reference| self.merge_reference(event, reference))
    }

    pub(super) fn merge_reference(&mut self, event: &Event, reference: &str) -> bool {
        Latest::merge(&mut self.client_reference_id, event, || {
            reference.to_owned()
        })
    }

    pub(super) fn client_reference_id(&self) -> Option<&str> {
        self.client_reference_id
            .as_ref()
            .map(|latest| latest.value.as_str())
    }

    /// Returns `created` of the event that the client reference id is from.
    pub(super) fn client_reference_created(&self) -> Option<i64> {
        self.client_reference_id
            .as_ref()
            .map(|latest| latest.created)
    }

    pub(super) fn session(&self) -> Option<&Session> {
        self.session.as_ref().map(|latest| &latest.value)
    }

    pub(super) fn paid(&self) -> bool {
        self.paid
    }

    /// Returns the newest of the events that the registers hold.
    pub(super) fn last_event(&self) -> Option<(i64, &EventId)> {
        let reference = self.client_reference_id.as_ref().map(Latest::stamp);
        reference.max(self.session.as_ref().map(Latest::stamp))
    }
}
