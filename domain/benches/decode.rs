//! Measures decoding: from an event's bytes to the parts of it that are kept.
//!
//!     cargo bench -p litestripe-domain --bench decode

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use litestripe_domain::event::{MetadataKeys, decode};

mod events;

fn main() {
    divan::main();
}

#[divan::bench(args = ["customer.subscription.created", "customer.subscription.updated"])]
fn a_subscription(bencher: Bencher<'_, '_>, event_type: &str) {
    let body = events::subscription(event_type, "evt_1", 1_795_430_000);
    let decoded = || decode(black_box(&body), &MetadataKeys::All);
    assert!(decoded().is_ok_and(|event| event.is_some()));
    bencher
        .counter(BytesCount::new(body.len()))
        .bench_local(decoded);
}

/// An unhandled type, which is skipped.
#[divan::bench]
fn another_type(bencher: Bencher<'_, '_>) {
    let body = events::subscription("invoice.created", "evt_1", 1_795_430_000);
    bencher
        .counter(BytesCount::new(body.len()))
        .bench_local(|| decode(black_box(&body), &MetadataKeys::All));
}
