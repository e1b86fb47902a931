//! The faults: which there are, how a step of the schedule is drawn, and what starts and ends each.

use std::time::{Duration, Instant};

use litestripe_harness::pgbouncer::PgBouncer;
use litestripe_harness::process::{Process, Signal};
use litestripe_harness::program::Program;
use litestripe_harness::proxy::{Mode, Proxy};

use super::place::{Database, Place};
use crate::dice::Dice;
use crate::rig::{DEADLINE, Rig};

/// A program stops within 20 s; the rest allows for two busy cores.
const STOP_MAX: Duration = Duration::from_secs(25);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Victim {
    Ingress,
    Worker(usize),
    Broker,
    /// PostgreSQL.
    Database,
    /// PgBouncer.
    Pooler,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    IngressToNats,
    WorkerToNats,
    WorkerToDatabase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// SIGKILL; later it is started again.
    Kill(Victim),
    /// SIGSTOP; later SIGCONT.
    Freeze(Victim),
    /// SIGTERM; later it is started again.
    Restart(Victim),
    /// A proxy that disturbs a link.
    Disturb(Link, Mode),
    /// The primary dies and the standby takes over. The old one comes back as a standby, and for a
    /// while the workers still reach it.
    FailOver,
    /// The broker's user gets another password; the programs get it later.
    ChangePassword,
    /// The stream of events is made anew with what it held.
    RenewStream,
    /// The broker has no storage left for anyone.
    FillStorage,
    /// The stream of dead letters takes no more.
    LimitDeadLetters,
    /// A trigger refuses every row.
    RefuseRows,
    /// The workers' clock jumps by this many hours, and back later.
    JumpClock(i64),
}

/// Faults at the same time, their duration, and a pause after them.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) faults: Vec<Fault>,
    hold: Duration,
    rest: Duration,
}

