//! `orphaned_payment`: insert once, resolve once. The only code that writes an email.

use std::collections::HashSet;

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, OrphanReason, Timestamp};
use litestripe_domain::orphan::NewOrphan;
use litestripe_domain::payment::{ClientReferenceId, PaymentIds};
use litestripe_entity::orphaned_payment::{ActiveModel, Column, Entity, Model};
use sea_orm::sea_query::{Expr, ExprTrait as _, IntoCondition, LockType, OnConflict};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, Condition, ConnectionTrait, DatabaseTransaction, DbErr,
    EntityTrait as _, PaginatorTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
};
use time::OffsetDateTime;

use crate::error::StoreError;

/// The columns with an id of the person's.
const IDS: [Column; 4] = [
    Column::Id,
    Column::CheckoutSessionId,
    Column::StripeSubscriptionId,
    Column::StripeCustomerId,
];

/// Inserts `orphans`, unless they are there already: open, resolved or erased. Returns the ids that
/// were inserted.
///
/// An orphan that no Checkout Session had claimed learns its session and email when one comes. During a
/// replay they owe a signal, and `owed` has the event of each; else it is empty.
pub async fn insert(
    tx: &DatabaseTransaction,
    orphans: &[NewOrphan],
    owed: &[EventReference],
    now: OffsetDateTime,
) -> Result<HashSet<String>, StoreError> {
    let without_session = OrphanReason::NoCheckoutSession.as_str();
    let learns = Expr::col((Entity, Column::Reason))
        .eq(without_session)
        .and(Expr::cust("excluded.reason").ne(without_session))
        .and(Expr::col((Entity, Column::ResolvedAt)).is_null());
    let once = OnConflict::column(Column::Id)
        .update_columns([
            Column::Reason,
            Column::CheckoutSessionId,
            Column::CustomerEmail,
            Column::EventId,
            Column::DtLastUpdated,
        ])
        .action_and_where(learns)
        .to_owned();
    let models = orphans
        .iter()
        .enumerate()
        .map(|(index, orphan)| ActiveModel {
            owed_event: Set(owed.get(index).map(owed_event)),
            ..model(orphan, now)
        });
    let written = Entity::insert_many(models)
        .on_conflict(once)
        .exec_with_returning(tx)
        .await;
    let written = written.map_err(StoreError::doing("save orphaned payments"))?;
    Ok(written
        .into_iter()
        .filter(|row| row.dt_created == row.dt_last_updated)
        .map(|row| row.id)
        .collect())
}

/// Notes an operator's word, given `at`, on whose payment `orphan` is: resolves it if it is open,
/// inserts it as resolved if it is not there yet, so that a payment that comes later is none, and
/// takes back what an operator said before. Returns the orphan if the word counts. `owed` as of [`resolve`].
pub async fn resolve_by_operator(
    tx: &DatabaseTransaction,
    orphan: &NewOrphan,
    user: ClientReferenceId<'_>,
    at: OffsetDateTime,
    owed: Option<&EventReference>,
    now: OffsetDateTime,
) -> Result<Option<Model>, StoreError> {
    let column = |column| Expr::col((Entity, column));
    // Of two words the later one counts; of two in one second the same one in whatever order.
    let is_later = column(Column::ResolvedAt)
        .is_null()
        .or(column(Column::ResolvedAt).lt(at))
        .or(column(Column::ResolvedAt)
            .eq(at)
            .and(column(Column::ResolvedClientReferenceId).lt(user.0)));
    let word = OnConflict::column(Column::Id)
        .update_columns([
            Column::ResolvedAt,
            Column::ResolvedClientReferenceId,
            Column::CustomerEmail,
            Column::DtLastUpdated,
        ])
        .value(Column::OwedEvent, owed_once_resolved(owed))
        .action_and_where(is_later)
        .to_owned();
    let resolved = ActiveModel {
        customer_email: Set(None),
        resolved_at: Set(Some(at)),
        resolved_client_reference_id: Set(Some(user.0.to_owned())),
        ..model(orphan, now)
    };
    let written = Entity::insert_many([resolved])
        .on_conflict(word)
        .exec_with_returning(tx)
        .await;
    Ok(written
        .map_err(StoreError::doing("resolve an orphaned payment"))?
        .into_iter()
        .next())
}

