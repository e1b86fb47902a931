use secrecy::ExposeSecret as _;

use super::super::{Given, Problems, Reader};
use super::{Identity, NatsSettings};

fn read(given: &[(&'static str, &str)]) -> Result<NatsSettings, Problems> {
    let given: Given = given
        .iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect();
    let mut reader = Reader::new(given);
    let nats = NatsSettings::read(&mut reader);
    reader.finish(Some(nats))
}

#[test]
fn servers_are_urls_with_a_host() {
    let hosts = |value| read(&[("NATS_URL", value)]).map(|nats| nats.hosts()).ok();
    assert_eq!(hosts("nats://a:1/, b"), Some("a:1, b:4222".to_owned()));
    for value in [
        "nats://a:1,",
        ",",
        "nats://",
        "nats://a:x",
        "ws://a",
        "nats://a/path",
        "nats://a?tls=true",
    ] {
        assert_eq!(hosts(value), None, "{value}");
    }
}

/// Checks who `url` says we are: a user with a password, or a token.
fn check_user(url: &'static str, expected: Option<(&str, Option<&str>)>) {
    let nats = read(&[("NATS_URL", url)]).expect(url);
    match (&nats.identity, expected) {
        (Identity::Anonymous, None) => {}
        (Identity::Password(user, password), Some((name, Some(expected)))) => {
            let password = password.at_start().expose_secret();
            assert_eq!((user.as_str(), password), (name, expected));
        }
        (Identity::Token(token), Some((expected, None))) => {
            assert_eq!(token.expose_secret(), expected);
        }
        (found, expected) => panic!("{url}: {found:?}, not {expected:?}"),
    }
    let printed = format!("{nats:?} {}", nats.hosts());
    assert!(!printed.contains("hunter2"), "{printed}");
}

#[test]
fn a_user_in_the_url_is_the_identity_and_is_not_printed() {
    check_user("nats://127.0.0.1", None);
    check_user("nats://app:hunter2@a", Some(("app", Some("hunter2"))));
    check_user("app:hunter2@a:4222", Some(("app", Some("hunter2"))));
    check_user("nats://hunter2@a", Some(("hunter2", None)));
    check_user(
        "nats://a%40b:%2Fhunter2%25%3A%C3%A4@a",
        Some(("a@b", Some("/hunter2%:ä"))),
    );
    check_user("tls://app:pa$hunter2@a", Some(("app", Some("pa$hunter2"))));
    // async-nats connects to a server by the same identity, whichever of the list it is.
    check_user(
        "nats://a:1, nats://app:hunter2@b:2, c",
        Some(("app", Some("hunter2"))),
    );
    check_user(
        "nats://app:hunter2@b,nats://app:hunter2@c",
        Some(("app", Some("hunter2"))),
    );
}

/// Checks that these settings are refused, each problem beginning with these words.
fn check_refused(given: &[(&'static str, &str)], expected: &[&str]) {
    let Problems(problems) = read(given)
        .map(|nats| format!("{nats:?}"))
        .expect_err("they cannot be used");
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.starts_with(expected), "{problem}");
        assert!(!problem.contains("hunter2"), "{problem}");
    }
}

#[test]
fn a_url_that_would_be_read_as_something_else_is_refused() {
    for url in [
        "nats://app:12/hunter2@a",
        "nats://app:12#hunter2@a",
        "nats://:hunter2@a",
        "nats://app:%FFhunter2@a",
    ] {
        check_refused(&[("NATS_URL", url)], &["NATS_URL must be"]);
    }
    let users = "nats://a:hunter2@h,nats://b:hunter2@i";
    check_refused(&[("NATS_URL", users)], &["NATS_URL names different users"]);
}

#[test]
fn two_identities_are_refused() {
    let url = ("NATS_URL", "nats://app:hunter2@a");
    let user = ("NATS_USER", "app");
    let password = ("NATS_PASSWORD", "hunter2");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let path = folder.path().join("password");
    std::fs::write(&path, "hunter2\n").expect("the folder is ours");
    let file = ("NATS_PASSWORD_FILE", path.to_str().expect("it is text"));
    let only_one = "NATS_CREDS or NATS_NKEY_SEED_FILE or NATS_USER or a user in NATS_URL";
    check_refused(&[url, user, password], &[only_one]);
    check_refused(&[url, ("NATS_CREDS", "file")], &[only_one]);
    check_refused(&[("NATS_NKEY_SEED_FILE", "seed"), user, file], &[only_one]);
    check_refused(
        &[user, password, file],
        &["NATS_PASSWORD_FILE and NATS_PASSWORD"],
    );
    check_refused(&[user], &["NATS_PASSWORD is missing"]);
    check_refused(&[file], &["NATS_USER is missing"]);
}

#[test]
fn an_inbox_prefix_is_the_beginning_of_a_subject() {
    let prefix = |value| read(&[("NATS_INBOX_PREFIX", value)]).map(|nats| nats.inbox_prefix);
    assert_eq!(prefix(""), Ok("_INBOX".to_owned()));
    assert_eq!(prefix("_INBOX_worker"), Ok("_INBOX_worker".to_owned()));
    assert_eq!(
        prefix("inboxes.worker-1"),
        Ok("inboxes.worker-1".to_owned())
    );
    let long = "a".repeat(65);
    for value in [
        "a.", ".a", "a..b", "a b", "_INBOX.>", "*", "$JS.x", "é", &long,
    ] {
        assert!(prefix(value).is_err(), "{value}");
    }
}
