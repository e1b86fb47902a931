//! Measures accepted and refused deliveries, compared with the simplest programs that accept and
//! refuse them.

use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::load::{Load, percentile};
use crate::pool::{self, Events, Kind, Requests};
use crate::report::{Measurement, Sample, Target};
use crate::rig::{self, Served, Sync, pid};
use crate::usage::Since;
use crate::{Mode, in_turns};

const CONNECTIONS: usize = 64;

/// How long to warm up: long enough for ingress to find out whether group commit is faster.
const WARMUP: Duration = Duration::from_secs(1);

const INGRESS: &str = "ingress";
const SPIKE: &str = "spike";
const VERIFY: &str = "verify only";
const NATS: &str = "async-nats";

/// How many deliveries are signed for one run. A faster program finishes sooner.
fn count(mode: Mode) -> usize {
    mode.pick(60_000, 200_000)
}

fn load(served: &Served, mode: Mode, connections: usize, status: u16) -> Load {
    let measured = Duration::from_secs(mode.pick(3, 6));
    Load {
        address: served.address,
        connections,
        warmup: WARMUP,
        measured,
        status,
        rate: None,
    }
}

/// Measures one run of a server.
async fn run(
    served: Served,
    broker: Option<u32>,
    load: &Load,
    requests: &Arc<Requests>,
    repeat: bool,
) -> Result<Sample, String> {
    let (usage, broker) = (served.usage(), broker.map(Since::now));
    let answered = rig::bounded("a run", load.send(requests, repeat)).await??;
    Ok(Sample {
        rate: Some(answered.rate()),
        p50_us: Some(percentile(&answered.latencies_us, 0.5)),
        p99_us: Some(percentile(&answered.latencies_us, 0.99)),
        // Includes the warm-up's requests, which cost as much as the others.
        cpu_s: Some(usage.per_10k(answered.sent)),
        broker_cpu_s: broker.map(|broker| broker.per_10k(answered.sent)),
        memory_mib: Some(served.memory_mib()),
        ..Sample::default()
    })
}

/// Runs ingress or a reference once, with its own broker.
async fn contender(
    name: &str,
    sync: Sync,
    mode: Mode,
    connections: usize,
    requests: &Arc<Requests>,
) -> Result<Sample, String> {
    let broker = rig::broker(sync).await;
    let served = match name {
        INGRESS => rig::ingress(&broker, &[]).await?,
        SPIKE => rig::server("spike", Some(&broker)).await?,
        VERIFY => rig::server("verify", None).await?,
        _ => {
            return rig::finished(
                "publish",
                &broker,
                &[mode.pick(30_000, 100_000), connections],
            )
            .await;
        }
    };
    let load = load(&served, mode, connections, 200);
    // It stores nothing, so it may get a delivery twice; and it is fast enough to need that.
    let repeat = name == VERIFY;
    run(
        served,
        (name != VERIFY).then(|| pid(&broker)),
        &load,
        requests,
        repeat,
    )
    .await
}

pub(crate) async fn accepted(mode: Mode, events: &Events) -> Result<Measurement, String> {
    let mut measured = Measurement::new(
        "ingress",
        "deliveries accepted (4 KiB, 64 connections, default sync), compared with a server that only verifies, with \
         async-nats alone with the same number of pending PubAcks, and with a spike that verifies and publishes",
    );
    let requests = Arc::new(pool::requests(events, Kind("in"), count(mode)));
    for contenders in in_turns(mode, &[SPIKE, INGRESS, VERIFY, NATS]) {
        for name in contenders {
            measured.add(
                name,
                contender(name, Sync::Default, mode, CONNECTIONS, &requests).await?,
            );
        }
    }
    measured.add_ratio(
        "events/s",
        INGRESS,
        SPIKE,
        |sample| sample.rate,
        Some(Target::AtLeast(0.95)),
    );
    measured.add_ratio(
        "CPU per event",
        INGRESS,
        SPIKE,
        |sample| sample.cpu_s,
        Some(Target::AtMost(1.15)),
    );
    measured.add_ratio("p99", INGRESS, SPIKE, |sample| sample.p99_us, None);
    measured.add_ratio("events/s", INGRESS, VERIFY, |sample| sample.rate, None);
    measured.add_ratio("events/s", INGRESS, NATS, |sample| sample.rate, None);
    measured.add_bound(
        "memory (MiB)",
        INGRESS,
        |sample| sample.memory_mib,
        Target::AtMost(64.0),
    );
    Ok(measured)
}

