//! Statements that lock many rows, on PostgreSQL: all of them in one order, whatever the database's
//! collation, or two of them deadlock. And the outbox beside an old snapshot.

use std::time::Duration;

use litestripe_domain::question::Kind;
use litestripe_harness::{eventually, postgres};
use litestripe_worker::error::StoreError;
use litestripe_worker::settings::{DatabaseKind, DatabaseSettings};
use litestripe_worker::store::{Store, Transaction, orphan, outbox, question, subscription};
use sea_orm::{
    ConnectOptions, ConnectionTrait as _, Database, DatabaseConnection, DbBackend, Statement,
    TransactionTrait as _,
};
use time::OffsetDateTime;

use crate::growth::{commit, orphan_of, question_about, signal};

const DEADLINE: Duration = Duration::from_secs(60);

/// Bytewise, `sub_B` comes before `sub_a`. In a language, after it.
const IDS: [&str; 2] = ["sub_B", "sub_a"];

#[tokio::test]
async fn rows_are_locked_in_the_same_order_under_any_collation() {
    let server = postgres::Server::start().await;
    let admin = connect(&server.url("postgres")).await;
    admin
        .execute_unprepared(
            "CREATE DATABASE icu TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C' LOCALE_PROVIDER icu ICU_LOCALE 'en'",
        )
        .await
        .expect("the server has ICU");
    let url = server.url("icu");
    let store = open(&url).await;
    let other = connect(&url).await;
    let order = "SELECT id FROM (VALUES ('sub_a'), ('sub_B')) AS t(id) ORDER BY id LIMIT 1";
    assert_eq!(
        text(&other, order).await,
        "sub_a",
        "it sorts as a language does"
    );
    for sql in rows() {
        other.execute_unprepared(&sql).await.expect("it is written");
    }

    let lock = async |store: Store| {
        store
            .uncancelled(async |tx: Transaction| subscription::lock(&tx, &IDS).await)
            .await
    };
    locks_in_order(
        &other,
        "stripe_subscription",
        "stripe_subscription_id",
        lock(store.clone()),
    )
    .await;
    let take = async |store: Store| {
        store
            .uncancelled(async |tx: Transaction| orphan::take_unsent(&tx, 500).await.map(drop))
            .await
    };
    locks_in_order(&other, "orphaned_payment", "id", take(store.clone())).await;
    let erase = async |store: Store| {
        orphan::erase_emails_of(store.connection(), &["cus_1"])
            .await
            .map(drop)
    };
    locks_in_order(&other, "orphaned_payment", "id", erase(store.clone())).await;
    let fetched = async |store: Store| {
        question::remove_fetched(store.connection(), &[("sub_a", 1), ("sub_B", 1)]).await
    };
    locks_in_order(
        &other,
        "litestripe_question",
        "entity_id",
        fetched(store.clone()),
    )
    .await;
    let save = async |store: Store| {
        store
            .uncancelled(async |tx: Transaction| {
                let questions = ["sub_a", "sub_B"].map(question_about).into();
                question::save(&tx, questions, OffsetDateTime::now_utc()).await
            })
            .await
    };
    locks_in_order(
        &other,
        "litestripe_question",
        "entity_id",
        save(store.clone()),
    )
    .await;
    pass_over_locked_questions(&other, &store).await;
}

/// Statements that make questions due wait for no lock, so that they are in no deadlock.
async fn pass_over_locked_questions(other: &DatabaseConnection, store: &Store) {
    let db = store.connection();
    let [first, second] = IDS;
    let late = "UPDATE litestripe_question SET due_at = now() + interval '300 days', last_error = 'it fails'";
    let is_due = "SELECT string_agg(entity_id, ' ') FROM litestripe_question \
        WHERE kind = 'fetch' AND due_at <= clock_timestamp()";
    let hour = Duration::from_secs(60 * 60);
    for hastens in [true, false] {
        other.execute_unprepared(late).await.expect("it is written");
        let holder = other.begin().await.expect("the database answers");
        holder
            .execute_unprepared(&format!(
                "SELECT 1 FROM litestripe_question WHERE entity_id = '{first}' FOR UPDATE"
            ))
            .await
            .expect("it is locked");
        let made_due = async {
            if hastens {
                question::hasten(db, Kind::Fetch, 2).await.map(|()| 1)
            } else {
                question::correct_future(db, Kind::Fetch, hour, hour).await
            }
        };
        let count = tokio::time::timeout(DEADLINE / 4, made_due)
            .await
            .expect("it does not wait for a lock");
        assert_eq!(count.expect("the database answers"), 1);
        assert_eq!(text(&holder, is_due).await, second);
        holder.rollback().await.expect("the locks are released");
    }
}

