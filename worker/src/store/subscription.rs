//! `stripe_subscription`: load merge states, save rows.
//!
//! Invariant: a row is overwritten only if it still has the `version` that was read.

use std::collections::{HashMap, HashSet};

use litestripe_contract::signal::Timestamp;
use litestripe_domain::payment::ClientReferenceId;
use litestripe_domain::row::{LastSent, Row, SILENT, Stored, WITHHELD};
use litestripe_entity::replay;
use litestripe_entity::stripe_subscription::{Column, Entity};
use sea_orm::sea_query::{Expr, ExprTrait as _, JoinType, LockType, Order, Query, SelectStatement};
use sea_orm::{
    ColumnTrait as _, Condition, ConnectionTrait, DbBackend, DbErr, EntityTrait as _,
    IdenStatic as _, PaginatorTrait as _, QueryFilter as _, QueryOrder as _, QueryResult,
    QuerySelect as _, QueryTrait as _, Select,
};
use time::OffsetDateTime;

use super::rows::{Cell, Insert};
use crate::error::{Cause, StoreError};
use crate::store::Transaction;

const KEY: (Entity, Column) = (Entity, Column::StripeSubscriptionId);

/// The condition of the index of withheld rows.
pub(super) const IS_WITHHELD: &str = r#"last_sent IN ('"withheld"', '"silent"')"#;

const NEWEST_ERASURE: &str = "newest_erasure";
const INSTALLATION: &str = "installation";

/// The columns with their own index, besides `livemode`.
const INDEXED: [Column; 3] = [
    Column::StripeCustomerId,
    Column::ClientReferenceId,
    Column::CheckoutSessionId,
];

const INSERT: Insert<'_> = Insert {
    into: "stripe_subscription (stripe_subscription_id, stripe_customer_id, client_reference_id, checkout_session_id, \
        status, created, start_date, cancel_at, canceled_at, cancel_at_period_end, current_period_start, \
        current_period_end, trial_end, ended_at, items, metadata, subscription_metadata, livemode, stripe_account_id, \
        uncertain, revision, version, last_event_id, last_event_created, merge_state, last_sent, dt_created, dt_last_updated, \
        trial_start, collection_method, cancellation_reason, pause_collection)",
    select: "UNNEST($1::text[]), UNNEST($2::text[]), UNNEST($3::text[]), UNNEST($4::text[]), UNNEST($5::text[]), \
        to_timestamp(UNNEST($6::bigint[])), to_timestamp(UNNEST($7::bigint[])), to_timestamp(UNNEST($8::bigint[])), \
        to_timestamp(UNNEST($9::bigint[])), UNNEST($10::boolean[]), to_timestamp(UNNEST($11::bigint[])), \
        to_timestamp(UNNEST($12::bigint[])), to_timestamp(UNNEST($13::bigint[])), \
        to_timestamp(UNNEST($14::bigint[])), UNNEST($15::text[])::jsonb, UNNEST($16::text[])::jsonb, \
        UNNEST($17::text[])::jsonb, UNNEST($18::boolean[]), UNNEST($19::text[]), UNNEST($20::boolean[]), \
        UNNEST($21::bigint[]), UNNEST($22::bigint[]), UNNEST($23::text[]), to_timestamp(UNNEST($24::bigint[])), \
        UNNEST($25::text[]), UNNEST($26::text[]), UNNEST($27::timestamptz[]), UNNEST($28::timestamptz[]), \
        to_timestamp(UNNEST($29::bigint[])), UNNEST($30::text[]), UNNEST($31::text[]), UNNEST($32::text[])::jsonb",
    then: "",
};

const LOAD: &str = "load subscriptions";
const SAVE: &str = "save subscriptions";

const CONFLICT: &str = "ON CONFLICT (stripe_subscription_id) DO UPDATE SET ";

/// Overwrites the columns with their own index.
const OVERWRITE_INDEXED: &str = "stripe_customer_id = excluded.stripe_customer_id, \
    client_reference_id = excluded.client_reference_id, checkout_session_id = excluded.checkout_session_id, \
    livemode = excluded.livemode, ";

