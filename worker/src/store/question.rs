//! `litestripe_question`: open questions, each taken by one worker at a time.
//!
//! Invariant: a question that was taken becomes due again unless it is answered, so that none is
//! lost when a worker dies.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, Timestamp};
use litestripe_contract::trace::TraceContext;
use litestripe_domain::event::NotifiedObject;
use litestripe_domain::payment::PaymentIds;
use litestripe_domain::question::{Details, Kind, Notified, Question, later};
use litestripe_entity::question::{Column, Entity, Model};
use sea_orm::sea_query::{Expr, ExprTrait as _, LockBehavior, LockType};
use sea_orm::{
    ColumnTrait as _, Condition, ConnectionTrait, DbBackend, EntityTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, QueryTrait as _,
};
use time::OffsetDateTime;

use super::rows::{Cell, Insert};
use super::{Store, clock};
use crate::error::StoreError;
use crate::store::Transaction;

const INSERT: Insert<'_> = Insert {
    into: "litestripe_question (entity_id, kind, due_at, attempts, checkout_session_id, stripe_customer_id, \
        stripe_subscription_id, stripe_account_id, client_reference_id, is_paid, livemode, event_id, event_type, \
        event_created, traceparent, tracestate, stream_sequence, context, notifications, ask_by, dt_created)",
    select: "UNNEST($1::text[]), UNNEST($2::text[]), \
        LEAST(clock_timestamp() + UNNEST($3::bigint[]) * interval '1 microsecond', '9999-12-31Z'), UNNEST($4::integer[]), \
        UNNEST($5::text[]), UNNEST($6::text[]), UNNEST($7::text[]), UNNEST($8::text[]), UNNEST($9::text[]), \
        UNNEST($10::boolean[]), UNNEST($11::boolean[]), UNNEST($12::text[]), UNNEST($13::text[]), \
        UNNEST($14::bigint[]), UNNEST($15::text[]), UNNEST($16::text[]), UNNEST($17::bigint[]), UNNEST($18::text[]), \
        UNNEST($19::text[]), to_timestamp(UNNEST($20::bigint[])), \
        clock_timestamp() + UNNEST($21::bigint[]) * interval '1 microsecond'",
    then: "",
};

/// Replaces an open question that is saved again. Once paid, a session stays paid, in whatever
/// order its events arrive. Attempts are counted anew.
const REPLACE: &str = "ON CONFLICT (entity_id, kind) DO UPDATE SET attempts = excluded.attempts, last_error = NULL, \
    checkout_session_id = excluded.checkout_session_id, stripe_customer_id = excluded.stripe_customer_id, \
    client_reference_id = excluded.client_reference_id, event_id = excluded.event_id, \
    event_type = excluded.event_type, event_created = excluded.event_created, \
    traceparent = excluded.traceparent, tracestate = excluded.tracestate, context = excluded.context, \
    is_paid = litestripe_question.is_paid OR excluded.is_paid, ";

/// A question about thin events keeps those that it has, and waits for more until `ask_by`. If it
/// is due later than the new one and has no error, it is taken or postponed, and stays so: two
/// fetches of one object must not overlap, because the later answer may hold the earlier state. The
/// worker that has taken it sees by the sequence that it was saved again. The sequence is the
/// newest one, also after a redelivery.
const GATHER_POSTGRES: &str = "due_at = CASE WHEN litestripe_question.ask_by IS NULL OR litestripe_question.last_error IS NOT NULL THEN excluded.due_at \
        WHEN litestripe_question.due_at <= excluded.due_at THEN LEAST(excluded.due_at, litestripe_question.ask_by) ELSE litestripe_question.due_at END, \
    ask_by = CASE WHEN litestripe_question.due_at <= excluded.due_at THEN litestripe_question.ask_by ELSE excluded.ask_by END, \
    stream_sequence = CASE WHEN litestripe_question.ask_by IS NULL THEN excluded.stream_sequence \
        ELSE GREATEST(litestripe_question.stream_sequence, excluded.stream_sequence) END, \
    notifications = (COALESCE(litestripe_question.notifications, '{}')::jsonb || excluded.notifications::jsonb)::text";

