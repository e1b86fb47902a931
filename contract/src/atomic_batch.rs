//! Atomic batches: messages of which a stream stores all or nothing, with one sync of its disk.
//!
//! Owns the headers that make messages members of a batch, and what its PubAck has to say (NATS:
//! ADR-50, "JetStream Batch Publishing"). May not know when a batch is made.

use async_nats::header::{
    HeaderValue, NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL, NATS_BATCH_ID, NATS_BATCH_SEQUENCE,
};
use async_nats::jetstream::publish::PublishAck;
use async_nats::{Client, HeaderMap};

/// The id of one batch.
#[derive(Debug, Clone)]
pub struct BatchId(HeaderValue);

impl BatchId {
    pub fn new(client: &Client) -> Self {
        // An inbox name is unique among all clients, so the batch id is too.
        let inbox = client.new_inbox();
        Self(inbox.rsplit('.').next().unwrap_or(&inbox).into())
    }

    /// Makes a message the member `number` of the batch, counted from 1.
    pub fn add(&self, headers: &mut HeaderMap, number: usize) {
        headers.insert(NATS_BATCH_ID, self.0.clone());
        headers.insert(NATS_BATCH_SEQUENCE, HeaderValue::from(number));
    }

    /// Makes a message the last member of the batch, which commits it and gets its PubAck.
    pub fn add_last(&self, headers: &mut HeaderMap, number: usize) {
        self.add(headers, number);
        headers.insert(NATS_BATCH_COMMIT, NATS_BATCH_COMMIT_FINAL);
    }

    /// Whether the PubAck says that the whole batch is stored, with `count` members. A server
    /// without support for batches stores the members one by one and acknowledges the last alone.
    pub fn is_stored(&self, ack: &PublishAck, count: usize) -> bool {
        ack.batch_id.as_deref() == Some(self.0.as_str()) && ack.batch_size == Some(count as u64)
    }
}
