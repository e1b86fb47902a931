//! The `Stripe-Signature` scheme.
//!
//! Owns the header's grammar, the HMAC and the tolerance. May not know HTTP, JetStream, the clock
//! (receipt time is an argument), or anything inside the body. Only this module can make a
//! [`VerifiedBody`], so holding one is the proof.
//!
//! The verdict is the same as that of Stripe's Python SDK (`_webhook.py`, 16.1.0), including its
//! oddities: which texts it accepts as an integer, how it reads an item with no `=` or with two,
//! and that it accepts a timestamp in the future.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hmac::digest::CtOutput;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use time::OffsetDateTime;

/// The only scheme of a live signature. Stripe: "Verify webhook signatures manually".
const SCHEME: &str = "v1";

/// The length of an HMAC-SHA256, in bytes.
const MAC_BYTES: usize = 32;

/// The most digits that Python's `int()` accepts (`sys.int_info.default_max_str_digits`).
const TIMESTAMP_DIGITS_MAX: usize = 4300;

/// A signing secret (`whsec_…`): the whole text is the key. Never printed.
#[derive(Clone)]
pub struct SigningSecret {
    /// The HMAC with its key set: no delivery pays for that, and the text itself is not kept.
    keyed: Hmac<Sha256>,
    fingerprint: String,
    /// In seconds since the Unix epoch; 0 if it was not used yet. Clones share it.
    last_used: Arc<AtomicI64>,
}

impl SigningSecret {
    pub fn new(text: &str) -> Self {
        let keyed = Hmac::new_from_slice(text.as_bytes()).expect("HMAC takes a key of any length");
        let digest = Sha256::digest(text.as_bytes());
        let fingerprint = digest
            .iter()
            .take(4)
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Self {
            keyed,
            fingerprint,
            last_used: Arc::default(),
        }
    }

    /// The first 8 hex digits of the text's SHA-256, which identify a secret without showing it.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Records that a delivery that was received `at` is verified with it.
    pub(crate) fn record_use(&self, at: OffsetDateTime) {
        self.last_used
            .fetch_max(at.unix_timestamp(), Ordering::Relaxed);
    }

    /// When the last delivery that was verified with it was received, in seconds since the Unix
    /// epoch; 0 if there was none.
    pub(crate) fn last_used_s(&self) -> i64 {
        self.last_used.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningSecret({}…)", self.fingerprint)
    }
}

/// The body of a delivery that Stripe signed, byte for byte.
#[derive(Debug, Clone)]
pub struct VerifiedBody {
    bytes: Bytes,
    secret: usize,
}

impl VerifiedBody {
    /// The bytes as they were received.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Which of the secrets signed them: its index.
    pub fn secret(&self) -> usize {
        self.secret
    }
}

/// Why a delivery cannot be trusted to come from Stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("the Stripe-Signature header is missing")]
    Missing,
    #[error("the Stripe-Signature header is malformed")]
    Malformed,
    /// Stripe's bodies are always UTF-8.
    #[error("the body is not UTF-8")]
    NotText,
    #[error("no signature matches the body")]
    NoMatch,
    #[error("the signature's timestamp is too old")]
    Stale {
        /// Rounded down to whole seconds.
        age: Duration,
    },
}

/// Checks that one of `secrets` signed `body`, at most `tolerance` before `received`.
///
/// A tolerance of zero accepts any age.
pub fn verify(
    header: &str,
    body: Bytes,
    secrets: &[SigningSecret],
    received: OffsetDateTime,
    tolerance: Duration,
) -> Result<VerifiedBody, SignatureError> {
    if std::str::from_utf8(&body).is_err() {
        return Err(SignatureError::NotText);
    }
    let signed = SignedHeader::parse(header)?;
    let secret = secrets
        .iter()
        .position(|secret| signed.matches(secret, &body));
    let secret = secret.ok_or(SignatureError::NoMatch)?;
    match signed.timestamp.age(received) {
        Some(age) if !tolerance.is_zero() && age > tolerance => Err(SignatureError::Stale {
            age: Duration::from_secs(age.as_secs()),
        }),
        _ => Ok(VerifiedBody {
            bytes: body,
            secret,
        }),
    }
}

