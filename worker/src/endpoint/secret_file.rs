//! The file with the endpoints' signing secrets, which ingress reads: STRIPE_WEBHOOK_SECRET_FILE.
//!
//! Owns its lines and how it is replaced: in one step, so that neither ingress nor a crash finds half
//! of it, readable for its owner alone. A line that we write holds a secret and, as a comment, the
//! endpoint that signs with it; other lines stay as they are. Never prints a secret.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use litestripe_contract::signing_secret::{self, FILE_BYTES_MAX};
use secrecy::{ExposeSecret as _, SecretString};

const MODE: u32 = 0o600;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretFileError {
    #[error("--secret-file: the folder {} does not exist: create it, for the user of ingress", .0.display())]
    NoFolder(PathBuf),
    #[error("--secret-file: {} is not a file", .0.display())]
    NotAFile(PathBuf),
    #[error("--secret-file: {} is larger than the 64 KiB that ingress reads", .0.display())]
    TooLarge(PathBuf),
    #[error(
        "--secret-file: {} is a mount of its own, so no other file can take its place: mount the folder, not the file",
        .0.display()
    )]
    Mounted(PathBuf),
    #[error("--secret-file: cannot {doing} {}", path.display())]
    Unusable {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// Ingress reads letters and digits only.
    #[error("the secret that Stripe returned is not whsec_ and letters and digits")]
    UnknownForm,
}

/// The file, locked for other processes that would change it.
pub(crate) struct SecretFile {
    path: PathBuf,
    folder: PathBuf,
    content: SecretString,
    /// Of the file when it was last read. `None` if there was none.
    found: Option<Metadata>,
    _lock: File,
}

impl SecretFile {
    /// Opens the file, which need not exist, and makes sure that it can be replaced. Waits, and
    /// calls `waiting`, while another process holds its folder's lock.
    pub(crate) fn open(path: &Path, waiting: impl FnOnce()) -> Result<Self, SecretFileError> {
        // A link stays a link to the file.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(SecretFileError::NotAFile(path));
        };
        let folder = if parent.as_os_str().is_empty() {
            PathBuf::from(".")
        } else {
            parent.to_owned()
        };
        // Without a slash at its end, with which the rename would fail.
        let path = folder.join(name);
        if !folder.is_dir() {
            return Err(SecretFileError::NoFolder(folder));
        }
        let lock = lock(&folder, waiting).map_err(|source| SecretFileError::Unusable {
            doing: "lock the folder",
            path: folder.clone(),
            source,
        })?;
        let (content, found) = read(&path)?;
        let file = Self {
            path,
            folder,
            content,
            found,
            _lock: lock,
        };
        let temporary = file.temporary_path();
        file.create_temporary(&temporary)
            .and_then(|_| fs::remove_file(&temporary))
            .map_err(|source| file.unusable("replace", source))?;
        // The rename would fail with EBUSY. A hard link fails with EXDEV then; any other failure says
        // nothing about mounts. The link is removed at once.
        let linked = fs::hard_link(&file.path, &temporary);
        if linked.is_err_and(|error| error.kind() == ErrorKind::CrossesDevices) {
            return Err(SecretFileError::Mounted(file.path));
        }
        let _ = fs::remove_file(&temporary);
        Ok(file)
    }

    /// The permissions that the file had, if others than its owner could read it.
    pub(crate) fn readable_for_others(&self) -> Option<u32> {
        let mode = self.found.as_ref()?.mode() & 0o777;
        (mode & 0o077 != 0).then_some(mode)
    }

    /// Returns the secret of an endpoint.
    pub(crate) fn secret(&self, id: &str) -> Option<SecretString> {
        find(self.content.expose_secret(), id)
    }

    /// Returns whether the file holds a secret of which it does not say whose it is.
    pub(crate) fn has_unnamed(&self) -> bool {
        let lines = self.content.expose_secret().lines();
        lines
            .filter(|line| has_secret(line))
            .any(|line| owner(line).is_none())
    }

    /// Adds the secret of an endpoint. Keeps all others.
    pub(crate) fn add(&mut self, id: &str, secret: &SecretString) -> Result<(), SecretFileError> {
        let secret = secret.expose_secret();
        if signing_secret::find(secret).next() != Some(secret) {
            return Err(SecretFileError::UnknownForm);
        }
        self.replace(|content| with(content, id, secret))
    }

    /// Removes the secrets of these endpoints.
    pub(crate) fn remove(&mut self, ids: &[String]) -> Result<(), SecretFileError> {
        self.replace(|content| without(content, ids))
    }

    /// Replaces the content by what `edit` makes of it. Reads the file again first: whoever edits it
    /// by hand takes no lock, and a roll lasts for half a minute.
    fn replace(&mut self, edit: impl FnOnce(&str) -> String) -> Result<(), SecretFileError> {
        let (content, found) = read(&self.path)?;
        self.found = found;
        let content = edit(content.expose_secret());
        let temporary = self.temporary_path();
        let replaced = self.create_temporary(&temporary).and_then(|mut file| {
            file.write_all(content.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)?;
            // The rename is on disk only once the folder is.
            File::open(&self.folder)?.sync_all()
        });
        replaced.map_err(|source| {
            // It holds no secret that is not elsewhere too.
            let _ = fs::remove_file(&temporary);
            self.unusable("write", source)
        })?;
        self.content = content.into();
        Ok(())
    }

    /// The file that will take the other's place. One that a killed run left is overwritten: the
    /// folder is locked.
    fn temporary_path(&self) -> PathBuf {
        let mut name = OsString::from(".");
        name.push(self.path.file_name().unwrap_or_default());
        name.push(".new");
        self.folder.join(name)
    }

    fn create_temporary(&self, path: &Path) -> io::Result<File> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(MODE)
            .open(path)?;
        file.set_permissions(Permissions::from_mode(MODE))?;
        // So that root's run does not take the file away from the user of ingress.
        if let Some(found) = &self.found {
            let made = file.metadata()?;
            if (made.uid(), made.gid()) != (found.uid(), found.gid()) {
                fchown(&file, Some(found.uid()), Some(found.gid()))?;
            }
        }
        Ok(file)
    }

    fn unusable(&self, doing: &'static str, source: io::Error) -> SecretFileError {
        SecretFileError::Unusable {
            doing,
            path: self.path.clone(),
            source,
        }
    }
}

