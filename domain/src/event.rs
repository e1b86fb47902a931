//! Decodes the bytes of an event into a typed event.
//!
//! Owns the names of Stripe's JSON fields (only this module has them) and the choice of fields that
//! are kept. These few fields are read by presence, never by API version, so that every rendering
//! of an object reads the same. May not know JetStream, the database, or what the worker does with
//! an event. Invariant: an event that `decode` returns can be stored and signalled without further
//! checks, and the error for one that it refuses shows none of the event's values.

pub mod api;
mod json;
mod marks;
mod object;
pub mod owner;
mod read;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use litestripe_contract::event::{
    EventId, EventType, HANDLED_THIN_TYPES, HANDLED_TYPES, ID_BYTES_MAX, RESOLUTION_TYPE,
    SNAPSHOT_TYPE, THIN_OBJECT,
};
use litestripe_contract::signal::{EventReference, Item, PauseCollection};
use serde::{Deserialize, Serialize};

use json::{Leaf, Nested, objects};
pub use marks::Marks;
use object::Fields;
use read::Place;

use crate::payment::PaymentIds;

/// The longest client reference id, in bytes. An event with a longer one can never be applied.
pub const CLIENT_REFERENCE_ID_BYTES_MAX: usize = object::TEXT_BYTES_MAX;

/// The kept part of an event of a type that the worker handles.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub id: EventId,
    /// The type in the body.
    pub event_type: EventType,
    /// When Stripe created it: seconds since the Unix epoch, in the range of a `Timestamp`.
    pub created: i64,
    pub livemode: bool,
    /// The connected account it came from.
    pub stripe_account_id: Option<String>,
    pub body: Body,
    /// How its object was fetched, for our own `litestripe.snapshot`.
    pub fetch: Option<Fetch>,
    /// Whether its personal data must not be kept: see [`Event::redact`].
    pub redacted: bool,
}

/// How a worker fetched the object of a `litestripe.snapshot` from Stripe's API.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fetch {
    pub stamp: FetchStamp,
    /// The thin events that led to the fetch: of each type the one that was received last.
    pub notifications: Vec<EventReference>,
    /// Whether Stripe was asked for the subscription's Checkout Sessions too, and lists none that
    /// names a user.
    pub searched: bool,
}

/// The order of the fetches of one object: of two successive fetches, the later one has the larger
/// stamp.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FetchStamp {
    /// The `Date` of Stripe's answer: seconds since the Unix epoch.
    pub date: i64,
    /// The position of the last event in `STRIPE_EVENTS` when the fetch began
    /// ([`StreamId::position`](crate::arrival::StreamId::position)). Orders fetches of the same
    /// second: a fetch is stored before the next one of the same object begins.
    pub mark: u64,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// `customer.subscription.*` and our own `litestripe.snapshot`.
    Subscription(Box<SubscriptionEvent>),
    /// `checkout.session.*`.
    CheckoutSession(Box<CheckoutSession>),
    /// Our own `litestripe.resolution`.
    Resolution(Resolution),
    /// A thin event.
    Notification(Notification),
}

/// A thin event: it only says that an object changed. Stripe: "Thin events".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    pub object: NotifiedObject,
    /// The account that has to be named to fetch the object, as in the event: a connected account,
    /// or a path for organizations.
    pub context: Option<String>,
}

/// The object that a thin event is about, by its id: printable ASCII.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotifiedObject {
    Subscription(String),
    CheckoutSession(String),
}

impl NotifiedObject {
    pub fn id(&self) -> &str {
        match self {
            Self::Subscription(id) | Self::CheckoutSession(id) => id,
        }
    }
}

/// A subscription after an event, and before it as far as the event says.
#[derive(Debug, Clone, PartialEq)]
pub struct SubscriptionEvent {
    /// Stripe's id of the subscription: printable ASCII.
    pub stripe_subscription_id: String,
    pub snapshot: Snapshot,
    pub before: Before,
    /// What else the event says about the state after it.
    pub marks: Marks,
    /// What else it says about the state before it.
    pub marks_before: Marks,
}

/// The state of a subscription before an event.
#[derive(Debug, Clone, PartialEq)]
pub enum Before {
    /// It did not exist: the event created it.
    Nothing,
    /// The same as after it: the event has no previous attributes, or none among the fields we
    /// keep. Marks may differ.
    Same,
    Snapshot(Box<Snapshot>),
    /// Unknown: the event has previous attributes, but they cannot be read.
    Unreadable,
}

