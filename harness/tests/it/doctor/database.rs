//! Faults of the database.

use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::postgres::Server;
use litestripe_harness::process::Signal;

use super::{DEADLINE, Healthy, examine};

on_both_databases!(schema_that_is_behind_is_named);

async fn schema_that_is_behind_is_named(database: DatabaseKind) {
    let mut healthy = Healthy::start(database).await;
    assert!(healthy.bridge.workers.remove(0).stop().await.success());
    let down = healthy
        .bridge
        .worker()
        .args(["migrate", "down"])
        .run(DEADLINE)
        .await;
    assert!(down.status.success(), "{down:?}");
    let by_hand = healthy.doctor().env("LITESTRIPE_AUTO_MIGRATE", "false");
    examine(by_hand).await.check(
        "schema",
        &["1 migrations are pending", "litestripe-worker migrate up"],
    );
    // `run` would apply it.
    healthy.examine().await.check_healthy();
}

#[tokio::test]
async fn database_that_is_away_refuses_or_hangs_is_named() {
    let mut healthy = Healthy::start(DatabaseKind::Postgres).await;
    let url = healthy.bridge.database.url();
    let unknown = format!("{}_unknown", url);
    examine(healthy.doctor().env("DATABASE_URL", unknown))
        .await
        .check("database", &["does not exist"]);

    let database = healthy.bridge.database.process().expect("it runs");
    database.signal(Signal::Stop);
    healthy.check("database", &["DATABASE_URL"]).await;
    database.signal(Signal::Cont);
    healthy.examine().await.check_healthy();
    healthy.bridge.database.kill().await;
    healthy.check("database", &["DATABASE_URL"]).await;
}

/// A worker would wait for ever.
#[tokio::test]
async fn user_that_may_not_write_is_named() {
    let mut healthy = Healthy::start(DatabaseKind::Postgres).await;
    assert!(healthy.bridge.workers.remove(0).stop().await.success());
    let server = healthy.bridge.database.server();
    let url = format!("postgres://reader@127.0.0.1:{}/postgres", server.port());
    healthy.bridge.set_worker("DATABASE_URL", url);
    let change = async |healthy: &Healthy, sql: &str| {
        let changed = healthy.bridge.database.execute(sql).await;
        changed.unwrap_or_else(|problem| panic!("{sql}: {problem}"));
    };
    change(
        &healthy,
        "CREATE ROLE reader LOGIN; REVOKE ALL ON SCHEMA public FROM PUBLIC",
    )
    .await;
    let check = async |healthy: &Healthy, said: &[&str]| healthy.check("database", said).await;
    check(&healthy, &["rights to the schema public", "GRANT USAGE"]).await;
    change(&healthy, "GRANT USAGE ON SCHEMA public TO reader").await;
    check(&healthy, &["rights to litestripe_backfill, ", "GRANT"]).await;
    let all = "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO reader; \
               GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO reader";
    change(&healthy, all).await;
    healthy.examine().await.check_healthy();
    change(
        &healthy,
        "ALTER ROLE reader SET default_transaction_read_only = on",
    )
    .await;
    check(&healthy, &["read-only", "default_transaction_read_only"]).await;
    change(
        &healthy,
        "ALTER ROLE reader RESET ALL; REVOKE INSERT ON litestripe_erasure FROM reader",
    )
    .await;
    check(&healthy, &["rights to litestripe_erasure", "GRANT"]).await;

    change(&healthy, "REVOKE SELECT ON litestripe_erasure FROM reader").await;
    let waits = "waiting for the database (DATABASE_URL): ";
    let worker = healthy.bridge.start_worker();
    worker.wait_for_log(waits, DEADLINE).await;
    let reason = "permission denied for table litestripe_erasure";
    assert_eq!(worker.count_in_log("waiting for JetStream"), 0);
    assert!(worker.log().contains(reason), "{}", worker.log());
    let (status, text) = worker.page("/readyz").await.expect("it answers");
    assert_eq!(status, 503);
    assert!(text.contains("waiting for the database"), "{text}");
    let (_, metrics) = worker.page("/metrics").await.expect("it answers");
    for waiting in [
        "litestripe_worker_waiting{for=\"database\"} 1",
        "litestripe_worker_waiting{for=\"broker\"} 0",
    ] {
        assert!(metrics.contains(waiting), "{waiting} is not in {metrics}");
    }
    change(
        &healthy,
        "GRANT SELECT, INSERT ON litestripe_erasure TO reader",
    )
    .await;
    healthy.bridge.workers[0].wait_until_ready().await;
}

#[tokio::test]
async fn standby_is_named() {
    let mut healthy = Healthy::start(DatabaseKind::Postgres).await;
    let mut standby = Server::start().await;
    standby.follow(healthy.bridge.database.server()).await;
    let doctor = healthy
        .doctor()
        .env("DATABASE_URL", standby.url("postgres"));
    let said = ["standby", "set DATABASE_URL to the primary"];
    examine(doctor).await.check("database", &said);
}

#[tokio::test]
async fn sqlite_file_that_can_only_be_read_is_named_and_waited_for() {
    let mut healthy = Healthy::start(DatabaseKind::Sqlite).await;
    assert!(healthy.bridge.workers.remove(0).stop().await.success());
    // As a file of another user.
    let url = healthy.bridge.database.url().replace("rwc", "ro");
    healthy.bridge.set_worker("DATABASE_URL", url);
    healthy
        .check(
            "database",
            &["readonly database", "who may read and write it"],
        )
        .await;
    let worker = healthy.bridge.start_worker();
    worker.wait_for_log("readonly database", DEADLINE).await;
    let (status, text) = worker.page("/readyz").await.expect("it answers");
    assert_eq!(status, 503);
    assert!(text.contains("waiting for the database"), "{text}");
}

#[tokio::test]
async fn sqlite_file_that_cannot_be_used_is_named() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let check = async |url: &str, said: &str| {
        let report = examine(healthy.doctor().env("DATABASE_URL", url)).await;
        report.check("database", &[said, "DATABASE_URL"]);
    };
    check(
        "sqlite:///nowhere/litestripe.db?mode=rwc",
        "nor does its folder",
    )
    .await;
    check("sqlite://other.db", "mode=rwc").await;
    let text = tempfile::NamedTempFile::new().expect("a file can be made");
    std::fs::write(text.path(), "no database, but a text of some length").expect("written");
    check(
        &format!("sqlite://{}", text.path().display()),
        "not a database",
    )
    .await;
}
