//! `due_check`: questions to the user lookup and to Stripe's API, taken by one worker at a time.
//!
//! Invariant: a question that was taken comes due again unless it is answered, so a dead worker
//! loses none.

use std::time::Duration;

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, Timestamp};
use litestripe_domain::question::{Check, Kind};
use litestripe_entity::due_check::{ActiveModel, Column, Entity, Model};
use sea_orm::sea_query::{Expr, ExprTrait as _, LockBehavior, LockType, OnConflict};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, Condition, ConnectionTrait, DatabaseTransaction, EntityTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;

use super::Store;
use crate::error::StoreError;
use crate::settings::DatabaseKind;

/// Puts `checks` in. One that is there already is asked anew.
///
/// # Errors
/// When the database is away.
pub async fn put(tx: &DatabaseTransaction, mut checks: Vec<Check>) -> Result<(), StoreError> {
    // One statement may not name a key twice; of several, the last one knows most.
    checks.sort_by(|a, b| (&a.entity_id, a.kind).cmp(&(&b.entity_id, b.kind)));
    checks.reverse();
    checks.dedup_by(|a, b| (&a.entity_id, a.kind) == (&b.entity_id, b.kind));
    checks.reverse();
    let anew = || {
        OnConflict::columns([Column::EntityId, Column::Kind])
            .update_columns([
                Column::DueAt,
                Column::Attempts,
                Column::CheckoutSessionId,
                Column::StripeCustomerId,
                Column::ClientReferenceId,
                Column::EventId,
                Column::EventType,
                Column::EventCreated,
                Column::StreamSequence,
            ])
            // Paid stays paid, whichever of a session's events comes last.
            .value(Column::IsPaid, Expr::cust("due_check.is_paid OR excluded.is_paid"))
            .to_owned()
    };
    let rows = checks.into_iter().map(|check| ActiveModel {
        entity_id: Set(check.entity_id),
        kind: Set(check.kind.as_str().to_owned()),
        due_at: Set(check.due_at),
        attempts: Set(check.attempts),
        checkout_session_id: Set(check.checkout_session_id),
        stripe_customer_id: Set(check.stripe_customer_id),
        stripe_subscription_id: Set(check.stripe_subscription_id),
        stripe_account_id: Set(check.stripe_account_id),
        client_reference_id: Set(check.client_reference_id),
        is_paid: Set(check.is_paid),
        livemode: Set(check.livemode),
        event_id: Set(check.event.id.to_string()),
        event_type: Set(check.event.event_type.to_string()),
        event_created: Set(check.event.created.unix()),
        stream_sequence: Set(check.stream_sequence.cast_signed()),
    });
    let put = super::rows::insert(tx, rows.collect(), Some(anew), None).await;
    put.map(drop).map_err(StoreError::doing("save due checks"))
}

/// Takes up to `limit` checks of `kinds` that are due. Each comes due again after `lease`.
///
/// While a replay has not reached its end, rows may be half rebuilt: what it may still answer waits.
///
/// # Errors
/// When the database is away.
pub async fn take(
    store: &Store,
    kinds: &[Kind],
    now: OffsetDateTime,
    lease: Duration,
    limit: u64,
) -> Result<Vec<Check>, StoreError> {
    let doing = StoreError::doing("take due checks");
    let mut due = Column::Kind.is_in(kinds.iter().map(|kind| kind.as_str())).and(Column::DueAt.lte(now));
    // Most of the time there is none, and a look costs no write lock.
    let any = Entity::find().filter(due.clone()).one(store.connection()).await.map_err(&doing)?;
    if any.is_none() {
        return Ok(Vec::new());
    }
    if let Some(last) = super::replay::rebuilding_until(store.connection(), now).await? {
        // A subscription's Checkout Session may be among the events that the replay has yet to reach.
        let asked_at_once = Column::Kind.ne(Kind::Grace.as_str());
        due = due.and(Column::StreamSequence.gt(last.cast_signed())).and(asked_at_once);
    }
    let tx = store.begin().await?;
    let mut oldest = Entity::find().filter(due).order_by_asc(Column::DueAt).limit(limit);
    if store.kind() == DatabaseKind::Postgres {
        oldest = oldest.lock_with_behavior(LockType::Update, LockBehavior::SkipLocked);
    }
    let taken = oldest.all(&tx).await.map_err(&doing)?;
    let keys = taken.iter().fold(Condition::any(), |keys, row| {
        keys.add(Column::EntityId.eq(row.entity_id.as_str()).and(Column::Kind.eq(row.kind.as_str())))
    });
    // PostgreSQL keeps microseconds, and this is compared later.
    let leased_until = (now + lease).truncate_to_millisecond();
    if !taken.is_empty() {
        let moved = Entity::update_many().col_expr(Column::DueAt, Expr::value(leased_until)).filter(keys);
        moved.exec(&tx).await.map_err(&doing)?;
    }
    tx.commit().await.map_err(&doing)?;
    Ok(taken.into_iter().filter_map(|row| check(row, kinds, leased_until)).collect())
}

