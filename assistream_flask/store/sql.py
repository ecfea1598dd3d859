"""The thread store: threads, messages, runs and the replies to idempotency keys, in SQL.

Objects go in and come out as the JSON of the API. The text of a message that grows is stored
with the event id as of which it is exact, so that text plus later events is the whole.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from ..errors import ConfigurationError
from ..events import TERMINAL, Json, Said, entry, text_of
from ..types import Entry, Message, Run, Step, Thread
from . import database, migrations, tables
from .tables import answers, messages, runs, threads, workers

_MESSAGE = [column for column in messages.c if column.name != "position"]
_RUN = list(runs.c)[: list(runs.c).index(runs.c.steps)]
# What changes while a run goes on.
_MESSAGE_CHANGES = [
    messages.c[name] for name in ("status", "content", "completed_at", "incomplete_at", "incomplete_details")
]
_RUN_CHANGES = _RUN[_RUN.index(runs.c.status) : _RUN.index(runs.c.model)] + _RUN[_RUN.index(runs.c.started_at) :]

# Statements on a request's way to its first words, and of what is stored all the time: SQLAlchemy takes ten times as
# long for one that is made anew.
_THIS: sa.BindParameter[Any] = sa.bindparam("this")
_OWNED = (threads.c.scope == sa.bindparam("scope"), threads.c.owner == sa.bindparam("owner"))
_LIVING = sa.or_(*(runs.c.status == live for live in ("queued", "in_progress", "requires_action")))
_OWNS = sa.select(threads.c.number).where(threads.c.id == _THIS, *_OWNED)
# The row lock gives positions in the order of commits where several can write at once.
_HOLD = sa.select(threads.c.number).where(threads.c.id == _THIS).with_for_update()
_COUNT = (
    sa.select(sa.func.count()).select_from(runs.join(threads, threads.c.id == runs.c.thread_id)).where(_LIVING, *_OWNED)
)
_LAST = sa.select(sa.func.max(messages.c.position)).where(messages.c.thread_id == _THIS)
_NOW = sa.select(database.Now())
# When a lease of so many seconds that begins now ends; one of none is over, whatever the clocks say.
_TERM: sa.BindParameter[float] = sa.bindparam("term", type_=sa.Float)
_LEASE = sa.case((_TERM > 0, database.Now() + _TERM), else_=0.0)
LAPSED: Final = runs.c.lease < database.Now()
RELEASED: Final = runs.c.lease == 0
"""Runs that anybody may take over: as their lease ran out, and as they were let go of."""
_ADD_MESSAGE, _ADD_RUN = messages.insert(), runs.insert().values(lease=_LEASE)
_BUSY = (
    sa.select(runs.c.id)
    .join(messages, messages.c.id == runs.c.message_id)
    .where(
        runs.c.thread_id == _THIS,
        _LIVING,
        messages.c.position < sa.bindparam("before"),
        runs.c.group_id != sa.bindparam("beside"),
    )
    .limit(1)
)


def _of_newest(column: sa.Column[int]) -> sa.ScalarSelect[int]:
    of_thread = sa.select(column).where(messages.c.thread_id == threads.c.id)
    return of_thread.order_by(messages.c.position.desc()).limit(1).scalar_subquery()


_NEWEST = sa.select(threads.c.id, _of_newest(messages.c.position), _of_newest(messages.c.created_at)).where(
    threads.c.id.in_(sa.bindparam("these", expanding=True))
)
_ASKED = (
    sa.select(messages.c.thread_id, messages.c.position, runs.c.group_id, runs.c.mode)
    .join_from(messages, runs, runs.c.id == messages.c.run_id)
    .where(messages.c.id == _THIS)
    .subquery()
)
_BESIDE = sa.select(runs.c.message_id).where(runs.c.group_id == _ASKED.c.group_id, _ASKED.c.mode == "parallel")
_HISTORY = (
    # A thread may have thousands: what nobody needs of them costs more than all else of a request.
    sa.select(messages.c.position, messages.c.assistant_id, messages.c.content, messages.c.status)
    .where(
        messages.c.thread_id == _ASKED.c.thread_id,
        messages.c.position < _ASKED.c.position,
        messages.c.position < sa.bindparam("before"),
        messages.c.id.not_in(_BESIDE),
    )
    .order_by(messages.c.position.desc())
    .limit(sa.bindparam("some"))
)
# So many at a time: a worker that reads millions of characters in one go does nothing else meanwhile.
_FEWEST, _FIRST, _MOST = 16, 64, 500
# What was let go of is nobody's, also while its row still names the last who had it.
_HELD = (runs.c.worker == sa.bindparam("mine"), _LIVING, runs.c.lease > 0)
_SAVE_RUN = runs.update().where(runs.c.id == _THIS, *_HELD, runs.c.claim == sa.bindparam("number"))
_SAVE_MESSAGE = messages.update().where(messages.c.id == _THIS)


def _unlocked(*where: sa.ColumnElement[bool]) -> sa.Select[str]:
    # Rows that another transaction holds are passed over: two that wait for many rows can be a deadlock.
    return sa.select(runs.c.id).where(*where).with_for_update(skip_locked=True)


_THESE = runs.c.id.in_(sa.bindparam("these", expanding=True))
_MINE = _unlocked(_THESE, *_HELD).add_columns(runs.c.claim)
_TO_CANCEL = sa.select(runs.c.id).where(_THESE, runs.c.worker == sa.bindparam("mine"), _LIVING, runs.c.cancel_requested)
_RENEW = runs.update().where(runs.c.id.in_(_unlocked(_THESE, *_HELD))).values(lease=_LEASE)


class Owner(NamedTuple):
    """A caller: ``scope`` is the blueprint's registered name, so two blueprints share nothing."""

    scope: str
    name: str


