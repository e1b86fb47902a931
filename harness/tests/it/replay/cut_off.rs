//! Replays that are killed, stopped, or begun twice: what they owe is not lost, and never told early.

use std::collections::BTreeSet;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, of_subscription};
use litestripe_harness::process::Signal as ProcessSignal;
use litestripe_harness::stripe::Event;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{DEADLINE, cut_off, forget_rows, last_signal, owed, publish, replay, signals_after, told};
use crate::any_order::message;
use crate::orphans::UPDATED;
use crate::orphans::rebuild::lasting;

on_both_databases!(
    replay_that_was_killed_tells_when_it_is_run_again,
    live_event_signals_a_row_that_is_due_at_once,
    stopped_replay_goes_on_where_it_was,
    second_replay_waits_for_the_first,
    replay_is_finished_although_the_stream_moved_on,
    what_cannot_be_told_is_dropped_or_named_and_keeps_nobody_else_waiting,
);

async fn replay_that_was_killed_tells_when_it_is_run_again(database: DatabaseKind) {
    for arguments in [&[][..], &["--name", "rebuild"]] {
        let mut bridge = Bridge::start(Options::on(database)).await;
        publish(&bridge, &told(100)).await;
        bridge.check().await;
        let (rows, last) = (bridge.rows().await, last_signal(&bridge).await);
        forget_rows(&mut bridge, database).await;

        cut_off(&bridge, arguments).await;
        // Not even with a worker up: what stands in the rows now may be any state they ever had.
        bridge.start_worker().wait_until_ready().await;
        bridge.wait_until_applied().await;
        assert_eq!(signals_after(&bridge, last).await.len(), 0, "an intermediate state was told");

        let status = bridge.worker().args(["status", "--json"]).run(DEADLINE).await;
        let status: Value = serde_json::from_str(&status.stdout).expect("it prints JSON");
        assert!(status["replays"][0]["signals_due"].as_u64() >= Some(10), "{status:#}");

        // The database believes the dead process alive for half a minute.
        last_heard_of(&bridge, 60).await;
        let again = replay(&bridge, arguments).await;
        assert_eq!(again.status.code(), Some(0), "{}", again.stderr);
        assert!(lasting(bridge.rows().await) == lasting(rows.clone()), "other rows than before");
        bridge.wait_until_applied().await;
        let signals = signals_after(&bridge, last).await;
        let told: BTreeSet<_> = signals.iter().map(|signal| signal.headers["ce-subject"].clone()).collect();
        assert_eq!((signals.len(), told.len()), (rows.len(), rows.len()), "each row once");
        for row in &rows {
            let [signal] = of_subscription(&signals, &row.stripe_subscription_id)[..] else { panic!("not one") };
            assert_eq!(signal.body["status"], json!(row.status), "the final state");
        }
        assert_eq!(owed(&bridge).await, 0);
    }
}

async fn live_event_signals_a_row_that_is_due_at_once(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::on(database)).await;
    let histories = told(100);
    publish(&bridge, &histories).await;
    bridge.check().await;
    let last = last_signal(&bridge).await;
    forget_rows(&mut bridge, database).await;
    cut_off(&bridge, &[]).await;
    let due = bridge.database.query("SELECT entity_id FROM signal_due ORDER BY 1").await.expect("it answers");
    let due: String = due[0].try_get("", "entity_id").expect("it is a text");

    bridge.start_worker().wait_until_ready().await;
    let history = histories.iter().find(|history| history.subscription == due).expect("it is one of ours");
    // One that the row knows already changes nothing, and yet tells that the row is there.
    let known = history.events.iter().min_by_key(|event| event.created()).expect("it has events");
    let (event_type, body, id) = message(known);
    bridge.publish(&event_type, body, &format!("{id}:late")).await;
    bridge.wait_until_applied().await;
    let signals = signals_after(&bridge, last).await;
    let [signal] = of_subscription(&signals, &due)[..] else { panic!("{signals:#?}") };
    assert_eq!((&signal.body["replayed"], &signal.body["previous_revision"]), (&json!(true), &Value::Null));
    assert_eq!(signals.len(), 1, "no other row");

    // A live change of it is told as any other, on top of that.
    let change = Event::new(UPDATED, crate::orphans::now(), history.truth.clone());
    bridge.publish(UPDATED, change.body(), change.id()).await;
    bridge.wait_until_applied().await;
    let after = signals_after(&bridge, last).await;
    assert!(of_subscription(&after, &due).len() <= 2);
    let row = bridge.row(&due).await;
    assert_eq!(of_subscription(&after, &due).last().expect("there is one").body["revision"], row.revision);
}

async fn stopped_replay_goes_on_where_it_was(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::on(database)).await;
    publish(&bridge, &told(100)).await;
    bridge.check().await;
    let (rows, last) = (bridge.rows().await, last_signal(&bridge).await);
    forget_rows(&mut bridge, database).await;

    let launch = bridge.worker().env("LITESTRIPE_BATCH", "1").args(["replay", "--name", "night"]);
    let first = launch.start();
    litestripe_harness::eventually("a replay to be at it", DEADLINE, async || {
        if super::owed_if_migrated(&bridge).await > 0 { Ok(()) } else { Err("nothing is due".to_owned()) }
    })
    .await;
    first.signal(ProcessSignal::Int);
    let status = first.wait(DEADLINE).await;
    assert_eq!(status.code(), Some(1), "{}", first.stderr());
    assert!(first.stderr().contains("run again"), "{}", first.stderr());
    assert_eq!(signals_after(&bridge, last).await.len(), 0);

    // No waiting: who was stopped said so.
    let second = replay(&bridge, &["--name", "night", "--json"]).await;
    let summary: Value = serde_json::from_str(&second.stdout).unwrap_or_else(|_| panic!("{}", second.stderr));
    assert_eq!(summary["finished"], true);
    assert!(summary["events"].as_u64().is_some_and(|events| events < 2000), "it began anew: {summary}");
    assert!(lasting(bridge.rows().await) == lasting(rows.clone()));
    assert_eq!(signals_after(&bridge, last).await.len(), rows.len());
}

