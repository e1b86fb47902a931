//! A database that Litestripe shares with an application, or with an earlier state of itself: it
//! touches only what it made.

use std::collections::BTreeMap;

use litestripe_harness::bridge::{Bridge, Database, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::Purchase;
use litestripe_migration::{Migrator, MigratorTrait as _};
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};

use super::{DEADLINE, columns, run, tables};
use crate::orphans::{CREATED, apply, now};
use crate::previous::{self, Step};

on_both_databases!(
    foreign_object_is_refused_by_name_and_left_alone,
    application_may_have_tables_and_migrations_of_its_own,
    tables_of_before_are_taken_over_with_their_rows,
    foreign_table_that_was_taken_for_ours_is_named,
);

/// What an application may have made before.
const FOREIGN: [(&str, &str); 7] = [
    (
        "stripe_subscription",
        "CREATE TABLE stripe_subscription (id int)",
    ),
    ("orphaned_payment", "CREATE TABLE orphaned_payment (id int)"),
    (
        "litestripe_question",
        "CREATE TABLE litestripe_question (id int)",
    ),
    (
        "litestripe_replay",
        "CREATE VIEW litestripe_replay AS SELECT * FROM app",
    ),
    (
        "litestripe_erasure",
        "CREATE TABLE litestripe_erasure (id int)",
    ),
    (
        "litestripe_migrations",
        "CREATE TABLE litestripe_migrations (id int)",
    ),
    (
        "stripe_subscription_stripe_customer_id",
        "CREATE INDEX stripe_subscription_stripe_customer_id ON app (id)",
    ),
];

async fn foreign_object_is_refused_by_name_and_left_alone(kind: DatabaseKind) {
    let mut bridge = Bridge::prepare(Options::new(kind));
    bridge.database.resume().await;
    execute(
        &bridge.database,
        "CREATE TABLE app (id int); INSERT INTO app VALUES (7)",
    )
    .await;
    for (name, create) in FOREIGN {
        execute(&bridge.database, create).await;
        let before = (tables(&bridge).await, columns(&bridge.database).await);

        let refused = migrate(&bridge, &["up"]).await;
        assert_eq!(refused.status.code(), Some(1), "{name}: {refused:?}");
        for word in [name, "LITESTRIPE_DATABASE_SCHEMA"] {
            assert!(refused.stderr.contains(word), "{word}: {}", refused.stderr);
        }
        let _ = migrate(&bridge, &["down", "--steps", "99"]).await;
        let mut after = (tables(&bridge).await, columns(&bridge.database).await);
        after.0.retain(|table| table != OURS || name == OURS);
        after
            .1
            .retain(|column, _| !column.starts_with(OURS) || name == OURS);
        assert_eq!(after, before, "{name}");

        let what = create.split(' ').nth(1).expect("CREATE is followed by it");
        execute(&bridge.database, &format!("DROP {what} {name}")).await;
        if name != OURS {
            execute(&bridge.database, &format!("DROP TABLE {OURS}")).await;
        }
    }
    assert_eq!(ids(&bridge, "app").await, [7]);
}

/// The table that is there after any `migrate down`, because the steps would stand in it.
const OURS: &str = "litestripe_migrations";

async fn application_may_have_tables_and_migrations_of_its_own(kind: DatabaseKind) {
    const TABLES: [&str; 5] = [
        "replay",
        "signal_outbox",
        "signal_shard",
        "due_check",
        "signal_due",
    ];
    let mut bridge = Bridge::prepare(Options::new(kind));
    bridge.broker.resume().await;
    bridge.database.resume().await;
    for table in TABLES {
        let create = format!("CREATE TABLE {table} (id int); INSERT INTO {table} VALUES (7)");
        execute(&bridge.database, &create).await;
    }
    execute(&bridge.database, APPLICATIONS_STEPS).await;

    assert!(migrate(&bridge, &["up"]).await.status.success());
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    let purchase = Purchase::new(now());
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    bridge.check().await;
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    let down = migrate(&bridge, &["down", "--steps", "99"]).await;
    assert!(down.status.success(), "{down:?}");

    let mut expected: Vec<_> = TABLES.map(str::to_owned).into();
    expected.extend(["litestripe_migrations", "seaql_migrations"].map(str::to_owned));
    expected.sort();
    assert_eq!(tables(&bridge).await, expected);
    for table in TABLES {
        assert_eq!(ids(&bridge, table).await, [7], "{table}");
    }
    assert_eq!(
        texts(&bridge, "SELECT version AS t FROM seaql_migrations").await,
        ["m20250101_000001_app"]
    );
}

