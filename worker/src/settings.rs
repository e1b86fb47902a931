//! The worker's own settings.
//!
//! Owns their names, defaults and limits. [`read`] is a pure function of the given texts, and of the
//! files that hold secrets.

use std::ops::RangeInclusive;
use std::str::FromStr as _;
use std::time::Duration;

use litestripe_contract::settings::{
    self, ADDRESS, Address, BYTES, DURATION, EventsSettings, FileError, Given, LogSettings,
    NatsSettings, Problems, Reader, Secret, StreamSettings, TraceSettings,
};
use litestripe_domain::event::MetadataKeys;
use sea_orm::sqlx::sqlite::SqliteConnectOptions;
use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

use crate::store::Servers;
use crate::stripe::kv;

litestripe_contract::settings! {
    /// The settings that only the worker has.
    pub SETTINGS;

    DATABASE_URL = "DATABASE_URL", Some(DATABASE_URL_DEFAULT),
        "URL of the database: SQLite (sqlite://file?mode=rwc) or PostgreSQL (postgres://user:password@host/database), several servers as host:5432,host:5432";
    DATABASE_URL_FILE = "DATABASE_URL_FILE", None,
        "file with the URL of the database, instead of DATABASE_URL; read again for each new connection to PostgreSQL";
    DATABASE_SCHEMA = "LITESTRIPE_DATABASE_SCHEMA", None,
        "PostgreSQL schema of Litestripe's tables, which `migrate up` creates if it is missing [default: the connection's]";
    AUTO_MIGRATE = "LITESTRIPE_AUTO_MIGRATE", None,
        "whether `run`, `replay`, `backfill` and a `reconcile` that repairs migrate the schema first; otherwise they exit if it is behind [default: true on SQLite, false on PostgreSQL]";
    LISTEN = "LITESTRIPE_WORKER_LISTEN", Some("127.0.0.1:9090"),
        "address on which `run` serves /healthz, /readyz and /metrics: an IP or a host name, and a port";
    BATCH = "LITESTRIPE_BATCH", Some("250"),
        "most events in one transaction, 1 to 1000";
    pub(crate) SIGNALS_MAX_AGE = "LITESTRIPE_SIGNALS_MAX_AGE", Some("7d"),
        "how long the stream LITESTRIPE_SIGNALS keeps signals";
    pub(crate) SIGNALS_MAX_BYTES = "LITESTRIPE_SIGNALS_MAX_BYTES", None,
        "size at which LITESTRIPE_SIGNALS drops its oldest signals; if unset and the server has less storage, halved until it fits [default: a fifth of STRIPE_EVENTS]";
    pub(crate) DEAD_LETTERS_MAX_AGE = "LITESTRIPE_DEAD_LETTERS_MAX_AGE", Some("90d"),
        "how long the stream STRIPE_DEAD_LETTERS keeps dead letters";
    pub(crate) DEAD_LETTERS_MAX_BYTES = "LITESTRIPE_DEAD_LETTERS_MAX_BYTES", None,
        "size at which STRIPE_DEAD_LETTERS refuses new dead letters; if unset and the server has less storage, halved until it fits [default: a tenth of STRIPE_EVENTS]";
    pub(crate) METADATA_KEYS = "LITESTRIPE_METADATA_KEYS", Some("*"),
        "metadata keys to keep: keys, comma-separated, * for all, or none; metadata is your own text and may hold personal data";
    pub(crate) ORPHAN_GRACE = "LITESTRIPE_ORPHAN_GRACE", Some("10m"),
        "how long a subscription may wait for its Checkout Session before it becomes an orphan; at most 365d";
    pub(crate) ORPHAN_WITHOUT_SESSION = "LITESTRIPE_ORPHAN_WITHOUT_SESSION", Some("true"),
        "whether a subscription that no Checkout Session claims becomes an orphan; set it to false if you create subscriptions through Stripe's API";
    ORPHAN_EMAIL_MAX_AGE = "LITESTRIPE_ORPHAN_EMAIL_MAX_AGE", Some("90d"),
        "age at which an orphan's email is erased even if the orphan is still open";
    pub(crate) ERASE_ON_CUSTOMER_DELETED = "LITESTRIPE_ERASE_ON_CUSTOMER_DELETED", Some("false"),
        "whether a `customer.deleted` event erases the customer, as the command `erase` does; add this type to LITESTRIPE_EVENT_TYPES of ingress";
    pub(crate) USER_LOOKUP = "LITESTRIPE_USER_LOOKUP", Some("none"),
        "how a client reference id is matched to a user: none (every id is a user), sql:<query with $1>, or nats:<subject>";
    USER_DATABASE_URL = "LITESTRIPE_USER_DATABASE_URL", None,
        "URL of the database for the sql: lookup [default: DATABASE_URL]";
    USER_DATABASE_URL_FILE = "LITESTRIPE_USER_DATABASE_URL_FILE", None,
        "file with that URL, instead of LITESTRIPE_USER_DATABASE_URL; read again for each new connection to PostgreSQL";
    STRIPE_SECRET_KEY = "STRIPE_SECRET_KEY", None,
        "secret or restricted key for Stripe's API (sk_… or rk_…); without it, backfill, reconcile and lookups at Stripe are off, and thin events wait for it";
    STRIPE_SECRET_KEY_FILE = "STRIPE_SECRET_KEY_FILE", None,
        "file with that key, instead of STRIPE_SECRET_KEY; read again for each request";
    STRIPE_API_BASE = "STRIPE_API_BASE", Some("https://api.stripe.com"),
        "base URL of Stripe's API; change it only for tests and proxies";
    BACKFILL_INTERVAL = "LITESTRIPE_BACKFILL_INTERVAL", None,
        "how often one of the workers fetches missed events from Stripe, beginning right after a start; or off [default: 1h with a key, else off]";
    MAX_REQUESTS_PER_MINUTE = "LITESTRIPE_MAX_REQUESTS_PER_MINUTE", Some("75"),
        "most calls to Stripe's API per minute, of all workers together";
    API_RATE_LIMIT_CACHE_KEY = "LITESTRIPE_API_RATE_LIMIT_CACHE_KEY", Some("litestripe_stripe_api_rate_limit"),
        "key in the JetStream KV bucket litestripe under which the workers share that limit";
    /// The period of the API budget. Tests shorten it; `--help` does not list it.
    pub WINDOW = "LITESTRIPE_API_RATE_LIMIT_WINDOW", Some("1m"),
        "period of the API budget; for tests";
}

