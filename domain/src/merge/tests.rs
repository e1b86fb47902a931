//! The law of the merge, over simulated histories of events, and single cases.

mod cases;
mod erased;
mod fetched;
mod history;
mod law;
mod marks;
mod model;
mod random;
mod thin;
