"""Rows as objects of the API, and the statements that more than one module of this room needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..events import TERMINAL, Json, entry, now
from ..types import Entry, Message, Run, Step
from . import database
from .tables import answers, messages, runs, threads, workers

MESSAGE: Final = [column for column in messages.c if column.name != "position"]
RUN: Final = list(runs.c)[: list(runs.c).index(runs.c.steps)]
"""The columns of the objects."""
# What changes while a run goes on.
MESSAGE_CHANGES: Final = [
    messages.c[name] for name in ("status", "content", "completed_at", "incomplete_at", "incomplete_details")
]
RUN_CHANGES: Final = RUN[RUN.index(runs.c.status) : RUN.index(runs.c.model)] + RUN[RUN.index(runs.c.started_at) :]

THIS: Final[sa.BindParameter[Any]] = sa.bindparam("this")
LIVING: Final = sa.or_(*(runs.c.status == live for live in ("queued", "in_progress", "requires_action")))
# When a lease of so many seconds that begins now ends; one of none is over, whatever the clocks say.
_TERM: sa.BindParameter[float] = sa.bindparam("term", type_=sa.Float)
LEASE: Final = sa.case((_TERM > 0, database.Now() + _TERM), else_=0.0)
LAPSED: Final = runs.c.lease < database.Now()
RELEASED: Final = runs.c.lease == 0
"""Runs that anybody may take over: as their lease ran out, and as they were let go of."""
PARKED: Final = sa.and_(runs.c.status == "requires_action", runs.c.worker == "")
"""Runs that wait for a page or a person, and are no worker's meanwhile. Their lease ends when the question expires."""
# The row lock gives positions in the order of commits where several can write at once.
HOLD: Final = sa.select(threads.c.number).where(threads.c.id == THIS).with_for_update()
_REMEMBER: Final = answers.insert()
SAVE_MESSAGE: Final = messages.update().where(messages.c.id == THIS)


class Owner(NamedTuple):
    """A caller: ``scope`` is the blueprint's registered name, so two blueprints share nothing."""

    scope: str
    name: str


class Stored(NamedTuple):
    """An entry as stored, and the event id as of which it is exact (``None``: no event yet)."""

    entry: Entry
    event_id: str | None


class LeasedRun(NamedTuple):
    """A run that is not over, with what a worker needs to take it over: see :mod:`..runs.recovery`."""

    run: Run
    message: Message
    steps: list[Step]
    position: int
    owner: Owner
    group_id: str
    mode: str
    event_id: str | None
    upstream: Json | None
    lease: float
    worker: str
    claim: int
    loop: Json | None
    # Whose it is, for people; and for how many seconds its lease is over.
    name: str | None
    overdue: float


class StoredAnswer(NamedTuple):
    """The first reply to an Idempotency-Key. ``fingerprint`` tells one request from another."""

    key: str
    fingerprint: str
    status: int
    # An object as the database has it: any that a route answers with.
    body: Mapping[str, Any]
    event_id: str | None = None
    thread_id: str | None = None


class AnsweredBefore(Exception):
    """The Idempotency-Key has an answer already; it was given between the look-up and the write."""


State = tuple[Run, Message, list[Step], str | None, Json | None, int]
"""What there is to store of a run that goes on: the run, its message, its steps, the event id as of which they
are exact, the state of its upstream, and which claim of the run its holder has."""


def columns(value: Mapping[str, Any], columns: list[sa.Column[Any]]) -> Json:
    """Give what goes into those columns of an object."""
    return {column.name: value[column.name] for column in columns}


def prefixed(table: sa.Table) -> list[sa.Label[Any]]:
    """Give the columns of a run that is read beside its message, for :func:`stored`."""
    return [column.label(f"run.{column.name}") for column in table.c]


def run_object(row: Any, prefix: str = "") -> Run:
    """Give the public run object."""
    value = {column.name: row[prefix + column.name] for column in RUN}
    return cast(Run, {"id": value.pop("id"), "object": "thread.run", **value})


def run_of(connection: Connection, thread_id: str, run_id: str) -> Run | None:
    """Give a run of the thread."""
    query = sa.select(*RUN).where(runs.c.id == run_id, runs.c.thread_id == thread_id)
    row = connection.execute(query).first()
    return None if row is None else run_object(row._mapping)


def stored(row: Row[Any]) -> Stored:
    """Give the entry of a message and its run, if it has one."""
    mapping = row._mapping
    value = {column.name: mapping[column.name] for column in MESSAGE}
    message = cast(Message, {"id": value.pop("id"), "object": "thread.message", **value})
    if message["run_id"] is None:
        return Stored(entry(message), None)
    run = run_object(mapping, "run.")
    steps = mapping["run.steps"]
    for step in steps:
        # Older releases store none: a run of theirs thinks before it speaks, and does nothing else.
        step.setdefault("content_index", 0)
    return Stored(entry(message, run, steps), None if run["status"] in TERMINAL else mapping["run.place"])


def leased(connection: Connection, *where: sa.ColumnElement[bool], hold: bool = False) -> list[LeasedRun]:
    """Give the runs that ``where`` selects, in the order of their threads; whoever is to ``hold`` them has their rows
    until the transaction ends."""
    overdue = (database.Now() - runs.c.lease).label("overdue")
    query = (
        sa.select(messages, *prefixed(runs), threads.c.scope, threads.c.owner, workers.c.name, overdue)
        .select_from(
            runs.join(messages, messages.c.id == runs.c.message_id)
            .join(threads, threads.c.id == runs.c.thread_id)
            .outerjoin(workers, workers.c.id == runs.c.worker)
        )
        .where(*where)
        .order_by(messages.c.thread_id, messages.c.position)
    )
    if hold:
        query = query.with_for_update(of=runs)
    found = []
    for row in connection.execute(query).all():
        whole, ours = stored(row).entry, row._mapping
        # The query joins it.
        assert whole["run"] is not None
        found.append(
            LeasedRun(
                whole["run"],
                whole["message"],
                whole["steps"],
                ours["position"],
                Owner(ours["scope"], ours["owner"]),
                ours["run.group_id"],
                ours["run.mode"],
                ours["run.place"],
                ours["run.upstream"],
                ours["run.lease"],
                ours["run.worker"],
                ours["run.claim"],
                ours["run.loop"],
                ours["name"],
                ours["overdue"],
            )
        )
    return found


def remember(connection: Connection, owner: Owner, answer: StoredAnswer | None) -> None:
    """Store what ``owner`` was answered, if anything. Raises :class:`AnsweredBefore`."""
    if answer is None:
        return
    values = {**answer._asdict(), "scope": owner.scope, "owner": owner.name, "created_at": now()}
    # The column's name in the schema.
    values["place"] = values.pop("event_id")
    try:
        connection.execute(_REMEMBER, values)
    except sa.exc.IntegrityError as error:
        raise AnsweredBefore from error
