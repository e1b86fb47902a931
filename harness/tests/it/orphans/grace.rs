//! Subscriptions that no Checkout Session claims.

use std::time::Duration;

use litestripe_harness::bridge::{
    Bridge, DatabaseKind, Options, filter_by_subscription, lock_row_sql,
};
use litestripe_harness::eventually;
use litestripe_harness::stripe::{MONTH, Purchase};
use serde_json::json;

use super::{
    COMPLETED, CREATED, DEADLINE, EMAIL, UPDATED, apply, count_signals, now, orphan, questions,
    signals_about, until, until_all_questions_are_answered,
};

on_both_databases!(
    grace_period_ends_once_with_several_workers,
    late_session_resolves_an_unclaimed_subscription,
    late_session_without_a_reference_adds_its_email_to_the_same_orphan,
    session_within_the_grace_period_makes_no_orphan,
    orphans_without_a_session_can_be_switched_off,
    old_account_makes_no_orphans,
    subscription_that_was_never_paid_creates_no_orphan,
    subscription_paid_after_its_grace_period_becomes_an_orphan_at_once,
    backlog_makes_no_orphans,
    times_at_the_end_of_the_calendar_do_not_stop_the_worker,
);

async fn grace_period_ends_once_with_several_workers(database: DatabaseKind) {
    const GRACE: Duration = Duration::from_secs(2);
    let options = Options::new(database)
        .workers(3)
        .worker("LITESTRIPE_ORPHAN_GRACE", "2s");
    let bridge = Bridge::start(options).await;
    // Stripe's clock may run ahead of ours.
    let times = [now() - MONTH, now() - 1, now(), now() + 3];
    let purchases: Vec<_> = times
        .iter()
        .cycle()
        .take(24)
        .map(|&created| Purchase::new(created))
        .collect();
    for purchase in &purchases {
        bridge
            .deliver(&purchase.subscription_event(CREATED, purchase.created, json!({})))
            .await;
    }
    bridge.wait_until_applied().await;
    until_all_questions_are_answered(&bridge).await;

    let signals = bridge.check().await;
    assert_eq!(bridge.orphans().await.len(), purchases.len());
    assert_eq!(count_signals(&signals, "orphan.created"), purchases.len());
    for purchase in &purchases {
        let orphan = orphan(&bridge, &purchase.subscription).await;
        let row = bridge.row(&purchase.subscription).await;
        let start = row.dt_created.max(row.created.expect("its event was seen"));
        assert!(
            orphan.dt_created >= start + GRACE,
            "{} is early: {}",
            orphan.dt_created,
            start
        );
        assert_eq!(orphan.reason, "no_checkout_session");
        assert_eq!(orphan.stripe_customer_id.as_ref(), Some(&purchase.customer));
        assert_eq!(
            orphan.stripe_subscription_id.as_ref(),
            Some(&purchase.subscription)
        );
        assert_eq!(
            (
                orphan.checkout_session_id,
                orphan.customer_email,
                orphan.resolved_at
            ),
            (None, None, None)
        );
        assert_eq!(
            signals_about(&signals, "orphan.created", &orphan.id).len(),
            1
        );
    }
}

async fn late_session_resolves_an_unclaimed_subscription(database: DatabaseKind) {
    let bridge = Bridge::start(
        Options::new(database)
            .workers(3)
            .worker("LITESTRIPE_ORPHAN_GRACE", "1s"),
    )
    .await;
    let purchase = Purchase::new(now() - 60);
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    let id = purchase.subscription.as_str();
    until(&bridge, id, |orphan| orphan.resolved_at.is_none()).await;

    let session = json!({ "client_reference_id": "user_1" });
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, session);
    apply(&bridge, &session).await;

    let signals = bridge.check().await;
    let resolved = orphan(&bridge, id).await;
    assert!(resolved.resolved_at.is_some());
    assert_eq!(
        resolved.resolved_client_reference_id.as_deref(),
        Some("user_1")
    );
    assert_eq!(resolved.customer_email, None);
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
    assert_eq!(
        signals_about(&signals, "orphan.resolved", id)[0].body["event"]["id"],
        session.id()
    );
    let sent = filter_by_subscription(&signals, id);
    let last = sent.last().expect("the row was signalled");
    assert_eq!(
        (&last.body["client_reference_id"], &last.body["access"]),
        (&json!("user_1"), &json!("granted"))
    );
}

