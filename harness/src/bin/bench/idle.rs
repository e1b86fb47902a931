//! Measures CPU and memory of the programs with nothing to do.

use std::time::{Duration, Instant};

use litestripe_harness::bridge::{Database, DatabaseKind};
use tokio::time::sleep;

use crate::Mode;
use crate::report::{Measurement, Sample, Target};
use crate::rig::{self, Sync};

pub(crate) async fn idle(mode: Mode) -> Result<Measurement, String> {
    let mut measured = Measurement::new("idle", "CPU (of one core) and memory with nothing to do");
    // Each database has a broker of its own: a broker belongs to one.
    let (broker, other) = (
        rig::broker(Sync::Default).await,
        rig::broker(Sync::Default).await,
    );
    let mut postgres = Database::prepare(DatabaseKind::Postgres);
    postgres.resume().await;
    let sqlite = Database::prepare(DatabaseKind::Sqlite);
    let programs = [
        ("ingress", rig::ingress(&broker, &[]).await?),
        (
            "worker, PostgreSQL",
            rig::worker(&broker, &postgres.url(), &[]).await?,
        ),
        (
            "worker, SQLite",
            rig::worker(&other, &sqlite.url(), &[]).await?,
        ),
    ];
    // Until the work at the start is over.
    sleep(Duration::from_secs(3)).await;
    for _ in 0..mode.pick(1, 3) {
        let usages: Vec<_> = programs.iter().map(|(_, served)| served.usage()).collect();
        let begin = Instant::now();
        sleep(Duration::from_secs(mode.pick(10, 20))).await;
        for ((name, served), usage) in programs.iter().zip(usages) {
            let cpu_s = usage.per_10k(10_000);
            measured.add(
                name,
                Sample {
                    cpu_percent: Some(100.0 * cpu_s / begin.elapsed().as_secs_f64()),
                    memory_mib: Some(served.memory_mib()),
                    ..Sample::default()
                },
            );
        }
    }
    for (name, _) in &programs {
        measured.add_bound(
            "CPU (%)",
            name,
            |sample| sample.cpu_percent,
            Target::AtMost(0.5),
        );
        measured.add_bound(
            "memory (MiB)",
            name,
            |sample| sample.memory_mib,
            Target::AtMost(64.0),
        );
    }
    Ok(measured)
}
