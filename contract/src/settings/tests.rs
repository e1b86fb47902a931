use std::time::Duration;

use super::{
    BYTES, DURATION, EventsSettings, Given, LogSettings, NatsSettings, Problems, Reader, address,
    bytes, duration,
};

fn reader(given: &[(&'static str, &str)]) -> Reader {
    let given: Given = given
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    Reader::new(given)
}

#[test]
fn defaults_are_valid() {
    let mut reader = reader(&[]);
    let nats = NatsSettings::read(&mut reader);
    let events = EventsSettings::read(&mut reader);
    let log = LogSettings::read(&mut reader);
    assert_eq!(nats.hosts(), "127.0.0.1:4222");
    assert_eq!(events.max_age, Duration::from_secs(35 * 24 * 60 * 60));
    assert_eq!(events.max_bytes, 10 << 30);
    assert!(!events.max_bytes_is_set && !log.json);
    assert_eq!(reader.finish(Some(())), Ok(()));
}

#[test]
fn an_empty_value_counts_as_not_given() {
    let mut reader = reader(&[("NATS_CREDS", ""), ("NATS_URL", " ")]);
    NatsSettings::read(&mut reader);
    assert_eq!(reader.finish(Some(())), Ok(()));
}

#[test]
fn every_problem_is_reported_by_name_and_without_its_value() {
    let mut reader = reader(&[
        ("NATS_URL", "nats://user:hunter2@:::"),
        ("NATS_USER", "someone"),
        ("NATS_TLS_KEY", "key.pem"),
        ("LITESTRIPE_STREAM_REPLICAS", "2"),
        ("LITESTRIPE_EVENTS_MAX_AGE", "hunter2"),
        ("LITESTRIPE_LOG_FORMAT", "hunter2"),
    ]);
    NatsSettings::read(&mut reader);
    EventsSettings::read(&mut reader);
    LogSettings::read(&mut reader);
    let Problems(problems) = reader.finish(Some(())).expect_err("they are all wrong");
    let names: Vec<_> = problems
        .iter()
        .filter_map(|problem| problem.split(' ').next())
        .collect();
    assert_eq!(
        names,
        [
            "NATS_URL",
            "NATS_PASSWORD",
            "NATS_TLS_CERT",
            "LITESTRIPE_STREAM_REPLICAS",
            "LITESTRIPE_EVENTS_MAX_AGE",
            "LITESTRIPE_LOG_FORMAT"
        ]
    );
    assert!(!problems.concat().contains("hunter2"));
}

#[test]
fn a_missing_required_setting_is_one_problem() {
    let mut reader = reader(&[]);
    assert_eq!(
        reader.required(&super::NATS_CREDS, "a path", super::text),
        None
    );
    let Problems(problems) = reader.finish::<()>(None).expect_err("it is missing");
    assert_eq!(problems, ["NATS_CREDS is missing: set it to a path"]);
}

#[test]
fn durations_and_sizes_are_parsed_with_their_units() {
    assert_eq!(
        duration("10m"),
        Some(Duration::from_secs(600)),
        "{DURATION}"
    );
    assert_eq!(duration("ten"), None);
    assert_eq!(bytes("1MiB"), Some(1 << 20), "{BYTES}");
    assert_eq!(bytes("-1"), None);
}

#[test]
fn addresses_to_listen_on_are_an_ip_or_a_name_with_a_port() {
    for value in [
        "127.0.0.1:8080",
        "[::1]:8080",
        "0.0.0.0:0",
        "localhost:8080",
        "db-1.example.com:80",
        "a_b:1",
    ] {
        assert_eq!(
            address(value).map(|address| address.to_string()).as_deref(),
            Some(value)
        );
    }
    for value in [
        "",
        "localhost",
        "8080",
        ":8080",
        "*:8080",
        "::1:8080",
        "localhost:",
        "localhost:http",
        "localhost:70000",
        "http://localhost:80",
        "a b:80",
        "-:80",
    ] {
        assert_eq!(address(value), None, "{value}");
    }
}
