"""Gunicorn in a subprocess, on a free port, with a deadline."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.programs import free_port

ROOT = Path(__file__).resolve().parent.parent

APP = """
import gc, json, os, time
import greenlet
from flask import Flask, jsonify
from assistream_flask import Assistant, create_blueprint, event_response
from assistream_flask.testing import FAULTS, OfflineServer

app = Flask(__name__)
app.config.update(SECRET_KEY="only for tests", **json.loads(os.environ["APP_CONFIG"]))
servers = []

def client():
    servers.append(OfflineServer(delay=float(os.environ.get("APP_DELAY", "0.02"))).start())
    return servers[0].client()

assistants = [
    Assistant(dialect + ("-" + fault if fault else ""), model="offline-" + fault if fault else "m", upstream=dialect,
              **({"assistant_id": "asst_offline-" + fault} if fault and dialect == "assistants" else {}))
    for dialect in ("responses", "chat", "assistants") for fault in ("", *FAULTS)
]
app.register_blueprint(create_blueprint(assistants, client=client, owner=lambda: "me"), url_prefix="/assistream")

@app.get("/asked")
def asked():
    return jsonify([[r.path, r.disconnected, r.closed_at is not None] for r in servers[0].requests] if servers else [])

@app.get("/left")
def left():
    gc.collect()
    alive = [o for o in gc.get_objects() if isinstance(o, greenlet.greenlet) and not o.dead]
    return jsonify(greenlets=len(alive), files=len(os.listdir("/proc/self/fd")), pid=os.getpid())

@app.get("/relay")
def relay():
    return event_response(client().responses.create(model="m", input="Hi", stream=True))

@app.get("/page")
def page():
    return "<!doctype html><title>test</title>"

@app.get("/pid")
def pid():
    return jsonify(os.getpid())
"""


def answered(request: urllib.request.Request | str) -> bytes:
    """Give the body of the answer. What it raises for a status of 400 or above holds its body, and no socket: one that
    is left to the garbage collector fails whatever test is the next."""
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            body = io.BytesIO(error.read())
        raise urllib.error.HTTPError(error.url, error.code, error.reason, error.headers, body) from None


class Gunicorn:
    """One gunicorn with one gevent worker, and a caller of the app in it."""

    def __init__(
        self,
        folder: Path,
        *,
        delay: float = 0.02,
        app: str = APP,
        worker_class: str = "gevent",
        workers: int = 1,
        options: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        self._options = ["-k", worker_class, "-w", str(workers), *(options or ())]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        (folder / "live_app.py").write_text(app)
        settings.setdefault("database_url", f"sqlite:///{folder / 'live.sqlite3'}")
        config = {f"ASSISTREAM_{name.upper()}": value for name, value in settings.items()}
        self.env = {**os.environ, "APP_CONFIG": json.dumps(config), "APP_DELAY": str(delay)}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and waits until it answers."""
        # Its script, not -m: what it starts itself anew (SIGUSR2) would look for modules in its own folder.
        script = str(Path(sys.executable).with_name("gunicorn"))
        command = [script, *self._options, "-b", f"127.0.0.1:{self.port}"]
        command += ["--no-control-socket", "live_app:app"]
        with open(self._folder / "gunicorn.log", "ab") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, env=self.env, stdout=log, stderr=log)
        # Four that import the app at once, on two busy cores.
        end = time.monotonic() + 60
        while True:
            try:
                self.get("/page", parse=False)
                return
            except OSError:
                assert time.monotonic() < end, self.log()
                assert self._process.poll() is None, self.log()
                time.sleep(0.05)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it: with SIGKILL the worker too, as a crash would."""
        if how == signal.SIGKILL:
            for pid in self.workers():
                os.kill(pid, how)
        self.process.send_signal(how)
        self.process.wait(40)

    def workers(self) -> list[int]:
        """Give the pids of its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def log(self) -> str:
        """Give all that it has logged."""
        return (self._folder / "gunicorn.log").read_text()

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Give the JSON answer. Raises ``urllib.error.HTTPError`` for a status of 400 or above."""
        data = None if body is None else json.dumps(body).encode()
        head = {"Content-Type": "application/json", **(headers or {})}
        text = answered(urllib.request.Request(self.url + path, data=data, method=method, headers=head))
        return json.loads(text) if text else None

    def get(self, path: str, *, parse: bool = True) -> Any:
        text = answered(self.url + path)
        return json.loads(text) if parse else text

    def thread(self) -> str:
        """Create a thread, gives its path."""
        return "/assistream/threads/" + str(self.request("POST", "/assistream/threads", {})["id"])

    def run(self, thread: str, *assistant_ids: str, content: str = "Hello there") -> list[str]:
        """Start runs, gives their ids."""
        body = {"assistant_ids": assistant_ids, "content": content}
        return [run["id"] for run in self.request("POST", f"{thread}/runs", body)["runs"]]

    def entries(self, thread: str) -> list[Any]:
        found: list[Any] = self.get(f"{thread}/messages?limit=200")["data"]
        return found

    def settled(self, thread: str, seconds: float = 40) -> list[Any]:
        """Wait until all runs of the thread are over, through restarts; give its entries."""
        start = time.monotonic()
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                entries = self.entries(thread)
                over = ("completed", "incomplete", "failed", "cancelled")
                if all(entry["run"]["status"] in over for entry in entries if entry["run"]):
                    return entries
            waited = time.monotonic() - start
            assert waited < seconds, self.log()
            time.sleep(min(0.1 + waited / 10, 2))


class Event:
    """One received event."""

    def __init__(self, name: str, id: str | None, data: Any) -> None:
        self.name, self.id, self.data = name, id, data


def stream(gunicorn: Gunicorn, path: str, *, last: str | None = None, by: str = "header") -> Iterator[Event]:
    """Read an event stream, until its clean end; raises ``OSError`` or ``HTTPException`` for a broken one."""
    headers = {}
    if last is not None and by == "header":
        headers["Last-Event-ID"] = last
    elif last is not None:
        path += f"?last_event_id={last}"
    connection = http.client.HTTPConnection("127.0.0.1", gunicorn.port, timeout=40)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        while answer.status == 503:
            answer.read()
            time.sleep(float(answer.headers["Retry-After"]))
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
        assert answer.status == 200, answer.status
        name, id, data = "", None, ""
        for raw in answer:
            line = raw.decode().rstrip("\n")
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "id":
                id = value
            elif field == "data":
                data = value
            elif not line and data:
                if data != "[DONE]":
                    yield Event(name, id, json.loads(data))
                name, id, data = "", None, ""
    finally:
        connection.close()


@contextlib.contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Gunicorn]:
    """Give a started gunicorn, ended whatever happens."""
    gunicorn = Gunicorn(folder, **settings)
    try:
        gunicorn.start()
        yield gunicorn
    finally:
        if gunicorn.process.poll() is None:
            gunicorn.stop()
