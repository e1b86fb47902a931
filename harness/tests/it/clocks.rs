//! Clocks that are wrong or jump, by hours and more. The workers are shown another clock than the
//! broker and the database have.

use litestripe_entity::{question, replay};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::clock::Clock;
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use sea_orm::sea_query::Expr;
use sea_orm::{ActiveValue::Set, EntityTrait as _};
use serde_json::json;
use time::macros::datetime;
use time::{Duration, OffsetDateTime};

use crate::orphans::lookup::{Answer, Application, asking_the_application, buy};
use crate::orphans::{
    COMPLETED, CREATED, DEADLINE, apply, now, questions, until, until_all_questions_are_answered,
    until_retried,
};

on_both_databases!(
    no_orphan_waits_for_a_clock_that_was_ahead,
    no_grace_period_ends_early_by_a_clock_that_is_ahead,
    email_is_not_erased_early_by_a_clock_that_is_ahead,
    events_are_applied_whatever_year_the_workers_clock_shows,
    replay_whose_last_sign_of_life_is_in_the_future_does_not_run,
);

const HOURS: i64 = 5 * 60 * 60;

async fn no_orphan_waits_for_a_clock_that_was_ahead(database: DatabaseKind) {
    let clock = Clock::new();
    clock.set_ahead(HOURS);
    let options = Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "2s");
    let bridge = Bridge::start(options.clock(&clock)).await;
    let purchase = Purchase::new(now() - 60);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(&bridge, &created).await;
    let row = bridge.row(&purchase.subscription).await;
    assert!(
        row.dt_created > OffsetDateTime::now_utc() + Duration::HOUR,
        "the worker's clock is ahead: {}",
        row.dt_created
    );
    bridge.workers[0]
        .wait_for_log("the broker's clock is 1", DEADLINE)
        .await;
    let status = bridge.worker().arg("status").run(DEADLINE).await;
    assert!(
        status.stdout.contains("the broker's clock is 1"),
        "{status:?}"
    );
    clock.set_ahead(0);
    until(&bridge, &purchase.subscription, |_| true).await;
    bridge.check().await;
}

async fn no_grace_period_ends_early_by_a_clock_that_is_ahead(database: DatabaseKind) {
    let clock = Clock::new();
    let options = Options::new(database).worker("LITESTRIPE_ORPHAN_GRACE", "1h");
    let bridge = Bridge::start(options.clock(&clock)).await;
    let purchase = Purchase::new(now() - 60);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(&bridge, &created).await;
    clock.set_ahead(HOURS);
    // PostgreSQL's own clock did not jump.
    crate::orphans::make_due(&bridge).await;
    until_retried(&bridge).await;
    assert_eq!(bridge.orphans().await, []);
    assert_eq!(
        questions(&bridge).await,
        [(purchase.subscription.clone(), "grace".to_owned())]
    );
}

async fn email_is_not_erased_early_by_a_clock_that_is_ahead(database: DatabaseKind) {
    const AGE: std::time::Duration = std::time::Duration::from_secs(12);
    let clock = Clock::new();
    let options = Options::new(database)
        .worker("LITESTRIPE_ORPHAN_EMAIL_MAX_AGE", "12s")
        .clock(&clock);
    let bridge = Bridge::start(options).await;
    let delivered = std::time::Instant::now();
    let purchase = Purchase::new(now() - 60);
    let session = purchase.checkout_session_event(COMPLETED, purchase.created, json!({}));
    apply(&bridge, &session).await;
    let found = until(&bridge, &purchase.subscription, |_| true).await;
    assert!(found.customer_email.is_some(), "{found:?}");
    clock.set_ahead(HOURS);

    until(&bridge, &purchase.subscription, |orphan| {
        orphan.customer_email.is_none()
    })
    .await;
    assert!(delivered.elapsed() >= AGE, "{:?}", delivered.elapsed());
}

