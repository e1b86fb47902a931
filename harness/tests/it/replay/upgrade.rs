//! A database of the previous version, in which a replay was cut off: its unsent signals are not
//! lost.

use litestripe_harness::bridge::{
    Bridge, Database, DatabaseKind, Options, Signal, filter_by_subscription,
};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use litestripe_migration::{Migrator, MigratorTrait as _};
use serde_json::{Value, json};

use super::{DEADLINE, count_unsent, cut_off, json_of, last_signal, replay, signals_after};
use crate::orphans::{CREATED, apply, count_signals, now, until};
use crate::previous::{self, Step};

on_both_databases!(database_of_the_previous_version_continues);

/// The number of migrations in the previous version.
const STEPS_BEFORE: usize = 6;

async fn database_of_the_previous_version_continues(database: DatabaseKind) {
    let mut bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1s")).await;
    let (changed, new) = (Purchase::new(now() - 3_600), Purchase::new(now() - 3_600));
    for purchase in [&changed, &new] {
        apply(
            &bridge,
            &purchase.subscription_event(CREATED, purchase.created, json!({})),
        )
        .await;
    }
    let last = last_signal(&bridge).await;
    install_previous_database(&mut bridge, database, &changed, &new).await;

    // Back to the step before the one that moved the unsent signals.
    let steps = (Migrator::migrations().len() - STEPS_BEFORE - 1).to_string();
    let down = ["down", "--steps", &steps];
    let migrate = async |command: &[&str]| {
        let migrated = bridge
            .worker()
            .arg("migrate")
            .args(command.iter().copied())
            .run(DEADLINE)
            .await;
        assert_eq!(migrated.status.code(), Some(0), "{}", migrated.stderr);
    };
    migrate(&["up"]).await;
    let events =
        "SELECT unsent_event FROM orphaned_payment WHERE unsent_event IS NOT NULL ORDER BY id";
    let events = bridge
        .database
        .query(events)
        .await
        .expect("the database answers");
    let events: Vec<String> = events
        .iter()
        .map(|row| row.try_get("", "unsent_event").expect("it is text"))
        .collect();
    let expected = [
        "checkout.session.completed evt_cs_open",
        "litestripe.resolution evt_cs_resolved",
    ];
    assert_eq!(events, expected.map(|event| format!("1795430000 {event}")));
    migrate(&down).await;
    let due = bridge
        .database
        .query("SELECT entity_id FROM litestripe_signal_due")
        .await
        .expect("the database answers");
    assert_eq!(due.len(), 4);
    migrate(&["up"]).await;
    cut_off::set_last_heartbeat(&bridge, 3_600).await;
    assert_eq!(
        count_unsent(&bridge).await,
        4,
        "an orphan that was created and resolved needs no signal"
    );

    // A worker sends the signal in the outbox, and leaves the unsent signals of the replay to the
    // replay.
    bridge.start_worker().wait_until_ready().await;
    bridge.wait_until_applied().await;
    let signals = signals_after(&bridge, last).await;
    assert_eq!(
        (signals.len(), count_signals(&signals, "orphan.resolved")),
        (1, 1),
        "{signals:#?}"
    );
    let status = bridge
        .worker()
        .args(["status", "--json"])
        .run(DEADLINE)
        .await;
    let status: Value = serde_json::from_str(&status.stdout).expect("it prints JSON");
    assert_eq!(
        (&status["unsent_signals"], &status["replay"]["running"]),
        (&json!(4), &json!(false)),
        "{status:#}"
    );
    let asked = bridge
        .database
        .query("SELECT kind FROM litestripe_question")
        .await
        .expect("the database answers");
    assert_eq!(asked.len(), 1, "the question waits for the replay");

    let summary = json_of(&replay(&bridge, &["--json"]).await);
    assert_eq!(
        (
            &summary["finished"],
            &summary["events"],
            &summary["signals"]
        ),
        (&json!(true), &json!(2), &json!(4))
    );
    eventually("everything to be sent", DEADLINE, async || {
        let sent = signals_after(&bridge, last).await.len();
        if sent >= 5 {
            Ok(())
        } else {
            Err(format!("{sent} signals"))
        }
    })
    .await;
    check_sent(&signals_after(&bridge, last).await, &changed, &new);
    assert_eq!(count_unsent(&bridge).await, 0);
    until(&bridge, &new.subscription, |orphan| {
        orphan.resolved_at.is_none()
    })
    .await;
    let status = bridge
        .worker()
        .args(["status", "--json"])
        .run(DEADLINE)
        .await;
    let status: Value = serde_json::from_str(&status.stdout).expect("it prints JSON");
    assert_eq!(
        (&status["unsent_signals"], &status["replay"]),
        (&json!(0), &Value::Null),
        "{status:#}"
    );
}

fn check_sent(signals: &[Signal], changed: &Purchase, new: &Purchase) {
    let [signal] = filter_by_subscription(signals, &changed.subscription)[..] else {
        panic!("not one: {signals:#?}")
    };
    assert_eq!(
        (&signal.body["changed"], &signal.body["previous"]),
        (&json!(["status"]), &json!({ "status": "trialing" }))
    );
    assert_eq!(
        (&signal.body["previous_revision"], &signal.body["replayed"]),
        (&json!(1_795_430_000_123_i64), &json!(true))
    );
    let [signal] = filter_by_subscription(signals, &new.subscription)[..] else {
        panic!("not one: {signals:#?}")
    };
    assert_eq!(
        (&signal.body["previous_revision"], &signal.body["replayed"]),
        (&Value::Null, &json!(true))
    );
    let of_orphan = |id: &str| {
        signals
            .iter()
            .filter(|signal| signal.body["orphan_id"] == id)
            .collect::<Vec<_>>()
    };
    let [created] = of_orphan("cs_open")[..] else {
        panic!("not one: {signals:#?}")
    };
    assert_eq!(
        (created.subject.as_str(), &created.body["event"]["id"]),
        ("orphan.created", &json!("evt_cs_open"))
    );
    let [resolved] = of_orphan("cs_resolved")[..] else {
        panic!("not one: {signals:#?}")
    };
    assert_eq!(
        (resolved.subject.as_str(), &resolved.body["event"]["id"]),
        ("orphan.resolved", &json!("evt_cs_resolved"))
    );
    assert_eq!(of_orphan("cs_gone").len(), 0);
}

