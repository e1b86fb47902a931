//! Reads what the tables hold, for the metrics and for the pauses of failing questions.
//!
//! Owns when: every few seconds, in one statement that takes a few milliseconds at any size of the
//! tables. May not know SQL.

use std::time::Duration;

use litestripe_contract::exit;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::metrics;
use crate::questions::open::OpenQuestions;
use crate::store::{Store, figures};
use crate::wait::pause;

/// How old a figure is, at most, while the database answers.
const READ_EVERY: Duration = Duration::from_secs(5);

/// How long the database may take to answer before the figures are unknown.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Reads the figures until `shutdown`.
pub(crate) async fn watch(store: Store, mut open: OpenQuestions, shutdown: CancellationToken) {
    let (mut waiting, mut is_refused) = (None, false);
    loop {
        let store = store.clone();
        let mut reading = tokio::spawn(async move { figures::read(&store).await });
        let answer = match tokio::time::timeout(ANSWER_MAX, &mut reading).await {
            Ok(Ok(answer)) => Some(answer),
            Ok(Err(panicked)) => std::panic::resume_unwind(panicked.into_panic()),
            Err(_) => None,
        };
        metrics::tables(answer.as_ref().and_then(|answer| answer.as_ref().ok()));
        match answer {
            Some(Ok(figures)) => {
                waiting = None;
                if std::mem::take(&mut is_refused) {
                    info!("the figures of the tables are known again");
                }
                open.record(&figures);
            }
            // It answers: nothing waits for it.
            Some(Err(error)) if error.is_refusal() => {
                waiting = None;
                if !std::mem::replace(&mut is_refused, true) {
                    warn!(
                        "the figures of the tables are unknown: {}",
                        exit::chain(&error)
                    );
                }
            }
            unavailable => {
                if let Some(Err(error)) = unavailable {
                    debug!("{}", exit::chain(&error));
                }
                waiting.get_or_insert_with(|| metrics::DATABASE.begin());
                // One statement at a time, or more and more would wait for the same database.
                if !reading.is_finished() {
                    tokio::select! {
                        _ = &mut reading => {}
                        () = shutdown.cancelled() => return,
                    }
                }
            }
        }
        if pause(READ_EVERY, &shutdown).await.is_none() {
            return;
        }
    }
}
