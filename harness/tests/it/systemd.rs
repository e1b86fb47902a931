//! What systemd hears from the programs, on a socket such as it makes for a unit of `Type=notify`.

use std::time::Duration;

use litestripe_harness::bridge::{Bridge, DatabaseKind, HOOK, Options, SECRET};
use litestripe_harness::process::Signal;
use litestripe_harness::program::{Launch, Program};
use litestripe_harness::{nats, port};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpStream, UnixDatagram};
use tokio::time::{Instant, timeout};

const DEADLINE: Duration = Duration::from_secs(60);

const ALIVE: &str = "WATCHDOG=1";

/// How many signs of life show that they go on.
const SEVERAL: usize = 5;

/// The socket on which systemd would listen.
struct Systemd {
    socket: UnixDatagram,
    folder: tempfile::TempDir,
}

impl Systemd {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let socket = UnixDatagram::bind(folder.path().join("notify")).expect("it can be bound");
        Self { socket, folder }
    }

    /// Makes it the supervisor of a program that has to say every second that it is alive.
    fn supervise(&self, launch: Launch) -> Launch {
        launch
            .env("NOTIFY_SOCKET", self.folder.path().join("notify"))
            .env("WATCHDOG_USEC", "1000000")
    }

    /// Returns the next message, or `None` if none comes `within` that time.
    async fn next(&self, within: Duration) -> Option<String> {
        let mut message = [0; 4096];
        let length = timeout(within, self.socket.recv(&mut message)).await.ok()?;
        let length = length.expect("the socket can be read");
        Some(String::from_utf8_lossy(&message[..length]).into_owned())
    }

    /// Returns the messages up to the first that contains `text`.
    async fn until(&self, text: &str) -> Vec<String> {
        let mut messages = Vec::new();
        while !messages.last().is_some_and(|it: &String| it.contains(text)) {
            let next = self.next(DEADLINE).await;
            messages.push(next.unwrap_or_else(|| panic!("no {text:?} after {messages:?}")));
        }
        messages
    }

    /// Waits for several signs of life in a row, and checks that nothing else comes meanwhile.
    async fn until_alive_only(&self, program: &Program) {
        for _ in 0..SEVERAL {
            let message = self.next(DEADLINE).await;
            assert_eq!(
                message.as_deref().map(str::trim),
                Some(ALIVE),
                "{}",
                program.log()
            );
        }
    }

    /// Checks that the program is alive while its broker is away, ready only when that is there,
    /// alive while it is silent, and that it says when it stops.
    async fn check(&self, program: &Program, broker: &mut nats::Server, waiting: &str) {
        let before = self.until(waiting).await;
        assert!(!before.concat().contains("READY=1"), "{before:?}");
        self.until_alive_only(program).await;

        broker.resume().await;
        let ready = self.until("READY=1").await;
        assert!(ready.concat().ends_with("READY=1\nSTATUS=\n"), "{ready:?}");

        let frozen = broker.process().expect("it runs");
        frozen.signal(Signal::Stop);
        self.until_alive_only(program).await;
        frozen.signal(Signal::Cont);

        program.signal(Signal::Term);
        self.until("STOPPING=1").await;
        assert_eq!(program.wait(DEADLINE).await.code(), Some(0));
    }
}

fn ingress(broker: &nats::Server) -> Launch {
    Program::named("litestripe-ingress")
        .env("NATS_URL", broker.url())
        .env("STRIPE_WEBHOOK_UUID", HOOK)
        .env("STRIPE_WEBHOOK_SECRET", SECRET)
        .env("LITESTRIPE_LISTEN", format!("127.0.0.1:{}", port::free()))
}

fn worker(bridge: &Bridge) -> Launch {
    let address = format!("127.0.0.1:{}", port::free());
    bridge.worker().env("LITESTRIPE_WORKER_LISTEN", address)
}

#[tokio::test]
async fn ingress_is_ready_with_its_broker_and_alive_without() {
    let systemd = Systemd::new();
    let mut broker = nats::Server::prepare(nats::Options::default()).expect("it can be prepared");
    let ingress = systemd.supervise(ingress(&broker)).start();
    let waiting = "STATUS=not connected to NATS";
    systemd.check(&ingress, &mut broker, waiting).await;
}

