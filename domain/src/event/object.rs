//! Reads the objects that events carry.
//!
//! Owns the fields of subscriptions, Checkout Sessions and our own resolutions, and how to read
//! them from every API version: expanded or not, with the period on the subscription or on its
//! items, with prices or plans. May not know the envelope around them. Invariant: the states of a
//! subscription before and after an event are read by the same rules, so that equal states read as
//! equal.

use std::collections::BTreeMap;

use litestripe_contract::event::{EventId, ID_BYTES_MAX};
use litestripe_contract::signal::{Item, PauseCollection, Timestamp};

use super::json::{self, Leaf, Nested, objects, parse_borrowed};
use super::marks::{Mark, Marked, Marks};
use super::read::Place;
use super::{
    Before, CheckoutSession, DecodeError, Email, MetadataKeys, Problem, Resolution, Snapshot,
    SubscriptionEvent,
};
use crate::payment::PaymentIds;

/// The longest status, mode and the like, in bytes. Stripe's longest today has 18.
const STATUS_BYTES_MAX: usize = 64;
/// The longest client reference id, lookup key or email, in bytes. Stripe: 200 characters for the
/// first two, 512 for the last.
pub(super) const TEXT_BYTES_MAX: usize = 1024;

objects! {
    /// The fields of all kinds of `data.object`. An event's type usually comes after its data, so a
    /// single pass does not know the kind yet. Fields that belong to another kind are not used.
    pub(super) struct Fields {
        id: Leaf<'a> = "id",
        livemode: Leaf<'a> = "livemode",
        created: Leaf<'a> = "created",
        customer: Leaf<'a> = "customer",
        customer_account: Leaf<'a> = "customer_account",
        metadata: Leaf<'a> = "metadata",
        status: Leaf<'a> = "status",
        start_date: Leaf<'a> = "start_date",
        cancel_at: Leaf<'a> = "cancel_at",
        cancel_at_period_end: Leaf<'a> = "cancel_at_period_end",
        canceled_at: Leaf<'a> = "canceled_at",
        ended_at: Leaf<'a> = "ended_at",
        trial_end: Leaf<'a> = "trial_end",
        current_period_start: Leaf<'a> = "current_period_start",
        current_period_end: Leaf<'a> = "current_period_end",
        items: Leaf<'a> = "items",
        pause_collection: Leaf<'a> = "pause_collection",
        cancellation_details: Leaf<'a> = "cancellation_details",
        trial_start: Leaf<'a> = "trial_start",
        collection_method: Leaf<'a> = "collection_method",
        latest_invoice: Leaf<'a> = "latest_invoice",
        default_payment_method: Leaf<'a> = "default_payment_method",
        schedule: Leaf<'a> = "schedule",
        pending_update: Leaf<'a> = "pending_update",
        billing_cycle_anchor: Leaf<'a> = "billing_cycle_anchor",
        mode: Leaf<'a> = "mode",
        payment_status: Leaf<'a> = "payment_status",
        client_reference_id: Leaf<'a> = "client_reference_id",
        subscription: Leaf<'a> = "subscription",
        customer_email: Leaf<'a> = "customer_email",
        customer_details: Leaf<'a> = "customer_details",
        object: Leaf<'a> = "object",
        orphan_id: Leaf<'a> = "orphan_id",
        checkout_session_id: Leaf<'a> = "checkout_session_id",
        stripe_customer_id: Leaf<'a> = "stripe_customer_id",
        reason: Leaf<'a> = "reason",
        stripe_subscription_id: Leaf<'a> = "stripe_subscription_id",
    }

    struct ItemList {
        data: Leaf<'a> = "data",
        has_more: Leaf<'a> = "has_more",
    }

    struct PauseFields {
        behavior: Leaf<'a> = "behavior",
        resumes_at: Leaf<'a> = "resumes_at",
    }

    struct CancellationDetails {
        reason: Leaf<'a> = "reason",
    }

    struct ItemFields {
        price: Leaf<'a> = "price",
        plan: Leaf<'a> = "plan",
        quantity: Leaf<'a> = "quantity",
        current_period_start: Leaf<'a> = "current_period_start",
        current_period_end: Leaf<'a> = "current_period_end",
    }

    struct PriceFields {
        id: Leaf<'a> = "id",
        product: Leaf<'a> = "product",
        lookup_key: Leaf<'a> = "lookup_key",
    }

    struct CustomerDetails {
        email: Leaf<'a> = "email",
    }

    struct Identified {
        id: Leaf<'a> = "id",
    }
}

