//! Ingress from the outside: requests go in, and a message is stored or not.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::State;
use litestripe_contract::{header, subject};
use litestripe_harness::process::Signal;
use litestripe_harness::program::{Launch, Program};
use litestripe_harness::stripe::{self, Delivery};
use litestripe_harness::{eventually, nats, port};
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

mod broker;
mod connections;
mod life;

const UUID: &str = "0b7f8c1e-6f0a-4a51-9d55-0a4d3f6b7c21";
const SECRET: &str = "whsec_integrationTests0123456789";
const TYPE: &str = "customer.subscription.updated";
const DEADLINE: Duration = Duration::from_secs(30);

/// The deadline for answering a 503.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// The deadline for an answer that waits for nothing. It takes milliseconds; on two busy cores it
/// has taken 1.5 s.
const AT_ONCE: Duration = Duration::from_secs(6);

/// A broker and an ingress that is ready to store events.
struct Setup {
    broker: nats::Server,
    ingress: Ingress,
}

/// A running ingress.
struct Ingress {
    program: Program,
    address: SocketAddr,
    client: reqwest::Client,
}

impl Setup {
    async fn new() -> Self {
        Self::with(nats::Options::default(), |launch| launch).await
    }

    async fn with(options: nats::Options, change: impl FnOnce(Launch) -> Launch) -> Self {
        let broker = nats::Server::start_with(options).await;
        let ingress = Ingress::start(&broker, |launch| {
            change(launch.env("STRIPE_WEBHOOK_SECRET", SECRET))
        });
        ingress.until_ready().await;
        Self { broker, ingress }
    }

    async fn state(&self) -> State {
        let jetstream = async_nats::jetstream::new(self.broker.connect().await);
        let stream = jetstream
            .get_stream(subject::EVENTS_STREAM)
            .await
            .expect("ingress created the stream");
        stream.cached_info().state.clone()
    }

    async fn message(&self, sequence: u64) -> StreamMessage {
        let jetstream = async_nats::jetstream::new(self.broker.connect().await);
        let stream = jetstream
            .get_stream(subject::EVENTS_STREAM)
            .await
            .expect("ingress created the stream");
        stream
            .get_raw_message(sequence)
            .await
            .expect("the message is stored")
    }
}

impl Ingress {
    fn start(broker: &nats::Server, change: impl FnOnce(Launch) -> Launch) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], port::free()));
        let launch = Program::named("litestripe-ingress")
            .env("STRIPE_WEBHOOK_UUID", UUID)
            .env("LITESTRIPE_LISTEN", address.to_string())
            .env("NATS_URL", broker.url());
        Self {
            program: change(launch).start(),
            address,
            client: stripe::client(),
        }
    }

    fn hook(&self) -> String {
        self.url(&format!("/ls/hook/{UUID}/"))
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    async fn post(&self, delivery: &Delivery) -> Response {
        delivery
            .post(&self.client, &self.hook())
            .await
            .expect("ingress answers")
    }

    /// Posts a newly signed event and returns the status.
    async fn post_event(&self, id: &str) -> StatusCode {
        self.post(&Delivery::new(event(id, TYPE), SECRET))
            .await
            .status()
    }

    async fn get(&self, path: &str) -> Response {
        self.client
            .get(self.url(path))
            .send()
            .await
            .expect("ingress answers")
    }

    async fn until_ready(&self) {
        eventually("ingress to be ready", DEADLINE, async || {
            let answer = self
                .client
                .get(self.url("/readyz"))
                .send()
                .await
                .map_err(|error| error.to_string())?;
            if answer.status() == StatusCode::OK {
                Ok(())
            } else {
                Err(answer.text().await.unwrap_or_default())
            }
        })
        .await;
    }

    /// Returns the value of the metric whose line begins with `line`.
    async fn metric(&self, line: &str) -> f64 {
        let page = self
            .get("/metrics")
            .await
            .text()
            .await
            .expect("a page is text");
        let value = page
            .lines()
            .find_map(|found| found.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no {line} in\n{page}"))
    }

    /// Sends `request` and returns all that ingress answers until it closes the connection.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.address)
            .await
            .expect("ingress listens");
        stream.write_all(request).await.expect("ingress reads");
        read_to_end(&mut stream).await
    }

    fn resident_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.program.id()))
            .expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("Linux counts memory");
        line.trim()
            .trim_end_matches(" kB")
            .parse::<u64>()
            .expect("it is a number")
            >> 10
    }
}

