//! What a batch does to one row, and to what belongs to it. Pure.
//!
//! Owns transitions: which merged events are signalled, under which revision, and what an event
//! makes of orphans and open questions. May not know SQL, messages, or the clock.

use std::collections::BTreeMap;

use litestripe_contract::signal::{Access, EventReference, Subscription, SubscriptionChanged};
use litestripe_contract::subject;
use time::OffsetDateTime;

use crate::arrival::Arrival;
use crate::event::Body;
use crate::merge::{self, Visible};
use crate::orphan::{self, NewOrphan, Rules};
use crate::question::{Kind, Question};
use crate::row::{Due, NewDue, Rebuilding, Row, Stored};
use crate::signal::{self, NewSignal};

/// Who is told of what events change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signalling {
    /// Each change is signalled: the events are live.
    Now,
    /// What changed is signalled once, with its final state, when the replay reaches its end. What
    /// stands between would revoke paying customers on a rebuild.
    Later {
        /// The replay.
        replay: String,
        /// Whether rows that did not change are sent too, under their existing revision.
        unchanged: bool,
    },
    /// Nobody is. A row that changes still gets another revision, under which it can be sent.
    Never,
}

/// What a batch is applied under.
#[derive(Debug)]
pub struct Terms {
    /// What the operator wants of orphans.
    pub rules: Rules,
    /// Who is told.
    pub signalling: Signalling,
}

/// What a batch is applied under, and what it met.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances<'a> {
    /// The terms.
    pub terms: &'a Terms,
    /// The replay that may not have reached an event of the same row yet.
    pub rebuilding: Option<&'a Rebuilding>,
    /// When.
    pub now: OffsetDateTime,
}

/// What a batch does to orphans and open questions, be there a row or not.
#[derive(Debug, Default)]
pub struct Consequences<'a> {
    /// A payment that names no user, and the event that told.
    pub orphan: Option<(&'a Arrival, NewOrphan)>,
    /// An orphan that found its user, if it is one.
    pub resolution: Option<Resolution<'a>>,
    /// Questions to ask.
    pub questions: Vec<Question>,
    /// Kinds of questions about this row that need no answer any more.
    pub answered: Vec<Kind>,
}

/// An orphan that found its user, if there is one under this id.
#[derive(Debug)]
pub struct Resolution<'a> {
    /// The orphan's id.
    pub id: String,
    /// The user.
    pub client_reference_id: String,
    /// The event that told.
    pub arrival: &'a Arrival,
    /// Of an operator's: what is noted when there is no such orphan yet, and since when it holds.
    pub by_operator: Option<(NewOrphan, OffsetDateTime)>,
}

/// What a batch does to one subscription's row.
#[derive(Debug)]
pub struct Plan<'a> {
    /// The row's key.
    pub id: &'a str,
    /// The events merged into it.
    pub arrivals: Vec<&'a Arrival>,
    /// The row as it is to be written.
    pub row: Row,
    /// A signal per transition, in the order of their revisions.
    pub signals: Vec<NewSignal>,
    /// The signal that becomes due.
    pub due: Option<NewDue>,
    /// Whether the signal that was due is among `signals`, or needless.
    pub settles_due: bool,
    /// Whether what live events would tell is left to the end of the replay that was met.
    pub is_withheld: bool,
    /// What follows for orphans and open questions.
    pub consequences: Consequences<'a>,
}

/// Events by the id of the subscription whose row they concern.
pub type BySubscription<'a> = BTreeMap<&'a str, Vec<&'a Arrival>>;

/// The events by subscription, in the order of its key, and those about a payment by its id.
///
/// An operator's word is among both: the orphan follows it also where the row has a newer client
/// reference id and does not.
#[must_use]
pub fn by_subscription(pending: Vec<&Arrival>) -> (BySubscription<'_>, Vec<(&str, &Arrival)>) {
    let mut by_subscription = BySubscription::new();
    let mut others = Vec::new();
    for arrival in pending {
        let id = arrival.event.stripe_subscription_id();
        if let Some(id) = id {
            by_subscription.entry(id).or_default().push(arrival);
        }
        match &arrival.event.body {
            Body::CheckoutSession(session) if id.is_none() => others.push((session.id.as_str(), arrival)),
            Body::Resolution(resolution) => others.push((resolution.orphan_id.as_str(), arrival)),
            Body::CheckoutSession(_) | Body::Subscription(_) => {}
        }
    }
    others.sort_by_key(|(id, _)| *id);
    (by_subscription, others)
}

