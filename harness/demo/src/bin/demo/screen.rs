//! What people see: lines of up to 100 columns, coloured on a terminal only.

use std::fmt::Display;
use std::io::Write as _;

/// The columns that every line fits into.
pub(crate) const WIDTH: usize = 100;

/// Where the demo prints.
pub(crate) struct Screen {
    /// Whether it is a terminal that shows colours.
    pub(crate) coloured: bool,
}

/// What a colour says.
#[derive(Clone, Copy)]
pub(crate) enum Tone {
    /// As it should be.
    Good,
    /// On its way to the worse.
    Warn,
    /// Not as it should be, or over.
    Bad,
    /// What a line is about.
    Name,
    /// Of lesser weight.
    Faint,
    /// A heading.
    Heading,
}

impl Screen {
    /// Prints a line.
    ///
    /// # Errors
    /// When nobody reads any more, as after `| head`.
    pub(crate) fn line(&self, text: impl Display) -> Result<(), String> {
        writeln!(std::io::stdout(), "{text}").map_err(|problem| format!("cannot print: {problem}"))
    }

    /// `text` in the colour of `tone`. Pad before: colours have no width but a length.
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

/// `text` in at most `width` characters, an ellipsis standing for what is left out.
pub(crate) fn fit(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let kept: String = text.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
}

/// Enough of one of Stripe's ids to tell it from the others of the story: `sub_1Ab2Cd3…`.
pub(crate) fn short(id: &str) -> String {
    fit(id, 12)
}
