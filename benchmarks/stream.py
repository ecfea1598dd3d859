"""What a streamed delta costs: ours against what people write, and against relays that parse nothing.

    python benchmarks/stream.py                           all scenarios, five rounds each (an hour)
    python benchmarks/stream.py p200 t16 --rounds 3       two of them
    python benchmarks/stream.py p200 --relays raw,ours    with these relays only

In a round each relay has the same model server, which writes the same deltas at the same pace, one relay after the
other. A relay is pinned to core 0, the model server and the load to core 1. CPU is that of all processes of the relay
(from /proc/*/schedstat). That of a delta is measured from when all streams have begun until the first one ends, over
the deltas that were delivered meanwhile; that of a request is all the rest, beginnings and ends, over the streams.
Latency is from the time of a delta's write, which is its text, to its client's read, in the same time; the relay's own
share is what lies above `direct`'s. Every delta is looked at: one that is lost or comes twice ends the benchmark.
Ratios are of medians over the rounds; the spread is the lowest and the highest round.

Relays:
  direct         no relay: the load reads from the model server
  naive          Flask under gunicorn with gevent: the SDK's typed iterator and `model_dump_json`, as people write it
  raw            gevent, socket to socket
  nginx          `proxy_pass` without buffering
  ours           as the blueprint comes
  sdk            ours with a client of the app's own, so with the SDK's ordinary transport
  redis          ours with the log in Redis (a server is started; its CPU does not count)
  ours@0.05      as `ours`, `sdk` or `redis`, with this for ASSISTREAM_PACE_SECONDS; 0 is not paced

Scenarios:
  t16            16 streams as fast as they go
  s60, p200      60 and 200 streams at 50 deltas a second
  f200           200 streams at 200 deltas a second
  max            the most streams at 50 deltas a second whose 99th percentile is under 50 ms, while the model server
                 keeps that rate
  first          75 streams at 50 deltas a second, and 50 that begin one after the other: the time to their first delta
  viewers        one stream at 50 deltas a second with 1 and with 100 viewers
  threads        10, 50, 100 and 400 streams at 25 deltas a second
  messages       20 streams at 50 deltas a second in threads that have 0, 100 and 1,000 messages
  length         20 streams at 200 deltas a second, of 200, 2,000 and 8,000 deltas
  memory         what a stream takes: 500 that have a delta a second
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

HERE: Final = Path(__file__).resolve()
ROOT: Final = HERE.parent.parent
RELAYS: Final = ("direct", "naive", "raw", "nginx", "ours", "ours@0", "sdk", "redis")
PACED: Final = {"t16": (16, 0, 10_000), "s60": (60, 50, 400), "p200": (200, 50, 400), "f200": (200, 200, 1000)}
"""Streams, deltas a second each (0: as many as go), deltas each."""
_BORN: Final = re.compile(rb"\d{19} ")
_DELTA: Final = re.compile(rb"(?:thread\.message\.|output_text\.)delta")


class Result(NamedTuple):
    """One round: CPU a delta in µs and a request in ms, latencies in ms, deltas a second."""

    cpu: float
    request: float
    p50: float
    p99: float
    rate: float


# The load


class Load:
    """Reads streams to their ends, as cheaply as it can, and looks at what they were afterwards."""

    def __init__(self, port: int, cpu: Callable[[], float] = lambda: 0.0) -> None:
        self._port, self._cpu = port, cpu
        self._silent: set[int] = set()
        # When all had begun, when the first one ended: the time in ns and the CPU.
        self.window: list[tuple[int, float]] = []
        self._selector = selectors.EpollSelector()
        self._read: dict[int, list[tuple[int, bytes]]] = {}
        self._count = 0

    def open(self, path: str, body: bytes | None) -> None:
        """Send a request; ``body`` makes it a POST."""
        peer = socket.create_connection(("127.0.0.1", self._port))
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
        head += "Accept: text/event-stream\r\nConnection: close\r\nContent-Type: application/json\r\n"
        peer.sendall(f"{head}Content-Length: {len(body or b'')}\r\n\r\n".encode() + (body or b""))
        peer.setblocking(False)
        self._count += 1
        self._read[self._count] = [(time.time_ns(), b"")]
        self._silent.add(self._count)
        self._selector.register(peer, selectors.EVENT_READ, self._count)

    def read(self, seconds: float, until: Callable[[], bool] | None = None) -> None:
        """Read until all have ended, or for so long; what takes longer is an error where no ``until`` says enough."""
        end = time.monotonic() + seconds
        while self._selector.get_map() and not (until and until()):
            if time.monotonic() > end:
                if until:
                    return
                raise SystemExit("the streams took too long")
            for key, _ in self._selector.select(0.2):
                data = cast(socket.socket, key.fileobj).recv(65_536)
                now = time.time_ns()
                self._read[key.data].append((now, data))
                if self._silent and key.data in self._silent and _DELTA.search(data):
                    self._silent.discard(key.data)
                    if not self._silent:
                        self.window.append((now, self._cpu()))
                if not data or data.endswith(b"\r\n0\r\n\r\n"):
                    if len(self.window) == 1:
                        self.window.append((now, self._cpu()))
                    self._selector.unregister(key.fileobj)
                    cast(socket.socket, key.fileobj).close()

    def late(self) -> list[tuple[int, float]]:
        """Give when each delta was read, in ns, and how long that was after it was written, in ms."""
        return [delta for reads in self._read.values() for delta in _late(reads)]

    def reads(self) -> list[list[tuple[int, bytes]]]:
        """Give what each stream read, and when, in ns."""
        return list(self._read.values())

    def first(self) -> list[float]:
        """Give how long after its request each stream had its first delta, in ms."""
        found = []
        for reads in self._read.values():
            seen = next(at for at, data in reads if _DELTA.search(data))
            found.append((seen - reads[0][0]) / 1e6)
        return found

    def close(self) -> None:
        """Leave all streams."""
        for key in list(self._selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()
        self._selector.close()


def _late(reads: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, float]]:
    rest, last = b"", 0
    for at, data in reads:
        # Frames end in an empty line; whatever chunks they are in, they are looked at whole.
        whole, _, rest = (rest + data).rpartition(b"\n\n")
        for frame in whole.split(b"\n\n"):
            # A message's whole text, at its end, has no time of its own.
            if _DELTA.search(frame):
                for born in map(int, _BORN.findall(_unchunked(frame))):
                    if born <= last:
                        raise SystemExit("a delta came twice, or out of order")
                    last = born
                    yield at, (at - born) / 1e6


def _unchunked(frame: bytes) -> bytes:
    # A chunk may end in the midst of a delta's text.
    return re.sub(rb"\r\n[0-9a-fA-F]+\r\n", b"", frame)


# The servers


def cpu_of(pids: Sequence[int]) -> float:
    """Give the CPU seconds that processes, all their threads, took so far."""
    total = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def rss_of(pids: Sequence[int]) -> int:
    """Give the memory of processes in bytes."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 for pid in pids)


