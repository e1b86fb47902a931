"""Runs nats-server with deploy/nats.conf as deploy/nats-start starts it, on free ports and a store of its own.

The server is $LITESTRIPE_NATS_SERVER, else nats-server from PATH.
"""

import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SERVER = os.environ.get("LITESTRIPE_NATS_SERVER") or shutil.which("nats-server")
USERS = ("ingress", "worker", "operator", "reader", "monitor")

# Sees and may do everything: looks at what the others have done.
WITNESS = "witness"


# One UDP socket per port that this process has reserved.
taken = []


def free_port():
    """Reserves a port as harness/demo/src/port.rs does, which says why."""
    while True:
        port, lock = random.randrange(20000, 32000), socket.socket(type=socket.SOCK_DGRAM)
        with contextlib.suppress(OSError), socket.socket() as server:
            lock.bind(("127.0.0.1", port))
            server.bind(("127.0.0.1", port))
            taken.append(lock)
            return port
        lock.close()


def replaced(text, old, new):
    if text.count(old) != 1:
        raise ValueError(f"deploy/nats.conf: {old!r} is there {text.count(old)} times")
    return text.replace(old, new)


class Checks:
    """Prints one line per check and counts those that fail."""

    failed = 0

    def check(self, what, holds, detail=""):
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {what}{f': {detail}' if detail and not holds else ''}", flush=True)


class Broker:
    """The broker, with its files in `folder`."""

    def __init__(self, folder):
        self.folder, self.store = folder, folder / "data"
        self.port, self.http_port = free_port(), free_port()
        self.process, self.log = None, folder / "log"
        text = (ROOT / "deploy/nats.conf").read_text()
        text = replaced(text, '"0.0.0.0:4222"', f'"127.0.0.1:{self.port}"')
        text = replaced(text, '"0.0.0.0:8222"', f'"127.0.0.1:{self.http_port}"')
        text = replaced(text, '"/data"', f'"{self.store}"')
        of_the_streams = "    jetstream: enabled\n    users: [\n"
        text = replaced(text, of_the_streams, f"{of_the_streams}      {{ user: {WITNESS}, password: {WITNESS} }}\n")
        (folder / "nats.conf").write_text(text)
        self.store.mkdir(exist_ok=True)
        # nats-start calls the server by its name.
        (folder / "bin").mkdir(exist_ok=True)
        link = folder / "bin/nats-server"
        if not link.exists():
            link.symlink_to(pathlib.Path(SERVER).resolve())

    def url(self):
        return f"nats://127.0.0.1:{self.port}"

    def password(self, user):
        return WITNESS if user == WITNESS else f"password-of-{user}"

    def start(self, key, previous=None, **others):
        """Starts it with this JS_KEY and JS_KEY_PREVIOUS, which stand in quotes as in compose.yml, and other variables."""
        environment = {f"NATS_{user.upper()}_PASSWORD": f'"{self.password(user)}"' for user in USERS}
        environment |= {"JS_KEY": f'"{key}"'} | ({} if previous is None else {"JS_KEY_PREVIOUS": f'"{previous}"'})
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["sh", ROOT / "deploy/nats-start", self.folder / "nats.conf", self.store],
            env=os.environ | environment | {"PATH": path} | others,
            stdout=subprocess.DEVNULL,
            stderr=self.log.open("wb"),
            start_new_session=True,
        )

    def until_ready(self, seconds=60):
        """Waits until it is healthy. Returns whether it is; not if it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.monitoring("healthz")
                return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        return False

    def monitoring(self, page):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{page}", timeout=5) as answer:
            return answer.read().decode()

    def end(self, how=signal.SIGTERM):
        """Ends it and what it has started. Returns its log."""
        if self.process and self.process.poll() is None:
            if how == signal.SIGKILL:
                os.killpg(self.process.pid, how)
            else:
                self.process.send_signal(how)
        if self.process:
            self.process.wait(30)
        return self.log.read_text(errors="replace")
