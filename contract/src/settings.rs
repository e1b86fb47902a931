//! Settings: a constant for each, and a reader that turns texts into values or into a list of *all*
//! problems.
//!
//! Owns how a setting is named, given and refused, and the settings that both programs take. clap
//! parses no value, each stays a text until [`Reader`] parses it: clap's error would print a
//! malformed value, and the value may hold a password. Nothing below `main` reads the environment,
//! except for variables that are not our settings; ARCHITECTURE.md lists them. Of the files that settings name,
//! only those that hold secrets are read here.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};

pub mod dotenv;
mod nats;
mod secret;
mod traces;

pub use nats::{Identity, NatsSettings};
pub use secret::{FileError, Secret};
pub use traces::TraceSettings;

/// Defines a constant for each setting and a list of them all, so that each name is written once.
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
    /// The value if the setting is not given. An empty value counts as not given.
    pub default: Option<&'static str>,
    /// The meaning for `--help`, in one or two sentences, without the default.
    pub help: &'static str,
}

impl Setting {
    /// Returns the flag's name: `LITESTRIPE_LISTEN` is `--litestripe-listen`.
    pub fn flag(&self) -> String {
        self.name.to_ascii_lowercase().replace('_', "-")
    }
}

settings! {
    /// Settings of both programs.
    pub SHARED;

    NATS_URL = "NATS_URL", Some("nats://127.0.0.1:4222"),
        "URLs of the NATS servers, comma-separated; may hold a user and password, or a token";
    pub(crate) NATS_CREDS = "NATS_CREDS", None,
        "file with NATS credentials (JWT and nkey seed); read again at each reconnect, like the other files of credentials";
    pub(crate) NATS_NKEY_SEED_FILE = "NATS_NKEY_SEED_FILE", None,
        "file with an nkey seed, to authenticate at NATS";
    NATS_USER = "NATS_USER", None,
        "user at NATS; goes with NATS_PASSWORD or NATS_PASSWORD_FILE";
    NATS_PASSWORD = "NATS_PASSWORD", None,
        "password at NATS; goes with NATS_USER";
    NATS_PASSWORD_FILE = "NATS_PASSWORD_FILE", None,
        "file with the password at NATS, instead of NATS_PASSWORD; read again at each reconnect";
    pub(crate) NATS_INBOX_PREFIX = "NATS_INBOX_PREFIX", Some("_INBOX"),
        "first part of the subjects on which NATS answers this program, if its user may listen only there";
    pub(crate) NATS_TLS_CA = "NATS_TLS_CA", None,
        "file with the CA certificates to verify the NATS servers with; makes TLS required";
    pub(crate) NATS_TLS_CERT = "NATS_TLS_CERT", None,
        "file with the client certificate for NATS; goes with NATS_TLS_KEY";
    pub(crate) NATS_TLS_KEY = "NATS_TLS_KEY", None,
        "file with the private key of NATS_TLS_CERT";
    pub STREAM_REPLICAS = "LITESTRIPE_STREAM_REPLICAS", Some("1"),
        "replicas of each stream on a NATS cluster: 1, 3 or 5";
    pub EVENTS_MAX_AGE = "LITESTRIPE_EVENTS_MAX_AGE", Some("35d"),
        "how long the stream STRIPE_EVENTS keeps raw events; Stripe itself keeps them 30 days";
    pub EVENTS_MAX_BYTES = "LITESTRIPE_EVENTS_MAX_BYTES", Some("10GiB"),
        "size at which STRIPE_EVENTS refuses new events; if unset and the server has less storage, the default is halved until it fits, down to 256MiB, and leaves room for the other streams";
    LOG_FILTER = "RUST_LOG", Some("info"),
        "log filter: a level such as info or debug, or one per module (litestripe_worker=debug)";
    LOG_FORMAT = "LITESTRIPE_LOG_FORMAT", Some("text"),
        "log format: text or json";
    OTEL_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", None,
        "URL of the OpenTelemetry collector that receives traces by OTLP over HTTP, such as http://otel-collector:4318; /v1/traces is appended. Without it, traces are off and the other settings of OpenTelemetry are not read";
    OTEL_TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", None,
        "the same as a whole URL, to which nothing is appended; wins over OTEL_EXPORTER_OTLP_ENDPOINT";
    OTEL_HEADERS = "OTEL_EXPORTER_OTLP_HEADERS", None,
        "HTTP headers for the collector, such as a token: name=value, comma-separated, values percent-encoded";
    OTEL_HEADERS_FILE = "OTEL_EXPORTER_OTLP_HEADERS_FILE", None,
        "file with those headers, instead of OTEL_EXPORTER_OTLP_HEADERS; read again for each request";
    OTEL_TRACES_HEADERS = "OTEL_EXPORTER_OTLP_TRACES_HEADERS", None,
        "the same for traces alone; wins over OTEL_EXPORTER_OTLP_HEADERS";
    OTEL_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL", Some("http/protobuf"),
        "protocol of OTLP: only http/protobuf is supported";
    OTEL_TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", None,
        "the same for traces alone; wins over OTEL_EXPORTER_OTLP_PROTOCOL";
    OTEL_TIMEOUT = "OTEL_EXPORTER_OTLP_TIMEOUT", Some("10000"),
        "how long the collector may take to accept some spans, in milliseconds";
    OTEL_TRACES_TIMEOUT = "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", None,
        "the same for traces alone; wins over OTEL_EXPORTER_OTLP_TIMEOUT";
    OTEL_SERVICE_NAME = "OTEL_SERVICE_NAME", None,
        "the program's name in traces; wins over service.name in OTEL_RESOURCE_ATTRIBUTES [default: the name of the program]";
    OTEL_ATTRIBUTES = "OTEL_RESOURCE_ATTRIBUTES", None,
        "attributes of all spans, such as deployment.environment.name=production: name=value, comma-separated, values percent-encoded";
    OTEL_SAMPLER = "OTEL_TRACES_SAMPLER", Some("parentbased_always_on"),
        "which traces are recorded: always_on, always_off or traceidratio, each with parentbased_ before it to record what the caller records";
    OTEL_SAMPLER_ARG = "OTEL_TRACES_SAMPLER_ARG", Some("1"),
        "the part of the traces that traceidratio records, 0 to 1";
    OTEL_EXPORTER = "OTEL_TRACES_EXPORTER", Some("otlp"),
        "otlp, or none to switch traces off";
    OTEL_DISABLED = "OTEL_SDK_DISABLED", Some("false"),
        "true to switch traces off";
}

