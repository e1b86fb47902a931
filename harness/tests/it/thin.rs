//! Thin events: notification in, fetch from Stripe, row and signal out. Stripe's API is a stub;
//! everything else is real.

use std::time::Instant;

use futures_util::future::join_all;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_entity::stripe_subscription;
use litestripe_harness::bridge::{
    Bridge, Database, DatabaseKind, Node, Options, SECRET, filter_by_subscription,
};
use litestripe_harness::eventually;
use litestripe_harness::stripe::api::{API_KEY, Api};
use litestripe_harness::stripe::{Delivery, Event, Notification, Purchase};
use sea_orm::ConnectionTrait as _;
use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::erase::erase;
use crate::orphans::rebuild::rebuildable;
use crate::orphans::{COMPLETED, CREATED, DEADLINE, UPDATED, now, questions, with};

on_both_databases!(
    thin_events_lead_to_the_row_and_its_signals,
    burst_costs_about_one_request_for_each_subscription,
    change_during_a_fetch_is_fetched_after_it,
    later_of_two_fetches_in_one_second_counts,
    change_in_a_stream_made_anew_during_a_fetch_is_fetched_after_it,
    later_of_two_fetches_counts_although_the_stream_was_made_anew,
    thin_events_wait_visibly_for_a_key_of_their_mode,
    snapshot_and_thin_destinations_lead_to_the_row_of_either,
    change_without_its_snapshot_event_is_not_hidden_by_the_one_before,
    replay_makes_no_calls,
    fetch_of_a_killed_worker_is_made_by_the_next,
    backfill_stores_nothing_that_thin_events_have_brought,
    erasure_removes_the_thin_events_of_the_customer,
);

const DELETED: &str = "customer.subscription.deleted";
const SUBSCRIPTIONS: &str = "/v1/subscriptions/";
const SESSIONS: &str = "/v1/checkout/sessions/";
const ACCOUNT: &str = "acct_1OfAnotherShop";
/// The signing secret of a second destination.
const THIN_SECRET: &str = "whsec_ofTheThinDestination";

async fn thin_events_lead_to_the_row_and_its_signals(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api).workers(2)).await;
    let purchase = put_purchase(&api);
    bridge
        .notify_all(&[
            about_session(&purchase, COMPLETED),
            about(&purchase, CREATED),
        ])
        .await;
    settle(&bridge).await;

    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.status.as_deref(), Some("active"));
    assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));
    assert_eq!(
        row.checkout_session_id,
        Some(purchase.checkout_session.clone())
    );
    assert_eq!(row.stripe_customer_id, Some(purchase.customer.clone()));
    assert_eq!(row.stripe_account_id, None);
    assert_eq!(
        row.metadata,
        json!({
            "checkout.session.completed.plan": "team",
            "customer.subscription.created.workspace": "acme",
        }),
        "the types are those of snapshot events"
    );
    assert_eq!(row.subscription_metadata, json!({ "workspace": "acme" }));
    assert!(!row.uncertain);
    let signals = bridge.check().await;
    assert!(!filter_by_subscription(&signals, &purchase.subscription).is_empty());
    assert_eq!(bridge.orphans().await, []);
    for path in [SUBSCRIPTIONS, SESSIONS] {
        let requests = api.requests(path);
        assert_eq!(requests.len(), 1, "{requests:?}");
        assert_eq!(requests[0].context(), None);
    }
    assert_eq!(
        bridge.stored_events().await,
        4,
        "two thin events and two fetched objects"
    );
}

#[tokio::test]
async fn each_finer_type_means_that_the_subscription_changed() {
    // The last one does not exist yet.
    const TYPES: [&str; 7] = [
        "active",
        "past_due",
        "cancel_at_changed",
        "item_price_changed",
        "item_quantity_changed",
        "default_payment_method_changed",
        "named_in_2027",
    ];
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let purchases = TYPES.map(|_| put_purchase(&api));
    for (name, purchase) in TYPES.iter().zip(&purchases) {
        let event_type = format!("customer.subscription.{name}");
        bridge.notify_all(&[about(purchase, &event_type)]).await;
    }
    settle(&bridge).await;

    for (name, purchase) in TYPES.iter().zip(&purchases) {
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(row.status.as_deref(), Some("active"), "{name}");
        assert_eq!(row.subscription_metadata, json!({ "workspace": "acme" }));
        assert_eq!(row.metadata, json!({}), "{name} has no snapshot event");
    }
    bridge.check().await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
}

