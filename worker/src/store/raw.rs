//! `stripe_subscription`: rows as they are stored, even if they are damaged.
//!
//! Owns reading and repairing the columns, which a batch never reads, and listing the ids. Trusts
//! only the key and the version of a row: a person or a half-restored backup may have written the
//! rest.

use std::collections::HashMap;

use litestripe_contract::signal::Timestamp;
use litestripe_domain::merge::{State, Visible};
use litestripe_domain::row::LastSent;
use litestripe_entity::stripe_subscription::{ActiveModel, Column, Entity, Model};
use sea_orm::{
    ActiveModelTrait as _, ActiveValue::Set, ColumnTrait as _, ConnectionTrait, EntityTrait as _,
    ExprTrait as _, FromQueryResult as _, IdenStatic as _, Iterable as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, QueryTrait as _, Value,
};
use serde_json::{Map, json};
use time::OffsetDateTime;

use crate::error::StoreError;

/// Columns by name, with times written as in signals.
pub type Fields = Map<String, serde_json::Value>;

/// A row as it is stored.
#[derive(Debug, Clone)]
pub struct RawRow {
    /// Grows with every write.
    pub version: i64,
    /// The columns. `None` if the value of one is not of the column's type, which only SQLite
    /// allows.
    pub columns: Option<Fields>,
    /// The merge state, which determines the columns. `None` if it cannot be read.
    pub state: Option<State>,
    /// The columns that the merge state determines.
    pub expected: Option<Fields>,
    /// Whether its first signal is withheld until its user is known.
    pub is_withheld: bool,
}

/// Returns the rows of `ids` that exist.
pub async fn find<C: ConnectionTrait>(
    db: &C,
    ids: &[&str],
) -> Result<HashMap<String, RawRow>, StoreError> {
    let doing = StoreError::doing("read subscriptions");
    let rows = Entity::find()
        .filter(Column::StripeSubscriptionId.is_in(ids.iter().copied()))
        .into_query();
    let mut found = HashMap::new();
    for row in db.query_all(&rows).await.map_err(&doing)? {
        let id = row.try_get("", "stripe_subscription_id").map_err(&doing)?;
        let version = row.try_get("", "version").map_err(&doing)?;
        let state = row
            .try_get("", "merge_state")
            .ok()
            .and_then(|state: String| serde_json::from_str(&state).ok());
        let columns = Model::from_query_result(&row, "")
            .ok()
            .map(|model| fields(&model.into()));
        let expected = state.as_ref().map(columns_of);
        let last_sent: Option<String> = row.try_get("", "last_sent").ok().flatten();
        let is_withheld = LastSent::from_json(last_sent.as_deref()).is_withheld();
        found.insert(
            id,
            RawRow {
                version,
                columns,
                state,
                expected,
                is_withheld,
            },
        );
    }
    Ok(found)
}

/// Returns the columns of a row with this merge state.
pub fn columns_of(state: &State) -> Fields {
    fields(&columns(state.visible()))
}

fn columns(visible: Visible) -> ActiveModel {
    let subscription = visible.subscription;
    let (last_event_id, last_event_created) = visible.last_event.unzip();
    let time = |at: Option<Timestamp>| Set(at.map(Timestamp::get));
    ActiveModel {
        stripe_customer_id: Set(subscription.stripe_customer_id),
        client_reference_id: Set(subscription.client_reference_id),
        checkout_session_id: Set(visible.checkout_session_id),
        status: Set(subscription.status),
        created: time(subscription.created),
        start_date: time(subscription.start_date),
        cancel_at: time(subscription.cancel_at),
        canceled_at: time(subscription.canceled_at),
        cancel_at_period_end: Set(subscription.cancel_at_period_end),
        current_period_start: time(subscription.current_period_start),
        current_period_end: time(subscription.current_period_end),
        trial_end: time(subscription.trial_end),
        ended_at: time(subscription.ended_at),
        trial_start: time(subscription.trial_start),
        collection_method: Set(subscription.collection_method),
        cancellation_reason: Set(subscription.cancellation_reason),
        pause_collection: Set(subscription.pause_collection.map(|pause| json!(pause))),
        items: Set(json!(subscription.items)),
        metadata: Set(json!(subscription.metadata)),
        subscription_metadata: Set(json!(subscription.subscription_metadata)),
        livemode: Set(subscription.livemode),
        stripe_account_id: Set(subscription.stripe_account_id),
        uncertain: Set(subscription.uncertain),
        last_event_id: Set(last_event_id.map(String::from)),
        last_event_created: time(last_event_created.and_then(|at| Timestamp::from_unix(at).ok())),
        ..Default::default()
    }
}

