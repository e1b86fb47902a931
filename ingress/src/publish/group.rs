//! Group commit: publishes an event by itself, or in a batch with others that wait for the same
//! sync of the broker's disk.
//!
//! Owns the choice between the two for each event. May not know retries or deadlines. `single`
//! publishes one event, `batch` publishes batches, `choice` measures which is faster.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::Client;
use async_nats::jetstream;
use litestripe_contract::subject;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::warn;

use super::batch::{Batches, Member, Outcome};
use super::choice::{Choice, Mode, Turn};
use super::message::Delivery;
use super::outcome::{AttemptError, Stored};
use super::single::{send, stored, wait_for_ack};
use crate::settings::GroupCommit;

/// Events that may wait for a batch. There is at most one per connection, and connections are
/// fewer.
const MEMBERS_MAX: usize = 2048;

/// The largest event that goes into a batch, in bytes. A larger one is published by itself: it
/// keeps the disk busy enough.
const MEMBER_BYTES_MAX: usize = 128 << 10;

pub(super) struct Group {
    jetstream: jetstream::Context,
    setting: GroupCommit,
    is_allowed: AtomicBool,
    load: Mutex<Load>,
    members: mpsc::Sender<Member>,
}

/// How events that find others in flight are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GroupState {
    /// One by one: the settings say so.
    Off,
    /// One by one: the stream does not accept atomic batches.
    Unsupported,
    /// One by one, which is faster now.
    Single,
    /// In batches.
    Grouped,
}

/// How many events are being published, and how.
struct Load {
    in_flight: usize,
    choice: Choice,
}

impl Group {
    /// Returns the group, and the [`Batches`] that have to run beside it. `connections_lost`
    /// changes whenever a connection was lost or made; messages in flight on an older one get no
    /// answer.
    pub(super) fn new(
        client: Client,
        jetstream: jetstream::Context,
        setting: GroupCommit,
        connections_lost: watch::Receiver<u64>,
    ) -> (Self, Batches) {
        let (sender, receiver) = mpsc::channel(MEMBERS_MAX);
        let group = Self {
            jetstream: jetstream.clone(),
            setting,
            is_allowed: AtomicBool::new(false),
            load: Mutex::new(Load {
                in_flight: 0,
                choice: Choice::new(Instant::now()),
            }),
            members: sender,
        };
        let batches = Batches::new(client, jetstream, receiver, connections_lost);
        (group, batches)
    }

    /// Records whether the stream accepts atomic batches.
    pub(super) fn allow_batches(&self, is_allowed: bool) {
        self.is_allowed.store(is_allowed, Ordering::Relaxed);
        if !is_allowed && self.setting == GroupCommit::On {
            warn!(
                "events are stored one by one: stream {} does not allow atomic batches (allow_atomic, NATS 2.12)",
                subject::EVENTS_STREAM
            );
        }
    }

    pub(super) fn state(&self) -> GroupState {
        if self.setting == GroupCommit::Off {
            GroupState::Off
        } else if !self.is_allowed.load(Ordering::Relaxed) {
            GroupState::Unsupported
        } else if self.setting == GroupCommit::On || self.load().choice.mode() == Mode::Grouped {
            GroupState::Grouped
        } else {
            GroupState::Single
        }
    }

    /// Publishes an event, without retries.
    ///
    /// # Cancel safety
    /// If this is dropped, the event may still be stored.
    pub(super) async fn publish(&self, delivery: &Arc<Delivery>) -> Result<Stored, AttemptError> {
        if self.setting == GroupCommit::Off || !self.is_allowed.load(Ordering::Relaxed) {
            return self.single(delivery).await;
        }
        let (mut in_flight, mode) = self.enter(delivery);
        let outcome = match mode {
            Mode::Single => self.single(delivery).await,
            Mode::Grouped => self.grouped(delivery).await,
        };
        in_flight.is_stored = Some(outcome.is_ok());
        outcome
    }

    /// Counts the event as in flight and decides how it is published.
    fn enter(&self, delivery: &Delivery) -> (InFlightEvent<'_>, Mode) {
        let since = Instant::now();
        let mut load = self.load();
        let others = load.in_flight;
        load.in_flight += 1;
        let (mode, turn) = match self.setting {
            GroupCommit::On => (Mode::Grouped, Turn::NONE),
            GroupCommit::Auto | GroupCommit::Off => load.choice.assign_mode(others, since),
        };
        // Without other events there is no sync to share.
        let is_single = others == 0 || delivery.bytes() > MEMBER_BYTES_MAX;
        let mode = if is_single { Mode::Single } else { mode };
        (
            InFlightEvent {
                group: self,
                turn,
                since,
                is_stored: None,
            },
            mode,
        )
    }

    async fn grouped(&self, delivery: &Arc<Delivery>) -> Result<Stored, AttemptError> {
        let (member, outcome) = Member::new(delivery);
        if self.members.send(member).await.is_err() {
            return self.single(delivery).await;
        }
        match outcome.await.unwrap_or(Outcome::PublishSingly) {
            Outcome::Known(outcome) => outcome,
            Outcome::PublishSingly => self.single(delivery).await,
        }
    }

    async fn single(&self, delivery: &Delivery) -> Result<Stored, AttemptError> {
        let ack = send(&self.jetstream, delivery, delivery.headers()).await?;
        Ok(stored(&wait_for_ack(ack).await?))
    }

    fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An event that is being published. Dropping it ends its time in flight and records the outcome.
struct InFlightEvent<'a> {
    group: &'a Group,
    turn: Turn,
    since: Instant,
    /// Whether it was stored; `None` if publishing was cancelled before that was known.
    is_stored: Option<bool>,
}

impl Drop for InFlightEvent<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut load = self.group.load();
        load.in_flight -= 1;
        let others = load.in_flight;
        match self.is_stored {
            Some(true) => load
                .choice
                .record_ack(self.turn, now - self.since, others, now),
            Some(false) => load.choice.record_failure(),
            None => {}
        }
    }
}
