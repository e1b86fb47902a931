use super::{DEAD_LETTERS_PREFIX, EVENTS_PREFIX, event_type, for_event_type, is_for_event_type};
use crate::event::{EventType, HANDLED_TYPES};

#[test]
fn subject_parses_back_to_its_event_type() {
    for name in HANDLED_TYPES {
        let expected = EventType::parse(name).expect("a handled type is a type");
        assert_eq!(
            event_type(&for_event_type(&expected)).as_ref(),
            Some(&expected)
        );
        assert_eq!(
            event_type(&format!("{DEAD_LETTERS_PREFIX}{name}")),
            Some(expected.clone())
        );
        for prefix in [EVENTS_PREFIX, DEAD_LETTERS_PREFIX] {
            assert!(is_for_event_type(&format!("{prefix}{name}"), &expected));
        }
        assert!(!is_for_event_type("stripe.events.other", &expected));
        assert!(!is_for_event_type(name, &expected));
    }
}

#[test]
fn other_subjects_have_no_event_type() {
    for subject in [
        "",
        "stripe.events.",
        "stripe.events.A",
        "subscription.changed",
    ] {
        assert_eq!(event_type(subject), None, "{subject}");
    }
}
