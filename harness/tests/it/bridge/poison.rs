//! Events that can never be applied.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, Options, SECRET};
use litestripe_harness::stripe::{Delivery, Event, Purchase};
use serde_json::{Value, json};

use super::{COMPLETED, CREATED, UPDATED, now};

on_both_databases!(poison_becomes_a_dead_letter_and_its_neighbours_are_applied);

const DEADLINE: Duration = Duration::from_secs(60);

/// A placeholder in an event for text that `serde_json::Value` cannot hold.
const MARK: &str = "THE_POISON";

/// A poisoned event, and the field that the reason must name.
struct Poison {
    event: Event,
    instead_of_mark: String,
    field: &'static str,
}

async fn poison_becomes_a_dead_letter_and_its_neighbours_are_applied(database: DatabaseKind) {
    // The worker starts when all events are stored, so that poison and neighbours are in one batch.
    let mut bridge = Bridge::start(Options::new(database).workers(0)).await;
    let neighbours: Vec<_> = (0..8).map(|_| Purchase::new(now())).collect();
    let mut expected = Vec::new();
    for (neighbour, poison) in neighbours
        .iter()
        .zip(poisons().map(Some).into_iter().chain([None, None]))
    {
        bridge
            .deliver(&neighbour.subscription_event(CREATED, now(), json!({})))
            .await;
        let Some(poison) = poison else { continue };
        let answer = bridge.post(&Delivery::new(poison.body(), SECRET)).await;
        assert_eq!(
            answer.status(),
            200,
            "`{}`: ingress reads only the envelope",
            poison.field
        );
        expected.push((bridge.stored_events().await, poison));
    }
    let deep = json!({ "description": MARK });
    let deep = Purchase::new(now()).subscription_event(CREATED, now(), deep);
    bridge
        .post(&Delivery::new(replaced(&deep, &nested(20_000)), SECRET))
        .await;
    bridge.start_worker();

    assert_eq!(
        bridge.check().await.len(),
        neighbours.len() + 1,
        "a field that is not read may be nested to any depth"
    );
    for neighbour in &neighbours {
        bridge.row(&neighbour.subscription).await;
    }
    let mut letters = bridge.dead_letters().await;
    letters.sort_by_key(|letter| {
        letter.headers["Litestripe-Stream-Sequence"]
            .parse::<u64>()
            .ok()
    });
    assert_eq!(letters.len(), expected.len());
    for (letter, (sequence, poison)) in letters.iter().zip(&expected) {
        let header = |name: &str| letter.headers.get(name).cloned().unwrap_or_default();
        assert_eq!(header("Litestripe-Stream-Sequence"), sequence.to_string());
        assert_eq!(header("Nats-Msg-Id"), format!("dead:{sequence}"));
        let reason = header("Litestripe-Reason");
        assert!(
            reason.contains(poison.field),
            "{reason:?} does not name {}",
            poison.field
        );
        assert!(!reason.contains("Jo Doe"), "{reason:?} shows a value");
        assert_eq!(
            letter.subject,
            format!("stripe.dead.{}", poison.event.event_type())
        );
        assert_eq!(letter.body, poison.body(), "byte for byte");
        assert!(
            header("Stripe-Signature").starts_with("t="),
            "it can be verified again"
        );
        assert!(!header("Litestripe-Received-At").is_empty());
    }

    // Poisoned events are not redelivered, not even to the next worker.
    let worker = bridge.workers.remove(0);
    let (_, metrics) = worker.page("/metrics").await.expect("the worker answers");
    let count = format!(
        "\nlitestripe_worker_dead_letters_total {}\n",
        expected.len()
    );
    assert!(metrics.contains(&count), "{metrics}");
    assert!(worker.stop().await.success());
    bridge.start_worker().wait_until_ready().await;
    bridge
        .deliver(&Purchase::new(now()).subscription_event(CREATED, now(), json!({})))
        .await;
    bridge.check().await;
    assert_eq!(bridge.dead_letters().await.len(), expected.len());
}

