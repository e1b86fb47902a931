"""Shows that deploy/nats-start starts the broker only with the store's own key, changes that key, and loses nothing if
it is killed meanwhile. Prints one line per check, and exits with 1 if one fails.
"""

import asyncio
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import nats
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from broker import WITNESS, Broker, Checks

EVENTS = 400
STREAMS = {"STRIPE_EVENTS": ["stripe.events.>"], "LITESTRIPE_SIGNALS": ["subscription.changed"], "EMPTIED": ["emptied"]}
# Never holds a message. nats-server does not carry it over.
UNUSED = "STRIPE_DEAD_LETTERS"
BODY = b"event " + b"x" * 5000
KILLS = 6


async def connect(broker):
    client = await nats.connect(broker.url(), user=WITNESS, password=WITNESS)
    return client, client.jetstream(timeout=10)


async def fill(broker):
    client, js = await connect(broker)
    for name, subjects in STREAMS.items():
        await js.add_stream(name=name, subjects=subjects)
    for number in range(EVENTS):
        await js.publish(f"stripe.events.type_{number % 7}", BODY + str(number).encode())
    await js.publish("subscription.changed", b"{}")
    await js.add_stream(name=UNUSED, subjects=["stripe.dead.>"])
    for sequence in (1, 2):
        await js.publish("emptied", b"{}")
        await js.delete_msg("EMPTIED", sequence)
    for sequence in (3, 7, EVENTS):
        await js.delete_msg("STRIPE_EVENTS", sequence)
    durable = ConsumerConfig(name="litestripe-worker", durable_name="litestripe-worker", ack_policy=AckPolicy.EXPLICIT)
    await js.add_consumer("STRIPE_EVENTS", durable)
    await client.close()


async def content(broker):
    """Returns what the streams hold, by sequence."""
    client, js = await connect(broker)
    found = {}
    for name in STREAMS:
        last = (await js.stream_info(name)).state.last_seq
        for sequence in range(1, last + 1):
            try:
                found[name, sequence] = (await js.get_msg(name, sequence)).data
            except NotFoundError:
                found[name, sequence] = None
    await client.close()
    return found


async def make_worker_consumer(broker):
    """Returns how many events a consumer of the worker's name delivers that is made now."""
    client, js = await connect(broker)
    durable = ConsumerConfig(name="litestripe-worker", durable_name="litestripe-worker", ack_policy=AckPolicy.EXPLICIT)
    info = await js.add_consumer("STRIPE_EVENTS", durable)
    await client.close()
    return info.num_pending


def starts(broker, *keys, **others):
    """Returns what the streams hold once the broker runs with these keys, and stops it. None if it refuses to run."""
    broker.start(*keys, **others)
    found = asyncio.run(content(broker)) if broker.until_ready() else None
    broker.end()
    return found


def refuses(checks, broker, what, reason, *keys, **others):
    found, log = starts(broker, *keys, **others), broker.log.read_text(errors="replace")
    checks.check(f"refuses {what}", found is None and reason in log, log)


def crashes(checks, broker, before):
    """Kills it, with all that it has started, at moments spread over a change of the key."""
    saved = broker.folder / "saved"
    shutil.copytree(broker.store, saved)
    begin = time.monotonic()
    starts(broker, "second", "first")
    took = time.monotonic() - begin
    for number in range(KILLS):
        shutil.rmtree(broker.store)
        shutil.copytree(saved, broker.store)
        moment = took * (number + random.random()) / KILLS
        broker.start("second", "first")
        time.sleep(moment)
        broker.end(signal.SIGKILL)
        # The operator goes on, or takes the change back. Once the copy has its hash, the change is made.
        old = broker.folder / "saved/key.sha256"
        changed = (broker.store / "rekeyed/key.sha256").exists() or (broker.store / "key.sha256").read_bytes() != old.read_bytes()
        what = f"killed after {moment:.2f} s, {'after' if changed else 'before'} the change"
        if number % 2 and not changed:
            found = starts(broker, "first")
            checks.check(f"{what}: starts with the old key and has everything", found == before)
        found = starts(broker, "second", "first")
        checks.check(f"{what}: ends the change and has everything", found == before)
        left = sorted(path.name for path in broker.store.iterdir())
        checks.check(f"{what}: leaves nothing behind", left == ["jetstream", "key.sha256"], left)


