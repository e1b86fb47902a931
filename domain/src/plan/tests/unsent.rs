//! The law of signals: under any mix of batches, a row has an unsent signal exactly while what was
//! last sent differs from what it shows. A subscriber that applies all signals has the row once no
//! signal is unsent.

use litestripe_contract::signal::Timestamp;

use super::*;

proptest! {
    #![proptest_config(cases())]
    #[test]
    fn row_has_an_unsent_signal_exactly_while_it_differs_from_the_last_sent_one(
        batches in prop::collection::vec((prop::collection::vec(event(), 1..4), context()), 1..8),
    ) {
        let mut subscriber = Subscriber::default();
        let mut row: Option<Stored> = None;
        for (batch, (signalling, rebuilding)) in batches {
            // There are fewer ids than events, so some ids are repeated.
            let arrivals: Vec<_> = batch.into_iter().map(|event| arrival(event.0 as usize, event)).collect();
            let policy = Policy { rules: rules(), signalling };
            let context = Context { policy: &policy, rebuilding, now: NOW };
            let Some(plan) = plan_subscription(SUBSCRIPTION, row.clone(), arrivals.iter().collect(), context) else {
                continue;
            };
            if signalling == Signalling::Now && rebuilding.is_none() {
                prop_assert_eq!(&plan.row.last_sent, &LastSent::Current);
            }
            prop_assert!(plan.signals.is_empty() || signalling == Signalling::Now);
            subscriber.receive(&plan.signals, row.as_ref().map_or(0, |row| row.revision));
            let had_unsent = row.as_ref().is_some_and(|row| row.last_sent.has_unsent_signal());
            if signalling == Signalling::Never && !had_unsent {
                subscriber.miss_silent_write(&plan.row);
            }
            subscriber.check(&plan.row);
            row = Some(reload(plan.row));
        }
        let Some(row) = row else { return Ok(()) };
        if row.last_sent.has_unsent_signal() {
            let revision = row.revision;
            let unsent = plan_unsent(SUBSCRIPTION, row, NOW).expect("an event led to the row");
            prop_assert!(unsent.signal.is_some());
            subscriber.receive(unsent.signal.as_slice(), revision);
            prop_assert_eq!(&unsent.row.last_sent, &LastSent::Current);
            subscriber.check(&unsent.row);
        }
    }
}

#[test]
fn live_event_is_held_back_only_if_the_replay_may_complete_its_row() {
    let (old, new) = (NOW - Duration::from_secs(60), NOW + Duration::from_secs(1));
    let status = |status: &str, created| {
        let mut body = subscription(status, false);
        if let Body::Subscription(event) = &mut body {
            event.snapshot.created = Some(OffsetDateTime::unix_timestamp(created));
        }
        body
    };
    let session = || checkout_session("cs_1", Some(SUBSCRIPTION), None, "paid");
    let unsent = || {
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
        (Some(NOW), unsent(), session(), false),
        (Some(NOW), unsent(), status("active", old), true),
        (Some(NOW), known(), status("active", old), true),
        (None, unsent(), session(), true),
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
fn replay_back_to_the_last_sent_state_leaves_no_unsent_signal() {
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
    // The row as after restoring an older backup.
    let halfway = apply(None, vec![&active], Signalling::Never)
        .expect("it is new")
        .row;
    let halfway = Stored {
        last_sent: sent,
        revision: live.revision,
        ..reload(halfway)
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
fn erasing_metadata_keeps_an_unsent_signal_unsent() {
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
fn last_sent_column_reads_back() {
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

/// A subscriber that applies all signals.
#[derive(Default)]
struct Subscriber {
    known: Option<Subscription>,
    revision: i64,
    /// Whether the row was written silently before anything was sent about it.
    missed: bool,
}

impl Subscriber {
    /// Applies the signals of a row that had `revision` before.
    fn receive(&mut self, signals: &[NewSignal], mut revision: i64) {
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

    /// Records that a silent replay wrote the row, which counts as sent.
    fn miss_silent_write(&mut self, row: &Row) {
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

/// Returns the row as it is read back from the database.
fn reload(row: Row) -> Stored {
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
