//! Deliveries by localstripe, a fake Stripe that signs and sends its own webhooks.
//!
//! It renders API version 2017-08-15: plans instead of prices, the period on the subscription.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, SECRET, filter_by_subscription};
use litestripe_harness::{eventually, port, stripe};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::sdk::{lines, python};

const DEADLINE: Duration = Duration::from_secs(60);

#[tokio::test]
async fn subscriptions_created_and_canceled_through_stripes_sdk_lead_to_rows_and_signals() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let port = port::free();
    let api = format!("http://127.0.0.1:{port}");
    let localstripe = python("localstripe_server.py")
        .arg(port.to_string())
        .start();
    eventually("localstripe to answer", DEADLINE, async || {
        assert!(localstripe.is_running(), "{}", localstripe.log());
        let answer = stripe::client().get(format!("{api}/v1/plans")).send().await;
        answer.map_err(|error| error.to_string())
    })
    .await;

    let story = python("localstripe_story.py").args([&api, &bridge.hook(), SECRET]);
    let [made] = lines(&story)
        .await
        .try_into()
        .expect("it prints one object");

    let (canceled, kept) = (text(&made["canceled"]["id"]), text(&made["kept"]["id"]));
    // localstripe sends its webhooks a second after the call.
    eventually("both rows, one of them canceled", DEADLINE, async || {
        let rows = bridge.rows().await;
        let status = |id: &str| {
            rows.iter()
                .find(|row| row.stripe_subscription_id == id)?
                .status
                .as_deref()
        };
        match (status(canceled), status(kept)) {
            (Some("canceled"), Some("active")) => Ok(()),
            other => Err(format!("{other:?}\n{}", localstripe.log())),
        }
    })
    .await;

    let signals = bridge.check().await;
    let access = |id: &str| {
        filter_by_subscription(&signals, id)
            .last()
            .map(|signal| signal.body["access"].clone())
    };
    assert_eq!(
        (access(canceled), access(kept)),
        (Some(json!("revoked")), Some(json!("granted")))
    );
    for id in ["canceled", "kept"] {
        let object = &made[id];
        let row = bridge.row(text(&object["id"])).await;
        assert_eq!(
            row.stripe_customer_id.as_deref(),
            object["customer"].as_str()
        );
        assert_eq!(row.subscription_metadata, json!({ "workspace": "acme" }));
        let plan = &object["items"]["data"][0]["plan"];
        let item = json!({ "price": plan["id"], "product": plan["product"], "quantity": 3, "lookup_key": null });
        assert_eq!(row.items, json!([item]));
        for (column, field) in [
            (row.created, "created"),
            (row.current_period_start, "current_period_start"),
            (row.current_period_end, "current_period_end"),
            (row.ended_at, "ended_at"),
        ] {
            assert_eq!(
                column.map(OffsetDateTime::unix_timestamp),
                object[field].as_i64(),
                "{field}"
            );
        }
    }
    assert_eq!(bridge.dead_letters().await.len(), 0);

    // The rows from its webhooks equal the objects in its API, and an import from its API equals
    // those rows.
    let reconcile = bridge
        .worker()
        .env("STRIPE_API_BASE", &api)
        .env("STRIPE_SECRET_KEY", "sk_test_localstripe");
    let reconcile = reconcile.env("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "60000");
    let compared = reconcile.clone().arg("reconcile").run(DEADLINE).await;
    assert_eq!(compared.status.code(), Some(0), "{compared:?}");
    assert!(
        compared.stdout.contains("2 subscriptions compared"),
        "{compared:?}"
    );
    let rows = bridge.rows().await;
    bridge
        .database
        .query("DELETE FROM stripe_subscription")
        .await
        .expect("the rows can be deleted");
    let imported = reconcile
        .args(["reconcile", "--repair"])
        .run(DEADLINE)
        .await;
    assert_eq!(imported.status.code(), Some(0), "{imported:?}");
    for row in rows {
        let imported = bridge.row(&row.stripe_subscription_id).await;
        assert_eq!((imported.status, imported.items), (row.status, row.items));
        assert_eq!(
            (imported.current_period_end, imported.ended_at),
            (row.current_period_end, row.ended_at)
        );
        assert_eq!(imported.subscription_metadata, row.subscription_metadata);
    }
}

fn text(value: &Value) -> &str {
    value.as_str().expect("Stripe's objects have ids")
}
