//! How to reach NATS: the servers, the identity there, and TLS.
//!
//! Owns which of these settings exclude or need each other. Credentials are rotated: `connect` reads
//! their files for each connection. Invariant: no server's URL holds a user, a token or a password,
//! so that servers may be printed.

use std::path::PathBuf;

use async_nats::ServerAddr;
use percent_encoding::percent_decode_str;
use secrecy::SecretString;

use super::{
    NATS_CREDS, NATS_INBOX_PREFIX, NATS_NKEY_SEED_FILE, NATS_PASSWORD, NATS_PASSWORD_FILE,
    NATS_TLS_CA, NATS_TLS_CERT, NATS_TLS_KEY, NATS_URL, NATS_USER, Reader, Secret, path, text,
};

/// Describes what [`server`] accepts.
const SERVERS: &str = "one or more URLs such as nats://127.0.0.1:4222, with a user or without; in a user, password or \
    token, write , / # ? @ % as %2C %2F %23 %3F %40 %25";

/// How to reach NATS.
#[derive(Debug, Clone)]
pub struct NatsSettings {
    /// The servers, each a URL without user and password.
    pub servers: Vec<ServerAddr>,
    pub identity: Identity,
    /// What the subjects begin with on which NATS answers us.
    pub inbox_prefix: String,
    /// The CA certificates to verify the servers with. Makes TLS required.
    pub tls_ca: Option<PathBuf>,
    /// The client's certificate and its private key.
    pub tls_client: Option<(PathBuf, PathBuf)>,
}

/// How a program authenticates at NATS.
#[derive(Debug, Clone)]
pub enum Identity {
    Anonymous,
    /// A file with a JWT and an nkey seed.
    Credentials(PathBuf),
    /// A file with an nkey seed.
    Nkey(PathBuf),
    Password(String, Secret),
    Token(SecretString),
}

impl NatsSettings {
    pub fn read(reader: &mut Reader) -> Self {
        let servers: Vec<_> = reader.defaulted(&NATS_URL, SERVERS, |value| {
            value.split(',').map(server).collect::<Option<_>>()
        });
        let (servers, users): (_, Vec<_>) = servers.into_iter().unzip();
        let mut users = users.into_iter().flatten();
        let user = users.next();
        if users.any(|other| Some(other) != user) {
            let what = "names different users: give each server the same user and password, or only one server";
            reader.problem(&NATS_URL, what);
        }
        let identity = Identity::read(reader, user.map(Identity::from));
        let inbox_prefix = reader.defaulted(
            &NATS_INBOX_PREFIX,
            "a subject without wildcards, at most 64 characters, such as _INBOX_worker",
            inbox_prefix,
        );
        let tls_client = read_certificate(reader);
        let tls_ca = reader.optional(&NATS_TLS_CA, "a path", path);
        Self {
            servers,
            identity,
            inbox_prefix,
            tls_ca,
            tls_client,
        }
    }

    /// Returns the servers, to print them.
    pub fn hosts(&self) -> String {
        let hosts: Vec<_> = self
            .servers
            .iter()
            .map(|server| format!("{}:{}", server.host(), server.port()))
            .collect();
        hosts.join(", ")
    }
}

/// The user that a server's URL names, or its token, which stands alone where the user would.
#[derive(PartialEq, Eq)]
struct UrlUser {
    name: String,
    password: Option<String>,
}

impl From<UrlUser> for Identity {
    fn from(UrlUser { name, password }: UrlUser) -> Self {
        match password {
            Some(password) => Self::Password(name, password.into()),
            None => Self::Token(name.into()),
        }
    }
}

/// Parses a server's URL. async-nats would log the user in it and ignore it, as it ignores a path,
/// and takes WebSockets for plain TCP.
fn server(url: &str) -> Option<(ServerAddr, Option<UrlUser>)> {
    let mut url = url.trim().parse::<ServerAddr>().ok()?.into_inner();
    let is_server = matches!(url.scheme(), "nats" | "tls") && matches!(url.path(), "" | "/");
    if !is_server || url.query().is_some() || url.fragment().is_some() {
        return None;
    }
    let decoded = |text: &str| Some(percent_decode_str(text).decode_utf8().ok()?.into_owned());
    let user = match url.username() {
        // Also a token without a name, as in `nats://:token@host`.
        "" if url.password().is_some() => return None,
        "" => None,
        name => Some(UrlUser {
            name: decoded(name)?,
            password: match url.password() {
                Some(password) => Some(decoded(password)?),
                None => None,
            },
        }),
    };
    // These fail without a host, as after a trailing comma.
    url.set_username("").ok()?;
    url.set_password(None).ok()?;
    Some((ServerAddr::from_url(url).ok()?, user))
}

impl Identity {
    /// Reads the identity. `in_url` is the one in `NATS_URL`.
    fn read(reader: &mut Reader, in_url: Option<Self>) -> Self {
        let credentials = reader.optional(&NATS_CREDS, "a path", path);
        let nkey = reader.optional(&NATS_NKEY_SEED_FILE, "a path", path);
        let given = [
            in_url,
            credentials.map(Self::Credentials),
            nkey.map(Self::Nkey),
            Self::read_user(reader),
        ];
        let mut given = given.into_iter().flatten();
        let identity = given.next().unwrap_or(Self::Anonymous);
        if given.next().is_some() {
            let what =
                "or NATS_NKEY_SEED_FILE or NATS_USER or a user in NATS_URL: set only one of these";
            reader.problem(&NATS_CREDS, what);
        }
        identity
    }

    fn read_user(reader: &mut Reader) -> Option<Self> {
        let user = reader.optional(&NATS_USER, "a name", text);
        let has_password = reader.is_given(&NATS_PASSWORD) || reader.is_given(&NATS_PASSWORD_FILE);
        let any = |_: &str| Some(());
        let password = reader.secret(&NATS_PASSWORD, &NATS_PASSWORD_FILE, "a password", any);
        if user.is_some() && !has_password {
            let what = "is missing: set it or NATS_PASSWORD_FILE with NATS_USER";
            reader.problem(&NATS_PASSWORD, what);
        }
        if user.is_none() && has_password {
            reader.problem(&NATS_USER, "is missing: set it with its password");
        }
        let (password, ()) = password?;
        Some(Self::Password(user?, password))
    }
}

/// Parses the beginning of a subject. async-nats does not check it.
fn inbox_prefix(value: &str) -> Option<String> {
    let is_plain = |part: &str| {
        let allowed = |byte: u8| byte.is_ascii_graphic() && !b"*>$".contains(&byte);
        !part.is_empty() && part.bytes().all(allowed)
    };
    (value.len() <= 64 && value.split('.').all(is_plain)).then(|| value.to_owned())
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
            "is missing: set NATS_TLS_CERT and NATS_TLS_KEY together",
        );
    }
    certificate.zip(key)
}

#[cfg(test)]
mod tests;
