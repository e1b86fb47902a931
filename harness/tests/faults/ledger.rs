//! Stripe's view: every delivery and its answer. A 200 is a promise that the event will be applied.
//!
//! Owns the promises. May not know how ingress and worker keep them.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use litestripe_harness::bridge::SECRET;
use litestripe_harness::stripe::{Delivery, Event};

/// The answer to a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// 200: a promise.
    Accepted,
    /// Another status, after which Stripe delivers again.
    Refused(u16),
    /// No answer: the event may or may not have been stored.
    None,
}

/// Deliveries and their answers.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    pages: Mutex<Pages>,
}

#[derive(Debug, Default)]
struct Pages {
    accepted: BTreeMap<String, Bytes>,
    figures: Figures,
}

/// The number of deliveries by kind of answer.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Posted, repetitions included.
    pub(crate) deliveries: usize,
    /// Answered 200, repetitions included.
    pub(crate) accepted: usize,
    /// Answered with another status.
    pub(crate) refused: usize,
    /// Not answered.
    pub(crate) unanswered: usize,
}

impl Ledger {
    /// Delivers an event once, signed now, and records the answer.
    pub(crate) async fn deliver(
        &self,
        client: &reqwest::Client,
        hook: &str,
        event: &Event,
    ) -> Answer {
        self.deliver_body(client, hook, event.id(), event.body())
            .await
    }

    /// Delivers a body under the id of its event.
    pub(crate) async fn deliver_body(
        &self,
        client: &reqwest::Client,
        hook: &str,
        id: &str,
        body: Bytes,
    ) -> Answer {
        let answer = match Delivery::new(body.clone(), SECRET).post(client, hook).await {
            Ok(answer) if answer.status() == 200 => Answer::Accepted,
            Ok(answer) => {
                let status = answer.status().as_u16();
                let says_when = answer.headers().contains_key("retry-after");
                assert!(status != 503 || says_when, "a 503 has Retry-After");
                Answer::Refused(status)
            }
            Err(_) => Answer::None,
        };
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.figures.deliveries += 1;
        match answer {
            Answer::Accepted => {
                pages.figures.accepted += 1;
                pages.accepted.insert(id.to_owned(), body);
            }
            Answer::Refused(_) => pages.figures.refused += 1,
            Answer::None => pages.figures.unanswered += 1,
        }
        answer
    }

    /// Delivers an event as Stripe does, repeatedly until it is accepted, here for up to a minute.
    pub(crate) async fn deliver_until_accepted(
        &self,
        client: &reqwest::Client,
        hook: &str,
        event: &Event,
    ) {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = self.deliver(client, hook, event).await;
            if answer == Answer::Accepted {
                return;
            }
            assert!(
                Instant::now() < end,
                "{} was not accepted within a minute; the last answer: {answer:?}",
                event.summary()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The bodies that were accepted, by the id of their event.
    pub(crate) fn accepted(&self) -> BTreeMap<String, Bytes> {
        self.pages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .accepted
            .clone()
    }

    pub(crate) fn figures(&self) -> Figures {
        self.pages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .figures
    }
}
