//! `orphaned_payment`: insert once, resolve once. The only code that writes an email.

use std::collections::HashSet;

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, OrphanReason, Timestamp};
use litestripe_domain::orphan::NewOrphan;
use litestripe_domain::payment::{ClientReferenceId, PaymentIds};
use litestripe_entity::orphaned_payment::{ActiveModel, Column, Entity, Model};
use sea_orm::sea_query::{
    Expr, ExprTrait as _, IntoCondition, LockType, OnConflict, SelectStatement,
};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, Condition, ConnectionTrait, DbBackend, DbErr,
    EntityTrait as _, PaginatorTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    QueryTrait as _,
};
use time::OffsetDateTime;

use crate::error::StoreError;
use crate::store::Transaction;

/// The columns with an id of the customer or of one of their payments.
const IDS: [Column; 4] = [
    Column::Id,
    Column::CheckoutSessionId,
    Column::StripeSubscriptionId,
    Column::StripeCustomerId,
];

/// The value of `resolved_by` for an operator's resolution.
const OPERATOR: &str = "operator";

/// Inserts `orphans`, except those that already exist, whether open, resolved or erased. Returns
/// the ids that were inserted.
///
/// An open orphan without a Checkout Session is given its session and email when a session claims
/// it. During a replay the signals stay unsent, and `unsent` has the event of each; else it is
/// empty.
pub async fn insert(
    tx: &Transaction,
    orphans: &[NewOrphan],
    unsent: &[EventReference],
    now: OffsetDateTime,
) -> Result<HashSet<String>, StoreError> {
    let without_session = OrphanReason::NoCheckoutSession.as_str();
    let is_claimed = Expr::col((Entity, Column::Reason))
        .eq(without_session)
        .and(Expr::cust("excluded.reason").ne(without_session))
        .and(Expr::col((Entity, Column::ResolvedAt)).is_null());
    debug_assert!(
        orphans.is_sorted_by(|a, b| a.id < b.id),
        "the order of locks"
    );
    let once = OnConflict::column(Column::Id)
        .update_columns([
            Column::Reason,
            Column::CheckoutSessionId,
            Column::CustomerEmail,
            Column::EventId,
            Column::DtLastUpdated,
        ])
        .action_and_where(is_claimed)
        .to_owned();
    let models = orphans
        .iter()
        .enumerate()
        .map(|(index, orphan)| ActiveModel {
            unsent_event: Set(unsent.get(index).map(write_event)),
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

/// Records an operator's resolution, made `at`: the user that the payment `orphan` belongs to.
///
/// Resolves the orphan if it is open. Inserts it as resolved if it does not exist yet, so that a
/// payment that arrives later does not become an orphan. Replaces an earlier resolution. Returns
/// the orphan, or `None` if this resolution or one that wins over it is recorded already. `unsent`
/// as in [`resolve`].
pub async fn resolve_by_operator(
    tx: &Transaction,
    orphan: &NewOrphan,
    user: ClientReferenceId<'_>,
    at: OffsetDateTime,
    unsent: Option<&EventReference>,
    now: OffsetDateTime,
) -> Result<Option<Model>, StoreError> {
    let column = |column| Expr::col((Entity, column));
    // The later resolution wins. Of two in the same second, the larger user id wins, so that the
    // order of arrival does not matter.
    let is_later = column(Column::ResolvedAt)
        .is_null()
        .or(column(Column::ResolvedAt).lt(at))
        .or(column(Column::ResolvedAt)
            .eq(at)
            .and(column(Column::ResolvedClientReferenceId).lt(user.0)))
        // The previous version did not mark it: a replay does.
        .or(column(Column::ResolvedBy)
            .is_null()
            .and(column(Column::ResolvedAt).eq(at))
            .and(column(Column::ResolvedClientReferenceId).eq(user.0)));
    let resolve = OnConflict::column(Column::Id)
        .update_columns([
            Column::ResolvedAt,
            Column::ResolvedClientReferenceId,
            Column::ResolvedBy,
            Column::CustomerEmail,
            Column::DtLastUpdated,
        ])
        .value(Column::UnsentEvent, unsent_after_resolution(unsent))
        .action_and_where(is_later)
        .to_owned();
    let resolved = ActiveModel {
        customer_email: Set(None),
        resolved_at: Set(Some(at)),
        resolved_client_reference_id: Set(Some(user.0.to_owned())),
        resolved_by: Set(Some(OPERATOR.to_owned())),
        ..model(orphan, now)
    };
    let written = Entity::insert_many([resolved])
        .on_conflict(resolve)
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
        resolved_by: Set(None),
        unsent_event: Set(None),
        dt_created: Set(now),
        dt_last_updated: Set(now),
    }
}

/// Returns the orphan of a row. `None` if its reason was written by a later version of the program.
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

/// Returns the ids of the orphan's payment.
pub fn payment_ids(row: &Model) -> PaymentIds {
    PaymentIds {
        checkout_session_id: row.checkout_session_id.clone(),
        stripe_customer_id: row.stripe_customer_id.clone(),
        stripe_subscription_id: row.stripe_subscription_id.clone(),
    }
}

/// Returns those of `ids` that are open orphans.
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
        .map_err(StoreError::doing("find open orphans"))?
        .into_iter()
        .collect())
}

