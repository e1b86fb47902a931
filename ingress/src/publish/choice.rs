//! Measures whether events are stored faster in batches or one by one, and chooses the faster mode.
//!
//! A broker that syncs its disk for every message stores one message after another, and a batch
//! makes its members share one sync. A broker that does not sync is faster with many single
//! messages in flight. The broker does not say which of the two it is, and disks and networks
//! differ. So a trial measures both modes in turns under the same load, and the faster one is used
//! for a while; grouping also if it is a little slower. Where only a few events are in flight, none
//! is grouped: a batch costs the broker as much as syncing some ten single messages. Pure: time is
//! an argument.

use std::time::Duration;

use tokio::time::Instant;

/// Events that are measured in one turn of a trial.
const TURN_EVENTS: u32 = 64;

/// How many pairs of turns, each of one single and one grouped turn, have to agree: two of up to
/// three, so that one turn in which the disk stalled does not decide.
const PAIRS_AGREEING: u32 = 2;

/// How long a turn may take. A longer one met a lull, and the load after a lull is a different one.
const TURN_MAX: Duration = Duration::from_secs(10);

/// How long a choice holds until the next trial. A trial takes about 0.1 s under load.
const HOLD: Duration = Duration::from_secs(30);

/// Events in flight at which a trial begins.
const LOAD: usize = 8;

/// How many others an event finds in flight on average, at least, where events are grouped.
const LOAD_GROUPED: usize = 4;

/// Over about how many events that average is taken: just after a batch only few are in flight.
const AVERAGED: usize = 32;

/// Events in flight below which an event is not measured in a trial: at such a low load the modes
/// do not differ.
const LOAD_MIN: usize = 2;

/// How an event that finds others in flight is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// By itself, at once.
    Single,
    /// In a batch with the other waiting events, once the batch in flight is acknowledged.
    Grouped,
}

/// The turn of a trial in which an event is measured; none if it is not measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn(Option<u32>);

impl Turn {
    pub(super) const NONE: Self = Self(None);
}

/// The chosen mode, and the trial that leads to the next choice.
#[derive(Debug)]
pub(super) struct Choice {
    chosen: Mode,
    phase: Phase,
    /// Numbers the turns of all trials, so that an event that is acknowledged after its turn ended
    /// is not measured in a later one.
    turn: u32,
    turn_since: Instant,
    /// The average number of others in flight, times [`AVERAGED`].
    others: usize,
}

#[derive(Debug)]
enum Phase {
    Holding { until: Instant },
    Trying(Trial),
}

#[derive(Debug, Default)]
struct Trial {
    turns_over: u32,
    /// How many more events of this turn are not measured, because events of the turn before were
    /// still in flight beside them.
    skip: usize,
    events: u32,
    /// The summed latencies of the events in this pair of turns, by mode.
    single: Duration,
    grouped: Duration,
    /// Pairs of turns in which grouping was worth it.
    won: u32,
}

impl Choice {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            chosen: Mode::Single,
            phase: Phase::Holding { until: now },
            turn: 0,
            turn_since: now,
            others: 0,
        }
    }

    /// Returns the mode of an event that finds `in_flight` others, and the turn in which it is
    /// measured. Begins a trial when one is due.
    pub(super) fn assign_mode(&mut self, in_flight: usize, now: Instant) -> (Mode, Turn) {
        self.others = self.others - self.others / AVERAGED + in_flight;
        let begins = match &self.phase {
            Phase::Holding { until } => now >= *until && in_flight >= LOAD,
            Phase::Trying(_) => {
                now.duration_since(self.turn_since) > TURN_MAX && in_flight >= LOAD_MIN
            }
        };
        if begins {
            self.next_turn(now);
            self.phase = Phase::Trying(Trial {
                skip: in_flight,
                ..Trial::default()
            });
        }
        match &self.phase {
            Phase::Trying(trial) if in_flight >= LOAD_MIN => (trial.mode(), Turn(Some(self.turn))),
            Phase::Trying(_) | Phase::Holding { .. } => (self.mode(), Turn::NONE),
        }
    }

    /// Returns the mode of events outside a trial, under the load of the last ones.
    pub(super) fn mode(&self) -> Mode {
        if self.others < LOAD_GROUPED * AVERAGED {
            Mode::Single
        } else {
            self.chosen
        }
    }

    /// Records that an event of `turn` was acknowledged after `took`, while `in_flight` others are
    /// still in flight. Chooses a mode when this was the last event of a trial.
    pub(super) fn record_ack(
        &mut self,
        turn: Turn,
        took: Duration,
        in_flight: usize,
        now: Instant,
    ) {
        let Phase::Trying(trial) = &mut self.phase else {
            return;
        };
        if turn != Turn(Some(self.turn)) || !trial.record(took) {
            return;
        }
        trial.end_turn(in_flight);
        if let Some(chosen) = trial.outcome() {
            self.chosen = chosen;
            self.phase = Phase::Holding { until: now + HOLD };
        }
        self.next_turn(now);
    }

    /// Records that an event was not acknowledged. A trial starts over, because its measurements
    /// mean nothing then.
    pub(super) fn record_failure(&mut self) {
        if let Phase::Trying(trial) = &mut self.phase {
            *trial = Trial::default();
            self.turn = self.turn.wrapping_add(1);
        }
    }

    fn next_turn(&mut self, now: Instant) {
        self.turn = self.turn.wrapping_add(1);
        self.turn_since = now;
    }
}

impl Trial {
    /// Records an event of this turn. Returns whether it was the last one.
    fn record(&mut self, took: Duration) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        match self.mode() {
            Mode::Single => self.single += took,
            Mode::Grouped => self.grouped += took,
        }
        self.events += 1;
        self.events >= TURN_EVENTS
    }

    fn end_turn(&mut self, in_flight: usize) {
        self.events = 0;
        self.skip = in_flight;
        self.turns_over += 1;
        if self.mode() == Mode::Single {
            // A pair is complete. If the broker syncs, grouping leaves more of its disk and CPU to
            // the others, so it wins even if it takes a quarter longer. If the broker does not, it
            // takes several times as long.
            self.won += u32::from(self.grouped * 4 < self.single * 5);
            (self.single, self.grouped) = (Duration::ZERO, Duration::ZERO);
        }
    }

    /// Returns the faster mode, once enough pairs of turns agree.
    fn outcome(&self) -> Option<Mode> {
        let lost = self.turns_over / 2 - self.won;
        match (self.won, lost) {
            (PAIRS_AGREEING.., _) => Some(Mode::Grouped),
            (_, PAIRS_AGREEING..) => Some(Mode::Single),
            _ => None,
        }
    }

    fn mode(&self) -> Mode {
        if self.turns_over.is_multiple_of(2) {
            Mode::Single
        } else {
            Mode::Grouped
        }
    }
}

#[cfg(test)]
mod tests;
