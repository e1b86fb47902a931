"""Shows what each user of deploy/nats.conf may do, by doing it at a real nats-server: no less than the programs need,
and nothing else. Prints one line per check, and exits with 1 if one fails.

A permission is there if the server takes a message or subscription without an error; the answer to the PING that
follows proves that it has.
"""

import asyncio
import contextlib
import hashlib
import hmac
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import nats
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from broker import ROOT, USERS, WITNESS, Broker, Checks

EVENTS, SIGNALS, LETTERS, BUCKET = "STRIPE_EVENTS", "LITESTRIPE_SIGNALS", "STRIPE_DEAD_LETTERS", "KV_litestripe"
STREAMS = {
    EVENTS: ["stripe.events.>"],
    SIGNALS: ["subscription.changed", "orphan.created", "orphan.resolved"],
    LETTERS: ["stripe.dead.>"],
    BUCKET: ["$KV.litestripe.>"],
}
UPDATED = "customer.subscription.updated"
SECRET = "whsec_of_these_checks"
# Stands in every raw event.
PERSON = b"jane.doe@example.com"

# Who may publish to which subject, besides JetStream's API. Every user is refused the rest of these.
WORKERS = {"worker", "operator"}
PUBLISH = {
    f"stripe.events.{UPDATED}": WORKERS | {"ingress"},
    "stripe.events.checkout.session.completed": WORKERS | {"ingress"},
    "stripe.events.customer.deleted": WORKERS | {"ingress"},
    "stripe.events.invoice.paid": {"ingress"},
    f"stripe.events.v1.{UPDATED}": {"ingress"},
    "stripe.events.litestripe.snapshot": WORKERS,
    "stripe.events.litestripe.resolution": WORKERS,
    "stripe.events.litestripe.erasure": WORKERS,
    "stripe.events.litestripe.other": set(),
    f"stripe.dead.{UPDATED}": WORKERS,
    "stripe.dead.unknown": WORKERS,
    "subscription.changed": WORKERS,
    "orphan.created": WORKERS,
    "orphan.resolved": WORKERS,
    "orphan.other": set(),
    "app.users.known": {"worker"},
    "$KV.litestripe.installation": WORKERS,
    "$KV.other.key": set(),
    "$JS.ACK.STRIPE_EVENTS.litestripe-worker.1.1.1.1.0": WORKERS,
    "$JS.ACK.STRIPE_EVENTS.litestripe-replay.1.1.1.1.0": WORKERS,
    "$JS.ACK.STRIPE_EVENTS.litestripe-replay-dry-1.1.1.1.1.0": WORKERS,
    "$JS.ACK.STRIPE_DEAD_LETTERS.other.1.1.1.1.0": set(),
    "$JS.ACK.LITESTRIPE_SIGNALS.my-app.1.1.1.1.0": {"reader"},
    "$JS.EVENT.ADVISORY.API": set(),
    "$SYS.REQ.SERVER.PING": set(),
    "$SYS.REQ.USER.INFO": WORKERS,
    "anything.else": set(),
} | {f"_INBOX_{user}.x": set() for user in USERS}

# The requests of JetStream's API about a stream {s} and a consumer.
API = [
    *(f"STREAM.{verb}.{{s}}" for verb in ("INFO", "CREATE", "UPDATE", "DELETE", "PURGE", "SNAPSHOT", "RESTORE")),
    *(f"STREAM.{verb}.{{s}}" for verb in ("MSG.GET", "MSG.DELETE", "LEADER.STEPDOWN", "PEER.REMOVE")),
    *("DIRECT.GET.{s}", "DIRECT.GET.{s}.$KV.litestripe.installation", "CONSUMER.NAMES.{s}", "CONSUMER.LIST.{s}"),
    *("CONSUMER.CREATE.{s}", "CONSUMER.CREATE.{s}.x", "CONSUMER.CREATE.{s}.x.filter", "CONSUMER.DURABLE.CREATE.{s}.x"),
    *(f"CONSUMER.{verb}.{{s}}.x" for verb in ("INFO", "MSG.NEXT", "DELETE", "PAUSE", "RESET", "UNPIN", "LEADER.STEPDOWN")),
]
GENERAL = ["INFO", "STREAM.NAMES", "STREAM.LIST", "SERVER.REMOVE", "SERVER.STREAM.MOVE.A.S", "ACCOUNT.PURGE.A", "META.LEADER.STEPDOWN"]


