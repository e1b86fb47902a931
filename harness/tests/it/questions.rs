//! Questions that get no answer: how often they are asked, what is decided without one, and what an
//! operator sees of them.

use litestripe_entity::question::{ActiveModel, Column, Entity, Model};
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::Purchase;
use litestripe_harness::stripe::api::{Api, Trouble};
use sea_orm::sea_query::Expr;
use sea_orm::{ActiveValue::Set, ColumnTrait as _, EntityTrait as _, QueryFilter as _};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};

use crate::orphans::lookup::{Answer, Application, asking_the_application, buy};
use crate::orphans::{CREATED, DEADLINE, apply, now, until, until_all_questions_are_answered};
use crate::stripe_api::{
    CUSTOMERS, SESSIONS, SUBSCRIPTIONS, there_and_back, until_certain, with_key,
};

on_both_databases!(
    orphan_is_not_withheld_for_an_email_that_stripe_refuses,
    search_that_stripe_refuses_is_decided_as_without_a_key,
    refused_fetch_is_logged_once_and_shown_until_it_is_answered,
    stripe_is_left_alone_for_as_long_as_it_asks,
    one_answer_has_the_other_failing_questions_asked_again,
    another_thin_event_asks_a_failing_question_at_once,
    row_that_is_deleted_by_hand_ends_its_question,
);

const THIN: &str = "v1.customer.subscription.updated";

/// The log of a question without an answer.
const NO_ANSWER: &str = "no answer yet about";

async fn orphan_is_not_withheld_for_an_email_that_stripe_refuses(database: DatabaseKind) {
    let api = Api::start().await;
    let options = with_key(database, &api).worker("LITESTRIPE_ORPHAN_GRACE", "0s");
    let bridge = Bridge::start(options).await;
    api.refuse(CUSTOMERS, Trouble::status(403));
    let purchase = Purchase::new(now() - 60);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(&bridge, &created).await;

    let found = until(&bridge, &purchase.subscription, |_| true).await;
    assert_eq!(found.customer_email, None);
    until_all_questions_are_answered(&bridge).await;
    assert_eq!(api.requests(CUSTOMERS).len(), 1);
    bridge.check().await;
}

async fn search_that_stripe_refuses_is_decided_as_without_a_key(database: DatabaseKind) {
    let api = Api::start().await;
    let options = with_key(database, &api).worker("LITESTRIPE_ORPHAN_GRACE", "0s");
    let bridge = Bridge::start(options).await;
    api.refuse(SESSIONS, Trouble::status(403));
    let purchase = Purchase::new(now() - 60);
    let created = purchase.subscription_event(CREATED, purchase.created, json!({}));
    apply(&bridge, &created).await;
    for failed in 1..=5 {
        until_failed(&bridge, failed).await;
        assert_eq!(bridge.orphans().await, [], "after {failed} attempts");
        make_failing_due(&bridge).await;
    }

    let found = until(&bridge, &purchase.subscription, |_| true).await;
    assert_eq!(found.reason, "no_checkout_session");
    until_all_questions_are_answered(&bridge).await;
    assert_eq!(api.requests(SESSIONS).len(), 6);
    assert_eq!(
        bridge.workers[0].count_in_log(NO_ANSWER),
        1,
        "the reason was the same each time"
    );
    bridge.check().await;
}

