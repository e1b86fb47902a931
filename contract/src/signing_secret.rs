//! The form of a webhook signing secret in a file: `whsec_` and letters and digits.
//!
//! Owns how such a file, which the worker writes and ingress reads, is searched. Other text around a
//! secret is allowed: the file may be the whole output of the Stripe CLI.

pub const PREFIX: &str = "whsec_";

/// How many bytes of a file are read.
pub const FILE_BYTES_MAX: u64 = 64 << 10;

/// Returns every `whsec_[a-zA-Z0-9]+` in a text.
pub fn find(text: &str) -> impl Iterator<Item = &str> {
    let is_end = |character: char| !character.is_ascii_alphanumeric();
    let mut rest = text;
    std::iter::from_fn(move || {
        let (_, secret) = rest.split_at(rest.find(PREFIX)?);
        let (_, name) = secret.split_at(PREFIX.len());
        let length = name.find(is_end).unwrap_or(name.len());
        let (secret, after) = secret.split_at(PREFIX.len() + length);
        rest = after;
        Some(secret)
    })
    .filter(|secret| *secret != PREFIX)
}
