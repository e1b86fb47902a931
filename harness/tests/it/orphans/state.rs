//! The rule by which a subscription without a paid session becomes an orphan: by its row's state,
//! whatever events led to it.

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::stripe::{MONTH, Purchase};
use serde_json::json;

use super::{
    COMPLETED, CREATED, DEADLINE, EMAIL, SUCCEEDED, UPDATED, apply, count_signals, make_due, now,
    orphan, questions, until, until_all_questions_are_answered, until_retried, with,
};

on_both_databases!(
    unpaid_session_without_a_reference_claims_nothing,
    unpaid_session_that_stripe_lists_claims_nothing,
    subscription_whose_creation_event_never_came_becomes_an_orphan,
    row_that_reconcile_imported_becomes_an_orphan_unless_it_had_ended,
    no_question_is_stored_if_orphans_without_session_are_switched_off,
    row_of_the_previous_version_is_asked_about_with_its_next_event,
    question_that_is_due_too_early_makes_no_orphan,
    subscription_older_than_the_stream_is_an_orphan_only_if_stripe_was_asked,
);

const DELETED: &str = "customer.subscription.deleted";

async fn unpaid_session_without_a_reference_claims_nothing(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1s")).await;
    let purchases = [Purchase::new(now() - 60), Purchase::new(now() - 60)];
    for (purchase, backwards) in purchases.iter().zip([false, true]) {
        let unpaid = json!({ "payment_status": "unpaid" });
        let mut events = [
            purchase.subscription_event(CREATED, purchase.created, json!({})),
            purchase.checkout_session_event(COMPLETED, purchase.created, unpaid),
        ];
        if backwards {
            events.reverse();
        }
        for event in &events {
            apply(&bridge, event).await;
        }
    }
    until_all_questions_are_answered(&bridge).await;
    for purchase in &purchases {
        let found = orphan(&bridge, &purchase.subscription).await;
        assert_eq!(found.reason, "no_checkout_session");
        assert_eq!(found.resolved_at, None);
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(
            row.checkout_session_id.as_ref(),
            Some(&purchase.checkout_session)
        );
    }

    // Once the session is paid it says more, and once it names a user it resolves the orphan.
    let [unnamed, named] = &purchases;
    let paid = unnamed.checkout_session_event(SUCCEEDED, now(), json!({}));
    apply(&bridge, &paid).await;
    let found = orphan(&bridge, &unnamed.subscription).await;
    assert_eq!(found.reason, "missing_client_reference_id");
    assert_eq!(found.customer_email.as_deref(), Some(EMAIL));
    let user = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &named.checkout_session_event(SUCCEEDED, now(), user),
    )
    .await;
    let signals = bridge.check().await;
    let found = orphan(&bridge, &named.subscription).await;
    assert_eq!(
        found.resolved_client_reference_id.as_deref(),
        Some("user_1")
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (2, 1)
    );
}

async fn unpaid_session_that_stripe_lists_claims_nothing(database: DatabaseKind) {
    let api = Api::start().await;
    let options = with_key(database, &api).worker("LITESTRIPE_ORPHAN_GRACE", "0s");
    let bridge = Bridge::start(options).await;
    let purchase = Purchase::new(now() - 60);
    let unpaid = json!({ "payment_status": "unpaid" });
    api.put_checkout_session(with(purchase.checkout_session(), unpaid));
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    until_all_questions_are_answered(&bridge).await;

    let found = orphan(&bridge, &purchase.subscription).await;
    assert_eq!(found.reason, "no_checkout_session");
    let asked = api.requests(&format!("subscription={}", purchase.subscription));
    assert_eq!(asked.len(), 1, "asked once");
    assert_eq!(bridge.stored_events().await, 1, "it is not stored");
}

