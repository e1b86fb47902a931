//! Whether messages that wait for each other go faster together or one by one.
//!
//! A broker that syncs its disk for every message serves them one after the other, and grouping
//! makes them share a sync; one that does not is faster with many single messages in flight. Which
//! of the two it is, it does not say, and disks and networks differ: so both ways are tried, in
//! turns and under the same load, and the faster one is kept for a while. Pure: time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// Messages that count in one turn of a trial.
const TURN_MESSAGES: u32 = 128;

/// Pairs of turns in a trial, one single and one grouped. More than half of them decide, so that a disk that
/// is held up in one turn does not.
const PAIRS: u32 = 3;

/// How long a turn may take. One that takes longer met a lull, and what comes after it is another load.
const TURN_MAX: Duration = Duration::from_secs(10);

/// How long a choice holds. A trial takes some two tenths of a second under load.
const HOLD: Duration = Duration::from_secs(30);

/// Messages in flight at which a trial begins, and below which messages do not count in one: where
/// little waits, there is no difference to see.
const LOAD: usize = 4;
const LOAD_MIN: usize = 2;

/// How messages that find others on their way are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Each by itself, at once.
    Single,
    /// Together with the others that wait, once what is on its way has arrived.
    Grouped,
}

/// The turn of a trial for which a message counts, if it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Turn(Option<u32>);

impl Turn {
    pub(super) const NONE: Self = Self(None);
}

/// The choice, and the trial that leads to it.
#[derive(Debug)]
pub(super) struct Choice {
    chosen: Way,
    phase: Phase,
    /// Counts all turns of all trials, so that what is late for one counts in none.
    turn: u32,
    turn_since: Instant,
}

#[derive(Debug)]
enum Phase {
    Holding { until: Instant },
    Trying(Trial),
}

#[derive(Debug, Default)]
struct Trial {
    turns_over: u32,
    /// Messages of this turn that still meet those of the last on their way, and do not count.
    skip: usize,
    messages: u32,
    /// How long the messages of this turn and the one before it took.
    single: Duration,
    grouped: Duration,
    /// Pairs of turns in which grouping was worth it.
    won: u32,
}

impl Choice {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            chosen: Way::Single,
            phase: Phase::Holding { until: now },
            turn: 0,
            turn_since: now,
        }
    }

    /// The way of a message that finds `in_flight` others on their way.
    pub(super) fn way(&mut self, in_flight: usize, now: Instant) -> (Way, Turn) {
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
            Phase::Trying(trial) if in_flight >= LOAD_MIN => (trial.way(), Turn(Some(self.turn))),
            Phase::Trying(_) | Phase::Holding { .. } => (self.chosen, Turn::NONE),
        }
    }

    /// A message of that turn was acknowledged after `took`; `in_flight` others are on their way.
    pub(super) fn acknowledged(
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
        if trial.turns_over == 2 * PAIRS {
            self.chosen = if trial.won > PAIRS / 2 {
                Way::Grouped
            } else {
                Way::Single
            };
            self.phase = Phase::Holding { until: now + HOLD };
        }
        self.next_turn(now);
    }

    /// A message was not acknowledged: what a trial measured says nothing, and it begins again.
    pub(super) fn failed(&mut self) {
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
    /// Records a message of this turn. Returns whether it was the last one.
    fn record(&mut self, took: Duration) -> bool {
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        match self.way() {
            Way::Single => self.single += took,
            Way::Grouped => self.grouped += took,
        }
        self.messages += 1;
        self.messages >= TURN_MESSAGES
    }

    fn end_turn(&mut self, in_flight: usize) {
        self.messages = 0;
        self.skip = in_flight;
        self.turns_over += 1;
        if self.way() == Way::Single {
            // Grouping costs the broker more work per message, so it has to be worth it.
            self.won += u32::from(self.grouped * 10 < self.single * 9);
            (self.single, self.grouped) = (Duration::ZERO, Duration::ZERO);
        }
    }

    fn way(&self) -> Way {
        if self.turns_over.is_multiple_of(2) {
            Way::Single
        } else {
            Way::Grouped
        }
    }
}

#[cfg(test)]
mod tests;
