//! The law of orphans: whatever the order and the batches in which a subscription's events arrive,
//! they lead to the same row, and to the same open orphans once every question is answered.

use std::collections::BTreeMap;
use std::time::Duration;

use litestripe_contract::event::{EventId, EventType, RESOLUTION_TYPE};
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::event::{
    Before, CheckoutSession, Event, Fetch, FetchStamp, Marks, Notification, NotifiedObject,
    Resolution as ResolutionBody, Snapshot, SubscriptionEvent,
};
use crate::payment::PaymentIds;
use crate::question::Details;

mod first_signal;
mod grace;
mod unsent;

const SUBSCRIPTION: &str = "sub_1";
/// The one client reference id that the lookup knows.
const USER: &str = "user_1";
const NOW: OffsetDateTime = time::macros::datetime!(2026-11-25 12:00 UTC);

proptest! {
    #![proptest_config(cases())]
    #[test]
    fn every_order_and_batching_leads_to_the_same_open_orphans(
        (events, order, ends) in prop::collection::vec(event(), 1..7).prop_flat_map(|events| {
            // Some events are delivered twice.
            let repeated = prop::collection::vec(0..events.len(), 0..3);
            let order = repeated.prop_map({
                let all = 0..events.len();
                move |repeated| all.clone().chain(repeated).collect::<Vec<_>>()
            });
            (Just(events), order.prop_shuffle(), prop::collection::vec(any::<bool>(), 9))
        }),
        lookup in any::<bool>(),
    ) {
        let rules = Rules { lookup, without_session: true, grace: Duration::from_secs(600) };
        let policy = Policy { rules, signalling: Signalling::Now };
        let arrivals: Vec<_> = events.into_iter().enumerate().map(|(index, events)| arrival(index, events)).collect();
        let mut once = Table::default();
        once.apply(arrivals.iter().collect(), &policy);

        let mut table = Table::default();
        let mut batch = Vec::new();
        for (index, end) in order.into_iter().zip(ends) {
            batch.push(&arrivals[index]);
            if end {
                table.apply(std::mem::take(&mut batch), &policy);
                prop_assert_eq!(table.is_awaited(), table.needs_user());
            }
        }
        table.apply(batch, &policy);
        prop_assert_eq!(table.is_awaited(), table.needs_user());
        prop_assert_eq!(once.is_awaited(), once.needs_user());
        prop_assert_eq!(table.end(), once.end());
    }
}