/// The steps of an application that uses sea-orm too.
const APPLICATIONS_STEPS: &str = "CREATE TABLE seaql_migrations (version varchar NOT NULL PRIMARY KEY, applied_at bigint NOT NULL); \
     INSERT INTO seaql_migrations VALUES ('m20250101_000001_app', 1)";

const THEN: &str = "'2026-11-25 00:00:00+00:00'";

async fn tables_of_before_are_taken_over_with_their_rows(kind: DatabaseKind) {
    let mut fresh = Database::prepare(kind);
    fresh.resume().await;
    let connection = fresh.connection().await.expect("the database answers");
    Migrator::up(connection, None)
        .await
        .expect("it can be migrated");
    let fresh = schema(&fresh).await;

    for (step, is_shared) in [
        (Step::RoomToUpdate, false),
        (Step::Resolutions, false),
        (Step::Resolutions, true),
    ] {
        let mut bridge = Bridge::prepare(Options::new(kind));
        bridge.database.resume().await;
        previous::install(&bridge.database, step).await;
        for insert in rows() {
            execute(&bridge.database, &insert).await;
        }
        if is_shared {
            let other = "INSERT INTO seaql_migrations VALUES ('m20250101_000001_app', 1)";
            execute(&bridge.database, other).await;
        }
        let status = migrate(&bridge, &["status", "--json"]).await;
        let status: Value = serde_json::from_str(&status.stdout).expect("it is JSON");
        let applied = status.as_array().expect("it is a list").iter();
        let applied = applied.filter(|step| step["applied"] == true).count();
        assert_eq!(
            applied,
            if matches!(step, Step::RoomToUpdate) {
                6
            } else {
                11
            }
        );

        let migrated = migrate(&bridge, &["up"]).await;
        assert!(migrated.status.success(), "{migrated:?}");
        let mut now = schema(&bridge.database).await;
        if is_shared {
            assert_eq!(
                texts(&bridge, "SELECT version AS t FROM seaql_migrations").await,
                ["m20250101_000001_app"]
            );
            now.retain(|name, _| !name.starts_with("seaql_migrations"));
        }
        assert_eq!(now, fresh, "{step:?}");
        for (table, column) in [
            ("stripe_subscription", "stripe_subscription_id"),
            ("orphaned_payment", "id"),
            ("litestripe_signal_outbox", "entity_id"),
            ("litestripe_question", "entity_id"),
            ("litestripe_replay", "signals"),
        ] {
            let query = format!("SELECT {column} AS t FROM {table}");
            assert_eq!(texts(&bridge, &query).await, ["kept"], "{table}");
        }
        assert_eq!(
            texts(
                &bridge,
                "SELECT CAST(count(*) AS text) AS t FROM litestripe_signal_shard"
            )
            .await,
            ["16"]
        );
        // The ids of the outbox go on where they were.
        execute(
            &bridge.database,
            &outbox_row().replace("signal_outbox", "litestripe_signal_outbox"),
        )
        .await;
        let ids = "SELECT CAST(id AS text) AS t FROM litestripe_signal_outbox ORDER BY id";
        assert_eq!(texts(&bridge, ids).await, ["1", "2"]);

        // Down to nothing and up again.
        assert!(
            migrate(&bridge, &["down", "--steps", "99"])
                .await
                .status
                .success()
        );
        assert!(migrate(&bridge, &["up"]).await.status.success());
    }
}

