//! What a row says that Stripe does not. Pure.
//!
//! Owns which columns are Stripe's and how a row as it stands is held against them, and against the
//! row's own merge state. Shows names and values of our own columns; of metadata, which is the
//! operator's text, the keys alone.

use litestripe_contract::signal::{Subscription, Timestamp};
use litestripe_entity::stripe_subscription::Model;
use serde::Serialize;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;

use crate::store::whole::Whole;

/// The visible columns that Stripe's subscription does not tell: they are a function of the events.
const OF_EVENTS: [&str; 4] = ["client_reference_id", "metadata", "stripe_account_id", "uncertain"];

/// The columns whose values are the operator's text.
const METADATA: [&str; 2] = ["metadata", "subscription_metadata"];

/// Who a subscription belongs to, as far as its Checkout Session or a resolved orphan tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Claim {
    /// The session.
    pub(super) checkout_session_id: Option<String>,
    /// The user.
    pub(super) client_reference_id: Option<String>,
}

/// A column in which a row differs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// The column.
    pub field: String,
    /// What stands in it; of metadata the keys that differ, of `merge_state` the columns it would
    /// spoil when the row is written next.
    pub row: Value,
    /// What should, as Stripe or the row's own merge state says.
    pub stripe: Value,
}

/// The columns in which `row` differs from `stripe`, or from what its own merge state says.
///
/// Columns that are right over a merge state that is not are a difference too: the next event would
/// write what the state says.
pub(super) fn differences(stripe: &Subscription, claim: &Claim, row: &Whole) -> Vec<Difference> {
    let Some(columns) = row.columns.as_ref().map(columns) else { return Vec::new() };
    let stripe = fields(stripe);
    let visible = row.state.as_ref().map(|state| state.visible());
    let said = visible.as_ref().map(|visible| {
        let mut said = fields(&visible.subscription);
        said.insert("checkout_session_id".to_owned(), json!(visible.checkout_session_id));
        said
    });
    let said = |field: &str| said.as_ref().map(|said| &said[field]);
    let mut found = Vec::new();
    let mut spoilt = Vec::new();
    for (field, stripe) in stripe.iter().filter(|(field, _)| !OF_EVENTS.contains(&field.as_str())) {
        if columns[field] != *stripe {
            found.push(difference(field, &columns[field], stripe));
        } else if said(field).is_some_and(|said| said != stripe) {
            spoilt.push(field.as_str());
        }
    }
    for (field, claimed) in
        [("client_reference_id", &claim.client_reference_id), ("checkout_session_id", &claim.checkout_session_id)]
    {
        let claimed = json!(claimed);
        let expected = if claimed.is_null() { said(field).unwrap_or(&Value::Null) } else { &claimed };
        if columns[field] != *expected && !expected.is_null() {
            found.push(difference(field, &columns[field], expected));
        } else if said(field).is_some_and(|said| *said != columns[field]) {
            spoilt.push(field);
        }
    }
    for field in ["metadata", "stripe_account_id", "uncertain"] {
        match said(field).filter(|said| **said != columns[field]) {
            // Of a state that is behind nobody knows which of the two is right.
            Some(_) if !spoilt.is_empty() => spoilt.push(field),
            Some(said) => found.push(difference(field, &columns[field], said)),
            None => {}
        }
    }
    if !spoilt.is_empty() {
        found.push(Difference { field: "merge_state".to_owned(), row: json!(spoilt), stripe: Value::Null });
    }
    found
}

/// Whether only the column knows whose the subscription is: writing the row would lose it.
pub(super) fn only_the_column_knows_the_user(claim: &Claim, row: &Whole) -> bool {
    let said = row.state.as_ref().and_then(|state| state.visible().subscription.client_reference_id);
    let column = row.columns.as_ref().and_then(|columns| columns.client_reference_id.as_ref());
    said.is_none() && claim.client_reference_id.is_none() && column.is_some()
}

fn difference(field: &str, row: &Value, stripe: &Value) -> Difference {
    let (row, stripe) = match (row, stripe) {
        (Value::Object(row), Value::Object(stripe)) if METADATA.contains(&field) => {
            (keys_not_in(row, stripe), keys_not_in(stripe, row))
        }
        _ if METADATA.contains(&field) => (json!("unreadable"), json!("readable")),
        _ => (row.clone(), stripe.clone()),
    };
    Difference { field: field.to_owned(), row, stripe }
}

/// The keys whose values `other` does not have.
fn keys_not_in(map: &Map<String, Value>, other: &Map<String, Value>) -> Value {
    map.iter().filter(|(key, value)| other.get(*key) != Some(*value)).map(|(key, _)| key.as_str()).collect()
}

fn fields(subscription: &Subscription) -> Map<String, Value> {
    match serde_json::to_value(subscription) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

/// The columns as signals write them, as far as they can be: what stands in a damaged row need not
/// fit the signal's types.
fn columns(row: &Model) -> Value {
    let at = |at: Option<OffsetDateTime>| {
        // A year that RFC 3339 cannot write is shown all the same.
        at.map(|at| serde_json::to_value(Timestamp::from(at)).unwrap_or_else(|_| json!(at.to_string())))
    };
    json!({
        "stripe_customer_id": row.stripe_customer_id,
        "client_reference_id": row.client_reference_id,
        "checkout_session_id": row.checkout_session_id,
        "status": row.status,
        "created": at(row.created),
        "start_date": at(row.start_date),
        "cancel_at": at(row.cancel_at),
        "canceled_at": at(row.canceled_at),
        "ended_at": at(row.ended_at),
        "trial_end": at(row.trial_end),
        "current_period_start": at(row.current_period_start),
        "current_period_end": at(row.current_period_end),
        "cancel_at_period_end": row.cancel_at_period_end,
        "items": row.items,
        "metadata": row.metadata,
        "subscription_metadata": row.subscription_metadata,
        "livemode": row.livemode,
        "stripe_account_id": row.stripe_account_id,
        "uncertain": row.uncertain,
    })
}
