#!/usr/bin/env python3
"""Tries the image and compose.yml with a container engine: `scripts/check-deploy --run [--before REF]`.

Builds the image of REF (default: HEAD) and of the working tree, starts the first, sends the story of `send`, upgrades,
kills each container once while the story is sent, scales workers, and rolls back. After each step the rows must be
those that the events lead to, and nothing may be left over. Everything has a name of its own (project
litestripe-check) and is removed at the end; the two images and the build's cache stay.

The engine is the command in CONTAINER_ENGINE, else docker, podman or nerdctl; it has to know `build` and `compose`.
"""
import argparse, collections, concurrent.futures, json, os, pathlib, re, secrets, shutil, socket, subprocess, sys, tempfile, time, uuid

DEADLINE = 180  # Seconds for a container to be healthy again, and for events to be applied.
PROJECT = "litestripe-check"
OURS = ("image", "migrate", "ingress", "worker")  # Services that run our image.
# What a story's rows have in common, whatever its ids and times. `client_reference_id` and `ended_at` show the end.
SHAPE = ("status", "client_reference_id", "cancel_at_period_end", "livemode", "uncertain", "metadata", "subscription_metadata")

top = pathlib.Path(__file__).resolve().parent.parent
options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options.add_argument("--before", default="HEAD", metavar="REF", help="the state of the image before (default: HEAD)")
before_ref = options.parse_args().before
began, report = time.monotonic(), []


def fail(why):
    sys.exit(f"check-deploy --run: {why}")


def run(*command, check=True, **more):
    found = subprocess.run(command, capture_output=True, text=True, **more)
    if check and found.returncode:
        fail(f"`{' '.join(map(str, command))}` failed with {found.returncode}:\n{(found.stdout + found.stderr)[-4000:]}")
    return found


def find_engine():
    wanted = os.environ.get("CONTAINER_ENGINE")
    for name in [wanted] if wanted else ["docker", "podman", "nerdctl"]:
        if shutil.which(name) and not run(name, "info", check=False).returncode and not run(name, "compose", "version", check=False).returncode:
            return name
    fail(f"no container engine: {wanted or 'docker, podman and nerdctl'} with `info` and `compose` is not there or does not run. "
         "Start one, or name its command in CONTAINER_ENGINE (DOCKER_HOST names docker's socket)")


def step(what):
    """Reports the step that has just been done."""
    global began
    report.append((what, time.monotonic() - began))
    print(f"ok  {report[-1][1]:6.1f} s  {what}", flush=True)
    began = time.monotonic()


