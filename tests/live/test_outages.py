"""A database that reads and does not write, workers that stand still, clocks that differ: no answer is lost, and no
viewer sees a word twice, or after the end.

The words of each answer count up, so that one that is lost, doubled or moved shows. ``ASSISTREAM_TRIALS`` is how many
answers there are, at least.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import time
import urllib.error
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from assistream_flask.log.redis import RedisLog
from assistream_flask.store.sql import ThreadStore
from assistream_flask.store.tables import runs
from assistream_flask.testing import OfflineServer, Reply, Request
from tests.cluster import Cluster, clustered
from tests.conftest import wait_until
from tests.gunicorn_server import Event, Gunicorn
from tests.outages import locked_out
from tests.postgres_server import PostgresServer
from tests.redis_server import RedisServer
from tests.watcher import OVER, Watcher, says, settle

TRIALS = int(os.environ.get("ASSISTREAM_TRIALS", "200"))
WORDS = " ".join(f"w{number}" for number in range(2000))
DELAY = 0.2


def answer(request: Request) -> Reply:
    """As many words as the last message says."""
    count = int(re.findall(r"\d+", request.messages[-1][1])[-1])
    return Reply(" ".join(WORDS.split()[:count]), delay=DELAY)


class Reader(Watcher):
    """A viewer that looks at every answer after every event: it only grows, by the next words, until its end."""

    def __init__(self, gunicorns: list[Gunicorn], thread: str, seed: int = 0) -> None:
        self._seen: dict[str, tuple[str, bool]] = {}
        self.times: list[float] = []
        super().__init__(gunicorns, thread, seed)

    def _see(self, event: Event) -> None:
        super()._see(event)
        if event.name == "thread.message.delta":
            self.times.append(time.monotonic())
        for entry in self.entries:
            if entry["assistant_id"] is not None:
                self._look(event.name, entry)

    def _look(self, name: str, entry: Any) -> None:
        text, known = says(entry), entry["message"]["id"]
        before, over = self._seen.get(known, ("", False))
        if not WORDS.startswith(text) or not text.startswith(before):
            self.faults.append(f"{name}: {text[-30:]!r} after {before[-30:]!r}")
        if over and text != before:
            self.faults.append(f"{name}: {text[-30:]!r} after the end")
        self._seen[known] = text, over or (entry["run"] or {"status": ""})["status"] in OVER


@pytest.fixture(scope="module")
def model() -> Iterator[OfflineServer]:
    with OfflineServer(answer) as server:
        yield server


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> str:
    return postgres.new_database()


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer, database: str, model: OfflineServer
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    # A worker that stands still is not gunicorn's to kill here.
    options = {"workers": 3, "options": ["--timeout", "120"], "model_url": model.base_url, "max_streams": 1000}
    with clustered(folder, redis_server, database, **options) as cluster:
        yield cluster


def asked(
    gunicorns: Sequence[Gunicorn], count: int, choose: random.Random, words: tuple[int, int], seconds: float
) -> dict[str, list[Reader]]:
    """Ask for so many answers of so many words within so many seconds; give each thread's viewer."""
    found: dict[str, list[Reader]] = {}
    for number in range(count):
        began = time.monotonic()
        at = choose.choice(gunicorns)
        # Now and then one waits for the one before it.
        if not found or choose.random() < 0.8:
            thread = at.thread()
            found[thread] = [Reader(list(gunicorns), thread, number)]
        at.run(thread, choose.choice(["tutor", "critic"]), content=str(choose.randint(*words)))
        time.sleep(max(0.0, seconds / count - (time.monotonic() - began)))
    return found


def all_whole(gunicorn: Gunicorn, threads: Mapping[str, list[Reader]], seconds: float = 90) -> int:
    """Wait for all answers and looks at each, as stored and as seen; give how many there are."""
    count = 0
    for entries in settle(gunicorn, threads, seconds).values():
        for question, entry in zip(entries[::2], entries[1::2], strict=True):
            assert entry["run"]["status"] == "completed", entry["run"]
            assert says(entry) == " ".join(WORDS.split()[: int(says(question))])
            count += 1
    for watchers in threads.values():
        for watcher in watchers:
            watcher.stop()
    return count


