//! `litestripe-worker erase`: the personal data of one customer is removed and does not come back.

use std::path::Path;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use litestripe_harness::bridge::{
    Bridge, DatabaseKind, Options, Signal, filter_by_subscription, lock_row_sql, signal_fields,
};
use litestripe_harness::eventually;
use litestripe_harness::program::Finished;
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::stripe::{Event, Purchase};
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};

use crate::orphans::{COMPLETED, CREATED, DEADLINE, UPDATED, apply, now, orphan, with};

mod late;
mod restored;
mod trigger;

on_both_databases!(
    personal_data_of_a_customer_is_erased_and_rows_stay,
    a_last_signal_with_personal_data_is_replaced,
    an_erasure_survives_the_loss_of_nats_data,
    records_that_the_previous_version_kept_in_nats_are_migrated,
    erasure_is_refused_while_an_event_of_the_customer_is_unapplied,
    late_events_are_applied_without_their_personal_data,
    a_payment_without_a_customer_is_erased_by_its_orphan,
    a_customer_account_is_erased_with_emails_and_metadata,
    unknown_customer_is_recorded_and_nothing_else_changes,
);

const COMMAND: Duration = Duration::from_secs(90);

/// Part of all personal data of the customer that is erased.
const ERASED: &str = "ERASED";
/// Part of all personal data of the other customer.
const KEPT: &str = "KEPT";