/// The parsed header: `t=…,v1=…,v1=…,v0=…` in any order.
struct SignedHeader {
    timestamp: Timestamp,
    signatures: Vec<[u8; MAC_BYTES]>,
}

impl SignedHeader {
    fn parse(header: &str) -> Result<Self, SignatureError> {
        if header.is_empty() {
            return Err(SignatureError::Missing);
        }
        // The SDK splits an item at its first two `=` and uses the first two parts.
        let items = header.split(',').map(|item| {
            let mut parts = item.split('=');
            (parts.next().unwrap_or_default(), parts.next())
        });
        let mut timestamp = None;
        let mut signatures = Vec::new();
        for (name, value) in items {
            match name {
                "t" => timestamp = timestamp.or(Some(value.ok_or(SignatureError::Malformed)?)),
                SCHEME => signatures.push(value.ok_or(SignatureError::Malformed)?),
                _ => {}
            }
        }
        let timestamp = timestamp
            .and_then(Timestamp::parse)
            .ok_or(SignatureError::Malformed)?;
        // The SDK's comparison raises at the first signature that is not ASCII.
        let signatures = signatures
            .iter()
            .take_while(|text| text.is_ascii())
            .filter_map(|text| mac(text))
            .collect();
        Ok(Self {
            timestamp,
            signatures,
        })
    }

    fn matches(&self, secret: &SigningSecret, body: &[u8]) -> bool {
        let mut mac = secret.keyed.clone();
        mac.update(self.timestamp.decimal.as_bytes());
        mac.update(b".");
        mac.update(body);
        // Compared in constant time.
        let expected = mac.finalize();
        self.signatures
            .iter()
            .any(|signature| expected == CtOutput::new((*signature).into()))
    }
}

struct Timestamp {
    /// The number as it is signed: as Python's `%d` writes it, without leading zeros, `+` or `_`.
    decimal: String,
    /// In seconds since 1970. A number that does not fit becomes the nearest one that does.
    unix_s: i64,
}

impl Timestamp {
    /// Parses what Python's `int()` accepts, except for digits other than 0 to 9.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let (sign, digits) = match text.strip_prefix('-') {
            Some(digits) => ("-", digits),
            None => ("", text.strip_prefix('+').unwrap_or(text)),
        };
        let groups_are_digits = digits
            .split('_')
            .all(|group| !group.is_empty() && group.bytes().all(|byte| byte.is_ascii_digit()));
        let digits = digits.replace('_', "");
        if !groups_are_digits || digits.len() > TIMESTAMP_DIGITS_MAX {
            return None;
        }
        let decimal = match digits.trim_start_matches('0') {
            "" => "0".to_owned(),
            significant => [sign, significant].concat(),
        };
        let nearest = if sign == "-" { i64::MIN } else { i64::MAX };
        let unix_s = decimal.parse().unwrap_or(nearest);
        Some(Self { decimal, unix_s })
    }

    /// Returns how long before `now` this is, or `None` if it is later.
    fn age(&self, now: OffsetDateTime) -> Option<Duration> {
        const NANOS_PER_S: i128 = 1_000_000_000;
        let age_ns =
            u128::try_from(now.unix_timestamp_nanos() - i128::from(self.unix_s) * NANOS_PER_S)
                .ok()?;
        Some(Duration::from_nanos_u128(age_ns))
    }
}

/// Parses 64 lower-case hexadecimal digits.
fn mac(text: &str) -> Option<[u8; MAC_BYTES]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    if pairs.len() != MAC_BYTES || !rest.is_empty() {
        return None;
    }
    let mut mac = [0; MAC_BYTES];
    for (byte, [high, low]) in mac.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(mac)
}

#[cfg(test)]
mod tests;
