"""A response that can be asked for by its id; one in the background goes on whoever listens."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator

from ._answers import BREAK, Cut, Responses
from ._replies import dump

_GOING_ON = ("queued", "in_progress")


class Stored:
    """One response: what it holds as of now, and the frames of its stream with their sequence numbers."""

    def __init__(self, answer: Responses) -> None:
        self.answer, self.id = answer, str(answer.response["id"])
        self.key = answer.request.headers.get("idempotency-key", "") if answer.background else ""
        self.streamed = bool(answer.body.get("stream"))
        self.made_at = time.monotonic()
        self.over_at = None if answer.background else self.made_at
        self._frames: list[tuple[int, bytes]] = []
        self._break_at: int | None = None
        self._changed = threading.Condition()  # its lock guards the response too
        self._stopped = False

    @property
    def status(self) -> str:
        return str(self.answer.response["status"])

    @property
    def going_on(self) -> bool:
        return self.status in _GOING_ON

    def body(self) -> bytes:
        with self._changed:
            return dump(self.answer.response)

    def generate(self) -> None:
        """Answer, to the end or until it is cancelled or stopped."""
        steps = self.answer.encoded()
        while True:
            with self._changed:
                step = None if self._stopped else next(steps, None)
                if step == BREAK:
                    self._break_at = len(self._frames)
                elif isinstance(step, bytes):
                    self._frames.append((self.answer.number, step))
                elif isinstance(step, float):
                    self._changed.wait_for(lambda: self._stopped, None if math.isinf(step) else step)
                self._changed.notify_all()
            if step is None:
                return

    def end(self) -> None:
        with self._changed:
            if self.going_on:
                error = {"code": "server_error", "message": self.answer.message()}
                self.answer.response.update(status="failed", error=error)
            self.over_at = time.monotonic()
            self._changed.notify_all()

    def cancel(self) -> None:
        """Cancel it. OpenAI has no event for that: the streams just end."""
        with self._changed:
            if self.going_on:
                for item in self.answer.response["output"]:
                    if item.get("status") == "in_progress":
                        item["status"] = "incomplete"
                self.answer.response["status"] = "cancelled"
            self.stop()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def follow(self, after: int, fault: str | None) -> Iterator[float | bytes]:
        """Give the frames behind number `after`, then those to come; a float asks to look for the client."""
        at = 0
        while True:
            with self._changed:
                if len(self._frames) == at and self.over_at is None:
                    self._changed.wait(0.05)
                cut = self._break_at if fault else None
                frames, over = self._frames[at:cut], self.over_at is not None
            for number, frame in frames:
                at += 1
                if number > after:
                    yield frame
            if fault and at == cut:
                yield from self._broken(fault)
                if fault != "malformed":
                    return
                fault = None
            elif not frames:
                if over:
                    return
                yield 0.001

    def _broken(self, fault: str) -> Iterator[float | bytes]:
        if fault == "cut":
            raise Cut
        if fault == "stall":
            yield math.inf
        if fault == "malformed":
            yield self.answer.broken
