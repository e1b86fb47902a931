//! A full disk, simulated by a limit on the size of the files that a process writes: any write that
//! would extend a file beyond it fails, as on a full disk.
//!
//! Only the soft limit is lowered, because the owner of a process may raise that again.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::program::{self, Program};
use litestripe_harness::{eventually, port};
use sea_orm::{ConnectionTrait as _, TransactionTrait as _};

use crate::check::{Stream, check};
use crate::load::Load;
use crate::rig::{DEADLINE, Rig, count_in_log};

const WAITING: &str = "litestripe_worker_waiting{for=\"database\"} 1";
const NOT_WAITING: &str = "litestripe_worker_waiting{for=\"database\"} 0";

/// The size to which a table is grown. The server's other files stay smaller during the test.
const TABLE_BYTES: u64 = 4 << 20;
/// Smaller than any write-ahead log or store file during a test, so that all of them count as full.
const FULL_BYTES: u64 = 16 << 10;

#[tokio::test]
async fn worker_waits_while_the_database_has_no_room_for_its_tables() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 11);
    until_accepted(&rig, 200).await;
    load.stop().await;
    rig.bridge.wait_until_applied().await;
    grow_table(&rig).await;

    let server = Server::find(&rig).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 12);
    server.limit(Some(TABLE_BYTES));
    check_worker_waits(&rig, async || rig.worker_metrics(0).await).await;
    until_more_are_accepted(&rig).await;
    let worker = rig.running(0);
    assert_ne!(
        count_in_log(worker, "could not extend file"),
        0,
        "{}",
        worker.log()
    );

    server.limit(None);
    check_worker_continues(&rig, load, async || rig.worker_metrics(0).await).await;
}

/// Grows a table to the limit with dead row versions, and starts a new file of the write-ahead log,
/// of which the test fills only the beginning.
async fn grow_table(rig: &Rig) {
    let other = rig
        .bridge
        .database
        .connection()
        .await
        .expect("the server answers");
    // Vacuuming would shorten the table again.
    let keep = "ALTER TABLE stripe_subscription SET (autovacuum_enabled = off)";
    other
        .execute_unprepared(keep)
        .await
        .expect("the table exists");
    let tx = other.begin().await.expect("a transaction can be begun");
    let grow = format!(
        "DO $$ BEGIN WHILE pg_relation_size('stripe_subscription') < {TABLE_BYTES} LOOP \
         UPDATE stripe_subscription SET version = version; END LOOP; END $$"
    );
    tx.execute_unprepared(&grow)
        .await
        .expect("the disk still has room");
    tx.rollback().await.expect("the transaction is open");
    // The server makes a file of the write-ahead log in full length at the first write to it.
    for sql in [
        "CHECKPOINT",
        "SELECT pg_switch_wal()",
        "SELECT pg_logical_emit_message(true, 'disk', 'begin')",
    ] {
        other
            .execute_unprepared(sql)
            .await
            .expect("the server answers");
    }
}

#[tokio::test]
async fn worker_waits_while_the_database_has_no_room_for_its_write_ahead_log() {
    let mut rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 13);
    until_accepted(&rig, 200).await;

    // PostgreSQL panics and cannot recover while the disk is full.
    Server::find(&rig).await.limit(Some(FULL_BYTES));
    check_worker_waits(&rig, async || rig.worker_metrics(0).await).await;
    until_more_are_accepted(&rig).await;

    rig.bridge.database.kill().await;
    rig.bridge.database.resume().await;
    check_worker_continues(&rig, load, async || rig.worker_metrics(0).await).await;
    assert_eq!(
        count_in_log(rig.running(0), "waiting for the database"),
        1,
        "{}",
        rig.running(0).log()
    );
}

#[tokio::test]
async fn worker_waits_while_sqlite_has_no_room() {
    let (rig, address, load) = full_sqlite(14).await;
    limit(rig.running(0).id(), None);
    check_worker_continues(&rig, load, async || worker_page(&rig, &address).await).await;
}

#[tokio::test]
async fn sqlite_without_room_contains_every_acked_event() {
    // If the worker has acked an event without a commit, killing the worker loses that event.
    let (mut rig, address, load) = full_sqlite(16).await;
    rig.running(0).kill().await;
    rig.workers[0] = Some(start_worker_ignoring_the_limit_signal(&rig, &address));
    check_worker_continues(&rig, load, async || worker_page(&rig, &address).await).await;
}

/// Starts a bridge, with its worker at the returned address, and fills the disk of its database.
async fn full_sqlite(seed: u64) -> (Rig, String, Load) {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    let address = format!("127.0.0.1:{}", port::free());
    rig.workers
        .push(Some(start_worker_ignoring_the_limit_signal(&rig, &address)));
    rig.running(0)
        .wait_for_log("consuming STRIPE_EVENTS", DEADLINE)
        .await;
    let load = Load::start(&rig.ledger, &rig.hook(), seed);
    until_accepted(&rig, 200).await;

    limit(rig.running(0).id(), Some(FULL_BYTES));
    check_worker_waits(&rig, async || worker_page(&rig, &address).await).await;
    until_more_are_accepted(&rig).await;
    (rig, address, load)
}

async fn worker_page(rig: &Rig, address: &str) -> String {
    let answer = rig
        .client
        .get(format!("http://{address}/metrics"))
        .send()
        .await;
    answer
        .expect("the worker answers")
        .text()
        .await
        .expect("a page is text")
}

