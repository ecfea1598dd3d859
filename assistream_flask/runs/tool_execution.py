"""Executes one call of a server tool: in a greenlet, a thread or a coroutine, within the app's context, in its time."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Final, Literal, NamedTuple, TypeVar

from gevent import monkey
from pydantic_core import to_json, to_jsonable_python

from ..events import Json, clean, dumps
from ..platform.async_loop import AsyncLoop
from ..platform.interrupt import Interrupted, Interruptible
from ..platform.log_throttle import LogThrottle
from ..platform.threads import RealThreads, spawn
from ..tools import Tool, ToolArgumentsError, ToolContext, ToolFailedError

_log = logging.getLogger(__name__)

FAILED: Final = "An error occurred while running the tool. Please try again."
BUSY: Final = "Too many tools of this worker are still computing. Try again later."
INTERRUPTED: Final = "The tool was interrupted."
MOST_OUTPUT: Final = 100_000
"""So many characters of an output a model is given: more would cost much, and not fit beside the rest."""
# Beside those that were abandoned so many compute at once; more wait, in their time.
_AT_WORK: Final = 8

T = TypeVar("T")
Within = Callable[[], AbstractContextManager[object]]


class Outcome(NamedTuple):
    """What became of a call: the ``output`` is for the model, ``error`` says in a few words why it is none of the
    tool's own."""

    status: Literal["completed", "failed"]
    output: str
    error: str | None = None


class ToolExecutions:
    """Executes the tools of one worker. ``most_abandoned`` threads may go on with what nobody waits for any more; while
    as many do, no tool that needs a thread is begun."""

    def __init__(self, throttle: LogThrottle, most_abandoned: int = 8) -> None:
        self._throttle, self._most = throttle, most_abandoned
        self.loop, self._threads = AsyncLoop(), RealThreads(most_abandoned + _AT_WORK)
        # Threads come and go by one step each, so no lock is needed.
        self._abandoned: set[Execution] = set()

    @property
    def abandoned(self) -> int:
        """Give how many threads go on with what nobody waits for: nothing can end them."""
        return len(self._abandoned)

    def start(
        self,
        tool: Tool,
        arguments: Json,
        context: ToolContext,
        within: Within,
        most_seconds: float | None = None,
    ) -> Execution:
        """Begin to execute a call of a server tool: with ``arguments`` as they came, or as :meth:`Tool.checked` gave
        them, and within what ``within`` gives, such as the app's context. It may take the tool's ``timeout``, or
        ``most_seconds`` where those are fewer."""
        seconds = tool.timeout if most_seconds is None else min(tool.timeout, most_seconds)
        call = _Call(tool, arguments, context, within, self._throttle)
        execution = Execution(call, seconds, self._abandoned)
        if execution.needs_thread and len(self._abandoned) >= self._most:
            self._throttle.warn(_log, "tool %s is refused: %d threads compute for nobody", tool.name, self._most)
            execution.settle(Outcome("failed", BUSY, "busy"))
        else:
            execution.start(self.loop, self._threads)
        return execution

    def close(self) -> None:
        """End what still runs and can be ended. Called when no tool is executed any more."""
        self.loop.stop()


