//! Database errors, sorted by how the worker reacts to them.
//!
//! Owns the distinction that callers branch on. May not know which batch or command failed.

use std::error::Error;
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
    /// Like `Refused`, but about the database: its schema, a permission or a damaged row. Never a
    /// dead letter: the event waits until an operator has mended it.
    Broken,
}

impl Disposition {
    /// Its name in traces.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Wait => "unavailable",
            Self::Refused => "refused",
            Self::Poison => "poison",
            Self::Broken => "broken",
        }
    }
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
    /// A new value cannot be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// A stored value is damaged.
    #[error("a stored value cannot be read: `reconcile --repair` restores its row")]
    StoredValue(#[source] serde_json::Error),
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("it panicked, which is a bug")]
    Panic,
    #[error("it belongs to another installation than at the start")]
    OtherInstallation,
    #[error(
        "the schema has the migration {0} of a newer version of Litestripe: use that version for it"
    )]
    NewerSchema(String),
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
            Cause::StoredValue(_) => return Disposition::Broken,
            Cause::Timeout(_)
            | Cause::OtherInstallation
            | Cause::NewerSchema(_)
            | Cause::Foreign(_) => {
                return Disposition::Wait;
            }
            Cause::Database(error) => error,
        };
        match (error, sqlx_error(error)) {
            (DbErr::Json(_) | DbErr::Type(_), _) => Disposition::Broken,
            (_, Some(error)) => match (error.as_database_error(), error) {
                (Some(error), _) => Code::new(error).disposition(),
                (None, sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_)) => {
                    Disposition::Broken
                }
                (None, sqlx::Error::Encode(_)) => Disposition::Refused,
                (None, _) => Disposition::Wait,
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

/// Whether it was the database that failed, wherever in the chain of causes.
pub(crate) fn is_of_database(error: &(dyn Error + 'static)) -> bool {
    // A transparent error hides the `StoreError` in the chain, but not its cause.
    error.is::<StoreError>() || error.is::<Cause>() || error.source().is_some_and(is_of_database)
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
/// data. SQLite: "Result Codes"; temporary are BUSY, LOCKED, NOMEM, READONLY, IOERR, FULL and PROTOCOL.
fn is_temporary_code(error: &dyn sqlx::error::DatabaseError) -> bool {
    let code = Code::new(error);
    match code {
        Code::Postgres(_) => {
            !code.is_about_data()
                && !is_refusal_of_a_pooler(error)
                && !code.is_among(&["28", "3D", "3F", "42", "0A"], &[])
        }
        Code::Sqlite(_) => code.is_among(&[], &[5, 6, 7, 8, 10, 13, 15]),
    }
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

/// The code of an error of the database.
#[derive(Debug)]
enum Code {
    Postgres(String),
    /// The primary result code.
    Sqlite(Option<u32>),
}

impl Code {
    fn new(error: &dyn sqlx::error::DatabaseError) -> Self {
        let code = error.code().unwrap_or_default();
        if error
            .try_downcast_ref::<sqlx::postgres::PgDatabaseError>()
            .is_some()
        {
            return Self::Postgres(code.into_owned());
        }
        // The low byte of an extended result code is the primary one.
        Self::Sqlite(code.parse::<u32>().map(|code| code & 0xff).ok())
    }

    fn disposition(&self) -> Disposition {
        if self.is_outage() {
            Disposition::Wait
        } else if self.is_about_the_database() {
            Disposition::Broken
        } else if self.is_about_values() {
            Disposition::Poison
        } else {
            Disposition::Refused
        }
    }

    /// PostgreSQL: 08 (connection), 25 (transaction state, as read-only), 26 and 42P05 (prepared
    /// statements, which a pooler may mix up), 28 (authorization), 3D (no such database), 40
    /// (serialization, deadlock), 53 (resources), 55 (locks), 57 (intervention, timeouts), 58
    /// (system), XX000 (internal, as a file that cannot grow). SQLite: BUSY, LOCKED, NOMEM, READONLY,
    /// INTERRUPT, IOERR, FULL, CANTOPEN, PROTOCOL, NOTADB.
    fn is_outage(&self) -> bool {
        let postgres = [
            "08", "25", "26", "28", "3D", "40", "42P05", "53", "55", "57", "58", "XX000",
        ];
        self.is_among(&postgres, &[5, 6, 7, 8, 9, 10, 13, 14, 15, 26])
    }

    /// PostgreSQL: 0A (unsupported feature), 3F (no such schema), 42 (access rule, or unknown SQL),
    /// XX001 and XX002 (a corrupt row or index). SQLite: ERROR (as a missing table), CORRUPT. No
    /// outage: one corrupt row or one table without a grant leaves the others.
    fn is_about_the_database(&self) -> bool {
        self.is_among(&["0A", "3F", "42", "XX001", "XX002"], &[1, 11])
    }

    /// PostgreSQL: 22 (data exception) and 54 (program limit). SQLite: TOOBIG and MISMATCH. Not
    /// constraints: an operator may add one that refuses everything.
    fn is_about_values(&self) -> bool {
        self.is_among(&["22", "54"], &[18, 20])
    }

    fn is_about_data(&self) -> bool {
        self.is_about_values() || self.is_among(&["23"], &[19])
    }

    /// Whether it begins with one of these classes of PostgreSQL or is one of these codes of
    /// SQLite.
    fn is_among(&self, postgres: &[&str], sqlite: &[u32]) -> bool {
        match self {
            Self::Postgres(code) => postgres.iter().any(|class| code.starts_with(class)),
            Self::Sqlite(code) => code.is_some_and(|code| sqlite.contains(&code)),
        }
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::DbErr;

    use super::{Cause, Code, Disposition, StoreError, quotes};

    #[test]
    fn only_what_is_about_the_event_may_become_a_dead_letter() {
        let check = |code: &str, expected| {
            let code = Code::Postgres(code.to_owned());
            assert_eq!(code.disposition(), expected, "{code:?}");
        };
        check("22P02", Disposition::Poison);
        check("23514", Disposition::Refused);
        check("P0001", Disposition::Refused);
        check("42501", Disposition::Broken); // Permission denied.
        check("42P01", Disposition::Broken); // No such table.
        check("3F000", Disposition::Broken);
        check("0A000", Disposition::Broken);
        check("XX001", Disposition::Broken); // A corrupt row.
        check("42P05", Disposition::Wait);
        check("53100", Disposition::Wait); // The disk is full.
        check("XX000", Disposition::Wait); // A file cannot grow.

        let check = |code, expected| {
            assert_eq!(Code::Sqlite(Some(code)).disposition(), expected, "{code}");
        };
        check(18, Disposition::Poison);
        check(19, Disposition::Refused);
        check(1, Disposition::Broken);
        check(11, Disposition::Broken);
        check(13, Disposition::Wait);
    }

    #[test]
    fn a_damaged_stored_value_is_not_the_fault_of_an_event() {
        let json = || serde_json::from_str::<u8>("no JSON").expect_err("it is none");
        let disposition = |cause| StoreError::doing("load")(cause).disposition();
        assert_eq!(disposition(Cause::StoredValue(json())), Disposition::Broken);
        let null = DbErr::Type("a null value".to_owned());
        assert_eq!(disposition(Cause::Database(null)), Disposition::Broken);
        assert_eq!(disposition(Cause::Json(json())), Disposition::Poison);
    }

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
