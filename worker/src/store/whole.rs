//! `stripe_subscription`: whole rows as they stand, however damaged they are.
//!
//! Owns reading what a batch never reads: the columns themselves, which ids there are, and which
//! modes. Trusts nothing of a row but its key and its version: a person or a half-restored backup
//! may have written it.

use std::collections::HashMap;

use litestripe_domain::merge::State;
use litestripe_entity::stripe_subscription::{Column, Entity, Model};
use sea_orm::sea_query::Expr;
use sea_orm::{
    ColumnTrait as _, ConnectionTrait, DbErr, EntityTrait as _, ExprTrait as _, QueryFilter as _, QueryOrder as _,
    QuerySelect as _,
};
use time::OffsetDateTime;

use crate::error::StoreError;

/// A row as it stands.
#[derive(Debug, Clone)]
pub struct Whole {
    /// Grows with every write.
    pub version: i64,
    /// Its columns. None when one of them holds what the column's type cannot be, which only SQLite
    /// lets happen.
    pub columns: Option<Model>,
    /// What its columns should be a function of. None when it cannot be read.
    pub state: Option<State>,
}

/// The rows that exist among `ids`.
///
/// # Errors
/// When the database is away.
pub async fn find<C: ConnectionTrait>(db: &C, ids: &[&str]) -> Result<HashMap<String, Whole>, StoreError> {
    let doing = StoreError::doing("read whole subscriptions");
    let rows: Vec<(String, String, i64)> = Entity::find()
        .select_only()
        .columns([Column::StripeSubscriptionId, Column::MergeState, Column::Version])
        .filter(Column::StripeSubscriptionId.is_in(ids.iter().copied()))
        .into_tuple()
        .all(db)
        .await
        .map_err(&doing)?;
    let mut columns = columns(db, ids).await?;
    let whole = rows.into_iter().map(|(id, state, version)| {
        // Another worker may have written the row in between: then its columns are of another version.
        let columns = columns.remove(&id);
        let of_columns = columns.as_ref().map(|columns| (columns.merge_state.clone(), columns.version));
        let (state, version) = of_columns.unwrap_or((state, version));
        (id, Whole { version, columns, state: serde_json::from_str(&state).ok() })
    });
    Ok(whole.collect())
}

/// The columns of the rows that exist among `ids` and can be read.
async fn columns<C: ConnectionTrait>(db: &C, ids: &[&str]) -> Result<HashMap<String, Model>, StoreError> {
    let of = async |ids: &[&str]| -> Result<Vec<Model>, DbErr> {
        Entity::find().filter(Column::StripeSubscriptionId.is_in(ids.iter().copied())).all(db).await
    };
    let mut rows = Vec::new();
    match of(ids).await {
        Ok(all) => rows = all,
        // One row that cannot be read must not hide the others.
        Err(_) => {
            for id in ids {
                match of(&[id]).await {
                    Ok(row) => rows.extend(row),
                    Err(error) => reachable(db).await.map_err(|_| StoreError::doing("read a subscription")(error))?,
                }
            }
        }
    }
    Ok(rows.into_iter().map(|row| (row.stripe_subscription_id.clone(), row)).collect())
}

/// Whether it was the row's fault and not the database's.
async fn reachable<C: ConnectionTrait>(db: &C) -> Result<(), DbErr> {
    db.execute_unprepared("SELECT 1").await.map(|_| ())
}

/// The ids of up to `limit` rows after `after`, in the order of the key: those of one mode and of no
/// connected account that were first written before `before`.
///
/// # Errors
/// When the database is away.
pub async fn ids<C: ConnectionTrait>(
    db: &C,
    livemode: bool,
    before: OffsetDateTime,
    after: &str,
    limit: u64,
) -> Result<Vec<String>, StoreError> {
    let ids = Entity::find()
        .select_only()
        .column(Column::StripeSubscriptionId)
        .filter(Column::StripeSubscriptionId.gt(after))
        .filter(Column::Livemode.eq(livemode))
        .filter(Column::StripeAccountId.is_null())
        .filter(Column::DtCreated.lt(before))
        .order_by_asc(Column::StripeSubscriptionId)
        .limit(limit)
        .into_tuple()
        .all(db)
        .await;
    ids.map_err(StoreError::doing("list subscriptions"))
}

/// Empties a merge state that cannot be read, if the row is still at `version`. The columns stay as
/// they are, and so does the revision: the next event is merged into nothing and signalled under a
/// higher one.
///
/// # Errors
/// When the database is away.
pub async fn forget_state<C: ConnectionTrait>(db: &C, id: &str, version: i64) -> Result<bool, StoreError> {
    let doing = StoreError::doing("empty a merge state");
    let empty = serde_json::to_string(&State::default()).map_err(|error| doing(DbErr::Json(error.to_string())))?;
    let emptied = Entity::update_many()
        .col_expr(Column::MergeState, Expr::value(empty))
        .col_expr(Column::Version, Expr::col(Column::Version).add(1))
        .filter(Column::StripeSubscriptionId.eq(id))
        .filter(Column::Version.eq(version))
        .exec(db)
        .await;
    Ok(emptied.map_err(&doing)?.rows_affected == 1)
}
