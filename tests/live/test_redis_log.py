"""What only the log in Redis has to stand: a server that is away, empty, full, or has an older state."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import redis

from assistream_flask.events import Event
from assistream_flask.log import redis as redis_log
from assistream_flask.log.protocol import (
    REFUSED,
    AppendRequest,
    Claim,
    EventId,
    LogUnavailableError,
    PositionExpiredError,
)
from assistream_flask.log.redis import RedisLog
from assistream_flask.runs.log_appender import LogAppender
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
    return Event("e", cast(Any, {"n": number}))


def away(call: Callable[[], object]) -> bool:
    try:
        call()
    except LogUnavailableError:
        return True
    return False


def lost_within(log: RedisLog, event_id: EventId, seconds: float) -> bool:
    """Tell whether a viewer at ``event_id`` is told within so many ``seconds`` that it needs a snapshot."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            log.subscribe(THREAD, event_id).close()
        except PositionExpiredError:
            return True
        except LogUnavailableError:
            pass
        time.sleep(0.05)
    return False


def test_a_reader_of_a_stream_that_was_lost_is_told_within_5_seconds(own_redis: RedisServer, log: RedisLog) -> None:
    reader = log.subscribe(THREAD, log.append(THREAD, [event(1)]))
    own_redis.ask("FLUSHALL")
    with pytest.raises(PositionExpiredError):
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
        lambda: log.end_unless_locked(THREAD),
        lambda: log.since(THREAD, end),
        lambda: log.restart(THREAD),
        lambda: log.forget(THREAD, event(1)),
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
    event_id = log.append(THREAD, [event(1)])
    own_redis.ask("CONFIG", "SET", "maxmemory", "1")
    assert away(lambda: log.append(THREAD, [event(2)]))
    assert log.since(THREAD, event_id) == []
    log.forget(THREAD, event(3))
    assert [record.data()["n"] for record in log.since(THREAD, event_id)] == [3]


