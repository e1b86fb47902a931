//! The worker's calls to Stripe's API: when and how often it calls, and how it uses the answers.
//! The API is a stub; everything else is real.

use std::time::Duration;

use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_harness::bridge::{Bridge, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::api::{API_KEY, Api, Trouble};
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::orphans::{
    COMPLETED, CREATED, DEADLINE, EMAIL, SUCCEEDED, UPDATED, apply, count_signals, now, orphan,
    questions, until, until_all_questions_are_answered, with,
};

on_both_databases!(
    uncertain_row_is_fetched_once_and_settled_by_a_snapshot,
    session_that_stripe_lists_claims_the_subscription,
    subscription_without_a_session_is_an_orphan_with_the_customers_email,
    row_that_became_uncertain_again_during_a_fetch_is_fetched_again,
);

pub(crate) const SUBSCRIPTIONS: &str = "/v1/subscriptions/";
pub(crate) const SESSIONS: &str = "/v1/checkout/sessions";
pub(crate) const CUSTOMERS: &str = "/v1/customers/";

async fn uncertain_row_is_fetched_once_and_settled_by_a_snapshot(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api).workers(3)).await;
    let (back_and_forth, without_previous) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    let events = [
        there_and_back(&back_and_forth, 5),
        without_previous_attributes(&without_previous, 5),
    ]
    .concat();
    for purchase in [&back_and_forth, &without_previous] {
        api.put_subscription(with(
            purchase.subscription(),
            json!({ "metadata": { "seats": "9" } }),
        ));
    }
    bridge.deliver_all(&events).await;
    bridge.wait_until_applied().await;

    for purchase in [&back_and_forth, &without_previous] {
        until_certain(&bridge, purchase).await;
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(
            row.subscription_metadata,
            json!({ "seats": "9" }),
            "the value at Stripe"
        );
        let requests = api.requests(&purchase.subscription);
        assert_eq!(requests.len(), 1, "{requests:?}");
        assert_eq!(
            requests[0].path,
            format!("{SUBSCRIPTIONS}{}", purchase.subscription)
        );
        assert_eq!(
            requests[0].headers["authorization"],
            format!("Bearer {API_KEY}")
        );
        assert!(
            requests[0].headers.contains_key("stripe-version"),
            "{requests:?}"
        );
        let snapshots = snapshots_of(&bridge, &purchase.subscription).await;
        let [snapshot] = snapshots.as_slice() else {
            panic!("one snapshot, not {snapshots:?}")
        };
        assert_eq!(row.last_event_id.as_deref(), snapshot["id"].as_str());
        assert!(
            snapshot["created"]
                .as_i64()
                .is_some_and(|created| created > purchase.created + 5 && created <= now())
        );
    }
    let signals = bridge.check().await;
    let uncertain: Vec<_> = signals
        .iter()
        .map(|signal| signal.body["uncertain"] == true)
        .collect();
    assert!(
        uncertain.contains(&true),
        "subscribers see that the row was uncertain"
    );
    assert_eq!(
        questions(&bridge)
            .await
            .iter()
            .filter(|(_, kind)| kind == "fetch")
            .count(),
        0
    );
}

#[tokio::test]
async fn uncertain_row_of_the_current_second_is_fetched_when_the_answer_can_settle_it() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let purchases: Vec<_> = (0..8).map(|_| Purchase::new(now() - 60)).collect();
    for purchase in &purchases {
        api.put_subscription(with(
            purchase.subscription(),
            json!({ "metadata": { "seats": "9" } }),
        ));
    }
    // Deliver early in the second in which the events happen, as Stripe delivers at once.
    eventually("a second to begin", DEADLINE, async || {
        let millisecond = OffsetDateTime::now_utc().millisecond();
        if millisecond < 100 {
            Ok(())
        } else {
            Err(millisecond.to_string())
        }
    })
    .await;
    let second = now();
    for purchase in &purchases {
        bridge
            .deliver_all(&there_and_back(purchase, second - purchase.created))
            .await;
    }
    for purchase in &purchases {
        until_certain(&bridge, purchase).await;
    }
    let requests = api.requests(SUBSCRIPTIONS);
    assert_eq!(requests.len(), purchases.len(), "each is asked for once");
    bridge.check().await;
}