/// Overwrites the other columns, if the row still has the version that was read.
const OVERWRITE: &str = "status = excluded.status, \
    created = excluded.created, start_date = excluded.start_date, cancel_at = excluded.cancel_at, \
    canceled_at = excluded.canceled_at, cancel_at_period_end = excluded.cancel_at_period_end, \
    current_period_start = excluded.current_period_start, current_period_end = excluded.current_period_end, \
    trial_end = excluded.trial_end, ended_at = excluded.ended_at, items = excluded.items, \
    metadata = excluded.metadata, subscription_metadata = excluded.subscription_metadata, \
    stripe_account_id = excluded.stripe_account_id, uncertain = excluded.uncertain, \
    revision = excluded.revision, version = excluded.version, last_event_id = excluded.last_event_id, \
    last_event_created = excluded.last_event_created, merge_state = excluded.merge_state, last_sent = excluded.last_sent, \
    dt_last_updated = excluded.dt_last_updated, trial_start = excluded.trial_start, \
    collection_method = excluded.collection_method, cancellation_reason = excluded.cancellation_reason, \
    pause_collection = excluded.pause_collection \
    WHERE stripe_subscription.version = excluded.version - 1 RETURNING stripe_subscription_id";

/// Returns the values of `livemode` that rows have, each once.
pub async fn modes<C: ConnectionTrait>(db: &C) -> Result<Vec<bool>, StoreError> {
    let mut modes = Vec::new();
    // The first and the last one in the order of the index. `DISTINCT` would read every row.
    for order in [Order::Asc, Order::Desc] {
        let mode = Entity::find()
            .select_only()
            .column(Column::Livemode)
            .order_by(Column::Livemode, order)
            .limit(1);
        let mode: Result<Option<bool>, _> = mode.into_tuple().one(db).await;
        modes.extend(mode.map_err(StoreError::doing("read the subscriptions' modes"))?);
    }
    modes.dedup();
    Ok(modes)
}

/// The result of a batch's first statement.
#[derive(Debug, Default)]
pub struct Found {
    /// The rows that exist, by key.
    pub rows: HashMap<String, Stored>,
    /// The start of an unfinished rebuild, which may still have to rebuild rows, also rows that do
    /// not exist yet.
    pub rebuilding: Option<OffsetDateTime>,
    /// Whether there are erasures that the process has not read yet.
    pub has_new_erasures: bool,
    /// The installation that the database belongs to now.
    pub installation: Option<String>,
}

/// Returns the rows of `ids` that exist.
pub async fn load<C: ConnectionTrait>(
    db: &C,
    ids: &[&str],
) -> Result<HashMap<String, Stored>, StoreError> {
    let doing = StoreError::doing(LOAD);
    let rows = db
        .query_all(&rows_among(db.get_database_backend(), ids))
        .await
        .map_err(&doing)?;
    Ok(found(&rows).map_err(StoreError::doing(LOAD))?.rows)
}

/// Reads what a batch needs, as the first statement of its transaction: the rows of `ids` that
/// exist, whether a replay is rebuilding others, whether an erasure is newer than the sequence
/// `erasures`, and which installation the database belongs to.
pub async fn find(tx: &Transaction, ids: &[&str], erasures: i64) -> Result<Found, StoreError> {
    let doing = StoreError::doing(LOAD);
    let mut query = rows_among(tx.get_database_backend(), ids);
    query.expr_as(super::erasure::newest_after(erasures), NEWEST_ERASURE);
    query.expr_as(super::installation::id(), INSTALLATION);
    let rows = tx.query_all(&query).await.map_err(&doing)?;
    let (newest, installation): (Option<i64>, _) = match rows.first() {
        Some(row) => (
            row.try_get("", NEWEST_ERASURE).map_err(&doing)?,
            row.try_get("", INSTALLATION).map_err(&doing)?,
        ),
        None => (None, None),
    };
    Ok(Found {
        has_new_erasures: newest.is_some(),
        installation,
        ..found(&rows).map_err(StoreError::doing(LOAD))?
    })
}

fn rows_among(backend: DbBackend, ids: &[&str]) -> SelectStatement {
    // One statement, because nearly always no replay runs, and a second statement would slow every
    // batch down. It selects from one constant row, because neither replays nor subscriptions need
    // exist.
    let mut query = Query::select();
    query.from_subquery(
        Query::select().expr_as(Expr::cust("1"), "one").take(),
        "batch",
    );
    query.join_subquery(
        JoinType::LeftJoin,
        super::replay::latest_unfinished(),
        "rebuilding",
        Expr::cust("TRUE"),
    );
    query.join(
        JoinType::LeftJoin,
        Entity,
        super::among_ids(backend, KEY, ids),
    );
    let own = [
        Column::StripeSubscriptionId,
        Column::MergeState,
        Column::Version,
        Column::Revision,
        Column::LastSent,
        Column::DtCreated,
    ];
    for column in own {
        query.column((Entity, column));
    }
    query.column(("rebuilding", replay::Column::DtStarted));
    query
}