fn model(orphan: &NewOrphan, now: OffsetDateTime) -> ActiveModel {
    ActiveModel {
        id: Set(orphan.id.clone()),
        checkout_session_id: Set(orphan.payment.checkout_session_id.clone()),
        stripe_customer_id: Set(orphan.payment.stripe_customer_id.clone()),
        stripe_subscription_id: Set(orphan.payment.stripe_subscription_id.clone()),
        customer_email: Set(orphan
            .customer_email
            .as_ref()
            .map(|email| email.expose().to_owned())),
        reason: Set(orphan.reason.as_str().to_owned()),
        event_id: Set(orphan.event_id.to_string()),
        livemode: Set(orphan.livemode),
        resolved_at: Set(None),
        resolved_client_reference_id: Set(None),
        owed_event: Set(None),
        dt_created: Set(now),
        dt_last_updated: Set(now),
    }
}

/// The orphan that a row tells of. None for a reason that only a later program knows.
pub fn to_new_orphan(row: &Model) -> Option<NewOrphan> {
    Some(NewOrphan {
        id: row.id.clone(),
        reason: OrphanReason::parse(&row.reason)?,
        payment: payment_ids(row),
        customer_email: None,
        event_id: EventId::parse(row.event_id.as_str()).ok()?,
        livemode: row.livemode,
    })
}

/// What it was the payment of.
pub fn payment_ids(row: &Model) -> PaymentIds {
    PaymentIds {
        checkout_session_id: row.checkout_session_id.clone(),
        stripe_customer_id: row.stripe_customer_id.clone(),
        stripe_subscription_id: row.stripe_subscription_id.clone(),
    }
}

/// Which of `ids` are open orphans.
pub async fn open_among<C: ConnectionTrait>(
    db: &C,
    ids: &[&str],
) -> Result<HashSet<String>, StoreError> {
    if ids.is_empty() {
        return Ok(HashSet::new());
    }
    let open: Result<Vec<String>, _> = Entity::find()
        .select_only()
        .column(Column::Id)
        .filter(super::among_ids(db.get_database_backend(), Column::Id, ids))
        .filter(Column::ResolvedAt.is_null())
        .into_tuple()
        .all(db)
        .await;
    Ok(open
        .map_err(StoreError::doing("look for open orphans"))?
        .into_iter()
        .collect())
}

/// The orphan `id`.
pub async fn find<C: ConnectionTrait>(db: &C, id: &str) -> Result<Option<Model>, StoreError> {
    Entity::find_by_id(id)
        .one(db)
        .await
        .map_err(StoreError::doing("read an orphaned payment"))
}

/// The orphans, newest first; `open` leaves out those that are resolved.
pub async fn list<C: ConnectionTrait>(
    db: &C,
    open: bool,
    limit: u64,
) -> Result<Vec<Model>, StoreError> {
    let mut rows = Entity::find()
        .order_by_desc(Column::DtCreated)
        .order_by_asc(Column::Id)
        .limit(limit);
    if open {
        rows = rows.filter(Column::ResolvedAt.is_null());
    }
    rows.all(db)
        .await
        .map_err(StoreError::doing("list orphaned payments"))
}

/// Erases the emails of orphans that were first seen before `before`. Returns how many.
pub async fn erase_emails<C: ConnectionTrait>(
    db: &C,
    before: OffsetDateTime,
) -> Result<u64, StoreError> {
    let erased = erase_emails_where(db, Column::DtCreated.lt(before)).await;
    erased.map_err(StoreError::doing("erase emails of old orphans"))
}

/// Erases the emails of orphans that are of any of `ids`: customers, subscriptions or Checkout
/// Sessions. Returns how many.
pub async fn erase_emails_of<C: ConnectionTrait>(db: &C, ids: &[&str]) -> Result<u64, StoreError> {
    erase_emails_where(db, of_any(ids))
        .await
        .map_err(StoreError::doing("erase a customer's emails"))
}

async fn erase_emails_where<C: ConnectionTrait>(
    db: &C,
    which: impl IntoCondition,
) -> Result<u64, DbErr> {
    let erased = Entity::update_many()
        .col_expr(Column::CustomerEmail, Expr::value(Option::<String>::None))
        .filter(Column::CustomerEmail.is_not_null())
        .filter(which);
    Ok(erased.exec(db).await?.rows_affected)
}

