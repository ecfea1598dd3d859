"""Performs a run: asks the model server, round after round, and ends the run once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import openai
from sqlalchemy.exc import SQLAlchemyError

from ..errors import MESSAGE_TOO_LONG, RunError
from ..events import Event, Json, text_of
from ..platform.interrupt import Interrupted
from ..store.sql import State
from ..tools import ToolContext
from ..upstream import answer_stream
from ..upstream.deltas import Begun, Delta, End
from ..upstream.items import Turn, message_item
from .active_run import ActiveRun
from .checkpointer import Checkpointer
from .delta_publisher import DeltaPublisher
from .loop_state import LoopState
from .mcp_tools import McpTools
from .message_accumulator import LACKING, Ending
from .run_changes import RunChanges
from .run_slots import RunSlots, Ticket
from .thread_history import RunRequest
from .tool_execution import ToolExecutions
from .tool_loop import ToolLimits, ToolLoop
from .tracing import ChatSpan
from .worker import Worker

_log = logging.getLogger(__name__)

_BROKEN: Final = ("upstream_cut", "upstream_ended_early", "upstream_stalled", "upstream_unreachable", "upstream_error")
"""How the connection to a response can fail that goes on in the background."""
_TRIES: Final = 6
# So long a wait for a slot goes on by itself where nothing can throw into it.
_SLOT_SECONDS: Final = 1.0
_EQUIP_SECONDS: Final = 10.0
_UNWANTED: Final = ("cancelled", "failed", "incomplete")


class Executor:
    """Performs the runs of one worker, each in a thread of its own that waits for the model server, the store and the
    log. ``viewers`` gives how many event streams the worker has open."""

    def __init__(
        self,
        worker: Worker,
        changes: RunChanges,
        checkpointer: Checkpointer,
        executions: ToolExecutions,
        viewers: Callable[[], int],
    ) -> None:
        self._worker, self._changes, self._checkpointer = worker, changes, checkpointer
        self._executions = executions
        self._mcp = McpTools(executions.loop, worker.throttle)
        self._limits = ToolLimits(worker.settings.run_tools, worker.settings.worker_tools)
        pace = worker.settings.pace_seconds
        self._slots = RunSlots(worker.settings.worker_runs)
        self._publisher = DeltaPublisher(worker.appender, pace, viewers, _only_grows, worker.throttle)

    def close(self) -> None:
        """Have no more ticks."""
        self._publisher.close()

    def perform(self, active: ActiveRun) -> None:
        """Do the run from its beginning to its end, or to where another worker has it."""
        ticket = self._slots.ask(active.owner)
        try:
            self._wait_for_slot(active, ticket)
            self._begin(active)
            before = active.loop.trace if active.loop is not None else ""
            active.trace.begin(active.thread_id, active.id, _request(active).assistant, before)
            with active.trace.current():
                self._rounds(active)
        except Interrupted:
            self.end(active, active.ending)
        except RunError as error:
            # Who raised it often has it yet: with its traceback each would keep the other, and all that the run has.
            self.end(active, error.with_traceback(None))
        except Exception as error:
            self._worker.throttle.error(_log, error, "run %s failed", active.id)
            # The next one of the kind has no traceback.
            self.end(active, RunError("server_error", said=repr(error)))
        finally:
            _end_trace(active)
            active.close()
            self._slots.give_back(active.owner, ticket)
            if active.resume_state is not None and not active.is_left and active.run["status"] in _UNWANTED:
                # It goes on in the background otherwise, and is paid.
                self._cancel_upstream(active, active.resume_state)

    def _cancel_upstream(self, active: ActiveRun, state: Json) -> None:
        try:
            with active.trace.current():
                answer_stream.cancel(_request(active).client(), state)
        except Exception as error:
            self._worker.throttle.error(_log, error, "the background response of run %s may go on", active.id)

    def _wait_for_slot(self, active: ActiveRun, ticket: Ticket) -> None:
        """Wait, queued, until fewer runs ask their model servers than the worker may have. Raises
        :class:`Interrupted`."""
        while not active.waits.wait(partial(ticket.has_slot.wait, _SLOT_SECONDS)):
            if self._worker.stopping.is_set():
                self._changes.leave(active)
                raise Interrupted

    def _begin(self, active: ActiveRun) -> None:
        """Tell that the run is in progress. Raises :class:`Interrupted` where it is not this worker's to do."""
        # Not where another worker began it.
        is_new = active.run["started_at"] is None
        if active.wait_done():
            raise Interrupted
        if active.resume_state is None:
            self._changes.patiently(active, lambda: self._begin_now(active))
        if is_new:
            self._worker.notifier.notify("run_started", active.owner, run=active.run)
        active.limit(self._worker.settings.run_seconds)

    def _begin_now(self, active: ActiveRun) -> None:
        if self._worker.stopping.is_set():
            # Left to the next worker: nothing was asked for it here.
            self._changes.leave(active)
            raise Interrupted
        self._changes.change(active, active.begin)

    # Rounds: a request to the model server, its answer, and the tools that it calls.

    def _rounds(self, active: ActiveRun) -> None:
        self._equip(active)
        loop = ToolLoop(self._worker, self._changes, self._publisher, self._executions, self._limits, active)
        loop.restore()
        before: list[Turn] | None = None
        while not loop.is_open or loop.execute():
            self._drain(active)
            if before is None and active.resume_state is None:
                before = self._changes.patiently(active, lambda: self._turns(active))
            may_call = loop.may_call
            end = self._round(active, before or [], loop)
            if may_call and end.calls and end.reason is None:
                loop.begin(end)
                continue
            if end.calls and not active.has_told_of_round():
                raise RunError("too_many_tool_calls")
            self.end(active, end)
            self._drain(active)
            return
        # It waits for an answer, and its queue goes on.
        self.forget(active)

    def _equip(self, active: ActiveRun) -> None:
        """Have the run's assistant have the tools of its MCP servers. Raises :class:`Interrupted`."""
        request = _request(active)
        if not request.assistant.mcp:
            return
        context = ToolContext(active.thread_id, active.id, request.assistant.id, active.owner.name, "")
        equipment = active.waits.wait(partial(self._mcp.ask, request.assistant, context, request.within))
        # A coroutine of the app's that blocks would keep it waiting: it goes on without then, too.
        until = time.monotonic() + _EQUIP_SECONDS
        while not active.waits.wait(partial(equipment.wait, _SLOT_SECONDS)) and time.monotonic() < until:
            if active.is_left or active.is_over:
                raise Interrupted
        active.request = request._replace(assistant=equipment.assistant())
        missing = equipment.missing
        if missing or LACKING in active.run["metadata"]:
            self._changes.once(active, partial(active.accumulator.lack, missing))

    def _drain(self, active: ActiveRun) -> None:
        """Read the connection to its end, so that it can serve the next request."""
        if active.is_reading:
            while (deltas := self._next(active)) is not None:
                self._publisher.add(active, deltas)

    def _turns(self, active: ActiveRun) -> list[Turn]:
        return active.history.turns(self._worker.store, active.message["id"], _request(active))

    def _round(self, active: ActiveRun, earlier: Sequence[Turn], loop: ToolLoop) -> End:
        """Ask, and again where that helps, and tell what is answered; give the answer's end. Raises
        :class:`RunError`."""
        turns = [*earlier, *self._changes.patiently(active, loop.turns)] if active.resume_state is None else []
        with active.trace.chat(_request(active).assistant, turns) as chat:
            try:
                end = self._answer(active, turns, loop, chat)
            except Interrupted:
                if isinstance(active.ending, RunError):
                    chat.fail(active.ending.code)
                raise
            chat.answered(end, active.reader.source(), lambda: _said(active))
            return end

    def _answer(self, active: ActiveRun, turns: Sequence[Turn], loop: ToolLoop, chat: ChatSpan) -> End:
        tries = asked = 0
        while True:
            before = active.resume_state
            try:
                # Another key each time: a server that remembers a refusal would give it again.
                key = f"{active.id}{f'-r{loop.round}' if loop.round else ''}-{asked}"
                # Spans of the app's client, or of its transport, are below it.
                with chat.current():
                    self._ask(active, turns, loop, key, chat)
                return self._read(active)
            except RunError as error:
                # A tick that met it tells first what came before.
                with active.lock:
                    active.catch_up()
                    tries = tries + 1 if active.resume_state == before else 0
                if not self._goes_on(active, turns, error, tries):
                    raise
                error.with_traceback(None)
                asked += 1
                pause = 1.0 if active.is_loading else min(0.25 * 2**tries, 4)
                active.waits.wait(partial(time.sleep, pause))

    def _goes_on(self, active: ActiveRun, turns: Sequence[Turn], error: RunError, tries: int) -> bool:
        """Tell whether the run is to ask again after ``error``. Raises another that says more."""
        if error.code == "context_length_exceeded" and len(turns) == 1:
            raise RunError(error.code, said=error.said, message=MESSAGE_TOO_LONG) from error
        if active.is_over:
            return False
        if error.code == "model_loading" and not active.has_told_of_round():
            # Until the run's time is over.
            if not active.is_loading:
                # Without what was raised: its traceback has the whole history.
                said = RunError(error.code, said=error.said)
                changes = self._changes
                changes.patiently(active, lambda: changes.change(active, lambda: active.wait_for_model(said)))
            return True
        if error.code == "server_busy" and not active.has_told_of_round():
            # Nothing was asked: until there is a connection, or the run's time is over.
            return True
        if active.resume_state is None or error.code not in _BROKEN or tries > _TRIES:
            return False
        _log.warning("run %s goes on in the background (%s): it is asked for again", active.id, error.code)
        return True

    def _ask(self, active: ActiveRun, turns: Sequence[Turn], loop: ToolLoop, key: str, chat: ChatSpan) -> None:
        """Have the answer's beginning arrive, or what is missing of one that goes on in the background."""
        request = _request(active)
        assistant, client, names = request.assistant, request.client, request.names
        own = list(dict.fromkeys((names.get(assistant.id, assistant.id), assistant.id)))
        stall, most = self._worker.settings.stall_seconds, self._worker.settings.max_answer_chars

        def ask() -> answer_stream.AnswerStream:
            try:
                ours = client()
            except openai.OpenAIError as error:
                raise RunError("upstream_unauthorized", said=f"no client could be made: {error}") from error
            chat.reach(getattr(ours, "base_url", ""))
            if active.resume_state is not None:
                return answer_stream.resume(
                    ours, assistant, active.resume_state, stall, names=own, shown=active.shown(), most=most
                )
            return answer_stream.open(
                ours,
                assistant,
                turns,
                stall,
                own,
                key,
                most,
                start=active.accumulator.content_count,
                may_call=loop.may_call,
                followup=loop.followup(),
            )

        active.close()
        active.read(active.waits.wait(ask))
        if active.is_loading:
            self._changes.patiently(active, lambda: self._changes.change(active, active.begin))

    def _read(self, active: ActiveRun) -> End:
        """Tell what arrives until the answer's end; give that. Raises :class:`RunError`."""
        while (deltas := self._next(active)) is not None:
            self._publisher.add(active, deltas)
            if active.checkpoint.is_of_another_log or isinstance(deltas[0], Begun):
                # A crash would lose the response that it is of.
                self._checkpointer.store(active)
            if isinstance(deltas[-1], End):
                return deltas[-1]
            # Here too: a flood of deltas leaves the housekeeper little time to look.
            if (late := active.overdue()) is not None:
                raise late
        raise RunError("upstream_ended_early")

    def _next(self, active: ActiveRun) -> Sequence[Delta] | None:
        return active.waits.wait(lambda: self._publisher.next(active))

    # Its end

    def interrupt(self, active: ActiveRun, ending: Ending, wait: float = 0.5) -> None:
        """Have the run end so: by its own thread, for which ``wait`` seconds are waited, or here."""
        active.interrupt(ending)
        # One that is queued may be starting at this moment.
        if not active.is_queued and active.wait_done(wait):
            return
        # Not started, or a thread that nothing can stop: it finds the run over when it comes back.
        self.end(active, ending)

    def end(self, active: ActiveRun, ending: Ending) -> None:
        """End the run once: the store has its final state before viewers hear of it."""
        with active.lock:
            if active.is_over:
                return
            told = active.end(ending)
            final, items = active.state(), _last_items(active, ending)
        if told is None:
            self.forget(active)
            return
        if final[0]["status"] == "failed":
            _complain(active, ending)
        while True:
            try:
                with self._worker.appender.locked(active.thread_id):
                    self._end_now(active, final, told, items)
                break
            except SQLAlchemyError as error:
                self._worker.throttle.error(_log, error, "the end of run %s cannot be stored yet", active.id)
                if self._worker.stopping.wait(1):
                    break
            except Exception as error:
                # Whatever it is, the thread's queue must go on.
                self._worker.throttle.error(_log, error, "the end of run %s cannot be told", active.id)
                break
        self.forget(active)

    def _end_now(self, active: ActiveRun, final: State, told: Sequence[Event], items: Sequence[Json]) -> None:
        store, appender = self._worker.store, self._worker.appender
        if items:
            loop = active.loop or LoopState()
            last = loop._replace(round=loop.round + 1).stored()
            is_ours = self._worker.tool_calls.begin_round(self._worker.name, final, last, items, [])
        else:
            is_ours = store.save(self._worker.name, *final)
        if is_ours:
            run, message, *_ = final
            self._worker.notifier.notify("run_ended", active.owner, run=run, message=message)
            appender.append(active.thread_id, told, active.claim)
            return
        # Another worker has it, if it is still there.
        is_there = store.run(active.thread_id, active.id) is not None
        appender.mark_incomplete(active.thread_id, keep=is_there)
        if is_there:
            self._changes.leave(active)

    def forget(self, active: ActiveRun) -> None:
        """Have it be no run of this worker any more, and let those go on who wait for that."""
        self._worker.runs.discard(active)
        self._publisher.forget(active)
        # Before anybody goes on who waits for it: the process may end then.
        _end_trace(active)
        active.set_done()


