//! A transaction that does not come to its end harms no later one.

use std::time::Duration;

use litestripe_harness::bridge::DatabaseKind;
use sea_orm::ConnectionTrait as _;

use crate::rows::open;

#[tokio::test]
async fn writes_after_cancelled_transactions_are_committed() {
    let (database, store) = open(DatabaseKind::Postgres).await;
    database
        .query("CREATE TABLE written (n integer)")
        .await
        .expect("it is running");
    for n in 0..200 {
        // Cancelled at another moment each time: while connecting, beginning, or writing.
        let cancelled = async {
            let transaction = store.begin().await.expect("the database answers");
            let write = "INSERT INTO written VALUES (-1)";
            let _ = transaction.execute_unprepared(write).await;
            std::future::pending::<()>().await;
        };
        let _ = tokio::time::timeout(Duration::from_micros(n * 20), cancelled).await;
        store
            .connection()
            .execute_unprepared(&format!("INSERT INTO written VALUES ({n})"))
            .await
            .expect("the database answers");
    }
    let rows = database.query("SELECT n FROM written ORDER BY n").await;
    let written: Vec<i32> = rows
        .expect("it is running")
        .iter()
        .filter_map(|row| row.try_get_by_index(0).ok())
        .collect();
    assert_eq!(written, (0..200).collect::<Vec<_>>());
}

#[tokio::test]
async fn transaction_of_which_a_statement_failed_does_not_report_a_commit() {
    let (_database, store) = open(DatabaseKind::Postgres).await;
    let transaction = store.begin().await.expect("the database answers");
    let failed = transaction.execute_unprepared("SELECT 1 / 0").await;
    failed.expect_err("nothing is divided by zero");
    // PostgreSQL rolls back and answers without an error.
    transaction
        .commit()
        .await
        .expect_err("nothing was committed");
}
