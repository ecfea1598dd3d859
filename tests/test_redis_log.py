"""What only the log in Redis has to stand: a server that is away, empty, full, or has an older state."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from assistream_flask.events import Event
from assistream_flask.log import Away, Lost, Place
from assistream_flask.log import redis as redis_log
from assistream_flask.log.redis import RedisLog
from tests.conftest import wait_until
from tests.redis_server import RedisServer

THREAD = "thread_" + "a" * 32


@pytest.fixture
def log(own_redis: RedisServer) -> Iterator[RedisLog]:
    log = RedisLog(own_redis.url)
    wait_until(lambda: log.end(THREAD))
    yield log
    log.close()


def event(number: int) -> Event:
    return Event("e", {"n": number})


def away(call: Callable[[], object]) -> bool:
    try:
        call()
    except Away:
        return True
    return False


def lost_within(log: RedisLog, place: Place, seconds: float) -> bool:
    """Whether a viewer at ``place`` is told within so many ``seconds`` that it needs a snapshot."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            log.subscribe(THREAD, place).close()
        except Lost:
            return True
        except Away:
            pass
        time.sleep(0.05)
    return False


def test_a_reader_of_a_stream_that_was_lost_is_told_within_5_seconds(own_redis: RedisServer, log: RedisLog) -> None:
    reader = log.subscribe(THREAD, log.append(THREAD, [event(1)]))
    own_redis.ask("FLUSHALL")
    with pytest.raises(Lost):
        reader.read(5)
    reader.close()


def test_a_redis_that_comes_back_with_an_older_state_gives_no_place_out_twice(
    own_redis: RedisServer, log: RedisLog
) -> None:
    old = log.append(THREAD, [event(1), event(2)])
    own_redis.ask("SAVE")
    seen = log.append(THREAD, [event(3), event(4)])
    own_redis.stop()
    own_redis.start()
    wait_until(lambda: not away(lambda: log.end(THREAD)))
    assert lost_within(log, seen, 5)
    assert lost_within(log, old, 5)
    assert log.append(THREAD, [event(5)]).epoch != old.epoch


@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_what_needs_redis_says_so_while_it_is_away_and_works_when_it_is_back(
    own_redis: RedisServer, log: RedisLog, how: signal.Signals
) -> None:
    end = log.end(THREAD)
    own_redis.signal(how)
    calls: list[Callable[[], object]] = [
        lambda: log.append(THREAD, [event(1)]),
        lambda: log.end(THREAD),
        lambda: log.quiet(THREAD),
        lambda: log.since(THREAD, end),
        lambda: log.restart(THREAD),
        lambda: log.subscribe(THREAD, end),
        lambda: log.lock(THREAD).__enter__(),
    ]
    assert all(away(call) for call in calls)
    log.signal(THREAD)
    own_redis.signal(signal.SIGCONT)
    own_redis.start()
    wait_until(lambda: not away(lambda: log.append(THREAD, [event(2)])))
    reader = log.subscribe(THREAD, log.end(THREAD))
    log.append(THREAD, [event(3)])
    assert [record.data()["n"] for record in reader.read(5)] == [3]
    reader.close()


def test_a_full_redis_takes_nothing_and_still_answers(own_redis: RedisServer, log: RedisLog) -> None:
    place = log.append(THREAD, [event(1)])
    own_redis.ask("CONFIG", "SET", "maxmemory", "1")
    assert away(lambda: log.append(THREAD, [event(2)]))
    assert log.since(THREAD, place) == []


def test_a_lock_whose_holder_died_begins_the_log_anew(
    own_redis: RedisServer, log: RedisLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 0.3)
    place = log.append(THREAD, [event(1)])
    code = (
        "import os; from assistream_flask.log import redis as r; r.LOCK_SECONDS = 0.3\n"
        f"held = r.RedisLog({own_redis.url!r}).lock({THREAD!r}); held.__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert lost_within(log, place, 5)
    assert log.quiet(THREAD) is not None


def test_while_one_worker_holds_the_lock_another_waits_and_no_page_is_exact(
    own_redis: RedisServer, log: RedisLog
) -> None:
    other = RedisLog(own_redis.url)
    with log.lock(THREAD):
        assert other.quiet(THREAD) is None
    assert other.quiet(THREAD) == log.end(THREAD)
    other.close()


def test_a_threads_stream_has_at_most_about_so_many_bytes(own_redis: RedisServer) -> None:
    log = RedisLog(own_redis.url, max_bytes=200_000)
    for number in range(100):
        end = log.append(THREAD, [Event("e", {"n": number, "text": "x" * 10_000})])
    with redis.Redis.from_url(own_redis.url) as client:
        used = client.memory_usage(f"assistream:0:{THREAD}")
    assert used < 250_000
    assert log.since(THREAD, end._replace(offset=end.offset - 3))[-1].place == end
    log.close()


def test_a_stream_that_nobody_uses_expires_and_one_that_is_viewed_does_not(own_redis: RedisServer) -> None:
    log = RedisLog(own_redis.url, max_age=1)
    viewed, unused = log.end(THREAD), log.end("thread_b")
    reader = log.subscribe(THREAD, viewed)
    time.sleep(2.5)
    assert log.end(THREAD) == viewed
    assert log.end("thread_b").epoch != unused.epoch
    reader.close()
    log.close()


def test_a_signal_reaches_the_other_workers(own_redis: RedisServer, log: RedisLog) -> None:
    heard: list[str] = []
    other = RedisLog(own_redis.url)
    other.listen(heard.append)
    end = time.monotonic() + 10
    while not heard and time.monotonic() < end:
        log.signal(THREAD)
        time.sleep(0.05)
    assert set(heard) == {THREAD}
    other.close()