def _request(active: ActiveRun) -> RunRequest:
    assert active.request is not None
    return active.request


def _end_trace(active: ActiveRun) -> None:
    error = active.run["last_error"]
    active.trace.end(active.run["status"], error["code"] if error is not None else None)


def _said(active: ActiveRun) -> str:
    """Give the text of the answer that is over, where the next one has not begun."""
    shown = active.shown()
    return text_of(shown.message["content"][shown.start :])


def _last_items(active: ActiveRun, ending: Ending) -> Sequence[Json]:
    """Give what the last answer of a run is resent as, where there is more to the run than its message's text. The
    run's lock is held."""
    if isinstance(ending, End) and ending.items and not ending.calls:
        return ending.items
    if active.loop is None:
        return []
    said = text_of(active.message["content"][active.loop.content :])
    return [message_item("assistant", said)] if said else []


def _complain(active: ActiveRun, ending: Ending) -> None:
    error = active.run["last_error"]
    said = ending.said if isinstance(ending, RunError) else ""
    if error is not None:
        _log.warning("run %s of %r failed: %s: %s", active.id, active.run["assistant_id"], error["code"], said or "-")


def _only_grows(active: ActiveRun, deltas: Sequence[Delta]) -> bool:
    """Tell whether what arrived only has to be told: it is no beginning, no end, and needs no checkpoint at once."""
    is_special = isinstance(deltas[0], Begun) or isinstance(deltas[-1], End)
    return not (is_special or active.checkpoint.is_of_another_log)
