//! Sends signed Stripe events to an ingress by hand: a subscription's whole life, or one event.
//!
//! Reads `.env` if it exists, like the programs, so that it needs no option in the folder of a
//! running ingress.
#![expect(
    clippy::print_stdout,
    reason = "a program for people: the answers are its output"
)]

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Args, Parser, Subcommand};
use litestripe_demo::stripe::{self, Delivery, Event, Purchase};
use serde_json::{Value, json};
use time::OffsetDateTime;

/// Sends signed Stripe events to litestripe-ingress, as Stripe would.
#[derive(Parser)]
#[command(name = "send", version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    target: Target,
}

#[derive(Subcommand)]
enum What {
    /// Send the events of a subscription's life, from Checkout to its end, and one orphaned
    /// payment.
    Story,
    /// Send one event.
    Event {
        /// JSON file: an event, which is sent byte for byte, or an object (a subscription, a
        /// Checkout Session), which is sent in a new event of --type. Without a file, a sample
        /// event of --type is sent.
        #[arg(required_unless_present = "event_type")]
        file: Option<PathBuf>,
        /// Event type, such as customer.subscription.updated; replaces the type of an event in a
        /// file.
        #[arg(long = "type", value_name = "TYPE")]
        event_type: Option<String>,
    },
}

#[derive(Args)]
struct Target {
    /// The hook's complete URL; by default it is built from --listen and --uuid.
    #[arg(long, global = true)]
    url: Option<String>,
    /// HTTP address of the ingress.
    #[arg(
        long,
        global = true,
        env = "LITESTRIPE_LISTEN",
        default_value = "127.0.0.1:8080"
    )]
    listen: String,
    /// The UUID in the hook's path.
    #[arg(
        long,
        global = true,
        env = "STRIPE_WEBHOOK_UUID",
        hide_env_values = true
    )]
    uuid: Option<String>,
    /// The signing secret (whsec_…); if there are several, separated by commas, the first is used.
    #[arg(
        long,
        global = true,
        env = "STRIPE_WEBHOOK_SECRET",
        hide_env_values = true
    )]
    secret: Option<String>,
    /// Seconds for which an event that is not answered 200 is sent again, as Stripe does.
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 0)]
    retry_s: u64,
}

/// The time between two attempts to send an event.
const RETRY_EVERY: Duration = Duration::from_millis(500);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // A missing file is fine; the programs report a malformed one.
    let _ = litestripe_contract::settings::dotenv::load(&[]);
    match run(Arguments::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("send: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// Sends the chosen events; returns whether every answer was 200.
async fn run(arguments: Arguments) -> Result<bool, String> {
    let url = arguments.target.url()?;
    let secret = arguments.target.secret()?;
    let now = OffsetDateTime::now_utc();
    let messages = match arguments.what {
        What::Story => stripe::story(now).into_iter().map(Message::from).collect(),
        What::Event {
            file: Some(file),
            event_type,
        } => vec![read(&file, event_type, now)?],
        What::Event {
            file: None,
            event_type,
        } => {
            let event_type = event_type.ok_or("give a file or --type")?;
            vec![sample(&event_type, now.unix_timestamp()).into()]
        }
    };
    let client = stripe::client();
    let retry = Duration::from_secs(arguments.target.retry_s);
    let mut all_accepted = true;
    for message in messages {
        let end = Instant::now() + retry;
        all_accepted &= loop {
            let sent = send(&client, &url, secret, &message).await;
            if matches!(sent, Ok(true)) || Instant::now() >= end {
                break sent?;
            }
            tokio::time::sleep(RETRY_EVERY).await;
        };
    }
    Ok(all_accepted)
}

impl Target {
    fn url(&self) -> Result<String, String> {
        if let Some(url) = &self.url {
            return Ok(url.clone());
        }
        let uuid = self
            .uuid
            .as_ref()
            .ok_or("set STRIPE_WEBHOOK_UUID, or give --uuid or --url")?;
        Ok(format!("http://{}/ls/hook/{uuid}/", self.listen))
    }

    fn secret(&self) -> Result<&str, String> {
        let secrets = self.secret.as_deref().unwrap_or_default();
        let first = secrets
            .split(',')
            .map(str::trim)
            .find(|secret| !secret.is_empty());
        first.ok_or_else(|| "set STRIPE_WEBHOOK_SECRET or give --secret".to_owned())
    }
}

/// A body, and the event that the output describes.
struct Message {
    event: Event,
    body: Bytes,
}

impl From<Event> for Message {
    fn from(event: Event) -> Self {
        Self {
            body: event.body(),
            event,
        }
    }
}

fn read(file: &Path, event_type: Option<String>, now: OffsetDateTime) -> Result<Message, String> {
    let cannot = |problem: String| format!("cannot send {}: {problem}", file.display());
    let body = std::fs::read(file).map_err(|problem| cannot(problem.to_string()))?;
    let mut value: Value =
        serde_json::from_slice(&body).map_err(|problem| cannot(problem.to_string()))?;
    match (value["object"] == "event", event_type) {
        (true, None) => Ok(Message {
            event: Event { value },
            body: body.into(),
        }),
        (true, Some(event_type)) => {
            value["type"] = event_type.into();
            Ok(Event { value }.into())
        }
        (false, Some(event_type)) => {
            Ok(Event::new(&event_type, now.unix_timestamp(), value).into())
        }
        (false, None) => Err(cannot(
            "it is not an event; give --type to send the object in an event of that type"
                .to_owned(),
        )),
    }
}

/// Makes an event of that type about a purchase made just now.
fn sample(event_type: &str, now: i64) -> Event {
    let purchase = Purchase::new(now);
    if event_type.starts_with("checkout.session.") {
        let session = json!({ "client_reference_id": "user_4711" });
        return purchase.checkout_session_event(event_type, now, session);
    }
    let changes = match event_type {
        "customer.subscription.deleted" => {
            json!({ "status": "canceled", "canceled_at": now, "ended_at": now })
        }
        "customer.subscription.paused" => json!({ "status": "paused" }),
        "customer.subscription.trial_will_end" => purchase.on_trial(),
        _ => json!({}),
    };
    purchase.subscription_event(event_type, now, changes)
}

/// Sends one event and prints a line about it; returns whether the answer was 200.
async fn send(
    client: &reqwest::Client,
    url: &str,
    secret: &str,
    Message { event, body }: &Message,
) -> Result<bool, String> {
    let answer = Delivery::new(body.clone(), secret)
        .post(client, url)
        .await
        .map_err(|problem| format!("no answer from ingress: {}", chain(&problem.without_url())))?;
    let status = answer.status();
    let text = answer.text().await.unwrap_or_default();
    let mark = if status == 200 { "ok " } else { "NO " };
    println!(
        "{mark} {} {:<38} {}",
        status.as_u16(),
        event.event_type(),
        event.summary()
    );
    if status != 200 {
        println!("         {}", text.trim());
    }
    Ok(status == 200)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
