"""What a stranger can do to one gevent worker of gunicorn, and what it does to others meanwhile.

    python benchmarks/strangers.py post      messages of 100,000 characters, as fast as they go, for 30 seconds
    python benchmarks/strangers.py slow      1,000 answers that say a word a second, and then another caller's
    python benchmarks/strangers.py sessions  forty sessions of one address start runs, as fast as they go, for 7 seconds
    python benchmarks/strangers.py streams   addresses, one after another, open streams until they are refused
    python benchmarks/strangers.py bodies    2,100 POSTs of whose body a byte comes every five seconds, and then a GET
    python benchmarks/strangers.py headers   the same with GETs whose headers do not end
    python benchmarks/strangers.py readers   60 that ask for 200 messages of 100,000 characters, and read nothing

Prints the worker's resident memory before and after, how many messages were stored and refused, what became of the
other caller's run, or requests, and when the GET was answered; of sessions and streams, how many runs started and
streams opened, and what another address gets then. `--threads N` has N threads a caller post; `--callers N` has so many
callers, or addresses; `--redis` has the event log in a Redis of 64 MB, started for it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PORT = 8124
BODY = (
    b"POST /assistream/threads HTTP/1.1\r\nHost: x\r\nX-Caller: c\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000\r\n\r\n{"metadata":'
)
HEADERS = b"GET /assistream/assistants HTTP/1.1\r\nHost: x\r\nX-Caller: c"


def make_app() -> Any:
    """Give the app, for gunicorn: settings come in APP_CONFIG; where that has a SECRET_KEY, visitors have sessions."""
    from flask import Flask, request

    from assistream_flask import Assistant, create_blueprint

    app = Flask("strangers")
    app.config.update(json.loads(os.environ["APP_CONFIG"]))
    owner = None if app.secret_key else lambda: request.headers.get("X-Caller")
    blueprint = create_blueprint([Assistant("a", model="m")], owner=owner)
    app.register_blueprint(blueprint, url_prefix="/assistream")
    return app


def send(caller: str, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Send one request; give its status and its JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        headers = {"X-Caller": caller, "Content-Type": "application/json"}
        connection.request(method, f"/assistream{path}", None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def worker(pid: int) -> Path:
    """Give what the system tells of gunicorn's worker."""
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return Path("/proc", child)