async fn personal_data_of_a_customer_is_erased_and_rows_stay(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database).ingress("LITESTRIPE_EVENT_TYPES", "*")).await;
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    // A second subscription of the same customer, with a known user, and a payment without a
    // subscription.
    let second = of_the_same(&user, now() - 60);
    let once = of_the_same(&user, now() - 60);
    let one_time = json!({ "mode": "payment", "subscription": null });
    bridge
        .deliver_all(&[
            session(&user, ERASED, json!({})),
            subscription(&user, CREATED, ERASED, 0),
        ])
        .await;
    bridge
        .deliver(&session(
            &second,
            ERASED,
            json!({ "client_reference_id": "user_1" }),
        ))
        .await;
    bridge.deliver(&session(&once, ERASED, one_time)).await;
    bridge
        .deliver_all(&[
            subscription(&user, UPDATED, ERASED, 5),
            customer(&user, "customer.updated", ERASED),
        ])
        .await;
    bridge
        .deliver_all(&[
            session(&other, KEPT, json!({})),
            subscription(&other, CREATED, KEPT, 0),
        ])
        .await;
    bridge
        .deliver_all(&[
            customer(&other, "customer.updated", KEPT),
            naming(&other, &user.customer),
        ])
        .await;
    bridge
        .publish(UPDATED, poison(&user, ERASED), "poison")
        .await;
    bridge
        .publish(UPDATED, poison(&other, KEPT), "other poison")
        .await;
    bridge.check().await;
    assert!(!places(&bridge, ERASED).await.is_empty());
    let kept = places(&bridge, KEPT).await;
    let (rows, orphans) = (bridge.rows().await, bridge.orphans().await);

    let receipt = erased(&erase(&bridge, &user.customer, &["--json"]).await);
    let counts = [
        "events",
        "dead_letters",
        "subscriptions",
        "orphans",
        "unapplied",
    ]
    .map(|name| &receipt[name]);
    // The poisoned event is in both streams.
    assert_eq!(
        counts,
        [&json!(7), &json!(1), &json!(2), &json!(2), &json!(0)],
        "{receipt:#}"
    );
    assert_eq!(
        (&receipt["customer"], &receipt["orphan"]),
        (&json!(user.customer), &json!(null))
    );
    let ids = [&user, &second, &once]
        .map(|of| [&of.customer, &of.checkout_session])
        .concat();
    for id in ids
        .into_iter()
        .chain([&user.subscription, &second.subscription])
    {
        assert!(
            receipt["ids"]
                .as_array()
                .is_some_and(|ids| ids.contains(&json!(id))),
            "{id}: {receipt:#}"
        );
    }
    let at = receipt["recorded_at"].as_str().expect("it says when");
    assert!(at.ends_with('Z'), "{at}");

    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
    assert_eq!(bytes(&bridge, ERASED), Vec::<String>::new());
    assert_eq!(places(&bridge, KEPT).await, kept, "others are untouched");
    let signals = bridge.signals().await;
    for before in &rows {
        let row = bridge.row(&before.stripe_subscription_id).await;
        let sent = filter_by_subscription(&signals, &row.stripe_subscription_id);
        check_last(&sent, &signal_fields(&row));
        if before.stripe_customer_id.as_deref() != Some(&user.customer) {
            assert_eq!(&row, before);
            continue;
        }
        let cleared = with(
            signal_fields(before),
            json!({ "metadata": {}, "subscription_metadata": {} }),
        );
        assert_eq!(
            with(signal_fields(&row), json!({ "revision": before.revision })),
            cleared,
            "all but the metadata is unchanged"
        );
        assert_eq!(sent.len(), 1, "older signals are removed: {sent:#?}");
        let of_orphans = signals
            .iter()
            .filter(|signal| signal.body["orphan_id"] == json!(row.stripe_subscription_id));
        assert_eq!(of_orphans.count(), 0);
        let changed = sent[0].changed();
        assert!(changed.contains(&"metadata"), "{changed:?}");
        assert_eq!(
            (&sent[0].body["previous"], &sent[0].body["event"]["type"]),
            (&json!({}), &json!("litestripe.erasure"))
        );
    }
    for before in orphans {
        let after = orphan(&bridge, &before.id).await;
        let is_theirs = before.stripe_customer_id.as_deref() == Some(&user.customer);
        let email = before.customer_email.clone().filter(|_| !is_theirs);
        assert_eq!(
            (after.customer_email, after.resolved_at, after.reason),
            (email, before.resolved_at, before.reason)
        );
    }

    let again = erased(&erase(&bridge, &user.customer, &["--json"]).await);
    for count in ["events", "dead_letters", "subscriptions", "orphans"] {
        assert_eq!(again[count], 0, "{again:#}");
    }
    assert_eq!(
        again["signals"], 2,
        "each row is signalled again, in place of its previous signal"
    );
    assert_eq!(places(&bridge, KEPT).await, kept);
    let table = erase(&bridge, &user.customer, &[]).await;
    assert_eq!(table.status.code(), Some(0), "{}", table.stderr);
    assert!(
        table.stdout.contains("messages in STRIPE_EVENTS")
            && table.stdout.contains("recorded at 20"),
        "{table:?}"
    );
    for node in bridge.workers.iter().chain(&bridge.ingress) {
        assert_eq!(
            (node.count_in_log(ERASED), node.count_in_log("ERROR")),
            (0, 0),
            "{}",
            node.log()
        );
    }
}

async fn a_last_signal_with_personal_data_is_replaced(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let user = Purchase::new(now() - 60);
    apply(&bridge, &subscription(&user, UPDATED, ERASED, 0)).await;
    let emptied = json!({ "status": "past_due", "metadata": {} });
    apply(
        &bridge,
        &user.subscription_event(UPDATED, user.created + 1, emptied),
    )
    .await;
    let before = bridge.check().await;
    let last = filter_by_subscription(&before, &user.subscription)
        .pop()
        .expect("it was signalled");
    assert!(last.body["previous"].to_string().contains(ERASED));

    let receipt = erased(&erase(&bridge, &user.customer, &["--json"]).await);
    assert_eq!(
        (&receipt["subscriptions"], &receipt["signals"]),
        (&json!(0), &json!(2))
    );
    let signals = bridge.signals().await;
    let sent = filter_by_subscription(&signals, &user.subscription);
    check_last(&sent, &signal_fields(&bridge.row(&user.subscription).await));
    assert_eq!(
        (sent.len(), &sent[0].body["status"]),
        (1, &json!("past_due"))
    );
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
    let again = erased(&erase(&bridge, &user.customer, &["--json"]).await);
    assert_eq!(
        (&again["subscriptions"], &again["signals"]),
        (&json!(0), &json!(1))
    );
    let signals = bridge.signals().await;
    let sent = filter_by_subscription(&signals, &user.subscription);
    check_last(&sent, &signal_fields(&bridge.row(&user.subscription).await));
    assert_eq!((sent.len(), sent[0].changed()), (1, vec![]));
}

