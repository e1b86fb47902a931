//! The streams: whether they are as the settings say, and how much room is left. Pure.
//!
//! What loses events whatever the settings say is found by `stream::findings`.

use std::time::Duration;

use async_nats::jetstream::account::Account;
use async_nats::jetstream::stream::{Config, DiscardPolicy, Info, StorageType};
use litestripe_contract::settings::{EVENTS_MAX_AGE, EVENTS_MAX_BYTES, STREAM_REPLICAS, Setting};
use litestripe_contract::stream::{self, Finding};
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM, KV_STREAM};

use super::finding;
use crate::settings::{
    DEAD_LETTERS_MAX_AGE, DEAD_LETTERS_MAX_BYTES, SIGNALS_MAX_AGE, SIGNALS_MAX_BYTES, Settings,
};
use crate::start::broker::STREAMS;
use crate::stream::room::{percent, storage_max, stream_max};

pub(super) const CHECK: &str = "streams";

/// How full a stream or an account may be, in percent. Above 80 % a worker purges applied events,
/// so that only events that are not applied fill the stream of events further.
const FULL: u64 = 90;

/// A stream as the settings say.
struct Wanted {
    config: Config,
    age: &'static Setting,
    bytes: &'static Setting,
    /// Whether the operator set its size, or the program may make it smaller.
    is_size_set: bool,
}

fn wanted(settings: &Settings) -> [Wanted; 3] {
    let (events, replicas) = (&settings.events, settings.events.replicas);
    let of = |config, age, bytes, is_size_set| Wanted {
        config,
        age,
        bytes,
        is_size_set,
    };
    [
        of(
            stream::events(events),
            &EVENTS_MAX_AGE,
            &EVENTS_MAX_BYTES,
            events.max_bytes_is_set,
        ),
        of(
            stream::signals(replicas, settings.signals, events.max_bytes),
            &SIGNALS_MAX_AGE,
            &SIGNALS_MAX_BYTES,
            settings.signals.max_bytes.is_some(),
        ),
        of(
            stream::dead_letters(replicas, settings.dead_letters, events.max_bytes),
            &DEAD_LETTERS_MAX_AGE,
            &DEAD_LETTERS_MAX_BYTES,
            settings.dead_letters.max_bytes.is_some(),
        ),
    ]
}

/// Returns what differs from the settings in the streams that exist, and which replicas are missing.
/// `is_cluster` says whether the broker is one.
pub(super) fn findings(settings: &Settings, streams: &[Info], is_cluster: bool) -> Vec<Finding> {
    let mut findings = Vec::new();
    for wanted in wanted(settings) {
        let found = streams
            .iter()
            .find(|found| found.config.name == wanted.config.name);
        findings.extend(
            found
                .into_iter()
                .flat_map(|found| wanted.differences(&found.config)),
        );
    }
    for stream in streams {
        findings.extend(in_memory(&stream.config));
        findings.extend(copied(&stream.config));
        findings.extend(replicas(
            settings.events.replicas,
            &stream.config,
            is_cluster,
        ));
        findings.extend(peers(stream));
    }
    findings
}

impl Wanted {
    fn differences(&self, found: &Config) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut differs =
            |what: &str, flag: &str, setting: &Setting, has: String, wanted: String| {
                let (name, setting) = (&found.name, setting.name);
                findings.push(finding(
                format!("the stream {name} {what} {has}, and {setting} says {wanted}"),
                format!(
                    "nats stream edit {name} --{flag}={wanted}, or set {setting} to what you mean"
                ),
            ));
            };
        if found.max_age != self.config.max_age {
            let has = if found.max_age.is_zero() {
                "ever".to_owned()
            } else {
                age(found.max_age)
            };
            differs(
                "keeps messages for",
                "max-age",
                self.age,
                has,
                age(self.config.max_age),
            );
        }
        // Without a size, the stream has a finding already.
        if self.is_size_set && found.max_bytes > 0 && found.max_bytes != self.config.max_bytes {
            let [has, wanted] =
                [found.max_bytes, self.config.max_bytes].map(|bytes| bytes.to_string());
            differs(
                "has room for a number of bytes of",
                "max-bytes",
                self.bytes,
                has,
                wanted,
            );
        }
        findings
    }
}

