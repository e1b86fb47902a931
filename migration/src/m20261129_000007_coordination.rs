//! Creates the tables by which workers coordinate: `litestripe_lease`, `litestripe_backfill` and
//! `litestripe_erasure`.

use sea_orm_migration::prelude::*;

const LEASE: &str = "litestripe_lease";
const BACKFILL: &str = "litestripe_backfill";
const ERASURE: &str = "litestripe_erasure";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let text = |column: &'static str| ColumnDef::new(column).text().not_null().take();
        let boolean = |column: &'static str| ColumnDef::new(column).boolean().not_null().take();
        let number = |column: &'static str| ColumnDef::new(column).big_integer().not_null().take();
        let create = |table: &'static str| Table::create().table(table).take();
        let mut lease = create(LEASE);
        lease
            .col(text("name").primary_key())
            .col(boolean("is_held"))
            .col(number("renewed"));
        let mut backfill = create(BACKFILL);
        backfill
            .col(boolean("livemode").primary_key())
            .col(number("began"));
        let mut erasure = create(ERASURE);
        erasure
            .col(text("stripe_id").primary_key())
            .col(number("erased_at"))
            .col(number("sequence").unique_key());
        for table in [lease, backfill, erasure] {
            manager.create_table(table).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in [ERASURE, BACKFILL, LEASE] {
            manager.drop_table(Table::drop().table(name).take()).await?;
        }
        Ok(())
    }
}
