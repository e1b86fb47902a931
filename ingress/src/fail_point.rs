//! Points at which a test ends the process: the variable `FAILPOINTS` says at which, and how. They are
//! compiled in with the feature `failpoints` only, never in a release.

/// A point of this name. What `FAILPOINTS` says of it is done: nothing, a panic, or with `return` an abort.
macro_rules! fail_point {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($name, |_| std::process::abort());
    };
}

pub(crate) use fail_point;
