use tracing::Span;
use warp::http::header::{HeaderMap, HeaderValue};

use super::context;

#[test]
fn without_a_span_the_context_of_the_headers_is_passed_on() {
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let mut headers = HeaderMap::new();
    headers.insert("traceparent", HeaderValue::from_static(traceparent));
    headers.append("tracestate", HeaderValue::from_static("a=1"));
    headers.append("tracestate", HeaderValue::from_static("b=2"));
    let passed_on = context(&Span::none(), &headers).expect("it is valid");
    assert_eq!(passed_on.traceparent(), traceparent);
    assert_eq!(passed_on.tracestate(), Some("a=1,b=2"));

    headers.insert("traceparent", HeaderValue::from_static("of another format"));
    assert_eq!(context(&Span::none(), &headers), None);
}
