"""What changes in a thread in one transaction: parked runs, their tool calls, and what they are resent as."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Any, Final, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..events import TERMINAL, Json, now
from ..types import Message, Run, Step
from . import database
from .rows import (
    LEASE,
    MESSAGE_CHANGES,
    PARKED,
    RUN_CHANGES,
    SAVE_MESSAGE,
    THIS,
    LeasedRun,
    Owner,
    StoredAnswer,
    columns,
    leased,
    remember,
    run_of,
)
from .tables import items, runs, tool_calls

UNANSWERED: Final = "The user went on without answering."
NOT_EXECUTED: Final = "The tool was not executed."
NOT_KNOWN: Final = "The tool was started and its result is not known."
"""What a model is told of a call without output: it waited for a page or a person, or for its turn, or it had begun."""
_OPEN: Final = {"requires_action": UNANSWERED, "pending": NOT_EXECUTED, "claimed": NOT_KNOWN}

_OF_RUN: sa.BindParameter[Any] = sa.bindparam("of")
_THESE: sa.BindParameter[Any] = sa.bindparam("these", expanding=True)
_LEAVE = runs.update().where(runs.c.id == THIS, PARKED).values(lease=LEASE, claim=runs.c.claim + 1)
_CLOSE = (
    tool_calls.update()
    .where(tool_calls.c.run_id == THIS, tool_calls.c.status.in_(_OPEN))
    .values(
        status="interrupted",
        output=sa.case(_OPEN, value=tool_calls.c.status),
        completed_at=sa.bindparam("at"),
    )
)


class StoredCall(NamedTuple):
    """A tool call as stored: a row of :data:`.tables.tool_calls`, without the page that has it."""

    run_id: str
    call_id: str
    round: int
    number: int
    step_id: str
    name: str
    kind: str
    arguments: str
    status: str
    needs: str | None = None
    decision: Json | None = None
    remember: bool = False
    output: str | None = None
    error: str | None = None
    started_at: int | None = None
    completed_at: int | None = None


_CALL: Final = [tool_calls.c[name] for name in StoredCall.__annotations__]
# The others are what the model called.
_CHANGES: Final = [column.name for column in _CALL[_CALL.index(tool_calls.c.arguments) :]]
_PUT = tool_calls.update().where(tool_calls.c.run_id == _OF_RUN, tool_calls.c.call_id == THIS)
_HOLD_CALL = (
    _PUT.where(
        tool_calls.c.status == "requires_action",
        tool_calls.c.needs == "output",
        sa.or_(
            tool_calls.c.holder.is_(None),
            tool_calls.c.holder == sa.bindparam("page"),
            tool_calls.c.until < database.Now(),
        ),
    )
    .values(holder=sa.bindparam("page"), until=database.Now() + sa.bindparam("seconds", type_=sa.Float))
    .returning(tool_calls.c.until)
)
_CALLS = sa.select(*_CALL).where(tool_calls.c.run_id.in_(_THESE)).order_by(tool_calls.c.run_id, tool_calls.c.number)
_ITEMS = (
    sa.select(items.c.run_id, items.c.round, items.c.item)
    .where(items.c.run_id.in_(_THESE))
    .order_by(items.c.run_id, items.c.number)
)


def calls_of(connection: Connection, run_ids: Collection[str]) -> list[StoredCall]:
    """Give the calls of the runs, those of each in order."""
    return [StoredCall(*row) for row in connection.execute(_CALLS, {"these": list(run_ids)})]


def items_of(connection: Connection, run_ids: Collection[str]) -> dict[str, list[tuple[int, Json]]]:
    """Give the items of each run, in order, each with its round. Runs without any are left out."""
    found: dict[str, list[tuple[int, Json]]] = {}
    for run_id, number, item in connection.execute(_ITEMS, {"these": list(run_ids)}):
        found.setdefault(run_id, []).append((number, item))
    return found


def said(connection: Connection, run_ids: Collection[str]) -> dict[str, list[Json]]:
    """Give what each run is resent as: behind the items of a round, an output for each call among them, whatever became
    of that. Runs without items are left out."""
    found = items_of(connection, run_ids)
    calling = [run_id for run_id, theirs in found.items() if any(map(_is_call, (item for _, item in theirs)))]
    calls = {(one.run_id, one.call_id): one for one in calls_of(connection, calling)} if calling else {}
    return {
        run_id: [
            one
            for _, of_round in groupby(theirs, lambda numbered: numbered[0])
            for one in _closed([item for _, item in of_round], run_id, calls)
        ]
        for run_id, theirs in found.items()
    }


def _is_call(item: Json) -> bool:
    return item.get("type") == "function_call"


def _closed(of_round: Sequence[Json], run_id: str, calls: dict[tuple[str, str], StoredCall]) -> list[Json]:
    resent, outputs = [], []
    for item in of_round:
        if not _is_call(item):
            resent.append(item)
            continue
        call = calls.get((run_id, item["call_id"]))
        # A person may have approved it with others than the model's.
        resent.append(item if call is None else {**item, "arguments": call.arguments})
        outputs.append({"type": "function_call_output", "call_id": item["call_id"], "output": _output(call)})
    return resent + outputs


def _output(call: StoredCall | None) -> str:
    if call is None:
        return NOT_EXECUTED
    return call.output if call.output is not None else _OPEN.get(call.status, NOT_KNOWN)


def close_calls(connection: Connection, run: Run) -> None:
    """Have the calls of a run that is over be over too."""
    if run["status"] in TERMINAL:
        connection.execute(_CLOSE, {"this": run["id"], "at": now()})


class ThreadChange:
    """What changes in the thread ``thread_id`` in the transaction of ``connection``, which holds the thread's row: see
    :meth:`.tool_calls.ToolCallStore.changing`."""

    def __init__(self, connection: Connection, thread_id: str) -> None:
        self._connection, self._thread_id = connection, thread_id

    def parked(self, run_id: str | None = None) -> list[LeasedRun]:
        """Give the thread's runs that wait for an answer and are no worker's, in order; or the one of that id. Nobody
        else takes or changes them until the transaction ends."""
        this = () if run_id is None else (runs.c.id == run_id,)
        return leased(self._connection, runs.c.thread_id == self._thread_id, PARKED, *this, hold=True)

    def run(self, run_id: str) -> Run | None:
        """Give a run of the thread."""
        return run_of(self._connection, self._thread_id, run_id)

    def calls(self, run_id: str) -> list[StoredCall]:
        """Give the run's calls, in order."""
        return calls_of(self._connection, [run_id])

    def put(self, call: StoredCall) -> None:
        """Store what changed of a call: all but what the model called."""
        changes = {name: getattr(call, name) for name in _CHANGES}
        self._connection.execute(_PUT, {**changes, "of": call.run_id, "this": call.call_id})

    def hold(self, run_id: str, call_id: str, holder: str, seconds: float) -> float | None:
        """Have the page ``holder`` execute a call that waits for an output, for so many seconds, or so many more; give
        the time until which, by the database's clock. ``None`` where another page has it, or it waits for none."""
        values = {"of": run_id, "this": call_id, "page": holder, "seconds": seconds}
        return self._connection.execute(_HOLD_CALL, values).scalar()

    def save(self, run: Run, message: Message, steps: list[Step], *, worker: str, lease: float) -> LeasedRun:
        """Store a run that :meth:`parked` gave, as ``worker``'s for ``lease`` seconds: with 0 it is anybody's, with the
        worker ``""`` it is parked for so long. Give it as it is stored, with its next claim. The calls of one that is
        over then are over too."""
        ours = {"steps": steps, "worker": worker, "term": lease, "this": run["id"]}
        changed = self._connection.execute(_LEAVE, {**columns(run, RUN_CHANGES), **ours})
        if not changed.rowcount:
            raise RuntimeError(f"run {run['id']} is not parked: give one that parked() gave, once")
        self._connection.execute(SAVE_MESSAGE, {**columns(message, MESSAGE_CHANGES), "this": message["id"]})
        close_calls(self._connection, run)
        return leased(self._connection, runs.c.id == run["id"])[0]

    def remember(self, owner: Owner, answer: StoredAnswer | None) -> None:
        """Store what ``owner`` was answered, if anything. Raises :class:`.AnsweredBefore`."""
        remember(self._connection, owner, answer)
