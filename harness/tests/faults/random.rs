//! Random faults under load. A seed decides which faults happen, in which order and for how long.

use std::time::{Duration, Instant};

use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::process::Signal;
use litestripe_harness::program::Program;
use litestripe_harness::proxy::{Mode, Proxy};

use crate::check::{Found, Stream, check};
use crate::dice::Dice;
use crate::ledger::Figures;
use crate::load::Load;
use crate::rig::{DEADLINE, Rig, count_in_log};

/// How long faults are injected in the short form.
const SHORT: Duration = Duration::from_secs(20);
/// The number of seeds of the long form.
const SEEDS: u32 = 20;
/// A program stops within 20 s; the rest allows for two busy cores.
const STOP_MAX: Duration = Duration::from_secs(25);
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
    faults: usize,
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
    // Half of the seeds always publish waiting events in groups, even if that is not faster.
    let group_commit = if seed % 4 < 2 { "on" } else { "auto" };
    let settings = [
        ("LITESTRIPE_BATCH", "50"),
        ("LITESTRIPE_GROUP_COMMIT", group_commit),
    ];
    let mut rig = Rig::start(database, WORKERS, &settings).await;
    let load = Load::start(&rig.ledger, &rig.hook(), seed);
    let mut dice = Dice::new(seed);
    let mut faults = 0;
    let begun = Instant::now();
    while begun.elapsed() < duration {
        let step = Step::roll(&mut dice, database);
        eprintln!("{:6.2} s: {step:?}", begun.elapsed().as_secs_f64());
        faults += step.faults.len();
        for fault in &step.faults {
            inject(&mut rig, *fault).await;
        }
        // The schedule consists of fixed times, so these sleeps wait for no condition.
        tokio::time::sleep(step.hold).await;
        for fault in &step.faults {
            repair_link(&rig, *fault);
        }
        for fault in &step.faults {
            repair_server(&mut rig, *fault).await;
        }
        for fault in &step.faults {
            repair_program(&mut rig, *fault).await;
        }
        tokio::time::sleep(step.rest).await;
        assert_programs_run(&rig);
    }
    load.stop().await;
    let found = check(&rig, Stream::Whole).await;
    assert_programs_run(&rig);
    let deliveries = rig.ledger.figures();
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Ingress,
    Worker(usize),
    Broker,
    /// PostgreSQL.
    Database,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    IngressToNats,
    WorkerToNats,
    WorkerToDatabase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL; later it is started again.
    Kill(Victim),
    /// SIGSTOP; later SIGCONT.
    Freeze(Victim),
    /// SIGTERM; later it is started again.
    Restart(Victim),
    /// A proxy that disturbs a link.
    Disturb(Link, Mode),
}

/// Faults at the same time, their duration, and a pause after them.
#[derive(Debug)]
struct Step {
    faults: Vec<Fault>,
    hold: Duration,
    rest: Duration,
}

impl Step {
    fn roll(dice: &mut Dice, database: DatabaseKind) -> Self {
        let mut faults = vec![Fault::roll(dice, database)];
        if dice.percent(35) {
            let second = Fault::roll(dice, database);
            if !second.has_target_of(faults[0]) {
                faults.push(second);
            }
        }
        let is_frozen = |fault: &Fault| matches!(fault, Fault::Freeze(Victim::Worker(_)));
        // Longer than the broker's ack wait: another worker receives the messages that this one
        // holds.
        let exceeds_ack_wait = faults.iter().any(is_frozen) && dice.percent(40);
        let hold = if exceeds_ack_wait {
            dice.millis(3200, 4500)
        } else {
            dice.millis(20, 1200)
        };
        Self {
            faults,
            hold,
            rest: dice.millis(50, 600),
        }
    }
}

impl Fault {
    fn roll(dice: &mut Dice, database: DatabaseKind) -> Self {
        use Victim::{Broker, Database, Ingress, Worker};
        let has_server = database == DatabaseKind::Postgres;
        let programs = [Ingress, Worker(0), Worker(1), Broker];
        match dice.below(10) {
            0..3 if has_server && dice.percent(25) => Self::Kill(Database),
            0..3 => Self::Kill(dice.one_of(&programs)),
            3 => Self::Freeze(dice.one_of(&programs)),
            4 => Self::Restart(dice.one_of(&programs)),
            _ => {
                let links = [
                    Link::IngressToNats,
                    Link::WorkerToNats,
                    Link::WorkerToDatabase,
                ];
                let link = dice.one_of(if has_server { &links } else { &links[..2] });
                Self::Disturb(link, roll_mode(dice))
            }
        }
    }