#[tokio::test]
async fn worker_is_ready_with_its_broker_and_alive_without() {
    let systemd = Systemd::new();
    let mut bridge = Bridge::prepare(Options::new(DatabaseKind::Sqlite));
    bridge.database.resume().await;
    let worker = systemd.supervise(worker(&bridge)).start();
    let waiting = "STATUS=waiting for NATS";
    systemd.check(&worker, &mut bridge.broker, waiting).await;
}

/// systemd would kill and restart the program.
#[cfg(feature = "faults")]
mod stuck {
    use super::*;
    use litestripe_harness::stripe;

    /// For how long the fail point blocks the main loop, in milliseconds: longer than any test.
    const BLOCKED: &str = "sleep(600000)";

    /// Longer than a program that is alive is ever silent, which is half a second.
    const SILENCE: Duration = Duration::from_secs(5);

    async fn check_silence(systemd: &Systemd) {
        let end = Instant::now() + DEADLINE;
        while let Some(message) = systemd.next(SILENCE).await {
            assert!(Instant::now() < end, "it goes on: {message}");
            assert!(!message.contains("READY=1"), "READY=1 comes once");
        }
    }

    #[tokio::test]
    async fn ingress_whose_main_loop_is_stuck_is_silent() {
        let systemd = Systemd::new();
        let broker = nats::Server::start().await;
        let address = format!("127.0.0.1:{}", port::free());
        let launch = ingress(&broker)
            .env("LITESTRIPE_LISTEN", &address)
            .env("FAILPOINTS", format!("ingress::accepting=1*off->{BLOCKED}"));
        let _ingress = systemd.supervise(launch).start();
        systemd.until("READY=1").await;
        systemd.until(ALIVE).await;
        let get = stripe::client().get(format!("http://{address}/healthz"));
        let _stuck = tokio::spawn(get.send());
        check_silence(&systemd).await;
    }

    /// The first thread goes on. It accepts, and serves all connections but those that the others
    /// take over: the last of these many.
    #[tokio::test]
    async fn ingress_with_another_thread_that_is_stuck_is_silent() {
        const SERVED_BY_THE_FIRST: usize = 32;
        if std::thread::available_parallelism().is_ok_and(|cores| cores.get() == 1) {
            eprintln!("skipped: on one core ingress has one thread");
            return;
        }
        let systemd = Systemd::new();
        let broker = nats::Server::start().await;
        let address = format!("127.0.0.1:{}", port::free());
        let blocked = format!("ingress::connected={SERVED_BY_THE_FIRST}*off->{BLOCKED}");
        let launch = ingress(&broker)
            .env("LITESTRIPE_LISTEN", &address)
            .env("FAILPOINTS", blocked);
        let _ingress = systemd.supervise(launch).start();
        systemd.until("READY=1").await;
        let mut connections = Vec::new();
        for _ in 0..SERVED_BY_THE_FIRST {
            connections.push(TcpStream::connect(&address).await.expect("it listens"));
        }
        // They are accepted in this order, so the first thread has served all before.
        let mut served = BufReader::new(connections.pop().expect("there are several"));
        check_answer(&mut served).await;
        systemd.until(ALIVE).await;
        let _stuck = TcpStream::connect(&address).await.expect("it listens");
        check_silence(&systemd).await;
        check_answer(&mut served).await;
    }

    async fn check_answer(connection: &mut BufReader<TcpStream>) {
        let get = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
        connection.write_all(get).await.expect("it is open");
        let mut line = String::new();
        while !line.contains("HTTP/1.1 200") {
            line.clear();
            let read = timeout(DEADLINE, connection.read_line(&mut line)).await;
            let read = read.expect("it is answered").expect("it can be read");
            assert_ne!(read, 0, "it was closed");
        }
    }

    #[tokio::test]
    async fn worker_whose_main_loop_is_stuck_is_silent() {
        let systemd = Systemd::new();
        let bridge = Bridge::start(Options::new(DatabaseKind::Sqlite).workers(0)).await;
        let launch = worker(&bridge).env("FAILPOINTS", format!("worker::consuming={BLOCKED}"));
        let _worker = systemd.supervise(launch).start();
        systemd.until(ALIVE).await;
        systemd.until("READY=1").await;
        // Its pages are served by other threads.
        check_silence(&systemd).await;
    }
}
