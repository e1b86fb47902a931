//! The user's rights at the broker: those that a worker needs, and those that the server says the
//! user has. Pure, except for asking the server.
//!
//! The needed rights are the worker's of docs/permissions.md. Nothing is published to try them out:
//! whoever listens on the subject would hear it.

use litestripe_contract::event::HANDLED_TYPES;
use litestripe_contract::stream::Finding;
use litestripe_contract::subject::{
    DEAD_LETTERS_PREFIX, EVENTS_PREFIX, EVENTS_STREAM, KV_BUCKET, KV_STREAM, ORPHAN_CREATED,
    ORPHAN_RESOLVED, SUBSCRIPTION_CHANGED, WORKER_CONSUMER,
};
use serde::Deserialize;
use time::OffsetDateTime;

use super::{Line, finding};
use crate::settings::{LookupSettings, Settings};
use crate::start::broker::STREAMS;
use crate::stream::findings::covers;

const CHECK: &str = "rights";

/// The subject on which a server tells a user its own rights.
const ASK: &str = "$SYS.REQ.USER.INFO";

const READ_ACCOUNT: &str = "$JS.API.INFO";
const READ_STREAM: &str = "$JS.API.STREAM.INFO.";

/// The server's answer. It holds more, among it the user's name, which may be a token.
#[derive(Debug, Deserialize)]
pub(super) struct UserInfo {
    server: Server,
    data: User,
}

#[derive(Debug, Deserialize)]
struct Server {
    #[serde(default, with = "time::serde::rfc3339::option")]
    time: Option<OffsetDateTime>,
}

#[derive(Debug, Default, Deserialize)]
struct User {
    /// Absent if the user may do everything.
    #[serde(default)]
    permissions: Permissions,
}

#[derive(Debug, Default, Deserialize)]
struct Permissions {
    #[serde(default)]
    publish: Subjects,
}

/// What may be published: what `allow` covers, or everything if it is empty, except what `deny`
/// covers.
#[derive(Debug, Default, Deserialize)]
struct Subjects {
    #[serde(default)]
    allow: Vec<String>,
    #[serde(default)]
    deny: Vec<String>,
}

/// Asks the server. `None` if it does not answer, or the user may not ask.
pub(super) async fn ask(nats: &async_nats::Client) -> Option<UserInfo> {
    let answer = nats.request(ASK, bytes::Bytes::new()).await.ok()?;
    serde_json::from_slice(&answer.payload).ok()
}

/// The finding if the server was asked in vain.
pub(super) fn unknown() -> Finding {
    finding(
        "the NATS server does not say what this user may do",
        format!("allow it to publish to {ASK}"),
    )
}

/// Whether nothing can be said of the streams without this right.
pub(super) fn is_to_read(subject: &str) -> bool {
    subject == READ_ACCOUNT || subject.starts_with(READ_STREAM)
}

impl UserInfo {
    /// Returns the server's time.
    pub(super) fn time(&self) -> Option<OffsetDateTime> {
        self.server.time
    }

    /// Returns the subjects to which a worker with these settings publishes and this user may not.
    pub(super) fn lacking(&self, settings: &Settings) -> Vec<String> {
        let lookup = match &settings.lookup {
            LookupSettings::Nats { subject } => Some(subject.as_str()),
            _ => None,
        };
        self.data.permissions.publish.lacking(needed(lookup))
    }

    /// Judges the rights. `missing` are the streams that have to be created.
    pub(super) fn judge(&self, mut lacking: Vec<String>, missing: &[&str]) -> Line {
        let creating = missing
            .iter()
            .map(|name| Needed::one(format!("$JS.API.STREAM.CREATE.{name}")));
        lacking.extend(self.data.permissions.publish.lacking(creating));
        if lacking.is_empty() {
            return Line::ok(CHECK, "the user at NATS may do all that a worker does");
        }
        let subjects = lacking.join(", ");
        let what = format!("the user at NATS may not publish to {subjects}, as a worker does");
        Line::mend(
            CHECK,
            finding(what, "allow it, as docs/permissions.md does"),
        )
    }
}

impl Subjects {
    fn lacking(&self, needed: impl IntoIterator<Item = Needed>) -> Vec<String> {
        let lacks = |needed: &Needed| !needed.subjects.iter().all(|subject| self.allows(subject));
        let lacking = needed.into_iter().filter(lacks);
        lacking.map(|needed| needed.pattern).collect()
    }

    fn allows(&self, subject: &str) -> bool {
        let any_covers = |filters: &[String]| filters.iter().any(|filter| covers(filter, subject));
        (self.allow.is_empty() || any_covers(&self.allow)) && !any_covers(&self.deny)
    }
}

/// A right.
struct Needed {
    /// As it is written in a permission.
    pattern: String,
    /// Subjects that it has to cover.
    subjects: Vec<String>,
}

impl Needed {
    fn one(subject: impl Into<String>) -> Self {
        let subject = subject.into();
        Self {
            subjects: vec![subject.clone()],
            pattern: subject,
        }
    }