#[tokio::test]
async fn uncertain_row_stays_uncertain_without_a_key() {
    let api = Api::start().await;
    let options = Options::new(DatabaseKind::Sqlite).worker("STRIPE_API_BASE", api.url());
    let bridge = Bridge::start(options.worker("LITESTRIPE_ORPHAN_GRACE", "4s")).await;
    let (purchase, unclaimed) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    bridge.deliver_all(&there_and_back(&purchase, 5)).await;
    bridge
        .deliver(&unclaimed.subscription_event(CREATED, unclaimed.created, json!({})))
        .await;
    // Its grace period ends after a fetch would have started.
    until(&bridge, &unclaimed.subscription, |orphan| {
        orphan.customer_email.is_none()
    })
    .await;

    assert!(bridge.row(&purchase.subscription).await.uncertain);
    assert_eq!(api.requests("").len(), 0);
    bridge.check().await;

    // An event of a later second still settles it.
    let later = with_seats(&purchase, 9, "3", Some("1"));
    apply(&bridge, &later).await;
    assert!(!bridge.row(&purchase.subscription).await.uncertain);
    bridge.check().await;
}

#[tokio::test]
async fn key_of_another_mode_is_not_used() {
    let api = Api::start().await;
    let options = Options::new(DatabaseKind::Sqlite)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", "rk_live_ofTheOtherMode")
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off");
    let bridge = Bridge::start(options.worker("LITESTRIPE_ORPHAN_GRACE", "0s")).await;
    let (uncertain, unclaimed) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    bridge.deliver_all(&there_and_back(&uncertain, 5)).await;
    bridge
        .deliver(&unclaimed.subscription_event(CREATED, unclaimed.created, json!({})))
        .await;
    until(&bridge, &unclaimed.subscription, |orphan| {
        orphan.reason == "no_checkout_session"
    })
    .await;
    eventually("the fetch to be put off", DEADLINE, async || {
        let rows = bridge
            .database
            .query("SELECT 1 FROM litestripe_question WHERE kind = 'fetch' AND attempts = 1")
            .await;
        if rows.is_ok_and(|rows| rows.len() == 1) {
            Ok(())
        } else {
            Err(format!("{:?}", questions(&bridge).await))
        }
    })
    .await;

    assert_eq!(api.requests("").len(), 0);
    assert!(bridge.row(&uncertain.subscription).await.uncertain);
}

async fn session_that_stripe_lists_claims_the_subscription(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(
        with_key(database, &api)
            .workers(2)
            .worker("LITESTRIPE_ORPHAN_GRACE", "0s"),
    )
    .await;
    let (named, unnamed) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    let user = json!({ "client_reference_id": "user_1", "metadata": { "plan": "team" } });
    api.put_checkout_session(with(named.checkout_session(), user));
    api.put_checkout_session(unnamed.checkout_session());
    for purchase in [&named, &unnamed] {
        bridge
            .deliver(&purchase.subscription_event(CREATED, purchase.created, json!({})))
            .await;
    }
    bridge.wait_until_applied().await;
    until_all_questions_are_answered(&bridge).await;

    let signals = bridge.check().await;
    let row = bridge.row(&named.subscription).await;
    assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));
    assert_eq!(
        row.checkout_session_id.as_ref(),
        Some(&named.checkout_session)
    );
    let found = orphan(&bridge, &unnamed.subscription).await;
    assert_eq!(found.reason, "missing_client_reference_id");
    assert_eq!(found.customer_email.as_deref(), Some(EMAIL));
    assert_eq!(bridge.orphans().await.len(), 1);
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 0)
    );
    assert_eq!(
        snapshots_of(&bridge, &named.checkout_session).await.len(),
        1
    );
    let asked = api.requests(SESSIONS);
    assert!(
        asked
            .iter()
            .all(|request| request.path.contains("subscription=sub_")),
        "{asked:?}"
    );
    assert_eq!(
        api.requests(&format!("subscription={}", named.subscription))
            .len(),
        1,
        "asked once"
    );
    assert_eq!(api.requests(CUSTOMERS).len(), 0, "no email was needed");
}

