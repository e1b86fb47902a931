//! Test deliveries: whether ingress accepts a signing secret.
//!
//! Signs an event of a type that ingress does not store, posts it to the endpoint's URL as Stripe
//! would, and reads the status. This shows at once that the URL leads to ingress and that ingress
//! has the secret; Stripe can only be asked for such a delivery by Dashboard.

use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use litestripe_contract::{connect, header};
use reqwest::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use sha2::Sha256;
use time::OffsetDateTime;
use tokio::time::Instant;
use url::Url;

/// Stripe's type for test deliveries. Ingress answers 200 and stores it only if its settings say
/// so; no worker handles it.
const TYPE: &str = "ping";

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How many deliveries in a row must be accepted, each on a connection of its own: there may be
/// several ingresses behind the URL.
const IN_A_ROW: u32 = 4;

/// How long ingress may take to use a new secret. It reads the file every second.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(15);

const INTERVAL: Duration = Duration::from_millis(250);

/// Why a test delivery was not accepted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProbeError {
    #[error("a test delivery to the URL was answered {0}")]
    Refused(StatusCode),
    #[error("a test delivery cannot reach the URL from here")]
    Unreachable(#[source] reqwest::Error),
}

/// Sends test deliveries until several in a row are accepted.
///
/// # Errors
/// The last one's, if that takes more than 15 s.
pub(crate) async fn wait_until_accepted(
    url: &Url,
    secret: &SecretString,
) -> Result<(), ProbeError> {
    let client = client()?;
    let deadline = Instant::now() + ACCEPTED_WITHIN;
    let mut accepted = 0;
    while accepted < IN_A_ROW {
        match deliver(&client, url, secret).await {
            Ok(()) => accepted += 1,
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => {
                accepted = 0;
                tokio::time::sleep(INTERVAL).await;
            }
        }
    }
    Ok(())
}

fn client() -> Result<reqwest::Client, ProbeError> {
    connect::install_crypto_provider();
    reqwest::Client::builder()
        .timeout(TIMEOUT)
        .pool_max_idle_per_host(0)
        // Stripe takes a redirect for a failure.
        .redirect(reqwest::redirect::Policy::none())
        .user_agent(concat!("litestripe/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(ProbeError::Unreachable)
}

async fn deliver(
    client: &reqwest::Client,
    url: &Url,
    secret: &SecretString,
) -> Result<(), ProbeError> {
    let now = OffsetDateTime::now_utc().unix_timestamp();
    let id = format!("evt_probe{}", nuid::next());
    let body = json!({ "id": id, "object": "event", "type": TYPE, "created": now }).to_string();
    let answer = client
        .post(url.clone())
        .header("Content-Type", "application/json; charset=utf-8")
        .header(header::STRIPE_SIGNATURE, sign(secret, now, &body))
        .body(body)
        .send()
        .await
        .map_err(|error| ProbeError::Unreachable(error.without_url()))?;
    match answer.status() {
        status if status.is_success() => Ok(()),
        status => Err(ProbeError::Refused(status)),
    }
}

/// Stripe: "Verify webhook signatures manually".
fn sign(secret: &SecretString, timestamp: i64, body: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose_secret().as_bytes())
        .expect("HMAC takes a key of any length");
    mac.update(format!("{timestamp}.{body}").as_bytes());
    let digest = mac.finalize().into_bytes();
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={timestamp},v1={hex}")
}