/// How many histories are tested. `LITESTRIPE_LONG` sets another number.
fn cases() -> ProptestConfig {
    #[expect(clippy::disallowed_methods, reason = "says how long a test runs")]
    let long = std::env::var("LITESTRIPE_LONG")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: long.unwrap_or(2_000),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// An event's body, and its second.
fn event() -> impl Strategy<Value = (i64, Body)> {
    let reference = || select(&[None, Some(USER), Some("stranger")][..]);
    let session = (
        select(&["cs_1", "cs_2"][..]),
        reference(),
        select(&["paid", "unpaid"][..]),
    );
    let payment = (reference(), select(&["paid", "unpaid"][..]));
    let statuses = &["incomplete", "incomplete_expired", "active", "canceled"][..];
    let body = prop_oneof![
        (select(statuses), any::<bool>())
            .prop_map(|(status, created)| subscription(status, created)),
        select(statuses).prop_map(searched),
        session.prop_map(|(id, reference, paid)| checkout_session(
            id,
            Some(SUBSCRIPTION),
            reference,
            paid
        )),
        // Without a subscription, each session keeps one client reference id, as at Stripe.
        payment.prop_map(|(reference, paid)| checkout_session(
            reference.unwrap_or("cs_once"),
            None,
            reference,
            paid
        )),
        Just(resolution(SUBSCRIPTION, Some(SUBSCRIPTION))),
        Just(resolution("cs_once", None)),
        Just(resolution("stranger", None)),
    ];
    (0..4_i64, body)
}

fn subscription(status: &str, created: bool) -> Body {
    Body::Subscription(Box::new(SubscriptionEvent {
        stripe_subscription_id: SUBSCRIPTION.to_owned(),
        snapshot: Snapshot {
            status: Some(status.to_owned()),
            ..Snapshot::default()
        },
        before: if created {
            Before::Nothing
        } else {
            Before::Same
        },
        marks: Marks::default(),
        marks_before: Marks::default(),
    }))
}

/// A subscription of this customer was fetched, and Stripe has no Checkout Session for it.
const UNCLAIMED: &str = "cus_unclaimed";

fn searched(status: &str) -> Body {
    let mut body = subscription(status, false);
    if let Body::Subscription(event) = &mut body {
        event.snapshot.customer = Some(UNCLAIMED.to_owned());
    }
    body
}

fn fetch(body: &Body, created: i64, index: usize) -> Option<Fetch> {
    let Body::Subscription(event) = body else {
        return None;
    };
    let is_fetched = event.snapshot.customer.as_deref() == Some(UNCLAIMED);
    is_fetched.then(|| Fetch {
        stamp: FetchStamp {
            date: created,
            mark: index as u64,
        },
        searched: true,
        ..Fetch::default()
    })
}

fn checkout_session(
    id: &str,
    subscription: Option<&str>,
    reference: Option<&str>,
    payment_status: &str,
) -> Body {
    Body::CheckoutSession(Box::new(CheckoutSession {
        id: id.to_owned(),
        mode: Some(
            if subscription.is_some() {
                "subscription"
            } else {
                "payment"
            }
            .to_owned(),
        ),
        payment_status: Some(payment_status.to_owned()),
        client_reference_id: reference.map(str::to_owned),
        stripe_subscription_id: subscription.map(str::to_owned),
        ..CheckoutSession::default()
    }))
}

/// An operator's resolution of an orphan.
fn resolution(orphan_id: &str, subscription: Option<&str>) -> Body {
    Body::Resolution(ResolutionBody {
        reason: None,
        orphan_id: orphan_id.to_owned(),
        payment: PaymentIds {
            stripe_subscription_id: subscription.map(str::to_owned),
            ..PaymentIds::default()
        },
        client_reference_id: "said_by_operator".to_owned(),
    })
}

fn arrival(index: usize, (second, body): (i64, Body)) -> Arrival {
    let event_type = match &body {
        Body::Subscription(_) => "customer.subscription.updated",
        Body::CheckoutSession(_) => "checkout.session.completed",
        Body::Resolution(_) => RESOLUTION_TYPE,
        Body::Notification(_) => "v1.customer.subscription.updated",
    };
    let created = NOW.unix_timestamp() - 60 + second;
    let event = Event {
        id: EventId::parse(format!("evt_{index}")).expect("it is an id"),
        event_type: EventType::parse(event_type).expect("it is a type"),
        created,
        livemode: false,
        stripe_account_id: None,
        fetch: fetch(&body, created, index),
        body,
        redacted: false,
    };
    Arrival {
        index,
        event,
        trace: None,
        received: None,
        stream: crate::arrival::StreamId::default(),
        stream_sequence: 1 + index as u64,
    }
}

/// The tables, as far as orphans need them.
#[derive(Default)]
struct Table {
    row: Option<Stored>,
    /// Whether each orphan is open.
    orphans: BTreeMap<String, bool>,
    questions: BTreeMap<(String, Kind), Question>,
}

impl Table {
    fn apply(&mut self, batch: Vec<&Arrival>, policy: &Policy) {
        let (by_subscription, others) = by_subscription(batch);
        for (id, arrivals) in by_subscription {
            let context = Context {
                policy,
                rebuilding: None,
                now: NOW,
            };
            let Some(plan) = plan_subscription(id, self.row.clone(), arrivals, context) else {
                continue;
            };
            let Row {
                state,
                version,
                revision,
                last_sent,
                ..
            } = plan.row;
            self.row = Some(Stored {
                state,
                version,
                revision,
                last_sent,
                dt_created: None,
            });
            self.follow(id, plan.consequences);
        }
        for (id, arrival) in others {
            self.follow(id, plan_payment(arrival, &policy.rules, NOW));
        }
    }

    fn follow(&mut self, id: &str, consequences: Consequences<'_>) {
        if let Some((_, orphan)) = consequences.orphan {
            self.orphans.entry(orphan.id).or_insert(true);
        }
        if let Some(resolution) = consequences.resolution {
            match resolution.by_operator {
                Some(_) => drop(self.orphans.insert(resolution.id, false)),
                None => self.resolve(&resolution.id),
            }
        }
        for kind in consequences.answered {
            self.questions.remove(&(id.to_owned(), kind));
        }
        for mut question in consequences.questions {
            let key = (question.entity_id.clone(), question.kind());
            if let Details::Lookup { is_paid, .. } = &mut question.details {
                *is_paid |= self.questions.get(&key).is_some_and(asks_of_paid);
            }
            self.questions.insert(key, question);
        }
    }

    fn resolve(&mut self, id: &str) {
        self.orphans
            .entry(id.to_owned())
            .and_modify(|open| *open = false);
    }

    /// Whether a row of a subscription may have been paid and has no user.
    fn needs_user(&self) -> bool {
        let row = self.visible();
        let status = row.subscription.status.as_deref();
        status.is_some_and(|status| !status.starts_with("incomplete"))
            && row.subscription.client_reference_id.is_none()
            && !row.paid
    }

    /// Whether the end of the grace period is asked for.
    fn is_awaited(&self) -> bool {
        let key = (SUBSCRIPTION.to_owned(), Kind::Grace);
        self.questions.contains_key(&key)
    }

    fn visible(&self) -> Visible {
        self.row
            .as_ref()
            .map(|row| row.state.visible())
            .unwrap_or_default()
    }

    /// Answers all questions and returns the row and the open orphans.
    fn end(mut self) -> (Visible, Vec<String>) {
        let row = self.visible();
        for ((id, _), question) in std::mem::take(&mut self.questions) {
            match &question.details {
                Details::Lookup {
                    payment,
                    client_reference_id,
                    is_paid,
                } => {
                    let reference = match &payment.stripe_subscription_id {
                        Some(_) => row.subscription.client_reference_id.as_ref(),
                        None => Some(client_reference_id),
                    };
                    if reference.is_some_and(|reference| reference == USER) {
                        self.resolve(&id);
                    } else if *is_paid {
                        self.orphans.entry(id).or_insert(true);
                    }
                }
                Details::Grace { .. } => drop(self.orphans.entry(id).or_insert(true)),
                Details::Fetch | Details::Erase | Details::Notification(_) | Details::Removal => {}
            }
        }
        let open = self
            .orphans
            .into_iter()
            .filter(|(_, open)| *open)
            .map(|(id, _)| id)
            .collect();
        (row, open)
    }
}

fn asks_of_paid(question: &Question) -> bool {
    matches!(question.details, Details::Lookup { is_paid: true, .. })
}

/// A subscription's Checkout Session has no row of its own. A batch with its fetch must still not
/// overtake one with the thin event that the fetch answers: the question would stay.
#[test]
fn fetch_of_a_session_shares_an_id_with_the_thin_event_that_it_answers() {
    let object = NotifiedObject::CheckoutSession("cs_1".to_owned());
    let notification = Notification {
        object,
        context: None,
    };
    let thin = arrival(0, (0, Body::Notification(notification)));
    let session = checkout_session("cs_1", Some(SUBSCRIPTION), None, "paid");
    let mut fetched = arrival(1, (1, session));
    fetched.event.fetch = Some(Fetch::default());
    let (thin, fetched) = (entity_ids(&[thin]), entity_ids(&[fetched]));
    assert!(!thin.is_disjoint(&fetched), "{thin:?} {fetched:?}");
    assert!(fetched.contains(SUBSCRIPTION));
}
