//! What a seed's faults happen to: a bridge with all that a seed may have (a standby, a pooler,
//! passwords, a clock of the workers), and what an operator or a machine does to it.
//!
//! Owns how each of these is done and undone. Which happen, and when, is decided elsewhere.

use async_nats::HeaderMap;
use async_nats::jetstream::stream::{Config, DiscardPolicy};
use bytes::Bytes;
use litestripe_contract::header;
use litestripe_contract::subject::{DEAD_LETTERS_STREAM, EVENTS_STREAM};
use litestripe_harness::bridge::DatabaseKind;
use litestripe_harness::clock::Clock;
use litestripe_harness::proxy::Mode;
use litestripe_harness::{eventually, nats};
use tempfile::NamedTempFile;

use crate::check::{self, Stream};
use crate::rig::{DEADLINE, Rig, Settings};

/// The broker syncs each message before its PubAck, as deploy/nats.conf has it.
const SYNCED: &str = "sync_interval: always";

/// The storage of the broker, and the part of it that is promised to the events.
const STORAGE: &str = "max_file_store: 192MB";
const EVENTS: &str = "64MiB";
/// A stream of others that takes all storage which is left.
const FILLER: &str = "FILLER";
const FILLER_MESSAGE_BYTES: usize = 900_000;

/// What stands before the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Database {
    Sqlite,
    /// PostgreSQL with a standby.
    Replicated,
    /// PostgreSQL behind a PgBouncer.
    Pooled,
}

/// A bridge under faults.
pub(super) struct Place {
    pub(super) rig: Rig,
    pub(super) database: Database,
    /// What may be expected of the stream of events.
    pub(super) stream: Stream,
    password: u32,
    password_file: NamedTempFile,
}

impl Place {
    /// Starts everything. The seed decides what there is.
    pub(super) async fn start(
        kind: DatabaseKind,
        seed: u64,
        is_synced: bool,
        workers: usize,
        settings: Settings<'_>,
    ) -> Self {
        let database = match kind {
            DatabaseKind::Sqlite => Database::Sqlite,
            DatabaseKind::Postgres if seed % 8 < 4 => Database::Replicated,
            DatabaseKind::Postgres => Database::Pooled,
        };
        let password = 0;
        let broker = nats::Options {
            jetstream: format!("{STORAGE}\n{}", if is_synced { SYNCED } else { "" }),
            config: format!(
                "accounts {{ BRIDGE {{ jetstream: enabled, users: [ \
                 {{ user: test, password: test }}, {{ user: bridge, {} }} ] }} }}",
                password_line(password)
            ),
            user: Some(("test".to_owned(), "test".to_owned())),
            ..nats::Options::default()
        };
        let mut rig = Rig::servers(kind, broker).await;
        rig.clock = Some(Clock::new());
        match database {
            Database::Sqlite => {}
            Database::Replicated => rig.add_standby().await,
            Database::Pooled => rig.add_pooler().await,
        }
        let password_file = NamedTempFile::new().expect("a temporary file can be made");
        let file = password_file.path().display().to_string();
        let mut settings = settings.to_vec();
        settings.extend([
            ("NATS_USER", "bridge"),
            ("NATS_PASSWORD_FILE", file.as_str()),
            ("LITESTRIPE_EVENTS_MAX_BYTES", EVENTS),
        ]);
        let mut place = Self {
            rig,
            database,
            stream: Stream::Whole,
            password,
            password_file,
        };
        place.tell_password();
        place.rig.start_programs(workers, &settings).await;
        place
    }

    /// Makes the workers' clock jump, so that it is this many hours ahead, or behind.
    pub(super) fn set_clock(&self, hours: i64) {
        let clock = self.rig.clock.as_ref().expect("the workers have their own");
        clock.set_ahead(hours * 60 * 60);
    }

    /// Gives the broker's user another password, which the programs do not have yet.
    pub(super) fn change_password(&mut self) {
        let old = password_line(self.password);
        self.password += 1;
        let new = password_line(self.password);
        let broker = &self.rig.bridge.broker;
        broker.reconfigure(|text| text.replace(&old, &new));
    }

    /// Writes the password into the file that the programs read.
    pub(super) fn tell_password(&self) {
        // In place, as an editor does; the programs read it again when it is half written.
        std::fs::write(&self.password_file, password(self.password)).expect("the file is ours");
    }