/// A row for each table of before.
fn rows() -> [String; 5] {
    [
        format!(
            "INSERT INTO stripe_subscription (stripe_subscription_id, cancel_at_period_end, items, metadata, \
             subscription_metadata, livemode, uncertain, revision, version, merge_state, dt_created, dt_last_updated) \
             VALUES ('kept', FALSE, '[]', '{{}}', '{{}}', FALSE, FALSE, 1, 1, '{{}}', {THEN}, {THEN})"
        ),
        format!(
            "INSERT INTO orphaned_payment (id, reason, event_id, livemode, dt_created, dt_last_updated) \
             VALUES ('kept', 'no_checkout_session', 'evt_1', FALSE, {THEN}, {THEN})"
        ),
        outbox_row(),
        format!(
            "INSERT INTO due_check (entity_id, kind, due_at, attempts, is_paid, livemode, event_id, event_type, \
             event_created, stream_sequence) VALUES ('kept', 'grace', {THEN}, 0, FALSE, FALSE, 'evt_1', '{CREATED}', 1, 2)"
        ),
        format!(
            "INSERT INTO replay (name, signals, first_sequence, last_sequence, event_types, dt_started, dt_beat) \
             VALUES ('', 'kept', 1, 2, '', {THEN}, {THEN})"
        ),
    ]
}

fn outbox_row() -> String {
    format!(
        "INSERT INTO signal_outbox (shard, entity_id, subject, message_id, event_created, body, dt_created) \
         VALUES (1, 'kept', 'orphan.created', 'x', 1, '{{}}', {THEN})"
    )
}

async fn foreign_table_that_was_taken_for_ours_is_named(kind: DatabaseKind) {
    let mut bridge = Bridge::prepare(Options::new(kind));
    bridge.database.resume().await;
    previous::install(&bridge.database, Step::Resolutions).await;
    execute(
        &bridge.database,
        "DROP TABLE replay; CREATE TABLE replay (id int); INSERT INTO replay VALUES (7)",
    )
    .await;
    let before = schema(&bridge.database).await;

    for command in [&["up"][..], &["down", "--steps", "99"]] {
        let refused = migrate(&bridge, command).await;
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        let named = refused.stderr.contains("table replay is not Litestripe's");
        assert!(named, "{}", refused.stderr);
        assert_eq!(schema(&bridge.database).await, before);
    }
    assert_eq!(ids(&bridge, "replay").await, [7]);
}

#[tokio::test]
async fn postgres_schema_of_our_own_holds_all_tables() {
    let options = Options::new(DatabaseKind::Postgres)
        .worker("LITESTRIPE_DATABASE_SCHEMA", "Our-billing")
        .worker("LITESTRIPE_AUTO_MIGRATE", "false")
        .worker(
            "LITESTRIPE_USER_LOOKUP",
            "sql:SELECT 1 FROM app_user WHERE name = $1",
        );
    let mut bridge = Bridge::prepare(options);
    bridge.broker.resume().await;
    bridge.database.resume().await;
    execute(
        &bridge.database,
        "CREATE TABLE app_user (name text); INSERT INTO app_user VALUES ('user_1'); \
         CREATE TABLE stripe_subscription (id int); INSERT INTO stripe_subscription VALUES (7); \
         CREATE TABLE replay (id int); INSERT INTO replay VALUES (7)",
    )
    .await;
    let behind = run(bridge.worker()).await;
    assert_eq!(behind.status.code(), Some(1));
    assert!(behind.stderr.contains("migrate up"), "{}", behind.stderr);

    let migrated = migrate(&bridge, &["up"]).await;
    assert!(migrated.status.success(), "{migrated:?}");
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    let purchase = Purchase::new(now());
    for event in [
        purchase.subscription_event(CREATED, purchase.created, json!({})),
        purchase.checkout_session_event(
            "checkout.session.completed",
            purchase.created,
            json!({ "client_reference_id": "user_1" }),
        ),
    ] {
        bridge.deliver(&event).await;
    }
    eventually("the row in our schema", DEADLINE, async || {
        let users = "SELECT client_reference_id AS t FROM \"Our-billing\".stripe_subscription \
            WHERE client_reference_id IS NOT NULL";
        let users = texts(&bridge, users).await;
        let open = texts(
            &bridge,
            "SELECT kind AS t FROM \"Our-billing\".litestripe_question",
        )
        .await;
        (users == ["user_1"] && open.is_empty())
            .then_some(())
            .ok_or_else(|| format!("{users:?}, {open:?}"))
    })
    .await;
    let orphans = "SELECT id AS t FROM \"Our-billing\".orphaned_payment";
    assert_eq!(texts(&bridge, orphans).await, Vec::<String>::new());

    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    let down = migrate(&bridge, &["down", "--steps", "99"]).await;
    assert!(down.status.success(), "{down:?}");
    let left = "SELECT relname::text AS t FROM pg_class WHERE relkind = 'r' AND relnamespace = '\"Our-billing\"'::regnamespace";
    assert_eq!(texts(&bridge, left).await, ["litestripe_migrations"]);
    assert_eq!(
        tables(&bridge).await,
        ["app_user", "replay", "stripe_subscription"]
    );
    assert_eq!(ids(&bridge, "stripe_subscription").await, [7]);
}