fn found(rows: &[QueryResult]) -> Result<Found, Cause> {
    let mut found = Found::default();
    for row in rows {
        found.rows.extend(stored(row)?);
        found.rebuilding = row.try_get("", replay::Column::DtStarted.as_str())?;
    }
    Ok(found)
}

fn stored(row: &QueryResult) -> Result<Option<(String, Stored)>, Cause> {
    let Some(id) = row.try_get("", "stripe_subscription_id")? else {
        return Ok(None);
    };
    let state: String = row.try_get("", "merge_state")?;
    let last_sent: Option<String> = row.try_get("", "last_sent")?;
    let stored = Stored {
        state: serde_json::from_str(&state).map_err(Cause::StoredValue)?,
        version: row.try_get("", "version")?,
        revision: row.try_get("", "revision")?,
        dt_created: row.try_get("", "dt_created").ok(),
        last_sent: LastSent::from_json(last_sent.as_deref()),
    };
    Ok(Some((id, stored)))
}

/// Locks the rows `ids` for this transaction, in the order in which [`save`] does. Does nothing on
/// SQLite, where every transaction holds the one write lock.
pub async fn lock(tx: &Transaction, ids: &[&str]) -> Result<(), StoreError> {
    if tx.get_database_backend() != DbBackend::Postgres {
        return Ok(());
    }
    let rows = keys().filter(super::among_ids(tx.get_database_backend(), KEY, ids));
    let locked: Result<Vec<String>, _> = rows
        .order_by_asc(super::bytewise(
            tx.get_database_backend(),
            Column::StripeSubscriptionId,
        ))
        .lock(LockType::Update)
        .into_tuple()
        .all(tx)
        .await;
    locked
        .map(|_| ())
        .map_err(StoreError::doing("lock subscriptions"))
}

/// Returns those of `ids` that have a row.
pub async fn existing<C: ConnectionTrait>(
    db: &C,
    ids: &[String],
) -> Result<HashSet<String>, StoreError> {
    let rows = keys().filter(super::among(
        db.get_database_backend(),
        KEY,
        ids.iter().cloned(),
    ));
    let ids: Result<Vec<String>, _> = rows.into_tuple().all(db).await;
    ids.map(HashSet::from_iter)
        .map_err(StoreError::doing("find subscriptions"))
}

/// Returns up to `limit` keys after `after`, in their order.
pub async fn keys_after<C: ConnectionTrait>(
    db: &C,
    after: &str,
    limit: u64,
) -> Result<Vec<String>, StoreError> {
    let rows = keys()
        .filter(Column::StripeSubscriptionId.gt(after))
        .order_by_asc(Column::StripeSubscriptionId);
    rows.limit(limit)
        .into_tuple()
        .all(db)
        .await
        .map_err(StoreError::doing("list subscriptions"))
}

/// Returns up to `limit` keys after `after`, in their order, of rows with an unsent signal.
pub async fn unsent<C: ConnectionTrait>(
    db: &C,
    after: &str,
    limit: u64,
) -> Result<Vec<String>, StoreError> {
    keys_among(db, is_unsent(), after, limit).await
}

/// Returns up to `limit` keys after `after`, in their order, of rows whose first signal is unsent
/// or withheld and that are not whole, as far as their columns show.
pub async fn not_whole<C: ConnectionTrait>(
    db: &C,
    after: &str,
    limit: u64,
) -> Result<Vec<String>, StoreError> {
    let first = Column::LastSent.is_in(["null", WITHHELD, SILENT]);
    let is_unclaimed = Column::ClientReferenceId
        .is_null()
        .and(Column::CheckoutSessionId.is_null());
    let which = first.and(Column::Status.is_null().or(is_unclaimed));
    keys_among(db, which, after, limit).await
}

/// Returns the first `limit` keys of rows whose first signal is withheld.
pub async fn withheld<C: ConnectionTrait>(db: &C, limit: u64) -> Result<Vec<String>, StoreError> {
    keys_among(db, is_withheld(), "", limit).await
}