/// Two rows in each table.
fn rows() -> Vec<String> {
    let time = "TIMESTAMPTZ '2026-01-01 00:00:00+00:00'";
    let fetch = Kind::Fetch.as_str();
    let notification = Kind::Notification.as_str();
    IDS.iter()
        .flat_map(|id| {
            let question = |kind: &str| {
                format!(
                    "INSERT INTO litestripe_question (entity_id, kind, due_at, attempts, is_paid, livemode, event_id, \
                     event_type, event_created, stream_sequence) VALUES ('{id}', '{kind}', {time}, 0, FALSE, TRUE, 'evt_1', \
                     'customer.subscription.created', 1, 1)"
                )
            };
            [
                format!(
                    "INSERT INTO stripe_subscription (stripe_subscription_id, cancel_at_period_end, items, metadata, \
                     subscription_metadata, livemode, uncertain, revision, version, merge_state, dt_created, dt_last_updated) \
                     VALUES ('{id}', FALSE, '[]', '{{}}', '{{}}', TRUE, FALSE, 1, 1, '{{}}', {time}, {time})"
                ),
                format!(
                    "INSERT INTO orphaned_payment (id, stripe_customer_id, customer_email, reason, event_id, livemode, \
                     unsent_event, dt_created, dt_last_updated) VALUES ('{id}', 'cus_1', 'a@example.com', \
                     'no_checkout_session', 'evt_1', TRUE, '1 checkout.session.completed evt_1', {time}, {time})"
                ),
                question(fetch),
                question(notification),
            ]
        })
        .collect()
}

/// Holds the lock of the first row bytewise while `statement` runs. It has to wait for that lock
/// before it has locked the other row.
async fn locks_in_order(
    other: &DatabaseConnection,
    table: &str,
    key: &str,
    statement: impl Future<Output = Result<(), StoreError>> + Send + 'static,
) {
    const WAITING: &str = "SELECT count(*)::text FROM pg_locks WHERE NOT granted";
    let [first, second] = IDS;
    let row = |id: &str, how: &str| {
        format!("SELECT 1 FROM {table} WHERE {key} = '{id}' FOR UPDATE {how}")
    };
    let holder = other.begin().await.expect("the database answers");
    holder
        .execute_unprepared(&row(first, ""))
        .await
        .expect("it is locked");
    let running = tokio::spawn(statement);
    eventually(
        "the statement to wait for the lock",
        DEADLINE,
        async || match text(&holder, WAITING).await.as_str() {
            "0" => Err("it does not wait".to_owned()),
            _ => Ok(()),
        },
    )
    .await;
    let free = holder.execute_unprepared(&row(second, "NOWAIT")).await;
    assert!(
        free.is_ok(),
        "{table}: it has locked {second} first: {free:?}"
    );
    holder.rollback().await.expect("the locks are released");
    let done = running.await.expect("it does not panic");
    done.unwrap_or_else(|error| panic!("{table}: {error:?}"));
}

