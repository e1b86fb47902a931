//! What brings rows and subscribers back after an outage.
//!
//! Owns the four ways: events of the stream applied again (`replay`), events that never arrived fetched
//! from Stripe (`backfill`), rows compared with Stripe's subscriptions (`reconcile`), and rows
//! signalled once more (`resend`). What a replay leaves to be signalled is `owed`'s. All fail while the database
//! or the broker is away. May not know the command line.

use sha2::{Digest as _, Sha256};

pub(crate) mod backfill;
pub(crate) mod reconcile;
pub(crate) mod replay;
pub(crate) mod resend;
pub(crate) mod unsent;

/// What is remembered of an id: 16 bytes of its hash, so that a million of them take some 20 MB.
fn short_hash(id: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(id).into();
    digest.first_chunk().copied().unwrap_or_default()
}
