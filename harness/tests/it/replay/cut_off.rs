//! Replays that are killed, stopped, or started twice: their unsent signals are not lost and never
//! sent early.

use std::collections::BTreeSet;

use litestripe_entity::stripe_subscription::Model;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, filter_by_subscription};
use litestripe_harness::process::Signal as ProcessSignal;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{
    DEADLINE, count_unsent, cut_off, forget_rows, histories, last_signal, publish, replay,
    signals_after, until_all_signals_are_sent,
};
use crate::any_order::message;
use crate::orphans::rebuild::rebuildable;
use crate::orphans::{COMPLETED, CREATED, UPDATED, apply};

on_both_databases!(
    killed_replay_sends_its_signals_when_run_again,
    unsent_signals_after_the_end_are_sent_by_a_worker,
    live_event_signals_a_row_during_a_replay_only_if_it_has_the_current_state,
    stopped_replay_resumes_from_its_position,
    second_replay_is_refused_while_the_first_runs,
    replay_finishes_although_its_events_were_purged,
    unreadable_row_is_named_and_does_not_delay_other_signals,
);

async fn killed_replay_sends_its_signals_when_run_again(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(100)).await;
    bridge.check().await;
    let (rows, last) = (bridge.rows().await, last_signal(&bridge).await);
    forget_rows(&mut bridge, database).await;

    cut_off(&bridge, &[]).await;
    // Not even a running worker sends signals: the rows may be in any earlier state.
    bridge.start_worker().wait_until_ready().await;
    bridge.wait_until_applied().await;
    assert_eq!(
        signals_after(&bridge, last).await.len(),
        0,
        "an intermediate state was signalled"
    );

    let status = bridge
        .worker()
        .args(["status", "--json"])
        .run(DEADLINE)
        .await;
    let status: Value = serde_json::from_str(&status.stdout).expect("it prints JSON");
    assert!(
        status["unsent_signals"].as_u64() >= Some(10) && status["replay"].is_object(),
        "{status:#}"
    );

    // By the database the dead process counts as alive for half a minute.
    set_last_heartbeat(&bridge, 60).await;
    let again = replay(&bridge, &[]).await;
    assert_eq!(again.status.code(), Some(0), "{}", again.stderr);
    assert!(
        rebuildable(bridge.rows().await) == rebuildable(rows.clone()),
        "the rows differ from before"
    );
    until_all_signals_are_sent(&bridge).await;
    bridge.wait_until_applied().await;
    let signals = signals_after(&bridge, last).await;
    let signalled: BTreeSet<_> = signals
        .iter()
        .map(|signal| signal.headers["ce-subject"].clone())
        .collect();
    assert_eq!(
        (signals.len(), signalled.len()),
        (rows.len(), rows.len()),
        "each row once"
    );
    for row in &rows {
        let [signal] = filter_by_subscription(&signals, &row.stripe_subscription_id)[..] else {
            panic!("not one")
        };
        assert_eq!(signal.body["status"], json!(row.status), "the final state");
    }
}

/// A replay may die after its end, and a batch that read the rows before the end may commit after
/// it.
async fn unsent_signals_after_the_end_are_sent_by_a_worker(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(20)).await;
    let orphan = Purchase::new(crate::orphans::now() - 60);
    apply(
        &bridge,
        &orphan.checkout_session_event(COMPLETED, orphan.created, json!({})),
    )
    .await;
    bridge.check().await;
    let (rows, last) = (bridge.rows().await, last_signal(&bridge).await);
    assert_eq!(replay(&bridge, &[]).await.status.code(), Some(0));
    for statement in [
        "UPDATE litestripe_replay SET dt_finished = NULL",
        "UPDATE stripe_subscription SET last_sent = 'null'",
        "UPDATE orphaned_payment SET unsent_event = '1795430000 checkout.session.completed evt_1' WHERE id LIKE 'sub_%'",
    ] {
        bridge
            .database
            .query(statement)
            .await
            .expect("it can be written");
    }
    apply(
        &bridge,
        &orphan.subscription_event(CREATED, orphan.created, json!({})),
    )
    .await;
    assert!(
        count_unsent(&bridge).await >= rows.len() - 1,
        "the replay is not finished"
    );

    bridge
        .database
        .query("UPDATE litestripe_replay SET dt_finished = dt_heartbeat")
        .await
        .expect("it can be written");
    until_all_signals_are_sent(&bridge).await;
    bridge.wait_until_applied().await;
    let signals = signals_after(&bridge, last).await;
    for row in bridge.rows().await {
        let sent = filter_by_subscription(&signals, &row.stripe_subscription_id);
        let last = sent.last().expect("every row is sent");
        assert_eq!(
            (&last.body["revision"], &last.body["status"]),
            (&json!(row.revision), &json!(row.status))
        );
    }
}

