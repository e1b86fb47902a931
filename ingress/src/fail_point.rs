//! Points at which a test can end the process. The environment variable `FAILPOINTS` names the
//! point and the action. They are compiled in only with the feature `failpoints`, never in a
//! release.

/// Marks the point `$name` and does what `FAILPOINTS` says for it: nothing, a panic, or, for
/// `return`, an abort.
macro_rules! fail_point {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        fail::fail_point!($name, |_| std::process::abort());
    };
}

pub(crate) use fail_point;