async fn subscription_without_a_session_is_an_orphan_with_the_customers_email(
    database: DatabaseKind,
) {
    let api = Api::start().await;
    let bridge = Bridge::start(
        with_key(database, &api)
            .workers(2)
            .worker("LITESTRIPE_ORPHAN_GRACE", "0s"),
    )
    .await;
    let (known, deleted, connected) = (
        Purchase::new(now() - 60),
        Purchase::new(now() - 60),
        Purchase::new(now() - 60),
    );
    let customer = |purchase: &Purchase| json!({ "id": purchase.customer, "object": "customer", "email": "of-the-customer@example.com", "name": "Jo Doe" });
    api.put_customer(customer(&known));
    api.put_customer(json!({ "id": deleted.customer, "object": "customer", "deleted": true }));
    api.put_customer(customer(&connected));
    for purchase in [&known, &deleted, &connected] {
        let mut event = purchase.subscription_event(CREATED, purchase.created, json!({}));
        if purchase.subscription == connected.subscription {
            event.value["account"] = json!("acct_1Connected");
        }
        bridge.deliver(&event).await;
    }
    bridge.wait_until_applied().await;
    until_all_questions_are_answered(&bridge).await;

    let signals = bridge.check().await;
    for (purchase, email) in [
        (&known, Some("of-the-customer@example.com")),
        (&deleted, None),
        (&connected, Some("of-the-customer@example.com")),
    ] {
        let found = orphan(&bridge, &purchase.subscription).await;
        assert_eq!(
            (found.reason.as_str(), found.customer_email.as_deref()),
            ("no_checkout_session", email)
        );
        let customers = api.requests(&format!("{CUSTOMERS}{}", purchase.customer));
        let sessions = api.requests(&format!("subscription={}", purchase.subscription));
        assert_eq!((sessions.len(), customers.len()), (1, 1));
        assert!(sessions[0].at <= customers[0].at, "sessions come first");
        let account =
            (purchase.subscription == connected.subscription).then_some("acct_1Connected");
        assert_eq!(sessions[0].context(), account);
        assert_eq!(customers[0].context(), account);
    }
    assert_eq!(count_signals(&signals, "orphan.created"), 3);
    let everywhere = bridge.database.dump().await.expect("the database answers");
    let with_email: Vec<_> = everywhere
        .iter()
        .filter(|line| line.contains("of-the-customer"))
        .collect();
    assert_eq!(with_email.len(), 2, "{with_email:#?}");
    for worker in &bridge.workers {
        assert_eq!(worker.count_in_log("of-the-customer"), 0);
    }
}

#[tokio::test]
async fn no_answer_from_stripe_makes_no_orphan() {
    let api = Api::start().await;
    let options = with_key(DatabaseKind::Sqlite, &api).worker("LITESTRIPE_ORPHAN_GRACE", "0s");
    let bridge = Bridge::start(options).await;
    let purchase = Purchase::new(now() - 60);
    // Stripe says that a retry at once is useless.
    api.answer_next(
        SESSIONS,
        Trouble::status(500).header("Stripe-Should-Retry", "false"),
    );
    api.answer_next(
        CUSTOMERS,
        Trouble::status(500).header("Stripe-Should-Retry", "false"),
    );
    apply(
        &bridge,
        &purchase.subscription_event(CREATED, purchase.created, json!({})),
    )
    .await;
    let log = bridge.workers[0]
        .wait_for_log("no answer yet about", DEADLINE)
        .await;
    assert!(
        log.contains("Stripe answered 500") && log.contains("req_ofTheStub"),
        "{log}"
    );
    assert_eq!(
        api.requests("").len(),
        1,
        "Stripe said that a retry is useless"
    );
    eventually("the customer to be fetched", DEADLINE, async || {
        if api.requests(CUSTOMERS).is_empty() {
            Err(format!("{:?}", api.requests("")))
        } else {
            Ok(())
        }
    })
    .await;
    assert_eq!(bridge.orphans().await, [], "its email could not be fetched");

    api.put_customer(json!({ "id": purchase.customer, "object": "customer", "email": EMAIL }));
    let found = until(&bridge, &purchase.subscription, |_| true).await;
    assert_eq!(found.customer_email.as_deref(), Some(EMAIL));
    assert_eq!(api.requests(SESSIONS).len(), 3);
    bridge.check().await;
}

