use super::check::{Problem, problems};
use super::*;
use crate::stripe::api::VERSION;

const URL: &str = "https://shop.example/ls/hook/6f1c1f3e-5d0b-4a55-9f43-0a4b7a1e2d6c/";

#[test]
fn only_a_url_that_stripe_can_deliver_to_is_accepted() {
    let check = |text: &str, accepted: bool| {
        assert_eq!(parse_url(text).is_ok(), accepted, "{text}");
    };
    check(URL, true);
    check("http://127.0.0.1:8080/ls/hook/x/", true);
    check("http://[::1]:8080/ls/hook/x/", true);
    check("http://localhost:8080/", true);
    check("http://shop.example/", false);
    check("http://127.0.0.1.example/", false);
    check("http://10.0.0.1/", false);
    check("ftp://127.0.0.1/", false);
    check("https://user:password@shop.example/", false);
    check("https://shop.example/#part", false);
    check("shop.example", false);
    check("https://", false);
    check("", false);
}

#[test]
fn a_hook_is_recognized() {
    let check = |url: &str, expected: Option<&str>| {
        let url = Url::parse(url).expect("it is one");
        assert_eq!(hook_uuid(&url), expected, "{url}");
    };
    let uuid = Some("6f1c1f3e-5d0b-4a55-9f43-0a4b7a1e2d6c");
    check(URL, uuid);
    check(URL.trim_end_matches('/'), uuid);
    check(&URL.replace("/ls", "/billing/ls"), uuid);
    check("https://shop.example/", None);
    check("https://shop.example/ls/hook/", None);
    check("https://shop.example/ls/hook/uuid/", None);
    check(&URL.replace("/hook", ""), None);
}

fn types() -> Vec<String> {
    ["a.created", "a.updated"].map(str::to_owned).into()
}

fn endpoint(id: &str) -> Endpoint {
    Endpoint {
        id: id.to_owned(),
        url: URL.to_owned(),
        payload: Payload::Snapshot,
        source: Source::Account,
        types: types(),
        api_version: Some(VERSION.to_owned()),
        enabled: true,
        livemode: false,
        created: 1,
        marker: Some("key".to_owned()),
    }
}

/// Checks which endpoints have which problem, by a part of its text and of what mends it.
fn check(listed: &[Endpoint], asked: Option<&Address>, expected: &[(Option<&str>, &str, &str)]) {
    let found = problems(listed, asked, |_| types());
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, (id, problem, mend)) in found.iter().zip(expected) {
        let Problem {
            endpoint,
            problem: text,
            mend: advice,
        } = found;
        assert_eq!(endpoint.as_deref(), *id, "{found:#?}");
        assert!(text.contains(problem), "{problem}: {found:#?}");
        assert!(advice.contains(mend), "{mend}: {found:#?}");
    }
}

#[test]
fn each_difference_is_named_with_what_mends_it() {
    let one = |change: fn(&mut Endpoint)| {
        let mut endpoint = endpoint("we_1");
        change(&mut endpoint);
        [endpoint]
    };
    check(&one(|_| {}), None, &[]);
    check(&[], None, &[(None, "no endpoint", "endpoint create")]);
    check(
        &one(|one| one.marker = None),
        None,
        &[(None, "no endpoint", "endpoint create")],
    );
    check(
        &one(|one| one.types = vec!["a.created".to_owned(), "b.paid".to_owned()]),
        None,
        &[(
            Some("we_1"),
            "does not send a.updated; it sends what no worker handles: b.paid",
            "endpoint create",
        )],
    );
    check(
        &one(|one| one.types = vec!["*".to_owned()]),
        None,
        &[(Some("we_1"), "a.created", "endpoint create")],
    );
    check(
        &one(|one| {
            one.types
                .push("v1.customer.subscription.past_due".to_owned())
        }),
        None,
        &[],
    );
    check(
        &one(|one| one.api_version = Some("2024-06-20".to_owned())),
        None,
        &[(Some("we_1"), "2024-06-20", "endpoint roll we_1")],
    );
    check(
        &one(|one| one.api_version = None),
        None,
        &[(Some("we_1"), "account's default", "endpoint roll we_1")],
    );
    check(
        &one(|one| one.enabled = false),
        None,
        &[(Some("we_1"), "disabled", "endpoint create")],
    );
    check(
        &one(|one| one.url = "https://shop.example/".to_owned()),
        None,
        &[(None, "does not end in", "proxy")],
    );
}

#[test]
fn a_thin_endpoint_has_no_api_version() {
    let thin = Endpoint {
        payload: Payload::Thin,
        api_version: None,
        ..endpoint("ed_1")
    };
    check(&[thin], None, &[]);
}

#[test]
fn endpoints_of_one_url_are_compared() {
    let [old, new] = ["we_1", "we_2"].map(endpoint);
    let stranger = Endpoint {
        marker: None,
        ..endpoint("we_9")
    };
    let disabled = Endpoint {
        enabled: false,
        ..old.clone()
    };
    check(
        &[old, new.clone()],
        None,
        &[(Some("we_2"), "roll is not finished", "endpoint roll we_2")],
    );
    check(&[disabled, new.clone()], None, &[]);
    check(
        &[new, stranger],
        None,
        &[(Some("we_9"), "did not make it", "endpoint disable we_9")],
    );
}

#[test]
fn an_asked_address_must_have_an_endpoint() {
    let url = parse_url(URL).expect("it is one");
    let asked = |payload, source| Address {
        url: url.clone(),
        payload,
        source,
    };
    let listed = [endpoint("we_1")];
    check(
        &listed,
        Some(&asked(Payload::Snapshot, Source::Account)),
        &[],
    );
    check(
        &listed,
        Some(&asked(Payload::Thin, Source::Account)),
        &[(None, "we_1 delivers snapshot", "--thin")],
    );
    check(
        &listed,
        Some(&asked(Payload::Snapshot, Source::ConnectedAccounts)),
        &[(None, "events of the account", "--connect")],
    );
    let elsewhere = Address {
        url: parse_url("https://other.example/ls/hook/6f1c1f3e-5d0b-4a55-9f43-0a4b7a1e2d6c/")
            .expect("it is one"),
        ..asked(Payload::Snapshot, Source::Account)
    };
    check(
        &listed,
        Some(&elsewhere),
        &[(None, "no endpoint delivers", "other.example")],
    );
}
