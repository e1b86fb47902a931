//! Faults of the broker: its streams, its room, its disk, and the user's rights.

use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, Republish, StorageType};
use litestripe_contract::subject::{EVENTS_STREAM, SIGNALS_STREAM, WORKER_CONSUMER};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::{nats, port};

use super::{Healthy, PASSWORD, examine};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

#[tokio::test]
async fn broker_that_is_away_or_refuses_the_user_is_named() {
    let mut healthy = Healthy::start_with(DatabaseKind::Sqlite, |plan| {
        plan.broker.config += &users("");
        plan.options = as_worker(plan.options.clone());
    })
    .await;
    healthy.examine().await.check_healthy();
    let wrong = healthy.doctor().env("NATS_PASSWORD", "wrong");
    examine(wrong)
        .await
        .check("broker", &["authorization violation", "credentials"]);
    let missing = healthy
        .doctor()
        .env("NATS_USER", "")
        .env("NATS_PASSWORD", "");
    examine(missing.env("NATS_CREDS", "/nowhere"))
        .await
        .check("broker", &["/nowhere", "NATS_CREDS"]);
    healthy.bridge.broker.kill().await;
    healthy
        .check("broker", &["cannot reach NATS", "NATS_URL"])
        .await;
}

#[tokio::test]
async fn account_without_jetstream_is_named() {
    let mut healthy = Healthy::prepare(DatabaseKind::Sqlite, |plan| {
        plan.broker.jetstream = "enabled: false".to_owned();
    })
    .await;
    healthy.bridge.broker.resume().await;
    healthy
        .check(
            "JetStream",
            &["JetStream cannot be used", "enable JetStream"],
        )
        .await;
}

/// Users of the broker: the harness's own, who may do everything, and the worker's, with
/// `permissions` behind its password.
fn users(permissions: &str) -> String {
    format!(
        "\nauthorization {{ users: [ {{ user: harness, password: harness }}\n \
         {{ user: worker, password: {PASSWORD}{permissions} }} ] }}\nno_auth_user: harness\n"
    )
}

fn as_worker(options: litestripe_harness::bridge::Options) -> litestripe_harness::bridge::Options {
    options
        .worker("NATS_USER", "worker")
        .worker("NATS_PASSWORD", PASSWORD)
}

#[tokio::test]
async fn each_right_that_the_user_lacks_is_named() {
    let mut healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let lookup = "nats:app.user.known";
    healthy.bridge.set_worker("LITESTRIPE_USER_LOOKUP", lookup);
    healthy.bridge.set_worker("NATS_USER", "worker");
    healthy.bridge.set_worker("NATS_PASSWORD", PASSWORD);
    let plain = std::fs::read_to_string(healthy.bridge.broker.folder().join("nats.conf"));
    let plain = plain.expect("the server has it");
    let examine_without = async |healthy: &mut Healthy, subject: &str| {
        let denied = format!(", permissions: {{ publish: {{ deny: \"{subject}\" }} }}");
        let config = plain.clone() + &users(&denied);
        healthy.bridge.broker.reconfigure(|_| config);
        healthy.bridge.broker.restart().await;
        healthy.examine().await
    };
    for subject in [
        "stripe.dead.>",
        "orphan.resolved",
        "app.user.known",
        "$JS.API.DIRECT.GET.KV_litestripe.$KV.litestripe.>",
        "$JS.API.STREAM.PURGE.STRIPE_EVENTS",
        "$JS.API.CONSUMER.MSG.NEXT.STRIPE_EVENTS.litestripe-worker",
        "$KV.litestripe.>",
        "$JS.API.STREAM.INFO.STRIPE_EVENTS",
        "$JS.API.INFO",
    ] {
        let report = examine_without(&mut healthy, subject).await;
        report.check("rights", &[subject, "docs/permissions.md"]);
    }
    healthy.bridge.set_worker("LITESTRIPE_USER_LOOKUP", "none");
    // A stream that exists is not created.
    let report = examine_without(&mut healthy, "$JS.API.STREAM.CREATE.>").await;
    report.check_healthy();
    let report = examine_without(&mut healthy, "$SYS.REQ.USER.INFO").await;
    report.check_unknown("rights", "allow it to publish to $SYS.REQ.USER.INFO");
}

