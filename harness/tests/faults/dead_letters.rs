//! The operator's commands for dead letters: list, show, retry, drop.

use std::time::Duration;

use async_nats::{HeaderMap, jetstream};
use futures_util::future::join_all;
use litestripe_contract::settings::StreamSettings;
use litestripe_contract::{header, stream};
use litestripe_harness::bridge::{DatabaseKind, filter_by_subscription};
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::Purchase;
use litestripe_harness::{eventually, nats};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::ledger::Answer;
use crate::rig::{DEADLINE, Rig};

const CREATED: &str = "customer.subscription.created";

/// As long as there is room.
const DEAD_LETTERS: StreamSettings = StreamSettings {
    max_age: Duration::ZERO,
    max_bytes: None,
};

#[tokio::test]
async fn sqlite_dead_letters_are_listed_shown_retried_and_dropped() {
    dead_letters(DatabaseKind::Sqlite).await;
}

#[tokio::test]
async fn postgres_dead_letters_are_listed_shown_retried_and_dropped() {
    dead_letters(DatabaseKind::Postgres).await;
}

async fn dead_letters(database: DatabaseKind) {
    let mut rig = Rig::start(database, 1, &[]).await;
    let now = OffsetDateTime::now_utc().unix_timestamp() - 60;
    let [curable, hopeless, well] = [(); 3].map(|()| Purchase::new(now));
    let with_nul = json!({ "metadata": { "plan": "team", "note": "Jo Doe\u{0}" } });
    let events = [
        curable.subscription_event(CREATED, now, with_nul),
        hopeless.subscription_event(CREATED, now, json!({ "trial_end": i64::MAX })),
        well.subscription_event(CREATED, now, json!({})),
    ];
    for event in &events {
        assert_eq!(
            rig.ledger.deliver(&rig.client, &rig.hook(), event).await,
            Answer::Accepted
        );
    }
    rig.bridge.wait_until_applied().await;
    assert_eq!(
        rig.bridge.rows().await.len(),
        1,
        "poisoned events do not stop other events"
    );

    let letters = listed(&rig).await;
    assert_eq!(letters.len(), 2, "{letters:?}");
    let letter = |field: &str| {
        let letter = letters.iter().find(|letter| {
            letter["reason"]
                .as_str()
                .is_some_and(|why| why.contains(field))
        });
        let letter = letter.unwrap_or_else(|| panic!("no reason names `{field}`: {letters:?}"));
        assert_eq!(letter["event_type"], CREATED);
        letter["sequence"].to_string()
    };
    let (curable_letter, hopeless_letter) = (letter("metadata"), letter("trial_end"));
    let table = run(&rig, &["list"], &[]).await;
    assert!(table.stdout.contains("trial_end"), "{table:?}");
    assert!(!table.stdout.contains("Jo Doe"), "{table:?}");

    let shown = run(&rig, &["show", &curable_letter, "--json"], &[]).await;
    let shown: Value = serde_json::from_str(&shown.stdout).expect("it is JSON");
    assert_eq!(
        (&shown["event_type"], &shown["body"]),
        (&json!(CREATED), &Value::Null),
        "the body is shown only on request"
    );
    let body = run(&rig, &["show", &curable_letter, "--body", "--json"], &[]).await;
    assert!(body.stdout.contains(events[0].id()), "{body:?}");

    // Nothing was fixed, so the retry fails and the dead letter stays.
    let retried = run(&rig, &["retry", &curable_letter], &[]).await;
    assert_eq!(retried.status.code(), Some(1), "{retried:?}");
    assert!(
        retried.stderr.contains("still cannot be applied"),
        "{retried:?}"
    );
    assert_eq!(listed(&rig).await.len(), 2);

    // One of them can be applied now: the setting leaves out the metadata that cannot be stored.
    // The workers get it first.
    let fixed = [("LITESTRIPE_METADATA_KEYS", "plan")];
    assert!(rig.running(0).stop().await.success());
    rig.start_worker(0, &fixed);
    rig.until_worker_is_ready(0).await;
    let retried = run(&rig, &["retry", "--all", "--json"], &fixed).await;
    assert_eq!(retried.status.code(), Some(1), "{retried:?}");
    let report: Value = serde_json::from_str(&retried.stdout).expect("it is JSON");
    let applied = |letter: &Value| letter["applied"] == json!(true);
    assert_eq!(
        report
            .as_array()
            .map(|report| report.iter().filter(|letter| applied(letter)).count()),
        Some(1)
    );
    let left = listed(&rig).await;
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["sequence"].to_string(), hopeless_letter);

    rig.bridge.wait_until_applied().await;
    assert_eq!(
        rig.bridge
            .row(&curable.subscription)
            .await
            .subscription_metadata,
        json!({ "plan": "team" })
    );
    let again = run(&rig, &["retry", &curable_letter], &fixed).await;
    assert_eq!(again.status.code(), Some(1), "{again:?}");
    assert!(
        again.stderr.contains("there is no dead letter"),
        "{again:?}"
    );
    let signals = rig.bridge.signals().await;
    assert_eq!(
        filter_by_subscription(&signals, &curable.subscription).len(),
        1,
        "the event is applied once"
    );

    assert!(
        run(&rig, &["drop", &hopeless_letter], &[])
            .await
            .status
            .success()
    );
    assert_eq!(
        run(&rig, &["drop", &hopeless_letter], &[])
            .await
            .status
            .code(),
        Some(1)
    );
    assert_eq!(listed(&rig).await, Vec::<Value>::new());
    assert_eq!(rig.bridge.rows().await.len(), 2);
}

