"""Runs that wait for a page or a person: their calls are answered once, and the last answer has the run go on.

Such a run is no worker's. Whoever answers, cancels it or goes on without an answer does so in one transaction that
holds the thread, so of several one is first, and the others learn what was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Literal, NamedTuple

from .. import events
from ..errors import NotFoundError, RequestError
from ..events import Event, Json
from ..log.protocol import Claim, EventId
from ..store.leases import LEASE_SECONDS
from ..store.sql import LeasedRun, Owner, StoredAnswer
from ..store.thread_change import NOT_EXECUTED, UNANSWERED, StoredCall, ThreadChange
from ..tools import ToolArgumentsError
from ..types import Run, ToolCallStatus
from .message_accumulator import MessageAccumulator, Stop
from .step_calls import OVER
from .thread_history import RunRequest
from .tool_loop import required
from .worker import Worker

_EXPIRED: Final = "Nobody answered in time."
_DENIED: Final = "The user did not allow this."


class ToolAnswer(NamedTuple):
    """What a call is answered with: a page's ``output``, or whether a person approves of it."""

    call_id: str
    needs: Literal["output", "approval"]
    output: str = ""
    approve: bool = True
    reason: str | None = None
    arguments: Json | None = None
    remember: bool = False


class _Parked:
    """A run that waits, its calls, and what becomes of it in a transaction."""

    def __init__(self, change: ThreadChange, held: LeasedRun) -> None:
        self.change, self.held = change, held
        self.rows = {row.call_id: row for row in change.calls(held.run["id"])}
        self.accumulator = MessageAccumulator(held.run, held.message, held.steps)
        self.told: list[Event] = []

    def waiting(self) -> list[StoredCall]:
        """Give the calls that are not answered."""
        return [row for row in self.rows.values() if row.status == "requires_action"]

    def put(self, row: StoredCall) -> None:
        """Store what a call is now."""
        self.rows[row.call_id] = row
        self.change.put(row)
        shown: ToolCallStatus = "in_progress" if row.status == "pending" else row.status  # type: ignore[assignment]
        self.told += self.accumulator.calls.change(row.call_id, shown, row.output, row.error, row.arguments)

    def save(self, worker: str, lease: float) -> LeasedRun:
        """Store what the run is now."""
        self.held = self.change.save(*self.accumulator.snapshot(), worker=worker, lease=lease)
        return self.held


FindAssistant = Callable[[str], RunRequest | None]
"""Finds an assistant by its id, for who answers."""


