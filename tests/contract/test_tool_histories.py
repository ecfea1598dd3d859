"""Histories of tool calls that are cut anywhere: the next request is one that the model server takes, in each dialect.

``ASSISTREAM_TRIALS=1000`` tries so many in each dialect.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from flask import Flask
from sqlalchemy.engine import Connection

from assistream_flask import Assistant, ToolContext, page_tool, tool
from assistream_flask.runs import runtime
from assistream_flask.store.sql import ThreadStore
from assistream_flask.store.tables import runs
from assistream_flask.testing import OfflineServer, Reply, Request, ToolCall, _refusals
from tests.conftest import OVER, Caller, apps_of, text, wait_until

TRIALS = int(os.environ.get("ASSISTREAM_TRIALS", "12"))
CUTS: Final = ("none", "stop", "kill", "kill", "deploy", "run", "message", "broken")
ANSWERS: Final = ("answer", "answer", "answer", "some", "stop", "expire", "run", "message", "kill", "deploy")
FAULTS: Final = ("cut", "ends_early", "incomplete", "call_half", "call_no_ids", "call_empty_final", "error_nested")
EXPECTED: Final = {"worker_lost", "upstream_cut", "upstream_ended_early", "upstream_error"}
"""Why a run may fail here. That the model server refused what it was asked is no such reason."""


class Fate:
    """When a worker is cut short: before or after one of its runs' transactions."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._left: int | None = None
        self._is_deadly = False
        self.reached, self.going = threading.Event(), threading.Event()
        self.going.set()

    def arm(self, after: int, *, is_deadly: bool) -> None:
        with self._guard:
            self._left, self._is_deadly = after, is_deadly
            self.reached.clear()

    def disarm(self) -> None:
        with self._guard:
            self._left = None

    def point(self) -> None:
        if threading.current_thread().name.startswith(("assistream-queue-", "assistream-call_")):
            with self._guard:
                self._left = None if self._left is None else self._left - 1
                if self._left == 0:
                    if self._is_deadly:
                        self.going.clear()
                    self.reached.set()
        # Of a dead worker nothing is seen any more. Here it comes back later, as one that only stood still.
        self.going.wait()


class MortalStore(ThreadStore):
    """A store whose worker may be gone between any two transactions."""

    def __init__(self, *given: Any) -> None:
        self.fate = Fate()
        super().__init__(*given)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        self.fate.point()
        with super().write() as connection:
            yield connection
        self.fate.point()