def free_port() -> int:
    """Give a port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Return when somebody listens."""
    for _ in range(400):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.05)
    raise SystemExit("a server did not start")


class Relay:
    """One relay under way on core 0. ``model`` is what each stream asks the model server for."""

    def __init__(self, name: str, upstream: int, model: str, folder: str, more: dict[str, str] | None = None) -> None:
        self.name, self.port, self._folder, self.model = name.partition("@")[0], free_port(), Path(folder), model
        self._servers: list[subprocess.Popen[bytes]] = []
        config = {"SECRET_KEY": "k", "ASSISTREAM_DATABASE_URL": f"sqlite:///{folder}/x.sqlite3", **(more or {})}
        config |= {f"ASSISTREAM_MAX_{what}": "100000" for what in ("RUNS", "STREAMS")}
        name, _, pace = name.partition("@")
        if pace:
            config["ASSISTREAM_PACE_SECONDS"] = pace
        if name == "redis":
            config["ASSISTREAM_REDIS_URL"] = f"redis://127.0.0.1:{self._start_redis()}/0"
        env = {**os.environ, "APP_CONFIG": json.dumps(config), "MODEL": model, "PYTHONPATH": str(ROOT)}
        env |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{upstream}/v1", "OPENAI_API_KEY": "k"}
        env["TRANSPORT"] = "default" if name == "sdk" else "ours"
        if name == "direct":
            self.port, self.pids = upstream, [os.getpid()]
            return
        if name == "raw":
            command = ["-m", "benchmarks.stream_servers", "raw", str(self.port), str(upstream), model]
            command = [sys.executable, *command]
        elif name == "nginx":
            command = ["nginx", "-c", str(self._nginx(upstream)), "-e", f"{folder}/error"]
        else:
            # As the project is served; the naive app too.
            command = [sys.executable, "-m", "gunicorn", "-c", "gunicorn.conf.py", "--worker-connections", "4000"]
            command += ["-b", f"127.0.0.1:{self.port}", "benchmarks.stream_servers:make_app()"]
        self._start(["taskset", "-c", "0", *command], env)
        wait_for(self.port)
        if name not in ("raw", "nginx"):
            # The worker makes its store and its log at the first request.
            self.ask("GET", "/assistream/assistants")
        pid = self._servers[-1].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        self.pids = [pid, *map(int, children)]

    def _start(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        with open(self._folder / "log", "ab") as log:
            self._servers.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=log, stderr=log))

    def _start_redis(self) -> int:
        port = free_port()
        command = ["taskset", "-c", "1", "redis-server", "--port", str(port), "--save", "", "--bind", "127.0.0.1"]
        self._start([*command, "--dir", str(self._folder)])
        wait_for(port)
        return port

    def _nginx(self, upstream: int) -> Path:
        config = self._folder / "nginx.conf"
        config.write_text(
            f"""daemon off; master_process off; pid {self._folder}/pid; error_log {self._folder}/error;
            events {{ worker_connections 8192; }}
            http {{ access_log off; server {{ listen 127.0.0.1:{self.port} backlog=4096; location / {{
                proxy_pass http://127.0.0.1:{upstream}; proxy_buffering off; proxy_http_version 1.1; }} }} }}"""
        )
        return config

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """One request, for its JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        head = {"Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body is not None else None, head)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if answer.status >= 400:
            raise SystemExit(f"{self.name}: {data!r}")
        return json.loads(data)

    def requests(self, count: int, messages: int = 0) -> list[tuple[str, bytes]]:
        """Give the requests that begin so many streams; our threads, with so many ``messages``, are made now."""
        if self.name in ("direct", "raw", "nginx"):
            return [("/v1/responses", json.dumps({"model": self.model}).encode())] * count
        if self.name == "naive":
            return [("/naive", b'{"content": "Hi"}')] * count
        body = b'{"assistant_ids": ["a"], "content": "Hi"}'
        threads = [self.thread() for _ in range(count)]
        for thread in threads:
            for _ in range(messages):
                self.ask("POST", f"/assistream/threads/{thread}/messages", {"content": "A question. " * 8})
        return [(f"/assistream/threads/{thread}/runs", body) for thread in threads]

    def thread(self) -> str:
        """Give the id of a new thread."""
        found: str = self.ask("POST", "/assistream/threads", {})["id"]
        return found

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        for server in reversed(self._servers):
            server.send_signal(signal.SIGQUIT if self.name == "nginx" else signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


@contextlib.contextmanager
def upstream() -> Iterator[int]:
    """Run the model server; give its port."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.stream_servers", "upstream", str(port)]
    server = subprocess.Popen(["taskset", "-c", "1", *command], cwd=ROOT)
    try:
        wait_for(port)
        yield port
    finally:
        server.kill()
        server.wait()


