"""The log's contract, for every log in ``LOGS``."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import pytest

from assistream_flask.events import Event
from assistream_flask.log import memory, thread_buffer
from assistream_flask.log import redis as redis_log
from assistream_flask.log.memory import MemoryLog
from assistream_flask.log.protocol import (
    REFUSED,
    AppendRequest,
    Claim,
    EventId,
    Log,
    PositionExpiredError,
    Receipt,
    Record,
    Subscription,
)
from assistream_flask.log.redis import RedisLog
from tests.redis_server import DOCUMENTED, RedisServer


class Clock:
    """Time that the test moves: by hand, or, ``real`` seconds of which are a second of it, by waiting."""

    def __init__(self, real: float = 0) -> None:
        self._now, self.real = 1000.0, real

    def __call__(self) -> float:
        return self._now

    def forward(self, seconds: float) -> None:
        self._now += seconds
        time.sleep(seconds * self.real)


class MakeLog(Protocol):
    clock: Clock
    trims_by_age: bool

    def __call__(self, *, max_events: int = ..., max_bytes: int = ..., max_age: float = ...) -> Log: ...


class MakeMemoryLog:
    trims_by_age = True

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.clock = Clock()

    def __call__(self, *, max_events: int = 10_000, max_bytes: int = 8 << 20, max_age: float = 600) -> Log:
        return MemoryLog(max_events=max_events, max_bytes=max_bytes, max_age=max_age, clock=self.clock)


class MakeRedisLog:
    trims_by_age = False

    def __init__(self, request: pytest.FixtureRequest) -> None:
        # A stream lives for a real second, so that a machine which is busy for half of one loses none.
        self.clock, self._server = Clock(0.1), cast(RedisServer, request.getfixturevalue("redis_server"))
        self._server.start()

    def __call__(self, *, max_events: int = 10_000, max_bytes: int = 8 << 20, max_age: float = 600) -> Log:
        # Every log of these tests is one of its own, of a user that may do no more than the docs say.
        url = self._server.url_of(DOCUMENTED, int(self._server.empty_url().rpartition("/")[2]))
        return RedisLog(url, max_events=max_events, max_bytes=max_bytes, max_age=max_age * self.clock.real)


LOGS = [
    pytest.param(MakeMemoryLog, id="memory"),
    pytest.param(MakeRedisLog, id="redis", marks=pytest.mark.server),
]


@pytest.fixture(params=LOGS)
def make(request: pytest.FixtureRequest) -> Iterator[MakeLog]:
    made: list[Log] = []
    factory = request.param(request)

    class Make:
        clock, trims_by_age = factory.clock, factory.trims_by_age

        def __call__(self, **limits: Any) -> Log:
            made.append(factory(**limits))
            return made[-1]

    yield Make()
    for log in made:
        log.close()


def event(number: int, key: str | None = None) -> Event:
    return Event("e", cast(Any, {"n": number}), key)


def numbers(records: list[Record]) -> list[int]:
    return [record.data()["n"] for record in records]


def after(log: Log, event_id: EventId) -> list[int]:
    return numbers(log.since("t", event_id))


# Ids


def test_a_log_begins_at_offset_0(make: MakeLog) -> None:
    assert make().end("t").offset == 0


def test_offsets_grow_by_one_an_event_in_one_epoch(make: MakeLog) -> None:
    log = make()
    start = log.end("t")
    assert log.append("t", [event(1), event(2)]) == EventId(start.epoch, 2)
    assert log.append("t", [event(3)]) == EventId(start.epoch, 3) == log.end("t")
    assert [record.event_id for record in log.since("t", start)] == [EventId(start.epoch, n) for n in (1, 2, 3)]


def test_threads_and_logs_have_epochs_of_their_own(make: MakeLog) -> None:
    log, other = make(), make()
    assert len({log.end("t").epoch, log.end("u").epoch, other.end("t").epoch}) == 3


def test_a_thread_is_viewed_while_somebody_reads_it(make: MakeLog) -> None:
    log = make()
    log.append("u", [event(1)])
    reader, other = (log.subscribe("t", log.end("t")) for _ in range(2))
    assert log.viewed() == ["t"]
    reader.close()
    assert log.viewed() == ["t"]
    other.close()
    assert log.viewed() == []


def test_an_append_of_nothing_changes_nothing(make: MakeLog) -> None:
    log = make()
    assert log.append("t", []) == log.end("t") == EventId(log.end("t").epoch, 0)


def test_what_is_appended_for_several_threads_at_once_is_in_each_of_them_in_order(make: MakeLog) -> None:
    log = make()
    starts = {name: log.end(name) for name in ("t", "u", "v")}
    readers = {name: log.subscribe(name, start) for name, start in starts.items()}
    told = [("t", [event(1), event(2)]), ("u", [event(3)]), ("v", []), ("t", [event(4)])]
    places = log.append_all([AppendRequest(thread_id, events) for thread_id, events in told])
    assert list(places) == [
        EventId(starts[name].epoch, offset) for name, offset in (("t", 2), ("u", 1), ("v", 0), ("t", 3))
    ]
    for name, expected in (("t", [1, 2, 4]), ("u", [3]), ("v", [])):
        assert numbers(log.since(name, starts[name])) == expected
        assert numbers(readers[name].read(0.05)) == expected
        readers[name].close()
    assert list(log.append_all([])) == []


def test_a_record_has_its_frame_with_its_id_and_the_key_of_its_run(make: MakeLog) -> None:
    log = make()
    start = log.end("t")
    log.append("t", [Event("thread.x", cast(Any, {"a": "é\n"}), "run_1")])
    (record,) = log.since("t", start)
    assert record.frame == f'event: thread.x\ndata: {{"a":"é\\n"}}\nid: {start.epoch}-1\n\n'.encode()
    assert (record.name, record.key, record.data()) == ("thread.x", "run_1", {"a": "é\n"})


def test_a_place_reads_back_as_it_was_written() -> None:
    event_id = EventId("0af", 12)
    assert EventId.parse(str(event_id)) == event_id


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "1",
        "-1",
        "0a-",
        "0a--1",
        "0a-01",
        "0A-1",
        "zz-1",
        "0a-1 ",
        "0a-1\n",
        "0a-1e3",
        "0a-٣",
        "0a-" + "9" * 19,
        "a" * 33 + "-1",
    ],
)
def test_what_is_no_place_is_taken_for_none(text: str | None) -> None:
    assert EventId.parse(text) is None


# The end of a thread


def test_a_log_that_forgets_keeps_the_last_event_alone(make: MakeLog) -> None:
    log = make()
    start = log.end("t")
    before = log.append("t", [event(1), event(2)])
    log.forget("t", event(3))
    assert log.end("t") == EventId(before.epoch, before.offset + 1)
    assert after(log, before) == [3]
    assert lost(log, start)
    log.forget("u", event(4))
    assert log.end("u").offset == 1


def test_a_reader_is_told_the_last_event_once_and_one_that_is_behind_is_lost(make: MakeLog) -> None:
    log = make()
    behind = log.subscribe("t", log.end("t"))
    reader = log.subscribe("t", log.append("t", [event(1)]))
    got: list[Record] = []
    waiting = threading.Thread(target=lambda: got.extend(reader.read(5)))
    waiting.start()
    log.forget("t", event(2))
    waiting.join(10)
    assert numbers(got) == [2]
    assert reader.read(0.3) == []
    with pytest.raises(PositionExpiredError):
        behind.read(5)
    late = log.subscribe("t", EventId(log.end("t").epoch, 1))
    assert numbers(late.read(5)) == [2]
    for one in (behind, reader, late):
        one.close()


def test_nothing_comes_after_the_last_event_and_no_restart_undoes_it(make: MakeLog) -> None:
    log = make()
    log.append("t", [event(1)])
    log.forget("t", event(2))
    end = log.end("t")
    told = [("t", [event(3)]), ("u", [event(4)]), ("t", [event(5), event(6)])]
    first, second, third = log.append_all([AppendRequest(*one) for one in told])
    assert (first, third) == (None, None)
    assert second == log.end("u")
    assert log.append("t", [event(7)]) == end
    log.restart("t")
    log.forget("t", event(8))
    with log.lock("t"):
        pass
    assert log.end_unless_locked("t") == log.end("t") == end
    assert after(log, EventId(end.epoch, end.offset - 1)) == [2]


def test_the_last_event_lives_for_its_seconds_and_a_log_begins_anew_then(
    make: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "GONE_SECONDS", 1)
    monkeypatch.setattr(redis_log, "GONE_SECONDS", 1)
    log = make()
    log.append("t", [event(1)])
    log.forget("t", event(2))
    old = log.end("t")
    make.clock.forward(15)
    log.tend()
    assert log.end("t").epoch != old.epoch
    assert log.append("t", [event(3)]) == log.end("t")


# Resume


def test_since_gives_all_records_after_a_place_and_none_at_the_end(make: MakeLog) -> None:
    log = make()
    start = log.end("t")
    end = log.append("t", [event(n) for n in range(1, 6)])
    for offset in range(6):
        assert after(log, EventId(start.epoch, offset)) == list(range(offset + 1, 6))
    assert after(log, end) == []


def lost(log: Log, event_id: EventId) -> bool:
    """Tell whether the place is lost, which both ways to read must agree on."""
    ways: list[Callable[[], object]] = [
        lambda: log.since("t", event_id),
        lambda: log.subscribe("t", event_id).close(),
    ]
    found = []
    for way in ways:
        try:
            way()
            found.append(False)
        except PositionExpiredError:
            found.append(True)
    assert found[0] == found[1]
    return found[0]


def test_a_place_of_another_epoch_is_lost_even_at_offset_0(make: MakeLog) -> None:
    log, other = make(), make()
    log.append("t", [event(1)])
    other.append("t", [event(1)])
    assert lost(log, other.end("t"))
    assert lost(log, EventId(other.end("t").epoch, 0))
    assert lost(log, log.end("u"))


def test_a_place_in_the_future_is_lost(make: MakeLog) -> None:
    log = make()
    end = log.append("t", [event(1)])
    assert not lost(log, end)
    assert lost(log, end._replace(offset=2))


def test_a_place_in_a_thread_that_the_log_never_saw_is_lost(make: MakeLog) -> None:
    assert lost(make(), EventId("0a", 0))


# Trimming


def test_the_newest_max_events_are_kept(make: MakeLog) -> None:
    log = make(max_events=3)
    start = log.end("t")
    log.append("t", [event(1), event(2)])
    log.append("t", [event(3), event(4), event(5)])
    log.tend()
    assert lost(log, start)
    assert lost(log, start._replace(offset=1))
    assert after(log, start._replace(offset=2)) == [3, 4, 5]


def test_a_batch_longer_than_the_log_leaves_its_newest(make: MakeLog) -> None:
    log = make(max_events=2)
    start = log.end("t")
    log.append("t", [event(n) for n in range(1, 8)])
    log.tend()
    assert lost(log, start._replace(offset=4))
    assert after(log, start._replace(offset=5)) == [6, 7]


def test_what_is_older_than_max_age_goes(make: MakeLog) -> None:
    clock = make.clock
    log = make(max_age=10)
    start = log.end("t")
    log.append("t", [event(1)])
    clock.forward(6)
    log.append("t", [event(2)])
    clock.forward(6)
    log.tend()
    if make.trims_by_age:
        assert lost(log, start)
    assert after(log, start._replace(offset=1)) == [2]


def test_offsets_go_on_after_all_was_trimmed_while_somebody_reads(make: MakeLog) -> None:
    clock = make.clock
    log = make(max_age=10)
    end = log.append("t", [event(1)])
    reader = log.subscribe("t", end)
    clock.forward(25)
    log.tend()
    assert log.end("t") == end
    log.append("t", [event(2)])
    assert numbers(reader.read(0)) == [2]
    reader.close()


def test_an_old_thread_that_nobody_reads_is_dropped_and_begins_anew(make: MakeLog) -> None:
    clock = make.clock
    log = make(max_age=10)
    end = log.append("t", [event(1)])
    clock.forward(11)
    log.tend()
    assert log.end("t").epoch != end.epoch
    assert lost(log, end)


def test_a_thread_that_has_records_or_was_just_used_is_not_dropped(make: MakeLog) -> None:
    clock = make.clock
    log = make(max_age=10)
    end = log.append("t", [event(1)])
    clock.forward(6)
    log.tend()
    assert log.end("t") == end
    clock.forward(6)
    log.tend()
    assert log.end("t") == end


def test_a_closed_reader_keeps_no_thread(make: MakeLog) -> None:
    clock = make.clock
    log = make(max_age=10)
    end = log.end("t")
    reader = log.subscribe("t", end)
    reader.close()
    reader.close()
    for _ in range(3):
        assert lost(log, end._replace(offset=9))
    clock.forward(11)
    log.tend()
    assert log.end("t").epoch != end.epoch


def test_a_held_lock_keeps_its_thread(make: MakeLog) -> None:
    clock = make.clock
    log = make(max_age=10)
    with log.lock("t"):
        end = log.end("t")
        clock.forward(100 if make.trims_by_age else 5)
        log.tend()
        assert log.end("t") == end


# Readers


def test_a_reader_gets_replay_and_live_as_one_sequence(make: MakeLog) -> None:
    log = make()
    start = log.end("t")
    log.append("t", [event(1), event(2)])
    reader = log.subscribe("t", start)
    log.append("t", [event(3)])
    assert numbers(reader.read(0)) == [1, 2, 3]
    assert reader.read(0) == []
    log.append("t", [event(4)])
    assert numbers(reader.read(0)) == [4]
    reader.close()


def test_a_reader_hears_nothing_of_other_threads(make: MakeLog) -> None:
    log = make()
    reader = log.subscribe("t", log.end("t"))
    log.append("u", [event(1)])
    assert reader.read(0) == []
    reader.close()


def test_a_read_waits_for_its_timeout_and_not_longer(make: MakeLog) -> None:
    log = make()
    reader = log.subscribe("t", log.end("t"))
    began = time.monotonic()
    assert reader.read(0.05) == []
    assert 0.04 < time.monotonic() - began < 2
    reader.close()


def test_a_reader_that_fell_behind_the_trimming_is_told_so(make: MakeLog) -> None:
    log = make(max_events=2)
    reader = log.subscribe("t", log.end("t"))
    for n in range(3):
        log.append("t", [event(n)])
    for _ in range(2):
        with pytest.raises(PositionExpiredError):
            reader.read(0)
    reader.close()


def woken(readers: list[Subscription], act: Callable[[], object]) -> list[list[Record]]:
    """Let all readers wait, acts, gives what each got; all must be back well before their timeout."""
    found: list[list[Record]] = [[] for _ in readers]

    def wait(at: int) -> None:
        found[at] = readers[at].read(30)

    threads = [threading.Thread(target=wait, args=(at,)) for at in range(len(readers))]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    act()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    return found


def test_an_append_wakes_every_reader(make: MakeLog) -> None:
    log = make()
    readers = [log.subscribe("t", log.end("t")) for _ in range(5)]
    got = woken(readers, lambda: log.append("t", [event(1), event(2)]))
    assert [numbers(records) for records in got] == [[1, 2]] * 5


def test_close_wakes_every_reader_and_later_reads_do_not_wait(make: MakeLog) -> None:
    log = make()
    readers = [log.subscribe("t", log.end("t")) for _ in range(5)]
    assert woken(readers, log.close) == [[]] * 5
    began = time.monotonic()
    readers[0].read(5)
    assert time.monotonic() - began < 1


# Records that are taken where they come from


def test_what_a_waiting_reader_takes_is_not_given_to_it(make: MakeLog) -> None:
    log, taken = make(), list[int]()

    def take(records: list[Record]) -> Receipt:
        taken.extend(numbers(records))
        return Receipt.WHOLE if taken[-1] < 5 else Receipt.PART

    def write() -> None:
        for n in range(3):
            time.sleep(0.05)
            log.append("t", [event(2 * n), event(2 * n + 1)])

    reader = log.subscribe("t", log.end("t"))
    writer = threading.Thread(target=write)
    writer.start()
    # Woken for the rest of the last two.
    assert reader.read(30, take) == []
    writer.join()
    assert taken == [0, 1, 2, 3, 4, 5]
    log.append("t", [event(6)])
    assert numbers(reader.read(0, take)) == [6]
    reader.close()
    assert taken == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("fails", [False, True])
def test_what_is_not_taken_is_given_as_ever(make: MakeLog, caplog: pytest.LogCaptureFixture, fails: bool) -> None:
    log, offered = make(), list[int]()

    def take(records: list[Record]) -> Receipt:
        offered.extend(numbers(records))
        if fails:
            raise KeyError("take")
        return Receipt.NO

    reader = log.subscribe("t", log.end("t"))
    writer = threading.Timer(0.05, lambda: log.append("t", [event(1), event(2)]))
    writer.start()
    assert numbers(reader.read(30, take)) == [1, 2]
    writer.join()
    assert offered == [1, 2]
    assert ("records could not be taken" in caplog.text) == fails
    reader.close()


def test_a_reader_that_does_not_wait_takes_nothing(make: MakeLog) -> None:
    log, offered = make(), list[int]()

    def take(records: list[Record]) -> Receipt:
        offered.extend(numbers(records))
        return Receipt.WHOLE

    reader = log.subscribe("t", log.end("t"))
    assert reader.read(0.02, take) == []
    log.append("t", [event(1)])
    reader.close()
    log.append("t", [event(2)])
    assert offered == []


def test_whatever_is_taken_and_given_in_turns_is_each_event_once(make: MakeLog) -> None:
    log, choose, last = make(), random.Random(1), 3000
    seen, given = list[int](), 0

    def take(records: list[Record]) -> Receipt:
        taken = choose.choice(list(Receipt))
        if taken is not Receipt.NO:
            seen.extend(numbers(records))
        return taken

    def write() -> None:
        for n in range(0, last, 2):
            if n % 3 == 0:
                time.sleep(choose.random() * 0.0005)
            log.append("t", [event(n), event(n + 1)])

    reader = log.subscribe("t", log.end("t"))
    writer = threading.Thread(target=write)
    writer.start()
    while len(seen) < last:
        records = reader.read(choose.random() * 0.002, take)
        given += len(records)
        seen += numbers(records)
    writer.join()
    reader.close()
    assert seen == list(range(last))
    assert 0 < given < last


# Fences


FIRST, SECOND, THIRD = (Claim("run_1", number) for number in range(3))


def test_what_an_earlier_holder_of_a_run_appends_is_refused_and_leaves_nothing(make: MakeLog) -> None:
    log = make()
    start = log.end("t")
    reader = log.subscribe("t", start)
    assert log.append("t", [event(1)], FIRST) == start._replace(offset=1)
    log.fence("t", SECOND)
    assert log.append("t", [event(2)], FIRST) is REFUSED
    assert log.append("t", [event(3)], SECOND) == start._replace(offset=2)
    assert log.append("t", [event(4)], THIRD) == start._replace(offset=3)
    assert after(log, start) == numbers(reader.read(1)) + numbers(reader.read(0)) == [1, 3, 4]
    reader.close()


def test_of_what_is_appended_at_once_only_what_is_an_earlier_holders_is_refused(make: MakeLog) -> None:
    log = make()
    starts = {name: log.end(name) for name in ("t", "u", "v")}
    readers = {name: log.subscribe(name, start) for name, start in starts.items()}
    log.fence("t", SECOND)
    told = [
        AppendRequest("t", [event(1), event(2)], FIRST),
        AppendRequest("t", [event(3)]),
        AppendRequest("u", [event(4)], Claim("run_2", 0)),
        AppendRequest("t", [], FIRST),
        AppendRequest("t", [event(5)], Claim("run_3", 0)),
        AppendRequest("v", [event(6), event(7)], Claim("run_4", 5)),
        AppendRequest("t", [event(8)], SECOND),
    ]
    places = log.append_all(told)
    assert [event_id.offset if event_id and event_id is not REFUSED else None for event_id in places] == [
        None,
        1,
        1,
        None,
        2,
        2,
        3,
    ]
    for name, expected in (("t", [3, 5, 8]), ("u", [4]), ("v", [6, 7])):
        assert numbers(log.since(name, starts[name])) == expected
        assert numbers(readers[name].read(0.05)) == expected
        readers[name].close()


def test_a_fence_outlives_the_log_that_begins_anew_and_is_never_lowered(make: MakeLog) -> None:
    log = make()
    log.fence("t", THIRD)
    log.restart("t")
    log.fence("t", SECOND)
    start = log.end("t")
    assert log.append("t", [event(1)], FIRST) is REFUSED
    assert log.append("t", [event(2)], SECOND) is REFUSED
    assert log.end("t") == start
    assert log.append("t", [event(3)], THIRD) == start._replace(offset=1)


# What a run that was lost told


def test_what_was_told_is_recovered_with_the_place_as_of_which_it_is_exact(make: MakeLog) -> None:
    log = make()
    start = log.append("t", [event(1, "r")])
    assert log.recover("t", start, "r") == ([], start)
    end = log.append("t", [event(2, "r"), event(3, "r"), event(4, "another")])
    records, event_id = log.recover("t", start, "r")
    assert (numbers(records), event_id) == ([2, 3], end)


def test_a_log_that_began_anew_is_recovered_from_where_nothing_is_missing_and_is_lost_for_readers(
    make: MakeLog,
) -> None:
    log = make()
    start = log.append("t", [event(1, "r")])
    log.append("t", [event(2, "r")])
    log.restart("t", keep=True)
    log.append("t", [event(3, "r")])
    log.restart("t", keep=True)
    end = log.append("t", [event(4, "r")])
    for read in (log.since, log.subscribe):
        with pytest.raises(PositionExpiredError):
            read("t", start)
    if log.shared:
        records, event_id = log.recover("t", start, "r")
        assert (numbers(records), event_id) == ([2, 3, 4], end)
    log.restart("t")
    log.append("t", [event(5, "r")])
    for known in (start, end):
        with pytest.raises(PositionExpiredError):
            log.recover("t", known, "r")


def test_of_what_is_missing_in_a_log_that_began_anew_nothing_is_recovered_and_all_else_is(make: MakeLog) -> None:
    log = make()
    start = log.append("t", [event(1, "r"), event(2, "s")])
    log.append("t", [event(3, "s")])
    log.restart("t", keep=True, holes=["r", "x"])
    end = log.append("t", [event(4, "s"), event(5, "r")])
    with pytest.raises(PositionExpiredError):
        log.recover("t", start, "r")
    if log.shared:
        records, event_id = log.recover("t", start, "s")
        assert (numbers(records), event_id) == ([3, 4], end)


def test_a_place_that_never_was_is_not_recovered(make: MakeLog) -> None:
    log = make()
    start = log.append("t", [event(1, "r")])
    log.restart("t", keep=True)
    end = log.append("t", [event(2, "r")])
    for known in (
        start._replace(offset=2),
        end._replace(offset=2),
        EventId("0", 1),
        EventId("abc", 1),
        EventId("9" * 17, 0),
    ):
        with pytest.raises(PositionExpiredError):
            log.recover("t", known, "r")


def test_of_a_thread_that_is_gone_nothing_is_recovered(make: MakeLog) -> None:
    log = make()
    start = log.append("t", [event(1, "r")])
    log.append("t", [event(2, "r")])
    log.restart("t", keep=True)
    log.forget("t", event(3, "r"))
    with pytest.raises(PositionExpiredError):
        log.recover("t", start, "r")


# The lock


def test_the_lock_is_reentrant(make: MakeLog) -> None:
    log = make()
    with log.lock("t"), log.lock("t"):
        log.append("t", [event(1)])
    with log.lock("t"):
        pass


def test_the_lock_is_let_go_of_by_an_error(make: MakeLog) -> None:
    log = make()
    with pytest.raises(KeyError), log.lock("t"):
        raise KeyError
    assert woken([], lambda: None) == []
    other = threading.Thread(target=lambda: log.lock("t").__enter__())
    other.start()
    other.join(5)
    assert not other.is_alive()


def test_the_lock_keeps_others_out_of_its_thread_and_no_other(make: MakeLog) -> None:
    log = make()
    inside = 0
    worst = 0

    def work() -> None:
        nonlocal inside, worst
        for _ in range(200):
            with log.lock("t"):
                inside += 1
                worst = max(worst, inside)
                time.sleep(0)
                inside -= 1

    with log.lock("u"):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
    assert worst == 1


def test_appending_and_reading_need_no_lock(make: MakeLog) -> None:
    log = make()
    with log.lock("t"):
        reader = log.subscribe("t", log.end("t"))
        done = threading.Thread(target=lambda: log.append("t", [event(1)]))
        done.start()
        done.join(5)
        assert numbers(reader.read(0)) == [1]
        reader.close()


# Races


def _attach(log: Log, name: str, choose: random.Random, stop: int) -> tuple[EventId, list[int]]:
    """Read from the log's end as it is now up to the offset ``stop``, with cuts; give that end and what came."""
    event_id, got = log.end(name), list[int]()
    reader = log.subscribe(name, event_id)
    while event_id.offset + len(got) < stop:
        got += numbers(reader.read(5))
        if choose.random() < 0.3:
            # A cut: back at the place of the last record seen.
            reader.close()
            reader = log.subscribe(name, event_id._replace(offset=event_id.offset + len(got)))
    reader.close()
    return event_id, got


