//! The fault tests: they kill, freeze, cut off or fill up any part of the bridge, and check that no
//! event that was answered 200 is lost, doubled or signalled out of order.
//!
//! The short form of [`random`] is part of every test run. Environment variables choose the long
//! form:
//!
//!     cargo build --workspace --bins --features litestripe-harness/faults
//!     LITESTRIPE_FAULTS=600 cargo test -p litestripe-harness --features faults --test faults \
//!         -- --nocapture campaign
//!
//! This spends 600 seconds on 20 new seeds and prints a table. With `LITESTRIPE_SEED=7` in addition
//! it spends them on that seed, whose schedule of faults is always the same.

mod broker;
mod check;
mod cluster;
mod database;
mod dead_letters;
mod dice;
mod disk;
#[cfg(feature = "faults")]
mod kill_points;
mod ledger;
mod load;
mod overload;
mod random;
mod rig;
mod signals;
mod tampering;
