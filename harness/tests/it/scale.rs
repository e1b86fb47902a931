//! Many shuffled events for two workers: every row is correct and every signal is delivered.

use std::collections::BTreeMap;

use bytes::Bytes;
use litestripe_harness::bridge::{
    Bridge, DatabaseKind, Options, filter_by_subscription, signal_fields,
};
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::{Value, json};
use time::OffsetDateTime;

const SUBSCRIPTIONS: usize = 400;
const EVENTS_EACH: i64 = 25;
/// Every tenth message is stored twice.
const REPEATED: usize = 10;

#[tokio::test]
async fn two_workers_apply_ten_thousand_shuffled_events_and_lose_nothing() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Postgres).workers(2)).await;
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let histories: Vec<_> = (0..SUBSCRIPTIONS)
        .map(|number| History::new(number, now))
        .collect();
    let mut messages = Vec::new();
    for event in histories.iter().flat_map(|history| &history.events) {
        messages.push(message(event, event.id().to_owned()));
        if messages.len() % REPEATED == 0 {
            messages.push(message(event, format!("{}:again", event.id())));
        }
    }
    assert!(messages.len() > 10_000);
    let seed: u64 = std::env::var("SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(now.unsigned_abs());
    eprintln!("SEED={seed}");
    shuffle(&mut messages, seed);
    bridge.publish_all(messages).await;

    let signals = bridge.check().await;
    assert_eq!(bridge.dead_letters().await.len(), 0);
    let rows: BTreeMap<_, _> = bridge
        .rows()
        .await
        .into_iter()
        .map(|row| (row.stripe_subscription_id.clone(), row))
        .collect();
    assert_eq!(rows.len(), SUBSCRIPTIONS);
    let by_subscription = group(&signals);
    for history in &histories {
        let id = &history.purchase.subscription;
        let shown = signal_fields(&rows[id]);
        for (field, expected) in history.expected.as_object().expect("it is written as one") {
            assert_eq!(&shown[field], expected, "`{field}` of {id}");
        }
        assert_eq!(
            rows[id].last_event_id.as_deref(),
            Some(history.last().id()),
            "the last event of {id}"
        );
        // The bridge checks that each refers to the one before it.
        let revisions: Vec<_> = by_subscription[id.as_str()].clone();
        assert!(
            revisions.is_sorted(),
            "the signals of {id} are not in order: {revisions:?}"
        );
    }
    for worker in &bridge.workers {
        assert_eq!(worker.count_in_log("ERROR"), 0, "{}", worker.log());
        let (_, metrics) = worker.page("/metrics").await.expect("it answers");
        assert!(
            !metrics.contains("litestripe_worker_events_applied_total 0\n"),
            "one worker did all:\n{metrics}"
        );
    }
    let one = &histories[0].purchase.subscription;
    assert!(!filter_by_subscription(&signals, one).is_empty());
}

/// The events of one subscription as Stripe would send them, and the expected row.
struct History {
    purchase: Purchase,
    events: Vec<Event>,
    expected: Value,
}

impl History {
    /// A checkout, a creation that is paid within the same second, then an update per day. Every
    /// third subscription is canceled at the end.
    fn new(number: usize, now: i64) -> Self {
        let purchase = Purchase::new(now - 86_400 * (EVENTS_EACH + 1));
        let start = purchase.created;
        let user = format!("user_{number}");
        let session =
            json!({ "client_reference_id": user, "metadata": { "number": number.to_string() } });
        let mut events = vec![
            purchase.checkout_session_event("checkout.session.completed", start, session),
            purchase.subscription_event(
                "customer.subscription.created",
                start,
                json!({ "status": "incomplete" }),
            ),
            purchase
                .subscription_event("customer.subscription.updated", start, json!({}))
                .with_previous_attributes(json!({ "status": "incomplete" })),
        ];
        let is_canceled = number.is_multiple_of(3);
        let days = EVENTS_EACH - 3 - i64::from(is_canceled);
        for day in 1..=days {
            events.push(updated(&purchase, day));
        }
        let ended = start + 86_400 * (days + 1);
        if is_canceled {
            let last = &events.last().expect("there are updates").value["data"]["object"];
            let end = json!({
                "status": "canceled",
                "ended_at": ended,
                "items": last["items"],
                "metadata": last["metadata"],
            });
            events.push(purchase.subscription_event("customer.subscription.deleted", ended, end));
        }
        assert_eq!(i64::try_from(events.len()), Ok(EVENTS_EACH));

        let mut metadata = json!({
            "checkout.session.completed.number": number.to_string(),
            "customer.subscription.updated.day": days.to_string(),
        });
        if is_canceled {
            metadata["customer.subscription.deleted.day"] = json!(days.to_string());
        }
        let expected = json!({
            "stripe_customer_id": purchase.customer,
            "client_reference_id": user,
            "status": if is_canceled { "canceled" } else { status(days) },
            "items": [{
                "price": "price_1QyTpwLkdIwHu7ixT3aM0nth",
                "product": "prod_RsAIwXl5kSTEam",
                "quantity": days,
                "lookup_key": "team_monthly",
            }],
            "metadata": metadata,
            "subscription_metadata": { "day": days.to_string() },
            "uncertain": false,
        });
        Self {
            purchase,
            events,
            expected,
        }
    }

    fn last(&self) -> &Event {
        self.events.last().expect("a history has events")
    }
}

/// The update of one day. It changes the quantity, the metadata and sometimes the status.
fn updated(purchase: &Purchase, day: i64) -> Event {
    let at = purchase.created + 86_400 * day;
    let mut items = purchase.items(at, at + 86_400);
    items["data"][0]["quantity"] = json!(day);
    let changes =
        json!({ "status": status(day), "items": items, "metadata": { "day": day.to_string() } });
    purchase
        .subscription_event("customer.subscription.updated", at, changes)
        .with_previous_attributes(json!({ "metadata": { "day": (day - 1).to_string() } }))
}

fn status(day: i64) -> &'static str {
    if day % 5 == 0 { "past_due" } else { "active" }
}

fn message(event: &Event, message_id: String) -> (String, Bytes, String) {
    (event.event_type().to_owned(), event.body(), message_id)
}

/// The revisions of each subscription's signals, in the order of the stream.
fn group(signals: &[litestripe_harness::bridge::Signal]) -> BTreeMap<&str, Vec<i64>> {
    let mut revisions: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
    for signal in signals
        .iter()
        .filter(|signal| signal.subject == "subscription.changed")
    {
        let id = signal.body["stripe_subscription_id"]
            .as_str()
            .expect("the schema requires it");
        let revision = signal.body["revision"]
            .as_i64()
            .expect("the schema requires it");
        revisions.entry(id).or_default().push(revision);
    }
    revisions
}

/// Fisher and Yates, with SplitMix64.
fn shuffle<T>(list: &mut [T], mut seed: u64) {
    for last in (1..list.len()).rev() {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut random = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        random = (random ^ (random >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        random ^= random >> 31;
        let index =
            usize::try_from(random % (last as u64 + 1)).expect("it is an index of the list");
        list.swap(last, index);
    }
}
