//! Room at the broker: every stream has a size, together they fit, and none takes that of another.

use std::time::Duration;

use async_nats::jetstream;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use litestripe_contract::settings::{EventsSettings, Given, Reader};
use litestripe_contract::stream;
use litestripe_contract::subject::{
    DEAD_LETTERS_STREAM, EVENTS_STREAM, SIGNALS_STREAM, SUBSCRIPTION_CHANGED,
};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::{eventually, nats, port};
use serde_json::{Value, json};

use crate::orphans::{CREATED, now};

const DEADLINE: Duration = Duration::from_secs(60);
const MIB: i64 = 1 << 20;
const GIB: i64 = 1 << 30;

const BUCKET_STREAM: &str = "KV_litestripe";
const EVENTS_MAX_BYTES: &str = "LITESTRIPE_EVENTS_MAX_BYTES";

#[tokio::test]
async fn signals_that_fill_their_stream_leave_events_their_room() {
    let settings = Options::new(DatabaseKind::Sqlite)
        .ingress(EVENTS_MAX_BYTES, "32MiB")
        .worker(EVENTS_MAX_BYTES, "32MiB");
    let bridge = start(settings, "max_file_store: 64MB", "").await;
    let jetstream = bridge.jetstream().await;
    assert_eq!(size(jetstream, SIGNALS_STREAM).await, 32 * MIB / 5);
    assert_eq!(size(jetstream, DEAD_LETTERS_STREAM).await, 4 * MIB);

    // More than the server has.
    let signal = "x".repeat(64 << 10);
    for _ in 0..17 {
        let sent = (0..64).map(|_| jetstream.publish(SUBSCRIPTION_CHANGED, signal.clone().into()));
        for ack in join_all(sent).await {
            // They drop the oldest, so there is always room for one more.
            ack.expect("it is sent").await.expect("it is stored");
        }
    }
    works(&bridge).await;
    let status = status(&bridge).await;
    let signals = &status["streams"][1];
    assert_eq!(signals["name"], SIGNALS_STREAM);
    assert_eq!(signals["max_bytes"], 32 * MIB / 5);
    assert!(signals["percent"].as_u64() > Some(90), "{signals}");
    assert_eq!(status["problems"], json!([]));
}

#[tokio::test]
async fn sizes_that_nobody_sets_fit_the_server_together() {
    check_fit("20GB", 10 * GIB).await;
    // The events alone would fit.
    check_fit("10GB", 10 * GIB / 4 * 3).await;
    check_fit("1GB", 640 * MIB).await;
    check_fit("256MB", 192 * MIB).await;
}

/// Checks the size of `STRIPE_EVENTS` on a server with this room, and that all streams exist.
async fn check_fit(room: &str, expected: i64) {
    let limit = format!("max_file_store: {room}");
    let settings = Options::new(DatabaseKind::Sqlite);
    let bridge = start(settings, &limit, "").await;
    let jetstream = bridge.jetstream().await;
    assert_eq!(size(jetstream, EVENTS_STREAM).await, expected, "{room}");
    assert_eq!(size(jetstream, SIGNALS_STREAM).await, expected / 5);
    assert_eq!(size(jetstream, DEAD_LETTERS_STREAM).await, expected / 10);
    works(&bridge).await;
}

#[tokio::test]
async fn sizes_that_nobody_sets_fit_a_cluster_as_well() {
    let routes = [port::free(), port::free(), port::free()];
    let all = routes.map(|port| format!("nats-route://127.0.0.1:{port}"));
    let options = routes.map(|route| nats::Options {
        config: format!(
            "cluster {{ name: litestripe-tests, listen: \"127.0.0.1:{route}\", routes: [{}] }}",
            all.join(", ")
        ),
        jetstream: "max_file_store: 1GB".to_owned(),
        ..nats::Options::default()
    });
    let mut nodes: Vec<_> = join_all(options.map(nats::Server::start_with)).await;
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    bridge.broker = nodes.pop().expect("there are three");
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    let jetstream = bridge.jetstream().await;
    assert_eq!(size(jetstream, EVENTS_STREAM).await, 640 * MIB);
    works(&bridge).await;
}

