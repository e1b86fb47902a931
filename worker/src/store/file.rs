//! The file of a SQLite database: whether its path still leads to the file that is open.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use sea_orm::sqlx::sqlite::SqliteConnectOptions;
use secrecy::ExposeSecret as _;

use crate::settings::{DatabaseKind, DatabaseSettings};

/// The file of an open database.
#[derive(Debug, Clone)]
pub(crate) struct DatabaseFile {
    path: PathBuf,
    /// Device and inode. The inode is not used again while the file is open.
    id: (u64, u64),
}

impl DatabaseFile {
    /// Returns the file of the database that was just opened. `None` if it has none: it is in
    /// memory, or not SQLite.
    pub(crate) fn find(settings: &DatabaseSettings) -> Option<Self> {
        let path = path(settings)?;
        let id = id(&path).ok()?;
        Some(Self { path, id })
    }

    /// Returns whether the file was removed or replaced: what is written to the open one is lost.
    ///
    /// # Errors
    /// If the path cannot be followed now, which says nothing about the file: too many files are
    /// open, or its folder is on a disk that fails for a moment.
    pub(crate) fn is_replaced(&self) -> io::Result<bool> {
        match id(&self.path) {
            Ok(id) => Ok(id != self.id),
            Err(error) => match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => Ok(true),
                _ => Err(error),
            },
        }
    }
}

/// Returns the path of a SQLite file that does not exist. `None` if it exists, and for a database
/// that is not a file.
pub(crate) fn missing(settings: &DatabaseSettings) -> Option<PathBuf> {
    let url = settings.url.at_start().expose_secret();
    let is_in_memory = url.starts_with("sqlite::memory:") || url.contains("mode=memory");
    path(settings).filter(|path| !is_in_memory && !path.exists())
}

/// Whether opening a SQLite file creates it if it is missing. SQLite: "URI Filenames".
pub(crate) fn is_created(settings: &DatabaseSettings) -> bool {
    let query = settings.url.at_start().expose_secret().split_once('?');
    query.is_some_and(|(_, query)| query.split('&').any(|part| part == "mode=rwc"))
}

/// Returns the path of a SQLite database.
fn path(settings: &DatabaseSettings) -> Option<PathBuf> {
    if settings.kind != DatabaseKind::Sqlite {
        return None;
    }
    let options: SqliteConnectOptions = settings.url.at_start().expose_secret().parse().ok()?;
    Some(options.get_filename().to_owned())
}

fn id(path: &Path) -> io::Result<(u64, u64)> {
    let file = fs::metadata(path)?;
    Ok((file.dev(), file.ino()))
}
