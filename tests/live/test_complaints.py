"""What fails over and over does not flood the log."""

from __future__ import annotations

import contextlib
import logging
import resource
import threading
import time
import urllib.error
from pathlib import Path

import pytest

from assistream_flask.log.redis import RedisLog
from assistream_flask.platform.log_throttle import LogThrottle
from tests.conftest import wait_until
from tests.gunicorn_server import APP, Gunicorn, running
from tests.redis_server import RedisServer
from tests.watcher import says

LOG = logging.getLogger("assistream_flask.tests")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fail(what: str) -> None:
    raise OSError(what)


def fail_elsewhere(what: str) -> None:
    raise OSError(what)


def caught(throttle: LogThrottle, what: str = "disk full", where: str = "run %s", *, elsewhere: bool = False) -> None:
    try:
        fail_elsewhere(what) if elsewhere else fail(what)
    except OSError as error:
        throttle.error(LOG, error, where, "run_1")


def test_the_first_of_a_kind_is_written_with_its_traceback_and_then_one_line_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    throttle = LogThrottle(clock)
    for second in range(240):
        clock.now = second / 2
        caught(throttle)
        throttle.tend()
    assert [record.exc_info is not None for record in caplog.records] == [True, False]
    assert caplog.messages == ["run run_1", "run run_1 (120 times in 60 s, the newest: OSError('disk full'))"]


def test_what_differs_in_its_words_its_error_or_its_place_is_another_kind(caplog: pytest.LogCaptureFixture) -> None:
    throttle = LogThrottle(Clock())
    for _ in range(3):
        caught(throttle, "one text")
        caught(throttle, "another text")
        caught(throttle, where="the end of run %s")
        caught(throttle, elsewhere=True)
        throttle.error(LOG, KeyError("a"), "run %s", "run_1")
        throttle.warn(LOG, "run %s", "run_1")
        throttle.warn(LOG, "run %s", "run_2")
        throttle.warn(LOG, "away: %r", OSError("full"))
        throttle.warn(LOG, "away: %r", TimeoutError())
    assert len(caplog.records) == 7
    assert caplog.text.count("Traceback") == 3


def test_that_it_is_over_is_said_once_and_the_next_is_the_first_again(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    throttle = LogThrottle(clock)
    for second in range(20):
        clock.now = second
        caught(throttle)
    throttle.warn(LOG, "only once")
    for second in range(20, 200):
        clock.now = second
        throttle.tend()
    assert caplog.messages == ["run run_1", "only once", "over, after 20 times in 19 s: run run_1"]
    caught(throttle)
    assert caplog.records[-1].exc_info is not None


def test_a_line_of_a_minute_has_no_key_and_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    throttle = LogThrottle(clock)
    for at in range(4):
        clock.now = 20 * at
        caught(throttle, "no login\nat https://user:hunter22@host with sk-abcdefgh")
    assert "hunter22" not in caplog.messages[-1]
    assert "sk-abcdefgh" not in caplog.messages[-1]
    assert "\n" not in caplog.messages[-1]


def test_many_threads_that_complain_at_once_write_one_and_count_all(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    throttle = LogThrottle(clock)

    def many() -> None:
        for _ in range(500):
            caught(throttle)

    threads = [threading.Thread(target=many) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(caplog.records) == 1
    clock.now = 59.5
    caught(throttle)
    clock.now = 60
    caught(throttle)
    assert caplog.messages[1:] == ["run run_1 (4001 times in 60 s, the newest: OSError('disk full'))"]


def post(gunicorn: Gunicorn, path: str, content: str) -> int:
    try:
        gunicorn.request("POST", path, {"content": content})
    except urllib.error.HTTPError as error:
        return error.code
    return 201


def test_a_full_disk_under_load_brings_a_few_tracebacks_not_hundreds(tmp_path: Path) -> None:
    app = APP.replace("OfflineServer(", "OfflineServer(' '.join(f'w{n}' for n in range(400)), ")
    with running(tmp_path, app=app, flush_seconds=0.2) as gunicorn:
        threads = [gunicorn.thread() for _ in range(10)]
        # What is written next comes behind these two megabytes, which are no file's that the log is in.
        for _ in range(20):
            assert post(gunicorn, f"{threads[0]}/messages", "x" * 100_000) == 201
        runs = [gunicorn.run(thread, "responses", "chat") for thread in threads[1:]]
        wait_until(lambda: says(gunicorn.entries(threads[-1])[-1]), 30)
        [worker] = gunicorn.workers()
        unlimited = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (1 << 20, unlimited[1]))
        answers = set()
        end = time.monotonic() + 6
        while time.monotonic() < end:
            answers |= {post(gunicorn, f"{thread}/messages", "more") for thread in threads[:3]}
        log = gunicorn.log()
        resource.prlimit(worker, resource.RLIMIT_FSIZE, unlimited)
        assert answers == {503}
        assert "disk is full" in log or "disk I/O error" in log, log
        # Two each: of the driver, and of what it became.
        assert log.count("Traceback") <= 24, log
        assert log.count("\n") < 2000
        for thread, both in zip(threads[1:], runs, strict=True):
            over = [entry["run"] for entry in gunicorn.settled(thread) if entry["run"]]
            assert [(run["id"], run["status"]) for run in over] == [(id, "completed") for id in both]


def test_a_redis_that_is_away_for_seconds_is_said_a_few_times_not_every_second(
    own_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(RedisLog(own_redis.url)):
        own_redis.stop()
        wait_until(lambda: "Redis cannot be heard" in caplog.text, 10)
        time.sleep(5)
        assert caplog.text.count("Redis cannot be heard") <= 2
