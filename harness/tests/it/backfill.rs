//! Backfill of events that never arrived, by the workers and by the command. Stripe's API is a
//! stub; everything else is real.

use std::time::Duration;

use litestripe_contract::header;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::process::Signal;
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::api::{API_KEY, Api, Trouble};
use litestripe_harness::stripe::{Event, Purchase};
use litestripe_harness::{eventually, port};
use serde_json::{Value, json};

use crate::metrics::until_shown;
use crate::orphans::{COMPLETED, CREATED, DEADLINE, EMAIL, UPDATED, now};

on_both_databases!(
    missed_deliveries_are_backfilled_automatically,
    command_publishes_missing_events_and_nothing_when_repeated,
    key_is_refused_if_all_rows_are_of_the_other_mode,
);

const EVENTS: &str = "/v1/events";

async fn missed_deliveries_are_backfilled_automatically(database: DatabaseKind) {
    let api = Api::start().await;
    // Stripe is unavailable at first: the worker retries, and applies events that arrive meanwhile.
    api.answer_next(
        EVENTS,
        Trouble::status(503).header("Stripe-Should-Retry", "false"),
    );
    let bridge = Bridge::start(
        with_key(database, &api)
            .worker("LITESTRIPE_BACKFILL_INTERVAL", "1s")
            .workers(2),
    )
    .await;
    let (arrived, missed) = (Purchase::new(now() - 600), Purchase::new(now() - 600));
    let delivered = arrived.subscription_event(CREATED, arrived.created, json!({}));
    bridge.deliver(&delivered).await;
    api.put_event(delivered.value.clone(), true);
    let lost = [
        missed.checkout_session_event(
            COMPLETED,
            missed.created,
            json!({ "client_reference_id": "user_1" }),
        ),
        missed.subscription_event(CREATED, missed.created, json!({ "status": "incomplete" })),
        missed.subscription_event(UPDATED, missed.created + 2, json!({})),
    ];
    put(&api, &lost, false);

    eventually("the row of the missed event", DEADLINE, async || {
        let row = bridge
            .rows()
            .await
            .into_iter()
            .find(|row| row.stripe_subscription_id == missed.subscription);
        let is_whole = row.as_ref().is_some_and(|row| {
            row.status.as_deref() == Some("active")
                && row.client_reference_id.as_deref() == Some("user_1")
        });
        if is_whole {
            Ok(())
        } else {
            Err(format!("{row:?}"))
        }
    })
    .await;
    let signals = bridge.check().await;
    assert!(
        signals
            .iter()
            .any(|signal| signal.body["stripe_subscription_id"] == missed.subscription.as_str())
    );
    assert_eq!(bridge.stored_events().await, 4, "nothing is stored twice");
    for event in &lost {
        let stored = stored(&bridge, event).await;
        assert_eq!(
            stored.payload,
            event.compact_body(),
            "byte for byte as the API rendered it"
        );
        assert_eq!(
            stored.subject.as_str(),
            format!("stripe.events.{}", event.event_type())
        );
        assert_eq!(
            stored
                .headers
                .get(header::SOURCE)
                .map(|value| value.as_str()),
            Some("backfill")
        );
        assert!(stored.headers.get(header::STRIPE_SIGNATURE).is_none());
    }
    let mut logs = String::new();
    let mut backfilled = 0;
    for worker in &bridge.workers {
        let (_, page) = worker.page("/metrics").await.expect("it answers");
        let line = page
            .lines()
            .find(|line| line.starts_with("litestripe_worker_events_backfilled_total"));
        backfilled += line
            .and_then(|line| line.split(' ').nth(1)?.parse::<u64>().ok())
            .expect("it is counted");
        logs += &worker.log();
    }
    assert_eq!(backfilled, 3);
    assert!(
        logs.contains("a backfill failed and will be retried: Stripe answered 503"),
        "{logs}"
    );
    assert!(
        logs.contains("had not arrived") && !logs.contains(EMAIL),
        "{logs}"
    );
}

