use std::path::Path;

use super::{SigningSecret, find, is_in, parse_list};

#[test]
fn every_secret_in_a_file_is_found_once() {
    let check = |file: &[u8], expected: &[&str]| {
        let fingerprint = |secret: &SigningSecret| secret.fingerprint().to_owned();
        let found: Vec<_> = find(file).iter().map(fingerprint).collect();
        let expected: Vec<_> = expected
            .iter()
            .map(|text| fingerprint(&SigningSecret::new(text)))
            .collect();
        assert_eq!(found, expected, "{}", String::from_utf8_lossy(file));
    };
    check(b"whsec_abc", &["whsec_abc"]);
    check(b"whsec_abc\n", &["whsec_abc"]);
    check(
        b"> Ready! Your webhook signing secret is whsec_a1B2 (^C to quit)\n",
        &["whsec_a1B2"],
    );
    check(
        b"whsec_abc # we_1\nwhsec_def # we_2\nwhsec_abc\n",
        &["whsec_abc", "whsec_def"],
    );
    check(b"A=whsec_abc,whsec_def", &["whsec_abc", "whsec_def"]);
    check(b"SECRET=\"whsec_abc\"", &["whsec_abc"]);
    check(b"whsec_ whsec_-x whsec_abc-def", &["whsec_abc"]);
    check(b"whsec_whsec_abc", &["whsec_whsec"]);
    check(b"\xff\xfewhsec_abc\xff", &["whsec_abc"]);
    check(b"", &[]);
    check(b"whsec_", &[]);
    check(b"sk_test_abc", &[]);
}

#[test]
fn a_file_is_not_read_to_its_end_if_it_has_none() {
    assert!(!is_in(Path::new("/dev/zero")));
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
