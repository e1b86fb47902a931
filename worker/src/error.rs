//! Database errors, sorted by how the worker reacts to them.
//!
//! Owns the distinction that callers branch on. May not know which batch or command failed.

use std::time::Duration;

use sea_orm::sqlx;
use sea_orm::{DbErr, RuntimeErr};

/// What the worker does with a message whose event could not be applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The database is unavailable. Keep the message and retry with backoff, without a limit.
    Wait,
    /// The database answers and refuses, this event or all of them. The batch is halved, and an
    /// event that is refused alone is delivered again later.
    Refused,
    /// Like `Refused`, but about the event's own values: if the database accepts others, this event
    /// can never be applied, and becomes a dead letter.
    Poison,
}

/// A failed database operation.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing}")]
pub struct StoreError {
    /// The operation, in words that follow "cannot".
    pub doing: &'static str,
    /// Never contains a value that we store: causes are logged and become the reasons of dead
    /// letters.
    #[source]
    pub cause: Cause,
}

/// Why a database operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error(transparent)]
    Database(#[from] DbErr),
    /// A stored value is not valid JSON, or a new value cannot be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("it panicked, which is a bug")]
    Panic,
    #[error("it belongs to another installation than at the start")]
    OtherInstallation,
    /// A migration needs the name of something that another application made.
    #[error(
        "{0}: Litestripe did not make it and leaves it alone. Give Litestripe a database of its own, or on \
         PostgreSQL a schema of its own (LITESTRIPE_DATABASE_SCHEMA)"
    )]
    Foreign(DbErr),
}

impl Cause {
    /// PostgreSQL: "Error Codes", 42P07 (duplicate table). SQLite has no code of its own for it.
    pub fn of_migration(error: DbErr) -> Self {
        let is_taken = database_error(&error).is_some_and(|error| {
            let message = error.message();
            error.code().as_deref() == Some("42P07")
                || message.ends_with(" already exists")
                || message.starts_with("there is already ")
        });
        if is_taken {
            Self::Foreign(error)
        } else {
            Self::Database(error)
        }
    }
}

impl StoreError {
    /// Returns a function for `map_err` that makes a [`StoreError`] of a cause.
    pub fn doing<E: Into<Cause>>(doing: &'static str) -> impl Fn(E) -> Self {
        move |cause| Self {
            doing,
            cause: cause.into(),
        }
    }

    /// Sorts the error. An unknown one counts as a refusal: as an outage it would hold up all other
    /// events.
    pub fn disposition(&self) -> Disposition {
        let error = match &self.cause {
            Cause::Json(_) | Cause::Panic => return Disposition::Poison,
            Cause::Timeout(_) | Cause::OtherInstallation | Cause::Foreign(_) => {
                return Disposition::Wait;
            }
            Cause::Database(error) => error,
        };
        match (error, sqlx_error(error)) {
            (DbErr::Json(_) | DbErr::Type(_), _) => Disposition::Poison,
            (_, Some(error)) => match error.as_database_error() {
                Some(error) if is_outage(error) => Disposition::Wait,
                Some(error) if is_about_values(error) => Disposition::Poison,
                Some(_) => Disposition::Refused,
                None if is_about_a_stored_value(error) => Disposition::Refused,
                None => Disposition::Wait,
            },
            _ => Disposition::Wait,
        }
    }

    /// Whether the database answers and refuses, so that others may still be served.
    pub fn is_refusal(&self) -> bool {
        self.disposition() != Disposition::Wait
    }

    /// Whether a start that failed for this reason may succeed later without the operator's help:
    /// the database is unreachable, busy, restarting, full or read-only.
    pub fn is_temporary(&self) -> bool {
        let Cause::Database(error) = &self.cause else {
            return matches!(self.cause, Cause::Timeout(_));
        };
        match (error, sqlx_error(error)) {
            (DbErr::ConnectionAcquire(_), _) => true,
            (_, Some(error)) => is_temporary(error),
            _ => false,
        }
    }

    /// Whether the database cannot read `value` as the type it is compared with. Another value of
    /// the statement may be unreadable too: the message quotes which one it is.
    ///
    /// PostgreSQL: "Error Codes", 22P02 (invalid text representation) and 22003 (out of range).
    pub fn is_about_unreadable(&self, value: &str) -> bool {
        let Cause::Database(error) = &self.cause else {
            return false;
        };
        database_error(error).is_some_and(|error| {
            matches!(error.code().as_deref(), Some("22P02" | "22003"))
                && quotes(error.message(), value)
        })
    }
}

/// Whether the database may do later what it did not do now, without the operator's help.
pub(crate) fn is_temporary(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => is_temporary_code(error.as_ref()),
        // Not a PostgreSQL server, TLS that one of the two sides refuses, or an unusable URL.
        sqlx::Error::Protocol(_) | sqlx::Error::Tls(_) | sqlx::Error::Configuration(_) => false,
        _ => true,
    }
}

