//! The users of deploy/nats.conf: each may do all that its program does. What they may not do is
//! tried by harness/python/permissions.py, which scripts/check-deploy runs.

use std::time::Duration;

use async_nats::ConnectOptions;
use async_nats::jetstream;
use async_nats::jetstream::consumer::{PullConsumer, pull};
use futures_util::StreamExt as _;
use litestripe_contract::subject::SIGNALS_STREAM;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::stripe::{Event, Purchase};
use litestripe_harness::{eventually, nats};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::erase::customer;
use crate::orphans::{COMPLETED, CREATED, now};

const NATS_CONF: &str = include_str!("../../../deploy/nats.conf");
const USERS: [&str; 5] = ["ingress", "worker", "operator", "reader", "monitor"];
const PASSWORD: &str = "secret";
const COMMAND: Duration = Duration::from_secs(60);

#[tokio::test]
async fn shipped_users_may_do_everything_that_the_programs_do() {
    let api = Api::start().await;
    let mut options = Options::new(DatabaseKind::Sqlite)
        .ingress("LITESTRIPE_EVENT_TYPES", "customer.*,checkout.session.*")
        .worker("LITESTRIPE_ERASE_ON_CUSTOMER_DELETED", "true")
        .worker("LITESTRIPE_USER_LOOKUP", "nats:app.users.known")
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("STRIPE_API_BASE", api.url())
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000");
    for (name, value) in identity("ingress") {
        options = options.ingress(name, value);
    }
    for (name, value) in identity("worker") {
        options = options.worker(name, value);
    }
    let mut bridge = Bridge::prepare(options);
    bridge.broker = broker();
    bridge.broker.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    let purchases = [(); 3].map(|()| Purchase::new(now() - 600));
    let [known, missed, deleted] = &purchases;
    let event = missed.subscription_event(CREATED, missed.created, json!({}));
    api.put_event(event.value.clone(), false);
    for purchase in &purchases {
        api.put_subscription(purchase.subscription());
    }
    bridge.start_worker().wait_until_ready().await;
    let application = application(&bridge).await;

    let user = json!({ "client_reference_id": "user_2" });
    for (purchase, session) in [(known, json!({})), (deleted, user)] {
        let created = purchase.created;
        let paid = purchase.checkout_session_event(COMPLETED, created, session);
        let subscribed = purchase.subscription_event(CREATED, created, json!({}));
        bridge.deliver_all(&[paid, subscribed]).await;
    }
    let poison = Event::new("customer.subscription.updated", now(), json!({ "id": 5 }));
    bridge.deliver(&poison).await;
    let deletion = customer(deleted, "customer.deleted", "erased");
    bridge.deliver(&deletion).await;
    bridge.wait_until_applied().await;
    bridge.workers[0]
        .wait_for_log(&format!("erased {}", deleted.customer), COMMAND)
        .await;
    eventually("everything to have arrived", COMMAND, async || {
        let (rows, letters) = (bridge.rows().await.len(), bridge.dead_letters().await.len());
        let asked = application.is_finished();
        match (rows, letters, asked) {
            (3, 1, true) => Ok(()),
            found => Err(format!("{found:?}: {}", bridge.workers[0].log())),
        }
    })
    .await;

    let repaired: &[&str] = &["reconcile", "--repair"];
    let resolve = &known.subscription;
    let by_operator: [&[&str]; 9] = [
        &["status"],
        &[
            "orphans",
            "resolve",
            resolve,
            "--client-reference-id",
            "user_1",
        ],
        &["replay", "--since", "1h"],
        &["replay", "--type", CREATED, "--dry-run"],
        &["resend", "--all"],
        &["backfill", "--since", "1h"],
        repaired,
        &["dead-letters", "drop", "1"],
        &["erase", "--customer", &known.customer],
    ];
    // Commands also work in a worker's container.
    for (user, arguments) in by_operator
        .map(|arguments| ("operator", arguments))
        .into_iter()
        .chain([
            ("worker", by_operator[0]),
            ("worker", by_operator[2]),
            ("worker", repaired),
        ])
    {
        let finished = run(&bridge, user, arguments).await;
        assert_eq!(
            finished.status.code(),
            Some(0),
            "{user} {arguments:?}: {finished:?}"
        );
        let said = finished.stderr.to_lowercase();
        assert!(
            !said.contains("permissions"),
            "{user} {arguments:?}: {said}"
        );
    }
    let doctor = run(&bridge, "worker", &["doctor", "--json"]).await;
    let report: Value = serde_json::from_str(&doctor.stdout).expect("it is JSON");
    let checks = report["checks"].as_array().expect("it is a list");
    let rights = checks.iter().find(|line| line["check"] == "rights");
    assert_eq!(rights.expect("it is checked")["state"], "ok", "{rights:?}");
    for program in [bridge.ingress(), &bridge.workers[0]] {
        let log = program.log();
        assert!(!log.to_lowercase().contains("permissions"), "{log}");
    }
}

