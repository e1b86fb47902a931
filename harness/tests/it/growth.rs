//! Tables grow, statements do not: each reads what it needs, by an index.
//!
//! Every statement of the store runs on tables with many rows. On PostgreSQL the server logs the
//! plan of each (`auto_explain`). On SQLite the bytes count that this process reads from the file.
//! `LITESTRIPE_LONG` sets another number of rows, such as 1000000.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, OrphanReason, Timestamp};
use litestripe_domain::orphan::NewOrphan;
use litestripe_domain::payment::{ClientReferenceId, PaymentIds};
use litestripe_domain::question::{Details, Kind, Question};
use litestripe_domain::row::Row;
use litestripe_domain::signal::NewSignal;
use litestripe_harness::bridge::{Database, DatabaseKind};
use litestripe_migration::{Migrator, MigratorTrait as _};
use litestripe_worker::error::StoreError;
use litestripe_worker::settings::{self, DatabaseSettings};
use litestripe_worker::store::figures::{self, COUNT_MAX};
use litestripe_worker::store::question::{Due, Retry};
use litestripe_worker::store::{
    Store, Transaction, erasure, orphan, outbox, question, raw, subscription,
};
use sea_orm::ConnectionTrait as _;
use time::OffsetDateTime;

/// With this many, PostgreSQL's planner decides as with a million.
const ROWS: u64 = 30_000;

/// The tables that grow with the shop.
const LARGE: [&str; 5] = [
    "stripe_subscription",
    "orphaned_payment",
    "litestripe_question",
    "litestripe_signal_outbox",
    "litestripe_erasure",
];

/// What one call may read from SQLite's file: some hundred pages. The smallest large table has more
/// than that.
const READ_MAX: u64 = 1 << 20;

/// The same for a count, which reads an index: up to 160 bytes a row.
const READ_MAX_OF_A_COUNT: u64 = 160;

/// What a row of the outbox takes at most.
const SIGNAL: u64 = 1 << 10;

/// The steps up to which the tables are made before they are filled. The later ones make indexes.
const STEPS_BEFORE: u32 = 11;

on_both_databases!(no_statement_reads_a_whole_table);

async fn no_statement_reads_a_whole_table(kind: DatabaseKind) {
    let rows = std::env::var("LITESTRIPE_LONG")
        .ok()
        .and_then(|rows| rows.parse().ok())
        .unwrap_or(ROWS);
    let mut database = Database::prepare(kind);
    database.resume().await;
    let began = Instant::now();
    fill(&database, rows).await;
    eprintln!("filled {rows} rows in {:?}", began.elapsed());
    let began = Instant::now();
    let store = open(&database, kind).await;
    store.migrate_up().await.expect("it can be migrated");
    eprintln!("migrated them in {:?}", began.elapsed());
    if kind == DatabaseKind::Postgres {
        execute(&database, "VACUUM ANALYZE").await;
        execute(
            &database,
            "ALTER ROLE postgres SET session_preload_libraries = 'auto_explain'; \
             ALTER ROLE postgres SET auto_explain.log_min_duration = 0",
        )
        .await;
    }
    // A new one, whose connections log their plans.
    let store = open(&database, kind).await;
    let watch = Watch {
        database: &database,
        rows,
    };
    read_the_figures(&watch, &store).await;
    read_and_write_subscriptions(&watch, &store).await;
    read_and_write_orphans(&watch, &store).await;
    read_and_write_questions(&watch, &store).await;
    read_and_write_the_outbox(&watch, &store).await;
    read_and_write_erasures(&watch, &store).await;
}

/// What `/metrics` shows. It reads a part of each table, up to a bound.
async fn read_the_figures(watch: &Watch<'_>, store: &Store) {
    let read_max = READ_MAX + COUNT_MAX * (SIGNAL + 3 * READ_MAX_OF_A_COUNT);
    let found = figures::read(store);
    let found = watch.check("figures", read_max, found).await;
    assert_eq!(found.signals.count, COUNT_MAX);
    assert_eq!(found.uncertain_rows, 10);
    assert_eq!(found.withheld_rows, 10);
    assert_eq!(found.unfinished_replays, 0);
    assert_eq!(found.open_orphans(OrphanReason::NoCheckoutSession), 10);
    assert_eq!(found.questions(Kind::Grace).open.count, COUNT_MAX);
    assert_eq!(found.waiting_for_key(Some(false)), 10);
}

