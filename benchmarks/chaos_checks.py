"""What `chaos.py` holds true at every event of every viewer, and what it takes for an excuse.

An answer's words count up and say whose they are, so that one that is lost, doubled or in the wrong place shows in
the text itself: :func:`answer` is what the model server says, and what a viewer has must be a beginning of that.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple, cast

from assistream_flask import events
from assistream_flask.events import TERMINAL
from assistream_flask.types import Entry

Json = dict[str, Any]
LEASE_SECONDS: Final = 10.0
_RENEWED_SECONDS: Final = 2.0
"""A lease may be that old when its worker is stopped."""
_FLUSH_SECONDS: Final = 3.0
"""So long after they were said words are stored, by default and on a busy machine."""
_ORDER: Final = {"queued": 0, "in_progress": 1, **dict.fromkeys(TERMINAL, 2)}
_WORD: Final = re.compile(r"([a-z]+\d+)\.(\w+)\.(\d+)\.(\d+)")


@lru_cache(maxsize=1024)
def answer(token: str, assistant: str, ask: int, words: int) -> str:
    """Give what the model server says the ``ask``-th time that ``assistant`` is asked with the message ``token``."""
    return " ".join(f"{token}.{assistant}.{ask}.{n}" for n in range(words))


def says(entry: Json) -> str:
    """Give all that an entry says."""
    content: Sequence[Json] = entry["message"]["content"]
    return "".join(part["text"]["value"] for part in content)


def misfit(text: str, words: Callable[[str], int | None]) -> str | None:
    """Give how ``text`` is no beginning of an answer, ``None`` where it is one. ``words`` gives how many there are in
    the answers to a token."""
    if not text:
        return None
    first = _WORD.match(text)
    due = words(first[1]) if first else None
    if first is None or due is None:
        return "words of nobody's"
    whole = answer(first[1], first[2], int(first[3]), due)
    if whole.startswith(text):
        return None
    if text.startswith(whole):
        return "doubled words"
    at = next(at for at, (one, other) in enumerate(zip(text, whole, strict=False)) if one != other)
    # A word's end may be missing before it.
    begin = at if _WORD.match(text, at) else text.rfind(" ", 0, at) + 1
    found = _WORD.match(text, begin)
    if found is None or found.groups()[:3] != first.groups()[:3]:
        return "two answers mixed"
    return "lost words" if int(found[4]) > whole.count(" ", 0, begin) else "doubled words"


def count(text: str) -> int:
    """Give how many words there are."""
    return len(text.split())


def oddity(text: str) -> str:
    """Give the words where they do not count up."""
    words = text.split(" ")
    at = next((at for at, word in enumerate(words) if not word.endswith(f".{at}")), len(words))
    return f"…{' '.join(words[max(0, at - 2) : at + 2])}…, {at} of {len(words)} words"


class Shrunk(NamedTuple):
    """A run of which a viewer lost so many words, ``at`` Unix time."""

    at: float
    run: str
    words: int
    detail: str


def _difference(old: Sequence[str], new: Sequence[str]) -> str:
    if not set(old) <= set(new):
        return "an entry lost"
    return BETWEEN if [one for one in new if one in old] == old else "another order"


BETWEEN: Final = "an entry between"
AFTER: Final = "after the end"


class View:
    """What one viewer of a thread sees: folds the events as the helper does, and says what may not be.

    ``report(kind, run, detail)`` hears of each, once a run and kind until a snapshot mends it, but of text that shrank,
    which may have an excuse. ``words`` is that of :func:`misfit`.
    """

    def __init__(self, report: Callable[[str, str, str], None], words: Callable[[str], int | None]) -> None:
        self._report, self._words = report, words
        self.entries: list[Json] = []
        self.last: str | None = None
        self.seen = self.snapshots = 0
        self.gone = False
        self.over: dict[str, float] = {}
        """When runs were first seen to be over, in Unix time."""
        self.shrunk: list[Shrunk] = []
        self._mine: dict[str, Json] = {}
        self._runs: dict[str, Json] = {}
        self._offsets: dict[str, int] = {}
        self._told: set[tuple[str, str]] = set()

    def see(self, name: str, id: str | None, data: Json) -> None:
        """Take one event."""
        self.seen += 1
        if self.gone:
            self._tell("after thread.deleted", "", name)
        if name == "thread.deleted":
            self.gone = True
        if id is not None:
            self._check_place(name, id)
            self.last = id
        if name == "thread.snapshot":
            self._snapshot(data)
        elif name.startswith("thread.message."):
            self._message(name, data)
        elif name.startswith("thread.run.step."):
            self._grow(name, data["run_id"], data)
        elif name.startswith("thread.run."):
            self._run(data)

    def _tell(self, kind: str, run: str, detail: str) -> None:
        if (kind, run) not in self._told:
            self._told.add((kind, run))
            self._report(kind, run, f"{detail} (at {self.last})")

    # Places

    def _check_place(self, name: str, id: str) -> None:
        epoch, _, number = id.partition("-")
        offset, before = int(number), self._offsets.get(epoch)
        self._offsets[epoch] = max(offset, before or 0)
        if name == "thread.snapshot":
            if before is not None and offset < before:
                self._tell("an id went back", "", f"a snapshot at {id} after {before}")
            return
        known = (self.last or "").partition("-")[0]
        if epoch != known:
            self._tell("another epoch without a snapshot", "", f"{id} after {self.last}")
        elif before is not None and offset <= before:
            self._tell("an offset twice", "", f"{id} after {self.last}")
        elif before is not None and offset != before + 1:
            self._tell("a gap", "", f"{id} after {self.last}")

    # What the events say

    def _snapshot(self, data: Json) -> None:
        self.snapshots += 1
        old, self.entries = self.entries, data["data"]
        ids = [entry["message"]["id"] for entry in self.entries]
        known = [entry["message"]["id"] for entry in old]
        if ids[: len(known)] != known:
            self._tell(_difference(known, ids), "", f"{known} became {ids}")
        self._mine = {entry["message"]["id"]: entry for entry in self.entries}
        if len(self._mine) < len(ids):
            self._tell("an entry twice", "", f"{ids}")
        for entry in old:
            new = self._mine.get(entry["message"]["id"])
            if new is not None and entry["run"]:
                self._compare(entry, new)
        for entry in self.entries:
            if entry["run"]:
                self._know(entry["run"])
                self._check_text(entry, mended=True)

    def _know(self, run: Json) -> None:
        self._runs[run["id"]] = run
        if run["status"] in TERMINAL:
            self.over.setdefault(run["id"], time.time())

    def _compare(self, old: Json, new: Json) -> None:
        run, had, has = new["run"]["id"], says(old), says(new)
        self._check_status(run, old["run"]["status"], new["run"]["status"], "by a snapshot")
        if len(has) < len(had) and misfit(had, self._words) is None:
            self._shrink(run, had, has, "by a snapshot")

    def _shrink(self, run: str, had: str, has: str, how: str) -> None:
        detail = f"from {count(had)} words to {count(has)}, {how} (at {self.last})"
        self.shrunk.append(Shrunk(time.time(), run, count(had) - count(has), detail))

    def _check_status(self, run: str, old: str, new: str, how: str) -> None:
        if old in TERMINAL and new != old:
            self._tell("an end taken back", run, f"{old} became {new} {how}")
        elif _ORDER[new] < _ORDER[old]:
            self._tell("a status went back", run, f"{old} became {new} {how}")

    def _message(self, name: str, data: Json) -> None:
        if name == "thread.message.created":
            self._create(data)
        elif name == "thread.message.delta":
            self._grow(name, data["id"], data)
        else:
            self._end_message(data)

    def _create(self, data: Json) -> None:
        if data["id"] in self._mine:
            self._tell("an entry twice", data["run_id"] or "", f"{data['id']} was created again")
            return
        run = self._runs.get(data["run_id"] or "")
        entry = {"assistant_id": data["assistant_id"], "message": data, "run": run, "steps": []}
        self._mine[data["id"]] = entry
        self.entries.append(entry)

    def _grow(self, name: str, message_id: str, data: Json) -> None:
        entry = self._mine.get(message_id)
        if entry is None:
            self._tell("of an unknown message", message_id, name)
            return
        if self._is_over(entry):
            self._tell(AFTER, entry["message"]["run_id"], f"{data['delta']}")
        events.apply(cast(Entry, entry), name, data)
        if not self._is_over(entry):
            self._check_text(entry)

    def _is_over(self, entry: Json) -> bool:
        run = entry["run"]
        return entry["message"]["status"] != "in_progress" or bool(run and run["status"] in TERMINAL)

    def _end_message(self, data: Json) -> None:
        entry = self._mine.get(data["id"])
        if entry is None:
            self._tell("of an unknown message", data["id"], "its end")
            return
        if self._is_over(entry):
            self._tell(AFTER, data["run_id"], f"its message is {data['status']} again")
        had, entry["message"] = says(entry), data
        has = says(entry)
        if misfit(had, self._words) is None and has != had:
            if len(has) < len(had):
                self._shrink(data["run_id"], had, has, "at the end")
            else:
                self._tell("lost words", data["run_id"], f"{count(has)} words at the end, {count(had)} were seen")
        self._check_text(entry)

    def _run(self, data: Json) -> None:
        old = self._runs.get(data["id"])
        self._know(data)
        if old is not None:
            if old["status"] in TERMINAL:
                self._tell(AFTER, data["id"], f"its run is {data['status']} again, was {old['status']}")
            self._check_status(data["id"], old["status"], data["status"], "by an event")
        entry = self._mine.get(data["message_id"])
        if entry is not None:
            entry["run"] = data
            self._check_text(entry)

    def _check_text(self, entry: Json, mended: bool = False) -> None:
        run, text = entry["message"]["run_id"], says(entry)
        kind = misfit(text, self._words)
        if kind is not None:
            self._tell(kind, run, oddity(text))
        elif mended:
            self._told -= {(kind, run) for kind in ("lost words", "doubled words", "two answers mixed")}
        status = entry["run"]["status"] if entry["run"] else ""
        if status == "completed" and kind is None and not self.is_whole(text):
            self._tell("completed, and not whole", run, f"…{text[-40:]!r}")

    def is_whole(self, text: str) -> bool:
        """Tell whether it is all of an answer."""
        first = _WORD.match(text)
        return first is not None and count(text) == self._words(first[1])


# What was done, and what it excuses


@dataclass
class Fault:
    """One thing that was done, in seconds of Unix time; ``pids`` are the workers that it was done to."""

    kind: str
    begin: float
    pids: Sequence[int] = ()
    end: float = float("inf")
    what: str = ""


@dataclass
class Violation:
    """One thing that may not be, ``at`` Unix time."""

    at: float
    kind: str
    thread: str
    run: str
    detail: str
    viewer: str = ""


@dataclass
class Held:
    """A run, and who had it: ``workers`` by name, ``pids`` as they answered."""

    thread: str
    token: str
    assistant: str
    begun: float
    background: bool
    workers: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    wanted: str = ""
    """Why it may be cancelled."""


def _outlasts_lease(fault: Fault, at: float) -> bool:
    return min(fault.end, at) - fault.begin > LEASE_SECONDS - _RENEWED_SECONDS


class Ledger:
    """What was done when, what is known of each run, and what may not be."""

    def __init__(self, say: Callable[[str], None] = lambda line: None) -> None:
        self._say = say
        self.began = time.time()
        self.faults: list[Fault] = []
        self.violations: list[Violation] = []
        self.excused: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.runs: dict[str, Held] = {}
        self.words: dict[str, int] = {}
        self.paces: dict[str, float] = {}
        """How many words an answer to a token has, and the seconds between them."""
        self.asks: dict[tuple[str, str], list[float]] = {}
        self.pids: dict[str, int] = {}
        """Of workers, by their names."""

    def log(self, line: str) -> None:
        """Tell what happens, with its time."""
        self._say(f"{time.time() - self.began:8.1f} s  {line}")

    def begin(self, kind: str, pids: Iterable[int] = (), what: str = "", *, lasts: bool = False) -> Fault:
        """Note that something is done now; what ``lasts`` is to be ended."""
        now = time.time()
        fault = Fault(kind, now, tuple(pids), float("inf") if lasts else now, what)
        self.faults.append(fault)
        self.counts[f"chaos: {kind}"] += 1
        self.log(f"{kind} {what} {' '.join(map(str, fault.pids))}".rstrip())
        return fault

    def end(self, fault: Fault) -> None:
        """Note that it is over."""
        fault.end = time.time()
        self.log(f"{fault.kind} {fault.what} over after {fault.end - fault.begin:.1f} s")

    def violate(self, kind: str, thread: str, run: str, detail: str, viewer: str = "", at: float | None = None) -> None:
        """Note what may not be."""
        found = Violation(time.time() if at is None else at, kind, thread, run, detail, viewer)
        self.violations.append(found)
        held = self.runs.get(run)
        who = f" of {held.assistant} by {self.holders(held)}" if held else ""
        self.log(f"VIOLATION {kind}: {thread} {run}{who} {viewer} {found.at - self.began:.1f} s: {detail}")

    def holders(self, held: Held) -> list[int]:
        """Give the pids of those who had the run."""
        named = [self.pids[worker] for worker in held.workers if worker in self.pids]
        return list(dict.fromkeys([*held.pids, *named]))

    # Excuses

    def _done(self, kinds: Sequence[str], begin: float, end: float, pids: Sequence[int] | None = None) -> list[Fault]:
        return [
            fault
            for fault in self.faults
            if fault.kind in kinds
            and fault.begin <= end
            and fault.end >= begin
            and (pids is None or set(pids) & set(fault.pids))
        ]

    def lately(self, kinds: Sequence[str], seconds: float) -> bool:
        """Tell whether one of these was done in the last so many seconds."""
        return bool(self._done(kinds, time.time() - seconds, time.time()))

    def lost(self, held: Held, at: float) -> str | None:
        """Give why a worker of the run may have been taken for lost before ``at``."""
        pids = self.holders(held)
        if self._done(["kill"], held.begun - 1, at, pids):
            return "killed"
        if any(_outlasts_lease(fault, at) for fault in self._done(["stop"], held.begun - LEASE_SECONDS, at, pids)):
            return "stopped for longer than its lease"
        if self.left(held, at) and self._done(DATABASE, held.begun, at):
            return "deployed while the database was away"
        return None

    def left(self, held: Held, at: float) -> bool:
        """Tell whether a worker of the run was told to end before ``at``."""
        return bool(self._done(["deploy", "restart"], held.begun - 60, at, self.holders(held)))

    def shrunk(self, held: Held, lost: Shrunk) -> str | None:
        """Give why a viewer may have lost words of the run: its worker was lost, and at that time the log."""
        for fault in self._done(["kill", "stop", "deploy", "restart"], held.begun - 60, lost.at, self.holders(held)):
            if fault.kind == "stop" and not _outlasts_lease(fault, lost.at):
                continue
            # What was said before that was stored, if the database took it.
            since = fault.begin - _FLUSH_SECONDS
            since = min([since, *(one.begin - _FLUSH_SECONDS for one in self._done(DATABASE, since, lost.at))])
            away, database = self._done(REDIS, since, lost.at), self._done(DATABASE, since, lost.at)
            if away and (database or lost.words * self.paces[held.token] < 2 * _FLUSH_SECONDS):
                how = " and the database was away" if database else ""
                return f"{away[-1].kind}{how} at a {fault.kind} of its worker"
        return None

    def told(self, kind: str, run: str) -> str | None:
        """Say why a snapshot may mend what a viewer was told: an entry that came late, as Redis or the database was
        away when it was stored; a word of a worker that stood still, as Redis forgot meanwhile who has its run."""
        now = time.time()
        if kind == BETWEEN and self.lately([*REDIS, *DATABASE], 10):
            return "what was stored could not be told, or nobody knew that it was"
        held = self.runs.get(run)
        if kind == AFTER and held is not None:
            stops = self._done(["stop"], now - 60, now, self.holders(held))
            if any(self._done(["flush"], stop.begin, now) for stop in stops):
                return "flush at a stop of its worker"
        return None

    # Judgements

    def judge_end(self, run: Json, at: float) -> None:
        """Count how a run ended, and looks for the cause of an end that is not ``completed``."""
        status, held = run["status"], self.runs[run["id"]]
        code = (run["last_error"] or {}).get("code") or (run["incomplete_details"] or {}).get("reason") or ""
        self.ends[f"{status} {code}".strip()] += 1
        if status == "completed" or (status == "cancelled" and held.wanted):
            return
        why = None
        if code == "worker_lost" and not held.background:
            why = self.lost(held, at)
        elif code == "server_shutdown" and not held.background and self.left(held, at):
            why = "deployed"
        if why is None:
            self.violate(f"ended {status} {code} without a cause", held.thread, run["id"], "", at=at)
        else:
            self.excused[f"{status} {code}: {why}"] += 1

    def judge_asks(self, run_id: str, began: bool) -> None:
        """Look how often a model server was asked for a run; ``began``: there is text of it."""
        held = self.runs[run_id]
        asks = self.asks.get((held.token, held.assistant), [])
        if not asks and began:
            self.violate("never asked, and answered", held.thread, run_id, "")
        for before, again in pairwise(asks):
            why = self._asked_again(held, before) if held.background else None
            if why is None:
                self.violate("asked twice", held.thread, run_id, f"{again - before:.1f} s after", at=again)
            else:
                self.excused[f"asked twice: {why}"] += 1

    def _asked_again(self, held: Held, at: float) -> str | None:
        pids = self.holders(held)
        if self._done(["kill", "stop"], at - 0.1, at + 0.2, pids):
            return "killed or stopped within 0.2 s"
        if self._done(DATABASE, at - 5, at + 1) and self.lost(held, float("inf")):
            return "the database was away, and its worker was lost"
        return None


DATABASE: Final = ("lock", "readonly", "crash", "freeze", "terminate")
REDIS: Final = ("redis", "flush", "full", "pause", "clients")
