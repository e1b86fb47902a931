//! What operators see: commands, exit codes, settings, the schema.

mod rules;
mod schema;
mod settings;
mod shared_database;

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, Database, DatabaseKind, Options};
use litestripe_harness::program::{Finished, Launch};
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::{eventually, nats, port, stripe};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;

use schema::columns;

use crate::orphans::CREATED;

const DEADLINE: Duration = Duration::from_secs(60);

/// As many connections as the worker accepts for its pages.
const CONNECTIONS_MAX: usize = 64;

#[tokio::test]
async fn clients_that_send_nothing_do_not_block_the_workers_pages() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let worker = &bridge.workers[0];
    let address = worker.url().trim_start_matches("http://");
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        silent.push(TcpStream::connect(address).await.expect("it listens"));
    }

    eventually("the worker's page", DEADLINE, async || {
        let (status, page) = worker.page("/healthz").await?;
        (status == 200).then_some(()).ok_or(page)
    })
    .await;
    let mut byte = [0];
    let read = silent[0].read(&mut byte).await;
    assert_eq!(read.ok(), Some(0), "the worker closed it");
}

#[tokio::test]
async fn worker_whose_log_nobody_reads_works_and_stops() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite).workers(0)).await;
    let address = format!("127.0.0.1:{}", port::free());
    let launch = bridge.worker().env("LITESTRIPE_WORKER_LISTEN", &address);
    let worker = launch.unread_stderr().start();
    let purchase = Purchase::new(OffsetDateTime::now_utc().unix_timestamp());
    let event = purchase.subscription_event(CREATED, purchase.created, json!({}));
    bridge.deliver(&event).await;
    bridge.wait_until_applied().await;
    assert_eq!(worker.stop().await.code(), Some(0));

    for (arguments, code) in [
        (&["status", "--litestripe-batch", "x"][..], 2),
        (&["orphans", "show", "sub_unknown"], 1),
        (&["replay"], 0),
    ] {
        let command = bridge.worker().args(arguments).env("RUST_LOG", "info");
        let finished = run(command.unread_stderr()).await;
        assert_eq!(finished.status.code(), Some(code), "{arguments:?}");
    }
}

