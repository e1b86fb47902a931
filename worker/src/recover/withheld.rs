//! Rows that subscribers were never told about, because nobody knows whose they are.
//!
//! Owns the decision at the end of a replay, and the list of withheld rows for operators. The
//! decision itself is the domain's. `reconcile` and `resend` release such rows, and so does every
//! event that says whose the subscription is.

use litestripe_domain::plan::{self, Rebuilt};
use sea_orm::DatabaseTransaction;
use serde::Serialize;
use time::OffsetDateTime;

use crate::error::{Disposition, StoreError};
use crate::store::{self, Store};

/// Rows that are decided on in one transaction.
const BATCH: u64 = 500;

/// Withheld rows that a report names.
const NAMED_MAX: u64 = 10;

/// What an operator does about withheld rows.
const RELEASE: &str =
    "`reconcile --repair` finds out, `resend --subscription ID` sends one as it is";

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
                "{} rows are withheld, because nobody knows whose they are ({}{more}): {RELEASE}",
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

/// Decides for every row without a first signal whether that is sent now that a replay has applied
/// all its events. Runs before the replay's end is recorded, because then every worker sends what
/// is unsent; after a crash the next run of the replay decides again. Leaves rows that cannot be
/// read as they are.
pub(crate) async fn decide(store: &Store, rebuilt: Rebuilt) -> Result<(), StoreError> {
    let mut after = String::new();
    loop {
        let ids = store::subscription::not_whole(store.connection(), &after, BATCH).await?;
        let Some(last) = ids.last() else {
            return Ok(());
        };
        after.clone_from(last);
        match decide_together(store, ids.clone(), rebuilt).await {
            Err(error) if error.disposition() == Disposition::Poison => {
                for id in ids {
                    match decide_together(store, vec![id], rebuilt).await {
                        Err(error) if error.disposition() == Disposition::Poison => {}
                        outcome => outcome?,
                    }
                }
            }
            outcome => outcome?,
        }
    }
}

async fn decide_together(
    store: &Store,
    ids: Vec<String>,
    rebuilt: Rebuilt,
) -> Result<(), StoreError> {
    store
        .uncancelled(async move |tx| decide_rows(tx, &ids, rebuilt).await)
        .await
}

async fn decide_rows(
    tx: DatabaseTransaction,
    ids: &[String],
    rebuilt: Rebuilt,
) -> Result<(), StoreError> {
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    // Locked, because a live event that wrote such a row in between would be decided on never.
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