@pytest.mark.parametrize("how", ["locked", "read-only"])
def test_while_the_database_does_not_write_no_answer_is_lost_or_told_twice_and_text_goes_on(
    cluster: Cluster, database: str, how: str
) -> None:
    choose = random.Random(how)
    threads = asked(cluster.gunicorns, -(-TRIALS // 2), choose, (4, 80), 6)
    # On any machine one answer goes on for as long as the database does not write.
    long = asked(cluster.gunicorns, 1, choose, (130, 140), 0)
    wait_until(lambda: all(reader.times for [reader] in long.values()), 20)
    threads |= long
    with locked_out(database, how):
        began = time.monotonic()
        time.sleep(choose.uniform(11, 14))
        ended = time.monotonic()
    assert all_whole(cluster.gunicorns[0], threads) >= TRIALS // 2
    # An answer that began or ended in between waits for the store.
    alone = [reader for [reader] in threads.values() if len(reader.entries) == 2]
    # One whose answer a snapshot brought as a whole saw no text arrive.
    going = [reader for reader in alone if reader.times and reader.times[0] < began and ended < reader.times[-1]]
    assert going
    assert max(_pause(reader, began, ended) for reader in going) < 4


def test_a_worker_that_stood_still_tells_nothing_of_the_runs_that_others_ended(cluster: Cluster, database: str) -> None:
    gunicorn = cluster.gunicorns[0]
    threads = asked([gunicorn], 12, random.Random(2), (60, 90), 2)
    with contextlib.closing(ThreadStore(database)) as store:
        # One that has answers to lose.
        paused = int(str(store.held(runs.c.status == "in_progress")[0].name).rpartition("/")[2])

    def lost() -> list[Any]:
        return [entry for thread in threads for entry in gunicorn.entries(thread)[1::2] if entry["run"]["last_error"]]

    os.kill(paused, signal.SIGSTOP)
    try:
        wait_until(lost, 60)
        time.sleep(1)
    finally:
        os.kill(paused, signal.SIGCONT)
    for entries in settle(gunicorn, threads, 90).values():
        assert all(WORDS.startswith(says(entry)) for entry in entries[1::2])
    assert {entry["run"]["last_error"]["code"] for entry in lost()} == {"worker_lost"}


def test_no_answer_is_lost_while_the_app_computes_for_longer_than_a_lease(cluster: Cluster) -> None:
    gunicorn = cluster.gunicorns[0]
    threads = asked([gunicorn], 40, random.Random(4), (30, 70), 4)
    gunicorn.get("/compute/12")
    assert all_whole(gunicorn, threads) == 40


def _pause(reader: Reader, began: float, ended: float) -> float:
    """For how many seconds at most the viewer was told nothing."""
    times = [at for at in reader.times if began < at < ended]
    return max(later - sooner for sooner, later in itertools.pairwise([began, *times, ended]))


# One failed POST


RAISE = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.content::text LIKE '%%refuse ' || TG_ARGV[0] || '%%' THEN RAISE EXCEPTION 'the disk is full'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse_now BEFORE INSERT ON assistream_messages FOR EACH ROW EXECUTE FUNCTION refuse('now');
CREATE CONSTRAINT TRIGGER refuse_later AFTER INSERT ON assistream_messages DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION refuse('later');
"""


def test_a_post_that_fails_leaves_viewers_where_they_are_unless_its_commit_did(cluster: Cluster, database: str) -> None:
    gunicorn = cluster.gunicorns[0]
    thread = gunicorn.thread()
    with sa.create_engine(database, poolclass=sa.NullPool).begin() as admin:
        admin.exec_driver_sql(RAISE)
    viewer = Watcher(cluster.gunicorns, thread)

    def post(content: str) -> int:
        try:
            gunicorn.request("POST", f"{thread}/messages", {"content": content})
        except urllib.error.HTTPError as error:
            return error.code
        return 201

    wait_until(lambda: viewer.snapshots)
    for _ in range(3):
        assert post("refuse now") == 503
        assert post("fine") == 201
    wait_until(lambda: len(viewer.entries) == 3)
    assert (viewer.snapshots, viewer.breaks) == (1, 0)
    assert post("refuse later") == 503
    # Whether it is stored nobody knows, so all look.
    wait_until(lambda: viewer.snapshots > 1)
    assert post("fine") == 201
    wait_until(lambda: [says(entry) for entry in viewer.entries] == ["fine"] * 4)
    assert viewer.faults == []
    viewer.stop()


def test_a_stream_whose_snapshot_cannot_be_read_ends_without_a_traceback(
    cluster: Cluster, database: str, redis_server: RedisServer
) -> None:
    gunicorn = cluster.gunicorns[0]
    viewer = Watcher(cluster.gunicorns, thread := gunicorn.thread())
    wait_until(lambda: viewer.snapshots)
    before = len(cluster.log())
    engine = sa.create_engine(database, poolclass=sa.NullPool)
    with engine.begin() as admin, contextlib.closing(RedisLog(redis_server.url)) as log:
        admin.exec_driver_sql("LOCK TABLE assistream_messages IN ACCESS EXCLUSIVE MODE")
        log.restart(thread.rsplit("/", 1)[1])
        wait_until(lambda: viewer.breaks, 30)
    wait_until(lambda: viewer.snapshots > 1, 30)
    viewer.stop()
    streams = [part for part in cluster.log()[before:].split("\n\n") if "Error handling request" in part]
    assert streams == []
    assert "/events" not in "".join(re.findall(r"Exception on .*", cluster.log()[before:]))


# Clocks


CLOCK = """
import os, time

right = time.time
time.time = lambda: right() + float(os.environ["AHEAD"])
"""


def test_no_answer_is_lost_where_clocks_are_a_minute_off_and_the_log_says_so(
    tmp_path: Path, own_redis: RedisServer, postgres: PostgresServer, model: OfflineServer
) -> None:
    cluster = Cluster(tmp_path, own_redis, postgres.new_database(), gunicorns=3, workers=1, model_url=model.base_url)
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    _, early, late = cluster.gunicorns
    for gunicorn, ahead in ((early, "60"), (late, "-60")):
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        gunicorn.env.update(AHEAD=ahead, PYTHONPATH=path)
    try:
        cluster.start()
        threads = asked(cluster.gunicorns, 12, random.Random(5), (58, 62), 2)
        assert all_whole(cluster.gunicorns[0], threads) == 12
        told = [re.findall(r"clock is [56]\d\.\d s (ahead of|behind) .*NTP", one.log()) for one in cluster.gunicorns]
        assert told == [[], ["ahead of"], ["behind"]]
    finally:
        cluster.stop()
