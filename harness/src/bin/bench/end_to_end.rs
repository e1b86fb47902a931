//! Measures deliveries from the request to the signal, with the broker as shipped and with its
//! default sync, while an application reads the signals.
//!
//! With `--before` the programs of an earlier build run in turns with these.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use litestripe_harness::bridge::{Database, DatabaseKind};
use tokio::time::Instant;

use crate::load::{Answered, Load, percentile};
use crate::pool::{self, Events, Kind, Requests};
use crate::report::{Measurement, Sample, Target};
use crate::rig::{self, Build, Served, Sync, pid};
use crate::signals::{self, Application};
use crate::usage::Since;
use crate::{Mode, in_turns};

const KIND: Kind = Kind("e2e");

/// A load: how the broker syncs its disk, and over how many connections deliveries come. Each sends
/// its next delivery when the one before is answered.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// The same with the earlier build.
    before: &'static str,
    sync: Sync,
    connections: usize,
    /// Deliveries, in the quick and the full form.
    count: (usize, usize),
}

const SHIPPED_1: &str = "as shipped, 1 connection";
const SHIPPED_16: &str = "as shipped, 16 connections";
const SHIPPED_64: &str = "as shipped, 64 connections";
const DEFAULT_1: &str = "default sync, 1 connection";
const DEFAULT_16: &str = "default sync, 16 connections";
const DEFAULT_64: &str = "default sync, 64 connections";
const BEFORE_SHIPPED_1: &str = "before, as shipped, 1";
const BEFORE_SHIPPED_16: &str = "before, as shipped, 16";
const BEFORE_DEFAULT_16: &str = "before, default sync, 16";
const SPIKE: &str = "spike, default sync, 16 connections";

const CASES: [Case; 6] = [
    Case {
        name: SHIPPED_1,
        before: BEFORE_SHIPPED_1,
        sync: Sync::Always,
        connections: 1,
        count: (1_000, 1_500),
    },
    Case {
        name: SHIPPED_16,
        before: BEFORE_SHIPPED_16,
        sync: Sync::Always,
        connections: 16,
        count: (8_000, 12_000),
    },
    Case {
        name: SHIPPED_64,
        before: "before, as shipped, 64",
        sync: Sync::Always,
        connections: 64,
        count: (12_000, 20_000),
    },
    Case {
        name: DEFAULT_1,
        before: "before, default sync, 1",
        sync: Sync::Default,
        connections: 1,
        count: (1_000, 2_000),
    },
    Case {
        name: DEFAULT_16,
        before: BEFORE_DEFAULT_16,
        sync: Sync::Default,
        connections: 16,
        count: (20_000, 20_000),
    },
    Case {
        name: DEFAULT_64,
        before: "before, default sync, 64",
        sync: Sync::Default,
        connections: 64,
        count: (20_000, 20_000),
    },
];

/// Rounds of the full form, which takes less than three minutes.
const ROUNDS: usize = 3;

pub(crate) async fn signalled(
    mode: Mode,
    events: &Events,
    before: Option<&Path>,
) -> Result<Measurement, String> {
    let mut measured = Measurement::new(
        "end-to-end",
        "deliveries from the first request to the last signal (4 KiB, one worker on PostgreSQL, an application that \
         reads and acks the signals), the time from a request to its signal and to its 200, and how many signals had \
         not arrived when the last 200 did; `as shipped` syncs every message, the spike only stores",
    );
    let most = CASES.map(|case| mode.pick(case.count.0, case.count.1));
    let requests = pool::requests(events, KIND, most.into_iter().max().unwrap_or(0));
    let mut names: Vec<_> = CASES.iter().map(|case| case.name).collect();
    names.push(SPIKE);
    names.extend(
        CASES
            .iter()
            .filter(|_| before.is_some())
            .map(|case| case.before),
    );
    for contenders in in_turns(mode, &names).into_iter().take(ROUNDS) {
        for contender in contenders {
            let case = CASES
                .iter()
                .find(|case| case.name == contender || case.before == contender);
            let sample = match case {
                None => spike(&requests).await?,
                Some(case) => {
                    let build = match before {
                        Some(folder) if case.before == contender => Build::In(folder),
                        _ => Build::Own,
                    };
                    let count = mode.pick(case.count.0, case.count.1);
                    let requests: Requests = requests.iter().take(count).cloned().collect();
                    bridge(case, build, Arc::new(requests)).await?
                }
            };
            measured.add(contender, sample);
        }
    }
    compare(&mut measured, before.is_some());
    Ok(measured)
}

