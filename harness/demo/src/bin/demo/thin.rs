//! The thin way: delivers thin events, which hold no data, and shows what the worker fetches
//! because of them from a stub of Stripe's API.

use std::time::{Duration, Instant};

use litestripe_demo::stripe::api::Api;
use litestripe_demo::stripe::{Delivery, Event, Notification, Related};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::instance::Instance;
use crate::screen::{Screen, Tone, short};
use crate::signals::Signals;
use crate::story::{self, SETTLE_MAX, day, summary};

/// The time between two checks of the stub's requests.
const PAUSE: Duration = Duration::from_millis(20);

/// Changes the event's object at Stripe, delivers thin events about it, waits until the worker
/// fetches it, and shows the first signal that results.
pub(crate) async fn deliver(
    event: &Event,
    stripe: &Api,
    instance: &Instance,
    screen: &Screen,
    signals: &mut Signals,
) -> Result<(), String> {
    let object = &event.value["data"]["object"];
    put(stripe, object);
    let id = object["id"].as_str().unwrap_or_default();
    let asked = stripe.requests(id).len();
    let client = litestripe_demo::stripe::client();
    let notifications = notifications(event, id);
    for notification in &notifications {
        let delivery = Delivery::new(notification.body(), instance.secret());
        let answer = story::post(&delivery, instance, &client).await?;
        let status = answer.status();
        let tone = if status == 200 { Tone::Good } else { Tone::Bad };
        screen.line(format_args!(
            "{} {} {:<39} {} {}",
            screen.tint(Tone::Heading, "→"),
            screen.tint(tone, status.as_u16()),
            notification.event_type(),
            screen.tint(Tone::Faint, day(event.created())),
            short(id),
        ))?;
    }
    let end = Instant::now() + SETTLE_MAX;
    while stripe.requests(id).len() == asked {
        if Instant::now() > end {
            let seconds = SETTLE_MAX.as_secs();
            return Err(format!("the worker has not fetched {id} after {seconds} s"));
        }
        sleep(PAUSE).await;
    }
    let many = match notifications.len() {
        1 => String::new(),
        several => format!(" (for {several} thin events)"),
    };
    screen.line(format_args!(
        "  {} GET {}{}  {}{}",
        screen.tint(Tone::Name, "⇄"),
        path(object),
        short(id),
        summary(object),
        screen.tint(Tone::Faint, many),
    ))?;
    // Without a signal the check at the end names what is missing.
    let shown = timeout(SETTLE_MAX, signals.show_next(screen)).await;
    shown.unwrap_or(Ok(()))
}

/// The thin events that Stripe sends for the change that `event` reports: one with the event's
/// type, and for some changes a finer one.
fn notifications(event: &Event, id: &str) -> Vec<Notification> {
    let (name, object) = (event.event_type(), &event.value["data"]["object"]);
    let previous = &event.value["data"]["previous_attributes"];
    let mut types = vec![format!("v1.{name}")];
    if previous["status"].is_string() {
        let status = object["status"].as_str().unwrap_or_default();
        types.push(format!("v1.customer.subscription.{status}"));
    }
    if previous.get("cancel_at").is_some() {
        types.push("v1.customer.subscription.cancel_at_changed".to_owned());
    }
    let related = if is_session(object) {
        Related::CheckoutSession
    } else {
        Related::Subscription
    };
    let created_ms = event.created() * 1000;
    types
        .iter()
        .map(|event_type| Notification::new(event_type, created_ms, related, id))
        .collect()
}

fn put(stripe: &Api, object: &Value) {
    if is_session(object) {
        stripe.put_checkout_session(object.clone());
    } else {
        stripe.put_subscription(object.clone());
    }
}

fn path(object: &Value) -> &'static str {
    if is_session(object) {
        "/v1/checkout/sessions/"
    } else {
        "/v1/subscriptions/"
    }
}

fn is_session(object: &Value) -> bool {
    object["object"] == "checkout.session"
}
