//! A model of a subscription at Stripe, and its rendering by API versions. Histories are made of
//! it.
//!
//! Owns its own rules for what a row must show, so that decoding and merging are compared with
//! results that share no code with them.

use std::collections::BTreeMap;

use litestripe_contract::signal::{Item, PauseCollection, Subscription, Timestamp};
use serde_json::{Map, Value, json};

pub(super) const SUBSCRIPTION: &str = "sub_1";
pub(super) const CUSTOMER: &str = "cus_1";
pub(super) const ACCOUNT: &str = "acct_1";

/// The true state of a subscription.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Model {
    pub(super) status: &'static str,
    pub(super) created: i64,
    pub(super) cancel_at: Option<i64>,
    pub(super) cancel_at_period_end: bool,
    pub(super) canceled_at: Option<i64>,
    pub(super) ended_at: Option<i64>,
    pub(super) trial_end: Option<i64>,
    pub(super) items: Vec<ModelItem>,
    pub(super) metadata: BTreeMap<&'static str, u64>,
    pub(super) trial_start: Option<i64>,
    pub(super) cancellation_reason: Option<&'static str>,
    pub(super) collection_method: &'static str,
    pub(super) pause_collection: Option<&'static str>,
    /// Fields that change but that we do not keep.
    pub(super) latest_invoice: u64,
    pub(super) default_payment_method: Option<u64>,
    pub(super) pending_update: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModelItem {
    pub(super) id: u64,
    pub(super) price: u64,
    pub(super) quantity: Option<i64>,
    pub(super) start: i64,
    pub(super) end: i64,
}

/// How an API version, and the options of an endpoint, render a subscription.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) period: PeriodAt,
    pub(super) customer_expanded: bool,
    pub(super) product_expanded: bool,
    pub(super) with_plan: bool,
    /// The same for all events of a history, because a plan has no lookup key.
    pub(super) only_plan: bool,
    pub(super) nulls_absent: bool,
    /// Whether it has no fields that were added to Stripe's API later.
    pub(super) old: bool,
}

/// Where API versions put the period: before 2025-03-31, since then, and old versions rendered
/// since then.
#[derive(Debug, Clone, Copy)]
pub(super) enum PeriodAt {
    Subscription,
    Items,
    Both,
}

impl Model {
    /// Returns the columns that a row must show for the snapshot.
    pub(super) fn shown(&self, shape: Shape) -> Subscription {
        let at = |seconds: i64| Timestamp::from_unix(seconds).expect("a time");
        Subscription {
            stripe_customer_id: Some(CUSTOMER.to_owned()),
            status: Some(self.status.to_owned()),
            created: Some(at(self.created)),
            start_date: Some(at(self.created)),
            cancel_at: self.cancel_at.map(at),
            canceled_at: self.canceled_at.map(at),
            ended_at: self.ended_at.map(at),
            trial_end: self.trial_end.map(at),
            trial_start: self.trial_start.map(at).filter(|_| !shape.old),
            cancellation_reason: self
                .cancellation_reason
                .filter(|_| !shape.old)
                .map(str::to_owned),
            collection_method: Some(self.collection_method.to_owned()),
            pause_collection: self.pause_collection.map(|behavior| PauseCollection {
                behavior: Some(behavior.to_owned()),
                resumes_at: None,
            }),
            current_period_start: self.start().map(at),
            current_period_end: self.end().map(at),
            cancel_at_period_end: self.cancel_at_period_end,
            items: self.items.iter().map(|item| item.shown(shape)).collect(),
            subscription_metadata: self.shown_metadata(),
            livemode: true,
            stripe_account_id: Some(ACCOUNT.to_owned()),
            ..Subscription::default()
        }
    }

    pub(super) fn shown_metadata(&self) -> BTreeMap<String, String> {
        self.metadata
            .iter()
            .map(|(key, value)| ((*key).to_owned(), format!("v{value}")))
            .collect()
    }

    fn start(&self) -> Option<i64> {
        self.items.iter().map(|item| item.start).min()
    }

    fn end(&self) -> Option<i64> {
        self.items.iter().map(|item| item.end).max()
    }

