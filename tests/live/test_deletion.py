"""A deleted thread's words are nowhere any more, whoever was telling them at that moment; all viewers are told once."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from assistream_flask import events, sse
from assistream_flask.assistants import Assistant
from assistream_flask.events import Event
from assistream_flask.log.memory import MemoryLog
from assistream_flask.log.protocol import EventId, Receipt
from assistream_flask.log.redis import RedisLog
from assistream_flask.runs.open_streams import OpenStream
from assistream_flask.runs.runtime import Runtime
from assistream_flask.runs.thread_history import RunRequest
from assistream_flask.settings import Settings
from assistream_flask.store.sql import Owner, thread_object
from assistream_flask.upstream import answer_stream
from assistream_flask.upstream.deltas import Text
from assistream_flask.upstream.items import Turn
from assistream_flask.web import event_streams
from tests.redis_server import RedisServer
from tests.unit.test_snapshots import Script, until

TRIALS = int(os.environ.get("ASSISTREAM_TRIALS", "200"))
ME = Owner("blue", "me")
WORD = "unsayable"


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(
        client: Script, assistant: Assistant, turns: list[Turn], stall: float, *more: object, **named: object
    ) -> Script:
        client.opened.set()
        return client

    monkeypatch.setattr(answer_stream, "open", ask)


class Watcher:
    """A viewer of a thread, or of the runs of a POST, in a thread of its own."""

    def __init__(
        self,
        workers: Workers,
        thread_id: str,
        choose: random.Random,
        event_id: EventId | None = None,
        runs: set[str] | None = None,
    ) -> None:
        runtime, self._choose, self._said = choose.choice(workers.all), choose, b""
        place = OpenStream("me")
        if runs is None:
            self._frames = event_streams.view(runtime, thread_id, event_id, self._send, lambda: True, place)
        else:
            self._frames = event_streams.follow(
                runtime, thread_id, None, runs, event_id, self._send, lambda: True, place
            )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _send(self, data: bytes) -> Receipt:
        if self._choose.random() < 0.3:
            return Receipt.NO
        self._said += data
        return Receipt.WHOLE

    def _read(self) -> None:
        for data in self._frames:
            self._said += data

    def told(self) -> list[str]:
        """Give the names of its events once its stream has ended."""
        self._thread.join(20)
        assert not self._thread.is_alive(), "its stream does not end"
        return [frame.event for frame in sse.Decoder().feed(self._said)]


class Workers:
    """Workers on one database and, where there is one, one Redis."""

    def __init__(self, folder: Path, redis_url: str, count: int) -> None:
        settings = Settings(database_url=f"sqlite:///{folder / 'a.sqlite3'}", redis_url=redis_url, drain_seconds=0)
        self.all = [Runtime(settings, lambda scope, assistant_id: None) for _ in range(count)]
        for runtime in self.all:
            runtime.start()

    def thread(self) -> str:
        thread_id = events.new_id("thread")
        self.all[0].store.create_thread(ME, thread_object({"id": thread_id, "created_at": 1, "metadata": {}}))
        return thread_id

    def post(self, worker: Runtime, thread_id: str, scripts: Sequence[Script]) -> set[str]:
        asked = [RunRequest(Assistant("a", model="m"), cast(Any, lambda one=one: one), {}) for one in scripts]
        message = events.message(thread_id, "user", [events.text_part(WORD)])
        started = worker.runner.submit(ME, thread_id, message, asked, "parallel", lambda started: None)
        assert started is not None
        return {run["id"] for run in started.runs}

    def settle(self, thread_id: str) -> None:
        """Wait until no worker does anything for the thread."""
        until(lambda: not any(live.thread_id == thread_id for one in self.all for live in one.runner.active.all()))
        until(lambda: not any(one.runner._worker.appender._incomplete for one in self.all))

    def close(self) -> None:
        for runtime in self.all:
            runtime.stop()


@contextlib.contextmanager
def working(folder: Path, redis_url: str = "", count: int = 2) -> Iterator[Workers]:
    workers = Workers(folder, redis_url, count)
    try:
        until(lambda: all(well(one) for one in workers.all))
        yield workers
    finally:
        workers.close()


def well(runtime: Runtime) -> bool:
    return not isinstance(runtime.log, RedisLog) or runtime.log._linked.is_set()


def redis_has(server: RedisServer, pattern: str = "*") -> bool:
    """Tell whether any such key of that Redis has the word, in bytes or entries. Fails where there is none."""
    with redis.Redis.from_url(server.url) as client:
        client.config_set("rdbcompression", "no")
        keys = list(client.scan_iter(pattern, count=1000))
        assert keys
        dumps = [client.dump(key) or b"" for key in keys]
        streams = [client.xrange(key) for key in keys if client.type(key) == b"stream"]
    return any(WORD.encode() in dump for dump in dumps) or WORD in repr(streams)


def memory_has(runtime: Runtime, thread_id: str) -> bool:
    assert isinstance(runtime.log, MemoryLog)
    tail = runtime.log._threads.get(thread_id)
    assert tail is not None
    return WORD in repr(tail.records)


def script() -> Script:
    return Script([[Text(0, f"{WORD}{number} ")] for number in range(200)])


def trial(workers: Workers, choose: random.Random) -> str:
    """Delete a thread while its runs tell, and give its id when they are over; all must have been told."""
    thread_id, scripts = workers.thread(), [script() for _ in range(choose.choice([0, 1, 1, 2]))]
    log = workers.all[0].log
    start = log.end(thread_id)
    watchers = [Watcher(workers, thread_id, choose, choose.choice([None, start])) for _ in range(choose.randrange(3))]
    run_ids = workers.post(choose.choice(workers.all), thread_id, scripts)
    if run_ids and choose.random() < 0.5:
        watchers.append(Watcher(workers, thread_id, choose, start, run_ids))
    pauses = [choose.random() * 0.002 for _ in range(60)]

    def talk() -> None:
        for pause in pauses:
            for one in scripts:
                one.go()
            time.sleep(pause)

    talker = threading.Thread(target=talk)
    talker.start()
    time.sleep(choose.random() * 0.05)
    last = choose.choice([None, start, log.end(thread_id)])
    choose.choice(workers.all).runner.delete(thread_id)
    late = Watcher(workers, thread_id, choose, last)
    talker.join()
    workers.settle(thread_id)
    for watcher in (*watchers, late):
        told = watcher.told()
        assert told.count("thread.deleted") == 1, told
        assert [name for name in told[told.index("thread.deleted") + 1 :] if name != "done"] == []
    return thread_id


def trials(workers: Workers, has: Callable[[str], bool]) -> None:
    def one(number: int) -> None:
        assert not has(trial(workers, random.Random(f"{len(workers.all)}/{number}"))), number

    with ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(one, range(TRIALS)))) == TRIALS


def test_whoever_tells_a_deleted_threads_words_they_are_in_no_key_of_redis(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    with working(tmp_path, own_redis.url) as workers:
        trials(workers, lambda thread_id: redis_has(own_redis, f"*:{thread_id}"))
        assert not redis_has(own_redis, "*")


def test_whoever_tells_a_deleted_threads_words_they_are_in_no_log_in_memory(tmp_path: Path) -> None:
    with working(tmp_path, count=1) as workers:
        trials(workers, lambda thread_id: memory_has(workers.all[0], thread_id))


@pytest.mark.parametrize("how", ["silent", "emptied", "stopped"])
def test_what_redis_keeps_while_it_is_away_goes_when_it_is_back(
    own_redis: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    with working(tmp_path, own_redis.url) as workers:
        thread_id, mine, other = workers.thread(), script(), script()
        here, there = workers.all
        workers.post(here, thread_id, [mine])
        workers.post(there, thread_id, [other])
        delete = here.store.delete_thread
        own_redis.ask("SAVE")

        def lost_meanwhile(thread_id: str) -> None:
            delete(thread_id)
            match how:
                case "silent":
                    own_redis.signal(signal.SIGSTOP)
                case "emptied":
                    own_redis.ask("FLUSHALL")
                case "stopped":
                    own_redis.stop()

        monkeypatch.setattr(here.store, "delete_thread", lost_meanwhile)
        here.runner.delete(thread_id)
        own_redis.signal(signal.SIGCONT)
        own_redis.start()
        mine.go(20)
        other.go(20)
        workers.settle(thread_id)
        there.log.end(thread_id)
        assert not redis_has(own_redis)


def test_a_worker_that_was_away_longer_than_its_end_is_kept_leaves_no_word(
    own_redis: RedisServer, tmp_path: Path
) -> None:
    with working(tmp_path, own_redis.url) as workers:
        thread_id, one = workers.thread(), script()
        here, there = workers.all
        workers.post(here, thread_id, [one])
        one.go(3)
        until(lambda: redis_has(own_redis, f"*:{thread_id}") and there.log.end(thread_id).offset > 5)
        # What another does, and what is left of it a while later.
        there.store.delete_thread(thread_id)
        own_redis.ask("DEL", f"assistream:0:{thread_id}")
        one.go(3)
        workers.settle(thread_id)
        assert not redis_has(own_redis)


def test_no_worker_holds_a_deleted_threads_words_for_its_viewers(own_redis: RedisServer, tmp_path: Path) -> None:
    with working(tmp_path, own_redis.url) as workers:
        thread_id = workers.thread()
        start = workers.all[0].log.end(thread_id)
        readers = [one.log.subscribe(thread_id, start) for one in workers.all]
        workers.all[0].log.append(thread_id, [Event("e", cast(Any, {"text": WORD}))])
        logs = [cast(RedisLog, one.log) for one in workers.all]
        until(lambda: all(WORD in repr(log._threads.all()[0][1].records) for log in logs))
        workers.all[0].runner.delete(thread_id)
        until(lambda: not any(WORD in repr(log._threads.all()[0][1].records) for log in logs))
        assert all(log.since(thread_id, EventId(start.epoch, 1))[0].name == "thread.deleted" for log in logs)
        for reader in readers:
            reader.close()