async fn live_event_signals_a_row_during_a_replay_only_if_it_has_the_current_state(
    database: DatabaseKind,
) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let histories = histories(100);
    publish(&bridge, &histories).await;
    bridge.check().await;
    let last = last_signal(&bridge).await;
    forget_rows(&mut bridge, database).await;
    cut_off(&bridge, &[]).await;
    let due = "SELECT stripe_subscription_id AS id FROM stripe_subscription \
        WHERE last_sent = 'null' AND status IS NOT NULL";
    let due = bridge.database.query(due).await.expect("it answers");
    let due: String = due[0].try_get("", "id").expect("it is a text");

    bridge.start_worker().wait_until_ready().await;
    let history = histories
        .iter()
        .find(|history| history.subscription == due)
        .expect("it is one of ours");
    let of_row = async || {
        let signals = signals_after(&bridge, last).await;
        let ids: Vec<_> = signals
            .iter()
            .map(|signal| signal.headers["ce-subject"].clone())
            .collect();
        assert!(ids.iter().all(|id| *id == due), "another row: {ids:?}");
        signals
    };
    // The row contains this event already.
    let known = history
        .events
        .iter()
        .min_by_key(|event| event.created())
        .expect("it has events");
    let (event_type, body, id) = message(known);
    bridge
        .publish(&event_type, body, &format!("{id}:late"))
        .await;
    bridge.wait_until_applied().await;
    assert_eq!(
        of_row().await.len(),
        0,
        "the row may be in any earlier state"
    );
    // It completes the row, but is not the subscription's current state.
    let session = json!({ "subscription": due, "client_reference_id": "user_1" });
    let now = crate::orphans::now();
    let session = Purchase::new(now).checkout_session_event(COMPLETED, now, session);
    apply(&bridge, &session).await;
    assert_eq!(of_row().await.len(), 0, "the status may be an earlier one");

    let change = Event::new(UPDATED, crate::orphans::now(), history.truth.clone());
    bridge.publish(UPDATED, change.body(), change.id()).await;
    bridge.wait_until_applied().await;
    let signals = of_row().await;
    let [signal] = &signals[..] else {
        panic!("{signals:#?}")
    };
    assert_eq!(
        (&signal.body["replayed"], &signal.body["previous_revision"]),
        (&json!(false), &Value::Null)
    );
    assert_eq!(signal.body["revision"], bridge.row(&due).await.revision);
}

async fn stopped_replay_resumes_from_its_position(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(100)).await;
    bridge.check().await;
    let (rows, last) = (bridge.rows().await, last_signal(&bridge).await);
    forget_rows(&mut bridge, database).await;

    let launch = bridge
        .worker()
        .env("LITESTRIPE_BATCH", "1")
        .args(["replay"]);
    let first = launch.start();
    litestripe_harness::eventually("a replay to have begun", DEADLINE, async || {
        if super::count_unsent_if_migrated(&bridge).await > 0 {
            Ok(())
        } else {
            Err("nothing is due".to_owned())
        }
    })
    .await;
    first.signal(ProcessSignal::Int);
    let status = first.wait(DEADLINE).await;
    assert_eq!(status.code(), Some(1), "{}", first.stderr());
    assert!(
        first.stderr().contains("run the same command again"),
        "{}",
        first.stderr()
    );
    assert_eq!(signals_after(&bridge, last).await.len(), 0);

    // Without waiting: the stopped replay has recorded its stop.
    let second = replay(&bridge, &["--json"]).await;
    let summary: Value =
        serde_json::from_str(&second.stdout).unwrap_or_else(|_| panic!("{}", second.stderr));
    assert_eq!(summary["finished"], true);
    assert!(
        summary["events"]
            .as_u64()
            .is_some_and(|events| events < 2000),
        "it began from the start: {summary}"
    );
    assert!(rebuildable(bridge.rows().await) == rebuildable(rows.clone()));
    assert_eq!(signals_after(&bridge, last).await.len(), rows.len());
}

async fn second_replay_is_refused_while_the_first_runs(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(20)).await;
    bridge.check().await;
    forget_rows(&mut bridge, database).await;
    assert_eq!(replay(&bridge, &[]).await.status.code(), Some(0));
    // As if the first were still running.
    bridge
        .database
        .query("UPDATE litestripe_replay SET dt_finished = NULL")
        .await
        .expect("it can be written");
    for other in [&[][..], &["--type", UPDATED]] {
        let refused = replay(&bridge, other).await;
        assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
        assert!(
            refused.stderr.contains("a replay has been running"),
            "{}",
            refused.stderr
        );
    }

    // Once the first counts as dead, the next replay does its work too, whatever its own selection.
    set_last_heartbeat(&bridge, 60).await;
    bridge
        .database
        .query("DELETE FROM stripe_subscription")
        .await
        .expect("it can be emptied");
    let next = replay(&bridge, &["--type", UPDATED, "--json"]).await;
    assert_eq!(super::json_of(&next)["events"], 400, "all types");
}