#[tokio::test]
async fn program_that_may_not_update_the_stream_works_with_it_as_it_is() {
    let rights = "authorization { users: [ { user: test, password: test, permissions: { publish: { deny: \
                  \"$JS.API.STREAM.UPDATE.>\" } } } ] }\nno_auth_user: test";
    let settings = Options::new(DatabaseKind::Sqlite);
    let bridge = start(settings, "max_file_store: 20GB", rights).await;
    let warning = "cannot find out whether the other streams fit beside STRIPE_EVENTS";
    assert_eq!(bridge.ingress().count_in_log(warning), 1);
    works(&bridge).await;
}

#[tokio::test]
async fn stream_in_use_is_left_alone_if_its_info_is_not_answered() {
    // A server with this room refuses to create a stream twice, one with more accepts it.
    check_unanswered("15GB").await;
    check_unanswered("40GB").await;
}

async fn check_unanswered(room: &str) {
    let users = "authorization { users: [ { user: test, password: test }\n { user: blind, password: test, \
                 permissions: { publish: { deny: \"$JS.API.STREAM.INFO.>\" } } } ] }\nno_auth_user: test";
    let limit = format!("max_file_store: {room}");
    let bridge = start(Options::new(DatabaseKind::Sqlite), &limit, users).await;
    works(&bridge).await;
    let watching = bridge.broker.connect().await;
    let updates = watching.subscribe("$JS.API.STREAM.UPDATE.>").await;
    let mut updates = updates.expect("the connection is open");
    watching.flush().await.expect("the broker answers");

    let blind = async_nats::ConnectOptions::with_user_and_password("blind".into(), "test".into());
    let blind = blind.connect(bridge.broker.url()).await;
    let mut blind = jetstream::new(blind.expect("the broker accepts it"));
    blind.set_timeout(Duration::from_secs(1));
    let settings = EventsSettings::read(&mut Reader::new(Given::default()));
    let provided = stream::provide_events(&blind, &settings).await;
    assert_eq!(provided.expect("it exists"), 10 * GIB, "{room}");
    let jetstream = bridge.jetstream().await;
    assert_eq!(size(jetstream, EVENTS_STREAM).await, 10 * GIB);
    let update = tokio::time::timeout(Duration::from_millis(200), updates.next()).await;
    assert!(update.is_err(), "{room}: {update:?}");
}

#[tokio::test]
async fn account_that_requires_sizes_is_served() {
    let api = Api::start().await;
    let accounts = "accounts { app { users: [ { user: app, password: app } ]\n  jetstream { max_file: 1GB, \
                    max_mem: 1MB, max_bytes_required: true } } }\nno_auth_user: app";
    let settings = Options::new(DatabaseKind::Sqlite)
        .worker("LITESTRIPE_SIGNALS_MAX_BYTES", "5MiB")
        .worker("LITESTRIPE_DEAD_LETTERS_MAX_BYTES", "6MiB")
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("STRIPE_API_BASE", api.url());
    let bridge = start(settings, "", accounts).await;
    works(&bridge).await;
    let jetstream = bridge.jetstream().await;
    assert_eq!(size(jetstream, EVENTS_STREAM).await, 640 * MIB);
    assert_eq!(size(jetstream, SIGNALS_STREAM).await, 5 * MIB);
    assert_eq!(size(jetstream, DEAD_LETTERS_STREAM).await, 6 * MIB);
    // The worker makes the bucket when it first calls Stripe.
    eventually("the bucket", DEADLINE, async || {
        match jetstream.get_stream(BUCKET_STREAM).await {
            Ok(bucket) if bucket.cached_info().config.max_bytes > 0 => Ok(()),
            outcome => Err(format!("{outcome:?}")),
        }
    })
    .await;
    let account = &status(&bridge).await["account"];
    assert_eq!(account["max_storage"], GIB);
    assert!(account["storage"].as_u64() > Some(0), "{account}");
}