async fn erasure_is_refused_while_an_event_of_the_customer_is_unapplied(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    apply(&bridge, &session(&user, ERASED, json!({}))).await;
    bridge.workers.pop().expect("there is one").stop().await;
    bridge
        .deliver(&subscription(&user, CREATED, ERASED, 0))
        .await;
    let (rows, orphans, signals) = (
        bridge.rows().await,
        bridge.orphans().await,
        bridge.signals().await.len(),
    );

    let refused = erase(&bridge, &user.customer, &["--json"]).await;
    assert_eq!(
        (refused.status.code(), refused.stdout.as_str()),
        (Some(1), "")
    );
    let texts = [
        "event 2",
        "nothing was changed",
        "litestripe-worker run",
        "--force",
    ];
    assert!(
        texts.iter().all(|word| refused.stderr.contains(word)),
        "{}",
        refused.stderr
    );
    assert_eq!(
        (bridge.rows().await, bridge.orphans().await),
        (rows, orphans)
    );
    assert_eq!(
        (bridge.stored_events().await, bridge.signals().await.len()),
        (2, signals)
    );
    assert_eq!(recorded(&bridge, &user.customer).await, None);

    // One customer's backlog does not prevent the erasure of another.
    let stranger = erased(&erase(&bridge, &other.customer, &["--json"]).await);
    assert_eq!(stranger["events"], 0);

    let forced = erased(&erase(&bridge, &user.customer, &["--force", "--json"]).await);
    assert_eq!(
        (&forced["events"], &forced["unapplied"]),
        (&json!(2), &json!(1))
    );
    assert!(recorded(&bridge, &user.customer).await.is_some());
    bridge.start_worker();
    apply(&bridge, &subscription(&other, CREATED, KEPT, 0)).await;
    assert_eq!(
        bridge.row(&user.subscription).await.status,
        None,
        "the forced erasure removed the unapplied event"
    );
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
}

async fn late_events_are_applied_without_their_personal_data(database: DatabaseKind) {
    let bridge = Bridge::start(
        Options::new(database)
            .worker("LITESTRIPE_ORPHAN_GRACE", "0s")
            .workers(2),
    )
    .await;
    let user = Purchase::new(now() - 60);
    let paid = session(&user, ERASED, json!({}));
    let created = subscription(&user, CREATED, ERASED, 0);
    bridge.deliver_all(&[paid.clone(), created.clone()]).await;
    bridge.check().await;
    erased(&erase(&bridge, &user.customer, &["--json"]).await);

    // Two repeated events, a later change and a new payment, all dated before the erasure.
    bridge.publish(COMPLETED, paid.body(), "again").await;
    bridge
        .publish(CREATED, created.body(), "created again")
        .await;
    let mut late = subscription(&user, UPDATED, ERASED, 5);
    late.value["data"]["object"]["status"] = json!("past_due");
    bridge.deliver(&late).await;
    let third = of_the_same(&user, now() - 30);
    bridge.deliver(&session(&third, ERASED, json!({}))).await;
    bridge.wait_until_applied().await;

    let row = bridge.row(&user.subscription).await;
    assert_eq!(
        (row.status.as_deref(), row.uncertain),
        (Some("past_due"), false),
        "the status is applied"
    );
    assert_eq!(
        (row.metadata, row.subscription_metadata),
        (json!({}), json!({}))
    );
    let found = orphan(&bridge, &third.subscription).await;
    assert_eq!(
        (found.customer_email, found.reason.as_str()),
        (None, "missing_client_reference_id")
    );
    assert_eq!(
        orphan(&bridge, &user.subscription).await.customer_email,
        None
    );
    eventually(
        "late events to be removed from the stream",
        DEADLINE,
        async || {
            let stored = bridge.stored_events().await;
            // The copy of the erasure stays.
            if stored == 1 {
                Ok(())
            } else {
                Err(stored.to_string())
            }
        },
    )
    .await;
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());

    // An event that happened after the erasure is applied in full.
    let news =
        user.subscription_event(UPDATED, now() + 60, json!({ "metadata": { "note": KEPT } }));
    apply(&bridge, &news).await;
    let row = bridge.row(&user.subscription).await;
    assert_eq!(row.subscription_metadata, json!({ "note": KEPT }));
}