/// Who may store a resolution is a matter of its subject. One that ingress, or whoever has its
/// password, stores under another subject must not give a payment to a user.
#[tokio::test]
async fn event_under_the_subject_of_another_type_is_never_applied() {
    let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite)).await;
    let purchase = Purchase::new(now());
    let paid = purchase.checkout_session_event(COMPLETED, now(), json!({}));
    bridge.deliver(&paid).await;
    let object = json!({
        "orphan_id": purchase.subscription,
        "client_reference_id": "thief",
        "checkout_session_id": purchase.checkout_session,
        "stripe_customer_id": purchase.customer,
        "stripe_subscription_id": purchase.subscription,
        "reason": "missing_client_reference_id",
    });
    let forged = Event::new("litestripe.resolution", now(), object);
    bridge.publish(UPDATED, forged.body(), forged.id()).await;
    bridge.check().await;

    let is_unresolved = async || {
        let user = bridge.row(&purchase.subscription).await.client_reference_id;
        let [orphan] = bridge.orphans().await.try_into().expect("there is one");
        assert_eq!((user, orphan.resolved_at), (None, None));
    };
    is_unresolved().await;
    let letters = bridge.dead_letters().await;
    let [letter] = letters.as_slice() else {
        panic!("{letters:?}")
    };
    let reason = "its type is litestripe.resolution, but its subject is";
    assert_eq!(
        letter.headers["Litestripe-Reason"],
        format!("{reason} stripe.events.{UPDATED}")
    );
    let commands: [(&[&str], i32); 2] = [
        (&["dead-letters", "retry", "--all"], 1),
        (&["replay", "--since", "1h"], 0),
    ];
    for (arguments, code) in commands {
        let finished = bridge
            .worker()
            .args(arguments.iter().copied())
            .run(DEADLINE)
            .await;
        assert_eq!(finished.status.code(), Some(code), "{finished:?}");
        is_unresolved().await;
    }
    // Under its own subject it would have been applied.
    bridge
        .publish("litestripe.resolution", forged.body(), "again")
        .await;
    bridge.check().await;
    let row = bridge.row(&purchase.subscription).await;
    assert_eq!(row.client_reference_id.as_deref(), Some("thief"));
}

impl Poison {
    fn body(&self) -> String {
        replaced(&self.event, &self.instead_of_mark)
    }
}

fn poisons() -> [Poison; 6] {
    let subscription = |event_type: &str, changes: Value| {
        Purchase::new(now()).subscription_event(event_type, now(), changes)
    };
    let mut bad_created = subscription(UPDATED, json!({}));
    bad_created.value["created"] = json!("Jo Doe's birthday");
    let session = json!({ "client_reference_id": format!("user {MARK}") });
    let session = Purchase::new(now()).checkout_session_event(COMPLETED, now(), session);
    let poison = |event, instead_of_mark: &str, field| Poison {
        event,
        instead_of_mark: instead_of_mark.into(),
        field,
    };
    [
        poison(
            subscription(
                CREATED,
                json!({ "metadata": { "name": format!("\"Jo Doe\"{MARK}") } }),
            ),
            "\\u0000",
            "metadata",
        ),
        poison(bad_created, "", "created"),
        poison(
            subscription(UPDATED, json!({ "status": MARK })),
            &nested(10_000),
            "status",
        ),
        poison(session, "\\ud83d", "client_reference_id"),
        poison(
            subscription(UPDATED, json!({ "trial_end": i64::MAX })),
            "",
            "trial_end",
        ),
        poison(subscription(UPDATED, json!({ "id": null })), "", "id"),
    ]
}

/// The event's body with `with` in place of the mark. An array replaces the whole text that holds
/// the mark.
fn replaced(event: &Event, with: &str) -> String {
    let body = String::from_utf8(event.body().to_vec()).expect("our bodies are UTF-8");
    if with.starts_with('[') {
        body.replace(&format!("\"{MARK}\""), with)
    } else {
        body.replace(MARK, with)
    }
}

fn nested(depth: usize) -> String {
    "[".repeat(depth) + &"]".repeat(depth)
}
