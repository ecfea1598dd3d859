"""A crowd's snapshots: few are read, few at once, and none is older than who gets it has seen or done."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from assistream_flask.log.protocol import EventId
from assistream_flask.runs import shared_snapshots
from assistream_flask.runs.shared_snapshots import ReadLimit, SharedSnapshots
from assistream_flask.runs.snapshot import Page
from assistream_flask.store.sql import ThreadStore
from tests.conftest import Caller, MakeApp, at_once, wait_until


def started(*works: Callable[[], object]) -> list[threading.Thread]:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


def page(offset: int) -> Page:
    return [], False, EventId("a", offset)


@pytest.mark.parametrize("how", ["fresh", "from a log that is gone"])
def test_a_crowd_that_comes_to_a_thread_at_once_has_few_pages_read(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    read, reads = ThreadStore.page, list[int]()

    def slowly(*given: Any) -> Any:
        reads.append(1)
        found = read(*given)
        time.sleep(0.2)
        return found

    app = make_app(owner=lambda: "me")
    caller = Caller(app)
    caller.client.post(f"{caller.url}/messages", json={"content": "Hello all"})
    monkeypatch.setattr(ThreadStore, "page", slowly)

    def view() -> bool:
        query = {} if how == "fresh" else {"last_event_id": "abcdef-7"}
        stream = app.test_client().get(f"{caller.url}/events", query_string=query)
        frame = next(stream.iter_encoded())
        stream.close()
        return b"thread.snapshot" in frame and b"Hello all" in frame

    assert at_once(40, lambda _: view()) == [True] * 40
    # The first one's, the crowd's, and that of who came too late for it.
    assert len(reads) <= 4


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_no_snapshot_is_older_than_what_its_asker_did_before(seed: int) -> None:
    written, guard, wrong = 0, threading.Lock(), list[tuple[int, int]]()

    def read(*_: object) -> Page:
        found = page(written)
        time.sleep(choose.random() * 0.003)
        return found

    def work() -> None:
        nonlocal written
        for _ in range(60):
            with guard:
                written += 1
                mine = written
            found = ours.get("thread")
            if found is None or found.event_id.offset < mine:
                wrong.append((mine, found.event_id.offset if found else -1))
            time.sleep(choose.random() * 0.003)

    choose = random.Random(seed)
    ours = SharedSnapshots(read)
    join(started(*[work] * 8))
    assert wrong == []


def test_who_comes_to_a_thread_alone_waits_for_nobody() -> None:
    ours = SharedSnapshots(lambda *_: page(1))
    start = time.monotonic()
    for _ in range(100):
        ours.get("thread")
    # A pause each would be 10 s.
    assert time.monotonic() - start < 5


def test_a_failure_is_that_of_all_who_waited_and_the_next_reads_anew() -> None:
    reads, begun, go = list[int](), threading.Event(), threading.Event()

    def read(*_: object) -> Page:
        reads.append(1)
        if len(reads) == 1:
            begun.set()
            assert go.wait(10)
        if len(reads) <= 2:
            raise ValueError(len(reads))
        return page(len(reads))

    found = list[Any]()

    def ask() -> None:
        try:
            found.append(ours.get("thread"))
        except ValueError as error:
            found.append(error.args[0])

    ours = SharedSnapshots(read)
    first = started(ask)
    begun.wait(10)
    others = started(*[ask] * 10)
    wait_until(lambda: len(ours._open) == 1)
    time.sleep(0.2)
    go.set()
    join(first + others)
    assert Counter(found) == {1: 1, 2: 10}
    anew = ours.get("thread")
    assert anew is not None
    assert anew.event_id == EventId("a", 3)
    assert (ours._open, ours._begun) == ({}, {})


@pytest.mark.parametrize("where", ["reads", "waits"])
def test_who_is_stopped_while_it_reads_for_others_or_waits_to_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    class Killed(BaseException):
        pass

    begun, go, kills = threading.Event(), threading.Event(), [True]

    def read(*_: object) -> Page:
        if not begun.is_set():
            begun.set()
            assert go.wait(10)
            if where == "reads":
                kill()
        return page(1)

    def kill(*_: object) -> None:
        if kills and kills.pop():
            raise Killed

    if where == "waits":
        monkeypatch.setattr(shared_snapshots, "time", SimpleNamespace(sleep=kill, monotonic=time.monotonic))
    found = list[str]()

    def ask() -> None:
        try:
            found.append("" if ours.get("thread") is None else "got it")
        except Killed:
            found.append("killed")

    ours = SharedSnapshots(read)
    threads = started(ask)
    begun.wait(10)
    threads += started(*[ask] * 10)
    threading.Event().wait(0.2)
    go.set()
    join(threads)
    assert Counter(found) == {"got it": 10, "killed": 1}
    assert (ours._open, ours._begun) == ({}, {})


def test_pages_of_a_crowd_to_many_threads_are_read_a_few_at_once_and_stuck_ones_stop_nobody_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shared_snapshots, "_WAIT_SECONDS", 0.5)
    inside, most, go = 0, 0, threading.Event()
    guard = threading.Lock()

    def read(thread_id: str, _: int, read_limit: ReadLimit) -> Page:
        nonlocal inside, most
        with read_limit():
            with guard:
                inside += 1
                most = max(most, inside)
            if thread_id.startswith("stuck"):
                assert go.wait(20)
            time.sleep(0.01)
            with guard:
                inside -= 1
        return page(1)

    ours = SharedSnapshots(read)
    join(started(*[lambda at=at: ours.get(f"thread {at}") for at in range(20)]))
    assert most == 2
    stuck = started(*[lambda at=at: ours.get(f"stuck {at}") for at in range(2)])
    assert ours.get("thread") is not None
    go.set()
    join(stuck)
    most = 0
    join(started(*[lambda at=at: ours.get(f"thread {at}") for at in range(20)]))
    assert most == 2
