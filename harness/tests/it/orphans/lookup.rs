//! How a client reference id is matched to a user.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;
use litestripe_contract::subject::EVENTS_STREAM;
use litestripe_entity::orphaned_payment;
use litestripe_harness::bridge::{Bridge, Database, DatabaseKind, Options};
use litestripe_harness::eventually;
use litestripe_harness::stripe::{Event, Purchase};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::command::resolve;
use super::{
    COMPLETED, CREATED, DEADLINE, EMAIL, FAILED, SUCCEEDED, apply, count_signals, now, orphan,
    signals_about, until, until_all_questions_are_answered, with,
};

on_both_databases!(
    sql_lookup_queries_the_workers_database_with_the_id_bound,
    sql_lookup_queries_another_database,
    failed_sql_lookup_is_retried_and_makes_no_orphan,
    lookup_does_not_delay_the_row_and_silence_makes_no_orphan,
    user_who_is_created_later_resolves_the_orphan,
    payment_without_a_subscription_is_looked_up_once_it_is_paid,
    late_session_resolves_the_orphan_once_its_user_is_known,
    reference_received_during_a_lookup_is_looked_up_too,
    orphan_never_gets_the_email_of_another_customer,
    operators_resolution_overrides_the_lookup,
    operators_resolution_wins_over_a_later_dated_session,
    payment_that_succeeds_later_is_an_orphan_in_either_order_of_its_sessions,
);

/// The orphan's reason.
const UNKNOWN: &str = "unknown_client_reference_id";

const INJECTIONS: [&str; 3] = ["x' OR '1'='1", "'; DROP TABLE app_user; --", "$1"];

async fn sql_lookup_queries_the_workers_database_with_the_id_bound(database: DatabaseKind) {
    let options = Options::new(database).workers(0).worker(
        "LITESTRIPE_USER_LOOKUP",
        "sql:SELECT 1 FROM app_user WHERE name = $1 OR other_name = $1",
    );
    let mut bridge = Bridge::start(options).await;
    make_users(&bridge.database).await;
    bridge.start_worker();

    check_lookups(&bridge).await;
    assert_eq!(
        bridge
            .database
            .query("SELECT * FROM app_user")
            .await
            .expect("the table is still there")
            .len(),
        2
    );
}

async fn sql_lookup_queries_another_database(database: DatabaseKind) {
    // The application's database is of the other kind, and the worker's has no such table.
    let other = match database {
        DatabaseKind::Sqlite => DatabaseKind::Postgres,
        DatabaseKind::Postgres => DatabaseKind::Sqlite,
    };
    let mut users = Database::prepare(other);
    users.resume().await;
    make_users(&users).await;
    let options = Options::new(database)
        .worker("LITESTRIPE_USER_DATABASE_URL", users.url())
        .worker(
            "LITESTRIPE_USER_LOOKUP",
            "sql:SELECT 1 FROM app_user WHERE name = $1",
        );
    let bridge = Bridge::start(options).await;

    check_lookups(&bridge).await;
    let tables = bridge.database.query("SELECT * FROM app_user").await;
    assert!(tables.is_err(), "{}", tables.map_or(0, |rows| rows.len()));
}

#[tokio::test]
async fn sql_lookup_works_on_a_read_only_sqlite_database() {
    let users = Database::prepare(DatabaseKind::Sqlite);
    make_users(&users).await;
    let url = users.url().replace("mode=rwc", "mode=ro");
    let options = Options::new(DatabaseKind::Sqlite)
        .worker("LITESTRIPE_USER_DATABASE_URL", url)
        .worker(
            "LITESTRIPE_USER_LOOKUP",
            "sql:SELECT 1 FROM app_user WHERE name = $1",
        );
    let bridge = Bridge::start(options).await;

    check_lookups(&bridge).await;
    let mode = users
        .query("PRAGMA journal_mode")
        .await
        .expect("the database answers");
    let mode: String = mode[0].try_get("", "journal_mode").expect("it is a text");
    assert_eq!(
        mode, "delete",
        "the worker did not change the application's database"
    );
}

