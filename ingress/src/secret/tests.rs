use super::{SigningSecret, find, parse_list};

#[test]
fn the_first_secret_in_a_file_is_found() {
    let check = |file: &[u8], expected: Option<&str>| {
        let found = find(file).map(|secret| secret.fingerprint().to_owned());
        assert_eq!(
            found.as_deref(),
            expected
                .map(SigningSecret::new)
                .as_ref()
                .map(SigningSecret::fingerprint)
        );
    };
    check(b"whsec_abc", Some("whsec_abc"));
    check(b"whsec_abc\n", Some("whsec_abc"));
    check(
        b"> Ready! Your webhook signing secret is whsec_a1B2 (^C to quit)\nwhsec_later",
        Some("whsec_a1B2"),
    );
    check(b"SECRET=\"whsec_abc\"", Some("whsec_abc"));
    check(b"whsec_ whsec_-x whsec_abc-def", Some("whsec_abc"));
    check(b"whsec_whsec_abc", Some("whsec_whsec"));
    check(b"\xff\xfewhsec_abc\xff", Some("whsec_abc"));
    check(b"", None);
    check(b"whsec_", None);
    check(b"sk_test_abc", None);
}

#[test]
fn a_setting_holds_one_secret_or_several() {
    let check = |text: &str, expected: Option<&[&str]>| {
        let parsed = parse_list(text);
        let parsed: Option<Vec<_>> = parsed
            .as_ref()
            .map(|all| all.iter().map(SigningSecret::fingerprint).collect());
        let expected: Option<Vec<_>> =
            expected.map(|all| all.iter().map(|text| SigningSecret::new(text)).collect());
        let expected: Option<Vec<_>> = expected
            .as_ref()
            .map(|all| all.iter().map(SigningSecret::fingerprint).collect());
        assert_eq!(parsed, expected, "{text}");
    };
    check("whsec_abc", Some(&["whsec_abc"]));
    check("whsec_abc, whsec_dEf0", Some(&["whsec_abc", "whsec_dEf0"]));
    check("whsec_a+b/c=_-", Some(&["whsec_a+b/c=_-"]));
    for wrong in [
        "",
        "whsec_",
        "sk_live_abc",
        "whsec_abc,",
        "whsec_abc;whsec_def",
        "whsec_a b",
        " ,whsec_abc",
    ] {
        check(wrong, None);
    }
}
