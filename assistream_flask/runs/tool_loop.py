"""The tool loop of a run: stores what the model calls, has it executed, each call once, and says what is answered.

A call is stored before it is executed, and its output before the model is asked again. Who executes claims it first. So
another worker can go on at any point: what was claimed and has no output is not executed again, unless its tool is
``idempotent``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, Final

from .. import events
from ..errors import RunError
from ..events import Event, Json
from ..platform.interrupt import Interrupted
from ..platform.threads import spawn
from ..store.thread_change import NOT_KNOWN, StoredCall
from ..tools import Tool, ToolArgumentsError, ToolContext
from ..types import RequiredAction, RequiredCall, ToolCall
from ..upstream.deltas import End, WholeCall
from ..upstream.items import Turn
from .active_run import ActiveRun
from .delta_publisher import DeltaPublisher
from .loop_state import LoopState
from .message_accumulator import Stop
from .run_changes import RunChanges
from .step_calls import OVER, calls_of
from .thread_history import RunRequest
from .tool_execution import Execution, ToolExecutions
from .tracing import RunTrace
from .worker import Worker

_log = logging.getLogger(__name__)

_REPEATED: Final = "This was called three times in a row with the same arguments. Answer with what you have."
_OUT_OF_TIME: Final = "The time for tools is over. Answer with what you have."
_AWAY: Final = "The server of this tool cannot be reached now. The tool was not executed."
_EQUAL: Final = 3
# So long a wait goes on by itself where nothing can throw into it.
_LOOK_SECONDS: Final = 0.5


class ToolLimits:
    """How many tools the runs of one worker execute at a time: so many each, and so many together."""

    def __init__(self, of_run: int, of_worker: int) -> None:
        self.of_run = of_run
        self.of_worker = threading.BoundedSemaphore(of_worker)


class ToolLoop:
    """The tool calls of ``active``, for its own thread."""

    def __init__(
        self,
        worker: Worker,
        changes: RunChanges,
        publisher: DeltaPublisher,
        executions: ToolExecutions,
        limits: ToolLimits,
        active: ActiveRun,
    ) -> None:
        self._worker, self._changes, self._publisher = worker, changes, publisher
        self._executions, self._limits, self._active = executions, limits, active
        assert active.request is not None
        self._request: RunRequest = active.request
        self._rows: dict[str, StoredCall] = {}

    @property
    def _state(self) -> LoopState:
        return self._active.loop or LoopState()

    @property
    def round(self) -> int:
        """Give how many answers of the model called something."""
        return self._state.round

    @property
    def is_open(self) -> bool:
        """Tell whether the model waits for the outputs of calls."""
        calls = self._active.accumulator.calls
        return self._active.loop is not None and calls.is_open and calls.step_id == self._state.step_id

    @property
    def may_call(self) -> bool:
        """Tell whether the model may call anything in its next answer: where it may not, users get words."""
        state, assistant = self._state, self._request.assistant
        has_time = state.seconds < assistant.max_tool_seconds
        return state.round < assistant.max_rounds and state.equal < _EQUAL and has_time

    def turns(self) -> list[Turn]:
        """Give what the run itself said and did so far, for its next request."""
        if self._active.loop is None:
            return []
        items = self._worker.tool_calls.said(self._active.id)
        return [Turn("assistant", "", items)] if items else []

    def followup(self) -> Json | None:
        """Give what the model server needs to go on where it keeps the run itself: its own ids, and the outputs."""
        known = self._state.followup
        if known is None:
            return None
        outputs = [row.output or "" for row in self._rows.values() if row.round == self._state.round]
        return {**known, "outputs": outputs}

    # What the model calls

    def begin(self, end: End) -> None:
        """Store what the model calls in an answer that is over. Raises :class:`Interrupted`."""
        active = self._active
        self._publisher.tell(
            active,
            lambda: active.accumulator.calls.complete(active.run, active.accumulator.content_count, end.calls),
        )
        with active.lock:
            shown = active.accumulator.calls.functions()
            step_id = active.accumulator.calls.step_id
        before = self._state
        names = hashlib.sha256(json.dumps([[call.name, call.arguments] for call in end.calls]).encode()).hexdigest()
        state = before._replace(
            round=before.round + 1,
            step_id=step_id,
            equal=before.equal + 1 if names == before.calls else 1,
            calls=names,
            followup=end.followup,
            trace=active.trace.name(),
        )
        tools, approved = self._request.assistant.tools, set[str]()
        if any(tools[call.name].approval for call in end.calls if call.name in tools):
            approved = self._changes.patiently(active, lambda: self._worker.tool_calls.approved(active.thread_id))
        rows = [
            self._row(number, call, whole, state, approved)
            for number, (call, whole) in enumerate(zip(shown, end.calls, strict=False), len(self._rows))
        ]
        items = _as_stored(end.items, rows)

        def change() -> list[Event]:
            active.end_round()
            active.accumulator.count(end.usage)
            told: list[Event] = []
            for row in rows:
                told += self._told(row)
            for call in shown[len(rows) :]:
                # Of these the answer's end says nothing.
                told += active.accumulator.calls.change(call["id"], "interrupted")
            active.loop = state._replace(content=active.accumulator.content_count, steps=active.accumulator.step_count)
            return told

        def store() -> bool:
            assert active.loop is not None
            loop = active.loop.stored()
            return self._worker.tool_calls.begin_round(self._worker.name, active.state(), loop, items, rows)

        self._changes.once(active, change, store)
        self._rows.update((row.call_id, row) for row in rows)

    def _row(self, number: int, call: ToolCall, whole: WholeCall, state: LoopState, approved: set[str]) -> StoredCall:
        """Give the call as it is stored: checked, so that what a person is asked is what would be done."""
        arguments = _object(whole.arguments)
        row = StoredCall(
            self._active.id,
            call["id"],
            state.round,
            number,
            state.step_id,
            whole.name[:255],
            call["kind"],
            "{}" if arguments is None else events.dumps(arguments),
            "pending",
        )
        tool = self._request.assistant.tools.get(whole.name)
        refusal = self._refusal(tool, whole, arguments, state)
        if refusal is not None:
            output, error = refusal
            return row._replace(status="failed", output=output, error=error, completed_at=events.now())
        assert tool is not None
        assert arguments is not None
        if tool.kind == "page":
            return row._replace(status="requires_action", needs="output")
        if tool.name not in approved and self._needs_approval(tool, arguments, call["id"]):
            return row._replace(status="requires_action", needs="approval")
        return row

    def _unknown(self, name: str, otherwise: str) -> tuple[str, str]:
        """Give what the model is told of a call of a tool that there is not, and why in a few words."""
        return (_AWAY, "unreachable") if self._request.assistant.lacks(name) else (otherwise, "unknown tool")

    def _refusal(
        self, tool: Tool | None, whole: WholeCall, arguments: Json | None, state: LoopState
    ) -> tuple[str, str] | None:
        """Give what the model is told of a call that is not executed, and why in a few words."""
        if tool is None:
            known = ", ".join(self._request.assistant.tools) or "none"
            return self._unknown(whole.name, f"There is no tool {whole.name[:100]!r}. There are: {known}.")
        if arguments is None:
            return "The arguments are no JSON object. Give one.", "bad arguments"
        if state.equal >= _EQUAL:
            return _REPEATED, "repeated"
        if state.seconds >= self._request.assistant.max_tool_seconds:
            return _OUT_OF_TIME, "timed out"
        if state.round > self._request.assistant.max_rounds:
            return _OUT_OF_TIME, "too many rounds"
        try:
            tool.checked(arguments)
        except ToolArgumentsError as error:
            return str(error), "bad arguments"
        return None

    def _needs_approval(self, tool: Tool, arguments: Json, call_id: str) -> bool:
        if not callable(tool.approval):
            return tool.approval
        try:
            with self._request.within():
                return bool(tool.approval(arguments, self._context(call_id)))
        except Exception as error:
            # Whoever cannot say that it is safe has a person asked.
            self._worker.throttle.error(_log, error, "approval= of the tool %s failed", tool.name)
            return True

    def _context(self, call_id: str) -> ToolContext:
        active = self._active
        return ToolContext(active.thread_id, active.id, active.run["assistant_id"], active.owner.name, call_id)

    def _told(self, row: StoredCall) -> list[Event]:
        """Have viewers see a call as it is stored; give the events that tell of it. The run's lock is held."""
        status = "in_progress" if row.status in ("pending", "claimed", "requires_action") else row.status
        shown: Any = status
        return self._active.accumulator.calls.change(row.call_id, shown, row.output, row.error, row.arguments)

    # What is executed

    def restore(self) -> None:
        """Take what another worker stored of the calls, and have viewers see it. Raises :class:`Interrupted`."""
        active = self._active
        if active.loop is None:
            return
        found = self._changes.patiently(active, lambda: self._worker.tool_calls.of_run(active.id))
        self._rows = {row.call_id: row for row in found}
        if self.is_open:
            self._publisher.tell(active, lambda: [event for row in self._rows.values() for event in self._told(row)])

    def execute(self) -> bool:
        """Have the round's calls executed that nobody has to answer; give whether the model can be asked again: else
        the run waits, and is no worker's any more. Raises :class:`Interrupted`."""
        active = self._active
        left = self._left()
        began = time.monotonic()
        for batch in _batches(left, self._request.assistant.tools):
            _Batch(self, batch).run(active)
        if self._left():
            raise RunError("server_error", said="a tool call could not be executed, nor ended")
        spent = self._state.seconds + time.monotonic() - began
        waiting = [row for row in self._rows.values() if row.status == "requires_action"]
        if waiting:
            self._park(waiting, spent)
            return False

        def change() -> list[Event]:
            told = active.accumulator.calls.end()
            active.loop = self._state._replace(
                seconds=spent,
                content=active.accumulator.content_count,
                steps=active.accumulator.step_count,
                # It may have begun in another part.
                trace=active.trace.name(),
            )
            return told

        def store() -> bool:
            return self._worker.tool_calls.save_loop(self._worker.name, active.state(), self._state.stored())

        self._changes.once(active, change, store)
        return True

    def _left(self) -> list[StoredCall]:
        """Give the calls of the round that are to be executed."""
        found = self._rows.values()
        return [row for row in found if row.round == self._state.round and row.status in ("pending", "claimed")]

    def _park(self, waiting: Sequence[StoredCall], spent: float) -> None:
        active, seconds = self._active, self._worker.settings.action_seconds

        def change() -> list[Event]:
            told: list[Event] = []
            for row in waiting:
                told += active.accumulator.calls.change(row.call_id, "requires_action")
            active.loop = self._state._replace(seconds=spent)
            return told + active.accumulator.require(required(waiting), events.now() + int(seconds))

        def store() -> bool:
            state, loop, name = active.state(), self._state.stored(), self._worker.name
            if self._worker.tool_calls.park(name, state, loop, seconds):
                return True
            if self._worker.store.to_cancel(name, [active.id]):
                # Nobody would heed that any more once it is parked.
                active.interrupt(Stop.CANCELLED)
                raise Interrupted
            # It may be parked, and told to nobody.
            self._worker.appender.mark_incomplete(active.thread_id)
            return False

        self._changes.once(active, change, store)
        self._changes.leave(active)

    def perform(self, row: StoredCall, batch: _Batch) -> None:
        """Execute one call, in a thread of its own."""
        store, active = self._worker.tool_calls, self._active
        tool = self._request.assistant.tools.get(row.name)
        claim = active.claim
        if tool is None or (row.status == "claimed" and not tool.idempotent):
            # It was known when it was stored: the app is another one by now.
            said = self._unknown(row.name, f"There is no tool {row.name!r} any more.")
            output, error = (NOT_KNOWN, "interrupted") if row.status == "claimed" else said
            self._finish(row, "interrupted" if row.status == "claimed" else "failed", output, error)
            return
        again = row.status == "claimed"
        if not self._changes.patiently(
            active,
            lambda: store.claim(self._worker.name, claim.number, row.run_id, row.call_id, again=again),
        ):
            self._reread(row)
            return
        self._publisher.tell(active, lambda: active.accumulator.calls.start(row.call_id))
        left = self._request.assistant.max_tool_seconds - self._state.seconds
        arguments: Json = json.loads(row.arguments)
        context = self._context(row.call_id)
        with active.trace.tool(tool, row.call_id, row.arguments) as span:
            within = span.within(self._request.within)
            execution = self._executions.start(tool, arguments, context, within, max(0.1, left))
            if not batch.add(execution):
                return
            while not execution.wait(_LOOK_SECONDS):
                if batch.is_over.is_set():
                    return
            if batch.is_over.is_set():
                # It was abandoned: what became of it nobody knows.
                return
            outcome = execution.outcome
            span.over(outcome.output, outcome.error)
        self._finish(row, outcome.status, outcome.output, outcome.error)

    def fail(self, row: StoredCall, error: Exception) -> None:
        """End a call that could not be executed, or that may have been."""
        self._worker.throttle.error(_log, error, "the tool %s could not be executed", row.name)
        self._finish(row, "interrupted", NOT_KNOWN, "interrupted")

    def _finish(self, row: StoredCall, status: str, output: str, error: str | None) -> None:
        store, active = self._worker.tool_calls, self._active
        ours = (self._worker.name, active.claim.number, row.run_id, row.call_id)
        if not self._changes.patiently(active, lambda: store.finish(*ours, status, output, error)):
            self._reread(row)
            return
        over = row._replace(status=status, output=output, error=error)
        self._rows[row.call_id] = over
        self._publisher.tell(active, lambda: self._told(over))
        self._worker.notifier.notify("tool_called", active.owner, run=active.run, call=_shown(active, row.call_id))

    def _reread(self, row: StoredCall) -> None:
        """Take what the store has of a call that is not this worker's to execute, or to end."""
        active = self._active
        found = self._changes.patiently(active, lambda: self._worker.tool_calls.of_run(active.id))
        now = next((one for one in found if one.call_id == row.call_id), None)
        if now is None or now.status not in OVER:
            # Another worker has the run.
            self._changes.leave(active)
            return
        self._rows[row.call_id] = now
        self._publisher.tell(active, lambda: self._told(now))

    @property
    def trace(self) -> RunTrace:
        """Give what traces the run: the threads of its calls are not below it by themselves."""
        return self._active.trace

    @property
    def limits(self) -> ToolLimits:
        """Give how many are executed at a time."""
        return self._limits