def resident(pid: int) -> int:
    """Give the memory of the gunicorn's worker, in MiB."""
    status = (worker(pid) / "status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def open_files(pid: int) -> int:
    """Give how many files the worker has open, connections included."""
    return len(list((worker(pid) / "fd").iterdir()))


def post(pid: int, callers: int, threads: int) -> None:
    """Write messages for thirty seconds, in new threads, and a few words of another caller's."""
    found: Counter[str] = Counter()
    others: Counter[str] = Counter()
    until = time.monotonic() + 30

    def work(caller: str) -> None:
        while time.monotonic() < until:
            status, thread = send(caller, "POST", "/threads", {})
            for _ in range(5):
                if status == 201:
                    status, _ = send(caller, "POST", f"/threads/{thread['id']}/messages", {"content": "x" * 100_000})
                    found[str(status)] += 1

    def chat() -> None:
        _, thread = send("another", "POST", "/threads", {})
        path = f"/threads/{thread['id']}/messages"
        while time.monotonic() < until:
            for method, body in (("POST", {"content": "Hi"}), ("GET", None)):
                status, _ = send("another", method, path, body)
                others[str(status)] += 1
            time.sleep(0.1)

    print(f"{resident(pid)} MiB before")
    working = [
        threading.Thread(target=chat),
        *(threading.Thread(target=work, args=(f"c{at % callers}",)) for at in range(callers * threads)),
    ]
    for one in working:
        one.start()
    for one in working:
        one.join()
    print(f"{resident(pid)} MiB after; messages by status: {dict(found)}")
    print(f"another caller's requests by status: {dict(others)}")


@contextlib.contextmanager
def small_redis() -> Iterator[str]:
    """Give the URL of a Redis of 64 MB; print at the end what it holds."""
    import redis

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--maxmemory", "64mb"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
        with redis.Redis(port=port) as client:
            print(f"Redis holds {client.info('memory')['used_memory'] >> 20} MiB")
    finally:
        server.kill()
        server.wait()


def slow(pid: int, callers: int) -> None:
    """Begin a thousand answers that say a word a second, then another caller's."""
    begun = 0
    for at in range(1000):
        caller = f"c{at % max(callers, 25)}"
        _, thread = send(caller, "POST", "/threads", {})
        status, _ = send(caller, "POST", f"/threads/{thread['id']}/runs", {"assistant_ids": ["a"], "content": "slow"})
        begun += status == 202
    _, thread = send("another", "POST", "/threads", {})
    send("another", "POST", f"/threads/{thread['id']}/runs", {"assistant_ids": ["a"], "content": "quick"})
    start, run = time.monotonic(), None
    while time.monotonic() - start < 150:
        _, page = send("another", "GET", f"/threads/{thread['id']}/messages")
        run = page["data"][1]["run"]
        if run["status"] not in ("queued", "in_progress"):
            break
        time.sleep(0.5)
    assert run is not None
    print(
        f"{begun} begun, {resident(pid)} MiB; after {time.monotonic() - start:.0f} s the other caller's run is "
        f"{run['status']}, {run['last_error']}"
    )


class Visitor:
    """One without a name, at an address of this machine's, with a session and a thread of their own."""

    def __init__(self, address: str) -> None:
        self._address, self._headers = address, {"Content-Type": "application/json"}
        answer = self.ask("POST", "/threads", {})
        self.status, self.path = answer.status, ""
        if answer.status == 201:
            self._headers["Cookie"] = str(answer.headers["Set-Cookie"]).partition(";")[0]
            self.path = f"/threads/{json.loads(answer.read())['id']}"
        answer.close()

    def ask(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """Send a request on a connection of its own, which is closed with the answer."""
        line = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60, source_address=(self._address, 0))
        data = None if body is None else json.dumps(body)
        line.request(method, f"/assistream{path}", data, {**self._headers, "Connection": "close"})
        return line.getresponse()

    def post(self) -> int:
        """Ask for an answer; give the status."""
        with self.ask("POST", f"{self.path}/runs", {"assistant_ids": ["a"], "content": "slow"}) as answer:
            return answer.status


def sessions() -> None:
    """Start runs for seven seconds, in forty sessions of one address; then one of another's."""
    found: Counter[int] = Counter()
    visitors = [one for one in (Visitor("127.0.1.1") for _ in range(40)) if one.path]
    until = time.monotonic() + 7

    def work(visitor: Visitor) -> None:
        while time.monotonic() < until:
            found[visitor.post()] += 1

    working = [threading.Thread(target=work, args=(one,)) for one in visitors]
    for one in working:
        one.start()
    for one in working:
        one.join()
    print(f"{len(visitors)} sessions; runs by status: {dict(found)}; another address: {Visitor('127.0.2.1').post()}")


def streams(addresses: int) -> None:
    """Open streams until three sessions in a row get none, at each address in turn; then one from another."""
    held = []
    for at in range(addresses):
        opened, refused, last = 0, 0, 0
        while refused < 3:
            visitor = Visitor(f"127.0.1.{at + 1}")
            for _ in range(50 if visitor.path else 0):
                answer = visitor.ask("GET", f"{visitor.path}/events")
                last = answer.status
                if last != 200:
                    answer.close()
                    break
                held.append(answer)
                opened, refused = opened + 1, -1
            last = last if visitor.path else visitor.status
            refused += 1
        print(f"127.0.1.{at + 1} opened {opened} streams, then {last}")
    visitor = Visitor("127.0.2.1")
    print(f"another address: {visitor.ask('GET', f'{visitor.path}/events').status if visitor.path else visitor.status}")


def connected() -> socket.socket:
    """Give a connection to the worker that takes little at once."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    peer.connect(("127.0.0.1", PORT))
    return peer


def half(pid: int, head: bytes) -> None:
    """Begin 2,100 requests, of which a byte comes every five seconds, and ask for something else."""
    peers, over, answered = [connected() for _ in range(2100)], threading.Event(), list[float]()

    def drip() -> None:
        while not over.wait(5):
            for peer in peers:
                with suppress(OSError):
                    peer.send(b"x", socket.MSG_DONTWAIT)

    for peer in peers:
        peer.sendall(head)
    dripping = threading.Thread(target=drip)
    dripping.start()
    time.sleep(2)
    print(f"{resident(pid)} MiB with all of them")
    start = time.monotonic()
    while not answered and time.monotonic() - start < 120:
        with suppress(OSError):
            send("another", "GET", "/assistants")
            answered.append(time.monotonic() - start)
    print(f"another's GET is answered after {answered[0]:.1f} s" if answered else "no GET is answered in 120 s")
    over.set()
    dripping.join()
    statuses = Counter[str]()
    for peer in peers:
        peer.setblocking(False)
        with suppress(OSError):
            statuses[peer.recv(4096)[9:12].decode() or "closed"] += 1
    print(f"of the {len(peers)}: {dict(statuses)}; all others wait")


def readers(pid: int) -> None:
    """Ask sixty times for a long page, and read nothing of it."""
    _, thread = send("reader", "POST", "/threads", {})
    for _ in range(200):
        send("reader", "POST", f"/threads/{thread['id']}/messages", {"content": "x" * 100_000})
    print(f"{resident(pid)} MiB before")
    peers = [connected() for _ in range(60)]
    for peer in peers:
        path = f"/assistream/threads/{thread['id']}/messages?limit=200"
        peer.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nX-Caller: reader\r\n\r\n".encode())
    start, most = time.monotonic(), 0
    for seconds in (5, 10, 20, 40):
        while time.monotonic() - start < seconds:
            most = max(most, resident(pid))
            time.sleep(0.1)
        print(f"{resident(pid)} MiB after {seconds} s, at most {most} till then; {open_files(pid)} files are open")
    start = time.monotonic()
    _, page = send("reader", "GET", f"/threads/{thread['id']}/messages?limit=200")
    print(f"a page of {len(page['data'])} comes in {(time.monotonic() - start) * 1000:.0f} ms to who reads")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    attacks = ["post", "slow", "sessions", "streams", "bodies", "headers", "readers"]
    parser.add_argument("attack", choices=attacks)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--redis", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={})
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    from assistream_flask.testing import OfflineServer, Reply

    def reply(request: Any) -> Reply:
        return Reply("slow " * 100, delay=1.0) if "slow" in json.dumps(request.body) else Reply("done")

    with (
        tempfile.TemporaryDirectory() as folder,
        OfflineServer(reply) as model,
        small_redis() if options.redis else contextlib.nullcontext("") as redis_url,
    ):
        config = {
            "ASSISTREAM_DATABASE_URL": f"sqlite:///{folder}/a.sqlite3",
            "ASSISTREAM_REDIS_URL": redis_url,
            **options.settings,
        }
        if options.attack in ("sessions", "streams"):
            config["SECRET_KEY"] = "only for this"
        if options.attack == "readers":
            config["ASSISTREAM_MAX_BYTES"] = 1 << 30
        environment = {**os.environ, "OPENAI_BASE_URL": model.base_url, "APP_CONFIG": json.dumps(config)}
        command = [sys.executable, "-m", "gunicorn", "--worker-class", "gevent", "--no-control-socket", "--bind"]
        most = "4000" if options.attack in ("post", "slow", "sessions") else "2000"
        command += [f"127.0.0.1:{PORT}", "--worker-connections", most, "benchmarks.strangers:make_app()"]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        try:
            time.sleep(4)
            begin: dict[str, Callable[[], None]] = {
                "post": lambda: post(server.pid, options.callers, options.threads),
                "slow": lambda: slow(server.pid, options.callers),
                "sessions": sessions,
                "streams": lambda: streams(options.callers),
                "bodies": lambda: half(server.pid, BODY),
                "headers": lambda: half(server.pid, HEADERS),
                "readers": lambda: readers(server.pid),
            }
            begin[options.attack]()
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