pub(crate) async fn refused(mode: Mode, events: &Events) -> Result<Measurement, String> {
    let mut measured = Measurement::new(
        "bad signatures",
        "deliveries refused for their signature (4 KiB, 64 connections), compared with a server that only verifies",
    );
    let requests = Arc::new(pool::forged(events, 1_000));
    for contenders in in_turns(mode, &[VERIFY, INGRESS]) {
        for name in contenders {
            let broker = rig::broker(Sync::Default).await;
            let served = match name {
                INGRESS => rig::ingress(&broker, &[]).await?,
                _ => rig::server("verify", None).await?,
            };
            let load = load(&served, mode, CONNECTIONS, 400);
            measured.add(name, run(served, None, &load, &requests, true).await?);
        }
    }
    measured.add_ratio(
        "refusals/s",
        INGRESS,
        VERIFY,
        |sample| sample.rate,
        Some(Target::AtLeast(0.9)),
    );
    measured.add_ratio(
        "CPU per refusal",
        INGRESS,
        VERIFY,
        |sample| sample.cpu_s,
        None,
    );
    Ok(measured)
}

pub(crate) async fn synced(mode: Mode, events: &Events) -> Result<Measurement, String> {
    const ONE: &str = "ingress, 1 connection";
    const SPIKE_ONE: &str = "spike, 1 connection";
    const SYNC: &str = "one sync";
    let mut measured = Measurement::new(
        "ingress, synced",
        "deliveries accepted by a broker that syncs its disk before every PubAck (sync_interval: always), with 64 \
         connections and with one, and how long a sync of 4 KiB takes: if it takes almost no time, batches save \
         nothing",
    );
    let requests = Arc::new(pool::requests(events, Kind("sy"), count(mode)));
    for contenders in in_turns(mode, &[SYNC, SPIKE, INGRESS, SPIKE_ONE, ONE]) {
        for name in contenders {
            if name == SYNC {
                measured.add(name, one_sync().await?);
                continue;
            }
            let (program, connections) = match name {
                ONE => (INGRESS, 1),
                SPIKE_ONE => (SPIKE, 1),
                program => (program, CONNECTIONS),
            };
            measured.add(
                name,
                contender(program, Sync::Always, mode, connections, &requests).await?,
            );
        }
    }
    measured.add_ratio(
        "events/s",
        INGRESS,
        SPIKE,
        |sample| sample.rate,
        Some(Target::AtLeast(3.0)),
    );
    measured.add_ratio(
        "p50",
        ONE,
        SPIKE_ONE,
        |sample| sample.p50_us,
        Some(Target::AtMost(1.0)),
    );
    Ok(measured)
}

/// Measures how long it takes to write and sync an event on the broker's disk.
async fn one_sync() -> Result<Sample, String> {
    const TIMES: usize = 200;
    let write = || -> std::io::Result<Vec<u32>> {
        let mut file = tempfile::tempfile()?;
        let mut took_us = Vec::with_capacity(TIMES);
        for _ in 0..TIMES {
            let begin = Instant::now();
            file.write_all(&[b'x'; 4 << 10])?;
            file.sync_all()?;
            took_us.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
        }
        took_us.sort_unstable();
        Ok(took_us)
    };
    let took_us = tokio::task::spawn_blocking(write)
        .await
        .map_err(|error| error.to_string())?;
    let took_us = took_us.map_err(|error| format!("cannot write a temporary file: {error}"))?;
    Ok(Sample {
        p50_us: Some(percentile(&took_us, 0.5)),
        p99_us: Some(percentile(&took_us, 0.99)),
        ..Sample::default()
    })
}