    fn has_target_of(self, other: Self) -> bool {
        match (self, other) {
            (Self::Disturb(link, _), Self::Disturb(another, _)) => link == another,
            (Self::Kill(one) | Self::Freeze(one) | Self::Restart(one), other) => {
                matches!(other, Self::Kill(two) | Self::Freeze(two) | Self::Restart(two) if one == two)
            }
            _ => false,
        }
    }
}

fn roll_mode(dice: &mut Dice) -> Mode {
    match dice.below(6) {
        0 => Mode::Cut,
        1 => Mode::Delay(dice.millis(5, 200)),
        2 => Mode::HalfOpen,
        3 | 4 => Mode::DropReplies,
        _ => Mode::ResetAfter(dice.below(20_000)),
    }
}

async fn inject(rig: &mut Rig, fault: Fault) {
    match fault {
        Fault::Disturb(link, mode) => proxy(rig, link).set(mode),
        Fault::Kill(Victim::Broker) => rig.bridge.broker.kill().await,
        Fault::Kill(Victim::Database) => rig.bridge.database.kill().await,
        Fault::Restart(Victim::Broker) => rig.bridge.broker.stop().await,
        Fault::Freeze(Victim::Broker) => {
            rig.bridge
                .broker
                .process()
                .expect("it runs")
                .signal(Signal::Stop);
        }
        Fault::Kill(victim) => {
            program(rig, victim).kill().await;
        }
        Fault::Freeze(victim) => program(rig, victim).signal(Signal::Stop),
        Fault::Restart(victim) => program(rig, victim).signal(Signal::Term),
    }
}

fn repair_link(rig: &Rig, fault: Fault) {
    if let Fault::Disturb(link, _) = fault {
        proxy(rig, link).set(Mode::Pass);
    }
}

async fn repair_server(rig: &mut Rig, fault: Fault) {
    match fault {
        Fault::Kill(Victim::Broker) | Fault::Restart(Victim::Broker) => {
            rig.bridge.broker.resume().await
        }
        Fault::Freeze(Victim::Broker) => {
            rig.bridge
                .broker
                .process()
                .expect("it runs")
                .signal(Signal::Cont);
        }
        Fault::Kill(Victim::Database) => rig.bridge.database.resume().await,
        _ => {}
    }
}

async fn repair_program(rig: &mut Rig, fault: Fault) {
    match fault {
        Fault::Freeze(victim @ (Victim::Ingress | Victim::Worker(_))) => {
            program(rig, victim).signal(Signal::Cont)
        }
        Fault::Restart(victim @ (Victim::Ingress | Victim::Worker(_))) => {
            let begun = Instant::now();
            let status = program(rig, victim).wait(DEADLINE).await;
            let log = program(rig, victim).log();
            assert!(status.success(), "{victim:?} ended with {status}:\n{log}");
            assert!(
                begun.elapsed() < STOP_MAX,
                "{victim:?} took {:?} to end:\n{log}",
                begun.elapsed()
            );
            start(rig, victim);
        }
        Fault::Kill(victim @ (Victim::Ingress | Victim::Worker(_))) => start(rig, victim),
        _ => {}
    }
}

fn start(rig: &mut Rig, victim: Victim) {
    match victim {
        Victim::Ingress => rig.start_ingress(&[]),
        Victim::Worker(index) => rig.start_worker(index, &[]),
        Victim::Broker | Victim::Database => {}
    }
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

fn program(rig: &Rig, victim: Victim) -> &Program {
    match victim {
        Victim::Ingress => rig.ingress(),
        Victim::Worker(index) => rig.running(index),
        Victim::Broker | Victim::Database => panic!("{victim:?} is not one of our programs"),
    }
}

fn proxy(rig: &Rig, link: Link) -> &Proxy {
    match link {
        Link::IngressToNats => &rig.ingress_to_nats,
        Link::WorkerToNats => &rig.worker_to_nats,
        Link::WorkerToDatabase => rig
            .worker_to_database
            .as_ref()
            .expect("only PostgreSQL has such faults"),
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
            outcome.faults.to_string(),
            deliveries.deliveries.to_string(),
            deliveries.accepted.to_string(),
            deliveries.refused.to_string(),
            deliveries.unanswered.to_string(),
            found.events.to_string(),
            found.rows.to_string(),
            found.signals.to_string(),
            found.repeated_signals.to_string(),
            found.dead_letters.to_string(),
            // A loss makes the test fail before this.
            "0".to_owned(),
            format!("{:.1} s", outcome.took.as_secs_f64()),
        ]);
    }
    let sum = |figure: fn(&Outcome) -> usize| outcomes.iter().map(figure).sum::<usize>();
    let (faults, accepted) = (
        sum(|outcome| outcome.faults),
        sum(|outcome| outcome.deliveries.accepted),
    );
    eprintln!(
        "{table}\n{faults} faults over {} seeds, {accepted} deliveries accepted, none lost",
        outcomes.len()
    );
}