#[tokio::test]
async fn reference_that_cannot_be_cast_to_the_type_of_user_ids_is_unknown() {
    let options = Options::new(DatabaseKind::Postgres).workers(0).worker(
        "LITESTRIPE_USER_LOOKUP",
        "sql:SELECT 1 FROM app_user WHERE id = $1::bigint",
    );
    let mut bridge = Bridge::start(options).await;
    for sql in [
        "CREATE TABLE app_user (id bigint PRIMARY KEY)",
        "INSERT INTO app_user VALUES (42)",
    ] {
        bridge
            .database
            .query(sql)
            .await
            .expect("the table can be made");
    }
    bridge.start_worker();
    let known = buy(&bridge, "42").await;
    let mut unknown = Vec::new();
    for id in [
        "43",
        "user_1",
        "",
        " ",
        "4711 OR 1=1",
        "99999999999999999999",
        "4.2",
    ] {
        unknown.push(buy(&bridge, id).await);
    }
    bridge.wait_until_applied().await;

    for purchase in &unknown {
        until(&bridge, &purchase.subscription, |orphan| {
            orphan.customer_email.is_some()
        })
        .await;
    }
    assert_eq!(
        bridge.orphans().await.len(),
        unknown.len(),
        "{} is known",
        known.subscription
    );
}

async fn failed_sql_lookup_is_retried_and_makes_no_orphan(database: DatabaseKind) {
    let options = Options::new(database).worker(
        "LITESTRIPE_USER_LOOKUP",
        "sql:SELECT 1 FROM app_user WHERE name = $1",
    );
    let bridge = Bridge::start(options).await;
    let (stranger, user) = (buy(&bridge, "nobody").await, buy(&bridge, "user_1").await);
    bridge.wait_until_applied().await;
    assert_eq!(
        bridge
            .row(&stranger.subscription)
            .await
            .client_reference_id
            .as_deref(),
        Some("nobody")
    );
    bridge.workers[0]
        .wait_for_log("no answer yet about", DEADLINE)
        .await;
    assert_eq!(bridge.orphans().await, []);

    make_users(&bridge.database).await;
    until(&bridge, &stranger.subscription, |orphan| {
        orphan.reason == UNKNOWN
    })
    .await;
    assert_eq!(
        bridge.orphans().await.len(),
        1,
        "{} is known",
        user.subscription
    );
    assert_eq!(bridge.workers[0].count_in_log(EMAIL), 0);
}

async fn lookup_does_not_delay_the_row_and_silence_makes_no_orphan(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    // No application listens yet.
    let purchase = buy(&bridge, "user_1").await;
    bridge.wait_until_applied().await;
    assert_eq!(
        bridge
            .row(&purchase.subscription)
            .await
            .client_reference_id
            .as_deref(),
        Some("user_1")
    );
    bridge.workers[0]
        .wait_for_log("no answer yet about", DEADLINE)
        .await;
    assert_eq!(bridge.orphans().await, []);

    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Silence);
    application.until_asked("user_1", 1).await;
    // Without an answer other rows are still applied, and no orphan is created.
    let second = buy(&bridge, "user_2").await;
    bridge.wait_until_applied().await;
    bridge.row(&second.subscription).await;
    assert_eq!(bridge.orphans().await, []);

    application.answer("user_1", Answer::Text("who is that?"));
    application.answer("user_2", Answer::Text(r#"{"known": "perhaps"}"#));
    application.until_asked("user_1", 2).await;
    application.until_asked("user_2", 1).await;
    bridge.wait_until_applied().await;
    assert_eq!(bridge.orphans().await, []);

    application.answer("user_1", Answer::Known(false));
    application.answer("user_2", Answer::Known(true));
    let found = until(&bridge, &purchase.subscription, |orphan| {
        orphan.resolved_at.is_none()
    })
    .await;
    check_unknown(&found, &purchase);
    until_asked_and_known(&application, &bridge, &second).await;
    let signals = bridge.check().await;
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 0)
    );
}

