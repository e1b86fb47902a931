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
fn repeated_signature_headers_are_joined() {
    let joined = signature_header(&headers(&[
        ("stripe-signature", b"t=1"),
        ("stripe-signature", b"v1=\xe9"),
    ]));
    assert_eq!(joined, "t=1,v1=\u{e9}");
    assert_eq!(signature_header(&HeaderMap::new()), "");
}

#[test]
fn only_a_valid_traceparent_is_passed_on() {
    let valid = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let passed_on =
        |text: &str| traceparent(&headers(&[("traceparent", text.as_bytes())])).is_some();
    assert_eq!(
        traceparent(&headers(&[("traceparent", valid.as_bytes())])).as_deref(),
        Some(valid)
    );
    assert!(!passed_on(""));
    assert!(!passed_on(&valid.to_uppercase()));
    assert!(!passed_on(&valid.replace("00-4", "ff-4")));
    assert!(!passed_on(&format!("{valid}-extra")));
    assert!(!passed_on(
        &valid.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32))
    ));
    assert!(!passed_on(
        &valid.replace("00f067aa0ba902b7", &"0".repeat(16))
    ));
    assert!(!passed_on(
        &valid.replace("00f067aa0ba902b7", "00f067aa0ba902b")
    ));
}

#[test]
fn the_content_length_is_read_as_a_number() {
    assert_eq!(
        content_length(&headers(&[("content-length", b"12")])),
        Some(12)
    );
    assert_eq!(content_length(&HeaderMap::new()), None);
}
