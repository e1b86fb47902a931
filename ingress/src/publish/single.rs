//! Sends one message and reads its PubAck.
//!
//! Owns how a delivery becomes a published message. May not know batches, retries or deadlines.

use async_nats::HeaderMap;
use async_nats::jetstream;
use async_nats::jetstream::context::PublishError;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::publish::PublishAck;

use super::message::Delivery;
use super::outcome::Stored;
use crate::fail_point::fail_point;

pub(super) async fn send(
    jetstream: &jetstream::Context,
    delivery: &Delivery,
    headers: HeaderMap,
) -> Result<
    impl IntoFuture<Output = Result<PublishAck, PublishError>, IntoFuture: Send> + Send + use<>,
    PublishError,
> {
    let message = PublishMessage::build()
        .headers(headers)
        .payload(delivery.body.bytes().clone());
    let ack = jetstream.send_publish(delivery.subject(), message).await?;
    fail_point!("ingress::before_puback");
    Ok(ack)
}

pub(super) async fn wait_for_ack(
    ack: impl IntoFuture<Output = Result<PublishAck, PublishError>>,
) -> Result<PublishAck, PublishError> {
    let ack = ack.await?;
    fail_point!("ingress::after_puback");
    Ok(ack)
}

/// Reads the PubAck of an event that was published by itself.
pub(super) fn stored(ack: &PublishAck) -> Stored {
    if ack.duplicate {
        Stored::Duplicate
    } else {
        Stored::New
    }
}
