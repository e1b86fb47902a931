//! The worker: applies Stripe's events to the database and signals what changed.
//!
//! The life of an event: `stream::consumer` fetches a batch of messages, [`apply`] applies it (the
//! core decodes, merges and plans, [`store`] loads and saves, the consumer acks), [`relay`] sends the
//! signals that were committed with the rows. [`questions`] asks what no batch waits for, [`recover`]
//! brings rows and subscribers back after an outage, [`command`] is what operators call. May not know
//! HTTP requests from Stripe: those are ingress's.

pub mod apply;
pub mod command;
pub mod erasure;
pub mod error;
mod fail_point;
mod health;
mod metrics;
pub mod questions;
pub mod recover;
pub mod relay;
pub mod retention;
pub mod settings;
mod start;
pub mod store;
pub mod stream;
pub mod stripe;
pub mod upgrade;
mod wait;