async fn burst_costs_about_one_request_for_each_subscription(database: DatabaseKind) {
    const COUNT: usize = 50;
    const EACH: usize = 20;
    let api = Api::start().await;
    // Without workers at first: how fast this machine delivers the burst must not matter.
    let mut bridge = Bridge::start(with_key(database, &api).workers(0)).await;
    let purchases: Vec<_> = (0..COUNT).map(|_| put_purchase(&api)).collect();
    let bursts: Vec<Vec<_>> = purchases
        .iter()
        .map(|purchase| (0..EACH).map(|_| about(purchase, UPDATED)).collect())
        .collect();
    join_all(bursts.iter().map(|burst| bridge.notify_all(burst))).await;
    for _ in 0..2 {
        bridge.start_worker();
    }
    settle(&bridge).await;

    let requests = api.requests("").len();
    assert!(
        (COUNT..=2 * COUNT).contains(&requests),
        "{requests} requests"
    );
    eprintln!("{requests} requests for {} thin events", COUNT * EACH);
    assert_eq!(bridge.rows().await.len(), COUNT);
    bridge.check().await;
}

/// A fetch that began before a change was announced may lack it, and must not overtake the next
/// one.
async fn change_during_a_fetch_is_fetched_after_it(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api).workers(2)).await;
    let (purchase, other) = (put_purchase(&api), put_purchase(&api));
    let path = format!("{SUBSCRIPTIONS}{}", purchase.subscription);
    let held = api.hold(path.leak());
    bridge.notify_all(&[about(&purchase, CREATED)]).await;
    until_requested(&api, &purchase.subscription, 1).await;

    put(&api, &purchase, "past_due");
    bridge.notify_all(&[about(&purchase, UPDATED)]).await;
    bridge.wait_until_applied().await;
    // A thin event that came later is answered: this one would have been as well.
    bridge.notify_all(&[about(&other, CREATED)]).await;
    until_requested(&api, &other.subscription, 1).await;
    bridge.wait_until_applied().await;
    let released = Instant::now();
    drop(held);
    settle(&bridge).await;

    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.status.as_deref(), Some("past_due"));
    let requests = api.requests(&purchase.subscription);
    assert_eq!(requests.len(), 2, "{requests:?}");
    assert!(requests[1].at >= released, "the fetches overlap");
    bridge.check().await;
}

async fn later_of_two_fetches_in_one_second_counts(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = put_purchase(&api);
    api.stop_clock(now());
    for status in ["active", "past_due", "active", "unpaid"] {
        put(&api, &purchase, status);
        bridge.notify_all(&[about(&purchase, UPDATED)]).await;
        settle(&bridge).await;
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(row.status.as_deref(), Some(status));
        assert!(!row.uncertain);
    }
    assert_eq!(api.requests(SUBSCRIPTIONS).len(), 4);
    bridge.check().await;
}

/// The second thin event has a lower sequence than the first: the stream was made anew.
async fn change_in_a_stream_made_anew_during_a_fetch_is_fetched_after_it(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = put_purchase(&api);
    fill(&bridge).await;
    let path = format!("{SUBSCRIPTIONS}{}", purchase.subscription);
    let held = api.hold(path.leak());
    bridge.notify_all(&[about(&purchase, CREATED)]).await;
    until_requested(&api, &purchase.subscription, 1).await;

    make_stream_anew(&bridge).await;
    put(&api, &purchase, "past_due");
    bridge.notify_all(&[about(&purchase, UPDATED)]).await;
    bridge.wait_until_applied().await;
    drop(held);
    settle(&bridge).await;

    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.status.as_deref(), Some("past_due"));
    let requests = api.requests(&purchase.subscription);
    assert_eq!(requests.len(), 2, "{requests:?}");
}

