//! The demo's output: lines of up to 100 characters, coloured only on a terminal.

use std::fmt::Display;
use std::io::Write as _;

/// The most characters of a line.
pub(crate) const WIDTH: usize = 100;

/// The demo's standard output.
pub(crate) struct Screen {
    pub(crate) coloured: bool,
}

/// The meaning of a colour.
#[derive(Clone, Copy)]
pub(crate) enum Tone {
    /// As it should be.
    Good,
    /// Not bad yet, such as the access `grace`.
    Warn,
    /// A failure, or the access `revoked`.
    Bad,
    /// The subject of a line.
    Name,
    /// A detail.
    Faint,
    Heading,
}

impl Screen {
    /// Prints a line.
    ///
    /// # Errors
    /// When stdout is closed, as after `| head`.
    pub(crate) fn line(&self, text: impl Display) -> Result<(), String> {
        writeln!(std::io::stdout(), "{text}").map_err(|problem| format!("cannot print: {problem}"))
    }

    /// Returns `text` in the colour of `tone`. Pad `text` before: the colour codes count as
    /// characters.
    pub(crate) fn tint(&self, tone: Tone, text: impl Display) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Warn => "33",
            Tone::Bad => "31",
            Tone::Name => "36",
            Tone::Faint => "2",
            Tone::Heading => "1",
        };
        if self.coloured {
            format!("\u{1b}[{code}m{text}\u{1b}[0m")
        } else {
            text.to_string()
        }
    }
}

/// Shortens `text` to at most `width` characters, with an ellipsis at the end.
pub(crate) fn fit(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// Shortens one of Stripe's ids to what distinguishes it from the demo's others: `sub_1Ab2Cd3…`.
pub(crate) fn short(id: &str) -> String {
    fit(id, 12)
}
