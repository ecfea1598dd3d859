"""Gunicorn and gevent for real: streams, cuts, restarts, crashes, and what is left after many runs."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OVER, wait_until
from tests.gunicorn_server import APP, ROOT, Event, Gunicorn, running, stream


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    with running(tmp_path_factory.mktemp("live"), max_runs=1000, max_streams=1000) as gunicorn:
        yield gunicorn


class Viewer:
    """A page's state, kept by the plainest reducer there can be."""

    def __init__(self) -> None:
        self.entries: list[Any] = []
        self.ids: list[str] = []

    def take(self, event: Event) -> None:
        if event.id is not None:
            self.ids.append(event.id)
        data = copy.deepcopy(event.data)
        if event.name == "thread.snapshot":
            self.entries = data["data"]
        elif event.name == "thread.message.created":
            assert data["id"] not in [one["message"]["id"] for one in self.entries], "a message came twice"
            self.entries.append({"assistant_id": data["assistant_id"], "message": data, "run": None, "steps": []})
        elif event.name == "thread.message.delta":
            self._take_delta(data)
        elif event.name in ("thread.message.completed", "thread.message.incomplete"):
            self._take_end(data)
        elif event.name.startswith("thread.run.") and not event.name.startswith("thread.run.step."):
            for entry in self.entries:
                if entry["message"]["run_id"] == data["id"]:
                    entry["run"] = data

    def _take_delta(self, data: Any) -> None:
        content = self._entry("message", data["id"])["message"]["content"]
        for part in data["delta"]["content"]:
            if part["index"] == len(content):
                content.append({"type": "text", "text": {"value": "", "annotations": []}})
            content[part["index"]]["text"]["value"] += part["text"]["value"]

    def _take_end(self, data: Any) -> None:
        entry = self._entry("message", data["id"])
        if entry["message"]["status"] == "in_progress":
            assert entry["message"]["content"] == data["content"], "the deltas are not the whole"
        entry["message"] = data

    def _entry(self, kind: str, id: str) -> Any:
        return next(one for one in self.entries if one[kind]["id"] == id)

    def settled(self, messages: int) -> bool:
        statuses = [one["message"]["status"] for one in self.entries]
        runs = [one["run"]["status"] for one in self.entries if one["run"]]
        return len(statuses) >= messages and "in_progress" not in statuses and all(one in OVER for one in runs)


def test_cancel_closes_the_upstream_connection_also_before_its_first_byte(live: Gunicorn) -> None:
    thread = live.thread()
    for number, assistant in enumerate(["responses", "chat-stall_headers", "assistants-stall"], 1):
        (run,) = live.run(thread, assistant)
        wait_until(lambda number=number: len(live.get("/asked")) == number)  # type: ignore[misc]
        assert live.request("POST", f"{thread}/runs/{run}/cancel")["status"] == "cancelled"
        wait_until(lambda number=number: live.get("/asked")[number - 1][1], 1)  # type: ignore[misc]
    for entry in live.entries(thread)[1::2]:
        assert entry["message"]["status"] == "incomplete"
        assert entry["message"]["incomplete_details"] == {"reason": "run_cancelled"}