/// Stops the workers and replaces their database by one of the previous version: a replay without a
/// name and one with a name were cut off, and their unsent signals, a question and a signal in the
/// outbox wait.
async fn install_previous_database(
    bridge: &mut Bridge,
    database: DatabaseKind,
    changed: &Purchase,
    new: &Purchase,
) {
    let rows = [
        bridge.row(&changed.subscription).await,
        bridge.row(&new.subscription).await,
    ];
    let signals = bridge.signals().await;
    let mut last_sent = filter_by_subscription(&signals, &changed.subscription)
        .last()
        .expect("there is one")
        .body
        .clone();
    last_sent["status"] = json!("trialing");
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    bridge.database = Database::prepare(database);
    bridge.database.resume().await;
    previous::install(&bridge.database, Step::RoomToUpdate).await;

    const THEN: &str = "'2026-11-25 00:00:00+00:00'";
    let mut inserts = Vec::new();
    for (row, revision) in rows.iter().zip([1_795_430_000_123_i64, 0]) {
        inserts.push(format!(
            "INSERT INTO stripe_subscription (stripe_subscription_id, status, cancel_at_period_end, items, metadata, \
             subscription_metadata, livemode, uncertain, revision, version, last_event_id, merge_state, dt_created, \
             dt_last_updated) VALUES ('{}', 'active', FALSE, '[]', '{{}}', '{{}}', FALSE, FALSE, {revision}, 1, '{}', \
             '{}', {THEN}, {THEN})",
            row.stripe_subscription_id,
            row.last_event_id.as_deref().expect("it has a last event"),
            row.merge_state
        ));
    }
    for (id, resolved_at) in [
        ("cs_open", "NULL"),
        ("cs_gone", THEN),
        ("cs_resolved", THEN),
    ] {
        inserts.push(format!(
            "INSERT INTO orphaned_payment (id, checkout_session_id, reason, event_id, livemode, resolved_at, dt_created, \
             dt_last_updated) VALUES ('{id}', '{id}', 'missing_client_reference_id', 'evt_{id}', FALSE, {resolved_at}, \
             {THEN}, {THEN})"
        ));
    }
    for (id, subject, replay, last_sent, event_type) in [
        (
            changed.subscription.as_str(),
            "subscription.changed",
            "",
            format!("'{last_sent}'"),
            CREATED,
        ),
        (
            &new.subscription,
            "subscription.changed",
            "night",
            "NULL".to_owned(),
            CREATED,
        ),
        (
            "cs_open",
            "orphan.created",
            "night",
            "NULL".to_owned(),
            "checkout.session.completed",
        ),
        (
            "cs_gone",
            "orphan.created",
            "",
            "NULL".to_owned(),
            "checkout.session.completed",
        ),
        (
            "cs_gone",
            "orphan.resolved",
            "",
            "NULL".to_owned(),
            "litestripe.resolution",
        ),
        (
            "cs_resolved",
            "orphan.resolved",
            "",
            "NULL".to_owned(),
            "litestripe.resolution",
        ),
    ] {
        inserts.push(format!(
            "INSERT INTO signal_due (entity_id, subject, replay, told, unchanged, event_id, event_type, event_created, \
             dt_created) VALUES ('{id}', '{subject}', '{replay}', {last_sent}, FALSE, 'evt_{id}', '{event_type}', 1795430000, \
             {THEN})"
        ));
    }
    let in_outbox = json!({
        "orphan_id": "cs_sent", "reason": "missing_client_reference_id", "checkout_session_id": "cs_sent",
        "stripe_customer_id": null, "stripe_subscription_id": null, "livemode": false,
        "event": { "id": "evt_sent", "type": "checkout.session.completed", "created": "2026-11-23T10:33:20Z" },
    });
    inserts.push(format!(
        "INSERT INTO signal_outbox (shard, entity_id, subject, message_id, event_created, body, dt_created) VALUES \
         (3, 'cs_sent', 'orphan.resolved', 'cs_sent:orphan.resolved', 1795430000, '{in_outbox}', {THEN})"
    ));
    inserts.push(format!(
        "INSERT INTO due_check (entity_id, kind, due_at, attempts, stripe_customer_id, stripe_subscription_id, is_paid, \
         livemode, event_id, event_type, event_created, stream_sequence) VALUES ('{0}', 'grace', {THEN}, 0, '{1}', '{0}', \
         FALSE, FALSE, 'evt_1', '{CREATED}', 1795430000, 2)",
        new.subscription, new.customer
    ));
    for (name, last_sequence) in [("", 1), ("night", 2)] {
        inserts.push(format!(
            "INSERT INTO replay (name, signals, first_sequence, last_sequence, event_types, dt_started, dt_beat) VALUES \
             ('{name}', 'changed', 1, {last_sequence}, '', {THEN}, {THEN})"
        ));
    }
    for insert in inserts {
        bridge
            .database
            .query(&insert)
            .await
            .unwrap_or_else(|error| panic!("{insert}: {error}"));
    }
}