const GATHER_SQLITE: &str = "due_at = CASE WHEN litestripe_question.ask_by IS NULL OR litestripe_question.last_error IS NOT NULL THEN excluded.due_at \
        WHEN litestripe_question.due_at <= excluded.due_at THEN MIN(excluded.due_at, litestripe_question.ask_by) ELSE litestripe_question.due_at END, \
    ask_by = CASE WHEN litestripe_question.due_at <= excluded.due_at THEN litestripe_question.ask_by ELSE excluded.ask_by END, \
    stream_sequence = CASE WHEN litestripe_question.ask_by IS NULL THEN excluded.stream_sequence \
        ELSE MAX(litestripe_question.stream_sequence, excluded.stream_sequence) END, \
    notifications = json_patch(COALESCE(litestripe_question.notifications, '{}'), excluded.notifications)";

/// A question that this process has taken for a limited time.
#[derive(Debug, Clone)]
pub struct Taken {
    pub question: Question,
    /// When the question becomes due again. If it was saved again meanwhile, the table has another
    /// time, and the question no longer belongs to this process.
    leased_until: OffsetDateTime,
    /// Whether the last attempt failed.
    pub is_failing: bool,
    /// When the question was first saved, if the version of then wrote it.
    pub opened: Option<OffsetDateTime>,
}

/// Saves `questions`, which were made at `now`. An existing question is replaced and asked again.
pub async fn save(
    tx: &Transaction,
    questions: Vec<Question>,
    now: OffsetDateTime,
) -> Result<(), StoreError> {
    // One statement may not name a key twice. The last of several has the newest values.
    let mut by_key: BTreeMap<_, Question> = BTreeMap::new();
    for question in questions {
        match by_key.entry((question.entity_id.clone(), question.kind().as_str())) {
            Entry::Vacant(entry) => drop(entry.insert(question)),
            Entry::Occupied(mut entry) => entry.get_mut().replace(question),
        }
    }
    let backend = tx.get_database_backend();
    let gather = match backend {
        DbBackend::Postgres => GATHER_POSTGRES,
        _ => GATHER_SQLITE,
    };
    let insert = Insert {
        then: &[REPLACE, gather].concat(),
        ..INSERT
    };
    let time = |at: OffsetDateTime| match backend {
        DbBackend::Postgres => Cell::from(microseconds_until(at, now)),
        _ => Cell::from(at),
    };
    let rows = by_key
        .into_values()
        .map(|question| cells(question, time, now));
    let put = super::rows::insert(tx, insert, rows.collect()).await;
    put.map(drop).map_err(StoreError::doing("save questions"))
}

/// Returns how long after `now` the time `at` is. PostgreSQL adds it to its own clock, which is not
/// that of `now`. At most a year, because a sum beyond the calendar is an error: a question that is
/// due later is then asked too early, which does no harm.
fn microseconds_until(at: OffsetDateTime, now: OffsetDateTime) -> i64 {
    const MAX: time::Duration = time::Duration::days(365);
    let left = (at - now).clamp(-MAX, MAX).whole_microseconds();
    i64::try_from(left).expect("a year has fewer microseconds")
}

fn cells(
    question: Question,
    time: impl Fn(OffsetDateTime) -> Cell,
    now: OffsetDateTime,
) -> [Cell; 21] {
    let (kind, payment) = (question.kind(), question.payment());
    let (mut client_reference_id, mut is_paid, mut notified) = (None, false, None);
    match question.details {
        Details::Lookup {
            client_reference_id: reference,
            is_paid: paid,
            ..
        } => (client_reference_id, is_paid) = (Some(reference), paid),
        Details::Notification(details) => notified = Some(details),
        Details::Grace { .. } | Details::Fetch | Details::Erase | Details::Removal => {}
    }
    let notifications = notified
        .as_ref()
        .map(|notified| write_notifications(&notified.notifications));
    let (traceparent, tracestate) = question.trace.map(TraceContext::into_parts).unzip();
    let ask_by = notified.as_ref().map(|notified| notified.ask_by.into());
    [
        question.entity_id.into(),
        kind.as_str().to_owned().into(),
        time(question.due_at),
        question.attempts.into(),
        payment.checkout_session_id.into(),
        payment.stripe_customer_id.into(),
        payment.stripe_subscription_id.into(),
        question.stripe_account_id.into(),
        client_reference_id.into(),
        is_paid.into(),
        question.livemode.into(),
        question.event.id.to_string().into(),
        question.event.event_type.to_string().into(),
        question.event.created.unix().into(),
        traceparent.into(),
        tracestate.flatten().into(),
        question.position.cast_signed().into(),
        notified.and_then(|notified| notified.context).into(),
        notifications.into(),
        Cell::Time(ask_by),
        time(now),
    ]
}