/// Formats an age as both our settings and the NATS CLI read it.
fn age(age: Duration) -> String {
    const DAY: u64 = 24 * 60 * 60;
    match age.as_secs() {
        0 => "0s".to_owned(),
        seconds if seconds.is_multiple_of(DAY) => format!("{}d", seconds / DAY),
        seconds if seconds.is_multiple_of(60 * 60) => format!("{}h", seconds / 60 / 60),
        seconds if seconds.is_multiple_of(60) => format!("{}m", seconds / 60),
        seconds => format!("{seconds}s"),
    }
}

fn in_memory(config: &Config) -> Option<Finding> {
    let name = &config.name;
    (config.storage == StorageType::Memory).then(|| {
        finding(
            format!(
                "the stream {name} is kept in memory, so that a restart of the NATS server loses it"
            ),
            format!("move its messages to a new {name} that Litestripe creates"),
        )
    })
}

/// Whoever may read the subject of the copies reads whole events.
fn copied(config: &Config) -> Option<Finding> {
    let name = &config.name;
    let holds_events = [EVENTS_STREAM, DEAD_LETTERS_STREAM].contains(&name.as_str());
    let copies = config.republish.as_ref().filter(|_| holds_events)?;
    let to = &copies.destination;
    Some(finding(
        format!(
            "the stream {name} copies its events to {to} (republish), with the personal data in them"
        ),
        format!("nats stream edit {name} --no-republish"),
    ))
}

fn replicas(wanted: usize, config: &Config, is_cluster: bool) -> Option<Finding> {
    let (name, has, setting) = (&config.name, config.num_replicas, STREAM_REPLICAS.name);
    if has < wanted {
        return Some(finding(
            format!("the stream {name} has {has} replicas, and {setting} says {wanted}"),
            format!("nats stream edit {name} --replicas={wanted}"),
        ));
    }
    (is_cluster && has < 2).then(|| {
        finding(
            format!(
                "the stream {name} is on one server of the cluster only, and is away when that is"
            ),
            format!("nats stream edit {name} --replicas=3, and set {setting}=3 for all programs"),
        )
    })
}

/// Servers of a stream that are down.
fn peers(stream: &Info) -> Vec<Finding> {
    let peers = stream.cluster.iter().flat_map(|cluster| &cluster.replicas);
    let offline = peers.filter(|peer| peer.offline);
    let down = |peer: &async_nats::jetstream::stream::PeerInfo| {
        finding(
            format!(
                "the replica of the stream {} on server {} is offline",
                stream.config.name, peer.name
            ),
            "start that server, or move the replica to another one",
        )
    };
    offline.map(down).collect()
}

/// Says that the streams are well.
pub(super) fn well(streams: &[Info]) -> String {
    if streams.len() == STREAMS.len() {
        "as the settings say".to_owned()
    } else {
        let exists = |name: &&str| streams.iter().any(|stream| stream.config.name == **name);
        let missing: Vec<_> = STREAMS.into_iter().filter(|name| !exists(name)).collect();
        let missing = missing.join(", ");
        format!("as the settings say; the programs create at their start: {missing}")
    }
}

/// Returns which streams are almost full, and whether the account has room for what it is to hold.
pub(super) fn room(settings: &Settings, streams: &[Info], account: &Account) -> Vec<Finding> {
    let mut findings: Vec<_> = streams.iter().filter_map(almost_full).collect();
    let Some(limit) = storage_max(account) else {
        return findings;
    };
    // A size that nobody set is made smaller until it fits.
    let missing = missing(settings, streams).filter(|wanted| wanted.is_size_set);
    let needed: u64 = missing
        .map(|wanted| wanted.config.max_bytes.unsigned_abs())
        .sum();
    let reserved = account.reserved_storage.max(account.storage);
    if reserved + needed > limit {
        let set = "LITESTRIPE_…_MAX_BYTES";
        findings.push(finding(
            format!(
                "the account at NATS has room for {limit} bytes, of which {reserved} are taken, and the streams to be created \
                 need {needed}"
            ),
            format!("raise the account's max_file, or set {set} to less"),
        ));
    } else if limit > 0 && percent(account.storage, limit) >= FULL {
        findings.push(finding(
            format!(
                "the account at NATS has room for {limit} bytes, of which {} are used",
                account.storage
            ),
            "raise the account's max_file",
        ));
    }
    findings
}

