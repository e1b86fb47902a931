//! How often the NATS server syncs its disk, which only its monitoring page tells.
//!
//! A PubAck of a server that does not sync each message precedes the disk by up to two minutes, and
//! a power cut then loses events that Stripe takes for delivered.

use std::time::Duration;

use litestripe_contract::exit;
use litestripe_contract::settings::NatsSettings;
use serde::Deserialize;
use url::Url;

use super::{Line, finding};

pub(super) const CHECK: &str = "sync_interval";

/// The port that is customary for a server's monitoring.
const PORT: u16 = 8222;

/// How long the page may take.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// Where the server's monitoring is.
#[derive(Debug)]
pub(crate) enum Monitoring {
    /// Perhaps at the customary port of the server that the connection leads to.
    Customary,
    At(Url),
}

/// The page `/varz`, as far as it matters. NATS: "Monitoring".
#[derive(Debug, Deserialize)]
struct Page {
    server_id: String,
    jetstream: Option<JetStream>,
}

#[derive(Debug, Deserialize)]
struct JetStream {
    config: Option<Config>,
}

#[derive(Debug, Deserialize)]
struct Config {
    /// In nanoseconds.
    #[serde(default)]
    sync_interval: u64,
    #[serde(default)]
    sync_always: bool,
}

pub(super) async fn examine(
    monitoring: &Monitoring,
    settings: &NatsSettings,
    nats: &async_nats::Client,
) -> Line {
    let (url, is_given) = match monitoring {
        Monitoring::At(url) => (Some(url.clone()), true),
        Monitoring::Customary => (customary(settings), false),
    };
    let page = match url {
        Some(url) => read(url).await,
        None => Err("it has no address".to_owned()),
    };
    let page = page.and_then(|page| {
        // Another server may have that port.
        if page.server_id == nats.server_info().server_id {
            Ok(page)
        } else {
            Err("it is the page of another server".to_owned())
        }
    });
    match page {
        Ok(page) => judge(page),
        Err(reason) if is_given => Line::mend(
            CHECK,
            finding(
                format!("the NATS server's monitoring cannot be read: {reason}"),
                "check --nats-monitoring and the server's `http` setting",
            ),
        ),
        Err(_) => Line::skipped(
            CHECK,
            "needs the NATS server's monitoring: --nats-monitoring URL",
        ),
    }
}

fn customary(settings: &NatsSettings) -> Option<Url> {
    let host = settings.servers.first()?.host();
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        host.to_owned()
    };
    Url::parse(&format!("http://{host}:{PORT}")).ok()
}

async fn read(mut url: Url) -> Result<Page, String> {
    url.set_path("/varz");
    let read = async {
        let client = reqwest::Client::builder().timeout(ANSWER_MAX).build()?;
        client
            .get(url)
            .send()
            .await?
            .error_for_status()?
            .json()
            .await
    };
    // Without the address, which may hold a password.
    read.await
        .map_err(|error: reqwest::Error| exit::chain(&error.without_url()))
}

fn judge(page: Page) -> Line {
    let Some(config) = page.jetstream.and_then(|jetstream| jetstream.config) else {
        return Line::skipped(CHECK, "needs JetStream");
    };
    if config.sync_always {
        return Line::ok(CHECK, "always: a PubAck follows the sync of the disk");
    }
    let interval = Duration::from_nanos(config.sync_interval);
    Line::mend(
        CHECK,
        finding(
            format!(
                "the NATS server syncs its disk every {} s only: a power cut loses events that were answered 200 by then",
                interval.as_secs()
            ),
            "set `sync_interval: always` in its jetstream block, as deploy/nats.conf does, and restart it",
        ),
    )
}
