"""A run's message as it grows: deltas in, events out, and the whole so far at any time."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Literal, TypeAlias

from .. import events
from ..errors import STILL_LOADING, RunError
from ..events import Event
from ..types import ContentPart, Message, MessageIncompleteDetails, Run, RunIncompleteDetails, Step, TextContent
from ..upstream.deltas import Annotation, Begun, Delta, End, Failed, Reasoning, Refusal, Text

Reason: TypeAlias = Literal["run_failed", "run_cancelled", "max_tokens", "content_filter", "server_shutdown"]
"""Why a message is not whole."""


class Stop(Enum):
    """Why a run ends that its model server neither finished nor failed."""

    CANCELLED = "cancelled"
    SHUTDOWN = "server_shutdown"


Ending: TypeAlias = End | RunError | Stop
"""How a run ends: with the model's last word, with an error, or stopped; the text so far stays in each case."""


class MessageAccumulator:
    """Holds one run, its message and its steps, and keeps the three in step.

    Not locked: whoever adds to it from several threads brings a lock.
    """

    def __init__(self, run: Run, message: Message, steps: list[Step]) -> None:
        self.run, self.message, self._steps = run, message, steps
        # Text grows as a list: a string that grows by a token is copied whole for each.
        self._content: list[tuple[ContentPart, list[str]]] = [(part, []) for part in message["content"]]
        thinks = steps and steps[-1]["status"] == "in_progress"
        self._step: tuple[Step, list[str]] | None = (steps[-1], []) if thinks else None

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
        return [events.run_status(self.run.copy())]

    def wait(self) -> list[Event]:
        """Say that the model is still loading."""
        self.run["last_error"] = STILL_LOADING.copy()
        return [events.run_status(self.run.copy())]

    def add(self, deltas: Sequence[Delta]) -> list[Event]:
        """Add what arrived; an :class:`.deltas.End` among it is for :meth:`end`."""
        found: list[Event] = []
        for part in deltas:
            if isinstance(part, Reasoning):
                found += self._think(part.value)
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
            step = events.reasoning_step(self.run)
            self._steps.append(step)
            self._step = step, []
            found.append(
                events.step_created({**step, "step_details": {"type": "reasoning", "reasoning": {"text": ""}}})
            )
        self._step[1].append(value)
        return [*found, events.step_delta(self._step[0], value)]

    def _stop_thinking(self) -> list[Event]:
        if self._step is None:
            return []
        self._settle()
        done: Step = {**self._step[0], "status": "completed", "completed_at": events.now()}
        self._steps[-1], self._step = done, None
        return [events.step_completed(done)]

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
            thought = step["step_details"]["reasoning"]["text"] + "".join(grown)
            step = {**step, "step_details": {"type": "reasoning", "reasoning": {"text": thought}}}
            self._steps[-1], self._step = step, (step, [])

    def end(self, ending: Ending) -> list[Event]:
        """End the run and its message; give the events that tell of it."""
        if isinstance(ending, End):
            return self._finish(ending)
        if isinstance(ending, RunError):
            return self._fail(ending)
        return self._cancel() if ending is Stop.CANCELLED else self._cut_off()

    def _finish(self, end: End) -> list[Event]:
        self.run["usage"] = end.usage
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
        """Tell whether there is more in the message than blanks."""
        self._settle()
        return any(part["type"] != "text" or part["text"]["value"].strip() for part in self.message["content"])

    def _fail(self, error: RunError) -> list[Event]:
        self.run.update({"status": "failed", "last_error": error.public(), "failed_at": events.now()})
        return self._close("run_failed")

    def _cancel(self) -> list[Event]:
        self.run.update({"status": "cancelled", "last_error": None, "cancelled_at": events.now()})
        return self._close("run_cancelled")

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
        self._settle()
        at = events.now()
        if reason is None:
            self.message.update({"status": "completed", "completed_at": at})
        else:
            details: MessageIncompleteDetails = {"reason": reason}
            self.message.update({"status": "incomplete", "incomplete_at": at, "incomplete_details": details})
        return [*found, events.message_ended(self.message.copy()), events.run_status(self.run.copy())]
