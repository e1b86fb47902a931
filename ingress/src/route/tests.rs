use warp::http::header::{HeaderMap, HeaderName, HeaderValue};

use super::{content_length, signature_header, traceparent};

fn headers(given: &[(&'static str, &[u8])]) -> HeaderMap {
    let pairs = given.iter().map(|(name, value)| {
        (
            HeaderName::from_static(name),
            HeaderValue::from_bytes(value).expect("it is a header value"),
        )
    });
    let mut headers = HeaderMap::new();
    pairs.for_each(|(name, value)| {
        headers.append(name, value);
    });
    headers
}

#[test]
fn a_repeated_signature_header_is_one_list() {
    let joined = signature_header(&headers(&[
        ("stripe-signature", b"t=1"),
        ("stripe-signature", b"v1=\xe9"),
    ]));
    assert_eq!(joined, "t=1,v1=\u{e9}");
    assert_eq!(signature_header(&HeaderMap::new()), "");
}

#[test]
fn a_valid_traceparent_is_carried() {
    let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let carried = |text: &str| traceparent(&headers(&[("traceparent", text.as_bytes())])).is_some();
    assert_eq!(
        traceparent(&headers(&[("traceparent", valid.as_bytes())])).as_deref(),
        Some(valid)
    );
    assert!(!carried(""));
    assert!(!carried(&valid.to_uppercase()));
    assert!(!carried(&valid.replace("00-4", "ff-4")));
    assert!(!carried(&format!("{valid}-extra")));
    assert!(!carried(
        &valid.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32))
    ));
    assert!(!carried(
        &valid.replace("00f067aa0ba902b7", &"0".repeat(16))
    ));
    assert!(!carried(
        &valid.replace("00f067aa0ba902b7", "00f067aa0ba902b")
    ));
}

#[test]
fn a_declared_length_is_a_number() {
    assert_eq!(
        content_length(&headers(&[("content-length", b"12")])),
        Some(12)
    );
    assert_eq!(content_length(&HeaderMap::new()), None);
}