async fn user_who_is_created_later_resolves_the_orphan(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database).workers(2)).await;
    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Known(false));
    let purchase = buy(&bridge, "user_1").await;
    bridge
        .deliver(&purchase.subscription_event(CREATED, purchase.created, json!({})))
        .await;
    let found = until(&bridge, &purchase.subscription, |orphan| {
        orphan.resolved_at.is_none()
    })
    .await;
    check_unknown(&found, &purchase);

    application.answer("user_1", Answer::Known(true));
    let found = until(&bridge, &purchase.subscription, |orphan| {
        orphan.resolved_at.is_some()
    })
    .await;
    assert_eq!(
        found.resolved_client_reference_id.as_deref(),
        Some("user_1")
    );
    assert_eq!(found.customer_email, None);
    // A repeated session asks no question that could reopen the orphan.
    application.answer("user_1", Answer::Known(false));
    let again = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &purchase.checkout_session_event(SUCCEEDED, now(), again),
    )
    .await;
    until_all_questions_are_answered(&bridge).await;
    let signals = bridge.check().await;
    assert_eq!(orphan(&bridge, &found.id).await, found);
    assert_eq!(
        signals_about(&signals, "orphan.created", &found.id)[0].body["reason"],
        UNKNOWN
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
}

async fn payment_without_a_subscription_is_looked_up_once_it_is_paid(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let application = Application::start(&bridge).await;
    for user in ["user_1", "user_2"] {
        application.answer(user, Answer::Known(false));
    }
    let (paid, failed) = (Purchase::new(now() - 60), Purchase::new(now() - 60));
    let unpaid = |user: &str| {
        let once = json!({ "mode": "payment", "subscription": null, "payment_status": "unpaid" });
        with(once, json!({ "client_reference_id": user }))
    };
    apply(
        &bridge,
        &paid.checkout_session_event(COMPLETED, paid.created, unpaid("user_1")),
    )
    .await;
    apply(
        &bridge,
        &failed.checkout_session_event(COMPLETED, failed.created, unpaid("user_2")),
    )
    .await;
    apply(
        &bridge,
        &failed.checkout_session_event(FAILED, failed.created + 9, unpaid("user_2")),
    )
    .await;
    assert_eq!(bridge.orphans().await, []);
    let succeeded = with(unpaid("user_1"), json!({ "payment_status": "paid" }));
    apply(
        &bridge,
        &paid.checkout_session_event(SUCCEEDED, paid.created + 9, succeeded),
    )
    .await;

    let found = until(&bridge, &paid.checkout_session, |orphan| {
        orphan.resolved_at.is_none()
    })
    .await;
    assert_eq!(
        (found.reason.as_str(), found.customer_email.as_deref()),
        (UNKNOWN, Some(EMAIL))
    );
    assert_eq!(found.stripe_subscription_id, None);
    application.answer("user_1", Answer::Known(true));
    let found = until(&bridge, &paid.checkout_session, |orphan| {
        orphan.resolved_at.is_some()
    })
    .await;
    assert_eq!(found.customer_email, None);
    assert_eq!(
        bridge.orphans().await.len(),
        1,
        "a failed payment makes no orphan"
    );
    assert_eq!(application.asked("user_2"), 0, "nor a lookup");
}

async fn late_session_resolves_the_orphan_once_its_user_is_known(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Known(false));
    let purchase = Purchase::new(now() - 60);
    apply(
        &bridge,
        &purchase.checkout_session_event(COMPLETED, purchase.created, json!({})),
    )
    .await;
    let id = purchase.subscription.as_str();
    assert_eq!(
        orphan(&bridge, id).await.reason,
        "missing_client_reference_id",
        "nothing to look up"
    );

    let late = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &purchase.checkout_session_event(COMPLETED, purchase.created + 30, late),
    )
    .await;
    application.until_asked("user_1", 1).await;
    assert_eq!(
        orphan(&bridge, id).await.resolved_at,
        None,
        "the application does not know the user"
    );
    application.answer("user_1", Answer::Known(true));
    let found = until(&bridge, id, |orphan| orphan.resolved_at.is_some()).await;
    assert_eq!(
        found.resolved_client_reference_id.as_deref(),
        Some("user_1")
    );
    assert_eq!(found.customer_email, None);
    let signals = bridge.check().await;
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
}

