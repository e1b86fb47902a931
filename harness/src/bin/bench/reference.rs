//! The reference programs: the simplest programs that do the same work as the measured ones. Each
//! runs in its own process, so that its CPU time and memory can be measured.
//!
//! They are not fit for use, without limits, retries, deadlines or metrics. They show what the
//! machine, the broker and the libraries allow.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::pull;
use async_nats::jetstream::{self, AckKind};
use bytes::Bytes;
use clap::Subcommand;
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use hmac::{Hmac, KeyInit as _, Mac as _};
use litestripe_contract::subject::{EVENTS_PREFIX, EVENTS_STREAM};
use litestripe_contract::{header, stream};
use litestripe_harness::bridge::{HOOK, SECRET};
use serde::Deserialize;
use serde_json::json;
use sha2::Sha256;
use tokio::time::Instant;
use warp::Filter as _;
use warp::http::StatusCode;

use crate::pool::{Events, Kind, TYPE};
use crate::rig::events_settings;
use crate::usage;

/// The subjects that the relay reads from and writes to.
pub(crate) const IN: &str = "bench.in";
pub(crate) const OUT: &str = "bench.out";

/// Messages that are handled together, the same number as a worker's.
const BATCH: usize = 500;

#[derive(Subcommand)]
pub(crate) enum Reference {
    /// An HTTP server that verifies and answers.
    Verify { listen: SocketAddr },
    /// An HTTP server that verifies, publishes, and answers after the PubAck.
    Spike { listen: SocketAddr, nats: String },
    /// Publishes `count` events with `in_flight` pending PubAcks.
    Publish {
        nats: String,
        count: usize,
        in_flight: usize,
    },
    /// Consumes and acks `count` events.
    Consume { nats: String, count: usize },
    /// Consumes messages and publishes one for each of them.
    Relay { nats: String },
}

impl Reference {
    pub(crate) async fn run(self) {
        match self {
            Self::Verify { listen } => verify(listen).await,
            Self::Spike { listen, nats } => spike(listen, &nats).await,
            Self::Publish {
                nats,
                count,
                in_flight,
            } => publish(&nats, count, in_flight).await,
            Self::Consume { nats, count } => consume(&nats, count).await,
            Self::Relay { nats } => relay(&nats).await,
        }
    }
}

async fn connect(nats: &str) -> jetstream::Context {
    jetstream::new(async_nats::connect(nats).await.expect("the broker answers"))
}

async fn verify(listen: SocketAddr) {
    let hook = warp::post()
        .and(warp::path!("ls" / "hook" / String))
        .and(warp::header::<String>("stripe-signature"))
        .and(warp::body::bytes())
        .map(|hook: String, signature: String, body: Bytes| {
            answer(hook == HOOK && is_signed(&signature, &body))
        });
    warp::serve(hook).run(listen).await;
}

async fn spike(listen: SocketAddr, nats: &str) {
    let jetstream = connect(nats).await;
    stream::provide_events(&jetstream, &events_settings())
        .await
        .expect("the stream can be created");
    let hook = warp::post()
        .and(warp::path!("ls" / "hook" / String))
        .and(warp::header::<String>("stripe-signature"))
        .and(warp::body::bytes())
        .then(move |hook: String, signature: String, body: Bytes| {
            let jetstream = jetstream.clone();
            async move {
                if hook != HOOK || !is_signed(&signature, &body) {
                    return answer(false);
                }
                let Ok(envelope) = serde_json::from_slice::<Envelope<'_>>(&body) else {
                    return answer(false);
                };
                let mut headers = HeaderMap::new();
                headers.insert(header::MESSAGE_ID, envelope.id);
                let subject = format!("{EVENTS_PREFIX}{}", envelope.event_type);
                let ack = jetstream
                    .publish_with_headers(subject, headers, body.clone())
                    .await;
                answer(ack.expect("the broker is reachable").await.is_ok())
            }
        });
    warp::serve(hook).run(listen).await;
}

#[derive(Deserialize)]
struct Envelope<'a> {
    id: &'a str,
    #[serde(rename = "type")]
    event_type: &'a str,
}

