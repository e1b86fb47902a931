//! Replacing indexes: what several steps do.

use sea_orm_migration::prelude::*;

/// Drops the indexes `old` and creates `new`: each a name, and what it is on.
pub(crate) async fn replace(
    manager: &SchemaManager<'_>,
    old: &[(&str, &str)],
    new: &[(&str, &str)],
) -> Result<(), DbErr> {
    let db = manager.get_connection();
    for (name, _) in old {
        db.execute_unprepared(&format!("DROP INDEX {name}")).await?;
    }
    for (name, on) in new {
        db.execute_unprepared(&format!("CREATE INDEX {name} ON {on}"))
            .await?;
    }
    Ok(())
}
