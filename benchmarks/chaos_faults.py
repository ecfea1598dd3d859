"""The machines of `chaos.py`, and what is done to them: three gunicorns of one worker each, Redis, PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
import redis

from tests.gunicorn_server import Gunicorn
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

from .chaos_checks import Fault, Ledger

ROOT: Final = Path(__file__).resolve().parent.parent
GUNICORNS: Final = 3
POOL: Final = 10
HEARTBEAT_SECONDS: Final = 3.0
_APP: Final = "from benchmarks.chaos_servers import make_app\napp = make_app()\n"


class Planned(NamedTuple):
    """One thing to do: ``at`` so many seconds, to gunicorn ``target``, for ``seconds``; ``more`` says how."""

    at: float
    kind: str
    target: int
    seconds: float
    more: str


class _Kind(NamedTuple):
    """What it takes hold of meanwhile, for how long it lasts (seconds), and the ways to do it."""

    holds: str
    shortest: float = 0.0
    longest: float = 0.0
    ways: Sequence[str] = ("",)


FAULTS: Final = {
    "kill": _Kind("gunicorn"),
    "stop": _Kind("gunicorn", 1, 25),
    "deploy": _Kind("gunicorn"),
    "restart": _Kind("gunicorn", 20, 20),
    "clock": _Kind("clock", 10, 40, ("-60", "-20", "-9.5", "-3", "3", "9.5", "20", "60")),
    "compute": _Kind("gunicorn", 1, 12),
    "terminate": _Kind("database"),
    "lock": _Kind("database", 1, 20, ("SHARE", "EXCLUSIVE")),
    "readonly": _Kind("database", 12, 20),
    "crash": _Kind("database", 0, 5),
    "freeze": _Kind("database", 1, 12),
    "redis": _Kind("redis", 0, 8),
    "pause": _Kind("redis", 1, 8),
    "flush": _Kind("redis"),
    "full": _Kind("redis", 2, 10),
    "clients": _Kind("redis", 0, 0, ("normal", "pubsub")),
}
"""What is done to machines, by name."""
HABITS: Final = ("cut", "slow", "crossing", "repeat", "cancel", "delete", "background")
"""What people do."""


def plan(seed: str, seconds: float, kinds: Sequence[str], every: float) -> list[Planned]:
    """Give what to do in so many seconds: the same for the same arguments, one thing each ``every`` or so, and never
    two at once with what they take hold of."""
    choose, found, free = random.Random(seed), list[Planned](), dict[str, float]()
    at = choose.expovariate(1 / every)
    while at < seconds and kinds:
        kind, target = choose.choice(kinds), choose.randrange(GUNICORNS)
        what = FAULTS[kind]
        lasts, more = choose.uniform(what.shortest, what.longest), choose.choice(what.ways)
        held = what.holds + (str(target) if what.holds in ("gunicorn", "clock") else "")
        if free.get(held, 0) <= at and at + lasts < seconds:
            found.append(Planned(at, kind, target, lasts, more))
            free[held] = at + lasts + 1
        at += choose.expovariate(1 / every)
    return found


class Site:
    """All of it, started. Each of :data:`FAULTS` is a method."""

    def __init__(
        self, folder: Path, redis: RedisServer, postgres: PostgresServer, model_url: str, ledger: Ledger
    ) -> None:
        self._ledger, self.redis, self.postgres, self._folder = ledger, redis, postgres, folder
        self.url = postgres.new_database()
        self._conninfo = self.url.replace("+psycopg", "") + "&application_name=chaos&connect_timeout=5"
        self._clocks = [folder / f"clock{at}" for at in range(GUNICORNS)]
        self.gunicorns = [self._gunicorn(at, model_url) for at in range(GUNICORNS)]
        # One may take longer than it was planned to.
        self._restarting = [asyncio.Lock() for _ in self.gunicorns]

    def _gunicorn(self, at: int, model_url: str) -> Gunicorn:
        folder = self._folder / f"g{at}"
        folder.mkdir()
        settings: dict[str, Any] = {
            "redis_url": self.redis.url,
            "database_url": self.url,
            "database_pool": POOL,
            "max_runs": 10_000,
            "max_streams": 10_000,
            "heartbeat_seconds": HEARTBEAT_SECONDS,
        }
        options = ["-c", str(ROOT / "gunicorn.conf.py")]
        made = Gunicorn(folder, app=_APP, options=options, **settings)
        made.env.update(OPENAI_BASE_URL=model_url, OPENAI_API_KEY="k", PYTHONPATH=str(ROOT))
        made.env["CLOCK"] = str(self._clocks[at])
        self._set_clock(at, 0)
        return made

    def _set_clock(self, at: int, offset: float) -> None:
        # At once: one that is read half-written is another time.
        new = self._clocks[at].with_suffix(".new")
        new.write_text(str(offset))
        new.rename(self._clocks[at])

    @property
    def ports(self) -> list[int]:
        """Give the gunicorns' ports."""
        return [gunicorn.port for gunicorn in self.gunicorns]

    async def start(self) -> None:
        """Start all gunicorns, one after the other: on a busy machine each takes its time."""
        for gunicorn in self.gunicorns:
            await asyncio.to_thread(gunicorn.start)

    def stop(self) -> None:
        """End them."""
        begun = [gunicorn for gunicorn in self.gunicorns if gunicorn.is_running]
        for gunicorn in begun:
            gunicorn.process.terminate()
        for gunicorn in begun:
            try:
                gunicorn.process.wait(40)
            except subprocess.TimeoutExpired:
                gunicorn.stop(signal.SIGKILL)

    def logs(self) -> Iterator[str]:
        """Give the lines that the gunicorns have logged."""
        for gunicorn in self.gunicorns:
            yield from gunicorn.log().splitlines()

    async def do(self, planned: Planned) -> None:
        """Do one thing."""
        fault: Callable[[Planned], Coroutine[Any, Any, None]] = getattr(self, f"_do_{planned.kind}")
        try:
            await fault(planned)
        except (OSError, psycopg.Error, redis.RedisError, AssertionError) as error:
            # Others are at work on the same machines.
            self._ledger.log(f"{planned.kind} failed: {error!r}"[:200])

    def _pids(self, target: int) -> list[int]:
        return self.gunicorns[target].workers() if self.gunicorns[target].is_running else []

    @asynccontextmanager
    async def _during(self, planned: Planned, pids: Sequence[int] = (), what: str = "") -> AsyncIterator[Fault]:
        """While it lasts."""
        fault = self._ledger.begin(planned.kind, pids, what, lasts=True)
        try:
            yield fault
            await asyncio.sleep(planned.seconds)
        finally:
            self._ledger.end(fault)

    # Workers

    async def _do_kill(self, planned: Planned) -> None:
        """Have a worker of the gunicorn die."""
        for pid in self._pids(planned.target)[:1]:
            self._ledger.begin("kill", [pid], f"g{planned.target}")
            _signal(pid, signal.SIGKILL)

    async def _do_stop(self, planned: Planned) -> None:
        """Have a worker stand still for a while."""
        pids = self._pids(planned.target)[:1]
        try:
            async with self._during(planned, pids, f"g{planned.target} for {planned.seconds:.1f} s"):
                for pid in pids:
                    _signal(pid, signal.SIGSTOP)
        finally:
            for pid in pids:
                _signal(pid, signal.SIGCONT)

    async def _do_deploy(self, planned: Planned) -> None:
        """Deploy new code: the arbiter begins a new worker and ends the old one."""
        gunicorn = self.gunicorns[planned.target]
        if gunicorn.is_running:
            self._ledger.begin("deploy", self._pids(planned.target), f"g{planned.target}")
            gunicorn.process.send_signal(signal.SIGHUP)

    async def _do_restart(self, planned: Planned) -> None:
        """Have the machine's gunicorn end, and a new one come on its port."""
        async with self._restarting[planned.target]:
            gunicorn, pids = self.gunicorns[planned.target], self._pids(planned.target)
            fault = self._ledger.begin("restart", pids, f"g{planned.target}", lasts=True)
            try:
                await asyncio.to_thread(gunicorn.stop)
            except subprocess.TimeoutExpired:
                self._ledger.begin("kill", self._pids(planned.target), f"g{planned.target}, which does not end")
                await asyncio.to_thread(gunicorn.stop, signal.SIGKILL)
            finally:
                if not gunicorn.is_running:
                    await asyncio.to_thread(gunicorn.start)
                self._ledger.end(fault)

    async def _do_clock(self, planned: Planned) -> None:
        """Have the machine's clock be wrong for a while."""
        try:
            async with self._during(planned, self._pids(planned.target), f"g{planned.target} by {planned.more} s"):
                self._set_clock(planned.target, float(planned.more))
        finally:
            self._set_clock(planned.target, 0)

    async def _do_compute(self, planned: Planned) -> None:
        """Have the app compute in one request, and let nothing else go on."""
        port = self.gunicorns[planned.target].port
        async with self._during(planned, self._pids(planned.target)[:1], f"g{planned.target} {planned.seconds:.1f} s"):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"GET /compute?seconds={planned.seconds:.1f} HTTP/1.1\r\nHost: chaos\r\n\r\n".encode())
        writer.close()

    # The database

    def admin(self) -> psycopg.Connection[Any]:
        """Give a connection that no fault befalls, but the database's end."""
        return psycopg.connect(self._conninfo, autocommit=True, options="-c default_transaction_read_only=off")

    def _execute(self, *statements: str) -> list[Any]:
        with self.admin() as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def workers(self) -> int:
        """Give how many workers there are, with those that leave."""
        return sum(len(self._pids(at)) for at in range(GUNICORNS))

    def backends(self) -> list[int]:
        """Give the pids of the workers' connections."""
        rows = self._execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name <> 'chaos'"
        )
        return [pid for (pid,) in rows]

    def holders(self) -> list[tuple[str, str, str | None]]:
        """Give runs that are not over, and the workers that have them, with the names that these gave themselves."""
        query = (
            "SELECT r.id, r.worker, w.name FROM assistream_runs r LEFT JOIN assistream_workers w ON w.id = r.worker"
            " WHERE r.status IN ('queued', 'in_progress')"
        )
        return self._execute(query)

    def stored(self, thread_id: str) -> list[tuple[str, Any]]:
        """Give the thread's messages as they are in the database."""
        with self.admin() as connection:
            query = "SELECT id, content FROM assistream_messages WHERE thread_id = %s ORDER BY position"
            return connection.execute(query, [thread_id]).fetchall()

    async def _do_terminate(self, planned: Planned) -> None:
        """End all connections."""
        self._ledger.begin("terminate")
        await asyncio.to_thread(
            self._execute,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name <> 'chaos'",
        )

    async def _do_lock(self, planned: Planned) -> None:
        """Somebody has the table of runs: it can be read, and not written."""
        what = f"IN {planned.more} MODE for {planned.seconds:.1f} s"
        async with self._during(planned._replace(seconds=0), what=what):
            await asyncio.to_thread(self._hold, planned.more, planned.seconds)

    def _hold(self, mode: str, seconds: float) -> None:
        with self.admin() as connection, connection.transaction():
            connection.execute(f"LOCK TABLE assistream_runs IN {mode} MODE")
            time.sleep(seconds)

    async def _do_readonly(self, planned: Planned) -> None:
        """Have it be read, and not written, as a standby."""
        change = "ALTER SYSTEM SET default_transaction_read_only = {}"
        try:
            async with self._during(planned, what=f"for {planned.seconds:.1f} s"):
                await asyncio.to_thread(self._execute, change.format("on"), "SELECT pg_reload_conf()")
        finally:
            await asyncio.to_thread(self._execute, change.format("off"), "SELECT pg_reload_conf()")

    async def _do_crash(self, planned: Planned) -> None:
        """Have it be gone for a while, as after a crash."""
        try:
            async with self._during(planned, what=f"for {planned.seconds:.1f} s"):
                await asyncio.to_thread(self.postgres.stop)
        finally:
            await asyncio.to_thread(self.postgres.start)

    async def _do_freeze(self, planned: Planned) -> None:
        """Have all connections stand still for a while."""
        pids = await asyncio.to_thread(self.backends)
        try:
            async with self._during(planned, what=f"{len(pids)} backends for {planned.seconds:.1f} s"):
                for pid in pids:
                    _signal(pid, signal.SIGSTOP)
        finally:
            for pid in pids:
                _signal(pid, signal.SIGCONT)

    # Redis

    async def _do_redis(self, planned: Planned) -> None:
        """Have it be gone for a while, and come back empty."""
        try:
            async with self._during(planned, what=f"for {planned.seconds:.1f} s"):
                await asyncio.to_thread(self.redis.stop)
        finally:
            await asyncio.to_thread(self.redis.start)

    async def _do_pause(self, planned: Planned) -> None:
        """Have it answer nobody for a while."""
        async with self._during(planned, what=f"for {planned.seconds:.1f} s"):
            await asyncio.to_thread(self.redis.ask, "CLIENT", "PAUSE", str(int(planned.seconds * 1000)), "ALL")

    async def _do_flush(self, planned: Planned) -> None:
        """Have it lose all it has."""
        self._ledger.begin("flush")
        await asyncio.to_thread(self.redis.ask, "FLUSHALL")

    async def _do_full(self, planned: Planned) -> None:
        """Have it take nothing more for a while."""
        try:
            async with self._during(planned, what=f"for {planned.seconds:.1f} s"):
                await asyncio.to_thread(self.redis.ask, "CONFIG", "SET", "maxmemory", "1")
        finally:
            await asyncio.to_thread(self.redis.ask, "CONFIG", "SET", "maxmemory", "0")

    async def _do_clients(self, planned: Planned) -> None:
        """End the connections to it."""
        self._ledger.begin("clients", what=planned.more)
        await asyncio.to_thread(self.redis.ask, "CLIENT", "KILL", "TYPE", planned.more)


def _signal(pid: int, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)


@contextmanager
def model_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run the model server; give its URL, and the process whose output tells each time that it is asked."""
    command = [sys.executable, "-m", "benchmarks.chaos_servers"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.stdin.close()


def tracebacks(lines: Iterator[str]) -> Counter[str]:
    """Give how often each error was logged with its traceback; of one that came of another, the last."""
    found: Counter[str] = Counter()
    inside, last = False, ""
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside and re.match(r"[\w.]+(:|$)", line):
            inside, last = False, line.partition(":")[0]
        elif last and line.startswith(("During handling of the above", "The above exception was")):
            last = ""
        elif last and line.startswith("["):
            found[last] += 1
            last = ""
    found[last] += bool(last)
    return +found
