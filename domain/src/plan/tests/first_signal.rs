//! When the first signal of a row is withheld, and what releases it.

use super::unsent::{reload, rules};
use super::*;

/// The rebuild starts `NOW`. Subscriptions are older than it or newer.
fn old() -> i64 {
    NOW.unix_timestamp() - 86_400
}

fn newer() -> i64 {
    NOW.unix_timestamp() + 1
}

fn created_at(mut body: Body, at: i64) -> Body {
    match &mut body {
        Body::Subscription(event) => event.snapshot.created = Some(at),
        Body::CheckoutSession(session) => session.created = Some(at),
        Body::Resolution(_) | Body::Notification(_) => {}
    }
    body
}

fn status(status: &str) -> Body {
    created_at(subscription(status, false), old())
}

fn session() -> Body {
    checkout_session("cs_1", Some(SUBSCRIPTION), Some(USER), "paid")
}

/// A row to which batches are applied. Event ids and seconds grow.
struct History {
    row: Option<Stored>,
    events: usize,
}

impl History {
    fn new() -> Self {
        Self {
            row: None,
            events: 0,
        }
    }

    /// Applies `bodies` as one batch. Returns the number of signals and what was sent last.
    fn apply(
        &mut self,
        signalling: Signalling,
        rebuilding: Option<OffsetDateTime>,
        bodies: Vec<Body>,
    ) -> (usize, LastSent) {
        let first = self.events;
        self.events += bodies.len();
        let events = bodies.into_iter().enumerate();
        let arrivals: Vec<_> = events
            .map(|(index, body)| arrival(first + index, ((first + index) as i64, body)))
            .collect();
        self.merge(signalling, rebuilding, &arrivals)
    }

    /// Applies the first event once more.
    fn repeat(&mut self, rebuilding: Option<OffsetDateTime>, body: Body) -> (usize, LastSent) {
        self.merge(Now, rebuilding, &[arrival(0, (0, body))])
    }

    fn merge(
        &mut self,
        signalling: Signalling,
        rebuilding: Option<OffsetDateTime>,
        arrivals: &[Arrival],
    ) -> (usize, LastSent) {
        let policy = Policy {
            rules: rules(),
            signalling,
        };
        let context = Context {
            policy: &policy,
            rebuilding,
            now: NOW,
        };
        let arrivals = arrivals.iter().collect();
        let plan = plan_subscription(SUBSCRIPTION, self.row.clone(), arrivals, context);
        let mut signals = 0;
        if let Some(plan) = plan {
            signals = plan.signals.len();
            self.row = Some(reload(plan.row));
        }
        (signals, self.last_sent())
    }

    /// Ends the replay.
    fn end(&mut self, covers_stream: bool) -> LastSent {
        let rebuilt = Rebuilt {
            started: NOW,
            covers_stream,
        };
        let stored = self.row.clone().expect("an event led to the row");
        if let Some(row) = plan_rebuilt(SUBSCRIPTION, stored, rebuilt) {
            self.row = Some(reload(row));
        }
        self.last_sent()
    }

    fn last_sent(&self) -> LastSent {
        self.row.clone().unwrap_or_default().last_sent
    }
}

const SENT: (usize, LastSent) = (1, LastSent::Current);
const WITHHELD: (usize, LastSent) = (0, LastSent::Withheld);
const UNSENT: (usize, LastSent) = (0, LastSent::Nothing);
const SILENT: (usize, LastSent) = (0, LastSent::Silent);

use Signalling::{Later, Never, Now};

const OPEN: Option<OffsetDateTime> = Some(NOW);

#[test]
fn new_row_of_a_live_event_is_withheld_only_if_it_is_older_than_the_rebuild_and_not_whole() {
    let of_new = |body| created_at(body, newer());
    for (rebuilding, bodies, expected) in [
        (None, vec![status("active")], SENT),
        (None, vec![session()], SENT),
        (OPEN, vec![status("active")], WITHHELD),
        (OPEN, vec![session()], WITHHELD),
        (OPEN, vec![status("active"), session()], SENT),
        (OPEN, vec![created_at(searched("active"), old())], SENT),
        (OPEN, vec![subscription("active", false)], WITHHELD),
        (OPEN, vec![of_new(status("active"))], SENT),
        (OPEN, vec![of_new(session())], SENT),
    ] {
        let what = format!("{rebuilding:?}, {bodies:?}");
        let found = History::new().apply(Now, rebuilding, bodies);
        assert_eq!(found, expected, "{what}");
    }
}

#[test]
fn withheld_row_is_released_only_by_an_event_that_makes_it_whole() {
    let resolved = || resolution(SUBSCRIPTION, Some(SUBSCRIPTION));
    let searched_in_stripe = || created_at(searched("active"), old());
    for rebuilding in [OPEN, None] {
        for release in [session(), resolved(), searched_in_stripe()] {
            let mut history = History::new();
            assert_eq!(history.apply(Now, OPEN, vec![status("trialing")]), WITHHELD);
            assert_eq!(
                history.apply(Now, rebuilding, vec![status("active")]),
                WITHHELD
            );
            assert_eq!(
                history.apply(Now, rebuilding, vec![status("past_due")]),
                WITHHELD
            );
            assert_eq!(history.repeat(rebuilding, status("trialing")), WITHHELD);
            let what = format!("{rebuilding:?}, {release:?}");
            assert_eq!(
                history.apply(Now, rebuilding, vec![release]),
                SENT,
                "{what}"
            );
            // From then on it is signalled like every other row.
            assert_eq!(
                history.apply(Now, OPEN, vec![status("canceled")]),
                SENT,
                "{what}"
            );
        }
    }
}