async fn read_and_write_subscriptions(watch: &Watch<'_>, store: &Store) {
    let db = store.connection();
    let ids = ["sub_0000007", "sub_0000300", "sub_unknown"];
    let names = ids.map(str::to_owned);
    let now = OffsetDateTime::now_utc();

    let modes = watch.call("modes", subscription::modes(db)).await;
    assert_eq!(modes, [true], "all rows are of one mode");
    assert_eq!(
        watch.call("load", subscription::load(db, &ids)).await.len(),
        2
    );
    let found =
        store.uncancelled(async move |tx: Transaction| subscription::find(&tx, &ids, 0).await);
    assert!(watch.call("find", found).await.has_new_erasures);
    let lock = store.uncancelled(async move |tx: Transaction| subscription::lock(&tx, &ids).await);
    watch.call("lock", lock).await;
    let existing = watch
        .call("existing", subscription::existing(db, &names))
        .await;
    assert_eq!(existing.len(), 2);
    let keys = watch
        .call(
            "keys_after",
            subscription::keys_after(db, "sub_0000300", 500),
        )
        .await;
    assert_eq!(keys.len(), 500);
    let unsent = watch
        .call("unsent", subscription::unsent(db, "sub_0000300", 500))
        .await;
    assert_eq!(unsent.len(), 9);
    let not_whole = watch
        .call("not_whole", subscription::not_whole(db, "", 500))
        .await;
    assert_eq!(not_whole.len(), 10);
    assert_eq!(
        watch
            .call("withheld", subscription::withheld(db, 500))
            .await
            .len(),
        10
    );
    assert_eq!(
        watch
            .call("count_unsent", subscription::count_unsent(db))
            .await,
        10
    );
    assert_eq!(
        watch
            .call("count_withheld", subscription::count_withheld(db))
            .await,
        10
    );
    assert_eq!(
        watch.count("count", subscription::count(db)).await,
        watch.rows
    );
    let related = ["cus_0000007", "sub_0000012", "cs_0000020"];
    let related = watch
        .call("related_ids", subscription::related_ids(db, &related))
        .await;
    assert_eq!(HashSet::<String>::from_iter(related).len(), 6);
    let user = ClientReferenceId("user_0000007");
    let other = subscription::find_other_of_user(db, user, true, Some("sub_0000008"));
    assert_eq!(
        watch.call("find_other_of_user", other).await.as_deref(),
        Some("sub_0000007")
    );

    assert_eq!(watch.call("raw::find", raw::find(db, &ids)).await.len(), 2);
    let page = watch
        .call("raw::ids", raw::ids(db, false, now, "sub_0000300", 500))
        .await;
    assert_eq!(
        page.ids.len(),
        0,
        "rows of the other mode are passed over, 500 at a time"
    );
    assert_eq!(page.last.as_deref(), Some("sub_0000800"));
    let save = store.uncancelled(async move |tx: Transaction| {
        let row = |id: &str| Row {
            stripe_subscription_id: id.to_owned(),
            version: 2,
            ..Row::default()
        };
        let written = subscription::save(&tx, ids.map(row).into(), now).await?;
        commit(tx).await.map(|()| written)
    });
    assert_eq!(watch.call("save", save).await.len(), 3);
    let row = raw::find(db, &ids)
        .await
        .expect("it is read")
        .remove("sub_0000007");
    let repair = row.expect("there is one");
    watch
        .call("repair", raw::repair(db, "sub_0000007", &repair))
        .await;
}