/// Adds a flag and an environment variable for each of `settings` to `command`.
///
/// `--help` never shows a variable's value, which may be a secret.
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

/// The settings' texts as they were given, by name.
#[derive(Default)]
pub struct Given(BTreeMap<&'static str, String>);

impl Given {
    /// Takes the texts of `settings` from the command line and the environment.
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

/// All problems of the settings, one line each, without the values.
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

/// Reads settings one by one and collects the problems, so that all are reported at once.
pub struct Reader {
    given: Given,
    problems: Vec<String>,
}

impl Reader {
    pub fn new(given: Given) -> Self {
        Self {
            given,
            problems: Vec::new(),
        }
    }

    /// Returns whether `setting` was given, not left to its default.
    pub fn is_given(&self, setting: &Setting) -> bool {
        self.text(setting).is_some()
    }

    /// Reads a setting without a default. `expected` completes the problem "NAME must be …".
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

    /// Reads a setting that has a default.
    ///
    /// # Panics
    /// If the setting has no default or `parse` refuses its default. Each program's tests read all
    /// defaults.
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

    /// Reads a setting that must be given.
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

    /// Records a problem of `setting`. `what` continues the sentence after its name and must not
    /// hold the value.
    pub fn problem(&mut self, setting: &Setting, what: impl fmt::Display) {
        self.problems.push(format!("{} {what}", setting.name));
    }

    /// Returns `settings` if no problem was recorded.
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

/// Accepts any text.
pub fn text(value: &str) -> Option<String> {
    Some(value.to_owned())
}

/// Accepts any path, also of a file that does not exist.
pub fn path(value: &str) -> Option<PathBuf> {
    Some(PathBuf::from(value))
}

/// Parses `true` or `false`, in any case.
pub fn flag(value: &str) -> Option<bool> {
    value.to_ascii_lowercase().parse().ok()
}

/// Describes what [`duration`] accepts.
pub const DURATION: &str = "a duration such as 30s, 10m, 2h or 35d";

/// Parses a duration with its unit: `30s`, `10m`.
pub fn duration(value: &str) -> Option<Duration> {
    humantime::parse_duration(value).ok()
}

/// Describes what [`bytes`] accepts.
pub const BYTES: &str = "a size such as 512KiB, 1MiB or 10GiB";

/// Parses a size such as `512KiB` or `10GiB` into bytes.
pub fn bytes(value: &str) -> Option<u64> {
    value
        .parse::<bytesize::ByteSize>()
        .ok()
        .map(|size| size.as_u64())
}

/// Parses the size of a stream. Zero would mean that it has no limit.
pub fn stream_bytes(value: &str) -> Option<i64> {
    i64::try_from(bytes(value)?).ok().filter(|size| *size > 0)
}

/// Describes what [`address`] accepts.
pub const ADDRESS: &str = "an address such as 127.0.0.1:8080, [::1]:8080 or localhost:8080";

/// An address to listen on: an IP or a host name, and a port. A name is looked up when it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(String);

impl Address {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Parses an address to listen on.
pub fn address(value: &str) -> Option<Address> {
    let is_ip = value.parse::<std::net::SocketAddr>().is_ok();
    let is_named = || {
        let (host, port) = value.rsplit_once(':')?;
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let is_name =
            host.starts_with(|c: char| c.is_ascii_alphanumeric()) && host.chars().all(is_part);
        (is_name && port.parse::<u16>().is_ok()).then_some(())
    };
    (is_ip || is_named().is_some()).then(|| Address(value.to_owned()))
}

/// The limits of a stream that only workers write.
#[derive(Debug, Clone, Copy)]
pub struct StreamSettings {
    pub max_age: Duration,
    /// Its size in bytes. `None` if the operator did not set it: then it is a part of the events'.
    pub max_bytes: Option<i64>,
}

/// The limits of the stream `STRIPE_EVENTS`. Either program may have to create it.
#[derive(Debug, Clone)]
pub struct EventsSettings {
    pub replicas: usize,
    pub max_age: Duration,
    /// Size at which the stream refuses new events, in bytes.
    pub max_bytes: i64,
    /// Whether the operator set `max_bytes`. Then it is not halved to fit the server's storage.
    pub max_bytes_is_set: bool,
}

impl EventsSettings {
    pub fn read(reader: &mut Reader) -> Self {
        Self {
            replicas: reader.defaulted(&STREAM_REPLICAS, "1, 3 or 5", |value| {
                value
                    .parse()
                    .ok()
                    .filter(|replicas| [1, 3, 5].contains(replicas))
            }),
            max_age: reader.defaulted(&EVENTS_MAX_AGE, DURATION, duration),
            max_bytes: reader.defaulted(&EVENTS_MAX_BYTES, BYTES, stream_bytes),
            max_bytes_is_set: reader.is_given(&EVENTS_MAX_BYTES),
        }
    }
}

/// The log's filter and format.
#[derive(Debug, Clone)]
pub struct LogSettings {
    pub filter: String,
    pub filter_is_set: bool,
    pub json: bool,
}

impl LogSettings {
    /// Logs only warnings unless the operator set a filter: for commands whose output people read.
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