async fn reference_received_during_a_lookup_is_looked_up_too(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Later);
    application.answer("user_2", Answer::Known(false));
    let purchase = buy(&bridge, "user_1").await;
    application.until_asked("user_1", 1).await;
    let newer = json!({ "client_reference_id": "user_2" });
    apply(
        &bridge,
        &purchase.checkout_session_event(COMPLETED, purchase.created + 30, newer),
    )
    .await;
    application.answer_now("user_1", true).await;

    let found = until(&bridge, &purchase.subscription, |orphan| {
        orphan.resolved_at.is_none()
    })
    .await;
    assert_eq!(found.reason, UNKNOWN);
    assert_eq!(
        bridge
            .row(&purchase.subscription)
            .await
            .client_reference_id
            .as_deref(),
        Some("user_2")
    );
}

async fn orphan_never_gets_the_email_of_another_customer(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let purchase = buy(&bridge, "user_1").await;
    bridge.wait_until_applied().await;
    bridge.workers[0]
        .wait_for_log("no answer yet about", DEADLINE)
        .await;
    // The stream is lost and created again. Its first event now belongs to another customer.
    bridge
        .jetstream()
        .await
        .delete_stream(EVENTS_STREAM)
        .await
        .expect("it can be deleted");
    eventually("the stream to be created again", DEADLINE, async || {
        let stream = bridge.jetstream().await.get_stream(EVENTS_STREAM).await;
        stream.map(|_| ()).map_err(|error| error.to_string())
    })
    .await;
    let other = Purchase::new(now() - 60);
    let mut session = other.checkout_session();
    session["client_reference_id"] = json!("user_2");
    session["customer_details"]["email"] = json!("somebody-else@example.com");
    let session = Event::new(COMPLETED, other.created, session);
    assert_eq!(
        bridge
            .publish(COMPLETED, session.body(), session.id())
            .await,
        1
    );
    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Known(false));
    application.answer("user_2", Answer::Known(true));

    let found = until(&bridge, &purchase.subscription, |orphan| {
        orphan.reason == UNKNOWN
    })
    .await;
    assert_ne!(
        found.customer_email.as_deref(),
        Some("somebody-else@example.com")
    );
}

async fn operators_resolution_overrides_the_lookup(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let application = Application::start(&bridge).await;
    for user in ["user_1", "user_2"] {
        application.answer(user, Answer::Known(false));
    }
    let purchase = buy(&bridge, "user_1").await;
    let id = purchase.subscription.as_str();
    until(&bridge, id, |orphan| orphan.reason == UNKNOWN).await;
    let done = resolve(&bridge, id, "user_2").await;
    assert_eq!(done.status.code(), Some(0), "{}", done.stderr);
    let again = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &purchase.checkout_session_event(SUCCEEDED, purchase.created + 1, again),
    )
    .await;
    until_all_questions_are_answered(&bridge).await;

    let signals = bridge.check().await;
    let found = orphan(&bridge, id).await;
    assert_eq!(
        (
            found.resolved_client_reference_id.as_deref(),
            found.customer_email
        ),
        (Some("user_2"), None)
    );
    assert_eq!(
        bridge.row(id).await.client_reference_id.as_deref(),
        Some("user_2")
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
}

async fn operators_resolution_wins_over_a_later_dated_session(database: DatabaseKind) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Known(false));
    // Stripe's clock may run ahead of the operator's, so that the session is dated after the
    // resolution.
    let (purchase, ahead) = (Purchase::new(now() - 60), now() + 3600);
    let id = purchase.subscription.as_str();
    let unknown = json!({ "client_reference_id": "user_1" });
    apply(
        &bridge,
        &purchase.checkout_session_event(COMPLETED, ahead, unknown),
    )
    .await;
    until(&bridge, id, |orphan| orphan.reason == UNKNOWN).await;

    let done = resolve(&bridge, id, "user_2").await;
    let said = format!("{id} is resolved to client reference id user_2");
    assert_eq!(
        (done.status.code(), done.stdout.trim()),
        (Some(0), said.as_str()),
        "{}",
        done.stderr
    );
    until_all_questions_are_answered(&bridge).await;
    let signals = bridge.check().await;
    let found = orphan(&bridge, id).await;
    assert_eq!(
        (
            found.resolved_client_reference_id.as_deref(),
            found.customer_email
        ),
        (Some("user_2"), None)
    );
    assert_eq!(
        bridge.row(id).await.client_reference_id.as_deref(),
        Some("user_2"),
        "the operator's clock was behind"
    );
    assert_eq!(
        (
            count_signals(&signals, "orphan.created"),
            count_signals(&signals, "orphan.resolved")
        ),
        (1, 1)
    );
}

