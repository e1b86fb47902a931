//! Measures whether the programs get slower as tables and streams grow.

use std::sync::Arc;
use std::time::{Duration, Instant};

use litestripe_entity::stripe_subscription::Column;
use litestripe_harness::bridge::{Database, DatabaseKind};
use sea_orm::{ConnectionTrait as _, IdenStatic as _, Iterable as _};

use crate::load::Load;
use crate::pool::{self, Events, Kind};
use crate::report::{Measurement, Sample, Target};
use crate::rig::{self, Sync};
use crate::signals::Listener;
use crate::{Mode, in_turns};

/// Subscriptions that already have a row.
const OLD: Kind = Kind("old");

const SMALL: &str = "1,000 rows";
const MEDIUM: &str = "100,000 rows";
const LARGE: &str = "1,000,000 rows";

/// The step between two subscriptions that are changed one after the other. It is a prime number,
/// so that every subscription is changed and neighbours in the stream are far apart in the table.
const STRIDE: usize = 7_919;

pub(crate) async fn with_large_tables(
    name: &'static str,
    kind: DatabaseKind,
    mode: Mode,
    events: &Events,
) -> Result<Measurement, String> {
    let count = mode.pick(4_000, 20_000);
    let mut measured = Measurement::new(
        name,
        "changes of subscriptions spread over a table of this size, applied and signalled",
    );
    let sizes: &[&'static str] = mode.pick(&[SMALL, MEDIUM], &[SMALL, MEDIUM, LARGE]);
    for contenders in in_turns(mode, sizes) {
        for contender in contenders {
            let rows = match contender {
                SMALL => 1_000,
                MEDIUM => 100_000,
                _ => 1_000_000,
            };
            measured.add(contender, run(kind, events, rows, count).await?);
        }
    }
    for size in sizes.iter().skip(1) {
        let target = (*size == LARGE).then_some(Target::AtLeast(0.8));
        measured.add_ratio("events/s", size, SMALL, |sample| sample.rate, target);
    }
    Ok(measured)
}

async fn run(
    kind: DatabaseKind,
    events: &Events,
    rows: usize,
    count: usize,
) -> Result<Sample, String> {
    let broker = rig::broker(Sync::Default).await;
    let mut database = Database::prepare(kind);
    database.resume().await;
    // The worker makes the first row; the others are copies of it.
    let mut listener = Listener::start(&broker).await?;
    rig::fill(rig::jetstream(&broker).await, 1, |number| {
        (Some(events.id(OLD, number)), events.body(OLD, number))
    })
    .await?;
    let first = rig::worker(&broker, &database.url(), &[]).await?;
    rig::bounded("the first row", listener.wait_for(1)).await??;
    first.program.stop().await;
    grow(&database, kind, events, rows)
        .await
        .map_err(|problem| problem.to_string())?;

    let changes = events.changes();
    let change = |number: usize| {
        let (subscription, later_s) = (
            number * STRIDE % rows,
            i64::try_from(number / rows).unwrap_or_default() + 1,
        );
        let kind = Kind("new");
        // A new event of an old subscription.
        let body = changes.body_of(kind, number, subscription, later_s);
        let body = body.replace(
            &changes.subscription(kind, subscription),
            &changes.subscription(OLD, subscription),
        );
        (Some(changes.id(kind, number)), body)
    };
    let worker = rig::worker(&broker, &database.url(), &[]).await?;
    let (usage, database_usage) = (worker.usage(), rig::database_usage(database.process()));
    let begin = Instant::now();
    let filling = rig::fill(rig::jetstream(&broker).await, count, change);
    let (filled, received) = rig::bounded("applying", async {
        tokio::join!(filling, listener.wait_for(count))
    })
    .await?;
    filled.and(received)?;
    let took = begin.elapsed();
    Ok(Sample {
        rate: Some(count as f64 / took.as_secs_f64()),
        cpu_s: Some(usage.per_10k(count)),
        database_cpu_s: database_usage.map(|usage| usage.per_10k(count)),
        memory_mib: Some(worker.memory_mib()),
        ..Sample::default()
    })
}

/// Copies the only row until the table has `rows` rows.
async fn grow(
    database: &Database,
    kind: DatabaseKind,
    events: &Events,
    rows: usize,
) -> Result<(), sea_orm::DbErr> {
    let columns: Vec<&str> = Column::iter()
        .skip(1)
        .map(|column| column.as_str())
        .collect();
    let columns = columns.join(",");
    let last = events.subscription(OLD, 0);
    let prefix = last.trim_end_matches('0');
    let digits = last.len() - prefix.len();
    let (numbers, key) = match kind {
        DatabaseKind::Postgres => (
            format!("generate_series(1, {}) AS numbers(n)", rows - 1),
            format!("'{prefix}' || lpad(n::text, {digits}, '0')"),
        ),
        DatabaseKind::Sqlite => (
            format!(
                "(WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < {}) SELECT n FROM \
                 count) AS numbers",
                rows - 1
            ),
            format!("'{prefix}' || printf('%0{digits}d', n)"),
        ),
    };
    let copy = format!(
        "INSERT INTO stripe_subscription (stripe_subscription_id, {columns}) \
         SELECT {key}, {columns} FROM stripe_subscription CROSS JOIN {numbers}"
    );
    let connection = database.connection().await?;
    connection.execute_unprepared(&copy).await?;
    // A table that grew over time has been analyzed too.
    connection.execute_unprepared("ANALYZE").await.map(drop)
}

/// Measures, in full mode only, a stream of a million events.
pub(crate) async fn with_large_stream(mode: Mode, events: &Events) -> Result<Measurement, String> {
    const EMPTY: &str = "empty stream";
    const FULL: &str = "1,000,000 events";
    const RECENT: &str = "1,000,000 events of the last five minutes";
    let mut measured = Measurement::new(
        "growth of the stream",
        "deliveries accepted (4 KiB, 64 connections) by a stream with this many events; the broker still remembers the \
         ids of those of the last five minutes (the duplicate window)",
    );
    let requests = Arc::new(pool::requests(events, Kind("in"), 100_000));
    let filling = "x".repeat(1_000);
    for contenders in in_turns(mode, &[EMPTY, FULL, RECENT]) {
        for contender in contenders {
            let broker = rig::broker(Sync::Default).await;
            if contender != EMPTY {
                let id = |number| (contender == RECENT).then(|| events.id(OLD, number));
                let event = |number| (id(number), filling.clone());
                rig::fill(rig::jetstream(&broker).await, 1_000_000, event).await?;
            }
            let ingress = rig::ingress(&broker, &[]).await?;
            let load = Load {
                address: ingress.address,
                connections: 64,
                warmup: Duration::from_secs(1),
                measured: Duration::from_secs(5),
                status: 200,
                rate: None,
            };
            let answered = rig::bounded("a run", load.send(&requests, false)).await??;
            measured.add(
                contender,
                Sample {
                    rate: Some(answered.rate()),
                    ..Sample::default()
                },
            );
        }
    }
    measured.add_ratio(
        "events/s",
        FULL,
        EMPTY,
        |sample| sample.rate,
        Some(Target::AtLeast(0.95)),
    );
    measured.add_ratio("events/s", RECENT, EMPTY, |sample| sample.rate, None);
    Ok(measured)
}
