//! Sends the demo's webhooks, as snapshot or as thin events, and checks the rows and signals that
//! they lead to.

use std::time::{Duration, Instant};

use litestripe_contract::exit;
use litestripe_contract::signal::OrphanReason;
use litestripe_contract::subject;
use litestripe_demo::stripe::{self, Delivery, Event};
use litestripe_entity::{orphaned_payment, stripe_subscription};
use serde_json::Value;
use time::OffsetDateTime;
use time::macros::format_description;
use tokio::time::timeout;

use crate::instance::Instance;
use crate::rows::{Rows, Snapshot};
use crate::screen::{Screen, Tone, short};
use crate::signals::{Received, Signal, Signals};
use crate::thin;

/// How long rows and signals may take after the last delivery; they take milliseconds.
pub(crate) const SETTLE_MAX: Duration = Duration::from_secs(20);
/// The time between two checks of the rows.
const PAUSE: Duration = Duration::from_millis(50);

/// Delivers the story's events, one each `pace`, and shows them with the resulting signals and
/// rows.
///
/// Returns the open subscription, and an error text if rows or signals are not as expected.
pub(crate) async fn run(
    instance: &Instance,
    screen: &Screen,
    pace: Duration,
) -> Result<(Signals, Result<(), String>), String> {
    let mut signals = Signals::subscribe(&instance.nats_url()).await?;
    let rows = Rows::open(&instance.database_url("ro")).await?;
    let client = stripe::client();
    let story = stripe::story(OffsetDateTime::now_utc());
    show_heading(instance, screen)?;

    for event in &story {
        match instance.stripe() {
            None => deliver(event, instance, &client, screen).await?,
            Some(stripe) => thin::deliver(event, stripe, instance, screen, &mut signals).await?,
        }
        timeout(pace, show_all(&mut signals, screen))
            .await
            .unwrap_or(Ok(()))?;
    }

    let end = Instant::now() + SETTLE_MAX;
    let (snapshot, differences) = loop {
        let snapshot = rows.read().await?;
        let differences = differences(&story, &snapshot, &signals.seen);
        if differences.is_empty() || Instant::now() > end {
            break (snapshot, differences);
        }
        timeout(PAUSE, show_all(&mut signals, screen))
            .await
            .unwrap_or(Ok(()))?;
    };
    snapshot.show(screen)?;
    if differences.is_empty() {
        let good = screen.tint(Tone::Good, "as expected");
        let led = match instance.stripe() {
            None => format!("{} webhooks", story.len()),
            Some(stripe) => format!(
                "the thin events and {} requests to Stripe's API",
                stripe.requests("").len()
            ),
        };
        screen.line(format_args!(
            "\n{good}: {led} led to {} signals and the rows above",
            signals.seen.len()
        ))?;
        return Ok((signals, Ok(())));
    }
    Ok((
        signals,
        Err(format!(
            "the rows or signals are not as expected:\n  {}",
            differences.join("\n  ")
        )),
    ))
}

fn show_heading(instance: &Instance, screen: &Screen) -> Result<(), String> {
    let (title, delivered) = match instance.stripe() {
        None => (
            "A subscription's life, then an orphaned payment",
            "→ delivered webhook: HTTP status, event type, event's date, subscription, content",
        ),
        Some(_) => (
            "A subscription's life as thin events, then an orphaned payment",
            "→ delivered thin event: HTTP status, type, date, object; it holds no data\n  \
             ⇄ the worker's request to Stripe's API: object, its state",
        ),
    };
    screen.line(format_args!(
        "\n{}\n{delivered}\n    \
         ← signal sent: subject, subscription, revision, access, change (+2: 2 more fields)\n",
        screen.tint(Tone::Heading, title)
    ))
}

async fn show_all(signals: &mut Signals, screen: &Screen) -> Result<(), String> {
    loop {
        signals.show_next(screen).await?;
    }
}