def test_a_run_goes_on_when_everyone_has_left(live: Gunicorn) -> None:
    thread = live.thread()
    viewer = stream(live, f"{thread}/events")
    next(viewer)
    live.run(thread, "responses")
    next(viewer)
    viewer.close()  # type: ignore[attr-defined]
    (_, entry) = live.settled(thread)
    assert entry["run"]["status"] == "completed"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_at_shutdown_streams_end_cleanly_and_runs_end(tmp_path: Path, how: signal.Signals) -> None:
    with running(tmp_path, delay=0.06, drain_seconds=0.5) as live:
        thread = live.thread()
        live.run(thread, "responses")
        live.run(thread, "chat")
        with socket.create_connection(("127.0.0.1", live.port), timeout=30) as viewer:
            viewer.sendall(f"GET {thread}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            received = b""
            while received.count(b"thread.message.delta") < 3:
                received += viewer.recv(65536)
            live.process.send_signal(how)
            while more := viewer.recv(65536):
                received += more
        assert received.endswith(b"\n\n\r\n0\r\n\r\n"), "the stream was cut, not ended"
        live.process.wait(20)
        assert live.process.returncode == 0, live.log()
        live.start()
        _, cut, _, queued = live.settled(thread)
    assert cut["run"]["status"] == "incomplete"
    assert cut["run"]["incomplete_details"] == {"reason": "server_shutdown"}
    assert cut["message"]["status"] == "incomplete"
    assert cut["message"]["content"][0]["text"]["value"]
    assert queued["run"]["status"] == "completed"


def test_an_event_response_ends_whole_at_shutdown_and_holds_nothing_up(tmp_path: Path) -> None:
    with running(tmp_path, delay=0.5, drain_seconds=0.5) as live:
        thread = live.thread()
        live.run(thread, "responses")
        events = stream(live, "/relay")
        next(events)
        live.process.send_signal(signal.SIGTERM)
        names = [event.name for event in events]
        assert names[-2:] == ["thread.message.incomplete", "thread.run.incomplete"]
        live.process.wait(10)
        live.start()
        _, entry = live.settled(thread)
    assert entry["run"]["incomplete_details"] == {"reason": "server_shutdown"}


def test_a_run_that_ends_in_time_survives_the_shutdown(tmp_path: Path) -> None:
    with running(tmp_path, drain_seconds=10) as live:
        thread = live.thread()
        live.run(thread, "responses")
        time.sleep(0.3)
        live.stop()
        live.start()
        _, entry = live.settled(thread)
    assert entry["run"]["status"] == "completed"


def test_after_a_crash_no_run_is_in_progress_and_the_stored_text_is_kept(tmp_path: Path) -> None:
    with running(tmp_path, delay=0.08, flush_seconds=0.2) as live:
        thread = live.thread()
        live.run(thread, "responses")
        live.run(thread, "chat", content="And now?")
        time.sleep(2)
        live.stop(signal.SIGKILL)
        live.start()
        _, lost, _, queued = live.settled(thread)
    assert lost["run"]["status"] == "failed"
    assert lost["run"]["last_error"]["code"] == "worker_lost"
    assert lost["message"]["status"] == "incomplete"
    assert len(lost["message"]["content"][0]["text"]["value"]) > 20
    assert queued["run"]["status"] == "completed"


def test_a_reload_of_the_workers_loses_nothing(tmp_path: Path) -> None:
    with running(tmp_path) as live:
        thread = live.thread()
        live.run(thread, "responses")
        viewer = Viewer()
        first = stream(live, f"{thread}/events")
        viewer.take(next(first))
        live.process.send_signal(signal.SIGHUP)
        for event in first:
            viewer.take(event)
        live.run(thread, "chat", content="Are you new?")
        for event in stream(live, f"{thread}/events", last=viewer.ids[-1]):
            viewer.take(event)
            if viewer.settled(4):
                break
        assert viewer.entries == live.entries(thread)
        assert [one["run"]["status"] for one in viewer.entries if one["run"]] == ["completed", "completed"]


def _view_with_cuts(live: Gunicorn, thread: str, chance: random.Random, stop: threading.Event) -> tuple[Viewer, int]:
    """Follow the thread until its 36 messages are over; leave after some events, 160 times, and comes back."""
    viewer, cuts = Viewer(), 0
    while not viewer.settled(36):
        last = viewer.ids[-1] if viewer.ids else None
        events = stream(live, f"{thread}/events", last=last, by=chance.choice(["header", "query"]))
        enough = len(viewer.ids) + (chance.randrange(1, 22) if cuts < 160 else 10**9)
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                viewer.take(event)
                if len(viewer.ids) >= enough or viewer.settled(36) or stop.is_set():
                    break
        cuts += 1
    return viewer, cuts


def test_a_stream_that_is_old_ends_whole_and_the_next_one_goes_on(tmp_path: Path) -> None:
    with running(tmp_path, delay=0.05, stream_seconds=1, heartbeat_seconds=0.5) as live:
        thread, viewer, streams = live.thread(), Viewer(), 0
        live.run(thread, "responses", "chat")
        live.run(thread, "responses")
        while not viewer.settled(5):
            # It raises where the answer has no end.
            for event in stream(live, f"{thread}/events", last=viewer.ids[-1] if viewer.ids else None):
                viewer.take(event)
            streams += 1
        assert viewer.entries == live.entries(thread)
    assert streams > 2
    offsets = [int(id.partition("-")[2]) for id in viewer.ids]
    assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))


