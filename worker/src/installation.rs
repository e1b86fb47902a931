//! The installation: which database and which broker belong together.
//!
//! Owns the id that both hold, and what follows if they differ. What stands behind `DATABASE_URL`
//! or `NATS_URL` may become another thing: a file that was replaced, a server that was set up
//! again, the broker of another installation. Events would then be acked that only the other
//! database has. Invariant: from the moment that database and broker are known to differ, this
//! process acks no event.
//!
//! The id is made with the first worker. A broker without one has lost its store and gets the
//! database's. A database without one is new, or a rebuild: it gets a new id, which replaces the
//! broker's, so that the database before it is not taken for this one later. That is refused while
//! other workers consume.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use async_nats::jetstream::{self};
use litestripe_contract::exit;
use litestripe_contract::stream::Finding;
use litestripe_contract::subject::{EVENTS_STREAM, WORKER_CONSUMER};
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::error::StoreError;
use crate::settings::Settings;
use crate::store::file::DatabaseFile;
use crate::store::installation as table;
use crate::store::{Store, detached};
use crate::stream::position;
use crate::stream::progress::{self, ProgressError};
use crate::stripe::kv::{Bucket, Entry, KvError};
use crate::wait::pause;

/// The key of the KV bucket that holds the id.
const KEY: &str = "installation";

/// The length of an id: of a NUID, of letters and digits.
const ID_LENGTH: usize = 22;

/// How often a running worker compares the ids.
const COMPARE_EVERY: Duration = Duration::from_secs(2);

/// How long other workers may take to stop before a new database replaces theirs.
const STOP_MAX: Duration = Duration::from_secs(5);

/// How long none of them may do anything.
const QUIET: Duration = Duration::from_secs(2);

/// How often that is checked.
const STOP_POLL: Duration = Duration::from_millis(250);

/// Attempts to write the id, while other processes write it too.
const ATTEMPTS_MAX: usize = 10;

/// Database and broker do not belong together.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Split {
    #[error(
        "the database (DATABASE_URL) belongs to installation {ours} and the broker (NATS_URL) to installation {theirs}: \
         one of them is not the one that was used before, so no event is applied. Check both settings. If one was \
         replaced on purpose, stop all workers and run `litestripe-worker join`"
    )]
    Different { ours: String, theirs: String },
    #[error(
        "the database (DATABASE_URL) is new, and other workers apply the events of installation {theirs} to another \
         one: check DATABASE_URL, or stop those workers first"
    )]
    UsedElsewhere { theirs: String },
    #[error(
        "the database (DATABASE_URL) belongs to no installation yet, and the broker (NATS_URL) to installation \
         {theirs}: check DATABASE_URL; if it is right, start a worker first, which makes them one installation"
    )]
    NotJoined { theirs: String },
    #[error(
        "the database (DATABASE_URL) is not the one of installation {ours} any more: what it was is gone or replaced, \
         and no further event is applied to it. Check DATABASE_URL and start the worker again"
    )]
    Replaced { ours: String },
}

impl From<Split> for Finding {
    fn from(split: Split) -> Self {
        Self {
            what: split.to_string(),
            mend: "check DATABASE_URL and NATS_URL".to_owned(),
        }
    }
}

