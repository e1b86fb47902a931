//! The worker: applies Stripe's events to the database and signals what changed.
//!
//! The life of an event, in the order of the modules: [`consumer`] fetches a batch of messages,
//! [`batch`] applies it ([`event`] decodes, [`store`] loads, [`merge`] merges, [`store`] saves, the
//! consumer acks), [`outbox`] sends the signals that were committed with the rows. [`command`] is
//! what operators call. May not know HTTP requests from Stripe: those are ingress's.

pub mod backfill;
pub mod batch;
pub mod budget;
pub mod command;
pub mod consumer;
pub mod dead_letter;
pub mod drain;
pub mod erasure;
pub mod error;
pub mod health;
pub mod kv;
pub mod lease;
pub mod lookup;
pub mod metrics;
pub mod mode;
pub mod outbox;
pub mod own_event;
pub mod reconcile;
pub mod replay;
pub mod resend;
pub mod retention;
pub mod settings;
pub mod store;
pub mod stripe_api;
pub mod sweep;
