//! What a batch does to one row, and to its orphan and open questions. Pure.
//!
//! The worker applies events in batches. [`by_subscription`] groups the events of a batch.
//! [`plan_subscription`] merges the events of one subscription into its row and returns a [`Plan`]:
//! the new row, the signals of its changes, and the [`Consequences`] for orphans and questions. An
//! event about a payment without a subscription has only consequences: [`plan_payment`]. The worker
//! writes all plans of a batch in one transaction.
//!
//! Owns transitions: which merged events are signalled, under which revision, and what an event
//! means for orphans and open questions. May not know SQL, messages, or the clock.

use std::collections::{BTreeMap, HashSet};

use litestripe_contract::signal::{Access, EventReference, Subscription, SubscriptionChanged};
use time::OffsetDateTime;

use crate::arrival::Arrival;
use crate::event::{Body, CheckoutSession};
use crate::merge::{self, Changes, State, Visible};
use crate::orphan::{self, NewOrphan, Rules};
use crate::question::{self, Kind, Question};
use crate::row::{LastSent, Row, Stored};
use crate::signal::{self, Cause, NewSignal};

mod first_signal;

use first_signal::{Decision, Unknown};

pub use first_signal::{Rebuilt, plan_rebuilt};

/// When changes are signalled to subscribers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signalling {
    /// At once, one signal per change: the events are live.
    Now,
    /// Once per row, when the replay has reached its end. Until then a changed row has an unsent
    /// signal. During a rebuild, signals of the states in between would revoke paying customers.
    Later,
    /// Never. A changed row still gets a new revision, under which it can be resent. A new row that
    /// is not whole is withheld also after the replay.
    Never,
}

/// The settings under which a batch is applied. A replay has its own.
#[derive(Debug)]
pub struct Policy {
    pub rules: Rules,
    pub signalling: Signalling,
}

/// The policy of a batch, and the situation in which it is applied.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    pub policy: &'a Policy,
    /// When the unfinished rebuild was started, if there is one. It may not have reached all events
    /// of the row yet, or may have lost some.
    pub rebuilding: Option<OffsetDateTime>,
    pub now: OffsetDateTime,
}

/// What a batch means for orphans and open questions, with or without a row.
#[derive(Debug, Default)]
pub struct Consequences<'a> {
    /// A payment without a client reference id, and the event that reported it.
    pub orphan: Option<(&'a Arrival, NewOrphan)>,
    pub resolution: Option<Resolution<'a>>,
    pub questions: Vec<Question>,
    /// The kinds of questions about this row that are answered.
    pub answered: Vec<Kind>,
}

/// The user of a payment was found. If there is an orphan with this id, it is resolved.
#[derive(Debug)]
pub struct Resolution<'a> {
    pub id: String,
    pub client_reference_id: String,
    pub arrival: &'a Arrival,
    /// For an operator's resolution: the orphan to write if there is none yet, and the time of the
    /// resolution.
    pub by_operator: Option<(NewOrphan, OffsetDateTime)>,
}

/// What a batch does to one subscription's row.
#[derive(Debug)]
pub struct Plan<'a> {
    pub id: &'a str,
    pub arrivals: Vec<&'a Arrival>,
    pub row: Row,
    /// One signal per transition, in the order of their revisions.
    pub signals: Vec<NewSignal>,
    pub consequences: Consequences<'a>,
}

/// Events by the id of the subscription that they are about.
pub type BySubscription<'a> = BTreeMap<&'a str, Vec<&'a Arrival>>;

/// Groups events by subscription, in the order of the key. Returns them with the events about a
/// payment and the payment's id.
///
/// An operator's resolution is in both. It resolves the orphan even if the row has a newer client
/// reference id and therefore ignores the resolution.
pub fn by_subscription(pending: Vec<&Arrival>) -> (BySubscription<'_>, Vec<(&str, &Arrival)>) {
    let mut by_subscription = BySubscription::new();
    let mut others = Vec::new();
    for arrival in pending {
        let id = arrival.event.stripe_subscription_id();
        if let Some(id) = id {
            by_subscription.entry(id).or_default().push(arrival);
        }
        match &arrival.event.body {
            Body::CheckoutSession(session) if id.is_none() => {
                others.push((session.id.as_str(), arrival))
            }
            Body::Resolution(resolution) => others.push((resolution.orphan_id.as_str(), arrival)),
            Body::Notification(notification) => others.push((notification.object.id(), arrival)),
            Body::CheckoutSession(_) | Body::Subscription(_) => {}
        }
    }
    others.sort_by_key(|(id, _)| *id);
    (by_subscription, others)
}

