//! Connects to NATS as the settings say.
//!
//! Owns timeouts, pings, and the log lines about a connection that is made or lost. An unreachable
//! broker is no error: the connection is retried. Only settings that can never work are an error.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{AuthError, Client, ConnectErrorKind, ConnectOptions, Event, jetstream};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::exit;
use crate::settings::{FileError, NATS_TLS_CA, NATS_TLS_CERT, NATS_TLS_KEY, NatsSettings, Setting};

mod credentials;

/// How often the connection is pinged. After two pings without an answer it counts as lost, which
/// also detects a half-open link.
const PING_INTERVAL: Duration = Duration::from_secs(5);

/// Timeout of a request to JetStream, and of a PubAck.
///
/// Short, because async-nats neither fails nor resends what was in flight when a connection broke.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// The shortest interval between checks whether the server now accepts larger messages. The check
/// is only needed while a message is too large.
pub const MAX_PAYLOAD_CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// How often the state of the connection is checked while we wait for it.
const POLL: Duration = Duration::from_millis(50);

/// Why these settings can never lead to a connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("cannot connect to NATS")]
    Options(#[source] async_nats::ConnectError),
}

/// Returns a client that connects, and reconnects, in the background.
pub async fn connect(settings: &NatsSettings, name: &str) -> Result<Client, ConnectError> {
    let reported = Reported::default();
    let options = options(settings, name, &reported)?
        .retry_on_initial_connect()
        .event_callback({
            let settings = settings.clone();
            move |event| {
                report(&event, &settings, &reported);
                std::future::ready(())
            }
        });
    options
        .connect(settings.servers.as_slice())
        .await
        .map_err(ConnectError::Options)
}

/// Makes one attempt to connect, and returns why it fails. `None` if it succeeds.
pub async fn refusal(settings: &NatsSettings, name: &str) -> Option<String> {
    let options = match options(settings, name, &Reported::default()) {
        Ok(options) => options,
        Err(error) => return Some(exit::chain(&error)),
    };
    let attempt = options.connect(settings.servers.as_slice());
    match tokio::time::timeout(REQUEST_TIMEOUT, attempt).await {
        Ok(Ok(_)) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(_) => Some("no answer".to_owned()),
    }
}

/// Returns the server's error if the user may not subscribe where answers arrive, without which no
/// request succeeds. `None` if there is none within 2 s: the server confirms no subscription.
pub async fn inbox_refusal(settings: &NatsSettings, name: &str) -> Option<String> {
    let (sender, mut refusal) = watch::channel(None);
    let options = options(settings, name, &Reported::default()).ok()?;
    let options = options.event_callback(move |event| {
        if let Event::ServerError(error) = event {
            let error = error.to_string();
            if error.contains("Permissions Violation for Subscription") {
                sender.send_replace(Some(error));
            }
        }
        std::future::ready(())
    });
    let refused = async {
        let client = options.connect(settings.servers.as_slice()).await.ok()?;
        let _inbox = client.subscribe(client.new_inbox()).await.ok()?;
        refusal.wait_for(Option::is_some).await.ok()?.clone()
    };
    tokio::time::timeout(REQUEST_TIMEOUT, refused).await.ok()?
}

/// Reconnects `client` if the server now accepts larger messages.
///
/// A server that reloads its configuration announces the new limit only to new connections. The
/// check therefore opens a second connection, and keeps the first unless the limit grew: messages
/// in flight on it would have to be sent again.
pub async fn reconnect_if_max_payload_grew(client: &Client, settings: &NatsSettings, name: &str) {
    let Ok(options) = options(settings, name, &Reported::default()) else {
        return;
    };
    let probe = tokio::time::timeout(
        REQUEST_TIMEOUT,
        options.connect(settings.servers.as_slice()),
    )
    .await;
    let (before, Ok(Ok(probe))) = (client.max_payload(), probe) else {
        return;
    };
    if probe.max_payload() > before {
        info!(
            "NATS now accepts messages of up to {} bytes (before: {before}); reconnecting",
            probe.max_payload()
        );
        // Fails only if the client was closed.
        let _ = client.force_reconnect().await;
    }
}