/// The fields we keep of a subscription, independent of the API version that rendered it. Times are
/// seconds since the Unix epoch, in the range of a `Timestamp`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub customer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_date: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancel_at: Option<i64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cancel_at_period_end: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub canceled_at: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trial_end: Option<i64>,
    /// The subscription's own start if it has one, else the earliest start of its items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_period_start: Option<i64>,
    /// The subscription's own end if it has one, else the latest end of its items.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_period_end: Option<i64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub items: Vec<Item>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "Details::is_empty")]
    pub details: Details,
}

/// The fields of a snapshot that its digest leaves out: digests that an earlier version stored keep
/// their meaning. [`Marks`] take the digest's place.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(default)]
pub struct Details {
    /// Stripe's `cancellation_details.reason`. The comment beside it is the customer's own text and
    /// not kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cancellation_reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trial_start: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collection_method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pause_collection: Option<PauseCollection>,
    /// The customer's account, `acct_…`. Never changes, so it needs no mark. Stripe: "Accounts v2",
    /// `customer_account`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub customer_account: Option<String>,
    /// Whether the event had only the first page of the items.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub has_more_items: bool,
}

impl Details {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Snapshot {
    /// Returns a copy without metadata.
    pub(crate) fn without_metadata(&self) -> Self {
        Self {
            details: self.details.clone(),
            ..self.without_metadata_and_details()
        }
    }

    /// Returns a copy of what the digest covers, without metadata.
    pub(crate) fn without_metadata_and_details(&self) -> Self {
        let Self {
            customer,
            status,
            items,
            ..
        } = self;
        let (customer, status, items) = (customer.clone(), status.clone(), items.clone());
        Self {
            customer,
            status,
            items,
            metadata: BTreeMap::new(),
            details: Details::default(),
            ..*self
        }
    }
}

/// A Checkout Session after an event.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CheckoutSession {
    /// Stripe's id of the session: printable ASCII.
    pub id: String,
    pub mode: Option<String>,
    pub status: Option<String>,
    pub payment_status: Option<String>,
    /// Never blank.
    pub client_reference_id: Option<String>,
    /// The customer, or the customer's account if the session names no other customer.
    pub stripe_customer_id: Option<String>,
    pub customer_account: Option<String>,
    /// Printable ASCII.
    pub stripe_subscription_id: Option<String>,
    /// The email that was entered at checkout, else the one that the session was created with.
    pub customer_email: Option<Email>,
    pub metadata: BTreeMap<String, String>,
    pub created: Option<i64>,
}

impl CheckoutSession {
    /// Returns whether the session is paid, so that the payment must belong to a user.
    ///
    /// Stripe: "The Checkout Session object", `payment_status`: `unpaid` may still become paid,
    /// which another event reports. `no_payment_required` counts as paid, but the field also has
    /// this value before the session is complete and after it expired. Old API versions have no
    /// `status`. A session of mode `setup` never has a payment.
    pub fn is_paid(&self) -> bool {
        let pays = matches!(self.mode.as_deref(), Some("payment" | "subscription"));
        let completed = matches!(self.status.as_deref(), None | Some("complete"));
        pays && completed
            && matches!(
                self.payment_status.as_deref(),
                Some("paid" | "no_payment_required")
            )
    }

    /// Returns whether the session claims its subscription: it has a client reference id, or it is
    /// paid. A paid session without an id makes an orphan; an unpaid one without an id claims
    /// nothing.
    pub fn is_claim(&self) -> bool {
        self.client_reference_id.is_some() || self.is_paid()
    }
}

/// An operator's resolution: the user of an orphan. Also carries what the orphan's row needs if a
/// rebuild applies the resolution before the payment.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolution {
    pub reason: Option<String>,
    pub orphan_id: String,
    /// The ids of the payment. The subscription's id is printable ASCII.
    pub payment: PaymentIds,
    /// The user. Never blank.
    pub client_reference_id: String,
}

/// An email address. Its `Debug` hides it, because no log may show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Returns the address, for the one column that may hold it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Email(…)")
    }
}

/// Which metadata keys are kept: `LITESTRIPE_METADATA_KEYS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetadataKeys {
    /// `*`: all of them.
    All,
    /// Only these. Empty for `none`.
    Only(BTreeSet<String>),
}