def api_rights():
    """Returns who may send which request to JetStream's API."""
    rights = {f"$JS.API.{name}": set() for name in GENERAL}
    rights |= {f"$JS.API.{name.format(s=s)}": set() for name, s in itertools.product(API, [*STREAMS, "OTHER"])}

    def allow(users, names, streams=(None,)):
        for name, stream in itertools.product(names, streams):
            rights[f"$JS.API.{name.format(s=stream)}"] |= users

    allow(WORKERS | {"reader", "monitor"}, ["INFO"])
    allow(WORKERS, ["STREAM.INFO.{s}", "STREAM.CREATE.{s}"], STREAMS)
    allow(WORKERS, ["STREAM.MSG.GET.{s}"], [EVENTS, LETTERS, BUCKET])
    allow(WORKERS, ["DIRECT.GET.{s}.$KV.litestripe.installation"], [BUCKET])
    allow(WORKERS, ["STREAM.MSG.DELETE.{s}"], [EVENTS, SIGNALS, LETTERS])
    reading = ["CONSUMER.CREATE.{s}.x", "CONSUMER.INFO.{s}.x", "CONSUMER.MSG.NEXT.{s}.x"]
    allow(WORKERS, [*reading, "CONSUMER.DELETE.{s}.x"], [EVENTS, SIGNALS, LETTERS])
    allow({"worker"}, ["STREAM.PURGE.{s}"], [EVENTS])
    allow({"ingress"}, ["STREAM.INFO.{s}", "STREAM.CREATE.{s}"], [EVENTS])
    subscribing = ["CONSUMER.CREATE.{s}.x.filter", "CONSUMER.DURABLE.CREATE.{s}.x"]
    allow({"reader"}, ["STREAM.INFO.{s}", *reading, *subscribing], [SIGNALS])
    allow({"operator", "monitor"}, ["STREAM.NAMES", "STREAM.LIST"])
    allow({"operator", "monitor"}, ["CONSUMER.NAMES.{s}", "CONSUMER.LIST.{s}"], [*STREAMS, "OTHER"])
    allow({"monitor"}, ["STREAM.INFO.{s}", "CONSUMER.INFO.{s}.x"], [*STREAMS, "OTHER"])
    return rights


SUBSCRIBE = {
    **{f"_INBOX_{user}.>": {user} for user in USERS},
    "app.users.known": {"reader"},
    "$JS.EVENT.ADVISORY.>": {"monitor"},
    **{subject: set() for subject in (">", "*.>", "_INBOX.>", "_INBOX.*.*", "stripe.>", f"stripe.events.{UPDATED}")},
    **{subject: set() for subject in ("stripe.dead.>", "subscription.changed", "orphan.*", "app.>", "$KV.>", "$SYS.>")},
    **{subject: set() for subject in ("$JS.>", "$JS.API.>", "$JS.ACK.>", "$JS.EVENT.>")},
}


class User:
    """A connection of one user, as its program makes it."""

    def __init__(self, name):
        self.name, self.errors, self.heard = name, [], []

    async def connect(self, broker, password=None):
        async def on_error(error):
            self.errors.append(str(error))

        self.client = await nats.connect(
            broker.url(),
            user=self.name,
            password=password or broker.password(self.name),
            inbox_prefix=f"_INBOX_{self.name}".encode(),
            allow_reconnect=False,
            error_cb=on_error,
        )
        self.js = self.client.jetstream(timeout=5)
        return self

    async def is_refused(self, act):
        """Whether the server refuses what `act` sends."""
        await self.settle()
        self.errors.clear()
        await act
        await self.settle()
        return any("permissions violation" in error for error in self.errors)

    async def settle(self):
        """Returns once the server has taken everything that was sent."""
        # nats-py writes the PING of a flush before what is pending. The second one comes after that.
        await self.client.flush()
        await self.client.flush()

    async def may_publish(self, subject, body=b"", reply=""):
        return not await self.is_refused(self.client.publish(subject, body, reply=reply))

    async def may_subscribe(self, subject):
        subscriptions = []

        async def act():
            subscriptions.append(await self.client.subscribe(subject))

        refused = await self.is_refused(act())
        await subscriptions[0].unsubscribe()
        return not refused

    async def listen(self, subject):
        """Keeps what arrives."""

        async def on_message(message):
            self.heard.append(message.data)

        await self.client.subscribe(subject, cb=on_message)
        await self.settle()

    async def api(self, request, body=None):
        answer = await self.client.request(f"$JS.API.{request}", json.dumps(body or {}).encode(), timeout=5)
        return json.loads(answer.data)


