//! The schema, step by step.
//!
//! Owns the schema's history. A step is never edited after its release. It goes down as well as up,
//! and leaves a schema on which the previous program version still runs. It creates nothing "if it
//! does not exist": what exists already is not ours, and the step fails. May not know the entities,
//! which describe only the latest schema.

use sea_orm_migration::prelude::*;
use sea_orm_migration::sea_orm::{ConnectionTrait, DynIden};

pub use history::applied;
pub use sea_orm_migration::MigratorTrait;

mod columns;
mod history;
mod indexes;
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
mod m20261130_000012_drop_signal_due;
mod m20261130_000013_growth;
mod m20261130_000014_dead_letters;
mod m20261130_000015_installation;
mod m20261130_000016_question_attempts;
mod m20261130_000018_rules;
mod m20261201_000020_figures;
mod m20261201_000021_trace;
mod m20261201_000022_withheld;

/// All steps, in order.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migration_table_name() -> DynIden {
        history::TABLE.into_iden()
    }

    async fn install<C: ConnectionTrait>(db: &C) -> Result<(), DbErr> {
        history::install(db).await
    }

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
            Box::new(m20261130_000012_drop_signal_due::Migration),
            Box::new(m20261130_000013_growth::Migration),
            Box::new(m20261130_000014_dead_letters::Migration),
            Box::new(m20261130_000015_installation::Migration),
            Box::new(m20261130_000016_question_attempts::Migration),
            Box::new(m20261130_000018_rules::Migration),
            Box::new(m20261201_000020_figures::Migration),
            Box::new(m20261201_000021_trace::Migration),
            Box::new(m20261201_000022_withheld::Migration),
        ]
    }
}