/// The ids could not be compared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InstallationError {
    #[error(transparent)]
    Split(#[from] Split),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Kv(#[from] KvError),
    #[error(transparent)]
    Progress(#[from] ProgressError),
    #[error("other processes write the installation's id all the time")]
    Contended,
}

/// The installation that this process works for.
#[derive(Clone)]
pub struct Installation(Arc<Inner>);

struct Inner {
    id: String,
    store: Store,
    file: Option<DatabaseFile>,
    jetstream: jetstream::Context,
    bucket: Mutex<Bucket>,
    split: OnceLock<Split>,
    /// Cancelled when `split` is set.
    is_split: CancellationToken,
}

impl Installation {
    /// Makes database and broker one installation, if they are not: see the top of this file.
    pub(crate) async fn join(
        settings: &Settings,
        store: &Store,
        jetstream: &jetstream::Context,
    ) -> Result<Self, InstallationError> {
        let file = DatabaseFile::find(&settings.database);
        let mut bucket = Bucket::new(jetstream.clone(), settings.events.replicas);
        for _ in 0..ATTEMPTS_MAX {
            let Some(id) = step(store, jetstream, &mut bucket).await? else {
                continue;
            };
            return Ok(Self(Arc::new(Inner {
                id,
                store: store.clone(),
                file,
                jetstream: jetstream.clone(),
                bucket: Mutex::new(bucket),
                split: OnceLock::new(),
                is_split: CancellationToken::new(),
            })));
        }
        Err(InstallationError::Contended)
    }

    /// The id that database and broker hold.
    pub fn id(&self) -> &str {
        &self.0.id
    }

    /// Whether events that were committed may be acked.
    pub fn may_ack(&self) -> bool {
        match self.0.file.as_ref().map(DatabaseFile::is_replaced) {
            Some(Ok(true)) => self.separate(self.replaced()),
            Some(Err(error)) => {
                // Nothing is known, so the events are delivered again.
                warn!("cannot find the database's file, so no event is acked: {error}");
                return false;
            }
            Some(Ok(false)) | None => {}
        }
        !self.0.is_split.is_cancelled()
    }

    fn replaced(&self) -> Split {
        Split::Replaced {
            ours: self.0.id.clone(),
        }
    }

    fn separate(&self, split: Split) {
        let _ = self.0.split.set(split);
        self.0.is_split.cancel();
    }

    /// Compares the ids until `shutdown`. Returns why database and broker do not belong together any
    /// more, if that happens.
    pub(crate) async fn watch(self, shutdown: CancellationToken) -> Option<Split> {
        loop {
            match self.compare().await {
                Err(InstallationError::Split(split)) => self.separate(split),
                Err(error) => debug!("cannot compare the installation: {}", exit::chain(&error)),
                Ok(()) => {}
            }
            tokio::select! {
                biased;
                () = self.0.is_split.cancelled() => return self.0.split.get().cloned(),
                paused = pause(COMPARE_EVERY, &shutdown) => paused?,
            }
        }
    }

    async fn compare(&self) -> Result<(), InstallationError> {
        if !self.may_ack() {
            return Ok(());
        }
        let ours = find(&self.0.store).await?;
        let Some(known) = ours.filter(|ours| ours.id == self.0.id) else {
            return Err(self.replaced().into());
        };
        let mut bucket = self.0.bucket.lock().await;
        let entry = bucket.read(KEY).await?;
        match id_in(entry.value.as_ref()) {
            Some(theirs) if theirs == self.0.id => {}
            Some(theirs) if Some(&theirs) != known.replaces.as_ref() => {
                let ours = self.0.id.clone();
                return Err(Split::Different { ours, theirs }.into());
            }
            // It lost its store, or was restored from before the rebuild, as `step` has it.
            _ => write(&mut bucket, &self.0.id, &entry).await?,
        }
        drop(bucket);
        self.see_stream(known).await
    }

    /// Records which `STRIPE_EVENTS` there is, and says so if it was created anew or lost its end.
    async fn see_stream(&self, known: table::Installation) -> Result<(), InstallationError> {
        let Some((stream, end)) = progress::end(&self.0.jetstream).await? else {
            return Ok(());
        };
        if known.stream == Some((stream, end)) {
            return Ok(());
        }
        if matches!(known.stream, Some((before, was)) if before == stream && end < was) {
            position::mend(&self.0.jetstream).await;
        }
        let (store, before) = (self.0.store.clone(), known.stream);
        let recording =
            detached(async move { table::see_stream(&store, before, stream, end).await });
        if !recording.await? {
            return Ok(());
        }
        match known.stream {
            Some((before, _)) if before != stream => warn!(
                "{EVENTS_STREAM} was created anew: everything that it holds is applied again, and an unfinished replay \
                 has to be run again. Events that no worker had applied are gone with the old stream; a backfill \
                 fetches them from Stripe if there is a key"
            ),
            Some((_, before)) if end < before => warn!(
                "{EVENTS_STREAM} ends at event {end}, and ended at {before} before: the NATS server has lost its last \
                 events or was restored from a backup; a backfill fetches them from Stripe if there is a key"
            ),
            _ => {}
        }
        Ok(())
    }
}

/// Makes one step towards one id. Returns the id once both sides hold it.
async fn step(
    store: &Store,
    jetstream: &jetstream::Context,
    bucket: &mut Bucket,
) -> Result<Option<String>, InstallationError> {
    // In this order: another worker of the same database writes the broker's id last.
    let entry = bucket.read(KEY).await?;
    let ours = find(store).await?;
    match (ours, id_in(entry.value.as_ref())) {
        (Some(ours), Some(theirs)) if ours.id == theirs => return Ok(Some(theirs)),
        (Some(ours), theirs) if theirs.is_none() || theirs == ours.replaces => {
            write(bucket, &ours.id, &entry).await?;
        }
        (Some(ours), theirs) => {
            let (ours, theirs) = (ours.id, theirs.unwrap_or_default());
            return Err(Split::Different { ours, theirs }.into());
        }
        (None, theirs) => {
            if let Some(theirs) = &theirs {
                let waited = until_nobody_consumes(jetstream, theirs).await;
                // Those who consume may be workers of this database, who were faster.
                if find(store).await?.is_some() {
                    return Ok(None);
                }
                waited?;
                warn!(
                    "the database (DATABASE_URL) belongs to no installation yet: it takes the place of the one that \
                     installation {theirs} had before"
                );
            }
            let id = new_id(jetstream);
            table::insert(store.connection(), &id, theirs).await?;
        }
    }
    Ok(None)
}

/// How a command makes sure that it works on the broker's database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Membership {
    /// It acks events, so it joins as a worker does.
    Join,
    /// It removes from the broker what it has written to the database, so the database has to
    /// belong to the installation.
    Required,
    /// It removes nothing from the broker, so the database may be new.
    MayBeNew,
}