class Execution:
    """One call that is under way. It is over once it has an outcome, of which there is one: what comes later is
    dropped."""

    def __init__(self, call: _Call, seconds: float, abandoned: set[Execution]) -> None:
        self._call, self._seconds = call, seconds
        self._until = time.monotonic() + seconds
        self._abandoned = abandoned
        self._is_async = inspect.iscoroutinefunction(call.tool.function)
        is_greenlet = monkey.is_module_patched("threading") and not call.tool.thread
        self.needs_thread = not self._is_async and not is_greenlet
        self._cancel: Callable[[], None] | None = None
        self._waits = Interruptible(lambda: None)
        self._found: dict[str, Outcome] = {}
        self._over = threading.Event()
        self._has_begun = self._has_left = False

    def start(self, loop: AsyncLoop, threads: RealThreads) -> None:
        """Begin."""
        if self._is_async:
            self._cancel = loop.submit(self._call.run_async(), partial(self._spawn, self._finish))
        elif self.needs_thread:
            self._spawn(self._wait_for, partial(threads.call, self._compute))
        else:
            self._spawn(self._wait_for, self._call.run)

    def _spawn(self, work: Callable[[T], None], given: T) -> None:
        spawn(f"assistream-tool_{self._call.tool.name}", work, given)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is over, at most so many seconds, and tell whether it is. It is whoever waits that finds it
        late."""
        left = self._until - time.monotonic()
        self._over.wait(max(0.0, left if timeout is None else min(timeout, left)))
        if time.monotonic() >= self._until and not self._over.is_set():
            self._give_up(Outcome("failed", f"Timed out after {self._seconds:g} seconds.", "timed out"))
        return self._over.is_set()

    @property
    def outcome(self) -> Outcome:
        """Give what became of it. Asked once it is over."""
        return self._found["outcome"]

    def abandon(self) -> None:
        """Have it be over, and end as soon as it can. Idempotent."""
        self._give_up(Outcome("failed", INTERRUPTED, "interrupted"))

    def settle(self, outcome: Outcome) -> bool:
        """Let it be over with ``outcome``; ``False`` where it was over already."""
        # One step, so that of a thread that is done and of who gives it up one is first.
        is_first = self._found.setdefault("outcome", outcome) is outcome
        self._over.set()
        return is_first

    def _give_up(self, outcome: Outcome) -> None:
        if not self.settle(outcome):
            return
        if self._cancel is not None:
            self._cancel()
            return
        # The thread looks the other way round: it is never counted for good, whichever is first.
        if self.needs_thread and self._has_begun:
            self._abandoned.add(self)
            if self._has_left:
                self._abandoned.discard(self)
        self._waits.interrupt()

    def _wait_for(self, work: Callable[[], Result | None]) -> None:
        with suppress(Interrupted):
            self._finish(self._waits.wait(work))

    def _finish(self, result: Result | None) -> None:
        """Let it be over with ``result``; ``None`` where it was cancelled, or never begun. The log is told here, as
        one of gevent's locks may never wake who waits for it in a thread that is not gevent's."""
        if result is None:
            self.abandon()
            return
        try:
            if result.error is not None:
                self._call.throttle.error(_log, result.error, *result.complaint)
        finally:
            self.settle(result.outcome)

    def _compute(self) -> Result | None:
        self._has_begun = True
        try:
            # Its time may have been over before there was a thread for it.
            return None if self._over.is_set() else self._call.run()
        finally:
            self._has_left = True
            self._abandoned.discard(self)


class Result(NamedTuple):
    """An outcome, and what the log is to be told of it."""

    outcome: Outcome
    error: BaseException | None = None
    complaint: tuple[str, ...] = ()


class _Call(NamedTuple):
    """A function with what it is called with. What it raises is an outcome, whatever it is: ``SystemExit`` would end
    the worker, or the loop of all coroutines."""

    tool: Tool
    arguments: Json
    context: ToolContext
    within: Within
    throttle: LogThrottle

    def run(self) -> Result:
        """Call a plain function."""
        output: str | None = None
        try:
            with self.within():
                output = _text(self.tool(**self.tool.keywords(self.arguments, self.context)))
        except Interrupted:
            raise
        except BaseException as error:
            return self._ended(output, error)
        return Result(Outcome("completed", output))

    async def run_async(self) -> Result:
        """Call an ``async def``."""
        output: str | None = None
        try:
            with self.within():
                output = _text(await self.tool(**self.tool.keywords(self.arguments, self.context)))
        except GeneratorExit:
            raise
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            return self._ended(output, error)
        return Result(Outcome("completed", output))

    def _ended(self, output: str | None, error: BaseException) -> Result:
        name = self.tool.name
        if output is not None:
            # It did what it is for, and would do so once more if the model heard of an error.
            said = "after tool %s what it was executed in could not be left"
            return Result(Outcome("completed", output), error, (said, name))
        if isinstance(error, ToolFailedError):
            said = "tool %s failed at its server"
            return Result(Outcome("failed", _text(error.said), error.why), error.__cause__, (said, name))
        if not isinstance(error, ToolArgumentsError):
            return Result(Outcome("failed", FAILED, "failed"), error, ("tool %s failed", name))
        said = "the arguments of tool %s could not be checked"
        return Result(Outcome("failed", _text(str(error)), "bad arguments"), error.__cause__, (said, name))


def _text(given: object) -> str:
    """Give an output as the model is told it, and as every database stores it. Raises what pydantic raises where it
    cannot make JSON of it."""
    if isinstance(given, str):
        # That of an enum has a text of its own.
        text = clean(str.__str__(given)).replace("\0", "\ufffd")
    else:
        try:
            text = to_json(given, inf_nan_mode="strings").decode()
        except ValueError:
            # It takes a lone surrogate where the other does not.
            text = dumps(to_jsonable_python(given))
    if len(text) <= MOST_OUTPUT:
        return text
    return f"{text[:MOST_OUTPUT]}\n[Cut: these are {MOST_OUTPUT:,} of {len(text):,} characters.]"
