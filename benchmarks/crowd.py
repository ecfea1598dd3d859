"""What a crowd costs: idle event streams on one gevent worker of gunicorn, and how it answers meanwhile.

    python benchmarks/crowd.py                            5,000 streams, the log in memory
    python benchmarks/crowd.py --redis                    the same, with a redis-server that it starts itself
    python benchmarks/crowd.py --redis redis://host/0     the same, with that one
    python benchmarks/crowd.py --floor                    a bare WSGI app that yields and waits: what the server costs
    python benchmarks/crowd.py --threads 1                all in one thread, and an event to all
    python benchmarks/crowd.py --streams 500 --herd       500 come all at once, as after a deploy

Prints KiB a stream (the worker's RSS, after less before), how long commands take while the crowd is idle and
heartbeats go out, and how long the worker takes to notice that all viewers are gone; with `--herd`, how long commands
take while it comes, to a thread of 20 messages each. The crowd is a process of its
own. 5,000 streams need a `ulimit -Hn` of 12,000 or so. On a busy machine, and as root, begin with `nice -n -15`.

How they leave is `--leave close` (a FIN each), or `--leave vanish`: the crowd's network is taken away, without a
word to the server. That needs root and `ip`, since the crowd then lives in a network namespace.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import resource
import secrets
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

HERE = Path(__file__).resolve()


# What gunicorn serves


def make_app() -> Any:
    """Give the app, for gunicorn: settings come in APP_CONFIG."""
    from flask import Flask, jsonify, request

    from assistream_flask import Assistant, create_blueprint

    app = Flask("crowd")
    app.config.update(json.loads(os.environ["APP_CONFIG"]))
    blueprint = create_blueprint([Assistant("a", model="m")], owner=lambda: request.headers.get("X-Caller"))
    app.register_blueprint(blueprint, url_prefix="/assistream")

    @app.get("/open")
    def opened() -> Any:
        return jsonify(app.extensions["assistream"].runtime().open_streams)

    return app


class Floor:
    """A bare WSGI app whose streams yield and wait."""

    def __init__(self) -> None:
        self.streams = 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"].endswith("/events"):
            start_response("200 OK", [("Content-Type", "text/event-stream")])
            return self._stream()
        start_response("200 OK", [("Content-Type", "application/json")])
        return [b"%d" % self.streams if environ["PATH_INFO"] == "/open" else b'{"id": "x"}']

    def _stream(self) -> Iterator[bytes]:
        self.streams += 1
        try:
            yield b"retry: 1000\n\n"
            while True:
                time.sleep(float(os.environ["HEARTBEAT"]))
                yield b"event: ping\ndata: {}\n\n"
        finally:
            self.streams -= 1


# The crowd


class _Crowd:
    """Viewers that only read; those whom the server has no room for come again."""

    def __init__(self, host: str, port: int, due: list[str]) -> None:
        self._address, self.due = (host, port), due
        self._waiting = selectors.DefaultSelector()
        self._waiting.register(0, selectors.EVENT_READ)
        self._readers: dict[socket.socket, str] = {}
        self.silent: set[socket.socket] = set()
        """Those that were sent nothing yet, or nothing since stdin asked."""
        self.refused = 0
        self._last, self._cut = 0.0, 0

    def open(self, at_once: int) -> None:
        """Open streams until so many are silent."""
        while self.due and len(self.silent) < at_once:
            viewer = socket.create_connection(self._address)
            viewer.sendall(f"GET {self.due[-1]} HTTP/1.1\r\nHost: crowd\r\nX-Caller: me\r\n\r\n".encode())
            self._waiting.register(viewer, selectors.EVENT_READ)
            self._readers[viewer] = self.due.pop()
            self.silent.add(viewer)

    def attend(self) -> None:
        """Wait for what comes, and take it; end the process where stdin ended."""
        for key, _ in self._waiting.select():
            if key.fd == 0:
                self._answer()
            else:
                self._read(cast(socket.socket, key.fileobj))

    def _answer(self) -> None:
        if not os.read(0, 1):
            os._exit(0)
        print(json.dumps([len(self.silent), self._last, self._cut]), flush=True)
        self.silent = set(self._readers)

    def _read(self, viewer: socket.socket) -> None:
        try:
            found = viewer.recv(65536)
        except OSError:
            found = b""
        if not found:
            self._leave(viewer)
            self._cut += 1
        elif found.startswith(b"HTTP/1.1 503"):
            self.due.append(self._leave(viewer))
            self.refused += 1
            time.sleep(0.1)
        elif viewer in self.silent and b"event: ping" not in found:
            self.silent.remove(viewer)
            self._last = time.time()

    def _leave(self, viewer: socket.socket) -> str:
        """Close the viewer's stream; give its path."""
        self._waiting.unregister(viewer)
        viewer.close()
        self.silent.discard(viewer)
        return self._readers.pop(viewer)


