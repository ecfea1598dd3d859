"""The log in Redis has a budget for all threads: strangers cannot fill it, and what is used least goes first."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from assistream_flask.events import Event
from assistream_flask.log.protocol import Claim, EventId, LogUnavailableError, PositionExpiredError
from assistream_flask.log.redis import RedisLog
from tests.conftest import wait_until
from tests.redis_server import RedisServer, running_redis

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture
def client(own_redis: RedisServer) -> Iterator[Any]:
    with redis.Redis.from_url(own_redis.url) as client:
        yield client


@contextlib.contextmanager
def logging_to(server: RedisServer, **limits: Any) -> Iterator[RedisLog]:
    with contextlib.closing(RedisLog(server.url, **limits)) as log:
        wait_until(log._linked.is_set)
        yield log


def event(number: int, size: int = 0, key: str | None = None) -> Event:
    return Event("e", cast(Any, {"n": number, "text": "x" * size}), key)


def thread(number: object) -> str:
    return f"thread_{number}"


def kept(client: Any) -> dict[str, int]:
    """Give what each thread takes in Redis, what is put aside of it too."""
    found: dict[str, int] = {}
    for key in client.scan_iter("assistream:0:thread_*", count=1000):
        name = key.decode().split(":")[2]
        found[name] = found.get(name, 0) + (client.memory_usage(key, samples=0) or 0)
    return found


def accounts(client: Any) -> dict[str, int]:
    """Give what the accounts have of each thread, after a check that their sum is right."""
    sizes = {key.decode(): int(size) for key, size in client.hgetall("assistream:0-sizes").items()}
    total = sizes.pop("", 0)
    assert total == sum(sizes.values())
    assert {key.decode() for key in client.zrange("assistream:0-used", 0, -1)} == set(sizes)
    return {key.split(":")[2]: size for key, size in sizes.items()}


def used_memory(client: Any) -> int:
    return cast(int, client.info("memory")["used_memory"])


def is_there(client: Any, name: str) -> bool:
    return bool(client.exists(f"assistream:0:{name}"))


def numbers(reader: Any) -> list[int]:
    found: list[int] = []
    while records := reader.read(0.3):
        found += [record.data()["n"] for record in records]
    return found


def test_the_accounts_are_what_is_there_whatever_is_done_in_whatever_order(own_redis: RedisServer, client: Any) -> None:
    choose = random.Random("accounts")
    with (
        logging_to(own_redis, max_events=300, max_bytes=200_000, max_age=20) as one,
        logging_to(own_redis, max_events=300, max_bytes=200_000, max_age=20) as other,
    ):
        for step in range(4000):
            log, name = choose.choice((one, other)), thread(choose.randrange(60))
            match choose.randrange(20):
                case 0:
                    log.restart(name, keep=choose.random() < 0.5)
                case 1:
                    log.forget(name, event(step))
                case 2:
                    # As it expires, and leaves what was put aside.
                    client.delete(f"assistream:0:{name}")
                case 3:
                    with log.lock(name):
                        log.append(name, [event(step)])
                case 4:
                    log.end(name)
                case 5:
                    log.append(name, [event(step, choose.choice((0, 9_000, 70_000)))])
                case _:
                    log.append(name, [event(step, choose.randrange(600)) for _ in range(choose.randrange(4))])
        real, found = kept(client), accounts(client)
        # What expired is not known yet; all else is.
        assert set(real) <= set(found)
        there = [name for name in real if is_there(client, name)]
        for name in there:
            # An entry takes more or less than was thought of it, until 256 came.
            assert abs(found[name] - real[name]) < max(6000, real[name] * 0.2), name
        assert sum(found[name] for name in there) == pytest.approx(sum(real[name] for name in there), rel=0.1)
        # The time of all is over, which the workers notice as they look after the log.
        client.delete(*client.scan_iter("assistream:0:thread_*", count=1000))
        client.zadd("assistream:0-used", dict.fromkeys(client.zrange("assistream:0-used", 0, -1), 1))
        wait_until(lambda: accounts(client) == {})


def test_streams_that_expire_leave_the_accounts_and_those_that_are_used_do_not(
    own_redis: RedisServer, client: Any
) -> None:
    with logging_to(own_redis, max_age=8) as log, contextlib.closing(log.subscribe("thread_v", log.end("thread_v"))):
        for number in range(50):
            log.append(thread(number), [event(number)])
        log.forget("thread_0", event(0))
        assert len(accounts(client)) == 51
        wait_until(lambda: len(accounts(client)) == 2, 40)
        assert set(accounts(client)) == {"thread_v", "thread_0"} == set(kept(client))


def test_strangers_who_write_many_times_what_redis_holds_fill_nothing_and_no_viewer_misses_anything(
    tmp_path: Path,
) -> None:
    with (
        running_redis(tmp_path, "--maxmemory", "64mb") as server,
        logging_to(server) as strangers,
        logging_to(server) as log,
        redis.Redis.from_url(server.url) as client,
    ):
        wait_until(lambda: log._budget == strangers._budget == 32 * MIB)
        with contextlib.closing(log.subscribe("thread_v", log.end("thread_v"))) as reader:
            seen, most, before = list[int](), 0, used_memory(client)
            for number in range(2000):
                strangers.append(thread(number), [event(number, 100_000)])
                if number % 10 == 0:
                    log.append("thread_v", [event(number, 200)])
                    most = max(most, used_memory(client))
                if number % 100 == 0:
                    # A chat, with its lock, a page and a viewer of its own.
                    with log.lock("thread_c"):
                        start = log.end("thread_c")
                        log.append("thread_c", [event(1)])
                    with contextlib.closing(strangers.subscribe("thread_c", start)) as chat:
                        log.append("thread_c", [event(2)])
                        assert numbers(chat) == [1, 2]
                    seen += numbers(reader)
            assert seen + numbers(reader) == list(range(0, 2000, 10))
        assert most - before < 36 * MIB
        assert sum(accounts(client).values()) == pytest.approx(sum(kept(client).values()), rel=0.05)
        assert 30 * MIB < sum(kept(client).values()) < 33 * MIB
        # And from its beginning, for who comes back.
        assert len(log.since("thread_v", EventId(log.end("thread_v").epoch, 0))) == 200


def test_of_many_small_streams_no_more_are_kept_than_the_budget_has_room_for(
    own_redis: RedisServer, client: Any
) -> None:
    with logging_to(own_redis, max_memory=4 * MIB) as log:
        for number in range(3000):
            log.append(thread(number), [event(number)])
        assert 3 * MIB < sum(kept(client).values()) < 4 * MIB + 64 * KIB
        # What is only looked at takes room too, which the workers make.
        for number in range(3000, 6000):
            log.end(thread(number))
        wait_until(lambda: sum(kept(client).values()) < 4 * MIB + 64 * KIB)


def test_what_was_not_used_for_longest_goes_first_and_looking_is_a_use(own_redis: RedisServer, client: Any) -> None:
    with logging_to(own_redis, max_memory=MIB) as log:
        for number in range(9):
            log.append(thread(number), [event(number, 100_000)])
            time.sleep(0.01)
        log.append("thread_0", [event(9)])
        log.end("thread_1")
        for number in range(10, 14):
            log.append(thread(number), [event(number, 100_000)])
        assert [number for number in range(14) if is_there(client, thread(number))] == [0, 1, 6, 7, 8, 10, 11, 12, 13]


def test_what_is_viewed_in_any_worker_stays_and_a_viewer_that_comes_back_to_what_went_is_told_so(
    own_redis: RedisServer,
) -> None:
    with logging_to(own_redis, max_memory=MIB) as log, logging_to(own_redis, max_memory=MIB) as other:
        viewed, unviewed = log.append("thread_v", [event(1)]), log.append("thread_u", [event(1)])
        with contextlib.closing(other.subscribe("thread_v", viewed)) as reader:
            for number in range(50):
                log.append(thread(number), [event(number, 100_000)])
            assert log.append("thread_v", [event(2)]) == viewed._replace(offset=2)
            assert numbers(reader) == [2]
        assert log.append("thread_u", [event(2)]).epoch != unviewed.epoch
        for read in (log.since, log.subscribe):
            with pytest.raises(PositionExpiredError):
                read("thread_u", unviewed)


def test_where_all_is_viewed_the_oldest_events_go_and_who_is_there_gets_each_once(
    own_redis: RedisServer, client: Any
) -> None:
    with logging_to(own_redis, max_memory=2 * MIB) as log, contextlib.ExitStack() as stack:
        names = [thread(number) for number in range(4)]
        starts = {name: log.end(name) for name in names}
        readers = {name: stack.enter_context(contextlib.closing(log.subscribe(name, starts[name]))) for name in names}
        seen: dict[str, list[int]] = {name: [] for name in names}
        for number in range(100):
            for name in names:
                log.append(name, [event(number, 20_000)])
                seen[name] += [record.data()["n"] for record in readers[name].read(0)]
        assert all(seen[name] == list(range(100)) for name in names)
        assert sum(kept(client).values()) < 2 * MIB + 128 * KIB
        for name in names:
            end = log.end(name)
            assert end == starts[name]._replace(offset=100)
            assert log.since(name, end._replace(offset=97))
            with pytest.raises(PositionExpiredError):
                log.since(name, starts[name])


def test_of_a_run_whose_log_was_shed_what_cannot_be_proven_is_not_recovered_and_it_goes_on(
    own_redis: RedisServer,
) -> None:
    claim = Claim("run_1", 0)
    with logging_to(own_redis, max_memory=MIB) as log:
        stored = log.append("thread_r", [event(1, key="run_1")], claim)
        log.append("thread_r", [event(2, key="run_1")], claim)
        log.restart("thread_r", keep=True)
        log.append("thread_r", [event(3, key="run_1")], claim)
        assert len(log.recover("thread_r", stored, "run_1")[0]) == 2
        for number in range(20):
            log.append(thread(number), [event(number, 100_000)])
        with pytest.raises(PositionExpiredError):
            log.recover("thread_r", stored, "run_1")
        again = log.append("thread_r", [event(4, key="run_1")], claim)
        log.append("thread_r", [event(5, key="run_1")], claim)
        records, end = log.recover("thread_r", again, "run_1")
        assert ([record.data()["n"] for record in records], end) == ([5], again._replace(offset=2))
        with pytest.raises(PositionExpiredError):
            log.recover("thread_r", stored, "run_1")


def test_that_a_thread_is_gone_is_known_as_long_as_anything_else_can_go_and_a_flood_of_such_fills_nothing(
    own_redis: RedisServer, client: Any
) -> None:
    with logging_to(own_redis, max_memory=MIB) as log:
        log.forget("thread_gone", event(1))
        end = log.end("thread_gone")
        for number in range(30):
            log.append(thread(number), [event(number, 100_000)])
        assert log.append("thread_gone", [event(2)]) == end
        for number in range(1000):
            log.forget(thread(number), event(number))
        log.append("thread_a", [event(1)])
        wait_until(lambda: sum(kept(client).values()) < MIB + 64 * KIB)


def test_what_an_older_release_wrote_is_counted_from_when_it_is_used_and_what_it_did_is_noticed(
    own_redis: RedisServer, client: Any
) -> None:
    with logging_to(own_redis, max_memory=MIB) as log:
        for number in range(4):
            client.xadd(f"assistream:0:{thread(number)}", {"e": ""}, id="1-0")
            client.xadd(f"assistream:0:{thread(number)}", {"e": b"\nevent: e\n\n" + b"x" * 50_000}, id="1-1")
            client.pexpire(f"assistream:0:{thread(number)}", 600_000)
        assert accounts(client) == {}
        assert log.append("thread_0", [event(1)]) == EventId("1", 2)
        assert accounts(client)["thread_0"] > 50_000
        # It drops one and begins another anew.
        log.append("thread_1", [event(1)])
        client.delete("assistream:0:thread_0", "assistream:0:thread_1")
        client.xadd("assistream:0:thread_1", {"e": ""}, id="2-0")
        client.pexpire("assistream:0:thread_1", 600_000)
        for number in range(10, 40):
            log.append(thread(number), [event(number, 100_000)])
        # And 100 KB that it wrote and nobody used.
        assert MIB // 2 < sum(kept(client).values()) < MIB + 2 * 60_000
        assert "thread_0" not in accounts(client)


@pytest.mark.parametrize("lost", ["sizes", "used"])
def test_accounts_that_were_lost_are_made_again(own_redis: RedisServer, client: Any, lost: str) -> None:
    with logging_to(own_redis, max_memory=MIB) as log:
        for number in range(20):
            log.append(thread(number), [event(number, 100_000)])
        client.delete(f"assistream:0-{lost}")
        for number in range(100):
            log.append(thread(number % 30), [event(number, 100_000)])
        assert sum(accounts(client).values()) <= MIB


def test_a_redis_that_is_given_less_memory_than_is_used_has_room_again_soon(
    own_redis: RedisServer, client: Any
) -> None:
    with logging_to(own_redis) as log:
        for number in range(300):
            log.append(thread(number), [event(number, 100_000)])
        own_redis.ask("CONFIG", "SET", "maxmemory", "16mb")

        def takes() -> bool:
            with contextlib.suppress(LogUnavailableError):
                return bool(log.append("thread_a", [event(1)]))
            return False

        wait_until(takes)
        wait_until(lambda: sum(kept(client).values()) < 8 * MIB)


def test_a_thread_of_small_and_then_large_events_takes_no_more_than_it_may(own_redis: RedisServer, client: Any) -> None:
    with logging_to(own_redis, max_bytes=MIB) as log:
        for number in range(60):
            log.append("thread_a", [event(number, 400)])
        for number in range(100):
            log.append("thread_a", [event(number, 50_000)])
            assert kept(client)["thread_a"] < MIB + 64 * KIB
