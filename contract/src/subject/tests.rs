use super::{DEAD_LETTERS_PREFIX, event_type, for_event_type};
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
            Some(expected)
        );
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
