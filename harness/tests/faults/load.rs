//! Delivers events at a bounded rate and concurrently, as several of Stripe's servers do.
//!
//! Owns the events: lives of subscriptions with several events in one second, out of order and
//! repeated, occasionally a poisoned event, and payments without a user. An event that is not
//! accepted is delivered again until it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use litestripe_harness::stripe::{self, Event, Purchase};
use serde_json::json;
use time::OffsetDateTime;
use tokio::task::JoinSet;

use crate::dice::Dice;
use crate::ledger::{Answer, Ledger};
use crate::rig::DEADLINE;

/// Concurrent senders.
const LANES: u64 = 4;
/// The number of subscriptions of a lane.
const LIVES: usize = 12;
/// How many events a lane holds back, to deliver them out of order.
const HELD: usize = 6;
/// How long a lane waits between two events.
const PAUSE: Duration = Duration::from_millis(15);
/// How long a lane waits after an event that was not accepted.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// The timeout of a delivery, for frozen programs. Stripe waits longer.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A load that runs until it is stopped.
pub(crate) struct Load {
    lanes: JoinSet<()>,
    stop: Arc<AtomicBool>,
}

impl Load {
    /// Starts to deliver to `hook`.
    pub(crate) fn start(ledger: &Arc<Ledger>, hook: &str, seed: u64) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let mut lanes = JoinSet::new();
        for lane in 0..LANES {
            let dice = Dice::new(seed.wrapping_mul(LANES).wrapping_add(lane));
            lanes.spawn(deliver(
                Arc::clone(ledger),
                hook.to_owned(),
                dice,
                Arc::clone(&stop),
            ));
        }
        Self { lanes, stop }
    }

    /// Ends the load, after every delivered event has been accepted.
    ///
    /// # Panics
    /// When ingress gave an unexpected answer, or an event is not accepted before the deadline.
    pub(crate) async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        let all = tokio::time::timeout(DEADLINE, self.lanes.join_all()).await;
        all.expect("every delivered event is accepted once everything works again");
    }
}

async fn deliver(ledger: Arc<Ledger>, hook: String, mut dice: Dice, stop: Arc<AtomicBool>) {
    let client = client();
    let mut lives: Vec<Life> = (0..LIVES).map(|_| Life::new()).collect();
    let mut held: Vec<Event> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        while held.len() < HELD {
            let life = &mut lives[dice.below(LIVES)];
            held.push(life.next(&mut dice));
        }
        let event = held.swap_remove(dice.below(HELD));
        // Also at the end of the load: a request without an answer may still be stored, and Stripe
        // would retry too.
        loop {
            match ledger.deliver(&client, &hook, &event).await {
                Answer::Accepted => break,
                Answer::Refused(503) | Answer::None => tokio::time::sleep(RETRY_AFTER).await,
                Answer::Refused(status) => panic!("{} was answered {status}", event.summary()),
            }
        }
        if dice.percent(5) {
            held.push(event);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Makes a client with a shorter timeout than Stripe's, for frozen programs.
pub(crate) fn client() -> reqwest::Client {
    // Called because it installs the crypto provider.
    let _ = stripe::client();
    reqwest::Client::builder()
        .timeout(ANSWER_WITHIN)
        .build()
        .expect("a client without special settings can be made")
}

/// A subscription's events, in the order in which they happen.
struct Life {
    purchase: Purchase,
    step: u64,
    now: i64,
}

impl Life {
    fn new() -> Self {
        let now = OffsetDateTime::now_utc().unix_timestamp() - 86_400;
        Self {
            purchase: Purchase::new(now),
            step: 0,
            now,
        }
    }

    fn next(&mut self, dice: &mut Dice) -> Event {
        self.step += 1;
        // Several events in one second are the difficult case of merging.
        self.now += i64::from(dice.percent(60));
        let purchase = &self.purchase;
        match self.step {
            1 => {
                let user = dice
                    .percent(80)
                    .then(|| format!("user_{}", dice.below(1000)));
                let session = json!({ "client_reference_id": user });
                purchase.checkout_session_event("checkout.session.completed", self.now, session)
            }
            2 => purchase.subscription_event("customer.subscription.created", self.now, json!({})),
            _ if dice.percent(1) => {
                let mut event = purchase.subscription_event(
                    "customer.subscription.updated",
                    self.now,
                    json!({}),
                );
                event.value["data"]["object"]["trial_end"] = json!(i64::MAX);
                event
            }
            step => {
                let (before, after) = (step - 1, step);
                let step = |step: u64| json!({ "step": step.to_string() });
                let changes = json!({ "metadata": step(after) });
                let event =
                    purchase.subscription_event("customer.subscription.updated", self.now, changes);
                let before = if before == 2 {
                    json!({ "step": null })
                } else {
                    step(before)
                };
                event.with_previous_attributes(json!({ "metadata": before }))
            }
        }
    }
}