def view(host: str, port: int, paths: list[str], streams: int, at_once: int) -> None:
    """Open so many streams, at most so many ``at_once``, and read them until stdin ends; a line tells that all are
    open, and one answers each that is asked."""
    _files()
    crowd, opening = _Crowd(host, port, [paths[at % len(paths)] for at in range(streams)]), True
    while True:
        crowd.open(at_once)
        crowd.attend()
        if opening and not crowd.due and not crowd.silent:
            opening = False
            print(f"all opened; {crowd.refused} were told to come again, and did", flush=True)


# The measurements


class Line:
    """A connection that is kept."""

    def __init__(self, host: str, port: int) -> None:
        self._line = http.client.HTTPConnection(host, port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Give the JSON answer."""
        head = {"Content-Type": "application/json", "X-Caller": "me"}
        self._line.request(method, path, None if body is None else json.dumps(body), head)
        answer = self._line.getresponse()
        text = answer.read()
        if answer.status >= 400:
            raise SystemExit(f"{method} {path}: {answer.status} {text!r}")
        return json.loads(text)


class Server:
    """Gunicorn with one gevent worker."""

    def __init__(self, folder: str, host: str, floor: bool, config: dict[str, Any]) -> None:
        self.host = host
        with socket.socket() as free:
            free.bind((host, 0))
            self.port: int = free.getsockname()[1]
        env = {**os.environ, "APP_CONFIG": json.dumps(config), "HEARTBEAT": str(config["ASSISTREAM_HEARTBEAT_SECONDS"])}
        env |= {"OPENAI_API_KEY": "none", "PYTHONPATH": f"{HERE.parent}:{HERE.parent.parent}"}
        command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "-b", f"{host}:{self.port}", "--backlog", "4096"]
        command += ["--worker-connections", "6000", "--keep-alive", "600", "--graceful-timeout", "2"]
        command += ["--no-control-socket", "crowd:Floor()" if floor else "crowd:make_app()"]
        with open(f"{folder}/gunicorn.log", "wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection((host, self.port)).close()
                break
            if self._process.poll() is not None:
                raise SystemExit(Path(f"{folder}/gunicorn.log").read_text())
            time.sleep(0.05)
        self.ask = Line(host, self.port).ask

    def worker(self) -> int:
        """Give the worker's process id."""
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def kib(self) -> int:
        """Give the worker's resident memory."""
        lines = Path(f"/proc/{self.worker()}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def cpu(self) -> float:
        """Seconds of CPU that the worker has taken."""
        fields = Path(f"/proc/{self.worker()}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(60)


class Crowd:
    """Many viewers, in a process of their own."""

    def __init__(self, enter: list[str], server: Server, paths: list[str], streams: int, at_once: int = 200) -> None:
        code = "import json, sys; sys.path[0] = sys.argv[1]; import crowd; crowd.view(*json.loads(sys.argv[2]))"
        told = json.dumps([server.host, server.port, paths, streams, at_once])
        command = [*enter, sys.executable, "-c", code, str(HERE.parent), told]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        print(self._process.stdout.readline().decode().strip())

    def ask(self) -> tuple[int, float, int]:
        """Give how many have nothing yet of what was sent since the last call, but heartbeats; when the last one
        got it, and how many were cut."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        missing, last, cut = json.loads(self._process.stdout.readline())
        return missing, last, cut

    def end(self) -> None:
        """Have all leave at once. Idempotent."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


@contextlib.contextmanager
def redis_server(folder: str) -> Iterator[str]:
    """Give the URL of a redis-server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


class Network(NamedTuple):
    """Another network on this machine: what runs a command in it, this side's address, and what cuts it off."""

    enter: list[str]
    host: str
    vanish: Callable[[], None]


@contextlib.contextmanager
def network_of_its_own() -> Iterator[Network]:
    """Give a network namespace. Raises ``OSError`` or ``CalledProcessError`` without the command ip, or its rights."""
    name, net = f"crowd{secrets.token_hex(3)}", f"198.18.{secrets.randbelow(256)}"

    def ip(command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, stderr=subprocess.DEVNULL)

    ip(f"netns add {name}")
    try:
        ip(f"link add {name} type veth peer name out netns {name}")
        ip(f"addr add {net}.1/24 dev {name}")
        ip(f"link set {name} up")
        ip(f"-n {name} addr add {net}.2/24 dev out")
        ip(f"-n {name} link set out up")
        # What is sent to a wrong hardware address is lost, and no error tells of it.
        lost = f"neigh replace {net}.2 lladdr 02:00:00:00:00:99 dev {name}"
        yield Network(["ip", "netns", "exec", name], f"{net}.1", lambda: ip(lost))
    finally:
        ip(f"netns del {name}")


def quantiles(times: list[float]) -> str:
    """Give the middle, the 99th in a hundred and the longest, in milliseconds."""
    times = sorted(times)
    found = [times[len(times) // 2], times[int(len(times) * 0.99)], times[-1]]
    return "p50 {:.1f}, p99 {:.1f}, max {:.1f} ms".format(*(1000 * one for one in found))


def commands(server: Server, path: str, seconds: float) -> None:
    """Send commands for a while, one after the other; print how long they took."""
    posts, gets, start, cpu = list[float](), list[float](), time.monotonic(), server.cpu()
    while time.monotonic() < start + seconds:
        for times, method, body in ((posts, "POST", {"content": "Hello"}), (gets, "GET", None)):
            at = time.perf_counter()
            server.ask(method, f"{path}/messages" + ("?limit=5" if method == "GET" else ""), body)
            times.append(time.perf_counter() - at)
            time.sleep(0.02)
    used = 100 * (server.cpu() - cpu) / (time.monotonic() - start)
    print(
        f"  POST message: {quantiles(posts)};  GET messages: {quantiles(gets)}  ({len(posts)} each, CPU {used:.0f} %)"
    )


def herd(options: argparse.Namespace, server: Server, other: str, threads: list[str]) -> None:
    """Have all come at once; print how long commands take until all have their thread."""
    for path in [other, *threads]:
        for number in range(20):
            server.ask("POST", f"{path}/messages", {"content": f"{number} " + "Hello all. " * 50})
    paths = [f"{thread}/events" for thread in threads]
    print(f"a herd of {options.streams} to {options.threads} threads:")
    times: dict[str, list[float]] = {"POST": [], "GET": []}
    ready, came = threading.Event(), threading.Event()

    def ask(method: str, line: Line) -> None:
        body = {"content": "Hello"} if method == "POST" else None
        while not came.is_set():
            at = time.perf_counter()
            line.ask(method, f"{other}/messages" + ("" if body else "?limit=5"), body)
            if ready.is_set():
                times[method].append(time.perf_counter() - at)
            time.sleep(0.02)

    askers = [threading.Thread(target=ask, args=(method, Line(server.host, server.port))) for method in times]
    for one in askers:
        one.start()
    ready.set()
    start, cpu = time.monotonic(), server.cpu()
    crowd = Crowd([], server, paths, options.streams, options.streams)
    took, used = time.monotonic() - start, server.cpu() - cpu
    came.set()
    for one in askers:
        one.join()
    print(f"  all have their thread after {took:.2f} s, for {used:.2f} s of CPU")
    print(f"  POST message: {quantiles(times['POST'])};  GET messages: {quantiles(times['GET'])}")
    crowd.end()


def leave(server: Server, streams: int, gone: Callable[[], None]) -> None:
    """Have the crowd leave; print how long it takes the worker to notice."""
    start, left, slowest, marks = time.monotonic(), streams, 0.0, [0.5, 0.1]
    gone()
    while left and time.monotonic() < start + 120:
        time.sleep(0.05)
        at = time.monotonic()
        left = server.ask("GET", "/open")
        slowest = max(slowest, time.monotonic() - at)
        while marks and left <= marks[0] * streams:
            print(f"  {left} left after {time.monotonic() - start:.1f} s")
            del marks[0]
    print(f"  {left} left after {time.monotonic() - start:.1f} s; the slowest answer took {1000 * slowest:.0f} ms")


def measure(options: argparse.Namespace, server: Server, network: Network | None) -> None:
    """Do one round and prints it."""
    ids = [server.ask("POST", "/assistream/threads", {})["id"] for _ in range(options.threads + 1)]
    other, *threads = (f"/assistream/threads/{id}" for id in ids)
    server.ask("GET", "/open")
    if options.herd:
        herd(options, server, other, threads)
        return
    print("alone:")
    commands(server, other, 5)
    before, start = server.kib(), time.monotonic()
    crowd = Crowd(network.enter if network else [], server, [f"{thread}/events" for thread in threads], options.streams)
    took = time.monotonic() - start
    print(f"{server.ask('GET', '/open')} streams in {options.threads} threads, opened in {took:.1f} s:")

    def kib() -> float:
        return (server.kib() - before) / float(options.streams)

    print(f"  {kib():.1f} KiB a stream ({before >> 10} MiB before)")
    print(f"idle, with heartbeats each {options.heartbeat:g} s:")
    commands(server, other, 2.2 * options.heartbeat)
    print(f"  {kib():.1f} KiB a stream")
    if options.threads == 1 and not options.floor:
        crowd.ask()
        at = time.time()
        server.ask("POST", f"{threads[0]}/messages", {"content": "Hello all"})
        answered = time.time() - at
        time.sleep(3)
        missing, last, cut = crowd.ask()
        print(
            f"one event to all: answered in {1000 * answered:.0f} ms, at the last one {1000 * (last - at):.0f} ms later"
        )
        print(f"  {missing} missing, {cut} cut; then, their heartbeats coming all together:")
        commands(server, other, 2.2 * options.heartbeat)
    print("all leave" + (", without a word:" if network else ":"))
    leave(server, options.streams, network.vanish if network else crowd.end)
    print(f"  {kib():.1f} KiB a stream are still held")
    crowd.end()


def _files() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--threads", type=int, default=500, help="conversations that the streams are spread over")
    parser.add_argument("--herd", action="store_true", help="all come at once, and that is all")
    parser.add_argument("--database", metavar="URL", help="instead of an SQLite file")
    parser.add_argument("--heartbeat", type=float, default=15, help="seconds")
    parser.add_argument("--redis", nargs="?", const="own", metavar="URL")
    parser.add_argument("--floor", action="store_true", help="a bare WSGI app instead of assistream")
    parser.add_argument("--leave", choices=["close", "vanish"], default="close")
    options = parser.parse_args()
    _files()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        network = stack.enter_context(network_of_its_own()) if options.leave == "vanish" else None
        config = {
            "ASSISTREAM_DATABASE_URL": options.database or f"sqlite:///{folder}/crowd.sqlite3",
            "ASSISTREAM_MAX_STREAMS": options.streams,
            "ASSISTREAM_HEARTBEAT_SECONDS": options.heartbeat,
        }
        if options.redis:
            own = options.redis == "own"
            config["ASSISTREAM_REDIS_URL"] = stack.enter_context(redis_server(folder)) if own else options.redis
        server = Server(folder, network.host if network else "127.0.0.1", options.floor, config)
        stack.callback(server.stop)
        measure(options, server, network)


if __name__ == "__main__":
    main()
