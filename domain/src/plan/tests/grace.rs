//! When the question of the grace period is opened and closed.

use super::*;

#[test]
fn question_is_opened_once_with_the_event_that_led_to_it() {
    let mut table = Table::default();
    let policy = policy(true);
    let events = [
        subscription("incomplete", true),
        subscription("active", false),
        checkout_session("cs_1", Some(SUBSCRIPTION), None, "unpaid"),
        subscription("past_due", false),
    ];
    let arrivals = in_order(events);
    for (arrival, opened_by) in arrivals.iter().zip([None, Some(1), Some(1), Some(1)]) {
        table.apply(vec![arrival], &policy);
        let opened_by = opened_by.map(|index: usize| arrivals[index].event.id.clone());
        assert_eq!(table.grace_event(), opened_by, "after {}", arrival.index);
    }
    let mut at_once = Table::default();
    at_once.apply(arrivals.iter().collect(), &policy);
    assert_eq!(at_once.grace_event(), table.grace_event());
}

#[test]
fn claim_closes_the_question() {
    let claims = [
        checkout_session("cs_1", Some(SUBSCRIPTION), Some(USER), "unpaid"),
        checkout_session("cs_1", Some(SUBSCRIPTION), None, "paid"),
        resolution(SUBSCRIPTION, Some(SUBSCRIPTION)),
        subscription("incomplete_expired", false),
    ];
    for claim in claims {
        let mut table = Table::default();
        for arrival in in_order([subscription("active", false), claim]).iter() {
            assert_eq!(table.grace_event().is_some(), arrival.index > 0);
            table.apply(vec![arrival], &policy(true));
        }
        assert_eq!(table.grace_event(), None);
    }
}

#[test]
fn no_question_is_opened_if_it_is_switched_off() {
    let mut table = Table::default();
    table.apply(
        in_order([subscription("active", true)]).iter().collect(),
        &policy(false),
    );
    assert_eq!(table.grace_event(), None);
}

/// The previous version asked only about rows whose creation event it had seen, and not about rows
/// with any session.
#[test]
fn row_of_the_previous_version_is_asked_about_with_its_next_event() {
    let mut table = Table::default();
    let [first, next, last] = &in_order([
        subscription("active", false),
        subscription("past_due", false),
        subscription("active", false),
    ])[..] else {
        unreachable!("there are three")
    };
    table.apply(vec![first], &policy(true));
    let row = table.row.as_mut().expect("it was written");
    let mut json = serde_json::to_value(&row.state).expect("it is JSON");
    let new = json
        .as_object_mut()
        .and_then(|state| state.remove("awaits_user"));
    assert_eq!(new, Some(true.into()));
    row.state = serde_json::from_value(json).expect("it is a state");
    table.questions.clear();

    table.apply(vec![next], &policy(true));
    assert_eq!(table.grace_event().as_ref(), Some(&next.event.id));
    table.questions.clear(); // It is answered.
    table.apply(vec![last], &policy(true));
    assert_eq!(table.grace_event(), None, "asked once");
}

fn policy(without_session: bool) -> Policy {
    let rules = Rules {
        lookup: false,
        without_session,
        grace: Duration::from_secs(600),
    };
    Policy {
        rules,
        signalling: Signalling::Now,
    }
}

fn in_order<const N: usize>(bodies: [Body; N]) -> Vec<Arrival> {
    bodies
        .into_iter()
        .enumerate()
        .map(|(index, body)| arrival(index, (index as i64, body)))
        .collect()
}

impl Table {
    /// The event of the open question.
    fn grace_event(&self) -> Option<EventId> {
        let key = (SUBSCRIPTION.to_owned(), Kind::Grace);
        self.questions
            .get(&key)
            .map(|question| question.event.id.clone())
    }
}
