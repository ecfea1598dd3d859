"""A run's message as it grows: deltas in, events out, and the whole so far at any time."""

from __future__ import annotations

from collections.abc import Container, Sequence
from enum import Enum
from typing import Final, Literal, TypeAlias

from .. import events
from ..errors import STILL_LOADING, RunError
from ..events import Event
from ..types import (
    ContentPart,
    Message,
    MessageIncompleteDetails,
    RequiredAction,
    Run,
    RunIncompleteDetails,
    Step,
    TextContent,
    Usage,
)
from ..upstream.deltas import Annotation, Begun, Call, Delta, End, Failed, Reasoning, Refusal, Text
from .step_calls import StepCalls

Reason: TypeAlias = Literal[
    "run_failed", "run_cancelled", "run_expired", "max_tokens", "content_filter", "server_shutdown"
]
"""Why a message is not whole."""

LACKING: Final = "mcp_unavailable"
"""In a run's metadata: the MCP servers that it has to do without."""


class Stop(Enum):
    """Why a run ends that its model server neither finished nor failed."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    SHUTDOWN = "server_shutdown"


Ending: TypeAlias = End | RunError | Stop
"""How a run ends: with the model's last word, with an error, or stopped; the text so far stays in each case."""


class MessageAccumulator:
    """Holds one run, its message and its steps, and keeps the three in step.

    ``page_tools`` are the names of those that pages execute.

    Not locked: whoever adds to it from several threads brings a lock.
    """

    def __init__(self, run: Run, message: Message, steps: list[Step], page_tools: Container[str] = frozenset()) -> None:
        self.run, self.message, self._steps = run, message, steps
        # Text grows as a list: a string that grows by a token is copied whole for each.
        self._content: list[tuple[ContentPart, list[str]]] = [(part, []) for part in message["content"]]
        thinks = steps and steps[-1]["status"] == "in_progress" and steps[-1]["type"] == "reasoning"
        self._step: tuple[Step, list[str]] | None = (steps[-1], []) if thinks else None
        self._calls = StepCalls(steps, page_tools)

    @property
    def content_count(self) -> int:
        """Give how many parts the message has."""
        return len(self._content)

    @property
    def step_count(self) -> int:
        """Give how many steps there are."""
        return len(self._steps)

    @property
    def calls(self) -> StepCalls:
        """Give the tool calls of the round."""
        return self._calls

    @property
    def is_over(self) -> bool:
        """Tell whether the run is in a terminal state."""
        return self.run["status"] in events.TERMINAL

    def snapshot(self) -> tuple[Run, Message, list[Step]]:
        """Give run, message and steps as they are now, for nobody to change."""
        self._settle()
        return self.run.copy(), self.message.copy(), list(self._steps)

    def begin(self) -> list[Event]:
        """Set the run in progress: the model was asked, or waited for and is so no more."""
        started_at = self.run["started_at"] or events.now()
        self.run.update({"status": "in_progress", "last_error": None, "started_at": started_at})
        self.run.update({"required_action": None, "expires_at": None})
        return [events.run_status(self.run.copy())]

    def wait(self) -> list[Event]:
        """Say that the model is still loading."""
        self.run["last_error"] = STILL_LOADING.copy()
        return [events.run_status(self.run.copy())]

    def lack(self, servers: Sequence[str]) -> list[Event]:
        """Say which MCP servers the run has to do without, in its metadata."""
        metadata = {key: value for key, value in self.run["metadata"].items() if key != LACKING}
        if servers:
            metadata[LACKING] = ", ".join(servers)[:512]
        if metadata == self.run["metadata"]:
            return []
        self.run["metadata"] = metadata
        return [events.run_status(self.run.copy())]

    def add(self, deltas: Sequence[Delta]) -> list[Event]:
        """Add what arrived; an :class:`.deltas.End` among it is for :meth:`end`."""
        found: list[Event] = []
        for part in deltas:
            if isinstance(part, Reasoning):
                found += self._think(part.value)
            elif isinstance(part, Call):
                found += self._stop_thinking()
                found += self._calls.add(self.run, len(self._content), part)
            elif not isinstance(part, End | Begun | Failed):
                if self._step is not None:
                    found += self._stop_thinking()
                while part.at > len(self._content):
                    # A part of which nothing was left but a mark. It is told of too: who adds up deltas counts parts.
                    found.append(self._say(Text(len(self._content), "")))
                found.append(self._say(part))
        return found

    def _say(self, part: Text | Refusal | Annotation) -> Event:
        if part.at == len(self._content):
            refused = isinstance(part, Refusal)
            new: ContentPart = events.refusal_part("") if refused else events.text_part("")
            self._content.append((new, []))
        whole, grown = self._content[part.at]
        if isinstance(part, Annotation):
            # Citations are of texts only.
            assert whole["type"] == "text"
            known = whole["text"]
            text: TextContent = {"value": known["value"], "annotations": [*known["annotations"], part.value]}
            self._content[part.at] = {"type": "text", "text": text}, grown
            return events.annotation_delta(self.message, part.at, part.value)
        grown.append(part.value)
        make = events.text_delta if isinstance(part, Text) else events.refusal_delta
        return make(self.message, part.at, part.value)

    def _think(self, value: str) -> list[Event]:
        found: list[Event] = []
        if self._step is None:
            step = events.reasoning_step(self.run, len(self._content))
            self._steps.append(step)
            self._step = step, []
            found.append(
                events.step_created({**step, "step_details": {"type": "reasoning", "reasoning": {"text": ""}}})
            )
        self._step[1].append(value)
        return [*found, events.reasoning_delta(self._step[0], value)]

    def _stop_thinking(self) -> list[Event]:
        if self._step is None:
            return []
        self._settle()
        done: Step = {**self._step[0], "status": "completed", "completed_at": events.now()}
        self._put(done)
        self._step = None
        return [events.step_ended(done)]

    def _put(self, step: Step) -> None:
        """Have the step take the place of what it was before."""
        at = next(at for at in reversed(range(len(self._steps))) if self._steps[at]["id"] == step["id"])
        self._steps[at] = step

    def _settle(self) -> None:
        """Join what grew. Objects already given out stay as they were."""
        content: list[ContentPart] = []
        for at, (part, grown) in enumerate(self._content):
            if grown:
                added = "".join(grown)
                if part["type"] == "refusal":
                    part = {**part, "refusal": part["refusal"] + added}
                else:
                    text = part["text"]
                    part = {**part, "text": {"value": text["value"] + added, "annotations": text["annotations"]}}
                self._content[at] = part, []
            content.append(part)
        self.message["content"] = content
        if self._step is not None and self._step[1]:
            step, grown = self._step
            before = step["step_details"]
            thought = (before["reasoning"]["text"] if before["type"] == "reasoning" else "") + "".join(grown)
            step = {**step, "step_details": {"type": "reasoning", "reasoning": {"text": thought}}}
            self._put(step)
            self._step = step, []
        self._calls.settle()

    def end(self, ending: Ending) -> list[Event]:
        """End the run and its message; give the events that tell of it."""
        if isinstance(ending, End):
            return self._finish(ending)
        if isinstance(ending, RunError):
            return self._fail(ending)
        if ending is Stop.EXPIRED:
            return self._expire()
        return self._cancel() if ending is Stop.CANCELLED else self._cut_off()

    def count(self, usage: Usage | None) -> None:
        """Add what an answer of the model took."""
        before = self.run["usage"]
        if before is None or usage is None:
            self.run["usage"] = usage or before
            return
        self.run["usage"] = {
            "prompt_tokens": before["prompt_tokens"] + usage["prompt_tokens"],
            "completion_tokens": before["completion_tokens"] + usage["completion_tokens"],
            "total_tokens": before["total_tokens"] + usage["total_tokens"],
        }

    def require(self, action: RequiredAction, expires_at: int) -> list[Event]:
        """Have the run wait for what is required, till then."""
        self.run.update({"status": "requires_action", "required_action": action, "expires_at": expires_at})
        return [events.run_status(self.run.copy())]

    def requeue(self) -> list[Event]:
        """Have the run go on that waited."""
        self.run.update({"status": "queued", "required_action": None, "expires_at": None})
        return [events.run_status(self.run.copy())]

    def _finish(self, end: End) -> list[Event]:
        self.count(end.usage)
        if end.reason is None and not self._says_something():
            return self._fail(RunError("empty_answer"))
        if end.reason is None:
            self.run.update({"status": "completed", "completed_at": events.now()})
            return self._close(None)
        why: RunIncompleteDetails = {"reason": "content_filter"}
        if end.reason == "max_tokens":
            why = {"reason": "max_completion_tokens"}
        self.run.update({"status": "incomplete", "incomplete_details": why, "completed_at": events.now()})
        return self._close(end.reason)

    def _says_something(self) -> bool:
        """Tell whether there is more in the message than blanks, or anything was done beside it."""
        self._settle()
        if any(step["type"] == "tool_calls" for step in self._steps):
            return True
        return any(part["type"] != "text" or part["text"]["value"].strip() for part in self.message["content"])

    def _fail(self, error: RunError) -> list[Event]:
        self.run.update({"status": "failed", "last_error": error.public(), "failed_at": events.now()})
        return self._close("run_failed")

    def _cancel(self) -> list[Event]:
        self.run.update({"status": "cancelled", "last_error": None, "cancelled_at": events.now()})
        return self._close("run_cancelled")

    def _expire(self) -> list[Event]:
        self.run.update({"status": "expired", "last_error": None, "completed_at": events.now()})
        return self._close("run_expired")

    def _cut_off(self) -> list[Event]:
        self.run.update(
            {
                "status": "incomplete",
                "last_error": None,
                "incomplete_details": {"reason": "server_shutdown"},
                "completed_at": events.now(),
            }
        )
        return self._close("server_shutdown")

    def _close(self, reason: Reason | None) -> list[Event]:
        found = self._stop_thinking()
        found += self._calls.interrupt("cancelled" if reason in ("run_cancelled", "run_expired") else "failed")
        self._settle()
        self.run.update({"required_action": None, "expires_at": None})
        at = events.now()
        if reason is None:
            self.message.update({"status": "completed", "completed_at": at})
        else:
            details: MessageIncompleteDetails = {"reason": reason}
            self.message.update({"status": "incomplete", "incomplete_at": at, "incomplete_details": details})
        return [*found, events.message_ended(self.message.copy()), events.run_status(self.run.copy())]