#[tokio::test]
async fn request_is_retried_as_stripe_demands() {
    const RETRY_AFTER: Duration = Duration::from_secs(3);
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let purchase = Purchase::new(now() - 60);
    api.put_subscription(purchase.subscription());
    api.answer_next(
        SUBSCRIPTIONS,
        Trouble::status(429).header("Retry-After", RETRY_AFTER.as_secs().to_string()),
    );
    api.answer_next(SUBSCRIPTIONS, Trouble::status(500));
    api.answer_next(
        SUBSCRIPTIONS,
        Trouble::status(400).header("Stripe-Should-Retry", "true"),
    );
    bridge.deliver_all(&there_and_back(&purchase, 5)).await;
    until_certain(&bridge, &purchase).await;

    let requests = api.requests(SUBSCRIPTIONS);
    assert_eq!(requests.len(), 4);
    assert!(
        requests[1].at - requests[0].at >= RETRY_AFTER,
        "{requests:?}"
    );
    assert_eq!(snapshots_of(&bridge, &purchase.subscription).await.len(), 1);
    assert_eq!(
        bridge.workers[0].count_in_log("no answer yet"),
        0,
        "the retries are part of one attempt"
    );
}

#[tokio::test]
async fn unusable_answers_are_named_and_retried_if_that_can_help() {
    const RETRY_AFTER: Duration = Duration::from_secs(16);
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let backfill = async || {
        bridge
            .worker()
            .args(["backfill", "--since", "1h"])
            .run(DEADLINE)
            .await
    };
    let asked = || api.requests("/v1/events").len();

    api.answer_next(
        "/v1/events",
        Trouble::status(302).header("Location", "/v1/events?elsewhere=1"),
    );
    let redirected = backfill().await;
    assert!(
        redirected.stderr.contains("redirects to another address"),
        "{redirected:?}"
    );
    assert_eq!(
        (redirected.status.code(), asked()),
        (Some(1), 1),
        "the address in the redirect must not see the key"
    );

    api.answer_next(
        "/v1/events",
        Trouble::status(429).header("Retry-After", "61"),
    );
    let later = backfill().await;
    assert!(
        later
            .stderr
            .contains("asks to wait 61 s (request req_ofTheStub)"),
        "{later:?}"
    );
    assert_eq!((later.status.code(), asked()), (Some(1), 2));

    // First the body is shorter than its Content-Length, then Stripe asks for a longer wait than
    // our own backoff.
    api.answer_next(
        "/v1/events",
        Trouble::status(200).header("Content-Length", "1000"),
    );
    api.answer_next(
        "/v1/events",
        Trouble::status(429).header("Retry-After", RETRY_AFTER.as_secs().to_string()),
    );
    let whole = backfill().await;
    assert_eq!((whole.status.code(), asked()), (Some(0), 5), "{whole:?}");
    let requests = api.requests("/v1/events");
    assert!(
        requests[4].at - requests[3].at >= RETRY_AFTER,
        "{requests:?}"
    );
}

#[tokio::test]
async fn answer_without_a_date_suffices_if_no_time_is_needed() {
    let api = Api::start_without_date().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let backfill = bridge
        .worker()
        .args(["backfill", "--since", "1h"])
        .run(DEADLINE)
        .await;
    assert_eq!(backfill.status.code(), Some(0), "{backfill:?}");
    let reconcile = bridge.worker().arg("reconcile").run(DEADLINE).await;
    assert_eq!(reconcile.status.code(), Some(1), "{reconcile:?}");
    assert!(
        reconcile
            .stderr
            .contains("it has no Date (request req_ofTheStub)"),
        "{reconcile:?}"
    );
}

#[tokio::test]
async fn subscription_that_stripe_does_not_know_stays_uncertain() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let purchase = Purchase::new(now() - 60);
    bridge.deliver_all(&there_and_back(&purchase, 5)).await;
    let log = bridge.workers[0]
        .wait_for_log("stays uncertain", DEADLINE)
        .await;
    assert!(
        log.contains(&purchase.subscription) && log.contains("404"),
        "{log}"
    );
    until_all_questions_are_answered(&bridge).await;
    assert!(bridge.row(&purchase.subscription).await.uncertain);
    assert_eq!(api.requests("").len(), 1);
}