async fn second_replay_waits_for_the_first(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::on(database)).await;
    publish(&bridge, &told(20)).await;
    bridge.check().await;
    forget_rows(&mut bridge, database).await;
    assert_eq!(replay(&bridge, &["--name", "first"]).await.status.code(), Some(0));
    // As if it were still at it.
    bridge.database.query("UPDATE replay SET dt_finished = NULL").await.expect("it can be written");
    for other in [&[][..], &["--name", "second"]] {
        let refused = replay(&bridge, other).await;
        assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
        assert!(refused.stderr.contains("first") && refused.stderr.contains("running"), "{}", refused.stderr);
    }
    let differs = replay(&bridge, &["--name", "first", "--type", UPDATED]).await;
    assert_eq!(differs.status.code(), Some(2), "{}", differs.stderr);
    assert!(differs.stderr.contains("with other arguments (--signals changed)"), "{}", differs.stderr);
    assert!(differs.stderr.contains("--name"), "{}", differs.stderr);
    let joined = replay(&bridge, &["--name", "first"]).await;
    assert_eq!(joined.status.code(), Some(0), "{}", joined.stderr);
}

async fn replay_is_finished_although_the_stream_moved_on(database: DatabaseKind) {
    for name in [&[][..], &["--name", "rebuild"]] {
        let mut bridge = Bridge::start(Options::on(database)).await;
        publish(&bridge, &told(50)).await;
        bridge.check().await;
        let last = last_signal(&bridge).await;
        forget_rows(&mut bridge, database).await;
        let arguments = [&["--since", "1h"], name].concat();
        cut_off(&bridge, &arguments).await;
        let of_rows = "SELECT entity_id FROM signal_due WHERE subject = 'subscription.changed'";
        let due = bridge.database.query(of_rows).await.expect("the database answers").len();

        // Meanwhile, rows that are due are left to it.
        let resent = bridge.worker().args(["resend", "--all"]).run(DEADLINE).await;
        let left = format!("{due} rows are left to the end of the replay {:?}", name.get(1).unwrap_or(&""));
        assert!(resent.stdout.contains("0 rows signalled again") && resent.stderr.contains(&left), "{resent:?}");

        let stream = bridge.jetstream().await.get_stream("STRIPE_EVENTS").await.expect("the stream is there");
        stream.purge().await.expect("it can be emptied");
        last_heard_of(&bridge, 60).await;
        let again = replay(&bridge, &arguments).await;
        assert_eq!(again.status.code(), Some(0), "{}", again.stderr);
        let signals = signals_after(&bridge, last).await;
        let told = signals.iter().filter(|signal| signal.subject == "subscription.changed").count();
        assert_eq!((owed(&bridge).await, told), (0, due), "{}", again.stdout);
        assert!(replay(&bridge, &arguments).await.stdout.contains("nothing to replay"));
    }
}

async fn what_cannot_be_told_is_dropped_or_named_and_keeps_nobody_else_waiting(database: DatabaseKind) {
    let bridge = Bridge::start(Options::on(database)).await;
    publish(&bridge, &told(3)).await;
    let rows = bridge.check().await.len();
    let owe = async |id: &str, event_type: &str| {
        let due = format!(
            "INSERT INTO signal_due (entity_id, subject, replay, unchanged, event_id, event_type, event_created, \
             dt_created) VALUES ('{id}', 'subscription.changed', '', FALSE, 'evt_1', '{event_type}', 1, \
             '2026-11-25 00:00:00+00:00')"
        );
        bridge.database.query(&due).await.expect("it can be written");
    };
    owe("sub_gone", UPDATED).await;
    let finished = replay(&bridge, &[]).await;
    assert_eq!((finished.status.code(), owed(&bridge).await), (Some(0), 0), "{}", finished.stderr);

    let [unreadable, damaged, whole] = &bridge.rows().await[..] else { panic!("not three rows") };
    owe(&unreadable.stripe_subscription_id, "of a later version").await;
    for row in [damaged, whole] {
        owe(&row.stripe_subscription_id, UPDATED).await;
    }
    let damage = format!(
        "UPDATE stripe_subscription SET merge_state = 'no JSON' WHERE stripe_subscription_id = '{}'",
        damaged.stripe_subscription_id
    );
    bridge.database.query(&damage).await.expect("it can be written");
    let named = replay(&bridge, &[]).await;
    assert_eq!(named.status.code(), Some(1), "{}", named.stdout);
    assert!(named.stderr.contains("2 signals that are due cannot be told"), "{}", named.stderr);
    assert!(named.stderr.contains(&damaged.stripe_subscription_id), "{}", named.stderr);
    bridge.wait_until_applied().await;
    let signals = bridge.signals().await;
    assert_eq!(signals.len(), rows + 1, "the whole one is told");
    assert_eq!(
        of_subscription(&signals, &whole.stripe_subscription_id).last().expect("there is one").body["replayed"],
        true
    );
}

/// Has the database believe that whoever is at a replay was last heard of that many seconds ago.
pub(super) async fn last_heard_of(bridge: &Bridge, seconds: i64) {
    let at = OffsetDateTime::now_utc() - time::Duration::seconds(seconds);
    let at = at.format(&Rfc3339).expect("it can be written");
    let set = format!("UPDATE replay SET dt_beat = '{at}'");
    bridge.database.query(&set).await.expect("it can be written");
}