async fn read_and_write_orphans(watch: &Watch<'_>, store: &Store) {
    let db = store.connection();
    let now = OffsetDateTime::now_utc();
    let ids = ["sub_0000005", "sub_0000300", "sub_unknown"];

    let open = watch.call("open_among", orphan::open_among(db, &ids)).await;
    assert_eq!(open.len(), 1);
    assert!(
        watch
            .call("orphan::find", orphan::find(db, "sub_0000005"))
            .await
            .is_some()
    );
    assert_eq!(
        watch.call("list", orphan::list(db, true, 1000)).await.len(),
        10
    );
    assert_eq!(
        watch
            .call("list all", orphan::list(db, false, 1000))
            .await
            .len(),
        1000
    );
    assert_eq!(watch.call("count_open", orphan::count_open(db)).await, 10);
    let resolved = orphan::resolved_by_operator(db, "sub_0000005", 500);
    assert_eq!(watch.call("resolved_by_operator", resolved).await.len(), 9);
    let related = ["cus_0000300", "cs_0000301", "sub_0000302"];
    let related = watch
        .call("orphan::related_ids", orphan::related_ids(db, &related))
        .await;
    assert_eq!(HashSet::<String>::from_iter(related).len(), 9);
    let erased = orphan::erase_emails_of(db, &["cus_0000005", "cs_0000006"]);
    assert_eq!(watch.call("erase_emails_of", erased).await, 2);
    let week_ago = now - time::Duration::days(7);
    assert_eq!(
        watch
            .call("erase_emails", orphan::erase_emails(db, week_ago))
            .await,
        8
    );
    assert_eq!(
        watch.call("count_unsent", orphan::count_unsent(db)).await,
        10
    );
    let take = store.uncancelled(async |tx: Transaction| {
        let taken = orphan::take_unsent(&tx, 500).await?;
        commit(tx).await.map(|()| taken)
    });
    assert_eq!(watch.call("take_unsent", take).await.len(), 10);
    let write = store.uncancelled(async move |tx: Transaction| {
        let user = ClientReferenceId("user_1");
        let inserted = orphan::insert(&tx, &[orphan_of("sub_unknown")], &[], now).await?;
        let new = orphan_of("sub_0000005");
        let resolved = orphan::resolve_by_operator(&tx, &new, user, now, None, now).await?;
        let others = orphan::resolve(&tx, "sub_0000006", user, None, now).await?;
        commit(tx)
            .await
            .map(|()| (inserted.len(), resolved.is_some(), others.is_some()))
    });
    assert_eq!(watch.call("insert, resolve", write).await, (1, true, true));
}

async fn read_and_write_questions(watch: &Watch<'_>, store: &Store) {
    let db = store.connection();
    let now = OffsetDateTime::now_utc();
    let lease = Duration::from_secs(60);
    let retry = Retry {
        after: lease,
        attempts: 1,
        error: Some("no answer".to_owned()),
    };
    for (kind, livemode, taken) in [
        (Kind::Grace, None, 0),
        (Kind::Lookup, None, 0),
        // Those of the other mode are due as well, and wait for a key.
        (Kind::Notification, Some(true), 10),
    ] {
        let due = Due {
            kind,
            livemode,
            limit: 16,
        };
        let found = watch
            .call(kind.as_str(), question::take(store, due, lease))
            .await;
        assert_eq!(found.len(), taken, "{kind:?}");
        if let Some(taken) = found.first() {
            watch
                .call("postpone", question::postpone(db, taken, retry.clone()))
                .await;
            let removed = question::remove_answered(db, taken);
            assert!(
                !watch.call("remove_answered", removed).await,
                "it was postponed"
            );
        }
    }
    let open = watch
        .count("question::count_open", question::count_open(db))
        .await;
    assert_eq!(open.iter().map(|open| open.count).sum::<u64>(), watch.rows);
    let removed = question::remove(db, Kind::Grace, &["sub_0000300", "sub_0000301"]);
    watch.call("remove", removed).await;
    let fetched = [("sub_0000003", 99), ("sub_0000005", 99)];
    watch
        .call("remove_fetched", question::remove_fetched(db, &fetched))
        .await;
    let save = store.uncancelled(async move |tx: Transaction| {
        question::save(
            &tx,
            ["sub_0000400", "sub_unknown"].map(question_about).into(),
            now,
        )
        .await?;
        commit(tx).await
    });
    watch.call("question::save", save).await;
    let open = question::count_open(db).await.expect("they are counted");
    assert_eq!(
        open.iter().map(|open| open.count).sum::<u64>(),
        watch.rows - 1
    );
}

async fn read_and_write_the_outbox(watch: &Watch<'_>, store: &Store) {
    let db = store.connection();
    let low_water = store.low_water();
    assert!(!watch.call("is_empty", outbox::is_empty(store)).await);
    let is_short = outbox::is_at_most(store, 2000);
    assert!(!watch.check("is_at_most", 2000 * SIGNAL, is_short).await);
    let skipped = ["sub_0000001".to_owned()];
    let shards = outbox::all_shards();
    let rows = outbox::oldest(db, low_water, &shards, &skipped, 1000);
    let rows = watch.call("oldest", rows).await;
    assert_eq!(rows.len(), 1000);
    let ids = rows.iter().map(|row| row.id).collect();
    watch.call("delete", outbox::delete(db, ids)).await;
    let has = outbox::has_signals_of(db, &["sub_unknown", "sub_none"]);
    assert!(!watch.call("has_signals_of", has).await);
    watch
        .call(
            "delete_changes_of",
            outbox::delete_changes_of(db, "sub_0002000"),
        )
        .await;
    let (waiting, _) = watch.count("backlog", outbox::backlog(db)).await;
    assert_eq!(waiting, watch.rows - 1001);
    if watch.database.process().is_some() {
        let lock = store.uncancelled({
            let store = store.clone();
            async move |tx: Transaction| outbox::lock_shards(&tx, store.low_water()).await
        });
        assert_eq!(watch.call("lock_shards", lock).await.len(), 16);
    }
    let insert = store.uncancelled(async move |tx: Transaction| {
        outbox::insert(&tx, vec![signal("sub_new")], OffsetDateTime::now_utc()).await?;
        commit(tx).await
    });
    watch.call("outbox::insert", insert).await;
}