@pytest.mark.slow
def test_10000_attaches_while_appending_miss_and_repeat_nothing(make: MakeLog) -> None:
    log, wrong, trials, readers = make(), 0, 10_000, 4
    ready = threading.Barrier(readers + 1)
    places = [log.end("t0")] * readers
    results: list[list[int]] = [[] for _ in range(readers)]
    rounds = trials // readers
    stop = 12

    def read(at: int) -> None:
        choose = random.Random(at)
        for number in range(rounds):
            ready.wait()
            for _ in range(choose.randrange(3)):
                time.sleep(0)
            places[at], results[at] = _attach(log, f"t{number}", choose, stop)
            ready.wait()

    threads = [threading.Thread(target=read, args=(at,), daemon=True) for at in range(readers)]
    for thread in threads:
        thread.start()
    for number in range(rounds):
        ready.wait()
        for n in range(0, stop, 3):
            log.append(f"t{number}", [event(n + 1), event(n + 2), event(n + 3)])
        ready.wait(20)
        for event_id, got in zip(places, results, strict=True):
            wrong += got != list(range(event_id.offset + 1, stop + 1))
    for thread in threads:
        thread.join(5)
    assert wrong == 0


def test_a_reader_is_woken_once_by_an_event_whatever_its_time_outs_were(
    make: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_buffer, "_SWEEP_SECONDS", 0.02)
    log = make()
    reader = log.subscribe("t", log.end("t"))
    # A long wait that an event ends, then short ones until the long one would have ended.
    waker = threading.Timer(0.07, lambda: log.append("t", [event(0)]))
    waker.start()
    end = time.monotonic() + 0.4
    assert numbers(reader.read(0.2)) == [0]
    while time.monotonic() < end:
        assert reader.read(0.03) == []
    waker.join()
    reads, found = 0, list[int]()

    def write() -> None:
        for n in range(20):
            time.sleep(0.02)
            log.append("t", [event(n)])

    writer = threading.Thread(target=write)
    writer.start()
    while len(found) < 20:
        found += numbers(reader.read(5))
        reads += 1
    writer.join()
    reader.close()
    assert found == list(range(20))
    assert reads <= 20


