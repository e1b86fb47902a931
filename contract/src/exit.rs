//! How a program ends: its exit codes, and one line on stderr that says why.

use std::error::Error;
use std::fmt::Write as _;
use std::process::ExitCode;

/// A failure at work.
pub const FAILURE: u8 = 1;
/// The settings or the command line cannot be used.
pub const CONFIGURATION: u8 = 2;
/// `reconcile` ended and differences remain.
pub const DIFFERENCES: u8 = 3;

/// `error` and everything that led to it, in one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // Libraries often repeat their source in their own text.
        if !line.ends_with(&text) {
            let _ = write!(line, ": {text}");
        }
        source = cause.source();
    }
    line
}

/// Says on stderr why the program ends, and gives the exit code back.
pub fn fail(code: u8, why: impl std::fmt::Display) -> ExitCode {
    eprintln!("error: {why}");
    ExitCode::from(code)
}
