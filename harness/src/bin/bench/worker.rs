//! Measures a worker that applies a filled stream to a database and sends the signals, compared
//! with only consuming and with hand-written SQL for the same rows.

use std::time::Instant;

use litestripe_entity::stripe_subscription::{Column, Entity, Model};
use litestripe_harness::bridge::{Database, DatabaseKind};
use litestripe_harness::nats;
use litestripe_harness::program::Program;
use sea_orm::{
    ActiveModelTrait as _, ConnectionTrait as _, DatabaseConnection, EntityTrait as _,
    IntoActiveModel as _, Iterable as _, Statement, TransactionTrait as _, Value,
};

use crate::pool::Events;
use crate::report::{Measurement, Sample, Target};
use crate::rig::{self, Sync, pid};
use crate::usage::Since;
use crate::{Mode, in_turns, signals};

const WORKER: &str = "worker";
const NATS: &str = "async-nats";
const UPSERTS: &str = "upserts by hand";

/// Events in one transaction, the same number as the worker's.
const BATCH: usize = 500;

/// Rows of one statement on SQLite. (On PostgreSQL a statement has a whole batch.)
const SQLITE_ROWS: usize = 100;

pub(crate) async fn applied(
    name: &'static str,
    kind: DatabaseKind,
    mode: Mode,
    events: &Events,
) -> Result<Measurement, String> {
    let count = mode.pick(5_000, 40_000);
    let mut measured = Measurement::new(
        name,
        "events of a filled stream applied (4 KiB, a new subscription each) and signalled, compared with async-nats \
         alone that consumes and acks, and with hand-written SQL that upserts the same rows, 500 at a time",
    );
    // The first run does not count: it makes the rows for the hand-written SQL.
    let (_, rows) = run_worker(kind, events, count).await?;
    for contenders in in_turns(mode, &[UPSERTS, WORKER, NATS]) {
        for contender in contenders {
            let sample = match contender {
                WORKER => run_worker(kind, events, count).await?.0,
                UPSERTS => run_upserts(kind, &rows).await?,
                _ => run_nats(events, count).await?,
            };
            measured.add(contender, sample);
        }
    }
    let target = match kind {
        DatabaseKind::Postgres => 0.25,
        DatabaseKind::Sqlite => 0.15,
    };
    measured.add_ratio(
        "events/s",
        WORKER,
        UPSERTS,
        |sample| sample.rate,
        Some(Target::AtLeast(target)),
    );
    measured.add_ratio("events/s", WORKER, NATS, |sample| sample.rate, None);
    measured.add_bound(
        "memory (MiB)",
        WORKER,
        |sample| sample.memory_mib,
        Target::AtMost(64.0),
    );
    Ok(measured)
}

/// Measures a replay of events that were applied before.
pub(crate) async fn replayed(
    name: &'static str,
    kind: DatabaseKind,
    mode: Mode,
    events: &Events,
) -> Result<Measurement, String> {
    const FIRST: &str = "first pass";
    const REPLAY: &str = "replay";
    let count = mode.pick(10_000, 60_000);
    let mut measured = Measurement::new(
        name,
        "events of a filled stream applied by a worker (4 KiB, a new subscription each) and signalled, and then \
         applied again by `litestripe-worker replay --from-sequence 1`, including the program's start and end",
    );
    for _ in in_turns(mode, &[FIRST]) {
        let broker = filled(events, count).await?;
        let mut database = Database::prepare(kind);
        database.resume().await;
        measured.add(FIRST, apply(&broker, &database, count).await?);
        let replay = Program::named("litestripe-worker")
            .args(["replay", "--from-sequence", "1"])
            .env("NATS_URL", broker.url())
            .env("DATABASE_URL", database.url());
        let begin = Instant::now();
        let finished = replay.run(rig::DEADLINE).await;
        let rate = count as f64 / begin.elapsed().as_secs_f64();
        let expected = format!("{count} applied again, 0 poisoned, 0 signals");
        if !finished.stdout.contains(&expected) {
            return Err(format!("a replay: {finished:?}"));
        }
        measured.add(
            REPLAY,
            Sample {
                rate: Some(rate),
                ..Sample::default()
            },
        );
    }
    measured.add_ratio(
        "events/s",
        REPLAY,
        FIRST,
        |sample| sample.rate,
        Some(Target::AtLeast(2.0)),
    );
    Ok(measured)
}

/// Measures, in full mode only, a backlog as after an outage or an hour of the heaviest load.
pub(crate) async fn caught_up(events: &Events) -> Result<Measurement, String> {
    const COUNT: usize = 1_000_000;
    let mut measured = Measurement::new(
        "outage",
        "a backlog of a million events (4 KiB, a new subscription each) when a worker starts",
    );
    for (name, kind) in [
        ("PostgreSQL", DatabaseKind::Postgres),
        ("SQLite", DatabaseKind::Sqlite),
    ] {
        let broker = filled(events, COUNT).await?;
        let mut database = Database::prepare(kind);
        database.resume().await;
        measured.add(name, apply(&broker, &database, COUNT).await?);
        measured.add_bound(
            "memory (MiB)",
            name,
            |sample| sample.memory_mib,
            Target::AtMost(64.0),
        );
    }
    Ok(measured)
}