#[tokio::test]
async fn four_workers_make_one_backfill_per_interval() {
    const INTERVAL: Duration = Duration::from_secs(4);
    let api = Api::start().await;
    let interval = format!("{}s", INTERVAL.as_secs());
    let options =
        with_key(DatabaseKind::Sqlite, &api).worker("LITESTRIPE_BACKFILL_INTERVAL", interval);
    let _bridge = Bridge::start(options.workers(4)).await;
    let requests = eventually("some backfills", DEADLINE, async || {
        let requests = api.requests(EVENTS);
        if requests.len() >= 4 {
            Ok(requests)
        } else {
            Err(requests.len().to_string())
        }
    })
    .await;
    // The record has whole seconds, and a request may be late: hence a third. Four workers without
    // a shared record would ask at about the same time.
    for (earlier, later) in requests.iter().zip(&requests[1..]) {
        assert!(
            later.at - earlier.at > INTERVAL / 3,
            "{:?}",
            later.at - earlier.at
        );
    }
    let query = &requests[0].path;
    for wanted in [
        "created%5Bgte%5D=",
        "limit=100",
        "types%5B%5D=customer.subscription.created",
    ] {
        assert!(query.contains(wanted), "{query}");
    }
}

#[tokio::test]
async fn restarted_workers_backfill_once_even_after_a_short_stop() {
    let api = Api::start().await;
    let options = with_key(DatabaseKind::Sqlite, &api).worker("LITESTRIPE_BACKFILL_INTERVAL", "1h");
    let mut bridge = Bridge::start(options).await;
    let complete = eventually("the first backfill to be complete", DEADLINE, async || {
        recorded(&bridge)
            .await
            .ok_or_else(|| "it is not".to_owned())
    })
    .await;
    bridge.workers.pop().expect("there is one").stop().await;
    put(&api, &purchases(1), false);
    // A backfill that began at about the time of a worker's start would count as made after it.
    eventually(
        "the next backfill to count as a new one",
        DEADLINE,
        async || {
            if now() > complete + 3 {
                Ok(())
            } else {
                Err(now().to_string())
            }
        },
    )
    .await;
    for _ in 0..3 {
        bridge.start_worker();
    }
    eventually("the row of the missed event", DEADLINE, async || {
        if bridge.rows().await.is_empty() {
            Err("no row".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
    for worker in &bridge.workers {
        worker.wait_until_ready().await;
    }
    assert_eq!(api.requests(EVENTS).len(), 2, "one for each start");
}

#[tokio::test]
async fn outage_of_the_database_is_no_failed_backfill() {
    let api = Api::start().await;
    let options = with_key(DatabaseKind::Postgres, &api)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "6h")
        .worker("RUST_LOG", "info,litestripe_worker=debug");
    let mut bridge = Bridge::start(options).await;
    let complete = (
        "litestripe_worker_backfills_total{outcome=\"complete\"}",
        1.0,
    );
    until_shown(&bridge.workers[0], &[complete]).await;

    bridge.database.kill().await;
    // None is due: the worker only looks.
    bridge.workers[0]
        .wait_for_log("cannot read the last backfill", DEADLINE)
        .await;
    bridge.database.resume().await;

    let worker = &bridge.workers[0];
    worker.wait_until_ready().await;
    let failed = ("litestripe_worker_backfills_total{outcome=\"failed\"}", 0.0);
    until_shown(worker, &[complete, failed]).await;
    assert_eq!(
        worker.count_in_log("a backfill failed"),
        0,
        "{}",
        worker.log()
    );
}

#[tokio::test]
async fn backfill_of_a_dead_worker_is_taken_over() {
    let (first, second) = (Api::start().await, Api::start().await);
    let missed = Purchase::new(now() - 600);
    for api in [&first, &second] {
        put(
            api,
            &[missed.subscription_event(CREATED, missed.created, json!({}))],
            false,
        );
    }
    let held = first.hold(EVENTS);
    let options =
        with_key(DatabaseKind::Sqlite, &first).worker("LITESTRIPE_BACKFILL_INTERVAL", "1h");
    let bridge = Bridge::start(options).await;
    until_asked(&first, 1).await;
    let address = format!("127.0.0.1:{}", port::free());
    let other = bridge
        .worker()
        .env("LITESTRIPE_WORKER_LISTEN", address)
        .env("STRIPE_API_BASE", second.url());
    let other = other
        .env("RUST_LOG", "info,litestripe_worker=debug")
        .start();
    other
        .wait_for_log("another worker holds the lease backfill", DEADLINE)
        .await;
    assert_eq!(second.requests(EVENTS).len(), 0, "one at a time");
    bridge.workers[0].kill().await;
    until_asked(&second, 1).await;
    drop(held);
    eventually("the row of the missed event", DEADLINE, async || {
        if bridge.rows().await.is_empty() {
            Err("no row".to_owned())
        } else {
            Ok(())
        }
    })
    .await;
}

async fn command_publishes_missing_events_and_nothing_when_repeated(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let arrived = purchases(3);
    bridge.deliver_all(&arrived).await;
    put(&api, &arrived, true);
    // More than two pages, several events per second.
    let missed = purchases(250);
    put(&api, &missed, false);
    // Before the window.
    let old = Purchase::new(now() - 80 * 3600);
    put(
        &api,
        &[old.subscription_event(CREATED, old.created, json!({}))],
        false,
    );

    let first = report(&bridge, &["--json"]).await;
    assert_eq!(first["complete"], true);
    assert_eq!(counts(&first), [253, 3, 250, 0, 0], "{first}");
    assert_eq!(bridge.stored_events().await, 253);
    assert_eq!(api.requests(EVENTS).len(), 3);
    assert_eq!(api.requests("starting_after=evt_").len(), 2);
    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 253);

    // The second run starts two hours before the first one began, which covers all events.
    let second = report(&bridge, &["--json"]).await;
    assert_eq!(counts(&second), [253, 253, 0, 0, 0], "{second}");
    assert_eq!(bridge.stored_events().await, 253);
    assert!(
        second["since"].as_str() > Some(at(now() - 3 * 3600).as_str()),
        "{second}"
    );
    let third = report(&bridge, &["--since", "1m", "--json"]).await;
    assert_eq!(counts(&third), [0, 0, 0, 0, 0], "{third}");

    let table = command(&bridge, &["--since", "100h"]).await;
    assert!(table.status.success(), "{table:?}");
    assert_eq!(bridge.stored_events().await, 254, "the old one too");
    for (what, value) in [
        ("listed", "254"),
        ("already there", "253"),
        ("published", "1"),
        ("skipped", "0"),
    ] {
        let line = table
            .stdout
            .lines()
            .find(|line| line.trim_start().starts_with(what));
        let shown = line
            .is_some_and(|line| line.replace(what, "").split_whitespace().next() == Some(value));
        assert!(shown, "{what} is not {value} in\n{}", table.stdout);
    }
}

#[tokio::test]
async fn stream_of_thousands_of_events_is_read_completely() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let other = |index: i32| {
        (
            "invoice.paid".to_owned(),
            "{}".into(),
            format!("evt_other{index}"),
        )
    };
    let mut messages: Vec<_> = (0..5000).map(other).collect();
    let there = purchases(3);
    for (event, place) in there.iter().zip([0, 2500, 5002]) {
        messages.insert(
            place,
            (
                event.event_type().to_owned(),
                event.body(),
                event.id().to_owned(),
            ),
        );
    }
    bridge.publish_all(messages).await;
    put(&api, &there, true);
    put(&api, &purchases(1), false);
    assert_eq!(counts(&report(&bridge, &["--json"]).await), [4, 3, 1, 0, 0]);
}

#[tokio::test]
async fn undelivered_only_option_lists_no_delivered_events() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let (accepted, refused) = (purchases(2), purchases(3));
    put(&api, &accepted, true);
    put(&api, &refused, false);
    let some = report(&bridge, &["--undelivered-only", "--json"]).await;
    assert_eq!(counts(&some), [3, 0, 3, 0, 0], "{some}");
    assert_eq!(
        api.requests("delivery_success=false").len(),
        1,
        "{:?}",
        api.requests(EVENTS)
    );
    // A run over undelivered events only is not recorded: the next one starts where a first one
    // does.
    let all = report(&bridge, &["--json"]).await;
    assert_eq!(counts(&all), [5, 3, 2, 0, 0], "{all}");
    assert!(
        all["since"].as_str() < Some(at(now() - 71 * 3600).as_str()),
        "{all}"
    );
}

