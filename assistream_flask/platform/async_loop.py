"""Coroutines beside greenlets or threads: one asyncio loop a process, in a greenlet or a thread of its own."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, ClassVar, Final, NamedTuple, TypeVar, cast

import gevent
import greenlet
from gevent import monkey
from gevent.selectors import GeventSelector

from . import reliances
from .once import PerProcess
from .threads import spawn

_log = logging.getLogger(__name__)

T = TypeVar("T")

# So long coroutines may take to end once they are cancelled.
_END_SECONDS: Final = 1.0


class AsyncLoop:
    """A loop that is started with the first coroutine, and goes on until it is stopped.

    Under gevent it is a greenlet among the others, not a thread: a lock of gevent's may never wake who waits for it in
    another thread (gevent's issues 1744 and 2013), and the log has such a lock, as has each pool of connections.
    """

    def __init__(self) -> None:
        self._running = PerProcess(_Running)

    def submit(self, coroutine: Coroutine[Any, Any, T], when_done: Callable[[T | None], None]) -> Callable[[], None]:
        """Have the loop run ``coroutine``, and call ``when_done``, which must not wait, with what it gave, ``None``
        where it was cancelled. Give what cancels it."""
        loop, tasks = self._running.get().loop, list[asyncio.Task[T]]()

        def begin() -> None:
            tasks.append(loop.create_task(coroutine))
            tasks[0].add_done_callback(end)

        def end(task: asyncio.Task[T]) -> None:
            when_done(None if task.cancelled() or task.exception() is not None else task.result())

        def cancel() -> None:
            # Where the loop has ended, all that it ran has.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(lambda: tasks[0].cancel())

        loop.call_soon_threadsafe(begin)
        return cancel

    def stop(self) -> None:
        """Cancel what still runs, and end the loop. The next coroutine would have another one."""
        if (running := self._running.pop()) is not None:
            running.stop()


async def beside(name: str, work: Callable[[], T]) -> T:
    """Give what ``work`` gives, which may wait, in a thread or greenlet of its own, within the caller's context. Who is
    cancelled leaves it at work. Other than for asyncio's own threads, the process does not wait for it at its end."""
    loop, context = asyncio.get_running_loop(), contextvars.copy_context()
    given: asyncio.Future[T] = loop.create_future()

    def settle(found: T | None, error: BaseException | None) -> None:
        if given.done():
            return
        if error is not None:
            given.set_exception(error)
        else:
            given.set_result(cast(T, found))

    def run() -> None:
        found: T | None = None
        raised: BaseException | None = None
        try:
            found = context.run(work)
        except BaseException as error:
            # A future takes no StopIteration, and SystemExit would end the loop.
            is_usual = isinstance(error, Exception) and not isinstance(error, StopIteration)
            raised = error if is_usual else RuntimeError(repr(error))
        # The loop may have ended.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, found, raised)

    spawn(name, run)
    return await given


class _Running:
    """The loop of one process."""

    def __init__(self) -> None:
        self._apart: AbstractContextManager[object] = nullcontext()
        if monkey.is_module_patched("threading"):
            selector = _Selector()
            self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop(selector)
            self._apart = selector.apart()
        else:
            self.loop = asyncio.new_event_loop()
        self._is_stopped, self._ended = False, threading.Event()
        spawn("assistream-coroutines", self._serve)

    def _serve(self) -> None:
        try:
            with self._apart:
                while not self._is_stopped:
                    self._run()
                self.loop.run_until_complete(self._cancel_all())
                self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()
            self._ended.set()

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            # Of a task: it breaks off the loop, and all others with it.
            _log.exception("a task broke off the loop of coroutines; it goes on")

    async def _cancel_all(self) -> None:
        until = self.loop.time() + _END_SECONDS
        while (tasks := asyncio.all_tasks() - {asyncio.current_task()}) and (left := until - self.loop.time()) > 0:
            # Others wait for a turn: a task that is cancelled before it began never awaits the coroutine that it was to
            # run, if that is within another, as anyio's are, and Python warns of each.
            begun = {task for task in tasks if _has_begun(task)}
            for task in begun:
                task.cancel()
            await asyncio.wait(begun or tasks, timeout=left if begun else 0)

    def stop(self) -> None:
        """Have it end, and wait for that, but not for long."""
        self._is_stopped = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        if not self._ended.wait(2 * _END_SECONDS):
            _log.warning("a coroutine computes or blocks, and the loop of coroutines does not end for it")


def _has_begun(task: asyncio.Task[Any]) -> bool:
    coroutine = task.get_coro()
    return not inspect.iscoroutine(coroutine) or inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED


class _Selector(GeventSelector):
    """Waits for a loop that is a greenlet. What asyncio keeps in a thread of the loop that runs there is put aside
    meanwhile: ``asyncio.run`` elsewhere, and Flask's async views, would be refused, and the generators of another loop
    would be taken for this one's.

    Other greenlets also go on in the midst of a callback: where it starts a thread, as asyncio does for names and
    ``to_thread``, or takes a lock that is held. So switches are looked at as long as callbacks are called. Of two loops
    each would else come back to find the other one running, or none.
    """

    def __init__(self) -> None:
        super().__init__()
        # What others had there, such as a loop in another greenlet that waits.
        self._theirs = self._ours = _Kept()
        # A switch that was not seen, as another looked at switches meanwhile, is made up for at the next wait.
        self._is_away = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Have the loop run within it."""
        self._theirs = _Kept.take()
        _Switches.watch(self)
        try:
            yield
        finally:
            _Switches.forget()
            self._theirs.put_back()

    def select(self, timeout: float | None = None) -> Any:
        """Wait for what is registered, or so many seconds. Others go on also where there is nothing to wait for."""
        _Switches.forget()
        self.leave()
        # Of a task whose coming back was not seen there is one, which is over.
        self._ours = self._ours._replace(task=None)
        try:
            if timeout is not None and timeout <= 0:
                gevent.sleep(0)
            return super().select(timeout)
        finally:
            self.come_back()
            _Switches.watch(self)

    def leave(self) -> None:
        """Put this loop aside, and have there what others had. Idempotent."""
        if self._is_away:
            return
        self._is_away = True
        self._ours = _Kept.take()
        self._theirs.put_back()

    def come_back(self) -> None:
        """Do the opposite. Idempotent."""
        if not self._is_away:
            return
        self._is_away = False
        self._theirs = _Kept.take()
        self._ours.put_back()


class _Switches:
    """Watches the greenlets that call callbacks of a loop: who leaves one leaves its loop too."""

    _watched: ClassVar[dict[greenlet.greenlet, _Selector]] = {}
    # What looked at switches before, such as a profiler. It may come and go at any time, even within a callback.
    _before: ClassVar[list[Callable[..., object]]] = []
    _is_looking: ClassVar[bool] = False

    @classmethod
    def watch(cls, selector: _Selector) -> None:
        """Watch the present greenlet."""
        if not hasattr(greenlet, "settrace"):
            missing = reliances.Missing("greenlet", "greenlet.settrace")
            reliances.miss("switches", missing, "coroutines fail where two loops wait in the midst of a callback")
            return
        if greenlet.gettrace() != cls._look:
            before = greenlet.settrace(cls._look)
            cls._before[:] = [before] if before is not None else []
        cls._watched[greenlet.getcurrent()] = selector

    @classmethod
    def forget(cls) -> None:
        """Watch the present greenlet no longer."""
        found = cls._watched.pop(greenlet.getcurrent(), None)
        # What another has put there meanwhile is left.
        if found is not None and not cls._watched and greenlet.gettrace() == cls._look:
            greenlet.settrace(cls._before.pop() if cls._before else None)

    @classmethod
    def _look(cls, event: str, args: Any) -> None:
        # Called where it was switched to. One that came later may call this one, which calls that one.
        if cls._is_looking:
            return
        cls._is_looking = True
        try:
            if event in ("switch", "throw"):
                origin, target = args
                if (left := cls._watched.get(origin)) is not None:
                    left.leave()
                if (found := cls._watched.get(target)) is not None:
                    found.come_back()
            for before in cls._before:
                before(event, args)
        finally:
            cls._is_looking = False


class _Kept(NamedTuple):
    """What asyncio keeps in a thread of the loop that runs there."""

    loop: asyncio.AbstractEventLoop | None = None
    hooks: Any = (None, None)
    task: asyncio.Task[Any] | None = None

    @classmethod
    def take(cls) -> _Kept:
        """Give what there is, and leave nothing."""
        loop = getattr(asyncio, "_get_running_loop", lambda: None)()
        task = None if loop is None else asyncio.current_task(loop)
        taken = cls(loop, sys.get_asyncgen_hooks(), task)
        if loop is not None and task is not None:
            # From Python 3.14 on it is the thread's, and not the loop's.
            asyncio.tasks._leave_task(loop, task)
        _set_running(None)
        sys.set_asyncgen_hooks(None, None)
        return taken

    def put_back(self) -> None:
        """Have that there."""
        _set_running(self.loop)
        sys.set_asyncgen_hooks(*self.hooks)
        if self.loop is not None and self.task is not None:
            asyncio.tasks._enter_task(self.loop, self.task)


def _set_running(loop: asyncio.AbstractEventLoop | None) -> None:
    if hasattr(asyncio, "_set_running_loop"):
        asyncio._set_running_loop(loop)
    else:
        missing = reliances.Missing("asyncio", "asyncio._set_running_loop")
        reliances.miss("coroutines", missing, "asyncio.run fails in an app whose tools are coroutines")
