//! Failures of the database. The worker waits and continues; no event becomes a dead letter.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use litestripe_harness::bridge::{DatabaseKind, lock_row_sql};
use litestripe_harness::eventually;
use litestripe_harness::process::Signal;
use litestripe_harness::proxy::Mode;
use litestripe_harness::stripe::{Event, Purchase};
use sea_orm::{
    ConnectionTrait as _, SqliteTransactionMode, TransactionOptions, TransactionTrait as _,
};
use serde_json::json;
use time::OffsetDateTime;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::check::{Stream, check};
use crate::rig::{DEADLINE, Rig, count_in_log};

const WAITING: &str = "litestripe_worker_waiting{for=\"database\"} 1";
/// Longer than a worker waits for a server that never answers.
const SILENCE_DEADLINE: Duration = Duration::from_secs(90);
const NOT_WAITING: &str = "litestripe_worker_waiting{for=\"database\"} 0";

#[tokio::test]
async fn worker_waits_while_the_database_is_read_only() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    set_read_only(&rig, true).await;
    rig.deliver_all(&update(&purchases, 3)).await;
    check_worker_waits(&rig).await;
    set_read_only(&rig, false).await;
    check_worker_continues(&rig).await;
}

async fn set_read_only(rig: &Rig, read_only: bool) {
    let wanted = if read_only { "on" } else { "off" };
    let set = format!("ALTER SYSTEM SET default_transaction_read_only = {wanted}");
    for sql in [set.as_str(), "SELECT pg_reload_conf()"] {
        rig.bridge
            .database
            .query(sql)
            .await
            .expect("the server answers");
    }
    // A session reads the new setting when it is next idle.
    eventually("the setting to take effect", DEADLINE, async || {
        let shown = rig
            .bridge
            .database
            .query("SHOW default_transaction_read_only")
            .await;
        let shown: Option<String> = shown
            .ok()
            .and_then(|rows| rows.first()?.try_get_by_index(0).ok());
        if shown.as_deref() == Some(wanted) {
            Ok(())
        } else {
            Err(format!("{shown:?}"))
        }
    })
    .await;
}

#[tokio::test]
async fn worker_waits_while_connection_slots_are_exhausted() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    let port = rig
        .bridge
        .database
        .url()
        .rsplit(':')
        .next()
        .and_then(|rest| rest.split('/').next()?.parse().ok());
    let hogs = tokio::spawn(occupy_slots(port.expect("a PostgreSQL URL names a port")));
    eventually("the slots to be taken", DEADLINE, async || {
        let count = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'hog'";
        let rows = rig
            .bridge
            .database
            .query(count)
            .await
            .map_err(|error| error.to_string())?;
        let count: i64 = rows[0]
            .try_get_by_index(0)
            .map_err(|error| error.to_string())?;
        if count > 80 {
            Ok(())
        } else {
            Err(format!("{count} of about 90"))
        }
    })
    .await;
    // The freed slots are taken before the worker can reconnect.
    let disconnect_worker = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'litestripe-worker'";
    rig.bridge
        .database
        .query(disconnect_worker)
        .await
        .expect("the server answers");
    rig.deliver_all(&update(&purchases, 3)).await;
    check_worker_waits(&rig).await;
    rig.bridge
        .database
        .query(disconnect_worker)
        .await
        .expect("the server answers");

    hogs.abort();
    check_worker_continues(&rig).await;
}

