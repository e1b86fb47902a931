//! The broker: whether it answers, which rights the user has, and what it says of the streams.

use async_nats::jetstream::stream::Info;
use async_nats::jetstream::{self};
use litestripe_contract::stream::Finding;
use litestripe_contract::{connect, exit};

use super::monitoring::Monitoring;
use super::rights::{self, UserInfo};
use super::{Line, finding, monitoring, needs, streams, within};
use crate::clocks::{self, Reading};
use crate::settings::Settings;
use crate::start::broker::{STREAMS, get_stream};
use crate::start::parts::{self, StartError};
use crate::stream::findings;
use crate::stream::seen::Seen;

/// The name of the connection at the NATS server.
const NAME: &str = "litestripe-worker doctor";

const CHECK: &str = "broker";
const JETSTREAM: &str = "JetStream";
const RIGHTS: &str = "rights";
const ROOM: &str = "room";

/// The broker as it was found.
#[derive(Default)]
pub(super) struct Broker {
    pub(super) lines: Vec<Line>,
    pub(super) clock: Option<Reading>,
    /// Whether the user lacks rights that are known to be needed.
    pub(super) lacks_rights: bool,
    /// `None` if it cannot be used.
    pub(super) nats: Option<async_nats::Client>,
    /// `None` if it cannot be used.
    pub(super) jetstream: Option<jetstream::Context>,
}

pub(super) async fn examine(settings: &Settings, monitoring: &Monitoring) -> Broker {
    let mut broker = Broker::default();
    let nats = match parts::connect_within(settings, NAME).await {
        Ok(nats) => nats,
        Err(error) => {
            broker.lines.push(Line::mend(CHECK, unreachable(error)));
            let others = [RIGHTS, JETSTREAM, streams::CHECK, ROOM, monitoring::CHECK];
            broker
                .lines
                .extend(others.map(|check| needs(check, "the broker")));
            return broker;
        }
    };
    let answers = format!("NATS answers at {}", settings.nats.hosts());
    broker.lines.push(Line::ok(CHECK, answers));
    let (disk, ()) = tokio::join!(
        monitoring::examine(monitoring, &settings.nats, &nats),
        broker.examine_account(settings, &nats),
    );
    broker.lines.push(disk);
    broker.nats = Some(nats);
    broker
}

fn unreachable(error: StartError) -> Finding {
    match error {
        StartError::Unreachable(unreachable) => unreachable.into(),
        error => finding(
            exit::chain(&error),
            "correct that file, or the setting that names it",
        ),
    }
}

impl Broker {
    /// Examines what the user may do and what its account holds.
    async fn examine_account(&mut self, settings: &Settings, nats: &async_nats::Client) {
        let jetstream = connect::jetstream(nats.clone());
        let mut user = None;
        let asked = async {
            user = rights::ask(nats).await;
            user.as_ref().and_then(UserInfo::time)
        };
        self.clock = Reading::take(clocks::BROKER, asked).await;
        if self.clock.is_none()
            && let Some(error) = connect::inbox_refusal(&settings.nats, NAME).await
        {
            self.lacks_rights = true;
            self.lines.push(Line::mend(RIGHTS, no_inbox(&error)));
            let skipped = [JETSTREAM, streams::CHECK, ROOM];
            self.lines
                .extend(skipped.map(|check| needs(check, "the rights")));
            return;
        }
        if self.clock.is_none() {
            self.clock = clocks::read_broker(&jetstream).await;
        }
        let lacking = user
            .as_ref()
            .map(|user| user.lacking(settings))
            .unwrap_or_default();
        self.lacks_rights = !lacking.is_empty();
        let mut missing = Vec::new();
        if lacking.iter().any(|subject| rights::is_to_read(subject)) {
            let skipped = [JETSTREAM, streams::CHECK, ROOM];
            self.lines
                .extend(skipped.map(|check| needs(check, "the rights")));
        } else {
            let read = within(read(&jetstream)).await;
            match read.unwrap_or_else(|| Err("it does not answer in time".to_owned())) {
                Ok(found) => {
                    missing.extend(found.missing());
                    self.lines.extend(found.judge(settings, &jetstream));
                    self.jetstream = Some(jetstream);
                }
                Err(reason) => {
                    self.lines.push(Line::mend(JETSTREAM, unusable(&reason)));
                    let skipped = [streams::CHECK, ROOM];
                    self.lines
                        .extend(skipped.map(|check| needs(check, "JetStream")));
                }
            }
        }
        self.lines.push(match user {
            None => Line::unknown(RIGHTS, rights::unknown()),
            Some(user) => user.judge(lacking, &missing),
        });
    }
}

fn no_inbox(error: &str) -> Finding {
    finding(
        format!("the user at NATS gets no answers: {error}"),
        "set NATS_INBOX_PREFIX to the prefix below which this user may subscribe (docs/permissions.md#inboxes)",
    )
}

fn unusable(reason: &str) -> Finding {
    finding(
        format!("JetStream cannot be used: {reason}"),
        "enable JetStream on the NATS server and for this account; docs/permissions.md lists the rights that are needed",
    )
}

/// What JetStream says.
struct Found {
    streams: Vec<Info>,
    account: jetstream::account::Account,
    /// What `run` and `status` report of the streams too.
    findings: Vec<Finding>,
}

impl Found {
    fn judge(self, settings: &Settings, jetstream: &jetstream::Context) -> Vec<Line> {
        let Self {
            streams,
            account,
            mut findings,
        } = self;
        let is_cluster = jetstream.client().server_info().cluster.is_some();
        findings.extend(streams::findings(settings, &streams, is_cluster));
        let room = streams::room(settings, &streams, &account);
        let mut lines = vec![Line::ok(JETSTREAM, "the account may use it")];
        lines.extend(Line::all(streams::CHECK, findings, streams::well(&streams)));
        lines.extend(match streams::unknown_room(settings, &streams, &account) {
            Some(unknown) if room.is_empty() => vec![Line::unknown(ROOM, unknown)],
            _ => Line::all(ROOM, room, streams::usage(&streams)),
        });
        lines
    }

    fn missing(&self) -> impl Iterator<Item = &'static str> {
        let exists = |name: &&str| {
            self.streams
                .iter()
                .any(|stream| stream.config.name == **name)
        };
        STREAMS.into_iter().filter(move |name| !exists(name))
    }
}

async fn read(jetstream: &jetstream::Context) -> Result<Found, String> {
    let account = jetstream.query_account().await;
    let account = account.map_err(|error| exit::chain(&error))?;
    let mut streams = Vec::new();
    for name in STREAMS {
        let stream = get_stream(jetstream, name).await;
        let stream = stream.map_err(|error| format!("{name}: {}", exit::chain(&error)))?;
        streams.extend(stream.map(|stream| stream.cached_info().clone()));
    }
    let seen = Seen::read(jetstream).await;
    let mut findings = findings::find(&seen.map_err(|error| exit::chain(error.as_ref()))?);
    let configs = streams.iter().map(|stream| &stream.config);
    findings.extend(configs.flat_map(crate::start::broker::findings));
    Ok(Found {
        streams,
        account,
        findings,
    })
}
