//! The schema, step by step.
//!
//! Owns the schema's history. A step is never edited after its release. It goes down as well as up,
//! and leaves a schema on which the previous program version still runs. May not know the entities,
//! which describe only the latest schema.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::DatabaseConnection;

pub use sea_orm_migration::MigratorTrait;

mod columns;
mod m20261123_000001_stripe_subscription;
mod m20261123_000002_orphaned_payment;
mod m20261123_000003_signal_outbox;
mod m20261123_000004_due_check;
mod m20261124_000005_replay;
mod m20261125_000006_room_to_update;
mod m20261129_000007_coordination;
mod m20261129_000008_last_sent;
mod m20261129_000009_endive;
mod m20261129_000010_notifications;
mod m20261129_000011_resolutions;
mod m20261130_000012_own_names;

/// All steps, in order.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m20261123_000001_stripe_subscription::Migration),
            Box::new(m20261123_000002_orphaned_payment::Migration),
            Box::new(m20261123_000003_signal_outbox::Migration),
            Box::new(m20261123_000004_due_check::Migration),
            Box::new(m20261124_000005_replay::Migration),
            Box::new(m20261125_000006_room_to_update::Migration),
            Box::new(m20261129_000007_coordination::Migration),
            Box::new(m20261129_000008_last_sent::Migration),
            Box::new(m20261129_000009_endive::Migration),
            Box::new(m20261129_000010_notifications::Migration),
            Box::new(m20261129_000011_resolutions::Migration),
            Box::new(m20261130_000012_own_names::Migration),
        ]
    }
}

/// Returns the names of the steps that the database has, including steps of a later program
/// version. Creates nothing.
pub async fn applied(db: &DatabaseConnection) -> Result<Vec<String>, DbErr> {
    const HISTORY: &str = "seaql_migrations";
    if !SchemaManager::new(db).has_table(HISTORY).await? {
        return Ok(Vec::new());
    }
    let names = Query::select()
        .column("version")
        .from(HISTORY)
        .order_by("version", Order::Asc)
        .take();
    db.query_all(&names)
        .await?
        .iter()
        .map(|row| row.try_get("", "version"))
        .collect()
}