/// Writes thin events by type, each as `created`, a space and the id: two such objects can be
/// merged in SQL.
fn write_notifications(notifications: &BTreeMap<EventType, EventReference>) -> String {
    let by_type: BTreeMap<&str, String> = notifications
        .iter()
        .map(|(name, event)| {
            let (created, id) = (event.created.unix(), &event.id);
            (name.as_str(), format!("{created} {id}"))
        })
        .collect();
    serde_json::to_string(&by_type).expect("a map of texts can be written as JSON")
}

fn parse_notifications(json: Option<&str>) -> BTreeMap<EventType, EventReference> {
    let by_type: BTreeMap<EventType, String> = json
        .and_then(|json| serde_json::from_str(json).ok())
        .unwrap_or_default();
    let event = |(event_type, text): (EventType, String)| {
        let (created, id) = text.split_once(' ')?;
        let event = EventReference {
            id: EventId::parse(id).ok()?,
            event_type: event_type.clone(),
            created: Timestamp::from_unix(created.parse().ok()?).ok()?,
        };
        Some((event_type, event))
    };
    by_type.into_iter().filter_map(event).collect()
}

/// Returns the question of a row. `None` if a later version of the program wrote it.
fn question(row: Model) -> Option<Question> {
    let event = EventReference {
        id: EventId::parse(row.event_id).ok()?,
        event_type: EventType::parse(row.event_type).ok()?,
        created: Timestamp::from_unix(row.event_created).ok()?,
    };
    let details = match Kind::parse(&row.kind)? {
        Kind::Lookup => Details::Lookup {
            payment: PaymentIds {
                checkout_session_id: row.checkout_session_id,
                stripe_customer_id: row.stripe_customer_id,
                stripe_subscription_id: row.stripe_subscription_id,
            },
            client_reference_id: row.client_reference_id.unwrap_or_default(),
            is_paid: row.is_paid,
        },
        Kind::Grace => Details::Grace {
            stripe_customer_id: row.stripe_customer_id,
        },
        Kind::Fetch => Details::Fetch,
        Kind::Erase => Details::Erase,
        Kind::Removal => Details::Removal,
        Kind::Notification => Details::Notification(Notified {
            object: match row.checkout_session_id {
                Some(id) => NotifiedObject::CheckoutSession(id),
                None => NotifiedObject::Subscription(row.entity_id.clone()),
            },
            context: row.context,
            notifications: parse_notifications(row.notifications.as_deref()),
            ask_by: row.ask_by.unwrap_or(row.due_at),
        }),
    };
    Some(Question {
        entity_id: row.entity_id,
        details,
        due_at: row.due_at,
        attempts: row.attempts,
        stripe_account_id: row.stripe_account_id,
        livemode: row.livemode,
        event,
        trace: row
            .traceparent
            .and_then(|traceparent| TraceContext::parse(&traceparent, row.tracestate.as_deref())),
        position: row.stream_sequence.cast_unsigned(),
    })
}

/// Which questions are taken.
#[derive(Debug, Clone, Copy)]
pub struct Due {
    pub kind: Kind,
    /// Only those of this mode, if set.
    pub livemode: Option<bool>,
    /// How many at most.
    pub limit: u64,
}

