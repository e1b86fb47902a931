//! What commands print: stdout belongs to the result, logs go to stderr.

use std::io::Write as _;

use serde::Serialize;
use serde_json::Value;

/// Prints a line. A reader that has seen enough (`| head`) is no failure.
pub(crate) fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Prints `value` as JSON.
///
/// # Errors
/// When it has a map with keys that are not text.
pub(crate) fn json(value: &impl Serialize) -> Result<(), serde_json::Error> {
    line(&serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints the fields of a JSON object, a line each.
pub(crate) fn fields(object: &Value) {
    let rows = object.as_object().into_iter().flatten().map(|(name, value)| [name.clone(), cell(value)]);
    table(["field", "value"], rows);
}

/// A JSON value as a cell of a table.
pub(crate) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Prints a table that people read and `awk` can take apart.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    line(&table.to_string());
}
