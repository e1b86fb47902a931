//! A clock that programs are shown in place of the machine's, and that a test sets while they run.
//!
//! Works by libfaketime, so only for programs that ask libc: ours, and not nats-server, whose Go
//! asks the kernel. To those programs the broker's clock is wrong in the other direction. Timers
//! are not affected: they measure time since the machine was started.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use tempfile::NamedTempFile;

use crate::tools;

/// A clock, at first the machine's. Dropping it leaves its programs at the machine's time.
#[derive(Debug)]
pub struct Clock {
    file: NamedTempFile,
}

impl Clock {
    /// Creates a clock that shows the machine's time.
    ///
    /// # Panics
    /// When there is no room for its file.
    #[expect(clippy::new_without_default, reason = "it makes a file")]
    pub fn new() -> Self {
        let clock = Self {
            file: NamedTempFile::new().expect("a file for the clock can be made"),
        };
        clock.set_ahead(0);
        clock
    }

    /// Sets it this many seconds ahead of the machine's time, or behind if negative. Programs that
    /// run see a jump.
    ///
    /// # Panics
    /// When its file cannot be written.
    pub fn set_ahead(&self, seconds: i64) {
        // Replaced as a whole, because programs read it at any moment.
        let mut file = NamedTempFile::new().expect("a file can be made");
        write!(file, "{seconds:+}").expect("the file can be written");
        file.persist(&self.file).expect("the file can be replaced");
    }

    /// The environment that makes a program show this clock.
    ///
    /// # Panics
    /// When libfaketime is missing and cannot be installed.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        let library = tools::faketime().expect("libfaketime is there");
        [
            ("LD_PRELOAD", library.display().to_string()),
            (
                "FAKETIME_TIMESTAMP_FILE",
                self.file.path().display().to_string(),
            ),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }
}

impl Drop for Clock {
    /// Removes what libfaketime leaves of programs that were killed: each has a semaphore and
    /// shared memory of its own, named after its process.
    fn drop(&mut self) {
        for entry in fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let process = ["faketime_shm_", "sem.faketime_sem_"]
                .iter()
                .find_map(|prefix| name.strip_prefix(prefix));
            if process.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
                // Another test may have removed it.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}