class _Batch:
    """Calls that are executed at the same time."""

    def __init__(self, loop: ToolLoop, rows: Sequence[StoredCall]) -> None:
        self._loop, self._rows = loop, rows
        self._guard = threading.Lock()
        self._executions: list[Execution] = []
        self._left = len(rows)
        self._of_run = threading.BoundedSemaphore(loop.limits.of_run)
        self.is_over = threading.Event()

    def run(self, active: ActiveRun) -> None:
        """Execute all, and wait for that. Raises :class:`Interrupted`; what is executed then is abandoned."""
        try:
            for row in self._rows:
                spawn(f"assistream-{row.call_id}", self._perform, row)
            while not active.waits.wait(partial(self.is_over.wait, _LOOK_SECONDS)):
                if active.is_left or active.is_over:
                    raise Interrupted
            if active.is_left:
                raise Interrupted
        finally:
            with self._guard:
                self.is_over.set()
                abandoned, self._executions = self._executions, []
            for execution in abandoned:
                execution.abandon()

    def add(self, execution: Execution) -> bool:
        """Take an execution that began; ``False`` where all of them are abandoned by now, and this one with them."""
        with self._guard:
            if not self.is_over.is_set():
                self._executions.append(execution)
                return True
        execution.abandon()
        return False

    def _perform(self, row: StoredCall) -> None:
        try:
            with suppress(Interrupted), self._of_run, self._loop.limits.of_worker:
                if not self.is_over.is_set():
                    self._execute(row)
        finally:
            with self._guard:
                self._left -= 1
                if not self._left:
                    self._executions.clear()
                    self.is_over.set()

    def _execute(self, row: StoredCall) -> None:
        try:
            with self._loop.trace.current():
                self._loop.perform(row, self)
        except Exception as error:
            self._loop.fail(row, error)