/// Returns the ids of what the events write: subscriptions, payments, and the objects of thin
/// events and of fetches. Events that share one are applied in their order, so that a fetch comes
/// after the thin events that it answers.
pub fn entity_ids(arrivals: &[Arrival]) -> HashSet<String> {
    let (by_subscription, others) = by_subscription(arrivals.iter().collect());
    let fetched = arrivals
        .iter()
        .filter_map(|arrival| Some(arrival.event.fetched()?.0));
    let ids = by_subscription
        .into_keys()
        .chain(others.into_iter().map(|(id, _)| id))
        .chain(fetched);
    ids.map(str::to_owned).collect()
}

/// Merges `arrivals` into the row, one by one in the order of (`created`, id). Each event that
/// changes a visible column is a transition with its own revision. Returns `None` if there is
/// nothing to write.
pub fn plan_subscription<'a>(
    id: &'a str,
    stored: Option<Stored>,
    mut arrivals: Vec<&'a Arrival>,
    context: Context<'_>,
) -> Option<Plan<'a>> {
    let Context {
        policy,
        rebuilding,
        now,
    } = context;
    arrivals.sort_by(|a, b| (a.event.created, &a.event.id).cmp(&(b.event.created, &b.event.id)));
    let Stored {
        mut state,
        version,
        revision,
        dt_created,
        last_sent: sent_before,
    } = stored.unwrap_or_default();
    let before = state.visible();
    let mut merged = merge_all(&mut state, &arrivals);
    let after = merged
        .last()
        .map_or(&before, |transition| &transition.shown);
    let unknown = (revision == 0).then(|| Unknown {
        sent_before: &sent_before,
        is_new: version == 0,
        after,
        arrivals: &arrivals,
        merged: &merged,
        rebuilding,
    });
    let decision = first_signal::decide(policy.signalling, unknown);
    let mut sender = Sender::new(id, revision, &sent_before, &before.subscription, now);
    let last_sent = sender.follow(decision, &merged, &after.subscription, || {
        let newest = || {
            arrivals
                .last()
                .map(|newest| signal::reference(&newest.event))
        };
        signal::last_event(&state).or_else(newest)
    });
    let Sender {
        signals, revision, ..
    } = sender;
    if merged.is_empty() && (version == 0 || (signals.is_empty() && last_sent == sent_before)) {
        return None;
    }
    let consequences = merged.last().map_or_else(Consequences::default, |last| {
        let dt_created = dt_created.unwrap_or(now);
        let last = last.arrival;
        let needs_user = policy.rules.without_session && orphan::needs_user(after);
        RowChange {
            merged: &merged,
            last,
            before: &before,
            after,
            needs_user,
            awaited_user: state.record_awaits_user(needs_user),
            rules: &policy.rules,
            dt_created,
            now,
        }
        .consequences()
    });
    let visible = merged.pop().map_or(before, |transition| transition.shown);
    let row = Row {
        stripe_subscription_id: id.to_owned(),
        state,
        visible,
        version: version + 1,
        revision,
        last_sent,
    };
    Some(Plan {
        id,
        arrivals,
        row,
        signals,
        consequences,
    })
}

/// An event that changed the state, and the visible columns after it.
struct Transition<'a> {
    arrival: &'a Arrival,
    shown: Visible,
}

/// Merges `arrivals` into `state` and returns those that changed it.
fn merge_all<'a>(state: &mut State, arrivals: &[&'a Arrival]) -> Vec<Transition<'a>> {
    let mut merged = Vec::new();
    for &arrival in arrivals {
        if state.merge(&arrival.event) {
            merged.push(Transition {
                arrival,
                shown: state.visible(),
            });
        }
    }
    merged
}

/// A row's unsent signal, and the row after it is sent.
#[derive(Debug)]
pub struct Unsent {
    pub row: Row,
    /// The signal of what the row shows. `None` if subscribers were sent exactly that.
    pub signal: Option<NewSignal>,
}

/// Plans the unsent signal of a row whose state is final. Returns `None` if no event is known that
/// led to the row: a signal has to name one.
pub fn plan_unsent(id: &str, stored: Stored, now: OffsetDateTime) -> Option<Unsent> {
    let shown = stored.state.visible().subscription;
    let event = signal::last_event(&stored.state)?;
    let mut sender = Sender::new(id, stored.revision, &stored.last_sent, &shown, now);
    sender.send(&shown, event.into(), true);
    let Sender {
        mut signals,
        revision,
        ..
    } = sender;
    let signal = signals.pop();
    let row = Stored {
        revision,
        last_sent: LastSent::Current,
        ..stored
    }
    .into_row(id);
    Some(Unsent { row, signal })
}