/// Takes every connection slot and keeps it.
async fn occupy_slots(port: u16) {
    let mut hogs = JoinSet::new();
    for _ in 0..110 {
        hogs.spawn(async move {
            loop {
                // The server closes a connection for which it has no slot.
                if let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await
                    && stream.write_all(&startup()).await.is_ok()
                {
                    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
    }
    hogs.join_all().await;
}

/// PostgreSQL, "Message Formats", StartupMessage: length, protocol 3.0, pairs of name and value.
fn startup() -> Vec<u8> {
    let pairs = b"user\0postgres\0database\0postgres\0application_name\0hog\0\0";
    let length = u32::try_from(8 + pairs.len()).expect("it is short");
    [
        &length.to_be_bytes()[..],
        &0x0003_0000_u32.to_be_bytes(),
        pairs,
    ]
    .concat()
}

#[tokio::test]
async fn worker_waits_for_a_row_locked_by_another_session() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    let lock = rig
        .bridge
        .database
        .hold_lock(&lock_row_sql(&purchases[0].subscription))
        .await;
    rig.deliver_all(&update(&purchases, 3)).await;
    check_worker_waits(&rig).await;
    lock.rollback().await.expect("the transaction is open");
    check_worker_continues(&rig).await;
}

#[tokio::test]
async fn worker_waits_for_sqlite_locked_by_another_process() {
    let rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    // SQLite allows one writer at a time, so any write locks out the worker.
    let other = rig
        .bridge
        .database
        .hold_lock("UPDATE stripe_subscription SET version = version")
        .await;
    rig.deliver_all(&update(&purchases, 3)).await;
    check_worker_waits(&rig).await;
    other.rollback().await.expect("the transaction is open");
    check_worker_continues(&rig).await;
}

#[tokio::test]
async fn starting_worker_waits_for_locked_sqlite() {
    // Switching a new file to WAL mode takes a lock for which SQLite's busy timeout does not wait.
    // If several workers start at once, all but one may find it taken.
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    let other = rig
        .bridge
        .database
        .hold_lock("CREATE TABLE other (id INTEGER)")
        .await;
    rig.start_worker(0, &[]);
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    other.rollback().await.expect("the transaction is open");
    rig.until_worker_is_ready(0).await;
    start_with(&rig, 3).await;
    check(&rig, Stream::Whole).await;
}

#[tokio::test]
async fn starting_worker_waits_for_exclusively_locked_sqlite() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    let exclusive = TransactionOptions {
        sqlite_transaction_mode: Some(SqliteTransactionMode::Exclusive),
        ..Default::default()
    };
    let database = rig
        .bridge
        .database
        .connection()
        .await
        .expect("the file can be made");
    let other = database
        .begin_with_options(exclusive)
        .await
        .expect("no other process has locked it");
    rig.start_worker(0, &[]);
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    other.rollback().await.expect("the transaction is open");
    rig.until_worker_is_ready(0).await;
}

#[tokio::test]
async fn migrating_worker_waits_for_sqlite_locked_by_another_process() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    rig.bridge
        .database
        .query("PRAGMA journal_mode = WAL")
        .await
        .expect("the file can be made");
    let other = rig
        .bridge
        .database
        .hold_lock("CREATE TABLE other (id INTEGER)")
        .await;
    rig.start_worker(0, &[]);
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    other.rollback().await.expect("the transaction is open");
    rig.until_worker_is_ready(0).await;
}

#[tokio::test]
async fn starting_worker_that_waits_for_locked_sqlite_stops_on_a_signal() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    let _other = rig
        .bridge
        .database
        .hold_lock("CREATE TABLE other (id INTEGER)")
        .await;
    rig.start_worker(0, &[]);
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    let status = rig.running(0).stop().await;
    assert!(status.success(), "{status}: {}", rig.running(0).log());
}

#[tokio::test]
async fn migrating_worker_waits_while_the_database_is_read_only() {
    let mut rig = Rig::start(DatabaseKind::Postgres, 0, &[]).await;
    set_read_only(&rig, true).await;
    rig.start_worker(0, &[]);
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    set_read_only(&rig, false).await;
    rig.until_worker_is_ready(0).await;
}

#[tokio::test]
async fn worker_waits_for_a_killed_database_to_restart() {
    let mut rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    rig.bridge.database.kill().await;
    rig.deliver_all(&update(&purchases, 3)).await;
    check_worker_waits(&rig).await;
    rig.bridge.database.resume().await;
    check_worker_continues(&rig).await;
}