async fn read_and_write_erasures(watch: &Watch<'_>, store: &Store) {
    let last = i64::try_from(watch.rows).expect("they are few") - 10;
    let after = erasure::after(store.connection(), last);
    assert_eq!(watch.call("after", after).await.len(), 10);
    let erased = BTreeMap::from([("cus_0000001".to_owned(), 2), ("cus_new".to_owned(), 2)]);
    let record = erasure::record(store, Arc::new(erased), OffsetDateTime::now_utc());
    watch.call("record", record).await;
}

/// Checks what calls read.
struct Watch<'a> {
    database: &'a Database,
    rows: u64,
}

impl Watch<'_> {
    async fn call<T, E: Debug>(&self, name: &str, call: impl Future<Output = Result<T, E>>) -> T {
        self.check(name, READ_MAX, call).await
    }

    /// A count reads an index from its first to its last entry.
    async fn count<T, E: Debug>(&self, name: &str, call: impl Future<Output = Result<T, E>>) -> T {
        self.check(name, READ_MAX + self.rows * READ_MAX_OF_A_COUNT, call)
            .await
    }

    async fn check<T, E: Debug>(
        &self,
        name: &str,
        read_max: u64,
        call: impl Future<Output = Result<T, E>>,
    ) -> T {
        let (plans, read, began) = (self.plans().len(), bytes_read(), Instant::now());
        let result = call
            .await
            .unwrap_or_else(|error| panic!("{name}: {error:?}"));
        let (read, took) = (bytes_read() - read, began.elapsed());
        match self.database.process() {
            Some(_) => {
                let plans = self.plans().split_off(plans);
                assert!(plans.contains("plan:"), "{name}: no plan was logged");
                for table in LARGE {
                    let scan = format!("Seq Scan on {table}");
                    assert!(!plans.contains(&scan), "{name}: {plans}");
                }
                eprintln!("{name}: {took:?}");
            }
            None => {
                eprintln!("{name}: {took:?}, {read} bytes");
                assert!(read <= read_max, "{name} read {read} bytes of the file");
            }
        }
        result
    }

    fn plans(&self) -> String {
        self.database
            .process()
            .map_or_else(String::new, |server| server.log())
    }
}

/// How many bytes this process has read from files.
fn bytes_read() -> u64 {
    let io = fs::read_to_string("/proc/self/io").expect("Linux counts them");
    let read = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    read.and_then(|read| read.parse().ok())
        .expect("it is a number")
}

