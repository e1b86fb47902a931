//! Adds `tracestate` to `litestripe_signal_outbox`, beside `traceparent`, and both to
//! `litestripe_question`.

use sea_orm_migration::prelude::*;

use crate::columns;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

fn columns() -> [(&'static str, Vec<ColumnDef>); 2] {
    let text = |name| ColumnDef::new(name).text().take();
    [
        ("litestripe_signal_outbox", vec![text("tracestate")]),
        (
            "litestripe_question",
            vec![text("traceparent"), text("tracestate")],
        ),
    ]
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, columns) in columns() {
            columns::add(manager, table, columns).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, columns) in columns() {
            columns::drop(manager, table, columns).await?;
        }
        Ok(())
    }
}