/// Builds a signal of a row as it is, under its current revision, for subscribers that missed it.
pub fn resent_signal(
    id: &str,
    subscription: &Subscription,
    revision: i64,
    event: EventReference,
    now: OffsetDateTime,
) -> NewSignal {
    let change = Change {
        previous_revision: 0,
        changes: Changes::default(),
        event,
        replayed: true,
    };
    signal::subscription_resent(&change.with_revision(revision, id, subscription), now)
}

/// A row after its metadata was erased.
#[derive(Debug)]
pub struct Erased {
    pub row: Row,
    /// The row without its metadata. `None` if the row has an unsent or withheld signal: that one
    /// is sent later.
    pub signal: Option<NewSignal>,
    pub had_metadata: bool,
}

/// Erases the metadata of a row, and signals the row even if it had none: the erasure also removes
/// its older signals.
pub fn plan_erasure(
    id: &str,
    mut stored: Stored,
    event: EventReference,
    now: OffsetDateTime,
) -> Erased {
    let before = stored.state.visible().subscription;
    let had_metadata = stored.state.erase_metadata();
    let shown = stored.state.visible().subscription;
    let last_sent = std::mem::take(&mut stored.last_sent);
    if last_sent != LastSent::Current {
        let row = Row {
            last_sent: last_sent.without_metadata(&shown),
            ..stored.into_row(id)
        };
        return Erased {
            row,
            signal: None,
            had_metadata,
        };
    }
    let mut changes = merge::changes(&before, &shown).unwrap_or_default();
    // The previous values are the metadata that was just erased.
    changes
        .previous
        .retain(|name, _| !matches!(name.as_str(), "metadata" | "subscription_metadata"));
    let change = Change {
        previous_revision: stored.revision,
        changes,
        event,
        replayed: false,
    };
    let changed = change.signal(id, &shown, now);
    let row = Row {
        revision: changed.revision,
        ..stored.into_row(id)
    };
    let cause = Cause::from(changed.event.clone());
    Erased {
        row,
        signal: Some(signal::subscription_changed(&changed, cause)),
        had_metadata,
    }
}

/// Builds the signals of one row, and keeps track of what subscribers were last sent.
struct Sender<'r> {
    id: &'r str,
    now: OffsetDateTime,
    /// Whether the row had an unsent or withheld signal when it was read.
    had_unsent_signal: bool,
    /// What was sent last. `None` if nothing was sent yet.
    sent: Option<&'r Subscription>,
    revision: i64,
    signals: Vec<NewSignal>,
}

impl<'r> Sender<'r> {
    fn new(
        id: &'r str,
        revision: i64,
        last_sent: &'r LastSent,
        shown: &'r Subscription,
        now: OffsetDateTime,
    ) -> Self {
        let sent = match last_sent {
            LastSent::Current => (revision > 0).then_some(shown),
            LastSent::Nothing | LastSent::Withheld | LastSent::Silent => None,
            LastSent::Older(sent) => Some(&**sent),
        };
        Self {
            id,
            now,
            had_unsent_signal: *last_sent != LastSent::Current,
            sent,
            revision,
            signals: Vec::new(),
        }
    }