/// An administrator may create the schema for a role that may not.
#[tokio::test]
async fn postgres_schema_that_exists_needs_no_right_to_create_schemas() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.database.resume().await;
    execute(
        &bridge.database,
        "CREATE ROLE litestripe LOGIN; CREATE SCHEMA billing AUTHORIZATION litestripe",
    )
    .await;
    let url = bridge
        .database
        .url()
        .replace("postgres://postgres@", "postgres://litestripe@");
    let up = async |schema: &str| {
        run(bridge
            .worker()
            .env("DATABASE_URL", &url)
            .env("LITESTRIPE_DATABASE_SCHEMA", schema)
            .args(["migrate", "up"]))
        .await
    };
    let migrated = up("billing").await;
    assert!(migrated.status.success(), "{migrated:?}");
    let refused = up("other").await;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(
        refused.stderr.contains("LITESTRIPE_DATABASE_SCHEMA"),
        "{}",
        refused.stderr
    );
}

async fn migrate(bridge: &Bridge, arguments: &[&str]) -> Finished {
    run(bridge
        .worker()
        .arg("migrate")
        .args(arguments.iter().copied()))
    .await
}

/// The columns and the indexes by name.
async fn schema(database: &Database) -> BTreeMap<String, String> {
    let mut schema = columns(database).await;
    let indexes = if database.url().starts_with("sqlite:") {
        "SELECT name, tbl_name AS takes FROM sqlite_schema WHERE type = 'index' AND name NOT LIKE 'sqlite_%'"
    } else {
        "SELECT indexname::text AS name, indexdef AS takes FROM pg_indexes WHERE schemaname = 'public' UNION ALL \
         SELECT relname::text, 'sequence' FROM pg_class WHERE relkind = 'S'"
    };
    for row in database.query(indexes).await.expect("the database answers") {
        let text = |column| row.try_get("", column).expect("it is text");
        schema.insert(text("name"), text("takes"));
    }
    schema
}

async fn ids(bridge: &Bridge, table: &str) -> Vec<i32> {
    let rows = bridge
        .database
        .query(&format!("SELECT id FROM {table}"))
        .await
        .expect("the table is there");
    rows.iter()
        .map(|row| row.try_get("", "id").expect("it is a number"))
        .collect()
}

async fn texts(bridge: &Bridge, query: &str) -> Vec<String> {
    let rows = bridge
        .database
        .query(query)
        .await
        .expect("the database answers");
    rows.iter()
        .map(|row| row.try_get("", "t").expect("it is text"))
        .collect()
}

async fn execute(database: &Database, sql: &str) {
    let connection = database.connection().await.expect("the database answers");
    connection
        .execute_unprepared(sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error}"));
}
