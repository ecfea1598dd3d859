"""What a model server, or what stands in its place, can do to a worker: answers without limit.

    python benchmarks/hostile.py                    all of them, one after another, each to a new gunicorn
    python benchmarks/hostile.py line bomb          these
    python benchmarks/hostile.py --root ../other    of another checkout, such as one of the release before

Prints for each how the run ended and after how many seconds, the longest time that the worker took for an ordinary
request meanwhile, and the most memory that it had. A run may take five seconds. The model server is a thread of this
process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
MEGABYTES = 300
HEAD = b"HTTP/1.1 %b\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n%b\r\n"
STREAM = HEAD % (b"200 OK", b"text/event-stream", b"")
BEGIN = b'data: {"type":"response.output_text.delta","delta":"'
END = b'"}\n\ndata: {"type":"response.completed","response":{"status":"completed"}}\n\n'
DELTA = b'data: {"type":"response.output_text.delta","delta":"%b"}\n\n' % (b"word " * 4)


def make_app() -> Any:
    """Give the app, for gunicorn: settings come in APP_CONFIG."""
    from flask import Flask, jsonify

    from assistream_flask import Assistant, create_blueprint

    app = Flask("hostile")
    app.config.update(json.loads(os.environ["APP_CONFIG"]))
    app.register_blueprint(create_blueprint([Assistant("a", model="m")], owner=lambda: "me"), url_prefix="/assistream")

    @app.get("/up")
    def up() -> Any:
        return jsonify(os.getpid())

    return app


# The model server's answers


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _chunks(head: bytes, piece: bytes, end: bytes = b": end\n\n") -> Iterator[bytes]:
    yield head
    piece *= 65_536 // len(piece)
    for _ in range((MEGABYTES << 20) // len(piece)):
        yield _chunk(piece)
    yield _chunk(end) + b"0\r\n\r\n"


def line() -> Iterator[bytes]:
    """Give an event of one line."""
    return _chunks(STREAM + _chunk(BEGIN), b"a", END)


@functools.cache
def make_bomb() -> bytes:
    """Compress it, once."""
    return gzip.compress(BEGIN + b"a" * (MEGABYTES << 20) + END)


def bomb() -> Iterator[bytes]:
    """Give the same in few bytes."""
    body = make_bomb()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    yield head % len(body) + body


def flood() -> Iterator[bytes]:
    """Give deltas, as fast as they are taken."""
    return _chunks(STREAM, DELTA, DELTA.removesuffix(b'"}\n\n') + END)


def heartbeats() -> Iterator[bytes]:
    """Give what says nothing, as fast as it is taken."""
    return _chunks(STREAM, b": ping\n\n")


def lines() -> Iterator[bytes]:
    """Give an event of very many lines."""
    return _chunks(STREAM, b"data: 1\n")


def parts() -> Iterator[bytes]:
    """Give an answer of very many parts, all at once."""
    content = [{"type": "output_text", "text": "a"}] * 50_000
    response = {"status": "completed", "output": [{"type": "message", "content": content}]}
    event = f"data: {json.dumps({'type': 'response.completed', 'response': response})}\n\n".encode()
    yield STREAM + _chunk(event) + b"0\r\n\r\n"


def error() -> Iterator[bytes]:
    """Give an error that has no end."""
    return _chunks(HEAD % (b"500 Oh", b"application/json", b""), b"a")


CASES: dict[str, Callable[[], Iterator[bytes]]] = {
    one.__name__: one for one in (line, bomb, flood, heartbeats, lines, parts, error)
}


def send(peer: socket.socket, answer: Callable[[], Iterator[bytes]]) -> None:
    """Send an answer whole, and wait until the peer has closed. Raises ``OSError``."""
    for piece in answer():
        peer.sendall(piece)
    # A close with something unread would be a reset.
    peer.shutdown(socket.SHUT_WR)
    while peer.recv(65_536):
        pass


def serve(listening: socket.socket, answer: Callable[[], Iterator[bytes]]) -> None:
    """Answer every request so, each on a connection of its own."""
    while True:
        try:
            peer, _ = listening.accept()
        except OSError:
            return
        with peer, contextlib.suppress(OSError):
            peer.recv(65_536)
            send(peer, answer)


# What the worker does meanwhile


def ask(port: int, method: str, path: str, body: Any = None) -> Any:
    """Give what the app answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def up(port: int) -> int:
    """Wait for the worker; give its process's id."""
    end = time.monotonic() + 30
    while True:
        try:
            return int(ask(port, "GET", "/up"))
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def measure(name: str, root: Path) -> None:
    """Have one run answered so, and print what became of it."""
    listening, place = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(listening, CASES[name]), daemon=True).start()
    port = place.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = {"ASSISTREAM_DATABASE_URL": f"sqlite:///{folder}/x.sqlite3", "ASSISTREAM_RUN_SECONDS": 5}
        env = {
            **os.environ,
            "APP_CONFIG": json.dumps({"SECRET_KEY": "only for a benchmark", **config}),
            "OPENAI_BASE_URL": f"http://127.0.0.1:{listening.getsockname()[1]}/v1",
            "PYTHONPATH": os.pathsep.join([str(root), str(HERE.parent)]),
        }
        options = ["-k", "gevent", "--log-level", "critical", "-b", f"fd://{place.fileno()}", "hostile:make_app()"]
        worker = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options],
            cwd=folder,
            env=env,
            pass_fds=[place.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            _measure(name, port)
        finally:
            worker.terminate()
            worker.wait()
            listening.close()
            place.close()


def _measure(name: str, port: int) -> None:
    pid = up(port)
    thread = ask(port, "POST", "/assistream/threads", {})["id"]
    path = f"/assistream/threads/{thread}"
    begun = time.monotonic()
    body = {"assistant_ids": ["a"], "content": "Hi"}
    (run,) = ask(port, "POST", f"{path}/runs", body)["runs"]
    pauses: list[float] = []
    over = threading.Event()
    looking = threading.Thread(target=_look, args=(port, over, pauses))
    looking.start()
    while run["status"] in ("queued", "in_progress"):
        time.sleep(0.05)
        try:
            (entry,) = ask(port, "GET", f"{path}/messages?limit=1")["data"]
        except (OSError, http.client.HTTPException):
            # A worker that is killed; another comes.
            continue
        run = entry["run"]
    ended = time.monotonic()
    time.sleep(1)
    over.set()
    looking.join()
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        print(f"{name:10} gunicorn took the worker for dead, and killed it, after {ended - begun:5.1f} s", flush=True)
        return
    most = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
    how = (run["last_error"] or run["incomplete_details"] or {"code": ""}).copy()
    word = how.get("code") or how.get("reason") or ""
    print(
        f"{name:10} {run['status']:10} {word:22} after {ended - begun:5.1f} s, longest pause {max(pauses):6.2f} s, "
        f"memory {int(most.split()[1]) // 1024:5} MB",
        flush=True,
    )


def _look(port: int, over: threading.Event, pauses: list[float]) -> None:
    while not over.wait(0.02):
        before = time.monotonic()
        with contextlib.suppress(OSError, http.client.HTTPException):
            ask(port, "GET", "/up")
        pauses.append(time.monotonic() - before)


def main() -> None:
    """Read what is to be done, and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="case", help=", ".join(CASES))
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help="the checkout that is measured")
    wanted = parser.parse_args()
    # It takes longer to make than to read.
    make_bomb()
    for name in wanted.cases or CASES:
        measure(name, wanted.root.resolve())


if __name__ == "__main__":
    main()
