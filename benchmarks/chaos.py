"""Mixed chaos over three machines, and whether anything that was said is lost, doubled or moved meanwhile.

    python -m benchmarks.chaos                               five minutes of all there is
    python -m benchmarks.chaos --minutes 60 --seed 7         an hour; the seed makes the plan of it
    python -m benchmarks.chaos --only kill,stop,readonly     with these faults only (--without takes some away)
    python -m benchmarks.chaos --plan                        tells what would be done, and when

Three gunicorns with one gevent worker each, as three machines, on a redis-server and a PostgreSQL that it starts
itself, and a model server whose words count up and name their answer. People talk in threads, each of which has
several viewers, while at random moments, and mixed:

  kill, stop                   a worker gets SIGKILL, or SIGSTOP for 1 to 25 s
  deploy, restart              a gunicorn gets HUP, or SIGTERM and another takes its port
  clock                        a machine's clock (what `time.time` gives there) is up to 60 s wrong for a while
  compute                      the app computes for up to 12 s in one request
  terminate, lock, readonly    PostgreSQL's connections end; the runs are locked against writes for up to 20 s; it only
                               reads for 12 to 20 s
  crash, freeze                PostgreSQL is restarted at once; its connections stand still
  redis, pause, flush          Redis is killed, answers nobody, loses all it has
  full, clients                it takes nothing more; its connections end
  cut, slow                    viewers are cut and come back, or take nothing for a while
  crossing, repeat             two POSTs at once; one POST several times under one key
  cancel, delete, background   runs are cancelled, threads deleted under way; some answers are made in the background

At every event of every viewer: its text is a beginning of the answer, ids follow each other, nothing comes after an
end. In the end: every POST's message is there once, every end that is not `completed` has a cause among what was done,
the model was asked once for each run, and all viewers have what every worker and the database have. All that is done
is printed with its time, and so is each violation; a last table has the figures. Exits with 1 when there was one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psycopg

from tests.postgres_server import PostgresServer, postgres_binaries
from tests.redis_server import running_redis

from . import chaos_faults
from .chaos_checks import DATABASE, Ledger
from .chaos_faults import FAULTS, GUNICORNS, HABITS, POOL, Planned, Site, plan
from .chaos_load import BROKEN, PATIENCE_SECONDS, Answer, Conversation, World, ask

_MOST_CONNECTIONS: Final = GUNICORNS * (POOL + 1)
_Wrong = tuple[str, str] | None
"""A kind and its detail."""


class Chaos:
    """One run of it."""

    def __init__(self, site: Site, world: World, plan: Sequence[Planned], talks: int, seed: str) -> None:
        self._site, self._world, self._plan, self._seed = site, world, plan, seed
        self._ledger = world.ledger
        self._talks = talks
        self._begun = 0
        self._held: list[Conversation] = []

    async def run(self) -> None:
        """Give all of it, to the end."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
        looks = [
            asyncio.create_task(job())
            for job in (self._look_who_holds, self._look_who_serves, self._look_at_connections)
        ]
        done = asyncio.create_task(self._do_plan())
        await asyncio.gather(*(self._talk() for _ in range(self._talks)))
        await done
        self._ledger.log("the chaos is over, and so is all talk")
        for look in looks:
            look.cancel()
        await self._check_the_end()

    async def _do_plan(self) -> None:
        tasks = []
        for planned in self._plan:
            await asyncio.sleep(max(0.0, self._ledger.began + planned.at - time.time()))
            tasks.append(asyncio.create_task(self._site.do(planned)))
        await asyncio.gather(*tasks)

    async def _talk(self) -> None:
        while time.time() < self._world.until:
            self._begun += 1
            conversation = Conversation(self._world, self._begun, self._seed)
            self._held.append(conversation)
            await conversation.hold()

    async def _look_who_holds(self) -> None:
        """Who has which run, by the database."""
        while True:
            with contextlib.suppress(psycopg.Error, OSError):
                for run_id, worker, name in await asyncio.to_thread(self._site.holders):
                    if name:
                        # One that ends soon may never be asked who it is.
                        self._ledger.pids[worker] = int(name.rpartition("/")[2])
                    held = self._ledger.runs.get(run_id)
                    if held is not None and worker not in held.workers:
                        held.workers.append(worker)
            await asyncio.sleep(0.5)

    async def _look_who_serves(self) -> None:
        """Give the names of the workers."""
        while True:
            for state in await self._states():
                self._ledger.pids[state["worker"]] = state["pid"]
            await asyncio.sleep(1)

    async def _look_at_connections(self) -> None:
        """Give how many they have to the database."""
        many = 0
        while True:
            await asyncio.sleep(1)
            with contextlib.suppress(psycopg.Error, OSError):
                count, workers = len(await asyncio.to_thread(self._site.backends)), self._site.workers()
                self._ledger.counts["most connections"] = max(count, self._ledger.counts["most connections"])
                # One that ended or is held up in the database is a connection for a while.
                many = many + 1 if count > workers * (POOL + 1) and not self._ledger.lately(DATABASE, 20) else 0
                if many == 3:
                    self._ledger.violate("too many connections", "", "", f"{count} of {workers} workers")

    async def _states(self) -> list[Any]:
        found = []
        for port in self._site.ports:
            with contextlib.suppress(*BROKEN):
                answer = await ask(port, "GET", "/state", seconds=5)
                if answer.status == 200:
                    found.append(answer.data)
        return found

    # The end

    async def _check_the_end(self) -> None:
        for conversation in self._held:
            if conversation.entries is not None:
                await self._check_thread(conversation, time.time() + PATIENCE_SECONDS)
            elif conversation.is_deleted:
                rows = await asyncio.to_thread(self._site.stored, conversation.talk.id)
                if rows:
                    self._ledger.violate("what was deleted is stored", conversation.talk.id, "", f"{rows}")
        end = time.time() + PATIENCE_SECONDS
        await self._within(end, self._check_connections)
        await self._within(end, self._check_streams)

    async def _within(self, end: float, check: Callable[[], Awaitable[_Wrong]]) -> None:
        while (wrong := await check()) is not None:
            if time.time() > end:
                self._ledger.violate(wrong[0], "", "", wrong[1])
                return
            await asyncio.sleep(0.5)

    async def _check_thread(self, conversation: Conversation, end: float) -> None:
        """Give what was settled is still so, for every worker and in the database."""
        assert conversation.entries is not None
        thread = conversation.talk.id
        for port in self._site.ports:
            found = await self._read(port, f"/assistream/threads/{thread}/messages?limit=200", end)
            if found is None or found.status != 200 or found.data["data"] != conversation.entries:
                self._ledger.violate("it is not as it was settled", thread, "", f"{found}")
        rows = await asyncio.to_thread(self._site.stored, thread)
        mine = [(entry["message"]["id"], entry["message"]["content"]) for entry in conversation.entries]
        if rows != mine:
            self._ledger.violate("the database has something else", thread, "", f"{rows}, not {mine}")

    async def _read(self, port: int, path: str, end: float) -> Answer | None:
        """Give the answer, ``None`` where there is none until ``end``."""
        while time.time() < end:
            with contextlib.suppress(*BROKEN):
                found = await ask(port, "GET", path)
                if found.status != 503:
                    return found
            await asyncio.sleep(0.5)
        return None

    async def _check_connections(self) -> _Wrong:
        count = len(await asyncio.to_thread(self._site.backends))
        return ("too many connections", f"{count}") if count > _MOST_CONNECTIONS else None

    async def _check_streams(self) -> _Wrong:
        states = await self._states()
        left = [state["streams"] for state in states]
        return ("streams that nobody reads", f"{left}") if len(states) < GUNICORNS or any(left) else None


