//! Tests of the check itself: it must notice a removed event, a removed signal and a changed row.

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
    let rig = healthy_rig().await;
    delete(&rig, EVENTS_STREAM, 3).await;
    expect_failure(&rig, "are not stored").await;
}

#[tokio::test]
async fn lost_signal_is_noticed() {
    let rig = healthy_rig().await;
    // The deleted signal must have a successor of its subscription: signals of different
    // subscriptions may come in any order.
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
    expect_failure(&rig, "one was lost, doubled or overtaken").await;
}

#[tokio::test]
async fn changed_row_is_noticed() {
    let rig = healthy_rig().await;
    let sql = "UPDATE stripe_subscription SET status = 'paused' WHERE status = 'canceled'";
    rig.bridge
        .database
        .query(sql)
        .await
        .expect("the database answers");
    expect_failure(&rig, "differs from the merge of its events").await;
}

/// Starts a rig, delivers the story and checks it.
async fn healthy_rig() -> Rig {
    let rig = Rig::start(DatabaseKind::Sqlite, 1, &[]).await;
    rig.deliver_all(&stripe::story(OffsetDateTime::now_utc()))
        .await;
    check(&rig, Stream::Whole).await;
    rig
}

/// Removes a message from a stream.
async fn delete(rig: &Rig, stream: &str, sequence: u64) {
    let stream = rig.bridge.stream(stream).await;
    assert!(
        stream
            .delete_message(sequence)
            .await
            .expect("a message can be deleted")
    );
}

/// Runs the check and expects that it fails with a message that contains `text`.
async fn expect_failure(rig: &Rig, text: &str) {
    let outcome = AssertUnwindSafe(check(rig, Stream::Whole))
        .catch_unwind()
        .await;
    let panic = outcome.expect_err("the check fails");
    let message = panic
        .downcast_ref::<String>()
        .expect("an assertion with arguments has a String");
    assert!(message.contains(text), "{message}");
}