#[tokio::test]
async fn outage_halfway_keeps_published_events_and_the_next_run_publishes_the_rest() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    put(&api, &purchases(250), false);
    api.answer_next(
        "starting_after",
        Trouble::status(500).header("Stripe-Should-Retry", "false"),
    );
    let first = command(&bridge, &["--json"]).await;
    assert_eq!(first.status.code(), Some(1), "{first:?}");
    for text in [
        "failed halfway",
        "running it again publishes the rest",
        "Stripe answered 500",
        "req_ofTheStub",
    ] {
        assert!(
            first.stderr.contains(text),
            "{text} is not in {}",
            first.stderr
        );
    }
    let half = json_of(&first);
    assert_eq!(
        (counts(&half), &half["complete"]),
        ([100, 0, 100, 0, 0], &json!(false)),
        "{half}"
    );
    assert_eq!(bridge.stored_events().await, 100);

    let whole = report(&bridge, &["--json"]).await;
    assert_eq!(
        (counts(&whole), &whole["complete"]),
        ([250, 100, 150, 0, 0], &json!(true)),
        "{whole}"
    );
    assert_eq!(bridge.stored_events().await, 250);
}

#[tokio::test]
async fn interrupt_stops_after_the_current_page() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    put(&api, &purchases(150), false);
    let held = api.hold("starting_after");
    let started = bridge.worker().args(["backfill", "--json"]).start();
    until_asked(&api, 2).await;
    started.signal(Signal::Int);
    let status = started.wait(DEADLINE).await;
    drop(held);
    assert_eq!(status.code(), Some(1), "{}", started.log());
    let half: Value = serde_json::from_str(&started.stdout()).expect("it is JSON");
    assert_eq!(
        (counts(&half), &half["complete"]),
        ([100, 0, 100, 0, 0], &json!(false)),
        "{half}"
    );
    assert!(
        started.stderr().contains("was stopped"),
        "{}",
        started.stderr()
    );
    assert_eq!(bridge.stored_events().await, 100);
}

