//! `litestripe_backfill`: the start of the last complete backfill, by mode.

use litestripe_entity::backfill::{ActiveModel, Column, Entity};
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict};
use sea_orm::{ActiveValue::Set, ConnectionTrait, DbErr, EntityTrait as _};
use time::OffsetDateTime;

use crate::error::StoreError;

/// Returns when the last complete backfill of this mode began.
pub async fn last_complete<C: ConnectionTrait>(
    db: &C,
    livemode: bool,
) -> Result<Option<OffsetDateTime>, StoreError> {
    let row = Entity::find_by_id(livemode)
        .one(db)
        .await
        .map_err(StoreError::doing("read the last backfill"))?;
    Ok(row.and_then(|row| OffsetDateTime::from_unix_timestamp(row.began).ok()))
}

/// Records that a complete backfill began at `began`, unless another one was recorded since `last`
/// was read.
pub async fn record<C: ConnectionTrait>(
    db: &C,
    livemode: bool,
    began: OffsetDateTime,
    last: Option<OffsetDateTime>,
) -> Result<(), StoreError> {
    let model = ActiveModel {
        livemode: Set(livemode),
        began: Set(began.unix_timestamp()),
    };
    let as_read = Expr::col((Entity, Column::Began)).eq(last.map(OffsetDateTime::unix_timestamp));
    let guarded = OnConflict::column(Column::Livemode)
        .update_column(Column::Began)
        .action_and_where(as_read)
        .to_owned();
    match Entity::insert_many([model])
        .on_conflict(guarded)
        .exec_without_returning(db)
        .await
    {
        Ok(_) | Err(DbErr::RecordNotInserted) => Ok(()),
        Err(error) => Err(StoreError::doing("record a backfill")(error)),
    }
}
