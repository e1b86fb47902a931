//! The law of what subscribers are sent: under any mix of batches a row owes a signal exactly while
//! what was sent last differs from what it shows, and whoever applies the signals has the row once
//! nothing is owed.

use litestripe_contract::signal::Timestamp;

use super::*;

proptest! {
    #![proptest_config(cases())]
    #[test]
    fn a_row_owes_a_signal_exactly_while_what_was_sent_last_differs(
        batches in prop::collection::vec((prop::collection::vec(event(), 1..4), context()), 1..8),
    ) {
        let mut subscriber = Subscriber::default();
        let mut row: Option<Stored> = None;
        for (batch, (signalling, rebuilding)) in batches {
            // Some come again: there are fewer ids than events.
            let arrivals: Vec<_> = batch.into_iter().map(|told| arrival(told.0 as usize, told)).collect();
            let policy = Policy { rules: rules(), signalling };
            let context = Context { policy: &policy, rebuilding, now: NOW };
            let Some(plan) = plan_subscription(SUBSCRIPTION, row.clone(), arrivals.iter().collect(), context) else {
                continue;
            };
            if signalling == Signalling::Now && rebuilding.is_none() {
                prop_assert_eq!(&plan.row.last_sent, &LastSent::Current);
            }
            prop_assert!(plan.signals.is_empty() || signalling == Signalling::Now);
            subscriber.hear(&plan.signals, row.as_ref().map_or(0, |row| row.revision));
            let was_owed = row.as_ref().is_some_and(|row| row.last_sent.has_unsent_signal());
            if signalling == Signalling::Never && !was_owed {
                subscriber.miss(&plan.row);
            }
            subscriber.check(&plan.row);
            row = Some(read_again(plan.row));
        }
        let Some(row) = row else { return Ok(()) };
        if row.last_sent.has_unsent_signal() {
            let revision = row.revision;
            let owed = plan_unsent(SUBSCRIPTION, row, NOW).expect("it stands on an event");
            prop_assert!(owed.signal.is_some());
            subscriber.hear(owed.signal.as_slice(), revision);
            prop_assert_eq!(&owed.row.last_sent, &LastSent::Current);
            subscriber.check(&owed.row);
        }
    }
}

#[test]
fn a_live_event_is_withheld_only_where_the_replay_may_bring_the_rest() {
    let (old, new) = (NOW - Duration::from_secs(60), NOW + Duration::from_secs(1));
    let status = |status: &str, created| {
        let mut body = subscription(status, false);
        if let Body::Subscription(event) = &mut body {
            event.snapshot.created = Some(OffsetDateTime::unix_timestamp(created));
        }
        body
    };
    let session = || checkout_session("cs_1", Some(SUBSCRIPTION), None, "paid");
    let owed = || {
        Some(Stored {
            version: 1,
            last_sent: LastSent::Nothing,
            ..Stored::default()
        })
    };
    let known = || {
        Some(Stored {
            version: 1,
            revision: 1,
            ..Stored::default()
        })
    };
    for (rebuilding, stored, body, is_sent) in [
        (None, None, session(), true),
        (Some(NOW), None, session(), false),
        (Some(NOW), None, status("active", old), false),
        (Some(NOW), None, status("active", new), true),
        (Some(NOW), owed(), session(), false),
        (Some(NOW), owed(), status("active", old), true),
        (Some(NOW), known(), status("active", old), true),
        (None, owed(), session(), true),
    ] {
        let what = format!("{rebuilding:?}, {stored:?}, {body:?}");
        let arrival = arrival(0, (0, body));
        let policy = Policy {
            rules: rules(),
            signalling: Signalling::Now,
        };
        let context = Context {
            policy: &policy,
            rebuilding,
            now: NOW,
        };
        let plan = plan_subscription(SUBSCRIPTION, stored, vec![&arrival], context)
            .expect("it changes the row");
        assert_eq!(
            (plan.signals.len(), plan.row.last_sent.has_unsent_signal()),
            (usize::from(is_sent), !is_sent),
            "{what}"
        );
    }
}

#[test]
fn a_replay_that_brings_back_what_was_sent_owes_nothing() {
    let (active, past_due) = (
        arrival(0, (0, subscription("active", true))),
        arrival(1, (1, subscription("past_due", false))),
    );
    let apply = |stored, arrivals, signalling| {
        let policy = Policy {
            rules: rules(),
            signalling,
        };
        plan_subscription(
            SUBSCRIPTION,
            stored,
            arrivals,
            Context {
                policy: &policy,
                rebuilding: None,
                now: NOW,
            },
        )
    };
    let live = apply(None, vec![&active, &past_due], Signalling::Now)
        .expect("it is new")
        .row;
    let sent = LastSent::Older(Box::new(live.visible.subscription));
    // As if an older backup had been restored.
    let halfway = apply(None, vec![&active], Signalling::Never)
        .expect("it is new")
        .row;
    let halfway = Stored {
        last_sent: sent,
        revision: live.revision,
        ..read_again(halfway)
    };
    let back = apply(Some(halfway), vec![&past_due], Signalling::Later)
        .expect("it changes")
        .row;
    assert_eq!(
        (back.last_sent, back.revision),
        (LastSent::Current, live.revision)
    );
}