def test_a_lock_whose_holder_died_begins_the_log_anew(
    own_redis: RedisServer, log: RedisLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 0.3)
    event_id = log.append(THREAD, [event(1)])
    code = (
        "import os; from assistream_flask.log import redis as r; r.LOCK_SECONDS = 0.3\n"
        f"held = r.RedisLog({own_redis.url!r}).lock({THREAD!r}); held.__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert lost_within(log, event_id, 5)
    assert log.end_unless_locked(THREAD) is not None


def test_while_one_worker_holds_the_lock_another_waits_and_no_page_is_exact(
    own_redis: RedisServer, log: RedisLog
) -> None:
    other = RedisLog(own_redis.url)
    with log.lock(THREAD):
        assert other.end_unless_locked(THREAD) is None
    assert other.end_unless_locked(THREAD) == log.end(THREAD)
    other.close()


def test_a_threads_stream_has_at_most_about_so_many_bytes(own_redis: RedisServer) -> None:
    log = RedisLog(own_redis.url, max_bytes=200_000)
    for number in range(100):
        end = log.append(THREAD, [Event("e", cast(Any, {"n": number, "text": "x" * 10_000}))])
    with redis.Redis.from_url(own_redis.url) as client:
        used = client.memory_usage(f"assistream:0:{THREAD}")
    assert used < 250_000
    assert log.since(THREAD, end._replace(offset=end.offset - 3))[-1].event_id == end
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


def test_who_lost_the_lock_appends_nothing_under_it(
    own_redis: RedisServer, log: RedisLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 0.1)
    with contextlib.closing(RedisLog(own_redis.url)) as other:
        with log.lock(THREAD):
            assert log.append_all([AppendRequest(THREAD, [event(1)], locked=True)])[0] is not None
            time.sleep(0.2)
            with other.lock(THREAD):
                start = other.end(THREAD)
                assert log.append_all([AppendRequest(THREAD, [event(2)], locked=True)]) == [None]
                # Words need no lock.
                assert log.append_all([AppendRequest(THREAD, [event(3)])])[0] is not None
                assert other.append_all([AppendRequest(THREAD, [event(4)], locked=True)])[0] is not None
            assert log.append_all([AppendRequest(THREAD, [event(5)], locked=True)]) == [None]
            assert [record.data()["n"] for record in log.since(THREAD, start)] == [3, 4]
        with log.lock(THREAD), log.lock(THREAD):
            assert log.append_all([AppendRequest(THREAD, [event(6)], locked=True)])[0] is not None


def test_a_fence_holds_in_all_workers_and_is_known_again_after_all_was_lost(
    own_redis: RedisServer, log: RedisLog
) -> None:
    earlier, later = Claim("run_1", 0), Claim("run_1", 1)
    with contextlib.closing(RedisLog(own_redis.url)) as other:
        start = log.append(THREAD, [event(1)], earlier)
        other.fence(THREAD, later)
        with contextlib.closing(log.subscribe(THREAD, start)) as viewer:
            assert log.append(THREAD, [event(2)], earlier) is REFUSED
            assert viewer.read(0.1) == []
        own_redis.ask("FLUSHALL")
        # Nobody knows of it now; who has the run says so with the next words.
        other.append(THREAD, [event(3)], later)
        assert log.append(THREAD, [event(4)], earlier) is REFUSED
        end = other.append(THREAD, [event(5)], later)
        assert [record.data()["n"] for record in log.since(THREAD, end._replace(offset=0))] == [3, 5]
    assert 0 < cast(int, own_redis.ask("PTTL", "assistream:0-claim:run_1")) <= redis_log.CLAIM_SECONDS * 1000


def test_a_fence_that_could_not_be_set_is_set_before_anything_else_when_redis_is_back(
    own_redis: RedisServer, log: RedisLog
) -> None:
    earlier, later = Claim("run_1", 0), Claim("run_1", 1)
    appender = LogAppender(log)
    event_id = log.append(THREAD, [event(1)], earlier)
    own_redis.signal(signal.SIGSTOP)
    assert not appender.fence(THREAD, later)
    assert appender.append(THREAD, [event(2)], later) is None
    assert list(appender.rebuild()) == []
    own_redis.signal(signal.SIGCONT)
    wait_until(lambda: list(appender.rebuild()) == [THREAD])
    # Its viewers get a snapshot, and nothing of what its last holder still tells.
    assert lost_within(log, event_id, 5)
    assert log.append(THREAD, [event(3)], earlier) is REFUSED
    assert appender.append(THREAD, [event(4)], later) == log.end(THREAD)


OLD_APPEND = """
local ttl, most, next, found = ARGV[1], tonumber(ARGV[3]), 4, {}
for i, key in ipairs(KEYS) do
    local count, bytes = tonumber(ARGV[next]), 0
    local epoch, offset = last(key)
    if not epoch then epoch, offset = restart(key, ttl), 0 end
    offset = tonumber(offset)
    local prefix = epoch .. '-'
    for n = 1, count do
        local body = ARGV[next + n]
        bytes = bytes + #body
        redis.call('XADD', key, 'MAXLEN', '=', ARGV[2], prefix .. string.format('%.0f', offset + n), 'e', body)
    end
    redis.call('PEXPIRE', key, ttl)
    redis.call('PUBLISH', key,
        prefix .. string.format('%.0f\\n', offset + 1) .. table.concat(ARGV, '\\0', next + 1, next + count))
    found[i] = prefix .. string.format('%.0f', offset + count)
    next = next + count + 1
end
return found
"""
"""What the older release appends with: it knows no claims."""


def test_a_worker_of_the_older_release_appends_beside_this_one_also_where_a_run_was_taken_over(
    own_redis: RedisServer, log: RedisLog
) -> None:
    start = log.append(THREAD, [event(1)], Claim("run_1", 0))
    log.fence(THREAD, Claim("run_1", 1))
    with contextlib.closing(log.subscribe(THREAD, start)) as viewer, redis.Redis.from_url(own_redis.url) as client:
        old = client.register_script(redis_log.lua("common") + OLD_APPEND)
        body = redis_log._body(event(2))
        [event_id] = old(["assistream:0:" + THREAD], [600_000, 10_000, 8 << 20, 1, body])
        assert event_id.decode() == f"{start.epoch}-2"
        assert log.append(THREAD, [event(3)], Claim("run_1", 1)) == start._replace(offset=3)
        seen: list[int] = []
        for _ in range(20):
            seen += [record.data()["n"] for record in viewer.read(0.1)]
        assert seen == [2, 3]


def test_whoever_asks_a_log_that_is_being_closed_finds_it_away_and_nothing_worse(own_redis: RedisServer) -> None:
    worse: list[BaseException] = []

    def ask(log: RedisLog, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                log.end(THREAD)
            except LogUnavailableError:
                pass
            except BaseException as error:
                worse.append(error)

    for _ in range(30):
        log, stop = RedisLog(own_redis.url), threading.Event()
        askers = [threading.Thread(target=ask, args=[log, stop]) for _ in range(8)]
        for asker in askers:
            asker.start()
        time.sleep(0.03)
        log.close()
        stop.set()
        for asker in askers:
            asker.join(20)
    assert worse == []


def test_what_a_run_told_is_recovered_where_a_lock_of_its_thread_ran_out(
    log: RedisLog, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_log, "LOCK_SECONDS", 0.1)
    start = log.append(THREAD, [Event("e", cast(Any, {"n": 1}), "r")])
    log.append(THREAD, [Event("e", cast(Any, {"n": 2}), "r")])
    with log.lock(THREAD):
        wait_until(lambda: lost_within(log, start, 0.1))
        log.append(THREAD, [Event("e", cast(Any, {"n": 3}), "r")])
    log.append(THREAD, [Event("e", cast(Any, {"n": 4}), "r")])
    records, event_id = log.recover(THREAD, start, "r")
    assert [record.data()["n"] for record in records] == [2, 3, 4]
    assert event_id == log.end(THREAD)
    own_redis.ask("FLUSHALL")
    log.append(THREAD, [Event("e", cast(Any, {"n": 5}), "r")])
    with pytest.raises(PositionExpiredError):
        log.recover(THREAD, start, "r")


def test_what_was_put_aside_of_a_log_is_no_more_than_it_keeps_and_goes_within_a_minute(
    log: RedisLog, own_redis: RedisServer
) -> None:
    start = log.end(THREAD)
    for _ in range(4):
        log.append(THREAD, [Event("e", cast(Any, {"n": number}), "r") for number in range(1500)])
        log.restart(THREAD, keep=True)
    past = f"{log._prefix}{THREAD}:past"
    assert cast(int, own_redis.ask("XLEN", past)) <= 2000
    assert 0 < cast(int, own_redis.ask("PTTL", past)) <= 60_000
    with pytest.raises(PositionExpiredError):
        log.recover(THREAD, start, "r")


def test_a_thread_that_two_begin_anew_at_once_is_no_error(log: RedisLog, monkeypatch: pytest.MonkeyPatch) -> None:
    appender = LogAppender(log)
    appender.mark_incomplete(THREAD)
    restart = log.restart

    def other_meanwhile(thread_id: str, **more: Any) -> None:
        monkeypatch.undo()
        restart(thread_id, **more)
        assert list(appender.rebuild()) == [THREAD]

    monkeypatch.setattr(log, "restart", other_meanwhile)
    assert list(appender.rebuild()) == [THREAD]
    assert appender.has_all()
