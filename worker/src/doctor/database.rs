//! The database: whether it answers and lets a worker write, and whether its schema is this program's.

use std::path::Path;

use litestripe_contract::exit;
use litestripe_contract::stream::Finding;

use super::{Line, finding, within};
use crate::clocks::{self, Reading};
use crate::error::StoreError;
use crate::settings::{DatabaseKind, DatabaseSettings};
use crate::store::rights::{self, Refusal};
use crate::store::{Step, Store, file};

const CHECK: &str = "database";
const SCHEMA: &str = "schema";

/// The database as it was found.
pub(super) struct Database {
    pub(super) lines: Vec<Line>,
    /// `None` for SQLite, which has the host's clock.
    pub(super) clock: Option<Reading>,
    pub(super) tables: Tables,
}

/// How far the tables may be used.
pub(super) enum Tables {
    Unreachable,
    /// There are none yet.
    Missing,
    /// They are of an earlier version.
    Behind,
    Current(Store),
}

pub(super) async fn examine(settings: &DatabaseSettings) -> Database {
    if let Some(path) = file::missing(settings) {
        return examine_missing(settings, &path);
    }
    let opened = within(open(settings)).await;
    let mend = match settings.kind {
        DatabaseKind::Sqlite => "check the file of DATABASE_URL and who may read and write it",
        DatabaseKind::Postgres => {
            "check that the server of DATABASE_URL runs, is reached from here, and accepts the user and password"
        }
    };
    let (store, steps, clock) = match opened {
        Some(Ok(Ok(opened))) => opened,
        Some(Ok(Err(refusal))) => return unreachable(refusal.into()),
        Some(Err(error)) => return unreachable(finding(exit::chain(&error), mend)),
        None => {
            let what = "the database (DATABASE_URL) does not answer in time";
            return unreachable(finding(what, mend));
        }
    };
    let name = match settings.kind {
        DatabaseKind::Sqlite => "SQLite",
        DatabaseKind::Postgres => "PostgreSQL",
    };
    let pending: Vec<_> = steps.iter().filter(|step| !step.applied).collect();
    let (schema, tables) = match pending.first() {
        None => (Line::ok(SCHEMA, "current"), Tables::Current(store)),
        Some(first) => {
            let what = format!(
                "{} migrations are pending, from {} on",
                pending.len(),
                first.name
            );
            let tables = if pending.len() == steps.len() {
                Tables::Missing
            } else {
                Tables::Behind
            };
            (behind(settings, what), tables)
        }
    };
    Database {
        lines: vec![Line::ok(CHECK, format!("{name} answers")), schema],
        clock,
        tables,
    }
}

type Opened = (Store, Vec<Step>, Option<Reading>);

async fn open(settings: &DatabaseSettings) -> Result<Result<Opened, Refusal>, StoreError> {
    let store = Store::open_to_read(settings, "open the database (DATABASE_URL)").await?;
    let db = store.connection();
    let refusal = match settings.kind {
        DatabaseKind::Sqlite => None,
        DatabaseKind::Postgres => rights::refusal(db).await?,
    };
    if let Some(refusal) = refusal {
        return Ok(Err(refusal));
    }
    let steps = store.migrations().await?;
    let clock = match settings.kind {
        DatabaseKind::Sqlite => {
            rights::try_write(db).await?;
            None
        }
        DatabaseKind::Postgres => clocks::read_database(&store).await,
    };
    Ok(Ok((store, steps, clock)))
}

impl From<Refusal> for Finding {
    fn from(refusal: Refusal) -> Self {
        let mend = match &refusal {
            Refusal::Standby => "set DATABASE_URL to the primary",
            Refusal::ReadOnly => {
                "end default_transaction_read_only of the server, the database and the user, or set DATABASE_URL to \
                 another server"
            }
            Refusal::Rights(_) => {
                "GRANT USAGE ON SCHEMA …, SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA … and USAGE ON ALL \
                 SEQUENCES IN SCHEMA … to that user, or set DATABASE_URL to the user that migrated"
            }
        };
        let what = "nothing can be written to the database (DATABASE_URL)";
        finding(format!("{what}: {refusal}"), mend)
    }
}

fn unreachable(finding: Finding) -> Database {
    Database {
        lines: vec![
            Line::mend(CHECK, finding),
            super::needs(SCHEMA, "the database"),
        ],
        clock: None,
        tables: Tables::Unreachable,
    }
}

fn behind(settings: &DatabaseSettings, what: String) -> Line {
    if settings.auto_migrate {
        return Line::ok(
            SCHEMA,
            format!("{what}; `run` applies them (LITESTRIPE_AUTO_MIGRATE)"),
        );
    }
    let mend = "litestripe-worker migrate up";
    Line::mend(SCHEMA, finding(what, mend))
}

/// A SQLite file that is not there yet is created by `run`, if the URL and its folder allow it.
fn examine_missing(settings: &DatabaseSettings, path: &Path) -> Database {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let what = format!("the file {} (DATABASE_URL) does not exist", path.display());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        return unreachable(finding(
            what + ", nor does its folder",
            "correct DATABASE_URL, or make the folder",
        ));
    }
    if !file::is_created(settings) {
        return unreachable(finding(
            what,
            "correct DATABASE_URL, or add ?mode=rwc, which creates the file",
        ));
    }
    Database {
        lines: vec![
            Line::ok(CHECK, what + " yet; `run` creates it"),
            behind(settings, "all migrations are pending".to_owned()),
        ],
        clock: None,
        tables: Tables::Missing,
    }
}
