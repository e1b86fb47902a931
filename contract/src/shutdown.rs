//! Shutdown by signal: the first one asks the program to stop, the second one ends it at once.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::systemd;

/// The exit code after a second signal: what a shell reports for SIGINT.
const EXIT_SECOND_SIGNAL: i32 = 130;

/// Returns a token that the first SIGTERM or SIGINT cancels. A second signal exits at once.
pub fn token() -> std::io::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let token = CancellationToken::new();
    let cancelled = token.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            if first {
                // First, because nothing that follows may keep the program from stopping.
                cancelled.cancel();
                systemd::tell_stopping();
                tracing::info!(
                    "{name}: finishing what is in flight; a second signal exits at once"
                );
            }
        }
        #[expect(clippy::disallowed_methods, reason = "the operator asked twice")]
        std::process::exit(EXIT_SECOND_SIGNAL);
    });
    Ok(token)
}
