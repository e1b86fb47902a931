//! The permissions that docs/permissions.md gives each program: enough for all they do, and no
//! more.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::nats;
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::json;

use crate::orphans::{COMPLETED, CREATED, now};

const PERMISSIONS: &str = include_str!("../../../docs/permissions.md");
const COMMAND: Duration = Duration::from_secs(60);

#[tokio::test]
async fn documented_permissions_suffice_for_everything() {
    let start = PERMISSIONS
        .find("authorization {\n")
        .expect("the page has the block");
    let block = PERMISSIONS[start..].split("```").next().expect("it ends");
    let mut block = block.to_owned();
    for user in ["INGRESS", "WORKER", "OPERATOR", "APP"] {
        block = block.replace(&format!("${user}_PASSWORD"), "secret");
    }
    // The harness itself looks at everything.
    let block = block.replace(
        "  users: [",
        "  users: [\n    { user: harness, password: secret }",
    );
    let config = format!("{block}\nno_auth_user: harness\n");

    let api = Api::start().await;
    let options = Options::new(DatabaseKind::Sqlite)
        .ingress("NATS_USER", "ingress")
        .ingress("NATS_PASSWORD", "secret")
        .ingress("LITESTRIPE_EVENTS_MAX_BYTES", "1GiB")
        .worker("LITESTRIPE_EVENTS_MAX_BYTES", "1GiB")
        .worker("NATS_USER", "worker")
        .worker("NATS_PASSWORD", "secret")
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("STRIPE_API_BASE", api.url())
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000");
    let mut bridge = Bridge::prepare(options);
    let broker = nats::Options {
        config,
        ..nats::Options::default()
    };
    bridge.broker = nats::Server::prepare(broker).expect("a folder for nats-server can be made");
    bridge.broker.resume().await;
    bridge.start_ingress().wait_until_ready().await;
    let (known, missed) = (Purchase::new(now() - 600), Purchase::new(now() - 600));
    let event = missed.subscription_event(CREATED, missed.created, json!({}));
    api.put_event(event.value.clone(), false);
    for purchase in [&known, &missed] {
        api.put_subscription(purchase.subscription());
    }
    bridge.start_worker().wait_until_ready().await;

    bridge
        .deliver(&known.subscription_event(CREATED, known.created, json!({})))
        .await;
    bridge
        .deliver(&known.checkout_session_event(COMPLETED, known.created, json!({})))
        .await;
    let poison = Event::new("customer.subscription.updated", now(), json!({ "id": 5 }));
    bridge.deliver(&poison).await;
    bridge.wait_until_applied().await;
    litestripe_harness::eventually(
        "the missed event and the dead letter",
        COMMAND,
        async || {
            let (rows, letters) = (bridge.rows().await.len(), bridge.dead_letters().await.len());
            if (rows, letters) == (2, 1) {
                Ok(())
            } else {
                Err(format!("{rows} rows, {letters} dead letters"))
            }
        },
    )
    .await;

    let operator = async |arguments: &[&str]| {
        // A setting that is given twice is the later one.
        bridge
            .worker()
            .env("NATS_USER", "operator")
            .args(arguments)
            .run(COMMAND)
            .await
    };
    let by_operator: [(&[&str], i32); 9] = [
        (&["status"], 0),
        (
            &[
                "orphans",
                "resolve",
                &known.subscription,
                "--client-reference-id",
                "user_1",
            ],
            0,
        ),
        (&["replay", "--since", "1h"], 0),
        (&["replay", "--type", CREATED, "--dry-run"], 0),
        (&["resend", "--all"], 0),
        (&["backfill", "--since", "1h"], 0),
        (&["reconcile", "--repair"], 0),
        (&["dead-letters", "drop", "1"], 0),
        (&["erase", "--customer", &known.customer], 0),
    ];
    for (arguments, code) in by_operator {
        let finished = operator(arguments).await;
        assert_eq!(
            finished.status.code(),
            Some(code),
            "{arguments:?}: {} {}",
            finished.stdout,
            finished.stderr
        );
        assert!(
            !finished.stderr.contains("ermissions"),
            "{arguments:?}: {}",
            finished.stderr
        );
    }
    for program in [bridge.ingress(), &bridge.workers[0]] {
        assert!(
            !program.log().to_lowercase().contains("permissions"),
            "{}",
            program.log()
        );
    }
    // And no more: not even an operator deletes a stream.
    let client = async_nats::ConnectOptions::with_user_and_password(
        "operator".to_owned(),
        "secret".to_owned(),
    )
    .connect(bridge.broker.url())
    .await
    .expect("the operator may connect");
    let jetstream = async_nats::jetstream::new(client);
    assert!(jetstream.delete_stream("LITESTRIPE_SIGNALS").await.is_err());
    assert!(
        bridge
            .jetstream()
            .await
            .get_stream("LITESTRIPE_SIGNALS")
            .await
            .is_ok()
    );
}