#[tokio::test]
async fn inbox_that_the_user_may_not_read_is_named() {
    let healthy = Healthy::start_with(DatabaseKind::Sqlite, |plan| {
        plan.broker.config += &users(", permissions: { subscribe: \"_INBOX_worker.>\" }");
        plan.options = as_worker(plan.options.clone()).worker("NATS_INBOX_PREFIX", "_INBOX_worker");
    })
    .await;
    healthy.examine().await.check_healthy();
    let wrong = healthy.doctor().env("NATS_INBOX_PREFIX", "_INBOX");
    examine(wrong)
        .await
        .check("rights", &["Subscription to", "set NATS_INBOX_PREFIX"]);
}

#[tokio::test]
async fn right_to_create_is_needed_for_a_stream_that_does_not_exist() {
    let mut healthy = Healthy::prepare(DatabaseKind::Sqlite, |plan| {
        plan.broker.config +=
            &users(", permissions: { publish: { deny: \"$JS.API.STREAM.CREATE.*\" } }");
        plan.options = as_worker(plan.options.clone());
    })
    .await;
    healthy.bridge.broker.resume().await;
    healthy
        .check(
            "rights",
            &[
                "$JS.API.STREAM.CREATE.STRIPE_EVENTS",
                "CREATE.KV_litestripe",
            ],
        )
        .await;
}

#[tokio::test]
async fn disk_that_is_not_synced_for_each_message_is_named() {
    let healthy = Healthy::start_with(DatabaseKind::Sqlite, |plan| {
        plan.broker.jetstream = String::new();
    })
    .await;
    healthy
        .check("sync_interval", &["every 120 s", "sync_interval: always"])
        .await;

    // Without an address it is not known.
    let unnamed = healthy.bridge.worker().args(["doctor", "--json"]);
    examine(unnamed).await.check_healthy();
    let check = async |url: &str, said: &str| {
        let doctor = healthy
            .bridge
            .worker()
            .args(["doctor", "--json", "--nats-monitoring", url]);
        examine(doctor)
            .await
            .check("sync_interval", &[said, "--nats-monitoring"]);
    };
    check(
        &format!("http://127.0.0.1:{}", port::free()),
        "cannot be read",
    )
    .await;
    let port = port::free();
    let other = nats::Options {
        config: format!("http: \"127.0.0.1:{port}\""),
        ..nats::Options::default()
    };
    let _other = nats::Server::start_with(other).await;
    check(&format!("http://127.0.0.1:{port}"), "another server").await;
}

#[tokio::test]
async fn stream_that_is_not_as_the_settings_say_is_named() {
    let mut healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let check = async |name: &str, change: fn(&mut Config), said: &[&str]| {
        let jetstream = healthy.bridge.jetstream().await;
        let stream = healthy.bridge.stream(name).await;
        let before = stream.cached_info().config.clone();
        let mut config = before.clone();
        change(&mut config);
        jetstream
            .update_stream(config)
            .await
            .expect("it can be changed");
        healthy.check("streams", said).await;
        jetstream
            .update_stream(before)
            .await
            .expect("it can be changed back");
    };
    check(
        EVENTS_STREAM,
        |config| config.max_age = 7 * DAY,
        &[
            "7d",
            "LITESTRIPE_EVENTS_MAX_AGE says 35d",
            "nats stream edit STRIPE_EVENTS --max-age=35d",
        ],
    )
    .await;
    check(
        EVENTS_STREAM,
        |config| config.max_bytes = 1 << 29,
        &["536870912", "LITESTRIPE_EVENTS_MAX_BYTES says 1073741824"],
    )
    .await;
    check(
        EVENTS_STREAM,
        |config| config.discard = DiscardPolicy::Old,
        &["--discard=new"],
    )
    .await;
    check(
        EVENTS_STREAM,
        |config| config.max_message_size = 1000,
        &[
            "max_msg_size",
            "nats stream edit STRIPE_EVENTS --max-msg-size=-1",
        ],
    )
    .await;
    check(
        EVENTS_STREAM,
        |config| {
            config.republish = Some(Republish {
                source: ">".to_owned(),
                destination: "copy.>".to_owned(),
                headers_only: false,
            });
        },
        &[
            "personal data",
            "nats stream edit STRIPE_EVENTS --no-republish",
        ],
    )
    .await;
    check(
        SIGNALS_STREAM,
        |config| config.max_age = Duration::ZERO,
        &["keeps messages for ever", "7d"],
    )
    .await;
    check(
        SIGNALS_STREAM,
        |config| config.max_bytes = -1,
        &["no limit in bytes", "--max-bytes=SIZE"],
    )
    .await;
    check(
        "KV_litestripe",
        |config| config.max_age = DAY,
        &["KV_litestripe", "--max-age=0"],
    )
    .await;
    healthy.examine().await.check_healthy();

    healthy.bridge.workers.remove(0).stop().await;
    let events = healthy.bridge.stream(EVENTS_STREAM).await;
    events
        .delete_consumer(WORKER_CONSUMER)
        .await
        .expect("it exists");
    let gives_up = async_nats::jetstream::consumer::pull::Config {
        durable_name: Some(WORKER_CONSUMER.to_owned()),
        max_deliver: 3,
        ..Default::default()
    };
    events
        .create_consumer(gives_up)
        .await
        .expect("it can be made");
    healthy
        .check(
            "streams",
            &["max_deliver", "nats consumer rm STRIPE_EVENTS"],
        )
        .await;
}