/// Within one second only the mark orders fetches.
async fn later_of_two_fetches_counts_although_the_stream_was_made_anew(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = put_purchase(&api);
    api.stop_clock(now());
    fill(&bridge).await;
    bridge.notify_all(&[about(&purchase, CREATED)]).await;
    settle(&bridge).await;
    make_stream_anew(&bridge).await;
    put(&api, &purchase, "past_due");
    bridge.notify_all(&[about(&purchase, UPDATED)]).await;
    settle(&bridge).await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.status.as_deref(), Some("past_due"));
    assert!(!row.uncertain);
}

/// Applies some events, so that the stream's sequences are above those of a new stream.
async fn fill(bridge: &Bridge) {
    for _ in 0..5 {
        let event = Purchase::new(now()).subscription_event(CREATED, now(), json!({}));
        bridge.deliver(&event).await;
    }
    bridge.wait_until_applied().await;
}

async fn make_stream_anew(bridge: &Bridge) {
    let jetstream = bridge.jetstream().await;
    let deleted = jetstream.delete_stream(EVENTS_STREAM).await;
    deleted.expect("a stream can be deleted");
    eventually("the stream to be made anew", DEADLINE, async || {
        let stream = jetstream.get_stream(EVENTS_STREAM).await;
        stream.map(drop).map_err(|error| error.to_string())
    })
    .await;
}

async fn thin_events_wait_visibly_for_a_key_of_their_mode(database: DatabaseKind) {
    let api = Api::start().await;
    let options = Options::new(database).worker("STRIPE_API_BASE", api.url());
    let mut bridge = Bridge::start(options.worker("LITESTRIPE_BACKFILL_INTERVAL", "off")).await;
    let purchases: Vec<_> = (0..3).map(|_| put_purchase(&api)).collect();
    for purchase in &purchases {
        bridge
            .notify_all(&[about(purchase, CREATED), about(purchase, UPDATED)])
            .await;
    }
    bridge.wait_until_applied().await;

    until_waiting(&bridge, 3).await;
    let log = bridge.workers[0]
        .wait_for_log("wait for STRIPE_SECRET_KEY", DEADLINE)
        .await;
    assert!(log.contains("3 subscriptions"), "{log}");

    restart_with_key(&mut bridge, "rk_live_ofTheOtherMode").await;
    until_waiting(&bridge, 3).await;
    assert_eq!(api.requests("").len(), 0);
    assert_eq!(bridge.rows().await, []);

    restart_with_key(&mut bridge, API_KEY).await;
    settle(&bridge).await;
    until_waiting(&bridge, 0).await;
    for purchase in &purchases {
        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(row.status.as_deref(), Some("active"));
    }
    assert_eq!(api.requests(SUBSCRIPTIONS).len(), 3);
    bridge.check().await;
}

#[tokio::test]
async fn object_that_no_longer_exists_settles_its_thin_events_with_one_warning() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let gone = Purchase::new(now() - 60);
    bridge
        .notify_all(&[about(&gone, CREATED), about(&gone, DELETED)])
        .await;
    settle(&bridge).await;

    assert_eq!(bridge.rows().await, []);
    assert_eq!(bridge.dead_letters().await.len(), 0);
    assert_eq!(api.requests(SUBSCRIPTIONS).len(), 1);
    let worker = &bridge.workers[0];
    assert_eq!(
        worker.count_in_log("does not exist at Stripe"),
        1,
        "{}",
        worker.log()
    );
    let not_found = r#"litestripe_worker_stripe_requests_total{outcome="not_found"}"#;
    assert_eq!(metric(worker, not_found).await, Some(1.0));
}

#[tokio::test]
async fn object_of_another_account_is_fetched_in_its_context() {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(DatabaseKind::Sqlite, &api)).await;
    let path = format!("org_1OfMany/{ACCOUNT}");
    for context in [ACCOUNT, &path] {
        let purchase = put_purchase(&api);
        api.assign(&purchase.subscription, ACCOUNT);
        api.assign(&purchase.checkout_session, ACCOUNT);
        bridge
            .notify_all(&[
                about_session(&purchase, COMPLETED).in_context(context),
                about(&purchase, CREATED).in_context(context),
            ])
            .await;
        settle(&bridge).await;

        let row = bridge.row(&purchase.subscription).await;
        assert_eq!(row.stripe_account_id.as_deref(), Some(ACCOUNT));
        assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));
        for id in [&purchase.subscription, &purchase.checkout_session] {
            let requests = api.requests(id);
            assert_eq!(requests.len(), 1, "{requests:?}");
            assert_eq!(requests[0].context(), Some(context));
        }
    }
    bridge.check().await;
}