#[tokio::test]
async fn sqlite_migrates_up_and_down() {
    migrates_up_and_down(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn postgres_migrates_up_and_down() {
    migrates_up_and_down(DatabaseKind::Postgres).await;
}

async fn migrates_up_and_down(database: DatabaseKind) {
    let mut bridge = Bridge::prepare(Options::new(database));
    bridge.database.resume().await;
    let migrate = async |arguments: &[&str]| {
        let finished = run(bridge.worker().arg("migrate").args(arguments)).await;
        assert!(finished.status.success(), "{finished:?}");
        finished.stdout
    };
    let applied = async || {
        let steps: Value =
            serde_json::from_str(&migrate(&["status", "--json"]).await).expect("it is JSON");
        let steps = steps.as_array().expect("it is a list").clone();
        steps
            .iter()
            .map(|step| step["applied"] == true)
            .collect::<Vec<_>>()
    };

    let count = applied().await.len();
    assert!(count >= 3);
    assert_eq!(applied().await, vec![false; count]);
    assert_eq!(
        tables(&bridge).await,
        Vec::<String>::new(),
        "asking changes nothing"
    );

    let table = migrate(&["up"]).await;
    assert_eq!(
        table
            .lines()
            .filter(|line| line.trim_end().ends_with("yes"))
            .count(),
        count,
        "{table}"
    );
    let all = tables(&bridge).await;
    for wanted in [
        "orphaned_payment",
        "litestripe_signal_outbox",
        "stripe_subscription",
    ] {
        assert!(
            all.iter().any(|table| table == wanted),
            "{wanted} is not among {all:?}"
        );
    }
    assert_eq!(applied().await, vec![true; count]);
    assert_eq!(migrate(&["up"]).await, table, "nothing was left to do");

    migrate(&["down"]).await;
    assert_eq!(
        applied().await,
        [vec![true; count - 1], vec![false]].concat()
    );
    migrate(&["down", "--steps", &(count - 1).to_string()]).await;
    assert_eq!(tables(&bridge).await, ["litestripe_migrations"]);
    assert!(migrate(&["status"]).await.contains("no"));

    migrate(&["up"]).await;
    assert_eq!(tables(&bridge).await, all);
}

#[tokio::test]
async fn program_before_a_sqlite_schema_leaves_it_alone_and_runs() {
    program_before_the_schema_leaves_it_alone_and_runs(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn program_before_a_postgres_schema_leaves_it_alone_and_runs() {
    program_before_the_schema_leaves_it_alone_and_runs(DatabaseKind::Postgres).await;
}

/// After a roll back of the programs alone: their schema has a migration that they do not know.
async fn program_before_the_schema_leaves_it_alone_and_runs(database: DatabaseKind) {
    const NEWER: &str = "m29991231_000001_later";
    let mut bridge = Bridge::start(Options::new(database).workers(0)).await;
    let migrate = async |arguments: &[&str]| {
        let command = bridge.worker().arg("migrate").args(arguments);
        run(command).await
    };
    assert!(migrate(&["up"]).await.status.success());
    let sql = format!("INSERT INTO litestripe_migrations VALUES ('{NEWER}', 0)");
    let added = bridge.database.execute(&sql).await;
    added.expect("it can be inserted");
    let before = tables(&bridge).await;

    let up = migrate(&["up"]).await;
    assert_eq!(up.status.code(), Some(0), "{}", up.stderr);
    assert!(up.stderr.contains(NEWER), "{}", up.stderr);
    let down = migrate(&["down"]).await;
    assert_eq!(down.status.code(), Some(1));
    assert!(down.stderr.contains(NEWER), "{}", down.stderr);
    let status = migrate(&["status", "--json"]).await;
    let steps: Value = serde_json::from_str(&status.stdout).expect("it is JSON");
    let last = steps.as_array().and_then(|steps| steps.last().cloned());
    let newer = json!({ "name": NEWER, "applied": true, "known": false });
    assert_eq!(last, Some(newer));
    assert_eq!(tables(&bridge).await, before);

    // A migration that is pending must not be applied over one that is not known.
    let forget = "DELETE FROM litestripe_migrations WHERE version LIKE '%rules'";
    let forgotten = bridge.database.execute(forget).await;
    forgotten.expect("it can be deleted");
    let up = migrate(&["up"]).await;
    assert_eq!(up.status.code(), Some(1));
    assert!(up.stderr.contains(NEWER), "{}", up.stderr);
    let again = "INSERT INTO litestripe_migrations VALUES ('m20261130_000018_rules', 0)";
    let again = bridge.database.execute(again).await;
    again.expect("it can be inserted");

    bridge.start_worker().wait_until_ready().await;
}

#[tokio::test]
async fn commands_that_need_existing_rows_do_not_migrate() {
    let api = Api::start().await;
    let options = Options::new(DatabaseKind::Sqlite)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off");
    let mut bridge = Bridge::start(options).await;
    bridge.workers.pop().expect("there is one").stop().await;
    bridge.database = Database::prepare(DatabaseKind::Sqlite);
    bridge.database.resume().await;
    for arguments in [
        &["replay", "--dry-run"][..],
        &["reconcile"],
        &["resend", "--all"],
        &["orphans", "list"],
        &["erase", "--customer", "cus_1"],
        &["dead-letters", "retry", "--all"],
    ] {
        let refused = run(bridge.worker().args(arguments.iter().copied())).await;
        assert_eq!(refused.status.code(), Some(1), "{arguments:?}: {refused:?}");
        assert!(
            refused.stderr.contains("litestripe-worker migrate up"),
            "{arguments:?}: {}",
            refused.stderr
        );
        assert_eq!(tables(&bridge).await, Vec::<String>::new(), "{arguments:?}");
    }
    let imported = run(bridge.worker().args(["reconcile", "--repair"])).await;
    assert_eq!(imported.status.code(), Some(0), "{imported:?}");
}

#[tokio::test]
async fn sqlite_is_migrated_once_by_four_workers_that_start_at_once() {
    four_workers_start_at_once(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn postgres_is_migrated_once_by_four_workers_that_start_at_once() {
    four_workers_start_at_once(DatabaseKind::Postgres).await;
}

async fn four_workers_start_at_once(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database).workers(4)).await;
    bridge
        .deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
    bridge.check().await;
    for worker in &bridge.workers {
        assert_eq!(worker.count_in_log("ERROR"), 0, "{}", worker.log());
    }
}

#[tokio::test]
async fn worker_on_an_old_schema_exits_and_says_what_to_do() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.broker.resume().await;
    bridge.database.resume().await;
    let port = format!("127.0.0.1:{}", port::free());
    let worker = || bridge.worker().env("LITESTRIPE_WORKER_LISTEN", &port);
    // Off by setting, and off by default on PostgreSQL.
    for auto_migrate in ["false", ""] {
        let finished = run(worker().env("LITESTRIPE_AUTO_MIGRATE", auto_migrate)).await;
        assert_eq!(finished.status.code(), Some(1), "{finished:?}");
        assert!(
            finished.stderr.contains("LITESTRIPE_AUTO_MIGRATE"),
            "{finished:?}"
        );
        assert!(
            finished.stderr.contains("litestripe-worker migrate up"),
            "{finished:?}"
        );
    }
    assert_eq!(
        tables(&bridge).await,
        Vec::<String>::new(),
        "it changed nothing"
    );

    assert!(
        run(bridge.worker().args(["migrate", "up"]))
            .await
            .status
            .success()
    );
    let started = worker().env("LITESTRIPE_AUTO_MIGRATE", "false").start();
    started
        .wait_for_log("consuming STRIPE_EVENTS", DEADLINE)
        .await;
}

#[tokio::test]
async fn status_shows_the_progress_of_the_workers() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    bridge
        .deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
    bridge
        .publish("customer.subscription.created", "no event", "poison")
        .await;
    bridge.check().await;
    // Orphans may be created a moment after their events are applied.
    let report = eventually("the report to be complete", DEADLINE, async || {
        let finished = run(bridge.worker().args(["status", "--json"])).await;
        assert!(finished.status.success(), "{finished:?}");
        let report: Value = serde_json::from_str(&finished.stdout).expect("it is JSON");
        if report["open_orphans"] == 1 {
            Ok(report)
        } else {
            Err(report.to_string())
        }
    })
    .await;
    for (name, value) in [
        ("events", json!(9)),
        ("lag", json!(0)),
        ("pending_acks", json!(0)),
        ("ack_floor", json!(9)),
        ("outbox", json!(0)),
        ("outbox_oldest_age_s", json!(null)),
        ("dead_letters", json!(1)),
        ("schema_current", json!(true)),
    ] {
        assert_eq!(report[name], value, "`{name}` of {report:#}");
    }
    let version = report["schema_version"].as_str().expect("there is one");

    let finished = run(bridge.worker().arg("status")).await;
    for (name, value) in [
        ("STRIPE_EVENTS", "9"),
        ("lag", "0"),
        ("pending acks", "0"),
        ("ack floor", "9"),
        ("outbox", "0"),
        ("dead letters", "1"),
        ("open orphans", "1"),
        ("schema", version),
    ] {
        let rest = finished
            .stdout
            .lines()
            .find_map(|line| line.trim().strip_prefix(name));
        let shown = rest.and_then(|rest| rest.split_whitespace().next());
        assert_eq!(shown, Some(value), "`{name}` in\n{}", finished.stdout);
    }
}

#[tokio::test]
async fn status_before_the_first_start_shows_missing_stream_and_schema() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    bridge.broker.resume().await;
    let finished = run(bridge.worker().args(["status", "--json"])).await;
    assert!(finished.status.success(), "{finished:?}");
    let report: Value = serde_json::from_str(&finished.stdout).expect("it is JSON");
    assert_eq!(
        (&report["events"], &report["lag"]),
        (&Value::Null, &Value::Null)
    );
    assert_eq!(
        (&report["schema_version"], &report["schema_current"]),
        (&Value::Null, &json!(false))
    );
    let finished = run(bridge.worker().arg("status")).await;
    assert!(
        finished.stdout.contains("litestripe-worker migrate up"),
        "{finished:?}"
    );
}

#[tokio::test]
async fn status_without_broker_or_database_fails_and_names_the_setting() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.database.resume().await;
    let finished = run(bridge.worker().args(["status", "--json"])).await;
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert!(finished.stderr.contains("NATS_URL"), "{finished:?}");
    assert_eq!(finished.stdout, "");

    bridge.broker.resume().await;
    bridge.database.kill().await;
    let finished = run(bridge.worker().arg("status")).await;
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert!(
        finished.stderr.contains("schema version"),
        "it names the step that failed: {finished:?}"
    );
}

