use std::time::Duration;

use reqwest::header::HeaderValue;

use super::TraceSettings;
use crate::settings::{Given, Problems, Reader};

const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318");

fn read(given: &[(&'static str, &str)]) -> Result<Option<TraceSettings>, Problems> {
    let given: Given = given
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    let mut reader = Reader::new(given);
    let settings = TraceSettings::read(&mut reader);
    reader.finish(Some(settings))
}

fn valid(more: &[(&'static str, &str)]) -> TraceSettings {
    let given: Vec<_> = [ENDPOINT].iter().chain(more).copied().collect();
    let settings = read(&given).expect("they are valid");
    settings.expect("there is an endpoint")
}

fn headers_of(settings: &TraceSettings) -> Vec<(String, String)> {
    let headers = settings.headers().expect("their file can be read");
    let value = |value: &HeaderValue| value.to_str().expect("it is text").to_owned();
    let headers = headers.iter();
    headers
        .map(|(name, found)| (name.to_string(), value(found)))
        .collect()
}

fn text(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

#[test]
fn without_an_endpoint_traces_are_off_and_nothing_else_is_read() {
    assert!(matches!(read(&[]), Ok(None)));
    let elsewhere = [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_TRACES_SAMPLER", "xray"),
    ];
    assert!(matches!(read(&elsewhere), Ok(None)));
    for off in [
        ("OTEL_SDK_DISABLED", "true"),
        ("OTEL_TRACES_EXPORTER", "none"),
    ] {
        assert!(matches!(read(&[ENDPOINT, off]), Ok(None)), "{off:?}");
    }
}

#[test]
fn defaults_are_the_standards() {
    let settings = valid(&[]);
    assert_eq!(settings.timeout, Duration::from_secs(10));
    assert_eq!(format!("{:?}", settings.sampler), "ParentBased(AlwaysOn)");
    assert!(headers_of(&settings).is_empty() && settings.attributes.is_empty());
    assert_eq!(settings.service_name, None);
}

#[test]
fn only_the_endpoint_of_all_signals_gets_a_path() {
    let endpoint = |name, value| {
        let settings = read(&[(name, value)]).expect("it is valid");
        settings.expect("it is an endpoint").endpoint.to_string()
    };
    for (base, whole) in [
        ("http://collector:4318", "http://collector:4318/v1/traces"),
        ("https://collector/", "https://collector/v1/traces"),
        (
            "https://collector/otlp/",
            "https://collector/otlp/v1/traces",
        ),
    ] {
        assert_eq!(endpoint("OTEL_EXPORTER_OTLP_ENDPOINT", base), whole);
    }
    let of_traces = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";
    assert_eq!(
        endpoint(of_traces, "http://collector:4318/"),
        "http://collector:4318/"
    );
    let both = valid(&[(of_traces, "http://other:1/path")]);
    assert_eq!(both.endpoint.as_str(), "http://other:1/path");
}

#[test]
fn settings_of_traces_win_over_those_of_all_signals() {
    let settings = valid(&[
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "a=1"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "b=2"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "1"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "2"),
    ]);
    assert_eq!(settings.timeout, Duration::from_millis(2));
    assert_eq!(headers_of(&settings), [text("b", "2")]);
}

#[test]
fn headers_and_attributes_are_decoded() {
    let settings = valid(&[
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "Authorization=Bearer%20a=b , X-Scope=1,",
        ),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "deployment.environment.name=test,team=a%2Cb",
        ),
        ("OTEL_SERVICE_NAME", "billing"),
    ]);
    assert_eq!(
        headers_of(&settings),
        [text("authorization", "Bearer a=b"), text("x-scope", "1")]
    );
    assert_eq!(
        settings.attributes,
        [
            text("deployment.environment.name", "test"),
            text("team", "a,b")
        ]
    );
    assert_eq!(settings.service_name.as_deref(), Some("billing"));
}

#[test]
fn samplers_are_those_of_the_standard() {
    let sampler = |name, argument| {
        let settings = valid(&[
            ("OTEL_TRACES_SAMPLER", name),
            ("OTEL_TRACES_SAMPLER_ARG", argument),
        ]);
        format!("{:?}", settings.sampler)
    };
    assert_eq!(sampler("always_on", ""), "AlwaysOn");
    assert_eq!(
        sampler("parentbased_always_off", ""),
        "ParentBased(AlwaysOff)"
    );
    assert_eq!(sampler("traceidratio", "0.25"), "TraceIdRatioBased(0.25)");
    assert_eq!(
        sampler("parentbased_traceidratio", ""),
        "ParentBased(TraceIdRatioBased(1.0))"
    );
}

#[test]
fn every_problem_names_its_setting_and_the_mend_and_hides_the_value() {
    let check = |name: &'static str, value: &str, mend: &str| {
        // A later setting of the same name wins.
        let Err(Problems(problems)) = read(&[ENDPOINT, (name, value)]) else {
            panic!("{name}={value} was accepted")
        };
        let [problem] = problems.as_slice() else {
            panic!("{problems:?}")
        };
        assert!(
            problem.starts_with(name) && problem.contains(mend),
            "{problem}"
        );
        assert!(!problem.contains("hunter2"), "{problem}");
    };
    let endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT";
    for wrong in [
        "collector:4318",
        "grpc://collector:4317",
        "http://user:hunter2@collector",
        "http://collector?token=hunter2",
    ] {
        check(endpoint, wrong, "http://otel-collector:4318");
        check("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", wrong, "http://");
    }
    for wrong in ["grpc", "http/json"] {
        check("OTEL_EXPORTER_OTLP_PROTOCOL", wrong, "http/protobuf");
        check("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", wrong, "4318");
    }
    for wrong in [
        "hunter2",
        "=hunter2",
        "a b=hunter2",
        "a=hunter2%0a",
        "a=1,,b=2",
    ] {
        check("OTEL_EXPORTER_OTLP_HEADERS", wrong, "name=value");
    }
    check("OTEL_EXPORTER_OTLP_TIMEOUT", "10s", "milliseconds");
    check("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0", "above 0");
    check("OTEL_RESOURCE_ATTRIBUTES", "hunter2", "name=value");
    check("OTEL_TRACES_SAMPLER", "jaeger_remote", "traceidratio");
    check("OTEL_TRACES_SAMPLER_ARG", "1.5", "from 0 to 1");
    check("OTEL_TRACES_EXPORTER", "jaeger", "otlp or none");
    check("OTEL_SDK_DISABLED", "yes", "true or false");
}
