//! What Stripe renders today: more items than a page, accounts in `context`, paused collection. The
//! API is a stub; everything else is real.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, filter_by_subscription};
use litestripe_harness::eventually;
use litestripe_harness::stripe::api::{API_KEY, Api, ITEMS_ON_FIRST_PAGE, Trouble};
use litestripe_harness::stripe::{MONTH, Purchase};
use serde_json::{Value, json};

use crate::orphans::{CREATED, DEADLINE, UPDATED, now, with};

on_both_databases!(
    items_behind_the_first_page_are_fetched,
    reconcile_compares_all_items,
    account_in_the_context_is_kept_and_asked_for,
    paused_collection_is_kept_and_signalled,
);

/// A command compares twice, some seconds apart.
const COMMAND: Duration = Duration::from_secs(120);

const ITEMS: &str = "/v1/subscription_items?";

/// Items that take two further pages.
const MANY: usize = 150;

fn with_key(database: DatabaseKind, api: &Api) -> Options {
    Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000")
}

/// `count` items, each with its own quantity.
fn many_items(purchase: &Purchase, count: usize) -> Value {
    let mut items = purchase.items(purchase.created, purchase.created + MONTH);
    let first = items["data"][0].clone();
    let all = (0..count).map(|number| {
        let mut item = first.clone();
        item["id"] = format!("si_{number}").into();
        item["quantity"] = (number + 1).into();
        item
    });
    items["data"] = all.collect();
    items
}

/// The same items as an event has them: the first page.
fn first_page(mut items: Value) -> Value {
    let data = items["data"].as_array_mut().expect("a list");
    data.truncate(ITEMS_ON_FIRST_PAGE);
    items["has_more"] = true.into();
    items
}

fn quantities(items: &Value) -> Vec<u64> {
    let items = items.as_array().expect("a list");
    items
        .iter()
        .filter_map(|item| item["quantity"].as_u64())
        .collect()
}

async fn until_all_items_are_in_the_row(bridge: &Bridge, purchase: &Purchase) {
    eventually("the row to have all items", DEADLINE, async || {
        bridge.wait_until_applied().await;
        let row = bridge.row(&purchase.subscription).await;
        let count = quantities(&row.items).len();
        if count == MANY && !row.uncertain {
            Ok(())
        } else {
            Err(format!("{count} items, uncertain: {}", row.uncertain))
        }
    })
    .await;
}

async fn items_behind_the_first_page_are_fetched(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = Purchase::new(now() - 60);
    let all = many_items(&purchase, MANY);
    api.put_subscription(with(
        purchase.subscription(),
        json!({ "items": all.clone() }),
    ));
    let created = json!({ "items": first_page(all) });
    bridge
        .deliver(&purchase.subscription_event(CREATED, purchase.created, created))
        .await;

    until_all_items_are_in_the_row(&bridge, &purchase).await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(
        quantities(&row.items),
        (1..=MANY as u64).collect::<Vec<_>>()
    );
    let pages = api.requests(ITEMS);
    assert_eq!(pages.len(), 2, "{pages:?}");
    for (page, after) in pages
        .iter()
        .zip([ITEMS_ON_FIRST_PAGE - 1, ITEMS_ON_FIRST_PAGE + 99])
    {
        let after = format!("starting_after=si_{after}");
        assert!(
            page.path.contains(&after) && page.path.contains("limit=100"),
            "{page:?}"
        );
    }
    let signals = bridge.check().await;
    let signals: Vec<_> = filter_by_subscription(&signals, &purchase.subscription)
        .into_iter()
        .map(|signal| {
            (
                quantities(&signal.body["items"]).len(),
                signal.body["uncertain"] == true,
            )
        })
        .collect();
    assert_eq!(signals, [(ITEMS_ON_FIRST_PAGE, true), (MANY, false)]);
}

#[tokio::test]
async fn items_that_change_while_they_are_fetched_are_fetched_again() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let purchase = Purchase::new(now() - 60);
    let all = many_items(&purchase, MANY);
    api.put_subscription(with(
        purchase.subscription(),
        json!({ "items": all.clone() }),
    ));
    // The item after which the next page would start is gone.
    api.answer_next(ITEMS, Trouble::status(404));
    let created = json!({ "items": first_page(all) });
    bridge
        .deliver(&purchase.subscription_event(CREATED, purchase.created, created))
        .await;
    until_all_items_are_in_the_row(&bridge, &purchase).await;
    assert_eq!(api.requests(ITEMS).len(), 3);
    bridge.check().await;
}