/// Fills the large tables with `rows` rows each: an old shop of one mode. Few rows are open, unsent
/// or due.
async fn fill(database: &Database, rows: u64) {
    let connection = database.connection().await.expect("the database answers");
    Migrator::up(connection, Some(STEPS_BEFORE))
        .await
        .expect("it can be migrated");
    let is_sqlite = database.url().starts_with("sqlite:");
    let number = if is_sqlite {
        format!(
            "(WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {rows}) SELECT n FROM s) AS s"
        )
    } else {
        format!("generate_series(1, {rows}) AS s(n)")
    };
    let id = |prefix: &str| {
        if is_sqlite {
            format!("printf('{prefix}_%07d', n)")
        } else {
            format!("('{prefix}_' || lpad(n::text, 7, '0'))")
        }
    };
    let (sub, cus, cs, user) = (id("sub"), id("cus"), id("cs"), id("user"));
    let time = |text: &str| match is_sqlite {
        true => format!("'{text} 00:00:00+00:00'"),
        false => format!("TIMESTAMPTZ '{text} 00:00:00+00:00'"),
    };
    let (old, now, later) = (time("2026-01-01"), time("2026-11-28"), time("2099-01-01"));
    let body = "x".repeat(500);
    let inserts = [
        format!(
            "INSERT INTO stripe_subscription (stripe_subscription_id, stripe_customer_id, client_reference_id, \
             checkout_session_id, status, cancel_at_period_end, items, metadata, subscription_metadata, livemode, uncertain, \
             revision, version, merge_state, last_sent, dt_created, dt_last_updated) \
             SELECT {sub}, {cus}, {user}, {cs}, CASE WHEN n BETWEEN 401 AND 410 THEN NULL ELSE 'active' END, FALSE, '[]', \
             '{{}}', '{{}}', TRUE, n BETWEEN 501 AND 510, 1, 1, '{{\"created_seen\":true}}', CASE WHEN n BETWEEN 300 AND 309 THEN '{{}}' \
             WHEN n BETWEEN 401 AND 410 THEN '\"withheld\"' END, {old}, {old} FROM {number}"
        ),
        format!(
            "INSERT INTO orphaned_payment (id, checkout_session_id, stripe_customer_id, stripe_subscription_id, \
             customer_email, reason, event_id, livemode, resolved_at, resolved_client_reference_id, resolved_by, unsent_event, \
             dt_created, dt_last_updated) \
             SELECT {sub}, {cs}, {cus}, {sub}, CASE WHEN n <= 10 THEN 'a@example.com' END, 'no_checkout_session', 'evt_1', \
             TRUE, CASE WHEN n > 10 THEN {old} END, CASE WHEN n > 10 THEN {user} END, \
             CASE WHEN n BETWEEN 21 AND 29 THEN 'operator' END, \
             CASE WHEN n <= 10 THEN '1795430000 checkout.session.completed evt_1' END, {old}, {old} FROM {number}"
        ),
        format!(
            "INSERT INTO litestripe_question (entity_id, kind, due_at, attempts, is_paid, livemode, event_id, event_type, \
             event_created, stream_sequence) \
             SELECT {sub}, CASE WHEN n % 2 = 1 THEN 'notification' ELSE 'grace' END, \
             CASE WHEN n % 2 = 1 THEN {old} ELSE {later} END, 0, FALSE, n <= 20, 'evt_1', 'customer.subscription.created', \
             1, 2 FROM {number}"
        ),
        format!(
            "INSERT INTO litestripe_signal_outbox (shard, entity_id, subject, message_id, event_created, body, dt_created) \
             SELECT n % 16, {sub}, 'subscription.changed', {sub}, 1, '{body}', {now} FROM {number}"
        ),
        format!(
            "INSERT INTO litestripe_erasure (stripe_id, erased_at, sequence) SELECT {cus}, 1, n FROM {number}"
        ),
    ];
    for insert in inserts {
        execute(database, &insert).await;
    }
}

pub(crate) async fn open(database: &Database, kind: DatabaseKind) -> Store {
    let settings = DatabaseSettings {
        url: database.url().into(),
        kind: match kind {
            DatabaseKind::Sqlite => settings::DatabaseKind::Sqlite,
            DatabaseKind::Postgres => settings::DatabaseKind::Postgres,
        },
        schema: None,
        auto_migrate: true,
    };
    Store::open(&settings).await.expect("it can be opened")
}

pub(crate) fn orphan_of(id: &str) -> NewOrphan {
    NewOrphan {
        id: id.to_owned(),
        reason: OrphanReason::NoCheckoutSession,
        payment: PaymentIds::default(),
        customer_email: None,
        event_id: EventId::parse("evt_1").expect("it is an id"),
        livemode: true,
    }
}

pub(crate) fn question_about(id: &str) -> Question {
    Question {
        entity_id: id.to_owned(),
        details: Details::Fetch,
        due_at: OffsetDateTime::now_utc(),
        attempts: 0,
        stripe_account_id: None,
        livemode: true,
        event: EventReference {
            id: EventId::parse("evt_1").expect("it is an id"),
            event_type: EventType::parse("customer.subscription.created").expect("it is a type"),
            created: Timestamp::from_unix(1).expect("it is a time"),
        },
        trace: None,
        position: 3,
    }
}

pub(crate) fn signal(id: &str) -> NewSignal {
    NewSignal {
        entity_id: id.to_owned(),
        subject: "subscription.changed",
        message_id: id.to_owned(),
        event_created: 1,
        trace: None,
        received: None,
        body: "{}".to_owned(),
    }
}

pub(crate) async fn commit(tx: Transaction) -> Result<(), StoreError> {
    tx.commit().await.map_err(StoreError::doing("commit"))
}

async fn execute(database: &Database, sql: &str) {
    let connection = database.connection().await.expect("the database answers");
    for statement in sql.split("; ") {
        connection
            .execute_unprepared(statement)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error}"));
    }
}