/// A snapshot as a `pg_dump` holds it keeps the deleted rows. Reads must not pass over them.
#[tokio::test]
async fn outbox_is_read_from_its_first_signal_while_an_old_snapshot_keeps_the_deleted_ones() {
    const ROUNDS: usize = 20;
    const SIGNALS: usize = 1000;
    const PAGES_MAX: u64 = 200;
    let settings = [
        ("session_preload_libraries", "auto_explain"),
        ("auto_explain.log_min_duration", "0"),
        ("auto_explain.log_analyze", "on"),
        ("auto_explain.log_buffers", "on"),
    ];
    let server = postgres::Server::start_with(postgres::Options {
        settings: settings
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        ..postgres::Options::default()
    })
    .await;
    let url = server.url("postgres");
    let store = open(&url).await;
    let dump = connect(&url).await;
    let snapshot = dump.begin().await.expect("the database answers");
    for sql in [
        "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "SELECT count(*) FROM litestripe_signal_outbox",
    ] {
        snapshot
            .execute_unprepared(sql)
            .await
            .expect("it has a snapshot");
    }
    let now = OffsetDateTime::now_utc();
    for round in 0..ROUNDS {
        let signals = (0..SIGNALS)
            .map(|n| signal(&format!("sub_{round}_{n}")))
            .collect();
        let insert = store.uncancelled(async move |tx: Transaction| {
            outbox::insert(&tx, signals, now).await?;
            commit(tx).await
        });
        insert.await.expect("signals are saved");
        assert_eq!(send(&store).await, SIGNALS);
    }
    // The mark follows some rounds later.
    for _ in 0..3 {
        assert_eq!(send(&store).await, 0);
    }

    let log = || server.process().expect("it runs").log();
    let before = log().len();
    assert_eq!(send(&store).await, 0);
    assert!(
        outbox::is_empty(&store)
            .await
            .expect("the database answers")
    );
    let plans = log().split_off(before);
    let pages: Vec<u64> = plans
        .split("Buffers: shared hit=")
        .skip(1)
        .map(|rest| {
            rest.split(|c: char| !c.is_ascii_digit())
                .next()
                .unwrap_or_default()
        })
        .map(|pages| pages.parse().expect("it is a number"))
        .collect();
    assert!(pages.len() >= 3, "{plans}");
    assert!(
        pages.iter().all(|pages| *pages < PAGES_MAX),
        "{pages:?} pages: {plans}"
    );

    // Nothing is hidden below the mark: a transaction that took its ids early and ends late.
    let late = store.uncancelled({
        let store = store.clone();
        async move |tx: Transaction| {
            // As a batch does, it has written a row before.
            let orphan = orphan_of("sub_late");
            orphan::insert(&tx, &[orphan], &[], now).await?;
            outbox::insert(&tx, vec![signal("sub_late")], now).await?;
            for _ in 0..5 {
                send(&store).await;
            }
            commit(tx).await
        }
    });
    late.await.expect("it is saved");
    assert_eq!(send(&store).await, 1, "the signal of the late transaction");

    // A crash of the server undid a deletion.
    let again = "INSERT INTO litestripe_signal_outbox (id, shard, entity_id, subject, message_id, event_created, body, dt_created) \
        OVERRIDING SYSTEM VALUE VALUES (7, 0, 'sub_again', 'subscription.changed', 'sub_again', 1, '{}', now())";
    let other = connect(&url).await;
    other
        .execute_unprepared(again)
        .await
        .expect("it is written");
    outbox::verify_low_water(store.connection(), store.low_water())
        .await
        .expect("the database answers");
    assert_eq!(send(&store).await, 1, "the signal that was there again");
    snapshot.rollback().await.expect("the database answers");
}

/// A round of the relay. Returns how many signals it sent.
async fn send(store: &Store) -> usize {
    let low_water = store.clone();
    let round = store.uncancelled(async move |tx: Transaction| {
        let low_water = low_water.low_water();
        let shards = outbox::lock_shards(&tx, low_water).await?;
        let rows = outbox::oldest(&tx, low_water, &shards, &[], 2000).await?;
        let ids: Vec<i64> = rows.iter().map(|row| row.id).collect();
        let sent = ids.len();
        outbox::delete(&tx, ids).await?;
        commit(tx).await.map(|()| sent)
    });
    round.await.expect("the database answers")
}

async fn open(url: &str) -> Store {
    let settings = DatabaseSettings {
        url: url.to_owned().into(),
        kind: DatabaseKind::Postgres,
        schema: None,
        auto_migrate: true,
    };
    let store = Store::open(&settings).await.expect("it can be opened");
    store.migrate_up().await.expect("it can be migrated");
    store
}

async fn connect(url: &str) -> DatabaseConnection {
    let mut options = ConnectOptions::new(url);
    options.max_connections(1).sqlx_logging(false);
    Database::connect(options)
        .await
        .expect("a running server accepts a client")
}

async fn text(db: &impl sea_orm::ConnectionTrait, query: &str) -> String {
    let query = Statement::from_string(DbBackend::Postgres, query);
    let row = db.query_one_raw(query).await.expect("the database answers");
    let row = row.expect("there is a row");
    row.try_get_by_index(0).expect("it is text")
}