class World:
    """An assistant with tools of each kind in one dialect, whom workers answer for one after another."""

    def __init__(self, folder: Path, dialect: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dialect, self.folder = dialect, folder
        self.executed: Counter[str] = Counter()
        self.refused: list[str] = []
        self.late: list[str] = []
        self.script: list[Reply] = []
        self.server = OfflineServer(self._reply, delay=0, keep=100)
        self.app: Flask
        self.dead: list[Flask] = []
        self._queries = itertools.count()
        monkeypatch.setattr(runtime, "ThreadStore", MortalStore)
        init = _refusals.Refused.__init__

        def refuse(refused: Any, status: int, message: str, **more: Any) -> None:
            # Whether a worker that is gone had submitted the outputs, only the server knows: a new run is begun then.
            is_late = message.startswith(('Runs in status "', "Expected tool outputs for call_ids "))
            (self.late if is_late else self.refused).append(message)
            init(refused, status, message, **more)

        monkeypatch.setattr(_refusals.Refused, "__init__", refuse)

    def _reply(self, request: Request) -> Reply:
        return self.script.pop(0) if self.script else Reply("Done.")

    # Workers

    def begin(self, make: Callable[..., Flask]) -> None:
        self._make = make
        self.replace()
        self.store = ThreadStore(self.runtime.settings.database_url)

    def replace(self) -> None:
        """Have another worker."""
        other = "chat" if self.dialect != "chat" else "responses"
        clerk = Assistant("clerk", model="m", upstream=self.dialect, tools=self._tools())
        critic = Assistant("critic", model="m2", upstream=other, tools=self._tools())
        self.app = self._make([clerk, critic], owner=lambda: "me", heartbeat_seconds=20)

    @property
    def runtime(self) -> Any:
        return self.app.extensions["assistream"].runtime()

    @property
    def fate(self) -> Fate:
        fate: Fate = self.runtime.store.fate
        return fate

    def die(self) -> None:
        """Have another worker go on where the first does nothing any more."""
        dead = self.runtime
        dead.store.fate.going.clear()
        dead.leases._held = list
        self.dead.append(self.app)
        self.replace()
        self.end_leases(runs.c.worker == dead.worker)

    def deploy(self) -> None:
        self.app.extensions["assistream"].close()
        self.replace()
        self.runtime.runner.sweep()

    def end_leases(self, which: Any) -> None:
        with self.runtime.store.write() as connection:
            connection.execute(runs.update().where(which, runs.c.status.not_in(OVER)).values(lease=0))
        self.runtime.runner.sweep()

    def bury(self) -> None:
        """Have those that were gone find that they were replaced."""
        while self.dead:
            app = self.dead.pop()
            app.extensions["assistream"].runtime().store.fate.going.set()
            app.extensions["assistream"].close()

    # Tools

    def _tools(self) -> list[Any]:
        def count(context: ToolContext) -> None:
            self.executed[context.run_id + context.tool_call_id] += 1

        @tool
        def lookup(query: str, context: ToolContext) -> dict[str, str]:
            """Look something up."""
            count(context)
            return {"found": query}

        @tool(sequential=True)
        def alone(query: str, context: ToolContext) -> str:
            """Do it alone."""
            count(context)
            return query

        @tool(timeout=0.02)
        def late(query: str, context: ToolContext) -> str:
            """Take too long."""
            count(context)
            time.sleep(0.06)
            return query

        @tool
        def broken(query: str, context: ToolContext) -> str:
            """Fail."""
            count(context)
            raise ValueError(query)

        @tool(approval=True)
        def pay(query: str, context: ToolContext) -> str:
            """Pay."""
            count(context)
            return query

        schema = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
        return [lookup, alone, late, broken, pay, page_tool("pick", "Ask for a day.", schema)]

    def replies(self, choose: random.Random) -> list[Reply]:
        """Give what the model answers a run's rounds with."""
        return [self._round(choose) for _ in range(choose.choice([1, 1, 2, 3]))]

    def _round(self, choose: random.Random) -> Reply:
        names = ("lookup", "lookup", "alone", "late", "broken", "pay", "pick", "nothing")
        calls = []
        for _ in range(choose.choice([1, 1, 2, 3])):
            query = f"q{next(self._queries)}"
            arguments: Any = {"query": query}
            if choose.random() < 0.15:
                arguments = choose.choice(['{"query": "half', "", "[]", "null", {"query": 1}, {}, {"other": query}])
            # Some count anew with each answer; of the runs of the Assistants API all have their own.
            ids = [None, None, "call_1", f"strange id {'x' * 80}", ""] if self.dialect != "assistants" else [None]
            calls.append(ToolCall(choose.choice(names), arguments, choose.choice(ids)))
        return Reply(
            choose.choice(["", "", "I look."]),
            calls=calls,
            reasoning="Hm." if choose.random() < 0.3 else "",
            fault=choose.choice(FAULTS) if choose.random() < 0.15 else None,
        )


class History:
    """One thread: what is asked in it, and how that is cut."""

    def __init__(self, world: World, seed: str) -> None:
        self.world, self.choose, self.did = world, random.Random(seed), list[str]()
        self.caller = Caller(world.app)

    def back(self) -> None:
        """Have requests go to the worker that there is now."""
        self.caller = Caller(self.world.app, self.caller.thread_id)

    def entries(self) -> list[Any]:
        """Give what is stored of runs: a worker that is gone would keep whoever asks it waiting."""
        found = self.world.store.page(self.caller.thread_id, 200)
        assert found is not None
        return [stored.entry for stored in found[0] if stored.entry["run"]]

    def of_status(self, *statuses: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries() if entry["run"]["status"] in statuses]

    def settle(self, seconds: float = 60) -> list[dict[str, Any]]:
        """Wait until nothing goes on; give what waits for an answer."""
        wait_until(lambda: not self.of_status("queued", "in_progress"), seconds)
        return self.of_status("requires_action")

    def cut(self) -> None:
        """Ask something, and cut it somewhere."""
        world, choose = self.world, self.choose
        world.script[:] = world.replies(choose)
        kind, after = choose.choice(CUTS), choose.randrange(1, 24)
        self.did.append(f"{kind} after {after}")
        fate = world.fate
        # The thread of the last run may be at its end still, with a lock that whoever asks next would wait for.
        wait_until(lambda: not world.runtime.runner.active.all())
        if kind == "broken":
            world.script[-1] = Reply("I beg", fault=choose.choice(FAULTS))
        if kind not in ("none", "broken"):
            fate.arm(after, is_deadly=kind == "kill")
        self.caller.run(choose.choice(["clerk", "clerk", "clerk", "critic"]), content="Hi")
        end = time.monotonic() + 60
        while kind not in ("none", "broken") and not fate.reached.wait(0.005):
            assert time.monotonic() < end, self.did
            if fate.going.is_set() and not self.of_status("queued", "in_progress"):
                break
        fate.disarm()
        if kind == "kill" and fate.going.is_set():
            # It ended, or waits.
            kind = "none"
        self.act(kind)
        while waiting := self.settle():
            self.decide(choose.choice(ANSWERS), waiting[0])

    def act(self, kind: str) -> None:
        world = self.world
        match kind:
            case "stop":
                for entry in self.of_status("queued", "in_progress", "requires_action"):
                    self.caller.cancel(entry["run"]["id"])
            case "kill":
                world.die()
                self.back()
            case "deploy":
                world.deploy()
                self.back()
            case "run":
                self.caller.run("clerk", content="Else?")
            case "message":
                answer = self.caller.client.post(f"{self.caller.url}/messages", json={"content": "Never mind."})
                assert answer.status_code == 201, answer.text

    def decide(self, how: str, entry: dict[str, Any]) -> None:
        """Do something about a run that waits."""
        self.did.append(f"waits: {how}")
        run, world = entry["run"], self.world
        if how == "expire":
            world.end_leases(runs.c.id == run["id"])
        elif how not in ("answer", "some"):
            self.act(how)
        else:
            waiting = run["required_action"]["submit_tool_outputs"]["tool_calls"]
            for call in waiting[: 1 if how == "some" else None]:
                self.answer(run["id"], call)

    def answer(self, run_id: str, call: dict[str, Any]) -> None:
        given: dict[str, Any] = {"tool_call_id": call["id"]}
        if call["needs"] == "output":
            path, body = "submit_tool_outputs", {"tool_outputs": [{**given, "output": "Friday"}]}
        else:
            given["approve"] = self.choose.random() < 0.7
            if given["approve"] and self.choose.random() < 0.3:
                given["arguments"] = {"query": "edited"}
            path, body = "approvals", {"approvals": [given]}
        answer = self.caller.client.post(f"{self.caller.url}/runs/{run_id}/{path}", json=body)
        assert answer.status_code == 200, answer.text

    def check(self) -> None:
        """Ask again, and look at all that there is then."""
        world = self.world
        world.script.clear()
        for assistant in ("clerk", "critic"):
            [run_id] = self.caller.run(assistant, content="And now?")
            assert self.settle() == []
            entry = self.caller.entry(run_id)
            assert (entry["run"]["status"], entry["run"]["last_error"], text(entry)) == ("completed", None, "Done.")
        world.bury()
        assert self.entries() == [entry for entry in self.caller.entries() if entry["run"]]
        for entry in self.entries():
            error = entry["run"]["last_error"]
            assert error is None or error["code"] in EXPECTED, error
            for step in entry["steps"]:
                assert step["status"] != "in_progress", step
                for call in step["step_details"].get("tool_calls", ()):
                    assert call["status"] in ("completed", "failed", "denied", "interrupted"), call
        assert world.refused == []
        assert world.late == [] or any("kill" in one or "deploy" in one for one in self.did)
        world.late.clear()
        assert set(world.executed.values()) <= {1}
        world.executed.clear()


@pytest.mark.parametrize("dialect", ["responses", "chat", "assistants"])
def test_wherever_calls_are_cut_the_next_request_is_taken(
    dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, dialect, monkeypatch)
    done: Counter[str] = Counter()
    with world.server, apps_of(world.server, tmp_path) as make:
        world.begin(make)
        try:
            for number in range(TRIALS):
                history = History(world, f"{dialect}/{number}")
                try:
                    for _ in range(history.choose.choice([1, 1, 2])):
                        history.cut()
                    history.check()
                except BaseException as error:
                    error.add_note(f"history {dialect}/{number}: {history.did}")
                    raise
                done.update(one.split(" after")[0] for one in history.did)
        finally:
            world.fate.going.set()
            world.bury()
            world.store.close()
    print(f"{TRIALS} histories in {dialect}: {dict(done)}")
    assert TRIALS < 40 or {"kill", "stop", "deploy", "run", "message"} <= set(done)