async fn read_to_end(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let read = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
    read.expect("the connection ends")
        .expect("the connection is not reset");
    String::from_utf8(answer).expect("an answer is text")
}

fn event(id: &str, event_type: &str) -> String {
    json!({ "id": id, "object": "event", "type": event_type, "data": { "object": {} } }).to_string()
}

/// Makes an event of `length` bytes.
fn event_with_length(id: &str, length: usize) -> String {
    let bare = event(id, TYPE);
    format!("{bare}{}", " ".repeat(length - bare.len()))
}

fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// Makes the head of a delivery to the hook, without its last line and without a length.
fn head(delivery: &Delivery) -> String {
    let signature = delivery.signature().expect("it is signed");
    format!(
        "POST /ls/hook/{UUID}/ HTTP/1.1\r\nHost: localhost\r\nStripe-Signature: {signature}\r\n"
    )
}

async fn check_error(answer: Response, status: u16, case: &str) {
    assert_eq!(answer.status().as_u16(), status, "{case}");
    assert_eq!(
        answer.headers()["content-type"],
        "application/json",
        "{case}"
    );
    let body: Value = answer.json().await.expect("an error is JSON");
    assert!(
        body["error"].as_str().is_some_and(|text| !text.is_empty()),
        "{case}: {body}"
    );
}

/// Waits until bodies of at least `bytes` bytes are in flight.
async fn until_in_flight(ingress: &Ingress, bytes: usize) {
    eventually("bodies to be in flight", DEADLINE, async || {
        let held = ingress
            .metric("litestripe_ingress_bodies_in_flight_bytes")
            .await;
        if held >= bytes as f64 {
            Ok(())
        } else {
            Err(held.to_string())
        }
    })
    .await;
}

#[tokio::test]
async fn an_event_is_stored_as_it_was_signed() {
    let setup = Setup::new().await;
    let body = "{ \"id\" : \"evt_1\",\n \"type\":\"customer.subscription.updated\", \"data\": {\"n\": 1.0e2, \"s\": \"\\u00e9 é\"} }\n";
    let delivery = Delivery::new(body, SECRET);
    let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let before = OffsetDateTime::now_utc();
    let request = setup
        .ingress
        .client
        .post(setup.ingress.hook())
        .body(body)
        .header("traceparent", traceparent);
    let signature = delivery.signature().expect("it is signed");
    let answer = request
        .header("Stripe-Signature", signature)
        .send()
        .await
        .expect("ingress answers");
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(
        answer.text().await.expect("a body is text"),
        r#"{"status":"success"}"#
    );

    let message = setup.message(1).await;
    assert_eq!(
        message.subject.as_str(),
        "stripe.events.customer.subscription.updated"
    );
    assert_eq!(message.payload, body);
    let stored = |name: &str| {
        message
            .headers
            .get(name)
            .map(|value| value.as_str().to_owned())
    };
    assert_eq!(stored(header::MESSAGE_ID).as_deref(), Some("evt_1"));
    assert_eq!(stored(header::STRIPE_SIGNATURE).as_deref(), Some(signature));
    assert_eq!(stored(header::TRACEPARENT).as_deref(), Some(traceparent));
    let received = stored(header::RECEIVED_AT).expect("the time of receipt is stored");
    let received = OffsetDateTime::parse(&received, &Rfc3339).expect("it is RFC 3339");
    let tolerance = time::Duration::milliseconds(1);
    assert!(
        before - tolerance <= received && received <= OffsetDateTime::now_utc(),
        "{received}"
    );
}

#[tokio::test]
async fn the_hook_path_allows_upper_case_a_query_and_no_trailing_slash() {
    let setup = Setup::new().await;
    for (n, path) in [
        format!("/ls/hook/{UUID}/"),
        format!("/ls/hook/{UUID}"),
        format!("/ls/hook/{}/", UUID.to_uppercase()),
        format!("/ls/hook/{UUID}?from=stripe"),
    ]
    .iter()
    .enumerate()
    {
        let delivery = Delivery::new(event(&format!("evt_{n}"), TYPE), SECRET);
        let answer = delivery
            .post(&setup.ingress.client, &setup.ingress.url(path))
            .await
            .expect("ingress answers");
        assert_eq!(answer.status(), StatusCode::OK, "{path}");
    }
    assert_eq!(setup.state().await.messages, 4);
}

