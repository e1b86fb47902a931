//! The operator's request for a replay, and the range of events that it resolves to.

use std::collections::BTreeSet;

use litestripe_contract::event::EventType;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_domain::arrival::StreamId;
use time::OffsetDateTime;

use super::{ReplayError, Replayer};
use crate::store::replay::Replay;
use crate::stream::{consumer, progress};

/// Where a replay begins or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    Sequence(u64),
    /// As a start, the first event stored at this time or later. As an end, the event before it.
    Time(OffsetDateTime),
}

/// Whether subscribers receive signals of the rows that a replay changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum Signals {
    /// No signals. The replay ends before the first event that the workers have not applied yet,
    /// because they signal that one and the later ones themselves.
    None,
    /// One signal for each changed row, at the end, with its final state.
    Changed,
}

impl Signals {
    fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Changed => "changed",
        }
    }

    /// Parses a replay's column. `all`, which the version before wrote, counts as `changed`.
    pub(super) fn parse(text: &str) -> Self {
        if text == Self::None.as_str() {
            Self::None
        } else {
            Self::Changed
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Where the replay begins. `None`: at the stream's first event.
    pub from: Option<Bound>,
    /// Where the replay ends. `None`: at the stream's last event.
    pub until: Option<Bound>,
    /// The event types to replay. Empty: all types.
    pub event_types: Vec<EventType>,
    pub stripe_subscription_id: Option<String>,
    pub signals: Signals,
}

impl Request {
    /// Whether it asks for everything that the stream holds.
    pub(super) fn covers_stream(&self) -> bool {
        let Self {
            from,
            until,
            event_types,
            stripe_subscription_id,
            signals: _,
        } = self;
        (from, until, stripe_subscription_id) == (&None, &None, &None) && event_types.is_empty()
    }
}

impl Replayer {
    /// Resolves `request` to a range of events. Returns `None` if the stream holds no such event.
    pub(crate) async fn resolve(
        &self,
        request: &Request,
        now: OffsetDateTime,
    ) -> Result<Option<Replay>, ReplayError> {
        let stream = self.jetstream.get_stream(EVENTS_STREAM).await;
        let stream = stream.map_err(|error| ReplayError::Broker(error.into()))?;
        let info = stream.cached_info();
        let state = &info.state;
        let (first, last) = (state.first_sequence, state.last_sequence);
        let first_sequence = match request.from {
            None => first,
            Some(bound) => self.sequence(bound, first, last).await?.max(first),
        };
        let mut last_sequence = match request.until {
            None => last,
            Some(Bound::Time(time)) => self
                .sequence(Bound::Time(time), first, last)
                .await?
                .saturating_sub(1),
            Some(bound) => self.sequence(bound, first, last).await?,
        };
        if request.signals == Signals::None {
            // If it applied an event first, without a signal, the worker's merge of that event
            // would change nothing, and the change would never be signalled.
            let applied_until = progress::applied_until(&self.jetstream).await?;
            last_sequence = last_sequence.min(applied_until.unwrap_or(0));
        }
        let is_backwards = match (request.from, request.until) {
            (Some(Bound::Sequence(from)), Some(Bound::Sequence(until))) => until < from,
            (Some(Bound::Time(from)), Some(Bound::Time(until))) => until < from,
            _ => false,
        };
        if is_backwards {
            return Err(ReplayError::Backwards {
                first: first_sequence,
                last: last_sequence,
            });
        }
        let is_empty = state.messages == 0 || first_sequence > last_sequence;
        // Without duplicates: JetStream refuses overlapping subjects.
        let event_types: BTreeSet<_> = request
            .event_types
            .iter()
            .map(EventType::to_string)
            .collect();
        Ok((!is_empty).then(|| Replay {
            name: String::new(),
            signals: request.signals.as_str().to_owned(),
            stream: Some(StreamId::from_created(info.created)),
            first_sequence,
            last_sequence,
            event_types: event_types.into_iter().collect(),
            stripe_subscription_id: request.stripe_subscription_id.clone(),
            started: now,
            heartbeat: now,
        }))
    }

    async fn sequence(&self, bound: Bound, first: u64, last: u64) -> Result<u64, ReplayError> {
        match bound {
            Bound::Sequence(asked) if (first..=last).contains(&asked) => Ok(asked),
            Bound::Sequence(asked) => Err(ReplayError::NoSuchSequence { asked, first, last }),
            Bound::Time(time) => consumer::sequence_at(&self.jetstream, time)
                .await
                .map_err(ReplayError::Broker),
        }
    }
}

/// Returns a replay that covers both, and that sends signals if either was to send them.
pub(super) fn union(begun: Replay, asked: Replay) -> Replay {
    let signals = Signals::parse(&begun.signals).max(Signals::parse(&asked.signals));
    let same_types = begun.event_types == asked.event_types;
    let same_subscription = begun.stripe_subscription_id == asked.stripe_subscription_id;
    Replay {
        signals: signals.as_str().to_owned(),
        first_sequence: begun.first_sequence.min(asked.first_sequence),
        last_sequence: begun.last_sequence.max(asked.last_sequence),
        event_types: if same_types {
            asked.event_types
        } else {
            Vec::new()
        },
        stripe_subscription_id: asked.stripe_subscription_id.filter(|_| same_subscription),
        started: begun.started,
        ..asked
    }
}

/// Whether `replay`, which covers `begun`, may resume from its position: they differ only in the
/// end.
pub(super) fn is_continuation(begun: &Replay, replay: &Replay) -> bool {
    begun.name.is_empty()
        && *replay
            == Replay {
                last_sequence: replay.last_sequence,
                heartbeat: replay.heartbeat,
                ..begun.clone()
            }
}