    /// Sends, postpones or skips the row's signals, as decided after a batch. Returns what was sent
    /// last.
    fn follow(
        &mut self,
        decision: Decision,
        merged: &'r [Transition<'_>],
        shown: &'r Subscription,
        cause: impl FnOnce() -> Option<EventReference>,
    ) -> LastSent {
        match decision {
            Decision::SendChanges => self.send_now(merged, shown, cause),
            Decision::SendRow => {
                let last = merged.last().map_or(&[][..], std::slice::from_ref);
                self.send_now(last, shown, cause)
            }
            Decision::Postpone => self.postpone(shown),
            Decision::Skip => self.skip(shown),
            Decision::Keep(last_sent) => last_sent,
        }
    }

    /// Sends a signal for each transition. If the row had an unsent signal, also sends what the row
    /// shows, even if no event changed it.
    fn send_now(
        &mut self,
        merged: &'r [Transition<'_>],
        shown: &'r Subscription,
        cause: impl FnOnce() -> Option<EventReference>,
    ) -> LastSent {
        for transition in merged {
            self.send(
                &transition.shown.subscription,
                transition.arrival.cause(),
                false,
            );
        }
        if self.had_unsent_signal && self.sent != Some(shown) {
            let Some(event) = cause() else {
                return self.postpone(shown);
            };
            self.send(shown, event.into(), true);
        }
        LastSent::Current
    }

    /// Sends nothing yet. The row gets an unsent signal, unless what it shows was sent last.
    fn postpone(&self, shown: &Subscription) -> LastSent {
        match self.sent {
            None => LastSent::Nothing,
            Some(sent) if sent == shown => LastSent::Current,
            Some(sent) => LastSent::Older(Box::new(sent.clone())),
        }
    }

    /// Sends nothing, and counts what the row shows as sent. If subscribers know the row, it gets a
    /// new revision, under which it can be resent. A signal that was unsent before stays unsent.
    fn skip(&mut self, shown: &Subscription) -> LastSent {
        if self.had_unsent_signal {
            return self.postpone(shown);
        }
        if self.sent.is_some_and(|sent| sent != shown) {
            self.revision = next_revision(self.revision, self.now);
        }
        LastSent::Current
    }

    /// Sends what the row shows under a new revision, unless that was sent last. A new row is sent
    /// even if all its columns are empty.
    fn send(&mut self, shown: &'r Subscription, cause: Cause, replayed: bool) {
        if self.sent == Some(shown) {
            return;
        }
        let nothing = Subscription::default();
        let changes = merge::changes(self.sent.unwrap_or(&nothing), shown).unwrap_or_default();
        let change = Change {
            previous_revision: self.revision,
            changes,
            event: cause.event.clone(),
            replayed,
        };
        let changed = change.signal(self.id, shown, self.now);
        self.signals
            .push(signal::subscription_changed(&changed, cause));
        (self.revision, self.sent) = (changed.revision, Some(shown));
    }
}

/// A change of a row that is to be signalled.
struct Change {
    previous_revision: i64,
    changes: Changes,
    event: EventReference,
    replayed: bool,
}

impl Change {
    fn signal(
        self,
        id: &str,
        subscription: &Subscription,
        now: OffsetDateTime,
    ) -> SubscriptionChanged {
        let revision = next_revision(self.previous_revision, now);
        self.with_revision(revision, id, subscription)
    }

    fn with_revision(
        self,
        revision: i64,
        id: &str,
        subscription: &Subscription,
    ) -> SubscriptionChanged {
        SubscriptionChanged {
            stripe_subscription_id: id.to_owned(),
            access: Access::from_status(subscription.status.as_deref()),
            subscription: subscription.clone(),
            revision,
            previous_revision: (self.previous_revision > 0).then_some(self.previous_revision),
            changed: self.changes.changed,
            previous: self.changes.previous,
            event: self.event,
            replayed: self.replayed,
        }
    }
}

/// The change of a row by a batch, from which the consequences follow.
struct RowChange<'r, 'a> {
    merged: &'r [Transition<'a>],
    last: &'a Arrival,
    before: &'r Visible,
    after: &'r Visible,
    /// Whether the row is to have an open question for a user, and whether one was stored before.
    needs_user: bool,
    awaited_user: bool,
    rules: &'r Rules,
    /// When the row was first written.
    dt_created: OffsetDateTime,
    now: OffsetDateTime,
}

