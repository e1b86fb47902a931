//! Reads responses of Stripe's API: lists of objects and events, a subscription's items beyond its
//! first page, and the email of a customer.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use litestripe_contract::event::{EventId, EventType, THIN_PREFIX};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Body, Email, MetadataKeys};

/// One object, with its unchanged JSON.
#[derive(Debug)]
pub struct Object {
    pub id: String,
    pub livemode: bool,
    pub raw: Box<RawValue>,
}

/// The kept fields of a subscription and of a Checkout Session, except email and metadata, which is
/// the operator's own text. Ids, states and dates do not name a person.
const FIELDS_WITHOUT_PERSONAL_DATA: [&str; 24] = [
    "cancel_at",
    "cancel_at_period_end",
    "canceled_at",
    "cancellation_details",
    "client_reference_id",
    "collection_method",
    "created",
    "current_period_end",
    "current_period_start",
    "customer",
    "customer_account",
    "ended_at",
    "id",
    "items",
    "livemode",
    "mode",
    "object",
    "pause_collection",
    "payment_status",
    "start_date",
    "status",
    "subscription",
    "trial_end",
    "trial_start",
];

impl Object {
    /// Returns the object without fields that may hold personal data. After an erasure they
    /// must not be stored again. `None` if the JSON is not an object.
    pub fn without_personal_data(&self) -> Option<Self> {
        let mut fields: serde_json::Map<String, Value> =
            serde_json::from_str(self.raw.get()).ok()?;
        fields.retain(|name, _| FIELDS_WITHOUT_PERSONAL_DATA.contains(&name.as_str()));
        // The comment is the customer's own text.
        if let Some(details) = fields.get_mut("cancellation_details") {
            let reason = details.get("reason").cloned();
            *details = serde_json::json!({ "reason": reason });
        }
        let raw = serde_json::value::to_raw_value(&fields).ok()?;
        Some(Self {
            id: self.id.clone(),
            livemode: self.livemode,
            raw,
        })
    }
}

/// Whether a subscription that Stripe returned has all of its items: an object contains only the
/// first page of a list. Stripe: "Pagination".
#[derive(Debug, PartialEq, Eq)]
pub enum Items {
    All,
    /// More follow after the item with this id, or from the beginning.
    More(Option<String>),
}

/// The fields of an item that we keep.
const ITEM_FIELDS: [&str; 5] = [
    "price",
    "plan",
    "quantity",
    "current_period_start",
    "current_period_end",
];

/// The fields of an item's price or plan that we keep.
const PRICE_FIELDS: [&str; 3] = ["id", "product", "lookup_key"];

/// A page of a list, in Stripe's order: newest first.
#[derive(Debug)]
pub struct Page {
    pub objects: Vec<Object>,
    /// Whether another page follows. Stripe: "Pagination".
    pub has_more: bool,
}

/// An event on a page of events, with its unchanged JSON.
#[derive(Debug)]
pub struct ListedEvent {
    pub id: EventId,
    pub event_type: EventType,
    /// The change that it reports. `None` if that cannot be read.
    pub change: Option<Change>,
    pub raw: Box<RawValue>,
}

/// What a snapshot event and the thin event for the same change have in common: their ids differ.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Change {
    /// The type of the snapshot event.
    event_type: String,
    object_id: String,
    /// `created` in whole seconds.
    pub created: i64,
}

impl Change {
    /// Reads the change from the body of a thin event. Returns `None` if the worker does not handle
    /// it.
    pub fn from_thin(body: &[u8]) -> Option<Self> {
        let event = super::decode(body, &MetadataKeys::Only(BTreeSet::new())).ok()??;
        let Body::Notification(notification) = &event.body else {
            return None;
        };
        let event_type = event.event_type.as_str().strip_prefix(THIN_PREFIX)?;
        Some(Self {
            event_type: event_type.to_owned(),
            object_id: notification.object.id().to_owned(),
            created: event.created,
        })
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.event_type, self.object_id, self.created)
    }
}

/// A page of events, newest first.
#[derive(Debug)]
pub struct EventPage {
    pub events: Vec<ListedEvent>,
    /// How many entries were skipped because they have no id or type under which they could be
    /// stored.
    pub skipped: usize,
    /// The id after which the next page starts, if another page follows. Stripe: "Pagination".
    pub after: Option<String>,
}

#[derive(Deserialize)]
struct Listed {
    id: Option<String>,
    #[serde(rename = "type")]
    event_type: Option<String>,
}

/// The part of a listed event that identifies the change. Read separately, because an event without
/// it can be stored anyway.
#[derive(Deserialize)]
struct ListedChange {
    created: i64,
    data: ListedData,
}

#[derive(Deserialize)]
struct ListedData {
    object: ListedObject,
}

#[derive(Deserialize)]
struct ListedObject {
    id: String,
}

#[derive(Deserialize)]
struct List {
    data: Vec<Box<RawValue>>,
    #[serde(default)]
    has_more: bool,
}

/// A list of which no page is missing.
#[derive(Serialize)]
struct WholeList<'a, T> {
    object: &'static str,
    data: &'a [T],
    has_more: bool,
}

impl<'a, T> WholeList<'a, T> {
    fn new(data: &'a [T]) -> Self {
        Self {
            object: "list",
            data,
            has_more: false,
        }
    }
}