/// Reads the secrets that a file names the endpoints of, as `(endpoint, secret)`, without a lock.
pub(crate) fn read_named(path: &Path) -> Result<Vec<(String, SecretString)>, SecretFileError> {
    let (content, found) = read(path)?;
    if found.is_none() {
        return Err(SecretFileError::Unusable {
            doing: "read",
            path: path.to_owned(),
            source: ErrorKind::NotFound.into(),
        });
    }
    let lines = content.expose_secret().lines();
    Ok(lines
        .filter_map(|line| Some((owner(line)?.to_owned(), secret_in(line)?)))
        .collect())
}

/// Reads the file and its metadata. A file that does not exist is empty.
fn read(path: &Path) -> Result<(SecretString, Option<Metadata>), SecretFileError> {
    let unusable = |source| SecretFileError::Unusable {
        doing: "read",
        path: path.to_owned(),
        source,
    };
    let found = match fs::metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(("".into(), None)),
        Err(error) => return Err(unusable(error)),
    };
    if !found.is_file() {
        return Err(SecretFileError::NotAFile(path.to_owned()));
    }
    if found.len() > FILE_BYTES_MAX {
        return Err(SecretFileError::TooLarge(path.to_owned()));
    }
    let content = fs::read_to_string(path).map_err(unusable)?;
    Ok((content.into(), Some(found)))
}

/// Locks the folder, not the file, which is replaced.
fn lock(folder: &Path, waiting: impl FnOnce()) -> io::Result<File> {
    let file = File::open(folder)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            waiting();
            file.lock()?;
        }
        Err(TryLockError::Error(error)) => return Err(error),
    }
    Ok(file)
}

/// Returns the endpoint that a line with a secret names.
fn owner(line: &str) -> Option<&str> {
    let (secret, comment) = line.split_once('#')?;
    has_secret(secret).then_some(())?;
    let id = comment.split_whitespace().next()?;
    let is_id = id.contains('_')
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    is_id.then_some(id)
}

fn has_secret(text: &str) -> bool {
    signing_secret::find(text).next().is_some()
}

/// Returns the secret in a line, as ingress reads it.
fn secret_in(line: &str) -> Option<SecretString> {
    signing_secret::find(line).next().map(SecretString::from)
}

fn find(content: &str, id: &str) -> Option<SecretString> {
    let line = content.lines().find(|line| owner(line) == Some(id))?;
    secret_in(line)
}

fn with(content: &str, id: &str, secret: &str) -> String {
    let mut content = without(content, &[id.to_owned()]);
    if !content.is_empty() && !content.ends_with('\n') {
        content.push('\n');
    }
    content.push_str(&format!("{secret} # {id}\n"));
    content
}

fn without(content: &str, ids: &[String]) -> String {
    let is_kept = |line: &&str| owner(line).is_none_or(|owner| !ids.iter().any(|id| id == owner));
    content.split_inclusive('\n').filter(is_kept).collect()
}

#[cfg(test)]
mod tests;