const OBJECT: Place = Place("data.object.");
const PREVIOUS: Place = Place("data.previous_attributes.");

impl Fields<'_> {
    pub(super) fn livemode(&self) -> Result<Option<bool>, DecodeError> {
        OBJECT.flag(self.livemode, "livemode")
    }
}

/// Reads a subscription from the event that created it: it did not exist before.
pub(super) fn created(
    object: &Fields<'_>,
    keys: &MetadataKeys,
) -> Result<SubscriptionEvent, DecodeError> {
    let event = subscription(object, &Nested::Absent, keys)?;
    Ok(SubscriptionEvent {
        before: Before::Nothing,
        ..event
    })
}

/// Reads a subscription after an event, and before it by applying `previous` over it.
pub(super) fn subscription(
    object: &Fields<'_>,
    previous: &Nested<Fields<'_>>,
    keys: &MetadataKeys,
) -> Result<SubscriptionEvent, DecodeError> {
    let stripe_subscription_id = required_id(object.id, "id")?;
    let mut reading = Reading::default();
    reading.overlay(object, OBJECT, keys)?;
    OBJECT.check_metadata_size(&reading.kept.metadata, object.metadata)?;
    let snapshot = reading.clone().snapshot();
    let (mut marks, mut marks_before) = (reading.marks, reading.marks);
    let before = match previous {
        Nested::Absent | Nested::Null => Before::Same,
        Nested::Object(previous) if reading.overlay(previous, PREVIOUS, keys).is_ok() => {
            marks_before = reading.marks;
            marks = marks.after(&marks_before);
            let before = reading.snapshot();
            if before == snapshot {
                Before::Same
            } else {
                Before::Snapshot(Box::new(before))
            }
        }
        // This does not poison the event: only its position among the events of its second is
        // unknown.
        _ => Before::Unreadable,
    };
    Ok(SubscriptionEvent {
        stripe_subscription_id,
        snapshot,
        before,
        marks,
        marks_before,
    })
}

/// A subscription while it is read. The periods are still kept where the API version put them.
#[derive(Clone, Default)]
struct Reading {
    /// All fields except the current period.
    kept: Snapshot,
    own: Period,
    items: Period,
    marks: Marks,
}

#[derive(Clone, Copy, Default)]
struct Period {
    start: Option<i64>,
    end: Option<i64>,
}

impl Reading {
    /// Applies `fields` over the fields read so far. A present field replaces the old value;
    /// objects are merged key by key.
    fn overlay(
        &mut self,
        fields: &Fields<'_>,
        at: Place,
        keys: &MetadataKeys,
    ) -> Result<(), DecodeError> {
        let kept = &mut self.kept;
        if fields.status.is_present() {
            kept.status = at.text(fields.status, "status", STATUS_BYTES_MAX)?;
        }
        if fields.cancel_at_period_end.is_present() {
            let flag = at.flag(fields.cancel_at_period_end, "cancel_at_period_end")?;
            kept.cancel_at_period_end = flag.unwrap_or(false);
        }
        for (target, leaf, name) in [
            (&mut kept.created, fields.created, "created"),
            (&mut kept.start_date, fields.start_date, "start_date"),
            (&mut kept.cancel_at, fields.cancel_at, "cancel_at"),
            (&mut kept.canceled_at, fields.canceled_at, "canceled_at"),
            (&mut kept.ended_at, fields.ended_at, "ended_at"),
            (&mut kept.trial_end, fields.trial_end, "trial_end"),
            (
                &mut self.own.start,
                fields.current_period_start,
                "current_period_start",
            ),
            (
                &mut self.own.end,
                fields.current_period_end,
                "current_period_end",
            ),
        ] {
            if leaf.is_present() {
                *target = at.seconds(leaf, name)?;
            }
        }
        overlay_reference(&mut kept.customer, fields.customer, at, "customer")?;
        at.overlay_metadata(&mut kept.metadata, fields.metadata, keys)?;
        self.overlay_details(fields, at)?;
        self.mark_hidden(fields, at);
        self.overlay_items(fields.items, at)
    }