async fn key_is_refused_if_all_rows_are_of_the_other_mode(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    put(&api, &purchases(1), false);
    // There are no rows yet, so no mode to compare with.
    assert_eq!(counts(&report(&bridge, &["--json"]).await), [1, 0, 1, 0, 0]);
    bridge.check().await;
    let live = async |arguments: &[&str]| {
        let launch = bridge
            .worker()
            .env("STRIPE_SECRET_KEY", "sk_live_ofTheOtherMode")
            .arg("backfill");
        launch.args(arguments.iter().copied()).run(DEADLINE).await
    };
    let asked = api.requests("").len();
    let refused = live(&[]).await;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
    for text in [
        "STRIPE_SECRET_KEY is a live mode key",
        "is test mode",
        "sk_test_",
        "--any-mode",
    ] {
        assert!(
            refused.stderr.contains(text),
            "{text} is not in {}",
            refused.stderr
        );
    }
    assert!(!refused.stderr.contains("ofTheOtherMode"));
    assert_eq!(api.requests("").len(), asked, "Stripe was not asked");
    // The stub refuses the key, which shows that it was asked.
    let any_mode = live(&["--any-mode"]).await;
    assert!(
        any_mode
            .stderr
            .contains("STRIPE_SECRET_KEY must be a key that exists"),
        "{any_mode:?}"
    );

    let mut event = Purchase::new(now() - 60).subscription_event(CREATED, now() - 60, json!({}));
    event.value["livemode"] = json!(true);
    event.value["data"]["object"]["livemode"] = json!(true);
    bridge.deliver(&event).await;
    bridge.check().await;
    assert!(
        live(&[]).await.stderr.contains("Stripe answered 401"),
        "rows of both modes are no mismatch"
    );
}