async fn row_that_became_uncertain_again_during_a_fetch_is_fetched_again(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = Purchase::new(now() - 60);
    api.put_subscription(with(
        purchase.subscription(),
        json!({ "metadata": { "seats": "7" } }),
    ));
    let held = api.hold(SUBSCRIPTIONS);
    bridge.deliver_all(&there_and_back(&purchase, 5)).await;
    until_requested(&api, SUBSCRIPTIONS, 1).await;
    // It changes and changes back again while Stripe's answer is in flight.
    let at = now() - purchase.created;
    bridge
        .deliver_all(&[
            with_seats(&purchase, at, "2", Some("1")),
            with_seats(&purchase, at, "1", Some("2")),
        ])
        .await;
    bridge.wait_until_applied().await;
    api.put_subscription(with(
        purchase.subscription(),
        json!({ "metadata": { "seats": "9" } }),
    ));
    drop(held);

    until_certain(&bridge, &purchase).await;
    assert_eq!(
        bridge
            .row(&purchase.subscription)
            .await
            .subscription_metadata,
        json!({ "seats": "9" })
    );
    bridge.check().await;
}

#[tokio::test]
async fn unanswered_stripe_request_does_not_delay_other_questions() {
    let api = Api::start().await;
    let options = with_key(DatabaseKind::Sqlite, &api)
        .worker("LITESTRIPE_USER_LOOKUP", "sql:SELECT 1 WHERE $1 = 'user_1'")
        .worker("LITESTRIPE_ORPHAN_GRACE", "0s");
    let bridge = Bridge::start(options).await;
    let (asked, unknown) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    let held = api.hold(SESSIONS);
    apply(
        &bridge,
        &asked.subscription_event(CREATED, asked.created, json!({})),
    )
    .await;
    until_requested(&api, SESSIONS, 1).await;
    let session = json!({ "client_reference_id": "stranger" });
    apply(
        &bridge,
        &unknown.checkout_session_event(COMPLETED, unknown.created, session),
    )
    .await;

    // Less than the 30 s after which the worker gives up the first request.
    let deadline = Duration::from_secs(20);
    eventually("the orphan of the lookup", deadline, async || match bridge
        .orphans()
        .await
        .as_slice()
    {
        [orphan] if orphan.id == unknown.subscription => Ok(()),
        others => Err(format!("{others:?}")),
    })
    .await;
    drop(held);
    until_no_question_is_open_about(&bridge, &asked).await;
}

#[tokio::test]
async fn requests_keep_to_the_budget_and_the_key_is_never_printed() {
    // The use of a permit may take a fortieth of the window, and so may the request on the network.
    const REQUESTS: usize = 50;
    const WINDOW: Duration = Duration::from_secs(8);
    let api = Api::start().await;
    let options = with_key(DatabaseKind::Sqlite, &api)
        .worker("LITESTRIPE_ORPHAN_GRACE", "0s")
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", REQUESTS.to_string())
        .worker(
            "LITESTRIPE_API_RATE_LIMIT_WINDOW",
            format!("{}s", WINDOW.as_secs()),
        )
        .worker("RUST_LOG", "trace");
    let bridge = Bridge::start(options).await;
    let purchases: Vec<_> = (0..30).map(|_| Purchase::new(now() - 60)).collect();
    for purchase in &purchases {
        api.put_customer(json!({ "id": purchase.customer, "object": "customer", "email": EMAIL }));
    }
    let events = purchases
        .iter()
        .map(|purchase| purchase.subscription_event(CREATED, purchase.created, json!({})));
    bridge.deliver_all(&events.collect::<Vec<_>>()).await;
    bridge.wait_until_applied().await;
    until_all_questions_are_answered(&bridge).await;

    let requests = api.requests("");
    assert_eq!(requests.len(), 2 * purchases.len());
    // Checks a window that is one second shorter, because a busy machine may stall a request for
    // longer.
    for (first, after) in requests.iter().zip(requests.iter().skip(REQUESTS)) {
        assert!(
            after.at - first.at >= WINDOW - Duration::from_secs(1),
            "{REQUESTS} and one more in {:?}",
            after.at - first.at
        );
    }
    let log = bridge.workers[0].log();
    assert!(log.contains("TRACE"), "the log is at level trace");
    assert!(
        !log.contains(API_KEY),
        "{:?}",
        log.lines().find(|line| line.contains(API_KEY))
    );
    let secret = API_KEY.trim_start_matches("sk_test_");
    assert!(!log.contains(secret) && !log.contains(EMAIL));
    for command in [vec!["status"], vec!["orphans", "list"], vec!["--help"]] {
        let printed = bridge.worker().args(command.clone()).run(DEADLINE).await;
        assert!(
            !format!("{}{}", printed.stdout, printed.stderr).contains(secret),
            "{command:?}"
        );
    }
    let broken = bridge
        .worker()
        .env("STRIPE_SECRET_KEY", format!("{secret} with blanks"))
        .run(DEADLINE)
        .await;
    assert_eq!(broken.status.code(), Some(2), "{}", broken.stderr);
    assert!(
        broken.stderr.contains("STRIPE_SECRET_KEY") && !broken.stderr.contains(secret),
        "{}",
        broken.stderr
    );
}

