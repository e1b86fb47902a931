//! Publishes the events that wait for each other as one atomic batch (NATS: ADR-50), of which
//! JetStream stores all or nothing, with one sync of its disk.
//!
//! At most one batch is in flight, from its commit to its PubAck; the events that arrive meanwhile
//! go into the open batch. All members of the open batch but the newest are sent at once, so that
//! the broker already has them when it finishes the batch in flight. The newest is held back,
//! because the last member of a batch has to commit it: that happens as soon as the batch in flight
//! is acknowledged, or at once if there is none. A batch of one is sent as an ordinary message.
//! Owns what a batch is; `fill_wait` decides when an open batch waits for more members. May not
//! know retries or deadlines.
//!
//! Invariant: a member counts as stored only after the PubAck of its own batch, with the batch's id
//! and count. A server without support for batches would store the members one by one and
//! acknowledge the last one alone.

use std::collections::{HashSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;

use async_nats::Client;
use async_nats::jetstream;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::publish::PublishAck;
use futures_util::future::OptionFuture;
use litestripe_contract::atomic_batch::BatchId;
use litestripe_contract::event::EventId;
use litestripe_contract::exit;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::fill_wait::FillWait;
use super::message::Delivery;
use super::outcome::{AttemptError, Stored, Trouble};
use super::single::{send, stored, wait_for_ack};

/// The most members of a batch. A server accepts 1,000, but beyond a few hundred a sync more or
/// less hardly matters beside the rest of the work.
const MEMBERS_MAX: usize = 256;

/// The most bytes of a batch. The server stages a batch before it stores it.
const BYTES_MAX: usize = 4 << 20;

/// The most events taken out of the channel at a time.
const TAKE_MAX: usize = 64;

/// An event that is to be stored in a batch.
pub(super) struct Member {
    delivery: Arc<Delivery>,
    outcome: oneshot::Sender<Outcome>,
}

#[derive(Clone)]
pub(super) enum Outcome {
    Known(Result<Stored, AttemptError>),
    /// The batch says nothing about this member: publish it by itself.
    PublishSingly,
}

impl Member {
    pub(super) fn new(delivery: &Arc<Delivery>) -> (Self, oneshot::Receiver<Outcome>) {
        let (outcome, receiver) = oneshot::channel();
        (
            Self {
                delivery: Arc::clone(delivery),
                outcome,
            },
            receiver,
        )
    }

    fn finish(self, outcome: Outcome) {
        // A request that no longer listens was answered 503, or its client left.
        let _ = self.outcome.send(outcome);
    }
}

/// The task that makes and publishes batches.
pub(super) struct Batches {
    client: Client,
    jetstream: jetstream::Context,
    members: mpsc::Receiver<Member>,
    connections_lost: watch::Receiver<u64>,
    /// The batch that was committed last, until its outcome is known.
    in_flight: Option<InFlightBatch>,
    open: Option<Batch>,
    /// Members that do not fit into the open batch.
    waiting: VecDeque<Member>,
    fill_wait: FillWait,
}

/// A batch that was committed and whose PubAck is pending.
struct InFlightBatch {
    members: Vec<Member>,
    repeated: Vec<Member>,
    since: Instant,
    outcome: Pin<Box<dyn Future<Output = Outcome> + Send>>,
}

enum Next {
    Arrived(Vec<Member>),
    /// No more members can come.
    Closed,
    /// The outcome of the batch in flight is known.
    Finished(Outcome),
    ConnectionLost,
    FillWaitOver,
}

impl Batches {
    pub(super) fn new(
        client: Client,
        jetstream: jetstream::Context,
        members: mpsc::Receiver<Member>,
        connections_lost: watch::Receiver<u64>,
    ) -> Self {
        Self {
            client,
            jetstream,
            members,
            connections_lost,
            in_flight: None,
            open: None,
            waiting: VecDeque::new(),
            fill_wait: FillWait::new(MEMBERS_MAX),
        }
    }

    /// Makes batches until the channel of members is closed.
    pub(super) async fn run(&mut self) {
        loop {
            match self.next().await {
                Next::Closed => return,
                Next::Arrived(members) => self.waiting.extend(members),
                Next::Finished(outcome) => self.finish_in_flight(&outcome),
                Next::ConnectionLost => self.give_up(),
                Next::FillWaitOver => self.fill_wait.record_timeout(),
            }
            self.fill().await;
            if self.in_flight.is_none() && !self.keep_waiting() {
                self.commit().await;
                // The members that did not fit start the next batch.
                self.fill().await;
            }
        }
    }

    /// Returns whether the open batch waits for more members. Ends the wait if it has enough.
    fn keep_waiting(&mut self) -> bool {
        if !self.waiting.is_empty() {
            // The open batch is full.
            return false;
        }
        let members = self.open.as_ref().map_or(0, Batch::count);
        self.fill_wait.end_if_enough(members);
        self.fill_wait.is_waiting()
    }

    async fn next(&mut self) -> Next {
        let mut arrived = Vec::new();
        let finished = self
            .in_flight
            .as_mut()
            .map(|in_flight| in_flight.outcome.as_mut());
        let until = self.fill_wait.until.filter(|_| self.open.is_some());
        tokio::select! {
            biased;
            Some(outcome) = OptionFuture::from(finished) => Next::Finished(outcome),
            Some(()) = OptionFuture::from(until.map(sleep_until)) => Next::FillWaitOver,
            changed = self.connections_lost.changed() => {
                if changed.is_ok() { Next::ConnectionLost } else { Next::Closed }
            }
            count = self.members.recv_many(&mut arrived, TAKE_MAX) => {
                if count > 0 { Next::Arrived(arrived) } else { Next::Closed }
            }
        }
    }

    fn finish_in_flight(&mut self, outcome: &Outcome) {
        let Some(InFlightBatch {
            members,
            repeated,
            since,
            ..
        }) = self.in_flight.take()
        else {
            return;
        };
        let open = self.open.as_ref().map_or(0, Batch::count);
        self.fill_wait.record_answered(members.len(), open, since);
        members
            .into_iter()
            .for_each(|member| member.finish(outcome.clone()));
        repeated
            .into_iter()
            .for_each(|member| member.finish(Outcome::PublishSingly));
    }

    /// Gives up the batch in flight and the open one: the broker does not answer on a new
    /// connection for messages that were sent on the lost one.
    fn give_up(&mut self) {
        self.finish_in_flight(&Outcome::Known(Err(AttemptError::Retry(Trouble::NoAck))));
        if let Some(batch) = self.open.take() {
            batch.dissolve();
        }
    }

    /// Moves waiting members into the open batch as long as it has room.
    async fn fill(&mut self) {
        while let Some(member) = self.waiting.pop_front() {
            if member.outcome.is_closed() {
                // Its request was answered 503, or its client left.
                continue;
            }
            let batch = self.open.get_or_insert_with(|| Batch::new(&self.client));
            if !batch.has_room_for(&member) {
                self.waiting.push_front(member);
                return;
            }
            if let Err(error) = batch.add(&self.client, member).await {
                debug!(
                    "cannot send a batch, publishing its members by themselves: {}",
                    exit::chain(&error)
                );
                self.open.take().into_iter().for_each(Batch::dissolve);
            }
        }
    }

    async fn commit(&mut self) {
        let Some(batch) = self.open.take() else {
            return;
        };
        self.in_flight = batch.commit(&self.jetstream).await;
    }
}

struct Batch {
    id: BatchId,
    sent: Vec<Member>,
    /// The newest member. It is not sent yet, because it may become the last one, which commits.
    held: Option<Member>,
    /// Members with the event id of another member. A batch must not contain a message id twice.
    repeated: Vec<Member>,
    ids: HashSet<EventId>,
    bytes: usize,
}

impl Batch {
    fn new(client: &Client) -> Self {
        Self {
            id: BatchId::new(client),
            sent: Vec::new(),
            held: None,
            repeated: Vec::new(),
            ids: HashSet::new(),
            bytes: 0,
        }
    }

    fn count(&self) -> usize {
        self.sent.len() + usize::from(self.held.is_some())
    }

    fn has_room_for(&self, member: &Member) -> bool {
        let is_empty = self.held.is_none();
        is_empty
            || (self.sent.len() + 1 < MEMBERS_MAX
                && self.bytes + member.delivery.bytes() <= BYTES_MAX)
    }

    /// Holds `member` back, and sends the member that was held back before.
    async fn add(
        &mut self,
        client: &Client,
        member: Member,
    ) -> Result<(), async_nats::PublishError> {
        if !self.ids.insert(member.delivery.id.clone()) {
            self.repeated.push(member);
            return Ok(());
        }
        self.bytes += member.delivery.bytes();
        if let Some(before) = self.held.replace(member) {
            let mut headers = before.delivery.headers();
            self.id.add(&mut headers, self.sent.len() + 1);
            let (subject, body) = (
                before.delivery.subject(),
                before.delivery.body.bytes().clone(),
            );
            self.sent.push(before);
            client.publish_with_headers(subject, headers, body).await?;
        }
        Ok(())
    }

    /// Sends the last member, which commits the batch and asks for its PubAck. A batch of one is
    /// sent as an ordinary message.
    async fn commit(mut self, jetstream: &jetstream::Context) -> Option<InFlightBatch> {
        let last = self.held.take()?;
        let count = self.sent.len() + 1;
        let mut headers = last.delivery.headers();
        if count > 1 {
            self.id.add_last(&mut headers, count);
        }
        let ack = send(jetstream, &last.delivery, headers).await;
        let id = self.id;
        let outcome = async move {
            let ack = match ack {
                Ok(ack) => wait_for_ack(ack).await,
                Err(error) => Err(error),
            };
            ack.map_or_else(outcome_of_error, |ack| outcome_of_ack(&ack, &id, count))
        };
        self.sent.push(last);
        Some(InFlightBatch {
            members: self.sent,
            repeated: self.repeated,
            since: Instant::now(),
            outcome: Box::pin(outcome),
        })
    }

    /// Tells every member to publish by itself. The server forgets the members that were sent.
    fn dissolve(self) {
        let members = self.sent.into_iter().chain(self.held).chain(self.repeated);
        members.for_each(|member| member.finish(Outcome::PublishSingly));
    }
}

/// Returns the outcome of a batch of `count` members from its PubAck.
fn outcome_of_ack(ack: &PublishAck, id: &BatchId, count: usize) -> Outcome {
    if count == 1 {
        Outcome::Known(Ok(stored(ack)))
    } else if id.is_stored(ack, count) {
        Outcome::Known(Ok(Stored::New))
    } else {
        Outcome::PublishSingly
    }
}

/// Returns the outcome of a batch that got an error instead of a PubAck.
fn outcome_of_error(error: PublishError) -> Outcome {
    match error.kind() {
        // The members may or may not be stored.
        PublishErrorKind::TimedOut
        | PublishErrorKind::StreamNotFound
        | PublishErrorKind::BrokenPipe => Outcome::Known(Err(AttemptError::from(error))),
        // No member is stored. Most likely the stream already has one of the message ids; or other
        // clients have too many open batches, or the stream is full. Published by itself, each
        // member gets its own answer.
        _ => {
            debug!(
                "a batch was refused, publishing its members by themselves: {}",
                exit::chain(&error)
            );
            Outcome::PublishSingly
        }
    }
}
