use std::time::Duration;

use litestripe_contract::settings::StreamSettings;
use litestripe_contract::stream as wanted;

use super::*;

/// Checks that `found` has one finding, which contains `what` and the command `mend`.
fn check(found: Vec<Finding>, what: &str, mend: &str) {
    let [one] = &found[..] else {
        panic!("{what}: {found:?}");
    };
    assert!(one.what.contains(what), "{one:?}");
    assert!(one.mend.contains(mend), "{one:?}");
}

const DEFAULT: StreamSettings = StreamSettings {
    max_age: Duration::ZERO,
    max_bytes: None,
};

fn signals() -> stream::Config {
    wanted::signals(1, DEFAULT, 10 << 30)
}

fn letters() -> stream::Config {
    wanted::dead_letters(1, DEFAULT, 10 << 30)
}

fn durable() -> consumer::Config {
    consumer::Config {
        ack_policy: AckPolicy::Explicit,
        max_deliver: -1,
        ..consumer::Config::default()
    }
}

#[test]
fn what_litestripe_creates_has_no_findings() {
    assert_eq!(of_signals(&signals()), []);
    assert_eq!(of_dead_letters(&letters()), []);
    assert_eq!(of_consumer(&durable()), []);
    assert_eq!(of_position(7, 7), None);
}

#[test]
fn each_harmful_setting_of_a_stream_is_named_with_its_mend() {
    let edit = "nats stream edit LITESTRIPE_SIGNALS --";
    let no_ack = stream::Config {
        no_ack: true,
        ..signals()
    };
    check(of_signals(&no_ack), "no_ack", &format!("{edit}ack"));
    let full = stream::Config {
        max_bytes: 1,
        discard: DiscardPolicy::New,
        ..signals()
    };
    check(of_signals(&full), "refuses", &format!("{edit}discard=old"));
    let small = stream::Config {
        max_message_size: 1000,
        ..signals()
    };
    check(
        of_signals(&small),
        "max_msg_size",
        &format!("{edit}max-msg-size=-1"),
    );
    let large = stream::Config {
        max_message_size: MAX_PAYLOAD,
        ..signals()
    };
    assert_eq!(of_signals(&large), []);
    let other = stream::Config {
        subjects: vec!["orphan.*".to_owned()],
        ..signals()
    };
    check(of_signals(&other), "subjects", &format!("{edit}subjects"));
    let queue = stream::Config {
        retention: RetentionPolicy::WorkQueue,
        ..letters()
    };
    check(
        of_dead_letters(&queue),
        "acknowledged",
        "STRIPE_DEAD_LETTERS",
    );
    let events = stream::Config {
        name: EVENTS_STREAM.to_owned(),
        subjects: vec!["stripe.>".to_owned()],
        max_bytes: 1 << 30,
        ..stream::Config::default()
    };
    check(of_events(&events), "not applied yet", "--discard=new");
}

#[test]
fn each_harmful_setting_of_the_consumer_is_named_with_its_mend() {
    let mend = "nats consumer rm STRIPE_EVENTS litestripe-worker";
    let once = consumer::Config {
        max_deliver: 1,
        ..durable()
    };
    check(of_consumer(&once), "max_deliver", mend);
    let no_acks = consumer::Config {
        ack_policy: AckPolicy::None,
        ..durable()
    };
    check(of_consumer(&no_acks), "ack_policy", mend);
    let filtered = consumer::Config {
        filter_subject: "stripe.events.customer.>".to_owned(),
        ..durable()
    };
    check(of_consumer(&filtered), "filter_subject", mend);
    let all = consumer::Config {
        filter_subject: "stripe.events.>".to_owned(),
        ..durable()
    };
    assert_eq!(of_consumer(&all), []);
    let new = consumer::Config {
        deliver_policy: DeliverPolicy::New,
        ..durable()
    };
    check(of_consumer(&new), "deliver_policy", mend);
    let pushed = consumer::Config {
        deliver_subject: Some("somewhere".to_owned()),
        ..durable()
    };
    check(of_consumer(&pushed), "push", mend);
    check(of_position(8, 7).into_iter().collect(), "skipped", mend);
}
