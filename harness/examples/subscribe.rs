//! A durable subscriber in Rust, shown in `docs/subscribing.md`. Run: `cargo run --example
//! subscribe`.
//!
//! Needs only the contract crate with default features, async-nats, futures-util, serde_json and
//! tokio.
#![expect(clippy::print_stdout, reason = "an example that prints the signals")]

use std::collections::HashMap;

use async_nats::jetstream::{self, consumer::pull};
use futures_util::StreamExt as _;
use litestripe_contract::signal::{Orphan, SubscriptionChanged};
use litestripe_contract::subject;

/// The durable consumer of this application. Each application needs its own.
const DURABLE: &str = "my-rust-app";

/// The highest revision seen of each subscription, and its user. In your application these are
/// columns of your own row, written in the same transaction as your changes.
type Seen = HashMap<String, (i64, Option<String>)>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), async_nats::Error> {
    let url = std::env::var("NATS_URL").unwrap_or_else(|_| "nats://127.0.0.1:4222".to_owned());
    let client = async_nats::connect(url).await?;
    let stream = jetstream::new(client)
        .get_stream(subject::SIGNALS_STREAM)
        .await?;
    let subjects = [
        subject::SUBSCRIPTION_CHANGED,
        subject::ORPHAN_CREATED,
        subject::ORPHAN_RESOLVED,
    ];
    let config = pull::Config {
        durable_name: Some(DURABLE.to_owned()),
        filter_subjects: subjects.map(str::to_owned).to_vec(),
        ..pull::Config::default()
    };
    let consumer = stream.get_or_create_consumer(DURABLE, config).await?;
    let mut signals = consumer.messages().await?;
    let mut seen = Seen::new();
    while let Some(signal) = signals.next().await {
        let signal = match signal {
            Ok(signal) => signal,
            Err(error) => {
                eprintln!("waiting for the broker: {error}");
                continue;
            }
        };
        if signal.subject.as_str() == subject::SUBSCRIPTION_CHANGED {
            changed(&mut seen, &serde_json::from_slice(&signal.payload)?);
        } else {
            let orphan: Orphan = serde_json::from_slice(&signal.payload)?;
            println!(
                "{}: {} {}",
                signal.subject,
                orphan.orphan_id,
                orphan.reason.as_str()
            );
        }
        signal.ack().await?; // After the work: after a crash before it, the signal is redelivered.
    }
    Ok(())
}

fn changed(seen: &mut Seen, signal: &SubscriptionChanged) {
    let id = &signal.stripe_subscription_id;
    let (last, known) = seen.get(id).cloned().unzip();
    if last.is_some_and(|last| signal.revision <= last) {
        return println!("{id}: {} is not above {last:?}: ignored", signal.revision);
    }
    if let Some(previous) = signal
        .previous_revision
        .filter(|previous| Some(*previous) != last)
    {
        println!(
            "{id}: missed what came between {last:?} and {previous}; this signal has the whole row"
        );
    }
    let row = &signal.subscription;
    // None: not known here, so the user that you know stays.
    let user = row.client_reference_id.clone().or(known.flatten());
    println!(
        "{id}: user {user:?} {:?} ({:?}), changed {:?}",
        signal.access, row.status, signal.changed
    );
    seen.insert(id.clone(), (signal.revision, user));
}
