//! Secrets in files: the database's URL and Stripe's key, which are read again when they are used.

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{API_KEY, Api};
use serde_json::json;

use super::{DEADLINE, File, works};
use crate::orphans::{CREATED, now};

#[tokio::test]
async fn rotated_database_password_is_used_for_the_next_connection() {
    let file = File::new("");
    let options = Options::new(DatabaseKind::Postgres)
        // The harness sets it. Empty is not set.
        .worker("DATABASE_URL", "")
        .worker("DATABASE_URL_FILE", file.path());
    let mut bridge = Bridge::prepare(options);
    bridge.broker.resume().await;
    bridge.database.resume().await;
    let port = bridge.database.server().port();
    let url = |password: &str| format!("postgres://app:{password}@127.0.0.1:{port}/postgres\n");
    run_all(
        &bridge,
        &[
            "CREATE ROLE app LOGIN SUPERUSER PASSWORD 'hunter2-old'",
            // The harness itself has no password.
            "DO $$ BEGIN EXECUTE format('COPY (VALUES (''host all app all scram-sha-256''), \
             (''host all all all trust''), (''local all all trust'')) TO %L', \
             current_setting('hba_file')); END $$",
            "SELECT pg_reload_conf()",
        ],
    )
    .await;
    file.write(&url("hunter2-old"));
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    works(&bridge, 1).await;
    let worker = &bridge.workers[0];

    // At first the new file is not whole, and the old password is still valid.
    file.write("postgres://app:hunter2-new");
    let kept = "keeping the last URL of the database: cannot use the file";
    close_until(&bridge, || worker.count_in_log(kept) > 0).await;
    works(&bridge, 2).await;
    // Then the server has the new password before the file does.
    let alter = "ALTER ROLE app PASSWORD 'hunter2-new'";
    run_all(&bridge, &[alter]).await;
    let server = bridge.database.process().expect("it runs");
    let refused = "password authentication failed";
    close_until(&bridge, || server.log().contains(refused)).await;
    file.write(&url("hunter2-new"));
    works(&bridge, 3).await;
    assert_eq!(worker.count_in_log(kept), 1, "{}", worker.log());
    assert_eq!(worker.count_in_log("hunter2"), 0, "{}", worker.log());
}

#[tokio::test]
async fn rotated_stripe_key_is_used_for_the_next_request() {
    const NEW: &str = "rk_test_hunter2";
    let api = Api::start().await;
    let file = File::new(API_KEY);
    let options = Options::new(DatabaseKind::Sqlite)
        .worker("STRIPE_SECRET_KEY_FILE", file.path())
        .worker("STRIPE_API_BASE", api.url())
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "1s")
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000");
    let bridge = Bridge::start(options).await;
    let worker = &bridge.workers[0];
    is_fetched(&api, &bridge, 1).await;

    // Rows are of one mode.
    file.write("rk_live_hunter2");
    let other = "of STRIPE_SECRET_KEY_FILE: it must hold a key of the mode, live or test";
    worker.wait_for_log(other, DEADLINE).await;
    api.set_key(NEW);
    file.write(&format!("{NEW}\n"));
    is_fetched(&api, &bridge, 2).await;
    assert!(api.requests("").iter().all(|request| {
        let key = request.headers.get("authorization");
        key.is_some_and(|key| !key.contains("live"))
    }));
    for secret in [API_KEY, "hunter2"] {
        assert_eq!(worker.count_in_log(secret), 0, "{}", worker.log());
    }
}

/// Checks that a worker fetches a missed event, which leads to the row number `rows`.
async fn is_fetched(api: &Api, bridge: &Bridge, rows: usize) {
    let purchase = Purchase::new(now() - 60);
    let event = purchase.subscription_event(CREATED, purchase.created, json!({}));
    api.put_event(event.value, false);
    eventually("its row", DEADLINE, async || {
        match bridge.rows().await.len() {
            found if found == rows => Ok(()),
            found => Err(format!("{found} rows: {}", bridge.workers[0].log())),
        }
    })
    .await;
}

/// Closes the worker's connections, also those that it opens meanwhile, until `is_reached`.
async fn close_until(bridge: &Bridge, is_reached: impl Fn() -> bool) {
    let close = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'";
    eventually("a new connection", DEADLINE, async || {
        run_all(bridge, &[close]).await;
        if is_reached() {
            Ok(())
        } else {
            Err(bridge.workers[0].log())
        }
    })
    .await;
}

async fn run_all(bridge: &Bridge, statements: &[&str]) {
    for sql in statements {
        let done = bridge.database.query(sql).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }
}
