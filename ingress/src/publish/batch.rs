//! Group commit: events that arrive while others are on their way become one atomic batch (NATS:
//! ADR-50), of which JetStream stores all or nothing and syncs its disk once.
//!
//! Members are sent as they come, so that the broker has them when it gets to them, and the last one
//! commits the batch as soon as what was on its way has arrived: it is held back for that. One that
//! finds nothing on its way goes at once, by itself. Owns what is a batch's; `company` knows when one
//! waits for more. May not know retries or deadlines.
//!
//! Invariant: a member is told that it is stored only by a PubAck of its very batch, with the
//! batch's id and count. A server that knows no batches would store the members one by one and
//! acknowledge the last alone.

use std::collections::{HashSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;

use async_nats::header::{
    HeaderValue, NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL, NATS_BATCH_ID, NATS_BATCH_SEQUENCE,
};
use async_nats::jetstream;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::publish::PublishAck;
use async_nats::{Client, HeaderMap};
use futures_util::future::OptionFuture;
use litestripe_contract::event::EventId;
use litestripe_contract::exit;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::company::Company;
use super::message::Delivery;
use super::outcome::{AttemptError, Stored, Trouble};
use super::single::{acknowledged, send, stored};

/// Members of one batch. A server takes 1,000; beyond some hundred, one sync more or less is
/// nothing to the rest of the work.
const MEMBERS_MAX: usize = 256;

/// Bytes of one batch, which the server stages before it stores them.
const BYTES_MAX: usize = 4 << 20;

/// Events taken out of the channel at a time.
const TAKE_MAX: usize = 64;

pub(super) struct Member {
    delivery: Arc<Delivery>,
    outcome: oneshot::Sender<Outcome>,
}

#[derive(Clone)]
pub(super) enum Outcome {
    Known(Result<Stored, AttemptError>),
    /// Its batch was refused whole, which says nothing of this one: it has to go by itself.
    Alone,
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

    fn settle(self, outcome: Outcome) {
        // Whoever does not listen any more has been answered.
        let _ = self.outcome.send(outcome);
    }
}

pub(super) struct Batches {
    client: Client,
    jetstream: jetstream::Context,
    members: mpsc::Receiver<Member>,
    broken: watch::Receiver<u64>,
    /// What was committed last, until it is known what became of it.
    on_its_way: Option<OnItsWay>,
    open: Option<Batch>,
    /// Members that the open batch has no room for.
    waiting: VecDeque<Member>,
    company: Company,
}

/// Members whose PubAck is awaited, and how to get it.
struct OnItsWay {
    members: Vec<Member>,
    repeated: Vec<Member>,
    since: Instant,
    outcome: Pin<Box<dyn Future<Output = Outcome> + Send>>,
}

enum Next {
    Arrived(Vec<Member>),
    Over,
    Settled(Outcome),
    Broken,
    Waited,
}

impl Batches {
    pub(super) fn new(
        client: Client,
        jetstream: jetstream::Context,
        members: mpsc::Receiver<Member>,
        broken: watch::Receiver<u64>,
    ) -> Self {
        Self {
            client,
            jetstream,
            members,
            broken,
            on_its_way: None,
            open: None,
            waiting: VecDeque::new(),
            company: Company::new(MEMBERS_MAX),
        }
    }

    /// Makes batches until nobody can bring members any more.
    pub(super) async fn run(&mut self) {
        loop {
            match self.next().await {
                Next::Over => return,
                Next::Arrived(members) => self.waiting.extend(members),
                Next::Settled(outcome) => self.settle(&outcome),
                Next::Broken => self.give_up(),
                Next::Waited => self.company.stay_away(),
            }
            self.fill().await;
            if self.on_its_way.is_none() && !self.waits_for_company() {
                self.commit().await;
                // What there was no room for.
                self.fill().await;
            }
        }
    }

    fn waits_for_company(&mut self) -> bool {
        let members = self.open.as_ref().map_or(0, Batch::count);
        // A full one is as good as it gets.
        self.waiting.is_empty() && self.company.is_expected(members)
    }

    async fn next(&mut self) -> Next {
        let mut arrived = Vec::new();
        let settled = self
            .on_its_way
            .as_mut()
            .map(|on_its_way| on_its_way.outcome.as_mut());
        let until = self.company.until.filter(|_| self.open.is_some());
        tokio::select! {
            biased;
            Some(outcome) = OptionFuture::from(settled) => Next::Settled(outcome),
            Some(()) = OptionFuture::from(until.map(sleep_until)) => Next::Waited,
            changed = self.broken.changed() => if changed.is_ok() { Next::Broken } else { Next::Over },
            count = self.members.recv_many(&mut arrived, TAKE_MAX) => {
                if count > 0 { Next::Arrived(arrived) } else { Next::Over }
            }
        }
    }

    fn settle(&mut self, outcome: &Outcome) {
        let Some(OnItsWay {
            members,
            repeated,
            since,
            ..
        }) = self.on_its_way.take()
        else {
            return;
        };
        let open = self.open.as_ref().map_or(0, Batch::count);
        self.company.leave(members.len(), open, since);
        members
            .into_iter()
            .for_each(|member| member.settle(outcome.clone()));
        repeated
            .into_iter()
            .for_each(|member| member.settle(Outcome::Alone));
    }

    /// Nobody answers for what was sent over another connection.
    fn give_up(&mut self) {
        self.settle(&Outcome::Known(Err(AttemptError::Again(Trouble::NoAck))));
        if let Some(batch) = self.open.take() {
            batch.dissolve();
        }
    }

    /// Sends those that wait, as far as the open batch has room.
    async fn fill(&mut self) {
        while let Some(member) = self.waiting.pop_front() {
            if member.outcome.is_closed() {
                // It was answered 503.
                continue;
            }
            let batch = self.open.get_or_insert_with(|| Batch::new(&self.client));
            if !batch.has_room_for(&member) {
                self.waiting.push_front(member);
                return;
            }
            if let Err(error) = batch.add(&self.client, member).await {
                debug!("a batch is given up: {}", exit::chain(&error));
                self.open.take().into_iter().for_each(Batch::dissolve);
            }
        }
    }

    async fn commit(&mut self) {
        let Some(batch) = self.open.take() else {
            return;
        };
        self.on_its_way = batch.commit(&self.jetstream).await;
    }
}

struct Batch {
    id: HeaderValue,
    sent: Vec<Member>,
    /// The last one so far, which is not sent yet: it may become the one that commits.
    held: Option<Member>,
    /// Those that repeat another one. A batch may not name a message id twice.
    repeated: Vec<Member>,
    ids: HashSet<EventId>,
    bytes: usize,
}

impl Batch {
    fn new(client: &Client) -> Self {
        // Unique among all clients, as an inbox has to be.
        let inbox = client.new_inbox();
        let id = inbox.rsplit('.').next().unwrap_or(&inbox).into();
        Self {
            id,
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

    /// Holds a member back, and sends the one that was.
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
            let headers = self.headers(&before, self.sent.len() + 1);
            let (subject, body) = (
                before.delivery.subject(),
                before.delivery.body.bytes().clone(),
            );
            self.sent.push(before);
            client.publish_with_headers(subject, headers, body).await?;
        }
        Ok(())
    }

    /// Sends the last member, which asks for the batch's PubAck. A single one needs no batch.
    async fn commit(mut self, jetstream: &jetstream::Context) -> Option<OnItsWay> {
        let last = self.held.take()?;
        let count = self.sent.len() + 1;
        let headers = if count == 1 {
            last.delivery.headers()
        } else {
            committing(self.headers(&last, count))
        };
        let ack = send(jetstream, &last.delivery, headers).await;
        let id = self.id;
        let outcome = async move {
            let ack = match ack {
                Ok(ack) => acknowledged(ack).await,
                Err(error) => Err(error),
            };
            ack.map_or_else(not_stored, |ack| committed(&ack, &id, count))
        };
        self.sent.push(last);
        Some(OnItsWay {
            members: self.sent,
            repeated: self.repeated,
            since: Instant::now(),
            outcome: Box::pin(outcome),
        })
    }

    /// Lets every member go by itself. What was sent of it, the server forgets.
    fn dissolve(self) {
        let members = self.sent.into_iter().chain(self.held).chain(self.repeated);
        members.for_each(|member| member.settle(Outcome::Alone));
    }

    fn headers(&self, member: &Member, sequence: usize) -> HeaderMap {
        let mut headers = member.delivery.headers();
        headers.insert(NATS_BATCH_ID, self.id.clone());
        headers.insert(NATS_BATCH_SEQUENCE, HeaderValue::from(sequence));
        headers
    }
}

fn committing(mut headers: HeaderMap) -> HeaderMap {
    headers.insert(NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL);
    headers
}

/// What the PubAck of a batch of `count` members says of them.
fn committed(ack: &PublishAck, id: &HeaderValue, count: usize) -> Outcome {
    if count == 1 {
        return Outcome::Known(Ok(stored(ack)));
    }
    let is_of_this_batch =
        ack.batch_id.as_deref() == Some(id.as_str()) && ack.batch_size == Some(count as u64);
    if is_of_this_batch {
        Outcome::Known(Ok(Stored::New))
    } else {
        Outcome::Alone
    }
}

fn not_stored(error: PublishError) -> Outcome {
    match error.kind() {
        // They may be stored or not.
        PublishErrorKind::TimedOut
        | PublishErrorKind::StreamNotFound
        | PublishErrorKind::BrokenPipe => Outcome::Known(Err(AttemptError::from(error))),
        // They are not: most likely the stream has one of the message ids already; or there are too
        // many batches of others, or it is full. Each member gets its own verdict.
        _ => {
            debug!(
                "a batch was refused, its members go by themselves: {}",
                exit::chain(&error)
            );
            Outcome::Alone
        }
    }
}
