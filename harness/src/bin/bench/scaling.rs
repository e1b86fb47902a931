//! Measures several workers on a database with slow commits.

use std::time::Instant;

use litestripe_harness::postgres;
use sea_orm::{ConnectOptions, ConnectionTrait as _, Database};

use crate::pool::Events;
use crate::report::{Measurement, Sample, Target};
use crate::rig::{self, Sync, pid};
use crate::signals::Listener;
use crate::usage::Since;
use crate::{Mode, in_turns};

/// How much longer a commit takes. PostgreSQL itself waits this long before it writes.
const COMMIT_DELAY_US: u32 = 5_000;

/// Events in one transaction. With the default a worker keeps computing while it commits, and two
/// cores are soon fully used; this measurement shows whether workers wait for each other.
const BATCH: &str = "5";

const COMMIT: &str = "one commit";

pub(crate) async fn scaled(mode: Mode, events: &Events) -> Result<Measurement, String> {
    const ONE: &str = "1 worker";
    const TWO: &str = "2 workers";
    const FOUR: &str = "4 workers";
    let count = mode.pick(2_000, 8_000);
    let mut measured = Measurement::new(
        "scaling",
        "events applied and signalled by 1, 2 and 4 workers, 5 events per transaction, on a PostgreSQL with commits that \
         take 5 ms longer",
    );
    measured.add(COMMIT, commit().await?);
    for contenders in in_turns(mode, &[ONE, TWO, FOUR]) {
        for contender in contenders {
            let workers = match contender {
                ONE => 1,
                TWO => 2,
                _ => 4,
            };
            measured.add(contender, run(events, count, workers).await?);
        }
    }
    measured.add_bound(
        "commit (µs)",
        COMMIT,
        |sample| sample.p50_us,
        Target::AtLeast(COMMIT_DELAY_US.into()),
    );
    measured.add_ratio("events/s", TWO, ONE, |sample| sample.rate, None);
    measured.add_ratio(
        "events/s",
        FOUR,
        ONE,
        |sample| sample.rate,
        Some(Target::AtLeast(3.2)),
    );
    Ok(measured)
}

async fn database() -> postgres::Server {
    let setting = |name: &str, value: String| (name.to_owned(), value);
    // With 0 siblings every commit waits, not only one beside other open transactions.
    let settings = vec![
        setting("commit_delay", COMMIT_DELAY_US.to_string()),
        setting("commit_siblings", "0".to_owned()),
    ];
    postgres::Server::start_with(postgres::Options {
        settings,
        ..postgres::Options::default()
    })
    .await
}

/// Measures how long a commit of one row takes.
async fn commit() -> Result<Sample, String> {
    let text = |problem: sea_orm::DbErr| problem.to_string();
    let server = database().await;
    let mut options = ConnectOptions::new(server.url("postgres"));
    options.max_connections(1).sqlx_logging(false);
    let connection = Database::connect(options).await.map_err(text)?;
    connection
        .execute_unprepared("CREATE TABLE written (number int)")
        .await
        .map_err(text)?;
    let mut latencies_us = Vec::new();
    for _ in 0..40 {
        let begin = Instant::now();
        connection
            .execute_unprepared("INSERT INTO written VALUES (1)")
            .await
            .map_err(text)?;
        latencies_us.push(u32::try_from(begin.elapsed().as_micros()).unwrap_or(u32::MAX));
    }
    latencies_us.sort_unstable();
    Ok(Sample {
        p50_us: Some(crate::load::percentile(&latencies_us, 0.5)),
        ..Sample::default()
    })
}

async fn run(events: &Events, count: usize, workers: usize) -> Result<Sample, String> {
    let broker = rig::broker(Sync::Default).await;
    rig::fill_with_new(rig::jetstream(&broker).await, events, count).await?;
    rig::paused_consumer(&broker).await?;
    let server = database().await;
    let database = server.database().await;
    rig::migrate(&database).await?;
    let mut running = Vec::new();
    for _ in 0..workers {
        running.push(rig::worker(&broker, &database, &[("LITESTRIPE_BATCH", BATCH)]).await?);
    }
    let mut listener = Listener::start(&broker).await?;
    let usages: Vec<_> = running.iter().map(rig::Served::usage).collect();
    let broker_usage = Since::now(pid(&broker));
    let database_usage = rig::database_usage(server.process());
    rig::resume_consumer(&broker).await?;
    let took = rig::bounded("applying", listener.wait_for(count)).await??;
    let rate = count as f64 / took.as_secs_f64();
    let cpu_s = usages.iter().map(|usage| usage.per_10k(count)).sum();
    Ok(Sample {
        rate: Some(rate),
        cpu_s: Some(cpu_s),
        broker_cpu_s: Some(broker_usage.per_10k(count)),
        database_cpu_s: database_usage.map(|usage| usage.per_10k(count)),
        // That of the largest worker.
        memory_mib: running
            .iter()
            .map(rig::Served::memory_mib)
            .max_by(f64::total_cmp),
        ..Sample::default()
    })
}