#[tokio::test]
async fn worker_retries_after_a_deadlock_with_another_session() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let mut purchases = start_with(&rig, 2).await;
    purchases.sort_by(|a, b| a.subscription.cmp(&b.subscription));
    // The worker locks rows in the order of their keys; the other session has locked the second
    // already.
    let other = rig
        .bridge
        .database
        .hold_lock(&lock_row_sql(&purchases[1].subscription))
        .await;
    other
        .execute_unprepared("SET LOCAL deadlock_timeout = '10min'")
        .await
        .expect("the tests' user may set it");
    rig.running(0).signal(Signal::Stop);
    rig.deliver_all(&update(&purchases, 3)).await;
    rig.running(0).signal(Signal::Cont);
    rig.bridge.database.until_a_worker_waits().await;
    // The server ends the statement of the session that first checks for a deadlock: the worker's.
    other
        .execute_unprepared(&lock_row_sql(&purchases[0].subscription))
        .await
        .expect("the worker's statement was ended");
    check_worker_waits(&rig).await;
    other.rollback().await.expect("the transaction is open");
    check_worker_continues(&rig).await;
}

#[tokio::test]
async fn serialization_failures_make_no_dead_letters() {
    // Four workers whose transactions must be serializable, so that the server refuses some of
    // them.
    let mut rig = Rig::start(DatabaseKind::Postgres, 0, &[("LITESTRIPE_BATCH", "5")]).await;
    for sql in [
        "ALTER SYSTEM SET default_transaction_isolation = 'serializable'",
        "SELECT pg_reload_conf()",
    ] {
        rig.bridge
            .database
            .query(sql)
            .await
            .expect("the server answers");
    }
    let now = OffsetDateTime::now_utc().unix_timestamp() - 600;
    let purchases: Vec<_> = (0..5).map(|_| Purchase::new(now)).collect();
    for worker in 0..4 {
        rig.start_worker(worker, &[]);
        rig.until_worker_is_ready(worker).await;
        rig.running(worker).signal(Signal::Stop);
    }
    rig.deliver_all(&update(&purchases, 200)).await;
    // All workers continue at once, or the first one would process all events.
    (0..4).for_each(|worker| rig.running(worker).signal(Signal::Cont));
    check(&rig, Stream::Whole).await;
    assert_eq!(rig.bridge.dead_letters().await.len(), 0);
    let refused = |worker: usize| count_in_log(rig.running(worker), "waiting for the database");
    assert!(
        (0..4).map(refused).sum::<usize>() > 0,
        "no transaction was refused: this test shows nothing"
    );
}

#[tokio::test]
async fn database_host_that_vanishes_silently_does_not_block_a_batch_for_ever() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    in_the_middle_of_a_statement(
        &rig,
        &purchases,
        &lock_row_sql(&purchases[0].subscription),
        Mode::Strand,
    )
    .await;
    // The worker times out, reconnects and applies the batch again.
    eventually("the worker to apply again", SILENCE_DEADLINE, async || {
        let rows = rig.bridge.rows().await;
        let steps: Vec<_> = rows
            .iter()
            .map(|row| row.subscription_metadata["step"].clone())
            .collect();
        if steps.iter().all(|step| step == "12") {
            Ok(())
        } else {
            Err(format!("{steps:?}\n{}", rig.running(0).log()))
        }
    })
    .await;
    check(&rig, Stream::Whole).await;
}

#[tokio::test]
async fn database_host_that_vanishes_silently_does_not_block_signals_for_ever() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    in_the_middle_of_a_statement(
        &rig,
        &purchases,
        "LOCK TABLE litestripe_signal_shard",
        Mode::Strand,
    )
    .await;
    eventually(
        "the worker to send signals again",
        SILENCE_DEADLINE,
        async || {
            let waiting = rig
                .bridge
                .database
                .query("SELECT message_id FROM litestripe_signal_outbox")
                .await;
            let waiting = waiting.map_err(|error| error.to_string())?.len();
            if waiting == 0 {
                Ok(())
            } else {
                Err(format!("{waiting} unsent\n{}", rig.running(0).log()))
            }
        },
    )
    .await;
    check(&rig, Stream::Whole).await;
}

#[tokio::test]
async fn shutdown_is_bounded_while_the_database_does_not_answer() {
    let mut rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    in_the_middle_of_a_statement(
        &rig,
        &purchases,
        &lock_row_sql(&purchases[0].subscription),
        Mode::HalfOpen,
    )
    .await;
    rig.running(0).signal(Signal::Term);
    rig.running(0).wait(Duration::from_secs(30)).await;
    rig.worker_to_database
        .as_ref()
        .expect("it is PostgreSQL")
        .set(Mode::Pass);
    rig.start_worker(0, &[]);
    check(&rig, Stream::Whole).await;
}