async fn an_erasure_survives_the_loss_of_nats_data(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let user = Purchase::new(now() - 60);
    bridge
        .deliver_all(&[
            session(&user, ERASED, json!({})),
            subscription(&user, CREATED, ERASED, 0),
        ])
        .await;
    bridge.check().await;
    erased(&erase(&bridge, &user.customer, &["--json"]).await);
    bridge.workers.pop().expect("there is one").stop().await;
    bridge.broker.kill().await;
    std::fs::remove_dir_all(bridge.broker.folder().join("store")).expect("it can be removed");
    bridge.broker.resume().await;
    bridge.start_worker().wait_until_ready().await;

    check_late(&bridge, &user).await;
}

async fn records_that_the_previous_version_kept_in_nats_are_migrated(database: DatabaseKind) {
    let mut bridge = Bridge::start(Options::new(database)).await;
    let user = Purchase::new(now() - 60);
    bridge
        .deliver(&user.subscription_event(CREATED, user.created, json!({})))
        .await;
    bridge.check().await;
    bridge.workers.pop().expect("there is one").stop().await;
    let bucket = bridge.jetstream().await.get_key_value("litestripe").await;
    let bucket = bucket.expect("the worker made it");
    let (at, began) = (now(), now() - 600);
    let record = json!({ "at": at }).to_string();
    let kept = [
        (format!("erased.{}", user.customer), record.clone()),
        // The id `a.b`, encoded.
        ("erased.=612e62".to_owned(), record.clone()),
        ("erased.cus_taken_back".to_owned(), record),
        ("backfill.test".to_owned(), began.to_string()),
        ("lease.backfill".to_owned(), "free".to_owned()),
        ("a_budget".to_owned(), "1 2 3".to_owned()),
    ];
    for (key, value) in kept {
        bucket.put(key, value.into()).await.expect("it can be put");
    }
    bucket
        .delete("erased.cus_taken_back")
        .await
        .expect("it can be deleted");

    bridge.start_worker().wait_until_ready().await;
    assert_eq!(
        (
            recorded(&bridge, &user.customer).await,
            recorded(&bridge, "a.b").await
        ),
        (Some(at), Some(at))
    );
    assert_eq!(recorded(&bridge, "cus_taken_back").await, None);
    assert_eq!(crate::backfill::recorded(&bridge).await, Some(began));
    let mut keys = bucket
        .keys()
        .await
        .expect("it answers")
        .try_collect::<Vec<_>>()
        .await
        .expect("it answers");
    keys.sort();
    assert_eq!(keys, ["a_budget", "installation"]);
    check_late(&bridge, &user).await;
}

/// Checks that a late event of an erased customer is applied without its personal data.
async fn check_late(bridge: &Bridge, user: &Purchase) {
    let mut late = subscription(user, UPDATED, ERASED, 5);
    late.value["data"]["object"]["status"] = json!("past_due");
    bridge.publish(UPDATED, late.body(), late.id()).await;
    bridge.wait_until_applied().await;
    let row = bridge.row(&user.subscription).await;
    assert_eq!(
        (row.status.as_deref(), row.subscription_metadata),
        (Some("past_due"), json!({}))
    );
    eventually(
        "the late event to be removed from the stream",
        DEADLINE,
        async || {
            let places = places(bridge, ERASED).await;
            if places.is_empty() {
                Ok(())
            } else {
                Err(places.join("\n"))
            }
        },
    )
    .await;
}

