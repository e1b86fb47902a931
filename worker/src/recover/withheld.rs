//! Withheld rows: no signal of them was ever sent, because their user is unknown.
//!
//! Owns the decision at the end of a replay, and the list of withheld rows for operators. The
//! decision itself is the domain's. `reconcile` and `resend` release such rows, and so does every
//! event that names the subscription's user.

use litestripe_domain::plan::{self, Rebuilt};
use serde::Serialize;
use time::OffsetDateTime;

use crate::error::StoreError;
use crate::store::Transaction;
use crate::store::{self, Store};

/// Rows that are decided on in one transaction.
const BATCH: u64 = 500;

/// Withheld rows that a report names.
const NAMED_MAX: u64 = 10;

/// What an operator does about withheld rows.
const RELEASE: &str =
    "`reconcile --repair` asks Stripe, `resend --subscription ID` sends one as it is";

/// The withheld rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Withheld {
    #[serde(rename = "withheld")]
    pub count: u64,
    /// Some of them, in the order of their ids.
    #[serde(rename = "withheld_first")]
    pub first: Vec<String>,
}

impl Withheld {
    /// Says what an operator does about the rows. `None` if there are none.
    pub(crate) fn advice(&self) -> Option<String> {
        let more = if self.count > self.first.len() as u64 {
            ", …"
        } else {
            ""
        };
        (self.count > 0).then(|| {
            format!(
                "{} rows are withheld, because their user is unknown ({}{more}): {RELEASE}",
                self.count,
                self.first.join(", ")
            )
        })
    }

    pub(crate) async fn find(store: &Store) -> Result<Self, StoreError> {
        let db = store.connection();
        Ok(Self {
            count: store::subscription::count_withheld(db).await?,
            first: store::subscription::withheld(db, NAMED_MAX).await?,
        })
    }
}

/// Decides and records for every row without a first signal whether it is sent or withheld, now
/// that a replay has applied all its events. Runs before the replay's end is recorded, because then
/// every worker sends what is unsent; after a crash the next run of the replay decides again.
/// Leaves rows that cannot be read as they are.
pub(crate) async fn withhold_or_release(store: &Store, rebuilt: Rebuilt) -> Result<(), StoreError> {
    let mut after = String::new();
    loop {
        let ids = store::subscription::not_whole(store.connection(), &after, BATCH).await?;
        let Some(last) = ids.last() else {
            return Ok(());
        };
        after.clone_from(last);
        match write_decisions(store, ids.clone(), rebuilt).await {
            Err(error) if error.is_refusal() => {
                for id in ids {
                    match write_decisions(store, vec![id], rebuilt).await {
                        Err(error) if error.is_refusal() => {}
                        outcome => outcome?,
                    }
                }
            }
            outcome => outcome?,
        }
    }
}

async fn write_decisions(
    store: &Store,
    ids: Vec<String>,
    rebuilt: Rebuilt,
) -> Result<(), StoreError> {
    store
        .uncancelled(async move |tx| write_decisions_in(tx, &ids, rebuilt).await)
        .await
}

async fn write_decisions_in(
    tx: Transaction,
    ids: &[String],
    rebuilt: Rebuilt,
) -> Result<(), StoreError> {
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    // Locked, because a live event that wrote such a row in between would otherwise never be
    // decided on.
    store::subscription::lock(&tx, &ids).await?;
    let mut stored: Vec<_> = store::subscription::load(&tx, &ids)
        .await?
        .into_iter()
        .collect();
    stored.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
    let rows = stored
        .into_iter()
        .filter_map(|(id, row)| plan::plan_rebuilt(&id, row, rebuilt));
    store::subscription::save(&tx, rows.collect(), OffsetDateTime::now_utc()).await?;
    tx.commit()
        .await
        .map_err(StoreError::doing("commit which signals are withheld"))
}
