"""Hostile traffic of all kinds at once, beside twenty well-behaved chats, on one gevent worker of gunicorn.

    python -m benchmarks.storm                       five minutes of it, the log in memory
    python -m benchmarks.storm --redis               the same, with a redis-server of 64 MB that it starts itself
    python -m benchmarks.storm --only streams        that kind alone; several with commas between
    python -m benchmarks.storm --each --seconds 20   each kind alone, to a new gunicorn, and a line for each

The chats ask every three seconds, are answered in forty words within two, and then load a page of their thread. For
thirty seconds they are alone (``--before``), then all attack for ``--seconds``, then the chats are alone once more
(``--after``). Each chat, and each kind of attack, has a loopback address of its own, and each session its cookie.

Prints for each fifteen seconds how long the chats waited for a first word and for their page, what failed for them, and
the worker's memory, files and threads; in the end the same for before, attack and after, and what the attackers were
answered. Exits with 1 where a chat failed, an answer was not whole, the worker died, or a stranger was given a chat's
thread. Each kind of attack sends ``--rate`` requests a second, as many commands as deploy/nginx.conf lets an address
send; 0 is as fast as they go. Half-sent requests don't count: of those ``--half`` begin a second. A worker whose CPU is
near 100 % answers all late, and no attack of its own shows: lower both on a slow machine.

The worker has core 0; the model server, attackers and chats have core 1, and as root the chats come first there (nice
-10). *late* is how late the chats' own process was, and *waiting* for how much of the time the worker could not run as
others had its core: neither is the worker's fault. On a busy machine, and as root, begin with `nice -n -15`; where
`/proc/sys/kernel/sched_autogroup_enabled` is 1 that counts within a session only, so begin with
`setsid -w bash -c 'echo -15 > /proc/self/autogroup; exec "$@"' -- python -m benchmarks.storm`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from tests.gunicorn_server import Gunicorn
from tests.programs import free_port, listening
from tests.redis_server import running_redis

from .storm_clients import ATTACKS

ROOT: Final = Path(__file__).resolve().parent.parent
_APP: Final = "from benchmarks.storm_servers import make_app\napp = make_app()\n"
_WINDOW: Final = 15.0
_WARM: Final = 6.0


class Worker:
    """The process that is attacked, as the system sees it."""

    def __init__(self, gunicorn: Gunicorn) -> None:
        self._gunicorn = gunicorn
        (self.pid,) = gunicorn.workers()
        self._before = (0.0, 0.0, 0.0)
        self.shares()

    def is_alive(self) -> bool:
        """Tell whether it is still the same one."""
        return self._gunicorn.is_running and self._gunicorn.workers() == [self.pid]

    def status(self, name: str) -> int:
        """Give a number of its status: ``VmRSS`` in KiB, ``Threads``."""
        try:
            text = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return 0
        return int((text.partition(f"{name}:")[2].split() or ["0"])[0])

    def files(self) -> int:
        """Give how many files it has open."""
        try:
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        except OSError:
            return 0

    def shares(self) -> tuple[int, int]:
        """Give what of a core it had, and what of the time it waited for it while others had it, in percent since the
        last call."""
        try:
            running, waiting, _ = map(int, Path(f"/proc/{self.pid}/schedstat").read_text().split())
        except OSError:
            return 0, 0
        now = (time.monotonic(), running / 1e9, waiting / 1e9)
        seconds, *used = (one - other for one, other in zip(now, self._before, strict=True))
        self._before = now
        had, waited = (int(100 * one / max(0.001, seconds)) for one in used)
        return had, waited


class Times:
    """What was seen within some time."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {kind: [] for kind in ("first", "end", "page", "late")}
        self.failures: Counter[str] = Counter()
        self.memory: list[int] = []
        self.waited: list[int] = []

    def at(self, kind: str, share: float) -> float:
        """Give the quantile, in milliseconds."""
        found = sorted(self.times[kind])
        return 1000 * found[min(len(found) - 1, int(len(found) * share))] if found else float("nan")

    def line(self) -> str:
        """Give it in short."""
        pairs = [f"{kind} {self.at(kind, 0.5):6.0f} {self.at(kind, 0.99):7.0f}" for kind in ("first", "page")]
        return f"{'  '.join(pairs)}  late {self.at('late', 0.99):5.0f}  ended {len(self.times['end']):4}"