pub async fn find<C: ConnectionTrait>(db: &C, id: &str) -> Result<Option<Model>, StoreError> {
    Entity::find_by_id(id)
        .one(db)
        .await
        .map_err(StoreError::doing("read an orphaned payment"))
}

/// Returns up to `limit` orphans, newest first; only the open ones if `open`.
pub async fn list<C: ConnectionTrait>(
    db: &C,
    open: bool,
    limit: u64,
) -> Result<Vec<Model>, StoreError> {
    let mut rows = Entity::find()
        .order_by_desc(Column::DtCreated)
        .order_by_desc(Column::Id)
        .limit(limit);
    if open {
        rows = rows.filter(Column::ResolvedAt.is_null());
    }
    rows.all(db)
        .await
        .map_err(StoreError::doing("list orphaned payments"))
}

/// Locks and returns up to `limit` open orphans after `after`, in the order of the key.
pub async fn lock_open(
    tx: &Transaction,
    after: &str,
    limit: u64,
) -> Result<Vec<Model>, StoreError> {
    let open = Entity::find()
        .filter(Column::ResolvedAt.is_null())
        .filter(Column::Id.gt(after))
        .order_by_asc(Column::Id)
        .limit(limit)
        .lock(LockType::Update);
    open.all(tx)
        .await
        .map_err(StoreError::doing("lock open orphans"))
}

/// Returns up to `limit` orphans after `after`, in the order of the key, that an operator resolved.
pub async fn resolved_by_operator<C: ConnectionTrait>(
    db: &C,
    after: &str,
    limit: u64,
) -> Result<Vec<Model>, StoreError> {
    let resolved = Entity::find()
        .filter(Column::ResolvedBy.eq(OPERATOR))
        .filter(Column::Id.gt(after))
        .order_by_asc(Column::Id)
        .limit(limit);
    resolved
        .all(db)
        .await
        .map_err(StoreError::doing("list operators' resolutions"))
}

/// Erases the emails of orphans that were created before `before`. Returns their number.
pub async fn erase_emails<C: ConnectionTrait>(
    db: &C,
    before: OffsetDateTime,
) -> Result<u64, StoreError> {
    let erased = erase_emails_where(db, Column::DtCreated.lt(before)).await;
    erased.map_err(StoreError::doing("erase emails of old orphans"))
}

/// Erases the emails of orphans that have one of `ids`: customers, subscriptions or Checkout
/// Sessions. Returns their number.
pub async fn erase_emails_of<C: ConnectionTrait>(db: &C, ids: &[&str]) -> Result<u64, StoreError> {
    erase_emails_where(db, has_any(ids))
        .await
        .map_err(StoreError::doing("erase a customer's emails"))
}

async fn erase_emails_where<C: ConnectionTrait>(
    db: &C,
    which: impl IntoCondition,
) -> Result<u64, DbErr> {
    let which = Condition::all()
        .add(Column::CustomerEmail.is_not_null())
        .add(which);
    let erased =
        Entity::update_many().col_expr(Column::CustomerEmail, Expr::value(Option::<String>::None));
    let erased = match db.get_database_backend() {
        DbBackend::Postgres => erased.filter(Column::Id.in_subquery(locked(which))),
        _ => erased.filter(which),
    };
    Ok(erased.exec(db).await?.rows_affected)
}

/// Returns the ids of all orphans that have one of `ids`: customers, subscriptions and Checkout
/// Sessions.
pub async fn related_ids<C: ConnectionTrait>(
    db: &C,
    ids: &[&str],
) -> Result<Vec<String>, StoreError> {
    type Row = (String, Option<String>, Option<String>, Option<String>);
    let rows: Result<Vec<Row>, _> = Entity::find()
        .select_only()
        .columns(IDS)
        .filter(has_any(ids))
        .into_tuple()
        .all(db)
        .await;
    let rows = rows.map_err(StoreError::doing("find a customer's orphans"))?;
    let ids = rows
        .into_iter()
        .flat_map(|(id, session, subscription, customer)| {
            [Some(id), session, subscription, customer]
        });
    Ok(ids.flatten().collect())
}