/// Returns what is not known of the room for streams that are missing beside `STRIPE_EVENTS`, which
/// may have taken all of it.
pub(super) fn unknown_room(
    settings: &Settings,
    streams: &[Info],
    account: &Account,
) -> Option<Finding> {
    let missing: Vec<_> = missing(settings, streams)
        .filter(|wanted| !wanted.is_size_set)
        .map(|wanted| wanted.config.name)
        .collect();
    let is_started = streams
        .iter()
        .any(|stream| stream.config.name == EVENTS_STREAM);
    if !is_started || missing.is_empty() || storage_max(account).is_some() {
        return None;
    }
    let (missing, reserved) = (missing.join(", "), account.reserved_storage);
    let bytes = EVENTS_MAX_BYTES.name;
    Some(finding(
        format!(
            "{missing} are to be created, and whether the NATS server has room for more than the {reserved} bytes that are \
             taken is not known"
        ),
        format!(
            "start a worker, which creates them; if it cannot: nats stream edit {EVENTS_STREAM} --max-bytes=SIZE, and set \
             {bytes} to the same size"
        ),
    ))
}

fn missing(settings: &Settings, streams: &[Info]) -> impl Iterator<Item = Wanted> {
    let exists = |name: &str| streams.iter().any(|stream| stream.config.name == name);
    wanted(settings)
        .into_iter()
        .filter(move |wanted| !exists(&wanted.config.name))
}

/// Signals drop their oldest when they are full, and the bucket's few keys do not grow.
fn almost_full(stream: &Info) -> Option<Finding> {
    let Config { name, discard, .. } = &stream.config;
    let full = percent_full(stream)?;
    let may_fill = *discard == DiscardPolicy::Old || name == KV_STREAM;
    (full >= FULL && !may_fill).then(|| {
        finding(
            format!("the stream {name} is {full} % full, and refuses messages when it is full"),
            format!(
                "see with `litestripe-worker status` what waits, and raise its size: nats stream edit {name} --max-bytes=SIZE"
            ),
        )
    })
}

/// Says how full the streams are.
pub(super) fn usage(streams: &[Info]) -> String {
    let usage = |stream: &Info| {
        Some(format!(
            "{} {} %",
            stream.config.name,
            percent_full(stream)?
        ))
    };
    let usage: Vec<_> = streams.iter().filter_map(usage).collect();
    if usage.is_empty() {
        "enough".to_owned()
    } else {
        format!("used: {}", usage.join(", "))
    }
}

fn percent_full(stream: &Info) -> Option<u64> {
    Some(percent(
        stream.state.bytes,
        stream_max(stream.config.max_bytes)?,
    ))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use async_nats::jetstream::stream::Config;

    use super::{age, replicas};

    #[test]
    fn stream_on_one_server_of_a_cluster_is_named() {
        let check = |wanted, has, is_cluster, said: Option<&str>| {
            let config = Config {
                name: "STRIPE_EVENTS".to_owned(),
                num_replicas: has,
                ..Config::default()
            };
            let found = replicas(wanted, &config, is_cluster).map(|found| found.mend);
            let is_said = found.as_deref().zip(said);
            assert_eq!(found.is_some(), said.is_some(), "{found:?}");
            assert!(
                is_said.is_none_or(|(mend, said)| mend.contains(said)),
                "{found:?}"
            );
        };
        check(1, 1, false, None);
        check(1, 1, true, Some("LITESTRIPE_STREAM_REPLICAS=3"));
        check(1, 3, true, None);
        check(3, 1, true, Some("--replicas=3"));
        check(3, 3, true, None);
    }

    #[test]
    fn age_is_written_as_the_settings_and_the_cli_read_it() {
        let hours = |hours: u64| Duration::from_secs(hours * 60 * 60);
        assert_eq!(age(hours(35 * 24)), "35d");
        assert_eq!(age(hours(36)), "36h");
        assert_eq!(age(Duration::from_secs(90)), "90s");
        assert_eq!(age(Duration::ZERO), "0s");
    }
}
