//! The check that the Stripe key and the rows have the same mode, live or test.
//!
//! It keeps a live key's objects out of a table of test objects, and the reverse. The keys and
//! databases of two environments are easily mixed up, and the mistake is noticed late.

use litestripe_contract::stream::Finding;

use crate::error::StoreError;
use crate::settings::StripeSettings;
use crate::store::{self, Store};

/// Every row has the other mode than the key.
#[derive(Debug, thiserror::Error)]
#[error("{}: {}; `--any-mode` skips this check", self.what(), self.mend())]
pub(crate) struct Mismatch {
    key: &'static str,
    rows: &'static str,
}

impl Mismatch {
    fn what(&self) -> String {
        let Self { key, rows } = self;
        format!(
            "STRIPE_SECRET_KEY is a {key} mode key, but every row of stripe_subscription is {rows} mode"
        )
    }

    fn mend(&self) -> String {
        let Self { key, rows } = self;
        format!(
            "set it to the {rows} mode's key (sk_{rows}_… or rk_{rows}_…), or DATABASE_URL to the {key} mode's database"
        )
    }
}

impl From<Mismatch> for Finding {
    fn from(mismatch: Mismatch) -> Self {
        Self {
            what: mismatch.what(),
            mend: mismatch.mend(),
        }
    }
}

/// Returns the mismatch of key and rows, if there is one. There is none without rows, or with rows
/// of both modes.
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

/// Returns the mode's name.
pub(crate) fn mode_name(livemode: bool) -> &'static str {
    if livemode { "live" } else { "test" }
}
