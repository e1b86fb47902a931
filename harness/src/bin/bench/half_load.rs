//! Measures deliveries from the request to the signal, compared with the same steps in JetStream
//! alone: publish, consume, publish again, receive.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use futures_util::future::try_join_all;
use litestripe_harness::bridge::{Database, DatabaseKind};
use tokio::time::{Instant, sleep_until};

use crate::load::{Load, percentile};
use crate::pool::{self, Events, Kind, Requests};
use crate::reference::{IN, OUT};
use crate::report::{Measurement, Sample, Target};
use crate::rig::{self, Served, Sync, pid};
use crate::signals::{self, Listener};
use crate::usage::Since;
use crate::{Mode, in_turns};

const BRIDGE: &str = "litestripe";
const INGRESS: &str = "litestripe's ingress";
const WORKER: &str = "litestripe's worker";
const RAW: &str = "JetStream alone";
const SPIKE: &str = "spike";

/// How many connections post deliveries, and how many messages JetStream alone has in flight.
const CONNECTIONS: usize = 64;

const FAST: Kind = Kind("fast");
const SLOW: Kind = Kind("slow");

pub(crate) async fn signalled(mode: Mode, events: &Events) -> Result<Measurement, String> {
    let count = mode.pick(8_000, 40_000);
    let measured_s = mode.pick(2, 6);
    let mut measured = Measurement::new(
        "HTTP to signal",
        "deliveries from the first request to the last signal (4 KiB, 64 connections, one worker on PostgreSQL), and \
         the latency from a delivery to its signal at half that rate, compared with JetStream alone, also at half its \
         own rate; the spike only stores",
    );
    let requests = Arc::new(pool::requests(events, FAST, count));
    for contenders in in_turns(mode, &[RAW, BRIDGE, SPIKE]) {
        for contender in contenders {
            let sample = match contender {
                BRIDGE => {
                    let run = bridge(events, &requests, measured_s).await?;
                    measured.add(INGRESS, run.ingress);
                    measured.add(WORKER, run.worker);
                    run.whole
                }
                RAW => raw(events, count, measured_s).await?,
                _ => spike(&requests).await?,
            };
            measured.add(contender, sample);
        }
    }
    // That is 6,000 a second on a machine on which the spike reaches 18,000.
    measured.add_ratio(
        "events/s",
        BRIDGE,
        SPIKE,
        |sample| sample.rate,
        Some(Target::AtLeast(0.333)),
    );
    measured.add_ratio("events/s", BRIDGE, RAW, |sample| sample.rate, None);
    measured.add_ratio(
        "p99",
        BRIDGE,
        RAW,
        |sample| sample.p99_us,
        Some(Target::AtMost(5.0)),
    );
    measured.add_ratio("p50", BRIDGE, RAW, |sample| sample.p50_us, None);
    Ok(measured)
}

/// Makes a load of `rate` requests per second, or as fast as they are answered.
fn load(served: &Served, rate: Option<f64>) -> Load {
    let forever = Duration::from_secs(600);
    Load {
        address: served.address,
        connections: CONNECTIONS,
        warmup: Duration::ZERO,
        measured: forever,
        status: 200,
        rate,
    }
}

/// The samples of one run.
struct Bridge {
    whole: Sample,
    ingress: Sample,
    worker: Sample,
}

async fn bridge(
    events: &Events,
    requests: &Arc<Requests>,
    measured_s: usize,
) -> Result<Bridge, String> {
    let broker = rig::broker(Sync::Default).await;
    let mut database = Database::prepare(DatabaseKind::Postgres);
    database.resume().await;
    let ingress = rig::ingress(&broker, &[]).await?;
    let worker = rig::worker(&broker, &database.url(), &[]).await?;
    let mut listener = Listener::start(&broker).await?;
    let (of_ingress, of_worker, of_broker) =
        (ingress.usage(), worker.usage(), Since::now(pid(&broker)));
    let of_database = rig::database_usage(database.process());

    let begin = Instant::now();
    let (sending, count) = (load(&ingress, None), requests.len());
    let (sent, received) = rig::bounded("a run", async {
        tokio::join!(sending.send(requests, false), listener.wait_for(count))
    })
    .await?;
    sent.and(received)?;
    let rate = count as f64 / begin.elapsed().as_secs_f64();
    let used = |usage: Since, served: &Served| Sample {
        cpu_s: Some(usage.per_10k(count)),
        memory_mib: Some(served.memory_mib()),
        ..Sample::default()
    };
    let (of_ingress, of_worker) = (used(of_ingress, &ingress), used(of_worker, &worker));
    let cpu_s = of_ingress
        .cpu_s
        .zip(of_worker.cpu_s)
        .map(|(ingress, worker)| ingress + worker);
    let (broker_cpu_s, database_cpu_s) = (
        Some(of_broker.per_10k(count)),
        of_database.map(|usage| usage.per_10k(count)),
    );

    let half = rate / 2.0;
    let slow = Arc::new(pool::requests(
        events,
        SLOW,
        (half * measured_s as f64) as usize,
    ));
    let sending = load(&ingress, Some(half));
    let number_of = |payload: &[u8]| Events::number(SLOW, &signals::event_id(payload)?);
    let begin = Instant::now();
    let (sent, arrivals) = rig::bounded("a run", async {
        tokio::join!(
            sending.send(&slow, false),
            listener.arrivals(slow.len(), number_of)
        )
    })
    .await?;
    sent?;
    let latencies_us = latencies_us(begin, half, arrivals?);
    let whole = Sample {
        rate: Some(rate),
        p50_us: Some(percentile(&latencies_us, 0.5)),
        p99_us: Some(percentile(&latencies_us, 0.99)),
        cpu_s,
        broker_cpu_s,
        database_cpu_s,
        ..Sample::default()
    };
    Ok(Bridge {
        whole,
        ingress: of_ingress,
        worker: of_worker,
    })
}