#[tokio::test]
async fn second_signal_ends_a_worker_at_once() {
    let mut rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let purchases = start_with(&rig, 3).await;
    in_the_middle_of_a_statement(
        &rig,
        &purchases,
        &lock_row_sql(&purchases[0].subscription),
        Mode::HalfOpen,
    )
    .await;
    rig.running(0).signal(Signal::Term);
    rig.running(0)
        .wait_for_log("finishing what is in flight", DEADLINE)
        .await;
    let begun = Instant::now();
    rig.running(0).signal(Signal::Term);
    rig.running(0).wait(DEADLINE).await;
    assert!(
        begun.elapsed() < Duration::from_secs(6),
        "{:?}",
        begun.elapsed()
    );
    rig.worker_to_database
        .as_ref()
        .expect("it is PostgreSQL")
        .set(Mode::Pass);
    rig.start_worker(0, &[]);
    check(&rig, Stream::Whole).await;
}

/// Delivers updates and breaks the link to the database during a statement of the worker. The
/// statement waits for another session's lock, which is released once its answer can no longer
/// arrive.
async fn in_the_middle_of_a_statement(rig: &Rig, purchases: &[Purchase], lock: &str, mode: Mode) {
    let lock = rig.bridge.database.hold_lock(lock).await;
    rig.deliver_all(&update(purchases, 12)).await;
    rig.bridge.database.until_a_worker_waits().await;
    rig.worker_to_database
        .as_ref()
        .expect("it is PostgreSQL")
        .set(mode);
    lock.rollback().await.expect("the transaction is open");
}

/// Makes subscriptions and waits until their rows exist.
async fn start_with(rig: &Rig, count: usize) -> Vec<Purchase> {
    let now = OffsetDateTime::now_utc().unix_timestamp() - 600;
    let purchases: Vec<_> = (0..count).map(|_| Purchase::new(now)).collect();
    let created = |purchase: &Purchase| {
        purchase.subscription_event("customer.subscription.created", now, json!({}))
    };
    rig.deliver_all(&purchases.iter().map(created).collect::<Vec<_>>())
        .await;
    rig.bridge.wait_until_applied().await;
    purchases
}

/// Makes `count` updates of each subscription.
fn update(purchases: &[Purchase], count: i64) -> Vec<Event> {
    let event = |purchase: &Purchase, step: i64| {
        let changes = json!({ "metadata": { "step": step.to_string() } });
        purchase.subscription_event(
            "customer.subscription.updated",
            purchase.created + step,
            changes,
        )
    };
    (1..=count)
        .flat_map(|step| purchases.iter().map(move |purchase| event(purchase, step)))
        .collect()
}

/// Checks that the worker waits for the database, logs it, and shows it in its metrics.
async fn check_worker_waits(rig: &Rig) {
    let worker = rig.running(0);
    worker
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    eventually("the metric to show the waiting", DEADLINE, async || {
        let page = rig.worker_metrics(0).await;
        if page.contains(WAITING) {
            Ok(())
        } else {
            Err(page)
        }
    })
    .await;
    assert!(
        rig.bridge.unacknowledged().await > 0,
        "unapplied events are not acked"
    );
}

/// Checks that the worker continues by itself, logged each change once, and made no dead letter.
async fn check_worker_continues(rig: &Rig) {
    check(rig, Stream::Whole).await;
    let worker = rig.running(0);
    assert_eq!(
        count_in_log(worker, "waiting for the database"),
        1,
        "{}",
        worker.log()
    );
    assert_eq!(
        count_in_log(worker, "the database is back"),
        1,
        "{}",
        worker.log()
    );
    assert_eq!(count_in_log(worker, "ERROR"), 0, "{}", worker.log());
    assert_eq!(rig.bridge.dead_letters().await.len(), 0);
    // What waited longest between its attempts may only now see that the database is back.
    eventually("nothing to wait for the database", DEADLINE, async || {
        let is_back = rig.worker_metrics(0).await.contains(NOT_WAITING);
        is_back.then_some(()).ok_or_else(|| worker.log())
    })
    .await;
}
