//! `litestripe-worker orphans`: the commands with which support staff list and resolve orphans.

use std::time::Duration;

use litestripe_contract::subject::KV_BUCKET;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, filter_by_subscription};
use litestripe_harness::eventually;
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::Purchase;
use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{
    COMPLETED, CREATED, DEADLINE, EMAIL, apply, count_signals, now, orphan, signals_about, until,
};

on_both_databases!(
    orphans_are_listed_and_shown,
    list_shows_the_newest_thousand_and_says_so,
    user_in_the_other_mode_does_not_prevent_a_resolution,
    resolution_reaches_row_orphan_and_subscribers,
    payment_without_a_subscription_can_be_resolved,
    refused_resolution_changes_nothing,
    wrong_resolution_is_replaced_by_force,
    orphan_with_the_longest_id_is_resolved,
    resolution_without_a_worker_is_applied_later,
    no_resolution_is_stored_at_the_broker_of_another_installation,
    competing_resolutions_leave_row_and_orphan_consistent,
);

/// The command itself waits 10 s for a worker.
const COMMAND: Duration = Duration::from_secs(60);

async fn orphans_are_listed_and_shown(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let none = orphans(&bridge, &["list"]).await;
    assert_eq!(
        (none.status.code(), none.stdout.trim()),
        (Some(0), "no open orphans")
    );
    let none = orphans(&bridge, &["list", "--json"]).await;
    assert_eq!(json_of(&none), json!([]));

    let purchase = paid(&bridge).await;
    let listed = orphans(&bridge, &["list"]).await;
    let [header, line] = listed.stdout.lines().collect::<Vec<_>>()[..] else {
        panic!("{}", listed.stdout)
    };
    assert_eq!(
        words(header),
        [
            "id", "reason", "email", "customer", "mode", "since", "state"
        ]
    );
    let since = words(line)[5].to_owned();
    let customer = purchase.customer.as_str();
    let expected = [
        &purchase.subscription,
        "missing_client_reference_id",
        EMAIL,
        customer,
        "test",
        &since,
        "open",
    ];
    assert_eq!(words(line), expected);
    let listed = orphans(&bridge, &["list", "--json"]).await;
    let shown = orphans(&bridge, &["show", &purchase.subscription, "--json"]).await;
    let shown = json_of(&shown);
    assert_eq!(json_of(&listed), json!([shown]));
    let expected = json!({
        "orphan_id": purchase.subscription,
        "reason": "missing_client_reference_id",
        "customer_email": EMAIL,
        "checkout_session_id": purchase.checkout_session,
        "stripe_customer_id": purchase.customer,
        "stripe_subscription_id": purchase.subscription,
        "event_id": orphan(&bridge, &purchase.subscription).await.event_id,
        "livemode": false,
        "resolved_at": null,
        "resolved_client_reference_id": null,
        "dt_created": since,
        "dt_last_updated": since,
    });
    assert_eq!(shown, expected);
    let table = orphans(&bridge, &["show", &purchase.subscription]).await;
    assert!(
        table
            .stdout
            .lines()
            .any(|line| words(line) == ["customer_email", EMAIL]),
        "{}",
        table.stdout
    );

    resolve(&bridge, &purchase.subscription, "user_1").await;
    assert_eq!(
        orphans(&bridge, &["list"]).await.stdout.trim(),
        "no open orphans"
    );
    let all = orphans(&bridge, &["list", "--all"]).await;
    assert!(
        all.stdout.contains("resolved: user_1") && !all.stdout.contains(EMAIL),
        "{}",
        all.stdout
    );
}

async fn list_shows_the_newest_thousand_and_says_so(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    paid(&bridge).await;
    let more = "INSERT INTO orphaned_payment (id, reason, event_id, livemode, dt_created, dt_last_updated) \
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000) \
        SELECT 'cs_' || i, reason, event_id, livemode, dt_created, dt_last_updated FROM n, orphaned_payment";
    bridge
        .database
        .query(more)
        .await
        .expect("the rows can be made");

    let listed = orphans(&bridge, &["list"]).await;
    assert_eq!(listed.stdout.lines().count(), 1 + 1000);
    assert_eq!(listed.stderr.trim(), "only the newest 1000 are listed");
    let listed = orphans(&bridge, &["list", "--json"]).await;
    assert_eq!(json_of(&listed).as_array().map(Vec::len), Some(1000));
    assert_eq!(listed.stderr.trim(), "only the newest 1000 are listed");
    bridge
        .database
        .query("DELETE FROM orphaned_payment WHERE id = 'cs_1'")
        .await
        .expect("it can be deleted");
    assert_eq!(orphans(&bridge, &["list"]).await.stderr, "");
}

