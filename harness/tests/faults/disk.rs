//! A full disk, played by a limit on the size of the files that a process writes: what would make a
//! file longer fails, as it does when there is no room.
//!
//! Only the soft limit is lowered, which whoever owns the process may raise again.

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

/// What a table is made to take. What a test writes of other files of the server is less.
const TABLE_BYTES: u64 = 4 << 20;
/// Less than any log of anybody has when a test is under way.
const FULL_BYTES: u64 = 16 << 10;

#[tokio::test]
async fn database_without_room_for_its_tables_is_waited_for() {
    let rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 11);
    until_accepted(&rig, 200).await;
    load.stop().await;
    rig.bridge.wait_until_applied().await;
    grow_table(&rig).await;

    let server = Server::find(&rig).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 12);
    server.limit(Some(TABLE_BYTES));
    waits(&rig, async || rig.worker_metrics(0).await).await;
    until_more_are_accepted(&rig).await;
    let worker = rig.running(0);
    assert_ne!(
        count_in_log(worker, "could not extend file"),
        0,
        "{}",
        worker.log()
    );

    server.limit(None);
    goes_on(&rig, load, async || rig.worker_metrics(0).await).await;
}

/// Makes a table as long as the limit, with rows that nobody sees, and begins the write-ahead log's
/// next file, of which only the beginning will be written.
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
        .expect("the table is there");
    let tx = other.begin().await.expect("a transaction can be begun");
    let grow = format!(
        "DO $$ BEGIN WHILE pg_relation_size('stripe_subscription') < {TABLE_BYTES} LOOP \
         UPDATE stripe_subscription SET version = version; END LOOP; END $$"
    );
    tx.execute_unprepared(&grow)
        .await
        .expect("there is room yet");
    tx.rollback().await.expect("the transaction is open");
    // A file of the write-ahead log is made in its full length with the first that is written to it.
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
async fn database_without_room_for_its_write_ahead_log_is_waited_for() {
    let mut rig = Rig::start(DatabaseKind::Postgres, 1, &[]).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 13);
    until_accepted(&rig, 200).await;

    // PostgreSQL panics, and cannot recover before there is room.
    Server::find(&rig).await.limit(Some(FULL_BYTES));
    waits(&rig, async || rig.worker_metrics(0).await).await;
    until_more_are_accepted(&rig).await;

    rig.bridge.database.kill().await;
    rig.bridge.database.resume().await;
    goes_on(&rig, load, async || rig.worker_metrics(0).await).await;
    assert_eq!(
        count_in_log(rig.running(0), "waiting for the database"),
        1,
        "{}",
        rig.running(0).log()
    );
}

#[tokio::test]
async fn sqlite_without_room_is_waited_for() {
    let (rig, address, load) = full_sqlite(14).await;
    limit(rig.running(0).id(), None);
    goes_on(&rig, load, async || worker_page(&rig, &address).await).await;
}

#[tokio::test]
async fn sqlite_without_room_has_what_was_acked() {
    // Whatever a worker took for committed and was not is gone with it.
    let (mut rig, address, load) = full_sqlite(16).await;
    rig.running(0).kill().await;
    rig.workers[0] = Some(start_heedless_worker(&rig, &address));
    goes_on(&rig, load, async || worker_page(&rig, &address).await).await;
}

/// A bridge whose worker, at that address, has had no room for its database for a while.
async fn full_sqlite(seed: u64) -> (Rig, String, Load) {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    let address = format!("127.0.0.1:{}", port::free());
    rig.workers
        .push(Some(start_heedless_worker(&rig, &address)));
    rig.running(0)
        .wait_for_log("consuming STRIPE_EVENTS", DEADLINE)
        .await;
    let load = Load::start(&rig.ledger, &rig.hook(), seed);
    until_accepted(&rig, 200).await;

    limit(rig.running(0).id(), Some(FULL_BYTES));
    waits(&rig, async || worker_page(&rig, &address).await).await;
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

/// A write beyond the limit comes with a signal that ends whoever does not ignore it, and a full
/// disk sends none. What a shell ignores stays ignored in the program that replaces it.
fn start_heedless_worker(rig: &Rig, address: &str) -> Program {
    let worker = program::folder()
        .expect("a test knows where it lies")
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
async fn broker_without_room_refuses_and_keeps_what_it_took() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    let load = Load::start(&rig.ledger, &rig.hook(), 15);
    until_accepted(&rig, 200).await;

    let broker = rig.bridge.broker.process().expect("it runs").id();
    limit(broker, Some(FULL_BYTES));
    // The ledger sees to it that a refusal says when to come again.
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

    // A stream that could not be written stays as it is until the server is started again.
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

/// The PostgreSQL server that is told what it may write.
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

    /// Limits it first, as its children inherit from it, and then those that it has already.
    fn limit(&self, bytes: Option<u64>) {
        limit(self.postmaster, bytes);
        for child in children(self.postmaster) {
            limit(child, bytes);
        }
    }
}

/// The processes whose parent that one is.
fn children(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("Linux has /proc").flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id: &u32| parent_of(*id) == Some(parent))
        .collect()
}

/// proc_pid_stat(5): `pid (name) state ppid …`, where the name may hold anything.
fn parent_of(id: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(1)?.parse().ok()
}

/// Limits how long a process may make a file, or no longer does.
fn limit(id: u32, bytes: Option<u64>) {
    let process = PathBuf::from(format!("/proc/{id}"));
    // Some child of a server may have ended.
    let Ok(owner) = fs::metadata(&process) else {
        return;
    };
    let soft = bytes.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    let mut command = Command::new("prlimit");
    command.args(["--pid", &id.to_string(), &format!("--fsize={soft}:")]);
    // Its owner may set it, and root without further capabilities may not.
    let output = command.uid(owner.uid()).gid(owner.gid()).output();
    let output =
        output.unwrap_or_else(|error| panic!("this test needs `prlimit` of util-linux: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() || !process.exists(),
        "{command:?}: {said}"
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

/// The worker waits, its page says so, and what it could not apply is not acked.
async fn waits(rig: &Rig, metrics: impl AsyncFn() -> String) {
    rig.running(0)
        .wait_for_log("waiting for the database", DEADLINE)
        .await;
    eventually("the metric to say so", DEADLINE, async || {
        let page = metrics().await;
        if page.contains(WAITING) {
            Ok(())
        } else {
            Err(page)
        }
    })
    .await;
    let stream = rig
        .bridge
        .jetstream()
        .await
        .get_stream(EVENTS_STREAM)
        .await
        .expect("it is there");
    eventually(
        "what was not applied not to be acked",
        DEADLINE,
        async || {
            let info = stream
                .consumer_info(WORKER_CONSUMER)
                .await
                .map_err(|error| error.to_string())?;
            if info.num_ack_pending > 0 {
                Ok(())
            } else {
                Err(format!("{info:?}"))
            }
        },
    )
    .await;
}

/// The worker goes on by itself, and said as often that it does as that it waits: on the edge of
/// having room, some events may fit that others do not. No event is blamed that is not poison.
async fn goes_on(rig: &Rig, load: Load, metrics: impl AsyncFn() -> String) {
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
    assert!(metrics().await.contains(NOT_WAITING), "{}", worker.log());
}