class StoredAnswer(NamedTuple):
    """The first reply to an Idempotency-Key. ``fingerprint`` tells one request from another."""

    key: str
    fingerprint: str
    status: int
    # An object as the database has it: any that a route answers with.
    body: Mapping[str, Any]
    event_id: str | None = None
    thread_id: str | None = None


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
    # Whose it is, for people; and for how many seconds its lease is over.
    name: str | None
    overdue: float


State = tuple[Run, Message, list[Step], str | None, Json | None, int]
"""What there is to store of a run that goes on: the run, its message, its steps, the event id as of which they
are exact, the state of its upstream, and which claim of the run its holder has."""


class AnsweredBefore(Exception):
    """The Idempotency-Key has an answer already; it was given between the look-up and the write."""


class TooManyRunsError(Exception):
    """The caller has as many runs that are not over as allowed."""


class ThreadStore:
    """Threads in the database that ``url`` names (an SQLAlchemy URL), over at most ``pool`` connections, each of which
    waits at most ``patience`` seconds for anything.

    The schema is created at first use, and an older one is upgraded. Raises :class:`ConfigurationError` for a
    URL that cannot work, or a schema newer than this code. SQLite takes no ``pool``: it has one writer.
    """

    def __init__(self, url: str, pool: int = 10, patience: float = database.PATIENCE) -> None:
        self._engine = database.open_engine(url, pool, patience)
        sqlite = self._engine.dialect.name == "sqlite"
        self._writer: AbstractContextManager[object] = database.OneWriter() if sqlite else nullcontext()
        # A database in memory is one connection, which readers share with the writer.
        alone = isinstance(self._engine.pool, sa.StaticPool)
        self._reader: AbstractContextManager[object] = self._writer if alone else nullcontext()
        self._writes = self._engine.execution_options(**{database.WRITE: True})
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._writer, database.writing(self._writes) as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._reader, self._engine.connect() as connection:
            yield connection

    def _create(self) -> None:
        with self._write() as connection:
            # Of workers that start at once the first does it, and the others find it done.
            _take_turns(connection, "schema")
            recorded = sa.inspect(connection).has_table(tables.schema.name)
            newest = sa.select(sa.func.max(tables.schema.c.version))
            found = connection.execute(newest).scalar() if recorded else None
            if found is None:
                tables.metadata.create_all(connection)
                connection.execute(tables.schema.insert().values(version=tables.VERSION))
                migrations.stamp(connection, tables.VERSION)
            elif found < tables.VERSION:
                migrations.upgrade(connection, found)
                connection.execute(tables.schema.update().values(version=tables.VERSION))
            elif found > tables.VERSION:
                raise ConfigurationError(
                    f"the database has schema version {found}, this assistream knows {tables.VERSION}: "
                    "upgrade assistream, or use another ASSISTREAM_DATABASE_URL"
                )

    def close(self) -> None:
        """Close the pooled connections."""
        # The one connection of a database in memory may be at work in another thread.
        with self._reader:
            self._engine.dispose()

    # Threads

    def create_thread(self, owner: Owner, thread: Thread, answer: StoredAnswer | None = None) -> None:
        """Store ``thread`` as ``owner``'s. Raises :class:`AnsweredBefore`."""
        with self._write() as connection:
            self._remember(connection, owner, answer)
            connection.execute(
                threads.insert().values(
                    id=thread["id"],
                    scope=owner.scope,
                    owner=owner.name,
                    created_at=thread["created_at"],
                    metadata=thread["metadata"],
                )
            )

    def owns(self, owner: Owner, thread_id: str) -> bool:
        """Tell whether the thread exists and is ``owner``'s."""
        with self._read() as connection:
            return connection.execute(_OWNS, {"this": thread_id, **_named(owner)}).first() is not None

    def thread(self, thread_id: str) -> Thread | None:
        """Give the public thread object."""
        with self._read() as connection:
            row = connection.execute(sa.select(threads).where(threads.c.id == thread_id)).first()
        return None if row is None else thread_object(row._mapping)

    def threads(self, owner: Owner, limit: int, before: str | None) -> tuple[list[Thread], bool] | None:
        """Give ``owner``'s threads older than ``before``, newest first, and whether there are more;
        ``None`` when ``before`` is not one of them."""
        query = sa.select(threads).where(*_OWNED).order_by(threads.c.number.desc()).limit(limit + 1)
        with self._read() as connection:
            if before is not None:
                number = connection.execute(_OWNS, {"this": before, **_named(owner)}).scalar()
                if number is None:
                    return None
                query = query.where(threads.c.number < number)
            rows = connection.execute(query, _named(owner)).all()
        return [thread_object(row._mapping) for row in rows[:limit]], len(rows) > limit

    def delete_thread(self, thread_id: str) -> None:
        """Delete the thread and all that is in it."""
        with self._write() as connection:
            # Before all else, as in add(): whoever else works on the thread comes wholly before or after.
            connection.execute(_HOLD, {"this": thread_id})
            ours, thread = answers.c.thread_id == thread_id, answers.c.body["object"].as_string()
            connection.execute(answers.delete().where(ours, thread.is_distinct_from("thread")))
            # What is left is that of its creation, which its key shall not do once more.
            for body in connection.execute(sa.select(answers.c.body).where(ours)).scalars().all():
                connection.execute(answers.update().where(ours).values(body={**body, "metadata": {}}))
            connection.execute(runs.delete().where(runs.c.thread_id == thread_id))
            connection.execute(messages.delete().where(messages.c.thread_id == thread_id))
            connection.execute(threads.delete().where(threads.c.id == thread_id))

    # Messages and runs

    def add(
        self,
        owner: Owner,
        thread_id: str,
        message: Message | None,
        started: Sequence[tuple[Run, Message]] = (),
        *,
        mode: str = "parallel",
        group_id: str = "",
        worker: str = "",
        lease: float = 0,
        event_id: str | None = None,
        max_runs: int | None = None,
        answer: StoredAnswer | None = None,
    ) -> int | None:
        """Store the user's message and, for each pair of ``started``, a run and its message, in this order.

        The runs are ``worker``'s for ``lease`` seconds; with 0 they are anybody's.

        Give the position of the first of them, ``None`` when the thread is gone.
        Raises :class:`AnsweredBefore`, :class:`TooManyRunsError`.
        """
        with self._write() as connection:
            if connection.execute(_HOLD, {"this": thread_id}).first() is None:
                return None
            self._remember(connection, owner, answer)
            if max_runs is not None and started:
                # Two that count at once would both find room.
                _take_turns(connection, "runs", *owner)
                if (connection.execute(_COUNT, _named(owner)).scalar() or 0) + len(started) > max_runs:
                    raise TooManyRunsError
            position: int = (connection.execute(_LAST, {"this": thread_id}).scalar() or 0) + 1
            new = ([message] if message else []) + [reply for _, reply in started]
            connection.execute(
                _ADD_MESSAGE, [{**_columns(m, _MESSAGE), "position": position + i} for i, m in enumerate(new)]
            )
            if started:
                ours: Json = {
                    "steps": [],
                    "group_id": group_id,
                    "mode": mode,
                    "place": event_id,
                    "worker": worker,
                    "term": lease,
                    "cancel_requested": False,
                }
                connection.execute(_ADD_RUN, [{**_columns(run, _RUN), **ours} for run, _ in started])
        return position

    def page(self, thread_id: str, limit: int, before: str | None = None) -> tuple[list[Stored], bool] | None:
        """Give the newest entries (older than the message ``before``), in order, and whether there are
        more; ``None`` when the thread is gone, or ``before`` is no message of it."""
        query = (
            _entries().where(messages.c.thread_id == thread_id).order_by(messages.c.position.desc()).limit(limit + 1)
        )
        with self._read() as connection:
            if before is not None:
                where = (messages.c.id == before, messages.c.thread_id == thread_id)
                position = connection.execute(sa.select(messages.c.position).where(*where)).scalar()
                if position is None:
                    return None
                query = query.where(messages.c.position < position)
            rows = connection.execute(query).all()
            if (
                not rows
                and not connection.execute(sa.select(threads.c.number).where(threads.c.id == thread_id)).first()
            ):
                return None
        return [_stored(row) for row in rows[:limit]][::-1], len(rows) > limit

    def history(self, message_id: str, characters: int, count: int) -> tuple[list[Said], bool]:
        """Give what the run of the message ``message_id`` may see, in order: the messages before it, without
        the replies of its own group where that runs in parallel; and whether there are older ones.

        Of many, the newest: at most ``count``, and no more than it takes to have ``characters``. It is read a few
        messages at a time, and between those the worker's others go on.
        """
        found: list[Said] = []
        left, before, some = characters, 1 << 62, _FIRST
        while True:
            some = min(some, count + 1 - len(found))
            with self._read() as connection:
                values = {"this": message_id, "before": before, "some": some}
                rows = connection.execute(_HISTORY, values).all()
            for position, speaker, content, status in rows:
                if left < 0 or len(found) == count:
                    return found[::-1], True
                found.append(Said(speaker, text_of(content), status == "completed"))
                left, before = left - len(found[-1].text), position
            if len(rows) < some:
                return found[::-1], False
            some = max(_FEWEST, min(_MOST, max(0, left) * len(found) // (characters - left + 1)))
            time.sleep(0)

    def run(self, thread_id: str, run_id: str) -> Run | None:
        """Give a run of the thread."""
        query = sa.select(*_RUN).where(runs.c.id == run_id, runs.c.thread_id == thread_id)
        with self._read() as connection:
            row = connection.execute(query).first()
        return None if row is None else _run(row._mapping)

    def save(
        self,
        worker: str,
        run: Run,
        message: Message,
        steps: list[Step],
        event_id: str | None,
        upstream: Json | None = None,
        claim: int = 0,
    ) -> bool:
        """Store the run with its message, its steps and the state of its upstream, as of ``event_id``. Give ``False``,
        and stores nothing, when the run is not ``worker``'s by this ``claim`` any more, or is over or gone."""
        ours = {"steps": steps, "place": event_id, "upstream": upstream, **_by(run, worker, claim)}
        with self._write() as connection:
            if not connection.execute(_SAVE_RUN, {**_columns(run, _RUN_CHANGES), **ours}).rowcount:
                return False
            connection.execute(_SAVE_MESSAGE, {**_columns(message, _MESSAGE_CHANGES), "this": message["id"]})
        return True

    def save_grown(self, worker: str, states: Sequence[State]) -> set[str]:
        """Store, at once, what has grown in runs whose status was stored before. Give the ids of those; of another,
        :meth:`save` tells whether it is ``worker``'s."""
        if not states:
            return set()
        with self._write() as connection:
            ids = [run["id"] for run, *_ in states]
            claims = {row.id: row.claim for row in connection.execute(_MINE, {"mine": worker, "these": ids})}
            found = [state for state in states if claims.get(state[0]["id"]) == state[5]]
            if found:
                connection.execute(
                    _SAVE_RUN,
                    [
                        {"steps": steps, "place": event_id, "upstream": upstream, **_by(run, worker, claim)}
                        for run, _, steps, event_id, upstream, claim in found
                    ],
                )
                connection.execute(
                    _SAVE_MESSAGE,
                    [{"content": message["content"], "this": message["id"]} for _, message, *_ in found],
                )
        return {run["id"] for run, *_ in found}

    # Who works on what

    def held(self, *where: sa.ColumnElement[bool]) -> list[LeasedRun]:
        """Give the runs that are not over, oldest first, of those that ``where`` (a condition on
        :data:`.tables.runs`) selects."""
        with self._read() as connection:
            return self._held(connection, *where)

    @staticmethod
    def _held(connection: Connection, *where: sa.ColumnElement[bool]) -> list[LeasedRun]:
        overdue = (database.Now() - runs.c.lease).label("overdue")
        query = (
            sa.select(messages, *_prefixed(runs), threads.c.scope, threads.c.owner, workers.c.name, overdue)
            .select_from(
                runs.join(messages, messages.c.id == runs.c.message_id)
                .join(threads, threads.c.id == runs.c.thread_id)
                .outerjoin(workers, workers.c.id == runs.c.worker)
            )
            .where(_LIVING, *where)
            .order_by(messages.c.thread_id, messages.c.position)
        )
        rows = connection.execute(query).all()
        found = []
        for row in rows:
            whole, ours = _stored(row).entry, row._mapping
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
                    ours["name"],
                    ours["overdue"],
                )
            )
        return found

    def busy_before(self, thread_id: str, position: int, group_id: str | None) -> bool:
        """Tell whether a run of the thread that stands before ``position``, and is not of the group, is not over."""
        values = {"this": thread_id, "before": position, "beside": group_id or ""}
        with self._read() as connection:
            return connection.execute(_BUSY, values).first() is not None

    def renew(self, worker: str, run_ids: Collection[str], seconds: float) -> None:
        """Have the leases of those runs that are ``worker``'s end in so many seconds. Writes, or fails to, also where
        there is none."""
        with self._write() as connection:
            connection.execute(_RENEW, {"mine": worker, "these": list(run_ids), "term": seconds})

    def to_cancel(self, worker: str, run_ids: Collection[str]) -> list[str]:
        """Give those of ``worker``'s runs that somebody asked to cancel."""
        with self._read() as connection:
            return list(connection.execute(_TO_CANCEL, {"mine": worker, "these": list(run_ids)}).scalars())

    def claim(self, held: LeasedRun, worker: str, seconds: float) -> LeasedRun | None:
        """Make ``worker`` for so many seconds the holder of a run that anybody may take, if it still is as it was
        read; give it as it is now, with its text. ``None`` where somebody else has it, be it the last holder that
        came back or was heard of since, and where this worker was not heard of itself just now: all were held up then,
        or the database's clock was set."""
        lives = _heard_of(runs.c.worker, workers.c.id != worker, workers.c.seen > database.Now() - seconds)
        late = _heard_of(worker, workers.c.seen < database.Now() - seconds / 2)
        as_read = (
            runs.c.id == held.run["id"],
            runs.c.status == held.run["status"],
            runs.c.worker == held.worker,
            runs.c.claim == held.claim,
            runs.c.lease == held.lease,
            LAPSED,
            # What its holder is storing as an app computes is locked, and no lease of it can be renewed.
            sa.or_(RELEASED, ~lives & ~late),
        )
        with self._write() as connection:
            taken = runs.update().where(*as_read).values(worker=worker, lease=_LEASE, claim=runs.c.claim + 1)
            if not connection.execute(taken, {"term": seconds}).rowcount:
                return None
            return self._held(connection, runs.c.id == held.run["id"])[0]

    def now(self) -> float:
        """Give the time by the database's clock, in seconds since the epoch."""
        with self._read() as connection:
            return float(connection.execute(_NOW).scalar_one())

    def beat(self, worker: str, name: str, *, is_shared: bool) -> float:
        """Have all know that ``worker`` lives, which is ``name`` to people; give the time by the database's clock.

        ``is_shared`` says whether others read its event log."""
        lives = workers.update().where(workers.c.id == worker).values(seen=database.Now()).returning(workers.c.seen)
        with self._write() as connection:
            seen = connection.execute(lives).scalar()
            if seen is None:
                values = {"id": worker, "name": name[:255], "is_shared": is_shared, "seen": database.Now()}
                seen = connection.execute(workers.insert().values(values).returning(workers.c.seen)).scalar_one()
        return float(seen)

    def others(self, worker: str, seconds: float) -> list[str]:
        """Give the names of the workers but ``worker`` that were heard of within so many seconds."""
        lives = (workers.c.id != worker, workers.c.seen > database.Now() - seconds)
        with self._read() as connection:
            return list(connection.execute(sa.select(workers.c.name).where(*lives).order_by(workers.c.name)).scalars())

    def newest(self, thread_ids: Collection[str]) -> dict[str, tuple[int, int]]:
        """Give the position of each thread's newest message, and when that was created: 0 and 0 where there is none.
        Threads that are gone are left out."""
        with self._read() as connection:
            rows = connection.execute(_NEWEST, {"these": list(thread_ids)}).all()
        return {thread_id: (position or 0, created_at or 0) for thread_id, position, created_at in rows}

    def retire(self, worker: str) -> None:
        """Forget ``worker``, which left nothing behind."""
        with self._write() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker))

    def bury(self, seconds: float, since: float) -> list[str]:
        """Forget the workers that were not heard of for so many seconds, and have no run that is not over; give the
        threads that they had others in which went on after the Unix time ``since``. Of several that call at once, one
        is given them."""
        silent = workers.c.seen < database.Now() - seconds
        with self._read() as connection:
            # Seldom any, and what writes may have to wait.
            if connection.execute(sa.select(workers.c.id).where(silent).limit(1)).first() is None:
                return []
        busy = sa.exists().where(runs.c.worker == workers.c.id, _LIVING)
        # Rows that another has are left to it: two that wait for many rows can be a deadlock.
        dead = sa.select(workers.c.id).where(silent, ~busy).with_for_update(skip_locked=True, of=workers)
        times = (runs.c.started_at, runs.c.completed_at, runs.c.failed_at, runs.c.cancelled_at)
        late = sa.or_(*(time > since for time in times))
        with self._write() as connection:
            gone = connection.execute(workers.delete().where(workers.c.id.in_(dead)).returning(workers.c.id))
            theirs = runs.c.worker.in_(gone.scalars().all())
            return list(connection.execute(sa.select(runs.c.thread_id).where(theirs, late).distinct()).scalars())

    def release(self, worker: str, *run_ids: str) -> None:
        """Let go of ``worker``'s queued runs, or of those named, for the next worker to pick up at once."""
        which = runs.c.id.in_(run_ids) if run_ids else runs.c.status == "queued"
        with self._write() as connection:
            connection.execute(_free(runs.c.worker == worker, which).values(lease=0))

    def request_cancel(self, run_id: str) -> None:
        """Ask the worker that holds the run to cancel it."""
        with self._write() as connection:
            connection.execute(runs.update().where(runs.c.id == run_id).values(cancel_requested=True))

    # Idempotency

    def answer(self, owner: Owner, key: str) -> StoredAnswer | None:
        """Give the answer that ``owner`` got first for this Idempotency-Key."""
        where = (answers.c.scope == owner.scope, answers.c.owner == owner.name, answers.c.key == key)
        columns = (answers.c.key, answers.c.fingerprint, answers.c.status, answers.c.body, answers.c.place)
        with self._read() as connection:
            row = connection.execute(sa.select(*columns).where(*where)).first()
        return None if row is None else StoredAnswer(*row)

    def remember(self, owner: Owner, answer: StoredAnswer) -> None:
        """Store an answer that goes with no other change. Raises :class:`AnsweredBefore`."""
        with self._write() as connection:
            self._remember(connection, owner, answer)

    def _remember(self, connection: Connection, owner: Owner, answer: StoredAnswer | None) -> None:
        if answer is None:
            return
        values = {**answer._asdict(), "scope": owner.scope, "owner": owner.name, "created_at": int(time.time())}
        # The column's name in the schema.
        values["place"] = values.pop("event_id")
        try:
            connection.execute(answers.insert().values(values))
        except sa.exc.IntegrityError as error:
            raise AnsweredBefore from error

    def rename_owner(self, former: Owner, owner: Owner) -> None:
        """Give ``owner`` the threads of ``former``; where there are any, forget the answers ``former`` was given."""
        theirs = [(table.c.scope == former.scope, table.c.owner == former.name) for table in (threads, answers)]
        with self._read() as connection:
            if connection.execute(sa.select(threads.c.number).where(*theirs[0]).limit(1)).first() is None:
                return
        with self._write() as connection:
            connection.execute(threads.update().where(*theirs[0]).values(owner=owner.name))
            connection.execute(answers.delete().where(*theirs[1]))

    def forget_owner(self, owner: Owner) -> None:
        """Drop all answers that ``owner`` was given."""
        with self._write() as connection:
            connection.execute(answers.delete().where(answers.c.scope == owner.scope, answers.c.owner == owner.name))

    def forget_answers(self, before: int) -> None:
        """Drop answers given before the Unix time ``before``."""
        key = (answers.c.scope, answers.c.owner, answers.c.key)
        # What another transaction holds is left for the next time: two that wait for many rows can be a deadlock.
        old = sa.select(*key).where(answers.c.created_at < before).with_for_update(skip_locked=True)
        with self._write() as connection:
            connection.execute(answers.delete().where(sa.tuple_(*key).in_(old)))


