//! A subscriber of `LITESTRIPE_SIGNALS` with an ephemeral consumer, which prints a line per signal.

use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use futures_util::StreamExt as _;
use litestripe_contract::exit;
use litestripe_contract::signal::{Access, Orphan, SubscriptionChanged};
use litestripe_contract::subject;

use crate::screen::{Screen, Tone, WIDTH, fit, short};

/// An open subscription to the signals, and the signals received so far.
pub(crate) struct Signals {
    messages: Ordered,
    /// In the order of arrival.
    pub(crate) seen: Vec<Received>,
}

/// A signal's body, as text and decoded.
pub(crate) struct Received {
    pub(crate) body: String,
    pub(crate) signal: Signal,
}

/// A decoded signal.
pub(crate) enum Signal {
    /// `subscription.changed`.
    Changed(Box<SubscriptionChanged>),
    /// `orphan.created` or `orphan.resolved`, as the subject says.
    Orphan { subject: String, orphan: Orphan },
}

impl Signals {
    /// Subscribes to all signals, beginning with those already in the stream.
    pub(crate) async fn subscribe(nats_url: &str) -> Result<Self, String> {
        let cannot =
            |problem: &dyn std::error::Error| format!("cannot subscribe to signals: {problem}");
        let client = async_nats::connect(nats_url)
            .await
            .map_err(|problem| cannot(&problem))?;
        let jetstream = jetstream::new(client);
        let stream = jetstream
            .get_stream(subject::SIGNALS_STREAM)
            .await
            .map_err(|problem| cannot(&problem))?;
        let consumer = stream
            .create_consumer(OrderedConfig::default())
            .await
            .map_err(|problem| cannot(&problem))?;
        let messages = consumer
            .messages()
            .await
            .map_err(|problem| cannot(&problem))?;
        Ok(Self {
            messages,
            seen: Vec::new(),
        })
    }

    /// Waits for the next signal and shows it.
    ///
    /// # Cancel safety
    /// When cancelled, it has taken no signal from the subscription.
    pub(crate) async fn show_next(&mut self, screen: &Screen) -> Result<(), String> {
        let message = self
            .messages
            .next()
            .await
            .ok_or("the subscription to signals ended")?;
        let message = message
            .map_err(|problem| format!("cannot receive signals: {}", exit::chain(&problem)))?;
        let received = Received::read(&message.subject, &message.payload)?;
        screen.line(received.signal.line(screen))?;
        self.seen.push(received);
        Ok(())
    }
}

impl Received {
    fn read(subject: &str, payload: &[u8]) -> Result<Self, String> {
        let unreadable =
            |problem: serde_json::Error| format!("cannot read a signal on {subject}: {problem}");
        let signal = if subject == subject::SUBSCRIPTION_CHANGED {
            Signal::Changed(serde_json::from_slice(payload).map_err(unreadable)?)
        } else {
            let orphan = serde_json::from_slice(payload).map_err(unreadable)?;
            Signal::Orphan {
                subject: subject.to_owned(),
                orphan,
            }
        };
        Ok(Self {
            body: String::from_utf8_lossy(payload).into_owned(),
            signal,
        })
    }
}

impl Signal {
    fn line(&self, screen: &Screen) -> String {
        let arrow = screen.tint(Tone::Faint, "    ←");
        match self {
            Self::Changed(signal) => {
                let head = head(
                    screen,
                    subject::SUBSCRIPTION_CHANGED,
                    &signal.stripe_subscription_id,
                );
                let (tone, access) = match signal.access {
                    Access::Granted => (Tone::Good, "granted"),
                    Access::Grace => (Tone::Warn, "grace"),
                    Access::Revoked => (Tone::Bad, "revoked"),
                };
                let access = screen.tint(tone, format_args!("{access:<7}"));
                let revision = screen.tint(Tone::Faint, format_args!("rev {}", signal.revision));
                // The line holds 66 characters before it.
                let room = WIDTH - 66;
                format!(
                    "{arrow} {head} {revision} {access} {}",
                    fit(&change(signal), room)
                )
            }
            Self::Orphan { subject, orphan } => {
                let head = head(screen, subject, &orphan.orphan_id);
                format!(
                    "{arrow} {head} {}",
                    screen.tint(Tone::Warn, orphan.reason.as_str())
                )
            }
        }
    }
}

fn head(screen: &Screen, subject: &str, id: &str) -> String {
    format!(
        "{} {:<12}",
        screen.tint(Tone::Name, format_args!("{subject:<20}")),
        short(id)
    )
}

/// Describes a change: `trialing → active`, or the unchanged status and the field that changed.
fn change(signal: &SubscriptionChanged) -> String {
    const NONE: &str = "no status";
    let status = signal.subscription.status.as_deref().unwrap_or(NONE);
    if let Some(before) = signal.previous.get("status") {
        return format!("{} → {status}", before.as_str().unwrap_or(NONE));
    }
    format!("{status} ({})", abbreviated(&signal.changed))
}

/// Names the most interesting of these fields and counts the others: a line has no room for all.
fn abbreviated(fields: &[String]) -> String {
    const INTERESTING: [&str; 4] = [
        "client_reference_id",
        "cancel_at_period_end",
        "current_period_end",
        "metadata",
    ];
    let interesting = INTERESTING
        .into_iter()
        .find(|interesting| fields.iter().any(|field| field == interesting));
    let field = interesting
        .or(fields.first().map(String::as_str))
        .unwrap_or("no change");
    match fields.len() {
        0 | 1 => field.to_owned(),
        several => format!("{field} +{}", several - 1),
    }
}
