//! Many rows in one statement.
//!
//! Owns how they are bound. PostgreSQL gets one array per column, so that the text of a statement does
//! not depend on how many rows there are: it is parsed and planned once per connection, and not for
//! every batch anew with its thousands of parameters. SQLite has no arrays and gets every value by
//! itself, in statements of few different lengths, which are prepared once too.

use sea_orm::sea_query::{ArrayType, ColumnType, Expr, InsertStatement, OnConflict, Query};
use sea_orm::{
    ActiveModelTrait, ActiveValue, ColumnDef, ColumnTrait as _, ConnectionTrait as _, DatabaseTransaction, DbBackend,
    DbErr, EntityName as _, EntityTrait, IdenStatic as _, Iterable as _, QueryResult, Statement, Value,
};
use time::OffsetDateTime;
use time::macros::datetime;

/// How many rows SQLite gets at a time: as many of the first as there are, then of the next.
const SQLITE_ROWS: [usize; 3] = [64, 8, 1];

/// Stands for no time in an array: sea-orm binds none that holds nulls. Stripe cannot mean it, since
/// RFC 3339 cannot write it.
const NO_TIME: OffsetDateTime = datetime!(-4000-01-01 0:00 UTC);
const GIVEN_TIME: &str = "NULLIF($1, TIMESTAMPTZ '4001-01-01 00:00:00+00 BC')";

type Column<A> = <<A as ActiveModelTrait>::Entity as EntityTrait>::Column;

/// Inserts `models`, all of which set the same columns. Returns `returning` of those that were written.
/// `on_conflict` holds no values.
///
/// # Errors
/// When the database is away or refuses the data.
pub(super) async fn insert<A: ActiveModelTrait>(
    tx: &DatabaseTransaction,
    models: Vec<A>,
    on_conflict: Option<&OnConflict>,
    returning: Option<Column<A>>,
) -> Result<Vec<QueryResult>, DbErr> {
    let backend = tx.get_database_backend();
    let mut written = Vec::new();
    let mut models = models.into_iter().peekable();
    while let Some(first) = models.peek() {
        let columns: Vec<_> = Column::<A>::iter().filter(|column| !first.get(*column).is_not_set()).collect();
        let count = match backend {
            DbBackend::Postgres => models.len(),
            _ => SQLITE_ROWS.into_iter().find(|rows| *rows <= models.len()).unwrap_or(1),
        };
        let rows = models.by_ref().take(count);
        let (mut insert, values) = match backend {
            DbBackend::Postgres => arrays(&columns, rows.collect())?,
            _ => singly(&columns, rows)?,
        };
        insert.into_table(A::Entity::default().table_ref());
        if let Some(on_conflict) = on_conflict {
            insert.on_conflict(on_conflict.clone());
        }
        if let Some(column) = returning {
            insert.returning_col(column);
        }
        // sea-query would copy every value once more, and each into an expression of its own.
        let mut sql = backend.build(&insert).sql;
        if backend != DbBackend::Postgres {
            sql = repeated(&sql, columns.len(), count);
        }
        let statement = Statement::from_sql_and_values(backend, sql, values);
        match returning {
            Some(_) => written.extend(tx.query_all_raw(statement).await?),
            None => {
                tx.execute_raw(statement).await?;
            }
        }
    }
    Ok(written)
}

/// What a statement of one row says, of `rows` of them.
fn repeated(sql: &str, columns: usize, rows: usize) -> String {
    let row = format!("({})", vec!["?"; columns].join(", "));
    sql.replacen(&row, &vec![row.as_str(); rows].join(", "), 1)
}

/// A row's values in the order of `columns`.
fn cells<A: ActiveModelTrait>(columns: &[Column<A>], mut model: A) -> Result<Vec<Value>, DbErr> {
    let cell = |column: &Column<A>| match model.take(*column) {
        ActiveValue::Set(value) | ActiveValue::Unchanged(value) => Ok(value),
        ActiveValue::NotSet => Err(DbErr::Type(format!("{} is set in some rows only", column.as_str()))),
    };
    columns.iter().map(cell).collect()
}