async fn deliver(
    event: &Event,
    instance: &Instance,
    client: &reqwest::Client,
    screen: &Screen,
) -> Result<(), String> {
    let delivery = Delivery::new(event.body(), instance.secret());
    let answer = post(&delivery, instance, client).await?;
    let status = answer.status();
    let tone = if status == 200 { Tone::Good } else { Tone::Bad };
    let object = &event.value["data"]["object"];
    screen.line(format_args!(
        "{} {} {:<37} {} {}  {}",
        screen.tint(Tone::Heading, "→"),
        screen.tint(tone, status.as_u16()),
        event.event_type(),
        screen.tint(Tone::Faint, day(event.created())),
        short(subscription(object)),
        summary(object),
    ))?;
    if status != 200 {
        let body = answer.text().await.unwrap_or_default();
        screen.line(format_args!("  {}", screen.tint(Tone::Bad, body.trim())))?;
    }
    Ok(())
}

/// Posts a delivery to the hook.
pub(crate) async fn post(
    delivery: &Delivery,
    instance: &Instance,
    client: &reqwest::Client,
) -> Result<reqwest::Response, String> {
    let answer = delivery.post(client, &instance.hook_url()).await;
    answer.map_err(|problem| {
        format!(
            "ingress does not answer: {}",
            exit::chain(&problem.without_url())
        )
    })
}

pub(crate) fn day(created: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(created).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    at.format(format_description!(
        "[day padding:space] [month repr:short]"
    ))
    .unwrap_or_default()
}

/// The id of a subscription, or of the subscription that a Checkout Session belongs to.
fn subscription(object: &Value) -> &str {
    object["subscription"]
        .as_str()
        .or(object["id"].as_str())
        .unwrap_or_default()
}

/// Describes an object in a few words.
pub(crate) fn summary(object: &Value) -> String {
    if object["object"] == "checkout.session" {
        return match object["client_reference_id"].as_str() {
            Some(id) => format!("client reference id {id}"),
            None => "paid, no client reference id".to_owned(),
        };
    }
    let status = object["status"].as_str().unwrap_or_default();
    let canceling = object["cancel_at_period_end"] == true && status != "canceled";
    if canceling {
        format!("{status}, cancels at period end")
    } else {
        status.to_owned()
    }
}

/// Compares rows and signals with those that the story must lead to; returns the differences.
fn differences(story: &[Event], rows: &Snapshot, signals: &[Received]) -> Vec<String> {
    let objects = || story.iter().map(|event| &event.value["data"]["object"]);
    let subscriptions = || objects().filter(|object| object["object"] == "subscription");
    let (Some(checkout), Some(ended), Some(orphan)) = (
        objects().next(),
        subscriptions().next_back(),
        objects().next_back(),
    ) else {
        return vec!["the story has no events".to_owned()];
    };
    let mut differences = Differences::default();

    let id = subscription(ended);
    let row = rows
        .subscriptions
        .iter()
        .find(|row| row.stripe_subscription_id == id);
    match row {
        Some(row) => differences.check_subscription(row, checkout, ended),
        None => differences.add(format!("stripe_subscription has no row {id}")),
    }
    let statuses = subscriptions().map(|object| object["status"].as_str().unwrap_or_default());
    differences.check_signals(
        id,
        row.map(|row| row.revision),
        &without_repetition(statuses),
        signals,
    );

    let id = subscription(orphan);
    match rows.orphans.iter().find(|row| row.id == id) {
        Some(row) => differences.check_orphan(row, orphan),
        None => differences.add(format!("orphaned_payment has no row {id}")),
    }
    differences.check_orphan_signals(orphan, signals);
    differences.0
}

#[derive(Default)]
struct Differences(Vec<String>);

impl Differences {
    fn add(&mut self, difference: String) {
        self.0.push(difference);
    }

    fn unless_equal(&mut self, what: &str, expected: &Value, found: impl Into<Value>) {
        let found = found.into();
        if *expected != found {
            self.add(format!("{what} is {found}, expected {expected}"));
        }
    }

