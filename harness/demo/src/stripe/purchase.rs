//! The objects of one purchase, which refer to each other by id, and events about them.
//!
//! The JSON templates in this folder are as API version 2026-07-29.dahlia renders them with
//! flexible billing: the items hold the current period.

use serde_json::{Value, json};

use super::{Event, Notification, Related, unique};

/// The length of a period in these events, in seconds: 30 days.
pub const MONTH: i64 = 30 * 86_400;
/// The length of a trial in these events, in seconds: 14 days.
pub const TRIAL: i64 = 14 * 86_400;

/// A customer, their Checkout Session and the resulting subscription.
#[derive(Clone, Debug)]
pub struct Purchase {
    /// The time of the purchase in Unix seconds.
    pub created: i64,
    /// The subscription's id, `sub_…`.
    pub subscription: String,
    /// The customer's id, `cus_…`.
    pub customer: String,
    /// The Checkout Session's id, `cs_test_…`.
    pub checkout_session: String,
    item: String,
    payment_method: String,
    invoice: String,
}

impl Purchase {
    /// A purchase with unique ids.
    pub fn new(created: i64) -> Self {
        Self {
            created,
            subscription: format!("sub_1{}", unique(23)),
            customer: format!("cus_{}", unique(14)),
            checkout_session: format!("cs_test_a1{}", unique(56)),
            item: format!("si_{}", unique(14)),
            payment_method: format!("pm_1{}", unique(23)),
            invoice: format!("in_1{}", unique(23)),
        }
    }

    /// The subscription as it is right after the purchase: active, in its first period.
    pub fn subscription(&self) -> Value {
        let mut object = template(include_str!("subscription.json"));
        for field in ["created", "start_date", "billing_cycle_anchor"] {
            object[field] = self.created.into();
        }
        object["billing_mode"]["updated_at"] = self.created.into();
        object["id"] = self.subscription.as_str().into();
        object["customer"] = self.customer.as_str().into();
        object["default_payment_method"] = self.payment_method.as_str().into();
        object["latest_invoice"] = self.invoice.as_str().into();
        object["items"] = self.items(self.created, self.created + MONTH);
        object
    }

    /// The subscription's `items` in a period (Unix seconds).
    pub fn items(&self, start: i64, end: i64) -> Value {
        let mut items = template(include_str!("subscription.json"))["items"].take();
        items["url"] = format!("/v1/subscription_items?subscription={}", self.subscription).into();
        let item = &mut items["data"][0];
        item["id"] = self.item.as_str().into();
        item["subscription"] = self.subscription.as_str().into();
        item["created"] = self.created.into();
        item["current_period_start"] = start.into();
        item["current_period_end"] = end.into();
        items
    }

    /// The Checkout Session: complete, paid, without a client reference id.
    pub fn checkout_session(&self) -> Value {
        let mut object = template(include_str!("checkout_session.json"));
        object["id"] = self.checkout_session.as_str().into();
        object["customer"] = self.customer.as_str().into();
        object["subscription"] = self.subscription.as_str().into();
        object["invoice"] = self.invoice.as_str().into();
        // Opened two minutes before it was completed, open for a day.
        object["created"] = (self.created - 120).into();
        object["expires_at"] = (self.created - 120 + 86_400).into();
        object
    }

    /// Makes an event about the subscription as it is right after the purchase, with the fields in
    /// `changes` replaced (whole values; null is a value).
    pub fn subscription_event(&self, event_type: &str, created: i64, changes: Value) -> Event {
        Event::new(event_type, created, changed(self.subscription(), changes))
    }

    /// Makes an event about the Checkout Session, with the fields in `changes` replaced (whole
    /// values; null is a value).
    pub fn checkout_session_event(&self, event_type: &str, created: i64, changes: Value) -> Event {
        Event::new(
            event_type,
            created,
            changed(self.checkout_session(), changes),
        )
    }

    /// Makes a thin event about the subscription. `created_ms` is in milliseconds.
    pub fn subscription_notification(&self, event_type: &str, created_ms: i64) -> Notification {
        Notification::new(
            event_type,
            created_ms,
            Related::Subscription,
            &self.subscription,
        )
    }

    /// Makes a thin event about the Checkout Session. `created_ms` is in milliseconds.
    pub fn checkout_session_notification(&self, event_type: &str, created_ms: i64) -> Notification {
        Notification::new(
            event_type,
            created_ms,
            Related::CheckoutSession,
            &self.checkout_session,
        )
    }

    /// The fields of the subscription that differ while it is on trial.
    pub fn on_trial(&self) -> Value {
        let end = self.created + TRIAL;
        json!({
            "status": "trialing",
            "trial_start": self.created,
            "trial_end": end,
            "billing_cycle_anchor": end,
            "items": self.items(self.created, end),
        })
    }
}

/// Replaces members of `object` by those of `changes`.
pub(super) fn changed(mut object: Value, changes: Value) -> Value {
    let Value::Object(changes) = changes else {
        return object;
    };
    for (key, value) in changes {
        object[key.as_str()] = value;
    }
    object
}

fn template(text: &str) -> Value {
    serde_json::from_str(text).expect("the templates in this folder are JSON")
}