#[tokio::test]
async fn a_refused_delivery_gets_the_right_status_and_is_not_stored() {
    let setup = Setup::with(nats::Options::default(), |launch| {
        launch.env("LITESTRIPE_EVENT_TYPES", "*")
    })
    .await;
    let ingress = &setup.ingress;
    let good = event("evt_1", TYPE);
    let signed = |body: &str| Delivery::new(body.to_owned(), SECRET);
    let unsigned = signed(&good);
    let header = unsigned.signature().expect("it is signed").to_owned();
    let cases = [
        ("no signature", 400, signed(&good).with_signature(None)),
        (
            "an empty signature",
            400,
            signed(&good).with_signature(Some("")),
        ),
        (
            "a nonsensical signature",
            400,
            signed(&good).with_signature(Some("nonsense")),
        ),
        (
            "no timestamp",
            400,
            signed(&good).with_signature(Some(&header.replace("t=", "x="))),
        ),
        (
            "another scheme",
            400,
            signed(&good).with_signature(Some(&header.replace("v1=", "v0="))),
        ),
        (
            "another secret",
            400,
            Delivery::new(good.clone(), "whsec_other"),
        ),
        (
            "another body",
            400,
            signed(&good).with_body(good.replace("evt_1", "evt_2")),
        ),
        (
            "an old timestamp",
            400,
            Delivery::signed_at(good.clone(), SECRET, now() - 302),
        ),
        ("a body that is not JSON", 400, signed("hello")),
        ("an empty body", 400, signed("")),
        ("a JSON list", 400, signed("[]")),
        ("no id", 400, signed(r#"{"type":"a.b"}"#)),
        ("no type", 400, signed(r#"{"id":"evt_1"}"#)),
        (
            "an id that is not a string",
            400,
            signed(r#"{"id":1,"type":"a.b"}"#),
        ),
        (
            "a type that cannot be a subject",
            400,
            signed(&event("evt_1", "A.*")),
        ),
        (
            "a type with an empty part",
            400,
            signed(&event("evt_1", "a..b")),
        ),
        (
            "a body over the limit",
            413,
            signed(&event_with_length("evt_1", 1_032_193)),
        ),
        (
            "a body far over the limit",
            413,
            signed(&event_with_length("evt_1", 8 << 20)),
        ),
    ];
    for (case, status, delivery) in cases {
        check_error(ingress.post(&delivery).await, status, case).await;
    }

    // A signed body that is not UTF-8.
    let delivery = Delivery::new(
        b"{\"id\":\"evt_1\",\"type\":\"a\",\"x\":\"\xff\"}".as_slice(),
        SECRET,
    );
    check_error(
        ingress.post(&delivery).await,
        400,
        "a body that is not UTF-8",
    )
    .await;

    for (path, status) in [
        ("/ls/hook/11111111-2222-4333-8444-555555555555/", 404),
        (&format!("/ls/hook/{}/", UUID.replace('-', "")), 404),
        ("/ls/hook/", 404),
        (&format!("/ls/hook/{UUID}/more"), 404),
        (&format!("/ls/hook/{UUID}//"), 404),
        ("/", 404),
        ("/healthz", 405),
    ] {
        let answer = unsigned
            .post(&ingress.client, &ingress.url(path))
            .await
            .expect("ingress answers");
        check_error(answer, status, path).await;
    }

    // The method comes first, whatever the UUID.
    for method in [
        Method::GET,
        Method::PUT,
        Method::DELETE,
        Method::PATCH,
        Method::OPTIONS,
    ] {
        for path in [format!("/ls/hook/{UUID}/"), "/ls/hook/other/".to_owned()] {
            let answer = ingress
                .client
                .request(method.clone(), ingress.url(&path))
                .send()
                .await;
            let answer = answer.expect("ingress answers");
            assert_eq!(answer.headers()["allow"], "POST", "{method} {path}");
            check_error(answer, 405, &format!("{method} {path}")).await;
        }
    }

    assert_eq!(setup.state().await.messages, 0);
    assert_eq!(
        ingress.post_event("evt_1").await,
        StatusCode::OK,
        "ingress still accepts events"
    );
    assert_eq!(setup.state().await.messages, 1);
    let log = ingress.program.log();
    assert!(!log.contains(UUID) && !log.contains(SECRET), "{log}");
}

#[tokio::test]
async fn events_of_types_that_are_not_stored_are_answered_200() {
    let setup = Setup::new().await;
    let thin = |id: &str, event_type: &str| {
        json!({ "id": id, "object": "v2.core.event", "type": event_type }).to_string()
    };
    for body in [
        event("evt_1", "invoice.paid"),
        thin("evt_2", "v1.invoice.paid"),
        event("evt_3", "Not A Subject"),
        thin("evt_4", "v2.core.account.created"),
    ] {
        let answer = setup
            .ingress
            .post(&Delivery::new(body.clone(), SECRET))
            .await;
        assert_eq!(answer.status(), StatusCode::OK, "{body}");
    }
    assert_eq!(setup.state().await.messages, 0);
    for outcome in ["ignored", "thin_ignored"] {
        let counter = format!(r#"litestripe_ingress_deliveries_total{{outcome="{outcome}"}}"#);
        assert_eq!(setup.ingress.metric(&counter).await, 2.0, "{outcome}");
    }
}

#[tokio::test]
async fn a_redelivery_within_the_duplicate_window_is_not_stored_again() {
    let setup = Setup::new().await;
    let body = event("evt_1", TYPE);
    for age_s in [60, 0] {
        let delivery = Delivery::signed_at(body.clone(), SECRET, now() - age_s);
        assert_eq!(setup.ingress.post(&delivery).await.status(), StatusCode::OK);
    }
    assert_eq!(setup.state().await.messages, 1);
    for outcome in ["stored", "duplicate"] {
        let line = format!("litestripe_ingress_deliveries_total{{outcome=\"{outcome}\"}}");
        assert_eq!(setup.ingress.metric(&line).await, 1.0, "{outcome}");
    }
}

#[tokio::test]
async fn bodies_are_accepted_with_and_without_a_length() {
    let setup = Setup::new().await;
    let ingress = &setup.ingress;
    let chunked = |delivery: &Delivery, size: usize| {
        let mut request =
            format!("{}Transfer-Encoding: chunked\r\n\r\n", head(delivery)).into_bytes();
        for chunk in delivery.body().chunks(size) {
            request.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
            request.extend(chunk);
            request.extend(b"\r\n");
        }
        request.extend(b"0\r\n\r\n");
        request
    };
    let closing = |request: Vec<u8>| {
        let text = b"Host: localhost\r\n";
        let at = request
            .windows(text.len())
            .position(|window| window == text)
            .expect("there is a head");
        [&request[..at], b"Connection: close\r\n", &request[at..]].concat()
    };

    let small = Delivery::new(event("evt_1", TYPE), SECRET);
    let large = Delivery::new(event_with_length("evt_2", 1_032_192), SECRET);
    for (delivery, size) in [(&small, 1), (&large, 1000)] {
        let answer = ingress.raw(&closing(chunked(delivery, size))).await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
    assert_eq!(setup.message(1).await.payload, small.body());
    assert_eq!(setup.message(2).await.payload, large.body());

    let over = Delivery::new(event_with_length("evt_3", 1_032_193), SECRET);
    let answer = ingress.raw(&chunked(&over, 100_000)).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    // Refused for its announced length, before any of the body is sent.
    let announced = format!("{}Content-Length: 5000000\r\n\r\n", head(&over));
    let mut stream = TcpStream::connect(ingress.address)
        .await
        .expect("ingress listens");
    stream
        .write_all(announced.as_bytes())
        .await
        .expect("ingress reads");
    let answer = read_to_end(&mut stream).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert_eq!(setup.state().await.messages, 2);
}

#[tokio::test]
async fn the_body_limit_is_lowered_to_the_broker_s_max_payload() {
    let options = nats::Options {
        config: "max_payload: 64KB".to_owned(),
        ..Default::default()
    };
    let setup = Setup::with(options, |launch| launch).await;
    let limit = (64 - 16) << 10;
    let fits = Delivery::new(event_with_length("evt_1", limit), SECRET);
    assert_eq!(setup.ingress.post(&fits).await.status(), StatusCode::OK);
    let over = Delivery::new(event_with_length("evt_2", limit + 1), SECRET);
    check_error(setup.ingress.post(&over).await, 413, "one byte more").await;
    assert_eq!(setup.state().await.messages, 1);
}

#[tokio::test]
async fn slow_clients_are_cut_off() {
    let setup = Setup::new().await;
    let ingress = &setup.ingress;
    let delivery = Delivery::new(event("evt_1", TYPE), SECRET);
    let slow_head = async {
        let mut stream = TcpStream::connect(ingress.address)
            .await
            .expect("ingress listens");
        stream
            .write_all(head(&delivery).as_bytes())
            .await
            .expect("ingress reads");
        read_to_end(&mut stream).await
    };
    let idle = async {
        let mut stream = TcpStream::connect(ingress.address)
            .await
            .expect("ingress listens");
        read_to_end(&mut stream).await
    };
    let slow_body = async {
        let request = format!(
            "{}Content-Length: {}\r\n\r\n{{",
            head(&delivery),
            delivery.body().len()
        );
        ingress.raw(request.as_bytes()).await
    };
    let start = Instant::now();
    let (_, _, body) = tokio::join!(slow_head, idle, slow_body);
    assert!(body.starts_with("HTTP/1.1 408 "), "{body}");
    let elapsed = start.elapsed();
    assert!(
        elapsed < Duration::from_secs(18),
        "10 s and, for the body, 5 s to read the answer; took {elapsed:?}"
    );
    assert_eq!(setup.state().await.messages, 0);
}

#[tokio::test]
async fn odd_requests_are_answered_and_do_no_harm() {
    let setup = Setup::new().await;
    let headers = "Host: localhost\r\nConnection: close\r\n\r\n";
    for (line, status) in [
        ("OPTIONS * HTTP/1.1", "404"),
        ("GET http://localhost/healthz HTTP/1.1", "200"),
        ("GET //healthz HTTP/1.1", "404"),
        ("GET /%ff/%00 HTTP/1.1", "404"),
        ("CONNECT localhost:80 HTTP/1.1", "404"),
        ("HEAD /healthz HTTP/1.1", "200"),
        ("nonsense", "400"),
    ] {
        let answer = setup
            .ingress
            .raw(format!("{line}\r\n{headers}").as_bytes())
            .await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{line}: {answer}"
        );
        // A cache must not keep the state of a moment ago.
        assert!(
            status != "200" || answer.contains("cache-control: no-store"),
            "{line}: {answer}"
        );
    }
    let long = format!(
        "GET /healthz HTTP/1.1\r\nX: {}\r\n{headers}",
        "x".repeat(100_000)
    );
    let mut stream = TcpStream::connect(setup.ingress.address)
        .await
        .expect("ingress listens");
    // It may be refused before all of it is written.
    let _ = stream.write_all(long.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    assert!(
        answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    assert_eq!(setup.ingress.post_event("evt_1").await, StatusCode::OK);
}

#[tokio::test]
async fn the_memory_of_waiting_bodies_is_bounded() {
    let setup = Setup::new().await;
    let ingress = &setup.ingress;
    assert_eq!(ingress.post_event("evt_0").await, StatusCode::OK);
    let broker = setup.broker.process().expect("the broker runs");
    broker.signal(Signal::Stop);
    let start = Instant::now();
    let posts = (1..=80).map(|n| {
        let delivery = Delivery::new(event_with_length(&format!("evt_{n}"), 1_000_000), SECRET);
        async move {
            let answer = ingress.post(&delivery).await;
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(answer.headers().contains_key("retry-after"));
            start.elapsed()
        }
    });
    let mut took = futures_util::future::join_all(posts).await;
    took.sort();
    let at_once = took.iter().filter(|took| **took < AT_ONCE).count();
    assert!(
        (80 - 33..80).contains(&at_once),
        "33 bodies fit; {at_once} were refused at once: {took:?}"
    );
    let resident = ingress.resident_mib();
    assert!(resident < 160, "{resident} MiB");
    let held = ingress
        .metric("litestripe_ingress_bodies_in_flight_bytes")
        .await;
    assert!(held <= f64::from(32 << 20), "{held}");

    broker.signal(Signal::Cont);
    eventually("ingress to store again", DEADLINE, async || {
        let status = ingress.post_event("evt_last").await;
        if status == StatusCode::OK {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
    .await;
    eventually("the bodies to be gone", DEADLINE, async || {
        let held = ingress
            .metric("litestripe_ingress_bodies_in_flight_bytes")
            .await;
        if held == 0.0 {
            Ok(())
        } else {
            Err(held.to_string())
        }
    })
    .await;
}
