//! The visible columns as a function of the state, and the changes between two versions of them.
//!
//! Owns which register each column is read from. Every column has one source. Once a subscription
//! event has arrived, the last snapshot alone counts, nulls included. Until then customer, mode and
//! account are the newest Checkout Session's.

use litestripe_contract::event::EventId;
use litestripe_contract::signal::{Subscription, Timestamp};
use serde::Serialize;
use serde_json::{Map, Value};

use super::State;
use super::snapshot::Last;

/// The visible part of a row's state.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Visible {
    /// The columns that signals carry.
    pub subscription: Subscription,
    /// The newest Checkout Session that names the subscription.
    pub checkout_session_id: Option<String>,
    /// The id and `created` of the event that led to the row: the event of the last snapshot or,
    /// before any subscription event, the newest event that named the session or the user.
    pub last_event: Option<(EventId, i64)>,
    /// Whether the subscription's creation event was merged.
    pub created_event_seen: bool,
    /// Whether any Checkout Session was paid.
    pub paid: bool,
    /// Whether Stripe was searched for a Checkout Session and has none that names a user.
    pub searched: bool,
    /// The second of the newest subscription event. A fetch that settles an uncertain row starts at
    /// least 2 s later.
    pub head_created: Option<i64>,
}

impl Visible {
    /// Returns whether the row is whole: it has a status, and a client reference id, a Checkout
    /// Session or a search at Stripe shows which user it belongs to, or that the user is unknown. A
    /// rebuild may have lost the event with the user, so a null client reference id alone means
    /// "not known here".
    pub fn is_whole(&self) -> bool {
        let row = &self.subscription;
        let is_claimed = row.client_reference_id.is_some() || self.checkout_session_id.is_some();
        row.status.is_some() && (is_claimed || self.searched)
    }
}

impl State {
    /// Returns the columns of the row.
    pub fn visible(&self) -> Visible {
        let mut visible = Visible {
            checkout_session_id: self.checkout.session().map(|session| session.id.clone()),
            last_event: self
                .checkout
                .last_event()
                .map(|(created, id)| (id.clone(), created)),
            created_event_seen: self.created_seen,
            paid: self.checkout.paid(),
            searched: self.searched,
            ..Visible::default()
        };
        let row = &mut visible.subscription;
        row.client_reference_id = self.checkout.client_reference_id().map(str::to_owned);
        row.metadata = self.metadata.visible(&self.fetched_metadata);
        if let Some(last) = self.last_snapshot() {
            show_snapshot(&mut visible, &last);
        } else if let Some(session) = self.checkout.session() {
            row.stripe_customer_id.clone_from(&session.customer);
            row.livemode = session.livemode;
            row.stripe_account_id.clone_from(&session.account);
        }
        visible
    }
}

fn show_snapshot(visible: &mut Visible, last: &Last<'_>) {
    let snapshot = last.snapshot;
    // Decoding has checked that each time fits into a `Timestamp`.
    let at = |seconds: Option<i64>| seconds.and_then(|seconds| Timestamp::from_unix(seconds).ok());
    visible.last_event = Some((last.id.clone(), last.created));
    visible.head_created = Some(last.created);
    let row = &mut visible.subscription;
    let customer = snapshot.customer.as_ref();
    row.stripe_customer_id = customer.or(last.details.customer_account.as_ref()).cloned();
    row.status.clone_from(&snapshot.status);
    row.created = at(snapshot.created);
    row.start_date = at(snapshot.start_date);
    row.cancel_at = at(snapshot.cancel_at);
    row.canceled_at = at(snapshot.canceled_at);
    row.ended_at = at(snapshot.ended_at);
    row.trial_end = at(snapshot.trial_end);
    row.current_period_start = at(snapshot.current_period_start);
    row.current_period_end = at(snapshot.current_period_end);
    row.cancel_at_period_end = snapshot.cancel_at_period_end;
    let details = last.details;
    row.cancellation_reason
        .clone_from(&details.cancellation_reason);
    row.trial_start = at(details.trial_start);
    row.collection_method.clone_from(&details.collection_method);
    row.pause_collection.clone_from(&details.pause_collection);
    row.items.clone_from(&snapshot.items);
    row.subscription_metadata.clone_from(&snapshot.metadata);
    row.livemode = last.livemode;
    row.stripe_account_id = last.account.map(str::to_owned);
    row.uncertain = last.uncertain;
}

/// The changed fields, as a signal lists them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Changes {
    /// The names of the fields that changed, in the order of the signal's fields.
    pub changed: Vec<String>,
    /// Their previous values, in the format of a signal.
    pub previous: Map<String, Value>,
}

/// Returns the fields in which `after` differs from `before`, or `None` if they are equal.
pub fn changes(before: &Subscription, after: &Subscription) -> Option<Changes> {
    if before == after {
        return None;
    }
    let mut changes = Changes {
        changed: Vec::new(),
        previous: Map::new(),
    };
    // Destructures all fields, so that a new field of the signal does not compile until it is
    // compared.
    macro_rules! compare {
        ($($field:ident),* $(,)?) => {
            let Subscription { $($field),* } = before;
            $(changes.compare(stringify!($field), $field, &after.$field);)*
        };
    }
    compare!(
        stripe_customer_id,
        client_reference_id,
        status,
        created,
        start_date,
        cancel_at,
        canceled_at,
        cancellation_reason,
        ended_at,
        trial_start,
        trial_end,
        current_period_start,
        current_period_end,
        cancel_at_period_end,
        collection_method,
        pause_collection,
        items,
        metadata,
        subscription_metadata,
        livemode,
        stripe_account_id,
        uncertain,
    );
    Some(changes)
}

impl Changes {
    fn compare<T: PartialEq + Serialize>(&mut self, name: &str, before: &T, after: &T) {
        if before != after {
            // Every field of a signal can be serialised, so the fallback to null is never used.
            let previous = serde_json::to_value(before).unwrap_or(Value::Null);
            self.changed.push(name.to_owned());
            self.previous.insert(name.to_owned(), previous);
        }
    }
}