async fn late_session_without_a_reference_adds_its_email_to_the_same_orphan(
    database: DatabaseKind,
) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "0s")).await;
    let purchase = Purchase::new(now() - 60);
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    let id = purchase.subscription.as_str();
    until(&bridge, id, |orphan| orphan.customer_email.is_none()).await;

    let session = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
    apply(&bridge, &session).await;
    let found = orphan(&bridge, id).await;
    assert_eq!(found.reason, "missing_client_reference_id");
    assert_eq!(found.customer_email.as_deref(), Some(EMAIL));
    assert_eq!(
        found.checkout_session_id.as_ref(),
        Some(&purchase.checkout_session)
    );
    assert_eq!(found.resolved_at, None);

    let late = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &purchase.checkout_session_event(COMPLETED, purchase.created + 30, late),
    )
    .await;
    bridge.publish(COMPLETED, session.body(), "again").await;
    let signals = bridge.check().await;
    let found = orphan(&bridge, id).await;
    assert!(found.resolved_at.is_some());
    assert_eq!(found.customer_email, None);
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
}

async fn session_within_the_grace_period_makes_no_orphan(database: DatabaseKind) {
    let bridge = Bridge::start(
        Options::new(database)
            .workers(2)
            .worker("LITESTRIPE_ORPHAN_GRACE", "1h"),
    )
    .await;
    let (before, after) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    let session = |purchase: &Purchase| {
        let user = json!({ "client_reference_id": "user_1" });
        purchase.checkout_session_event(COMPLETED, purchase.created, user)
    };
    let created =
        |purchase: &Purchase| purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(&bridge, &session(&before)).await;
    apply(&bridge, &created(&before)).await;
    apply(&bridge, &created(&after)).await;
    assert_eq!(
        questions(&bridge).await,
        [(after.subscription.clone(), "grace".to_owned())]
    );
    apply(&bridge, &session(&after)).await;

    assert_eq!(
        questions(&bridge).await,
        [],
        "no open question could create one"
    );
    assert_eq!(bridge.orphans().await, []);
}

async fn orphans_without_a_session_can_be_switched_off(database: DatabaseKind) {
    let options = Options::new(database)
        .worker("LITESTRIPE_ORPHAN_GRACE", "0s")
        .worker("LITESTRIPE_ORPHAN_WITHOUT_SESSION", "false");
    let bridge = Bridge::start(options).await;
    let (by_api, paid) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    bridge
        .deliver_all(&[
            by_api.subscription_event(CREATED, by_api.created, json!({})),
            paid.subscription_event(CREATED, paid.created, json!({})),
            paid.checkout_session_event(COMPLETED, paid.created, json!({})),
        ])
        .await;

    bridge.check().await;
    assert_eq!(
        questions(&bridge).await,
        [],
        "no open question could create one"
    );
    let ids: Vec<_> = bridge
        .orphans()
        .await
        .into_iter()
        .map(|orphan| orphan.id)
        .collect();
    assert_eq!(
        ids,
        [paid.subscription],
        "a session without a reference still makes an orphan"
    );
}

async fn old_account_makes_no_orphans(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "0s")).await;
    for _ in 0..5 {
        let purchase = Purchase::new(now() - 20 * MONTH);
        let renewed = json!({ "items": purchase.items(now() - 60, now() - 60 + MONTH) });
        let ended = json!({ "status": "canceled", "ended_at": now() - 1 });
        bridge
            .deliver(&purchase.subscription_event(UPDATED, now() - 60, renewed))
            .await;
        bridge
            .deliver(&purchase.subscription_event(
                "customer.subscription.deleted",
                now() - 1,
                ended.clone(),
            ))
            .await;
        let other = Purchase::new(now() - 20 * MONTH);
        bridge
            .deliver(&other.subscription_event("customer.subscription.deleted", now() - 1, ended))
            .await;
    }

    bridge.check().await;
    assert_eq!(bridge.rows().await.len(), 10);
    let waiting = "SELECT 1 FROM litestripe_question WHERE attempts > 0";
    eventually("the open questions to wait", DEADLINE, async || {
        let waiting = bridge.database.query(waiting).await;
        let waiting = waiting.expect("the database answers").len();
        let open = questions(&bridge).await;
        if waiting == open.len() {
            Ok(())
        } else {
            Err(format!("{waiting} of {open:?}"))
        }
    })
    .await;
    assert_eq!(
        bridge.orphans().await,
        [],
        "their sessions are older than the stream"
    );
}