/// Makes ring the crypto provider of TLS in this process. [`connect`] does it too. A dependency that
/// brings a second one must not make the first handshake panic.
pub fn install_crypto_provider() {
    // Fails if there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

fn options(
    settings: &NatsSettings,
    name: &str,
    reported: &Reported,
) -> Result<ConnectOptions, ConnectError> {
    install_crypto_provider();
    // A file that cannot be used now is an error, later it is retried.
    credentials::prove(&settings.identity, &[])?;
    let (identity, hosts) = (settings.identity.clone(), settings.hosts());
    let reported = reported.clone();
    let prove = move |nonce: Vec<u8>| {
        let proof = credentials::prove(&identity, &nonce).map_err(|error| {
            reported.warn_once(&hosts, &exit::chain(&error));
            AuthError::new(error)
        });
        std::future::ready(proof)
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that makes options"
    )]
    let mut options = ConnectOptions::with_auth_callback(prove)
        .name(name)
        .custom_inbox_prefix(&settings.inbox_prefix)
        .ping_interval(PING_INTERVAL)
        .request_timeout(Some(REQUEST_TIMEOUT));
    check_tls(settings)?;
    if let Some(ca) = &settings.tls_ca {
        options = options.add_root_certificates(ca.clone()).require_tls(true);
    }
    if let Some((certificate, key)) = &settings.tls_client {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

/// Checks the files of TLS. async-nats reads them at every attempt to connect, does not say which
/// one it cannot use, and takes a file without a certificate.
fn check_tls(settings: &NatsSettings) -> Result<(), ConnectError> {
    if let Some(ca) = &settings.tls_ca {
        certificates(&NATS_TLS_CA, ca)?;
    }
    if let Some((certificate, key)) = &settings.tls_client {
        certificates(&NATS_TLS_CERT, certificate)?;
        let text = std::fs::read(key).map_err(unusable(&NATS_TLS_KEY, key))?;
        // The parser's own message may quote a line of the key.
        PrivateKeyDer::from_pem_slice(&text)
            .map_err(|_| unusable(&NATS_TLS_KEY, key)("it holds no PEM private key"))?;
    }
    Ok(())
}

/// Returns the JetStream API over `client`, with our timeouts.
pub fn jetstream(client: Client) -> jetstream::Context {
    jetstream::ContextBuilder::new()
        .timeout(REQUEST_TIMEOUT)
        .ack_timeout(REQUEST_TIMEOUT)
        .build(client)
}

/// Waits until `client` is connected. Logs once if that takes longer than a second.
pub async fn connected(client: &Client, settings: &NatsSettings) {
    let mut waited = Duration::ZERO;
    while client.connection_state() != State::Connected {
        if waited == REQUEST_TIMEOUT / 2 {
            warn!(
                servers = settings.hosts(),
                "waiting for NATS at {} (NATS_URL)",
                settings.hosts()
            );
        }
        tokio::time::sleep(POLL).await;
        waited += POLL;
    }
}

/// Checks that a file holds certificates.
fn certificates(setting: &Setting, path: &Path) -> Result<(), ConnectError> {
    let found =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match found.map_err(unusable(setting, path))?.as_slice() {
        [] => Err(unusable(setting, path)("it holds no PEM certificate")),
        _ => Ok(()),
    }
}

fn unusable<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    setting: &Setting,
    path: &Path,
) -> impl FnOnce(E) -> ConnectError + use<E> {
    let (setting, path) = (setting.name, path.to_owned());
    move |source| {
        ConnectError::File(FileError {
            setting,
            path,
            source: source.into(),
        })
    }
}

/// What was logged since the connection was lost, so that nothing is logged for each attempt.
#[derive(Clone, Default)]
struct Reported(Arc<Mutex<HashSet<String>>>);

impl Reported {
    fn warn_once(&self, hosts: &str, problem: &str) {
        if self.locked().insert(problem.to_owned()) {
            warn!(
                servers = hosts,
                "cannot connect to NATS at {hosts}: {problem}"
            );
        }
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs an event of the connection.
fn report(event: &Event, settings: &NatsSettings, reported: &Reported) {
    let hosts = settings.hosts();
    match event {
        Event::Connected => {
            reported.locked().clear();
            info!(servers = hosts, "connected to NATS at {hosts}");
        }
        Event::Disconnected => warn!(
            servers = hosts,
            "connection to NATS lost; reconnecting to {hosts}"
        ),
        Event::ServerError(error) => warn!("error from the NATS server: {error}"),
        // Comes once per attempt to connect. The code that waits for the connection logs that the
        // server is unreachable (an IO error), and the code that proves our identity why it could
        // not; only this line can say that the server refuses us. The text is the library's and
        // contains no credentials.
        Event::ClientError(error) => {
            let error = error.to_string();
            debug!("NATS connection: {error}");
            let is_logged = [ConnectErrorKind::Io, ConnectErrorKind::Authentication]
                .iter()
                .any(|kind| error.contains(&kind.to_string()));
            match check_tls(settings) {
                Err(file) => reported.warn_once(&hosts, &exit::chain(&file)),
                Ok(()) if is_logged => {}
                Ok(()) => reported.warn_once(&hosts, &error),
            }
        }
        Event::SlowConsumer(_) | Event::LameDuckMode | Event::Draining | Event::Closed => {
            info!("NATS connection: {event}")
        }
    }
}
