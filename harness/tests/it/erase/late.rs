//! Messages of an erased person that arrive late, also those that no worker can apply.

use std::time::Duration;

use async_nats::jetstream;
use litestripe_contract::settings::StreamSettings;
use litestripe_contract::stream;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, lock_row_sql};
use litestripe_harness::eventually;
use litestripe_harness::nats;
use litestripe_harness::stripe::Purchase;
use serde_json::{Value, json};

use super::{
    COMMAND, ERASED, KEPT, customer, erase, erased, places, poison, run, session, subscription,
};
use crate::orphans::{CREATED, DEADLINE, UPDATED, apply, now};

on_both_databases!(
    pending_dead_letter_of_an_erased_person_is_dropped,
    late_messages_that_are_not_applied_are_removed_too,
    removal_that_fails_is_repeated_until_it_is_done
);

async fn late_messages_that_are_not_applied_are_removed_too(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database).ingress("LITESTRIPE_EVENT_TYPES", "*")).await;
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    for purchase in [&user, &other] {
        apply(&bridge, &subscription(purchase, CREATED, KEPT, 0)).await;
    }
    erased(&erase(&bridge, &user.customer, &["--json"]).await);

    let mut updated = customer(&user, "customer.updated", ERASED);
    updated.value["created"] = json!(user.created);
    bridge.deliver(&updated).await;
    bridge
        .publish(UPDATED, poison(&user, ERASED), "late poison")
        .await;
    bridge
        .publish(UPDATED, poison(&other, KEPT), "other poison")
        .await;
    let mut news = customer(&user, "customer.updated", KEPT);
    news.value["created"] = json!(now() + 60);
    bridge.deliver(&news).await;
    bridge.wait_until_applied().await;
    until_gone(&bridge).await;

    let letters = bridge.bodies("STRIPE_DEAD_LETTERS").await;
    assert_eq!(letters.len(), 1, "only the other customer's");
    let stored = bridge.bodies("STRIPE_EVENTS").await;
    let is_news = |body: &&bytes::Bytes| body[..] == news.body()[..];
    assert_eq!(stored.iter().filter(is_news).count(), 1, "it is not late");
    let log = bridge.workers[0].log();
    assert!(!log.contains(ERASED), "{log}");
}

async fn pending_dead_letter_of_an_erased_person_is_dropped(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database).workers(0)).await;
    let settings = StreamSettings {
        max_age: Duration::ZERO,
        max_bytes: None,
    };
    let room = stream::dead_letters(1, settings, 1 << 30);
    let full = jetstream::stream::Config {
        max_messages: 1,
        ..room.clone()
    };
    let jetstream = bridge.jetstream().await;
    let made = jetstream.create_stream(full).await;
    made.expect("a stream can be made");
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    bridge.start_worker().wait_until_ready().await;
    bridge
        .publish(UPDATED, poison(&other, KEPT), "other poison")
        .await;
    bridge.wait_until_applied().await;
    bridge
        .publish(UPDATED, poison(&user, ERASED), "poison")
        .await;
    bridge.wait_until_applied().await;
    assert!(bridge.workers.remove(0).stop().await.success());

    // Another worker recorded it, and has not read this event.
    let erasure = format!(
        "INSERT INTO litestripe_erasure (stripe_id, erased_at, sequence) VALUES ('{}', {}, 1)",
        user.customer,
        now()
    );
    let recorded = bridge.database.query(&erasure).await;
    recorded.expect("it is written");
    let updated = bridge.jetstream().await.update_stream(room).await;
    updated.expect("a stream can be changed");
    bridge.start_worker().wait_until_ready().await;
    until_gone(&bridge).await;
    let pending = "SELECT sequence FROM litestripe_dead_letter";
    eventually("no pending dead letter", DEADLINE, async || {
        match bridge.database.query(pending).await {
            Ok(rows) if rows.is_empty() => Ok(()),
            outcome => Err(format!("{outcome:?}")),
        }
    })
    .await;
    until_gone(&bridge).await;
    assert_eq!(bridge.bodies("STRIPE_DEAD_LETTERS").await.len(), 1);
}

async fn removal_that_fails_is_repeated_until_it_is_done(database: DatabaseKind) {
    let config = "authorization { users: [
        { user: harness, password: secret }
        { user: limited, password: secret, permissions: { publish: { deny: \"$JS.API.STREAM.MSG.DELETE.>\" } } }
        ] }\nno_auth_user: harness\n";
    let options = Options::new(database)
        .worker("NATS_USER", "limited")
        .worker("NATS_PASSWORD", "secret");
    let mut bridge = Bridge::prepare(options);
    let broker = nats::Options {
        config: config.to_owned(),
        ..nats::Options::default()
    };
    bridge.broker = nats::Server::prepare(broker).expect("a folder for nats-server can be made");
    bridge.broker.resume().await;
    bridge.database.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    let user = Purchase::new(now() - 60);
    erased(
        &bridge
            .worker()
            .env("NATS_USER", "harness")
            .args(["erase", "--customer", &user.customer, "--json"])
            .run(COMMAND)
            .await,
    );

    bridge
        .deliver(&subscription(&user, CREATED, ERASED, 0))
        .await;
    bridge.wait_until_applied().await;
    let worker = bridge.workers.pop().expect("there is one");
    worker
        .wait_for_log("no answer yet about STRIPE_EVENTS", DEADLINE)
        .await;
    worker.stop().await;
    let status = bridge
        .worker()
        .args(["status", "--json"])
        .run(COMMAND)
        .await;
    let status: Value = serde_json::from_str(&status.stdout).expect("it prints JSON");
    assert_eq!(status["questions"]["removal"]["open"], 1, "{status:#}");
    assert!(!places(&bridge, ERASED).await.is_empty());

    bridge.set_worker("NATS_USER", "harness");
    bridge.start_worker().wait_until_ready().await;
    until_gone(&bridge).await;
}

/// PostgreSQL, because another session holds a lock of the worker's batch.
#[tokio::test]
async fn worker_does_not_write_what_was_erased_by_force_while_it_held_it() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Postgres));
    bridge.broker.resume().await;
    bridge.database.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    apply(&bridge, &subscription(&other, CREATED, KEPT, 0)).await;

    let row = bridge
        .database
        .hold_lock(&lock_row_sql(&other.subscription))
        .await;
    let events = [
        subscription(&other, UPDATED, KEPT, 5),
        subscription(&user, UPDATED, ERASED, 5),
        session(&user, ERASED, json!({})),
    ];
    let mut messages: Vec<_> = events.iter().map(crate::any_order::message).collect();
    messages.push((UPDATED.to_owned(), poison(&user, ERASED), "held".to_owned()));
    bridge.publish_all(messages).await;
    bridge.database.until_a_worker_waits().await;
    let forced = run(
        &bridge,
        &["--customer", &user.customer, "--force", "--json"],
    )
    .await;
    assert_eq!(erased(&forced)["events"], 3);
    row.rollback().await.expect("it can be rolled back");

    bridge.wait_until_applied().await;
    until_gone(&bridge).await;
    assert_eq!(bridge.bodies("STRIPE_DEAD_LETTERS").await.len(), 0);
}

/// Waits until nothing in streams and tables contains personal data of the person.
async fn until_gone(bridge: &Bridge) {
    eventually("late messages to be removed", DEADLINE, async || {
        let places = places(bridge, ERASED).await;
        if places.is_empty() {
            Ok(())
        } else {
            let log = bridge.workers.last().map(|worker| worker.log());
            Err(format!(
                "{}\n{}",
                places.join("\n"),
                log.unwrap_or_default()
            ))
        }
    })
    .await;
}