/// `INSERT … VALUES (?, …)`, and the values of all rows.
fn singly<A: ActiveModelTrait>(
    columns: &[Column<A>],
    rows: impl Iterator<Item = A>,
) -> Result<(InsertStatement, Vec<Value>), DbErr> {
    let mut values = Vec::new();
    for row in rows {
        values.extend(cells(columns, row)?);
    }
    let mut insert = Query::insert();
    let one_row = columns.iter().map(|_| Expr::val(Value::Bool(None)));
    let taken = insert.columns(columns.iter().copied()).values(one_row);
    taken.map_err(|error| DbErr::Type(error.to_string()))?;
    Ok((insert, values))
}

/// `INSERT … SELECT … FROM (SELECT UNNEST($1), …)`, and an array of each column's values.
fn arrays<A: ActiveModelTrait>(columns: &[Column<A>], rows: Vec<A>) -> Result<(InsertStatement, Vec<Value>), DbErr> {
    let mut of_columns: Vec<Vec<Value>> = columns.iter().map(|_| Vec::with_capacity(rows.len())).collect();
    for row in rows {
        of_columns.iter_mut().zip(cells(columns, row)?).for_each(|(column, cell)| column.push(cell));
    }
    let (mut arrays, mut row) = (Query::select(), Query::select());
    let mut values = Vec::with_capacity(columns.len());
    for (column, cells) in columns.iter().zip(of_columns) {
        let (array, unnested, given) = bound(&column.def(), cells)
            .ok_or_else(|| DbErr::Type(format!("{} is of a kind that is not inserted in arrays", column.as_str())))?;
        values.push(array);
        arrays.expr_as(Expr::cust_with_values(unnested, [Value::Bool(None)]), *column);
        row.expr(Expr::cust_with_exprs(given, [Expr::col(("given", *column))]));
    }
    let mut insert = Query::insert();
    let taken = insert.columns(columns.iter().copied()).select_from(row.from_subquery(arrays.take(), "given").take());
    taken.map_err(|error| DbErr::Type(error.to_string()))?;
    Ok((insert, values))
}

/// The array of a column's cells, how it is unnested, and what a row makes of its cell.
fn bound(column: &ColumnDef, cells: Vec<Value>) -> Option<(Value, &'static str, &'static str)> {
    const AS_GIVEN: &str = "$1";
    const UNNESTED: &str = "UNNEST($1)";
    let array = |of: ArrayType, cells| Value::Array(of, Some(Box::new(cells)));
    Some(match (column.get_column_type(), column.is_null()) {
        (ColumnType::Text, true) => (text_array(cells), "UNNEST($1::text[])", AS_GIVEN),
        (ColumnType::TimestampWithTimeZone, true) => {
            let dated = |cell| match cell {
                Value::TimeDateTimeWithTimeZone(None) => NO_TIME.into(),
                time => time,
            };
            let cells = cells.into_iter().map(dated).collect();
            (array(ArrayType::TimeDateTimeWithTimeZone, cells), UNNESTED, GIVEN_TIME)
        }
        (ColumnType::JsonBinary, false) => {
            let written = |cell| match cell {
                Value::Json(Some(json)) => json.to_string().into(),
                other => other,
            };
            (array(ArrayType::String, cells.into_iter().map(written).collect()), UNNESTED, "$1::jsonb")
        }
        (_, false) => (array(cells.first()?.array_type(), cells), UNNESTED, AS_GIVEN),
        (_, true) => return None,
    })
}

/// An array of texts in PostgreSQL's own writing, which has nulls. PostgreSQL: "Array Input and Output Syntax".
fn text_array(cells: Vec<Value>) -> Value {
    let mut written = String::from("{");
    for (index, cell) in cells.into_iter().enumerate() {
        if index > 0 {
            written.push(',');
        }
        let Value::String(Some(text)) = cell else {
            written.push_str("NULL");
            continue;
        };
        written.push('"');
        for part in text.split_inclusive(['"', '\\']) {
            match part.strip_suffix(['"', '\\']) {
                Some(before) => {
                    written.push_str(before);
                    written.push('\\');
                    written.push_str(&part[before.len()..]);
                }
                None => written.push_str(part),
            }
        }
        written.push('"');
    }
    written.push('}');
    written.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_of_texts_is_written_as_postgresql_reads_it() {
        let cells = ["plain", "", "NULL", r#"a "quoted" \ one,{two}"#].map(|text| Some(text.to_owned()).into());
        let written = text_array(cells.into_iter().chain([Value::String(None)]).collect());
        let expected = r#"{"plain","","NULL","a \"quoted\" \\ one,{two}",NULL}"#;
        assert_eq!(written, expected.to_owned().into());
    }
}