async fn refused_fetch_is_logged_once_and_shown_until_it_is_answered(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    api.refuse(SUBSCRIPTIONS, Trouble::status(401));
    let purchase = Purchase::new(now() - 60);
    api.put_subscription(purchase.subscription());
    bridge.deliver_all(&there_and_back(&purchase, 5)).await;
    bridge.wait_until_applied().await;
    for failed in 1..=8 {
        until_failed(&bridge, failed).await;
        make_failing_due(&bridge).await;
    }
    until_failed(&bridge, 9).await;

    assert!(bridge.row(&purchase.subscription).await.uncertain);
    assert_eq!(bridge.workers[0].count_in_log(NO_ANSWER), 1);
    let (json, text) = (
        status(&bridge, &["--json"]).await,
        status(&bridge, &[]).await,
    );
    let json: Value = serde_json::from_str(&json).expect("it prints JSON");
    let shown = &json["questions"]["fetch"];
    assert_eq!(
        (&shown["open"], &shown["failing"]),
        (&json!(1), &json!(1)),
        "{json:#}"
    );
    assert!(shown["oldest_age_s"].is_u64(), "{shown}");
    let error = shown["last_error"].as_str().unwrap_or_default();
    assert!(error.contains("Stripe answered 401"), "{shown}");
    assert!(
        text.contains("questions: fetch") && text.contains(error),
        "{text}"
    );
    eventually("the metrics to show it", DEADLINE, async || {
        let page = bridge.workers[0].page("/metrics").await?.1;
        let failing = r#"litestripe_worker_failing_questions{kind="fetch"} 1"#;
        let oldest = r#"litestripe_worker_oldest_question_seconds{kind="fetch"} "#;
        if page.contains(failing) && page.contains(oldest) {
            Ok(())
        } else {
            Err(page)
        }
    })
    .await;

    api.refuse_nothing();
    make_failing_due(&bridge).await;
    until_certain(&bridge, &purchase).await;
    bridge.workers[0]
        .wait_for_log("questions of the kind fetch are answered again", DEADLINE)
        .await;
    bridge.check().await;
}

async fn stripe_is_left_alone_for_as_long_as_it_asks(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let before = OffsetDateTime::now_utc();
    let purchases = [Purchase::new(now() - 60), Purchase::new(now() - 60)];
    for (purchase, wait) in purchases.iter().zip(["200", "86400"]) {
        let planned = Trouble::status(429).header("Retry-After", wait);
        api.answer_next(SUBSCRIPTIONS, planned);
        bridge.deliver_all(&there_and_back(purchase, 5)).await;
        eventually("the call to be made", DEADLINE, async || {
            let asked = api.requests(&purchase.subscription).len();
            if asked == 1 {
                Ok(())
            } else {
                Err(format!("{asked} calls"))
            }
        })
        .await;
    }
    until_failed(&bridge, 1).await;
    for question in open(&bridge).await {
        let wait = question.due_at - before;
        let is_long = question.entity_id == purchases[1].subscription;
        let least = Duration::seconds(if is_long { 300 } else { 200 });
        assert!(least <= wait && wait < Duration::HOUR, "{question:?}");
    }
    assert_eq!(api.requests(SUBSCRIPTIONS).len(), 2);
}

async fn one_answer_has_the_other_failing_questions_asked_again(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let mut users = Vec::new();
    for number in 0..12 {
        let user = format!("user_{number}");
        buy(&bridge, &user).await;
        users.push(user);
    }
    bridge.wait_until_applied().await;
    until_failed(&bridge, 1).await;
    let application = Application::start(&bridge).await;
    for user in &users {
        application.answer(user, Answer::Known(true));
    }
    // As if they had failed very often, or many had failed.
    let later = OffsetDateTime::now_utc() + Duration::hours(20);
    let postponed = Entity::update_many()
        .set(ActiveModel {
            due_at: Set(later),
            ..ActiveModel::default()
        })
        .filter(Column::LastError.is_not_null())
        .exec(bridge.database.connection().await.expect("it answers"));
    postponed.await.expect("the database answers");
    let one = open(&bridge).await.remove(0).entity_id;
    let due = Entity::update_many()
        .col_expr(
            Column::DueAt,
            Expr::value(OffsetDateTime::now_utc() - Duration::HOUR),
        )
        .filter(Column::EntityId.eq(one))
        .exec(bridge.database.connection().await.expect("it answers"));
    due.await.expect("the database answers");

    until_all_questions_are_answered(&bridge).await;
    assert_eq!(bridge.orphans().await, []);
}

