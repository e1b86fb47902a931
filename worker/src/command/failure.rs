//! The error that ends a command, and its exit code.

use std::error::Error;
use std::process::ExitCode;

use litestripe_contract::exit;

use crate::start::parts::StartError;

type Cause = Box<dyn Error + Send + Sync>;

/// The error that ends a command: one line on stderr and an exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    error: Cause,
}

impl Failure {
    pub(crate) fn new(error: impl Into<Cause>) -> Self {
        Self {
            code: exit::FAILURE,
            error: error.into(),
        }
    }

    /// A wrong setting or argument.
    pub(crate) fn configuration(error: impl Into<Cause>) -> Self {
        Self {
            code: exit::CONFIGURATION,
            error: error.into(),
        }
    }

    /// Something is left to do, such as differences that `reconcile` found, or what `doctor` says.
    pub(crate) fn differences(error: impl Into<Cause>) -> Self {
        Self {
            code: exit::DIFFERENCES,
            error: error.into(),
        }
    }

    pub(crate) fn exit(self) -> ExitCode {
        exit::fail(self.code, exit::chain(self.error.as_ref()))
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error)
    }
}

/// Converts an error at start. Only a setting that names an unusable file is a configuration error.
pub(crate) fn start(error: StartError) -> Failure {
    match error {
        StartError::Connect(error) => Failure::configuration(error),
        error => error.into(),
    }
}
