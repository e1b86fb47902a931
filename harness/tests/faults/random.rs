//! Random faults under load. A seed decides which faults happen, in which order and for how long.

mod fault;
mod place;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use litestripe_harness::bridge::DatabaseKind;

use crate::check::{Found, check};
use crate::dice::Dice;
use crate::ledger::Figures;
use crate::load::Load;
use crate::rig::{Rig, count_in_log};

use fault::Step;
use place::Place;

/// How long faults are injected in the short form.
const SHORT: Duration = Duration::from_secs(20);
/// The number of seeds of the long form.
const SEEDS: u32 = 20;
const WORKERS: usize = 2;

#[tokio::test]
async fn postgres_known_seed_loses_no_event() {
    survive(DatabaseKind::Postgres, 2, SHORT).await;
}

#[tokio::test]
async fn sqlite_known_seed_loses_no_event() {
    survive(DatabaseKind::Sqlite, 1, SHORT).await;
}

/// Runs one new seed, or the long form.
#[tokio::test]
async fn campaign_of_new_seeds_loses_no_event() {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .map(|text| text.parse::<u64>().expect("it is a number"))
    };
    let seconds = number("LITESTRIPE_FAULTS").map(Duration::from_secs);
    let seeds = match number("LITESTRIPE_SEED") {
        Some(seed) => vec![(seed, seconds.unwrap_or(SHORT))],
        None => {
            let now = std::time::UNIX_EPOCH
                .elapsed()
                .expect("it is after 1970")
                .as_secs();
            let count = if seconds.is_some() { SEEDS } else { 1 };
            (0..count)
                .map(|n| {
                    (
                        now + u64::from(n),
                        seconds.map_or(SHORT, |seconds| seconds / SEEDS),
                    )
                })
                .collect()
        }
    };
    let mut results = Vec::new();
    for (seed, duration) in seeds {
        // Seeds alternate between the databases, and a seed always has the same one.
        let database = if seed % 2 == 0 {
            DatabaseKind::Postgres
        } else {
            DatabaseKind::Sqlite
        };
        results.push(survive(database, seed, duration).await);
    }
    print_table(&results);
}

/// The result of one seed.
struct Outcome {
    seed: u64,
    database: DatabaseKind,
    /// How many there were of each kind.
    faults: BTreeMap<String, usize>,
    deliveries: Figures,
    found: Found,
    took: Duration,
}

/// Injects the faults of `seed` under load for `duration`, repairs everything, and checks the
/// result.
async fn survive(database: DatabaseKind, seed: u64, duration: Duration) -> Outcome {
    eprintln!(
        "seed {seed} on {database:?}: LITESTRIPE_SEED={seed} LITESTRIPE_FAULTS={}",
        duration.as_secs()
    );
    let start = Instant::now();
    // Half of the seeds have a broker that syncs each message, as shipped, and always publish
    // waiting events in groups, even if that is not faster.
    let is_synced = seed % 4 < 2;
    let group_commit = if is_synced { "on" } else { "auto" };
    let settings = [
        ("LITESTRIPE_BATCH", "50"),
        ("LITESTRIPE_GROUP_COMMIT", group_commit),
    ];
    let mut place = Place::start(database, seed, is_synced, WORKERS, &settings).await;
    let rig = &place.rig;
    let load = Load::start(&rig.ledger, &rig.hook(), seed);
    let mut dice = Dice::new(seed);
    let mut faults = BTreeMap::new();
    let begun = Instant::now();
    while begun.elapsed() < duration {
        let step = Step::roll(&mut dice, &place);
        eprintln!("{:6.2} s: {step:?}", begun.elapsed().as_secs_f64());
        for fault in &step.faults {
            *faults.entry(fault.kind()).or_default() += 1;
        }
        step.run(&mut place).await;
        assert_programs_run(&place.rig);
    }
    load.stop().await;
    let found = check(&place.rig, place.stream).await;
    assert_programs_run(&place.rig);
    let deliveries = place.rig.ledger.figures();
    assert!(
        deliveries.accepted > 20,
        "the load was too small to show anything: {deliveries:?}"
    );
    let outcome = Outcome {
        seed,
        database,
        faults,
        deliveries,
        found,
        took: start.elapsed(),
    };
    print_table(std::slice::from_ref(&outcome));
    outcome
}

/// Asserts that every started program runs and that none has panicked.
fn assert_programs_run(rig: &Rig) {
    for program in rig.ingress.iter().chain(rig.workers.iter().flatten()) {
        assert_eq!(count_in_log(program, "panicked"), 0, "{}", program.log());
        assert!(
            program.is_running(),
            "it ended by itself:\n{}",
            program.log()
        );
    }
}

fn print_table(outcomes: &[Outcome]) {
    let mut table = comfy_table::Table::new();
    table.set_header([
        "seed",
        "database",
        "faults",
        "deliveries",
        "200",
        "refused",
        "no answer",
        "events",
        "rows",
        "signals",
        "in batches",
        "repeats",
        "dead",
        "lost",
        "took",
    ]);
    for outcome in outcomes {
        let Outcome {
            deliveries, found, ..
        } = outcome;
        table.add_row([
            outcome.seed.to_string(),
            format!("{:?}", outcome.database),
            outcome.faults.values().sum::<usize>().to_string(),
            deliveries.deliveries.to_string(),
            deliveries.accepted.to_string(),
            deliveries.refused.to_string(),
            deliveries.unanswered.to_string(),
            found.events.to_string(),
            found.rows.to_string(),
            found.signals.to_string(),
            found.signals_in_batches.to_string(),
            found.repeated_signals.to_string(),
            found.dead_letters.to_string(),
            // A loss makes the test fail before this.
            "0".to_owned(),
            format!("{:.1} s", outcome.took.as_secs_f64()),
        ]);
    }
    let mut faults = BTreeMap::<_, usize>::new();
    for (kind, count) in outcomes.iter().flat_map(|outcome| &outcome.faults) {
        *faults.entry(kind).or_default() += count;
    }
    let kinds: Vec<_> = faults
        .iter()
        .map(|(kind, count)| format!("{count} {kind}"))
        .collect();
    eprintln!(
        "{table}\n{} faults over {} seeds ({}), {} deliveries accepted, none lost",
        faults.values().sum::<usize>(),
        outcomes.len(),
        kinds.join(", "),
        outcomes
            .iter()
            .map(|outcome| outcome.deliveries.accepted)
            .sum::<usize>(),
    );
}