def signed(body):
    now = int(time.time())
    digest = hmac.new(SECRET.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    return {"Stripe-Signature": f"t={now},v1={digest}", "Litestripe-Received-At": "2026-01-01T00:00:00.000Z"}


def event(event_type, number):
    content = {"id": f"evt_{number}", "object": "event", "type": event_type, "data": {"object": {"email": PERSON.decode()}}}
    return json.dumps(content).encode()


async def programs_can_work(checks, users):
    """What ingress, worker and an application do all day."""
    ingress, worker, reader = users["ingress"], users["worker"], users["reader"]
    config = {"retention": "limits", "storage": "file", "allow_direct": True, "max_bytes": 1 << 24}
    created = await ingress.api(f"STREAM.CREATE.{EVENTS}", {**config, "name": EVENTS, "subjects": STREAMS[EVENTS]})
    checks.check("ingress creates STRIPE_EVENTS", "error" not in created, created)
    for name, subjects in STREAMS.items():
        created = await worker.api(f"STREAM.CREATE.{name}", {**config, "name": name, "subjects": subjects})
        checks.check(f"worker creates or finds {name}", "error" not in created, created)
    for user in ("ingress", "reader", "monitor"):
        await users[user].listen(f"_INBOX_{user}.>")
    await users["monitor"].listen("$JS.EVENT.ADVISORY.>")

    body = event(UPDATED, 1)
    ack = await ingress.js.publish(f"stripe.events.{UPDATED}", body, headers=signed(body) | {"Nats-Msg-Id": "evt_1"})
    checks.check("ingress gets the PubAck of an event", ack.stream == EVENTS and ack.seq == 1, ack)
    for number, event_type in [(2, f"v1.{UPDATED}"), (3, "invoice.paid")]:
        body = event(event_type, number)
        await ingress.js.publish(f"stripe.events.{event_type}", body, headers=signed(body))
    durable = ConsumerConfig(name="litestripe-worker", durable_name="litestripe-worker", ack_policy=AckPolicy.EXPLICIT)
    await worker.js.add_consumer(EVENTS, durable)
    pull = await worker.js.pull_subscribe_bind(durable="litestripe-worker", stream=EVENTS)
    events = await pull.fetch(3, timeout=5)
    checks.check("worker fetches the events", len(events) == 3 and all(PERSON in one.data for one in events))
    for one in events:
        await one.ack_sync(timeout=5)
    info = await worker.js.consumer_info(EVENTS, "litestripe-worker")
    checks.check("worker's acks count", info.ack_floor.stream_seq == 3, info)
    snapshot = event("litestripe.snapshot", 4)
    await worker.js.publish("stripe.events.litestripe.snapshot", snapshot, headers={"Litestripe-Source": "snapshot"})
    backfilled = event(UPDATED, 5)
    await worker.js.publish(f"stripe.events.{UPDATED}", backfilled, headers={"Litestripe-Source": "backfill"})
    await worker.js.publish(f"stripe.dead.{UPDATED}", event(UPDATED, 6))
    checks.check("worker stores its own events, backfilled ones and dead letters", True)
    await worker.js.publish("$KV.litestripe.installation", b"id")
    read = await worker.client.request(f"$JS.API.DIRECT.GET.{BUCKET}.$KV.litestripe.installation", timeout=5)
    checks.check("worker reads and writes its bucket", read.data == b"id")

    application = ConsumerConfig(durable_name="my-app", ack_policy=AckPolicy.EXPLICIT, filter_subjects=STREAMS[SIGNALS])
    await reader.js.add_consumer(SIGNALS, application)
    subscribed = await reader.js.pull_subscribe_bind("my-app", SIGNALS)
    await worker.js.publish("subscription.changed", b'{"revision":1}')
    (signal,) = await subscribed.fetch(1, timeout=5)
    await signal.ack_sync(timeout=5)
    checks.check("reader receives a signal and acks it", signal.data == b'{"revision":1}')
    pushed = await reader.js.subscribe("subscription.changed", stream=SIGNALS, durable="pushed")
    signal = await pushed.next_msg(timeout=5)
    await signal.ack_sync(timeout=5)
    checks.check("reader is sent a signal and acks it", signal.data == b'{"revision":1}')

    async def answer(request):
        await request.respond(b'{"known": true}')

    lookups = await reader.client.subscribe("app.users.known", cb=answer)
    await reader.settle()
    known = await worker.client.request("app.users.known", b"user_1", timeout=5)
    checks.check("reader answers the worker's user lookup", known.data == b'{"known": true}')
    await lookups.unsubscribe()


async def commands_can_work(checks, operator):
    """What the commands of litestripe-worker do at the broker."""
    replay = ConsumerConfig(name="litestripe-replay", durable_name="litestripe-replay", ack_policy=AckPolicy.EXPLICIT)
    await operator.js.add_consumer(EVENTS, replay)
    pull = await operator.js.pull_subscribe_bind(durable="litestripe-replay", stream=EVENTS)
    for one in await pull.fetch(5, timeout=5):
        await one.ack_sync(timeout=5)
    await operator.js.delete_consumer(EVENTS, "litestripe-replay")
    checks.check("operator replays", True)
    letter = await operator.js.get_msg(LETTERS, 1)
    checks.check("operator shows and drops a dead letter", await operator.js.delete_msg(LETTERS, letter.seq))
    resolution = event("litestripe.resolution", 7)
    await operator.js.publish("stripe.events.litestripe.resolution", resolution, headers={"Litestripe-Source": "resolution"})
    await operator.js.publish("subscription.changed", b'{"revision":2}')
    checks.check("operator resolves and resends", True)


async def events_stay_private(checks, broker, users):
    """No way to a raw event for those who do not need it."""
    worker = users["worker"]
    for name in ("ingress", "reader", "monitor"):
        user = users[name]
        for subject in ("_INBOX.>", "_INBOX_worker.>", "_INBOX_operator.>", "stripe.events.>"):
            checks.check(f"{name} cannot listen on {subject}", await user.is_refused(user.listen(subject)))
    # All the ways on which events travel, once more.
    pull = await worker.js.pull_subscribe_bind(durable="litestripe-worker", stream=EVENTS)
    for one in await pull.fetch(3, timeout=5):
        await one.ack()
    await worker.js.get_msg(EVENTS, 1)
    reader = users["reader"]
    # The stream in the subject is allowed, the one in the body is not meant.
    request = {"stream_name": EVENTS, "config": {"name": "my-app-2", "ack_policy": "none"}}
    answer = await reader.api(f"CONSUMER.CREATE.{SIGNALS}.my-app-2", request)
    checks.check("reader cannot name STRIPE_EVENTS in the body of a request about its own stream", "error" in answer, answer)
    for request in (f"STREAM.INFO.{EVENTS}", f"CONSUMER.CREATE.{EVENTS}.my-app", f"STREAM.MSG.GET.{EVENTS}", f"DIRECT.GET.{EVENTS}"):
        checks.check(f"reader is refused {request}", not await reader.may_publish(f"$JS.API.{request}", b'{"seq":1}'))
    await asyncio.sleep(0.2)
    for name in ("ingress", "reader", "monitor"):
        heard = users[name].heard
        checks.check(f"{name} has heard {len(heard)} messages, and no raw event", not any(PERSON in one for one in heard))
    pages = broker.monitoring("varz") + broker.monitoring("connz?auth=1&subs=1") + broker.monitoring("jsz?streams=1&consumers=1&config=1")
    secrets = [*map(broker.password, USERS), "key-of-the-store", PERSON.decode()]
    checks.check("the monitoring port shows no password, key or event", "ingress" in pages and not any(one in pages for one in secrets))


async def answers_are_no_requests(checks, users):
    """The server takes some of its own answers for requests, if a client has them sent there: the status of a fetch that
    finds nothing, a PubAck. It checks no reply subject. What keeps applications and monitoring from that are their
    accounts, and what keeps ingress from it that nothing it gets is a valid request.
    """
    ingress, reader, monitor, witness = (users[name] for name in ("ingress", "reader", "monitor", WITNESS))

    async def state():
        return {one.config.name: (one.state.messages, one.state.last_seq) for one in await witness.js.streams_info()}

    await reader.js.add_consumer(SIGNALS, ConsumerConfig(name="empty", deliver_policy=DeliverPolicy.NEW, ack_policy=AckPolicy.NONE))
    before = await state()
    targets = [f"$JS.API.STREAM.{verb}.{stream}" for verb in ("DELETE", "PURGE") for stream in STREAMS]
    targets += [f"$JS.API.CONSUMER.DELETE.{EVENTS}.litestripe-worker", "$KV.litestripe.installation", f"stripe.events.{UPDATED}"]
    for target in targets:
        for wait in ({"no_wait": True}, {"expires": 10**8}):
            fetch = json.dumps({"batch": 1} | wait).encode()
            await reader.may_publish(f"$JS.API.CONSUMER.MSG.NEXT.{SIGNALS}.empty", fetch, target)
        for user in (reader, monitor):
            await user.may_publish("$JS.API.INFO", b"", target)
        heartbeat = {"deliver_subject": target, "deliver_policy": "new", "ack_policy": "none", "idle_heartbeat": 10**8}
        await reader.api(f"CONSUMER.CREATE.{SIGNALS}.beats", {"stream_name": SIGNALS, "config": heartbeat | {"name": "beats"}})
        await asyncio.sleep(0.3)
        await witness.js.delete_consumer(SIGNALS, "beats")
    checks.check("reader and monitor cannot have an answer sent as a request, or stored", await state() == before, await state())
    requests = [target for target in targets if target.startswith("$JS.API")]
    for request in requests:
        await ingress.may_publish("stripe.events.invoice.paid", event("invoice.paid", 9), request)
    before[EVENTS] = tuple(count + len(requests) for count in before[EVENTS])
    for _ in range(3000):
        if await state() == before:
            break
        await asyncio.sleep(0.02)
    checks.check("ingress cannot have a PubAck taken for a request", await state() == before, await state())
    there = await witness.js.consumer_info(EVENTS, "litestripe-worker")
    checks.check("the worker's consumer is still there", there.name == "litestripe-worker")


async def forgeries_are_found(checks, broker, users):
    """A worker may store events that Stripe did not sign. `scripts/verify-events` tells them apart."""

    def verify():
        settings = {"NATS_URL": broker.url(), "NATS_USER": "operator", "NATS_PASSWORD": broker.password("operator")}
        settings |= {"STRIPE_WEBHOOK_SECRET": f"whsec_older,{SECRET}"}
        command = [sys.executable, ROOT / "scripts/verify-events"]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, output = await asyncio.to_thread(verify)
    checks.check("verify-events finds nothing wrong with what the programs store", code == 0 and "3 signed by Stripe" in output, output)
    worker, witness = users["worker"], users[WITNESS]
    last = (await witness.js.stream_info(EVENTS)).state.last_seq
    genuine = await witness.js.get_msg(EVENTS, 1)
    body = event(UPDATED, 8)
    old = {"Stripe-Signature": f"t={int(time.time()) - 7200},v1={'0' * 64}"}
    wrong = {"Stripe-Signature": f"t={int(time.time())},v1={'0' * 64}"}
    taken = {"Stripe-Signature": genuine.headers["Stripe-Signature"]}
    forged = [
        ("a signature of its own", f"stripe.events.{UPDATED}", body, wrong),
        ("an old one", f"stripe.events.{UPDATED}", body, old),
        ("the signature of another event", f"stripe.events.{UPDATED}", body, taken),
        ("no signature and no source", f"stripe.events.{UPDATED}", body, None),
        ("another type than its subject says", "stripe.events.litestripe.snapshot", body, {"Litestripe-Source": "snapshot"}),
    ]
    for _, subject, content, headers in forged:
        await worker.js.publish(subject, content, headers=headers)
    # nats-server does not check the reply subject of a request: whatever it answers, it stores there.
    letter = await worker.js.publish(f"stripe.dead.{UPDATED}", body, headers=wrong)
    reply = "stripe.events.v1.forged"
    await worker.may_publish(f"$JS.API.STREAM.MSG.GET.{LETTERS}", json.dumps({"seq": letter.seq}).encode(), reply)
    forged.append(("an answer of the server", reply, None, None))
    # A delivered message is not taken for a request. The status of an empty fetch is: docs/permissions.md.
    await worker.js.publish(f"stripe.dead.{UPDATED}", b"")
    empty = ConsumerConfig(name="empty", ack_policy=AckPolicy.NONE, deliver_policy=DeliverPolicy.LAST)
    await worker.js.add_consumer(LETTERS, empty)
    for request in (f"STREAM.DELETE.{EVENTS}", f"STREAM.PURGE.{EVENTS}"):
        await worker.may_publish(f"$JS.API.CONSUMER.MSG.NEXT.{LETTERS}.empty", b"1", f"$JS.API.{request}")
    for _ in range(100):
        if (await witness.js.stream_info(EVENTS)).state.last_seq == last + len(forged):
            break
        await asyncio.sleep(0.02)
    code, output = await asyncio.to_thread(verify)
    for number, (what, *_) in enumerate(forged, last + 1):
        checks.check(f"verify-events lists a forged event with {what}", code == 3 and f"event {number} of" in output, output)
    checks.check("and no other", f"{len(forged)} that nobody vouches for" in output, output)


async def rights_are_exact(checks, users):
    """Every subject, by every user. The last checks, because what is allowed is done."""
    for subject, allowed in SUBSCRIBE.items():
        found = {name for name in USERS if await users[name].may_subscribe(subject)}
        checks.check(f"subscribe {subject}: {', '.join(sorted(allowed)) or 'nobody'}", found == allowed, f"found {sorted(found)}")
    for subject, allowed in (PUBLISH | api_rights()).items():
        found = {name for name in USERS if await users[name].may_publish(subject)}
        checks.check(f"publish {subject}: {', '.join(sorted(allowed)) or 'nobody'}", found == allowed, f"found {sorted(found)}")
    streams = {stream.config.name for stream in await users[WITNESS].js.streams_info()}
    checks.check("all streams are still there", streams == set(STREAMS), streams)


async def nobody_else_connects(checks, broker):
    refused = []

    async def ignore(error):
        pass

    for name, password in [(None, None), ("ingress", "wrong"), ("worker", broker.password("ingress")), ("other", "x")]:
        try:
            connection = {"user": name, "password": password} if name else {}
            client = await nats.connect(broker.url(), allow_reconnect=False, error_cb=ignore, connect_timeout=2, **connection)
            await client.close()
        except (nats.errors.Error, OSError):
            refused.append(name)
    checks.check("without a user and its password nobody connects", len(refused) == 4, refused)


async def check_all(broker, checks):
    users = {name: await User(name).connect(broker) for name in (*USERS, WITNESS)}
    await nobody_else_connects(checks, broker)
    await programs_can_work(checks, users)
    await commands_can_work(checks, users["operator"])
    await events_stay_private(checks, broker, users)
    await forgeries_are_found(checks, broker, users)
    await answers_are_no_requests(checks, users)
    await rights_are_exact(checks, users)
    for user in users.values():
        await user.client.close()


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="litestripe-permissions-") as folder:
        broker = Broker(pathlib.Path(folder))
        broker.start("key-of-the-store")
        with contextlib.ExitStack() as stack:
            stack.callback(broker.end)
            if not broker.until_ready():
                sys.exit(f"the broker does not start:\n{broker.end()}")
            try:
                asyncio.run(check_all(broker, checks))
            except (nats.errors.Error, OSError) as error:
                refused = [line for line in broker.log.read_text().splitlines() if "Violation" in line]
                checks.check("everything is answered", False, f"{error!r}; the server's last refusal: {refused[-1:]}")
    print(f"permissions: {checks.failed} problems")
    sys.exit(bool(checks.failed))


if __name__ == "__main__":
    main()