    /// Applies the fields that have marks and are kept.
    fn overlay_details(&mut self, fields: &Fields<'_>, at: Place) -> Result<(), DecodeError> {
        let details = &mut self.kept.details;
        let account = fields.customer_account;
        overlay_reference(
            &mut details.customer_account,
            account,
            at,
            "customer_account",
        )?;
        if fields.trial_start.is_present() {
            details.trial_start = at.seconds(fields.trial_start, "trial_start")?;
            let text = details.trial_start.map(|at| at.to_string());
            self.marks
                .set(Marked::TrialStart, Mark::from_value(text.as_deref()));
        }
        if fields.collection_method.is_present() {
            let leaf = fields.collection_method;
            details.collection_method = at.text(leaf, "collection_method", STATUS_BYTES_MAX)?;
            let mark = Mark::from_value(details.collection_method.as_deref());
            self.marks.set(Marked::CollectionMethod, mark);
        }
        if fields.cancellation_details.is_present() {
            let leaf = fields.cancellation_details;
            match at.object(leaf, "cancellation_details")? {
                None => details.cancellation_reason = None,
                Some(CancellationDetails { reason }) if reason.is_present() => {
                    details.cancellation_reason =
                        at.text(reason, "cancellation_details.reason", STATUS_BYTES_MAX)?;
                }
                Some(_) => {}
            }
            let mark = Mark::from_value(details.cancellation_reason.as_deref());
            self.marks.set(Marked::CancellationReason, mark);
        }
        if fields.pause_collection.is_present() {
            overlay_pause(&mut details.pause_collection, fields.pause_collection, at)?;
            let json = details
                .pause_collection
                .as_ref()
                .map(|pause| serde_json::to_string(pause).expect("a pause is two texts"));
            self.marks
                .set(Marked::PauseCollection, Mark::from_value(json.as_deref()));
        }
        Ok(())
    }

    /// Marks the fields that are not kept. They only help to order the events of a second, so one
    /// that cannot be read counts as missing.
    fn mark_hidden(&mut self, fields: &Fields<'_>, at: Place) {
        for (field, leaf) in [
            (Marked::LatestInvoice, fields.latest_invoice),
            (Marked::DefaultPaymentMethod, fields.default_payment_method),
            (Marked::Schedule, fields.schedule),
        ] {
            if let Some(mark) = reference_mark(leaf, at) {
                self.marks.set(field, mark);
            }
        }
        if fields.pending_update.is_present() {
            // Its price and quantity become the items' once it is applied, so only its presence
            // counts here.
            let text = fields.pending_update.value().map(|_| "present");
            self.marks
                .set(Marked::PendingUpdate, Mark::from_value(text));
        }
        if fields.billing_cycle_anchor.is_present() {
            let mark = match at.integer(fields.billing_cycle_anchor, "") {
                Ok(seconds) => {
                    let text = seconds.map(|seconds| seconds.to_string());
                    Mark::from_value(text.as_deref())
                }
                Err(_) => Mark::Missing,
            };
            self.marks.set(Marked::BillingCycleAnchor, mark);
        }
    }

    fn overlay_items(&mut self, leaf: Leaf<'_>, at: Place) -> Result<(), DecodeError> {
        if !leaf.is_present() {
            return Ok(());
        }
        let data = match leaf.value() {
            None => leaf,
            Some(json) if json.starts_with('[') => leaf,
            Some(json) => match parse_borrowed(json) {
                Some(Nested::Object(ItemList { data, has_more })) if data.is_present() => {
                    if let Some(has_more) = at.flag(has_more, "items.has_more")? {
                        self.kept.details.has_more_items = has_more;
                    }
                    data
                }
                Some(Nested::Object(_)) => return Ok(()),
                _ => return Err(at.fault("items", Problem::NotAList)),
            },
        };
        (self.kept.items, self.items) = items(data, at)?;
        Ok(())
    }

    fn snapshot(self) -> Snapshot {
        Snapshot {
            current_period_start: self.own.start.or(self.items.start),
            current_period_end: self.own.end.or(self.items.end),
            ..self.kept
        }
    }
}