impl Membership {
    /// Returns the installation if it was joined.
    pub(crate) async fn check(
        self,
        settings: &Settings,
        store: &Store,
        jetstream: &jetstream::Context,
    ) -> Result<Option<Installation>, InstallationError> {
        match self {
            Self::Join => Ok(Some(Installation::join(settings, store, jetstream).await?)),
            Self::Required => require(Some(store), jetstream).await.map(|()| None),
            Self::MayBeNew => check(store, jetstream).await.map(|()| None),
        }
    }
}

/// Fails if database and broker belong to different installations, or only the broker to one. The
/// database is `None` if it has no tables yet.
pub(crate) async fn require(
    store: Option<&Store>,
    jetstream: &jetstream::Context,
) -> Result<(), InstallationError> {
    if let Some(store) = store
        && find(store).await?.is_some()
    {
        return check(store, jetstream).await;
    }
    match broker_id(jetstream).await? {
        Some(theirs) => Err(Split::NotJoined { theirs }.into()),
        None => Ok(()),
    }
}

/// Fails if database and broker belong to different installations. A database that belongs to none
/// yet passes.
pub(crate) async fn check(
    store: &Store,
    jetstream: &jetstream::Context,
) -> Result<(), InstallationError> {
    let Some(ours) = find(store).await? else {
        return Ok(());
    };
    match broker_id(jetstream).await? {
        Some(theirs) if theirs != ours.id && Some(&theirs) != ours.replaces.as_ref() => {
            let ours = ours.id;
            Err(Split::Different { ours, theirs }.into())
        }
        _ => Ok(()),
    }
}

/// Makes the database's id the broker's, whatever it held. Returns the id, and what the broker
/// held before.
pub(crate) async fn join_on_purpose(
    settings: &Settings,
    store: &Store,
    jetstream: &jetstream::Context,
) -> Result<(String, Option<String>), InstallationError> {
    let mut bucket = Bucket::new(jetstream.clone(), settings.events.replicas);
    table::insert(store.connection(), &new_id(jetstream), None).await?;
    let id = find(store).await?.map(|ours| ours.id).unwrap_or_default();
    let entry = bucket.read(KEY).await?;
    let theirs = id_in(entry.value.as_ref());
    let before = theirs.clone().filter(|theirs| *theirs != id);
    if theirs.as_ref() != Some(&id) {
        bucket.write(KEY, id.clone(), entry.revision).await?;
    }
    Ok((id, before))
}

/// Waits until no worker has requested, received or acked messages for [`QUIET`]. One look is not
/// enough: under a backlog the server answers each request at once.
async fn until_nobody_consumes(
    jetstream: &jetstream::Context,
    theirs: &str,
) -> Result<(), InstallationError> {
    let nobody = async {
        let mut last = progress::activity(jetstream, WORKER_CONSUMER).await?;
        let mut changed = Instant::now();
        while changed.elapsed() < QUIET {
            tokio::time::sleep(STOP_POLL).await;
            let now = progress::activity(jetstream, WORKER_CONSUMER).await?;
            if now.requests > 0 || now != last {
                (last, changed) = (now, Instant::now());
            }
        }
        Ok(())
    };
    let in_use = |_| {
        let theirs = theirs.to_owned();
        InstallationError::Split(Split::UsedElsewhere { theirs })
    };
    tokio::time::timeout(STOP_MAX, nobody)
        .await
        .unwrap_or_else(|elapsed| Err(in_use(elapsed)))
}

async fn find(store: &Store) -> Result<Option<table::Installation>, StoreError> {
    let store = store.clone();
    detached(async move { table::find(store.connection()).await }).await
}

/// Reads the broker's id, and never creates the bucket.
async fn broker_id(jetstream: &jetstream::Context) -> Result<Option<String>, KvError> {
    let value = Bucket::existing(jetstream.clone(), KEY).await?;
    Ok(id_in(value.as_ref()))
}

/// Writes the broker's id over `before`. Another process may write it at the same time: the caller
/// reads it again.
async fn write(bucket: &mut Bucket, id: &str, before: &Entry) -> Result<(), KvError> {
    match bucket.write(KEY, id.to_owned(), before.revision).await {
        Ok(_) => {
            if before.value.is_some() && id_in(before.value.as_ref()).is_none() {
                warn!(
                    "the key {KEY} of the KV bucket held no id: a program that is none of Litestripe's wrote to it"
                );
            }
            info!("the broker (NATS_URL) belongs to installation {id} now");
            Ok(())
        }
        Err(KvError::Conflict(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Returns the id in this value, or `None` if it is not one. A client can have the server's answer to
/// a request stored here, and that must not stop all workers.
fn id_in(value: Option<impl AsRef<[u8]>>) -> Option<String> {
    let text = String::from_utf8(value?.as_ref().to_vec()).ok()?;
    let is_id = text.len() == ID_LENGTH && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_id.then_some(text)
}

/// Returns a random id.
fn new_id(jetstream: &jetstream::Context) -> String {
    let unique = jetstream.client().new_inbox();
    unique.rsplit('.').next().unwrap_or_default().to_owned()
}