class Tree:
    """A state of the repository, with its image."""

    def __init__(self, name, ref=None):
        self.folder, self.tag = work / name, f"{PROJECT}:{name}"
        self.folder.mkdir()
        if ref:
            archive = subprocess.run(["git", "archive", ref], cwd=top, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", self.folder], input=archive, check=True)
        else:
            files = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=top).stdout.split("\0")
            for file in filter(None, files):
                if (top / file).exists():
                    (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(top / file, self.folder / file)
        # It would ask a registry for the parser of the Dockerfile; the one that the engine has does.
        dockerfile = self.folder / "deploy/Dockerfile"
        dockerfile.write_text(re.sub(r"^# syntax=.*\n", "", dockerfile.read_text()))
        services = {name: {"image": self.tag} for name in OURS if re.search(rf"^  {name}:$", (self.folder / "compose.yml").read_text(), re.M)}
        (self.folder / "check.json").write_text(json.dumps({"services": services}))

    def build(self):
        run(engine, "build", "-q", "-f", self.folder / "deploy/Dockerfile", "-t", self.tag, self.folder, env=os.environ | {"DOCKER_BUILDKIT": "1"})

    def compose(self, *arguments, **more):
        return run(engine, "compose", "-p", PROJECT, "--env-file", work / "env", "-f", self.folder / "compose.yml", "-f", self.folder / "check.json", *arguments, **more)

    def up(self, workers, *more):
        self.compose("up", "-d", "--no-build", "--wait", "--wait-timeout", str(DEADLINE), "--scale", f"worker={workers}", *more)

    def containers(self, service):
        return self.compose("ps", "-q", service).stdout.split()

    def check_secrets(self):
        """Checks that no container's configuration shows a secret."""
        containers = self.compose("ps", "-aq").stdout.split()
        shown = run(engine, "inspect", *containers).stdout
        files = [file for file in (self.folder / "secrets").iterdir() if file.stat().st_size]
        for file in files:
            if file.read_text() in shown:
                fail(f"`inspect` shows secrets/{file.name}")
        step(f"`inspect` of {len(containers)} containers shows none of {len(files)} secrets")

    def sql(self, query):
        return self.compose("exec", "-T", "postgres", "psql", "-U", "litestripe", "-Atc", query).stdout

    def rows(self, table="stripe_subscription", key="stripe_subscription_id"):
        rows = json.loads(self.sql(f"SELECT coalesce(json_agg(t), '[]') FROM {table} t"))
        return {row[key]: row for row in rows}

    def settled(self):
        """Waits until everything is applied and signalled, and returns the rows and the orphans."""
        end, status = time.monotonic() + DEADLINE, {}
        while time.monotonic() < end:
            found = self.compose("exec", "-T", "worker", "litestripe-worker", "status", "--json", check=False)
            status = json.loads(found.stdout) if found.returncode == 0 else {"error": found.stderr.strip()}
            if all(status.get(field) == 0 for field in ("lag", "pending_acks", "outbox", "unsent_signals")):
                break
            time.sleep(0.5)
        else:
            fail(f"not everything is applied after {DEADLINE} s: {json.dumps(status, indent=1)}")
        if status["dead_letters"] or status["problems"]:
            fail(f"dead letters or problems: {json.dumps(status, indent=1)}")
        return self.rows(), self.rows("orphaned_payment", "id")


def story():
    run(send, "story", "--retry-s", str(DEADLINE), cwd=work, env=os.environ | settings | {"LITESTRIPE_LISTEN": address})


def stories_during(action, *arguments):
    """Sends one story after the other, as long as `action` takes, and returns how many."""
    count = 0
    with concurrent.futures.ThreadPoolExecutor() as threads:
        acting = threads.submit(action, *arguments)
        while not acting.done():
            story()
            count += 1
        acting.result()
    return count


def shapes(rows, orphans, count=1):
    """Returns how often each kind of row and orphan is there, divided by `count`."""
    kinds = [json.dumps([row[field] for field in SHAPE], sort_keys=True) for row in rows]
    counted = collections.Counter(kinds + [orphan["reason"] for orphan in orphans])
    return {kind: number / count for kind, number in counted.items()}


def check_stories(tree, count, known, what):
    """Compares what the newest stories have led to with the first one, and all older rows with what they were."""
    found = tree.settled()
    for older, all_now in zip(known, found):
        check_same(older, all_now, what)
    new = shapes(*([row for key, row in all_now.items() if key not in older] for older, all_now in zip(known, found)), count)
    if new != first:
        fail(f"{what}: {count} stories led to other rows than the first one: {json.dumps(new, indent=1)} instead of {json.dumps(first, indent=1)}")
    step(f"{what}: {count} {'story' if count == 1 else 'stories'} more, {len(found[0])} rows and {len(found[1])} orphans in all")
    return found


def check_same(before, after, what):
    for key, row in before.items():
        now = {field: after.get(key, {}).get(field) for field in row}
        if now != row:
            different = {field: (value, now[field]) for field, value in row.items() if now[field] != value}
            fail(f"{what}: the row {key} changed: {different}")


def crash(service, container):
    """Kills all processes in the container but its init, as a crash would; its restart policy starts it again."""
    look = lambda: json.loads(run(engine, "inspect", container).stdout)[0]["State"]
    started, end = look()["StartedAt"], time.monotonic() + DEADLINE
    run(engine, "exec", container, "sh", "-c", "kill -KILL -1", check=False)
    while time.monotonic() < end:
        state = look()
        if state["StartedAt"] != started and state["Health"]["Status"] == "healthy":
            return
        time.sleep(0.2)
    fail(f"{service} is not healthy {DEADLINE} s after it was killed: {state}")


def remove_streams_of_no_account():
    """CHANGELOG.md, "Before you upgrade", from a broker whose users had no accounts. A roll back keeps the accounts."""
    if "\naccounts {" in (before.folder / "deploy/nats.conf").read_text():
        return
    before.compose("stop")
    now.compose("run", "--rm", "--no-deps", "--entrypoint", "rm", "nats", "-r", "/data/jetstream/$G")
    for file in ("nats.conf", "nats-start"):
        shutil.copy(now.folder / "deploy" / file, before.folder / "deploy" / file)
    step("the broker's streams of no account are removed")


engine = find_engine()
run("cargo", "build", "--quiet", "-p", "litestripe-demo", "--bin", "send", cwd=top)
send = top / os.environ.get("CARGO_TARGET_DIR", "target") / "debug/send"
with tempfile.TemporaryDirectory() as folder:
    work = pathlib.Path(folder)
    before, now = Tree("before", before_ref), Tree("now")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    required = {name for tree in (before, now) for name in re.findall(r"\$\{([A-Z0-9_]+):\?", (tree.folder / "compose.yml").read_text())}
    settings = {name: secrets.token_hex(32) for name in required | {"JS_KEY", "POSTGRES_PASSWORD"}} | {
        "STRIPE_WEBHOOK_UUID": str(uuid.uuid4()), "STRIPE_WEBHOOK_SECRET": f"whsec_{secrets.token_hex(16)}",
        "LITESTRIPE_PUBLISH": address, "LITESTRIPE_EVENTS_MAX_BYTES": "256MiB"}
    (work / "env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    for tree in (before, now):
        if (tree.folder / "deploy/make-secrets").exists():
            shutil.copy(work / "env", tree.folder / ".env")
            run(tree.folder / "deploy/make-secrets")
    began = time.monotonic()
    try:
        before.build()
        step(f"image of {before_ref} built ({run('git', 'rev-parse', '--short', before_ref, cwd=top).stdout.strip()})")
        now.build()
        step("image of the working tree built")
        now.compose("down", "-v", "--remove-orphans")

        before.up(1)
        step("the image before is up and healthy, with one worker")
        story()
        known = before.settled()
        first = shapes(*(each.values() for each in known))
        step(f"the first story is applied and signalled: {len(known[0])} rows, {len(known[1])} orphan")

        remove_streams_of_no_account()
        now.up(2)
        check_same(known[0], now.settled()[0], "upgrade")
        step("upgraded to the image of the working tree, with two workers; the rows are the same")
        now.check_secrets()
        story()
        known = check_stories(now, 1, known, "after the upgrade")

        for service in ("ingress", "worker", "nats", "postgres"):
            for number, container in enumerate(now.containers(service), 1):
                count = stories_during(crash, service, container)
                known = check_stories(now, count, known, f"{service} {number} killed, and healthy again")

        for workers in (4, 1):
            now.up(workers, "--no-recreate")
            if len(now.containers("worker")) != workers:
                fail(f"{len(now.containers('worker'))} workers run instead of {workers}")
            story()
            known = check_stories(now, 1, known, f"scaled to {workers} worker{'s' * (workers > 1)}")

        before.up(1)
        check_same(known[0], before.settled()[0], "roll back")
        step("rolled back to the image before; the rows are the same")
        story()
        check_stories(before, 1, known, "after the roll back")
    except BaseException:
        print(now.compose("logs", "--no-color", "--tail", "40", check=False).stdout[-20000:], file=sys.stderr)
        raise
    finally:
        now.compose("down", "-v", "--remove-orphans", "--timeout", "30", check=False)
    size = json.loads(run(engine, "image", "inspect", now.tag).stdout)[0]["Size"]
print(f"{time.strftime('%Y-%m-%d')}, {run(engine, '--version').stdout.strip()}, {run(engine, 'compose', 'version').stdout.strip()}, "
      f"{os.uname().machine}, image of {size >> 20} MiB; check-deploy --run: all {len(report)} steps ok")