/// The error for a text that is not a list of metadata keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("neither `*` nor metadata keys separated by commas")]
pub struct InvalidMetadataKeys;

impl FromStr for MetadataKeys {
    type Err = InvalidMetadataKeys;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "*" => Ok(Self::All),
            "" | "none" => Ok(Self::Only(BTreeSet::new())),
            list => {
                let keys: BTreeSet<String> =
                    list.split(',').map(|key| key.trim().to_owned()).collect();
                if keys.contains("") || keys.contains("*") {
                    return Err(InvalidMetadataKeys);
                }
                Ok(Self::Only(keys))
            }
        }
    }
}

impl MetadataKeys {
    fn keeps(&self, key: &[u8]) -> bool {
        match self {
            Self::All => true,
            Self::Only(keys) => std::str::from_utf8(key).is_ok_and(|key| keys.contains(key)),
        }
    }
}

/// Why an event can never be applied. Names fields, shows no values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Both numbers count from 1.
    #[error("the body is not JSON (line {line}, column {column})")]
    NotJson { line: usize, column: usize },
    #[error("the body is not an object")]
    NotAnObject,
    #[error("`{place}{name}` {problem}")]
    Field {
        place: &'static str,
        name: &'static str,
        problem: Problem,
    },
}

/// What is wrong with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("is missing")]
    Missing,
    #[error("is not a valid id")]
    NotAnId,
    #[error("is not a valid event type")]
    NotAType,
    #[error("is not an object")]
    NotAnObject,
    #[error("is neither an id nor an object")]
    NotAReference,
    #[error("is not a list of objects")]
    NotAList,
    #[error("is not text that can be kept")]
    NotText,
    #[error("holds a NUL character")]
    Nul,
    #[error("is longer than {0} bytes")]
    TooLong(usize),
    #[error("is not a whole number")]
    NotInteger,
    #[error("lies outside the years 0 to 9999")]
    OutOfRange,
    #[error("is not a time of RFC 3339")]
    NotATime,
    #[error("is neither true nor false")]
    NotBoolean,
}

objects! {
    struct Envelope {
        id: Leaf<'a> = "id",
        event_type: Leaf<'a> = "type",
        created: Leaf<'a> = "created",
        livemode: Leaf<'a> = "livemode",
        account: Leaf<'a> = "account",
        user_id: Leaf<'a> = "user_id",
        data: Nested<Data<'a>> = "data",
        object: Leaf<'a> = "object",
        context: Leaf<'a> = "context",
        related_object: Nested<RelatedObject<'a>> = "related_object",
        fetched: Nested<Fetched<'a>> = "fetched",
        notifications: Leaf<'a> = "notifications",
        searched: Leaf<'a> = "searched",
    }

    struct RelatedObject {
        id: Leaf<'a> = "id",
    }

    struct Fetched {
        date: Leaf<'a> = "date",
        mark: Leaf<'a> = "mark",
    }

    struct Data {
        object: Nested<Fields<'a>> = "object",
        previous_attributes: Nested<Fields<'a>> = "previous_attributes",
    }
}

const ENVELOPE: Place = Place("");
const RELATED: Place = Place("related_object.");