/// A broker with the users of deploy/nats.conf. The harness itself looks at everything.
fn broker() -> nats::Server {
    let start = NATS_CONF.find("accounts {\n").expect("it has users");
    let mut config = NATS_CONF[start..].replacen(
        "    users: [\n",
        "    users: [\n      { user: harness, password: secret }\n",
        1,
    );
    for user in USERS {
        let password = format!("$NATS_{}_PASSWORD", user.to_uppercase());
        assert!(config.contains(&password), "{password} is not there");
        config = config.replace(&password, PASSWORD);
    }
    let options = nats::Options {
        config: format!("{config}\nno_auth_user: harness\n"),
        ..nats::Options::default()
    };
    nats::Server::prepare(options).expect("a folder for nats-server can be made")
}

/// The settings of a program that is this user. Nobody may update a stream, so the size is set:
/// see docs/permissions.md.
fn identity(user: &str) -> [(&'static str, String); 4] {
    [
        ("NATS_USER", user.to_owned()),
        ("NATS_PASSWORD", PASSWORD.to_owned()),
        ("NATS_INBOX_PREFIX", format!("_INBOX_{user}")),
        ("LITESTRIPE_EVENTS_MAX_BYTES", "1GiB".to_owned()),
    ]
}

/// Runs a command of the worker as this user.
async fn run(bridge: &Bridge, user: &str, arguments: &[&str]) -> Finished {
    // A setting that is given twice is the later one.
    let launch = identity(user)
        .into_iter()
        .fold(bridge.worker(), |launch, (name, value)| {
            launch.env(name, value)
        });
    launch.args(arguments.iter().copied()).run(COMMAND).await
}

/// Starts an application, as the user `reader`: it answers one user lookup, receives a signal and
/// ends.
async fn application(bridge: &Bridge) -> JoinHandle<()> {
    let client = ConnectOptions::with_user_and_password("reader".to_owned(), PASSWORD.to_owned())
        .custom_inbox_prefix("_INBOX_reader")
        .connect(bridge.broker.url())
        .await
        .expect("a reader may connect");
    let lookups = client.subscribe("app.users.known").await;
    let mut lookups = lookups.expect("a client can subscribe");
    client.flush().await.expect("the server answers");
    let jetstream = jetstream::new(client.clone());
    let stream = jetstream.get_stream(SIGNALS_STREAM).await;
    let signals: PullConsumer = stream
        .expect("a reader sees the stream of signals")
        .create_consumer(pull::Config {
            durable_name: Some("my-app".to_owned()),
            ..pull::Config::default()
        })
        .await
        .expect("a reader can make a consumer");
    tokio::spawn(async move {
        let lookup = lookups.next().await.expect("the server does not end it");
        let reply = lookup.reply.expect("it is a request");
        let known = client.publish(reply, r#"{"known":true}"#.into()).await;
        known.expect("the server answers");
        let mut signals = signals.messages().await.expect("a reader can pull");
        let signal = signals.next().await.expect("the consumer exists");
        let signal = signal.expect("it can be read");
        signal.double_ack().await.expect("the ack is answered");
    })
}
