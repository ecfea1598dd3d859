"""Many workers on one Redis and one PostgreSQL: any of them serves any request, and all tell the same story.

``ASSISTREAM_CUTS``, ``ASSISTREAM_ATTACHES`` and ``ASSISTREAM_STARTS`` make the long tests longer.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from assistream_flask.events import Event as Told
from assistream_flask.events import Said
from assistream_flask.log.redis import RedisLog
from assistream_flask.testing import OfflineServer, Reply, Request
from assistream_flask.upstream.items import closed, turns_of
from tests.cluster import APP, Cluster, clustered
from tests.conftest import text, wait_until
from tests.gunicorn_server import Event, Gunicorn, stream
from tests.live.test_live import Viewer
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer

LIMITS = {"max_streams": 1000, "log_events": 100_000}
STARTS = 8
"""How often both tabs start runs in one thread."""

# What the run that gave an answer was asked with.
Asked = dict[str, list[tuple[str, str]]]


def count(name: str, default: int) -> int:
    return int(os.environ.get(f"ASSISTREAM_{name}", default))


@pytest.fixture(scope="module")
def four(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, postgres: PostgresServer
) -> Iterator[Gunicorn]:
    """Four workers behind one port: each connection lands on whichever is free."""
    folder, database = tmp_path_factory.mktemp("four"), postgres.new_database()
    with clustered(folder, redis_server, database, delay=0.01, **LIMITS) as cluster:
        yield cluster.gunicorns[0]


@pytest.fixture(scope="module")
def model() -> Iterator[OfflineServer]:
    with OfflineServer(delay=0) as server:
        yield server


@pytest.fixture(scope="module")
def apart(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, postgres: PostgresServer, model: OfflineServer
) -> Iterator[Cluster]:
    """Three workers with a port each, so that a test can choose; the model server is ``model``."""
    folder, database = tmp_path_factory.mktemp("apart"), postgres.new_database()
    options = {"gunicorns": 3, "workers": 1, "model_url": model.base_url}
    with clustered(folder, redis_server, database, **options, **LIMITS) as cluster:
        yield cluster


def all_of(jobs: Sequence[Callable[[], object]], seconds: float) -> None:
    """Do them at once; raises what the first one that failed raised."""
    failed: list[BaseException] = []

    def work(job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=[job], daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        while thread.is_alive() and not failed:
            thread.join(0.2)
            assert time.monotonic() < end, "it takes too long"
    if failed:
        raise failed[0]


class Tab(Viewer):
    """A viewer that may come from anywhere in the log, and makes sure that it goes on there."""

    def __init__(self) -> None:
        super().__init__()
        self.snapshots = 0

    def take(self, event: Event) -> None:
        if event.name == "thread.snapshot":
            self.snapshots += 1
            assert not event.data["has_more"]
        elif event.id is not None:
            epoch, _, offset = self.ids[-1].partition("-")
            assert event.id == f"{epoch}-{int(offset) + 1}", f"{event.id} came after {self.ids[-1]}"
        super().take(event)

    def watch(self, gunicorn: Gunicorn, thread: str, messages: int, cuts: int, chance: random.Random) -> None:
        """Look on, cut off ``cuts`` times, until so many messages are there and all is over."""
        while not self.settled(messages):
            left = chance.randrange(1, 22) if cuts > 0 else 10**9
            last = self.ids[-1] if self.ids else None
            events = stream(gunicorn, f"{thread}/events", last=last, by=chance.choice(["header", "query"]))
            with contextlib.closing(events):  # type: ignore[type-var]
                for event in events:
                    self.take(event)
                    left -= event.id is not None
                    if left <= 0 or self.settled(messages):
                        break
            cuts -= 1
        assert cuts <= 0, "it was over before all cuts were made"


def test_1000_cuts_across_four_workers_under_load_lose_repeat_and_reorder_nothing(four: Gunicorn) -> None:
    for trial in range(-(-count("CUTS", 1000) // 1000)):
        _cut_1000_times(four, trial)
    assert "Traceback" not in four.log()


def _cut_1000_times(four: Gunicorn, seed: int) -> None:
    viewers, rounds = 16, 9
    paths = [four.thread() for _ in range(8)]
    tabs = [(paths[at % 8], Tab()) for at in range(viewers)]
    jobs = [partial(_talk, four, path, rounds, random.Random(f"{seed} {path}")) for path in paths]
    for at, (path, tab) in enumerate(tabs):
        jobs.append(partial(tab.watch, four, path, rounds * 4, -(-1000 // viewers), random.Random(f"{seed} {at}")))
    all_of(jobs, 200)
    for path, tab in tabs:
        assert tab.entries == four.entries(path)
        assert tab.snapshots == 1, "a place was not found again"
    ends = [entry["run"]["status"] for _, tab in tabs for entry in tab.entries if entry["run"]]
    assert set(ends) == {"completed", "cancelled"}


def _talk(four: Gunicorn, path: str, rounds: int, chance: random.Random) -> None:
    for number in range(rounds):
        mode = chance.choice(["parallel", "sequential"])
        body = {"assistant_ids": ["tutor", "critic"], "content": f"Question {number}", "mode": mode}
        runs = four.request("POST", f"{path}/runs", body)["runs"]
        time.sleep(chance.random() / 2)
        four.request("POST", f"{path}/messages", {"content": f"Aside {number}"})
        if chance.random() < 0.4:
            four.request("POST", f"{path}/runs/{chance.choice(runs)['id']}/cancel", {})


def test_attaches_while_two_workers_append_miss_and_repeat_nothing(redis_server: RedisServer) -> None:
    url, stop, readers = redis_server.empty_url(), 12, 4
    rounds = count("ATTACHES", 1500) // readers
    with contextlib.closing(RedisLog(url)) as one, contextlib.closing(RedisLog(url)) as other:
        ready = threading.Barrier(readers + 2)

        def read(at: int) -> None:
            log, chance = (one, other)[at % 2], random.Random(at)
            for number in range(rounds):
                ready.wait(20)
                place = log.end(f"t{number}")
                while place.offset < stop:
                    # A cut now and then: back at the place of the last record seen.
                    with contextlib.closing(log.subscribe(f"t{number}", place)) as reader:
                        while place.offset < stop and chance.random() < 0.7:
                            for record in reader.read(5):
                                assert record.event_id == place._replace(offset=place.offset + 1)
                                place = record.event_id
                    log = chance.choice([one, other])

        def write(log: RedisLog) -> None:
            for number in range(rounds):
                ready.wait(20)
                for _ in range(0, stop, 4):
                    log.append(f"t{number}", [Told("e", {}), Told("e", {})])

        jobs: list[Callable[[], object]] = [partial(write, one), partial(write, other)]
        jobs += [partial(read, at) for at in range(readers)]
        all_of(jobs, 200)


@pytest.mark.parametrize("route", ["messages", "runs"])
def test_100_posts_with_one_key_across_four_workers_store_one_message_and_get_one_answer(
    four: Gunicorn, route: str
) -> None:
    thread = four.thread()
    body = (
        b'{"content": "Once"}' if route == "messages" else b'{"assistant_ids": ["tutor", "critic"], "content": "Once"}'
    )

    found = set()

    def post() -> None:
        headers = {"Content-Type": "application/json", "Idempotency-Key": thread}
        request = urllib.request.Request(f"{four.url}{thread}/{route}", data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found.add((answer.status, answer.read()))

    all_of([post] * 100, 60)
    (status, _), *others = found
    assert not others
    assert status == (201 if route == "messages" else 202)
    entries = four.settled(thread)
    assert [entry["assistant_id"] for entry in entries] == [None, *(["tutor", "critic"] if route == "runs" else [])]


def test_two_tabs_on_two_workers_that_start_runs_at_once_see_one_order_and_no_run_sees_half_an_answer(
    apart: Cluster, model: OfflineServer
) -> None:
    asked: Asked = {}
    numbers = itertools.count()

    def answer(request: Request) -> Reply:
        said = f"answer {next(numbers)}, in a few words"
        asked[said] = request.messages
        return Reply(said)

    model.replies = answer
    for trial in range(-(-count("STARTS", 24) // STARTS)):
        _start_at_once(apart, asked, trial)
    assert "Traceback" not in apart.log()


def _start_at_once(apart: Cluster, asked: Asked, seed: int) -> None:
    sides, tabs = apart.gunicorns[:2], (Tab(), Tab())
    path, chance = sides[0].thread(), random.Random(seed)
    groups, modes = [["tutor"], ["critic"], ["tutor", "critic"]], ["parallel", "sequential"]
    plans = [[(chance.choice(groups), chance.choice(modes)) for _ in range(STARTS)] for _ in sides]
    totals = list(itertools.accumulate(2 + len(one[0]) + len(other[0]) for one, other in zip(*plans, strict=True)))
    gate = threading.Barrier(2)

    def start(side: int) -> None:
        for at, (ids, mode) in enumerate(plans[side]):
            gate.wait(60)
            sides[side].request("POST", f"{path}/runs", {"assistant_ids": ids, "mode": mode, "content": f"{side} {at}"})
            # Half of the threads are idle at each start; on the others all these wait their turn.
            if seed % 2:
                wait_until(partial(tabs[side].settled, totals[at]), 60)

    jobs: list[Callable[[], object]] = [partial(start, side) for side in (0, 1)]
    jobs += [partial(tabs[side].watch, sides[side], path, totals[-1], 0, chance) for side in (0, 1)]
    all_of(jobs, 120)
    entries = sides[0].entries(path)
    assert tabs[0].entries == tabs[1].entries == entries == apart.gunicorns[2].entries(path)
    _each_saw_all_before(entries, asked, plans)


def _each_saw_all_before(entries: list[Any], asked: Asked, plans: list[list[tuple[list[str], str]]]) -> None:
    """Each POST's entries stand together, and each run was asked with what stands before it, in order."""
    left, history = list(entries), list[tuple[str | None, str]]()
    while left:
        question = left.pop(0)
        side, at = map(int, text(question).split())
        ids, mode = plans[side][at]
        group, left = left[: len(ids)], left[len(ids) :]
        assert [entry["assistant_id"] for entry in group] == ids
        history.append((None, text(question)))
        before = list(history)
        for entry in group:
            assert entry["run"]["status"] == "completed"
            ours = history if mode == "sequential" else before
            said = [Said(speaker, words) for speaker, words in ours]
            turns = closed(turns_of(said, entry["assistant_id"], {}))
            assert asked[text(entry)] == [(turn.role, turn.text) for turn in turns]
            history.append((entry["assistant_id"], text(entry)))


