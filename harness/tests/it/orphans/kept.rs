//! Operators' resolutions have no maximum age: workers store again what the stream has lost.

use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_harness::bridge::{Bridge, Database, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use serde_json::json;

use super::command::resolve;
use super::rebuild::delete_worker_consumer;
use super::{COMPLETED, DEADLINE, apply, now, orphan, until};

on_both_databases!(resolution_survives_a_purged_stream_and_a_recreated_one);

async fn resolution_survives_a_purged_stream_and_a_recreated_one(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let (by_hand, by_itself) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    for purchase in [&by_hand, &by_itself] {
        let session = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
        apply(&bridge, &session).await;
        until(&bridge, &purchase.subscription, |_| true).await;
    }
    let late = json!({ "client_reference_id": "user_late" });
    let late = by_itself.checkout_session_event(COMPLETED, now(), late);
    apply(&bridge, &late).await;
    let resolved = resolve(&bridge, &by_hand.subscription, "user_4711").await;
    assert_eq!(resolved.status.code(), Some(0), "{resolved:?}");
    bridge.wait_until_applied().await;

    restart(&mut bridge).await;
    let stream = bridge.stream(EVENTS_STREAM).await;
    stream.purge().await.expect("it can be emptied");
    restart(&mut bridge).await;
    until_the_stream_holds_the_resolution(&bridge).await;

    let deleted = bridge.jetstream().await.delete_stream(EVENTS_STREAM).await;
    deleted.expect("it can be deleted");
    restart(&mut bridge).await;
    until_the_stream_holds_the_resolution(&bridge).await;
    bridge.wait_until_applied().await;
    // It is stored once, however often a worker looks; nothing else can be restored.
    restart(&mut bridge).await;
    until_the_stream_holds_the_resolution(&bridge).await;

    // Now the database is also lost.
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    bridge.database = Database::prepare(database);
    bridge.database.resume().await;
    delete_worker_consumer(&bridge).await;
    restart(&mut bridge).await;
    bridge.wait_until_applied().await;
    let id = &by_hand.subscription;
    let row = bridge.row(id).await;
    assert_eq!(row.client_reference_id.as_deref(), Some("user_4711"));
    let found = orphan(&bridge, id).await;
    assert_eq!(found.resolved_client_reference_id, row.client_reference_id);
    assert_eq!(found.resolved_by.as_deref(), Some("operator"));
}

/// Stops the worker and starts another, which looks for resolutions at once.
async fn restart(bridge: &mut Bridge) {
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    bridge.start_worker().wait_until_ready().await;
}

async fn until_the_stream_holds_the_resolution(bridge: &Bridge) {
    eventually("the resolution to be stored", DEADLINE, async || {
        let bodies = bridge.bodies(EVENTS_STREAM).await;
        let bodies: Vec<_> = bodies
            .iter()
            .map(|body| String::from_utf8_lossy(body))
            .collect();
        match &bodies[..] {
            [one] if one.contains("litestripe.resolution") && one.contains("user_4711") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}
