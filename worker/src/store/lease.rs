//! `litestripe_lease`: "only one worker does this".
//!
//! Owns taking, renewing, releasing and taking over. Needs no clock that two hosts agree on: a lease
//! whose counter has not changed for as long as it lasts, watched by our own clock, has lost its
//! holder. A holder that was stopped for that long and goes on is a second one. So a lease is for work
//! that is idempotent, where two at a time are a waste and no harm.

use std::time::{Duration, Instant};

use litestripe_contract::exit;
use litestripe_entity::lease::{ActiveModel, Column, Entity};
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict};
use sea_orm::{ActiveValue::Set, DbErr, EntityTrait as _};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Store;
use crate::error::StoreError;

/// How long a lease lasts that is not renewed.
const LASTS: Duration = Duration::from_secs(15);

/// How often it is renewed.
const RENEW_EVERY: Duration = Duration::from_secs(5);

/// A lease that some worker may hold.
pub struct Lease {
    store: Store,
    name: &'static str,
    /// The counter that another worker held it under, and when we first saw that.
    seen: Option<(i64, Instant)>,
}

impl Lease {
    /// The lease `name`.
    pub fn new(store: Store, name: &'static str) -> Self {
        Self {
            store,
            name,
            seen: None,
        }
    }

    /// Does `work` while no other worker does. Returns `None` if another worker holds the lease: ask again.
    /// An error comes before `work` has begun.
    ///
    /// # Cancel safety
    /// None: a cancelled statement may leave its connection in the middle of an answer.
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
                "the lease {} runs out by itself: {}",
                self.name,
                exit::chain(&error)
            );
        }
        Ok(Some(outcome))
    }

    /// Takes the lease, if it is free or its holder is gone. Returns its counter.
    async fn take(&mut self) -> Result<Option<i64>, StoreError> {
        let lease = Entity::find_by_id(self.name)
            .one(self.store.connection())
            .await;
        let lease = lease.map_err(StoreError::doing("read a lease"))?;
        let renewed = lease.as_ref().map_or(0, |lease| lease.renewed);
        if lease.is_some_and(|lease| lease.is_held) && !self.is_given_up(renewed) {
            debug!("another worker holds the lease {}", self.name);
            return Ok(None);
        }
        write(&self.store, self.name, true, renewed).await
    }

    /// Whether the holder has not renewed the lease for as long as it lasts, as far as we saw.
    fn is_given_up(&mut self, renewed: i64) -> bool {
        match self.seen {
            Some((seen, since)) if seen == renewed => since.elapsed() >= LASTS,
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
                    // The work goes on: it is idempotent.
                    Ok(None) => debug!("another worker took the lease {}", self.name),
                    Err(error) => debug!(
                        "the lease {} is not renewed: {}",
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

/// Writes the lease `name` if it still has the counter `over` (0 if it does not exist). Returns the new
/// counter, or `None` if another worker wrote it since.
async fn write(
    store: &Store,
    name: &str,
    is_held: bool,
    over: i64,
) -> Result<Option<i64>, StoreError> {
    let renewed = over + 1;
    let model = ActiveModel {
        name: Set(name.to_owned()),
        is_held: Set(is_held),
        renewed: Set(renewed),
    };
    let as_read = Expr::col((Entity, Column::Renewed)).eq(over);
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