    /// Renders `data.object`.
    pub(super) fn render(&self, shape: Shape) -> Value {
        let customer = json!({ "id": CUSTOMER, "object": "customer", "email": "jane@example.com" });
        let mut object = json!({
            "id": SUBSCRIPTION,
            "object": "subscription",
            "customer": if shape.customer_expanded { customer } else { json!(CUSTOMER) },
            "status": self.status,
            "created": self.created,
            "start_date": self.created,
            "cancel_at": self.cancel_at,
            "cancel_at_period_end": self.cancel_at_period_end,
            "canceled_at": self.canceled_at,
            "ended_at": self.ended_at,
            "trial_end": self.trial_end,
            "items": { "object": "list", "has_more": false, "url": "/v1/subscription_items",
                "data": self.items.iter().map(|item| item.render(shape)).collect::<Vec<_>>() },
            "metadata": self.shown_metadata(),
            "latest_invoice": format!("in_{}", self.latest_invoice),
            "pause_collection": self.pause_collection.map(|behavior| json!({ "behavior": behavior, "resumes_at": null })),
            "pending_update": self.pending_update.then(|| json!({ "expires_at": 1 })),
            "default_payment_method": self.default_payment_method.map(|number| format!("pm_{number}")),
            "collection_method": self.collection_method,
            "schedule": null,
            "billing_cycle_anchor": self.created,
        });
        if !shape.old {
            object["trial_start"] = json!(self.trial_start);
            object["cancellation_details"] =
                json!({ "comment": null, "feedback": null, "reason": self.cancellation_reason });
        }
        if matches!(shape.period, PeriodAt::Subscription | PeriodAt::Both) {
            object["current_period_start"] = json!(self.start());
            object["current_period_end"] = json!(self.end());
        }
        if shape.nulls_absent {
            object
                .as_object_mut()
                .expect("an object")
                .retain(|_, value| !value.is_null());
        }
        object
    }
}

impl ModelItem {
    fn price_id(&self) -> String {
        format!("price_{}", self.price)
    }

    /// Each product has two prices.
    fn product_id(&self) -> String {
        format!("prod_{}", self.price / 2)
    }

    /// Only some prices have a lookup key.
    fn lookup_key(&self) -> Option<String> {
        self.price
            .is_multiple_of(3)
            .then(|| format!("key-{}", self.price))
    }

    fn shown(&self, shape: Shape) -> Item {
        Item {
            price: Some(self.price_id()),
            product: Some(self.product_id()),
            quantity: self.quantity,
            lookup_key: self.lookup_key().filter(|_| !shape.only_plan),
        }
    }

    fn render(&self, shape: Shape) -> Value {
        let product = json!({ "id": self.product_id(), "object": "product", "name": "Plan" });
        let product = if shape.product_expanded {
            product
        } else {
            json!(self.product_id())
        };
        let mut item = json!({ "id": format!("si_{}", self.id), "object": "subscription_item", "metadata": {} });
        if !shape.only_plan {
            item["price"] = json!({ "id": self.price_id(), "object": "price", "product": product.clone(),
                "lookup_key": self.lookup_key(), "unit_amount": self.price * 100 });
        }
        if shape.only_plan || shape.with_plan {
            item["plan"] = json!({ "id": self.price_id(), "object": "plan", "product": product });
        }
        // Stripe leaves the quantity of a metered price out.
        if let Some(quantity) = self.quantity {
            item["quantity"] = json!(quantity);
        }
        if matches!(shape.period, PeriodAt::Items | PeriodAt::Both) {
            item["current_period_start"] = json!(self.start);
            item["current_period_end"] = json!(self.end);
        }
        item
    }
}

/// Returns `previous_attributes` as Stripe nests them: for objects the keys that changed, with null
/// for keys that were absent; arrays as a whole.
pub(super) fn previous_attributes(before: &Value, after: &Value) -> Map<String, Value> {
    let empty = Map::new();
    let (before, after) = (
        before.as_object().unwrap_or(&empty),
        after.as_object().unwrap_or(&empty),
    );
    let mut previous = Map::new();
    for (key, old) in before {
        match after.get(key) {
            Some(new) if new == old => {}
            Some(new) if new.is_object() && old.is_object() => {
                previous.insert(key.clone(), Value::Object(previous_attributes(old, new)));
            }
            _ => {
                previous.insert(key.clone(), old.clone());
            }
        }
    }
    for key in after.keys().filter(|key| !before.contains_key(*key)) {
        previous.insert(key.clone(), Value::Null);
    }
    previous
}