def test_a_read_that_is_interrupted_gives_nothing_and_the_next_one_misses_nothing(make: MakeLog) -> None:
    log = make()
    reader = log.subscribe("t", log.end("t"))
    # Before a read, and in the midst of one.
    reader.interrupt()
    assert reader.read(60) == []
    waker = threading.Timer(0.1, reader.interrupt)
    waker.start()
    assert reader.read(60) == []
    waker.join()
    log.append("t", [event(0)])
    log.append("t", [event(1)])
    found = list[int]()
    while len(found) < 2:
        found += numbers(reader.read(5))
    reader.close()
    assert found == [0, 1]


def test_writers_at_once_leave_no_hole_and_each_batch_whole(make: MakeLog) -> None:
    log = make()
    start = log.end("t")

    def write(writer: int) -> None:
        for n in range(200):
            log.append("t", [Event("e", cast(Any, {"w": writer, "n": n, "part": part})) for part in range(3)])

    reader, got = log.subscribe("t", start), list[Record]()
    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    while len(got) < 2400:
        records = reader.read(5)
        assert records
        got += records
    for thread in threads:
        thread.join()
    reader.close()
    assert [record.event_id.offset for record in got] == list(range(1, 2401))
    data = [record.data() for record in got]
    for at in range(0, 2400, 3):
        assert data[at : at + 3] == [{**data[at], "part": part} for part in range(3)]
    for writer in range(4):
        assert [d["n"] for d in data if d["w"] == writer and not d["part"]] == list(range(200))