# Scenarios


def stream(relay: str, model_server: int, streams: int, rate: int, count: int, messages: int = 0) -> Result:
    """One round of one relay; its threads, where it has any, have so many ``messages`` already."""
    with tempfile.TemporaryDirectory() as folder, Relay(relay, model_server, f"{rate}:{count}", folder) as one:
        requests = one.requests(streams, messages)
        load, before = Load(one.port, lambda: cpu_of(one.pids)), cpu_of(one.pids)
        for path, body in requests:
            load.open(path, body)
        load.read(240)
        spent = cpu_of(one.pids) - before
        late = load.late()
        if len(late) != streams * count:
            raise SystemExit(f"{relay}: {len(late)} deltas of {streams * count} came")
        (begin, first), (end, last) = load.window
        steady = [ms for at, ms in late if begin < at <= end]
        cpu = (last - first) / len(steady)
        request = (spent - cpu * len(late)) / streams
        return Result(cpu * 1e6, request * 1e3, *_percentiles(steady), len(steady) / (end - begin) * 1e9)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]


def compare(scenario: str, relays: Sequence[str], rounds: int, model_server: int) -> None:
    """Print what a delta costs in each relay."""
    found: dict[str, list[Result]] = {relay: [] for relay in relays}
    for _ in range(rounds):
        for relay in relays:
            found[relay].append(stream(relay, model_server, *PACED[scenario]))
    middle = {relay: statistics.median(one.cpu for one in results) for relay, results in found.items()}
    heads = f"{'of naive':>9} {'of raw':>7} {'of nginx':>9} {'ms a request':>13} {'p50 ms':>8} p99 ms"
    print(f"\n{scenario:11} {'CPU µs a delta':>24} {heads}")
    for relay, results in found.items():
        cpus = sorted(one.cpu for one in results)
        shares = [f"{middle[relay] / middle[one]:.2f}" if one in middle else "" for one in ("naive", "raw", "nginx")]
        cost = f"{middle[relay]:.1f} ({cpus[0]:.1f} to {cpus[-1]:.1f})"
        print(
            f"{relay:11} {cost:>24} {shares[0]:>9} {shares[1]:>7} {shares[2]:>9}",
            f"{statistics.median(one.request for one in results):13.2f}",
            f"{statistics.median(one.p50 for one in results):8.1f}",
            f"{statistics.median(one.p99 for one in results):6.1f}",
            flush=True,
        )


