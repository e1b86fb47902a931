//! Reads the rows that the worker wrote and prints them as two tables.

use comfy_table::{ContentArrangement, Table, presets};
use litestripe_contract::exit;
use litestripe_entity::{orphaned_payment, stripe_subscription};
use sea_orm::{ConnectOptions, Database, DatabaseConnection, EntityTrait, QueryOrder};
use serde_json::Value;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::screen::{Screen, Tone, WIDTH};

/// The width, in characters, that the table of two subscriptions leaves for the first one's values.
const MAP_WIDTH: usize = 40;

/// A read-only connection to the database.
pub(crate) struct Rows {
    connection: DatabaseConnection,
}

/// The rows at one moment, the oldest first.
pub(crate) struct Snapshot {
    pub(crate) subscriptions: Vec<stripe_subscription::Model>,
    pub(crate) orphans: Vec<orphaned_payment::Model>,
}

impl Rows {
    pub(crate) async fn open(url: &str) -> Result<Self, String> {
        let mut options = ConnectOptions::new(url);
        options.max_connections(1).sqlx_logging(false);
        let connection = Database::connect(options).await;
        let connection = connection
            .map_err(|problem| format!("cannot open the database: {}", exit::chain(&problem)))?;
        Ok(Self { connection })
    }

    /// Reads both tables.
    pub(crate) async fn read(&self) -> Result<Snapshot, String> {
        let cannot =
            |problem: sea_orm::DbErr| format!("cannot read the rows: {}", exit::chain(&problem));
        let subscriptions = stripe_subscription::Entity::find()
            .order_by_asc(stripe_subscription::Column::DtCreated)
            .all(&self.connection)
            .await
            .map_err(cannot)?;
        let orphans = orphaned_payment::Entity::find()
            .order_by_asc(orphaned_payment::Column::DtCreated)
            .all(&self.connection)
            .await
            .map_err(cannot)?;
        Ok(Snapshot {
            subscriptions,
            orphans,
        })
    }
}

impl Snapshot {
    /// Prints both tables. Each row of the database is a column on the screen, so that ids fit.
    pub(crate) fn show(&self, screen: &Screen) -> Result<(), String> {
        let all = &self.subscriptions;
        show(
            screen,
            "stripe_subscription",
            "(no column identifies a person)",
            &[
                (
                    "stripe_subscription_id",
                    each(all, |row| row.stripe_subscription_id.clone()),
                ),
                (
                    "stripe_customer_id",
                    each(all, |row| text(row.stripe_customer_id.as_deref())),
                ),
                (
                    "client_reference_id",
                    each(all, |row| text(row.client_reference_id.as_deref())),
                ),
                ("status", each(all, |row| text(row.status.as_deref()))),
                ("trial_end", each(all, |row| moment(row.trial_end))),
                (
                    "current_period_start",
                    each(all, |row| moment(row.current_period_start)),
                ),
                (
                    "current_period_end",
                    each(all, |row| moment(row.current_period_end)),
                ),
                (
                    "cancel_at_period_end",
                    each(all, |row| row.cancel_at_period_end.to_string()),
                ),
                ("canceled_at", each(all, |row| moment(row.canceled_at))),
                ("ended_at", each(all, |row| moment(row.ended_at))),
                ("items", each(all, |row| items(&row.items))),
                ("metadata", each(all, |row| map(&row.metadata))),
                (
                    "subscription_metadata",
                    each(all, |row| map(&row.subscription_metadata)),
                ),
                ("revision", each(all, |row| row.revision.to_string())),
            ],
        )?;
        let all = &self.orphans;
        show(
            screen,
            "orphaned_payment",
            "(the only table with an email, which is erased when the orphan is resolved)",
            &[
                ("id", each(all, |row| row.id.clone())),
                ("reason", each(all, |row| row.reason.clone())),
                (
                    "customer_email",
                    each(all, |row| text(row.customer_email.as_deref())),
                ),
                (
                    "stripe_customer_id",
                    each(all, |row| text(row.stripe_customer_id.as_deref())),
                ),
                (
                    "checkout_session_id",
                    each(all, |row| text(row.checkout_session_id.as_deref())),
                ),
                ("resolved_at", each(all, |row| moment(row.resolved_at))),
            ],
        )
    }
}

fn show(
    screen: &Screen,
    name: &str,
    note: &str,
    columns: &[(&str, Vec<String>)],
) -> Result<(), String> {
    screen.line(format_args!(
        "\n{} {}",
        screen.tint(Tone::Heading, name),
        screen.tint(Tone::Faint, note)
    ))?;
    if columns.iter().all(|(_, values)| values.is_empty()) {
        return screen.line("no rows");
    }
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_width(u16::try_from(WIDTH).expect("a screen's width is a u16"));
    for (column, values) in columns {
        table.add_row(std::iter::once((*column).to_owned()).chain(values.iter().cloned()));
    }
    screen.line(table)
}

fn each<T>(rows: &[T], value: impl Fn(&T) -> String) -> Vec<String> {
    rows.iter().map(value).collect()
}

fn text(value: Option<&str>) -> String {
    value.unwrap_or("null").to_owned()
}

fn moment(at: Option<OffsetDateTime>) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z");
    let written = at.map(|at| at.to_offset(time::UtcOffset::UTC).format(format));
    written
        .and_then(Result::ok)
        .unwrap_or_else(|| "null".to_owned())
}

/// Formats each item as a line `price_… × 1`.
fn items(items: &Value) -> String {
    let lines = items.as_array().into_iter().flatten().map(|item| {
        let price = text(item["price"].as_str());
        match item["quantity"].as_i64() {
            Some(quantity) => format!("{price} × {quantity}"),
            None => price,
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Formats each entry as `key = value`, on two lines if the key is long.
fn map(map: &Value) -> String {
    let lines = map.as_object().into_iter().flatten().map(|(key, value)| {
        let line = format!("{key} = {}", text(value.as_str()));
        match key.rfind('.') {
            Some(dot) if line.len() > MAP_WIDTH => format!("{}\n  {}", &line[..dot], &line[dot..]),
            _ => line,
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}