#[tokio::test]
async fn replicas_and_memory_are_named() {
    let mut healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let report = examine(healthy.doctor().env("LITESTRIPE_STREAM_REPLICAS", "3")).await;
    let said: &[&str] = &["has 1 replicas", "LITESTRIPE_STREAM_REPLICAS says 3"];
    report.check_all(&[("streams", said); 4]);

    healthy.bridge.workers.remove(0).stop().await;
    let jetstream = healthy.bridge.jetstream().await;
    let stream = healthy.bridge.stream(EVENTS_STREAM).await;
    let memory = Config {
        storage: StorageType::Memory,
        ..stream.cached_info().config.clone()
    };
    jetstream
        .delete_stream(EVENTS_STREAM)
        .await
        .expect("it exists");
    jetstream
        .create_stream(memory)
        .await
        .expect("it can be made");
    healthy
        .check("streams", &["kept in memory", "new STRIPE_EVENTS"])
        .await;
}

#[tokio::test]
async fn stream_that_is_almost_full_and_account_without_room_are_named() {
    let mut healthy = Healthy::start_with(DatabaseKind::Sqlite, |plan| {
        plan.options = plan
            .options
            .clone()
            .worker("LITESTRIPE_EVENTS_MAX_BYTES", "64KiB");
    })
    .await;
    healthy.bridge.workers.remove(0).stop().await;
    for id in ["1", "2", "3", "4"] {
        let body = vec![b'x'; 15_000];
        healthy.bridge.publish("invoice.paid", body, id).await;
    }
    healthy
        .check("room", &["STRIPE_EVENTS is 9", "litestripe-worker status"])
        .await;

    let mut small = Healthy::prepare(DatabaseKind::Sqlite, |plan| {
        plan.broker.config += "\naccounts: { A: { jetstream: { max_file: 500000000 }, users: [ { user: a, password: a } ] } }\n\
                               no_auth_user: a\n";
    })
    .await;
    small.bridge.broker.resume().await;
    small
        .check("room", &["500000000 bytes", "1073741824", "max_file"])
        .await;
}

/// The stream of events may have taken all that the server has.
#[tokio::test]
async fn room_for_streams_that_are_missing_is_not_known_without_a_limit() {
    let mut healthy = Healthy::prepare(DatabaseKind::Sqlite, |_| {}).await;
    healthy.bridge.broker.resume().await;
    healthy.bridge.start_ingress().wait_until_ready().await;
    let report = examine(healthy.doctor().env("LITESTRIPE_EVENTS_MAX_BYTES", "")).await;
    report.check_unknown("room", "nats stream edit STRIPE_EVENTS --max-bytes");
}
