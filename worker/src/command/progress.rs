//! Progress of long work: a bar on a terminal, a line every few seconds elsewhere.
//!
//! Owns the progress output. It goes to stderr, because stdout is for the result.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use litestripe_contract::exit;

/// How often a line is printed if stderr is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress of one piece of work.
pub(crate) struct Progress {
    what: &'static str,
    unit: &'static str,
    bar: ProgressBar,
    is_terminal: bool,
    last_line: Instant,
    /// The sequence after which the work began, if it goes through a stream.
    after: u64,
}

impl Progress {
    /// Starts the progress of `what` (`replay`), counted in `unit` (`events`), up to `total` if
    /// known.
    pub(crate) fn start(what: &'static str, unit: &'static str, total: Option<u64>) -> Self {
        let is_terminal = std::io::stderr().is_terminal();
        let target = if is_terminal {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(total, target);
        let template = match total {
            Some(_) => "{prefix} {bar:30} {human_pos} of {human_len} {msg}, {per_sec}, {eta} left",
            None => "{prefix} {spinner} {human_pos} {msg}, {per_sec}",
        };
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        bar.set_prefix(what);
        bar.set_message(unit);
        Self {
            what,
            unit,
            bar,
            is_terminal,
            last_line: Instant::now(),
            after: 0,
        }
    }

    /// Starts the progress of `what` through a stream, from after the sequence `after` to `last`.
    /// Counts sequences, because the number of selected events is not known.
    pub(crate) fn through(what: &'static str, after: u64, last: u64) -> Self {
        Self {
            after,
            ..Self::start(what, "events", Some(last.saturating_sub(after)))
        }
    }

    /// Records that everything up to `sequence` is done.
    pub(crate) fn reached(&mut self, sequence: u64) {
        self.advance(sequence.saturating_sub(self.after + self.bar.position()));
    }

    /// Records that `count` more are done.
    pub(crate) fn advance(&mut self, count: u64) {
        self.bar.inc(count);
        if !self.is_terminal && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            self.print_line();
        }
    }

    /// Removes the bar. The summary follows.
    pub(crate) fn finish(self) {
        self.bar.finish_and_clear();
    }

    fn print_line(&self) {
        let (done, rate) = (self.bar.position(), self.bar.per_sec());
        let (what, unit) = (self.what, self.unit);
        match self.bar.length() {
            Some(total) => exit::print_error_line(format_args!(
                "{what}: {} of {} {unit}, {rate:.0}/s, {} left",
                HumanCount(done),
                HumanCount(total),
                HumanDuration(self.bar.eta())
            )),
            None => exit::print_error_line(format_args!(
                "{what}: {} {unit}, {rate:.0}/s",
                HumanCount(done)
            )),
        }
    }
}
