use super::TraceContext;

const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[test]
fn only_a_valid_traceparent_is_passed_on() {
    let is_passed_on = |text: &str| TraceContext::parse(text, None).is_some();
    let context = TraceContext::parse(VALID, None).expect("it is valid");
    assert_eq!((context.traceparent(), context.tracestate()), (VALID, None));
    assert!(!is_passed_on(""));
    assert!(!is_passed_on(&VALID.to_uppercase()));
    assert!(!is_passed_on(&VALID.replace("00-4", "ff-4")));
    assert!(!is_passed_on(&format!("{VALID}-extra")));
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    assert!(!is_passed_on(&VALID.replace(trace, &"0".repeat(32))));
    let parent = "00f067aa0ba902b7";
    assert!(!is_passed_on(&VALID.replace(parent, &"0".repeat(16))));
    assert!(!is_passed_on(&VALID.replace(parent, &parent[1..])));
}

#[test]
fn a_tracestate_that_cannot_be_passed_on_leaves_the_traceparent() {
    let tracestate = |text: &str| {
        let context = TraceContext::parse(VALID, Some(text)).expect("the traceparent is valid");
        context.tracestate().map(str::to_owned)
    };
    assert_eq!(tracestate("a=1, b=2").as_deref(), Some("a=1, b=2"));
    let longest = "a".repeat(512);
    assert_eq!(tracestate(&longest).as_deref(), Some(longest.as_str()));
    for left_out in ["", "a=1\r\nNats-Msg-Id: x", "a=\u{e9}", &"a".repeat(513)] {
        assert_eq!(tracestate(left_out), None, "{left_out:?}");
    }
}