fn fields(model: &ActiveModel) -> Fields {
    let values = Column::iter()
        .filter_map(|column| Some((column.as_str().to_owned(), model.get(column).into_value()?)));
    values
        .map(|(column, value)| (column, to_json(value)))
        .collect()
}

fn to_json(value: Value) -> serde_json::Value {
    match value {
        Value::String(text) => json!(text),
        Value::Bool(bool) => json!(bool),
        Value::BigInt(number) => json!(number),
        Value::Json(json) => json!(json),
        Value::TimeDateTimeWithTimeZone(Some(at)) => {
            // RFC 3339 cannot write every year.
            serde_json::to_value(Timestamp::from(at)).unwrap_or_else(|_| json!(at.to_string()))
        }
        _ => serde_json::Value::Null,
    }
}

/// Some rows, in the order of the key.
#[derive(Debug)]
pub struct Page {
    /// The ids of those rows that were asked for.
    pub ids: Vec<String>,
    /// The last row's id. `None` if there are no more rows.
    pub last: Option<String>,
}

/// Looks at `limit` rows after `after` for those of one mode and of no connected account that were
/// first written before `before`. Other rows count too: one statement never reads the whole table
/// in search of a few.
pub async fn ids<C: ConnectionTrait>(
    db: &C,
    livemode: bool,
    before: OffsetDateTime,
    after: &str,
    limit: u64,
) -> Result<Page, StoreError> {
    let is_wanted = Column::Livemode
        .eq(livemode)
        .and(Column::StripeAccountId.is_null())
        .and(Column::DtCreated.lt(before));
    let rows: Result<Vec<(String, Option<bool>)>, _> = Entity::find()
        .select_only()
        .column(Column::StripeSubscriptionId)
        .expr_as(is_wanted, "is_wanted")
        .filter(Column::StripeSubscriptionId.gt(after))
        .order_by_asc(Column::StripeSubscriptionId)
        .limit(limit)
        .into_tuple()
        .all(db)
        .await;
    let rows = rows.map_err(StoreError::doing("list subscriptions"))?;
    let last = rows.last().map(|(id, _)| id.clone());
    let wanted = rows
        .into_iter()
        .filter(|(_, is_wanted)| *is_wanted == Some(true));
    Ok(Page {
        ids: wanted.map(|(id, _)| id).collect(),
        last,
    })
}

/// Rewrites the columns of a row from its merge state, unless the row was written since it was
/// read.
///
/// A merge state that cannot be read is emptied, so that the next event is merged into an empty
/// state; the columns stay. The revision stays in any case: subscribers got the merge state's
/// values under it.
pub async fn repair<C: ConnectionTrait>(db: &C, id: &str, row: &RawRow) -> Result<(), StoreError> {
    let columns = match &row.state {
        Some(state) => columns(state.visible()),
        None => ActiveModel {
            merge_state: Set("{}".to_owned()),
            ..Default::default()
        },
    };
    let repaired = ActiveModel {
        version: Set(row.version + 1),
        ..columns
    };
    let guarded = Column::StripeSubscriptionId
        .eq(id)
        .and(Column::Version.eq(row.version));
    let written = Entity::update_many()
        .set(repaired)
        .filter(guarded)
        .exec(db)
        .await;
    written
        .map(|_| ())
        .map_err(StoreError::doing("repair a subscription"))
}
