//! Finds out to whom the body of a message belongs: an event of Stripe's or of ours, or a signal.
//!
//! Owns where such bodies name customers, subscriptions and Checkout Sessions. May not know what
//! the result is used for. More tolerant than [`super::decode`], because a poisoned event has an
//! owner too.

use litestripe_contract::event::{EventId, EventType};
use litestripe_contract::signal::{EventReference, Timestamp};
use serde_json::Value;

/// The fields that name the account of the application, or one that it works for. An event about no
/// customer does not belong to a customer who has the same account.
const ACCOUNT_FIELDS: [&str; 6] = [
    "account",
    "context",
    "destination",
    "on_behalf_of",
    "stripe_account_id",
    "user_id",
];

/// The ids in a body that tell to whom it belongs, and the body itself.
#[derive(Debug)]
pub struct Owner {
    body: Value,
    /// The customer that the object belongs to, and the customer's account.
    pub customers: Vec<String>,
    /// The ids of the subscription and the Checkout Session that it is about.
    pub payments: Vec<String>,
}

impl Owner {
    /// Parses `body`. Returns `None` if it is not JSON.
    pub fn parse(body: &[u8]) -> Option<Self> {
        let body: Value = serde_json::from_slice(body).ok()?;
        // A signal has its fields where an event has its envelope.
        let object = body
            .pointer("/data/object")
            .or_else(|| body.pointer("/related_object"))
            .unwrap_or(&body);
        let kind = kind(&body, object);
        let own = object["id"].as_str();
        let named = [
            own.filter(|_| kind == Kind::Customer),
            id(&object["customer"]),
            id(&object["customer_account"]),
            object["stripe_customer_id"].as_str(),
        ];
        let customers = named.into_iter().flatten();
        let payment = own.filter(|_| kind == Kind::Payment);
        let named = ["stripe_subscription_id", "checkout_session_id", "orphan_id"];
        let named = named.into_iter().filter_map(|name| object[name].as_str());
        let payments = payment
            .into_iter()
            .chain(id(&object["subscription"]))
            .chain(named);
        Some(Self {
            customers: customers.map(str::to_owned).collect(),
            payments: payments.map(str::to_owned).collect(),
            body,
        })
    }

    /// Returns the ids that stand for the owner.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let ids = self.customers.iter().chain(&self.payments);
        ids.map(String::as_str)
    }

    /// Whether the body belongs to the person with the ids that `is_own` accepts.
    ///
    /// A body about another customer's object does not, whatever else it mentions. A body about an
    /// object without a customer does if one of its texts, anywhere, is one of the ids.
    pub fn belongs_to(&self, is_own: impl Fn(&str) -> bool) -> bool {
        self.ids().any(&is_own) || self.customers.is_empty() && self.contains_text(is_own)
    }

    /// Returns when the event was created, in seconds since the Unix epoch. `None` if the body does
    /// not say so readably.
    pub fn created(&self) -> Option<i64> {
        let created = &self.body["created"];
        let of_thin_event = || serde_json::from_value(created.clone()).ok();
        created
            .as_i64()
            .or_else(|| of_thin_event().map(Timestamp::unix))
    }

    /// Returns whether `wanted` accepts a text anywhere in the body, except where it names an
    /// account. Texts are compared as a whole; keys are not searched.
    fn contains_text(&self, wanted: impl Fn(&str) -> bool) -> bool {
        let mut left = vec![&self.body];
        while let Some(value) = left.pop() {
            match value {
                Value::String(text) if wanted(text) => return true,
                Value::Array(list) => left.extend(list),
                Value::Object(map) => {
                    let fields = map.iter();
                    let others =
                        fields.filter(|(name, _)| !ACCOUNT_FIELDS.contains(&name.as_str()));
                    left.extend(others.map(|(_, value)| value));
                }
                _ => {}
            }
        }
        false
    }
}

/// Returns the words of a body that is not JSON: ids are among them, each as a whole.
pub fn words(body: &[u8]) -> impl Iterator<Item = &str> {
    let words = body.split(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_');
    words.filter_map(|word| std::str::from_utf8(word).ok())
}

#[derive(PartialEq, Eq)]
enum Kind {
    Customer,
    /// A subscription or a Checkout Session.
    Payment,
    Other,
}

fn kind(body: &Value, object: &Value) -> Kind {
    let event_type = body["type"].as_str().unwrap_or_default();
    // A thin event names the kind of its object in another field.
    let kind = object["object"].as_str();
    match kind.or_else(|| body.pointer("/related_object/type")?.as_str()) {
        Some("customer") => Kind::Customer,
        Some("subscription" | "checkout.session") => Kind::Payment,
        None if event_type.starts_with("customer.subscription.")
            || event_type.starts_with("checkout.session.") =>
        {
            Kind::Payment
        }
        _ => Kind::Other,
    }
}

fn id(reference: &Value) -> Option<&str> {
    reference.as_str().or_else(|| reference["id"].as_str())
}

/// Reads a `customer.deleted` event, or the thin event for the same change. Returns `None` for
/// every other body, and if the ids in it are not valid.
pub fn deleted_customer(body: &[u8]) -> Option<DeletedCustomer> {
    memchr::memmem::find(body, b"customer.deleted")?;
    let body: Value = serde_json::from_slice(body).ok()?;
    let event_type = body["type"].as_str()?;
    let (customer, created) = match event_type {
        "customer.deleted" => (
            body.pointer("/data/object/id")?,
            Timestamp::from_unix(body["created"].as_i64()?).ok()?,
        ),
        "v1.customer.deleted" => (
            body.pointer("/related_object/id")?,
            serde_json::from_value(body["created"].clone()).ok()?,
        ),
        _ => return None,
    };
    let customer = customer.as_str().filter(|id| EventId::fits(id))?;
    let account = body["account"].as_str().map(str::to_owned);
    let account = account.or_else(|| super::account_of_context(body["context"].as_str()?));
    Some(DeletedCustomer {
        stripe_customer_id: customer.to_owned(),
        stripe_account_id: account.filter(|id| EventId::fits(id)),
        livemode: body["livemode"].as_bool().unwrap_or(false),
        event: EventReference {
            id: EventId::parse(body["id"].as_str()?).ok()?,
            event_type: EventType::parse(event_type).ok()?,
            created,
        },
    })
}

/// A customer that was deleted at Stripe.
#[derive(Debug)]
pub struct DeletedCustomer {
    /// The customer's id: printable ASCII.
    pub stripe_customer_id: String,
    pub stripe_account_id: Option<String>,
    pub livemode: bool,
    pub event: EventReference,
}

#[cfg(test)]
mod tests;
