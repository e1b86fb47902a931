//! `doctor`: what is wrong with an installation, before Stripe notices.
//!
//! Owns what is examined, in which order, and how long that may take. Invariant: nothing is changed,
//! neither a stream nor a key, a table or a file. A part that cannot be used is one line, and what
//! needs it is skipped, so that one fault is one line. The rules are pure, and most are those by
//! which `run` and `status` find problems too.

use std::time::Duration;

use litestripe_contract::stream::Finding;
use litestripe_contract::{connect, exit};
use litestripe_domain::payment::ClientReferenceId;
use serde::Serialize;

use crate::clocks::{self, Reading};
use crate::installation::{self, InstallationError};
use crate::questions::lookup::Lookup;
use crate::settings::{LookupSettings, Settings, StripeSettings};
use crate::stripe::mode;

mod broker;
mod database;
mod endpoints;
mod monitoring;
mod rights;
mod spelling;
mod streams;
mod stripe;

use broker::Broker;
use database::{Database, Tables};

pub(crate) use monitoring::Monitoring;

/// How long one part may take to answer. There are two rounds: the parts, of which Stripe is asked
/// twice, and then what needs several of them.
const ANSWER_MAX: Duration = Duration::from_secs(6);

/// A client reference id that no application gives a user.
const NOBODY: &str = "litestripe-doctor-asks-for-nobody";

/// What was found about one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Line {
    pub(crate) state: State,
    /// The thing, such as `schema`.
    pub(crate) check: &'static str,
    pub(crate) what: String,
    /// What to do about it.
    pub(crate) mend: Option<String>,
}

/// Worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// Something has to be mended.
    Mend,
    /// It could not be found out.
    Unknown,
    Ok,
    /// It needs a setting that is not set, or a part that has to be mended first.
    Skipped,
}

impl State {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Mend => "mend",
            Self::Unknown => "unknown",
            Self::Ok => "ok",
            Self::Skipped => "skipped",
        }
    }
}

impl Line {
    fn new(state: State, check: &'static str, what: impl Into<String>) -> Self {
        Self {
            state,
            check,
            what: what.into(),
            mend: None,
        }
    }

    fn ok(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(State::Ok, check, what)
    }

    fn skipped(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(State::Skipped, check, what)
    }

    fn mend(check: &'static str, finding: impl Into<Finding>) -> Self {
        let Finding { what, mend } = finding.into();
        Self {
            mend: Some(mend),
            ..Self::new(State::Mend, check, what)
        }
    }

    fn unknown(check: &'static str, finding: Finding) -> Self {
        Self {
            state: State::Unknown,
            ..Self::mend(check, finding)
        }
    }

    /// Returns a line for each finding, or one that says that all is well.
    fn all(check: &'static str, findings: Vec<Finding>, well: impl Into<String>) -> Vec<Self> {
        if findings.is_empty() {
            return vec![Self::ok(check, well)];
        }
        let mend = |finding| Self::mend(check, finding);
        findings.into_iter().map(mend).collect()
    }
}

fn finding(what: impl Into<String>, mend: impl Into<String>) -> Finding {
    Finding {
        what: what.into(),
        mend: mend.into(),
    }
}

/// What an examination needs beside the settings.
#[derive(Debug)]
pub(crate) struct Given {
    /// The UUID in the hook's path. Without it, any UUID counts.
    pub(crate) hook: Option<String>,
    pub(crate) monitoring: Monitoring,
    /// The names of the variables of the environment and of `.env` that have a value.
    pub(crate) variables: Vec<String>,
}

/// Examines everything. Returns the lines, worst first.
///
/// Takes at most 30 s, whatever does not answer.
pub(crate) async fn examine(settings: &Settings, given: &Given) -> Vec<Line> {
    connect::install_crypto_provider();
    let (database, broker, stripe) = tokio::join!(
        database::examine(&settings.database),
        broker::examine(settings, &given.monitoring),
        stripe::examine(settings, given.hook.as_deref()),
    );
    let (belonging, lookup, mode) = tokio::join!(
        examine_installation(&database, &broker),
        examine_lookup(settings, &database, &broker),
        examine_mode(settings.stripe.as_ref(), &database),
    );
    let readings = [database.clock, broker.clock, stripe.clock];
    let mut lines = spelling::examine(&given.variables);
    lines.extend(examine_clocks(&Vec::from_iter(
        readings.into_iter().flatten(),
    )));
    lines.extend(broker.lines);
    lines.extend(database.lines);
    lines.extend(stripe.lines);
    lines.extend([belonging, mode, lookup].into_iter().flatten());
    lines.sort_by_key(|line| line.state);
    lines
}

