"""Memory that all callers share: the log's in all, and what one caller may write in a minute."""

from __future__ import annotations

import random
import tracemalloc
from contextlib import closing

import pytest

from assistream_flask import events
from assistream_flask.errors import RequestError
from assistream_flask.log.memory import MemoryLog
from assistream_flask.log.protocol import PositionExpiredError
from assistream_flask.runs.byte_budget import ByteBudget
from assistream_flask.store.sql import Owner
from tests.conftest import Caller, MakeApp

MIB = 1 << 20
TEXT = events.text_delta(events.message("t", "assistant", [], run_id="run_1"), 0, "x" * 10_000)


def kept(log: MemoryLog) -> int:
    return sum(buffer.size for _, buffer in log._threads.all())


def test_all_logs_together_stay_within_their_memory_whatever_is_written() -> None:
    choose, log = random.Random("memory"), MemoryLog(max_memory=MIB)
    for _ in range(2000):
        log.append(f"t{choose.randrange(500)}", [TEXT] * choose.randrange(1, 4))
        assert kept(log) <= MIB + MIB // 16 + 4 * 11_000
    assert kept(log) > MIB // 2


@pytest.mark.parametrize("size", [10, 500])
def test_a_log_of_short_events_takes_no_more_memory_than_it_may_with_what_python_needs_for_them(size: int) -> None:
    short = events.text_delta(events.message("t", "assistant", [], run_id="run_1"), 0, "x" * size)
    tracemalloc.start()
    try:
        log = MemoryLog(max_memory=4 * MIB)
        for number in range(20_000):
            log.append(f"t{number % 20}", [short])
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 3 * MIB < taken < 4 * MIB + MIB // 2


def test_what_nobody_views_goes_before_what_somebody_views() -> None:
    log = MemoryLog(max_memory=MIB)
    start = log.end("viewed")
    with closing(log.subscribe("viewed", start)) as reader:
        log.append("viewed", [TEXT] * 10)
        for number in range(300):
            log.append(f"t{number}", [TEXT])
        found = reader.read(0)
        while more := reader.read(0):
            found += more
        assert len(found) == 10
        with pytest.raises(PositionExpiredError):
            log.since("t0", log.end("t0")._replace(offset=0))


def test_a_thread_that_is_viewed_and_too_large_by_itself_loses_its_oldest_events() -> None:
    log = MemoryLog(max_memory=MIB)
    with closing(log.subscribe("t", log.end("t"))):
        log.append_all([])
        for _ in range(300):
            log.append("t", [TEXT])
        end = log.end("t")
        assert log.since("t", end._replace(offset=end.offset - 20))
    assert kept(log) <= MIB + MIB // 16 + 11_000


def test_a_caller_may_write_so_much_at_once_and_as_much_again_in_a_minute() -> None:
    now = 0.0
    budget = ByteBudget(1000, clock=lambda: now)
    one, other = Owner("test", "one"), Owner("test", "other")
    for _ in range(10):
        budget.take(one, 100)
    with pytest.raises(RequestError) as refused:
        budget.take(one, 100)
    assert (refused.value.status, refused.value.code, refused.value.retry_after) == (429, "too_many_bytes", 7)
    budget.take(other, 1000)
    now = 6.0
    budget.take(one, 100)
    with pytest.raises(RequestError):
        budget.take(one, 100)
    now = 200.0
    budget.take(one, 5000)


def test_a_message_beyond_the_budget_is_refused_and_stores_nothing(make_app: MakeApp) -> None:
    caller = Caller(make_app(max_bytes=100))
    for status in (201, 201, 429):
        answer = caller.client.post(f"{caller.url}/messages", json={"content": "ä" * 25})
        assert answer.status_code == status
    assert answer.get_json()["error"]["code"] == "too_many_bytes"
    assert int(answer.headers["Retry-After"]) > 0
    assert len(caller.entries()) == 2