async fn user_in_the_other_mode_does_not_prevent_a_resolution(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let (live, user) = (
        Purchase::new(now() - 60),
        json!({ "client_reference_id": "user_1" }),
    );
    let mut session = live.checkout_session_event(COMPLETED, live.created, user);
    session.value["livemode"] = true.into();
    apply(&bridge, &session).await;
    let test = paid(&bridge).await;

    let done = resolve(&bridge, &test.subscription, "user_1").await;
    assert_eq!(
        (done.status.code(), done.stderr.as_str()),
        (Some(0), ""),
        "{}",
        done.stdout
    );
}

async fn resolution_reaches_row_orphan_and_subscribers(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "0s")).await;
    let missing = paid(&bridge).await;
    bridge
        .deliver(&missing.subscription_event(CREATED, missing.created, json!({})))
        .await;
    let unclaimed = Purchase::new(now() - 60);
    apply(
        &bridge,
        &unclaimed.subscription_event(CREATED, unclaimed.created, json!({})),
    )
    .await;
    until(&bridge, &unclaimed.subscription, |_| true).await;

    for (user, purchase) in [
        ("user_1", &missing),
        ("user 2 of Müller & Söhne", &unclaimed),
    ] {
        let id = purchase.subscription.as_str();
        let done = resolve(&bridge, id, user).await;
        assert_eq!(
            (done.status.code(), done.stderr.as_str()),
            (Some(0), ""),
            "{}",
            done.stdout
        );
        assert_eq!(
            done.stdout.trim(),
            format!("{id} is resolved to client reference id {user}")
        );
        let signals = bridge.check().await;
        let found = orphan(&bridge, id).await;
        assert!(found.resolved_at.is_some());
        assert_eq!(found.resolved_client_reference_id.as_deref(), Some(user));
        assert_eq!(found.customer_email, None);
        assert_eq!(
            bridge.row(id).await.client_reference_id.as_deref(),
            Some(user)
        );
        assert_eq!(signals_about(&signals, "orphan.resolved", id).len(), 1);
        assert_eq!(
            signals_about(&signals, "orphan.resolved", id)[0].body["event"]["type"],
            "litestripe.resolution"
        );
        let last = filter_by_subscription(&signals, id)
            .pop()
            .expect("the row was signalled")
            .clone();
        assert_eq!(
            (last.changed(), &last.body["client_reference_id"]),
            (vec!["client_reference_id"], &json!(user))
        );
    }
    // A session that was created before the resolution and arrives after it does not change it.
    let session = unclaimed.checkout_session_event(COMPLETED, unclaimed.created, json!({}));
    apply(&bridge, &session).await;
    let signals = bridge.check().await;
    assert_eq!(
        orphan(&bridge, &unclaimed.subscription)
            .await
            .customer_email,
        None
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (2, 2)
    );
}

async fn payment_without_a_subscription_can_be_resolved(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 60);
    let once = json!({ "mode": "payment", "subscription": null });
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, once);
    apply(&bridge, &session).await;
    let done = resolve(&bridge, &purchase.checkout_session, "user_1").await;
    assert_eq!(done.status.code(), Some(0), "{}", done.stderr);
    bridge.publish(COMPLETED, session.body(), "again").await;

    let signals = bridge.check().await;
    let found = orphan(&bridge, &purchase.checkout_session).await;
    assert_eq!(
        (
            found.resolved_client_reference_id.as_deref(),
            found.customer_email
        ),
        (Some("user_1"), None)
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
    assert_eq!(bridge.rows().await, []);
}