/// Takes questions that are due. Each becomes due again after `lease`, by the database's clock.
///
/// Until a replay has reached its end, rows may be half rebuilt, so questions that it may still
/// answer are not taken.
pub async fn take(
    store: &Store,
    Due {
        kind,
        livemode,
        limit,
    }: Due,
    lease: Duration,
) -> Result<Vec<Taken>, StoreError> {
    let doing = StoreError::doing("take questions");
    let now = clock::now(store.connection()).await?;
    let mut due = is_of(kind).and(Column::DueAt.lte(now));
    if let Some(livemode) = livemode {
        due = due.and(Column::Livemode.eq(livemode));
    }
    // Usually none is due, and this check takes no write lock.
    let any = Entity::find()
        .filter(due.clone())
        .order_by_asc(Column::DueAt)
        .one(store.connection())
        .await
        .map_err(&doing)?;
    if any.is_none() {
        return Ok(Vec::new());
    }
    if let Some(last) = super::replay::rebuilding_until(store.connection(), now).await? {
        // A grace question waits for the end: the replay may still reapply the Checkout Session
        // that answers it.
        if kind == Kind::Grace {
            return Ok(Vec::new());
        }
        due = due.and(Column::StreamSequence.gt(last.cast_signed()));
    }
    store
        .uncancelled(async move |tx| take_due(tx, kind, due, limit, (now, lease)).await)
        .await
}

/// The kind as a literal: one of the indexes is only of one kind.
fn is_of(kind: Kind) -> Expr {
    Expr::cust(format!("kind = '{}'", kind.as_str()))
}

async fn take_due(
    tx: Transaction,
    kind: Kind,
    due: Expr,
    limit: u64,
    (now, lease): (OffsetDateTime, Duration),
) -> Result<Vec<Taken>, StoreError> {
    let doing = StoreError::doing("take questions");
    // PostgreSQL keeps microseconds, and this is compared later.
    let leased_until = later(now, lease).truncate_to_millisecond();
    let mut oldest = Entity::find()
        .filter(due)
        .order_by_asc(Column::DueAt)
        .limit(limit);
    if tx.get_database_backend() == DbBackend::Postgres {
        oldest = oldest.lock_with_behavior(LockType::Update, LockBehavior::SkipLocked);
    }
    let taken = oldest.all(&tx).await.map_err(&doing)?;
    let keys = taken.iter().map(|row| row.entity_id.as_str());
    let keys = Column::EntityId
        .is_in(keys)
        .and(Column::Kind.eq(kind.as_str()));
    if !taken.is_empty() {
        let moved = Entity::update_many()
            .col_expr(Column::DueAt, Expr::value(leased_until))
            .col_expr(Column::LastError, Expr::value(None::<String>))
            .filter(keys);
        moved.exec(&tx).await.map_err(&doing)?;
    }
    tx.commit().await.map_err(&doing)?;
    Ok(taken
        .into_iter()
        .filter_map(|row| {
            Some(Taken {
                is_failing: row.last_error.is_some(),
                opened: row.dt_created,
                question: question(row)?,
                leased_until,
            })
        })
        .collect())
}

/// When and after what a question is asked again.
#[derive(Debug, Clone)]
pub struct Retry {
    pub after: Duration,
    /// How many attempts in a row had this outcome.
    pub attempts: i32,
    /// Why the attempt failed, if it did.
    pub error: Option<String>,
}

/// Records when the question is asked again, unless it is no longer leased.
pub async fn postpone<C: ConnectionTrait>(
    db: &C,
    taken: &Taken,
    retry: Retry,
) -> Result<(), StoreError> {
    let due_at = later(clock::now(db).await?, retry.after);
    let postponed = Entity::update_many()
        .col_expr(Column::DueAt, Expr::value(due_at))
        .col_expr(Column::Attempts, Expr::value(retry.attempts))
        .col_expr(Column::LastError, Expr::value(retry.error))
        .filter(as_leased(taken))
        .exec(db)
        .await;
    postponed
        .map(|_| ())
        .map_err(StoreError::doing("postpone a question"))
}

/// Questions that one statement locks to change when they are due, at most.
const FREE_MAX: u64 = 1000;

