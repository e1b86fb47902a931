//! The law of the merge, over simulated histories of events, and single cases.
#![expect(
    clippy::disallowed_macros,
    reason = "a test that enumerates reports how much, and its seed"
)]

mod cases;
mod erased;
mod fetched;
mod history;
mod law;
mod marks;
mod model;
mod random;
mod thin;
