//! Adding columns to a table, and dropping them again: what several steps do.

use sea_orm_migration::prelude::*;

/// Adds `columns` to `table`.
pub(crate) async fn add(
    manager: &SchemaManager<'_>,
    table: &'static str,
    columns: impl IntoIterator<Item = ColumnDef>,
) -> Result<(), DbErr> {
    // One column in a statement, because SQLite allows no more.
    for column in columns {
        let add = Table::alter().table(table).add_column(column).take();
        manager.alter_table(add).await?;
    }
    Ok(())
}

/// Drops `columns` from `table`.
pub(crate) async fn drop(
    manager: &SchemaManager<'_>,
    table: &'static str,
    columns: impl IntoIterator<Item = ColumnDef>,
) -> Result<(), DbErr> {
    for column in columns {
        let drop = Table::alter()
            .table(table)
            .drop_column(column.get_column_name())
            .take();
        manager.alter_table(drop).await?;
    }
    Ok(())
}
