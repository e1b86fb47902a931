//! Rows are read from both databases as the worker wrote them: every column, filled and null, new
//! and overwritten.

use std::time::Duration;

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, Item, PauseCollection, Subscription, Timestamp};
use litestripe_contract::subject::SUBSCRIPTION_CHANGED;
use litestripe_contract::trace::TraceContext;
use litestripe_domain::event::NotifiedObject;
use litestripe_domain::merge::{State, Visible};
use litestripe_domain::payment::PaymentIds;
use litestripe_domain::question::{Details, Kind, Notified, Question};
use litestripe_domain::row::{LastSent, Row};
use litestripe_domain::signal::NewSignal;
use litestripe_entity::{question as question_entity, signal_outbox, stripe_subscription};
use litestripe_harness::bridge::{Database, DatabaseKind};
use litestripe_worker::settings::{self, DatabaseSettings};
use litestripe_worker::store::question::Due;
use litestripe_worker::store::{Store, outbox, question, subscription};
use sea_orm::{EntityTrait as _, QueryOrder as _};
use serde_json::json;
use time::OffsetDateTime;

on_both_databases!(subscriptions, signals, questions, thin_events_are_gathered);

/// SQLite gets them in statements of 64, 8, 1 and 1 rows.
const ROWS: usize = 74;

/// All characters that PostgreSQL's array notation has to quote.
const TEXT: &str = r#"a "quoted" \ one, {two}, NULL"#;

