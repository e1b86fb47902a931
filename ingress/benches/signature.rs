//! The cost of a delivery before it is published: the HMAC over its body, and reading its envelope.
//!
//!     cargo bench -p litestripe-ingress

use std::time::Duration;

use bytes::Bytes;
use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use hmac::{Hmac, KeyInit as _, Mac as _};
use litestripe_ingress::envelope::Envelope;
use litestripe_ingress::signature::{SigningSecret, VerifiedBody, verify};
use sha2::Sha256;
use time::OffsetDateTime;

const SECRET: &str = "whsec_onlyTheBenchesKnowThis";
const TOLERANCE: Duration = Duration::from_secs(300);

/// The lengths of the bodies, in bytes. Stripe's have 2 to 60 KiB.
const LENGTHS: [usize; 3] = [1 << 10, 4 << 10, 64 << 10];

fn main() {
    divan::main();
}

/// Makes a subscription's event that metadata fills up to `length`.
fn body(length: usize) -> Bytes {
    let event = |filling: &str| {
        format!(
            r#"{{"id":"evt_1QyaBcDeFgHiJkLmNoPqRsTu","object":"event","created":1795430000,"data":{{"object":{{"id":"sub_1","object":"subscription","metadata":{{"filling":"{filling}"}}}}}},"type":"customer.subscription.updated"}}"#
        )
    };
    event(&"x".repeat(length - event("").len())).into()
}

fn signed(body: &[u8], now: OffsetDateTime) -> String {
    let timestamp = now.unix_timestamp();
    let mut mac =
        Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(format!("{timestamp}.").as_bytes());
    mac.update(body);
    let signature: String = mac
        .finalize()
        .into_bytes()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("t={timestamp},v1={signature}")
}

fn verified(length: usize) -> VerifiedBody {
    let (body, now) = (body(length), OffsetDateTime::now_utc());
    verify(
        &signed(&body, now),
        body,
        &[SigningSecret::new(SECRET)],
        now,
        TOLERANCE,
    )
    .expect("it is signed")
}

#[divan::bench(args = LENGTHS)]
fn a_good_signature(bencher: Bencher<'_, '_>, length: usize) {
    let (body, now, secrets) = (
        body(length),
        OffsetDateTime::now_utc(),
        [SigningSecret::new(SECRET)],
    );
    let header = signed(&body, now);
    let verified = || verify(black_box(&header), body.clone(), &secrets, now, TOLERANCE).is_ok();
    bencher
        .counter(BytesCount::new(length))
        .bench_local(verified);
}

#[divan::bench(args = LENGTHS)]
fn a_bad_signature(bencher: Bencher<'_, '_>, length: usize) {
    let (body, now, secrets) = (
        body(length),
        OffsetDateTime::now_utc(),
        [SigningSecret::new("whsec_another")],
    );
    let header = signed(&body, now);
    let verified = || verify(black_box(&header), body.clone(), &secrets, now, TOLERANCE).is_ok();
    bencher
        .counter(BytesCount::new(length))
        .bench_local(verified);
}

#[divan::bench(args = LENGTHS)]
fn an_envelope(bencher: Bencher<'_, '_>, length: usize) {
    let body = verified(length);
    bencher
        .counter(BytesCount::new(length))
        .bench_local(|| Envelope::read(black_box(&body)));
}
