"""The tool calls of a run as its viewers have them: one step for those of an answer, which is a round."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, Final, Literal

from .. import events
from ..events import Event
from ..types import Run, Step, ToolCall, ToolCallDelta, ToolCallStatus
from ..upstream.deltas import Call, WholeCall
from .values import CALL_ID

OVER: Final = frozenset({"completed", "failed", "denied", "interrupted"})
"""The statuses in which a call has all that it will have."""


class StepCalls:
    """Holds the calls of a run's present round within its ``steps``. ``page_tools`` are the names of those that pages
    execute.

    Objects that were given out stay as they were: what changes is a copy.
    """

    def __init__(self, steps: list[Step], page_tools: Container[str]) -> None:
        self._steps, self._page_tools = steps, page_tools
        found = [at for at, step in enumerate(steps) if step["type"] == "tool_calls"]
        # The open step's place, and what its calls' arguments grew by.
        self._at = next((at for at in found if steps[at]["status"] == "in_progress"), None)
        self._grown: list[list[str]] = []
        self._calls: list[ToolCall] = []
        self._known = {call["id"] for at in found for call in calls_of(steps[at])}
        if self._at is not None:
            self._calls = [{**call, "function": call["function"].copy()} for call in calls_of(steps[self._at])]
            self._grown = [[] for _ in self._calls]

    def functions(self) -> list[ToolCall]:
        """Give the calls of the round that the model server does not execute itself."""
        self.settle()
        return [call for call in self._calls if call["kind"] != "hosted"]

    @property
    def is_open(self) -> bool:
        """Tell whether there are calls in the present round."""
        return self._at is not None

    @property
    def step_id(self) -> str:
        """Give the id of their step, ``""`` where there are none."""
        return "" if self._at is None else self._steps[self._at]["id"]

    # What comes in

    def add(self, run: Run, content_index: int, part: Call) -> list[Event]:
        """Add what came of a call, behind so many parts of the message; give the events that tell of it."""
        found = self._begin(run, content_index)
        while part.at > len(self._calls):
            found += self._new("", "", "function")
        if part.at == len(self._calls):
            found += self._new(part.call_id, part.name, part.kind, part.value)
            return found
        delta: ToolCallDelta = {"index": part.at}
        call = self._calls[part.at]
        if part.name and part.name != call["function"]["name"]:
            delta["function"] = {"name": part.name}
            delta["kind"] = self._kind(part.name, part.kind)
        if part.value:
            delta["function"] = {**delta.get("function", {}), "arguments": part.value}
        return [*found, self._told(delta)] if len(delta) > 1 else found

    def _begin(self, run: Run, content_index: int) -> list[Event]:
        if self._at is not None:
            return []
        step = events.tool_calls_step(run, content_index)
        self._at, self._calls, self._grown = len(self._steps), [], []
        self._steps.append(step)
        return [events.step_created(step)]

    def _new(self, call_id: str, name: str, kind: str, arguments: str = "") -> list[Event]:
        # Servers count them anew with each answer, or give none.
        id = call_id if CALL_ID.fullmatch(call_id) and call_id not in self._known else events.new_id("call")
        self._known.add(id)
        new = events.tool_call(id, name, self._kind(name, kind), kind)
        self._calls.append(new)
        self._grown.append([arguments])
        # All of it: who adds up deltas has the same call as a snapshot.
        whole: Any = {**new, "index": len(self._calls) - 1, "function": {**new["function"], "arguments": arguments}}
        return [events.tool_call_delta(self._step(), whole)]

    def _kind(self, name: str, kind: str) -> Literal["server", "page", "hosted"]:
        if kind != "function":
            return "hosted"
        return "page" if name in self._page_tools else "server"

    def complete(self, run: Run, content_index: int, whole: Sequence[WholeCall]) -> list[Event]:
        """Take what the functions' calls are now that the answer is over; give the events that tell of it."""
        found: list[Event] = []
        for call in whole[len(self.functions()) :]:
            found += self._begin(run, content_index) + self._new(call.call_id, call.name, "function", call.arguments)
        is_other = False
        for mine, one in zip(self.functions(), whole, strict=False):
            function = mine["function"]
            if (function["name"], function["arguments"]) != (one.name, one.arguments):
                function.update({"name": one.name, "arguments": one.arguments})
                mine["kind"] = self._kind(one.name, "function")
                is_other = True
        self.settle()
        # What was told cannot be taken back by a delta.
        return [*found, events.step_created(self._step())] if is_other else found

    # What becomes of them

    def change(
        self,
        call_id: str,
        status: ToolCallStatus,
        output: str | None = None,
        error: str | None = None,
        arguments: str | None = None,
    ) -> list[Event]:
        """Set where a call of the round stands; give the events that tell of it, none where nothing is new."""
        at = next((at for at, call in enumerate(self._calls) if call["id"] == call_id), None)
        if at is None:
            return []
        call = self._calls[at]
        if arguments is not None and arguments != call["function"]["arguments"]:
            self.settle()
            call["function"]["arguments"] = arguments
            self.settle()
            return [events.step_created(self._step()), *self.change(call_id, status, output, error)]
        delta: ToolCallDelta = {"index": at}
        if call["status"] != status:
            delta["status"] = status
            if status in OVER:
                delta["completed_at"] = events.now()
        if output is not None and call["function"]["output"] != output:
            delta["function"] = {"output": output}
        if error is not None and call["error"] != error:
            delta["error"] = error
        return [self._told(delta)] if len(delta) > 1 else []

    def start(self, call_id: str) -> list[Event]:
        """Take note that a call is executed from now on."""
        at = next((at for at, call in enumerate(self._calls) if call["id"] == call_id), None)
        return [] if at is None else [self._told({"index": at, "started_at": events.now()})]

    def _told(self, delta: ToolCallDelta) -> Event:
        at = delta["index"]
        if arguments := delta.get("function", {}).get("arguments"):
            self._grown[at].append(arguments)
            rest: ToolCallDelta = {**delta, "function": {**delta["function"], "arguments": ""}}
            events.grow_call(self._calls, rest)
        else:
            events.grow_call(self._calls, delta)
        return events.tool_call_delta(self._step(), delta)

    def end(self) -> list[Event]:
        """End the round, whose calls are all over; give the events that tell of it."""
        return self._end("completed")

    def interrupt(self, status: Literal["failed", "cancelled"]) -> list[Event]:
        """End the round, whatever its calls are; give the events that tell of it."""
        if self._at is None:
            return []
        found: list[Event] = []
        for call in list(self._calls):
            if call["status"] not in OVER:
                found += self.change(call["id"], "interrupted")
        return [*found, *self._end(status)]

    def _end(self, status: Literal["completed", "failed", "cancelled"]) -> list[Event]:
        if self._at is None:
            return []
        self.settle()
        done: Step = {**self._step(), "status": status, "completed_at": events.now()}
        self._steps[self._at], self._at = done, None
        self._calls, self._grown = [], []
        return [events.step_ended(done)]

    def settle(self) -> None:
        """Join what grew, and put the calls as they are now into the step."""
        if self._at is None:
            return
        for call, grown in zip(self._calls, self._grown, strict=True):
            if any(grown):
                call["function"]["arguments"] += "".join(grown)
                grown.clear()
        calls: list[ToolCall] = [{**call, "function": call["function"].copy()} for call in self._calls]
        self._steps[self._at] = {**self._step(), "step_details": {"type": "tool_calls", "tool_calls": calls}}

    def _step(self) -> Step:
        assert self._at is not None
        return self._steps[self._at]


def calls_of(step: Step) -> list[ToolCall]:
    """Give the functions that the step calls."""
    details = step["step_details"]
    return details["tool_calls"] if details["type"] == "tool_calls" else []