/// Returns a subquery that locks the orphans `which`, in the order in which [`insert`] does.
fn locked(which: Condition) -> SelectStatement {
    let ids = Entity::find()
        .select_only()
        .column(Column::Id)
        .filter(which);
    ids.order_by_asc(super::bytewise(DbBackend::Postgres, Column::Id))
        .lock(LockType::Update)
        .into_query()
}

fn has_any(ids: &[&str]) -> Condition {
    IDS.iter().fold(Condition::any(), |any, column| {
        any.add(column.is_in(ids.iter().copied()))
    })
}

/// Resolves the orphan `id` if it exists and is open: records the user and erases the email.
/// Returns the resolved orphan. `unsent` is the event if its signal stays unsent until a replay has
/// ended.
pub async fn resolve(
    tx: &Transaction,
    id: &str,
    user: ClientReferenceId<'_>,
    unsent: Option<&EventReference>,
    now: OffsetDateTime,
) -> Result<Option<Model>, StoreError> {
    let resolved = Entity::update_many()
        .col_expr(Column::ResolvedAt, Expr::value(now))
        .col_expr(Column::ResolvedClientReferenceId, Expr::value(user.0))
        .col_expr(Column::CustomerEmail, Expr::value(Option::<String>::None))
        .col_expr(Column::UnsentEvent, unsent_after_resolution(unsent))
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

/// Returns the value of `unsent_event` after a resolution by `event`; `None` if its signal is sent
/// at once. An orphan that was created and resolved in the same replay has no unsent signal.
fn unsent_after_resolution(event: Option<&EventReference>) -> Expr {
    let column = |column| Expr::col((Entity, column));
    Expr::case(
        column(Column::ResolvedAt).is_not_null(),
        column(Column::UnsentEvent),
    )
    .case(
        column(Column::UnsentEvent).is_not_null(),
        Expr::value(Option::<String>::None),
    )
    .finally(Expr::value(event.map(write_event)))
    .into()
}

/// Takes up to `limit` orphans with an unsent signal, each with the signal's event. Their signals
/// count as sent once `tx` commits.
pub async fn take_unsent(
    tx: &Transaction,
    limit: u64,
) -> Result<Vec<(Model, EventReference)>, StoreError> {
    let doing = StoreError::doing("take orphans with unsent signals");
    let is_unsent = || Column::UnsentEvent.is_not_null();
    let some = Entity::find()
        .select_only()
        .column(Column::Id)
        .filter(is_unsent())
        .order_by_asc(Column::Id)
        .limit(limit)
        .into_query();
    // Locked in the order in which [`insert`] does, which the index need not have.
    let taken = Entity::find()
        .filter(is_unsent().and(Column::Id.in_subquery(some)))
        .order_by_asc(super::bytewise(tx.get_database_backend(), Column::Id))
        .lock(LockType::Update)
        .all(tx)
        .await
        .map_err(&doing)?;
    let sent = Entity::update_many()
        .col_expr(Column::UnsentEvent, Expr::value(Option::<String>::None))
        .filter(Column::Id.is_in(taken.iter().map(|orphan| orphan.id.as_str())));
    sent.exec(tx).await.map_err(&doing)?;
    let with_event = |mut orphan: Model| Some((parse_event(&orphan.unsent_event.take()?)?, orphan));
    Ok(taken
        .into_iter()
        .filter_map(with_event)
        .map(|(event, orphan)| (orphan, event))
        .collect())
}

/// Counts the orphans with an unsent signal.
pub async fn count_unsent<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    let unsent = Entity::find()
        .filter(Column::UnsentEvent.is_not_null())
        .count(db)
        .await;
    unsent.map_err(StoreError::doing("count orphans with unsent signals"))
}

fn write_event(event: &EventReference) -> String {
    format!("{} {} {}", event.created.unix(), event.event_type, event.id)
}

fn parse_event(text: &str) -> Option<EventReference> {
    let mut parts = text.splitn(3, ' ');
    let created = Timestamp::from_unix(parts.next()?.parse().ok()?).ok()?;
    let event_type = EventType::parse(parts.next()?).ok()?;
    Some(EventReference {
        id: EventId::parse(parts.next()?).ok()?,
        event_type,
        created,
    })
}

/// Counts the open orphans.
pub async fn count_open<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    let open = Entity::find()
        .filter(Column::ResolvedAt.is_null())
        .count(db)
        .await;
    open.map_err(StoreError::doing("count orphaned payments"))
}
