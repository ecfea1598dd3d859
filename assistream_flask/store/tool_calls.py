"""The tool calls of runs: who executes each, what came of it, and the rounds of the loop that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from ..events import Json, now
from . import tables
from .rows import HOLD, PARKED, THIS, State
from .sql import MINE_NOW, ThreadStore, save_state
from .tables import runs, tool_calls
from .thread_change import StoredCall, ThreadChange, calls_of, said

# One statement: what is read first may be another's by the time it is written.
_OURS = (
    tool_calls.update()
    .where(tool_calls.c.run_id == THIS, tool_calls.c.call_id == sa.bindparam("call"))
    .where(sa.exists().where(runs.c.id == tool_calls.c.run_id, *MINE_NOW))
)
_CLAIM = _OURS.where(tool_calls.c.status == "pending").values(status="claimed")
_FINISH = _OURS.where(tool_calls.c.status.in_(("pending", "claimed")))
_CLAIM_AGAIN = _FINISH.values(status="claimed")
_PARKED_IN = sa.select(runs.c.id).where(runs.c.thread_id == THIS, PARKED).limit(1)
_APPROVED = sa.select(tool_calls.c.name).distinct().where(tool_calls.c.thread_id == THIS, tool_calls.c.remember)


class ToolCallStore:
    """The tool calls of the runs in ``store``."""

    def __init__(self, store: ThreadStore) -> None:
        self._store = store

    def of_run(self, run_id: str) -> list[StoredCall]:
        """Give the run's calls, in order."""
        with self._store.read() as connection:
            return calls_of(connection, [run_id])

    def begin_round(
        self, worker: str, state: State, loop: Json, items: Sequence[Json], calls: Sequence[StoredCall]
    ) -> bool:
        """Store the run with its ``loop``, the items of the round ``loop["round"]`` and its calls, all or nothing.
        Give ``False``, and store nothing, where the run is not ``worker``'s any more. A round that is stored again, as
        nobody knew whether it was, takes the place of the first."""
        run, number = state[0], loop["round"]
        ours = {"run_id": run["id"], "thread_id": run["thread_id"]}
        with self._store.write() as connection:
            if not save_state(connection, worker, state, loop):
                return False
            for table in (tables.items, tool_calls):
                connection.execute(table.delete().where(table.c.run_id == run["id"], table.c.round == number))
            last = sa.select(sa.func.max(tables.items.c.number)).where(tables.items.c.run_id == run["id"])
            first = (connection.execute(last).scalar() or 0) + 1
            if items:
                rows = [{**ours, "number": first + i, "round": number, "item": item} for i, item in enumerate(items)]
                connection.execute(tables.items.insert(), rows)
            if calls:
                connection.execute(tool_calls.insert(), [{**call._asdict(), **ours} for call in calls])
        return True

    def save_loop(self, worker: str, state: State, loop: Json) -> bool:
        """Store the run and how far its loop came. Give ``False`` as :meth:`begin_round` does."""
        with self._store.write() as connection:
            return save_state(connection, worker, state, loop)

    def claim(self, worker: str, number: int, run_id: str, call_id: str, *, again: bool = False) -> bool:
        """Have ``worker``, whose the run is by the claim ``number``, be the one that executes a pending call; or, where
        that may be done ``again``, one that somebody claimed. ``False`` where it is not to."""
        with self._store.write() as connection:
            values = _which(worker, number, run_id, call_id)
            return bool(connection.execute(_CLAIM_AGAIN if again else _CLAIM, {**values, "started_at": now()}).rowcount)

    def finish(
        self, worker: str, number: int, run_id: str, call_id: str, status: str, output: str, error: str | None
    ) -> bool:
        """Store how a pending or claimed call of ``worker``'s run ended. ``False`` where the run is another's by now,
        or the call is over: what is stored counts then."""
        changes = {"status": status, "output": output, "error": error, "completed_at": now()}
        with self._store.write() as connection:
            found = connection.execute(_FINISH, {**_which(worker, number, run_id, call_id), **changes})
            return bool(found.rowcount)

    def park(self, worker: str, state: State, loop: Json, seconds: float) -> bool:
        """Store a run that waits for an answer, and let go of it: after so many seconds it is anybody's. Give ``False``
        as :meth:`begin_round` does, and where somebody asked to cancel it: nobody would hear of that."""
        with self._store.write() as connection:
            return save_state(connection, worker, state, loop, park=seconds)

    def said(self, run_id: str) -> list[Json]:
        """Give what a run that goes on is resent as: its items, and an output for each call."""
        with self._store.read() as connection:
            return said(connection, [run_id]).get(run_id, [])

    def approved(self, thread_id: str) -> set[str]:
        """Give the names of the tools that are approved for the rest of the thread."""
        with self._store.read() as connection:
            return set(connection.execute(_APPROVED, {"this": thread_id}).scalars())

    def has_parked(self, thread_id: str) -> bool:
        """Tell whether a run of the thread waits for an answer, and is no worker's."""
        with self._store.read() as connection:
            return connection.execute(_PARKED_IN, {"this": thread_id}).first() is not None

    @contextmanager
    def changing(self, thread_id: str) -> Iterator[ThreadChange | None]:
        """Change parked runs of the thread and their calls, all or nothing; ``None`` where the thread is gone."""
        with self._store.write() as connection:
            found = connection.execute(HOLD, {"this": thread_id}).first()
            yield None if found is None else ThreadChange(connection, thread_id)


def _which(worker: str, number: int, run_id: str, call_id: str) -> dict[str, Any]:
    return {"mine": worker, "by_claim": number, "this": run_id, "call": call_id}