def test_any_worker_serves_any_request_and_cancels_any_run(apart: Cluster, model: OfflineServer) -> None:
    model.replies = Reply("Word by word. " * 1000, delay=0.05)
    started, seen, cancelled = apart.gunicorns
    path = started.thread()
    tab = Tab()
    with contextlib.closing(stream(seen, f"{path}/events")) as events:  # type: ignore[type-var]
        tab.take(next(events))
        under_way, queued = started.run(path, "tutor") + started.run(path, "critic")
        for event in events:
            tab.take(event)
            if event.name == "thread.message.delta":
                break
        request = model.requests[-1]
        for run in (queued, under_way):
            cancelled.request("POST", f"{path}/runs/{run}/cancel", {})
        while not tab.settled(4):
            tab.take(next(events))
    assert request.wait(10)
    assert request.disconnected
    assert [entry["run"]["status"] for entry in tab.entries if entry["run"]] == ["cancelled", "cancelled"]
    assert [one.entries(path) for one in apart.gunicorns] == [tab.entries] * 3


def test_without_redis_two_workers_are_refused_at_start_and_told_what_to_set(tmp_path: Path) -> None:
    alone = Gunicorn(tmp_path, app=APP, workers=2)
    with pytest.raises(AssertionError):
        alone.start()
    assert alone.process.wait(20) != 0
    assert "ASSISTREAM_REDIS_URL" in alone.log()
