//! What went wrong, sorted by what the worker does about it.
//!
//! Owns the one thing a caller branches on. May not know which batch or command it was.

use std::time::Duration;

use sea_orm::sqlx;
use sea_orm::{DbErr, RuntimeErr};

/// What the worker does with a message whose event could not be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Something else is down. Keep the message, wait with backoff, never count tries.
    Wait,
    /// This event can never be applied. Dead letter with the reason; the batch goes on.
    Poison,
}

/// The database did not do what was asked of it.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub struct StoreError {
    /// What was asked, to go after "cannot".
    pub doing: &'static str,
    /// Why not. Never holds a value of ours: see [`StoreError::disposition`].
    #[source]
    pub cause: Cause,
}

/// Why the database did not do it.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error(transparent)]
    Database(#[from] DbErr),
    /// What is stored cannot be read as JSON, or what is to be stored cannot be written.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("no answer within {} s", .0.as_secs())]
    Silence(Duration),
    #[error("it panicked, which is a bug")]
    Panic,
}

impl StoreError {
    /// For `map_err`.
    pub fn doing<E: Into<Cause>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |cause| Self {
            doing,
            cause: cause.into(),
        }
    }

    /// Whether the same statement may succeed later.
    ///
    /// Only what the database says of the data itself is permanent. PostgreSQL: "Error Codes",
    /// classes 22 (data exception), 23 (integrity constraint) and 54 (program limit).
    /// SQLite: "Result Codes", TOOBIG, CONSTRAINT and MISMATCH.
    pub fn disposition(&self) -> Disposition {
        match &self.cause {
            Cause::Json(_) | Cause::Panic | Cause::Database(DbErr::Json(_) | DbErr::Type(_)) => {
                Disposition::Poison
            }
            Cause::Silence(_) => Disposition::Wait,
            Cause::Database(error) => match database_error(error) {
                Some(error) if is_about_data(error) => Disposition::Poison,
                _ => Disposition::Wait,
            },
        }
    }

    /// Whether a start that failed for this reason may succeed later without a person's help: the
    /// database is away, busy, restarting, full or read-only.
    pub fn is_temporary(&self) -> bool {
        let Cause::Database(error) = &self.cause else {
            return matches!(self.cause, Cause::Silence(_));
        };
        match (error, sqlx_error(error)) {
            (DbErr::ConnectionAcquire(_), _) => true,
            (_, Some(error)) => match error.as_database_error() {
                Some(error) => is_passing(error),
                None => !matches!(error, sqlx::Error::Configuration(_)),
            },
            _ => false,
        }
    }

    /// Whether the database cannot read a value as the type it is compared with.
    ///
    /// PostgreSQL: "Error Codes", 22P02 (invalid text representation) and 22003 (out of range).
    pub fn is_unreadable_value(&self) -> bool {
        matches!(self.code().as_deref(), Some("22P02" | "22003"))
    }

    /// The database's own code for it, for people and metrics.
    pub fn code(&self) -> Option<String> {
        let Cause::Database(error) = &self.cause else {
            return None;
        };
        database_error(error)?.code().map(|code| code.into_owned())
    }
}

fn sqlx_error(error: &DbErr) -> Option<&sqlx::Error> {
    match error {
        DbErr::Conn(RuntimeErr::SqlxError(error))
        | DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error)) => Some(error),
        _ => None,
    }
}

fn database_error(error: &DbErr) -> Option<&dyn sqlx::error::DatabaseError> {
    sqlx_error(error)?.as_database_error()
}

/// PostgreSQL: "Error Codes"; what stays is 28 (invalid authorization), 3D (no such database), 3F (no
/// such schema), 42 (access rule, or SQL it does not know), 0A (feature), and what is about data.
/// SQLite: "Result Codes"; what passes is BUSY, LOCKED, NOMEM, IOERR, FULL and PROTOCOL.
fn is_passing(error: &dyn sqlx::error::DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    if error
        .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
        .is_some()
    {
        return !is_about_data(error)
            && !["28", "3D", "3F", "42", "0A"]
                .iter()
                .any(|class| code.starts_with(class));
    }
    let primary = code.parse::<u32>().map(|code| code & 0xff);
    matches!(primary, Ok(5 | 6 | 7 | 10 | 13 | 15))
}

fn is_about_data(error: &dyn sqlx::error::DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    if error
        .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
        .is_some()
    {
        return ["22", "23", "54"]
            .iter()
            .any(|class| code.starts_with(class));
    }
    // The low byte of an extended result code is the primary one.
    let primary = code.parse::<u32>().map(|code| code & 0xff);
    matches!(primary, Ok(18..=20)) // TOOBIG, CONSTRAINT, MISMATCH
}
