//! Faults of the database.

use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::process::Signal;

use super::{Healthy, examine};

on_both_databases!(schema_that_is_behind_is_named);

async fn schema_that_is_behind_is_named(database: DatabaseKind) {
    let mut healthy = Healthy::start(database).await;
    assert!(healthy.bridge.workers.remove(0).stop().await.success());
    let down = healthy
        .bridge
        .worker()
        .args(["migrate", "down"])
        .run(super::DEADLINE)
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
