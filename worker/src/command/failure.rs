//! Why a command failed, and with which exit code.

use std::error::Error;
use std::process::ExitCode;

use litestripe_contract::exit;

use crate::start::parts::StartError;

type Cause = Box<dyn Error + Send + Sync>;

/// What ends a command. It is one line on stderr and an exit code.
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

    /// The settings or the command line cannot be used.
    pub(crate) fn configuration(error: impl Into<Cause>) -> Self {
        Self {
            code: exit::CONFIGURATION,
            error: error.into(),
        }
    }

    /// Differences remain.
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

/// A start fails for its configuration only where a setting names a file that cannot be used.
pub(crate) fn start(error: StartError) -> Failure {
    match error {
        StartError::Connect(error) => Failure::configuration(error),
        error => error.into(),
    }
}
