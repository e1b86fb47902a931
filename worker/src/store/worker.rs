//! `litestripe_worker`: which workers run, and by which rules.
//!
//! All times are the database's, so that hosts need no common clock.

use litestripe_entity::worker::{Column, Entity};
use sea_orm::sea_query::{Expr, ExprTrait as _, OnConflict, Query};
use sea_orm::{ConnectionTrait, DbBackend, EntityTrait as _, QueryOrder as _, QuerySelect as _};

use crate::error::StoreError;

/// A worker without a heartbeat for this long has ended, in seconds. Three heartbeats may be late.
const ENDED_AFTER_S: i64 = 40;

/// What a worker recorded.
#[derive(Debug)]
pub struct Recorded {
    pub rules: String,
    /// Whether the worker runs, as far as its heartbeats show.
    pub is_running: bool,
}

/// Returns what workers have recorded, the newest heartbeat first.
pub async fn all<C: ConnectionTrait>(db: &C) -> Result<Vec<Recorded>, StoreError> {
    let age = now(db).sub(Expr::col(Column::Heartbeat));
    let rows: Result<Vec<(String, i64)>, _> = Entity::find()
        .select_only()
        .column(Column::Rules)
        .column_as(age, "age")
        .order_by_desc(Column::Heartbeat)
        .into_tuple()
        .all(db)
        .await;
    let rows = rows.map_err(StoreError::doing("read the workers' rules"))?;
    let recorded = |(rules, age): (String, i64)| Recorded {
        rules,
        is_running: age.abs() < ENDED_AFTER_S,
    };
    Ok(rows.into_iter().map(recorded).collect())
}

/// Records that the worker `name` runs by `rules`.
pub async fn record<C: ConnectionTrait>(db: &C, name: &str, rules: &str) -> Result<(), StoreError> {
    let doing = StoreError::doing("record the worker's rules");
    let mut insert = Query::insert()
        .into_table(Entity)
        .columns([Column::Name, Column::Rules, Column::Heartbeat])
        .to_owned();
    insert.values_panic([Expr::value(name), Expr::value(rules), now(db)]);
    insert.on_conflict(
        OnConflict::column(Column::Name)
            .update_columns([Column::Rules, Column::Heartbeat])
            .to_owned(),
    );
    db.execute(&insert).await.map(drop).map_err(&doing)
}

/// Records that the worker `name` has ended. Its rules stay, for commands that find no worker.
pub async fn record_end<C: ConnectionTrait>(db: &C, name: &str) -> Result<(), StoreError> {
    let mut update = Query::update();
    update
        .table(Entity)
        .value(Column::Heartbeat, now(db).sub(ENDED_AFTER_S))
        .and_where(Expr::col(Column::Name).eq(name));
    db.execute(&update)
        .await
        .map(drop)
        .map_err(StoreError::doing("record that the worker has ended"))
}

/// Removes the records of workers that have ended.
pub async fn remove_ended<C: ConnectionTrait>(db: &C) -> Result<(), StoreError> {
    let age = now(db).sub(Expr::col(Column::Heartbeat));
    let ended = age.clone().gte(ENDED_AFTER_S).or(age.lte(-ENDED_AFTER_S));
    let removed = Query::delete()
        .from_table(Entity)
        .cond_where(ended)
        .to_owned();
    db.execute(&removed)
        .await
        .map(drop)
        .map_err(StoreError::doing("remove the records of ended workers"))
}

/// The database's time in seconds since the Unix epoch.
fn now<C: ConnectionTrait>(db: &C) -> Expr {
    Expr::cust(match db.get_database_backend() {
        DbBackend::Postgres => "CAST(EXTRACT(EPOCH FROM now()) AS bigint)",
        _ => "CAST(strftime('%s', 'now') AS integer)",
    })
}
