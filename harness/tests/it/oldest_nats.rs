//! The oldest nats-server that is supported. It has no atomic batches, so events and signals are
//! stored one by one.

use futures_util::future::join_all;
use litestripe_contract::subject::{EVENTS_STREAM, SIGNALS_STREAM};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::nats;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::json;
use time::OffsetDateTime;

/// As many as would make batches of both.
const PURCHASES: usize = 100;

/// Each is created, then updated.
fn purchases() -> [Vec<Event>; 2] {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let purchases: Vec<_> = (0..PURCHASES).map(|_| Purchase::new(now - 60)).collect();
    [("created", 0), ("updated", 5)].map(|(change, seconds)| {
        let event_type = format!("customer.subscription.{change}");
        purchases
            .iter()
            .map(|purchase| {
                let changes = json!({ "metadata": { "step": change } });
                purchase.subscription_event(&event_type, purchase.created + seconds, changes)
            })
            .collect()
    })
}

/// Delivers all of them at once, twice. The second time they are there already.
async fn deliver(bridge: &Bridge, events: &[Event]) {
    for _ in 0..2 {
        join_all(events.iter().map(|event| bridge.deliver(event))).await;
    }
    bridge.wait_until_applied().await;
}

#[tokio::test]
async fn bridge_runs_on_it_and_through_its_upgrade() {
    let options = Options::new(DatabaseKind::Postgres).ingress("LITESTRIPE_GROUP_COMMIT", "on");
    let mut bridge = Bridge::prepare(options);
    let broker = nats::Options {
        jetstream: "sync_interval: always".to_owned(),
        is_oldest: true,
        ..nats::Options::default()
    };
    bridge.broker = nats::Server::prepare(broker).expect("a folder for nats-server can be made");
    bridge.broker.resume().await;
    bridge.database.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    let version = bridge.broker.connect().await.server_info().version;
    assert!(version.starts_with("2.11."), "{version}");

    let [created, updated] = purchases();
    deliver(&bridge, &created).await;
    assert_eq!(bridge.check().await.len(), PURCHASES);
    for (program, line) in [
        (bridge.ingress(), "events are stored one by one"),
        (&bridge.workers[0], "signals are sent one by one"),
    ] {
        assert_eq!(program.count_in_log(line), 1, "{}", program.log());
    }

    bridge.broker.upgrade().await;
    bridge.ingress().wait_until_ready().await;
    bridge.workers[0].wait_until_ready().await;
    deliver(&bridge, &updated).await;
    assert_eq!(bridge.check().await.len(), 2 * PURCHASES);
    for (stream, messages) in [
        (EVENTS_STREAM, 2 * PURCHASES),
        (SIGNALS_STREAM, 2 * PURCHASES),
    ] {
        let stream = bridge.stream(stream).await;
        assert_eq!(stream.cached_info().state.messages, messages as u64);
    }
}
