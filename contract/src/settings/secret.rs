//! A secret: a text, or a file that others may rotate.
//!
//! Owns how such a file is read. Invariant: no error shows what it holds.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

use secrecy::SecretString;

use super::{Reader, Setting, path};

/// How much a file may hold, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Why a file cannot be used that a setting names.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the file {} of {setting}", path.display())]
pub struct FileError {
    pub setting: &'static str,
    pub path: PathBuf,
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// A secret as it was at the start, and the file that it was read from, if it was.
#[derive(Debug, Clone)]
pub struct Secret {
    at_start: SecretString,
    file: Option<SecretFile>,
}

#[derive(Debug, Clone)]
struct SecretFile {
    setting: &'static str,
    path: PathBuf,
}

impl Secret {
    /// The secret as it was when the settings were read.
    pub fn at_start(&self) -> &SecretString {
        &self.at_start
    }

    /// Reads its file again and returns what `parse` makes of the content. `None` if it has no file.
    ///
    /// # Errors
    /// If the file cannot be read, is empty, holds several lines or begins with a byte order mark, or
    /// `parse` refuses the content: then it is not `expected`.
    pub fn reread<T>(
        &self,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<Result<T, FileError>> {
        Some(self.file.as_ref()?.read(expected, parse))
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self {
            at_start: SecretString::from(text),
            file: None,
        }
    }
}

impl SecretFile {
    fn read<T>(&self, expected: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T, FileError> {
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| FileError {
            setting: self.setting,
            path: self.path.clone(),
            source,
        };
        let mut text = String::new();
        File::open(&self.path)
            .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
            .map_err(|error| unusable(error.into()))?;
        if text.len() as u64 > FILE_BYTES_MAX {
            return Err(unusable("it is larger than 64 KiB".into()));
        }
        // Editors and `echo` end it with a newline.
        let secret = text.strip_suffix('\n').unwrap_or(&text);
        let secret = secret.strip_suffix('\r').unwrap_or(secret);
        if secret.is_empty() {
            return Err(unusable("it is empty".into()));
        }
        if secret.contains(['\n', '\r']) {
            return Err(unusable("it holds several lines".into()));
        }
        // A password may be any text, so the mark would silently become part of it.
        if secret.starts_with('\u{feff}') {
            return Err(unusable("it begins with a byte order mark".into()));
        }
        parse(secret).ok_or_else(|| unusable(format!("it must hold {expected}").into()))
    }
}

impl Reader {
    /// Reads a secret that is the text of `setting` or the content of the file that `file` names.
    /// Returns it with what `parse` makes of it. The only settings of which files are read.
    pub fn secret<T>(
        &mut self,
        setting: &Setting,
        file: &Setting,
        expected: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<(Secret, T)> {
        let Some(path) = self.optional(file, "a path", path) else {
            let text = |text: &str| Some((Secret::from(text.to_owned()), parse(text)?));
            return self.optional(setting, expected, text);
        };
        if self.is_given(setting) {
            let what = format!("and {} are both set: set only one of them", setting.name);
            self.problem(file, what);
            return None;
        }
        let setting = file.name;
        let source = SecretFile { setting, path };
        let both = |text: &str| Some((SecretString::from(text), parse(text)?));
        match source.read(expected, both) {
            Ok((at_start, value)) => {
                let file = Some(source);
                Some((Secret { at_start, file }, value))
            }
            Err(error) => {
                let (path, why) = (error.path.display(), &error.source);
                self.problem(file, format!("names {path}, which cannot be used: {why}"));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
