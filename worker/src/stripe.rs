//! Stripe's API: how it is called, within which budget, and for which mode.

pub mod api;
pub mod budget;
pub mod kv;
pub mod mode;
