"""Who gets the places of a worker that is full of event streams."""

from __future__ import annotations

import random

import pytest

from assistream_flask.errors import RequestError
from assistream_flask.runs.open_streams import OpenStream, OpenStreams
from assistream_flask.settings import Settings


def open_streams(max_streams: int = 1000, address_streams: int = 0) -> OpenStreams:
    return OpenStreams(Settings(max_streams=max_streams, address_streams=address_streams))


def held(streams: OpenStreams) -> dict[object, int]:
    return {party: len(theirs) for party, theirs in streams._parties.items()}


def test_the_oldest_stream_of_the_heaviest_ends_for_a_newcomer() -> None:
    streams, woken = open_streams(), list[int]()
    heavy = [OpenStream(f"session {at}", "1.2.3.4") for at in range(90)]
    for at, one in enumerate(heavy):
        one.on_end(lambda at=at: woken.append(at))  # type: ignore[misc]
        assert streams.enter(one, 100)
    for at in range(10):
        assert streams.enter(OpenStream("other", f"5.6.7.{at}"), 100)
    assert streams.enter(OpenStream("newcomer", "9.9.9.9"), 100)
    assert (woken, [one.is_over for one in heavy[:2]]) == ([0], [True, False])
    assert streams.count == 100
    assert "session 0" not in streams.callers
    # Its body is closed a moment later.
    streams.leave(heavy[0])
    assert streams.count == 100


def test_where_nobody_is_heavy_a_newcomer_waits() -> None:
    streams = open_streams()
    for at in range(100):
        assert streams.enter(OpenStream("a", f"1.2.{at // 2}.0"), 100)
    assert not streams.enter(OpenStream("b", "9.9.9.9"), 100)
    assert (streams.count, streams.callers) == (100, {"a": 100})


def test_a_stream_that_had_to_end_before_it_began_is_told_as_it_begins() -> None:
    stream, woken = OpenStream("a"), list[bool]()
    stream.end()
    stream.on_end(lambda: woken.append(True))
    assert woken == [True]


def test_those_without_an_address_are_told_apart_by_their_names() -> None:
    streams = open_streams()
    for at in range(100):
        assert streams.enter(OpenStream("heavy" if at < 60 else f"caller {at}"), 100)
    assert streams.enter(OpenStream("newcomer"), 100)
    assert streams.callers["heavy"] == 59


def test_no_two_take_places_from_each_other_in_turn() -> None:
    choose = random.Random("places")
    for _ in range(20):
        streams, moves = open_streams(), 0
        for _ in range(300):
            streams.enter(OpenStream("a", str(choose.randrange(choose.choice((2, 30))))), 200)
        # All come back at once and for ever, as the pages of those that had to end do.
        before = None
        while before != (before := held(streams)):
            for address in range(30):
                while streams.enter(OpenStream("a", str(address)), 200):
                    moves += 1
                    assert moves < 2000
        assert streams.count == 200
        # Nobody has less than about half of what the heaviest has.
        assert len(before) == 30
        assert min(before.values()) * 2 + 2 > max(before.values())


def test_an_address_may_have_so_many_and_who_has_none_is_not_limited() -> None:
    streams = open_streams(address_streams=3)
    theirs = [OpenStream(f"session {at}", "1.2.3.4") for at in range(4)]
    for one in theirs[:3]:
        assert streams.enter(one, 100)
    with pytest.raises(RequestError) as refused:
        streams.enter(theirs[3], 100)
    assert (refused.value.status, refused.value.code) == (429, "too_many_address_streams")
    for _ in range(4):
        assert streams.enter(OpenStream("a"), 100)
    streams.leave(theirs[0])
    assert streams.enter(theirs[3], 100)


def test_who_may_have_no_more_ends_nobodys() -> None:
    streams = open_streams(max_streams=2)
    for caller in ("heavy", "heavy", "poor", "poor"):
        assert streams.enter(OpenStream(caller, "1.1.1.1" if caller == "heavy" else None), 4)
    with pytest.raises(RequestError) as refused:
        streams.enter(OpenStream("poor"), 4)
    assert refused.value.code == "too_many_streams"
    assert held(streams) == {"1.1.1.1": 2, "poor": 2}
