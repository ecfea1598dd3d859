"""A page without a browser: it follows a thread's stream, comes back after every break, and folds the events."""

from __future__ import annotations

import contextlib
import copy
import http.client
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.gunicorn_server import Event, Gunicorn, stream

OVER = ("completed", "incomplete", "failed", "cancelled")


# Those that the present test made: see tests/conftest.py.
made: list[Watcher] = []


class Watcher:
    """Follows ``thread`` (its path) on any of ``gunicorns``, until :meth:`stop`.

    ``faults`` has what no viewer may see: an offset that does not follow the one before it, an entry twice.
    """

    def __init__(self, gunicorns: list[Gunicorn], thread: str, seed: int = 0) -> None:
        self._gunicorns, self._path, self._choose = gunicorns, thread + "/events", random.Random(seed)
        self._last: str | None = None
        self.entries: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.breaks = self.snapshots = 0
        self._stopped = threading.Event()
        self._runs: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        made.append(self)

    def stop(self) -> None:
        """Leave at the next event or break."""
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
                by = self._choose.choice(["header", "query"])
                for event in stream(self._choose.choice(self._gunicorns), self._path, last=self._last, by=by):
                    if self._stopped.is_set():
                        return
                    self._see(event)
            self.breaks += 1
            # As the helper: half a second, with jitter.
            time.sleep(0.25 + self._choose.random() / 4)

    def _see(self, event: Event) -> None:
        if event.id is None:
            return
        epoch, _, offset = event.id.partition("-")
        data = copy.deepcopy(event.data)
        if event.name == "thread.snapshot":
            self.snapshots += 1
            self.entries = data["data"]
        else:
            known, _, before = (self._last or "-").partition("-")
            if epoch != known or int(offset) != int(before) + 1:
                self.faults.append(f"{event.id} after {self._last}")
            self._fold(event.name.removeprefix("thread."), data)
        self._last = event.id

    def _fold(self, name: str, data: dict[str, Any]) -> None:
        mine = [one for one in self.entries if data["id"] in (one["message"]["id"], one["message"]["run_id"])]
        if name == "message.created":
            if mine:
                self.faults.append(f"{data['id']} created twice")
            run = self._runs.get(data["run_id"] or "")
            self.entries.append({"assistant_id": data["assistant_id"], "message": data, "run": run, "steps": []})
        elif name == "message.delta":
            for part in data["delta"]["content"]:
                content = mine[0]["message"]["content"]
                if part["index"] == len(content):
                    content.append({"type": "text", "text": {"value": "", "annotations": []}})
                content[part["index"]]["text"]["value"] += part["text"]["value"]
        elif name.startswith("message."):
            mine[0]["message"] = data
        elif name.startswith("run."):
            self._runs[data["id"]] = data
            for one in mine:
                one["run"] = data


def settle(gunicorn: Gunicorn, watchers: Mapping[str, Sequence[Watcher]], seconds: float = 60) -> dict[str, list[Any]]:
    """Wait until all runs of the threads are over; give each thread's entries.

    Then every viewer must come to see just those.
    """
    found = {thread: gunicorn.settled(thread, seconds) for thread in watchers}
    end = time.monotonic() + 20
    for thread, entries in found.items():
        for watcher in watchers[thread]:
            while watcher.entries != entries and time.monotonic() < end:
                time.sleep(0.05)
            assert watcher.entries == entries, (thread, watcher.entries[-2:], entries[-2:])
            assert watcher.faults == []
    return found


def says(entry: dict[str, Any]) -> str:
    """Give all that an entry says."""
    return "".join(part["text"]["value"] for part in entry["message"]["content"])