async fn another_thin_event_asks_a_failing_question_at_once(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(
        with_key(database, &api).worker("LITESTRIPE_ORPHAN_WITHOUT_SESSION", "false"),
    )
    .await;
    let purchase = Purchase::new(now() - 60);
    api.put_subscription(purchase.subscription());
    let planned = Trouble::status(500).header("Stripe-Should-Retry", "false");
    api.refuse(SUBSCRIPTIONS, planned);
    let thin = |second| purchase.subscription_notification(THIN, 1000 * second);
    bridge.notify_all(&[thin(purchase.created + 5)]).await;
    until_failed(&bridge, 1).await;
    api.refuse_nothing();
    let later = OffsetDateTime::now_utc() + Duration::hours(20);
    let postponed = Entity::update_many()
        .col_expr(Column::DueAt, Expr::value(later))
        .col_expr(
            Column::LastError,
            Expr::value("as if it had failed very often"),
        )
        .exec(bridge.database.connection().await.expect("it answers"));
    postponed.await.expect("the database answers");

    bridge.notify_all(&[thin(purchase.created + 9)]).await;
    until_all_questions_are_answered(&bridge).await;
    bridge.check().await;
    assert_eq!(
        bridge.row(&purchase.subscription).await.status.as_deref(),
        Some("active")
    );
}

async fn row_that_is_deleted_by_hand_ends_its_question(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let purchase = buy(&bridge, "user_1").await;
    bridge.wait_until_applied().await;
    until_failed(&bridge, 1).await;
    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Known(false));
    let delete = format!(
        "DELETE FROM stripe_subscription WHERE stripe_subscription_id = '{}'",
        purchase.subscription
    );
    bridge
        .database
        .query(&delete)
        .await
        .expect("the database answers");
    make_failing_due(&bridge).await;

    until_all_questions_are_answered(&bridge).await;
    assert_eq!(bridge.orphans().await, []);
}

#[tokio::test]
async fn value_that_the_lookups_own_query_cannot_read_makes_no_user_unknown() {
    let options = Options::new(DatabaseKind::Postgres).workers(0).worker(
        "LITESTRIPE_USER_LOOKUP",
        "sql:SELECT 1 FROM app_user WHERE id = $1::bigint AND is_active::boolean",
    );
    let mut bridge = Bridge::start(options).await;
    for sql in [
        "CREATE TABLE app_user (id bigint PRIMARY KEY, is_active text)",
        "INSERT INTO app_user VALUES (42, 'perhaps')",
    ] {
        bridge.database.query(sql).await.expect("it can be made");
    }
    bridge.start_worker();
    buy(&bridge, "42").await;
    bridge.wait_until_applied().await;
    until_failed(&bridge, 1).await;
    assert_eq!(bridge.orphans().await, []);

    let mended = "UPDATE app_user SET is_active = 'yes'";
    bridge
        .database
        .query(mended)
        .await
        .expect("the database answers");
    make_failing_due(&bridge).await;
    until_all_questions_are_answered(&bridge).await;
    assert_eq!(bridge.orphans().await, []);
}

async fn open(bridge: &Bridge) -> Vec<Model> {
    let db = bridge.database.connection().await.expect("it answers");
    Entity::find()
        .all(db)
        .await
        .expect("the questions can be read")
}

/// Waits until every open question failed that often in a row.
async fn until_failed(bridge: &Bridge, attempts: i32) {
    eventually("the questions to fail", DEADLINE, async || {
        let open = open(bridge).await;
        let failed =
            |question: &Model| question.last_error.is_some() && question.attempts == attempts;
        if !open.is_empty() && open.iter().all(failed) {
            Ok(())
        } else {
            Err(format!("{open:?}"))
        }
    })
    .await;
}

/// Has the failing questions asked again at once, and not in their pause.
async fn make_failing_due(bridge: &Bridge) {
    let due = "UPDATE litestripe_question SET due_at = '2000-01-01 00:00:00+00:00' WHERE last_error IS NOT NULL";
    bridge
        .database
        .query(due)
        .await
        .expect("the database answers");
}

async fn status(bridge: &Bridge, arguments: &[&str]) -> String {
    let launch = bridge.worker().arg("status").args(arguments.to_vec());
    let printed = launch.run(DEADLINE).await;
    assert!(printed.status.success(), "{printed:?}");
    printed.stdout
}