#[tokio::test]
async fn thin_types_that_the_settings_leave_out_are_ignored_and_counted() {
    let types = "customer.subscription.*,v1.customer.subscription.updated,v1.checkout.*";
    let options = Options::new(DatabaseKind::Sqlite).ingress("LITESTRIPE_EVENT_TYPES", types);
    let bridge = Bridge::start(options).await;
    let purchase = Purchase::new(now() - 60);
    bridge
        .notify_all(&[
            about(&purchase, "customer.subscription.active"),
            about(&purchase, "customer.updated"),
        ])
        .await;
    assert_eq!(bridge.stored_events().await, 0);
    bridge
        .notify_all(&[
            about(&purchase, UPDATED),
            about_session(&purchase, "checkout.session.expired"),
        ])
        .await;
    bridge
        .deliver(&purchase.subscription_event(CREATED, purchase.created, json!({})))
        .await;

    assert_eq!(bridge.stored_events().await, 3);
    for (outcome, count) in [("thin_ignored", 2.0), ("ignored", 0.0), ("stored", 3.0)] {
        let name = format!(r#"litestripe_ingress_deliveries_total{{outcome="{outcome}"}}"#);
        assert_eq!(
            metric(bridge.ingress(), &name).await,
            Some(count),
            "{outcome}"
        );
    }
}

/// Which destinations an account has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Destinations {
    Snapshot,
    Thin,
    /// The snapshot event arrives first.
    SnapshotThenThin,
    ThenSnapshot,
}

async fn snapshot_and_thin_destinations_lead_to_the_row_of_either(database: DatabaseKind) {
    use Destinations::{Snapshot, SnapshotThenThin, ThenSnapshot, Thin};
    let purchase = Purchase::new(now() - 600);
    let snapshot = live(database, &purchase, Snapshot).await;
    assert_eq!(snapshot.1, 4, "each step is a change");
    for destinations in [Thin, SnapshotThenThin, ThenSnapshot] {
        let (row, signals) = live(database, &purchase, destinations).await;
        assert_eq!(row, snapshot.0, "{destinations:?}");
        assert_eq!(signals, snapshot.1, "{destinations:?}");
    }
}

/// Lets a subscription live with these destinations. Returns its row, without what says how it came
/// about, and the number of its signals.
async fn live(
    database: DatabaseKind,
    purchase: &Purchase,
    destinations: Destinations,
) -> (stripe_subscription::Model, usize) {
    let api = Api::start().await;
    let secrets = format!("{SECRET},{THIN_SECRET}");
    let options = with_key(database, &api).ingress("STRIPE_WEBHOOK_SECRET", secrets);
    let bridge = Bridge::start(options).await;
    for step in life(purchase) {
        step.put(&api);
        // Stripe's clock is that of the story: a fetch holds no change that is still to come.
        api.stop_clock(step.event.created() + 4);
        let snapshot = Delivery::new(step.event.body(), SECRET);
        let thin = Delivery::new(step.notification(purchase).body(), THIN_SECRET);
        let deliveries = match destinations {
            Destinations::Snapshot => vec![snapshot],
            Destinations::Thin => vec![thin],
            Destinations::SnapshotThenThin => vec![snapshot, thin],
            Destinations::ThenSnapshot => vec![thin, snapshot],
        };
        for delivery in deliveries {
            assert_eq!(bridge.post(&delivery).await.status(), 200);
            settle(&bridge).await;
        }
    }
    let signals = bridge.check().await;
    let count = filter_by_subscription(&signals, &purchase.subscription).len();
    let row = rebuildable(bridge.rows().await).remove(0);
    let row = stripe_subscription::Model {
        last_event_id: None,
        last_event_created: None,
        merge_state: String::new(),
        last_sent: None,
        ..row
    };
    (row, count)
}

