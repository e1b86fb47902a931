//! One event's way into the stream: by itself, or with others that wait for the same sync of the
//! broker's disk.
//!
//! Owns which way it goes. May not know retries or deadlines. `single` owns the way by itself, `batch` the way
//! together, `choice` which one is faster.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::Client;
use async_nats::jetstream;
use litestripe_contract::subject;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::warn;

use super::batch::{Batches, Member, Outcome};
use super::choice::{Choice, Turn, Way};
use super::message::Delivery;
use super::outcome::{AttemptError, Stored};
use super::single::{acknowledged, send, stored};
use crate::settings::GroupCommit;

/// Events on their way to a batch. There are no more than connections, and those are fewer.
const MEMBERS_MAX: usize = 2048;

/// Bytes of an event that may be in a batch. A larger one goes by itself: it keeps the disk busy
/// enough.
const MEMBER_BYTES_MAX: usize = 128 << 10;

pub(super) struct Group {
    jetstream: jetstream::Context,
    setting: GroupCommit,
    is_allowed: AtomicBool,
    load: Mutex<Load>,
    members: mpsc::Sender<Member>,
}

/// The events between their arrival and their outcome.
struct Load {
    present: usize,
    choice: Choice,
}

impl Group {
    /// The ways over `client`, and what has to run for the one together. `broken` counts the
    /// connections that broke, and whatever was on its way with them.
    pub(super) fn new(
        client: Client,
        jetstream: jetstream::Context,
        setting: GroupCommit,
        broken: watch::Receiver<u64>,
    ) -> (Self, Batches) {
        let (sender, receiver) = mpsc::channel(MEMBERS_MAX);
        let group = Self {
            jetstream: jetstream.clone(),
            setting,
            is_allowed: AtomicBool::new(false),
            load: Mutex::new(Load {
                present: 0,
                choice: Choice::new(Instant::now()),
            }),
            members: sender,
        };
        (group, Batches::new(client, jetstream, receiver, broken))
    }

    pub(super) fn allow(&self, is_allowed: bool) {
        self.is_allowed.store(is_allowed, Ordering::Relaxed);
        if !is_allowed && self.setting == GroupCommit::On {
            warn!(
                "events are stored one by one: stream {} does not allow atomic batches (allow_atomic, NATS 2.12)",
                subject::EVENTS_STREAM
            );
        }
    }

    /// Publishes an event, once. Where this is dropped, the event may be stored all the same.
    pub(super) async fn publish(&self, delivery: &Arc<Delivery>) -> Result<Stored, AttemptError> {
        if self.setting == GroupCommit::Off || !self.is_allowed.load(Ordering::Relaxed) {
            return self.single(delivery).await;
        }
        let (mut presence, way) = self.enter(delivery);
        let outcome = match way {
            Way::Single => self.single(delivery).await,
            Way::Grouped => self.grouped(delivery).await,
        };
        presence.is_stored = Some(outcome.is_ok());
        outcome
    }

    fn enter(&self, delivery: &Delivery) -> (Presence<'_>, Way) {
        let since = Instant::now();
        let mut load = self.load();
        let others = load.present;
        load.present += 1;
        let (way, turn) = match self.setting {
            GroupCommit::On => (Way::Grouped, Turn::NONE),
            GroupCommit::Auto | GroupCommit::Off => load.choice.way(others, since),
        };
        // Without others there is nobody to share with.
        let goes_alone = others == 0 || delivery.bytes() > MEMBER_BYTES_MAX;
        let way = if goes_alone { Way::Single } else { way };
        (
            Presence {
                group: self,
                turn,
                since,
                is_stored: None,
            },
            way,
        )
    }

    async fn grouped(&self, delivery: &Arc<Delivery>) -> Result<Stored, AttemptError> {
        let (member, outcome) = Member::new(delivery);
        if self.members.send(member).await.is_err() {
            return self.single(delivery).await;
        }
        match outcome.await.unwrap_or(Outcome::Alone) {
            Outcome::Known(outcome) => outcome,
            Outcome::Alone => self.single(delivery).await,
        }
    }

    async fn single(&self, delivery: &Delivery) -> Result<Stored, AttemptError> {
        let ack = send(&self.jetstream, delivery, delivery.headers()).await?;
        Ok(stored(&acknowledged(ack).await?))
    }

    fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An event between its arrival and its outcome.
struct Presence<'a> {
    group: &'a Group,
    turn: Turn,
    since: Instant,
    /// Whether it was stored, unless it was given up before that was known.
    is_stored: Option<bool>,
}

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut load = self.group.load();
        load.present -= 1;
        let others = load.present;
        match self.is_stored {
            Some(true) => load
                .choice
                .acknowledged(self.turn, now - self.since, others, now),
            Some(false) => load.choice.failed(),
            None => {}
        }
    }
}
