//! Plays Stripe: renders events as its API does, signs them and posts them to the hook.
//!
//! Owns the delivery and its signature. It does not use the product's code, so that a mistake there
//! is not repeated here and overlooked. [`purchase`](Purchase) makes the objects, [`story()`] the
//! events of a subscription's life.

pub mod api;
mod event;
mod notification;
mod purchase;
mod story;

use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use time::OffsetDateTime;

pub use event::Event;
pub use notification::{Notification, Related};
pub use purchase::{MONTH, Purchase, TRIAL};
pub use story::story;

/// Makes the `Stripe-Signature` header: HMAC-SHA256 over `{timestamp}.{body}`, with the whole
/// `whsec_…` text as the key.
pub fn sign(secret: &str, timestamp: i64, body: &[u8]) -> String {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(timestamp.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    let hex = mac
        .finalize()
        .into_bytes()
        .into_iter()
        .map(|byte| format!("{byte:02x}"));
    format!("t={timestamp},v1={}", hex.collect::<String>())
}

/// One webhook request: a body and its signature, which tests may change.
#[derive(Clone, Debug)]
pub struct Delivery {
    body: Bytes,
    signature: Option<String>,
}

impl Delivery {
    /// A body signed now.
    pub fn new(body: impl Into<Bytes>, secret: &str) -> Self {
        Self::signed_at(body, secret, OffsetDateTime::now_utc().unix_timestamp())
    }

    /// A body signed at another time (Unix seconds).
    pub fn signed_at(body: impl Into<Bytes>, secret: &str, timestamp: i64) -> Self {
        let body = body.into();
        let signature = Some(sign(secret, timestamp, &body));
        Self { body, signature }
    }

    /// Replaces or removes the signature header.
    #[must_use]
    pub fn with_signature(mut self, signature: Option<&str>) -> Self {
        self.signature = signature.map(str::to_owned);
        self
    }

    /// Replaces the body and keeps the signature.
    #[must_use]
    pub fn with_body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    pub fn body(&self) -> &Bytes {
        &self.body
    }

    pub fn signature(&self) -> Option<&str> {
        self.signature.as_deref()
    }

    /// Posts it to a hook's URL with the headers that Stripe sends.
    pub async fn post(
        &self,
        client: &reqwest::Client,
        url: &str,
    ) -> reqwest::Result<reqwest::Response> {
        let mut request = client
            .post(url)
            .header(
                "User-Agent",
                "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
            )
            .header("Content-Type", "application/json; charset=utf-8")
            .header("Accept", "*/*; q=0.5, application/xml")
            .header("Cache-Control", "no-cache");
        if let Some(signature) = &self.signature {
            request = request.header("Stripe-Signature", signature);
        }
        request.body(self.body.clone()).send().await
    }
}

/// Makes an HTTP client with a timeout of 30 s, like that of Stripe's command line tool.
pub fn client() -> reqwest::Client {
    static PROVIDER: OnceLock<()> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        // Fails if the process has installed another provider already, which works as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::builder()
        .timeout(Duration::from_secs(30))
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .expect("a client without special settings can be made")
}

/// Returns `length` characters like those of Stripe's ids, different for every call and process.
pub(crate) fn unique(length: usize) -> String {
    const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    static KEYS: OnceLock<RandomState> = OnceLock::new();
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let keys = KEYS.get_or_init(RandomState::new);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    (0..length)
        .map(|place| {
            let index = keys.hash_one((count, place)) % 62;
            char::from(ALPHABET[usize::try_from(index).expect("a remainder of 62 is small")])
        })
        .collect()
}