async fn run_worker(
    kind: DatabaseKind,
    events: &Events,
    count: usize,
) -> Result<(Sample, Vec<Model>), String> {
    let broker = filled(events, count).await?;
    let mut database = Database::prepare(kind);
    database.resume().await;
    let sample = apply(&broker, &database, count).await?;
    let text = |problem: sea_orm::DbErr| problem.to_string();
    let rows = Entity::find()
        .all(database.connection().await.map_err(text)?)
        .await
        .map_err(text)?;
    if rows.len() == count {
        Ok((sample, rows))
    } else {
        Err(format!("{} rows of {count} events", rows.len()))
    }
}

/// Starts a broker with `count` events and a paused consumer.
async fn filled(events: &Events, count: usize) -> Result<nats::Server, String> {
    let broker = rig::broker(Sync::Default).await;
    rig::fill_with_new(rig::jetstream(&broker).await, events, count).await?;
    rig::paused_consumer(&broker).await?;
    Ok(broker)
}

/// Has a worker apply `count` events, and waits for the last signal.
async fn apply(broker: &nats::Server, database: &Database, count: usize) -> Result<Sample, String> {
    let worker = rig::worker(broker, &database.url(), &[]).await?;
    let mut signals = signals::Listener::start(broker).await?;
    let (usage, broker_usage) = (worker.usage(), Since::now(pid(broker)));
    let database_usage = rig::database_usage(database.process());
    rig::resume_consumer(broker).await?;
    let took = rig::bounded("applying", signals.wait_for(count)).await??;
    Ok(Sample {
        rate: Some(count as f64 / took.as_secs_f64()),
        cpu_s: Some(usage.per_10k(count)),
        broker_cpu_s: Some(broker_usage.per_10k(count)),
        database_cpu_s: database_usage.map(|usage| usage.per_10k(count)),
        memory_mib: Some(worker.memory_mib()),
        ..Sample::default()
    })
}

async fn run_nats(events: &Events, count: usize) -> Result<Sample, String> {
    let broker = rig::broker(Sync::Default).await;
    rig::fill_with_new(rig::jetstream(&broker).await, events, count).await?;
    rig::finished("consume", &broker, &[count]).await
}

async fn run_upserts(kind: DatabaseKind, rows: &[Model]) -> Result<Sample, String> {
    let mut database = Database::prepare(kind);
    database.resume().await;
    rig::migrate(&database.url()).await?;
    let text = |problem: sea_orm::DbErr| problem.to_string();
    let connection = database.connection().await.map_err(text)?;
    if kind == DatabaseKind::Sqlite {
        // The same settings as on the worker's connection.
        for pragma in ["PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL"] {
            connection.execute_unprepared(pragma).await.map_err(text)?;
        }
    }
    let rows: Vec<Vec<Value>> = rows.iter().map(values).collect();
    let usage = rig::database_usage(database.process());
    let begin = Instant::now();
    for batch in rows.chunks(BATCH) {
        upsert(connection, kind, batch).await.map_err(text)?;
    }
    let took = begin.elapsed();
    Ok(Sample {
        rate: Some(rows.len() as f64 / took.as_secs_f64()),
        database_cpu_s: usage.map(|usage| usage.per_10k(rows.len())),
        ..Sample::default()
    })
}

fn values(row: &Model) -> Vec<Value> {
    let row = row.clone().into_active_model();
    Column::iter()
        .filter_map(|column| row.get(column).into_value())
        .collect()
}

/// Writes one batch in one transaction.
async fn upsert(
    connection: &DatabaseConnection,
    kind: DatabaseKind,
    batch: &[Vec<Value>],
) -> Result<(), sea_orm::DbErr> {
    let transaction = connection.begin().await?;
    let rows_max = match kind {
        DatabaseKind::Postgres => BATCH,
        DatabaseKind::Sqlite => SQLITE_ROWS,
    };
    for rows in batch.chunks(rows_max) {
        let values = rows.iter().flatten().cloned();
        let statement = Statement::from_sql_and_values(
            connection.get_database_backend(),
            sql(kind, rows.len()),
            values,
        );
        transaction.execute_raw(statement).await?;
    }
    transaction.commit().await
}

fn sql(kind: DatabaseKind, rows: usize) -> String {
    use sea_orm::IdenStatic as _;
    let columns: Vec<&str> = Column::iter().map(|column| column.as_str()).collect();
    let mut number = 0;
    let mut placeholder = || {
        number += 1;
        match kind {
            DatabaseKind::Postgres => format!("${number}"),
            DatabaseKind::Sqlite => "?".to_owned(),
        }
    };
    let mut row = || {
        format!(
            "({})",
            columns
                .iter()
                .map(|_| placeholder())
                .collect::<Vec<_>>()
                .join(",")
        )
    };
    let rows: Vec<String> = (0..rows).map(|_| row()).collect();
    let sets: Vec<String> = columns
        .iter()
        .skip(1)
        .map(|column| format!("{column} = excluded.{column}"))
        .collect();
    format!(
        "INSERT INTO stripe_subscription ({}) VALUES {} ON CONFLICT (stripe_subscription_id) DO UPDATE SET {}",
        columns.join(","),
        rows.join(","),
        sets.join(",")
    )
}
