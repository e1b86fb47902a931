//! Faults at Stripe, or of the key.

use litestripe_contract::event::HANDLED_TYPES;
use litestripe_harness::bridge::{DatabaseKind, HOOK};
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::Trouble;
use serde_json::{Value, json};

use super::{DEADLINE, ENDPOINT, Healthy, endpoint, examine, hook};
use crate::orphans::{CREATED, now};

#[tokio::test]
async fn key_that_stripe_refuses_is_named() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    healthy.api.refuse("/", Trouble::status(401));
    healthy
        .check("Stripe's API", &["STRIPE_SECRET_KEY", "401"])
        .await;
}

#[tokio::test]
async fn each_permission_that_the_key_lacks_is_named() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    healthy.api.refuse(
        "/v1/checkout/sessions",
        Trouble::forbidden("rak_checkout_session_read"),
    );
    let report = healthy.examine().await;
    report.check(
        "key's permissions",
        &["may not read Checkout Sessions", "STRIPE_SECRET_KEY"],
    );
    assert!(
        !report.finished.stdout.contains("acct_"),
        "the answer's text is not shown"
    );
    healthy
        .api
        .refuse("/v1/customers", Trouble::forbidden("rak_customer_read"));
    healthy
        .check("key's permissions", &["Checkout Sessions, Customers"])
        .await;

    healthy.api.refuse_nothing();
    healthy.api.refuse(
        "/v1/webhook_endpoints",
        Trouble::forbidden("rak_webhook_read"),
    );
    let report = healthy.examine().await;
    report.check_unknown("webhook endpoint", "Webhook Endpoints");
}

#[tokio::test]
async fn key_of_the_other_mode_than_the_rows_is_named() {
    let mut healthy = Healthy::start(DatabaseKind::Sqlite).await;
    healthy.bridge.start_ingress().wait_until_ready().await;
    let bought = Purchase::new(now() - 60);
    let created = bought.subscription_event(CREATED, bought.created, json!({}));
    healthy.bridge.deliver(&created).await;
    healthy.bridge.wait_until_applied().await;
    let made_live = "UPDATE stripe_subscription SET livemode = true";
    healthy
        .bridge
        .database
        .execute(made_live)
        .await
        .expect("it can be written");
    healthy
        .check(
            "key's mode",
            &["test mode key", "every row", "sk_live_", "DATABASE_URL"],
        )
        .await;
}

#[tokio::test]
async fn api_that_gives_no_usable_answer_is_named() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    healthy.api.refuse("/v1/events", Trouble::status(500));
    healthy.check("Stripe's API", &["500", "status page"]).await;
    healthy.api.refuse_nothing();
    let held = healthy.api.hold("/v1/customers");
    healthy
        .check("Stripe's API", &["cannot reach", "STRIPE_API_BASE"])
        .await;
    drop(held);
    healthy.examine().await.check_healthy();
    let closed = format!("http://127.0.0.1:{}", litestripe_harness::port::free());
    let report = examine(healthy.doctor().env("STRIPE_API_BASE", closed)).await;
    report.check("Stripe's API", &["cannot reach", "STRIPE_API_BASE"]);
}

#[tokio::test]
async fn answer_that_is_not_stripes_or_of_no_use_is_named() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    // It answers 404 to all but its own pages, as any web server does.
    let other = healthy.doctor().env("STRIPE_API_BASE", &healthy.monitoring);
    let said = ["another server", "STRIPE_API_BASE"];
    examine(other).await.check("Stripe's API", &said);
    healthy.api.refuse("/v1/events", Trouble::status(400));
    let said = ["no usable answer", "400", "STRIPE_API_BASE"];
    healthy.check("Stripe's API", &said).await;
    healthy.api.refuse("/v1/events", Trouble::status(429));
    let said = ["Stripe limits the calls", "429", "try again"];
    healthy.check("Stripe's API", &said).await;
}

#[tokio::test]
async fn stripes_clock_is_compared() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    healthy.api.stop_clock(now() - 600);
    healthy
        .check("clocks", &["Stripe's clock is 6", "behind"])
        .await;
    healthy.api.resume_clock();
    healthy.examine().await.check_healthy();
}

#[tokio::test]
async fn endpoint_that_gets_nothing_or_not_all_is_named() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let put = |changes: Value| healthy.api.put_endpoint(ENDPOINT, &changes);
    let ours = endpoint(&hook(HOOK), &HANDLED_TYPES);
    let other = hook("00000000-0000-4000-8000-000000000000");
    for (changes, said) in [
        (
            json!({ "url": "https://litestripe.example.com/stripe" }),
            "no test mode endpoint",
        ),
        (json!({ "url": other }), "another UUID"),
        (
            json!({ "enabled_events": HANDLED_TYPES[1..] }),
            "customer.subscription.created",
        ),
        (json!({ "status": "disabled" }), "is disabled"),
    ] {
        put(ours.clone());
        put(changes);
        healthy
            .check("webhook endpoint", &[said, "endpoint create"])
            .await;
    }

    // A thin destination takes the place of the disabled snapshot endpoint.
    let thin = HANDLED_TYPES.map(|name| format!("v1.{name}"));
    let destination = json!({
        "object": "v2.core.event_destination",
        "created": "2026-11-01T00:00:00.000Z",
        "enabled_events": thin,
        "event_payload": "thin",
        "events_from": ["@self"],
        "livemode": false,
        "metadata": {},
        "status": "enabled",
        "type": "webhook_endpoint",
        "webhook_endpoint": { "url": hook(HOOK) },
    });
    healthy.api.put_endpoint("ed_test_byHand", &destination);
    healthy.examine().await.check_healthy();
    let few = json!({ "enabled_events": thin[1..] });
    healthy.api.put_endpoint("ed_test_byHand", &few);
    let said = ["customer.subscription.created", "thin", "v1. in front"];
    healthy.check("webhook endpoint", &said).await;
}

/// What `endpoint` makes is all that `doctor` wants, and its differences are those that `endpoint
/// check` finds.
#[tokio::test]
async fn endpoint_that_litestripe_made_is_judged_as_by_endpoint_check() {
    let healthy = Healthy::start(DatabaseKind::Sqlite).await;
    let by_hand = json!({ "status": "disabled" });
    healthy.api.put_endpoint(ENDPOINT, &by_hand);
    let folder = tempfile::tempdir().expect("a folder can be made");
    let create = async || {
        let create = ["endpoint", "create", "--url", &hook(HOOK), "--secret-file"];
        let create = healthy.bridge.worker().args(create);
        let created = create.arg(folder.path().join("secret")).run(DEADLINE).await;
        assert!(created.status.success(), "{created:?}");
    };
    create().await;
    healthy.examine().await.check_healthy();

    let endpoints = healthy.api.endpoints();
    let made = &endpoints.last().expect("one was created").id;
    for (changes, said) in [
        (json!({ "status": "disabled" }), "disabled"),
        (
            json!({ "enabled_events": ["invoice.paid"] }),
            "invoice.paid",
        ),
    ] {
        healthy.api.put_endpoint(made, &changes);
        let url = "--url https://litestripe.example.com/ls/hook/<STRIPE_WEBHOOK_UUID>/";
        let said = [made, said, "litestripe-worker endpoint create", url];
        healthy.check("webhook endpoint", &said).await;
        create().await;
        healthy.examine().await.check_healthy();
    }
    healthy
        .api
        .put_endpoint(ENDPOINT, &json!({ "status": "enabled" }));
    let said = ["litestripe-worker endpoint disable", ENDPOINT];
    healthy.check("webhook endpoint", &said).await;
}