/// A change at Stripe, with the event that reports it.
struct Step {
    event: Event,
}

impl Step {
    /// Makes the changed object the one that Stripe's API returns.
    fn put(&self, api: &Api) {
        let object = self.event.value["data"]["object"].clone();
        if object["object"] == "subscription" {
            api.put_subscription(object);
        } else {
            api.put_checkout_session(object);
        }
    }

    fn notification(&self, purchase: &Purchase) -> Notification {
        let (name, created_ms) = (self.event.event_type(), self.event.created() * 1000 + 321);
        if name.starts_with("checkout.") {
            purchase.checkout_session_notification(&format!("v1.{name}"), created_ms)
        } else {
            purchase.subscription_notification(&format!("v1.{name}"), created_ms)
        }
    }
}

/// A purchase, a change of the seats and the end.
fn life(purchase: &Purchase) -> Vec<Step> {
    let at = purchase.created;
    let session = json!({ "client_reference_id": "user_1", "metadata": { "plan": "team" } });
    let seats = |seats: &str| json!({ "metadata": { "seats": seats } });
    let ended = with(
        seats("2"),
        json!({ "status": "canceled", "canceled_at": at + 120, "ended_at": at + 120 }),
    );
    let events = [
        purchase.checkout_session_event(COMPLETED, at, session),
        purchase.subscription_event(CREATED, at, seats("1")),
        purchase
            .subscription_event(UPDATED, at + 60, seats("2"))
            .with_previous_attributes(seats("1")),
        purchase.subscription_event(DELETED, at + 120, ended),
    ];
    events.map(|event| Step { event }).into()
}

/// The snapshot destination was switched off between two changes: what is fetched for the second
/// holds it, but not surely every change of the first one's second.
async fn change_without_its_snapshot_event_is_not_hidden_by_the_one_before(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = put_purchase(&api);
    let created = now();
    api.stop_clock(created);
    bridge
        .deliver(&purchase.subscription_event(CREATED, created, json!({})))
        .await;
    put(&api, &purchase, "past_due");
    bridge.notify_all(&[about(&purchase, UPDATED)]).await;
    settle(&bridge).await;
    assert!(bridge.row(&purchase.subscription).await.uncertain);
    assert_eq!(api.requests(SUBSCRIPTIONS).len(), 1);

    api.stop_clock(created + 60);
    eventually("the row to be certain", DEADLINE, async || {
        bridge.wait_until_applied().await;
        let row = bridge.row(&purchase.subscription).await;
        if row.uncertain {
            Err(format!("{row:?}"))
        } else {
            Ok(())
        }
    })
    .await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.status.as_deref(), Some("past_due"));
    bridge.check().await;
}

async fn replay_makes_no_calls(database: DatabaseKind) {
    let api = Api::start().await;
    let mut bridge = Bridge::start(with_key(database, &api)).await;
    for purchase in [(); 3].map(|()| Purchase::new(now() - 600)) {
        for step in life(&purchase) {
            step.put(&api);
            bridge.notify_all(&[step.notification(&purchase)]).await;
            settle(&bridge).await;
        }
    }
    let rows = bridge.rows().await;
    for worker in bridge.workers.drain(..) {
        worker.stop().await;
    }
    drop(api);
    bridge.database = Database::prepare(database);
    bridge.database.resume().await;

    let replayed = bridge.worker().arg("replay").run(DEADLINE).await;

    assert!(replayed.status.success(), "{replayed:?}");
    assert_eq!(rebuildable(bridge.rows().await), rebuildable(rows));
    let left = questions(&bridge).await;
    assert!(
        left.iter().all(|(_, kind)| kind != "notification"),
        "the stream has the answers: {left:?}"
    );
}