/// Merges `arrivals` into the row, one by one in the order of (`created`, id). Each that changes a
/// visible column is a transition with its own revision. None if nothing is to be written.
#[must_use]
pub fn of_subscription<'a>(
    id: &'a str,
    stored: Option<Stored>,
    mut arrivals: Vec<&'a Arrival>,
    circumstances: Circumstances<'_>,
) -> Option<Plan<'a>> {
    let Circumstances { terms, now, .. } = circumstances;
    arrivals.sort_by(|a, b| (a.event.created, &a.event.id).cmp(&(b.event.created, &b.event.id)));
    let Stored { mut state, version, revision, dt_created, due } = stored.unwrap_or_default();
    let before = state.visible();
    let mut teller = Teller::new(id, revision, due.as_ref(), &before);
    let mut after = before.clone();
    let mut merged = Vec::new();
    for &arrival in &arrivals {
        if !state.merge(&arrival.event) {
            continue;
        }
        merged.push(arrival);
        after = state.visible();
        if terms.signalling == Signalling::Now {
            let event = signal::reference(&arrival.event);
            teller.tell(&after.subscription, event, arrival.traceparent.clone(), false, now);
        }
    }
    let mut new_due = None;
    let mut settles_due = false;
    let withheld_for = circumstances.rebuilding.filter(|rebuilding| {
        terms.signalling == Signalling::Now && is_half_built(rebuilding, version, due.is_some(), &after, &arrivals)
    });
    if withheld_for.is_some() {
        teller = Teller::new(id, revision, due.as_ref(), &before);
    }
    match (&terms.signalling, due) {
        // No signal, and what is due stays so.
        (Signalling::Now, Some(_)) if withheld_for.is_some() => {}
        (Signalling::Now, None) => {
            new_due = withheld_for.zip(merged.last()).map(|(rebuilding, last)| NewDue {
                entity_id: id.to_owned(),
                subject: subject::SUBSCRIPTION_CHANGED,
                due: Due {
                    replay: rebuilding.replay.clone(),
                    told: None,
                    unchanged: false,
                    event: signal::reference(&last.event),
                },
            });
        }
        (Signalling::Now, Some(due)) => {
            // A live event signals such a row at once, whether or not it changed it.
            let event = signal::standing(&state).unwrap_or(due.event);
            teller.tell(&after.subscription, event, None, true, now);
            settles_due = !teller.signals.is_empty() || !due.unchanged;
        }
        (Signalling::Later { replay, unchanged }, due) => {
            let is_changed = teller.differs(&after.subscription) && due.is_none();
            let cause = merged.last().or(arrivals.last()).map(|arrival| signal::reference(&arrival.event));
            let exists = !merged.is_empty() || version > 0;
            new_due = cause.filter(|_| is_changed || (*unchanged && exists)).map(|event| NewDue {
                entity_id: id.to_owned(),
                subject: subject::SUBSCRIPTION_CHANGED,
                due: Due { replay: replay.clone(), told: teller.told.clone(), unchanged: *unchanged, event },
            });
        }
        (Signalling::Never, None) if revision > 0 && teller.differs(&after.subscription) => {
            teller.revision = next_revision(revision, now);
        }
        (Signalling::Never, _) => {}
    }
    if merged.is_empty() && new_due.is_none() && !settles_due {
        return None;
    }
    let consequences = match merged.last() {
        Some(&last) => {
            let step = Step { before: &before, after: &after, dt_created: dt_created.unwrap_or(now), now };
            of_row(&merged, last, &step, &terms.rules)
        }
        None => Consequences::default(),
    };
    let row = Row {
        stripe_subscription_id: id.to_owned(),
        state,
        visible: after,
        version: version + 1,
        revision: teller.revision,
    };
    Some(Plan {
        id,
        arrivals,
        row,
        signals: teller.signals,
        due: new_due,
        settles_due,
        is_withheld: withheld_for.is_some(),
        consequences,
    })
}