/// Reads the items in `list`, with the earliest start and the latest end of their periods.
fn items(list: Leaf<'_>, at: Place) -> Result<(Vec<Item>, Period), DecodeError> {
    let Some(json) = list.value() else {
        return Ok(Default::default());
    };
    let list: Option<Vec<Nested<ItemFields<'_>>>> = parse_borrowed(json);
    let list = list.ok_or_else(|| at.fault("items.data", Problem::NotAList))?;
    let mut items = Vec::with_capacity(list.len());
    let mut period = Period::default();
    for fields in list {
        let Nested::Object(fields) = fields else {
            return Err(at.fault("items.data", Problem::NotAList));
        };
        let start = at.seconds(
            fields.current_period_start,
            "items.data[].current_period_start",
        )?;
        let end = at.seconds(fields.current_period_end, "items.data[].current_period_end")?;
        period.start = period.start.into_iter().chain(start).min();
        period.end = period.end.max(end);
        items.push(item(&fields, at)?);
    }
    Ok((items, period))
}

fn item(fields: &ItemFields<'_>, at: Place) -> Result<Item, DecodeError> {
    let item = match fields.price.value() {
        Some(_) => priced(fields.price, at, "items.data[].price")?,
        None => priced(fields.plan, at, "items.data[].plan")?,
    };
    Ok(Item {
        quantity: at.integer(fields.quantity, "items.data[].quantity")?,
        ..item
    })
}

/// Reads an item's price or plan, which may be only its id.
fn priced(leaf: Leaf<'_>, at: Place, name: &'static str) -> Result<Item, DecodeError> {
    let mut item = Item::default();
    match leaf.value().map(|json| json.as_bytes().first().copied()) {
        None => {}
        Some(Some(b'"')) => item.price = at.text(leaf, name, ID_BYTES_MAX)?,
        Some(_) => {
            let price = at.object(leaf, name)?.unwrap_or(PriceFields::default());
            item.price = at.text(price.id, name, ID_BYTES_MAX)?;
            item.lookup_key = at.text(
                price.lookup_key,
                "items.data[].price.lookup_key",
                TEXT_BYTES_MAX,
            )?;
            overlay_reference(
                &mut item.product,
                price.product,
                at,
                "items.data[].price.product",
            )?;
        }
    }
    Ok(item)
}

/// Applies a reference over `target`: an id, an object with an id, or null, which clears `target`.
fn overlay_reference(
    target: &mut Option<String>,
    leaf: Leaf<'_>,
    at: Place,
    name: &'static str,
) -> Result<(), DecodeError> {
    match leaf.value().map(|json| json.as_bytes().first().copied()) {
        None if leaf.is_present() => *target = None,
        None => {}
        Some(Some(b'"')) => *target = at.text(leaf, name, ID_BYTES_MAX)?,
        Some(Some(b'{')) => {
            let object = at.object(leaf, name)?.unwrap_or(Identified::default());
            if object.id.is_present() {
                *target = at.text(object.id, name, ID_BYTES_MAX)?;
            }
        }
        Some(_) => return Err(at.fault(name, Problem::NotAReference)),
    }
    Ok(())
}

/// Returns the mark of a reference. `None` if `leaf` says nothing about it: it is absent, or an
/// expanded object of which only other fields changed.
fn reference_mark(leaf: Leaf<'_>, at: Place) -> Option<Mark> {
    let mut id = None;
    match overlay_reference(&mut id, leaf, at, "") {
        Ok(()) if id.is_none() && leaf.value().is_some() => None,
        Ok(()) if leaf.is_present() => Some(Mark::from_value(id.as_deref())),
        Ok(()) => None,
        Err(_) => Some(Mark::Missing),
    }
}

/// Applies a pause over `target`, key by key, or null, which clears `target`.
fn overlay_pause(
    target: &mut Option<PauseCollection>,
    leaf: Leaf<'_>,
    at: Place,
) -> Result<(), DecodeError> {
    let Some(fields) = at.object(leaf, "pause_collection")? else {
        *target = None;
        return Ok(());
    };
    let PauseFields {
        behavior,
        resumes_at,
    } = fields;
    let pause = target.get_or_insert_default();
    if behavior.is_present() {
        pause.behavior = at.text(behavior, "pause_collection.behavior", STATUS_BYTES_MAX)?;
    }
    if resumes_at.is_present() {
        let seconds = at.seconds(resumes_at, "pause_collection.resumes_at")?;
        pause.resumes_at = seconds.and_then(|seconds| Timestamp::from_unix(seconds).ok());
    }
    Ok(())
}

