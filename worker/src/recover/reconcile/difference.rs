//! The differences between a row and Stripe's values. Pure.
//!
//! Owns which columns Stripe's subscription determines, and how a row is compared with them and
//! with its own merge state. Shows names and values of our own columns, but only the keys of
//! metadata, which is the operator's text.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::store::raw::{Fields, RawRow};

/// The columns that Stripe's subscription does not determine: they follow from the events.
const NOT_FROM_STRIPE: [&str; 6] = [
    "checkout_session_id",
    "client_reference_id",
    "last_event_created",
    "last_event_id",
    "metadata",
    "uncertain",
];

/// The columns that contain the operator's text.
const METADATA: [&str; 2] = ["metadata", "subscription_metadata"];

#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Difference {
    pub field: String,
    /// The row's value. For metadata, the keys that differ. For `merge_state`, the columns that the
    /// next event would overwrite with a wrong value.
    pub row: Value,
    /// The expected value, from Stripe or from the row's own merge state.
    pub stripe: Value,
}

impl Difference {
    /// The row was never signalled, because its user is unknown. The repair releases it: with the
    /// user that Stripe knows, or with the fact that Stripe knows none.
    pub(super) fn withheld() -> Self {
        Self {
            field: "withheld".to_owned(),
            row: Value::Bool(true),
            stripe: Value::Bool(false),
        }
    }
}

/// Returns those of `columns` that Stripe's subscription determines.
pub(super) fn stripe_columns(mut columns: Fields) -> Fields {
    columns.retain(|field, _| !NOT_FROM_STRIPE.contains(&field.as_str()));
    columns
}

/// Returns the columns in which `row` differs from Stripe's values or from its own merge state.
///
/// Correct columns with a wrong merge state are a difference too: the next event would write the
/// state's values.
pub(super) fn differences(stripe: &Fields, row: &RawRow) -> Vec<Difference> {
    let Some(columns) = &row.columns else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut overwritten = Vec::new();
    for (field, expected) in stripe {
        if columns[field] != *expected {
            found.push(difference(field, &columns[field], expected));
        } else if row
            .expected
            .as_ref()
            .is_some_and(|state| state[field] != *expected)
        {
            overwritten.push(field);
        }
    }
    let other_columns = row
        .expected
        .iter()
        .flatten()
        .filter(|(field, state)| !stripe.contains_key(*field) && columns[*field] != **state);
    for (field, state) in other_columns {
        // If the state is wrong, or has no value, the column may be right.
        if overwritten.is_empty() && !state.is_null() {
            found.push(difference(field, &columns[field], state));
        } else {
            overwritten.push(field);
        }
    }
    if !overwritten.is_empty() {
        found.push(Difference {
            field: "merge_state".to_owned(),
            row: json!(overwritten),
            stripe: Value::Null,
        });
    }
    found
}

/// Whether the row's merge state agrees with Stripe's values, so that only its columns can be
/// wrong.
pub(super) fn only_columns_differ(stripe: &Fields, row: &RawRow) -> bool {
    row.expected.as_ref().is_some_and(|state| {
        stripe
            .iter()
            .all(|(field, expected)| state[field] == *expected)
    })
}

/// Whether only the column has the client reference id: writing the row from its merge state would
/// lose it.
pub(super) fn only_the_column_knows_the_user(stripe: &Fields, row: &RawRow) -> bool {
    let knows = |fields: &Fields| {
        fields
            .get("client_reference_id")
            .is_some_and(|user| !user.is_null())
    };
    row.columns.as_ref().is_some_and(knows)
        && !row.expected.as_ref().is_some_and(knows)
        && !knows(stripe)
}

fn difference(field: &str, row: &Value, stripe: &Value) -> Difference {
    let (row, stripe) = match (row, stripe) {
        (Value::Object(row), Value::Object(stripe)) if METADATA.contains(&field) => {
            (keys_not_in(row, stripe), keys_not_in(stripe, row))
        }
        _ if METADATA.contains(&field) => (json!("unreadable"), json!("readable")),
        _ => (row.clone(), stripe.clone()),
    };
    Difference {
        field: field.to_owned(),
        row,
        stripe,
    }
}

/// Returns the keys of `map` that `other` lacks or has with another value.
fn keys_not_in(map: &Map<String, Value>, other: &Map<String, Value>) -> Value {
    map.iter()
        .filter(|(key, value)| other.get(*key) != Some(*value))
        .map(|(key, _)| key.as_str())
        .collect()
}

#[cfg(test)]
mod tests;
