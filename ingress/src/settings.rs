//! Ingress's own settings.
//!
//! Owns their names, defaults and meaning. Pure: nothing here reads the environment or a file.

use std::path::{Path, PathBuf};
use std::time::Duration;

use litestripe_contract::settings::{
    ADDRESS, Address, EventsSettings, Given, LogSettings, NatsSettings, Problems, Reader,
    TraceSettings, address, bytes, path,
};
use uuid::Uuid;

use crate::body::BUDGET_BYTES;
use crate::secret::{self, SecretSource};

mod event_types;

pub(crate) use event_types::EventTypes;

/// The smallest body limit, in bytes. Below it hardly any event would be accepted.
const BODY_LIMIT_MIN: usize = 1 << 10;

litestripe_contract::settings! {
    /// The settings that only ingress has.
    pub SETTINGS;

    UUID = "STRIPE_WEBHOOK_UUID", None,
        "the UUID in the hook's path, /ls/hook/UUID/ [required]";
    SECRET = secret::SETTING, None,
        "signing secret, whsec_…; several, comma-separated, while a secret is being rolled [or STRIPE_WEBHOOK_SECRET_FILE]";
    SECRET_FILE = secret::FILE_SETTING, Some("/run/secrets_djstripe/djstripe_webhook_secret"),
        "file with the signing secrets, used when STRIPE_WEBHOOK_SECRET is not set: every whsec_… in it; ingress waits for one at the start (10 tries, 2 s apart) and reads the file again when it changes";
    TOLERANCE = "STRIPE_WEBHOOK_TOLERANCE", Some("300"),
        "largest accepted age of a signature at receipt, in seconds; 0 accepts any";
    LISTEN = "LITESTRIPE_LISTEN", Some("127.0.0.1:8080"),
        "HTTP address: an IP or a host name, and a port";
    EVENT_TYPES = "LITESTRIPE_EVENT_TYPES", None,
        "event types that are stored, comma-separated, with * for any rest (v1.customer.subscription.*), or * for all; others are answered 200 and counted, but not stored [default: the types the worker handles, of snapshot and of thin events]";
    BODY_LIMIT = "LITESTRIPE_BODY_LIMIT", Some("1MiB"),
        "largest body accepted, 1KiB to 32MiB; lowered to the NATS server's max_payload less 16KiB when that is smaller";
    GROUP_COMMIT = "LITESTRIPE_GROUP_COMMIT", Some("auto"),
        "whether events that arrive together are stored in one batch: on, off, or auto, which tries both under load and groups unless that is clearly slower; needs NATS 2.12 and a stream with allow_atomic, which a new stream has";
}

/// All settings of ingress.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The UUID in the hook's path. It is only defence in depth, but still never logged.
    pub(crate) hook: HookId,
    pub(crate) secrets: SecretSource,
    /// How old a delivery's signature may be at receipt. Zero accepts any age.
    ///
    /// 300 s is the default of Stripe's own SDKs. Larger lets a captured delivery be replayed for
    /// longer.
    pub(crate) tolerance: Duration,
    pub listen: Address,
    pub(crate) event_types: EventTypes,
    pub(crate) body_limit: usize,
    pub(crate) group_commit: GroupCommit,
    pub(crate) nats: NatsSettings,
    /// The limits of the stream, if it has to be created.
    pub(crate) events: EventsSettings,
    pub log: LogSettings,
    /// `None` if no traces are sent.
    pub traces: Option<TraceSettings>,
}

/// The UUID in the hook's path.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct HookId(Uuid);

impl HookId {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        // Only the form with hyphens has 36 characters; `Uuid` also parses other forms.
        (text.len() == 36).then(|| Uuid::try_parse(text).ok().map(Self))?
    }
}

impl std::fmt::Debug for HookId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("HookId(…)")
    }
}

/// Whether events that wait for each other are stored in one batch, if the stream accepts batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GroupCommit {
    Auto,
    On,
    Off,
}

/// Reads the settings.
///
/// `holds_secret` says whether a secret file holds a secret now. A file without one is reported
/// only together with other problems, because the secret may still be written later. Otherwise
/// `holds_secret` is not called, because a pipe can be read only once.
pub fn read(given: Given, holds_secret: impl Fn(&Path) -> bool) -> Result<Settings, Problems> {
    let mut reader = Reader::new(given);
    let hook = reader.required(
        &UUID,
        "the UUID of the hook's path, 36 characters with hyphens",
        HookId::parse,
    );
    let (secrets, needed_file) = read_secrets(&mut reader);
    let tolerance_s: u32 =
        reader.defaulted(&TOLERANCE, "whole seconds", |value| value.parse().ok());
    let listen = reader.defaulted(&LISTEN, ADDRESS, address);
    let event_types = reader.optional(
        &EVENT_TYPES,
        "event types of Stripe such as customer.subscription.updated, comma-separated, each may end in .* for any rest, or *",
        EventTypes::parse,
    );
    let body_limit = reader.defaulted(&BODY_LIMIT, "a size from 1KiB to 32MiB", |value| {
        let limit = usize::try_from(bytes(value)?).ok()?;
        (BODY_LIMIT_MIN..=BUDGET_BYTES)
            .contains(&limit)
            .then_some(limit)
    });
    let group_commit = reader.defaulted(&GROUP_COMMIT, "auto, on or off", |value| match value {
        "auto" => Some(GroupCommit::Auto),
        "on" => Some(GroupCommit::On),
        "off" => Some(GroupCommit::Off),
        _ => None,
    });
    let nats = NatsSettings::read(&mut reader);
    let events = EventsSettings::read(&mut reader);
    let log = LogSettings::read(&mut reader);
    let traces = TraceSettings::read(&mut reader);
    let settings = hook.map(|hook| Settings {
        hook,
        secrets,
        tolerance: Duration::from_secs(tolerance_s.into()),
        listen,
        event_types: event_types.unwrap_or_else(EventTypes::handled),
        body_limit,
        group_commit,
        nats,
        events,
        log,
        traces,
    });
    reader.finish(settings).map_err(|Problems(mut problems)| {
        let lacking = needed_file.filter(|file| !holds_secret(file));
        problems.extend(lacking.map(|file| {
            format!(
                "{} is missing, and {} names {}, which contains none",
                SECRET.name,
                SECRET_FILE.name,
                file.display()
            )
        }));
        Problems(problems)
    })
}

/// Returns where the secrets come from, and the file that has to hold one.
fn read_secrets(reader: &mut Reader) -> (SecretSource, Option<PathBuf>) {
    let expected = "whsec_ and letters and digits, or several of them, comma-separated";
    let secrets = reader.optional(&SECRET, expected, secret::parse_list);
    let file: PathBuf = reader.defaulted(&SECRET_FILE, "a path", path);
    let needed_file = (!reader.is_given(&SECRET)).then(|| file.clone());
    (
        secrets.map_or(SecretSource::File(file), SecretSource::Given),
        needed_file,
    )
}

#[cfg(test)]
mod tests;