async fn fetch_of_a_killed_worker_is_made_by_the_next(database: DatabaseKind) {
    let api = Api::start().await;
    let mut bridge = Bridge::start(with_key(database, &api)).await;
    let purchase = put_purchase(&api);
    let held = api.hold(SUBSCRIPTIONS);
    bridge.notify_all(&[about(&purchase, CREATED)]).await;
    until_requested(&api, SUBSCRIPTIONS, 1).await;
    bridge.workers.remove(0).kill().await;
    drop(held);
    assert_eq!(bridge.stored_events().await, 1, "nothing was fetched");
    // The dead worker's lease lasts for minutes.
    let end_lease = "UPDATE litestripe_question SET due_at = ask_by";
    let connection = bridge.database.connection().await;
    let ended = connection
        .expect("the database answers")
        .execute_unprepared(end_lease)
        .await;
    assert_eq!(ended.expect("it can be written").rows_affected(), 1);

    bridge.start_worker().wait_until_ready().await;
    settle(&bridge).await;

    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.status.as_deref(), Some("active"));
    assert_eq!(bridge.stored_events().await, 2);
    bridge.check().await;
}

async fn backfill_stores_nothing_that_thin_events_have_brought(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let (notified, missed) = (Purchase::new(now() - 600), Purchase::new(now() - 600));
    for step in life(&notified) {
        step.put(&api);
        bridge.notify_all(&[step.notification(&notified)]).await;
        settle(&bridge).await;
    }
    let steps = life(&missed);
    steps.iter().for_each(|step| step.put(&api));
    // Stripe lists the snapshot events of all of them, whatever the destinations.
    for step in life(&notified).iter().chain(&steps) {
        api.put_event(step.event.value.clone(), true);
    }
    let rows = bridge.rows().await;
    let stored = bridge.stored_events().await;

    let first = backfill(&bridge).await;
    settle(&bridge).await;
    assert_eq!(first["published"], steps.len(), "{first}");
    assert_eq!(bridge.stored_events().await, stored + steps.len() as u64);
    assert_eq!(bridge.row(&notified.subscription).await, rows[0]);
    let row = bridge.row(&missed.subscription).await;
    assert_eq!(row.status.as_deref(), Some("canceled"));
    assert_eq!(row.client_reference_id.as_deref(), Some("user_1"));

    let second = backfill(&bridge).await;
    settle(&bridge).await;
    assert_eq!(second["published"], 0, "{second}");
    assert_eq!(bridge.stored_events().await, stored + steps.len() as u64);
    bridge.check().await;
}

async fn backfill(bridge: &Bridge) -> Value {
    let launch = bridge.worker().args(["backfill", "--json"]);
    let finished = launch.run(DEADLINE).await;
    assert!(finished.status.success(), "{finished:?}");
    serde_json::from_str(&finished.stdout).expect("it prints JSON")
}

async fn erasure_removes_the_thin_events_of_the_customer(database: DatabaseKind) {
    let api = Api::start().await;
    let bridge = Bridge::start(with_key(database, &api)).await;
    let (erased, kept) = (put_purchase(&api), put_purchase(&api));
    for purchase in [&erased, &kept] {
        bridge
            .notify_all(&[
                about_session(purchase, COMPLETED),
                about(purchase, CREATED),
                about(purchase, "customer.subscription.active"),
            ])
            .await;
    }
    settle(&bridge).await;
    assert_eq!(bridge.stored_events().await, 10);

    let receipt = erase(&bridge, &erased.customer, &["--json"]).await;

    assert!(receipt.status.success(), "{receipt:?}");
    let left = bridge.bodies(EVENTS_STREAM).await;
    let left: Vec<_> = left
        .iter()
        .map(|body| String::from_utf8_lossy(body))
        .collect();
    for id in [
        &erased.subscription,
        &erased.checkout_session,
        &erased.customer,
    ] {
        // The record of the erasure has ids only.
        let about = left.iter().filter(|body| body.contains(id));
        let found: Vec<_> = about
            .filter(|body| !body.contains("\"litestripe.erasure\""))
            .collect();
        assert!(found.is_empty(), "{found:#?}");
    }
    let of_the_other = left.iter().filter(|body| body.contains(&kept.subscription));
    assert!(of_the_other.count() >= 3, "{left:#?}");
    let row = bridge.row(&erased.subscription).await;
    assert_eq!(row.status.as_deref(), Some("active"), "the row stays");
    assert_eq!(
        (row.metadata, row.subscription_metadata),
        (json!({}), json!({}))
    );
}