async fn payment_that_succeeds_later_is_an_orphan_in_either_order_of_its_sessions(
    database: DatabaseKind,
) {
    let bridge = Bridge::start(asking_the_application(database)).await;
    let application = Application::start(&bridge).await;
    application.answer("user_1", Answer::Known(false));
    let paid = json!({});
    let unpaid = json!({ "payment_status": "unpaid", "client_reference_id": "user_1" });
    for backwards in [false, true] {
        let purchase = Purchase::new(now() - 60);
        let mut events = vec![
            purchase.checkout_session_event(COMPLETED, purchase.created, unpaid.clone()),
            purchase.checkout_session_event(SUCCEEDED, purchase.created + 9, paid.clone()),
        ];
        if backwards {
            events.reverse();
        }
        for event in &events {
            apply(&bridge, event).await;
        }
        until(&bridge, &purchase.subscription, |orphan| {
            orphan.resolved_at.is_none()
        })
        .await;
    }
}

/// Delivers payments of known and unknown users, and checks which become orphans.
async fn check_lookups(bridge: &Bridge) {
    let mut known = Vec::new();
    for user in ["user_1", "O'Brien"] {
        known.push(buy(bridge, user).await);
    }
    let mut unknown = Vec::new();
    for user in ["stranger", "USER_1", " user_1"].iter().chain(&INJECTIONS) {
        unknown.push(buy(bridge, user).await);
    }
    bridge.wait_until_applied().await;
    for purchase in &unknown {
        let found = until(bridge, &purchase.subscription, |orphan| {
            orphan.reason == UNKNOWN
        })
        .await;
        check_unknown(&found, purchase);
    }
    let left: Vec<_> = unknown
        .iter()
        .map(|purchase| purchase.subscription.as_str())
        .collect();
    eventually("the users to be known", DEADLINE, async || {
        let questions = super::questions(bridge).await;
        let open = questions
            .iter()
            .filter(|(id, _)| !left.contains(&id.as_str()))
            .count();
        if open == 0 {
            Ok(())
        } else {
            Err(format!("{questions:?}"))
        }
    })
    .await;
    let signals = bridge.check().await;
    assert_eq!(
        bridge.orphans().await.len(),
        unknown.len(),
        "{known:?} are known"
    );
    assert_eq!(count_signals(&signals, "orphan.created"), unknown.len());
}

fn check_unknown(orphan: &orphaned_payment::Model, purchase: &Purchase) {
    assert_eq!(orphan.reason, UNKNOWN);
    assert_eq!(orphan.customer_email.as_deref(), Some(EMAIL));
    assert_eq!(
        orphan.checkout_session_id.as_ref(),
        Some(&purchase.checkout_session)
    );
    assert_eq!(orphan.stripe_customer_id.as_ref(), Some(&purchase.customer));
    assert_eq!(
        orphan.stripe_subscription_id.as_ref(),
        Some(&purchase.subscription)
    );
    assert_eq!(
        (orphan.resolved_at, &orphan.resolved_client_reference_id),
        (None, &None)
    );
}

/// Delivers a paid Checkout Session with that client reference id.
pub(crate) async fn buy(bridge: &Bridge, client_reference_id: &str) -> Purchase {
    let purchase = Purchase::new(now() - 60);
    let session = json!({ "client_reference_id": client_reference_id });
    bridge
        .deliver(&purchase.checkout_session_event(COMPLETED, purchase.created, session))
        .await;
    purchase
}

async fn make_users(database: &Database) {
    for sql in [
        "CREATE TABLE app_user (name varchar(99) PRIMARY KEY, other_name varchar(99))",
        "INSERT INTO app_user (name) VALUES ('user_1'), ('O''Brien')",
    ] {
        database.query(sql).await.expect("the table can be made");
    }
}

