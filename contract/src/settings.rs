//! Settings: a constant for each, and a reader that turns texts into values or into *all* problems.
//!
//! Owns how a setting is named, given and refused, and the settings that both programs take. Every
//! setting is an opaque text until a program's own reader has looked at it: an argument parser's
//! message would print the malformed value, and a value may hold a password. Nothing below `main`
//! reads the environment.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::ServerAddr;
use clap::{Arg, ArgMatches, Command};
use secrecy::SecretString;

/// Settings and the list of them: each is a constant, so that its name is written once.
#[macro_export]
macro_rules! settings {
    ($(#[$list_doc:meta])* $list_vis:vis $list:ident;
     $($(#[$doc:meta])* $vis:vis $setting:ident = $name:expr, $default:expr, $help:expr;)+) => {
        $(
            $(#[$doc])*
            $vis const $setting: $crate::settings::Setting =
                $crate::settings::Setting { name: $name, default: $default, help: $help };
        )+
        $(#[$list_doc])*
        $list_vis const $list: &[$crate::settings::Setting] = &[$($setting),+];
    };
}

/// One setting: an environment variable, and a flag of the same name in kebab case.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub name: &'static str,
    /// What it is when it is not given. An empty value counts as not given.
    pub default: Option<&'static str>,
    /// What it means, in one or two sentences, without the default.
    pub help: &'static str,
}

impl Setting {
    /// The flag: `LITESTRIPE_LISTEN` is `--litestripe-listen`.
    pub fn flag(&self) -> String {
        self.name.to_ascii_lowercase().replace('_', "-")
    }
}

settings! {
    /// Settings of both programs.
    pub SHARED;

    NATS_URL = "NATS_URL", Some("nats://127.0.0.1:4222"),
        "URLs of the NATS servers, comma-separated";
    pub(crate) NATS_CREDS = "NATS_CREDS", None,
        "file with NATS credentials (JWT and nkey seed)";
    pub(crate) NATS_NKEY_SEED_FILE = "NATS_NKEY_SEED_FILE", None,
        "file with an nkey seed, to authenticate at NATS";
    NATS_USER = "NATS_USER", None,
        "user at NATS; goes with NATS_PASSWORD";
    NATS_PASSWORD = "NATS_PASSWORD", None,
        "password at NATS; goes with NATS_USER";
    pub(crate) NATS_TLS_CA = "NATS_TLS_CA", None,
        "file with the CA certificates to verify the NATS servers with; makes TLS required";
    pub(crate) NATS_TLS_CERT = "NATS_TLS_CERT", None,
        "file with the client certificate for NATS; goes with NATS_TLS_KEY";
    pub(crate) NATS_TLS_KEY = "NATS_TLS_KEY", None,
        "file with the private key of NATS_TLS_CERT";
    STREAM_REPLICAS = "LITESTRIPE_STREAM_REPLICAS", Some("1"),
        "replicas of each stream on a NATS cluster: 1, 3 or 5";
    EVENTS_MAX_AGE = "LITESTRIPE_EVENTS_MAX_AGE", Some("35d"),
        "how long the stream STRIPE_EVENTS keeps raw events; Stripe itself keeps them 30 days";
    EVENTS_MAX_BYTES = "LITESTRIPE_EVENTS_MAX_BYTES", Some("10GiB"),
        "size at which STRIPE_EVENTS refuses new events; if unset and the server has less storage, the default is halved until it fits, down to 256MiB";
    LOG_FILTER = "RUST_LOG", Some("info"),
        "log filter: a level such as info or debug, or one per module (litestripe_worker=debug)";
    LOG_FORMAT = "LITESTRIPE_LOG_FORMAT", Some("text"),
        "log format: text or json";
}

/// `command` with a flag and an environment variable for each of `settings`.
///
/// The value of a variable is never shown in `--help`: it may be a secret.
pub fn declare(command: Command, settings: &'static [Setting]) -> Command {
    settings.iter().fold(command, |command, setting| {
        let help = match setting.default {
            Some(default) => format!("{} [default: {default}]", setting.help),
            None => setting.help.to_owned(),
        };
        let arg = Arg::new(setting.name)
            .long(setting.flag())
            .env(setting.name)
            .hide_env_values(true)
            .value_name("VALUE")
            .help(help)
            .help_heading("Settings")
            .global(true);
        command.arg(arg)
    })
}

/// Reads `.env` in the working directory into the environment, where a variable is not set yet.
pub fn dotenv() -> Result<(), Problems> {
    match dotenvy::from_path(".env") {
        Ok(()) => Ok(()),
        Err(error) if error.not_found() => Ok(()),
        // Its own text would print the line, which may hold a secret.
        Err(dotenvy::Error::LineParse(..)) => Err(Problems(vec![
            ".env has a line that is not NAME=value".to_owned(),
        ])),
        Err(error) => Err(Problems(vec![format!(".env cannot be read: {error}")])),
    }
}

/// The texts that were given, by setting.
#[derive(Default)]
pub struct Given(BTreeMap<&'static str, String>);

impl Given {
    /// What the command line and the environment gave for `settings`.
    pub fn from_matches(matches: &ArgMatches, settings: &[&'static [Setting]]) -> Self {
        let all = settings.iter().copied().flatten();
        Self(
            all.filter_map(|setting| {
                Some((
                    setting.name,
                    matches.get_one::<String>(setting.name)?.clone(),
                ))
            })
            .collect(),
        )
    }
}

impl FromIterator<(&'static str, String)> for Given {
    fn from_iter<I: IntoIterator<Item = (&'static str, String)>>(texts: I) -> Self {
        Self(texts.into_iter().collect())
    }
}

/// Everything that is wrong with the settings, a line each, without the values.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<String>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the settings cannot be used:")?;
        self.0
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

/// Reads settings one by one and remembers each problem, so that all are reported at once.
pub struct Reader {
    given: Given,
    problems: Vec<String>,
}

impl Reader {
    /// A reader of `given`.
    pub fn new(given: Given) -> Self {
        Self {
            given,
            problems: Vec::new(),
        }
    }

    /// Whether `setting` was given, rather than left to its default.
    pub fn is_given(&self, setting: &Setting) -> bool {
        self.text(setting).is_some()
    }

    /// The value of a setting without a default, if it was given. `expected` says what it must be.
    pub fn optional<T>(
        &mut self,
        setting: &Setting,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = self.text(setting)?;
        let value = parse(text);
        if value.is_none() {
            self.problem(setting, format!("must be {expected}"));
        }
        value
    }

    /// The value of a setting that has a default.
    ///
    /// # Panics
    /// When the setting has no default or `parse` refuses it: a test of each program rules it out.
    pub fn defaulted<T>(
        &mut self,
        setting: &Setting,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> T {
        self.optional(setting, expected, &parse)
            .or_else(|| parse(setting.default?))
            .expect("a default is a valid value of its setting")
    }

    /// The value of a setting that must be given.
    pub fn required<T>(
        &mut self,
        setting: &Setting,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        if !self.is_given(setting) {
            self.problem(setting, format!("is missing: set it to {expected}"));
        }
        self.optional(setting, expected, parse)
    }

    /// Remembers what is wrong with `setting`. `what` continues the sentence and holds no value.
    pub fn problem(&mut self, setting: &Setting, what: impl fmt::Display) {
        self.problems.push(format!("{} {what}", setting.name));
    }

    /// The settings read, if nothing was wrong with any.
    pub fn finish<T>(self, settings: Option<T>) -> Result<T, Problems> {
        match settings {
            Some(settings) if self.problems.is_empty() => Ok(settings),
            _ => Err(Problems(self.problems)),
        }
    }

    fn text(&self, setting: &Setting) -> Option<&str> {
        self.given
            .0
            .get(setting.name)
            .map(|text| text.trim())
            .filter(|text| !text.is_empty())
    }
}

/// A text as it stands.
pub fn text(value: &str) -> Option<String> {
    Some(value.to_owned())
}

/// A secret text.
pub fn secret(value: &str) -> Option<SecretString> {
    Some(SecretString::from(value))
}

/// A path.
pub fn path(value: &str) -> Option<PathBuf> {
    Some(PathBuf::from(value))
}

/// `true` or `false`.
pub fn flag(value: &str) -> Option<bool> {
    value.to_ascii_lowercase().parse().ok()
}

/// What [`duration`] expects.
pub const DURATION: &str = "a time such as 30s, 10m, 2h or 35d";

/// A duration as people write it.
pub fn duration(value: &str) -> Option<Duration> {
    humantime::parse_duration(value).ok()
}

/// What [`bytes`] expects.
pub const BYTES: &str = "a size such as 512KiB, 1MiB or 10GiB";

/// A size in bytes as people write it.
pub fn bytes(value: &str) -> Option<u64> {
    value
        .parse::<bytesize::ByteSize>()
        .ok()
        .map(|size| size.as_u64())
}

/// What [`address`] expects.
pub const ADDRESS: &str = "an address such as 127.0.0.1:8080";

/// An address to listen on.
pub fn address(value: &str) -> Option<std::net::SocketAddr> {
    value.parse().ok()
}

/// How to reach NATS.
#[derive(Debug, Clone)]
pub struct NatsSettings {
    /// The servers, each a URL. May hold passwords: never print them, see [`NatsSettings::hosts`].
    pub servers: Vec<ServerAddr>,
    pub identity: Identity,
    /// The CA certificates that servers must have. Makes TLS required.
    pub tls_ca: Option<PathBuf>,
    pub tls_client: Option<(PathBuf, PathBuf)>,
}

/// Who we are to NATS.
#[derive(Debug, Clone)]
pub enum Identity {
    Anonymous,
    Credentials(PathBuf),
    Nkey(PathBuf),
    Password(String, SecretString),
}

impl NatsSettings {
    /// The servers without user or password, for people.
    pub fn hosts(&self) -> String {
        let hosts: Vec<_> = self
            .servers
            .iter()
            .map(|server| format!("{}:{}", server.host(), server.port()))
            .collect();
        hosts.join(", ")
    }

    /// Reads the settings that say how to reach NATS.
    pub fn read(reader: &mut Reader) -> Option<Self> {
        let servers = reader.defaulted(
            &NATS_URL,
            "one or more URLs such as nats://127.0.0.1:4222",
            |value| {
                // A host that is missing, as after a last comma, would be taken for an empty name.
                let server = |url: &str| {
                    url.trim()
                        .parse::<ServerAddr>()
                        .ok()
                        .filter(|server| !server.host().is_empty())
                };
                value.split(',').map(server).collect::<Option<Vec<_>>>()
            },
        );
        let identity = Identity::read(reader);
        let tls_client = read_certificate(reader);
        let tls_ca = reader.optional(&NATS_TLS_CA, "a path", path);
        Some(Self {
            servers,
            identity: identity?,
            tls_ca,
            tls_client,
        })
    }
}

fn read_certificate(reader: &mut Reader) -> Option<(PathBuf, PathBuf)> {
    let certificate = reader.optional(&NATS_TLS_CERT, "a path", path);
    let key = reader.optional(&NATS_TLS_KEY, "a path", path);
    if certificate.is_some() != key.is_some() {
        let missing = if key.is_none() {
            &NATS_TLS_KEY
        } else {
            &NATS_TLS_CERT
        };
        reader.problem(
            missing,
            "is missing: NATS_TLS_CERT and NATS_TLS_KEY go together",
        );
    }
    certificate.zip(key)
}

impl Identity {
    fn read(reader: &mut Reader) -> Option<Self> {
        let credentials = reader.optional(&NATS_CREDS, "a path", path);
        let nkey = reader.optional(&NATS_NKEY_SEED_FILE, "a path", path);
        let user = reader.optional(&NATS_USER, "a name", text);
        let password = reader.optional(&NATS_PASSWORD, "a password", secret);
        match (credentials, nkey, user, password) {
            (None, None, None, None) => return Some(Self::Anonymous),
            (Some(file), None, None, None) => return Some(Self::Credentials(file)),
            (None, Some(file), None, None) => return Some(Self::Nkey(file)),
            (None, None, Some(user), Some(password)) => {
                return Some(Self::Password(user, password));
            }
            (None, None, Some(_), None) => {
                reader.problem(&NATS_PASSWORD, "is missing: it goes with NATS_USER")
            }
            (None, None, None, Some(_)) => {
                reader.problem(&NATS_USER, "is missing: it goes with NATS_PASSWORD")
            }
            _ => reader.problem(
                &NATS_CREDS,
                "and NATS_NKEY_SEED_FILE and NATS_USER exclude each other: set one of them",
            ),
        }
        None
    }
}

/// The limits of the events stream, which either program may have to create.
#[derive(Debug, Clone)]
pub struct EventsSettings {
    pub replicas: usize,
    pub max_age: Duration,
    /// Size at which the stream refuses new events, in bytes.
    pub max_bytes: u64,
    /// Whether `max_bytes` was set by the operator: then it is not halved.
    pub max_bytes_is_set: bool,
}

impl EventsSettings {
    /// Reads the limits of the events stream.
    pub fn read(reader: &mut Reader) -> Self {
        Self {
            replicas: reader.defaulted(&STREAM_REPLICAS, "1, 3 or 5", |value| {
                value
                    .parse()
                    .ok()
                    .filter(|replicas| [1, 3, 5].contains(replicas))
            }),
            max_age: reader.defaulted(&EVENTS_MAX_AGE, DURATION, duration),
            max_bytes: reader.defaulted(&EVENTS_MAX_BYTES, BYTES, |value| {
                bytes(value).filter(|size| i64::try_from(*size).is_ok())
            }),
            max_bytes_is_set: reader.is_given(&EVENTS_MAX_BYTES),
        }
    }
}

/// How to log.
#[derive(Debug, Clone)]
pub struct LogSettings {
    pub filter: String,
    pub filter_is_set: bool,
    pub json: bool,
}

impl LogSettings {
    /// For commands whose output people read: only warnings, unless the operator said otherwise.
    pub fn quiet(self) -> Self {
        let filter = if self.filter_is_set {
            self.filter
        } else {
            "warn".to_owned()
        };
        Self {
            filter,
            filter_is_set: true,
            ..self
        }
    }

    /// Reads how to log.
    pub fn read(reader: &mut Reader) -> Self {
        Self {
            filter: reader.defaulted(
                &LOG_FILTER,
                "a log filter such as info or litestripe_worker=debug",
                |value| {
                    let parses = tracing_subscriber::EnvFilter::try_new(value).is_ok();
                    parses.then(|| value.to_owned())
                },
            ),
            filter_is_set: reader.is_given(&LOG_FILTER),
            json: reader.defaulted(&LOG_FORMAT, "text or json", |value| match value {
                "text" => Some(false),
                "json" => Some(true),
                _ => None,
            }),
        }
    }
}

#[cfg(test)]
mod tests;