/// Makes up to `count` failing questions of `kind` due: what they wait for may work again.
pub async fn hasten<C: ConnectionTrait>(db: &C, kind: Kind, count: u64) -> Result<(), StoreError> {
    let doing = StoreError::doing("ask failing questions again");
    let now = clock::now(db).await?;
    // A question that is being asked has no error.
    let failing = Column::Kind
        .eq(kind.as_str())
        .and(Column::LastError.is_not_null())
        .and(Column::DueAt.gt(now));
    let some: Vec<String> = Entity::find()
        .select_only()
        .column(Column::EntityId)
        .filter(failing.clone())
        .order_by_asc(Column::DueAt)
        .limit(count)
        .into_tuple()
        .all(db)
        .await
        .map_err(&doing)?;
    if some.is_empty() {
        return Ok(());
    }
    let hastened = Entity::update_many()
        .col_expr(Column::DueAt, Expr::value(now))
        .filter(free(db, kind, failing.and(Column::EntityId.is_in(some))))
        .exec(db)
        .await;
    hastened.map(drop).map_err(doing)
}

/// Corrects times that a clock wrote while it was ahead. Questions of `kind` that are due later
/// than `pause_max` from now become due, failing ones only if they are due later than
/// `failing_max`, and none was opened later than now. Returns how many it corrected: there may be
/// more, unless it is 0.
pub async fn correct_future<C: ConnectionTrait>(
    db: &C,
    kind: Kind,
    pause_max: Duration,
    failing_max: Duration,
) -> Result<u64, StoreError> {
    let doing = StoreError::doing("correct when questions are due");
    let now = clock::now(db).await?;
    let too_late = Column::LastError
        .is_null()
        .or(Column::DueAt.gt(later(now, failing_max)));
    let opened = Expr::case(Column::DtCreated.gt(now), now).finally(Expr::col(Column::DtCreated));
    let too_late = Column::Kind
        .eq(kind.as_str())
        .and(Column::DueAt.gt(later(now, pause_max)))
        .and(too_late);
    // Usually there is none, and this check takes no write lock.
    let any = Entity::find().filter(too_late.clone()).one(db).await;
    if any.map_err(&doing)?.is_none() {
        return Ok(0);
    }
    let corrected = Entity::update_many()
        .col_expr(Column::DueAt, Expr::value(now))
        .col_expr(Column::DtCreated, opened.into())
        .filter(free(db, kind, too_late))
        .exec(db)
        .await;
    corrected.map(|done| done.rows_affected).map_err(doing)
}

/// Narrows `those` of `kind` down to questions that no other transaction has locked, at most
/// [`FREE_MAX`] of them, and locks them in the order in which `save` does. On SQLite it is all of
/// them, because a writer has the whole database.
fn free<C: ConnectionTrait>(db: &C, kind: Kind, those: Expr) -> Expr {
    if db.get_database_backend() != DbBackend::Postgres {
        return those;
    }
    let locked = Entity::find()
        .select_only()
        .column(Column::EntityId)
        .filter(those)
        .order_by_asc(super::bytewise(DbBackend::Postgres, Column::EntityId))
        .limit(FREE_MAX)
        .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked)
        .into_query();
    let kind = Column::Kind.eq(kind.as_str());
    kind.and(Column::EntityId.in_subquery(locked))
}

/// Deletes the answered question, unless it was saved again since it was taken. Returns whether it
/// was deleted.
pub async fn remove_answered<C: ConnectionTrait>(
    db: &C,
    taken: &Taken,
) -> Result<bool, StoreError> {
    let as_taken =
        as_leased(taken).and(Column::StreamSequence.eq(taken.question.position.cast_signed()));
    let deleted = Entity::delete_many().filter(as_taken).exec(db).await;
    deleted
        .map(|done| done.rows_affected > 0)
        .map_err(StoreError::doing("remove an answered question"))
}

fn as_leased(taken: &Taken) -> Expr {
    let question = &taken.question;
    let this = Column::EntityId
        .eq(question.entity_id.as_str())
        .and(Column::Kind.eq(question.kind().as_str()));
    this.and(Column::DueAt.eq(taken.leased_until))
}

