use litestripe_contract::event::{HANDLED_TYPES, THIN_PREFIX};
use reqwest::StatusCode;

use super::*;
use crate::doctor::State;
use crate::stripe::api::VERSION;
use crate::stripe::endpoint::Source;

const UUID: &str = "6f1c1f3e-5d0b-4a55-9f43-0a4b7a1e2d6c";

fn types(payload: Payload) -> Vec<String> {
    let prefix = payload.type_prefix();
    HANDLED_TYPES.map(|name| format!("{prefix}{name}")).to_vec()
}

/// An endpoint that somebody made by hand.
fn by_hand() -> Endpoint {
    Endpoint {
        id: "we_1".to_owned(),
        url: format!("https://user:pass@example.com/ls/hook/{UUID}/"),
        payload: Payload::Snapshot,
        source: Source::Account,
        types: types(Payload::Snapshot),
        api_version: None,
        enabled: true,
        livemode: true,
        created: 1,
        marker: None,
    }
}

fn made() -> Endpoint {
    Endpoint {
        url: format!("https://example.com/ls/hook/{UUID}/"),
        api_version: Some(VERSION.to_owned()),
        marker: Some("key".to_owned()),
        ..by_hand()
    }
}

fn with(mut endpoint: Endpoint, change: impl FnOnce(&mut Endpoint)) -> Endpoint {
    change(&mut endpoint);
    endpoint
}

fn judge_all(endpoints: &[Endpoint]) -> Vec<Line> {
    let listed = Listed {
        endpoints: endpoints.to_vec(),
        failed: Vec::new(),
    };
    judge(&listed, "live", Some(UUID), types)
}

#[track_caller]
fn check(endpoints: &[Endpoint], state: State, said: &str) {
    let lines = judge_all(endpoints);
    let [line] = lines.as_slice() else {
        panic!("not one line: {lines:#?}");
    };
    assert_eq!(line.state, state, "{line:?}");
    assert!(line.what.contains(said), "{line:?}");
    let text = format!("{}{:?}", line.what, line.mend);
    for hidden in [UUID, "user", "pass@"] {
        assert!(!text.contains(hidden), "{line:?}");
    }
    if state == State::Mend {
        assert!(text.contains("litestripe-worker endpoint"), "{line:?}");
    }
}

#[test]
fn endpoint_made_by_hand_sends_all_types_or_has_one_fault() {
    let ours = by_hand;
    let thin = with(ours(), |one| {
        one.payload = Payload::Thin;
        one.types = types(Payload::Thin);
    });
    let disabled = with(ours(), |one| one.enabled = false);
    let all = with(ours(), |one| one.types = vec!["*".to_owned()]);
    let none = with(ours(), |one| one.types.clear());
    let at = |path: &str| with(ours(), |one| one.url = format!("https://example.com{path}"));
    check(&[ours()], State::Ok, "https://example.com/ls/hook/…");
    let upper = at(&format!("/billing/ls/hook/{}", UUID.to_uppercase()));
    check(&[upper], State::Ok, "account's");
    check(std::slice::from_ref(&thin), State::Ok, "(thin)");
    check(&[ours(), disabled.clone()], State::Ok, "");
    check(&[none.clone(), all], State::Ok, "");
    check(&[none], State::Mend, "checkout.session.expired");
    let but_last = |endpoint| with(endpoint, |one: &mut Endpoint| drop(one.types.pop()));
    check(
        &[but_last(ours())],
        State::Mend,
        ": checkout.session.expired",
    );
    let lines = judge_all(&[but_last(thin)]);
    assert!(format!("{lines:?}").contains(THIN_PREFIX), "{lines:?}");
    check(&[disabled], State::Mend, "disabled");
    let another = format!("/ls/hook/{}/", UUID.replace('6', "0"));
    check(&[at(&another)], State::Mend, "another UUID");
    check(&[at("/webhooks")], State::Mend, "no live mode endpoint");
    check(&[], State::Mend, "no live mode endpoint");
}

#[test]
fn endpoint_that_litestripe_made_is_judged_by_its_rules() {
    let disabled = with(made(), |one| one.enabled = false);
    check(&[made()], State::Ok, VERSION);
    check(&[made(), disabled.clone()], State::Ok, "");
    check(
        std::slice::from_ref(&disabled),
        State::Mend,
        "we_1: it is disabled",
    );
    check(&[disabled, by_hand()], State::Ok, "");
    let few = with(made(), |one| drop(one.types.pop()));
    check(
        &[few],
        State::Mend,
        "we_1: it does not send checkout.session.expired",
    );
    let older = with(made(), |one| {
        one.api_version = Some("2024-06-20".to_owned());
    });
    check(&[older], State::Mend, "2024-06-20");
    // Of another hook, which is not ours to judge.
    let other = with(made(), |one| {
        one.url = one.url.replace(UUID, &UUID.replace('6', "0"));
        one.types.clear();
    });
    check(&[made(), other], State::Ok, "");
}

#[test]
fn list_that_the_key_may_not_read_is_no_missing_endpoint() {
    let listed = |endpoints| {
        let error = ApiError::Status {
            status: StatusCode::FORBIDDEN,
            request_id: "req_1".to_owned(),
        };
        Listed {
            endpoints,
            failed: vec![(Payload::Snapshot, error)],
        }
    };
    let [line] = judge(&listed(vec![]), "test", None, types)
        .try_into()
        .expect("it is one line");
    let Line {
        state, what, mend, ..
    } = line;
    assert_eq!(state, State::Unknown);
    assert!(what.contains("Webhook Endpoints"), "{what}");
    assert!(mend.is_some_and(|mend| mend.contains("Webhook Endpoints")));
    let [line] = judge(&listed(vec![by_hand()]), "test", None, types)
        .try_into()
        .expect("it is one line");
    assert_eq!(line.state, State::Ok);
}
