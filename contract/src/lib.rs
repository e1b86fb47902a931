//! What ingress, worker and Rust subscribers share.
//!
//! Owns the names and shapes of DESIGN's external contract: streams, subjects, headers, signals. An
//! item belongs here only if that contract names it *and* more than one program, or a subscriber,
//! relies on it. May not know the database, HTTP, or anything inside an event beyond its envelope.
//!
//! Without features this crate does no I/O; Rust subscribers depend on it in this form. The feature
//! `process` adds the parts that the two programs share: settings, connection, provisioning,
//! telemetry and shutdown.

pub mod event;
pub mod header;
pub mod signal;
pub mod subject;
pub mod trace;

#[cfg(feature = "process")]
pub mod atomic_batch;
#[cfg(feature = "process")]
pub mod connect;
#[cfg(feature = "process")]
pub mod exit;
#[cfg(feature = "process")]
pub mod settings;
#[cfg(feature = "process")]
pub mod shutdown;
#[cfg(feature = "process")]
pub mod signing_secret;
#[cfg(feature = "process")]
pub mod stream;
#[cfg(feature = "process")]
pub mod systemd;
#[cfg(feature = "process")]
pub mod telemetry;
