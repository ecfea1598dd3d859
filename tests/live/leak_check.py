"""Many runs that end in every way, and what is left after them: ``python -m tests.live.leak_check gevent|threads``."""

from __future__ import annotations

import sys

if sys.argv[1] == "gevent":
    from gevent import monkey

    monkey.patch_all()

import gc
import json
import logging
import os
import random
import tempfile
import threading
import time
from typing import Any

import greenlet
import httpx2
import openai
from flask import Flask

from assistream_flask import Assistant, create_blueprint, event_response
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, text, wait_until

RUNS = int(sys.argv[2]) if len(sys.argv) > 2 else 100
WAYS = (
    "fine",
    "cut",
    "cancel stall",
    "429",
    "error_nested",
    "cancel stall_headers",
    "malformed",
    "ends_early",
    "leave",
    "stall",
    "relay",
    "relay left",
    "delete",
    "viewer",
    "storm",
    "function_call",
)


class Checked:
    def __init__(self, server: OfflineServer, app: Flask, client: openai.OpenAI) -> None:
        self.server, self.app, self.client = server, app, client
        self.runs = 0
        self.slowest = 0.0

    def one(self, way: str) -> None:
        server = self.server
        fault = way.removeprefix("cancel ")
        steady = Reply("one two three four", delay=0.01)
        server.replies = Reply("one two three", fault=fault) if fault in FAULTY else steady
        self.runs += 1
        if way.startswith("relay"):
            self.relay(way)
            return
        caller = Caller(self.app)
        before = len(server.requests)
        if way == "leave":
            self.leave(caller)
        elif way == "storm":
            self.storm(caller)
        else:
            viewer = caller.client.get(f"{caller.url}/events") if way == "viewer" else None
            frames = iter(viewer.iter_encoded()) if viewer else None
            [run] = caller.run(("tutor", "poet", "asst_1")[self.runs % 3])
            if frames and viewer:
                next(frames), next(frames)
                viewer.close()
            if way.startswith("cancel"):
                server.wait_for(before + 1)
                if fault == "stall":
                    wait_until(lambda: text(caller.entry(run)))
                at = time.monotonic()
                caller.cancel(run)
                if sys.argv[1] == "gevent" or fault == "stall":
                    request = server.requests[before]
                    assert request.wait()
                    assert request.closed_at is not None
                    self.slowest = max(self.slowest, request.closed_at - at)
            if way == "delete":
                caller.client.delete(caller.url)
                return
        caller.wait()

    def leave(self, caller: Caller) -> None:
        body = {"assistant_ids": ["tutor"], "content": "Hi"}
        answer = caller.client.post(f"{caller.url}/runs", json=body, headers={"Accept": "text/event-stream"})
        next(iter(answer.iter_encoded()))
        answer.close()

    def storm(self, caller: Caller) -> None:
        runs = caller.run("tutor", "poet", "asst_1", "tutor", "poet")
        self.runs += len(runs) - 1
        for run in runs:
            time.sleep(random.random() * 0.02)
            caller.cancel(run)

    def relay(self, way: str) -> None:
        fault = "stall" if way == "relay left" else None
        self.server.replies = Reply("one two three", fault=fault)
        stream = self.client.responses.create(model="m", input="Hi", stream=True)
        response = event_response(stream, heartbeat_seconds=0.05)
        frames = response.iter_encoded()
        if way == "relay":
            assert b"[DONE]" in b"".join(frames)
        else:
            next(frames), next(frames)
        response.close()


FAULTY = ("cut", "429", "error_nested", "malformed", "ends_early", "stall", "stall_headers", "function_call")


# The database's pool keeps a few connections, as many as were ever needed at once. A thread of the system that waited
# for a lock of gevent once keeps a loop, which is two files: ``loops`` counts those.
KEPT = ("socket:", "anon_inode:")


def fd_is_open(fd: str) -> bool:
    """Tell whether it is not the one that listed them all."""
    return os.path.lexists(f"/proc/self/fd/{fd}")


def is_ours(thing: greenlet.greenlet) -> bool:
    """Tell whether it is of this thread: those of gevent's pool, which looks up names, come and go by themselves."""
    top = thing
    while top.parent:
        top = top.parent
    return top is greenlet.getcurrent()


def open_files() -> list[str]:
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd_is_open(fd)]


def left() -> dict[str, Any]:
    gc.collect()
    live = [thing for thing in gc.get_objects() if isinstance(thing, greenlet.greenlet) and not thing.dead]
    files = open_files()
    return {
        "sockets": sum(name.startswith("socket:") for name in files),
        "files": sum(not name.startswith(KEPT) and ".sqlite3" not in name for name in files),
        "threads": sorted(thread.name for thread in threading.enumerate() if "Dummy" not in thread.name),
        "greenlets": sum(map(is_ours, live)),
    }


def settled(wanted: dict[str, Any]) -> dict[str, Any]:
    """Give what is left, once nothing goes away any more."""
    end = time.monotonic() + 15
    found: dict[str, Any] = {}
    while time.monotonic() < end:
        last, found = found, left()
        if found == (wanted or last):
            break
        time.sleep(0.1 if wanted else 1.5)
    return found


def main() -> None:
    logging.disable(logging.CRITICAL)
    # Without idle connections the counts are exact.
    transport = httpx2.Client(limits=httpx2.Limits(max_keepalive_connections=0), timeout=20)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        with OfflineServer(delay=0) as server, server.client(http_client=transport) as client:
            app = Flask("app", instance_path=folder)
            app.config.update(
                SECRET_KEY="only for tests",
                ASSISTREAM_STALL_SECONDS=0.4,
                ASSISTREAM_HEARTBEAT_SECONDS=0.05,
                ASSISTREAM_DRAIN_SECONDS=0,
                ASSISTREAM_MAX_RUNS=1000,
            )
            assistants = [
                Assistant("tutor", model="m"),
                Assistant("poet", model="m", upstream="chat"),
                Assistant("asst_1", upstream="assistants"),
            ]
            app.register_blueprint(create_blueprint(assistants, client=client), url_prefix="/assistream")
            checked = Checked(server, app, client)
            for way in WAYS:
                checked.one(way)
            results["before"] = settled({})
            checked.runs = 0
            while checked.runs < RUNS:
                for way in WAYS:
                    checked.one(way)
            results["after"] = settled(results["before"])
            results["loops"] = open_files().count("anon_inode:[eventpoll]")
            app.extensions["assistream"].close()
        results["closed"] = settled({})
    print(json.dumps({**results, "runs": checked.runs, "slowest": checked.slowest}))


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore", DeprecationWarning)
    main()