async fn refused_resolution_changes_nothing(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let (first, second, third) = (
        paid(&bridge).await,
        paid(&bridge).await,
        paid(&bridge).await,
    );
    assert_eq!(
        resolve(&bridge, &first.subscription, "user_1")
            .await
            .status
            .code(),
        Some(0)
    );
    bridge.check().await;
    let stored = bridge.stored_events().await;
    let (rows, before) = (bridge.rows().await, bridge.orphans().await);

    let refused = async |id: &str, user: &str, words: &[&str]| {
        let refused = resolve(&bridge, id, user).await;
        assert_eq!(
            (refused.status.code(), refused.stdout.as_str()),
            (Some(1), ""),
            "{id} to {user}"
        );
        assert!(
            words.iter().all(|word| refused.stderr.contains(word)),
            "{}",
            refused.stderr
        );
        assert_eq!(refused.stderr.lines().count(), 1, "{}", refused.stderr);
    };
    let again = resolve(&bridge, &first.subscription, "user_1").await;
    assert_eq!(again.status.code(), Some(0), "{}", again.stderr);
    refused(
        &first.subscription,
        "user_2",
        &["resolved already", "user_1", "nothing was changed"],
    )
    .await;
    refused("sub_nobody", "user_2", &["no orphan sub_nobody"]).await;
    refused("' OR 1=1 --", "user_2", &["no orphan"]).await;
    refused(
        &second.subscription,
        "user_1",
        &[&first.subscription, "nothing was changed", "--force"],
    )
    .await;
    refused(&second.subscription, "user\n2", &["control characters"]).await;
    refused(&second.subscription, "  ", &["blank"]).await;
    let long = "u".repeat(1025);
    refused(&second.subscription, &long, &["longer than 1024 bytes"]).await;
    let empty = resolve(&bridge, &second.subscription, "").await;
    assert_eq!(empty.status.code(), Some(2), "{}", empty.stderr);
    let shown = orphans(&bridge, &["show", "sub_nobody"]).await;
    assert_eq!((shown.status.code(), shown.stdout.as_str()), (Some(1), ""));

    bridge.check().await;
    assert_eq!(
        (bridge.rows().await, bridge.orphans().await),
        (rows, before)
    );
    assert_eq!(bridge.stored_events().await, stored);

    // With `--force` the user may have two subscriptions.
    let arguments = [
        "resolve",
        &second.subscription,
        "--client-reference-id",
        "user_1",
        "--force",
        "--json",
    ];
    let forced = orphans(&bridge, &arguments).await;
    assert_eq!(json_of(&forced)["resolved_client_reference_id"], "user_1");
    assert_eq!(json_of(&forced)["customer_email"], Value::Null);
    // Ended subscriptions of a user do not prevent a resolution.
    for purchase in [&first, &second] {
        let ended = json!({ "status": "canceled", "ended_at": now() });
        apply(
            &bridge,
            &purchase.subscription_event("customer.subscription.deleted", now(), ended),
        )
        .await;
    }
    let done = resolve(&bridge, &third.subscription, "user_1").await;
    assert_eq!(done.status.code(), Some(0), "{}", done.stderr);
}

async fn wrong_resolution_is_replaced_by_force(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = paid(&bridge).await;
    let once = Purchase::new(now() - 60);
    let payment = json!({ "mode": "payment", "subscription": null });
    let session = once.checkout_session_event(COMPLETED, once.created, payment);
    apply(&bridge, &session).await;
    for id in [&purchase.subscription, &once.checkout_session] {
        let wrong = resolve(&bridge, id, "user_1").await;
        assert_eq!(wrong.status.code(), Some(0), "{}", wrong.stderr);
        let arguments = [
            "resolve",
            id,
            "--client-reference-id",
            "user_2",
            "--force",
            "--json",
        ];
        let right = orphans(&bridge, &arguments).await;
        assert_eq!(right.status.code(), Some(0), "{}", right.stderr);
        assert_eq!(json_of(&right)["resolved_client_reference_id"], "user_2");
    }
    bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.client_reference_id.as_deref(), Some("user_2"));
}

/// The id of the resolution's own event contains the orphan's id.
async fn orphan_with_the_longest_id_is_resolved(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let mut purchase = Purchase::new(now() - 60);
    purchase.subscription = format!("sub_{}", "x".repeat(251));
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
    apply(&bridge, &session).await;
    let done = resolve(&bridge, &purchase.subscription, "user_1").await;
    assert_eq!(done.status.code(), Some(0), "{}", done.stderr);
    bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));
}