def most(relays: Sequence[str], rounds: int, model_server: int) -> None:
    """Print how many streams at 50 deltas a second each relay holds."""
    found: dict[str, list[int]] = {relay: [] for relay in relays}
    for _ in range(rounds):
        for relay in relays:
            found[relay].append(_most(relay, model_server))
    print(f"\n{'max':11} {'streams':>24} {'of naive':>9} {'of raw':>7}")
    for relay, counts in found.items():
        middle = statistics.median(counts)
        shares = [f"{middle / statistics.median(found[one]):.2f}" if one in found else "" for one in ("naive", "raw")]
        cost = f"{middle:.0f} ({min(counts)} to {max(counts)})"
        print(f"{relay:11} {cost:>24} {shares[0]:>9} {shares[1]:>7}", flush=True)


def _most(relay: str, model_server: int) -> int:
    """Double until it is too many, and halves the rest up to a tenth."""
    low, high = 0, 0
    while not high or high - low > low / 10:
        tried = (low + high) // 2 if high else low * 2 or 40
        # Long enough for all of them to be there together for some seconds.
        found = stream(relay, model_server, tried, 50, 250 + 2 * tried)
        # The model server has its limit too, and the latency is from when it did write.
        share = found.rate / tried / 50
        print(f"            {relay}: {found.p99:.1f} ms with {tried}, {share:.0%}", file=sys.stderr, flush=True)
        if found.p99 < 50 and share > 0.95:
            low = tried
        else:
            high = tried
    return low


def first(relays: Sequence[str], rounds: int, model_server: int) -> None:
    """Print how long after its request a stream has its first delta, beside 100 others on average."""
    print(f"\n{'first':11} {'p50 ms':>8} {'p99 ms':>8} {'p50 more than direct':>22} {'p99 more':>9}")
    base: list[float] = []
    for relay in ("direct", *(relay for relay in relays if relay != "direct")):
        late: list[float] = []
        for _ in range(rounds):
            late += _first(relay, model_server)
        base = base or late
        mine, theirs = _percentiles(late), _percentiles(base)
        print(
            f"{relay:11} {mine[0]:8.1f} {mine[1]:8.1f} {mine[0] - theirs[0]:22.1f} {mine[1] - theirs[1]:9.1f}",
            flush=True,
        )