const SUBJECT: &str = "app.user.known";

pub(crate) fn asking_the_application(database: DatabaseKind) -> Options {
    Options::new(database).worker("LITESTRIPE_USER_LOOKUP", format!("nats:{SUBJECT}"))
}

/// The application's answer about one id.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    Known(bool),
    Text(&'static str),
    /// No answer at all.
    Silence,
    /// The answer that [`Application::answer_now`] gives.
    Later,
}

/// An application that answers lookups about its users.
pub(crate) struct Application {
    client: async_nats::Client,
    book: Arc<Mutex<Book>>,
    _answers: JoinSet<()>,
}

#[derive(Default)]
struct Book {
    answers: BTreeMap<String, Answer>,
    asked: BTreeMap<String, usize>,
    waiting: BTreeMap<String, async_nats::Subject>,
}

impl Application {
    pub(crate) async fn start(bridge: &Bridge) -> Self {
        let client = bridge.broker.connect().await;
        let mut requests = client
            .subscribe(SUBJECT)
            .await
            .expect("a client can subscribe");
        client.flush().await.expect("the server answers");
        let book = Arc::<Mutex<Book>>::default();
        let mut answers = JoinSet::new();
        let (own_client, own_book) = (client.clone(), Arc::clone(&book));
        answers.spawn(async move {
            while let Some(request) = requests.next().await {
                let id = String::from_utf8(request.payload.to_vec()).expect("an id is text");
                let reply = request.reply.expect("it is a request");
                let answer = own_book.lock().expect(LOCK).note(id, &reply);
                if let Some(text) = answer {
                    own_client
                        .publish(reply, text.into())
                        .await
                        .expect("the server answers");
                }
            }
        });
        Self {
            client,
            book,
            _answers: answers,
        }
    }

    pub(crate) fn answer(&self, id: &str, answer: Answer) {
        self.book
            .lock()
            .expect(LOCK)
            .answers
            .insert(id.to_owned(), answer);
    }

    /// Answers the last request that waits for [`Answer::Later`].
    async fn answer_now(&self, id: &str, known: bool) {
        let reply = self
            .book
            .lock()
            .expect(LOCK)
            .waiting
            .remove(id)
            .expect("it was asked");
        self.client
            .publish(reply, known_as(known).into())
            .await
            .expect("the server answers");
        self.client.flush().await.expect("the server answers");
    }

    pub(crate) fn asked(&self, id: &str) -> usize {
        self.book
            .lock()
            .expect(LOCK)
            .asked
            .get(id)
            .copied()
            .unwrap_or_default()
    }

    pub(crate) async fn until_asked(&self, id: &str, times: usize) {
        eventually(
            &format!("{id} to be asked for {times} times"),
            DEADLINE,
            async || {
                let asked = self.asked(id);
                if asked >= times {
                    Ok(())
                } else {
                    Err(format!("{asked} times"))
                }
            },
        )
        .await;
    }
}

impl Book {
    /// Records a request and returns the immediate answer, if any.
    fn note(&mut self, id: String, reply: &async_nats::Subject) -> Option<String> {
        *self.asked.entry(id.clone()).or_default() += 1;
        let answer = *self.answers.get(&id).unwrap_or(&Answer::Silence);
        match answer {
            Answer::Known(known) => Some(known_as(known)),
            Answer::Text(text) => Some(text.to_owned()),
            Answer::Silence => None,
            Answer::Later => {
                self.waiting.insert(id, reply.clone());
                None
            }
        }
    }
}

fn known_as(known: bool) -> String {
    let answer: Value = json!({ "known": known });
    answer.to_string()
}

/// Waits until no question is open about a purchase.
async fn until_asked_and_known(application: &Application, bridge: &Bridge, purchase: &Purchase) {
    eventually("a user to be known", DEADLINE, async || {
        let questions = super::questions(bridge).await;
        let open = questions.iter().any(|(id, _)| *id == purchase.subscription);
        if open {
            Err(format!(
                "{questions:?}, asked {} times",
                application.asked("user_2")
            ))
        } else {
            Ok(())
        }
    })
    .await;
}

const LOCK: &str = "no holder of this lock panics";