const DATABASE_URL_DEFAULT: &str = "sqlite://litestripe.db?mode=rwc";

/// The most events in one transaction. Bounds memory and the number of a statement's parameters.
const BATCH_MAX: usize = 1000;

const GRACE_MAX: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// How often the workers run a backfill if there is a key and no interval is set.
const BACKFILL_INTERVAL_DEFAULT: Duration = Duration::from_secs(60 * 60);

/// The allowed windows of the API budget. In a shorter one, a request's latency takes too large a
/// part.
const WINDOWS: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_secs(24 * 60 * 60);

const DATABASE: &str = "a URL that starts with sqlite: or postgres://; in a password, write / # ? @ % as %2F %23 %3F %40 %25; target_session_attrs may be any, read-write or primary";

const STRIPE_KEY: &str = "a secret or restricted key (sk_… or rk_…)";

const SCHEMA: &str =
    "the name of a schema: letters, digits, _ and -, not beginning with a digit or pg_";

/// The values of all settings. The help texts above say what each one means.
#[derive(Debug, Clone)]
pub struct Settings {
    pub nats: NatsSettings,
    pub events: EventsSettings,
    pub signals: StreamSettings,
    pub dead_letters: StreamSettings,
    pub database: DatabaseSettings,
    pub listen: Address,
    pub batch: usize,
    pub metadata_keys: MetadataKeys,
    pub orphans: OrphanSettings,
    pub erase_on_customer_deleted: bool,
    pub lookup: LookupSettings,
    /// `None` without `STRIPE_SECRET_KEY`.
    pub stripe: Option<StripeSettings>,
    pub log: LogSettings,
    /// `None` if no traces are sent.
    pub traces: Option<TraceSettings>,
}

/// When a payment becomes an orphan, and how long its email is kept.
#[derive(Debug, Clone)]
pub struct OrphanSettings {
    pub grace: Duration,
    pub without_session: bool,
    pub email_max_age: Duration,
}

/// How a client reference id is matched to a user.
#[derive(Debug, Clone)]
pub enum LookupSettings {
    /// Every client reference id counts as a user's id.
    None,
    /// A query with one parameter, the id. The user exists if it returns a row.
    Sql {
        query: String,
        database: DatabaseSettings,
    },
    /// A subject on which the application answers whether the user exists.
    Nats { subject: String },
}

/// How to call Stripe's API.
#[derive(Debug, Clone)]
pub struct StripeSettings {
    key: Secret,
    /// The API's base URL, without a trailing slash.
    pub base: String,
    pub budget: BudgetSettings,
    /// How often `run` fetches missed events. `None` if it never does.
    pub backfill_interval: Option<Duration>,
}

/// A budget of calls that all workers share.
#[derive(Debug, Clone)]
pub struct BudgetSettings {
    /// Most calls in a window.
    pub requests: u32,
    /// From one second to a day.
    pub window: Duration,
    /// The key of the KV bucket under which it is shared.
    pub key: String,
}

