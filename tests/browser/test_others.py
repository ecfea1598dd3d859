"""Two workers on one database, each with an event log of its own in memory: what one stores shows at the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Collection, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext

from assistream_flask.store.sql import ThreadStore
from tests.browser.test_browser import chromium as chromium
from tests.browser.test_browser import context as context
from tests.browser.test_browser import open_page, wait
from tests.conftest import Caller, MakeApp, wait_until
from tests.gunicorn_server import Gunicorn, running, stream
from tests.unit.test_runner import me
from tests.watcher import OVER, Watcher, says, settle

SOON = 15


class Pair:
    """Two gunicorns of one worker each, and a new thread with a viewer at each."""

    def __init__(self, one: Gunicorn, other: Gunicorn) -> None:
        self.one, self.other = one, other
        self.thread = one.thread()
        self.viewers = [Watcher([one], self.thread), Watcher([other], self.thread)]
        wait_until(lambda: all(viewer.snapshots for viewer in self.viewers), SOON)

    def settle(self, count: int) -> list[Any]:
        """Wait until both viewers have so many entries, all runs over, just as they are stored; give those."""
        # Before anybody reads the thread: that has a worker look at it.
        wait_until(lambda: all(self._has(viewer, count) for viewer in self.viewers), SOON)
        return settle(self.one, {self.thread: self.viewers})[self.thread]

    def _has(self, viewer: Watcher, count: int) -> bool:
        runs = [one["run"] for one in viewer.entries if one["assistant_id"]]
        return len(viewer.entries) == count and all(run and run["status"] in OVER for run in runs)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Gunicorn]]:
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "other")]
    shared = {"database_url": f"sqlite:///{folders[0] / 'shared.sqlite3'}"}
    with contextlib.ExitStack() as stack:
        options = {"delay": 0, "drain_seconds": 0, "heartbeat_seconds": 1, **shared}
        yield [stack.enter_context(running(folder, **options)) for folder in folders]


@pytest.fixture
def pair(both: list[Gunicorn]) -> Iterator[Pair]:
    pair = Pair(*both)
    yield pair
    for viewer in pair.viewers:
        viewer.stop()


@pytest.mark.parametrize("asks", [False, True], ids=["message", "short answer"])
def test_what_either_worker_adds_shows_at_the_other(pair: Pair, asks: bool) -> None:
    for number, at in enumerate([pair.one, pair.other, pair.other, pair.one], 1):
        if asks:
            at.run(pair.thread, "responses", content=f"question {number}")
        else:
            at.request("POST", f"{pair.thread}/messages", {"content": f"note {number}"})
        pair.settle((1 + asks) * number)


def test_what_both_add_at_once_shows_at_both(pair: Pair) -> None:
    def add(at: Gunicorn) -> None:
        for number in range(20):
            at.request("POST", f"{pair.thread}/messages", {"content": f"{number} at {at.port}"})

    adding = [threading.Thread(target=add, args=[at]) for at in (pair.one, pair.other)]
    for each in adding:
        each.start()
    for each in adding:
        each.join()
    pair.settle(40)


def test_what_a_worker_adds_itself_is_no_reason_for_a_snapshot(pair: Pair) -> None:
    # Its viewers came when nobody knew what they had seen.
    time.sleep(3)
    mine, theirs = [viewer.snapshots for viewer in pair.viewers]
    for number in range(1, 6):
        pair.one.run(pair.thread, "responses", content=f"question {number}")
        pair.settle(2 * number)
    assert pair.viewers[0].snapshots == mine
    assert pair.viewers[1].snapshots > theirs


def test_a_thread_that_one_worker_deletes_is_deleted_at_the_other(pair: Pair) -> None:
    events = stream(pair.other, f"{pair.thread}/events")
    next(events)
    pair.one.request("DELETE", pair.thread)
    end = time.monotonic() + SOON
    # There is a ping a second.
    names = [event.name for event in takewhile(lambda _: time.monotonic() < end, events)]
    assert names[-1] == "thread.deleted"


def test_what_waits_at_one_worker_for_an_answer_of_the_other_comes_after_it_and_either_cancels_it(pair: Pair) -> None:
    (first,) = pair.one.run(pair.thread, "responses-stall", content="first")
    wait_until(lambda: pair.other.entries(pair.thread)[1]["run"]["status"] == "in_progress", SOON)
    pair.other.run(pair.thread, "responses", content="second")
    time.sleep(2)
    assert pair.one.entries(pair.thread)[3]["run"]["status"] == "queued"
    pair.other.request("POST", f"{pair.thread}/runs/{first}/cancel", {})
    found = pair.settle(4)
    assert [entry["run"]["status"] for entry in found if entry["run"]] == ["cancelled", "completed"]


def test_a_stream_of_a_command_that_the_other_worker_was_given_first_ends_with_its_runs(pair: Pair) -> None:
    head = {"Content-Type": "application/json", "Idempotency-Key": "once", "Accept": "text/event-stream"}
    body = json.dumps({"assistant_ids": ["responses"], "content": "Hi"}).encode()
    told = []
    for at in (pair.one, pair.other):
        request = urllib.request.Request(f"{at.url}{pair.thread}/runs", body, head)
        with urllib.request.urlopen(request, timeout=40) as answer:
            told.append(answer.read() if at is pair.other else answer.read(100))
    assert told[1].endswith(b"event: done\ndata: [DONE]\n\n")
    assert b'"status":"completed"' in told[1]
    pair.settle(2)


def test_a_worker_says_who_else_serves_its_database_and_what_to_do(pair: Pair) -> None:
    (other,) = pair.other.workers()
    wait_until(lambda: f"/{other} serves this database too" in pair.one.log(), 30)
    assert "Set ASSISTREAM_REDIS_URL" in pair.one.log()
    # One a minute, not one a look.
    assert pair.one.log().count("serves this database too") < 5


def test_threads_are_looked_at_while_another_worker_lives_and_once_more(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, newest = list[int](), ThreadStore.newest

    def counted(store: ThreadStore, thread_ids: Collection[str]) -> dict[str, tuple[int, int]]:
        looks.append(len(thread_ids))
        return newest(store, thread_ids)

    monkeypatch.setattr(ThreadStore, "newest", counted)
    caller = Caller(make_app(owner=me))
    time.sleep(2.5)
    assert looks == []
    other = make_app(owner=me)
    assert len(Caller(other, caller.thread_id).entries()) == 0
    wait_until(lambda: len(looks) > 2)
    other.extensions["assistream"].close()
    time.sleep(2)
    before = len(looks)
    time.sleep(2.5)
    assert len(looks) == before


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


class Renewed:
    """A gunicorn that was told to start its successor: two masters on one socket, with a worker each."""

    def __init__(self, gunicorn: Gunicorn) -> None:
        self._gunicorn = gunicorn
        (self.old,) = gunicorn.workers()
        gunicorn.process.send_signal(signal.SIGUSR2)
        wait_until(self._starts, 30)
        wait_until(lambda: gunicorn.get("/pid") == self.new, 30)

    def _starts(self) -> bool:
        for pid in self._gunicorn.workers():
            with contextlib.suppress(OSError):
                if pid != self.old and (found := children(pid)):
                    self.master, (self.new,) = pid, found
                    return True
        return False

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.master, signal.SIGTERM)
        wait_until(lambda: not lives(self.master), 40)


@pytest.fixture
def gunicorn(tmp_path: Path) -> Iterator[Gunicorn]:
    with running(tmp_path, delay=0, drain_seconds=0, heartbeat_seconds=1) as gunicorn:
        yield gunicorn


@pytest.fixture
def renewed(gunicorn: Gunicorn) -> Iterator[Renewed]:
    found = Renewed(gunicorn)
    yield found
    found.stop()


ASK = """
async (count) => {
  window.found = [];
  while (found.length < count) {
    const id = await createThread(), page = new AbortController();
    let last;
    await loadThread(id, (entries) => { last = entries; }, { signal: page.signal });
    const run = await addMessageAndRun(id, "Hi", "responses", () => {});
    // A browser has six connections, and each open thread takes one.
    page.abort();
    found.push([run.status, last.length, last.at(-1).run.status, text(last.at(-1)) !== ""]);
  }
}
"""


def test_two_masters_after_a_usr2_show_all_that_either_stores_and_then_the_new_one_goes_on_alone(
    gunicorn: Gunicorn, renewed: Renewed, context: BrowserContext
) -> None:
    page = open_page(context, gunicorn.url)
    page.evaluate(f"void ({ASK})(12)")
    wait(page, lambda: page.evaluate("found.length") == 12, 60)
    assert page.evaluate("found") == [["completed", 2, "completed", True]] * 12
    # Whoever takes a connection: each thread has viewers at both, or commands.
    threads: dict[str, list[Watcher]] = {gunicorn.thread(): [] for _ in range(8)}
    for at, (thread, watchers) in enumerate(threads.items()):
        watchers += [Watcher([gunicorn], thread, 10 * at + seed) for seed in range(3)]
    wait_until(lambda: all(one.snapshots for ones in threads.values() for one in ones), 30)
    for thread in threads:
        gunicorn.run(thread, "responses")
    for entries in settle(gunicorn, threads).values():
        assert [bool(says(entry)) for entry in entries] == [True, True]
    gunicorn.process.send_signal(signal.SIGQUIT)
    gunicorn.process.wait(40)
    for thread in threads:
        gunicorn.run(thread, "chat", content="And now?")
    assert {len(entries) for entries in settle(gunicorn, threads).values()} == {4}
    assert gunicorn.get("/pid") == renewed.new
    for ones in threads.values():
        for one in ones:
            one.stop()