fn answer(is_accepted: bool) -> impl warp::Reply {
    let (status, body) = match is_accepted {
        true => (StatusCode::OK, r#"{"status":"success"}"#),
        false => (StatusCode::BAD_REQUEST, r#"{"error":"no"}"#),
    };
    warp::reply::with_status(
        warp::reply::with_header(body, "content-type", "application/json"),
        status,
    )
}

fn is_signed(header: &str, body: &[u8]) -> bool {
    let value = |name: &str| {
        header
            .split(',')
            .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
    };
    let (Some(timestamp), Some(signature)) = (value("t"), value("v1")) else {
        return false;
    };
    let nibbles = signature.as_bytes().as_chunks::<2>().0.iter();
    let signature: Option<Vec<u8>> = nibbles
        .map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok())
        .collect();
    let mut mac =
        Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(timestamp.as_bytes());
    mac.update(b".");
    mac.update(body);
    signature.is_some_and(|signature| mac.verify_slice(&signature).is_ok())
}

/// Prints the figures as one line of JSON, which [`crate::rig::finished`] reads.
fn print_figures(count: usize, took: Duration, latencies_us: Vec<u32>) {
    let mut latencies_us = latencies_us;
    latencies_us.sort_unstable();
    let pid = std::process::id();
    let figures = json!({
        "rate": count as f64 / took.as_secs_f64(),
        "p50_us": crate::load::percentile(&latencies_us, 0.5),
        "p99_us": crate::load::percentile(&latencies_us, 0.99),
        "cpu_s": usage::cpu_s(pid) * 10_000.0 / count.max(1) as f64,
        "memory_mib": usage::memory_mib(pid),
    });
    println!("{figures}");
}

async fn publish(nats: &str, count: usize, in_flight: usize) {
    let jetstream = connect(nats).await;
    stream::provide_events(&jetstream, &events_settings())
        .await
        .expect("the stream can be created");
    let events = Arc::new(Events::new());
    let next = Arc::new(AtomicUsize::new(0));
    let begin = Instant::now();
    let lanes = (0..in_flight).map(|_| {
        let (jetstream, events, next) = (jetstream.clone(), Arc::clone(&events), Arc::clone(&next));
        tokio::spawn(async move {
            let mut latencies_us = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return latencies_us;
                }
                let begin = Instant::now();
                let mut headers = HeaderMap::new();
                headers.insert(header::MESSAGE_ID, events.id(Kind("pub"), number));
                let body = events.body(Kind("pub"), number);
                let ack = jetstream
                    .publish_with_headers(format!("{EVENTS_PREFIX}{TYPE}"), headers, body.into())
                    .await;
                ack.expect("the broker is reachable")
                    .await
                    .expect("it is stored");
                latencies_us.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
            }
        })
    });
    let latencies = join_all(lanes)
        .await
        .into_iter()
        .flat_map(|lane| lane.expect("no lane panics"))
        .collect();
    print_figures(count, begin.elapsed(), latencies);
}

async fn consume(nats: &str, count: usize) {
    let jetstream = connect(nats).await;
    let stream = jetstream
        .get_stream(EVENTS_STREAM)
        .await
        .expect("the stream exists");
    let consumer: jetstream::consumer::PullConsumer = stream
        .create_consumer(pull::Config {
            max_ack_pending: 20_000,
            ..pull::Config::default()
        })
        .await
        .expect("a consumer can be made");
    let messages = consumer
        .stream()
        .max_messages_per_batch(BATCH)
        .messages()
        .await
        .expect("messages can be pulled");
    let begin = Instant::now();
    let mut chunks = messages.ready_chunks(BATCH);
    let mut consumed = 0;
    while consumed < count {
        for message in chunks.next().await.expect("messages come") {
            message
                .expect("a message comes")
                .ack()
                .await
                .expect("an ack is sent");
            consumed += 1;
        }
    }
    let took = begin.elapsed();
    jetstream
        .client()
        .flush()
        .await
        .expect("the broker takes the acks");
    print_figures(count, took, Vec::new());
}

async fn relay(nats: &str) {
    let jetstream = connect(nats).await;
    let stream = jetstream.get_stream("IN").await.expect("the stream exists");
    let consumer: jetstream::consumer::PullConsumer = stream
        .create_consumer(pull::Config {
            max_ack_pending: 20_000,
            ..pull::Config::default()
        })
        .await
        .expect("a consumer can be made");
    let messages = consumer
        .stream()
        .max_messages_per_batch(BATCH)
        .messages()
        .await
        .expect("messages can be pulled");
    let mut chunks = messages.ready_chunks(BATCH);
    while let Some(chunk) = chunks.next().await {
        let mut acks = Vec::new();
        let chunk: Vec<_> = chunk
            .into_iter()
            .map(|message| message.expect("a message comes"))
            .collect();
        for message in &chunk {
            let sent = jetstream
                .publish(
                    OUT,
                    message.payload.slice(..message.payload.len().min(1_200)),
                )
                .await;
            acks.push(sent.expect("the broker is reachable"));
        }
        for ack in acks {
            ack.await.expect("it is stored");
        }
        for message in chunk {
            message
                .ack_with(AckKind::Ack)
                .await
                .expect("an ack is sent");
        }
    }
}