#[tokio::test]
async fn a_batch_either_begins_before_an_erasure_is_recorded_or_knows_it() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    let (user, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    apply(
        &bridge,
        &user.subscription_event(CREATED, user.created, json!({})),
    )
    .await;
    apply(
        &bridge,
        &other.subscription_event(CREATED, other.created, json!({})),
    )
    .await;

    // An erasure waits for a batch that has begun.
    let row = bridge
        .database
        .hold_lock(&lock_row_sql(&other.subscription))
        .await;
    bridge
        .deliver(&subscription(&other, UPDATED, KEPT, 5))
        .await;
    bridge.database.until_a_worker_waits().await;
    let recording = "LOCK TABLE litestripe_erasure IN EXCLUSIVE MODE NOWAIT";
    assert!(
        bridge.database.query(recording).await.is_err(),
        "the batch could not know an erasure recorded now"
    );
    row.rollback().await.expect("it can be rolled back");
    bridge.wait_until_applied().await;

    // A batch that has not begun waits until the erasure is recorded.
    let recorded = bridge
        .database
        .hold_lock("LOCK TABLE litestripe_erasure IN EXCLUSIVE MODE")
        .await;
    bridge
        .deliver(&subscription(&user, UPDATED, ERASED, 5))
        .await;
    bridge.database.until_a_worker_waits().await;
    let (id, at) = (&user.customer, now());
    let erasure = format!("INSERT INTO litestripe_erasure VALUES ('{id}', {at}, 1)");
    recorded
        .execute_unprepared(&erasure)
        .await
        .expect("it can be recorded");
    recorded.commit().await.expect("it commits");
    bridge.wait_until_applied().await;
    assert_eq!(
        bridge.row(&user.subscription).await.subscription_metadata,
        json!({})
    );
    assert_eq!(
        bridge.row(&other.subscription).await.subscription_metadata,
        json!({ "note": KEPT })
    );
}

#[tokio::test]
async fn a_backup_that_reads_every_table_does_not_block_an_erasure() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Postgres)).await;
    let user = Purchase::new(now() - 60);
    apply(&bridge, &subscription(&user, CREATED, ERASED, 0)).await;
    let backup = bridge
        .database
        .hold_lock("LOCK TABLE litestripe_erasure IN ACCESS SHARE MODE")
        .await;
    erased(&erase(&bridge, &user.customer, &["--json"]).await);
    backup.rollback().await.expect("it can be rolled back");
}