#[derive(Deserialize)]
struct WithItems {
    #[serde(default)]
    items: Option<ItemList>,
}

#[derive(Deserialize)]
struct ItemList {
    #[serde(default)]
    data: Vec<ListedItem>,
    #[serde(default)]
    has_more: bool,
}

#[derive(Deserialize)]
struct ListedItem {
    id: Option<String>,
}

#[derive(Deserialize)]
struct Identified {
    id: String,
    #[serde(default)]
    livemode: bool,
}

#[derive(Deserialize)]
struct Customer {
    email: Option<String>,
}

/// Reads the object in `body`.
pub fn object(body: &[u8]) -> Option<Object> {
    identified(serde_json::from_slice(body).ok()?)
}

/// Reads the page of a list in `body`.
pub fn page(body: &[u8]) -> Option<Page> {
    let List { data, has_more } = serde_json::from_slice(body).ok()?;
    let objects: Vec<_> = data.into_iter().map(identified).collect::<Option<_>>()?;
    // Refuses a page without an id to continue from: the following pages would be missed.
    let can_continue = !has_more || !objects.is_empty();
    can_continue.then_some(Page { objects, has_more })
}

/// Returns whether the subscription in `object` has all of its items. `None` if the list of its
/// items cannot be continued.
pub fn items(object: &[u8]) -> Option<Items> {
    let WithItems { items } = serde_json::from_slice(object).ok()?;
    let Some(ItemList {
        data,
        has_more: true,
    }) = items
    else {
        return Some(Items::All);
    };
    Some(Items::More(match data.last() {
        Some(item) => Some(item.id.clone()?),
        None => None,
    }))
}

/// Reads the page of items in `body`. Reduces each item to the fields that we keep, because a
/// subscription with thousands of items has to fit into one message.
pub fn item_page(body: &[u8]) -> Option<Page> {
    let mut page = page(body)?;
    for item in &mut page.objects {
        let mut fields: serde_json::Map<String, Value> =
            serde_json::from_str(item.raw.get()).ok()?;
        let has_price = fields.get("price").is_some_and(|price| !price.is_null());
        fields.retain(|name, value| {
            let is_kept = ITEM_FIELDS.contains(&name.as_str()) && !value.is_null();
            is_kept && !(has_price && name == "plan")
        });
        for price in fields.values_mut().filter_map(Value::as_object_mut) {
            price.retain(|name, value| PRICE_FIELDS.contains(&name.as_str()) && !value.is_null());
        }
        item.raw = serde_json::value::to_raw_value(&fields).ok()?;
    }
    Some(page)
}

/// Returns the subscription in `object` with `more` behind its items. `None` if it is no
/// subscription.
pub fn with_items(object: &[u8], more: &[Object]) -> Option<Vec<u8>> {
    let mut fields: BTreeMap<Cow<'_, str>, Box<RawValue>> = serde_json::from_slice(object).ok()?;
    let List { mut data, .. } = serde_json::from_str(fields.get("items")?.get()).ok()?;
    data.extend(more.iter().map(|item| item.raw.clone()));
    let items = serde_json::value::to_raw_value(&WholeList::new(&data)).ok()?;
    fields.insert("items".into(), items);
    serde_json::to_vec(&fields).ok()
}

/// Returns a list of `objects` as Stripe would, on one page.
pub fn list(objects: &[Object]) -> Option<Vec<u8>> {
    let data: Vec<_> = objects.iter().map(|object| &*object.raw).collect();
    serde_json::to_vec(&WholeList::new(&data)).ok()
}

/// Reads the page of events in `body`.
pub fn event_page(body: &[u8]) -> Option<EventPage> {
    let List { data, has_more } = serde_json::from_slice(body).ok()?;
    let last = data
        .last()
        .and_then(|raw| serde_json::from_str::<Listed>(raw.get()).ok()?.id);
    let count = data.len();
    let events: Vec<_> = data.into_iter().filter_map(listed_event).collect();
    let skipped = count - events.len();
    // Refuses a page without an id to continue from: the following pages would be missed.
    let after = if has_more { Some(last?) } else { None };
    Some(EventPage {
        events,
        skipped,
        after,
    })
}

/// Reads the email of the customer in `body`, if it has one.
pub fn customer_email(body: &[u8]) -> Option<Email> {
    let customer: Customer = serde_json::from_slice(body).ok()?;
    customer
        .email
        .filter(|email| !email.trim().is_empty() && !email.contains('\0'))
        .map(Email)
}

fn identified(raw: Box<RawValue>) -> Option<Object> {
    let Identified { id, livemode } = serde_json::from_str(raw.get()).ok()?;
    Some(Object { id, livemode, raw })
}

fn listed_event(raw: Box<RawValue>) -> Option<ListedEvent> {
    let Listed { id, event_type } = serde_json::from_str(raw.get()).ok()?;
    let (id, event_type) = (
        EventId::parse(id?).ok()?,
        EventType::parse(event_type?).ok()?,
    );
    let change = serde_json::from_str::<ListedChange>(raw.get()).ok();
    let change = change.map(|change| Change {
        event_type: event_type.to_string(),
        object_id: change.data.object.id,
        created: change.created,
    });
    Some(ListedEvent {
        id,
        event_type,
        change,
        raw,
    })
}
