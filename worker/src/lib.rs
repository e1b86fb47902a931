//! The worker: applies Stripe's events to the database and signals what changed.
//!
//! The life of an event: `stream::consumer` fetches a batch of messages. [`apply`] applies it:
//! `litestripe_domain` decodes, merges and plans, [`store`] loads and saves, and the consumer acks.
//! [`relay`] sends the signals that were committed with the rows. [`questions`] asks Stripe and the
//! application's user lookup, outside of any batch. [`recover`] brings rows and subscribers up to
//! date after an outage. `doctor` says what is wrong with all that a worker needs. [`command`] holds
//! the operators' commands. May not know HTTP requests from Stripe: ingress receives those.

pub mod apply;
mod clocks;
pub mod command;
mod doctor;
mod endpoint;
pub mod erasure;
pub mod error;
mod fail_point;
mod figures;
mod health;
mod installation;
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
mod trace;
pub mod upgrade;
mod wait;