def table(ledger: Ledger, minutes: float, errors: dict[str, int]) -> str:
    """Give the figures."""
    kinds: dict[str, int] = {}
    for one in ledger.violations:
        kinds[one.kind] = kinds.get(one.kind, 0) + 1
    rows: list[tuple[str, object]] = [("minutes", f"{minutes:.1f}"), *sorted(ledger.counts.items())]
    rows += [(f"ended {name}", count) for name, count in sorted(ledger.ends.items())]
    rows += [(f"excused: {name}", count) for name, count in sorted(ledger.excused.items())]
    rows += [(f"traceback: {name}", count) for name, count in sorted(errors.items())]
    rows += [(f"VIOLATION: {name}", count) for name, count in sorted(kinds.items())]
    rows.append(("violations", len(ledger.violations)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _listen(ledger: Ledger, lines: Iterable[str]) -> None:
    """Take note of each time that the model server is asked."""
    for line in lines:
        at, token, assistant = line.split()
        ledger.asks.setdefault((token, assistant), []).append(float(at))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--every", type=float, default=4, help="seconds from one fault to the next, on average (4)")
    parser.add_argument("--threads", type=int, default=20, help="threads that are talked in at once (20)")
    parser.add_argument("--viewers", type=int, default=3, help="viewers of each (3)")
    parser.add_argument("--longest", type=float, default=40, help="seconds that an answer takes at most, from 1 (40)")
    parser.add_argument("--only", help="which kinds of chaos, with commas")
    parser.add_argument("--without", default="", help="all but these")
    parser.add_argument("--plan", action="store_true", help="tell what would be done")
    parser.add_argument("--keep", type=Path, help="a folder for the gunicorns' logs, which must not be there yet")
    options = parser.parse_args()
    known = {*FAULTS, *HABITS}
    chosen = set(options.only.split(",")) if options.only else set(known)
    left = set(options.without.split(",")) - {""}
    if unknown := (chosen | left) - known:
        parser.error(f"got {', '.join(sorted(unknown))}: there is {', '.join((*FAULTS, *HABITS))}")
    options.kinds = frozenset(chosen - left)
    return options


async def _main(options: argparse.Namespace, folder: Path, ledger: Ledger) -> None:
    planned = plan(options.seed, options.minutes * 60, [one for one in FAULTS if one in options.kinds], options.every)
    binaries = postgres_binaries()
    if binaries is None:
        raise SystemExit("PostgreSQL is not installed")
    with contextlib.ExitStack() as stack:
        # Its user cannot enter all folders, and a socket's path is short.
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True))
        postgres = PostgresServer(binaries, Path(data), lasting=True)
        stack.callback(postgres.close)
        redis = stack.enter_context(running_redis(folder))
        url, model = stack.enter_context(chaos_faults.model_server())
        assert model.stdout is not None
        threading.Thread(target=_listen, args=(ledger, model.stdout), daemon=True).start()
        site = Site(folder, redis, postgres, url, ledger)
        stack.callback(site.stop)
        await site.start()
        ledger.began = time.time()
        until = ledger.began + options.minutes * 60
        world = World(
            site.ports,
            ledger,
            options.kinds,
            options.viewers,
            options.longest,
            chaos_faults.HEARTBEAT_SECONDS,
            until,
        )
        await Chaos(site, world, planned, options.threads, options.seed).run()
        errors = chaos_faults.tracebacks(site.logs())
    print(table(ledger, (time.time() - ledger.began) / 60, errors))


def main() -> None:
    """Do what the command line asks for."""
    options = _options()
    if options.plan:
        for one in plan(options.seed, options.minutes * 60, [k for k in FAULTS if k in options.kinds], options.every):
            print(f"{one.at:8.1f} s  {one.kind} g{one.target} {one.seconds:.1f} s {one.more}")
        return
    ledger = Ledger(lambda line: print(line, flush=True))
    with contextlib.ExitStack() as stack:
        if options.keep:
            options.keep.mkdir(parents=True)
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        asyncio.run(_main(options, folder, ledger))
    sys.exit(1 if ledger.violations else 0)


if __name__ == "__main__":
    main()