/// Decodes an event. Returns `None` if its type is not handled.
///
/// The type is taken from the body, not from the subject under which it was stored.
pub fn decode(body: &[u8], keys: &MetadataKeys) -> Result<Option<Event>, DecodeError> {
    let envelope: Envelope<'_> = match serde_json::from_slice(body) {
        Ok(Nested::Object(envelope)) => envelope,
        Ok(_) => return Err(DecodeError::NotAnObject),
        Err(error) => {
            return Err(DecodeError::NotJson {
                line: error.line(),
                column: error.column(),
            });
        }
    };
    let event_type = ENVELOPE.required_text(envelope.event_type, "type", ID_BYTES_MAX)?;
    let event_type =
        EventType::parse(event_type).map_err(|_| ENVELOPE.fault("type", Problem::NotAType))?;
    if is_thin(&envelope) {
        return notification(&envelope, event_type);
    }
    let Some(kind) = Kind::from_event_type(event_type.as_str()) else {
        return Ok(None);
    };
    let id = ENVELOPE.required_text(envelope.id, "id", ID_BYTES_MAX)?;
    let id = EventId::parse(id).map_err(|_| ENVELOPE.fault("id", Problem::NotAnId))?;
    let created = ENVELOPE.seconds(envelope.created, "created")?;
    let created = created.ok_or_else(|| ENVELOPE.fault("created", Problem::Missing))?;
    let stripe_account_id = account(&envelope)?;
    let fetch = (event_type.as_str() == SNAPSHOT_TYPE).then(|| fetch(&envelope, created));
    let Nested::Object(data) = envelope.data else {
        return Err(ENVELOPE.fault("data", missing_or_no_object(&envelope.data)));
    };
    let Nested::Object(object) = &data.object else {
        return Err(ENVELOPE.fault("data.object", missing_or_no_object(&data.object)));
    };
    let livemode = match ENVELOPE.flag(envelope.livemode, "livemode")? {
        Some(livemode) => livemode,
        None => object.livemode()?.unwrap_or(false),
    };
    let body = match kind {
        Kind::Snapshot if object::is_checkout_session(object) => {
            Body::CheckoutSession(Box::new(object::checkout_session(object, keys)?))
        }
        Kind::Created => Body::Subscription(Box::new(object::created(object, keys)?)),
        Kind::Subscription | Kind::Snapshot => {
            let event = object::subscription(object, &data.previous_attributes, keys)?;
            Body::Subscription(Box::new(event))
        }
        Kind::CheckoutSession => {
            Body::CheckoutSession(Box::new(object::checkout_session(object, keys)?))
        }
        Kind::Resolution => Body::Resolution(object::resolution(object)?),
    };
    Ok(Some(Event {
        id,
        event_type,
        created,
        livemode,
        stripe_account_id,
        body,
        fetch,
        redacted: false,
    }))
}

fn is_thin(envelope: &Envelope<'_>) -> bool {
    let object = ENVELOPE.text(envelope.object, "object", ID_BYTES_MAX);
    matches!(object, Ok(Some(object)) if object == THIN_OBJECT)
}

/// Reads a thin event. Returns `None` if its type is not handled.
fn notification(
    envelope: &Envelope<'_>,
    event_type: EventType,
) -> Result<Option<Event>, DecodeError> {
    let Some(wrap) = notified_object(event_type.as_str()) else {
        return Ok(None);
    };
    let id = ENVELOPE.required_text(envelope.id, "id", ID_BYTES_MAX)?;
    let id = EventId::parse(id).map_err(|_| ENVELOPE.fault("id", Problem::NotAnId))?;
    let Nested::Object(related) = &envelope.related_object else {
        let problem = missing_or_no_object(&envelope.related_object);
        return Err(ENVELOPE.fault("related_object", problem));
    };
    let object = RELATED.required_text(related.id, "id", ID_BYTES_MAX)?;
    if !EventId::fits(&object) {
        return Err(RELATED.fault("id", Problem::NotAnId));
    }
    let context = ENVELOPE.text(envelope.context, "context", ID_BYTES_MAX)?;
    Ok(Some(Event {
        id,
        event_type,
        created: ENVELOPE.rfc3339(envelope.created, "created")?,
        livemode: ENVELOPE
            .flag(envelope.livemode, "livemode")?
            .unwrap_or(false),
        stripe_account_id: context.as_deref().and_then(account_of_context),
        body: Body::Notification(Notification {
            object: wrap(object),
            context,
        }),
        fetch: None,
        redacted: false,
    }))
}

/// Returns the kind of object that thin events of a type are about. `None` if the type is not
/// handled.
fn notified_object(event_type: &str) -> Option<fn(String) -> NotifiedObject> {
    let is_handled = |handled: &&str| match handled.strip_suffix('*') {
        Some(prefix) => event_type.len() > prefix.len() && event_type.starts_with(prefix),
        None => event_type == *handled,
    };
    let handled = HANDLED_THIN_TYPES.into_iter().find(is_handled)?;
    Some(if handled.starts_with("v1.checkout.session.") {
        NotifiedObject::CheckoutSession
    } else {
        NotifiedObject::Subscription
    })
}

/// Reads the connected account of an event: its `account`, else what newer events (`context`) and
/// the oldest ones (`user_id`) have in its place.
fn account(envelope: &Envelope<'_>) -> Result<Option<String>, DecodeError> {
    let account = ENVELOPE.text(envelope.account, "account", ID_BYTES_MAX)?;
    if account.is_some() {
        return Ok(account);
    }
    let context = ENVELOPE.text(envelope.context, "context", ID_BYTES_MAX)?;
    match context.as_deref().and_then(account_of_context) {
        None => ENVELOPE.text(envelope.user_id, "user_id", ID_BYTES_MAX),
        account => Ok(account),
    }
}