async fn events_are_applied_whatever_year_the_workers_clock_shows(database: DatabaseKind) {
    for year in [
        datetime!(1970-01-02 00:00 UTC),
        // A year later, hyper cannot write the date of an answer.
        datetime!(9998-12-30 00:00 UTC),
    ] {
        let clock = Clock::new();
        clock.set_ahead((year - OffsetDateTime::now_utc()).whole_seconds());
        let options = asking_the_application(database).worker("LITESTRIPE_ORPHAN_GRACE", "1s");
        let bridge = Bridge::start(options.clock(&clock)).await;
        let application = Application::start(&bridge).await;
        application.answer("user_1", Answer::Known(true));
        let bought = buy(&bridge, "user_1").await;
        let unclaimed = Purchase::new(now() - 60);
        for purchase in [&bought, &unclaimed] {
            let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
            bridge.deliver(&created).await;
        }
        bridge.check().await;
        assert_eq!(bridge.rows().await.len(), 2);
        application.until_asked("user_1", 1).await;
        assert_eq!(bridge.dead_letters().await.len(), 0, "{year}");
        assert_eq!(bridge.workers[0].count_in_log("panicked"), 0, "{year}");

        clock.set_ahead(0);
        until(&bridge, &unclaimed.subscription, |_| true).await;
        until_all_questions_are_answered(&bridge).await;
        assert_eq!(bridge.orphans().await.len(), 1, "{year}");
        bridge.check().await;
    }
}

async fn replay_whose_last_sign_of_life_is_in_the_future_does_not_run(database: DatabaseKind) {
    let bridge = Bridge::start(Options::new(database)).await;
    let purchase = Purchase::new(now() - 60);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(&bridge, &created).await;
    let hours = OffsetDateTime::now_utc() + Duration::seconds(HOURS);
    let died = replay::ActiveModel {
        name: Set(String::new()),
        signals: Set("none".to_owned()),
        first_sequence: Set(1),
        last_sequence: Set(1),
        stream_created: Set(None),
        event_types: Set(String::new()),
        stripe_subscription_id: Set(None),
        dt_started: Set(hours),
        dt_heartbeat: Set(hours),
        dt_finished: Set(None),
    };
    let db = bridge.database.connection().await.expect("it answers");
    let inserted = replay::Entity::insert(died)
        .exec_without_returning(db)
        .await;
    inserted.expect("the replay can be recorded");
    let replay = bridge.worker().args(["replay", "--signals", "none"]);
    let replayed = replay.run(DEADLINE).await;
    assert!(replayed.status.success(), "{replayed:?}");
}

/// Workers on several hosts go by the database's clock, so that none asks too early what another
/// postponed.
#[tokio::test]
async fn worker_whose_clock_is_ahead_asks_no_question_too_early() {
    let clock = Clock::new();
    clock.set_ahead(HOURS);
    let options = asking_the_application(DatabaseKind::Postgres).clock(&clock);
    let bridge = Bridge::start(options).await;
    buy(&bridge, "user_1").await;
    bridge.wait_until_applied().await;
    let failed = async || {
        let db = bridge.database.connection().await.expect("it answers");
        let open = question::Entity::find().all(db).await;
        open.expect("it can be read")
            .iter()
            .all(|open| open.last_error.is_some())
    };
    eventually("the question to fail", DEADLINE, async || {
        if failed().await {
            Ok(())
        } else {
            Err("not yet".to_owned())
        }
    })
    .await;
    let half_an_hour = OffsetDateTime::now_utc() + Duration::minutes(30);
    let db = bridge.database.connection().await.expect("it answers");
    let postponed = question::Entity::update_many()
        .col_expr(question::Column::DueAt, Expr::value(half_an_hour))
        .exec(db);
    postponed.await.expect("the database answers");
    let application = Application::start(&bridge).await;
    for user in ["user_1", "user_2"] {
        application.answer(user, Answer::Known(false));
    }
    let second = buy(&bridge, "user_2").await;
    until(&bridge, &second.subscription, |_| true).await;
    assert_eq!(application.asked("user_1"), 0, "it is due in half an hour");
}