/// A broker without an answer must not look like an empty bridge.
#[tokio::test]
async fn status_fails_if_jetstream_does_not_answer() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    let broker = nats::Options {
        jetstream: "enabled: false".to_owned(),
        ..nats::Options::default()
    };
    bridge.broker = nats::Server::prepare(broker).expect("a folder for nats-server can be made");
    bridge.broker.resume().await;
    let finished = run(bridge.worker().args(["status", "--json"])).await;
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    assert!(finished.stderr.contains("STRIPE_EVENTS"), "{finished:?}");
    assert_eq!(finished.stdout, "");
}

#[tokio::test]
async fn command_that_does_not_exist_is_refused() {
    let bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    for arguments in [
        &["nonsense"][..],
        &["migrate"],
        &["migrate", "down", "--steps", "x"],
        &["status", "--xml"],
    ] {
        let finished = run(bridge.worker().args(arguments.iter().copied())).await;
        assert_eq!(
            finished.status.code(),
            Some(2),
            "{arguments:?}: {finished:?}"
        );
        assert!(
            finished.stderr.contains("--help"),
            "{arguments:?}: {finished:?}"
        );
    }
}

async fn run(launch: Launch) -> Finished {
    launch.run(DEADLINE).await
}

/// The names of the database's tables.
async fn tables(bridge: &Bridge) -> Vec<String> {
    let url = bridge.database.url();
    let sql = if url.starts_with("sqlite:") {
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY 1"
    } else {
        "SELECT table_name::text AS name FROM information_schema.tables WHERE table_schema = 'public' ORDER BY 1"
    };
    let rows = bridge
        .database
        .query(sql)
        .await
        .expect("the database answers");
    rows.iter()
        .map(|row| row.try_get("", "name").expect("a table has a name"))
        .collect()
}