async fn subscription_that_was_never_paid_creates_no_orphan(database: DatabaseKind) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "0s")).await;
    let (given_up, trial) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    let expired = json!({ "status": "incomplete_expired" });
    bridge
        .publish_all(
            [
                given_up.subscription_event(
                    CREATED,
                    given_up.created,
                    json!({ "status": "incomplete" }),
                ),
                given_up.subscription_event(UPDATED, given_up.created + 30, expired),
                trial.subscription_event(CREATED, trial.created, trial.on_trial()),
            ]
            .map(|event| {
                (
                    event.event_type().to_owned(),
                    event.body(),
                    event.id().to_owned(),
                )
            })
            .into(),
        )
        .await;

    bridge.wait_until_applied().await;
    until(&bridge, &trial.subscription, |orphan| {
        orphan.reason == "no_checkout_session"
    })
    .await;
    assert_eq!(bridge.orphans().await.len(), 1, "a trial counts as paid");
}

async fn subscription_paid_after_its_grace_period_becomes_an_orphan_at_once(
    database: DatabaseKind,
) {
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "0s")).await;
    let purchase = Purchase::new(now() - 60);
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({ "status": "incomplete" })),
    )
    .await;
    until_all_questions_are_answered(&bridge).await;
    assert_eq!(bridge.orphans().await, [], "nothing was paid");

    apply(
        &bridge,
        &purchase.subscription_event(
            UPDATED,
            purchase.created + 30,
            json!({ "status": "active" }),
        ),
    )
    .await;
    until(&bridge, &purchase.subscription, |orphan| {
        orphan.reason == "no_checkout_session"
    })
    .await;
    let signals = bridge.check().await;
    assert_eq!(count_signals(&signals, "orphan.created"), 1);
}

#[tokio::test]
async fn grace_period_does_not_wait_for_events_received_after_its_end() {
    let options = Options::new(DatabaseKind::Postgres).worker("LITESTRIPE_ORPHAN_GRACE", "3s");
    let bridge = Bridge::start(options.worker("LITESTRIPE_BATCH", "1")).await;
    let (purchase, before, after) = (
        Purchase::new(now()),
        Purchase::new(now()),
        Purchase::new(now()),
    );
    for other in [&before, &after] {
        apply(
            &bridge,
            &other.checkout_session_event(COMPLETED, now(), json!({})),
        )
        .await;
    }
    // A worker that lags: events about a locked row wait.
    let held = bridge
        .database
        .hold_lock(&lock_row_sql(&before.subscription))
        .await;
    let events = [
        purchase.subscription_event(CREATED, purchase.created, json!({})),
        before.subscription_event(CREATED, before.created, json!({})),
    ];
    bridge
        .publish_all(
            events
                .map(|event| {
                    (
                        event.event_type().to_owned(),
                        event.body(),
                        event.id().to_owned(),
                    )
                })
                .into(),
        )
        .await;
    eventually(
        "the question about the grace period to be asked",
        DEADLINE,
        async || {
            let asked = "SELECT 1 FROM litestripe_question WHERE kind = 'grace' AND attempts > 0";
            let asked = bridge
                .database
                .query(asked)
                .await
                .expect("the database answers");
            if asked.len() == 1 {
                Ok(())
            } else {
                Err(format!("{:?}", questions(&bridge).await))
            }
        },
    )
    .await;
    assert_eq!(
        bridge.orphans().await.len(),
        2,
        "an event received before the end may still name the user"
    );

    let still_held = bridge
        .database
        .hold_lock(&lock_row_sql(&after.subscription))
        .await;
    bridge
        .deliver(&after.subscription_event(CREATED, after.created, json!({})))
        .await;
    held.rollback().await.expect("the database answers");
    until(&bridge, &purchase.subscription, |orphan| {
        orphan.reason == "no_checkout_session"
    })
    .await;
    assert_eq!(
        bridge.row(&after.subscription).await.status,
        None,
        "its event still waits"
    );
    still_held.rollback().await.expect("the database answers");
    bridge.check().await;
}