fn examine_clocks(readings: &[Reading]) -> Vec<Line> {
    const CHECK: &str = "clocks";
    if readings.is_empty() {
        return vec![Line::skipped(CHECK, "no other clock can be read")];
    }
    let of = readings.iter().map(Reading::of);
    let agree = format!("agrees with {}", Vec::from_iter(of).join(", "));
    Line::all(
        CHECK,
        clocks::findings(readings),
        format!("this host's clock {agree}"),
    )
}

/// Whether database and broker belong together.
async fn examine_installation(database: &Database, broker: &Broker) -> Option<Line> {
    const CHECK: &str = "installation";
    let store = match &database.tables {
        Tables::Current(store) => Some(store),
        Tables::Missing => None,
        Tables::Behind | Tables::Unreachable => return Some(needs(CHECK, "the database")),
    };
    let Some(jetstream) = &broker.jetstream else {
        return Some(needs(CHECK, "the broker"));
    };
    if broker.lacks_rights {
        return Some(needs(CHECK, "the rights"));
    }
    let required = within(installation::require(store, jetstream)).await;
    Some(match required {
        Some(Ok(())) => Line::ok(CHECK, "database and broker belong together"),
        Some(Err(InstallationError::Split(split))) => Line::mend(CHECK, split),
        Some(Err(error)) => Line::unknown(CHECK, finding(exit::chain(&error), "try again")),
        None => Line::unknown(CHECK, finding("no answer in time", "try again")),
    })
}

/// Whether the key is of the rows' mode. Without rows there is nothing to say.
async fn examine_mode(stripe: Option<&StripeSettings>, database: &Database) -> Option<Line> {
    const CHECK: &str = "key's mode";
    let (stripe, Tables::Current(store)) = (stripe?, &database.tables) else {
        return None;
    };
    let key = mode::mode_name(stripe.is_live());
    match within(mode::find_mismatch(store, stripe)).await {
        Some(Ok(Some(mismatch))) => Some(Line::mend(CHECK, mismatch)),
        Some(Ok(None)) => Some(Line::ok(
            CHECK,
            format!("{key} mode, like the rows if there are any"),
        )),
        Some(Err(error)) => {
            let what = format!("cannot read the rows' mode: {}", exit::chain(&error));
            Some(Line::unknown(CHECK, finding(what, "try again")))
        }
        None => Some(Line::unknown(
            CHECK,
            finding("no answer in time", "try again"),
        )),
    }
}

/// Whether the application answers whether a client reference id is a user's.
async fn examine_lookup(settings: &Settings, database: &Database, broker: &Broker) -> Option<Line> {
    const CHECK: &str = "user lookup";
    let mend = match &settings.lookup {
        LookupSettings::None => {
            return Some(Line::skipped(
                CHECK,
                "LITESTRIPE_USER_LOOKUP is none: every id is a user's",
            ));
        }
        LookupSettings::Sql { .. } if matches!(database.tables, Tables::Unreachable) => {
            return Some(needs(CHECK, "the database"));
        }
        LookupSettings::Nats { .. } if broker.lacks_rights => {
            return Some(needs(CHECK, "the rights"));
        }
        LookupSettings::Sql { .. } => {
            "check the query of LITESTRIPE_USER_LOOKUP, and LITESTRIPE_USER_DATABASE_URL"
        }
        LookupSettings::Nats { .. } => {
            "start the application that answers, and check the subject of LITESTRIPE_USER_LOOKUP"
        }
    };
    let Some(nats) = &broker.nats else {
        return Some(needs(CHECK, "the broker"));
    };
    let lookup = Lookup::new(&settings.lookup, nats);
    Some(
        match within(lookup.knows(ClientReferenceId(NOBODY))).await {
            Some(Ok(false)) => Line::ok(
                CHECK,
                "it answers, and does not know a user whom nobody has",
            ),
            Some(Ok(true)) => Line::mend(
                CHECK,
                finding(
                    "it knows a user whom nobody has: it seems to know every id, and then no payment becomes an orphan",
                    "let its answer depend on the client reference id",
                ),
            ),
            Some(Err(error)) => Line::mend(CHECK, finding(exit::chain(&error), mend)),
            None => Line::mend(CHECK, finding("it does not answer in time", mend)),
        },
    )
}

fn needs(check: &'static str, part: &str) -> Line {
    Line::skipped(check, format!("needs {part}"))
}

/// Returns the answer, or `None` if it does not come in time.
async fn within<T>(answer: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(ANSWER_MAX, answer).await.ok()
}
