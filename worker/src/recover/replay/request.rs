//! What an operator wants replayed, and which events of the stream that comes down to.

use std::collections::BTreeSet;

use litestripe_contract::event::EventType;
use litestripe_contract::subject::EVENTS_STREAM;
use time::OffsetDateTime;

use super::{ReplayError, Replayer};
use crate::store::replay::Replay;
use crate::stream::{consumer, progress};

/// The longest name.
pub(super) const NAME_MAX: usize = 64;

/// Where a replay begins or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// At this sequence of the stream.
    Sequence(u64),
    /// At the first event that was stored at this time or later; as an end, before it.
    Time(OffsetDateTime),
}

/// Who is told what a replay changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Signals {
    /// Nobody, of events that are applied; of the others the workers will tell.
    None,
    /// Each row that changed, once, at the end, with its final state.
    Changed,
    /// These, and the rows that did not change under their existing revision.
    All,
}

impl Signals {
    fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Changed => "changed",
            Self::All => "all",
        }
    }

    pub(super) fn parse(text: &str) -> Self {
        [Self::None, Self::All].into_iter().find(|signals| signals.as_str() == text).unwrap_or(Self::Changed)
    }
}

/// What an operator wants replayed.
#[derive(Debug, Clone)]
pub struct Request {
    /// Under which name its position is kept.
    pub name: Option<String>,
    /// Where it begins: without, at the stream's first event.
    pub from: Option<Bound>,
    /// Where it ends: without, at the stream's last event.
    pub until: Option<Bound>,
    /// Only events of these types; all, if none is named.
    pub event_types: Vec<EventType>,
    /// Only events of this subscription.
    pub stripe_subscription_id: Option<String>,
    /// Who is told.
    pub signals: Signals,
}

impl Request {
    /// The name; empty for none.
    pub(super) fn name(&self) -> Result<String, ReplayError> {
        let fits = |name: &str| {
            (1..=NAME_MAX).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
        };
        match &self.name {
            None => Ok(String::new()),
            Some(name) if fits(name) => Ok(name.clone()),
            Some(_) => Err(ReplayError::Name),
        }
    }

    /// Each type once: JetStream refuses subjects that overlap.
    fn event_types(&self) -> Vec<String> {
        let types: BTreeSet<_> = self.event_types.iter().map(EventType::to_string).collect();
        types.into_iter().collect()
    }

    /// Whether `begun` is the same but for its bounds.
    pub(super) fn is(&self, begun: &Replay) -> bool {
        (self.event_types(), &self.stripe_subscription_id, self.signals.as_str())
            == (begun.event_types.clone(), &begun.stripe_subscription_id, &begun.signals)
    }
}

impl Replayer {
    /// What `request` comes down to. Nothing if the stream holds no such event.
    ///
    /// # Errors
    /// When the request cannot be met.
    pub async fn resolve(&self, request: &Request, now: OffsetDateTime) -> Result<Option<Replay>, ReplayError> {
        let name = request.name()?;
        let stream = self.jetstream.get_stream(EVENTS_STREAM).await;
        let stream = stream.map_err(|error| ReplayError::Broker(error.into()))?;
        let state = &stream.cached_info().state;
        let (first, last) = (state.first_sequence, state.last_sequence);
        let first_sequence = match request.from {
            None => first,
            Some(bound) => self.sequence(bound, first, last).await?.max(first),
        };
        let last_sequence = match request.until {
            None => last,
            Some(Bound::Time(time)) => self.sequence(Bound::Time(time), first, last).await?.saturating_sub(1),
            Some(bound) => self.sequence(bound, first, last).await?,
        };
        let last_sequence = match request.signals {
            // What it applied silently, a worker would merge to nothing, and nobody would ever be told.
            Signals::None => {
                let progress = progress::of_workers(&self.jetstream).await?;
                last_sequence.min(progress.map_or(0, |progress| progress.applied_until()))
            }
            Signals::Changed | Signals::All => last_sequence,
        };
        let is_backwards = match (request.from, request.until) {
            (Some(Bound::Sequence(from)), Some(Bound::Sequence(until))) => until < from,
            (Some(Bound::Time(from)), Some(Bound::Time(until))) => until < from,
            _ => false,
        };
        if is_backwards {
            return Err(ReplayError::Backwards { first: first_sequence, last: last_sequence });
        }
        let is_empty = state.messages == 0 || first_sequence > last_sequence;
        Ok((!is_empty).then(|| Replay {
            name,
            signals: request.signals.as_str().to_owned(),
            first_sequence,
            last_sequence,
            event_types: request.event_types(),
            stripe_subscription_id: request.stripe_subscription_id.clone(),
            started: now,
            beat: now,
        }))
    }

    async fn sequence(&self, bound: Bound, first: u64, last: u64) -> Result<u64, ReplayError> {
        match bound {
            Bound::Sequence(asked) if (first..=last).contains(&asked) => Ok(asked),
            Bound::Sequence(asked) => Err(ReplayError::NoSuchSequence { asked, first, last }),
            Bound::Time(time) => consumer::sequence_at(&self.jetstream, time).await.map_err(ReplayError::Broker),
        }
    }
}

/// What covers both, and tells whomever either was to tell.
pub(super) fn wider(begun: Replay, asked: Replay) -> Replay {
    let signals = Signals::parse(&begun.signals).max(Signals::parse(&asked.signals));
    let same_types = begun.event_types == asked.event_types;
    let same_subscription = begun.stripe_subscription_id == asked.stripe_subscription_id;
    Replay {
        signals: signals.as_str().to_owned(),
        first_sequence: begun.first_sequence.min(asked.first_sequence),
        last_sequence: begun.last_sequence.max(asked.last_sequence),
        event_types: if same_types { asked.event_types } else { Vec::new() },
        stripe_subscription_id: asked.stripe_subscription_id.filter(|_| same_subscription),
        started: begun.started,
        ..asked
    }
}
