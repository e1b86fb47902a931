//! Recovery of rows and subscribers after an outage.
//!
//! There are four ways: `replay` applies events of the stream again, `backfill` fetches events that
//! never arrived from Stripe, `reconcile` compares rows with Stripe's subscriptions, and `resend`
//! signals rows again. `unsent` sends the signals that a replay has held back, and `withheld`
//! decides whether the first signals of rebuilt rows are sent. `lost_rows` detects and records that
//! the rows were lost, and `resolutions` keeps operators' resolutions in the stream. All fail while
//! the database or the broker is unavailable. May not know the command line.

use sha2::{Digest as _, Sha256};

pub(crate) mod backfill;
pub(crate) mod lost_rows;
pub(crate) mod reconcile;
pub(crate) mod replay;
pub(crate) mod resend;
pub(crate) mod resolutions;
pub(crate) mod unsent;
pub(crate) mod withheld;

/// Returns the first 16 bytes of the id's hash, so that a million remembered ids take some 20 MB.
fn short_hash(id: &str) -> [u8; 16] {
    let digest: [u8; 32] = Sha256::digest(id).into();
    digest.first_chunk().copied().unwrap_or_default()
}