impl<'a> RowChange<'_, 'a> {
    fn consequences(&self) -> Consequences<'a> {
        let mut consequences = Consequences::default();
        self.decide_on_user(&mut consequences);
        self.decide_on_grace(&mut consequences);
        if self.after.subscription.uncertain {
            consequences
                .questions
                .extend(orphan::fetch_question(self.last, self.after, self.now));
        } else if self.before.subscription.uncertain {
            consequences.answered.push(Kind::Fetch);
        }
        consequences
    }

    /// Decides what follows from the row's client reference id. A paid row without one is an
    /// orphan. Otherwise the id is looked up; without a user lookup it resolves the orphan.
    fn decide_on_user(&self, consequences: &mut Consequences<'a>) {
        let Some(client_reference_id) = &self.after.subscription.client_reference_id else {
            if self.after.paid {
                consequences.orphan = self
                    .sessions()
                    .find_map(|arrival| Some((arrival, missing_reference(arrival)?)));
            }
            return;
        };
        if self
            .arrivals()
            .any(|arrival| matches!(arrival.event.body, Body::Resolution(_)))
        {
            // An operator's resolution needs no lookup. `plan_payment` resolves the orphan.
            consequences.answered.push(Kind::Lookup);
        } else if self.rules.lookup {
            // One session may report the payment and another the user, in any order. The row
            // combines both, so `paid` is the row's. Among the sessions a paid one is preferred.
            let session = self
                .sessions()
                .max_by_key(|arrival| arrival.session().is_some_and(CheckoutSession::is_paid));
            let lookup = |arrival| {
                orphan::lookup_question(arrival, client_reference_id, self.after.paid, self.now)
            };
            consequences.questions.extend(session.and_then(lookup));
        } else if self.before.subscription.client_reference_id.as_ref() != Some(client_reference_id)
        {
            consequences.resolution = Some(Resolution {
                id: self
                    .last
                    .event
                    .stripe_subscription_id()
                    .unwrap_or_default()
                    .to_owned(),
                client_reference_id: client_reference_id.clone(),
                arrival: self.last,
                by_operator: None,
            });
        }
    }

    /// Opens the question of the grace period when the row enters the state in which it needs a
    /// user, and closes it when the row leaves that state.
    fn decide_on_grace(&self, consequences: &mut Consequences<'a>) {
        if self.needs_user && !self.awaited_user {
            let end = orphan::grace_period_end(self.after, self.dt_created, self.rules.grace);
            consequences.questions.extend(orphan::grace_question(
                self.cause_of_need(),
                self.after,
                end,
            ));
        } else if !self.needs_user && (self.awaited_user || orphan::needs_user(self.before)) {
            consequences.answered.push(Kind::Grace);
        }
    }

    /// Returns the event with which the row entered the state in which it needs a user.
    fn cause_of_need(&self) -> &'a Arrival {
        self.merged
            .iter()
            .rev()
            .take_while(|transition| orphan::needs_user(&transition.shown))
            .last()
            .map_or(self.last, |transition| transition.arrival)
    }

    fn arrivals(&self) -> impl Iterator<Item = &'a Arrival> {
        self.merged.iter().map(|transition| transition.arrival)
    }

    fn sessions(&self) -> impl Iterator<Item = &'a Arrival> {
        self.arrivals()
            .filter(|arrival| arrival.session().is_some())
    }
}

/// Plans the consequences of an event apart from any row: of a payment for orphans and open
/// questions, of a thin event for the question about its object.
pub fn plan_payment<'a>(
    arrival: &'a Arrival,
    rules: &Rules,
    now: OffsetDateTime,
) -> Consequences<'a> {
    let mut consequences = Consequences {
        resolution: by_operator(arrival),
        questions: question::notification(arrival, now).into_iter().collect(),
        ..Consequences::default()
    };
    consequences.orphan = missing_reference(arrival).map(|orphan| (arrival, orphan));
    if rules.lookup
        && let Some(session) = arrival.session()
        && let Some(client_reference_id) = session
            .client_reference_id
            .as_deref()
            .filter(|_| session.is_paid())
    {
        consequences.questions.extend(orphan::lookup_question(
            arrival,
            client_reference_id,
            true,
            now,
        ));
    }
    if consequences.resolution.is_some() {
        consequences.answered.push(Kind::Lookup);
    }
    consequences
}

fn missing_reference(arrival: &Arrival) -> Option<NewOrphan> {
    NewOrphan::from_session(&arrival.event, arrival.session()?)
}

/// Returns the resolution, if the event is an operator's.
fn by_operator(arrival: &Arrival) -> Option<Resolution<'_>> {
    let Body::Resolution(resolution) = &arrival.event.body else {
        return None;
    };
    Some(Resolution {
        id: resolution.orphan_id.clone(),
        client_reference_id: resolution.client_reference_id.clone(),
        arrival,
        by_operator: Some((
            NewOrphan::from_resolution(&arrival.event, resolution),
            signal::reference(&arrival.event).created.get(),
        )),
    })
}

/// Returns the revision after `revision`: the larger of `revision + 1` and the time in
/// milliseconds. The time makes it grow also across a rebuild of the database, which loses the old
/// revisions.
fn next_revision(revision: i64, now: OffsetDateTime) -> i64 {
    let milliseconds = i64::try_from(now.unix_timestamp_nanos() / 1_000_000).unwrap_or(i64::MAX);
    milliseconds.max(revision.saturating_add(1))
}

#[cfg(test)]
mod tests;
