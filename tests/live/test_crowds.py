"""Many viewers, slow ones and dead ones: none of them takes what another needs."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import subprocess
import sys
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.crowd import network_of_its_own
from tests.conftest import wait_until
from tests.gunicorn_server import Gunicorn, running, stream

APP = """
import json, os
from flask import Flask, jsonify, request
from assistream_flask import Assistant, create_blueprint
from assistream_flask.testing import OfflineServer

app = Flask(__name__)
app.config.update(json.loads(os.environ["APP_CONFIG"]))
servers = []

def client():
    servers.append(OfflineServer(" ".join(f"word{n}" for n in range(3000)), delay=0).start())
    return servers[0].client()

def owner():
    return "me"

assistants = [Assistant(id, model="m") for id in ("one", "two", "three")]
app.register_blueprint(create_blueprint(assistants, client=client, owner=owner), url_prefix="/assistream")

@app.get("/open")
def opened():
    return jsonify(app.extensions["assistream"].runtime().open_streams)

@app.get("/page")
def page():
    return "up"
"""
HEARTBEAT = 0.5


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Gunicorn]:
    # Heartbeats are long, so that what is cut is so for its slowness.
    with running(tmp_path, app=APP, slow_seconds=1) as gunicorn:
        yield gunicorn


def view(live: Gunicorn, thread: str, *, buffer: int | None = None) -> socket.socket:
    """Give a connection on which the thread's stream has begun, but not one byte was read."""
    viewer = socket.socket()
    if buffer is not None:
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    before = live.get("/open")
    viewer.connect(("127.0.0.1", live.port))
    viewer.sendall(f"GET {thread}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    wait_until(lambda: live.get("/open") == before + 1)
    return viewer


def kept_for(viewer: socket.socket) -> int:
    """Give the bytes that the system holds on the server's side of a connection."""
    here, there = (f"{address[1]:04X}" for address in (viewer.getpeername(), viewer.getsockname()))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if local.endswith(f":{here}") and remote.endswith(f":{there}"):
            return int(queues.partition(":")[0], 16)
    return 0


def refused(live: Gunicorn, path: str) -> tuple[int, str, int]:
    """Give the status, the code and Retry-After of an error."""
    with pytest.raises(urllib.error.HTTPError) as found:
        live.get(path)
    answer = found.value
    return answer.code, json.load(answer)["error"]["code"], int(answer.headers["Retry-After"])


def test_a_viewer_that_stops_reading_is_cut_and_another_of_the_thread_gets_everything(live: Gunicorn) -> None:
    thread = live.thread()
    with view(live, thread, buffer=4096) as stuck:
        events = stream(live, f"{thread}/events")
        next(events)
        runs = set(live.run(thread, "one", "two", "three"))
        held, sent, texts = 0, 0, dict[str, str]()
        while runs:
            event = next(events)
            sent += len(json.dumps(event.data))
            if event.name == "thread.message.delta":
                (part,) = event.data["delta"]["content"]
                texts[event.data["id"]] = texts.get(event.data["id"], "") + part["text"]["value"]
                if len(texts[event.data["id"]]) % 50 == 0:
                    held = max(held, kept_for(stuck))
            elif event.name == "thread.run.completed":
                runs.remove(event.data["id"])
        wait_until(lambda: live.get("/open") == 1)
    assert sent > 1 << 20, "it was too little to fill any buffer"
    assert 1 << 16 < held < 1 << 20
    assert [text.split() for text in texts.values()] == 3 * [[f"word{n}" for n in range(3000)]]


def test_a_viewer_that_reads_slowly_gets_a_page_of_a_thread_of_megabytes(live: Gunicorn) -> None:
    thread = live.thread()
    for number in range(30):
        live.request("POST", f"{thread}/messages", {"content": f"{number} " + "x" * 99_000})
    with view(live, thread, buffer=4096) as slow, http.client.HTTPResponse(slow) as answer:
        answer.begin()
        frame, start = b"", time.monotonic()
        while not frame.endswith(b"\n\n"):
            frame += answer.read1(8192)
            time.sleep(0.03)
        assert time.monotonic() - start > 1, "it was not slow"
    snapshot = json.loads(frame.partition(b"\ndata: ")[2].partition(b"\n")[0])
    assert snapshot["has_more"]
    assert snapshot["data"][-1]["message"]["content"][0]["text"]["value"].startswith("29 ")
    assert len(frame) < 1 << 20


@pytest.mark.parametrize("linger", [False, True], ids=["closed", "reset"])
def test_a_caller_at_its_limit_is_refused_until_a_viewer_has_left(tmp_path: Path, linger: bool) -> None:
    with running(tmp_path, app=APP, heartbeat_seconds=HEARTBEAT, max_streams=2) as live:
        thread = live.thread()
        viewers = [view(live, thread), view(live, thread)]
        status, code, seconds = refused(live, f"{thread}/events")
        assert (status, code) == (429, "too_many_streams")
        assert seconds > 0
        for viewer in viewers:
            if linger:
                viewer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            viewer.close()
        wait_until(lambda: live.get("/open") == 0)
        view(live, thread).close()


def test_at_the_workers_limit_streams_are_told_to_come_again_and_commands_are_answered(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        options = ["--worker-connections", "10"]
        live = stack.enter_context(running(tmp_path, app=APP, heartbeat_seconds=HEARTBEAT, options=options))
        thread = live.thread()
        viewers = [stack.enter_context(view(live, thread)) for _ in range(9)]
        status, code, seconds = refused(live, f"{thread}/events")
        assert (status, code) == (503, "server_full")
        assert seconds > 0
        message = live.request("POST", f"{thread}/messages", {"content": "Is there room?"})["message"]
        assert live.entries(thread)[-1]["message"]["id"] == message["id"]
        viewers[0].close()
        wait_until(lambda: live.get("/open") == 8)
        view(live, thread).close()


ANONYMOUS = APP.replace("client=client, owner=owner", "client=client").replace(
    "app.config.update(", 'app.config.update(SECRET_KEY="only for tests", **', 1
)


class Visitor:
    """One at an address of this machine's, with a name and a thread of their own."""

    def __init__(self, live: Gunicorn, address: str, leaving: contextlib.ExitStack) -> None:
        self._live, self._from, self._leaving = live, (address, 0), leaving
        answer = self._ask("POST", "/assistream/threads")
        self._cookie = (answer.headers["Set-Cookie"] or "").partition(";")[0]
        self._thread = f"/assistream/threads/{json.load(answer)['id']}"

    def _ask(self, method: str, path: str, timeout: float = 30, **headers: str) -> http.client.HTTPResponse:
        line = http.client.HTTPConnection("127.0.0.1", self._live.port, timeout=timeout, source_address=self._from)
        self._leaving.callback(line.close)
        line.request(method, path, headers=headers)
        answer = line.getresponse()
        self._leaving.callback(answer.close)
        return answer

    def watch(self, timeout: float = 30) -> http.client.HTTPResponse:
        return self._ask("GET", f"{self._thread}/events", timeout, Cookie=self._cookie)


def test_of_a_full_worker_the_heaviest_address_gives_a_place_to_another_address(tmp_path: Path) -> None:
    # Heartbeats are long, so that what ends was told to.
    options = ["--worker-connections", "40"]
    with (
        running(tmp_path, app=ANONYMOUS, heartbeat_seconds=60, options=options) as live,
        contextlib.ExitStack() as leaving,
    ):
        streams = []
        for at in range(36):
            visitor = Visitor(live, "127.0.0.8", leaving)
            streams.append(visitor.watch(timeout=1 if at else 30))
            assert streams[-1].status == 200
        more = visitor.watch()
        assert (more.status, json.load(more)["error"]["code"]) == (503, "server_full")
        newcomer = Visitor(live, "127.0.0.9", leaving).watch()
        assert (newcomer.status, newcomer.readline()) == (200, b"retry: 1000\n")
        # It ends cleanly: the chunks have their last one.
        assert b"thread.snapshot" in streams[0].read()
        assert live.get("/open") == 36
        # Who comes back takes nobody's place.
        assert visitor.watch().status == 503
        with pytest.raises(TimeoutError):
            streams[1].read()


VANISHING = """
import socket, sys, time
viewer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
viewer.sendall(f"GET {sys.argv[3]}/events HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n".encode())
print(viewer.recv(100)[:15], flush=True)
while viewer.recv(65536):
    pass
"""


def test_the_slot_of_a_viewer_that_vanished_without_a_word_is_free_after_two_heartbeats(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(network_of_its_own())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no second network can be had: {error}")
        with socket.create_server((network.host, 0)) as free:
            port = free.getsockname()[1]
        options = ["-b", f"{network.host}:{port}"]
        live = stack.enter_context(running(tmp_path, app=APP, heartbeat_seconds=HEARTBEAT, options=options))
        thread = live.thread()
        command = [*network.enter, sys.executable, "-c", VANISHING, network.host, str(port), thread]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as viewer:
            stack.callback(viewer.wait)
            stack.callback(viewer.kill)
            assert viewer.stdout
            assert viewer.stdout.readline() == b"b'HTTP/1.1 200 OK'\n"
            time.sleep(3 * HEARTBEAT)
            assert live.get("/open") == 1
            network.vanish()
            wait_until(lambda: live.get("/open") == 0)
            assert viewer.poll() is None
            viewer.kill()