async fn resolution_without_a_worker_is_applied_later(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let purchase = paid(&bridge).await;
    bridge.workers.pop().expect("there is one").stop().await;
    let id = purchase.subscription.as_str();
    let arguments = ["resolve", id, "--client-reference-id", "user_1", "--json"];
    let (stored, as_json) =
        tokio::join!(resolve(&bridge, id, "user_1"), orphans(&bridge, &arguments));
    assert_eq!(stored.status.code(), Some(0), "{}", stored.stderr);
    let expected = json!({ "orphan_id": id, "client_reference_id": "user_1", "state": "stored" });
    assert_eq!(json_of(&as_json), expected);
    assert!(
        stored.stdout.contains("takes effect when a worker runs"),
        "{}",
        stored.stdout
    );
    assert_eq!(
        orphan(&bridge, &purchase.subscription)
            .await
            .customer_email
            .as_deref(),
        Some(EMAIL)
    );

    bridge.start_worker();
    let signals = bridge.check().await;
    let found = orphan(&bridge, &purchase.subscription).await;
    assert_eq!(
        (
            found.resolved_client_reference_id.as_deref(),
            found.customer_email
        ),
        (Some("user_1"), None)
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
}

async fn no_resolution_is_stored_at_the_broker_of_another_installation(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = paid(&bridge).await;
    let stored = bridge.stored_events().await;
    let bucket = bridge.jetstream().await.get_key_value(KV_BUCKET).await;
    let bucket = bucket.expect("the bucket exists");
    bucket
        .put("installation", "anotherInstallation000".into())
        .await
        .expect("it is written");
    let refused = resolve(&bridge, &purchase.subscription, "user_1").await;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("another"), "{}", refused.stderr);
    assert_eq!(bridge.stored_events().await, stored);
}

async fn competing_resolutions_leave_row_and_orphan_consistent(database: DatabaseKind) {
    // One event at a time, so that the first resolution is applied before the second.
    let mut bridge = Bridge::start(Options::new(database).worker("LITESTRIPE_BATCH", "1")).await;
    let purchase = paid(&bridge).await;
    bridge.workers.pop().expect("there is one").stop().await;
    let stored = bridge.stored_events().await;
    let id = purchase.subscription.as_str();
    let first = bridge
        .worker()
        .args(["orphans", "resolve", id, "--client-reference-id", "user_1"])
        .start();
    let at = until_stored(&bridge, stored + 1).await;
    eventually("the next second", DEADLINE, async || {
        if now() > at {
            Ok(())
        } else {
            Err(at.to_string())
        }
    })
    .await;
    let second = bridge
        .worker()
        .args(["orphans", "resolve", id, "--client-reference-id", "user_2"])
        .start();
    until_stored(&bridge, stored + 2).await;
    bridge.start_worker();
    let (_, _) = (first.wait(COMMAND).await, second.wait(COMMAND).await);

    bridge.check().await;
    let (row, found) = (bridge.row(id).await, orphan(&bridge, id).await);
    assert!(found.resolved_at.is_some());
    assert_eq!(row.client_reference_id, found.resolved_client_reference_id);
    let user = found.resolved_client_reference_id.unwrap_or_default();
    let winner = if user == "user_2" { &second } else { &first };
    let is_confirmed = winner
        .stdout()
        .contains(&format!("{id} is resolved to client reference id {user}"));
    assert!(is_confirmed, "{user}: {:?}", winner.log());
    // The other command may have checked before the later resolution was applied, so its output is
    // not compared.
    assert_eq!(user, "user_2", "the later resolution wins");
}

/// Waits until the stream holds `count` events, and returns the current second.
async fn until_stored(bridge: &Bridge, count: u64) -> i64 {
    eventually("a resolution to be stored", DEADLINE, async || {
        let stored = bridge.stored_events().await;
        if stored >= count {
            Ok(OffsetDateTime::now_utc().unix_timestamp())
        } else {
            Err(stored.to_string())
        }
    })
    .await
}

/// Delivers a payment that becomes an orphan.
async fn paid(bridge: &Bridge) -> Purchase {
    let purchase = Purchase::new(now() - 60);
    apply(
        bridge,
        &purchase.checkout_session_event(COMPLETED, purchase.created, json!({})),
    )
    .await;
    purchase
}

pub(super) async fn resolve(bridge: &Bridge, id: &str, user: &str) -> Finished {
    orphans(bridge, &["resolve", id, "--client-reference-id", user]).await
}

async fn orphans(bridge: &Bridge, arguments: &[&str]) -> Finished {
    bridge
        .worker()
        .arg("orphans")
        .args(arguments)
        .run(COMMAND)
        .await
}

fn json_of(finished: &Finished) -> Value {
    assert_eq!(finished.status.code(), Some(0), "{}", finished.stderr);
    serde_json::from_str(&finished.stdout).expect("it prints JSON")
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}
