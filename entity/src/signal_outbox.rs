//! `litestripe_signal_outbox`: signals that were committed with their change and are not yet in
//! JetStream.

use sea_orm::entity::prelude::*;

/// One signal that waits for its PubAck.
#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "litestripe_signal_outbox")]
pub struct Model {
    /// The order in which the signals of one subscription or orphan were committed.
    #[sea_orm(primary_key)]
    pub id: i64,
    /// The shard of the outbox, a function of `entity_id`.
    pub shard: i32,
    /// The subscription's or orphan's id. Signals of the same id are sent one after another.
    #[sea_orm(column_type = "Text")]
    pub entity_id: String,
    #[sea_orm(column_type = "Text")]
    pub subject: String,
    /// Its `Nats-Msg-Id`.
    #[sea_orm(column_type = "Text")]
    pub message_id: String,
    /// `created` of the event that led to it, in seconds since the Unix epoch: its `ce-time`.
    pub event_created: i64,
    #[sea_orm(column_type = "Text", nullable)]
    pub traceparent: Option<String>,
    #[sea_orm(column_type = "Text", nullable)]
    pub tracestate: Option<String>,
    #[sea_orm(column_type = "Text")]
    pub body: String,
    pub dt_created: TimeDateTimeWithTimeZone,
    /// When ingress received the event that led to it, in milliseconds since the Unix epoch, if
    /// ingress did.
    pub received_at_ms: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
