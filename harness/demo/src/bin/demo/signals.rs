//! A subscriber of `LITESTRIPE_SIGNALS`: an ephemeral consumer of its own, and a line per signal.

use async_nats::jetstream;
use async_nats::jetstream::consumer::pull::{Ordered, OrderedConfig};
use futures_util::StreamExt as _;
use litestripe_contract::exit;
use litestripe_contract::signal::{Access, Orphan, SubscriptionChanged};
use litestripe_contract::subject;

use crate::screen::{Screen, Tone, WIDTH, fit, short};

/// An open subscription, and what came so far.
pub(crate) struct Signals {
    messages: Ordered,
    /// In the order in which they came.
    pub(crate) seen: Vec<Received>,
}

/// A signal as it came.
pub(crate) struct Received {
    /// Its body.
    pub(crate) body: String,
    /// What the body says.
    pub(crate) signal: Signal,
}

/// What a signal says.
pub(crate) enum Signal {
    /// `subscription.changed`.
    Changed(Box<SubscriptionChanged>),
    /// `orphan.created` or `orphan.resolved`.
    Orphan {
        /// Which of the two.
        subject: String,
        /// The orphan.
        orphan: Orphan,
    },
}

impl Signals {
    /// Subscribes to all signals, those in the stream first.
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

    /// Waits for a signal and shows it.
    ///
    /// # Cancel safety
    /// A signal is either shown and kept, or not taken from the subscription.
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
            |problem: serde_json::Error| format!("a signal on {subject} is unreadable: {problem}");
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
                // 66 columns stand before it in the line.
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

/// `trialing → active`, or the status that stayed with what changed in its stead.
fn change(signal: &SubscriptionChanged) -> String {
    const NONE: &str = "no status";
    let status = signal.subscription.status.as_deref().unwrap_or(NONE);
    if let Some(before) = signal.previous.get("status") {
        return format!("{} → {status}", before.as_str().unwrap_or(NONE));
    }
    format!("{status} ({})", most_telling(&signal.changed))
}

/// One of these columns and how many more: all of them do not fit into a line.
fn most_telling(columns: &[String]) -> String {
    const TELLING: [&str; 4] = [
        "client_reference_id",
        "cancel_at_period_end",
        "current_period_end",
        "metadata",
    ];
    let telling = TELLING
        .into_iter()
        .find(|telling| columns.iter().any(|column| column == telling));
    let column = telling
        .or(columns.first().map(String::as_str))
        .unwrap_or("nothing new");
    match columns.len() {
        0 | 1 => column.to_owned(),
        several => format!("{column} +{}", several - 1),
    }
}
