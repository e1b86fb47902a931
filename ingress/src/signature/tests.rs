use std::time::Duration;

use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use proptest::prelude::{any, prop_assert_eq, proptest};
use sha2::Sha256;
use time::OffsetDateTime;

use super::{SignatureError, SigningSecret, TIMESTAMP_DIGITS_MAX, verify};

const SECRET: &str = "whsec_test";
const BODY: &[u8] = br#"{"id":"evt_1","object":"event"}"#;
const NOW_S: i64 = 1_790_000_000;
const TOLERANCE: Duration = Duration::from_secs(300);

const OK: Result<(), SignatureError> = Ok(());
const MISSING: Result<(), SignatureError> = Err(SignatureError::Missing);
const MALFORMED: Result<(), SignatureError> = Err(SignatureError::Malformed);
const NO_MATCH: Result<(), SignatureError> = Err(SignatureError::NoMatch);

fn now() -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(NOW_S).expect("a date")
}

fn sign(secret: &str, timestamp: &str, body: &[u8]) -> String {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(timestamp.as_bytes());
    mac.update(b".");
    mac.update(body);
    mac.finalize()
        .into_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn verdict(header: &str, body: &[u8]) -> Result<(), SignatureError> {
    let secrets = [
        SigningSecret::new("whsec_other"),
        SigningSecret::new(SECRET),
    ];
    let verified = verify(
        header,
        Bytes::copy_from_slice(body),
        &secrets,
        now(),
        TOLERANCE,
    )?;
    assert_eq!(verified.bytes(), body, "the bytes are unchanged");
    Ok(())
}

/// `{now}` stands for the timestamp and `{v1}` for the right signature of it.
#[track_caller]
fn check(header: &str, expected: Result<(), SignatureError>) {
    let now = NOW_S.to_string();
    let header = header
        .replace("{v1}", &sign(SECRET, &now, BODY))
        .replace("{now}", &now);
    assert_eq!(verdict(&header, BODY), expected, "{header}");
}

/// Checks a timestamp that the header writes as `text` and that is signed as `rendered`, as
/// Python's `%d` writes it.
#[track_caller]
fn check_timestamp(text: &str, rendered: &str, expected: Result<(), SignatureError>) {
    let header = format!("t={text},v1={}", sign(SECRET, rendered, BODY));
    assert_eq!(verdict(&header, BODY), expected, "{text:.40}");
}

#[test]
fn items_may_come_in_any_order_and_among_others() {
    let zeros = "0".repeat(64);
    check("t={now},v1={v1}", OK);
    check("v1={v1},t={now}", OK);
    check(&format!("t={{now}},v1={zeros},v1={{v1}}"), OK);
    check(&format!("t={{now}},v1={{v1}},v1={zeros}"), OK);
    check("t={now},v1={v1},v0=6ffbb59b", OK);
    check("t={now},v2=,,=,what,v1={v1}", OK);
    check("t={now},v1=short,v1={v1}", OK);
    check("t={now},t=1,v1={v1}", OK);
}

#[test]
fn odd_headers_are_read_as_the_python_sdk_reads_them() {
    // It splits an item at the first two `=` and drops the third part.
    check("t={now}=1,v1={v1}=rest", OK);
    check("t={now},v1={v1}=", OK);
    check("t={now},v1==,v1={v1}", OK);
    check("t={now},v1={v1},v1", MALFORMED);
    check("t={now},v1={v1},t", MALFORMED);
    check("t={now},v1={v1},", OK);
    // It strips white space only from the number.
    check("t={now}, v1={v1}", NO_MATCH);
    check(" t={now},v1={v1}", MALFORMED);
    check("t= {now} ,v1={v1}", OK);
    check("t={now},v1= {v1}", NO_MATCH);
    check("T={now},V1={v1}", MALFORMED);
    // The first `t` counts.
    check("t=1,t={now},v1={v1}", NO_MATCH);
    check("t=x,t={now},v1={v1}", MALFORMED);
    // Its comparison raises at a signature that is not ASCII, unless one before it matched.
    check("t={now},v1=\u{e9},v1={v1}", NO_MATCH);
    check("t={now},v1={v1},v1=\u{e9}", OK);
    check("t={now},x=\u{e9},v1={v1}", OK);
}

#[test]
fn a_header_without_a_right_signature_is_refused() {
    check("", MISSING);
    check(" ", MALFORMED);
    check(",", MALFORMED);
    check("t={now}", NO_MATCH);
    check("t={now},v1=", NO_MATCH);
    check("t={now},v0={v1}", NO_MATCH);
    check("v1={v1}", MALFORMED);
    check("t=,v1={v1}", MALFORMED);
    check("t={now}.5,v1={v1}", MALFORMED);
    check("t=0x10,v1={v1}", MALFORMED);
    check("t={now},v1={v1}0", NO_MATCH);
    check("t={now},v1=0{v1}", NO_MATCH);
}

#[test]
fn an_upper_case_signature_is_refused() {
    let now = NOW_S.to_string();
    let upper = sign(SECRET, &now, BODY).to_ascii_uppercase();
    check(&format!("t={now},v1={upper}"), NO_MATCH);
}

#[test]
fn timestamps_are_parsed_as_python_parses_integers() {
    let now = NOW_S.to_string();
    let far = |digits: usize| "9".repeat(digits);
    check_timestamp(&format!("+{now}"), &now, OK);
    check_timestamp(&format!("000{now}"), &now, OK);
    check_timestamp(&format!("\t{now}\u{a0}"), &now, OK);
    check_timestamp("1_790_000_000", &now, OK);
    check_timestamp("17_90000000", &now, OK);
    check_timestamp("1__790000000", &now, MALFORMED);
    check_timestamp("_1790000000", &now, MALFORMED);
    check_timestamp("1790000000_", &now, MALFORMED);
    check_timestamp("+_1790000000", &now, MALFORMED);
    check_timestamp("+ 1790000000", &now, MALFORMED);
    check_timestamp("++1790000000", &now, MALFORMED);
    check_timestamp("", &now, MALFORMED);
    check_timestamp("+", &now, MALFORMED);
    check_timestamp(
        "-0",
        "0",
        Err(SignatureError::Stale {
            age: Duration::from_secs(1_790_000_000),
        }),
    );
    check_timestamp(&far(40), &far(40), OK);
    check_timestamp(&far(TIMESTAMP_DIGITS_MAX), &far(TIMESTAMP_DIGITS_MAX), OK);
    check_timestamp(
        &far(TIMESTAMP_DIGITS_MAX + 1),
        &far(TIMESTAMP_DIGITS_MAX + 1),
        MALFORMED,
    );
    let past = format!("-{}", far(TIMESTAMP_DIGITS_MAX));
    assert!(matches!(
        verdict(&format!("t={past},v1={}", sign(SECRET, &past, BODY)), BODY),
        Err(SignatureError::Stale { .. })
    ));
}

#[test]
fn tolerance_includes_its_last_second() {
    let check = |age_s: i64, tolerance_s: u64, received_ms: i64, expected| {
        let timestamp = (NOW_S - age_s).to_string();
        let header = format!("t={timestamp},v1={}", sign(SECRET, &timestamp, BODY));
        let received = now() + time::Duration::milliseconds(received_ms);
        let secrets = [SigningSecret::new(SECRET)];
        let body = Bytes::from_static(BODY);
        let verified = verify(
            &header,
            body,
            &secrets,
            received,
            Duration::from_secs(tolerance_s),
        );
        assert_eq!(
            verified.map(|_| ()),
            expected,
            "{age_s} s old, {tolerance_s} s allowed"
        );
    };
    let stale = |age_s| {
        Err(SignatureError::Stale {
            age: Duration::from_secs(age_s),
        })
    };
    check(0, 300, 0, OK);
    check(300, 300, 0, OK);
    check(300, 300, 1, stale(300)); // The SDK compares with a clock that has fractions.
    check(301, 300, 0, stale(301));
    check(-5, 300, 0, OK); // Stripe's clock may run ahead of ours; its SDKs accept that too.
    check(-100_000, 300, 0, OK);
    check(1_000_000, 0, 0, OK); // Zero switches the check off.
}

#[test]
fn a_wrong_signature_is_reported_before_a_stale_one() {
    check("t=1,v1={v1}", NO_MATCH);
}

#[test]
fn a_body_that_is_not_utf8_is_refused() {
    let body = [b'{', 0xff, b'}'];
    let timestamp = NOW_S.to_string();
    let header = format!("t={timestamp},v1={}", sign(SECRET, &timestamp, &body));
    assert_eq!(verdict(&header, &body), Err(SignatureError::NotText));
}

#[test]
fn debug_output_hides_the_secret() {
    let secret = SigningSecret::new("whsec_hunter2");
    let printed = format!("{secret:?}");
    assert!(
        printed.contains(secret.fingerprint()) && !printed.contains("hunter2"),
        "{printed}"
    );
    assert_eq!(secret.fingerprint().len(), 8);
}

proptest! {
    #[test]
    fn no_header_panics(header in any::<String>(), body in any::<Vec<u8>>()) {
        let _ = verdict(&header, &body);
    }

    #[test]
    fn no_header_of_the_right_letters_panics(header in "[tv01=,_+ 9a-]{0,200}", body in any::<String>()) {
        let _ = verdict(&header, body.as_bytes());
    }

    #[test]
    fn a_body_that_the_secret_signed_is_accepted(body in any::<String>(), age_s in -1000_i64..=300, others in "(,v[02]=[0-9a-f]{0,64}){0,3}") {
        let timestamp = (NOW_S - age_s).to_string();
        let header = format!("t={timestamp}{others},v1={}", sign(SECRET, &timestamp, body.as_bytes()));
        prop_assert_eq!(verdict(&header, body.as_bytes()), OK);
    }

    #[test]
    fn a_flipped_bit_of_the_body_is_refused(body in "[ -~]{1,300}", at in any::<proptest::sample::Index>(), bit in 0_u8..7) {
        let timestamp = NOW_S.to_string();
        let header = format!("t={timestamp},v1={}", sign(SECRET, &timestamp, body.as_bytes()));
        let mut flipped = body.into_bytes();
        let at = at.index(flipped.len());
        flipped[at] ^= 1 << bit;
        prop_assert_eq!(verdict(&header, &flipped), NO_MATCH);
    }

    #[test]
    fn a_changed_header_is_refused(at in 0_usize..64, digit in "[0-9a-f]", later_s in 1_i64..1000) {
        let timestamp = NOW_S.to_string();
        let signature = sign(SECRET, &timestamp, BODY);
        let mut changed = signature.clone();
        changed.replace_range(at..=at, &digit);
        if changed != signature {
            prop_assert_eq!(verdict(&format!("t={timestamp},v1={changed}"), BODY), NO_MATCH);
        }
        let later = format!("t={},v1={signature}", NOW_S + later_s);
        prop_assert_eq!(verdict(&later, BODY), NO_MATCH);
    }

    #[test]
    fn another_secret_is_refused(secret in "whsec_[a-zA-Z0-9]{5,40}") {
        let timestamp = NOW_S.to_string();
        let header = format!("t={timestamp},v1={}", sign(&secret, &timestamp, BODY));
        prop_assert_eq!(verdict(&header, BODY), NO_MATCH);
    }
}
