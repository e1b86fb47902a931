//! Makes any number of events, whose bodies differ only in their ids, and the requests that deliver
//! them. Requests are signed before anything is measured.

use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use litestripe_harness::bridge::{HOOK, SECRET};
use litestripe_harness::stripe::Purchase;
use serde_json::{Value, json};
use sha2::Sha256;
use time::OffsetDateTime;

/// An event type of which each event makes a row and a signal.
pub(crate) const TYPE: &str = "customer.subscription.created";

/// The length of a body in bytes. Stripe's have 2 to 60 KiB; those of subscriptions are about this
/// long.
pub(crate) const BODY_BYTES: usize = 4096;

/// A text that is part of every id, so that events of different kinds have different ids.
#[derive(Clone, Copy)]
pub(crate) struct Kind(pub(crate) &'static str);

/// Makes similar events: each about its own subscription, or about one of several.
pub(crate) struct Events {
    purchase: Purchase,
    text: String,
    event: String,
    created: i64,
}

/// A number of ten digits that occurs nowhere else in the template.
const NUMBER: &str = "7531902468";

impl Events {
    /// Makes events of new subscriptions.
    pub(crate) fn new() -> Self {
        let now = OffsetDateTime::now_utc().unix_timestamp();
        Self::with_type(Purchase::new(now - 86_400), TYPE)
    }

    /// Makes events that change the metadata of this pool's subscriptions.
    pub(crate) fn changes(&self) -> Self {
        Self::with_type(self.purchase.clone(), "customer.subscription.updated")
    }

    fn with_type(purchase: Purchase, event_type: &str) -> Self {
        // No other time in the purchase has this value.
        let created = purchase.created + 86_400 - 3_607;
        // Most of an event of Stripe's is fields that the worker does not keep; so is this filling.
        let event = |tax_rates: usize, filling: usize| {
            let changes = json!({
                "metadata": { "number": NUMBER },
                "default_tax_rates": vec![tax_rate(purchase.created); tax_rates],
                "description": "x".repeat(filling),
            });
            purchase.subscription_event(event_type, created, changes)
        };
        let bytes = |tax_rates| event(tax_rates, 0).compact_body().len();
        let tax_rates = (BODY_BYTES - bytes(0)) / (bytes(2) - bytes(1));
        let event = event(tax_rates, BODY_BYTES.saturating_sub(bytes(tax_rates)));
        let text = String::from_utf8(event.compact_body().to_vec()).expect("an event is text");
        Self {
            purchase,
            text,
            event: event.id().to_owned(),
            created,
        }
    }

    /// Returns the id of event `number`.
    pub(crate) fn id(&self, kind: Kind, number: usize) -> String {
        numbered("evt_", kind, number, self.event.len())
    }

    /// Returns the number in an event's id.
    pub(crate) fn number(kind: Kind, id: &str) -> Option<usize> {
        id.strip_prefix("evt_")?.strip_prefix(kind.0)?.parse().ok()
    }

    /// Returns the id of subscription `number`.
    pub(crate) fn subscription(&self, kind: Kind, number: usize) -> String {
        numbered("sub_", kind, number, self.purchase.subscription.len())
    }

    /// Makes the body of an event about its own subscription.
    pub(crate) fn body(&self, kind: Kind, number: usize) -> String {
        self.body_of(kind, number, number, 0)
    }

    /// Makes the body of an event about `subscription`, created `later_s` seconds later.
    pub(crate) fn body_of(
        &self,
        kind: Kind,
        number: usize,
        subscription: usize,
        later_s: i64,
    ) -> String {
        self.text
            .replace(&self.event, &self.id(kind, number))
            .replace(
                &self.purchase.subscription,
                &self.subscription(kind, subscription),
            )
            .replace(NUMBER, &format!("{number:010}"))
            .replace(
                &self.created.to_string(),
                &(self.created + later_s).to_string(),
            )
    }
}

/// A tax rate as Stripe's API writes it in a subscription's `default_tax_rates`.
fn tax_rate(created: i64) -> Value {
    json!({
        "id": "txr_1RnGk2JNcmPzuWtRVvq9ufxB",
        "object": "tax_rate",
        "active": true,
        "country": "DE",
        "created": created,
        "description": "VAT Germany",
        "display_name": "VAT",
        "effective_percentage": 19.0,
        "flat_amount": null,
        "inclusive": false,
        "jurisdiction": "DE",
        "jurisdiction_level": "country",
        "livemode": false,
        "metadata": {},
        "percentage": 19.0,
        "rate_type": "percentage",
        "state": null,
        "tax_type": "vat",
    })
}

fn numbered(prefix: &str, kind: Kind, number: usize, length: usize) -> String {
    format!(
        "{prefix}{}{number:0>width$}",
        kind.0,
        width = length - prefix.len() - kind.0.len()
    )
}

/// Complete HTTP requests.
pub(crate) type Requests = Vec<Bytes>;

/// Makes signed deliveries of `count` new events.
pub(crate) fn requests(events: &Events, kind: Kind, count: usize) -> Requests {
    let timestamp = OffsetDateTime::now_utc().unix_timestamp();
    let request = |number| {
        let body = events.body(kind, number);
        render(&body, &signature(body.as_bytes(), timestamp))
    };
    (0..count).map(request).collect()
}

/// Makes the `Stripe-Signature` of a body.
pub(crate) fn signature(body: &[u8], timestamp: i64) -> String {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(format!("{timestamp}.").as_bytes());
    mac.update(body);
    let signature: String = mac
        .finalize()
        .into_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("t={timestamp},v1={signature}")
}

/// Makes deliveries with a signature that was not made with the secret.
pub(crate) fn forged(events: &Events, count: usize) -> Requests {
    let timestamp = OffsetDateTime::now_utc().unix_timestamp();
    let signature = format!("t={timestamp},v1={}", "5a".repeat(32));
    (0..count)
        .map(|number| render(&events.body(Kind("forged"), number), &signature))
        .collect()
}

fn render(body: &str, signature: &str) -> Bytes {
    format!(
        "POST /ls/hook/{HOOK}/ HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json; charset=utf-8\r\n\
         User-Agent: Stripe/1.0 (+https://stripe.com/docs/webhooks)\r\nStripe-Signature: {signature}\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into()
}