def required(waiting: Sequence[StoredCall]) -> RequiredAction:
    """Give what a run waits for whose calls ``waiting`` are not answered."""
    calls: list[RequiredCall] = [
        {
            "id": row.call_id,
            "type": "function",
            "function": {"name": row.name, "arguments": row.arguments},
            "needs": "approval" if row.needs == "approval" else "output",
        }
        for row in waiting
    ]
    return {"type": "submit_tool_outputs", "submit_tool_outputs": {"tool_calls": calls}}


def _batches(rows: Sequence[StoredCall], tools: Mapping[str, Tool]) -> Iterator[list[StoredCall]]:
    """Give those that are executed at the same time: a ``sequential`` one is alone, behind all before it."""

    def alone(numbered: tuple[int, StoredCall]) -> int:
        at, row = numbered
        tool = tools.get(row.name)
        return at if tool is not None and tool.sequential else -1

    for _, group in groupby(enumerate(rows), key=alone):
        yield [row for _, row in group]


def _object(arguments: str) -> Json | None:
    """Give the object that ``arguments`` are the JSON of, ``None`` where they are none; of nothing, an empty one."""
    if not arguments.strip():
        return {}
    try:
        found = json.loads(arguments)
        # Python's takes more than JSON has.
        events.dumps(found)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _as_stored(items: Sequence[Json], rows: Sequence[StoredCall]) -> list[Json]:
    """Give the items with the calls as they are stored: under their ids here, with arguments that are JSON."""
    found: list[Json] = []
    left = list(rows)
    for item in items:
        if item.get("type") != "function_call":
            found.append(item)
        elif left:
            found.append(_call_item(left.pop(0)))
    return found + [_call_item(row) for row in left]


def _call_item(row: StoredCall) -> Json:
    return {"type": "function_call", "call_id": row.call_id, "name": row.name, "arguments": row.arguments}


def _shown(active: ActiveRun, call_id: str) -> ToolCall:
    with active.lock:
        _, _, steps = active.accumulator.snapshot()
    # Of a run that was ended meanwhile only its steps have the call.
    return next(call for step in steps for call in calls_of(step) if call["id"] == call_id)
