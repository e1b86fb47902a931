//! The story: what is sent, and what it must have led to.

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

/// How long rows and signals may take after the last delivery; they take milliseconds.
const SETTLE_MAX: Duration = Duration::from_secs(20);
/// Between two looks at the rows.
const PAUSE: Duration = Duration::from_millis(50);

/// Sends the story, `pace` between two deliveries, and shows it with the signals and rows it leads to.
///
/// Returns the open subscription and whether all that the story must lead to is there.
pub(crate) async fn tell(
    instance: &Instance,
    screen: &Screen,
    pace: Duration,
) -> Result<(Signals, Result<(), String>), String> {
    let mut signals = Signals::subscribe(&instance.nats_url()).await?;
    let rows = Rows::open(&instance.database_url("ro")).await?;
    let client = stripe::client();
    let story = stripe::story(OffsetDateTime::now_utc());
    let heading = screen.tint(
        Tone::Heading,
        "A subscription's life, then an orphaned payment",
    );
    screen.line(format_args!(
        "\n{heading}   → delivery, its HTTP status   ← signal"
    ))?;

    for event in &story {
        deliver(event, instance, &client, screen).await?;
        timeout(pace, show_all(&mut signals, screen))
            .await
            .unwrap_or(Ok(()))?;
    }

    let end = Instant::now() + SETTLE_MAX;
    let (snapshot, missing) = loop {
        let snapshot = rows.read().await?;
        let missing = missing(&story, &snapshot, &signals.seen);
        if missing.is_empty() || Instant::now() > end {
            break (snapshot, missing);
        }
        timeout(PAUSE, show_all(&mut signals, screen))
            .await
            .unwrap_or(Ok(()))?;
    };
    snapshot.show(screen)?;
    if missing.is_empty() {
        let good = screen.tint(Tone::Good, "as expected");
        screen.line(format_args!(
            "\n{good}: {} deliveries, {} signals, the rows above",
            story.len(),
            signals.seen.len()
        ))?;
        return Ok((signals, Ok(())));
    }
    Ok((
        signals,
        Err(format!(
            "the story did not lead to what it must:\n  {}",
            missing.join("\n  ")
        )),
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
    let answer = delivery.post(client, &instance.hook_url()).await;
    let answer = answer.map_err(|problem| {
        format!(
            "the ingress does not answer: {}",
            exit::chain(&problem.without_url())
        )
    })?;
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
        gist(object),
    ))?;
    if status != 200 {
        let body = answer.text().await.unwrap_or_default();
        screen.line(format_args!("  {}", screen.tint(Tone::Bad, body.trim())))?;
    }
    Ok(())
}

fn day(created: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(created).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    at.format(format_description!(
        "[day padding:space] [month repr:short]"
    ))
    .unwrap_or_default()
}

/// The subscription that an object is, or belongs to.
fn subscription(object: &Value) -> &str {
    object["subscription"]
        .as_str()
        .or(object["id"].as_str())
        .unwrap_or_default()
}

/// What an object says, in a few words.
fn gist(object: &Value) -> String {
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

/// What the story must have led to and has not, or not yet.
fn missing(story: &[Event], rows: &Snapshot, signals: &[Received]) -> Vec<String> {
    let objects = || story.iter().map(|event| &event.value["data"]["object"]);
    let of_subscription = || objects().filter(|object| object["object"] == "subscription");
    let (Some(checkout), Some(ended), Some(orphan)) = (
        objects().next(),
        of_subscription().next_back(),
        objects().next_back(),
    ) else {
        return vec!["a story".to_owned()];
    };
    let mut missing = Missing::default();

    let id = subscription(ended);
    let row = rows
        .subscriptions
        .iter()
        .find(|row| row.stripe_subscription_id == id);
    match row {
        Some(row) => missing.in_subscription(row, checkout, ended),
        None => missing.note(format!("no row of {id} in stripe_subscription")),
    }
    let statuses = of_subscription().map(|object| object["status"].as_str().unwrap_or_default());
    missing.in_signals(
        id,
        row.map(|row| row.revision),
        &without_repetition(statuses),
        signals,
    );

    let id = subscription(orphan);
    match rows.orphans.iter().find(|row| row.id == id) {
        Some(row) => missing.in_orphan(row, orphan),
        None => missing.note(format!("no row of {id} in orphaned_payment")),
    }
    missing.in_orphan_signals(orphan, signals);
    missing.0
}

#[derive(Default)]
struct Missing(Vec<String>);

impl Missing {
    fn note(&mut self, what: String) {
        self.0.push(what);
    }

    fn unless_equal(&mut self, what: &str, wanted: &Value, found: impl Into<Value>) {
        let found = found.into();
        if *wanted != found {
            self.note(format!("{what} is {found} instead of {wanted}"));
        }
    }

    fn in_subscription(
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

    fn in_orphan(&mut self, row: &orphaned_payment::Model, session: &Value) {
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

    /// Every status of the story in its order, and revisions without a gap up to the row's own.
    fn in_signals(
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
                self.note(format!(
                    "the signal before revision {} of {id}",
                    signal.revision
                ));
            }
            last = Some(signal.revision);
        }
        if last.is_none() || last != revision {
            self.note(format!("the signal of the latest revision of {id}"));
        }
        let signalled =
            without_repetition(changes.filter_map(|signal| signal.subscription.status.as_deref()));
        if signalled != statuses {
            self.note(format!(
                "signals with the statuses {statuses:?} of {id}; there are {signalled:?}"
            ));
        }
    }

    fn in_orphan_signals(&mut self, session: &Value, signals: &[Received]) {
        let id = subscription(session);
        let created = signals.iter().filter(|received| match &received.signal {
            Signal::Orphan { subject, orphan } => {
                subject == subject::ORPHAN_CREATED && orphan.orphan_id == id
            }
            Signal::Changed(_) => false,
        });
        let count = created.count();
        if count != 1 {
            self.note(format!(
                "one signal {} of {id}; there are {count}",
                subject::ORPHAN_CREATED
            ));
        }
        let email = session["customer_details"]["email"]
            .as_str()
            .unwrap_or_default();
        if signals.iter().any(|received| received.body.contains(email)) {
            self.note("the absence of an email from the signals".to_owned());
        }
    }
}

fn without_repetition<'a>(statuses: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut statuses: Vec<&str> = statuses.collect();
    statuses.dedup();
    statuses
}
