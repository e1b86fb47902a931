//! The law of signals: under any mix of batches, a row has an unsent signal exactly while what was
//! last sent differs from what it shows. A subscriber that applies all signals has the row once no
//! signal is unsent. While a rebuild is open, the first signal of a row is of a whole row.

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
            let before = row.unwrap_or_default();
            let is_whole = plan.row.visible.is_whole();
            if signalling == Signalling::Now && rebuilding.is_none() {
                let is_withheld = before.last_sent.is_withheld() && !is_whole;
                prop_assert_eq!(plan.row.last_sent == LastSent::Current, !is_withheld);
            }
            prop_assert!(plan.signals.is_empty() || signalling == Signalling::Now);
            let is_first = before.revision == 0 && !plan.signals.is_empty();
            if is_first && (before.last_sent.is_withheld() || rebuilding.is_some()) {
                prop_assert!(is_whole, "a half-built row was sent");
                prop_assert_eq!(plan.signals.len(), 1, "an intermediate state was sent");
            }
            prop_assert!(!plan.row.last_sent.is_withheld() || !is_whole);
            subscriber.receive(&plan.signals, before.revision);
            let had_unsent = before.last_sent != LastSent::Current;
            if signalling == Signalling::Never && (!had_unsent || before.last_sent == LastSent::Silent) {
                subscriber.miss_silent_write(&plan.row);
            }
            subscriber.check(&plan.row);
            row = Some(reload(plan.row));
        }
        let Some(mut row) = row else { return Ok(()) };
        let rebuilt = Rebuilt { started: NOW, covers_stream: false };
        if let Some(settled) = plan_rebuilt(SUBSCRIPTION, row.clone(), rebuilt) {
            subscriber.check(&settled);
            row = reload(settled);
        }
        if row.last_sent.has_unsent_signal() {
            let revision = row.revision;
            let is_whole = row.state.visible().is_whole();
            prop_assert!(revision > 0 || is_whole, "a half-built row would be sent");
            let unsent = plan_unsent(SUBSCRIPTION, row, NOW).expect("an event led to the row");
            prop_assert!(unsent.signal.is_some());
            subscriber.receive(unsent.signal.as_slice(), revision);
            prop_assert_eq!(&unsent.row.last_sent, &LastSent::Current);
            subscriber.check(&unsent.row);
        }
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
    for withheld in [LastSent::Withheld, LastSent::Silent] {
        let json = withheld.to_json();
        assert_eq!(LastSent::from_json(json.as_deref()), withheld);
    }
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

    /// Records that a silent replay wrote the row, which counts as sent if it is whole.
    fn miss_silent_write(&mut self, row: &Row) {
        if row.last_sent == LastSent::Silent {
            return;
        }
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
            LastSent::Nothing | LastSent::Withheld | LastSent::Silent => {
                assert_eq!(self.known, None)
            }
            LastSent::Older(sent) => {
                assert_eq!(self.known.as_ref(), Some(&**sent));
                assert_ne!(&**sent, shown);
            }
        }
        self.missed &= row.last_sent == LastSent::Current;
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

pub(super) fn rules() -> Rules {
    Rules {
        lookup: false,
        without_session: true,
        grace: Duration::from_secs(600),
    }
}

/// Returns the row as it is read back from the database.
pub(super) fn reload(row: Row) -> Stored {
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
