//! Opening the database and checking its schema.

use tracing::info;

use crate::error::StoreError;
use crate::settings::{DatabaseKind, DatabaseSettings};
use crate::store::{Store, rights};
use crate::wait::{DATABASE, Wait};

/// The state that a command needs the schema in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Schema {
    Any,
    /// Current. Never migrated first, whatever LITESTRIPE_AUTO_MIGRATE says.
    Current,
    /// Current, and migrated first if LITESTRIPE_AUTO_MIGRATE is on.
    Migrated,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "the database's schema is behind (migration {0} is pending): run `litestripe-worker migrate up`, or \
         `litestripe-worker run` with LITESTRIPE_AUTO_MIGRATE=true"
    )]
    SchemaBehind(String),
}

/// Opens the database, waits until it answers, and checks or migrates its schema.
///
/// Fails only if an operator has to act: an unusable URL, a user or database that does not exist, a
/// schema that is behind.
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
    store.reach().await?;
    if schema == Schema::Migrated && settings.kind == DatabaseKind::Sqlite {
        rights::try_write(store.connection()).await?;
    }
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