def _first(relay: str, model_server: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder, Relay(relay, model_server, "50:1000", folder) as one:
        load, asked = Load(one.port), one.requests(125)
        for path, body in asked:
            load.open(path, body)
            load.read(0.08, until=lambda: False)
        load.read(1, until=lambda: False)
        found = load.first()[75:]
        load.close()
        return found


def viewers(relays: Sequence[str], rounds: int, model_server: int) -> None:
    """Print what more viewers of one thread cost."""
    print(f"\n{'viewers':11} {'viewers':>8} {'CPU µs a delta and viewer':>26} {'events':>8} {'p99 ms':>8}")
    for relay in relays:
        for count in (1, 100):
            results = [_viewed(relay, model_server, count) for _ in range(rounds)]
            cpu, events, p99 = (statistics.median(values) for values in zip(*results, strict=True))
            print(f"{relay:11} {count:8} {cpu:26.1f} {events:8.0f} {p99:8.1f}", flush=True)


def _viewed(relay: str, model_server: int, count: int) -> tuple[float, float, float]:
    deltas = 500
    with tempfile.TemporaryDirectory() as folder, Relay(relay, model_server, f"50:{deltas}", folder) as one:
        if relay.partition("@")[0] in ("direct", "naive", "raw", "nginx"):
            # They have no threads: as many streams, each with an upstream of its own.
            load = Load(one.port, lambda: cpu_of(one.pids))
            for path, body in one.requests(count):
                load.open(path, body)
        else:
            thread = one.thread()
            load = Load(one.port, lambda: cpu_of(one.pids))
            for _ in range(count):
                load.open(f"/assistream/threads/{thread}/events", None)
            load.read(1, until=lambda: False)
            one.ask("POST", f"/assistream/threads/{thread}/runs", {"assistant_ids": ["a"], "content": "Hi"})
        load.read(2, until=lambda: False)
        before, begin = cpu_of(one.pids), time.time_ns()
        load.read(6, until=lambda: False)
        spent, end = cpu_of(one.pids) - before, time.time_ns()
        late = [ms for at, ms in load.late() if begin < at <= end]
        reads = sum(begin < at <= end for each in load.reads() for at, _ in each)
        load.close()
        return spent / len(late) * 1e6, reads / count, _percentiles(late)[1]


def grows(what: str, relays: Sequence[str], rounds: int, model_server: int) -> None:
    """Print what a delta costs while one thing grows."""
    cases: dict[str, list[tuple[int, int, int, int]]] = {
        # How many, then streams, deltas a second, deltas each.
        "threads": [(n, n, 25, 200) for n in (10, 50, 100, 400)],
        "messages": [(n, 20, 50, 300) for n in (0, 100, 1000)],
        "length": [(n, 20, 200, n) for n in (200, 2000, 8000)],
    }
    print(f"\n{what:11} {'how many':>9} {'CPU µs a delta':>24} {'ms a request':>13} {'p99 ms':>8}")
    for relay in relays:
        for many, streams, rate, count in cases[what]:
            before = many if what == "messages" else 0
            results = [stream(relay, model_server, streams, rate, count, before) for _ in range(rounds)]
            cpus = sorted(one.cpu for one in results)
            cost = f"{statistics.median(cpus):.1f} ({cpus[0]:.1f} to {cpus[-1]:.1f})"
            print(
                f"{relay:11} {many:9} {cost:>24} {statistics.median(one.request for one in results):13.2f}",
                f"{statistics.median(one.p99 for one in results):8.1f}",
                flush=True,
            )


def memory(relays: Sequence[str], rounds: int, model_server: int) -> None:
    """Print what a stream that waits for its next delta takes."""
    print(f"\n{'memory':11} {'KiB a stream':>13}")
    for relay in relays:
        found = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder, Relay(relay, model_server, "1:100", folder) as one:
                load, requests = Load(one.port), one.requests(520)
                for path, body in requests[:20]:
                    load.open(path, body)
                load.read(3, until=lambda: False)
                before = rss_of(one.pids)
                for path, body in requests[20:]:
                    load.open(path, body)
                load.read(12, until=lambda: False)
                found.append((rss_of(one.pids) - before) / 500 / 1024)
                load.close()
        print(f"{relay:11} {statistics.median(found):13.1f}", flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    more = ("max", "first", "viewers", "threads", "messages", "length", "memory")
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help="by default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--relays", help="which, with commas; by default all that make sense")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - {*PACED, *more}:
        parser.error(f"got {', '.join(unknown)}: scenarios are {', '.join((*PACED, *more))}")
    os.sched_setaffinity(0, {1})
    chosen = options.relays.split(",") if options.relays else list(RELAYS)
    ours = options.relays.split(",") if options.relays else ["ours", "redis"]
    with upstream() as model_server:
        for scenario in options.scenarios or (*PACED, *more):
            if scenario in PACED:
                compare(scenario, chosen, options.rounds, model_server)
            elif scenario == "max":
                most([one for one in chosen if one not in ("direct", "redis")], options.rounds, model_server)
            elif scenario == "first":
                first([one for one in chosen if one != "naive"], options.rounds, model_server)
            elif scenario == "viewers":
                viewers(["raw", *ours], options.rounds, model_server)
            elif scenario == "memory":
                memory(ours, options.rounds, model_server)
            else:
                grows(scenario, ours, options.rounds, model_server)


if __name__ == "__main__":
    main()
