//! A thin event as Stripe sends it: it names the object that changed and carries none of its data.

use bytes::Bytes;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::macros::format_description;

use super::{event, unique};

/// A thin event. Tests may change `value` before it is rendered.
#[derive(Clone, Debug)]
pub struct Notification {
    /// The whole object, as a webhook delivers it.
    pub value: Value,
}

/// The kinds of objects that notifications are about.
#[derive(Clone, Copy, Debug)]
pub enum Related {
    Subscription,
    CheckoutSession,
}

impl Related {
    /// The type in `related_object`.
    fn name(self) -> &'static str {
        match self {
            Self::Subscription => "subscription",
            Self::CheckoutSession => "checkout.session",
        }
    }

    /// The path of its objects in the API.
    fn path(self) -> &'static str {
        match self {
            Self::Subscription => "/v1/subscriptions/",
            Self::CheckoutSession => "/v1/checkout/sessions/",
        }
    }
}

impl Notification {
    /// A notification of that type (`v1.…`) and time (milliseconds since the Unix epoch) about the
    /// object with that id. It has a new id, no context and no reason.
    ///
    /// # Panics
    /// When the time is outside the years 0 to 9999.
    pub fn new(event_type: &str, created_ms: i64, related: Related, id: &str) -> Self {
        let created = OffsetDateTime::from_unix_timestamp_nanos(i128::from(created_ms) * 1_000_000)
            .expect("a test's time is in range");
        let created = created
            .format(format_description!(
                "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
            ))
            .expect("it has all these parts");
        let value = json!({
            "id": format!("evt_test_65{}", unique(46)),
            "object": "v2.core.event",
            "type": event_type,
            "created": created,
            "livemode": false,
            "context": null,
            "reason": null,
            "related_object": {
                "id": id,
                "type": related.name(),
                "url": format!("{}{id}", related.path()),
            },
        });
        Self { value }
    }

    /// Sets the account for which the object must be fetched: `acct_…`, or a path to it.
    #[must_use]
    pub fn in_context(mut self, context: &str) -> Self {
        self.value["context"] = context.into();
        self
    }

    /// Sets the API request that caused the change.
    #[must_use]
    pub fn caused_by(mut self, request: &str, idempotency_key: &str) -> Self {
        self.value["reason"] = json!({
            "type": "request",
            "request": { "id": request, "idempotency_key": idempotency_key },
        });
        self
    }

    /// Its id, `evt_test_…`.
    pub fn id(&self) -> &str {
        self.value["id"].as_str().unwrap_or_default()
    }

    /// Its type, such as `v1.customer.subscription.past_due`.
    pub fn event_type(&self) -> &str {
        self.value["type"].as_str().unwrap_or_default()
    }

    /// The id of the object that it is about.
    pub fn related_id(&self) -> &str {
        self.value["related_object"]["id"]
            .as_str()
            .unwrap_or_default()
    }

    /// The whole event as `GET /v2/core/events/{id}` returns it: with what changed, and the id of
    /// the snapshot event about the same change, if there is one.
    pub fn whole(&self, changes: Value, snapshot_event: Option<&str>) -> Value {
        let mut value = self.value.clone();
        value["changes"] = changes;
        value["snapshot_event"] = snapshot_event.into();
        value
    }

    /// Renders the body like that of a snapshot event.
    pub fn body(&self) -> Bytes {
        event::render_body(&self.value)
    }
}