async fn replay_finishes_although_its_events_were_purged(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(50)).await;
    bridge.check().await;
    let last = last_signal(&bridge).await;
    forget_rows(&mut bridge, database).await;
    let arguments = ["--since", "1h"];
    cut_off(&bridge, &arguments).await;
    let of_rows = "SELECT 1 FROM stripe_subscription WHERE last_sent IS NOT NULL";
    let due = bridge
        .database
        .query(of_rows)
        .await
        .expect("the database answers")
        .len();

    // Meanwhile rows with an unsent signal are left to the replay.
    let resent = bridge
        .worker()
        .args(["resend", "--all"])
        .run(DEADLINE)
        .await;
    let left = format!("{due} rows were not resent");
    assert!(
        resent.stdout.contains("0 rows signalled again") && resent.stderr.contains(&left),
        "{resent:?}"
    );

    let stream = bridge.stream("STRIPE_EVENTS").await;
    stream.purge().await.expect("it can be emptied");
    set_last_heartbeat(&bridge, 60).await;
    let again = super::json_of(&replay(&bridge, &[&arguments[..], &["--json"]].concat()).await);
    let signals = signals_after(&bridge, last).await;
    let signalled = signals
        .iter()
        .filter(|signal| signal.subject == "subscription.changed")
        .count();
    // The session of the others may have been among the purged events.
    let withheld = again["withheld"].as_u64().map_or(0, |count| count as usize);
    assert_eq!(
        (count_unsent(&bridge).await, signalled + withheld),
        (0, due),
        "{again:#}"
    );
    assert!(
        replay(&bridge, &arguments)
            .await
            .stdout
            .contains("nothing to replay")
    );
}

async fn unreadable_row_is_named_and_does_not_delay_other_signals(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    publish(&bridge, &histories(3)).await;
    let signals = bridge.check().await.len();
    bridge.workers.pop().expect("there is one").stop().await;
    let [later, damaged, whole] = &bridge.rows().await[..] else {
        panic!("not three rows")
    };
    let set = async |row: &Model, column: &str, value: &str| {
        let id = &row.stripe_subscription_id;
        let set = format!(
            "UPDATE stripe_subscription SET {column} = '{value}' WHERE stripe_subscription_id = '{id}'"
        );
        bridge
            .database
            .query(&set)
            .await
            .expect("it can be written");
    };
    set(later, "last_sent", r#"{"of": "a later version"}"#).await;
    set(damaged, "last_sent", "null").await;
    set(damaged, "merge_state", "no JSON").await;
    set(whole, "last_sent", "null").await;
    // Selects another row: a replay of the damaged row's own events would be refused.
    let named = replay(&bridge, &["--subscription", &whole.stripe_subscription_id]).await;
    assert_eq!(named.status.code(), Some(1), "{}", named.stdout);
    assert!(
        named
            .stderr
            .contains("the signals of 1 rows cannot be sent"),
        "{}",
        named.stderr
    );
    assert!(
        named.stderr.contains(&damaged.stripe_subscription_id),
        "{}",
        named.stderr
    );
    assert_eq!(
        (bridge.signals().await.len(), count_unsent(&bridge).await),
        (signals + 2, 1),
        "the others are sent"
    );

    // Once the row is repaired, a worker sends its signal.
    set(damaged, "merge_state", &damaged.merge_state).await;
    bridge.start_worker().wait_until_ready().await;
    until_all_signals_are_sent(&bridge).await;
    bridge.wait_until_applied().await;
    let signals = bridge.signals().await;
    let sent = filter_by_subscription(&signals, &damaged.stripe_subscription_id);
    assert_eq!(sent.last().expect("there is one").body["replayed"], true);
}

/// Sets the last heartbeat of the running replay to `seconds` ago.
pub(super) async fn set_last_heartbeat(bridge: &Bridge, seconds: i64) {
    let at = OffsetDateTime::now_utc() - time::Duration::seconds(seconds);
    let at = at.format(&Rfc3339).expect("it can be written");
    let set = format!("UPDATE litestripe_replay SET dt_heartbeat = '{at}'");
    bridge
        .database
        .query(&set)
        .await
        .expect("it can be written");
}