impl Step {
    pub(super) fn roll(dice: &mut Dice, place: &Place) -> Self {
        let mut faults = vec![Fault::roll(dice, place.database)];
        if dice.percent(35) {
            let second = Fault::roll(dice, place.database);
            if !second.is_alone() && !faults[0].is_alone() && !second.has_target_of(faults[0]) {
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

    /// Starts the faults, ends them, and pauses.
    pub(super) async fn run(&self, place: &mut Place) {
        for fault in &self.faults {
            fault.inject(place).await;
        }
        // The schedule consists of fixed times, so these sleeps wait for no condition.
        tokio::time::sleep(self.hold).await;
        for fault in &self.faults {
            fault.repair_link(place);
        }
        for fault in &self.faults {
            fault.repair_server(place).await;
        }
        for fault in &self.faults {
            fault.repair_program(&mut place.rig).await;
        }
        tokio::time::sleep(self.rest).await;
    }
}

impl Fault {
    fn roll(dice: &mut Dice, database: Database) -> Self {
        use Victim::{Broker, Ingress, Pooler, Worker};
        let server = match database {
            Database::Sqlite => None,
            Database::Replicated => Some(Victim::Database),
            Database::Pooled => Some(dice.one_of(&[Victim::Database, Pooler])),
        };
        let programs = [Ingress, Worker(0), Worker(1), Broker];
        let victim = match server {
            Some(server) if dice.percent(25) => server,
            _ => dice.one_of(&programs),
        };
        match dice.below(14) {
            0..3 => Self::Kill(victim),
            3 => Self::Freeze(victim),
            4 => Self::Restart(victim),
            5..10 => {
                let links = [
                    Link::IngressToNats,
                    Link::WorkerToNats,
                    Link::WorkerToDatabase,
                ];
                let link = dice.one_of(if server.is_some() {
                    &links
                } else {
                    &links[..2]
                });
                Self::Disturb(link, roll_mode(dice))
            }
            10 if database == Database::Replicated => Self::FailOver,
            11 => {
                let hours = dice.one_of(&[1, 5, 30]);
                Self::JumpClock(if dice.percent(50) { hours } else { -hours })
            }
            _ => dice.one_of(&[
                Self::ChangePassword,
                Self::RenewStream,
                Self::FillStorage,
                Self::LimitDeadLetters,
                Self::RefuseRows,
            ]),
        }
    }

    /// Whether it needs servers that answer, so that no other fault may happen meanwhile.
    fn is_alone(self) -> bool {
        matches!(
            self,
            Self::FailOver
                | Self::RenewStream
                | Self::FillStorage
                | Self::LimitDeadLetters
                | Self::RefuseRows
        )
    }

    /// The name of its kind, for counting.
    pub(super) fn kind(self) -> String {
        let name = format!("{self:?}");
        let end = name.find('(').unwrap_or(name.len());
        match self {
            Self::Disturb(_, Mode::Blackhole) => "Blackhole".to_owned(),
            _ => name[..end].to_owned(),
        }
    }

    fn has_target_of(self, other: Self) -> bool {
        match (self, other) {
            (Self::Disturb(link, _), Self::Disturb(another, _)) => link == another,
            (Self::JumpClock(_), Self::JumpClock(_)) => true,
            (Self::Kill(one) | Self::Freeze(one) | Self::Restart(one), other) => {
                matches!(other, Self::Kill(two) | Self::Freeze(two) | Self::Restart(two) if one == two)
            }
            _ => false,
        }
    }

    async fn inject(self, place: &mut Place) {
        let rig = &mut place.rig;
        match self {
            Self::Disturb(link, mode) => proxy(rig, link).set(mode),
            Self::Kill(Victim::Broker) => rig.bridge.broker.kill().await,
            Self::Kill(Victim::Database) => rig.bridge.database.kill().await,
            Self::Kill(Victim::Pooler) => pooler(rig).kill().await,
            Self::Restart(Victim::Broker) => rig.bridge.broker.stop().await,
            Self::Restart(Victim::Database) => rig.bridge.database.stop().await,
            Self::Restart(Victim::Pooler) => pooler(rig).stop().await,
            Self::Kill(victim) => {
                program(rig, victim).kill().await;
            }
            Self::Restart(victim) => program(rig, victim).signal(Signal::Term),
            Self::Freeze(victim) => process(rig, victim).signal(Signal::Stop),
            Self::FailOver => rig.fail_over().await,
            Self::ChangePassword => place.change_password(),
            Self::RenewStream => place.renew_stream().await,
            Self::FillStorage => place.fill_storage().await,
            Self::LimitDeadLetters => place.limit_dead_letters(true).await,
            Self::RefuseRows => place.refuse_rows().await,
            Self::JumpClock(hours) => place.set_clock(hours),
        }
    }

    fn repair_link(self, place: &Place) {
        match self {
            Self::Disturb(link, _) => proxy(&place.rig, link).set(Mode::Pass),
            Self::FailOver => place.rig.follow_primary(),
            Self::ChangePassword => place.tell_password(),
            Self::JumpClock(_) => place.set_clock(0),
            _ => {}
        }
    }

    async fn repair_server(self, place: &mut Place) {
        use Victim::{Broker, Database, Pooler};
        let rig = &mut place.rig;
        match self {
            Self::Kill(Broker) | Self::Restart(Broker) => rig.bridge.broker.resume().await,
            Self::Kill(Database) | Self::Restart(Database) => rig.bridge.database.resume().await,
            Self::Kill(Pooler) | Self::Restart(Pooler) => pooler(rig).resume().await,
            Self::Freeze(victim @ (Broker | Database | Pooler)) => {
                process(rig, victim).signal(Signal::Cont);
            }
            Self::FillStorage => place.empty_storage().await,
            Self::LimitDeadLetters => place.limit_dead_letters(false).await,
            Self::RefuseRows => place.accept_rows().await,
            _ => {}
        }
    }

    async fn repair_program(self, rig: &mut Rig) {
        match self {
            Self::Freeze(victim @ (Victim::Ingress | Victim::Worker(_))) => {
                program(rig, victim).signal(Signal::Cont);
            }
            Self::Restart(victim @ (Victim::Ingress | Victim::Worker(_))) => {
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
            Self::Kill(victim @ (Victim::Ingress | Victim::Worker(_))) => start(rig, victim),
            _ => {}
        }
    }
}

fn roll_mode(dice: &mut Dice) -> Mode {
    match dice.below(7) {
        0 => Mode::Cut,
        1 => Mode::Delay(dice.millis(5, 200)),
        2 => Mode::HalfOpen,
        3 | 4 => Mode::DropReplies,
        5 => Mode::Blackhole,
        _ => Mode::ResetAfter(dice.below(20_000)),
    }
}

fn start(rig: &mut Rig, victim: Victim) {
    match victim {
        Victim::Ingress => rig.start_ingress(&[]),
        Victim::Worker(index) => rig.start_worker(index, &[]),
        Victim::Broker | Victim::Database | Victim::Pooler => {}
    }
}

/// The process of anything that can be frozen.
fn process(rig: &Rig, victim: Victim) -> &Process {
    let server = match victim {
        Victim::Ingress | Victim::Worker(_) => return program(rig, victim),
        Victim::Broker => rig.bridge.broker.process(),
        Victim::Database => rig.bridge.database.process(),
        Victim::Pooler => rig.pooler.as_ref().and_then(PgBouncer::process),
    };
    server.expect("it runs")
}

fn pooler(rig: &mut Rig) -> &mut PgBouncer {
    rig.pooler.as_mut().expect("this seed has one")
}

fn program(rig: &Rig, victim: Victim) -> &Program {
    match victim {
        Victim::Ingress => rig.ingress(),
        Victim::Worker(index) => rig.running(index),
        Victim::Broker | Victim::Database | Victim::Pooler => {
            panic!("{victim:?} is not one of our programs")
        }
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
