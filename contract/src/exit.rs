//! How a program ends: its exit code, and one line on stderr with the reason.

use std::error::Error;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

/// A failure while the program ran.
pub const FAILURE: u8 = 1;
/// The settings or the command line cannot be used.
pub const CONFIGURATION: u8 = 2;
/// A command ended and found or left something that is to be done, as `reconcile` does.
pub const DIFFERENCES: u8 = 3;

/// Formats `error` and all its sources as one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        // Many libraries already include the source's text in their own.
        if !line.ends_with(&text) {
            let _ = write!(line, ": {text}");
        }
        source = cause.source();
    }
    line
}

/// Prints the reason on stderr and returns the exit code.
pub fn fail(code: u8, why: impl std::fmt::Display) -> ExitCode {
    print_error_line(format_args!("error: {why}"));
    ExitCode::from(code)
}

/// Prints a line on stderr. Ignores that its reader is gone, which is no reason to end otherwise
/// than planned: `eprintln!` would panic.
pub fn print_error_line(line: impl std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