/// Whether a live event may show a row half built: it makes the row, of what is older than the replay, or
/// leaves it without the state that only the replay can bring. Told, it would revoke a paying customer.
fn is_half_built(rebuilding: &Rebuilding, version: i64, is_due: bool, after: &Visible, arrivals: &[&Arrival]) -> bool {
    if is_due {
        return after.subscription.status.is_none();
    }
    let of_session = || {
        let sessions = arrivals.iter().filter_map(|arrival| match &arrival.event.body {
            Body::CheckoutSession(session) => session.created,
            Body::Subscription(_) | Body::Resolution(_) => None,
        });
        sessions.min()
    };
    let created = after.subscription.created.map(|created| created.unix()).or_else(of_session);
    version == 0 && created.is_none_or(|created| created < rebuilding.started.unix_timestamp())
}

/// A row of which a replay that reached its end owes a signal, and the signal.
#[derive(Debug)]
pub struct Overdue {
    /// The row as it is to be written.
    pub row: Row,
    /// The signal, unless in the end there is nothing to tell.
    pub signal: Option<NewSignal>,
}

/// What is signalled of a row at the end of a replay: its final state, once.
#[must_use]
pub fn of_overdue(id: &str, stored: Stored, due: Due, now: OffsetDateTime) -> Overdue {
    let visible = stored.state.visible();
    let mut teller = Teller::new(id, stored.revision, Some(&due), &visible);
    let event = signal::standing(&stored.state).unwrap_or(due.event);
    teller.tell(&visible.subscription, event.clone(), None, true, now);
    let signal = match teller.signals.pop() {
        None if due.unchanged => Some(of_unchanged(id, &visible.subscription, stored.revision, event, now)),
        signal => signal,
    };
    let row = Row {
        stripe_subscription_id: id.to_owned(),
        state: stored.state,
        visible,
        version: stored.version + 1,
        revision: teller.revision,
    };
    Overdue { row, signal }
}

/// A row once more, under the revision it has: for subscribers that missed it.
#[must_use]
pub fn of_unchanged(
    id: &str,
    subscription: &Subscription,
    revision: i64,
    event: EventReference,
    now: OffsetDateTime,
) -> NewSignal {
    let again = SubscriptionChanged {
        stripe_subscription_id: id.to_owned(),
        access: Access::of_status(subscription.status.as_deref()),
        subscription: subscription.clone(),
        revision,
        previous_revision: None,
        changed: Vec::new(),
        previous: serde_json::Map::new(),
        event,
        replayed: true,
    };
    signal::subscription_again(&again, now)
}

/// Tells subscribers of one row.
struct Teller<'a> {
    id: &'a str,
    /// What they were told last; None if nothing yet.
    told: Option<Subscription>,
    revision: i64,
    signals: Vec<NewSignal>,
}

impl<'a> Teller<'a> {
    fn new(id: &'a str, revision: i64, due: Option<&Due>, stored: &Visible) -> Self {
        let told = match due {
            Some(due) => due.told.clone(),
            None => (revision > 0).then(|| stored.subscription.clone()),
        };
        Self { id, told, revision, signals: Vec::new() }
    }

    /// A new row is told of even if it looks like no row.
    fn differs(&self, now: &Subscription) -> bool {
        self.told.as_ref() != Some(now)
    }

    /// Tells what the row is, under a revision of its own, if that is news.
    fn tell(
        &mut self,
        subscription: &Subscription,
        event: EventReference,
        traceparent: Option<String>,
        replayed: bool,
        now: OffsetDateTime,
    ) {
        if !self.differs(subscription) {
            return;
        }
        let previous_revision = (self.revision > 0).then_some(self.revision);
        self.revision = next_revision(self.revision, now);
        let changes = merge::changes(&self.told.take().unwrap_or_default(), subscription);
        let (changed, previous) = changes.map(|changes| (changes.changed, changes.previous)).unwrap_or_default();
        let told = SubscriptionChanged {
            stripe_subscription_id: self.id.to_owned(),
            access: Access::of_status(subscription.status.as_deref()),
            subscription: subscription.clone(),
            revision: self.revision,
            previous_revision,
            changed,
            previous,
            event,
            replayed,
        };
        self.signals.push(signal::subscription_changed(&told, traceparent));
        self.told = Some(told.subscription);
    }
}

/// What a batch makes of a row.
struct Step<'r> {
    before: &'r Visible,
    after: &'r Visible,
    /// When the row was first written.
    dt_created: OffsetDateTime,
    now: OffsetDateTime,
}