async fn subscription_whose_creation_event_never_came_becomes_an_orphan(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1s")).await;
    let (unclaimed, claimed, ended) = (
        Purchase::new(now() - 60),
        Purchase::new(now() - 60),
        Purchase::new(now() - 60),
    );
    let updated = |purchase: &Purchase| purchase.subscription_event(UPDATED, now() - 30, json!({}));
    let user = json!({ "client_reference_id": "user_1" });
    let at_end = json!({ "status": "canceled", "ended_at": now() - 30 });
    bridge
        .deliver_all(&[
            updated(&unclaimed),
            updated(&claimed),
            claimed.checkout_session_event(COMPLETED, claimed.created, user),
            ended.subscription_event(DELETED, now() - 30, at_end),
        ])
        .await;
    bridge.wait_until_applied().await;
    until_all_questions_are_answered(&bridge).await;

    let signals = bridge.check().await;
    let mut ids: Vec<_> = bridge
        .orphans()
        .await
        .into_iter()
        .map(|orphan| orphan.id)
        .collect();
    ids.sort();
    let mut expected = vec![
        unclaimed.subscription.clone(),
        // It began while the stream existed, so its session should have come.
        ended.subscription.clone(),
    ];
    expected.sort();
    assert_eq!(ids, expected);
    assert_eq!(count_signals(&signals, "orphan.created"), 2);
    let found = orphan(&bridge, &unclaimed.subscription).await;
    assert_eq!(found.reason, "no_checkout_session");
    assert_eq!(found.stripe_customer_id.as_ref(), Some(&unclaimed.customer));
}

async fn row_that_reconcile_imported_becomes_an_orphan_unless_it_had_ended(database: DatabaseKind) {
    let api = Api::start().await;
    let options = with_key(database, &api).worker("LITESTRIPE_ORPHAN_GRACE", "1s");
    let bridge = Bridge::start(options).await;
    let (running, ended) = (
        Purchase::new(now() - 20 * MONTH),
        Purchase::new(now() - 20 * MONTH),
    );
    api.put_subscription(running.subscription());
    let at_end = json!({ "status": "canceled", "ended_at": now() - MONTH });
    api.put_subscription(with(ended.subscription(), at_end));
    api.put_customer(json!({ "id": running.customer, "object": "customer", "email": EMAIL }));
    let imported = bridge
        .worker()
        .args(["reconcile", "--repair"])
        .run(DEADLINE)
        .await;
    assert_eq!(imported.status.code(), Some(0), "{imported:?}");

    let found = until(&bridge, &running.subscription, |_| true).await;
    assert_eq!(found.reason, "no_checkout_session");
    assert_eq!(found.customer_email.as_deref(), Some(EMAIL));
    until_all_questions_are_answered(&bridge).await;
    assert_eq!(
        bridge.orphans().await.len(),
        1,
        "no customer waits for access"
    );
    let signals = bridge.check().await;
    assert_eq!(count_signals(&signals, "orphan.created"), 1);
}

async fn no_question_is_stored_if_orphans_without_session_are_switched_off(database: DatabaseKind) {
    let api = Api::start().await;
    let options = with_key(database, &api)
        .worker("LITESTRIPE_ORPHAN_GRACE", "0s")
        .worker("LITESTRIPE_ORPHAN_WITHOUT_SESSION", "false");
    let bridge = Bridge::start(options).await;
    let [created, updated, unpaid, imported] = [(); 4].map(|()| Purchase::new(now() - 60));
    bridge
        .deliver_all(&[
            created.subscription_event(CREATED, created.created, json!({})),
            updated.subscription_event(UPDATED, updated.created, json!({})),
            unpaid.subscription_event(CREATED, unpaid.created, json!({})),
            unpaid.checkout_session_event(
                COMPLETED,
                unpaid.created,
                json!({ "payment_status": "unpaid" }),
            ),
        ])
        .await;
    api.put_subscription(imported.subscription());
    for purchase in [&created, &updated, &unpaid] {
        api.put_subscription(purchase.subscription());
    }
    bridge.wait_until_applied().await;
    let repaired = bridge
        .worker()
        .args(["reconcile", "--repair"])
        .run(DEADLINE)
        .await;
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");

    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 4);
    assert_eq!(
        questions(&bridge).await,
        [],
        "no open question could create one"
    );
    assert_eq!(bridge.orphans().await, []);
    assert_eq!(api.requests("/v1/customers/").len(), 0);
}