/// Whether `message` has `value` in quotation marks, in whatever language it is.
fn quotes(message: &str, value: &str) -> bool {
    const MARKS: &str = "\"'«»‹›„“”‚‘’「」";
    let is_mark = |next: Option<char>| next.is_some_and(|next| MARKS.contains(next));
    message.match_indices(value).any(|(at, value)| {
        let (before, rest) = message.split_at(at);
        let after = rest.strip_prefix(value).unwrap_or_default();
        is_mark(before.trim_end().chars().next_back()) && is_mark(after.trim_start().chars().next())
    })
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

/// PostgreSQL: "Error Codes"; permanent are 28 (invalid authorization), 3D (no such database), 3F
/// (no such schema), 42 (access rule, or unknown SQL), 0A (unsupported feature), and errors about
/// data. SQLite: "Result Codes"; temporary are BUSY, LOCKED, NOMEM, IOERR, FULL and PROTOCOL.
fn is_temporary_code(error: &dyn sqlx::error::DatabaseError) -> bool {
    if error
        .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
        .is_some()
    {
        return !is_about_data(error)
            && !is_refusal_of_a_pooler(error)
            && !has_class(error, &["28", "3D", "3F", "42", "0A"], &[]);
    }
    has_class(error, &[], &[5, 6, 7, 10, 13, 15])
}

/// PgBouncer has one code (08P01) for everything that it refuses by itself, such as a password, and
/// for outages of the server.
fn is_refusal_of_a_pooler(error: &dyn sqlx::error::DatabaseError) -> bool {
    let lasting = [
        "authentication failed",
        "does not exist",
        "no such database",
        "no such user",
        "unsupported startup parameter",
        "transaction blocks not allowed",
    ];
    error.code().as_deref() == Some("08P01")
        && lasting.iter().any(|text| error.message().contains(text))
}

fn is_about_data(error: &dyn sqlx::error::DatabaseError) -> bool {
    is_about_values(error) || has_class(error, &["23"], &[19])
}

/// PostgreSQL: "Error Codes", 22 (data exception) and 54 (program limit). SQLite: "Result Codes",
/// TOOBIG and MISMATCH. Not constraints: an operator may add one that refuses everything.
fn is_about_values(error: &dyn sqlx::error::DatabaseError) -> bool {
    has_class(error, &["22", "54"], &[18, 20])
}

/// PostgreSQL: 08 (connection), 25 (transaction state, as read-only), 26 and 42P05 (prepared
/// statements, which a pooler may mix up), 28 (authorization), 3D (no such database), 40
/// (serialization, deadlock), 53 (resources), 55 (locks), 57 (intervention, timeouts), 58 and XX
/// (system, as a file that cannot grow). SQLite: BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR,
/// CORRUPT, FULL, CANTOPEN, PROTOCOL, NOTADB.
fn is_outage(error: &dyn sqlx::error::DatabaseError) -> bool {
    let postgres = [
        "08", "25", "26", "28", "3D", "40", "42P05", "53", "55", "57", "58", "XX",
    ];
    has_class(error, &postgres, &[5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 26])
}

/// Whether a value that a person or another version wrote cannot be read.
fn is_about_a_stored_value(error: &sqlx::Error) -> bool {
    matches!(
        error,
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) | sqlx::Error::Encode(_)
    )
}

/// Whether the code is of one of these classes of PostgreSQL or primary codes of SQLite.
fn has_class(error: &dyn sqlx::error::DatabaseError, postgres: &[&str], sqlite: &[u32]) -> bool {
    let code = error.code().unwrap_or_default();
    if error
        .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
        .is_some()
    {
        return postgres.iter().any(|class| code.starts_with(class));
    }
    // The low byte of an extended result code is the primary one.
    let primary = code.parse::<u32>().map(|code| code & 0xff);
    primary.is_ok_and(|primary| sqlite.contains(&primary))
}

#[cfg(test)]
mod tests {
    use super::quotes;

    #[test]
    fn message_is_about_a_value_only_if_it_quotes_it() {
        let english = r#"invalid input syntax for type integer: "user_1""#;
        assert!(quotes(english, "user_1"));
        assert!(!quotes(english, "integer"), "a word of the message");
        assert!(!quotes(english, "user"), "a part of another value");
        assert!(!quotes(english, "43"));
        assert!(quotes(
            "syntaxe en entrée invalide pour le type integer : «\u{a0}user_1\u{a0}»",
            "user_1"
        ));
        assert!(quotes(
            "ungültige Eingabesyntax für Typ integer: „user_1“",
            "user_1"
        ));
        assert!(quotes(
            r#"value "99999999999999999999" is out of range for type bigint"#,
            "99999999999999999999"
        ));
        assert!(quotes(r#"invalid input syntax for type bigint: """#, ""));
        assert!(!quotes(
            r#"invalid input syntax for type boolean: "maybe""#,
            ""
        ));
        assert!(quotes(r#"invalid input syntax for type bigint: " ""#, " "));
    }
}
