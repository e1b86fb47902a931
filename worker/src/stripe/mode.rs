//! Whether the key and the rows are of one mode.
//!
//! Owns the check that keeps a live key's objects out of a table of test ones, and the other way
//! round: the keys and databases of two environments are easily mixed up, and it shows late.

use crate::error::StoreError;
use crate::settings::StripeSettings;
use crate::store::{self, Store};

/// All rows are of the other mode than the key.
#[derive(Debug, thiserror::Error)]
#[error(
    "STRIPE_SECRET_KEY is a {key} mode key, but every row of stripe_subscription is {rows} mode: set it to the {rows} \
     mode's key (sk_{rows}_… or rk_{rows}_…), or DATABASE_URL to the {key} mode's database; `--any-mode` goes on all the same"
)]
pub(crate) struct Mismatch {
    key: &'static str,
    rows: &'static str,
}

/// The mismatch of key and rows, if there is one. Without rows there is none, nor with rows of both
/// modes.
pub(crate) async fn find_mismatch(
    store: &Store,
    stripe: &StripeSettings,
) -> Result<Option<Mismatch>, StoreError> {
    let has_table = store.migrations().await?.iter().any(|step| step.applied);
    let modes = if has_table {
        store::subscription::modes(store.connection()).await?
    } else {
        Vec::new()
    };
    Ok(match modes.as_slice() {
        [rows] if *rows != stripe.is_live() => Some(Mismatch {
            key: mode_name(stripe.is_live()),
            rows: mode_name(*rows),
        }),
        _ => None,
    })
}

fn mode_name(livemode: bool) -> &'static str {
    if livemode { "live" } else { "test" }
}
