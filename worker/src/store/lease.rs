//! `litestripe_lease`: work that only one worker does at a time.
//!
//! Owns taking, renewing and releasing a lease, and taking it over from a dead holder. Hosts need
//! no common clock: if the counter of a lease does not change for its duration, measured by this
//! process's clock, its holder is gone. A holder that was paused for that long and then continues
//! is a second one. So a lease is only for idempotent work, where two holders at a time waste
//! effort and harm nothing.

use std::time::{Duration, Instant};

use litestripe_contract::exit;
use litestripe_entity::lease::{ActiveModel, Column, Entity};
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict};
use sea_orm::{ActiveValue::Set, DbErr, EntityTrait as _};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Store;
use crate::error::StoreError;

/// How long a lease lasts if it is not renewed.
const DURATION: Duration = Duration::from_secs(15);

/// How often it is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(5);

/// A lease that some worker may hold.
pub struct Lease {
    store: Store,
    name: &'static str,
    /// The counter of another worker's lease, and when this process first read that value.
    seen: Option<(i64, Instant)>,
}

impl Lease {
    pub fn new(store: Store, name: &'static str) -> Self {
        Self {
            store,
            name,
            seen: None,
        }
    }

    /// Runs `work` while holding the lease. Returns `None` if another worker holds it: call again
    /// later.
    ///
    /// # Errors
    /// The lease could not be read or taken; `work` has not begun.
    ///
    /// # Cancel safety
    /// Not cancel safe: a cancelled statement may leave its connection in the middle of an answer.
    pub async fn hold_during<T>(
        &mut self,
        work: impl Future<Output = T>,
    ) -> Result<Option<T>, StoreError> {
        let Some(renewed) = self.take().await? else {
            return Ok(None);
        };
        let (outcome, renewed) = self.renew_during(work, renewed).await;
        if let Err(error) = write(&self.store, self.name, false, renewed).await {
            debug!(
                "cannot release the lease {}, it will expire: {}",
                self.name,
                exit::chain(&error)
            );
        }
        Ok(Some(outcome))
    }

    /// Takes the lease if it is free or its holder is gone. Returns its counter.
    async fn take(&mut self) -> Result<Option<i64>, StoreError> {
        let lease = Entity::find_by_id(self.name)
            .one(self.store.connection())
            .await;
        let lease = lease.map_err(StoreError::doing("read a lease"))?;
        let renewed = lease.as_ref().map_or(0, |lease| lease.renewed);
        if lease.is_some_and(|lease| lease.is_held) && !self.observe_expiry(renewed) {
            debug!("another worker holds the lease {}", self.name);
            return Ok(None);
        }
        write(&self.store, self.name, true, renewed).await
    }

    /// Records the counter of another worker's lease. Returns whether the holder has not renewed
    /// the lease for its duration.
    fn observe_expiry(&mut self, renewed: i64) -> bool {
        match self.seen {
            Some((seen, since)) if seen == renewed => since.elapsed() >= DURATION,
            _ => {
                self.seen = Some((renewed, Instant::now()));
                false
            }
        }
    }

    async fn renew_during<T>(&self, work: impl Future<Output = T>, mut renewed: i64) -> (T, i64) {
        let done = CancellationToken::new();
        let work = async {
            let outcome = work.await;
            done.cancel();
            outcome
        };
        let renew = async {
            while done
                .run_until_cancelled(tokio::time::sleep(RENEW_EVERY))
                .await
                .is_some()
            {
                match write(&self.store, self.name, true, renewed).await {
                    Ok(Some(counter)) => renewed = counter,
                    // The work continues, because it is idempotent.
                    Ok(None) => debug!("another worker took the lease {}", self.name),
                    Err(error) => debug!(
                        "cannot renew the lease {}: {}",
                        self.name,
                        exit::chain(&error)
                    ),
                }
            }
            renewed
        };
        tokio::join!(work, renew)
    }
}

/// Writes the lease `name` if it still has the counter `previous` (0 if it does not exist). Returns
/// the new counter, or `None` if another worker has written it since.
async fn write(
    store: &Store,
    name: &str,
    is_held: bool,
    previous: i64,
) -> Result<Option<i64>, StoreError> {
    let renewed = previous + 1;
    let model = ActiveModel {
        name: Set(name.to_owned()),
        is_held: Set(is_held),
        renewed: Set(renewed),
    };
    let as_read = Expr::col((Entity, Column::Renewed)).eq(previous);
    let guarded = OnConflict::column(Column::Name)
        .update_columns([Column::IsHeld, Column::Renewed])
        .action_and_where(as_read)
        .to_owned();
    match Entity::insert_many([model])
        .on_conflict(guarded)
        .exec_without_returning(store.connection())
        .await
    {
        Ok(written) => Ok((written > 0).then_some(renewed)),
        Err(DbErr::RecordNotInserted) => Ok(None),
        Err(error) => Err(StoreError::doing("write a lease")(error)),
    }
}