#[test]
fn an_erasure_is_sent_at_the_end_of_a_replay() {
    let shown = Subscription {
        status: Some("active".to_owned()),
        ..Subscription::default()
    };
    let mut sent = shown.clone();
    sent.subscription_metadata
        .insert("name".to_owned(), "Jane".to_owned());
    let older = |subscription: &Subscription| LastSent::Older(Box::new(subscription.clone()));
    assert_eq!(older(&sent).without_metadata(&shown), LastSent::Nothing);
    let other = Subscription {
        trial_end: Timestamp::from_unix(1).ok(),
        ..shown.clone()
    };
    sent.status = Some("trialing".to_owned());
    let stripped = Subscription {
        status: sent.status.clone(),
        ..Subscription::default()
    };
    assert_eq!(older(&sent).without_metadata(&other), older(&stripped));
    assert_eq!(
        LastSent::Nothing.without_metadata(&shown),
        LastSent::Nothing
    );
    assert_eq!(
        LastSent::Current.without_metadata(&shown),
        LastSent::Current
    );
}

#[test]
fn what_was_sent_last_reads_back() {
    for unreadable in ["", "{}", "of a later version"] {
        assert_eq!(
            LastSent::from_json(Some(unreadable)),
            LastSent::Nothing,
            "{unreadable}"
        );
    }
    assert_eq!(LastSent::from_json(None), LastSent::Current);
    assert_eq!(LastSent::Nothing.to_json().as_deref(), Some("null"));
}

/// What is known to whoever applies all signals.
#[derive(Default)]
struct Subscriber {
    known: Option<Subscription>,
    revision: i64,
    /// A row that was written silently before anything was sent of it.
    missed: bool,
}

impl Subscriber {
    /// Applies signals of a row that was at `revision`.
    fn hear(&mut self, signals: &[NewSignal], mut revision: i64) {
        for signal in signals {
            let signal: SubscriptionChanged =
                serde_json::from_str(&signal.body).expect("it is a signal");
            assert_eq!(signal.previous_revision, (revision > 0).then_some(revision));
            assert!(signal.revision > self.revision, "it would be ignored");
            let changes = merge::changes(
                &self.known.clone().unwrap_or_default(),
                &signal.subscription,
            );
            assert_eq!(
                signal.changed,
                changes.map(|changes| changes.changed).unwrap_or_default()
            );
            revision = signal.revision;
            *self = Self {
                known: Some(signal.subscription),
                revision,
                missed: false,
            };
        }
    }

    /// A silent replay wrote the row: that counts as sent.
    fn miss(&mut self, row: &Row) {
        assert_eq!(row.last_sent, LastSent::Current);
        match row.revision {
            0 => self.missed = true,
            _ => self.known = Some(row.visible.subscription.clone()),
        }
        self.revision = row.revision;
    }

    fn check(&mut self, row: &Row) {
        let shown = &row.visible.subscription;
        match &row.last_sent {
            LastSent::Current => assert!(self.missed || self.known.as_ref() == Some(shown)),
            LastSent::Nothing => assert_eq!(self.known, None),
            LastSent::Older(sent) => {
                assert_eq!(self.known.as_ref(), Some(&**sent));
                assert_ne!(&**sent, shown);
            }
        }
        self.missed &= !row.last_sent.has_unsent_signal();
        assert_eq!(row.revision, self.revision);
    }
}

fn context() -> impl Strategy<Value = (Signalling, Option<OffsetDateTime>)> {
    let signalling = select(
        &[
            Signalling::Now,
            Signalling::Now,
            Signalling::Later,
            Signalling::Never,
        ][..],
    );
    (signalling, select(&[None, Some(NOW)][..]))
}

fn rules() -> Rules {
    Rules {
        lookup: false,
        without_session: true,
        grace: Duration::from_secs(600),
    }
}

/// The row as the database gives it back.
fn read_again(row: Row) -> Stored {
    let Row {
        state,
        version,
        revision,
        last_sent,
        ..
    } = row;
    let last_sent = LastSent::from_json(last_sent.to_json().as_deref());
    Stored {
        state,
        version,
        revision,
        last_sent,
        dt_created: None,
    }
}
