//! `.env` in the working directory.
//!
//! Owns its grammar: what python-dotenv and docker compose read alike, except that nothing is
//! expanded. [`parse`] is pure.
//!
//! The file often serves other tools too, so a line about another tool's variable never stops a
//! program. A problem names its line and never shows it, because it may hold a secret.

use std::io::Cursor;

use super::{Problems, Setting};

/// Reads `.env` into the environment, if there is one. A variable that is already set wins.
///
/// # Errors
/// The lines that cannot be read, if they may be about one of `settings`.
pub fn load(settings: &[&[Setting]]) -> Result<(), Problems> {
    let text = match std::fs::read(".env") {
        Ok(bytes) => String::from_utf8(bytes)
            .map_err(|_| Problems(vec![".env is not UTF-8 text".to_owned()]))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Problems(vec![format!(".env cannot be read: {error}")])),
    };
    let is_ours = |name: &str| {
        let mut all = settings.iter().copied().flatten();
        all.any(|setting| setting.name == name)
    };
    let variables = parse(&text, is_ours)?;
    let lines: String = variables.iter().map(canonical).collect();
    // Changing the environment is unsafe code, which `dotenvy` has and we have not.
    dotenvy::from_read(Cursor::new(lines))
        .map_err(|_| Problems(vec![".env cannot be read into the environment".to_owned()]))
}

/// Returns the variables that `text` sets, each with its last value.
///
/// # Errors
/// The lines that cannot be read: those about a name that `is_ours`, and those that name nothing.
pub fn parse(
    text: &str,
    is_ours: impl Fn(&str) -> bool,
) -> Result<Vec<(String, String)>, Problems> {
    let mut rest = text.trim_start_matches('\u{feff}');
    let mut line = 1;
    let mut variables: Vec<(String, String)> = Vec::new();
    let mut problems = Vec::new();
    while !rest.is_empty() {
        let (statement, after) = Statement::read(rest);
        let read_lines = rest[..rest.len() - after.len()].matches('\n').count();
        match statement {
            Statement::Nothing => {}
            Statement::Set(name, value) => {
                variables.retain(|(other, _)| *other != name);
                variables.push((name.to_owned(), value));
            }
            Statement::Nameless => problems.push(format!(".env line {line} is not NAME=value")),
            Statement::Unreadable(name, why) if is_ours(name) => {
                problems.push(format!(".env line {line}: {name} {why}"));
            }
            Statement::Unreadable(..) => {}
        }
        line += read_lines;
        rest = after;
    }
    if problems.is_empty() {
        Ok(variables)
    } else {
        Err(Problems(problems))
    }
}

enum Statement<'a> {
    /// A comment, an empty line, or a name without a value.
    Nothing,
    Set(&'a str, String),
    /// A line that no tool reads.
    Nameless,
    /// A line that is not read, with its name and what is wrong with it.
    Unreadable(&'a str, &'static str),
}

const BLANKS: [char; 3] = [' ', '\t', '\r'];

impl<'a> Statement<'a> {
    /// Reads the first statement of `text`. Returns it with the text after it.
    fn read(text: &'a str) -> (Self, &'a str) {
        let next_line = text.split_once('\n').map_or("", |(_, next)| next);
        let start = text.trim_start_matches(BLANKS);
        let start = match start.strip_prefix("export") {
            Some(rest) if rest.starts_with(BLANKS) => rest.trim_start_matches(BLANKS),
            _ => start,
        };
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
        let name_end = start.find(|c| !is_part(c)).unwrap_or(start.len());
        let (name, rest) = start.split_at(name_end);
        let rest = rest.trim_start_matches(BLANKS);
        let is_name = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if let Some(value) = rest.strip_prefix('=').filter(|_| is_name) {
            return Self::read_value(name, value, next_line);
        }
        let statement = match rest.chars().next() {
            None | Some('\n' | '#') if is_name || name.is_empty() => Self::Nothing,
            // docker compose reads this form too.
            Some(':') if is_name => Self::Unreadable(name, "is not written as NAME=value"),
            _ => Self::Nameless,
        };
        (statement, next_line)
    }

    fn read_value(name: &'a str, value: &'a str, next_line: &'a str) -> (Self, &'a str) {
        let start = value.trim_start_matches(BLANKS);
        let (value, after) = match start.chars().next() {
            Some(quote @ ('"' | '\'')) => match read_quoted(&start[1..], quote) {
                Some((value, after)) => (value, after),
                None => {
                    let why = "has an opening quote without its closing one";
                    return (Self::Unreadable(name, why), next_line);
                }
            },
            _ => read_unquoted(value),
        };
        let (tail, after) = after.split_once('\n').unwrap_or((after, ""));
        let tail = tail.trim_start_matches(BLANKS);
        if !tail.is_empty() && !tail.starts_with('#') {
            let why = "has text behind its closing quote";
            return (Self::Unreadable(name, why), next_line);
        }
        let statement = match value {
            Err(Reference) => Self::Unreadable(
                name,
                "holds ${…}, which is not expanded: write the value itself, or put it in single quotes to keep it as it is",
            ),
            Ok(value) if value.contains('\0') => Self::Unreadable(name, "holds a NUL character"),
            Ok(value) => Self::Set(name, value),
        };
        (statement, after)
    }
}

/// A value refers to another variable as `${NAME}`. Other tools expand that, so that keeping it
/// would set another value than they do.
struct Reference;

/// Reads a value up to its closing quote. Returns it with the text after the quote.
fn read_quoted(text: &str, quote: char) -> Option<(Result<String, Reference>, &str)> {
    let (mut value, mut refers) = (String::new(), false);
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            _ if c == quote => {
                let value = if refers { Err(Reference) } else { Ok(value) };
                return Some((value, &text[at + 1..]));
            }
            '\\' => {
                let (_, escaped) = chars.next()?;
                match (quote, escaped) {
                    ('"', 'n') => value.push('\n'),
                    ('"', 'r') => value.push('\r'),
                    ('"', 't') => value.push('\t'),
                    ('"', '"' | '\\' | '$' | '\'') | (_, '\'') => value.push(escaped),
                    _ => value.extend(['\\', escaped]),
                }
            }
            _ => {
                refers |= quote == '"' && text[at..].starts_with("${");
                value.push(c);
            }
        }
    }
    None
}

/// Reads a value without quotes: up to the end of its line or a comment, without blanks around it.
fn read_unquoted(text: &str) -> (Result<String, Reference>, &str) {
    let line = text.split('\n').next().unwrap_or_default();
    let is_comment = |at: &usize| line[..*at].ends_with(BLANKS);
    let hashes = line.match_indices('#').map(|(at, _)| at);
    let end = hashes.into_iter().find(is_comment).unwrap_or(line.len());
    let value = line[..end].trim();
    let value = if value.contains("${") {
        Err(Reference)
    } else {
        Ok(value.to_owned())
    };
    (value, &text[line.len()..])
}

/// Writes a variable so that `dotenvy` reads exactly its value.
fn canonical((name, value): &(String, String)) -> String {
    // No shell can read such a variable, and `dotenvy` refuses it.
    if name.contains('-') {
        return String::new();
    }
    let mut line = format!("{name}=\"");
    for c in value.chars() {
        match c {
            '\n' => line.push_str("\\n"),
            '\\' | '"' | '$' => line.extend(['\\', c]),
            _ => line.push(c),
        }
    }
    line + "\"\n"
}

#[cfg(test)]
mod tests;