async fn backlog_makes_no_orphans(database: DatabaseKind) {
    // Small batches, so that questions are asked between them.
    let options = Options::new(database)
        .workers(0)
        .worker("LITESTRIPE_ORPHAN_GRACE", "0s")
        .worker("LITESTRIPE_BATCH", "3");
    let mut bridge = Bridge::start(options).await;
    let claimed: Vec<_> = (0..20).map(|_| Purchase::new(now() - MONTH)).collect();
    let others: Vec<_> = (0..2000).map(|_| Purchase::new(now() - MONTH)).collect();
    let lost = Purchase::new(now() - MONTH);
    let created = claimed.iter().chain([&lost]);
    let created =
        created.map(|purchase| purchase.subscription_event(CREATED, purchase.created, json!({})));
    let never_paid = json!({ "status": "incomplete_expired" });
    let others = others
        .iter()
        .map(|purchase| purchase.subscription_event(UPDATED, now(), never_paid.clone()));
    let user = json!({ "client_reference_id": "user_1" });
    let sessions = claimed.iter();
    let sessions =
        sessions.map(|purchase| purchase.checkout_session_event(COMPLETED, now(), user.clone()));
    let events = created.chain(others).chain(sessions);
    let messages = events.map(|event| {
        (
            event.event_type().to_owned(),
            event.compact_body(),
            event.id().to_owned(),
        )
    });
    bridge.publish_all(messages.collect()).await;
    for _ in 0..2 {
        bridge.start_worker();
    }

    bridge.wait_until_applied().await;
    eventually("the grace period to end", DEADLINE, async || {
        let orphans = bridge.orphans().await;
        if questions(&bridge).await.is_empty() {
            Ok(())
        } else {
            Err(format!("{orphans:#?}"))
        }
    })
    .await;
    let signals = bridge.check().await;
    let ids: Vec<_> = bridge
        .orphans()
        .await
        .into_iter()
        .map(|orphan| orphan.id)
        .collect();
    assert_eq!(
        ids,
        [lost.subscription],
        "the stream already held the sessions of the others"
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 0)
    );
}

async fn times_at_the_end_of_the_calendar_do_not_stop_the_worker(database: DatabaseKind) {
    /// The last second of the year 9999, which every column can hold.
    const END: i64 = 253_402_300_799;
    let bridge =
        Bridge::start(Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1s")).await;
    let (created, uncertain, ordinary) = (
        Purchase::new(END),
        Purchase::new(now()),
        Purchase::new(now()),
    );
    let seats = |seats: &str| json!({ "metadata": { "seats": seats } });
    bridge
        .deliver_all(&[
            created.subscription_event(
                CREATED,
                now(),
                json!({ "items": created.items(END - 60, END) }),
            ),
            uncertain.subscription_event(UPDATED, END, seats("1")),
            uncertain.subscription_event(UPDATED, END, seats("2")),
            ordinary.subscription_event(CREATED, ordinary.created, json!({})),
        ])
        .await;

    eventually("the orphans of the other two", DEADLINE, async || {
        let worker = &bridge.workers[0];
        assert!(worker.is_running(), "it ended:\n{}", worker.log());
        let orphans = bridge.orphans().await;
        if [&uncertain, &ordinary].iter().all(|purchase| {
            orphans
                .iter()
                .any(|orphan| orphan.id == purchase.subscription)
        }) {
            Ok(())
        } else {
            Err(worker.log())
        }
    })
    .await;
    assert_eq!(
        (bridge.rows().await.len(), bridge.orphans().await.len()),
        (3, 2)
    );
    assert!(bridge.row(&uncertain.subscription).await.uncertain);
    assert_eq!(bridge.dead_letters().await.len(), 0);
    bridge.check().await;
}