#[tokio::test]
async fn wrong_settings_and_arguments_are_named() {
    let api = Api::start().await;
    let mut bridge = Bridge::prepare(with_key(DatabaseKind::Sqlite, &api));
    let backfill = async |bridge: &Bridge, key: &str, arguments: &[&str]| {
        let launch = bridge
            .worker()
            .env("STRIPE_SECRET_KEY", key)
            .arg("backfill");
        launch.args(arguments.iter().copied()).run(DEADLINE).await
    };
    let check = |finished: &Finished, code: i32, texts: &[&str]| {
        assert_eq!(finished.status.code(), Some(code), "{finished:?}");
        for text in texts {
            assert!(
                finished.stderr.contains(text),
                "{text:?} is not in {}",
                finished.stderr
            );
        }
        assert_eq!(finished.stdout, "");
    };
    check(
        &backfill(&bridge, "", &[]).await,
        2,
        &["STRIPE_SECRET_KEY is missing"],
    );
    let tomorrow = at(now() + 86_400);
    check(
        &backfill(&bridge, API_KEY, &["--since", &tomorrow]).await,
        2,
        &["--since", "lies in the future"],
    );
    check(
        &backfill(&bridge, API_KEY, &["--since", "31d"]).await,
        2,
        &["--since", "Stripe keeps events for 30 days"],
    );
    check(
        &backfill(&bridge, API_KEY, &["--since", "yesterday"]).await,
        2,
        &["--since", "must be a duration"],
    );
    check(
        &backfill(&bridge, API_KEY, &[]).await,
        1,
        &["cannot reach NATS", "NATS_URL"],
    );
    bridge.broker.resume().await;
    check(
        &backfill(&bridge, API_KEY, &[]).await,
        1,
        &["there is no stream STRIPE_EVENTS"],
    );
    assert_eq!(api.requests("").len(), 0);
}

/// Returns when the last complete backfill in test mode began.
pub(crate) async fn recorded(bridge: &Bridge) -> Option<i64> {
    let record = bridge
        .database
        .query("SELECT began FROM litestripe_backfill WHERE NOT livemode")
        .await;
    let record = record.expect("the database answers");
    record
        .first()
        .map(|row| row.try_get("", "began").expect("it is a second"))
}

/// Options for workers that have a key for the stub and backfill only by command.
fn with_key(database: DatabaseKind, api: &Api) -> Options {
    Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000")
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
}

/// The first events of `count` subscriptions, three per second.
fn purchases(count: i64) -> Vec<Event> {
    let event = |index: i64| {
        let purchase = Purchase::new(now() - 600 - index / 3);
        purchase.subscription_event(CREATED, purchase.created, json!({}))
    };
    (0..count).map(event).collect()
}

fn put(api: &Api, events: &[Event], delivered: bool) {
    for event in events {
        api.put_event(event.value.clone(), delivered);
    }
}

async fn command(bridge: &Bridge, arguments: &[&str]) -> Finished {
    bridge
        .worker()
        .arg("backfill")
        .args(arguments.iter().copied())
        .run(DEADLINE)
        .await
}

async fn report(bridge: &Bridge, arguments: &[&str]) -> Value {
    let finished = command(bridge, arguments).await;
    assert!(finished.status.success(), "{finished:?}");
    json_of(&finished)
}

fn json_of(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout).unwrap_or_else(|_| panic!("it is JSON: {finished:?}"))
}

fn counts(report: &Value) -> [u64; 5] {
    [
        "listed",
        "already_there",
        "published",
        "duplicates",
        "skipped",
    ]
    .map(|name| {
        report[name]
            .as_u64()
            .unwrap_or_else(|| panic!("{name} is in {report}"))
    })
}

fn at(second: i64) -> String {
    use time::format_description::well_known::Rfc3339;
    let at = time::OffsetDateTime::from_unix_timestamp(second).expect("it is a time");
    at.format(&Rfc3339).expect("it is written")
}

async fn until_asked(api: &Api, count: usize) {
    eventually("Stripe to be asked", DEADLINE, async || {
        let requests = api.requests(EVENTS).len();
        if requests >= count {
            Ok(())
        } else {
            Err(format!("{requests} requests"))
        }
    })
    .await;
}

async fn stored(bridge: &Bridge, event: &Event) -> async_nats::jetstream::message::StreamMessage {
    let stream = bridge.stream(EVENTS_STREAM).await;
    for sequence in 1..=stream.cached_info().state.last_sequence {
        let message = stream
            .get_raw_message(sequence)
            .await
            .expect("nothing was deleted");
        if message
            .headers
            .get(header::MESSAGE_ID)
            .is_some_and(|id| id.as_str() == event.id())
        {
            return message;
        }
    }
    panic!("{} is not stored", event.id());
}