#[tokio::test]
async fn dead_letter_of_an_older_stream_with_the_same_sequence_hides_no_new_one() {
    let mut rig = Rig::start(DatabaseKind::Sqlite, 0, &[]).await;
    let now = OffsetDateTime::now_utc().unix_timestamp() - 60;
    let poison =
        Purchase::new(now).subscription_event(CREATED, now, json!({ "trial_end": i64::MAX }));
    rig.deliver_all(std::slice::from_ref(&poison)).await;
    // As if STRIPE_EVENTS had been recreated: the first event of the old stream was poisoned too.
    let jetstream = rig.bridge.jetstream().await;
    let letters = stream::dead_letters(1, DEAD_LETTERS, 10 << 30);
    let letters = jetstream::stream::Config {
        duplicate_window: Duration::from_secs(10),
        ..letters
    };
    jetstream
        .create_stream(letters)
        .await
        .expect("a stream can be made");
    let mut headers = HeaderMap::new();
    headers.insert(header::MESSAGE_ID, "dead:1");
    let other = jetstream
        .publish_with_headers(format!("stripe.dead.{CREATED}"), headers, "{}".into())
        .await;
    other.expect("it is sent").await.expect("it is stored");

    rig.start_worker(0, &[]);
    eventually("the event to be stored beside it", DEADLINE, async || {
        let letters = rig.bridge.dead_letters().await;
        if letters.iter().any(|letter| letter.body == poison.body()) {
            Ok(())
        } else {
            Err(rig.running(0).log())
        }
    })
    .await;
    rig.bridge.wait_until_applied().await;
    assert_eq!(rig.bridge.dead_letters().await.len(), 2);
}

#[tokio::test]
async fn ten_thousand_dead_letters_are_all_listed() {
    const COUNT: usize = 10_050;
    let rig = Rig::servers(DatabaseKind::Sqlite, nats::Options::default()).await;
    let jetstream = rig.bridge.jetstream().await;
    jetstream
        .create_stream(stream::dead_letters(1, DEAD_LETTERS, 10 << 30))
        .await
        .expect("a stream can be made");
    for _ in 0..COUNT / 50 {
        let sent = (0..50).map(|_| async {
            let sent = jetstream
                .publish(format!("stripe.dead.{CREATED}"), "{}".into())
                .await;
            sent.expect("it is sent").await.expect("it is stored")
        });
        join_all(sent).await;
    }
    assert_eq!(listed(&rig).await.len(), COUNT);
}

async fn listed(rig: &Rig) -> Vec<Value> {
    let finished = run(rig, &["list", "--json"], &[]).await;
    assert!(finished.status.success(), "{finished:?}");
    serde_json::from_str(&finished.stdout).expect("it is a list in JSON")
}

async fn run(rig: &Rig, arguments: &[&str], settings: &[(&str, &str)]) -> Finished {
    let launch = rig
        .worker()
        .arg("dead-letters")
        .args(arguments.iter().copied());
    settings
        .iter()
        .fold(launch, |launch, (name, value)| launch.env(name, value))
        .run(DEADLINE)
        .await
}