impl StripeSettings {
    /// Returns whether the key is a live mode key.
    #[must_use]
    pub fn is_live(&self) -> bool {
        is_live(self.key.at_start().expose_secret())
    }

    /// Returns the key as it is now.
    ///
    /// # Errors
    /// If its file cannot be used, or holds a key of the other mode: rows of one mode must not be
    /// mixed with objects of the other.
    pub(crate) fn key(&self) -> Result<SecretString, FileError> {
        let same_mode = |text: &str| stripe_key(text).filter(|_| is_live(text) == self.is_live());
        let expected = "a key of the mode, live or test, that it held at the start";
        let now = self.key.reread(expected, same_mode).transpose()?;
        Ok(now.unwrap_or_else(|| self.key.at_start().clone()))
    }
}

/// The database that holds the rows, or the one of the user lookup.
#[derive(Debug, Clone)]
pub struct DatabaseSettings {
    /// Usually holds a password.
    pub url: Secret,
    pub kind: DatabaseKind,
    /// The PostgreSQL schema of our tables. `None` for the first one of the connection's search
    /// path.
    pub schema: Option<SchemaName>,
    /// Whether the commands that may migrate the schema do so first.
    pub auto_migrate: bool,
}

/// The name of a PostgreSQL schema: letters, digits, `_` and `-`, so that it needs no escapes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchemaName(pub(crate) String);

impl SchemaName {
    /// PostgreSQL cuts longer names off: "Identifiers and Key Words".
    const LENGTH_MAX: usize = 63;

    fn parse(value: &str) -> Option<Self> {
        let fits = value.len() <= Self::LENGTH_MAX
            && value.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && value
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
            && !value.starts_with("pg_");
        fits.then(|| Self(value.to_owned()))
    }

    /// The name as SQL.
    pub(crate) fn quoted(&self) -> String {
        format!("\"{}\"", self.0)
    }
}

/// The databases that are supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatabaseKind {
    /// The embedded default: one host, one writer at a time.
    Sqlite,
    /// For several hosts or more load.
    Postgres,
}

/// Reads the worker's settings, or returns all their problems.
///
/// # Errors
/// The problems, each named after its setting, without the values.
pub fn read(given: Given) -> Result<Settings, Problems> {
    let mut reader = Reader::new(given);
    let settings = read_all(&mut reader);
    reader.finish(Some(settings))
}

fn read_all(reader: &mut Reader) -> Settings {
    let database = read_database(reader);
    Settings {
        listen: reader.defaulted(&LISTEN, ADDRESS, settings::address),
        batch: reader.defaulted(&BATCH, "a number from 1 to 1000", |value| {
            value
                .parse()
                .ok()
                .filter(|batch| (1..=BATCH_MAX).contains(batch))
        }),
        signals: StreamSettings {
            max_age: reader.defaulted(&SIGNALS_MAX_AGE, DURATION, settings::duration),
            max_bytes: reader.optional(&SIGNALS_MAX_BYTES, BYTES, settings::stream_bytes),
        },
        dead_letters: StreamSettings {
            max_age: reader.defaulted(&DEAD_LETTERS_MAX_AGE, DURATION, settings::duration),
            max_bytes: reader.optional(&DEAD_LETTERS_MAX_BYTES, BYTES, settings::stream_bytes),
        },
        metadata_keys: reader.defaulted(
            &METADATA_KEYS,
            "*, none, or keys separated by commas",
            |value| value.parse().ok(),
        ),
        orphans: read_orphans(reader),
        erase_on_customer_deleted: reader.defaulted(
            &ERASE_ON_CUSTOMER_DELETED,
            "true or false",
            settings::flag,
        ),
        lookup: read_lookup(reader, &database),
        database,
        stripe: read_stripe(reader),
        events: EventsSettings::read(reader),
        log: LogSettings::read(reader),
        traces: TraceSettings::read(reader),
        nats: NatsSettings::read(reader),
    }
}

fn read_database(reader: &mut Reader) -> DatabaseSettings {
    let given = reader.secret(&DATABASE_URL, &DATABASE_URL_FILE, DATABASE, database_kind);
    let default = || {
        (
            Secret::from(DATABASE_URL_DEFAULT.to_owned()),
            DatabaseKind::Sqlite,
        )
    };
    let (url, kind) = given.unwrap_or_else(default);
    let schema = reader.optional(&DATABASE_SCHEMA, SCHEMA, SchemaName::parse);
    if schema.is_some() && kind == DatabaseKind::Sqlite {
        reader.problem(
            &DATABASE_SCHEMA,
            "is for PostgreSQL: SQLite has no schemas; remove it, or set DATABASE_URL to a PostgreSQL database",
        );
    }
    let auto_migrate = reader.optional(&AUTO_MIGRATE, "true or false", settings::flag);
    DatabaseSettings {
        url,
        kind,
        schema,
        auto_migrate: auto_migrate.unwrap_or(kind == DatabaseKind::Sqlite),
    }
}