async fn a_payment_without_a_customer_is_erased_by_its_orphan(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let (guest, other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    let once = json!({ "mode": "payment", "subscription": null, "customer": null });
    let paid = session(&guest, ERASED, once.clone());
    bridge
        .deliver_all(&[paid.clone(), session(&other, KEPT, once)])
        .await;
    bridge.check().await;
    let unknown = run(&bridge, &["--orphan", &guest.subscription]).await;
    assert_eq!(
        (unknown.status.code(), unknown.stdout.as_str()),
        (Some(1), "")
    );
    assert!(
        unknown.stderr.contains("no orphan") && unknown.stderr.contains(&guest.subscription),
        "{unknown:?}"
    );

    let receipt = erased(&run(&bridge, &["--orphan", &guest.checkout_session, "--json"]).await);
    let counts = ["events", "orphans", "signals", "subscriptions"].map(|name| &receipt[name]);
    assert_eq!(
        counts,
        [&json!(1), &json!(1), &json!(1), &json!(0)],
        "{receipt:#}"
    );
    assert_eq!(receipt["orphan"], json!(guest.checkout_session));
    bridge.publish(COMPLETED, paid.body(), "again").await;
    bridge.wait_until_applied().await;
    assert_eq!(
        orphan(&bridge, &guest.checkout_session)
            .await
            .customer_email,
        None
    );
    assert!(
        orphan(&bridge, &other.checkout_session)
            .await
            .customer_email
            .is_some()
    );
}

async fn unknown_customer_is_recorded_and_nothing_else_changes(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let user = Purchase::new(now() - 60);
    apply(&bridge, &session(&user, KEPT, json!({}))).await;
    let kept = places(&bridge, KEPT).await;
    let receipt = erased(&erase(&bridge, "cus_nobody", &["--json"]).await);
    for count in [
        "events",
        "dead_letters",
        "signals",
        "subscriptions",
        "orphans",
        "unapplied",
    ] {
        assert_eq!(receipt[count], 0, "{receipt:#}");
    }
    assert!(recorded(&bridge, "cus_nobody").await.is_some());
    assert_eq!(places(&bridge, KEPT).await, kept);
    for arguments in [
        &[][..],
        &["--customer", "cus_1", "--orphan", "sub_1"],
        &["--customer", ""],
        &["--customer", "a b"],
    ] {
        let refused = run(&bridge, arguments).await;
        assert_eq!(
            (refused.status.code(), refused.stdout.as_str()),
            (Some(2), ""),
            "{arguments:?}"
        );
    }
}

async fn a_customer_account_is_erased_with_emails_and_metadata(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let (mut user, mut other) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    // The other one is a customer of the user's own connected account.
    let account = "acct_1pC1fcRgUIaqxDvM";
    let mut delivered = Vec::new();
    for (purchase, whom) in [(&mut user, ERASED), (&mut other, KEPT)] {
        let of_account = match whom {
            ERASED => json!({ "customer": null, "customer_account": account }),
            _ => json!({ "customer": null }),
        };
        let mut events = [
            session(purchase, whom, of_account.clone()),
            subscription(purchase, CREATED, whom, 0),
        ];
        for event in &mut events {
            let object = event.value["data"]["object"].take();
            event.value["data"]["object"] = with(object, of_account.clone());
            if whom == KEPT {
                event.value["account"] = json!(account);
            }
        }
        delivered.extend(events);
    }
    bridge.deliver_all(&delivered).await;
    bridge.check().await;
    let row = bridge.row(&user.subscription).await;
    assert_eq!(row.stripe_customer_id.as_deref(), Some(account));
    // Even if the stream does not hold the events any more.
    let purged = bridge.stream("STRIPE_EVENTS").await.purge().await;
    purged.expect("it can be purged");
    let kept = places(&bridge, KEPT).await;

    let receipt = erased(&erase(&bridge, account, &["--json"]).await);
    assert_eq!(
        (&receipt["subscriptions"], &receipt["orphans"]),
        (&json!(1), &json!(1)),
        "{receipt:#}"
    );
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());
    assert_eq!(places(&bridge, KEPT).await, kept);
}

/// Options for workers with a key for the stub that backfill only by command.
fn with_key(api: &Api) -> Options {
    Options::new(DatabaseKind::Sqlite)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "60000")
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
}

