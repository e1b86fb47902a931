//! A small seeded generator, so that a failure is reproduced by its seed.

use std::hash::{BuildHasher, RandomState};

/// The environment variable that sets the seed.
const SEED: &str = "LITESTRIPE_TEST_SEED";

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    /// Takes the seed from `LITESTRIPE_TEST_SEED`, else a random one, and prints it: a failed test
    /// shows it.
    pub(crate) fn start() -> Self {
        let given = std::env::var(SEED)
            .ok()
            .map(|seed| seed.parse().expect("a seed is a number"));
        let seed = given.unwrap_or_else(|| RandomState::new().hash_one(0));
        eprintln!("{SEED}={seed}");
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// One of `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let n = u64::try_from(n).expect("a usize is at most a u64");
        usize::try_from(self.next() % n).expect("it is below a usize")
    }

    pub(crate) fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }

    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for last in (1..list.len()).rev() {
            list.swap(last, self.below(last + 1));
        }
    }
}
