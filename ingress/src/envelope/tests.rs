use super::{NotAnEvent, parse};

#[track_caller]
fn check(body: &str, expected: Result<(&str, &str, bool), NotAnEvent>) {
    let read = parse(body.as_bytes());
    let read = read
        .as_ref()
        .map(|read| (read.id.as_str(), read.event_type.as_str(), read.is_thin));
    assert_eq!(read, expected.as_ref().copied(), "{body:.80}");
}

#[test]
fn an_event_is_an_object_with_an_id_and_a_type() {
    check(
        r#"{"id":"evt_1","type":"a.b"}"#,
        Ok(("evt_1", "a.b", false)),
    );
    check(
        r#" {"data":{"id":1,"type":2}, "type" : "a.b","id":"evt_1"} "#,
        Ok(("evt_1", "a.b", false)),
    );
    check(
        r#"{"id":"evt_1","type":"a.b","object":"event"}"#,
        Ok(("evt_1", "a.b", false)),
    );
    check(
        r#"{"id":"evt_1","type":"a.b","object":"v2.core.event"}"#,
        Ok(("evt_1", "a.b", true)),
    );
    check(
        r#"{"id":"evt_1","type":"a.b","object":null}"#,
        Ok(("evt_1", "a.b", false)),
    );
    check(
        r#"{"id":"evt_1","type":"No Subject"}"#,
        Ok(("evt_1", "No Subject", false)),
    );
    check(
        r#"{"\u0069d":"evt_\u0031","type":"a.b"}"#,
        Ok(("evt_1", "a.b", false)),
    );
}

#[test]
fn the_last_one_of_a_repeated_field_counts() {
    check(
        r#"{"id":1,"type":"a","id":"evt_1","type":"b"}"#,
        Ok(("evt_1", "b", false)),
    );
    check(r#"{"id":"evt_1","type":"a","id":1}"#, Err(NotAnEvent::Id));
}

#[test]
fn a_body_that_is_not_a_json_object_is_not_an_event() {
    for body in [
        "",
        "null",
        "[]",
        r#""text""#,
        "{",
        r#"{"id":"evt_1","type":"a"}x"#,
        r#"{"id":"evt_1","type":"a",}"#,
    ] {
        check(body, Err(NotAnEvent::NotJson));
    }
    check(
        "\u{feff}{\"id\":\"evt_1\",\"type\":\"a\"}",
        Err(NotAnEvent::NotJson),
    );
}

#[test]
fn a_body_without_a_usable_id_and_type_is_not_an_event() {
    check("{}", Err(NotAnEvent::Id));
    for id in [
        "null",
        "1",
        r#""""#,
        r#""evt 1""#,
        r#""evt_é""#,
        r#""evt_1\n""#,
        &format!("{:?}", "e".repeat(256)),
    ] {
        check(&format!(r#"{{"id":{id},"type":"a"}}"#), Err(NotAnEvent::Id));
    }
    check(r#"{"id":"evt_1"}"#, Err(NotAnEvent::Type));
    for name in ["null", "1", r#""""#, "{}"] {
        check(
            &format!(r#"{{"id":"evt_1","type":{name}}}"#),
            Err(NotAnEvent::Type),
        );
    }
}

#[test]
fn fields_that_are_not_read_may_be_odd() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for odd in [
        deep.as_str(),
        "1e999",
        "-0",
        r#""\ud800""#,
        "123456789012345678901234567890",
        r#"{"a":1,"a":2}"#,
    ] {
        check(
            &format!(r#"{{"id":"evt_1","data":{odd},"type":"a"}}"#),
            Ok(("evt_1", "a", false)),
        );
    }
    check(
        r#"{"id":"evt_1","\ud800":1,"":2,"ty\u0070e":"a"}"#,
        Ok(("evt_1", "a", false)),
    );
}