#[tokio::test]
async fn stream_without_a_size_is_left_alone_and_named() {
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    bridge.broker.resume().await;
    let signals = jetstream::stream::Config {
        name: SIGNALS_STREAM.to_owned(),
        subjects: vec![SUBSCRIPTION_CHANGED.to_owned(), "orphan.*".to_owned()],
        ..jetstream::stream::Config::default()
    };
    let created = bridge.jetstream().await.create_stream(signals).await;
    created.expect("a stream can be made");
    bridge.start_worker().wait_until_ready().await;

    let mend = "nats stream edit LITESTRIPE_SIGNALS --max-bytes";
    let worker = &bridge.workers[0];
    assert_eq!(worker.count_in_log("has no limit in bytes"), 1);
    assert_eq!(worker.count_in_log(mend), 1, "{}", worker.log());
    assert_eq!(size(bridge.jetstream().await, SIGNALS_STREAM).await, -1);
    let shown = status(&bridge).await;
    assert_eq!(shown["problems"].as_array().map(Vec::len), Some(1));
    assert_eq!(shown["streams"][1]["max_bytes"], Value::Null);
    let text = bridge.worker().arg("status").run(DEADLINE).await.stdout;
    for words in [mend, "no limit", "bytes, 0 %"] {
        assert!(text.contains(words), "{words:?} is not in {text}");
    }
}

#[tokio::test]
async fn every_stream_for_which_there_is_no_room_is_named() {
    let options = nats::Options {
        jetstream: "max_file_store: 64MB".to_owned(),
        ..nats::Options::default()
    };
    let mut bridge = Bridge::prepare(
        Options::new(DatabaseKind::Sqlite)
            .ingress(EVENTS_MAX_BYTES, "64MiB")
            .worker(EVENTS_MAX_BYTES, "64MiB"),
    );
    bridge.broker = nats::Server::start_with(options).await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker();
    let worker = &bridge.workers[0];
    let line = worker
        .wait_for_log("waiting for JetStream: ", DEADLINE)
        .await;
    for setting in [
        "LITESTRIPE_SIGNALS_MAX_BYTES",
        "LITESTRIPE_DEAD_LETTERS_MAX_BYTES",
    ] {
        assert!(line.contains(setting), "{setting} is not in {line}");
    }

    // Room for one of them: the other's reason is another one.
    shrink_events(&bridge, 60 * MIB).await;
    let line = worker
        .wait_for_log("still waiting for JetStream: ", DEADLINE)
        .await;
    assert!(line.contains(DEAD_LETTERS_STREAM), "{line}");
    shrink_events(&bridge, 32 * MIB).await;
    worker.wait_until_ready().await;
    works(&bridge).await;
}

/// Starts a bridge at a broker with these lines in its `jetstream` block and at the top level.
async fn start(settings: Options, jetstream: &str, config: &str) -> Bridge {
    let options = nats::Options {
        jetstream: jetstream.to_owned(),
        config: config.to_owned(),
        ..nats::Options::default()
    };
    let mut bridge = Bridge::prepare(settings);
    bridge.broker = nats::Server::start_with(options).await;
    bridge.start_ingress().wait_until_ready().await;
    bridge.start_worker().wait_until_ready().await;
    bridge
}

/// Checks that an event is accepted and applied.
async fn works(bridge: &Bridge) {
    let purchase = Purchase::new(now());
    let event = purchase.subscription_event(CREATED, purchase.created, json!({}));
    bridge.deliver(&event).await;
    bridge.wait_until_applied().await;
    bridge.row(&purchase.subscription).await;
}

async fn size(jetstream: &jetstream::Context, name: &str) -> i64 {
    let stream = jetstream.get_stream(name).await.expect(name);
    stream.cached_info().config.max_bytes
}

async fn shrink_events(bridge: &Bridge, max_bytes: i64) {
    let jetstream = bridge.jetstream().await;
    let stream = bridge.stream(EVENTS_STREAM).await;
    let config = jetstream::stream::Config {
        max_bytes,
        ..stream.cached_info().config.clone()
    };
    jetstream
        .update_stream(config)
        .await
        .expect("an operator may");
}

async fn status(bridge: &Bridge) -> Value {
    let status = bridge.worker().args(["status", "--json"]);
    let finished = status.run(DEADLINE).await;
    assert_eq!(finished.status.code(), Some(0), "{finished:?}");
    serde_json::from_str(&finished.stdout).expect("it is JSON")
}