fn read_orphans(reader: &mut Reader) -> OrphanSettings {
    OrphanSettings {
        grace: reader.defaulted(
            &ORPHAN_GRACE,
            "a duration such as 10m, at most 365d",
            |value| settings::duration(value).filter(|grace| *grace <= GRACE_MAX),
        ),
        without_session: reader.defaulted(&ORPHAN_WITHOUT_SESSION, "true or false", settings::flag),
        email_max_age: reader.defaulted(&ORPHAN_EMAIL_MAX_AGE, DURATION, settings::duration),
    }
}

fn read_lookup(reader: &mut Reader, database: &DatabaseSettings) -> LookupSettings {
    let users = reader.secret(
        &USER_DATABASE_URL,
        &USER_DATABASE_URL_FILE,
        DATABASE,
        database_kind,
    );
    let database = match users {
        Some((url, kind)) => DatabaseSettings {
            url,
            kind,
            schema: None,
            auto_migrate: false,
        },
        // The users' table is where the connection finds it, not in our schema.
        None => DatabaseSettings {
            schema: None,
            ..database.clone()
        },
    };
    let expected = "none, sql:<query with $1>, or nats:<subject>";
    reader.defaulted(&USER_LOOKUP, expected, |value| {
        if value == "none" {
            return Some(LookupSettings::None);
        }
        if let Some(query) = value.strip_prefix("sql:") {
            let query = query.trim();
            return query.contains("$1").then(|| LookupSettings::Sql {
                query: query.to_owned(),
                database: database.clone(),
            });
        }
        let subject = value.strip_prefix("nats:")?.trim();
        let valid = !subject.is_empty()
            && !subject.contains([' ', '*', '>'])
            && !subject.split('.').any(str::is_empty);
        valid.then(|| LookupSettings::Nats {
            subject: subject.to_owned(),
        })
    })
}

fn read_stripe(reader: &mut Reader) -> Option<StripeSettings> {
    let base = reader.defaulted(
        &STRIPE_API_BASE,
        "a URL that starts with https:// or http://",
        |value| {
            let is_http = value.starts_with("https://") || value.starts_with("http://");
            is_http.then(|| value.trim_end_matches('/').to_owned())
        },
    );
    let budget = BudgetSettings {
        requests: reader.defaulted(&MAX_REQUESTS_PER_MINUTE, "a number above 0", |value| {
            value.parse().ok().filter(|requests| *requests > 0)
        }),
        window: reader.defaulted(&WINDOW, "a duration from 1s to 1d", |value| {
            settings::duration(value).filter(|window| WINDOWS.contains(window))
        }),
        key: reader.defaulted(
            &API_RATE_LIMIT_CACHE_KEY,
            "a key of a NATS KV bucket: letters, digits and -/_=., no dot at its start or end",
            |value| kv::is_key(value).then(|| value.to_owned()),
        ),
    };
    let interval = |value: &str| match value {
        "off" => Some(None),
        interval => settings::duration(interval)
            .filter(|interval| *interval >= Duration::from_secs(1))
            .map(Some),
    };
    let backfill_interval = reader
        .optional(
            &BACKFILL_INTERVAL,
            "off, or a duration such as 30m or 1h, at least 1s",
            interval,
        )
        .unwrap_or(Some(BACKFILL_INTERVAL_DEFAULT));
    let (key, _) = reader.secret(
        &STRIPE_SECRET_KEY,
        &STRIPE_SECRET_KEY_FILE,
        STRIPE_KEY,
        stripe_key,
    )?;
    Some(StripeSettings {
        key,
        base,
        budget,
        backfill_interval,
    })
}

/// Parses a key for Stripe's API.
fn stripe_key(value: &str) -> Option<SecretString> {
    let fits = value.starts_with("sk_") || value.starts_with("rk_");
    (fits && value.bytes().all(|byte| byte.is_ascii_graphic())).then(|| SecretString::from(value))
}

/// Whether it is a live mode key. Stripe: "API keys".
fn is_live(key: &str) -> bool {
    key.starts_with("sk_live_") || key.starts_with("rk_live_")
}

/// Accepts only a URL that sea-orm and sqlx accept. Their parsers are called here, because later
/// their own errors would print it, with a password that has an unescaped `/`, `#` or `?`.
fn database_kind(url: &str) -> Option<DatabaseKind> {
    if url.starts_with("sqlite:") {
        Url::parse(url).ok()?;
        SqliteConnectOptions::from_str(url).ok()?;
        return Some(DatabaseKind::Sqlite);
    }
    Servers::parse(url)?;
    Some(DatabaseKind::Postgres)
}

#[cfg(test)]
mod tests;
