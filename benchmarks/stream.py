"""What a streamed delta costs: ours against what people write, and against a relay that parses nothing.

    python benchmarks/stream.py                    all scenarios, three rounds each
    python benchmarks/stream.py --scenario p200    one of them
    python benchmarks/stream.py --redis            ours also with the log in Redis, with a server that it starts itself

In each round all relays have the same upstream, which writes the same deltas at the same pace, one relay after the
other. The relay is pinned to core 0, upstream and load to core 1. CPU is that of the relay's process (user and system,
from /proc) over the deltas that were delivered; latency is from the upstream's write, whose time is in the delta's
text, to the client's read. Ratios are of medians; the spread is the lowest and highest round.

`t16`: 16 streams as fast as they go. `s60`: 60 streams at 50 deltas a second. `p200`: 200 at 50.
`naive`: Flask, the SDK's typed iterator, `model_dump_json`. `raw`: gevent, socket to socket.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

HERE = Path(__file__).resolve()
SCENARIOS = {"t16": (16, 0, 2000), "s60": (60, 50, 400), "p200": (200, 50, 400)}
"""Streams, deltas a second each (0: as many as go), deltas each."""
_BORN = re.compile(rb'"(\d{19}) "')


# The upstream


def serve_upstream(port: int) -> None:
    """Answers each POST with the deltas that its ``model`` asks for: ``rate:count``."""
    from gevent import monkey

    monkey.patch_all()
    import gevent
    from gevent.server import StreamServer

    def frame(kind: str, **data: Any) -> bytes:
        body = f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()
        return b"%x\r\n%b\r\n" % (len(body), body)

    def answer(peer: Any, _: Any) -> None:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        file = peer.makefile("rb")
        while file.readline():
            length = 0
            while (line := file.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            rate, count = map(int, json.loads(file.read(length))["model"].split(":"))
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            peer.sendall(head + frame("response.created", sequence_number=0, response={"id": "resp_1"}))
            due = time.monotonic()
            for number in range(count):
                delta = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
                delta |= {"delta": f"{time.time_ns()} ", "sequence_number": number + 1}
                peer.sendall(frame("response.output_text.delta", **delta))
                if rate:
                    due += 1 / rate
                    gevent.sleep(max(0.0, due - time.monotonic()))
            over = {"id": "resp_1", "status": "completed", "output": []}
            peer.sendall(frame("response.completed", sequence_number=count + 1, response=over) + b"0\r\n\r\n")

    StreamServer(("127.0.0.1", port), answer, backlog=1000).serve_forever()


# The relays


def make_app() -> Any:
    """Gives the app that gunicorn serves: ours below /assistream, and /naive."""
    import openai
    from flask import Flask, Response, request

    from assistream_flask import Assistant, create_blueprint

    app = Flask("stream")
    app.config.update(json.loads(os.environ["APP_CONFIG"]))
    model = os.environ["MODEL"]
    http = openai.DefaultHttpxClient(limits=openai.DEFAULT_CONNECTION_LIMITS)
    client = openai.OpenAI(base_url=os.environ["UPSTREAM"], api_key="k", http_client=http)
    blueprint = create_blueprint([Assistant("a", model=model)], owner=lambda: "me", client=client)
    app.register_blueprint(blueprint, url_prefix="/assistream")

    @app.post("/naive")
    def naive() -> Response:
        stream = client.responses.create(model=model, input=request.json["content"], stream=True)
        return Response((f"data: {event.model_dump_json()}\n\n" for event in stream), mimetype="text/event-stream")

    return app


def serve_raw(port: int, upstream: int, model: str) -> None:
    """Sends each request on and each answer back, unread."""
    from gevent.server import StreamServer
    from gevent.socket import create_connection

    body = json.dumps({"model": model}).encode()

    def relay(peer: Any, _: Any) -> None:
        peer.recv(65536)
        other = create_connection(("127.0.0.1", upstream))
        other.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        while data := other.recv(65536):
            peer.sendall(data)
            if data.endswith(b"\r\n0\r\n\r\n"):
                break
        peer.close()

    StreamServer(("127.0.0.1", port), relay, backlog=1000).serve_forever()


# The load


class Result(NamedTuple):
    """CPU a delta in µs, and the latency in ms at the median and the 99th percentile."""

    cpu: float
    p50: float
    p99: float


def load(port: int, paths: list[str], body: bytes, expected: int, cpu: Callable[[], float]) -> Result:
    """Opens a stream for each path, reads them to their ends, and tells what the deltas cost."""
    selector = selectors.DefaultSelector()
    late: list[float] = []
    rest: dict[int, bytes] = {}
    for path in paths:
        peer = socket.create_connection(("127.0.0.1", port))
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        peer.sendall(head.encode() + body)
        peer.setblocking(False)
        selector.register(peer, selectors.EVENT_READ)
        rest[peer.fileno()] = b""
    before, end = cpu(), time.monotonic() + 120
    while rest and time.monotonic() < end:
        for key, _ in selector.select(1):
            now, reader = time.time_ns(), cast(socket.socket, key.fileobj)
            data = reader.recv(262_144)
            if not data:
                selector.unregister(reader)
                del rest[key.fd]
                reader.close()
                continue
            data = rest[key.fd] + data
            whole = data.rfind(b"\n") + 1
            # A message's whole text, at its end, has no time by itself.
            late += [(now - int(born)) / 1e6 for born in _BORN.findall(data[:whole])]
            rest[key.fd] = data[whole:]
    spent = cpu() - before
    if len(late) != expected:
        raise SystemExit(f"{len(late)} deltas of {expected} came: the relay lost some, or 120 s were too few")
    late.sort()
    return Result(spent / len(late) * 1e6, late[len(late) // 2], late[len(late) * 99 // 100])


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait_for(port: int) -> None:
    for _ in range(400):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise SystemExit("a server did not start")


def measure(relay: str, scenario: str, upstream: int, redis: str | None) -> Result:
    """One round of one relay."""
    streams, rate, count = SCENARIOS[scenario]
    model, port = f"{rate}:{count}", _free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = {"SECRET_KEY": "k", "ASSISTREAM_DATABASE_URL": f"sqlite:///{folder}/x.sqlite3"}
        config |= {f"ASSISTREAM_MAX_{what}": "100000" for what in ("RUNS", "STREAMS")}
        if relay == "ours, Redis":
            config["ASSISTREAM_REDIS_URL"] = redis or ""
        env = {**os.environ, "APP_CONFIG": json.dumps(config), "MODEL": model, "PYTHONPATH": str(HERE.parent.parent)}
        env["UPSTREAM"] = f"http://127.0.0.1:{upstream}/v1"
        command = [sys.executable, "-m", "gunicorn", "-k", "gevent", "--worker-connections", "2000", "-b"]
        command += [f"127.0.0.1:{port}", "--no-control-socket", "benchmarks.stream:make_app()"]
        if relay == "raw":
            command = [sys.executable, str(HERE), "--serve-raw", str(port), str(upstream), model]
        with open(f"{folder}/log", "wb") as log:
            process = subprocess.Popen(
                ["taskset", "-c", "0", *command], env=env, cwd=HERE.parent.parent, stdout=log, stderr=log
            )
        try:
            _wait_for(port)
            body = json.dumps({"assistant_ids": ["a"], "content": "Hi"} if "ours" in relay else {"content": "Hi"})
            paths = ["/naive"] * streams
            if "ours" in relay:
                paths = [f"/assistream/threads/{_new_thread(port)}/runs" for _ in range(streams)]
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            pid = int(children[0]) if children else process.pid
            return load(port, paths, body.encode(), streams * count, lambda: cpu_of(pid))
        finally:
            process.send_signal(signal.SIGKILL if relay == "raw" else signal.SIGTERM)
            process.wait(40)


def _new_thread(port: int) -> str:
    import urllib.request

    url = f"http://127.0.0.1:{port}/assistream/threads"
    request = urllib.request.Request(url, b"{}", {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        found: str = json.load(answer)["id"]
        return found


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=SCENARIOS, action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--redis", action="store_true")
    parser.add_argument("--serve-upstream", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--serve-raw", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_upstream:
        return serve_upstream(options.serve_upstream)
    if options.serve_raw:
        port, upstream, model = options.serve_raw
        return serve_raw(int(port), int(upstream), model)
    os.sched_setaffinity(0, {1})
    port, redis_port = _free_port(), _free_port()
    servers = [subprocess.Popen([sys.executable, str(HERE), "--serve-upstream", str(port)])]
    relays = ["naive", "raw", "ours"]
    if options.redis:
        arguments = ["--port", str(redis_port), "--save", "", "--bind", "127.0.0.1"]
        servers.append(subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL))
        relays.append("ours, Redis")
    try:
        _wait_for(port)
        print(f"{'':4} {'relay':12} {'CPU µs a delta':>24} {'of naive':>9} {'of raw':>7} {'p50 ms':>8} {'p99 ms':>8}")
        for scenario in options.scenario or SCENARIOS:
            found: dict[str, list[Result]] = {relay: [] for relay in relays}
            for _ in range(options.rounds):
                for relay in relays:
                    found[relay].append(measure(relay, scenario, port, f"redis://127.0.0.1:{redis_port}/0"))
            middle = {relay: statistics.median(one.cpu for one in results) for relay, results in found.items()}
            for relay, results in found.items():
                cpus = sorted(one.cpu for one in results)
                print(
                    f"{scenario:4} {relay:12} {middle[relay]:8.1f} ({cpus[0]:.1f} to {cpus[-1]:.1f})".ljust(42),
                    f"{middle[relay] / middle['naive']:9.2f} {middle[relay] / middle['raw']:7.2f}",
                    f"{statistics.median(one.p50 for one in results):8.1f}",
                    f"{statistics.median(one.p99 for one in results):8.1f}",
                    flush=True,
                )
    finally:
        for server in servers:
            server.kill()


if __name__ == "__main__":
    main()