def thread_object(row: Mapping[Any, Any]) -> Thread:
    """Give the public thread object."""
    return {"id": row["id"], "object": "thread", "created_at": row["created_at"], "metadata": row["metadata"]}


def _named(owner: Owner) -> Json:
    return {"scope": owner.scope, "owner": owner.name}


def _heard_of(worker: sa.Column[str] | str, *where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.exists().where(workers.c.id == worker, *where)


def _by(run: Run, worker: str, claim: int) -> Json:
    return {"this": run["id"], "mine": worker, "number": claim}


def _free(*where: sa.ColumnElement[bool]) -> sa.Update:
    return runs.update().where(runs.c.id.in_(_unlocked(*where)))


def _columns(value: Mapping[str, Any], columns: list[sa.Column[Any]]) -> Json:
    return {column.name: value[column.name] for column in columns}


def _prefixed(table: sa.Table) -> list[sa.Label[Any]]:
    return [column.label(f"run.{column.name}") for column in table.c]


def _entries() -> sa.Select[Any]:
    joined = messages.outerjoin(runs, runs.c.id == messages.c.run_id)
    return sa.select(messages, *_prefixed(runs)).select_from(joined)


def _message(row: Any) -> Message:
    value = {column.name: row[column.name] for column in _MESSAGE}
    return cast(Message, {"id": value.pop("id"), "object": "thread.message", **value})


def _run(row: Any, prefix: str = "") -> Run:
    value = {column.name: row[prefix + column.name] for column in _RUN}
    return cast(Run, {"id": value.pop("id"), "object": "thread.run", **value})


def _stored(row: Row[Any]) -> Stored:
    mapping = row._mapping
    message = _message(mapping)
    if message["run_id"] is None:
        return Stored(entry(message), None)
    run = _run(mapping, "run.")
    steps = mapping["run.steps"]
    return Stored(entry(message, run, steps), None if run["status"] in TERMINAL else mapping["run.place"])


def _take_turns(connection: Connection, *names: str) -> None:
    # Until the transaction ends. SQLite's one writer needs none of it.
    if connection.dialect.name == "postgresql":
        digest = hashlib.sha256("\0".join(("assistream", *names)).encode("utf-8", "surrogatepass")).digest()
        number = sa.literal(int.from_bytes(digest[:8], signed=True), sa.BigInteger)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))
