use super::{EventId, EventType, HANDLED_TYPES, RESOLUTION_TYPE, SNAPSHOT_TYPE};

#[test]
fn event_ids_are_printable_and_bounded() {
    for (id, valid) in [
        ("evt_1NG8Du2eZvKYlo2CUI79vXWy", true),
        ("", false),
        ("evt 1", false),
        ("evt_1\r\nX: y", false),
        ("evt_ü", false),
        (&"e".repeat(255), true),
        (&"e".repeat(256), false),
    ] {
        assert_eq!(EventId::parse(id).is_ok(), valid, "{id:?}");
    }
}

#[test]
fn event_types_are_subject_tails() {
    for (name, valid) in [
        ("customer.subscription.updated", true),
        ("v2.core.health", true),
        ("ping", true),
        ("", false),
        (".", false),
        ("a..b", false),
        ("a.b.", false),
        ("a.*", false),
        ("a.>", false),
        ("A.b", false),
        ("a b", false),
        ("a-b", false),
        (&"t".repeat(201), false),
    ] {
        assert_eq!(EventType::parse(name).is_ok(), valid, "{name:?}");
    }
}

#[test]
fn every_handled_type_is_a_type() {
    for name in HANDLED_TYPES
        .into_iter()
        .chain([SNAPSHOT_TYPE, RESOLUTION_TYPE])
    {
        assert!(EventType::parse(name).is_ok(), "{name}");
    }
}