/// Deletes the questions of `kind` about `entity_ids`. The transaction holds the locks of the rows
/// that they are about, so that the order in which it locks the questions does not matter.
pub async fn remove<C: ConnectionTrait>(
    db: &C,
    kind: Kind,
    entity_ids: &[&str],
) -> Result<(), StoreError> {
    if entity_ids.is_empty() {
        return Ok(());
    }
    let about = super::among_ids(db.get_database_backend(), Column::EntityId, entity_ids);
    let those = Column::Kind.eq(kind.as_str()).and(about);
    let removed = Entity::delete_many().filter(those).exec(db).await;
    removed
        .map(|_| ())
        .map_err(StoreError::doing("remove questions"))
}

/// Deletes the questions about thin events that fetches answer: each entry has an object's id and
/// the position of the last event when its fetch began.
///
/// A worker that asks deletes its question itself. This deletes those that a replay stored again,
/// and those whose worker died after the fetch was stored.
pub async fn remove_fetched<C: ConnectionTrait>(
    db: &C,
    fetched: &[(&str, u64)],
) -> Result<(), StoreError> {
    if fetched.is_empty() {
        return Ok(());
    }
    let is_answered = fetched.iter().fold(Condition::any(), |any, (id, mark)| {
        any.add(
            Column::EntityId
                .eq(*id)
                .and(Column::StreamSequence.lte(mark.cast_signed())),
        )
    });
    let kind = Column::Kind.eq(Kind::Notification.as_str());
    let mut those = Condition::all().add(kind.clone()).add(is_answered);
    // Locked in the order in which `save` does.
    if db.get_database_backend() == DbBackend::Postgres {
        let locked = Entity::find()
            .select_only()
            .column(Column::EntityId)
            .filter(those)
            .order_by_asc(super::bytewise(DbBackend::Postgres, Column::EntityId))
            .lock(LockType::Update)
            .into_query();
        those = Condition::all()
            .add(kind)
            .add(Column::EntityId.in_subquery(locked));
    }
    let removed = Entity::delete_many().filter(those).exec(db).await;
    removed
        .map(drop)
        .map_err(StoreError::doing("remove answered questions"))
}

/// Counts the open questions by kind and mode. Reads only the rows of failing ones.
pub async fn count_open<C: ConnectionTrait>(db: &C) -> Result<Vec<Open>, StoreError> {
    type Failing = (String, bool, i64, Option<OffsetDateTime>, Option<String>);
    let doing = StoreError::doing("count open questions");
    let by_kind_and_mode = || {
        Entity::find()
            .select_only()
            .columns([Column::Kind, Column::Livemode])
            .expr_as(Expr::cust("COUNT(*)"), "count")
            .group_by(Column::Kind)
            .group_by(Column::Livemode)
    };
    let all: Vec<(String, bool, i64)> = by_kind_and_mode()
        .into_tuple()
        .all(db)
        .await
        .map_err(&doing)?;
    let failing: Vec<Failing> = by_kind_and_mode()
        .column_as(Column::DtCreated.min(), "oldest")
        .column_as(Column::LastError.max(), "error")
        .filter(Column::LastError.is_not_null())
        .into_tuple()
        .all(db)
        .await
        .map_err(&doing)?;
    let open = |(kind, livemode, count): (String, bool, i64)| {
        let failing = failing.iter().find(|of| (&of.0, of.1) == (&kind, livemode));
        Some(Open {
            kind: Kind::parse(&kind)?,
            livemode,
            count: count.cast_unsigned(),
            failing: failing.map_or(0, |of| of.2.cast_unsigned()),
            oldest: failing.and_then(|of| of.3),
            error: failing.and_then(|of| of.4.clone()),
        })
    };
    Ok(all.into_iter().filter_map(open).collect())
}

/// The open questions of a kind and mode.
#[derive(Debug, Clone)]
pub struct Open {
    pub kind: Kind,
    pub livemode: bool,
    pub count: u64,
    /// How many of them failed at the last attempt.
    pub failing: u64,
    /// When the oldest failing one was saved.
    pub oldest: Option<OffsetDateTime>,
    /// Why the last attempt at one of them failed.
    pub error: Option<String>,
}

impl Open {
    /// Whether these questions wait for a key: without one, thin events cannot be followed up.
    /// `key` is the mode of the key, if there is one.
    pub fn waits_for_key(&self, key: Option<bool>) -> bool {
        self.kind == Kind::Notification && key != Some(self.livemode)
    }
}