/// Counts the rows with an unsent signal.
pub async fn count_unsent<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    let unsent = unsent_or_withheld().filter(is_unsent()).count(db).await;
    unsent.map_err(StoreError::doing("count subscriptions with unsent signals"))
}

/// Counts the rows whose first signal is withheld.
pub async fn count_withheld<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    let withheld = unsent_or_withheld().filter(is_withheld()).count(db).await;
    withheld.map_err(StoreError::doing("count subscriptions that are withheld"))
}

/// The condition is that of the index of these rows.
fn is_unsent() -> Expr {
    Expr::cust(r#"last_sent NOT IN ('"withheld"', '"silent"')"#)
}

fn is_withheld() -> Expr {
    Expr::cust(IS_WITHHELD)
}

/// Selects the rows with an unsent or withheld signal. The condition is that of their index.
fn unsent_or_withheld() -> Select<Entity> {
    Entity::find().filter(Column::LastSent.is_not_null())
}

async fn keys_among<C: ConnectionTrait>(
    db: &C,
    which: Expr,
    after: &str,
    limit: u64,
) -> Result<Vec<String>, StoreError> {
    let rows = unsent_or_withheld()
        .select_only()
        .column(Column::StripeSubscriptionId)
        .filter(which)
        .filter(Column::StripeSubscriptionId.gt(after));
    let rows = rows
        .order_by_asc(Column::StripeSubscriptionId)
        .limit(limit)
        .into_tuple()
        .all(db)
        .await;
    rows.map_err(StoreError::doing("find subscriptions with unsent signals"))
}

/// Counts all rows.
pub async fn count<C: ConnectionTrait>(db: &C) -> Result<u64, StoreError> {
    Entity::find()
        .count(db)
        .await
        .map_err(StoreError::doing("count subscriptions"))
}

fn keys() -> Select<Entity> {
    Entity::find()
        .select_only()
        .column(Column::StripeSubscriptionId)
}

/// Returns the ids of the subscriptions that have one of `ids` (as customer, subscription or
/// Checkout Session), and of their Checkout Sessions.
pub async fn related_ids<C: ConnectionTrait>(
    db: &C,
    ids: &[&str],
) -> Result<Vec<String>, StoreError> {
    let any = [
        Column::StripeCustomerId,
        Column::StripeSubscriptionId,
        Column::CheckoutSessionId,
    ];
    let rows: Result<Vec<(String, Option<String>)>, _> = Entity::find()
        .select_only()
        .columns([Column::StripeSubscriptionId, Column::CheckoutSessionId])
        .filter(any.iter().fold(Condition::any(), |any, column| {
            any.add(column.is_in(ids.iter().copied()))
        }))
        .into_tuple()
        .all(db)
        .await;
    let rows = rows.map_err(StoreError::doing("find a customer's subscriptions"))?;
    Ok(rows
        .into_iter()
        .flat_map(|(subscription, session)| [Some(subscription), session])
        .flatten()
        .collect())
}

/// Returns a subscription of this user in this mode that has not ended and is not `id`.
pub async fn find_other_of_user<C: ConnectionTrait>(
    db: &C,
    user: ClientReferenceId<'_>,
    livemode: bool,
    id: Option<&str>,
) -> Result<Option<String>, StoreError> {
    const ENDED: [&str; 2] = ["canceled", "incomplete_expired"];
    let mut others = Entity::find()
        .select_only()
        .column(Column::StripeSubscriptionId)
        .filter(Column::ClientReferenceId.eq(user.0))
        .filter(Column::Livemode.eq(livemode))
        .filter(Column::Status.is_null().or(Column::Status.is_not_in(ENDED)));
    if let Some(id) = id {
        others = others.filter(Column::StripeSubscriptionId.ne(id));
    }
    others
        .into_tuple()
        .one(db)
        .await
        .map_err(StoreError::doing("find the user's subscriptions"))
}

/// Writes `rows`, which are in the order of their keys: two writers that take locks in different
/// orders deadlock. Returns the keys that were written. Another worker has written the other rows
/// since they were read.
pub async fn save(
    tx: &Transaction,
    rows: Vec<Row>,
    now: OffsetDateTime,
) -> Result<HashSet<String>, StoreError> {
    debug_assert!(rows.is_sorted_by(|a, b| a.stripe_subscription_id < b.stripe_subscription_id));
    let doing = StoreError::doing(SAVE);
    // SQLite rewrites the index entries of every assigned column, a page for each, even if they do
    // not change. PostgreSQL compares first.
    let (indexed, others) = match tx.get_database_backend() {
        DbBackend::Sqlite => by_index_entries(tx, rows).await.map_err(&doing)?,
        _ => (rows, Vec::new()),
    };
    let mut written = HashSet::new();
    for (rows, entries) in [(indexed, OVERWRITE_INDEXED), (others, "")] {
        let rows = rows
            .into_iter()
            .map(|row| cells(row, now))
            .collect::<Result<Vec<_>, _>>();
        let rows = rows.map_err(StoreError::doing(SAVE))?;
        let then = [CONFLICT, entries, OVERWRITE].concat();
        for row in super::rows::insert(
            tx,
            Insert {
                then: &then,
                ..INSERT
            },
            rows,
        )
        .await
        .map_err(&doing)?
        {
            written.insert(row.try_get("", "stripe_subscription_id").map_err(&doing)?);
        }
    }
    Ok(written)
}

/// Splits `rows` into those with changed index entries, and those that are new or keep them.
async fn by_index_entries(tx: &Transaction, rows: Vec<Row>) -> Result<(Vec<Row>, Vec<Row>), DbErr> {
    let known: Vec<&str> = rows
        .iter()
        .filter(|row| row.version > 1)
        .map(|row| row.stripe_subscription_id.as_str())
        .collect();
    if known.is_empty() {
        return Ok((Vec::new(), rows));
    }
    let wanted = super::among_ids(tx.get_database_backend(), KEY, &known);
    let query = keys()
        .columns(INDEXED)
        .column(Column::Livemode)
        .filter(wanted)
        .into_query();
    let mut entries = HashMap::new();
    for row in tx.query_all(&query).await? {
        let id: String = row.try_get("", "stripe_subscription_id")?;
        // A person may have written a value that is not text.
        let entry = |column: Column| row.try_get::<Option<String>>("", column.as_str()).ok();
        let livemode: Option<bool> = row.try_get("", "livemode").ok();
        entries.insert(id, (INDEXED.map(entry), livemode));
    }
    let changes = |row: &Row| {
        let subscription = &row.visible.subscription;
        let now = [
            &subscription.stripe_customer_id,
            &subscription.client_reference_id,
            &row.visible.checkout_session_id,
        ]
        .map(Some);
        let held = entries
            .get(&row.stripe_subscription_id)
            .map(|(held, livemode)| (held.each_ref().map(Option::as_ref), *livemode));
        row.version > 1 && held != Some((now, Some(subscription.livemode)))
    };
    Ok(rows.into_iter().partition(changes))
}

fn cells(row: Row, now: OffsetDateTime) -> Result<[Cell; 32], serde_json::Error> {
    let visible = row.visible;
    let subscription = visible.subscription;
    let (last_event_id, last_event_created) = visible.last_event.unzip();
    Ok([
        row.stripe_subscription_id.into(),
        subscription.stripe_customer_id.into(),
        subscription.client_reference_id.into(),
        visible.checkout_session_id.into(),
        subscription.status.into(),
        subscription.created.into(),
        subscription.start_date.into(),
        subscription.cancel_at.into(),
        subscription.canceled_at.into(),
        subscription.cancel_at_period_end.into(),
        subscription.current_period_start.into(),
        subscription.current_period_end.into(),
        subscription.trial_end.into(),
        subscription.ended_at.into(),
        serde_json::to_string(&subscription.items)?.into(),
        serde_json::to_string(&subscription.metadata)?.into(),
        serde_json::to_string(&subscription.subscription_metadata)?.into(),
        subscription.livemode.into(),
        subscription.stripe_account_id.into(),
        subscription.uncertain.into(),
        row.revision.into(),
        row.version.into(),
        last_event_id.map(String::from).into(),
        last_event_created
            .and_then(|at| Timestamp::from_unix(at).ok())
            .into(),
        serde_json::to_string(&row.state)?.into(),
        row.last_sent.to_json().into(),
        now.into(),
        now.into(),
        subscription.trial_start.into(),
        subscription.collection_method.into(),
        subscription.cancellation_reason.into(),
        subscription
            .pause_collection
            .map(|pause| serde_json::to_string(&pause))
            .transpose()?
            .into(),
    ])
}