/// Asks `check` again at `due_at`, unless it was put anew since it was taken.
///
/// # Errors
/// When the database is away.
pub async fn postpone<C: ConnectionTrait>(
    db: &C,
    check: &Check,
    due_at: OffsetDateTime,
    attempts: i32,
) -> Result<(), StoreError> {
    let postponed = Entity::update_many()
        .col_expr(Column::DueAt, Expr::value(due_at))
        .col_expr(Column::Attempts, Expr::value(attempts))
        .filter(as_taken(check))
        .exec(db)
        .await;
    postponed.map(|_| ()).map_err(StoreError::doing("postpone a due check"))
}

/// Forgets `check`, which is answered, unless it was put anew since it was taken. Returns whether
/// it is forgotten.
///
/// # Errors
/// When the database is away.
pub async fn settle<C: ConnectionTrait>(db: &C, check: &Check) -> Result<bool, StoreError> {
    let settled = Entity::delete_many().filter(as_taken(check)).exec(db).await;
    settled.map(|done| done.rows_affected > 0).map_err(StoreError::doing("remove an answered check"))
}

fn as_taken(check: &Check) -> Expr {
    let this = Column::EntityId.eq(check.entity_id.as_str()).and(Column::Kind.eq(check.kind.as_str()));
    this.and(Column::DueAt.eq(check.leased_until))
}

/// Forgets the checks of `kind` about `entity_ids`.
///
/// # Errors
/// When the database is away.
pub async fn remove<C: ConnectionTrait>(db: &C, kind: Kind, entity_ids: &[&str]) -> Result<(), StoreError> {
    if entity_ids.is_empty() {
        return Ok(());
    }
    let about = super::among_ids(db.get_database_backend(), Column::EntityId, entity_ids);
    let those = Column::Kind.eq(kind.as_str()).and(about);
    let removed = Entity::delete_many().filter(those).exec(db).await;
    removed.map(|_| ()).map_err(StoreError::doing("remove due checks"))
}

fn check(row: Model, kinds: &[Kind], leased_until: OffsetDateTime) -> Option<Check> {
    let event = EventReference {
        id: EventId::parse(row.event_id).ok()?,
        event_type: EventType::parse(row.event_type).ok()?,
        created: Timestamp::from_unix(row.event_created).ok()?,
    };
    Some(Check {
        kind: kinds.iter().copied().find(|kind| kind.as_str() == row.kind)?,
        entity_id: row.entity_id,
        due_at: row.due_at,
        leased_until,
        attempts: row.attempts,
        checkout_session_id: row.checkout_session_id,
        stripe_customer_id: row.stripe_customer_id,
        stripe_subscription_id: row.stripe_subscription_id,
        stripe_account_id: row.stripe_account_id,
        client_reference_id: row.client_reference_id,
        is_paid: row.is_paid,
        livemode: row.livemode,
        event,
        stream_sequence: row.stream_sequence.cast_unsigned(),
    })
}