pub(super) fn checkout_session(
    object: &Fields<'_>,
    keys: &MetadataKeys,
) -> Result<CheckoutSession, DecodeError> {
    let text = |leaf, name, bytes_max| OBJECT.text(leaf, name, bytes_max);
    let reference = text(
        object.client_reference_id,
        "client_reference_id",
        TEXT_BYTES_MAX,
    )?;
    let mut session = CheckoutSession {
        id: required_id(object.id, "id")?,
        mode: text(object.mode, "mode", STATUS_BYTES_MAX)?,
        status: text(object.status, "status", STATUS_BYTES_MAX)?,
        payment_status: text(object.payment_status, "payment_status", STATUS_BYTES_MAX)?,
        client_reference_id: reference,
        stripe_customer_id: None,
        customer_account: None,
        stripe_subscription_id: None,
        customer_email: customer_email(object),
        metadata: BTreeMap::new(),
        created: OBJECT.seconds(object.created, "created")?,
    };
    overlay_reference(
        &mut session.stripe_customer_id,
        object.customer,
        OBJECT,
        "customer",
    )?;
    overlay_reference(
        &mut session.customer_account,
        object.customer_account,
        OBJECT,
        "customer_account",
    )?;
    if session.stripe_customer_id.is_none() {
        session
            .stripe_customer_id
            .clone_from(&session.customer_account);
    }
    let mut subscription = None;
    overlay_reference(
        &mut subscription,
        object.subscription,
        OBJECT,
        "subscription",
    )?;
    session.stripe_subscription_id = subscription
        .map(|id| checked_id(id, "subscription"))
        .transpose()?;
    OBJECT.overlay_metadata(&mut session.metadata, object.metadata, keys)?;
    OBJECT.check_metadata_size(&session.metadata, object.metadata)?;
    Ok(session)
}

/// Reads the email that was entered at checkout, else the one that the session was created with. An
/// unreadable email counts as missing: only an orphan needs it, and the rest of the session matters
/// more.
fn customer_email(object: &Fields<'_>) -> Option<Email> {
    let email = |leaf| OBJECT.text(leaf, "customer_email", TEXT_BYTES_MAX).ok()?;
    let details = OBJECT
        .object(object.customer_details, "customer_details")
        .ok()?;
    let entered = email(details.unwrap_or(CustomerDetails::default()).email);
    entered.or_else(|| email(object.customer_email)).map(Email)
}

/// Reads an operator's resolution of an orphan, as a worker published it.
pub(super) fn resolution(object: &Fields<'_>) -> Result<Resolution, DecodeError> {
    let subscription = OBJECT.text(
        object.stripe_subscription_id,
        "stripe_subscription_id",
        ID_BYTES_MAX,
    )?;
    let reference = OBJECT.text(
        object.client_reference_id,
        "client_reference_id",
        TEXT_BYTES_MAX,
    )?;
    let missing = || OBJECT.fault("client_reference_id", Problem::Missing);
    Ok(Resolution {
        reason: OBJECT.text(object.reason, "reason", TEXT_BYTES_MAX)?,
        orphan_id: required_id(object.orphan_id, "orphan_id")?,
        payment: PaymentIds {
            checkout_session_id: OBJECT.text(
                object.checkout_session_id,
                "checkout_session_id",
                ID_BYTES_MAX,
            )?,
            stripe_customer_id: OBJECT.text(
                object.stripe_customer_id,
                "stripe_customer_id",
                ID_BYTES_MAX,
            )?,
            stripe_subscription_id: subscription
                .map(|id| checked_id(id, "stripe_subscription_id"))
                .transpose()?,
        },
        client_reference_id: reference.ok_or_else(missing)?,
    })
}

pub(super) fn is_checkout_session(object: &Fields<'_>) -> bool {
    matches!(OBJECT.text(object.object, "object", STATUS_BYTES_MAX), Ok(Some(name)) if name == "checkout.session")
}

fn required_id(leaf: Leaf<'_>, name: &'static str) -> Result<String, DecodeError> {
    checked_id(OBJECT.required_text(leaf, name, ID_BYTES_MAX)?, name)
}

/// Checks an id by the rules for event ids: it may become a key, a header or part of a message id.
fn checked_id(id: String, name: &'static str) -> Result<String, DecodeError> {
    if EventId::fits(&id) {
        Ok(id)
    } else {
        Err(OBJECT.fault(name, Problem::NotAnId))
    }
}