def test_1000_cuts_under_load_lose_repeat_and_reorder_nothing(tmp_path: Path) -> None:
    with running(tmp_path, delay=0.01, max_runs=1000, max_streams=1000, log_events=100_000) as live:
        threads = [live.thread() for _ in range(8)]
        stop = threading.Event()
        counts: list[int] = []
        failed: list[BaseException] = []

        def load(thread: str) -> None:
            for number in range(12):
                live.run(thread, "responses", "chat", content=f"Question {number}")

        def view(thread: str, seed: int) -> None:
            try:
                viewer, cuts = _view_with_cuts(live, thread, random.Random(seed), stop)
                offsets = [int(id.partition("-")[2]) for id in viewer.ids]
                assert offsets[1:] == list(range(offsets[0] + 1, offsets[0] + len(offsets)))
                assert viewer.entries == live.entries(thread)
                counts.append(cuts)
            except BaseException as error:
                failed.append(error)
                stop.set()

        workers = [threading.Thread(target=load, args=[thread]) for thread in threads]
        workers += [threading.Thread(target=view, args=[thread, seed]) for seed, thread in enumerate(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(200)
    assert not failed, failed[0]
    assert len(counts) == 8
    assert sum(counts) >= 1000


def test_no_greenlet_and_no_file_is_left_after_many_runs(tmp_path: Path) -> None:
    with running(tmp_path, delay=0.001, max_runs=1000, max_streams=1000) as live:
        _leaves_nothing(live)


def _leaves_nothing(live: Gunicorn) -> None:
    def runs(count: int) -> None:
        thread = live.thread()
        for number in range(count):
            assistant = ["responses", "chat", "assistants", "responses-cut", "chat-429", "assistants-stall"][number % 6]
            (run,) = live.run(thread, assistant)
            if assistant.endswith("stall") or number % 7 == 0:
                time.sleep(0.05)
                live.request("POST", f"{thread}/runs/{run}/cancel")
            if number % 5 == 0:
                with contextlib.closing(stream(live, f"{thread}/events")) as events:  # type: ignore[type-var]
                    next(events)
        live.settled(thread, 120)

    runs(12)
    time.sleep(1)
    before = live.get("/left")
    count = int(os.environ.get("ASSISTREAM_RUNS", "160"))
    callers = [threading.Thread(target=runs, args=[count // 4]) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    def as_before() -> bool:
        after = live.get("/left")
        # The model server's idle connections are kept for the next runs, ten at most, on both of their ends.
        return bool(after["greenlets"] <= before["greenlets"] + 12 and after["files"] <= before["files"] + 22)

    wait_until(as_before, 60)


def test_more_than_one_worker_is_refused_at_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "-b", "127.0.0.1:0", "wsgi:app"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode != 0
    assert "one worker" in found.stderr


def test_a_worker_class_that_cannot_work_is_told_what_to_do(tmp_path: Path) -> None:
    with running(tmp_path, worker_class="sync") as gunicorn:
        with pytest.raises(urllib.error.HTTPError) as refused:
            gunicorn.thread()
        assert refused.value.code == 500
        assert "--worker-class gevent" in refused.value.read().decode()
        assert "--worker-class gevent" in gunicorn.log()


def test_the_first_runs_of_a_worker_fork_no_processes_for_the_sdk(tmp_path: Path) -> None:
    app = APP.replace(
        "servers = []",
        """
import subprocess
servers, forked, fork = [], [], subprocess.check_output

def counted(*given, **named):
    forked.append(given)
    return fork(*given, **named)

subprocess.check_output = counted

@app.get("/forked")
def told():
    return jsonify(len(forked))
""",
    )
    with running(tmp_path, app=app) as live:
        thread = live.thread()
        # One, for the name of the processor.
        assert live.get("/forked") == 1
        live.run(thread, "responses", "chat", "assistants")
        live.settled(thread)
        assert live.get("/forked") == 1