/// Options for workers with a key for the stub.
fn with_key(database: DatabaseKind, api: &Api) -> Options {
    Options::new(database)
        .worker("STRIPE_API_BASE", api.url())
        .worker("STRIPE_SECRET_KEY", API_KEY)
        .worker("LITESTRIPE_BACKFILL_INTERVAL", "off")
        .worker("LITESTRIPE_MAX_REQUESTS_PER_MINUTE", "6000")
}

/// A purchase of `user_1` whose objects Stripe's API returns.
fn put_purchase(api: &Api) -> Purchase {
    let purchase = Purchase::new(now() - 60);
    put(api, &purchase, "active");
    api.put_checkout_session(with(
        purchase.checkout_session(),
        json!({ "client_reference_id": "user_1", "metadata": { "plan": "team" } }),
    ));
    purchase
}

fn put(api: &Api, purchase: &Purchase, status: &str) {
    api.put_subscription(with(
        purchase.subscription(),
        json!({ "status": status, "metadata": { "workspace": "acme" } }),
    ));
}

/// A thin event about the subscription that happened just now. `event_type` is that of the snapshot
/// event.
fn about(purchase: &Purchase, event_type: &str) -> Notification {
    purchase.subscription_notification(&format!("v1.{event_type}"), now_ms())
}

fn about_session(purchase: &Purchase, event_type: &str) -> Notification {
    purchase.checkout_session_notification(&format!("v1.{event_type}"), now_ms())
}

fn now_ms() -> i64 {
    let now = OffsetDateTime::now_utc();
    now.unix_timestamp() * 1000 + i64::from(now.millisecond())
}

/// Waits until all thin events are fetched and what they brought is applied.
async fn settle(bridge: &Bridge) {
    bridge.wait_until_applied().await;
    eventually("thin events to be answered", DEADLINE, async || {
        let open = questions(bridge).await;
        if open.iter().any(|(_, kind)| kind == "notification") {
            Err(format!("{open:?}"))
        } else {
            Ok(())
        }
    })
    .await;
    bridge.wait_until_applied().await;
}

async fn until_requested(api: &Api, path: &str, count: usize) {
    eventually("a request to Stripe", DEADLINE, async || {
        match api.requests(path).len() {
            requests if requests >= count => Ok(()),
            requests => Err(format!("{requests} requests")),
        }
    })
    .await;
}

/// Waits until command and metrics say that `count` objects wait for a key.
async fn until_waiting(bridge: &Bridge, count: u64) {
    let worker = bridge.workers.last().expect("a worker runs");
    let open = r#"litestripe_worker_open_questions{kind="notification"}"#;
    let waiting = r#"litestripe_worker_waiting{for="stripe_key"}"#;
    #[expect(clippy::cast_precision_loss, reason = "it is small")]
    let expected = (Some(count as f64), Some(f64::from(u8::from(count > 0))));
    eventually("the metrics to show what waits", DEADLINE, async || {
        let shown = (metric(worker, open).await, metric(worker, waiting).await);
        if shown == expected {
            Ok(())
        } else {
            Err(format!("{shown:?}"))
        }
    })
    .await;
    let status = bridge
        .worker()
        .args(["status", "--json"])
        .run(DEADLINE)
        .await;
    assert!(status.status.success(), "{status:?}");
    let status: Value = serde_json::from_str(&status.stdout).expect("it prints JSON");
    assert_eq!(status["waiting_for_key"], count, "{status:#}");
    assert_eq!(
        status["questions"]["notification"]["open"], count,
        "{status:#}"
    );
}

async fn restart_with_key(bridge: &mut Bridge, key: &str) {
    bridge.workers.pop().expect("a worker runs").stop().await;
    bridge.set_worker("STRIPE_SECRET_KEY", key);
    bridge.start_worker().wait_until_ready().await;
}

/// The value of a metric, given by its name and labels.
async fn metric(node: &Node, name: &str) -> Option<f64> {
    let (_, page) = node.page("/metrics").await.expect("it answers");
    let line = page.lines().find_map(|line| line.strip_prefix(name));
    line?.trim().parse().ok()
}
