//! `customer.deleted` erases the customer if `LITESTRIPE_ERASE_ON_CUSTOMER_DELETED` is on.

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{API_KEY, Api};
use serde_json::{Value, json};

use super::{ERASED, KEPT, customer, places, session, subscription};
use crate::orphans::{CREATED, DEADLINE, now, orphan, questions};

on_both_databases!(
    a_deleted_customer_is_erased_if_the_setting_is_on,
    a_deleted_customer_is_kept_by_default,
    deleted_customers_are_erased_together,
);

const SETTING: &str = "LITESTRIPE_ERASE_ON_CUSTOMER_DELETED";

async fn a_deleted_customer_is_erased_if_the_setting_is_on(database: DatabaseKind) {
    let options = Options::new(database)
        .ingress("LITESTRIPE_EVENT_TYPES", "*")
        .worker(SETTING, "true")
        .workers(2);
    let bridge = Bridge::start(options).await;
    let (user, other) = purchases(&bridge).await;
    bridge
        .deliver(&customer(&user, "customer.deleted", ERASED))
        .await;

    until_erased(&bridge, &user).await;
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
    assert_eq!(questions(&bridge).await, []);
    assert_eq!(
        bridge.row(&user.subscription).await.status.as_deref(),
        Some("active")
    );
    assert_eq!(
        orphan(&bridge, &user.subscription).await.customer_email,
        None
    );
    assert!(
        orphan(&bridge, &other.subscription)
            .await
            .customer_email
            .is_some()
    );
}

#[tokio::test]
async fn a_missed_deletion_is_backfilled_once() {
    let api = Api::start().await;
    let options = Options::new(DatabaseKind::Sqlite)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
        .worker(SETTING, "true");
    let bridge = Bridge::start(options).await;
    let (user, _) = purchases(&bridge).await;
    api.put_event(customer(&user, "customer.deleted", ERASED).value, false);
    for (published, skipped) in [(1, 0), (0, 1)] {
        let backfill = bridge
            .worker()
            .args(["backfill", "--since", "1h", "--json"])
            .run(DEADLINE)
            .await;
        let summary: Value = serde_json::from_str(&backfill.stdout).expect("it prints JSON");
        assert_eq!(
            (&summary["published"], &summary["skipped"]),
            (&json!(published), &json!(skipped)),
            "{summary}"
        );
        until_erased(&bridge, &user).await;
    }
    assert_eq!(
        orphan(&bridge, &user.subscription).await.customer_email,
        None
    );
}

async fn deleted_customers_are_erased_together(database: DatabaseKind) {
    let options = Options::new(database)
        .ingress("LITESTRIPE_EVENT_TYPES", "*")
        .worker(SETTING, "true")
        .workers(0);
    let mut bridge = Bridge::start(options).await;
    let users: Vec<_> = (0..3).map(|_| Purchase::new(now() - 60)).collect();
    for user in &users {
        bridge.deliver(&session(user, ERASED, json!({}))).await;
        bridge
            .deliver(&subscription(user, CREATED, ERASED, 0))
            .await;
    }
    for user in &users {
        bridge
            .deliver(&customer(user, "customer.deleted", ERASED))
            .await;
    }
    bridge.start_worker().wait_until_ready().await;
    for user in &users {
        until_erased(&bridge, user).await;
    }
    let worker = &bridge.workers[0];
    let together = worker.count_in_log("erased the data of 3 customers");
    assert_eq!(together, 1, "{}", worker.log());
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
}

/// Waits until a worker logs that it erased the customer. Reads no stream meanwhile: a reader would
/// wait for messages that are removed while it reads.
async fn until_erased(bridge: &Bridge, user: &Purchase) {
    let text = format!("erased {}", user.customer);
    eventually("the customer to be erased", DEADLINE, async || {
        let count: usize = bridge
            .workers
            .iter()
            .map(|worker| worker.count_in_log(&text))
            .sum();
        let questions = questions(bridge).await;
        if (count, questions.len()) == (1, 0) {
            Ok(())
        } else {
            Err(format!("logged {count} times; {questions:?}"))
        }
    })
    .await;
}

async fn a_deleted_customer_is_kept_by_default(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database).ingress("LITESTRIPE_EVENT_TYPES", "*")).await;
    let (user, _) = purchases(&bridge).await;
    let before = places(&bridge, ERASED).await.len();
    bridge
        .deliver(&customer(&user, "customer.deleted", ERASED))
        .await;
    bridge.wait_until_applied().await;
    assert_eq!(questions(&bridge).await, []);
    assert_eq!(places(&bridge, ERASED).await.len(), before + 1);
    assert_eq!(
        orphan(&bridge, &user.subscription).await.customer_email,
        Some(format!("{ERASED}@example.com"))
    );
}

/// A customer to erase and one to keep, both with an orphan.
async fn purchases(bridge: &Bridge) -> (Purchase, Purchase) {
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    for (purchase, whom) in [(&user, ERASED), (&other, KEPT)] {
        bridge.deliver(&session(purchase, whom, json!({}))).await;
        bridge
            .deliver(&subscription(purchase, CREATED, whom, 0))
            .await;
    }
    bridge.check().await;
    (user, other)
}