/// What a step means for the row's orphan and open questions.
fn of_row<'a>(merged: &[&'a Arrival], last: &'a Arrival, step: &Step<'_>, rules: &Rules) -> Consequences<'a> {
    let &Step { before, after, dt_created, now } = step;
    let mut consequences = Consequences::default();
    let sessions = || merged.iter().copied().filter(|arrival| matches!(arrival.event.body, Body::CheckoutSession(_)));
    match &after.subscription.client_reference_id {
        None if after.paid => {
            consequences.orphan = sessions().find_map(|arrival| Some((arrival, missing_reference(arrival)?)));
        }
        None => {}
        Some(client_reference_id) => {
            let is_new = before.subscription.client_reference_id.as_ref() != Some(client_reference_id);
            if merged.iter().any(|arrival| matches!(arrival.event.body, Body::Resolution(_))) {
                // Nobody need be asked against an operator's word. The orphan follows it in `of_payment`.
                consequences.answered.push(Kind::Lookup);
            } else if rules.lookup {
                // One session may say that it is paid and another whose it is, in any order: the row knows both.
                let paid_first = sessions().max_by_key(|arrival| is_paid(arrival));
                let lookup = |arrival| orphan::lookup(arrival, client_reference_id, after.paid, now);
                consequences.questions.extend(paid_first.and_then(lookup));
            } else if is_new {
                consequences.resolution = Some(Resolution {
                    id: last.event.stripe_subscription_id().unwrap_or_default().to_owned(),
                    client_reference_id: client_reference_id.clone(),
                    arrival: last,
                    by_operator: None,
                });
            }
        }
    }
    let claimed = |row: &Visible| row.checkout_session_id.is_some() || row.subscription.client_reference_id.is_some();
    let may_be_paid = |row: &Visible| orphan::may_be_paid(row.subscription.status.as_deref());
    if claimed(after) && before.created_event_seen && !claimed(before) {
        consequences.answered.push(Kind::Grace);
    } else if after.created_event_seen && (!before.created_event_seen || (may_be_paid(after) && !may_be_paid(before))) {
        // The sweep forgets the question while nothing was paid.
        let created = merged.iter().copied().find(|arrival| arrival.is_creation()).unwrap_or(last);
        let end = orphan::end_of_grace(after, dt_created, rules.grace);
        consequences.questions.extend(orphan::grace(created, after, rules, end));
    }
    if after.subscription.uncertain {
        consequences.questions.extend(orphan::fetch(last, after, now));
    } else if before.subscription.uncertain {
        consequences.answered.push(Kind::Fetch);
    }
    consequences
}

/// What an event that concerns no subscription's row means for orphans and open questions.
#[must_use]
pub fn of_payment<'a>(arrival: &'a Arrival, rules: &Rules, now: OffsetDateTime) -> Consequences<'a> {
    let mut consequences = Consequences { resolution: by_operator(arrival), ..Consequences::default() };
    consequences.orphan = missing_reference(arrival).map(|orphan| (arrival, orphan));
    if rules.lookup
        && let Body::CheckoutSession(session) = &arrival.event.body
        && let Some(client_reference_id) = session.client_reference_id.as_deref().filter(|_| session.is_paid())
    {
        consequences.questions.extend(orphan::lookup(arrival, client_reference_id, true, now));
    }
    if consequences.resolution.is_some() {
        consequences.answered.push(Kind::Lookup);
    }
    consequences
}

fn is_paid(arrival: &Arrival) -> bool {
    matches!(&arrival.event.body, Body::CheckoutSession(session) if session.is_paid())
}

fn missing_reference(arrival: &Arrival) -> Option<NewOrphan> {
    match &arrival.event.body {
        Body::CheckoutSession(session) => orphan::of_session(&arrival.event, session),
        Body::Subscription(_) | Body::Resolution(_) => None,
    }
}

fn by_operator(arrival: &Arrival) -> Option<Resolution<'_>> {
    let Body::Resolution(resolution) = &arrival.event.body else { return None };
    Some(Resolution {
        id: resolution.orphan_id.clone(),
        client_reference_id: resolution.client_reference_id.clone(),
        arrival,
        by_operator: Some((
            orphan::of_resolution(&arrival.event, resolution),
            signal::reference(&arrival.event).created.get(),
        )),
    })
}

/// The revision after `revision`: grows, also across a rebuild of the database.
#[must_use]
pub fn next_revision(revision: i64, now: OffsetDateTime) -> i64 {
    let milliseconds = i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX);
    milliseconds.max(revision + 1)
}

#[cfg(test)]
mod tests;
