//! What keeps existing streams and the durable consumer from their work.
//!
//! Owns what is wrong about a configuration that an operator, another program or an earlier version
//! made, and the command that mends it. Existing streams and consumers are never changed, except for
//! a consumer that is ahead of its stream (see `position`). The rules are pure: configuration in,
//! findings out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::consumer::{self, AckPolicy, DeliverPolicy};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy};
use async_nats::jetstream::{self};
use litestripe_contract::exit;
use litestripe_contract::stream::Finding;
use litestripe_contract::subject::{
    DEAD_LETTERS_PREFIX, DEAD_LETTERS_STREAM, EVENTS_PREFIX, EVENTS_STREAM, KV_STREAM,
    ORPHAN_CREATED, ORPHAN_RESOLVED, SIGNALS_STREAM, SUBSCRIPTION_CHANGED, WORKER_CONSUMER,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::position;
use super::seen::Seen;
use crate::health::{Problems, Readiness};
use crate::metrics;
use crate::wait::pause;

/// The part of the worker that the findings are reported for.
const PART: &str = "streams";

/// How often the broker is asked.
const READ_EVERY: Duration = Duration::from_secs(10);

/// The `max_payload` of a NATS server, unless it is configured. A stream need not accept larger
/// messages.
const MAX_PAYLOAD: i32 = 1 << 20;

/// Returns what should be changed in a stream.
type Of = fn(&stream::Config) -> Vec<Finding>;

/// The findings as a running worker sees them: each is logged once, and the worker is not ready
/// while there are any.
struct Watched {
    problems: Problems,
    last: Vec<Finding>,
}

/// Watches the streams until `shutdown`: shows their figures in the metrics, and reports what should
/// be changed. Once the worker consumes, a consumer that is ahead of its stream is made anew.
pub(crate) async fn watch(
    jetstream: jetstream::Context,
    readiness: Arc<Readiness>,
    shutdown: CancellationToken,
) {
    let mut watched = Watched {
        problems: readiness.problems.clone(),
        last: Vec::new(),
    };
    let mut waiting = None;
    loop {
        // Before that, the worker may belong to another broker, and the old position tells lost rows.
        if readiness.consuming.load(Ordering::Relaxed) {
            position::mend(&jetstream).await;
        }
        let seen = match Seen::read(&jetstream).await {
            Ok(seen) => Some(seen),
            Err(error) => {
                debug!("cannot read the streams: {}", exit::chain(error.as_ref()));
                None
            }
        };
        metrics::streams(seen.as_ref());
        match seen {
            Some(seen) => {
                waiting = None;
                watched.report(find(&seen));
            }
            None => {
                waiting.get_or_insert_with(|| metrics::BROKER.begin());
            }
        }
        if pause(READ_EVERY, &shutdown).await.is_none() {
            return;
        }
    }
}

impl Watched {
    /// Reports what has changed.
    fn report(&mut self, found: Vec<Finding>) {
        let text = |Finding { what, mend }: &Finding| format!("{what}: {mend}");
        let all: Vec<_> = found.iter().map(text).collect();
        match &all[..] {
            [] if self.last.is_empty() => {}
            [] => {
                info!("the streams and the consumer {WORKER_CONSUMER} are as needed again");
                self.problems.clear(PART);
            }
            all => self.problems.report(PART, all.join("; ")),
        }
        for new in found.iter().filter(|new| !self.last.contains(new)) {
            warn!("{}: {}", new.what, new.mend);
        }
        self.last = found;
    }
}

/// Returns what should be changed. What does not exist is created as needed, and has no findings.
pub(crate) fn find(seen: &Seen) -> Vec<Finding> {
    let of: [(&str, Of); 4] = [
        (EVENTS_STREAM, of_events),
        (SIGNALS_STREAM, of_signals),
        (DEAD_LETTERS_STREAM, of_dead_letters),
        (KV_STREAM, of_bucket),
    ];
    let streams = of
        .into_iter()
        .filter_map(|(name, of)| Some(of(&seen.stream(name)?.config)));
    let mut found: Vec<Finding> = streams.flatten().collect();
    if let Some(consumer) = &seen.consumer {
        found.extend(of_consumer(&consumer.config));
        found.extend(consumer.paused.then(paused));
        let end = seen.stream(EVENTS_STREAM);
        let end = end.map_or(u64::MAX, |events| events.state.last_sequence);
        found.extend(of_position(consumer.delivered.stream_sequence, end));
    }
    found
}

fn of_events(config: &stream::Config) -> Vec<Finding> {
    let mut rules = of_any(config, &[&format!("{EVENTS_PREFIX}>")]);
    rules.extend([
        (
            is_limited(config) && config.discard == DiscardPolicy::Old,
            "deletes old events when it is full, even if they are not applied yet",
            "--discard=new",
        ),
        (
            config.max_messages > 0 || config.max_messages_per_subject > 0,
            "limits the number of its messages",
            "--max-msgs=-1 --max-msgs-per-subject=-1",
        ),
        (
            config.deny_purge || config.deny_delete,
            "denies deletes or purges, so that nobody can be erased and it cannot be kept from filling up",
            NEW_STREAM,
        ),
    ]);
    findings(config, rules)
}

fn of_signals(config: &stream::Config) -> Vec<Finding> {
    let mut rules = of_any(
        config,
        &[SUBSCRIPTION_CHANGED, ORPHAN_CREATED, ORPHAN_RESOLVED],
    );
    rules.push((
        is_limited(config) && config.discard == DiscardPolicy::New,
        "refuses new signals when it is full",
        "--discard=old",
    ));
    findings(config, rules)
}

fn of_dead_letters(config: &stream::Config) -> Vec<Finding> {
    findings(
        config,
        of_any(config, &[&format!("{DEAD_LETTERS_PREFIX}>")]),
    )
}

fn of_bucket(config: &stream::Config) -> Vec<Finding> {
    let rule = (
        !config.max_age.is_zero(),
        "forgets its keys after a while, and with them to which installation it belongs",
        "--max-age=0",
    );
    findings(config, vec![rule])
}

/// Whether something is wrong, what, and the flags of `nats stream edit` that mend it.
type Rule = (bool, &'static str, &'static str);

/// What no flag can mend.
const NEW_STREAM: &str = "";

/// Returns the rules for every stream. `subjects` are those that it must hold.
fn of_any(config: &stream::Config, subjects: &[&str]) -> Vec<Rule> {
    let holds = |wanted: &&str| config.subjects.iter().any(|own| covers(own, wanted));
    vec![
        (
            config.no_ack,
            "confirms no message (no_ack), so that nobody knows what is stored",
            "--ack",
        ),
        (
            (1..MAX_PAYLOAD).contains(&config.max_message_size),
            "refuses some messages of less than 1 MiB (max_msg_size)",
            "--max-msg-size=-1",
        ),
        (
            config.sealed || config.mirror.is_some(),
            "accepts no messages: it is sealed or a mirror",
            NEW_STREAM,
        ),
        (
            config.mirror.is_none() && !subjects.iter().all(holds),
            "lacks subjects that it is for",
            "--subjects=…",
        ),
        (
            config.subject_transform.is_some(),
            "changes the subjects of its messages",
            NEW_STREAM,
        ),
        (
            config.retention != RetentionPolicy::Limits,
            "deletes messages once a consumer has acknowledged them, so that nothing can be replayed",
            NEW_STREAM,
        ),
    ]
}

/// Whether the subject `filter` covers `wanted`; both may have wildcards.
pub(crate) fn covers(filter: &str, wanted: &str) -> bool {
    let mut wanted = wanted.split('.');
    for token in filter.split('.') {
        match wanted.next() {
            Some(_) if token == ">" => return true,
            Some(other) if token == other || (token == "*" && other != ">") => {}
            _ => return false,
        }
    }
    wanted.next().is_none()
}

fn is_limited(config: &stream::Config) -> bool {
    config.max_bytes > 0 || config.max_messages > 0 || config.max_messages_per_subject > 0
}

fn findings(config: &stream::Config, rules: Vec<Rule>) -> Vec<Finding> {
    let name = &config.name;
    let finding = |(is_wrong, what, flags): Rule| {
        let mend = if flags == NEW_STREAM {
            format!("move its messages to a new {name} that Litestripe creates")
        } else {
            format!("nats stream edit {name} {flags}")
        };
        is_wrong.then(|| Finding {
            what: format!("the stream {name} {what}"),
            mend,
        })
    };
    rules.into_iter().filter_map(finding).collect()
}

fn of_consumer(config: &consumer::Config) -> Vec<Finding> {
    let all = format!("{EVENTS_PREFIX}>");
    let mut filters = config.filter_subjects.clone();
    filters.extend(Some(config.filter_subject.clone()).filter(|filter| !filter.is_empty()));
    let rules = [
        (
            config.deliver_subject.is_some(),
            "is a push consumer: workers cannot fetch from it",
        ),
        (
            config.ack_policy != AckPolicy::Explicit,
            "does not wait for each event's ack (ack_policy), so that events are lost when a worker stops",
        ),
        (
            config.max_deliver > 0,
            "gives up events after some deliveries (max_deliver)",
        ),
        (
            !filters.is_empty() && !filters.iter().any(|filter| covers(filter, &all)),
            "delivers only some subjects (filter_subject)",
        ),
        (
            config.deliver_policy != DeliverPolicy::All,
            "skips the events before some point (deliver_policy)",
        ),
        (config.headers_only, "delivers no bodies (headers_only)"),
        (
            config.priority_policy != consumer::PriorityPolicy::None,
            "needs a priority group (priority_policy)",
        ),
    ];
    let finding = |(is_wrong, what): (bool, &str)| is_wrong.then(|| consumer_finding(what));
    rules.into_iter().filter_map(finding).collect()
}

/// A consumer that is ahead of its stream skips the events in between once they arrive.
fn of_position(delivered: u64, end: u64) -> Option<Finding> {
    (delivered > end).then(|| {
        consumer_finding(&format!(
            "has delivered up to event {delivered}, and the stream ends at {end}: events up to there would be skipped"
        ))
    })
}

/// Only a request of an operator pauses it.
fn paused() -> Finding {
    Finding {
        mend: format!("nats consumer resume {EVENTS_STREAM} {WORKER_CONSUMER}"),
        ..consumer_finding("is paused, so that no event is applied")
    }
}

fn consumer_finding(what: &str) -> Finding {
    Finding {
        what: format!("the consumer {WORKER_CONSUMER} of {EVENTS_STREAM} {what}"),
        mend: format!(
            "nats consumer rm {EVENTS_STREAM} {WORKER_CONSUMER}; a worker creates it as needed, and applies all that \
             the stream holds again, to the same rows"
        ),
    }
}

#[cfg(test)]
mod tests;
