//! A program ends between two effects, at every point where that might lose or double an event or
//! signal.
//!
//! The programs are compiled with fail points (feature `faults`). `FAILPOINTS` names the one at
//! which a program aborts: with `2*off->1*return` it passes the point twice and aborts the third
//! time.

use std::os::unix::process::ExitStatusExt as _;

use futures_util::future::join_all;
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::json;
use time::OffsetDateTime;

use crate::check::{Stream, check};
use crate::ledger::Answer;
use crate::rig::{DEADLINE, Rig};

/// SIGABRT.
const ABORTED: Option<i32> = Some(6);

macro_rules! kill_points {
    ($($name:ident: $kill:ident, $database:ident, $point:literal;)*) => {
        $(
            #[tokio::test]
            async fn $name() {
                $kill(DatabaseKind::$database, $point).await;
            }
        )*
    };
}

kill_points! {
    sqlite_worker_killed_before_the_commit: kill_worker, Sqlite, "worker::before_commit";
    sqlite_worker_killed_between_commit_and_ack: kill_worker, Sqlite, "worker::after_commit";
    sqlite_worker_killed_between_ack_and_signal: kill_worker, Sqlite, "worker::after_ack";
    sqlite_worker_killed_between_signal_and_outbox: kill_worker, Sqlite, "worker::after_signal";
    sqlite_ingress_killed_before_the_pub_ack: kill_ingress, Sqlite, "ingress::before_puback";
    sqlite_ingress_killed_between_pub_ack_and_answer: kill_ingress, Sqlite, "ingress::after_puback";
    sqlite_ingress_killed_before_a_batch_s_pub_ack: kill_ingress_amid_batches, Sqlite, "ingress::before_puback";
    sqlite_ingress_killed_after_a_batch_s_pub_ack: kill_ingress_amid_batches, Sqlite, "ingress::after_puback";
    postgres_worker_killed_before_the_commit: kill_worker, Postgres, "worker::before_commit";
    postgres_worker_killed_between_commit_and_ack: kill_worker, Postgres, "worker::after_commit";
    postgres_worker_killed_between_ack_and_signal: kill_worker, Postgres, "worker::after_ack";
    postgres_worker_killed_between_signal_and_outbox: kill_worker, Postgres, "worker::after_signal";
    postgres_ingress_killed_before_the_pub_ack: kill_ingress, Postgres, "ingress::before_puback";
    postgres_ingress_killed_between_pub_ack_and_answer: kill_ingress, Postgres, "ingress::after_puback";
}

async fn kill_worker(database: DatabaseKind, point: &str) {
    // The events are delivered before the worker starts, so that it has several batches of them.
    let mut rig = Rig::start(database, 0, &[("LITESTRIPE_BATCH", "10")]).await;
    let (events, later) = lives(12, 5);
    rig.deliver_all(&events).await;
    // The first worker dies after one pass of the point, the second at once; the third keeps
    // running.
    for passes in ["1*off->1*return", "1*return"] {
        rig.start_worker(0, &[("FAILPOINTS", &format!("{point}={passes}"))]);
        let status = rig.running(0).wait(DEADLINE).await;
        assert_eq!(
            status.signal(),
            ABORTED,
            "{status} at {point}:\n{}",
            rig.running(0).log()
        );
    }
    rig.start_worker(0, &[]);
    rig.deliver_all(&later).await;

    let found = check(&rig, Stream::Whole).await;
    assert_eq!(
        (found.rows, found.repeated_signals),
        (12, 0),
        "a signal sent again is dropped by its id"
    );
}

async fn kill_ingress(database: DatabaseKind, point: &str) {
    let mut rig = Rig::start(database, 1, &[]).await;
    let (events, later) = lives(4, 4);
    for passes in ["3*off->1*return", "1*return"] {
        assert!(rig.ingress().stop().await.success());
        rig.start_ingress(&[("FAILPOINTS", &format!("{point}={passes}"))]);
        rig.until_ingress_is_ready().await;
        let hook = rig.hook();
        let mut unanswered = 0;
        for event in &events {
            if rig.ledger.deliver(&rig.client, &hook, event).await == Answer::None {
                unanswered += 1;
            }
        }
        let status = rig.ingress().wait(DEADLINE).await;
        assert_eq!(
            status.signal(),
            ABORTED,
            "{status} at {point}:\n{}",
            rig.ingress().log()
        );
        assert!(unanswered > 0, "{point}");
        rig.start_ingress(&[]);
        rig.until_ingress_is_ready().await;
    }
    // Stripe redelivers events that were not answered, and sometimes those that were.
    rig.deliver_all(&events).await;
    rig.deliver_all(&later).await;

    let found = check(&rig, Stream::Whole).await;
    assert_eq!(
        (found.events, found.rows),
        (events.len() + later.len(), 4),
        "each event is stored once"
    );
}