def _read_on(log: Log, event_id: EventId, is_whole: Callable[[EventId], bool], wrong: list[str]) -> None:
    """Read on from a place until all is read; ``wrong`` gets each record that is not the next.

    An epoch may end only while nobody reads, so a hole shows as an offset that is not the next.
    """
    with contextlib.closing(log.subscribe("t", event_id)) as reader:
        while not is_whole(event_id):
            for record in reader.read(0.01):
                if record.event_id != event_id._replace(offset=event_id.offset + 1):
                    wrong.append(f"{record.event_id} after {event_id}")
                event_id = record.event_id


def test_trimming_at_once_with_readers_and_writers_loses_nothing_silently(make: MakeLog) -> None:
    clock = make.clock
    # Redis's time passes for real.
    log, total = make(max_events=20, max_age=10), 3000 if make.trims_by_age else 800
    written = threading.Event()

    def write() -> None:
        for n in range(1, total + 1):
            log.append("t", [event(n)])
            if n % 7 == 0:
                clock.forward(3 if make.trims_by_age else 0.6)
                log.tend()
        written.set()

    def is_whole(event_id: EventId) -> bool:
        return written.is_set() and log.end("t") == event_id

    def read(found: list[str]) -> None:
        event_id = log.end("t")
        while not is_whole(event_id):
            with contextlib.suppress(PositionExpiredError):
                _read_on(log, event_id, is_whole, found)
            event_id = log.end("t")

    wrong: list[str] = []
    threads = [threading.Thread(target=read, args=(wrong,)) for _ in range(3)]
    threads.append(threading.Thread(target=write))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []


class Model:
    """A log as anyone would write it: all events for ever, and what of them is kept."""

    def __init__(self, max_events: int, max_age: float) -> None:
        self.max_events, self.max_age = max_events, max_age
        self.events: list[tuple[float, int]] = []
        self.first = 0  # the offset before the oldest event that is kept

    def append(self, at: float, new: list[int]) -> None:
        self.events += [(at, n) for n in new]
        self.first = max(self.first, len(self.events) - self.max_events)

    def trim(self, now: float) -> None:
        while self.first < len(self.events) and self.events[self.first][0] < now - self.max_age:
            self.first += 1

    def after(self, offset: int) -> list[int] | None:
        if not self.first <= offset <= len(self.events):
            return None
        return [n for _, n in self.events[offset:]]


class Beside:
    """A log and its model, to both of which the same happens, at random."""

    def __init__(self, make: MakeLog, choose: random.Random) -> None:
        self._make, self._choose, self._clock = make, choose, make.clock
        size, age = choose.randrange(1, 8), choose.randrange(1, 20)
        self._log = make(max_events=size, max_age=age if make.trims_by_age else 30_000)
        self._model = Model(size, age)
        # One reader throughout, so that the epoch stays.
        self._anchor = self._log.subscribe("t", self._log.end("t"))
        self._epoch, self._counter = self._log.end("t").epoch, 0
        self._readers: list[tuple[Subscription, int]] = []

    def step(self) -> None:
        match self._choose.randrange(6):
            case 0 | 1:
                self._append()
            case 2:
                self._trim()
            case 3:
                self._attach()
            case 4 if self._readers:
                self._read()
            case 5 if self._readers:
                self._readers.pop(self._choose.randrange(len(self._readers)))[0].close()

    def _append(self) -> None:
        new = [self._counter + n for n in range(self._choose.randrange(4))]
        self._counter += len(new)
        self._model.append(self._clock(), new)
        assert self._log.append("t", [event(n) for n in new]) == EventId(self._epoch, self._counter)

    def _trim(self) -> None:
        self._log.tend()
        if self._make.trims_by_age:
            self._clock.forward(self._choose.random() * 8)
            self._log.tend()
            self._model.trim(self._clock())

    def _attach(self) -> None:
        event_id = EventId(self._epoch, self._choose.randrange(self._counter + 3))
        expected = self._model.after(event_id.offset)
        if expected is None:
            assert lost(self._log, event_id)
        else:
            assert after(self._log, event_id) == expected
            self._readers.append((self._log.subscribe("t", event_id), event_id.offset))

    def _read(self) -> None:
        reader, offset = self._readers.pop(self._choose.randrange(len(self._readers)))
        expected = self._model.after(offset)
        if expected is None:
            with pytest.raises(PositionExpiredError):
                reader.read(0)
            reader.close()
        else:
            assert numbers(reader.read(0)) == expected
            self._readers.append((reader, self._counter))

    def close(self) -> None:
        self._anchor.close()
        for reader, _ in self._readers:
            reader.close()
        self._log.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_interleaving_of_appends_trims_attaches_and_cuts_is_as_the_model_says(make: MakeLog, seed: int) -> None:
    for trial in range(500 if make.trims_by_age else 60):
        beside = Beside(make, random.Random(seed * 10_000 + trial))
        for _ in range(40):
            beside.step()
        beside.close()


def test_what_is_kept_is_nothing_that_the_garbage_collector_looks_at_again() -> None:
    kept = thread_buffer.ThreadBuffer("epoch")
    kept.add(1.0, [("thread.message.delta", key, b"frame") for key in ("run_1", None)])
    gc.collect()
    assert not any(map(gc.is_tracked, kept.records))
