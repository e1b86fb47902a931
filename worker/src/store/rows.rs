//! Many rows in one statement.
//!
//! Owns how they are bound. PostgreSQL gets one array per column, so that the text of a statement does
//! not depend on how many rows there are: it is parsed and planned once per connection, and not for
//! every batch anew with its thousands of parameters. SQLite has no arrays and gets every value by
//! itself, in statements of few different lengths, which are prepared once too.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use sea_orm::sea_query::{ArrayType, ColumnType, Expr, OnConflict, Query};
use sea_orm::{
    ActiveModelTrait, ActiveValue, ColumnDef, ColumnTrait, ConnectionTrait as _, DatabaseTransaction, DbBackend, DbErr,
    EntityName as _, EntityTrait, IdenStatic, Iterable as _, QueryResult, Statement, Value,
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

/// The texts of the inserts so far. sea-query takes longer to write one than to bind the rows of a small batch.
static TEXTS: LazyLock<Mutex<HashMap<Key, Arc<str>>>> = LazyLock::new(Mutex::default);

/// What the text of an insert depends on.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    entity: TypeId,
    columns: Vec<&'static str>,
    /// How many are written out: none on PostgreSQL.
    rows: usize,
    /// The function's address.
    on_conflict: Option<usize>,
    returning: Option<&'static str>,
}

/// Inserts `models`, all of which set the same columns. Returns `returning` of those that were written.
/// `on_conflict` holds no values, and is the same whenever it is asked.
///
/// # Errors
/// When the database is away or refuses the data.
pub(super) async fn insert<A: ActiveModelTrait>(
    tx: &DatabaseTransaction,
    models: Vec<A>,
    on_conflict: Option<fn() -> OnConflict>,
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
        let (values, sources) = match backend {
            DbBackend::Postgres => arrays(&columns, rows.collect())?,
            _ => (singly(&columns, rows)?, Vec::new()),
        };
        let key = Key {
            entity: TypeId::of::<A::Entity>(),
            columns: columns.iter().map(IdenStatic::as_str).collect(),
            rows: if backend == DbBackend::Postgres { 0 } else { count },
            on_conflict: on_conflict.map(|on_conflict| on_conflict as usize),
            returning: returning.as_ref().map(IdenStatic::as_str),
        };
        let known = texts().get(&key).cloned();
        let text = match known {
            Some(text) => text,
            None => {
                let text: Arc<str> = text(backend, &columns, &sources, count, on_conflict, returning)?.into();
                texts().insert(key, Arc::clone(&text));
                text
            }
        };
        let statement = Statement::from_sql_and_values(backend, &*text, values);
        match returning {
            Some(_) => written.extend(tx.query_all_raw(statement).await?),
            None => {
                tx.execute_raw(statement).await?;
            }
        }
    }
    Ok(written)
}

fn texts() -> MutexGuard<'static, HashMap<Key, Arc<str>>> {
    TEXTS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn text<C: ColumnTrait>(
    backend: DbBackend,
    columns: &[C],
    sources: &[Source],
    rows: usize,
    on_conflict: Option<fn() -> OnConflict>,
    returning: Option<C>,
) -> Result<String, DbErr> {
    let mut insert = Query::insert();
    insert.into_table(C::EntityName::default().table_ref()).columns(columns.iter().copied());
    let filled = match backend {
        // `INSERT … SELECT … FROM (SELECT UNNEST($1), …)`
        DbBackend::Postgres => {
            let (mut arrays, mut row) = (Query::select(), Query::select());
            for (column, source) in columns.iter().zip(sources) {
                arrays.expr_as(Expr::cust_with_values(source.unnested, [Value::Bool(None)]), *column);
                row.expr(Expr::cust_with_exprs(source.given, [Expr::col(("given", *column))]));
            }
            insert.select_from(row.from_subquery(arrays.take(), "given").take())
        }
        // `INSERT … VALUES (?, …)`
        _ => insert.values(columns.iter().map(|_| Expr::val(Value::Bool(None)))),
    };
    filled.map_err(|error| DbErr::Type(error.to_string()))?;
    if let Some(on_conflict) = on_conflict {
        insert.on_conflict(on_conflict());
    }
    if let Some(column) = returning {
        insert.returning_col(column);
    }
    let sql = backend.build(&insert).sql;
    Ok(if backend == DbBackend::Postgres { sql } else { repeated(&sql, columns.len(), rows) })
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

/// The values of all rows.
fn singly<A: ActiveModelTrait>(columns: &[Column<A>], rows: impl Iterator<Item = A>) -> Result<Vec<Value>, DbErr> {
    let mut values = Vec::new();
    for row in rows {
        values.extend(cells(columns, row)?);
    }
    Ok(values)
}

/// How an array is unnested, and what a row makes of its cell.
struct Source {
    unnested: &'static str,
    given: &'static str,
}

/// An array of each column's values, and what is made of them.
fn arrays<A: ActiveModelTrait>(columns: &[Column<A>], rows: Vec<A>) -> Result<(Vec<Value>, Vec<Source>), DbErr> {
    let mut of_columns: Vec<Vec<Value>> = columns.iter().map(|_| Vec::with_capacity(rows.len())).collect();
    for row in rows {
        of_columns.iter_mut().zip(cells(columns, row)?).for_each(|(column, cell)| column.push(cell));
    }
    let bound = |(column, cells): (&Column<A>, _)| {
        bound(&column.def(), cells)
            .ok_or_else(|| DbErr::Type(format!("{} is of a kind that is not inserted in arrays", column.as_str())))
    };
    columns.iter().zip(of_columns).map(bound).collect::<Result<Vec<_>, _>>().map(|bound| bound.into_iter().unzip())
}

/// The array of a column's cells, and what is made of it.
fn bound(column: &ColumnDef, cells: Vec<Value>) -> Option<(Value, Source)> {
    const AS_GIVEN: &str = "$1";
    const UNNESTED: &str = "UNNEST($1)";
    let array = |of: ArrayType, cells| Value::Array(of, Some(Box::new(cells)));
    let (array, unnested, given) = match (column.get_column_type(), column.is_null()) {
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
    };
    Some((array, Source { unnested, given }))
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
