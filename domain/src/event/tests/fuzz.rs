//! Properties of `decode`: no bytes make it panic, and every event that it accepts can be stored.
//! Tested with arbitrary bytes, and with Stripe's bodies after random mutations.

use litestripe_contract::signal::Timestamp;
use proptest::prelude::*;

use super::*;

/// How many bodies each property is tested with. `LITESTRIPE_LONG` sets another number.
fn cases() -> ProptestConfig {
    #[expect(clippy::disallowed_methods, reason = "says how long a test runs")]
    let long = std::env::var("LITESTRIPE_LONG")
        .ok()
        .and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: long.unwrap_or(10_000),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn bodies() -> Vec<Vec<u8>> {
    let previous =
        json!({ "status": "trialing", "metadata": { "plan": null }, "items": { "data": [{}] } });
    [
        updated(subscription(), previous),
        body("customer.subscription.created", subscription()),
        body("checkout.session.completed", session()),
        body(
            RESOLUTION_TYPE,
            json!({ "orphan_id": "sub_1", "client_reference_id": "user-1" }),
        ),
    ]
    .map(|body| body.to_string().into_bytes())
    .into()
}

/// Pieces of text to which JSON readers are sensitive.
const PIECES: [&str; 20] = [
    "null",
    "true",
    "{",
    "}",
    "[",
    "]",
    "\"",
    ",",
    ":",
    "\\u0000",
    "\\ud800",
    "\\",
    "1e999",
    "-1",
    "0.5",
    "99999999999999999999",
    "\u{FEFF}",
    "\"\"",
    "{}",
    "[]",
];

#[derive(Debug, Clone)]
enum Mutation {
    Overwrite(usize, u8),
    Insert(usize, &'static str),
    Remove(usize, usize),
    /// Replaces a whole value by a piece.
    Value(usize, &'static str),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let place = any::<usize>();
    let piece = proptest::sample::select(&PIECES[..]);
    prop_oneof![
        (place, any::<u8>()).prop_map(|(at, byte)| Mutation::Overwrite(at, byte)),
        (place, piece.clone()).prop_map(|(at, piece)| Mutation::Insert(at, piece)),
        (place, 1..40usize).prop_map(|(at, bytes)| Mutation::Remove(at, bytes)),
        (place, piece).prop_map(|(at, piece)| Mutation::Value(at, piece)),
    ]
}

fn mutate(body: &mut Vec<u8>, mutation: &Mutation) {
    let length = body.len().max(1);
    match mutation {
        Mutation::Overwrite(at, byte) => {
            if let Some(target) = body.get_mut(at % length) {
                *target = *byte;
            }
        }
        Mutation::Insert(at, piece) => {
            let at = at % length;
            body.splice(at.min(body.len())..at.min(body.len()), piece.bytes());
        }
        Mutation::Remove(at, bytes) => {
            let at = (at % length).min(body.len());
            body.drain(at..(at + bytes).min(body.len()));
        }
        Mutation::Value(at, piece) => {
            let colons: Vec<usize> = (0..body.len()).filter(|at| body[*at] == b':').collect();
            if let Some(colon) = colons.get(at % colons.len().max(1)) {
                let end = body[*colon..]
                    .iter()
                    .position(|byte| matches!(byte, b',' | b'}'))
                    .unwrap_or(1);
                body.splice(colon + 1..(colon + end).max(colon + 1), piece.bytes());
            }
        }
    }
}

/// Checks that an event which `decode` accepted can be stored and signalled.
fn check_storable(event: &Event) {
    Timestamp::from_unix(event.created).expect("a time");
    if let Body::Subscription(body) = &event.body {
        let kept = &body.snapshot;
        let times = [
            kept.created,
            kept.start_date,
            kept.cancel_at,
            kept.canceled_at,
            kept.ended_at,
            kept.trial_end,
        ];
        for time in times
            .into_iter()
            .chain([kept.current_period_start, kept.current_period_end])
            .flatten()
        {
            Timestamp::from_unix(time).expect("a time");
        }
        let json = serde_json::to_string(kept).expect("it is JSON");
        assert!(
            !json.replace(r"\\", "").contains(r"\u0000"),
            "NUL in {json}"
        );
        assert_eq!(
            serde_json::from_str::<Snapshot>(&json).expect("it reads back"),
            *kept
        );
    }
    if let Some(id) = event.stripe_subscription_id() {
        EventId::parse(id).expect("printable ASCII, as a header needs it");
    }
}

fn check_decodes_or_refuses(bytes: &[u8]) -> Result<(), TestCaseError> {
    match decode(bytes, &MetadataKeys::All) {
        Ok(Some(event)) => check_storable(&event),
        Ok(None) => {}
        Err(error) => {
            let reason = error.to_string();
            prop_assert!(reason.is_ascii() && reason.len() < 120, "{reason}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        check_decodes_or_refuses(&bytes)?;
    }

    #[test]
    fn mutated_bodies_never_panic(
        which in 0..4usize,
        mutations in proptest::collection::vec(mutation(), 1..5),
    ) {
        let mut body = bodies().swap_remove(which);
        for mutation in &mutations {
            mutate(&mut body, mutation);
        }
        check_decodes_or_refuses(&body)?;
    }
}