    /// The right to subjects that begin with `prefix`, tried on these ends.
    fn below(prefix: &str, ends: impl IntoIterator<Item = &'static str>) -> Self {
        let subject = |end| format!("{prefix}{end}");
        Self {
            pattern: format!("{prefix}>"),
            subjects: ends.into_iter().map(subject).collect(),
        }
    }
}

/// Returns what a worker needs once the streams exist.
fn needed(lookup: Option<&str>) -> Vec<Needed> {
    let own = [
        "litestripe.snapshot",
        "litestripe.resolution",
        "litestripe.erasure",
    ];
    let consumer = format!("{EVENTS_STREAM}.{WORKER_CONSUMER}");
    let key = format!("$KV.{KV_BUCKET}.");
    let direct = format!("$JS.API.DIRECT.GET.{KV_STREAM}.{key}");
    let mut needed = vec![
        Needed::below(EVENTS_PREFIX, HANDLED_TYPES.into_iter().chain(own)),
        Needed::below(DEAD_LETTERS_PREFIX, HANDLED_TYPES),
        Needed::below(&key, ["installation"]),
        Needed::below(&direct, ["installation"]),
        Needed::below(&format!("$JS.ACK.{consumer}."), ["1.1.1.1.1"]),
    ];
    let mut subjects = [
        SUBSCRIPTION_CHANGED,
        ORPHAN_CREATED,
        ORPHAN_RESOLVED,
        READ_ACCOUNT,
    ]
    .map(String::from)
    .to_vec();
    subjects.extend(lookup.map(String::from));
    subjects.extend(STREAMS.map(|name| format!("{READ_STREAM}{name}")));
    subjects.extend(
        ["STREAM.MSG.GET", "STREAM.MSG.DELETE", "STREAM.PURGE"]
            .map(|request| format!("$JS.API.{request}.{EVENTS_STREAM}")),
    );
    subjects.extend(
        ["CREATE", "INFO", "DELETE", "MSG.NEXT"]
            .map(|request| format!("$JS.API.CONSUMER.{request}.{consumer}")),
    );
    needed.extend(subjects.into_iter().map(Needed::one));
    needed
}

#[cfg(test)]
mod tests {
    use super::{Subjects, needed};

    /// The worker's of docs/permissions.md.
    const DOCUMENTED: [&str; 18] = [
        "stripe.events.>",
        "stripe.dead.>",
        "subscription.changed",
        "orphan.*",
        "app.users.known",
        "$JS.API.INFO",
        "$JS.API.STREAM.INFO.*",
        "$JS.API.STREAM.CREATE.*",
        "$JS.API.DIRECT.GET.>",
        "$JS.API.STREAM.MSG.GET.*",
        "$JS.API.CONSUMER.CREATE.STRIPE_EVENTS.*",
        "$JS.API.CONSUMER.INFO.STRIPE_EVENTS.*",
        "$JS.API.CONSUMER.MSG.NEXT.STRIPE_EVENTS.*",
        "$JS.API.STREAM.PURGE.STRIPE_EVENTS",
        "$JS.API.STREAM.MSG.DELETE.*",
        "$JS.API.CONSUMER.*.STRIPE_EVENTS.litestripe-worker",
        "$JS.ACK.STRIPE_EVENTS.litestripe-worker.>",
        "$KV.litestripe.>",
    ];

    #[test]
    fn lacking_right_is_named_and_nothing_else() {
        let check = |allow: &[&str], deny: &[&str], expected: &[&str]| {
            let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
            let subjects = Subjects {
                allow: texts(allow),
                deny: texts(deny),
            };
            assert_eq!(subjects.lacking(needed(Some("app.users.known"))), expected);
        };
        check(&[], &[], &[]);
        check(&DOCUMENTED, &[], &[]);
        check(
            &[">"],
            &["$JS.API.STREAM.PURGE.>"],
            &["$JS.API.STREAM.PURGE.STRIPE_EVENTS"],
        );
        check(&[], &["stripe.events.checkout.>"], &["stripe.events.>"]);
        check(&[], &["stripe.events.invoice.>"], &[]);
        for (without, lacking) in [
            ("stripe.dead.>", "stripe.dead.>"),
            ("app.users.known", "app.users.known"),
            (
                "$JS.ACK.STRIPE_EVENTS.litestripe-worker.>",
                "$JS.ACK.STRIPE_EVENTS.litestripe-worker.>",
            ),
            ("$KV.litestripe.>", "$KV.litestripe.>"),
            (
                "$JS.API.DIRECT.GET.>",
                "$JS.API.DIRECT.GET.KV_litestripe.$KV.litestripe.>",
            ),
        ] {
            let allow: Vec<_> = DOCUMENTED
                .into_iter()
                .filter(|right| *right != without)
                .collect();
            check(&allow, &[], &[lacking]);
        }
    }
}
