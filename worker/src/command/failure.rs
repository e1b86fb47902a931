//! Why a command failed, and with which exit code.

use std::error::Error;
use std::process::ExitCode;

use litestripe_contract::exit;

use crate::start::parts::StartError;

/// What ends a command. It is one line on stderr and an exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    error: Box<dyn Error + Send + Sync>,
}

/// A command that asks Stripe was called without a key.
#[derive(Debug, thiserror::Error)]
#[error("STRIPE_SECRET_KEY is missing: set it to a secret or restricted key; this command asks Stripe's API")]
pub(crate) struct NoKey;

impl Failure {
    /// A failure at work that has no type of its own.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { code: exit::FAILURE, error: message.into().into() }
    }

    /// The settings or the command line cannot be used.
    pub(crate) fn configuration(error: impl Error + Send + Sync + 'static) -> Self {
        Self { code: exit::CONFIGURATION, error: error.into() }
    }

    /// Differences remain.
    pub(crate) fn differences(error: impl Error + Send + Sync + 'static) -> Self {
        Self { code: exit::DIFFERENCES, error: error.into() }
    }

    pub(crate) fn exit(self) -> ExitCode {
        exit::fail(self.code, exit::chain(self.error.as_ref()))
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { code: exit::FAILURE, error: error.into() }
    }
}

/// A start fails for its configuration only where a setting names a file that cannot be used.
pub(crate) fn start(error: StartError) -> Failure {
    match error {
        StartError::Connect(error) => Failure::configuration(error),
        error => error.into(),
    }
}
