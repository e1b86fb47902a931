//! Printing results to stdout. Logs and progress go to stderr.

use std::io::Write as _;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::Failure;

/// The format of a command's result.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct Output {
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl Output {
    /// Prints `value` as JSON with `--json`, else calls `text`, which prints for people.
    pub(crate) fn print(self, value: &impl Serialize, text: impl FnOnce()) -> Result<(), Failure> {
        if self.json {
            line(&serde_json::to_string_pretty(value)?)
        } else {
            text()
        }
        Ok(())
    }

    /// Prints `value` as JSON with `--json`, else the object's fields, one per line.
    pub(crate) fn fields(self, value: &Value) -> Result<(), Failure> {
        let row = |(name, value): (&String, &Value)| [name.clone(), cell(value)];
        self.print(value, || {
            table(
                ["field", "value"],
                value.as_object().into_iter().flatten().map(row),
            )
        })
    }
}

/// Prints a line. Ignores a closed pipe, as in `| head`.
pub(crate) fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Formats a JSON value as a cell of a table.
pub(crate) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Prints a table without borders, which people can read and `awk` can split.
pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) {
    let mut table = comfy_table::Table::new();
    table
        .load_style(comfy_table::presets::NOTHING)
        .set_header(header)
        .add_rows(rows);
    line(&table.to_string());
}
