"""What a stream has is read whole and in order, by whom ever it is read."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from assistream_flask.events import Json
from assistream_flask.fast.read_gate import ReadGate
from assistream_flask.upstream import event_reader


class Broke(Exception):
    """What a source raises."""


def source(count: int, breaks: bool, chance: random.Random) -> Iterator[int]:
    for number in range(count):
        if chance.random() < 0.1:
            time.sleep(0.0002)
        yield number
    if breaks:
        raise Broke


def test_a_stream_is_a_flood_for_as_long_as_there_is_more_however_little_a_read_gives() -> None:
    # Of TLS one gives a record.
    ours, theirs = socket.socketpair()
    with ours, theirs:
        gate = ReadGate()
        gate.socket = ours
        for flood in range(2):
            theirs.sendall(b"a" * 80_000)
            assert gate.read()
            found, record = len(gate.taken_or(ours.recv)), lambda _: ours.recv(4_000)
            while found < 80_000:
                assert gate.is_flooded
                found += len(gate.taken_or(record))
            assert not gate.is_flooded, flood
        theirs.sendall(b"a" * 4_000)
        assert len(gate.taken_or(ours.recv)) == 4_000
        assert not gate.is_flooded


@pytest.mark.parametrize("part", range(4))
def test_a_source_that_is_fed_from_any_moment_on_is_read_whole_in_order_and_to_its_end(part: int) -> None:
    for seed in range(part, 2000, 4):
        chance = random.Random(seed)
        count, breaks, from_ = chance.randrange(12), chance.random() < 0.5, chance.randrange(14)
        gate, found, broke = ReadGate(), list[int](), False
        feeder = None
        try:
            for at, items in enumerate(gate.through(source(count, breaks, random.Random(seed)))):
                found += items
                if items:
                    assert not gate.is_fed or gate.taken == len(items)
                    continue
                if at >= from_ and gate.source is not None and not gate.is_fed:
                    gate.is_fed, feeder = True, threading.Thread(target=gate.feed)
                    feeder.start()
                while gate.is_fed and chance.random() < 0.5 and not gate.pending():
                    time.sleep(0.0001)
        except Broke:
            broke = True
        assert (found, broke) == (list(range(count)), breaks)
        if feeder is not None:
            feeder.join(5)
            assert not feeder.is_alive()


def test_a_tick_looks_at_what_was_fed_and_does_not_wait_for_it() -> None:
    gate, more = ReadGate(), threading.Event()

    def slow() -> Iterator[str]:
        yield "one"
        more.wait(10)
        yield "two"

    items = gate.through(slow())
    assert (next(items), next(items), next(items)) == ([], ["one"], [])
    gate.is_fed, feeder = True, threading.Thread(target=gate.feed)
    feeder.start()
    assert (gate.read(), gate.pending()) == (False, False)
    more.set()
    feeder.join(10)
    assert (gate.read(), gate.pending()) == (True, True)
    assert next(items) == ["two"]
    # What may come behind is not for a tick.
    assert (next(items), gate.can_wait) == ([], False)
    assert list(items) == []


def test_what_came_before_an_event_that_is_none_is_said_also_where_it_was_taken_with_it() -> None:
    good: Json = {"type": "response.output_text.delta", "delta": "a"}
    gate = ReadGate()
    batches = event_reader.read(iter([good, good, object()]), gate)
    assert next(batches) == []
    gate.is_fed = True
    gate.feed()
    assert [data for _, data in next(batches)] == [good, good]
    with pytest.raises(AttributeError):
        next(batches)