async fn row_of_the_previous_version_is_asked_about_with_its_next_event(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1h")).await;
    let purchase = Purchase::new(now() - 60);
    let open = [(purchase.subscription.clone(), "grace".to_owned())];
    apply(
        &bridge,
        &purchase.subscription_event(UPDATED, purchase.created, json!({})),
    )
    .await;
    assert_eq!(questions(&bridge).await, open);
    // The previous version did not ask about it, and its row says nothing about that.
    execute(&bridge, "DELETE FROM litestripe_question").await;
    let before = "UPDATE stripe_subscription SET \
        merge_state = replace(merge_state, ',\"awaits_user\":true', '')";
    execute(&bridge, before).await;
    let row = bridge.row(&purchase.subscription).await;
    assert!(!row.merge_state.contains("awaits_user"), "{row:?}");

    let past_due = json!({ "status": "past_due" });
    apply(
        &bridge,
        &purchase.subscription_event(UPDATED, purchase.created + 1, past_due),
    )
    .await;
    assert_eq!(questions(&bridge).await, open);

    // Once answered, it is not opened again by every event.
    execute(&bridge, "DELETE FROM litestripe_question").await;
    apply(
        &bridge,
        &purchase.subscription_event(UPDATED, purchase.created + 2, json!({})),
    )
    .await;
    assert_eq!(questions(&bridge).await, []);
    bridge.check().await;
}

/// A worker whose clock runs ahead takes a question before the grace period has ended.
async fn question_that_is_due_too_early_makes_no_orphan(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1h")).await;
    let purchase = Purchase::new(now());
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    make_due(&bridge).await;

    until_retried(&bridge).await;
    assert_eq!(bridge.orphans().await, []);
    let due = "SELECT 1 FROM litestripe_question WHERE due_at > (SELECT dt_created FROM stripe_subscription)";
    let due = bridge.database.query(due).await;
    assert_eq!(
        due.expect("the database answers").len(),
        1,
        "it is asked at the end"
    );
    bridge.check().await;
}

async fn subscription_older_than_the_stream_is_an_orphan_only_if_stripe_was_asked(
    database: DatabaseKind,
) {
    let mut bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "0s")).await;
    let (unclaimed, claimed) = (
        Purchase::new(now() - 20 * MONTH),
        Purchase::new(now() - 20 * MONTH),
    );
    for purchase in [&unclaimed, &claimed] {
        apply(
            &bridge,
            &purchase.subscription_event(UPDATED, now(), json!({})),
        )
        .await;
        until_retried(&bridge).await;
    }
    assert_eq!(bridge.orphans().await, [], "its session may be older too");
    assert_eq!(questions(&bridge).await.len(), 2, "they wait for a key");

    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    let api = Api::start().await;
    let user = json!({ "client_reference_id": "user_1" });
    api.put_checkout_session(with(claimed.checkout_session(), user));
    make_due(&bridge).await;
    let worker = bridge
        .worker()
        .env("STRIPE_API_BASE", api.url())
        .env("STRIPE_SECRET_KEY", API_KEY)
        .env("LITESTRIPE_BACKFILL_INTERVAL", "off")
        .env("LITESTRIPE_WORKER_LISTEN", "127.0.0.1:0")
        .start();
    until_all_questions_are_answered(&bridge).await;
    let row = bridge.row(&claimed.subscription).await;
    assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));
    let found = orphan(&bridge, &unclaimed.subscription).await;
    assert_eq!(found.reason, "no_checkout_session");
    assert_eq!(bridge.orphans().await.len(), 1);
    worker.stop().await;
}

fn with_key(database: DatabaseKind, api: &Api) -> Options {
    Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000")
}

async fn execute(bridge: &Bridge, sql: &str) -> Vec<sea_orm::QueryResult> {
    let done = bridge.database.query(sql).await;
    done.unwrap_or_else(|error| panic!("{sql}: {error}"))
}
