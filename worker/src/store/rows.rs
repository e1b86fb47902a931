//! Many rows in one statement.
//!
//! Owns how rows are bound. PostgreSQL gets one array per column, so that the text of a statement
//! does not depend on the number of rows: it is parsed and planned once per connection, not for
//! every batch with its thousands of parameters. SQLite has no arrays and gets every value as its
//! own parameter, in statements of three lengths, which are also prepared once. May not know the
//! tables.

use crate::store::Transaction;
use litestripe_contract::signal::Timestamp;
use sea_orm::{ConnectionTrait as _, DbBackend, DbErr, QueryResult, Statement, Value};
use time::OffsetDateTime;

/// How many rows SQLite gets in one statement: as often as possible the first number, then the
/// next.
const SQLITE_ROWS: [usize; 3] = [64, 8, 1];

/// The parts of an insert that differ between tables.
pub(super) struct Insert<'a> {
    /// The table and its columns.
    pub into: &'static str,
    /// PostgreSQL's select list, by column: `UNNEST($1::text[]), …`. A [`Cell::Time`] is bound in
    /// seconds since the Unix epoch: `to_timestamp(UNNEST($2::bigint[]))`.
    pub select: &'static str,
    /// The SQL after the rows, such as `ON CONFLICT …`.
    pub then: &'a str,
}

/// One value of a row. All cells of a column are of the same variant.
pub(super) enum Cell {
    /// A value of a column without nulls.
    NotNull(Value),
    /// A text or a null.
    Text(Option<String>),
    /// A time in whole seconds or a null.
    Time(Option<Timestamp>),
    /// A number or a null.
    Number(Option<i64>),
}

macro_rules! not_null {
    ($($of:ty),+) => {
        $(impl From<$of> for Cell {
            fn from(value: $of) -> Self {
                Self::NotNull(value.into())
            }
        })+
    };
}

not_null!(bool, i32, i64, String, OffsetDateTime);

impl From<Option<String>> for Cell {
    fn from(text: Option<String>) -> Self {
        Self::Text(text)
    }
}

impl From<Option<Timestamp>> for Cell {
    fn from(time: Option<Timestamp>) -> Self {
        Self::Time(time)
    }
}

impl From<Option<i64>> for Cell {
    fn from(number: Option<i64>) -> Self {
        Self::Number(number)
    }
}

impl From<Cell> for Value {
    fn from(cell: Cell) -> Self {
        match cell {
            Cell::NotNull(value) => value,
            Cell::Text(text) => text.into(),
            Cell::Time(time) => time.map(Timestamp::get).into(),
            Cell::Number(number) => number.into(),
        }
    }
}

/// Inserts `rows`, with their cells in the order of the columns. Returns the rows of a `RETURNING`.
pub(super) async fn insert<const N: usize>(
    tx: &Transaction,
    Insert { into, select, then }: Insert<'_>,
    rows: Vec<[Cell; N]>,
) -> Result<Vec<QueryResult>, DbErr> {
    let backend = tx.get_database_backend();
    let mut returned = Vec::new();
    let mut rows = rows.into_iter();
    while rows.len() > 0 {
        let (text, values) = if backend == DbBackend::Postgres {
            (
                format!("INSERT INTO {into} SELECT {select} {then}"),
                arrays(rows.by_ref()),
            )
        } else {
            let count = SQLITE_ROWS
                .into_iter()
                .find(|count| *count <= rows.len())
                .unwrap_or(1);
            let row = format!("({})", ["?"; N].join(", "));
            let text = format!(
                "INSERT INTO {into} VALUES {} {then}",
                vec![row; count].join(", ")
            );
            (
                text,
                rows.by_ref()
                    .take(count)
                    .flatten()
                    .map(Value::from)
                    .collect(),
            )
        };
        returned.extend(
            tx.query_all_raw(Statement::from_sql_and_values(backend, text, values))
                .await?,
        );
    }
    Ok(returned)
}

/// Returns an array for each column.
fn arrays<const N: usize>(rows: impl Iterator<Item = [Cell; N]>) -> Vec<Value> {
    let mut columns = [const { Vec::new() }; N];
    for row in rows {
        columns
            .iter_mut()
            .zip(row)
            .for_each(|(column, cell)| column.push(cell));
    }
    columns.into_iter().map(array).collect()
}

fn array(column: Vec<Cell>) -> Value {
    match column.first() {
        Some(Cell::NotNull(first)) => Value::Array(
            first.array_type(),
            Some(Box::new(column.into_iter().map(Value::from).collect())),
        ),
        _ => literal(&column).into(),
    }
}

/// Writes an array in PostgreSQL's own notation ("Array Input and Output Syntax"), because sea-orm
/// cannot bind an array with nulls.
fn literal(column: &[Cell]) -> String {
    let mut literal = String::from("{");
    for cell in column {
        if literal.len() > 1 {
            literal.push(',');
        }
        match cell {
            Cell::Text(Some(text)) => push_quoted(&mut literal, text),
            Cell::Time(Some(time)) => literal.push_str(&time.unix().to_string()),
            Cell::Number(Some(number)) => literal.push_str(&number.to_string()),
            _ => literal.push_str("NULL"),
        }
    }
    literal.push('}');
    literal
}

fn push_quoted(literal: &mut String, text: &str) {
    literal.push('"');
    for character in text.chars() {
        if matches!(character, '"' | '\\') {
            literal.push('\\');
        }
        literal.push(character);
    }
    literal.push('"');
}