#[tokio::test]
async fn row_with_only_the_first_page_of_its_items_is_uncertain_without_a_key() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let purchase = Purchase::new(now() - 60);
    let items = json!({ "items": first_page(many_items(&purchase, MANY)) });
    let whole = json!({ "items": many_items(&purchase, MANY) });
    let created = purchase.subscription_event(CREATED, purchase.created, items);
    bridge.deliver(&created).await;
    bridge.wait_until_applied().await;
    assert!(bridge.row(&purchase.subscription).await.uncertain);

    let updated = purchase.subscription_event(UPDATED, purchase.created + 1, whole);
    bridge.deliver(&updated).await;
    bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!((quantities(&row.items).len(), row.uncertain), (MANY, false));
}

async fn reconcile_compares_all_items(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = Purchase::new(now() - 60);
    let event = |count| {
        let items = json!({ "items": many_items(&purchase, count) });
        purchase.subscription_event(CREATED, purchase.created, items)
    };
    // Only the last item, on the last page, differs.
    bridge.deliver(&event(MANY - 1)).await;
    bridge.wait_until_applied().await;
    let all = json!({ "items": many_items(&purchase, MANY) });
    api.put_subscription(with(purchase.subscription(), all));
    let reconcile = async |arguments: &[&'static str]| {
        let arguments = arguments.iter().copied();
        bridge
            .worker()
            .arg("reconcile")
            .args(arguments)
            .run(COMMAND)
            .await
    };

    let found = reconcile(&["--json"]).await;
    assert_eq!(found.status.code(), Some(3), "{found:?}");
    assert!(found.stdout.contains("\"items\""), "{found:?}");
    let repaired = reconcile(&["--repair"]).await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!((quantities(&row.items).len(), row.uncertain), (MANY, false));
    let equal = reconcile(&[]).await;
    assert_eq!(equal.status.code(), Some(0), "{equal:?}");
}

async fn account_in_the_context_is_kept_and_asked_for(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = Purchase::new(now() - 60);
    let all = many_items(&purchase, MANY);
    api.put_subscription(with(
        purchase.subscription(),
        json!({ "items": all.clone() }),
    ));
    api.assign(&purchase.subscription, "acct_1Connected");
    let items = json!({ "items": first_page(all) });
    let mut created = purchase.subscription_event(CREATED, purchase.created, items);
    created.value["context"] = json!("org_1/acct_1Connected");
    bridge.deliver(&created).await;

    until_all_items_are_in_the_row(&bridge, &purchase).await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.stripe_account_id.as_deref(), Some("acct_1Connected"));
    for request in api.requests(&purchase.subscription) {
        assert_eq!(request.context(), Some("acct_1Connected"), "{request:?}");
        assert!(
            !request.headers.contains_key("stripe-account"),
            "{request:?}"
        );
    }
    bridge.check().await;
}

async fn paused_collection_is_kept_and_signalled(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 60);
    let resumes = 1_900_000_000;
    let pause = json!({ "behavior": "mark_uncollectible", "resumes_at": resumes });
    let events = [
        purchase.subscription_event(CREATED, purchase.created, json!({})),
        purchase
            .subscription_event(
                UPDATED,
                purchase.created + 1,
                json!({ "pause_collection": pause }),
            )
            .with_previous_attributes(json!({ "pause_collection": null })),
        purchase
            .subscription_event(
                UPDATED,
                purchase.created + 2,
                json!({ "pause_collection": null }),
            )
            .with_previous_attributes(json!({ "pause_collection": pause })),
    ];
    let mut rows = Vec::new();
    for event in &events {
        bridge.deliver(event).await;
        bridge.wait_until_applied().await;
        rows.push(bridge.row(&purchase.subscription).await.pause_collection);
    }
    let paused = json!({ "behavior": "mark_uncollectible", "resumes_at": "2030-03-17T17:46:40Z" });
    assert_eq!(rows, [None, Some(paused.clone()), None]);
    let signals = bridge.check().await;
    let sent: Vec<_> = filter_by_subscription(&signals, &purchase.subscription)
        .into_iter()
        .skip(1)
        .map(|signal| {
            (
                signal.body["pause_collection"].clone(),
                signal.changed(),
                signal.body["access"].clone(),
            )
        })
        .collect();
    let changed = vec!["pause_collection"];
    let granted = json!("granted");
    assert_eq!(
        sent,
        [
            (paused, changed.clone(), granted.clone()),
            (json!(null), changed, granted)
        ]
    );
}