#[tokio::test]
async fn backfill_reconcile_and_replay_restore_no_erased_data() {
    let api = Api::start().await;
    let mut bridge = Bridge::start(with_key(&api)).await;
    let user = Purchase::new(now() - 60);
    let created = subscription(&user, CREATED, ERASED, 0);
    bridge
        .deliver_all(&[session(&user, ERASED, json!({})), created.clone()])
        .await;
    bridge.check().await;
    erased(&erase(&bridge, &user.customer, &["--json"]).await);
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }

    // Stripe still has all of it.
    api.put_event(created.value.clone(), true);
    api.put_subscription(created.value["data"]["object"].clone());
    let stored = bridge.stored_events().await;
    let summary = erased(&command(&bridge, &["backfill", "--since", "1h", "--json"]).await);
    assert_eq!(
        (&summary["published"], &summary["skipped"]),
        (&json!(0), &json!(1)),
        "{summary:#}"
    );
    let report = erased(&command(&bridge, &["reconcile", "--repair", "--json"]).await);
    assert_eq!(report["different"], 0, "{report:#}");
    assert_eq!(bridge.stored_events().await, stored);

    // A missed state is repaired without its personal data.
    api.put_subscription(with(
        created.value["data"]["object"].clone(),
        json!({ "status": "canceled" }),
    ));
    let different = command(&bridge, &["reconcile", "--json"]).await;
    assert_eq!(different.status.code(), Some(3), "{different:?}");
    let report: Value = serde_json::from_str(&different.stdout).expect("it prints JSON");
    let fields = report["differences"][0]["differences"]
        .as_array()
        .expect("there is one");
    assert_eq!(
        fields
            .iter()
            .map(|field| &field["field"])
            .collect::<Vec<_>>(),
        ["status"],
        "{report:#}"
    );
    let report = erased(&command(&bridge, &["reconcile", "--repair", "--json"]).await);
    assert_eq!(
        (&report["different"], &report["repaired"]),
        (&json!(1), &json!(1)),
        "{report:#}"
    );
    let row = bridge.row(&user.subscription).await;
    assert_eq!(
        (row.status.as_deref(), row.subscription_metadata),
        (Some("canceled"), json!({}))
    );
    assert_eq!(places(&bridge, ERASED).await, Vec::<String>::new());

    // A late delivery in the stream does not bring the row back in a rebuild.
    bridge
        .database
        .query("DELETE FROM stripe_subscription")
        .await
        .expect("it can be emptied");
    bridge.publish(CREATED, created.body(), "late").await;
    let replayed = erased(&command(&bridge, &["replay", "--json"]).await);
    assert_eq!(
        (&replayed["finished"], &replayed["events"]),
        (&json!(true), &json!(0)),
        "{replayed:#}"
    );
    assert_eq!(bridge.rows().await, []);
}

#[tokio::test]
async fn commands_already_running_restore_no_erased_data() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(&api)).await;
    let user = Purchase::new(now() - 60);
    let created = subscription(&user, CREATED, ERASED, 0);
    bridge.deliver(&created).await;
    bridge.check().await;
    api.put_event(created.value.clone(), true);
    api.put_subscription(created.value["data"]["object"].clone());
    bridge
        .database
        .query("DELETE FROM stripe_subscription")
        .await
        .expect("it can be emptied");

    // Both commands have sent their requests, and get the answers after the erasure.
    let held = [api.hold("/v1/events"), api.hold("/v1/subscriptions?")];
    let commands = [
        &["backfill", "--since", "1h"][..],
        &["reconcile", "--repair"],
    ];
    let running = commands.map(|arguments| bridge.worker().args(arguments.iter().copied()).start());
    for path in ["/v1/events", "/v1/subscriptions?"] {
        eventually("Stripe to be asked", DEADLINE, async || {
            if api.requests(path).is_empty() {
                Err(path.to_owned())
            } else {
                Ok(())
            }
        })
        .await;
    }
    erased(&erase(&bridge, &user.customer, &["--json"]).await);
    drop(held);
    for command in running {
        assert_eq!(
            command.wait(COMMAND).await.code(),
            Some(0),
            "{}",
            command.log()
        );
    }
    bridge.wait_until_applied().await;
    eventually("late events to be removed", DEADLINE, async || {
        let places = places(&bridge, ERASED).await;
        if places.is_empty() {
            Ok(())
        } else {
            Err(places.join("\n"))
        }
    })
    .await;
}

/// Checks that the last signal of a row equals the row.
fn check_last(signals: &[&Signal], row: &Value) {
    let last = signals.last().expect("the row is signalled");
    for (field, value) in row.as_object().expect("it is made as one") {
        assert_eq!(
            &last.body[field], value,
            "`{field}` of the row and its last signal"
        );
    }
}

/// A paid session with an email, a name and metadata of `whom`.
pub(crate) fn session(purchase: &Purchase, whom: &str, changes: Value) -> Event {
    let email = format!("{whom}@example.com");
    let personal = json!({
        "customer_email": email,
        "customer_details": { "email": email, "name": whom, "phone": null, "address": null },
        "metadata": { "note": whom },
    });
    purchase.checkout_session_event(COMPLETED, purchase.created, with(personal, changes))
}