/// Starts a worker that ignores `SIGXFSZ`. A write beyond the limit sends this signal, which ends a
/// program that does not ignore it; a full disk sends none. A signal that a shell ignores stays
/// ignored in the program that replaces the shell.
fn start_worker_ignoring_the_limit_signal(rig: &Rig, address: &str) -> Program {
    let worker = program::folder()
        .expect("a test knows its own path")
        .join("litestripe-worker");
    Program::at("/bin/sh")
        .args(["-c", "trap '' XFSZ; exec \"$0\""])
        .arg(worker)
        .env(
            "NATS_URL",
            format!("nats://127.0.0.1:{}", rig.worker_to_nats.port()),
        )
        .env("DATABASE_URL", rig.bridge.database.url())
        .env("LITESTRIPE_AUTO_MIGRATE", "true")
        .env("LITESTRIPE_WORKER_LISTEN", address)
        .start()
}

#[tokio::test]
async fn broker_without_room_refuses_events_and_keeps_the_stored_ones() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 15);
    until_accepted(&rig, 200).await;

    let broker = rig.bridge.broker.process().expect("it runs").id();
    limit(broker, Some(FULL_BYTES));
    // The ledger checks that every 503 has `Retry-After`.
    eventually("refusals", DEADLINE, async || match rig.ledger.figures() {
        figures if figures.refused >= 4 => Ok(()),
        figures => Err(format!("{figures:?}")),
    })
    .await;
    let log = rig.bridge.broker.process().expect("it runs").log();
    assert!(log.contains("Critical write error"), "{log}");
    assert_eq!(
        count_in_log(rig.ingress(), "events are not stored"),
        1,
        "{}",
        rig.ingress().log()
    );

    // After a failed write a stream accepts nothing until the server is restarted.
    limit(broker, None);
    rig.bridge.broker.restart().await;
    load.stop().await;
    check(&rig, Stream::Whole).await;
    assert_eq!(
        count_in_log(rig.ingress(), "events are stored again"),
        1,
        "{}",
        rig.ingress().log()
    );
}

/// The PostgreSQL server whose files are limited.
struct Server {
    postmaster: u32,
}

impl Server {
    async fn find(rig: &Rig) -> Self {
        let file = "SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)";
        let rows = rig
            .bridge
            .database
            .query(file)
            .await
            .expect("the server answers");
        let first: String = rows[0].try_get_by_index(0).expect("it is a text");
        Self {
            postmaster: first.parse().expect("the first line is its process id"),
        }
    }

    /// Limits the main process first, from which new child processes inherit, then the existing
    /// children.
    fn limit(&self, bytes: Option<u64>) {
        limit(self.postmaster, bytes);
        for child in children(self.postmaster) {
            limit(child, bytes);
        }
    }
}

/// Returns the child processes of a process.
fn children(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("Linux has /proc").flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id: &u32| parent_of(*id) == Some(parent))
        .collect()
}

/// Reads a process's parent. proc_pid_stat(5): `pid (name) state ppid …`; the name may hold any
/// character.
fn parent_of(id: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(1)?.parse().ok()
}

/// Limits the size of the files that a process writes; `None` removes the limit.
fn limit(id: u32, bytes: Option<u64>) {
    let process = PathBuf::from(format!("/proc/{id}"));
    // A child process may have ended.
    let Ok(owner) = fs::metadata(&process) else {
        return;
    };
    let soft = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    let mut command = Command::new("prlimit");
    command.args(["--pid", &id.to_string(), &format!("--fsize={soft}:")]);
    // Runs as the owner of the process, because root without extra capabilities may not set the
    // limit.
    let output = command.uid(owner.uid()).gid(owner.gid()).output();
    let output =
        output.unwrap_or_else(|error| panic!("this test needs `prlimit` of util-linux: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() || !process.exists(),
        "{command:?}: {error}"
    );
}

async fn until_accepted(rig: &Rig, count: usize) {
    eventually("deliveries", DEADLINE, async || {
        match rig.ledger.figures() {
            figures if figures.accepted >= count => Ok(()),
            figures => Err(format!("{figures:?}")),
        }
    })
    .await;
}

async fn until_more_are_accepted(rig: &Rig) {
    until_accepted(rig, rig.ledger.figures().accepted + 200).await;
}

/// Checks that the worker waits, shows it in its metrics, and does not ack events that it cannot
/// apply.
async fn check_worker_waits(rig: &Rig, metrics: impl AsyncFn() -> String) {
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    eventually("the metric to show the waiting", DEADLINE, async || {
        let page = metrics().await;
        if page.contains(WAITING) {
            Ok(())
        } else {
            Err(page)
        }
    })
    .await;
    let stream = rig.bridge.stream(EVENTS_STREAM).await;
    eventually("unapplied events to be unacked", DEADLINE, async || {
        let info = stream
            .consumer_info(WORKER_CONSUMER)
            .await
            .map_err(|error| error.to_string())?;
        if info.num_ack_pending > 0 {
            Ok(())
        } else {
            Err(format!("{info:?}"))
        }
    })
    .await;
}

/// Checks that the worker continues by itself and makes dead letters only of poisoned events.
///
/// It may have waited several times, because on an almost full disk some events fit and others do
/// not; each time it must also have logged that it continues.
async fn check_worker_continues(rig: &Rig, load: Load, metrics: impl AsyncFn() -> String) {
    load.stop().await;
    check(rig, Stream::Whole).await;
    let worker = rig.running(0);
    let waits = count_in_log(worker, "waiting for the database");
    assert_eq!(
        count_in_log(worker, "the database is back"),
        waits,
        "{}",
        worker.log()
    );
    assert_eq!(count_in_log(worker, "ERROR"), 0, "{}", worker.log());
    // What waited longest between its attempts may only now see that the database is back.
    eventually("nothing to wait for the database", DEADLINE, async || {
        let is_back = metrics().await.contains(NOT_WAITING);
        is_back.then_some(()).ok_or_else(|| worker.log())
    })
    .await;
}
