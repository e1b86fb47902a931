//! The check itself: what a test takes away or changes behind the programs' backs is noticed.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
use litestripe_contract::subject::{EVENTS_STREAM, SIGNALS_STREAM};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::stripe;
use serde_json::Value;
use time::OffsetDateTime;

use crate::check::{Stream, check};
use crate::rig::Rig;

#[tokio::test]
async fn lost_event_is_noticed() {
    let rig = sound().await;
    delete(&rig, EVENTS_STREAM, 3).await;
    notices(&rig, "are not stored").await;
}

#[tokio::test]
async fn lost_signal_is_noticed() {
    let rig = sound().await;
    // One that another of its subscription follows: signals of several may come in any order.
    let bodies: Vec<_> = rig
        .bridge
        .signals()
        .await
        .into_iter()
        .map(|signal| signal.body)
        .collect();
    let is_followed = |body: &Value| {
        bodies
            .iter()
            .any(|later| later["previous_revision"] == body["revision"])
    };
    let followed = bodies
        .iter()
        .position(|body| body["revision"].is_i64() && is_followed(body));
    delete(
        &rig,
        SIGNALS_STREAM,
        followed.expect("a story has such a signal") as u64 + 1,
    )
    .await;
    notices(&rig, "one was lost, doubled or overtaken").await;
}

#[tokio::test]
async fn changed_row_is_noticed() {
    let rig = sound().await;
    let sql = "UPDATE stripe_subscription SET status = 'paused' WHERE status = 'canceled'";
    rig.bridge
        .database
        .query(sql)
        .await
        .expect("SQLite is there");
    notices(&rig, "is not what its events make of it").await;
}

/// A rig in which all is well.
async fn sound() -> Rig {
    let rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    rig.deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
    check(&rig, Stream::Whole).await;
    rig
}

/// Takes a message out of a stream.
async fn delete(rig: &Rig, stream: &str, sequence: u64) {
    let stream = rig
        .bridge
        .jetstream()
        .await
        .get_stream(stream)
        .await
        .expect("it is there");
    assert!(
        stream
            .delete_message(sequence)
            .await
            .expect("a message can be deleted")
    );
}

async fn notices(rig: &Rig, words: &str) {
    let outcome = AssertUnwindSafe(check(rig, Stream::Whole))
        .catch_unwind()
        .await;
    let panic = outcome.expect_err("the check notices");
    let said = panic
        .downcast_ref::<String>()
        .expect("an assertion with arguments has a String");
    assert!(said.contains(words), "{said}");
}
