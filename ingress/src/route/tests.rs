use warp::http::header::{HeaderMap, HeaderName, HeaderValue};

use super::{content_length, signature_header};

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
fn the_content_length_is_read_as_a_number() {
    assert_eq!(
        content_length(&headers(&[("content-length", b"12")])),
        Some(12)
    );
    assert_eq!(content_length(&HeaderMap::new()), None);
}