def replacements(checks, broker, before):
    """The moments between two steps of putting the copy into the store's place, which are too short to hit."""
    store = broker.store
    steps = {
        "the store is moved away": lambda: (store / "jetstream").rename(store / "replaced"),
        "the copy is moved in": lambda: (store / "rekeyed/jetstream").rename(store / "jetstream"),
        "its hash is moved in": lambda: (store / "rekeyed/key.sha256").rename(store / "key.sha256"),
        "the copy's folder is removed": lambda: (store / "rekeyed").rmdir(),
    }
    old, new = broker.folder / "saved", broker.folder / "changed"
    shutil.rmtree(store)
    shutil.copytree(old, store)
    starts(broker, "second", "first")
    shutil.copytree(store, new)
    for done in range(1, len(steps) + 1):
        # The old store, and beside it the complete copy: what a change leaves just before it replaces the store.
        shutil.rmtree(store)
        shutil.copytree(old, store)
        shutil.copytree(new, store / "rekeyed")
        for step in list(steps.values())[:done]:
            step()
        found = starts(broker, "second")
        checks.check(f"killed once {list(steps)[done - 1]}: has everything", found == before)


def check_all(broker, checks):
    broker.start("first")
    if not broker.until_ready():
        sys.exit(f"the broker does not start:\n{broker.end()}")
    asyncio.run(fill(broker))
    before = asyncio.run(content(broker))
    broker.end()
    wrong = "not the key that the store is encrypted with"
    refuses(checks, broker, "another key", wrong, "second")
    refuses(checks, broker, "another key with a wrong previous one", wrong, "second", "third")
    refuses(checks, broker, "another key with an empty previous one", wrong, "second", "")
    refuses(checks, broker, "an empty key", "JS_KEY is empty", "")
    files = {name: broker.folder / name for name in ("key", "other", "lines", "empty")}
    for file, text in zip(files.values(), ("first\n", "second\n", "first\nline\n", "\n")):
        file.write_text(text)
    # As in compose.yml, where the previous key is an empty file.
    previous = {"JS_KEY_PREVIOUS_FILE": str(files["empty"])}
    checks.check("starts with its key from a file", starts(broker, "", JS_KEY_FILE=str(files["key"]), **previous) == before)
    refuses(checks, broker, "another key from a file", wrong, "", JS_KEY_FILE=str(files["other"]), **previous)
    refuses(checks, broker, "a key and a file", "JS_KEY and JS_KEY_FILE are both set", "first", JS_KEY_FILE=str(files["key"]))
    refuses(checks, broker, "a file of several lines", "several lines", "", JS_KEY_FILE=str(files["lines"]))
    refuses(checks, broker, "an empty file", "JS_KEY is empty", "", JS_KEY_FILE=str(files["empty"]))
    refuses(checks, broker, "a missing file", "cannot read the file of JS_KEY_FILE", "", JS_KEY_FILE="/nowhere")
    checks.check("starts with its key, whatever the previous one is", starts(broker, "first", "third") == before)
    earlier = broker.store / "jetstream/$G/streams"
    earlier.mkdir(parents=True)
    refuses(checks, broker, "a store with streams of no account", "of an earlier version", "first")
    shutil.rmtree(earlier.parent)
    crashes(checks, broker, before)
    replacements(checks, broker, before)
    refuses(checks, broker, "the old key after the change", wrong, "first")
    broker.start("second")
    if broker.until_ready():
        count = asyncio.run(make_worker_consumer(broker))
        checks.check("the worker's consumer can be made anew and delivers everything", count == EVENTS - 3, count)
    broker.end()


def main():
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="litestripe-rekey-") as folder:
        broker = Broker(pathlib.Path(folder))
        try:
            check_all(broker, checks)
        finally:
            broker.end(signal.SIGKILL)
    print(f"rekey: {checks.failed} problems")
    sys.exit(bool(checks.failed))


if __name__ == "__main__":
    main()