async fn subscriptions(kind: DatabaseKind) {
    let (_database, store) = open(kind).await;
    type Make = fn(usize) -> Row;
    let rounds: [[Make; 2]; 3] = [
        [filled, bare],
        [bare, filled],
        [filled, bare_of_the_same_user],
    ];
    for (version, kinds) in (1..).zip(rounds) {
        let rows = |version| {
            (0..ROWS)
                .map(|n| Row {
                    version,
                    ..kinds[n % 2](n)
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(save(&store, rows(version), now(version)).await, ROWS);
        let found = stripe_subscription::Entity::find()
            .order_by_asc(stripe_subscription::Column::StripeSubscriptionId)
            .all(store.connection())
            .await
            .expect("rows are read");
        let expected: Vec<_> = rows(version)
            .into_iter()
            .map(|row| model(row, now(1), now(version)))
            .collect();
        assert_eq!(found, expected, "in round {version}");
        assert_eq!(
            save(&store, rows(version + 2), now(9)).await,
            0,
            "a version that was not read is overwritten"
        );
    }
}

async fn save(store: &Store, rows: Vec<Row>, now: OffsetDateTime) -> usize {
    let tx = store.begin().await.expect("the database answers");
    let written = subscription::save(&tx, rows, now)
        .await
        .expect("rows are written");
    tx.commit().await.expect("they are committed");
    written.len()
}

fn bare(number: usize) -> Row {
    Row {
        stripe_subscription_id: format!("sub_{number:02}"),
        ..Row::default()
    }
}

fn bare_of_the_same_user(number: usize) -> Row {
    let mut row = bare(number);
    let filled = filled(number).visible.subscription;
    row.visible.subscription.stripe_customer_id = filled.stripe_customer_id;
    row.visible.subscription.client_reference_id = filled.client_reference_id;
    row
}

fn filled(number: usize) -> Row {
    let state: State = serde_json::from_str(r#"{"created_seen":true}"#).expect("it is a state");
    let metadata = |key: &str| [(key.to_owned(), TEXT.to_owned())].into();
    let subscription = Subscription {
        stripe_customer_id: Some(format!("cus_{number}")),
        client_reference_id: Some(TEXT.to_owned()),
        status: Some("NULL".to_owned()),
        created: Some(at(-62_135_596_800)),
        start_date: Some(at(2)),
        cancel_at: Some(at(3)),
        canceled_at: Some(at(4)),
        ended_at: Some(at(5)),
        trial_end: Some(at(6)),
        trial_start: Some(at(5)),
        cancellation_reason: Some(TEXT.to_owned()),
        collection_method: Some("null".to_owned()),
        pause_collection: Some(PauseCollection {
            behavior: Some(TEXT.to_owned()),
            resumes_at: Some(at(9)),
        }),
        current_period_start: Some(at(7)),
        current_period_end: Some(at(253_402_300_799)),
        cancel_at_period_end: true,
        items: vec![Item {
            price: Some(TEXT.to_owned()),
            quantity: Some(1),
            ..Item::default()
        }],
        metadata: metadata("customer.subscription.created.a"),
        subscription_metadata: metadata("b"),
        livemode: true,
        stripe_account_id: Some(String::new()),
        uncertain: true,
    };
    let visible = Visible {
        subscription,
        checkout_session_id: Some("cs_1".to_owned()),
        last_event: Some((event_id(), 8)),
        ..Visible::default()
    };
    let last_sent = LastSent::Older(Box::new(bare(number).visible.subscription));
    Row {
        state,
        visible,
        revision: 9,
        last_sent,
        ..bare(number)
    }
}

fn model(
    row: Row,
    dt_created: OffsetDateTime,
    dt_last_updated: OffsetDateTime,
) -> stripe_subscription::Model {
    let Visible {
        subscription,
        checkout_session_id,
        last_event,
        ..
    } = row.visible;
    let time = |at: Option<Timestamp>| at.map(Timestamp::get);
    stripe_subscription::Model {
        stripe_subscription_id: row.stripe_subscription_id,
        stripe_customer_id: subscription.stripe_customer_id,
        client_reference_id: subscription.client_reference_id,
        checkout_session_id,
        status: subscription.status,
        created: time(subscription.created),
        start_date: time(subscription.start_date),
        cancel_at: time(subscription.cancel_at),
        canceled_at: time(subscription.canceled_at),
        cancel_at_period_end: subscription.cancel_at_period_end,
        current_period_start: time(subscription.current_period_start),
        current_period_end: time(subscription.current_period_end),
        trial_end: time(subscription.trial_end),
        ended_at: time(subscription.ended_at),
        trial_start: time(subscription.trial_start),
        collection_method: subscription.collection_method,
        cancellation_reason: subscription.cancellation_reason,
        pause_collection: subscription.pause_collection.map(|pause| json!(pause)),
        items: json!(subscription.items),
        metadata: json!(subscription.metadata),
        subscription_metadata: json!(subscription.subscription_metadata),
        livemode: subscription.livemode,
        stripe_account_id: subscription.stripe_account_id,
        uncertain: subscription.uncertain,
        revision: row.revision,
        version: row.version,
        last_event_id: last_event.as_ref().map(|(id, _)| id.to_string()),
        last_event_created: last_event.map(|(_, created)| at(created).get()),
        merge_state: serde_json::to_string(&row.state).expect("a state is JSON"),
        last_sent: row.last_sent.to_json(),
        dt_created,
        dt_last_updated,
    }
}

fn trace(number: i64) -> Option<TraceContext> {
    let traceparent = format!("00-{number:032x}-{number:016x}-01");
    TraceContext::parse(&traceparent, Some(TEXT))
}

async fn signals(kind: DatabaseKind) {
    let (_database, store) = open(kind).await;
    let signal = |number: i64| NewSignal {
        entity_id: format!("sub_{number}"),
        subject: SUBSCRIPTION_CHANGED,
        message_id: format!("sub_{number}:1"),
        event_created: number,
        trace: (number % 2 == 0).then(|| trace(number)).flatten(),
        received: (number % 3 == 0).then(|| OffsetDateTime::UNIX_EPOCH + Duration::from_millis(1)),
        body: json!({ "number": number, "text": TEXT }).to_string(),
    };
    let tx = store.begin().await.expect("the database answers");
    outbox::insert(&tx, (1..=3).map(signal).collect(), now(1))
        .await
        .expect("signals are written");
    tx.commit().await.expect("they are committed");
    let found = outbox::oldest(
        store.connection(),
        store.low_water(),
        &outbox::all_shards(),
        &[],
        9,
    )
    .await
    .expect("signals are read");
    assert!(found.is_sorted_by(|a, b| a.id < b.id));
    let expected =
        found
            .iter()
            .zip((1..=3).map(signal))
            .map(|(row, signal)| signal_outbox::Model {
                id: row.id,
                shard: row.shard,
                entity_id: signal.entity_id,
                subject: signal.subject.to_owned(),
                message_id: signal.message_id,
                event_created: signal.event_created,
                traceparent: signal
                    .trace
                    .as_ref()
                    .map(|trace| trace.traceparent().to_owned()),
                tracestate: signal
                    .trace
                    .and_then(|trace| trace.tracestate().map(str::to_owned)),
                body: signal.body,
                dt_created: now(1),
                received_at_ms: signal.received.map(|_| 1),
            });
    assert_eq!(found, expected.collect::<Vec<_>>());
    assert_eq!(found.len(), 3);
}

async fn questions(kind: DatabaseKind) {
    let (_database, store) = open(kind).await;
    let details = |payment, reference: &str, is_paid| Details::Lookup {
        payment,
        client_reference_id: reference.to_owned(),
        is_paid,
    };
    let bare = Question {
        entity_id: "sub_1".to_owned(),
        details: details(PaymentIds::default(), "", false),
        due_at: now(1),
        attempts: 0,
        stripe_account_id: None,
        livemode: false,
        event: event(3),
        trace: None,
        position: 4,
    };
    let payment = PaymentIds {
        checkout_session_id: Some("cs_1".to_owned()),
        stripe_customer_id: Some("cus_1".to_owned()),
        stripe_subscription_id: Some("sub_1".to_owned()),
    };
    let filled = Question {
        details: details(payment.clone(), TEXT, true),
        due_at: now(2),
        attempts: 5,
        stripe_account_id: Some("acct_1".to_owned()),
        livemode: true,
        event: event(6),
        trace: trace(6),
        position: 7,
        ..bare.clone()
    };
    let row = |question: Question, payment: PaymentIds, reference: &str, is_paid| {
        let trace = question.trace;
        question_entity::Model {
            entity_id: question.entity_id,
            kind: "lookup".to_owned(),
            due_at: question.due_at,
            attempts: question.attempts,
            checkout_session_id: payment.checkout_session_id,
            stripe_customer_id: payment.stripe_customer_id,
            stripe_subscription_id: payment.stripe_subscription_id,
            stripe_account_id: question.stripe_account_id,
            client_reference_id: Some(reference.to_owned()),
            is_paid,
            livemode: question.livemode,
            event_id: question.event.id.to_string(),
            event_type: question.event.event_type.to_string(),
            event_created: question.event.created.unix(),
            traceparent: trace.as_ref().map(|trace| trace.traceparent().to_owned()),
            tracestate: trace.and_then(|trace| trace.tracestate().map(str::to_owned)),
            stream_sequence: question.position.cast_signed(),
            context: None,
            notifications: None,
            ask_by: None,
            last_error: None,
            dt_created: None,
        }
    };
    // A question that is asked again stays paid, and keeps its subscription, account and mode.
    let again = question_entity::Model {
        stripe_subscription_id: payment.stripe_subscription_id.clone(),
        stripe_account_id: filled.stripe_account_id.clone(),
        livemode: true,
        ..row(bare.clone(), PaymentIds::default(), "", true)
    };
    for (question, expected) in [
        (filled.clone(), row(filled, payment, TEXT, true)),
        (bare.clone(), again),
    ] {
        let other = Question {
            entity_id: "sub_2".to_owned(),
            ..bare.clone()
        };
        let tx = store.begin().await.expect("the database answers");
        question::save(&tx, vec![other.clone(), question], now(0))
            .await
            .expect("questions are written");
        tx.commit().await.expect("they are committed");
        let found = question_entity::Entity::find()
            .order_by_asc(question_entity::Column::EntityId)
            .all(store.connection())
            .await;
        // PostgreSQL dates them by its own clock.
        let undated = |model: question_entity::Model| question_entity::Model {
            due_at: now(0),
            dt_created: None,
            ..model
        };
        let found: Vec<_> = found.expect("questions are read").into_iter().collect();
        assert!(
            found
                .iter()
                .all(|model| model.due_at > now(0) && model.dt_created.is_some())
        );
        assert_eq!(
            found.into_iter().map(undated).collect::<Vec<_>>(),
            [expected, row(other, PaymentIds::default(), "", false)].map(undated)
        );
    }
}

/// Saves a question about thin events like those that batches save, and returns the stored one.
async fn save_notified(
    store: &Store,
    due_at: i64,
    ask_by: i64,
    name: &str,
) -> question_entity::Model {
    let event_type = EventType::parse(name).expect("it is a type");
    let event = EventReference {
        event_type: event_type.clone(),
        ..event(due_at)
    };
    let details = Details::Notification(Notified {
        object: NotifiedObject::Subscription("sub_1".to_owned()),
        context: Some("acct_1".to_owned()),
        notifications: [(event_type, event.clone())].into(),
        ask_by: hour(ask_by),
    });
    let question = Question {
        entity_id: "sub_1".to_owned(),
        details,
        due_at: hour(due_at),
        attempts: 0,
        stripe_account_id: Some("acct_1".to_owned()),
        livemode: false,
        event,
        trace: None,
        position: due_at.cast_unsigned(),
    };
    let tx = store.begin().await.expect("the database answers");
    question::save(&tx, vec![question], OffsetDateTime::now_utc())
        .await
        .expect("questions are written");
    tx.commit().await.expect("they are committed");
    let found = question_entity::Entity::find()
        .one(store.connection())
        .await;
    found.expect("questions are read").expect("there is one")
}

async fn thin_events_are_gathered(kind: DatabaseKind) {
    const UPDATED: &str = "v1.customer.subscription.updated";
    const ACTIVE: &str = "v1.customer.subscription.active";
    let (_database, store) = open(kind).await;
    let times = |model: &question_entity::Model| (hours(model.due_at), model.ask_by.map(hours));
    save_notified(&store, 10, 15, UPDATED).await;
    let second = save_notified(&store, 12, 17, ACTIVE).await;
    assert_eq!(times(&second), (12, Some(15)), "it waits for more");
    let third = save_notified(&store, 16, 21, UPDATED).await;
    assert_eq!(times(&third), (15, Some(15)), "but not longer");

    let due = Due {
        kind: Kind::Notification,
        livemode: Some(false),
        limit: 9,
    };
    let other_mode = Due {
        livemode: Some(true),
        ..due
    };
    let lease = Duration::from_secs(100 * 60 * 60);
    let taken = question::take(&store, other_mode, lease).await;
    assert!(taken.expect("the database answers").is_empty());
    let taken = question::take(&store, due, lease).await;
    let taken = taken.expect("the database answers").pop();
    let taken = taken.expect("it is due");
    let Details::Notification(notified) = &taken.question.details else {
        panic!("{taken:?}");
    };
    let names: Vec<_> = notified
        .notifications
        .iter()
        .map(|(name, event)| (name.as_str(), event.created))
        .collect();
    assert_eq!(names, [(ACTIVE, at(12)), (UPDATED, at(16))]);

    let during = save_notified(&store, 32, 37, UPDATED).await;
    assert_eq!(
        times(&during),
        (130, Some(37)),
        "it is asked again when the fetch has ended, not beside it"
    );
    let redelivered = save_notified(&store, 31, 36, UPDATED).await;
    assert_eq!(redelivered.stream_sequence, 32, "the newest one is open");
    let removed = question::remove_answered(store.connection(), &taken).await;
    assert!(!removed.expect("the database answers"));
    for (mark, open) in [(31, 1), (32, 0)] {
        question::remove_fetched(store.connection(), &[("sub_1", mark), ("sub_2", 99)])
            .await
            .expect("the database answers");
        let left = question::count_open(store.connection()).await;
        let left: u64 = left
            .expect("the database answers")
            .iter()
            .map(|open| open.count)
            .sum();
        assert_eq!(left, open, "a fetch that began at {mark}");
    }
}

pub(crate) async fn open(kind: DatabaseKind) -> (Database, Store) {
    let mut database = Database::prepare(kind);
    database.resume().await;
    let kind = match kind {
        DatabaseKind::Sqlite => settings::DatabaseKind::Sqlite,
        DatabaseKind::Postgres => settings::DatabaseKind::Postgres,
    };
    let settings = DatabaseSettings {
        url: database.url().into(),
        kind,
        schema: None,
        auto_migrate: true,
    };
    let store = Store::open(&settings)
        .await
        .expect("the database can be opened");
    store.migrate_up().await.expect("it can be migrated");
    (database, store)
}

fn event(created: i64) -> EventReference {
    let event_type = EventType::parse("customer.subscription.created").expect("it is a type");
    EventReference {
        id: event_id(),
        event_type,
        created: at(created),
    }
}

fn event_id() -> EventId {
    EventId::parse("evt_1").expect("it is an id")
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_unix(seconds).expect("RFC 3339 can write it")
}

/// A time that number of hours after a start that is 30 hours ago.
fn hour(hour: i64) -> OffsetDateTime {
    OffsetDateTime::now_utc() + time::Duration::hours(hour - 30)
}

/// The nearest hour, counted as in [`hour`].
fn hours(at: OffsetDateTime) -> i64 {
    30 + ((at - OffsetDateTime::now_utc()).as_seconds_f64() / 3600.0).round() as i64
}

/// A time with the fraction of a second that both databases keep.
fn now(minute: i64) -> OffsetDateTime {
    at(1_795_430_000 + 60 * minute).get() + Duration::from_millis(123)
}