class People:
    """A process of ``storm_clients``, whose lines are read as they come."""

    def __init__(self, part: str, config: dict[str, Any], nice: int) -> None:
        command = [sys.executable, "-m", "benchmarks.storm_clients", part, json.dumps(config)]
        if nice >= 0 or os.geteuid() == 0:
            command = ["nice", "-n", str(nice), *command]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._guard = threading.Lock()
        self._told: list[list[Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with self._guard:
                self._told.append(json.loads(line))

    def told(self) -> list[list[Any]]:
        """Give what was told since the last call."""
        with self._guard:
            told, self._told = self._told, []
        return told

    def is_alive(self) -> bool:
        """Tell whether it goes on."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it. Idempotent."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(30)


class Storm:
    """One storm, over a worker of its own."""

    def __init__(self, options: argparse.Namespace, gunicorn: Gunicorn, kinds: Sequence[str]) -> None:
        self._options, self._gunicorn, self._kinds = options, gunicorn, kinds
        self._worker = Worker(gunicorn)
        self._chats = People("chats", {"port": gunicorn.port, "chats": options.chats}, -10)
        self._attackers: People | None = None
        self._others: list[str] = []
        self.phases: dict[str, Times] = {}
        self.attacked: dict[str, dict[str, int]] = {}
        self.faults: Counter[str] = Counter()

    def weather(self, quiet: bool) -> None:
        """Have it come and go; print what it is like where it is not ``quiet``."""
        try:
            self._phase("", _WARM, True)
            self._phase("before", self._options.before, quiet)
            config = {"port": self._gunicorn.port, "kinds": self._kinds, "others": self._others}
            self._attackers = People("attacks", {**config, "rate": self._options.rate, "half": self._options.half}, 0)
            self._phase("attack", self._options.seconds, quiet)
            self._attackers.end()
            self._take(self._attackers, [])
            self._phase("after", self._options.after, quiet)
        finally:
            self._chats.end()
            if self._attackers:
                self._attackers.end()

    def _phase(self, name: str, seconds: float, quiet: bool) -> None:
        whole = self.phases.setdefault(name, Times())
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            window, begun = Times(), time.monotonic()
            self._worker.shares()
            while time.monotonic() < min(until, begun + _WINDOW):
                time.sleep(0.25)
                self._look([window, whole])
            had, waited = self._worker.shares()
            whole.waited.append(waited)
            if not quiet:
                memory, files, threads = window.memory[-1], self._worker.files(), self._worker.status("Threads")
                print(
                    f"{name:6} {window.line()}  {memory:5} MiB {files:5} files {threads:3} threads "
                    f"{had:3} % CPU, {waited:2} % waiting  {self._state()} {dict(window.failures) or ''}",
                    flush=True,
                )

    def _state(self) -> str:
        try:
            found = self._gunicorn.get("/state")
        except (OSError, ValueError):
            return "no answer"
        return f"{found['streams']} streams {found['runs']} runs"

    def _look(self, to: list[Times]) -> None:
        self._take(self._chats, to)
        if self._attackers:
            self._take(self._attackers, to)
            if not self._attackers.is_alive() and to[1] is self.phases.get("attack"):
                raise SystemExit("the attackers' process ended by itself")
        for one in to:
            one.memory.append(self._worker.status("VmRSS") >> 10)
        if not self._worker.is_alive():
            raise SystemExit("the worker died\n" + self._gunicorn.log()[-2000:])
        if not self._chats.is_alive():
            raise SystemExit("the chats' process ended by itself")

    def _take(self, people: People, to: list[Times]) -> None:
        for what, *more in people.told():
            if what == "thread":
                self._others.append(more[0])
            elif what == "seen":
                self.attacked = more[0]
            elif what == "fail":
                for one in to:
                    one.failures[more[0]] += 1
                self.faults[more[0]] += bool(to)
            elif what == "leak":
                self.faults[f"a stranger was let in: {more[0]}"] += 1
            else:
                for one in to:
                    one.times[what].append(more[0])

    def ratio(self, kind: str, share: float) -> float:
        """Give how much longer it took under attack."""
        return self.phases["attack"].at(kind, share) / self.phases["before"].at(kind, share)

    def report(self) -> None:
        """Print the end."""
        print("\n                 " + "".join(f"{name:>10}" for name in ("before", "attack", "after")) + "     ratio")
        for kind in ("first", "end", "page", "late"):
            for share in (0.5, 0.99):
                found = "".join(f"{self.phases[name].at(kind, share):10.0f}" for name in ("before", "attack", "after"))
                print(f"{kind:5} p{100 * share:.0f} ms     {found} {self.ratio(kind, share):9.1f}")
        failures = "".join(f"{self.phases[name].failures.total():10}" for name in ("before", "attack", "after"))
        print(f"failures         {failures}")
        waited = "".join(f"{max(self.phases[name].waited):10}" for name in ("before", "attack", "after"))
        print(f"waiting for core {waited} %")
        memory = [one for name in ("before", "attack", "after") for one in self.phases[name].memory]
        print(f"memory: start {memory[0]}, max {max(memory)}, end {memory[-1]} MiB")
        for kind, seen in self.attacked.items():
            print(f"  {kind:10} {seen}")
        print(f"chats: {dict(self.faults) or 'nothing failed, and every answer was whole'}")


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Have what is started meanwhile run on that core, as far as there is one."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[core % len(cores)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def storm(options: argparse.Namespace, kinds: Sequence[str], quiet: bool = False) -> Storm:
    """Give a storm that is over."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = dict(options.settings)
        if options.redis:
            with on_core(1):
                settings["redis_url"] = stack.enter_context(running_redis(folder, "--maxmemory", "64mb")).url
        port = free_port()
        with on_core(1):
            model = [sys.executable, "-m", "benchmarks.storm_servers", str(port)]
            stack.enter_context(listening(folder, port, *model))
        gunicorn = Gunicorn(folder, app=_APP, options=["-c", str(ROOT / "gunicorn.conf.py")], **settings)
        gunicorn.env.update(OPENAI_BASE_URL=f"http://127.0.0.1:{port}/v1", OPENAI_API_KEY="k", PYTHONPATH=str(ROOT))
        with on_core(0):
            gunicorn.start()
        try:
            with on_core(1):
                found = Storm(options, gunicorn, kinds)
                found.weather(quiet)
        finally:
            gunicorn.process.kill()
            gunicorn.process.wait()
            if options.log:
                options.log.write_text(gunicorn.log())
    return found


def each(options: argparse.Namespace, kinds: Sequence[str]) -> int:
    """Have each kind come alone; print a line for each."""
    print(
        "           first p50 p99, before and attack    ratio p99  page p99   late  waiting   memory: start, max, end"
    )
    failed = 0
    for kind in kinds:
        found = storm(options, [kind], quiet=True)
        before, attack = found.phases["before"], found.phases["attack"]
        memory = [one for name in ("before", "attack", "after") for one in found.phases[name].memory]
        times = "".join(f"{one.at('first', share):7.0f}" for one in (before, attack) for share in (0.5, 0.99))
        ratios = f"{found.ratio('first', 0.99):13.1f} {found.ratio('page', 0.99):9.1f}"
        faultless = f"{attack.at('late', 0.99):7.0f} {max(before.waited):3} {max(attack.waited):3} %"
        print(f"{kind:10} {times} {ratios} {faultless}   {memory[0]:5} {max(memory):5} {memory[-1]:5}  ", end="")
        print(f"{dict(found.faults) or ''} {found.attacked.get(kind)}", flush=True)
        failed += bool(found.faults)
    return failed


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--before", type=float, default=30)
    parser.add_argument("--after", type=float, default=30)
    parser.add_argument("--chats", type=int, default=20)
    parser.add_argument("--rate", type=float, default=10, help="requests a second of each kind; 0: as they go")
    parser.add_argument("--half", type=float, default=100, help="half-sent requests a second")
    parser.add_argument("--only", metavar="KINDS", help=", ".join(ATTACKS))
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--redis", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={}, help='such as {"worker_streams": 100}')
    parser.add_argument("--log", type=Path, help="where to leave gunicorn's log")
    options = parser.parse_args()
    kinds = options.only.split(",") if options.only else list(ATTACKS)
    if unknown := [kind for kind in kinds if kind not in ATTACKS]:
        parser.error(f"no kinds of attack: {', '.join(unknown)}; these are: {', '.join(ATTACKS)}")
    if options.each:
        sys.exit(1 if each(options, kinds) else 0)
    found = storm(options, kinds)
    found.report()
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    main()