async fn kill_ingress_amid_batches(database: DatabaseKind, point: &str) {
    let mut rig = Rig::start(database, 1, &[("LITESTRIPE_GROUP_COMMIT", "on")]).await;
    let (events, later) = lives(30, 4);
    for passes in ["2*off->1*return", "1*return"] {
        assert!(rig.ingress().stop().await.success());
        rig.start_ingress(&[("FAILPOINTS", &format!("{point}={passes}"))]);
        rig.until_ingress_is_ready().await;
        let hook = rig.hook();
        // Concurrently, so that most of them wait for a group.
        join_all(
            events
                .iter()
                .map(|event| rig.ledger.deliver(&rig.client, &hook, event)),
        )
        .await;
        let status = rig.ingress().wait(DEADLINE).await;
        assert_eq!(
            status.signal(),
            ABORTED,
            "{status} at {point}:\n{}",
            rig.ingress().log()
        );
        rig.start_ingress(&[]);
        rig.until_ingress_is_ready().await;
    }
    rig.deliver_all(&events).await;
    rig.deliver_all(&later).await;

    let found = check(&rig, Stream::Whole).await;
    assert_eq!(
        (found.events, found.rows),
        (events.len() + later.len(), 30),
        "each event is stored once"
    );
}

#[tokio::test]
async fn worker_whose_relay_panics_exits_with_failure_and_the_next_one_continues() {
    worker_panics(
        DatabaseKind::Postgres,
        "worker::after_signal",
        "the relay panicked",
    )
    .await;
}

#[tokio::test]
async fn worker_whose_questions_task_panics_exits_with_failure_and_the_next_one_continues() {
    worker_panics(
        DatabaseKind::Sqlite,
        "worker::before_question",
        "the questions panicked",
    )
    .await;
}

async fn worker_panics(database: DatabaseKind, point: &str, message: &str) {
    let mut rig = Rig::start(database, 0, &[]).await;
    let (events, later) = lives(4, 2);
    rig.deliver_all(&events).await;
    rig.start_worker(0, &[("FAILPOINTS", &format!("{point}=panic"))]);
    rig.running(0).wait_for_log(message, DEADLINE).await;
    assert_eq!(
        rig.running(0).wait(DEADLINE).await.code(),
        Some(1),
        "{}",
        rig.running(0).log()
    );
    rig.start_worker(0, &[]);
    rig.deliver_all(&later).await;
    check(&rig, Stream::Whole).await;
}

#[tokio::test]
async fn ingress_whose_broker_connection_task_panics_exits_with_failure() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    assert!(rig.ingress().stop().await.success());
    rig.start_ingress(&[("FAILPOINTS", "ingress::watching_connection=20*off->panic")]);
    rig.ingress()
        .wait_for_log("a background task of ingress panicked", DEADLINE)
        .await;
    assert_eq!(
        rig.ingress().wait(DEADLINE).await.code(),
        Some(1),
        "{}",
        rig.ingress().log()
    );
}

/// Makes the events of several subscriptions, interleaved. Returns all but the last event of each,
/// and the last ones.
fn lives(subscriptions: usize, length: i64) -> (Vec<Event>, Vec<Event>) {
    let now = OffsetDateTime::now_utc().unix_timestamp() - 3600;
    let purchases: Vec<_> = (0..subscriptions).map(|_| Purchase::new(now)).collect();
    let event = |purchase: &Purchase, step: i64| match step {
        0 => purchase.checkout_session_event(
            "checkout.session.completed",
            now,
            json!({ "client_reference_id": "user_4711" }),
        ),
        1 => purchase.subscription_event("customer.subscription.created", now, json!({})),
        _ => {
            let changes = json!({ "metadata": { "step": step.to_string() } });
            purchase.subscription_event("customer.subscription.updated", now + step, changes)
        }
    };
    let step = |step: i64| purchases.iter().map(move |purchase| event(purchase, step));
    ((0..length).flat_map(step).collect(), step(length).collect())
}
