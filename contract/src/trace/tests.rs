use super::TraceContext;

const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[test]
fn only_a_valid_traceparent_is_passed_on() {
    let is_passed_on = |text: &str| TraceContext::parse(text, None).is_some();
    let context = TraceContext::parse(VALID, None).expect("it is valid");
    assert_eq!((context.traceparent(), context.tracestate()), (VALID, None));
    assert!(!is_passed_on(""));
    assert!(!is_passed_on(&VALID.to_uppercase()));
    assert!(!is_passed_on(&format!("{VALID}-extra")));
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    assert!(!is_passed_on(&VALID.replace(trace, &"0".repeat(32))));
    let parent = "00f067aa0ba902b7";
    assert!(!is_passed_on(&VALID.replace(parent, &"0".repeat(16))));
    assert!(!is_passed_on(&VALID.replace(parent, &parent[1..])));
}

#[test]
fn a_later_version_is_passed_on_as_version_00() {
    let passed_on = |version: &str, flags: &str| {
        let text = format!("{version}-{}-{flags}", &VALID[3..52]);
        TraceContext::parse(&text, None).map(|context| context.traceparent().to_owned())
    };
    assert_eq!(passed_on("cc", "01").as_deref(), Some(VALID));
    assert_eq!(passed_on("01", "0f-more-").as_deref(), Some(VALID));
    let unrecorded = VALID.replace("-01", "-00");
    assert_eq!(passed_on("01", "fe").as_deref(), Some(&*unrecorded));
    assert_eq!(passed_on("ff", "01"), None);
    assert_eq!(passed_on("01", "01.more"), None);
    // Of this version all flags are known.
    assert_eq!(
        passed_on("00", "03").as_deref(),
        Some(&*VALID.replace("-01", "-03"))
    );
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
