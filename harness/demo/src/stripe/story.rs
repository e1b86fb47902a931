//! The events of a subscription's life from Checkout to its end, and of a payment without a known
//! user.

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::purchase::changed;
use super::{Event, MONTH, Purchase, TRIAL};

/// Makes the story's events in the order in which they happened, the last one a minute before
/// `now`.
///
/// They are: a Checkout with the client reference id `user_4711` and a trial; its activation; a
/// renewal; a cancellation at the period's end; that end. Then a paid Checkout Session of
/// `rescue-me@example.com` without a client reference id: an orphan.
pub fn story(now: OffsetDateTime) -> Vec<Event> {
    let now = now.unix_timestamp();
    // A trial and two periods ago, and one hour more, because Stripe acts some time after a
    // period's end.
    let purchase = Purchase::new(now - TRIAL - 2 * MONTH - 3_600);
    let mut events = life(&purchase);
    events.push(orphan(&Purchase::new(now - 60)));
    events
}

fn life(purchase: &Purchase) -> Vec<Event> {
    const UPDATED: &str = "customer.subscription.updated";
    let started = purchase.created;
    let trial_end = started + TRIAL;
    let renewal = trial_end + MONTH;
    let end = renewal + MONTH;
    let asked = end - 10 * 86_400;

    let metadata = json!({ "plan": "team", "source": "pricing-page" });
    let trial = changed(
        purchase.on_trial(),
        json!({ "metadata": { "workspace": "acme" } }),
    );
    let event = |event_type: &str, at: i64, changes: &Value| {
        purchase.subscription_event(event_type, at, changes.clone())
    };

    let checkout = json!({
        "client_reference_id": "user_4711",
        "amount_subtotal": 0,
        "amount_total": 0,
        "payment_status": "no_payment_required",
        "metadata": metadata,
    });
    let active = changed(
        trial.clone(),
        json!({ "status": "active", "items": purchase.items(trial_end, renewal) }),
    );
    let renewed = changed(
        active.clone(),
        json!({ "items": purchase.items(renewal, end) }),
    );
    let canceling = changed(
        renewed.clone(),
        json!({
            "cancel_at": end,
            "cancel_at_period_end": true,
            "canceled_at": asked,
            "cancellation_details": {
                "comment": null,
                "feedback": "unused",
                "reason": "cancellation_requested",
            },
        }),
    );
    let ended = changed(
        canceling.clone(),
        json!({ "status": "canceled", "ended_at": end }),
    );

    vec![
        purchase.checkout_session_event("checkout.session.completed", started, checkout),
        event("customer.subscription.created", started, &trial),
        event(
            "customer.subscription.trial_will_end",
            trial_end - 3 * 86_400,
            &trial,
        ),
        event(UPDATED, trial_end, &active).with_previous_attributes(json!({
            "items": { "data": purchase.items(started, trial_end)["data"] },
            "status": "trialing",
        })),
        event(UPDATED, renewal, &renewed).with_previous_attributes(json!({
            "items": { "data": purchase.items(trial_end, renewal)["data"] },
        })),
        event(UPDATED, asked, &canceling).with_previous_attributes(json!({
            "cancel_at": null,
            "cancel_at_period_end": false,
            "canceled_at": null,
            "cancellation_details": { "feedback": null, "reason": null },
        })),
        event("customer.subscription.deleted", end, &ended),
    ]
}

fn orphan(purchase: &Purchase) -> Event {
    let mut session = purchase.checkout_session();
    session["customer_details"]["email"] = "rescue-me@example.com".into();
    session["customer_details"]["name"] = "Robin Lost".into();
    Event::new("checkout.session.completed", purchase.created, session)
}