#[test]
fn late_event_without_the_current_state_sends_no_row_during_a_replay() {
    let mut history = History::new();
    assert_eq!(
        history.apply(Later, OPEN, vec![status("incomplete")]),
        UNSENT
    );
    assert_eq!(
        history.repeat(OPEN, status("incomplete")),
        UNSENT,
        "a late duplicate"
    );
    let late = history.apply(Now, OPEN, vec![session()]);
    assert_eq!(late, UNSENT, "a paying customer would lose access");
    assert_eq!(history.apply(Now, OPEN, vec![status("active")]), SENT);

    let mut history = History::new();
    assert_eq!(history.apply(Later, OPEN, vec![status("trialing")]), UNSENT);
    assert_eq!(history.apply(Now, OPEN, vec![status("active")]), WITHHELD);
    // The replay continues and finds the session.
    assert_eq!(history.apply(Later, OPEN, vec![session()]), UNSENT);
    assert_eq!(history.end(false), LastSent::Nothing, "it is sent now");
}

#[test]
fn end_of_a_replay_withholds_what_the_stream_may_have_lost() {
    let created = || created_at(subscription("active", true), old());
    for (bodies, covers_stream, expected) in [
        (vec![status("active")], true, LastSent::Withheld),
        (vec![session()], true, LastSent::Withheld),
        (vec![status("active"), session()], false, LastSent::Nothing),
        (
            vec![created_at(searched("active"), old())],
            false,
            LastSent::Nothing,
        ),
        (vec![created()], false, LastSent::Withheld),
        (vec![created()], true, LastSent::Nothing),
        (
            vec![created_at(status("active"), newer())],
            false,
            LastSent::Nothing,
        ),
    ] {
        let what = format!("{bodies:?}, {covers_stream}");
        let mut history = History::new();
        assert_eq!(history.apply(Later, OPEN, bodies), UNSENT, "{what}");
        assert_eq!(history.end(covers_stream), expected, "{what}");
    }
    // A row that a live event wrote during the replay.
    let mut history = History::new();
    assert_eq!(history.apply(Now, OPEN, vec![created()]), WITHHELD);
    assert_eq!(history.end(false), LastSent::Withheld);
    assert_eq!(history.end(true), LastSent::Nothing);
}

#[test]
fn row_of_a_silent_replay_is_sent_with_a_live_event_once_it_is_whole() {
    let mut history = History::new();
    assert_eq!(history.apply(Never, OPEN, vec![status("active")]), SILENT);
    assert_eq!(history.end(false), LastSent::Silent);
    assert_eq!(
        history.repeat(None, status("active")),
        SILENT,
        "a late duplicate"
    );
    assert_eq!(history.apply(Now, None, vec![status("past_due")]), WITHHELD);
    assert_eq!(history.apply(Now, None, vec![session()]), SENT);

    let mut history = History::new();
    assert_eq!(history.apply(Never, OPEN, vec![status("active")]), SILENT);
    assert_eq!(history.end(false), LastSent::Silent);
    assert_eq!(history.apply(Now, None, vec![session()]), SENT);

    // Until the silent replay ends, the row may be in any earlier state.
    let mut history = History::new();
    assert_eq!(
        history.apply(Never, OPEN, vec![status("incomplete")]),
        SILENT
    );
    assert_eq!(history.apply(Now, OPEN, vec![session()]), UNSENT);
    assert_eq!(history.apply(Never, OPEN, vec![status("active")]), UNSENT);
    assert_eq!(history.end(false), LastSent::Nothing, "it is sent now");
}

#[test]
fn silent_replay_that_makes_a_row_whole_leaves_nothing_unsent() {
    let current = (0, LastSent::Current);
    let mut history = History::new();
    assert_eq!(history.apply(Never, OPEN, vec![status("active")]), SILENT);
    assert_eq!(history.apply(Never, OPEN, vec![session()]), current);
    let mut history = History::new();
    let created = created_at(subscription("active", true), old());
    assert_eq!(history.apply(Never, OPEN, vec![created]), SILENT);
    assert_eq!(history.end(true), LastSent::Current);
    // A withheld signal becomes unsent, also if the replay sends no signals.
    let mut history = History::new();
    assert_eq!(history.apply(Now, OPEN, vec![status("active")]), WITHHELD);
    assert_eq!(history.apply(Never, OPEN, vec![session()]), UNSENT);
    assert_eq!(history.end(false), LastSent::Nothing);
}

#[test]
fn erasure_leaves_a_withheld_row_withheld() {
    let mut history = History::new();
    assert_eq!(history.apply(Now, OPEN, vec![status("active")]), WITHHELD);
    let stored = history.row.expect("it was written");
    let event = signal::last_event(&stored.state).expect("an event led to the row");
    let erased = plan_erasure(SUBSCRIPTION, stored, event, NOW);
    assert!(erased.signal.is_none());
    assert_eq!(erased.row.last_sent, LastSent::Withheld);
}