    fn check_subscription(
        &mut self,
        row: &stripe_subscription::Model,
        checkout: &Value,
        ended: &Value,
    ) {
        let unix = |at: Option<OffsetDateTime>| at.map(OffsetDateTime::unix_timestamp);
        let period_end = &ended["items"]["data"][0]["current_period_end"];
        self.unless_equal(
            "stripe_subscription.status",
            &ended["status"],
            row.status.as_deref(),
        );
        self.unless_equal(
            "stripe_subscription.stripe_customer_id",
            &ended["customer"],
            row.stripe_customer_id.as_deref(),
        );
        self.unless_equal(
            "stripe_subscription.checkout_session_id",
            &checkout["id"],
            row.checkout_session_id.as_deref(),
        );
        self.unless_equal(
            "stripe_subscription.client_reference_id",
            &checkout["client_reference_id"],
            row.client_reference_id.as_deref(),
        );
        self.unless_equal(
            "stripe_subscription.current_period_end",
            period_end,
            unix(row.current_period_end),
        );
        self.unless_equal(
            "stripe_subscription.cancel_at_period_end",
            &ended["cancel_at_period_end"],
            row.cancel_at_period_end,
        );
        self.unless_equal(
            "stripe_subscription.canceled_at",
            &ended["canceled_at"],
            unix(row.canceled_at),
        );
        self.unless_equal(
            "stripe_subscription.ended_at",
            &ended["ended_at"],
            unix(row.ended_at),
        );
        self.unless_equal(
            "stripe_subscription.subscription_metadata",
            &ended["metadata"],
            row.subscription_metadata.clone(),
        );
    }

    fn check_orphan(&mut self, row: &orphaned_payment::Model, session: &Value) {
        let reason = OrphanReason::MissingClientReferenceId.as_str();
        let email = &session["customer_details"]["email"];
        self.unless_equal(
            "orphaned_payment.reason",
            &reason.into(),
            row.reason.as_str(),
        );
        self.unless_equal(
            "orphaned_payment.customer_email",
            email,
            row.customer_email.as_deref(),
        );
        self.unless_equal(
            "orphaned_payment.checkout_session_id",
            &session["id"],
            row.checkout_session_id.as_deref(),
        );
    }

    /// Checks that the signals have the story's statuses in order, and revisions without a gap up
    /// to the row's.
    fn check_signals(
        &mut self,
        id: &str,
        revision: Option<i64>,
        statuses: &[&str],
        signals: &[Received],
    ) {
        let changes = signals
            .iter()
            .filter_map(|received| match &received.signal {
                Signal::Changed(signal) if signal.stripe_subscription_id == id => Some(signal),
                _ => None,
            });
        let mut last = None;
        for signal in changes.clone() {
            if signal.previous_revision != last {
                self.add(format!(
                    "the signal before revision {} of {id} is missing",
                    signal.revision
                ));
            }
            last = Some(signal.revision);
        }
        if last.is_none() || last != revision {
            self.add(format!(
                "the signal of the latest revision of {id} is missing"
            ));
        }
        let signalled =
            without_repetition(changes.filter_map(|signal| signal.subscription.status.as_deref()));
        if signalled != statuses {
            self.add(format!(
                "the signals of {id} have the statuses {signalled:?}, expected {statuses:?}"
            ));
        }
    }

    fn check_orphan_signals(&mut self, session: &Value, signals: &[Received]) {
        let id = subscription(session);
        let created = signals.iter().filter(|received| match &received.signal {
            Signal::Orphan { subject, orphan } => {
                subject == subject::ORPHAN_CREATED && orphan.orphan_id == id
            }
            Signal::Changed(_) => false,
        });
        let count = created.count();
        if count != 1 {
            self.add(format!(
                "there are {count} signals {} of {id}, expected 1",
                subject::ORPHAN_CREATED
            ));
        }
        let email = session["customer_details"]["email"]
            .as_str()
            .unwrap_or_default();
        if signals.iter().any(|received| received.body.contains(email)) {
            self.add("a signal contains an email".to_owned());
        }
    }
}

fn without_repetition<'a>(statuses: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut statuses: Vec<&str> = statuses.collect();
    statuses.dedup();
    statuses
}
