//! Opening the database, and whether its schema will do.

use tracing::info;

use crate::error::StoreError;
use crate::settings::DatabaseSettings;
use crate::store::Store;
use crate::wait::{DATABASE, Wait};

/// What the schema has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Schema {
    Any,
    /// Current. Who asks is no reason to change it.
    Current,
    /// Current, and migrated first where LITESTRIPE_AUTO_MIGRATE allows it.
    Migrated,
}

/// The database cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its schema is behind, and we were not told to migrate it.
    #[error(
        "the database's schema is behind ({0} waits): run `litestripe-worker migrate up`, or `litestripe-worker run` with \
         LITESTRIPE_AUTO_MIGRATE=true"
    )]
    SchemaBehind(String),
}

/// Opens the database, waits until it answers and sees to its schema.
///
/// Fails only where a person must help: a URL that cannot be used, a user or database that does not
/// exist, a schema that is behind.
pub(crate) async fn open(settings: &DatabaseSettings, schema: Schema) -> Result<Store, OpenError> {
    let mut wait = Wait::new(DATABASE);
    loop {
        match try_open(settings, schema).await {
            Err(OpenError::Store(error)) if error.is_temporary() => {
                tokio::time::sleep(wait.failed(&error)).await
            }
            Ok(store) => {
                wait.succeeded();
                return Ok(store);
            }
            Err(error) => return Err(error),
        }
    }
}

async fn try_open(settings: &DatabaseSettings, schema: Schema) -> Result<Store, OpenError> {
    let store = Store::open(settings).await?;
    store.ping().await?;
    if schema == Schema::Any {
        return Ok(store);
    }
    let steps = store.migrations().await?;
    let Some(behind) = steps.into_iter().find(|step| !step.applied) else {
        return Ok(store);
    };
    if schema == Schema::Current || !settings.auto_migrate {
        return Err(OpenError::SchemaBehind(behind.name));
    }
    store.migrate_up().await?;
    info!("migrated the database's schema");
    Ok(store)
}
