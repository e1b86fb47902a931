//! What systemd hears from a program that it supervises: that it is ready, what it waits for until
//! then, that it is alive, and that it stops.
//!
//! Owns the protocol (systemd: "sd_notify(3)"). Nothing here has an effect without `NOTIFY_SOCKET`,
//! which systemd sets for a unit of `Type=notify`. Ready and alive are two things: a program whose
//! broker is away is alive and must not be killed.

use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::time::MissedTickBehavior;
use tracing::debug;

/// How often a starting program is asked why it is not ready.
const POLL: Duration = Duration::from_millis(250);

/// Calls `why_not_ready` until it returns `None`, and tells systemd each new reason, and in the end
/// that the program is ready.
pub async fn tell_ready<F: Future<Output = Option<String>>>(why_not_ready: impl Fn() -> F) {
    if !is_supervised() {
        return;
    }
    let mut told = None;
    while let Some(reason) = why_not_ready().await {
        if told.as_ref() != Some(&reason) {
            tell(&[NotifyState::Status(&reason)]);
            told = Some(reason);
        }
        tokio::time::sleep(POLL).await;
    }
    // The status is emptied, because it is not kept up from here on: `/readyz` is.
    tell(&[NotifyState::Ready, NotifyState::Status("")]);
}

/// Tells systemd that the program stops, as it was asked to.
pub fn tell_stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Runs the program's main loop. Meanwhile tells systemd's watchdog (`WatchdogSec=`), at twice the
/// rate that it wants, that the loop is alive.
///
/// One task does both, and each time waits until `others_answer`, the other threads that the program
/// cannot do without. So systemd hears nothing, and restarts the program, exactly if the loop or one
/// of these keeps its thread busy or blocked. A loop that waits, for hours even, is alive.
pub async fn watched<T>(main_loop: impl Future<Output = T>, others_answer: impl AsyncFn()) -> T {
    tokio::select! {
        outcome = main_loop => outcome,
        never = tell_alive(others_answer) => match never {},
    }
}

async fn tell_alive(others_answer: impl AsyncFn()) -> Infallible {
    let limit = sd_notify::watchdog_enabled().map(|limit| limit / 2);
    let Some(interval) = limit.filter(|interval| !interval.is_zero()) else {
        return pending().await;
    };
    let mut interval = tokio::time::interval(interval);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        others_answer().await;
        tell(&[NotifyState::Watchdog]);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "systemd's variable is no setting of ours, and its crate reads it too"
)]
fn is_supervised() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("cannot notify systemd: {error}");
    }
}
