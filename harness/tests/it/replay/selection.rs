//! The selection of events for a replay, and the errors for invalid ones.

use async_nats::jetstream::stream;
use futures_util::StreamExt as _;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use serde_json::json;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{forget_rows, json_of, replay};
use crate::orphans::{COMPLETED, CREATED, UPDATED, apply, now};

#[tokio::test]
async fn only_selected_events_are_reapplied() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let (one, other) = (Purchase::new(now() - 600), Purchase::new(now() - 600));
    apply(
        &bridge,
        &one.subscription_event(CREATED, one.created, json!({})),
    )
    .await;
    apply(
        &bridge,
        &other.subscription_event(CREATED, other.created, json!({})),
    )
    .await;
    let session = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &one.checkout_session_event(COMPLETED, one.created, session),
    )
    .await;
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    let between = OffsetDateTime::now_utc()
        .format(&Rfc3339)
        .expect("it can be written");
    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    apply(
        &bridge,
        &one.subscription_event(UPDATED, now(), json!({ "status": "past_due" })),
    )
    .await;

    let poison =
        json!({ "id": "evt_poison", "object": "event", "type": UPDATED, "created": "yesterday" });
    bridge
        .publish(UPDATED, poison.to_string(), "evt_poison")
        .await;
    bridge.wait_until_applied().await;

    let cases: [(&[&str], usize, u64); 10] = [
        (&["--until", "2"], 2, 2),
        (&["--from-sequence", "2", "--until", "3"], 2, 2),
        (&["--type", UPDATED], 1, 1),
        (&["--type", UPDATED, "--type", COMPLETED], 1, 2),
        (&["--type", UPDATED, "--type", UPDATED], 1, 1),
        (&["--subscription", &one.subscription], 1, 3),
        (&["--from-time", &between], 1, 1),
        (&["--until", &between], 2, 3),
        (&["--since", "1h"], 2, 4),
        (&["--subscription", "sub_unknown"], 0, 0),
    ];
    for (arguments, rows, events) in cases {
        forget_rows(&mut bridge, DatabaseKind::Sqlite).await;
        let summary = json_of(&replay(&bridge, &[arguments, &["--json"]].concat()).await);
        assert_eq!(summary["events"], events, "{arguments:?}: {summary}");
        assert_eq!(bridge.rows().await.len(), rows, "{arguments:?}");
        // The poisoned event's subscription cannot be read, and the event lies after each of these
        // `--until`.
        let is_met = !arguments.contains(&"--until") && !arguments.contains(&"--subscription");
        assert_eq!(summary["poisoned"], u64::from(is_met), "{arguments:?}");
        let dry = json_of(&replay(&bridge, &[arguments, &["--dry-run", "--json"]].concat()).await);
        assert_eq!(
            (&dry["events"], &dry["poisoned"]),
            (&summary["events"], &summary["poisoned"]),
            "{arguments:?}"
        );
    }
    let after_all = replay(&bridge, &["--from-time", &now_text()]).await;
    assert_eq!(after_all.status.code(), Some(0), "{}", after_all.stderr);
    assert!(
        after_all.stdout.contains("nothing to replay"),
        "{}",
        after_all.stdout
    );
}

#[tokio::test]
async fn invalid_selections_are_refused_with_the_reason() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    for _ in 0..3 {
        let purchase = Purchase::new(now() - 600);
        apply(
            &bridge,
            &purchase.subscription_event(CREATED, purchase.created, json!({})),
        )
        .await;
    }
    let stream = bridge.stream("STRIPE_EVENTS").await;
    stream.delete_message(1).await.expect("it can be deleted");
    let cases: [(&[&str], &str); 9] = [
        (&["--from-sequence", "1"], "it holds 2 to 3"),
        (&["--from-sequence", "0"], "it holds 2 to 3"),
        (&["--from-sequence", "4"], "it holds 2 to 3"),
        (&["--until", "9"], "it holds 2 to 3"),
        (
            &["--from-sequence", "3", "--until", "2"],
            "before it begins",
        ),
        (
            &["--from-time", "2999-01-01T00:00:00Z"],
            "lies in the future",
        ),
        (&["--from-time", "yesterday"], "RFC 3339"),
        (&["--since", "soon"], "a duration such as"),
        (&["--type", "Not A Type"], "event type"),
    ];
    for (arguments, text) in cases {
        let refused = replay(&bridge, arguments).await;
        assert_eq!(
            refused.status.code(),
            Some(2),
            "{arguments:?}: {}",
            refused.stderr
        );
        assert!(
            refused.stderr.contains(text),
            "{arguments:?}: {}",
            refused.stderr
        );
    }
}

#[tokio::test]
async fn dry_run_that_loses_the_broker_prints_no_result() {
    let mut bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    super::publish(&bridge, &super::histories(100)).await;
    bridge.wait_until_applied().await;
    let dry = bridge
        .worker()
        .env("LITESTRIPE_BATCH", "1")
        .args(["replay", "--dry-run", "--json"])
        .start();
    eventually("a dry run to be halfway", super::DEADLINE, async || {
        let stream = bridge
            .jetstream()
            .await
            .get_stream("STRIPE_EVENTS")
            .await
            .map_err(|error| error.to_string())?;
        let consumers: Vec<_> = stream.consumers().collect().await;
        let halfway = consumers
            .iter()
            .flatten()
            .find(|consumer| consumer.name.starts_with("litestripe-replay-dry-"));
        match halfway.map(|consumer| (consumer.ack_floor.stream_sequence, consumer.num_pending)) {
            Some((1.., 1..)) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    bridge.broker.kill().await;
    assert_eq!(
        dry.wait(super::DEADLINE).await.code(),
        Some(1),
        "{}",
        dry.log()
    );
    assert_eq!(dry.stdout(), "");
    assert!(
        dry.stderr().contains("cannot read STRIPE_EVENTS"),
        "{}",
        dry.stderr()
    );
}

#[tokio::test]
async fn replay_fails_at_once_if_the_broker_refuses_its_consumer() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    bridge.broker.resume().await;
    bridge.database.resume().await;
    // Room for the workers' consumer only.
    let config = stream::Config {
        name: "STRIPE_EVENTS".to_owned(),
        subjects: vec!["stripe.events.>".to_owned()],
        max_consumers: 1,
        ..stream::Config::default()
    };
    bridge
        .jetstream()
        .await
        .create_stream(config)
        .await
        .expect("it can be made");
    bridge.start_worker().wait_until_ready().await;
    let purchase = Purchase::new(now() - 600);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    bridge.publish(CREATED, created.body(), created.id()).await;
    bridge.wait_until_applied().await;
    let refused = replay(&bridge, &[]).await;
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stdout);
    assert!(
        refused.stderr.contains("maximum consumers limit reached"),
        "{}",
        refused.stderr
    );
}

fn now_text() -> String {
    OffsetDateTime::now_utc()
        .format(&Rfc3339)
        .expect("it can be written")
}