fn compare(measured: &mut Measurement, has_before: bool) {
    let rate = |sample: &Sample| sample.rate;
    let at_least = |bound| Some(Target::AtLeast(bound));
    measured.add_ratio("events/s", SHIPPED_16, DEFAULT_16, rate, at_least(0.5));
    measured.add_ratio("events/s", SHIPPED_64, DEFAULT_64, rate, at_least(0.7));
    measured.add_ratio("events/s", DEFAULT_16, SPIKE, rate, at_least(0.45));
    for name in [DEFAULT_16, DEFAULT_64] {
        let behind = |sample: &Sample| sample.behind;
        measured.add_bound("signals behind", name, behind, Target::AtMost(1_000.0));
    }
    if !has_before {
        return;
    }
    let cpu = Sample::all_cpu_s;
    let at_most = |bound| Some(Target::AtMost(bound));
    measured.add_ratio("CPU", DEFAULT_16, BEFORE_DEFAULT_16, cpu, at_most(0.65));
    measured.add_ratio("CPU", SHIPPED_16, BEFORE_SHIPPED_16, cpu, at_most(0.35));
    let p50 = |sample: &Sample| sample.p50_us;
    measured.add_ratio("p50", SHIPPED_1, BEFORE_SHIPPED_1, p50, at_most(1.0));
    for case in &CASES {
        measured.add_ratio("events/s", case.name, case.before, rate, None);
    }
}

/// Makes a load of requests, each connection's as fast as they are answered.
fn load(served: &Served, connections: usize) -> Load {
    Load {
        address: served.address,
        connections,
        warmup: Duration::ZERO,
        measured: Duration::from_secs(600),
        status: 200,
        rate: None,
    }
}

async fn bridge(case: &Case, build: Build<'_>, requests: Arc<Requests>) -> Result<Sample, String> {
    let broker = rig::broker(case.sync).await;
    let mut database = Database::prepare(DatabaseKind::Postgres);
    database.resume().await;
    let ingress = rig::ingress_of(build, &broker, &[]).await?;
    let worker = rig::worker_of(build, &broker, &database.url(), &[]).await?;
    let mut application = Application::start(&broker).await?;
    let (of_ingress, of_worker, of_broker) =
        (ingress.usage(), worker.usage(), Since::now(pid(&broker)));
    let of_database = rig::database_usage(database.process());

    let (received, count) = (application.received(), requests.len());
    let sending = load(&ingress, case.connections);
    let sending = async {
        let answered = sending.send(&requests, false).await;
        (answered, count - received.load(Ordering::Relaxed))
    };
    let number_of = |payload: &[u8]| Events::number(KIND, &signals::event_id(payload)?);
    let begin = Instant::now();
    let ((answered, behind), arrivals) = rig::bounded("a run", async {
        tokio::join!(sending, application.arrivals(count, number_of))
    })
    .await?;
    let (answered, arrivals) = (answered?, arrivals?);
    let rate = count as f64 / begin.elapsed().as_secs_f64();
    let cpu_s = |usage: &Since| Some(usage.per_10k(count));
    let ingress_cpu_s = cpu_s(&of_ingress);
    let worker_cpu_s = cpu_s(&of_worker);
    let latencies_us = latencies_us(&answered, &arrivals);
    Ok(Sample {
        rate: Some(rate),
        p50_us: Some(percentile(&latencies_us, 0.5)),
        p99_us: Some(percentile(&latencies_us, 0.99)),
        answer_p50_us: Some(percentile(&answered.latencies_us, 0.5)),
        answer_p99_us: Some(percentile(&answered.latencies_us, 0.99)),
        behind: Some(behind as f64),
        ingress_cpu_s,
        cpu_s: ingress_cpu_s
            .zip(worker_cpu_s)
            .map(|(ingress, worker)| ingress + worker),
        broker_cpu_s: cpu_s(&of_broker),
        database_cpu_s: of_database.as_ref().and_then(cpu_s),
        ..Sample::default()
    })
}

/// Returns the times from each request to its signal, sorted. The first tenth is the warm-up and
/// left out.
fn latencies_us(answered: &Answered, arrivals: &[Option<Instant>]) -> Vec<u32> {
    let skipped = arrivals.len() / 10;
    let measured = answered
        .begun
        .iter()
        .filter(|(number, _)| *number >= skipped);
    let mut latencies_us: Vec<u32> = measured
        .filter_map(|(number, begun)| {
            let arrival = arrivals.get(*number).copied().flatten()?;
            let latency = arrival.saturating_duration_since(*begun);
            Some(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX))
        })
        .collect();
    latencies_us.sort_unstable();
    latencies_us
}

async fn spike(requests: &Requests) -> Result<Sample, String> {
    let broker = rig::broker(Sync::Default).await;
    let served = rig::server("spike", Some(&broker)).await?;
    let requests = Arc::new(requests.clone());
    let answered = rig::bounded("a run", load(&served, 16).send(&requests, false)).await??;
    Ok(Sample {
        rate: Some(answered.rate()),
        answer_p50_us: Some(percentile(&answered.latencies_us, 0.5)),
        answer_p99_us: Some(percentile(&answered.latencies_us, 0.99)),
        ..Sample::default()
    })
}