/// The ids that orphans of any of `ids` name: customers, subscriptions and Checkout Sessions.
pub async fn related_ids<C: ConnectionTrait>(
    db: &C,
    ids: &[&str],
) -> Result<Vec<String>, StoreError> {
    type Row = (String, Option<String>, Option<String>, Option<String>);
    let rows: Result<Vec<Row>, _> = Entity::find()
        .select_only()
        .columns(IDS)
        .filter(of_any(ids))
        .into_tuple()
        .all(db)
        .await;
    let rows = rows.map_err(StoreError::doing("look for a customer's orphans"))?;
    let ids = rows
        .into_iter()
        .flat_map(|(id, session, subscription, customer)| {
            [Some(id), session, subscription, customer]
        });
    Ok(ids.flatten().collect())
}

fn of_any(ids: &[&str]) -> Condition {
    IDS.iter().fold(Condition::any(), |any, column| {
        any.add(column.is_in(ids.iter().copied()))
    })
}

/// Resolves the orphan `id` if it is there and open: notes the user and erases the email. Returns
/// the orphan as it is then. `owed` is the event, if the signal of it is owed until a replay has ended.
pub async fn resolve(
    tx: &DatabaseTransaction,
    id: &str,
    user: ClientReferenceId<'_>,
    owed: Option<&EventReference>,
    now: OffsetDateTime,
) -> Result<Option<Model>, StoreError> {
    let resolved = Entity::update_many()
        .col_expr(Column::ResolvedAt, Expr::value(now))
        .col_expr(Column::ResolvedClientReferenceId, Expr::value(user.0))
        .col_expr(Column::CustomerEmail, Expr::value(Option::<String>::None))
        .col_expr(Column::OwedEvent, owed_once_resolved(owed))
        .col_expr(Column::DtLastUpdated, Expr::value(now))
        .filter(Column::Id.eq(id))
        .filter(Column::ResolvedAt.is_null())
        .exec_with_returning(tx)
        .await;
    Ok(resolved
        .map_err(StoreError::doing("resolve an orphaned payment"))?
        .into_iter()
        .next())
}

/// What an orphan owes once it is resolved because of `event`, or where that is sent at once. One that
/// came and went in the same replay owes nothing.
fn owed_once_resolved(event: Option<&EventReference>) -> Expr {
    let column = |column| Expr::col((Entity, column));
    Expr::case(
        column(Column::ResolvedAt).is_not_null(),
        column(Column::OwedEvent),
    )
    .case(
        column(Column::OwedEvent).is_not_null(),
        Expr::value(Option::<String>::None),
    )
    .finally(Expr::value(event.map(owed_event)))
    .into()
}

/// Takes up to `limit` orphans that owe a signal, each with the event that led to it: they owe none then.
pub async fn take_unsent(
    tx: &DatabaseTransaction,
    limit: u64,
) -> Result<Vec<(Model, EventReference)>, StoreError> {
    let doing = StoreError::doing("take orphans that owe a signal");
    let owing = Entity::find()
        .filter(Column::OwedEvent.is_not_null())
        .order_by_asc(Column::Id)
        .limit(limit);
    let taken = owing.lock(LockType::Update).all(tx).await.map_err(&doing)?;
    let paid = Entity::update_many()
        .col_expr(Column::OwedEvent, Expr::value(Option::<String>::None))
        .filter(Column::Id.is_in(taken.iter().map(|orphan| orphan.id.as_str())));
    paid.exec(tx).await.map_err(&doing)?;
    let with_event = |mut orphan: Model| Some((event(&orphan.owed_event.take()?)?, orphan));
    Ok(taken
        .into_iter()
        .filter_map(with_event)
        .map(|(event, orphan)| (orphan, event))
        .collect())
}

/// How many orphans owe a signal.
pub async fn count_unsent<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    let owing = Entity::find()
        .filter(Column::OwedEvent.is_not_null())
        .count(db)
        .await;
    owing.map_err(StoreError::doing("count orphans that owe a signal"))
}

fn owed_event(event: &EventReference) -> String {
    format!("{} {} {}", event.created.unix(), event.event_type, event.id)
}

fn event(owed: &str) -> Option<EventReference> {
    let mut parts = owed.splitn(3, ' ');
    let created = Timestamp::from_unix(parts.next()?.parse().ok()?).ok()?;
    let event_type = EventType::parse(parts.next()?).ok()?;
    Some(EventReference {
        id: EventId::parse(parts.next()?).ok()?,
        event_type,
        created,
    })
}

/// How many orphans are open.
pub async fn count_open<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    let open = Entity::find()
        .filter(Column::ResolvedAt.is_null())
        .count(db)
        .await;
    open.map_err(StoreError::doing("count orphaned payments"))
}