    /// Makes the stream of events anew with all that it held, as an operator does who restores it
    /// from a copy: every event has another sequence than before.
    ///
    /// Ingress has no connection to the broker meanwhile, so that nothing is stored after the copy.
    pub(super) async fn renew_stream(&mut self) {
        self.stream = Stream::Renewed;
        self.rig.ingress_to_nats.set(Mode::Cut);
        let copies = check::stored(&self.rig).await;
        let jetstream = self.rig.bridge.jetstream().await;
        let old = self.rig.bridge.stream(EVENTS_STREAM).await;
        let config = old.cached_info().config.clone();
        jetstream
            .delete_stream(EVENTS_STREAM)
            .await
            .expect("a stream can be deleted");
        // A program may have made it meanwhile.
        jetstream
            .get_or_create_stream(config)
            .await
            .expect("a stream can be made");
        self.rig.make_consumer(1).await;
        // The newest first, so that no sequence is what it was.
        for copy in copies.into_iter().rev() {
            let mut headers = HeaderMap::new();
            headers.insert(header::MESSAGE_ID, copy.message_id);
            let ack = jetstream
                .publish_with_headers(copy.subject, headers, copy.body)
                .await;
            ack.expect("it is sent").await.expect("it is stored");
        }
        self.rig.ingress_to_nats.set(Mode::Pass);
    }

    /// Takes all storage that the broker has left.
    pub(super) async fn fill_storage(&self) {
        let jetstream = self.rig.bridge.jetstream().await;
        let filler = Config {
            name: FILLER.to_owned(),
            subjects: vec![FILLER.to_owned()],
            ..Config::default()
        };
        jetstream
            .create_stream(filler)
            .await
            .expect("a stream can be made");
        let message = Bytes::from(vec![0; FILLER_MESSAGE_BYTES]);
        loop {
            let ack = jetstream.publish(FILLER, message.clone()).await;
            if ack.expect("it is sent").await.is_err() {
                return;
            }
        }
    }

    /// Gives the storage back.
    pub(super) async fn empty_storage(&self) {
        let jetstream = self.rig.bridge.jetstream().await;
        jetstream
            .delete_stream(FILLER)
            .await
            .expect("a stream can be deleted");
    }

    /// Lets the stream of dead letters take no more than it has, or as many as it wants.
    pub(super) async fn limit_dead_letters(&self, is_limited: bool) {
        let jetstream = self.rig.bridge.jetstream().await;
        let stream = self.rig.bridge.stream(DEAD_LETTERS_STREAM).await;
        let info = stream.cached_info();
        let count = i64::try_from(info.state.messages).expect("a test has few");
        let config = Config {
            // 0 would be no limit.
            max_messages: if is_limited { count.max(1) } else { -1 },
            discard: DiscardPolicy::New,
            ..info.config.clone()
        };
        jetstream
            .update_stream(config)
            .await
            .expect("a stream can be changed");
    }

    /// Adds a trigger of an operator that refuses each row of ours.
    pub(super) async fn refuse_rows(&self) {
        let sql = match self.database {
            Database::Sqlite => {
                "CREATE TRIGGER refuse_insert BEFORE INSERT ON stripe_subscription \
                 BEGIN SELECT RAISE(ABORT, 'refused by an operator'); END; \
                 CREATE TRIGGER refuse_update BEFORE UPDATE ON stripe_subscription \
                 BEGIN SELECT RAISE(ABORT, 'refused by an operator'); END"
            }
            Database::Replicated | Database::Pooled => {
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS \
                 $$BEGIN RAISE EXCEPTION 'refused by an operator'; END$$; \
                 CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON stripe_subscription \
                 FOR EACH ROW EXECUTE FUNCTION refuse()"
            }
        };
        self.execute(sql).await;
    }

    /// Removes the trigger.
    pub(super) async fn accept_rows(&self) {
        let sql = match self.database {
            Database::Sqlite => "DROP TRIGGER refuse_insert; DROP TRIGGER refuse_update",
            Database::Replicated | Database::Pooled => "DROP TRIGGER refuse ON stripe_subscription",
        };
        self.execute(sql).await;
    }

    /// Runs statements, again while the database is busy.
    async fn execute(&self, sql: &str) {
        let database = &self.rig.bridge.database;
        eventually("an operator's statement to end", DEADLINE, async || {
            database
                .execute(sql)
                .await
                .map_err(|error| error.to_string())
        })
        .await;
    }
}

fn password(number: u32) -> String {
    format!("rotated-{number}")
}

fn password_line(number: u32) -> String {
    format!("password: {}", password(number))
}