class ToolAnswers:
    """The answers that one worker takes. ``go_on`` is given a run that this worker holds from then on, the event as of
    which it is exact, what runs it, and the address that the last answer came from."""

    def __init__(
        self, worker: Worker, go_on: Callable[[LeasedRun, EventId | None, RunRequest, str | None], None]
    ) -> None:
        self._worker, self._go_on = worker, go_on

    def answer(
        self,
        owner: Owner,
        thread_id: str,
        run_id: str,
        answers: Sequence[ToolAnswer],
        find: FindAssistant,
        keep: Callable[[Run], StoredAnswer | None],
        address: str | None = None,
    ) -> Run:
        """Answer calls of a run that waits for them, all or none; give the run as it is then. ``keep`` gives what to
        remember for the request's Idempotency-Key; a run that goes on counts for the ``address``.

        Raises :class:`.AnsweredBefore`; :class:`NotFoundError` for a run or a call that there is not; and
        :class:`RequestError` where one does not wait for such an answer (any more), or its arguments are not those of
        its tool.
        """
        worker = self._worker
        known = worker.store.run(thread_id, run_id)
        if known is None:
            raise no_run()
        # The app is asked here: not under the lock.
        request = find(known["assistant_id"])
        self._check(run_id, answers, request)
        with worker.log.lock(thread_id):
            with worker.appender.storing(thread_id), worker.tool_calls.changing(thread_id) as change:
                parked = self._parked(change, thread_id, run_id, answers)
                for one in answers:
                    parked.put(_answered(parked.rows[one.call_id], one))
                waiting = parked.waiting()
                is_left = request is None or worker.stopping.is_set() or worker.resting.is_set()
                if waiting:
                    seconds = max(0.0, (parked.held.run["expires_at"] or 0) - events.now())
                    action = required(waiting)
                    parked.told += parked.accumulator.require(action, parked.held.run["expires_at"] or 0)
                    held = parked.save("", seconds)
                else:
                    parked.told += parked.accumulator.requeue()
                    held = parked.save(worker.name, 0 if is_left else LEASE_SECONDS)
                parked.change.remember(owner, keep(held.run))
            event_id = worker.appender.append(thread_id, parked.told, Claim(run_id, held.claim)) or None
        # What goes on changes it.
        run = held.run.copy()
        if request is not None and not waiting and not is_left:
            self._go_on(held, event_id, request, address)
        return run

    def _check(self, run_id: str, answers: Sequence[ToolAnswer], request: RunRequest | None) -> None:
        """Raise where a call is approved with arguments that are not those of its tool."""
        edited = {one.call_id: one.arguments for one in answers if one.arguments is not None}
        for row in self._worker.tool_calls.of_run(run_id) if edited else ():
            tool = request.assistant.tools.get(row.name) if request is not None else None
            if row.call_id not in edited or tool is None:
                continue
            try:
                tool.checked(edited[row.call_id] or {})
            except ToolArgumentsError as error:
                raise RequestError(400, "invalid_value", f"'arguments' are not those of {row.name}: {error}") from None

    def _parked(
        self, change: ThreadChange | None, thread_id: str, run_id: str, answers: Sequence[ToolAnswer]
    ) -> _Parked:
        """Give the run that waits for all of ``answers``. Raises as :meth:`answer` does."""
        found = change.parked(run_id) if change is not None else []
        if change is not None and found:
            parked = _Parked(change, found[0])
            for one in answers:
                _check_waits(parked.rows.get(one.call_id), one)
            return parked
        # Over the connection of the transaction: one more each would be all that there are.
        run = change.run(run_id) if change is not None else None
        if change is None or run is None:
            raise no_run()
        rows = {row.call_id: row for row in change.calls(run_id)}
        for one in answers:
            _check_waits(rows.get(one.call_id), one)
        raise RequestError(
            409, "not_waiting", f"The run waits for no answer: it is {run['status']}. Look at the thread, and go on."
        )

    def hold(self, thread_id: str, run_id: str, call_id: str, holder: str, seconds: float) -> float:
        """Have the page ``holder`` be the one that executes a call, for so many seconds, or no longer where there are
        none; give until when, in seconds since 1970. Raises as :meth:`answer` does."""
        with self._worker.tool_calls.changing(thread_id) as change:
            parked = self._parked(change, thread_id, run_id, [ToolAnswer(call_id, "output")])
            # One that is over just now is over for a database whose clock has not moved since.
            until = parked.change.hold(run_id, call_id, holder, seconds or -1.0)
        if until is None:
            raise RequestError(409, "already_claimed", "Another page executes this call. Wait for its output.")
        return until

    def close(self, change: ThreadChange, stop: Stop, said: str, run_id: str | None = None) -> list[Ended]:
        """End the thread's runs that wait, or that one, within a transaction; give what is to be told of each."""
        ended = []
        for held in change.parked(run_id):
            if stop is Stop.EXPIRED and held.overdue <= 0:
                # It was answered since it was looked at, and waits anew.
                continue
            parked = _Parked(change, held)
            for row in parked.rows.values():
                if row.status not in OVER:
                    parked.put(row._replace(status="interrupted", output=said, error="not answered"))
            parked.told += parked.accumulator.end(stop)
            ended.append(Ended(parked.save(self._worker.name, 0), parked.told))
        return ended

    def tell(self, thread_id: str, ended: Sequence[Ended]) -> None:
        """Tell of runs that were ended, for who has the thread's lock, once the transaction is over."""
        for held, told in ended:
            self._worker.notifier.notify("run_ended", held.owner, run=held.run, message=held.message)
            self._worker.appender.append(thread_id, told, Claim(held.run["id"], held.claim))

    def cancel(self, thread_id: str, run_id: str) -> None:
        """Cancel the run where it waits."""
        self._end(thread_id, run_id, Stop.CANCELLED, NOT_EXECUTED)

    def expire(self, thread_id: str, run_id: str) -> None:
        """End the run where it waits, as nobody answered in time."""
        self._end(thread_id, run_id, Stop.EXPIRED, _EXPIRED)

    def _end(self, thread_id: str, run_id: str, stop: Stop, said: str) -> None:
        worker = self._worker
        with worker.log.lock(thread_id):
            with worker.appender.storing(thread_id), worker.tool_calls.changing(thread_id) as change:
                ended = self.close(change, stop, said, run_id) if change is not None else []
            self.tell(thread_id, ended)

    def go_on_without(self, thread_id: str, position: int, command_id: str) -> None:
        """End the runs of other commands that wait before ``position``: what comes after them goes on."""
        worker = self._worker
        if not worker.tool_calls.has_parked(thread_id):
            return
        with worker.log.lock(thread_id):
            with worker.appender.storing(thread_id), worker.tool_calls.changing(thread_id) as change:
                ended: list[Ended] = []
                for held in change.parked() if change is not None else []:
                    if change is not None and held.position < position and held.group_id != command_id:
                        ended += self.close(change, Stop.CANCELLED, UNANSWERED, held.run["id"])
            self.tell(thread_id, ended)


def no_run() -> NotFoundError:
    """Give what is raised for a run that the thread has not."""
    return NotFoundError("run_not_found", "There is no such run in this thread.")


class Ended(NamedTuple):
    """A run that was ended while it waited, and the events that tell of it."""

    held: LeasedRun
    told: list[Event]


def _answered(row: StoredCall, answer: ToolAnswer) -> StoredCall:
    """Give the call as it is with its answer."""
    decision: Json = {"needs": answer.needs, "at": events.now()}
    if answer.needs == "output":
        return row._replace(status="completed", output=answer.output, decision=decision, completed_at=events.now())
    decision |= {"approve": answer.approve, "reason": answer.reason, "arguments": answer.arguments}
    if not answer.approve:
        said = f"{_DENIED} {answer.reason}" if answer.reason else _DENIED
        return row._replace(status="denied", output=said, error="denied", decision=decision)
    arguments = row.arguments if answer.arguments is None else events.dumps(answer.arguments)
    return row._replace(status="pending", arguments=arguments, remember=answer.remember, decision=decision)


def _check_waits(row: StoredCall | None, answer: ToolAnswer) -> None:
    """Raise where a call does not wait for such an answer."""
    if row is None:
        raise NotFoundError("tool_call_not_found", f"There is no call {answer.call_id[:64]!r} in this run.")
    if row.status == "requires_action" and row.needs == answer.needs:
        return
    if row.needs == answer.needs and row.decision is not None:
        decided: Any = row.decision
        raise RequestError(409, "already_answered", f"The call {row.call_id} was answered before.", decision=decided)
    if row.status in OVER or row.needs is None:
        raise RequestError(409, "not_waiting", f"The call {row.call_id} waits for no answer: it is {row.status}.")
    routes = {"output": "submit_tool_outputs", "approval": "approvals"}
    raise RequestError(
        409, "not_waiting", f"The call {row.call_id} needs an {row.needs}: POST it to {routes[row.needs]}."
    )