/// Another purchase of the same customer.
fn of_the_same(customer: &Purchase, created: i64) -> Purchase {
    let mut purchase = Purchase::new(created);
    purchase.customer.clone_from(&customer.customer);
    purchase
}

/// A subscription event with metadata of `whom`.
pub(crate) fn subscription(
    purchase: &Purchase,
    event_type: &str,
    whom: &str,
    second: i64,
) -> Event {
    let changes = json!({ "metadata": { "note": whom }, "description": whom });
    purchase.subscription_event(event_type, purchase.created + second, changes)
}

pub(crate) fn customer(purchase: &Purchase, event_type: &str, whom: &str) -> Event {
    let email = format!("{whom}@example.com");
    let object =
        json!({ "id": purchase.customer, "object": "customer", "email": email, "name": whom });
    Event::new(event_type, now(), object)
}

/// An event of another customer whose metadata names `mentioned`.
fn naming(purchase: &Purchase, mentioned: &str) -> Event {
    let changes = json!({ "metadata": { "note": KEPT, "recommended_by": mentioned } });
    purchase.subscription_event(UPDATED, purchase.created + 1, changes)
}

/// An event that can never be applied.
fn poison(purchase: &Purchase, whom: &str) -> bytes::Bytes {
    let mut event = subscription(purchase, UPDATED, whom, 9);
    event.value["created"] = json!("yesterday");
    event.body()
}

/// The messages and rows that contain `text`.
pub(crate) async fn places(bridge: &Bridge, text: &str) -> Vec<String> {
    let mut places = Vec::new();
    for stream in ["STRIPE_EVENTS", "STRIPE_DEAD_LETTERS", "LITESTRIPE_SIGNALS"] {
        let bodies = bridge.bodies(stream).await;
        let bodies = bodies
            .iter()
            .map(|body| format!("{stream}: {}", String::from_utf8_lossy(body)));
        places.extend(bodies.filter(|body| body.contains(text)));
    }
    let rows = bridge.database.dump().await.expect("the database answers");
    places.extend(rows.into_iter().filter(|row| row.contains(text)));
    places
}

/// The files of the broker and of SQLite that still contain `text`.
fn bytes(bridge: &Bridge, text: &str) -> Vec<String> {
    let mut left: Vec<_> = bridge
        .database
        .folder()
        .into_iter()
        .chain([bridge.broker.folder()])
        .map(Path::to_owned)
        .collect();
    let mut found = Vec::new();
    while let Some(path) = left.pop() {
        if path.is_dir() {
            let entries = std::fs::read_dir(&path).expect("it can be listed");
            left.extend(entries.map(|entry| entry.expect("it can be listed").path()));
        } else if let Ok(bytes) = std::fs::read(&path)
            && bytes
                .windows(text.len())
                .any(|window| window == text.as_bytes())
        {
            found.push(path.display().to_string());
        }
    }
    found
}

/// Returns when an id was erased.
async fn recorded(bridge: &Bridge, id: &str) -> Option<i64> {
    let row = format!("SELECT erased_at FROM litestripe_erasure WHERE stripe_id = '{id}'");
    let row = bridge
        .database
        .query(&row)
        .await
        .expect("the database answers");
    row.first()
        .map(|row| row.try_get("", "erased_at").expect("it is a second"))
}

pub(crate) async fn erase(bridge: &Bridge, customer: &str, arguments: &[&str]) -> Finished {
    run(bridge, &[&["--customer", customer], arguments].concat()).await
}

async fn command(bridge: &Bridge, arguments: &[&str]) -> Finished {
    bridge.worker().args(arguments).run(COMMAND).await
}

async fn run(bridge: &Bridge, arguments: &[&str]) -> Finished {
    bridge
        .worker()
        .arg("erase")
        .args(arguments)
        .run(COMMAND)
        .await
}

fn erased(finished: &Finished) -> Value {
    assert_eq!(finished.status.code(), Some(0), "{finished:?}");
    assert!(!finished.stderr.contains(ERASED), "{}", finished.stderr);
    serde_json::from_str(&finished.stdout).expect("it prints JSON")
}