/// Options for workers with a key for the stub.
pub(crate) fn with_key(database: DatabaseKind, api: &Api) -> Options {
    Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        // `backfill` tests those requests.
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000")
}

/// A subscription that changes and changes back within a second: the events do not show which was
/// last.
pub(crate) fn there_and_back(purchase: &Purchase, at: i64) -> Vec<Event> {
    vec![
        purchase.checkout_session_event(
            SUCCEEDED,
            purchase.created,
            json!({ "client_reference_id": "user_1", "metadata": {} }),
        ),
        with_seats(purchase, at, "2", Some("1")),
        with_seats(purchase, at, "1", Some("2")),
    ]
}

/// Two states within a second, both without previous attributes.
fn without_previous_attributes(purchase: &Purchase, at: i64) -> Vec<Event> {
    vec![
        with_seats(purchase, at, "1", None),
        with_seats(purchase, at, "2", None),
    ]
}

/// An update to `seats`, `at` seconds after the purchase, from `before`.
fn with_seats(purchase: &Purchase, at: i64, seats: &str, before: Option<&str>) -> Event {
    let metadata = json!({ "metadata": { "seats": seats } });
    let event = purchase.subscription_event(UPDATED, purchase.created + at, metadata);
    match before {
        Some(before) => event.with_previous_attributes(json!({ "metadata": { "seats": before } })),
        None => event,
    }
}

pub(crate) async fn until_certain(bridge: &Bridge, purchase: &Purchase) {
    eventually("the row to be certain", DEADLINE, async || {
        bridge.wait_until_applied().await;
        let row = bridge.row(&purchase.subscription).await;
        let settled = !row.uncertain && row.status.is_some();
        if settled {
            Ok(())
        } else {
            Err(format!("{row:?}, asked {:?}", questions(bridge).await))
        }
    })
    .await;
}

async fn until_requested(api: &Api, path: &str, count: usize) {
    eventually("a request to Stripe", DEADLINE, async || {
        let requests = api.requests(path).len();
        if requests >= count {
            Ok(())
        } else {
            Err(format!("{requests} requests"))
        }
    })
    .await;
}

async fn until_no_question_is_open_about(bridge: &Bridge, purchase: &Purchase) {
    eventually("its questions to be answered", DEADLINE, async || {
        let questions = questions(bridge).await;
        if questions.iter().any(|(id, _)| *id == purchase.subscription) {
            Err(format!("{questions:?}"))
        } else {
            Ok(())
        }
    })
    .await;
}

/// The stored snapshots of an object.
async fn snapshots_of(bridge: &Bridge, id: &str) -> Vec<Value> {
    let stream = bridge.stream(EVENTS_STREAM).await;
    let state = &stream.cached_info().state;
    let mut found = Vec::new();
    for sequence in state.first_sequence..=state.last_sequence {
        let message = stream
            .get_raw_message(sequence)
            .await
            .expect("nothing was deleted");
        let event: Value = serde_json::from_slice(&message.payload).expect("an event is JSON");
        if event["type"] == "litestripe.snapshot" && event["data"]["object"]["id"] == id {
            assert_eq!(
                message.subject.as_str(),
                "stripe.events.litestripe.snapshot"
            );
            found.push(event);
        }
    }
    found
}
