//! What the worker's transactions set for themselves.

use super::{DEADLINE, deliver_story, servers, start};
use litestripe_harness::eventually;

#[tokio::test]
async fn commits_reach_the_disk_whatever_the_servers_default() {
    for (default, used) in [("off", "on"), ("local", "local"), ("on", "on")] {
        let mut bridge = servers().await;
        for sql in [
            format!("ALTER SYSTEM SET synchronous_commit = {default}"),
            "SELECT pg_reload_conf()".to_owned(),
        ] {
            bridge.database.query(&sql).await.expect("it is running");
        }
        eventually("the setting to take effect", DEADLINE, async || {
            let shown = bridge.database.query("SHOW synchronous_commit").await;
            let shown: Option<String> = shown
                .ok()
                .and_then(|rows| rows.first()?.try_get_by_index(0).ok());
            match shown.as_deref() {
                Some(shown) if shown == default => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
        let url = bridge.database.url();
        start(&mut bridge, url).await;
        for sql in [
            "CREATE TABLE seen (synchronous_commit text PRIMARY KEY)",
            "CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             INSERT INTO seen VALUES (current_setting('synchronous_commit')) ON CONFLICT DO NOTHING; \
             RETURN NULL; END $$",
            "CREATE TRIGGER see AFTER INSERT OR UPDATE ON stripe_subscription \
             FOR EACH ROW EXECUTE FUNCTION see()",
        ] {
            bridge.database.query(sql).await.expect("it is allowed");
        }
        deliver_story(&bridge).await;
        bridge.wait_until_applied().await;

        let seen = bridge.database.query("SELECT * FROM seen").await;
        let seen: Vec<String> = seen
            .expect("it is running")
            .iter()
            .filter_map(|row| row.try_get_by_index(0).ok())
            .collect();
        assert_eq!(seen, [used], "with {default}");
    }
}