/// Returns the times from when each event was due to its arrival, sorted. The first tenth is the
/// warm-up and left out.
fn latencies_us(begin: Instant, rate: f64, arrivals: Vec<Option<Instant>>) -> Vec<u32> {
    let due = |number: usize| begin + Duration::from_secs_f64(number as f64 / rate);
    let latency = |number: usize, arrival: Instant| {
        arrival.saturating_duration_since(due(number)).as_micros()
    };
    let skipped = arrivals.len() / 10;
    let arrived = arrivals.into_iter().enumerate().skip(skipped);
    let mut latencies_us: Vec<u32> = arrived
        .filter_map(|(number, arrival)| {
            Some(u32::try_from(latency(number, arrival?)).unwrap_or(u32::MAX))
        })
        .collect();
    latencies_us.sort_unstable();
    latencies_us
}

async fn raw(events: &Events, count: usize, measured_s: usize) -> Result<Sample, String> {
    let broker = rig::broker(Sync::Default).await;
    let jetstream = rig::jetstream(&broker).await;
    for (name, subject) in [("IN", IN), ("OUT", OUT)] {
        let config = jetstream::stream::Config {
            name: name.to_owned(),
            subjects: vec![subject.to_owned()],
            ..jetstream::stream::Config::default()
        };
        jetstream
            .create_stream(config)
            .await
            .map_err(|problem| problem.to_string())?;
    }
    let _relay = rig::running("relay", &broker);
    let mut listener = Listener::subscribe(&broker, OUT).await?;
    // Waits until the relay works.
    publish(&jetstream, events, 1, None).await?;
    rig::bounded("the relay", listener.wait_for(1)).await??;

    let begin = Instant::now();
    let (sent, received) = rig::bounded("a run", async {
        tokio::join!(
            publish(&jetstream, events, count, None),
            listener.wait_for(count)
        )
    })
    .await?;
    sent.and(received)?;
    let rate = count as f64 / begin.elapsed().as_secs_f64();

    let half = rate / 2.0;
    let slow = (half * measured_s as f64) as usize;
    let number_of = |payload: &[u8]| std::str::from_utf8(payload.get(..10)?).ok()?.parse().ok();
    let begin = Instant::now();
    let (sent, arrivals) = rig::bounded("a run", async {
        tokio::join!(
            publish(&jetstream, events, slow, Some(half)),
            listener.arrivals(slow, number_of)
        )
    })
    .await?;
    sent?;
    let latencies_us = latencies_us(begin, half, arrivals?);
    Ok(Sample {
        rate: Some(rate),
        p50_us: Some(percentile(&latencies_us, 0.5)),
        p99_us: Some(percentile(&latencies_us, 0.99)),
        ..Sample::default()
    })
}

/// Publishes as [`Load`] posts: [`CONNECTIONS`] messages in flight, at `rate` per second or as fast
/// as PubAcks arrive.
async fn publish(
    jetstream: &jetstream::Context,
    events: &Events,
    count: usize,
    rate: Option<f64>,
) -> Result<(), String> {
    let body = events.body(FAST, 0);
    let (begin, next) = (Instant::now(), AtomicUsize::new(0));
    let lanes = (0..CONNECTIONS).map(|_| async {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(());
            }
            if let Some(rate) = rate {
                sleep_until(begin + Duration::from_secs_f64(number as f64 / rate)).await;
            }
            // As long as an event, with the number at the front.
            let payload = format!("{number:010}{}", &body[10..]);
            let ack = jetstream
                .publish(IN, payload.into())
                .await
                .map_err(|problem| problem.to_string())?;
            ack.await.map_err(|problem| problem.to_string())?;
        }
    });
    try_join_all(lanes).await.map(drop)
}

async fn spike(requests: &Arc<Requests>) -> Result<Sample, String> {
    let broker = rig::broker(Sync::Default).await;
    let served = rig::server("spike", Some(&broker)).await?;
    let answered = rig::bounded("a run", load(&served, None).send(requests, false)).await??;
    Ok(Sample {
        rate: Some(answered.rate()),
        ..Sample::default()
    })
}