/// Returns the account that a context names: the last part of a path. Stripe: "Stripe-Context".
pub(crate) fn account_of_context(context: &str) -> Option<String> {
    let account = context.rsplit('/').next()?;
    (!account.trim().is_empty()).then(|| account.to_owned())
}

/// Reads how the object of a `litestripe.snapshot` was fetched. The previous version wrote nothing
/// of this: its snapshots are ordered by their `created`.
fn fetch(envelope: &Envelope<'_>, created: i64) -> Fetch {
    let number = |leaf: Leaf<'_>| leaf.value().and_then(json::parse);
    let stamp = match &envelope.fetched {
        Nested::Object(Fetched { date, mark }) => FetchStamp {
            date: number(*date).unwrap_or(created),
            mark: mark.value().and_then(json::parse).unwrap_or_default(),
        },
        _ => FetchStamp {
            date: created,
            mark: 0,
        },
    };
    let notifications = envelope.notifications.value().and_then(json::parse);
    Fetch {
        stamp,
        notifications: notifications.unwrap_or_default(),
        searched: envelope.searched.value() == Some("true"),
    }
}

impl Event {
    /// Returns the id of the subscription that the event is about, if it is about one.
    pub fn stripe_subscription_id(&self) -> Option<&str> {
        match &self.body {
            Body::Subscription(event) => Some(&event.stripe_subscription_id),
            Body::CheckoutSession(session) => session.stripe_subscription_id.as_deref(),
            Body::Resolution(resolution) => resolution.payment.stripe_subscription_id.as_deref(),
            Body::Notification(_) => None,
        }
    }

    /// Returns whether the event says something about this subscription, or announces it.
    pub fn is_about(&self, stripe_subscription_id: &str) -> bool {
        match &self.body {
            Body::Notification(Notification {
                object: NotifiedObject::Subscription(id),
                ..
            }) => id == stripe_subscription_id,
            _ => self.stripe_subscription_id() == Some(stripe_subscription_id),
        }
    }

    /// Returns the id of the object that was fetched, and how, for a `litestripe.snapshot`.
    pub fn fetched(&self) -> Option<(&str, &Fetch)> {
        let id = match &self.body {
            Body::Subscription(event) => &event.stripe_subscription_id,
            Body::CheckoutSession(session) => &session.id,
            Body::Resolution(_) | Body::Notification(_) => return None,
        };
        Some((id, self.fetch.as_ref()?))
    }

    /// Removes email and metadata. What the event says about the subscription's state still counts.
    ///
    /// The snapshot of a subscription keeps its metadata for now: it is part of the digest, which
    /// must equal the digest of the same event if that was merged before the erasure. The merge
    /// does not store it.
    pub fn redact(&mut self) {
        self.redacted = true;
        if let Body::CheckoutSession(session) = &mut self.body {
            session.customer_email = None;
            session.metadata.clear();
        }
    }

    /// Returns the metadata that may be kept. `None` if the event's object has no metadata.
    pub fn metadata(&self) -> Option<&BTreeMap<String, String>> {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        match &self.body {
            Body::Subscription(_) if self.redacted => Some(&NONE),
            Body::Subscription(event) => Some(&event.snapshot.metadata),
            Body::CheckoutSession(session) => Some(&session.metadata),
            Body::Resolution(_) | Body::Notification(_) => None,
        }
    }
}

/// The kind of object that events of a type carry.
enum Kind {
    /// A subscription that was just created.
    Created,
    Subscription,
    CheckoutSession,
    /// A subscription or a Checkout Session: the object itself says which.
    Snapshot,
    Resolution,
}

impl Kind {
    fn from_event_type(event_type: &str) -> Option<Self> {
        match event_type {
            RESOLUTION_TYPE => Some(Self::Resolution),
            SNAPSHOT_TYPE => Some(Self::Snapshot),
            "customer.subscription.created" => Some(Self::Created),
            other if !HANDLED_TYPES.contains(&other) => None,
            other if other.starts_with("checkout.session.") => Some(Self::CheckoutSession),
            _ => Some(Self::Subscription),
        }
    }
}

fn missing_or_no_object<T>(nested: &Nested<T>) -> Problem {
    match nested {
        Nested::Absent | Nested::Null => Problem::Missing,
        _ => Problem::NotAnObject,
    }
}

#[cfg(test)]
mod tests;
