//! Stripe's side of the wire: events as its API renders them, signed and posted as it does.
//!
//! Owns the signature that the tests send (the products' own code is not used, or a shared mistake
//! would cancel out) and the delivery. [`purchase`](Purchase) holds what events look like,
//! [`story()`] which of them a subscription's life brings.

pub mod api;
mod event;
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
pub use purchase::{MONTH, Purchase, TRIAL};
pub use story::story;

/// The `Stripe-Signature` header: HMAC-SHA256 over `{timestamp}.{body}`, the key being the whole
/// `whsec_…` text.
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

/// One attempt to deliver a body: what Stripe posts, and what tests make of it.
#[derive(Clone, Debug)]
pub struct Delivery {
    body: Bytes,
    signature: Option<String>,
}

impl Delivery {
    /// A body with the signature that Stripe gives it now.
    pub fn new(body: impl Into<Bytes>, secret: &str) -> Self {
        Self::signed_at(body, secret, OffsetDateTime::now_utc().unix_timestamp())
    }

    /// A body signed at another time (Unix seconds).
    pub fn signed_at(body: impl Into<Bytes>, secret: &str, timestamp: i64) -> Self {
        let body = body.into();
        let signature = Some(sign(secret, timestamp, &body));
        Self { body, signature }
    }

    /// The same with this header instead, or with none.
    #[must_use]
    pub fn with_signature(mut self, signature: Option<&str>) -> Self {
        self.signature = signature.map(str::to_owned);
        self
    }

    /// The same signature over another body.
    #[must_use]
    pub fn with_body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// What is posted.
    pub fn body(&self) -> &Bytes {
        &self.body
    }

    /// The `Stripe-Signature` header.
    pub fn signature(&self) -> Option<&str> {
        self.signature.as_deref()
    }

    /// Posts it to a hook's URL, with the headers that Stripe sends.
    ///
    /// # Errors
    /// When no HTTP answer comes back.
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

/// An HTTP client that gives up after 30 s, as Stripe's command line does.
///
/// # Panics
/// When no client can be made.
pub fn client() -> reqwest::Client {
    static PROVIDER: OnceLock<()> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        // Fails when somebody else has installed one, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::builder()
        .timeout(Duration::from_secs(30))
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .expect("a client without special settings can be made")
}

/// `length` characters as Stripe's ids have them, different on every call and in every process.
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
