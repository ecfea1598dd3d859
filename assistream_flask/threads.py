"""The thread store: threads, messages, runs and given answers, in SQL.

Objects go in and come out as the JSON of the API. The text of a message that grows is stored
with the place in the log as of which it is exact, so that text plus later events is the whole.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from . import database, migrations, schema
from .errors import ConfigurationError
from .events import TERMINAL, Json, entry
from .schema import answers, messages, runs, threads

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
_ADD_MESSAGE, _ADD_RUN = messages.insert(), runs.insert()
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
_ASKED = (
    sa.select(messages.c.thread_id, messages.c.position, runs.c.group_id, runs.c.mode)
    .join_from(messages, runs, runs.c.id == messages.c.run_id)
    .where(messages.c.id == _THIS)
    .subquery()
)
_BESIDE = sa.select(runs.c.message_id).where(runs.c.group_id == _ASKED.c.group_id, _ASKED.c.mode == "parallel")
_HISTORY = (
    # A thread may have thousands: what nobody needs of them costs more than all else of a request.
    sa.select(messages.c.id, messages.c.role, messages.c.assistant_id, messages.c.content)
    .where(
        messages.c.thread_id == _ASKED.c.thread_id,
        messages.c.position < _ASKED.c.position,
        messages.c.id.not_in(_BESIDE),
    )
    .order_by(messages.c.position)
)
# What was let go of is nobody's, also while its row still names the last who had it.
_HELD = (runs.c.worker == sa.bindparam("mine"), _LIVING, runs.c.lease > 0)
_SAVE_RUN = runs.update().where(runs.c.id == _THIS, *_HELD)
_SAVE_MESSAGE = messages.update().where(messages.c.id == _THIS)


def _unlocked(*where: sa.ColumnElement[bool]) -> sa.Select[str]:
    # Rows that another transaction holds are passed over: two that wait for many rows can be a deadlock.
    return sa.select(runs.c.id).where(*where).with_for_update(skip_locked=True)


_MINE = _unlocked(runs.c.id.in_(sa.bindparam("these", expanding=True)), *_HELD)


class Owner(NamedTuple):
    """A caller: ``scope`` is the blueprint's registered name, so two blueprints share nothing."""

    scope: str
    name: str


class Answer(NamedTuple):
    """The first answer to an Idempotency-Key. ``fingerprint`` tells one request from another."""

    key: str
    fingerprint: str
    status: int
    body: Json
    place: str | None = None
    thread_id: str | None = None


class Stored(NamedTuple):
    """An entry as stored, and the place in the log as of which it is exact (``None``: no event yet)."""

    entry: Json
    place: str | None


class Said(NamedTuple):
    """What a model is to know of a message."""

    id: str
    role: str
    assistant_id: str | None
    content: list[Json]


class Held(NamedTuple):
    """A run that is not over, with what its worker needs: see :mod:`.runner`."""

    run: Json
    message: Json
    steps: list[Json]
    position: int
    scope: str
    group_id: str
    mode: str
    place: str | None
    upstream: Json | None
    lease: float


State = tuple[Json, Json, list[Json], str | None, Json | None]
"""What there is to store of a run that goes on: the run, its message, its steps, the place in the log as of which they
are exact, and the state of its upstream."""


class AnsweredBefore(Exception):
    """The Idempotency-Key has an answer already; it was given between the look-up and the write."""


class TooManyRuns(Exception):
    """The caller has as many runs that are not over as allowed."""


class ThreadStore:
    """Threads in the database that ``url`` names (an SQLAlchemy URL), over at most ``pool`` connections.

    The schema is created at first use, and an older one is upgraded. Raises :class:`ConfigurationError` for a
    URL that cannot work, or a schema newer than this code. SQLite takes no ``pool``: it has one writer.
    """

    def __init__(self, url: str, pool: int = 10) -> None:
        self._engine = database.open_engine(url, pool)
        sqlite = self._engine.dialect.name == "sqlite"
        # SQLite has one writer: a greenlet that waits for it inside SQLite would stop the one that holds it.
        self._writer: AbstractContextManager[object] = threading.RLock() if sqlite else nullcontext()
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
        with self._writer, self._writes.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._reader, self._engine.connect() as connection:
            yield connection

    def _create(self) -> None:
        with self._write() as connection:
            # Of workers that start at once the first does it, and the others find it done.
            _take_turns(connection, "schema")
            recorded = sa.inspect(connection).has_table(schema.schema.name)
            newest = sa.select(sa.func.max(schema.schema.c.version))
            found = connection.execute(newest).scalar() if recorded else None
            if found is None:
                schema.metadata.create_all(connection)
                connection.execute(schema.schema.insert().values(version=schema.VERSION))
                migrations.stamp(connection, schema.VERSION)
            elif found < schema.VERSION:
                migrations.upgrade(connection, found)
                connection.execute(schema.schema.update().values(version=schema.VERSION))
            elif found > schema.VERSION:
                raise ConfigurationError(
                    f"the database has schema version {found}, this assistream knows {schema.VERSION}: "
                    "upgrade assistream, or use another ASSISTREAM_DATABASE_URL"
                )

    def close(self) -> None:
        """Closes the pooled connections."""
        # The one connection of a database in memory may be at work in another thread.
        with self._reader:
            self._engine.dispose()

    # Threads

    def create_thread(self, owner: Owner, thread: Json, answer: Answer | None = None) -> None:
        """Stores ``thread`` as ``owner``'s. Raises :class:`AnsweredBefore`."""
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
        """Tells whether the thread exists and is ``owner``'s."""
        with self._read() as connection:
            return connection.execute(_OWNS, {"this": thread_id, **_named(owner)}).first() is not None

    def threads(self, owner: Owner, limit: int, before: str | None) -> tuple[list[Json], bool] | None:
        """Gives ``owner``'s threads older than ``before``, newest first, and whether there are more;
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
        """Deletes the thread and all that is in it."""
        with self._write() as connection:
            # Before all else, as in add(): whoever else works on the thread comes wholly before or after.
            connection.execute(_HOLD, {"this": thread_id})
            connection.execute(answers.delete().where(answers.c.thread_id == thread_id))
            connection.execute(runs.delete().where(runs.c.thread_id == thread_id))
            connection.execute(messages.delete().where(messages.c.thread_id == thread_id))
            connection.execute(threads.delete().where(threads.c.id == thread_id))

    # Messages and runs

    def add(
        self,
        owner: Owner,
        thread_id: str,
        message: Json | None,
        started: Sequence[tuple[Json, Json]] = (),
        *,
        mode: str = "parallel",
        group_id: str = "",
        worker: str = "",
        lease: float = 0,
        place: str | None = None,
        max_runs: int | None = None,
        answer: Answer | None = None,
    ) -> int | None:
        """Stores the user's message and, for each pair of ``started``, a run and its message, in this order.

        Gives the position of the first of them, ``None`` when the thread is gone.
        Raises :class:`AnsweredBefore`, :class:`TooManyRuns`.
        """
        with self._write() as connection:
            if connection.execute(_HOLD, {"this": thread_id}).first() is None:
                return None
            self._remember(connection, owner, answer)
            if max_runs is not None and started:
                # Two that count at once would both find room.
                _take_turns(connection, "runs", *owner)
                if (connection.execute(_COUNT, _named(owner)).scalar() or 0) + len(started) > max_runs:
                    raise TooManyRuns
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
                    "place": place,
                    "worker": worker,
                    "lease": lease,
                    "cancel_requested": False,
                }
                connection.execute(_ADD_RUN, [{**_columns(run, _RUN), **ours} for run, _ in started])
        return position

    def page(self, thread_id: str, limit: int, before: str | None = None) -> tuple[list[Stored], bool] | None:
        """Gives the newest entries (older than the message ``before``), in order, and whether there are
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

    def history(self, message_id: str) -> list[Said]:
        """Gives what the run of the message ``message_id`` may see, in order: the messages before it, without
        the replies of its own group where that runs in parallel."""
        with self._read() as connection:
            return [Said(*row) for row in connection.execute(_HISTORY, {"this": message_id})]

    def run(self, thread_id: str, run_id: str) -> Json | None:
        """Gives a run of the thread."""
        query = sa.select(*_RUN).where(runs.c.id == run_id, runs.c.thread_id == thread_id)
        with self._read() as connection:
            row = connection.execute(query).first()
        return None if row is None else _run(row._mapping)

    def save(
        self,
        worker: str,
        run: Json,
        message: Json,
        steps: list[Json],
        place: str | None,
        upstream: Json | None = None,
    ) -> bool:
        """Stores the run with its message, its steps and the state of its upstream, as of ``place``. Gives ``False``,
        and stores nothing, when the run is not ``worker``'s any more or is over or gone."""
        ours = {"steps": steps, "place": place, "upstream": upstream, "this": run["id"], "mine": worker}
        with self._write() as connection:
            if not connection.execute(_SAVE_RUN, {**_columns(run, _RUN_CHANGES), **ours}).rowcount:
                return False
            connection.execute(_SAVE_MESSAGE, {**_columns(message, _MESSAGE_CHANGES), "this": message["id"]})
        return True

    def save_grown(self, worker: str, states: Sequence[State]) -> set[str]:
        """Stores, at once, what has grown in runs whose status was stored before. Gives the ids of those; of another,
        :meth:`save` tells whether it is ``worker``'s."""
        if not states:
            return set()
        with self._write() as connection:
            ids = [run["id"] for run, *_ in states]
            mine = set(connection.execute(_MINE, {"mine": worker, "these": ids}).scalars())
            found = [state for state in states if state[0]["id"] in mine]
            if found:
                connection.execute(
                    _SAVE_RUN,
                    [
                        {"steps": steps, "place": place, "upstream": upstream, "this": run["id"], "mine": worker}
                        for run, _, steps, place, upstream in found
                    ],
                )
                connection.execute(
                    _SAVE_MESSAGE,
                    [{"content": message["content"], "this": message["id"]} for _, message, *_ in found],
                )
        return mine

    # Who works on what

    def held(self, *where: sa.ColumnElement[bool]) -> list[Held]:
        """Gives the runs that are not over, oldest first, of those that ``where`` (a condition on
        :data:`.schema.runs`) selects."""
        query = (
            sa.select(messages, *_prefixed(runs), threads.c.scope)
            .select_from(
                runs.join(messages, messages.c.id == runs.c.message_id).join(threads, threads.c.id == runs.c.thread_id)
            )
            .where(_LIVING, *where)
            .order_by(messages.c.thread_id, messages.c.position)
        )
        with self._read() as connection:
            rows = connection.execute(query).all()
        found = []
        for row in rows:
            whole, ours = _stored(row).entry, row._mapping
            found.append(
                Held(
                    whole["run"],
                    whole["message"],
                    whole["steps"],
                    ours["position"],
                    ours["scope"],
                    ours["run.group_id"],
                    ours["run.mode"],
                    ours["run.place"],
                    ours["run.upstream"],
                    ours["run.lease"],
                )
            )
        return found

    def busy_before(self, thread_id: str, position: int, group_id: str | None) -> bool:
        """Tells whether a run of the thread that stands before ``position``, and is not of the group, is not over."""
        values = {"this": thread_id, "before": position, "beside": group_id or ""}
        with self._read() as connection:
            return connection.execute(_BUSY, values).first() is not None

    def renew(self, worker: str, run_ids: Collection[str], lease: float) -> list[str]:
        """Extends the leases of those runs that are ``worker``'s to the Unix time ``lease``; gives the ids of those
        to cancel."""
        renewed = _free(runs.c.worker == worker, _LIVING, runs.c.id.in_(run_ids)).values(lease=lease)
        with self._write() as connection:
            rows = connection.execute(renewed.returning(runs.c.id, runs.c.cancel_requested)).all()
        return [run_id for run_id, cancel in rows if cancel]

    def claim(self, run_id: str, worker: str, lease: float) -> bool:
        """Makes ``worker`` the holder of a run whose lease ran out; ``False`` when another was first."""
        where = (runs.c.id == run_id, _LIVING, runs.c.lease < time.time())
        with self._write() as connection:
            return bool(connection.execute(runs.update().where(*where).values(worker=worker, lease=lease)).rowcount)

    def release(self, worker: str, run_id: str | None = None) -> None:
        """Lets go of ``worker``'s queued runs, or of the one named, for the next worker to pick up at once."""
        which = runs.c.status == "queued" if run_id is None else runs.c.id == run_id
        with self._write() as connection:
            connection.execute(_free(runs.c.worker == worker, which).values(lease=0))

    def request_cancel(self, run_id: str) -> None:
        """Asks the worker that holds the run to cancel it."""
        with self._write() as connection:
            connection.execute(runs.update().where(runs.c.id == run_id).values(cancel_requested=True))

    # Idempotency

    def answer(self, owner: Owner, key: str) -> Answer | None:
        """Gives the answer that ``owner`` got first for this Idempotency-Key."""
        where = (answers.c.scope == owner.scope, answers.c.owner == owner.name, answers.c.key == key)
        columns = (answers.c.key, answers.c.fingerprint, answers.c.status, answers.c.body, answers.c.place)
        with self._read() as connection:
            row = connection.execute(sa.select(*columns).where(*where)).first()
        return None if row is None else Answer(*row)

    def remember(self, owner: Owner, answer: Answer) -> None:
        """Stores an answer that goes with no other change. Raises :class:`AnsweredBefore`."""
        with self._write() as connection:
            self._remember(connection, owner, answer)

    def _remember(self, connection: Connection, owner: Owner, answer: Answer | None) -> None:
        if answer is None:
            return
        values = {**answer._asdict(), "scope": owner.scope, "owner": owner.name, "created_at": int(time.time())}
        try:
            connection.execute(answers.insert().values(values))
        except sa.exc.IntegrityError as error:
            raise AnsweredBefore from error

    def forget_answers(self, before: int) -> None:
        """Drops answers given before the Unix time ``before``."""
        key = (answers.c.scope, answers.c.owner, answers.c.key)
        # What another transaction holds is left for the next time: two that wait for many rows can be a deadlock.
        old = sa.select(*key).where(answers.c.created_at < before).with_for_update(skip_locked=True)
        with self._write() as connection:
            connection.execute(answers.delete().where(sa.tuple_(*key).in_(old)))


def thread_object(row: Any) -> Json:
    """Gives the public thread object."""
    return {"id": row["id"], "object": "thread", "created_at": row["created_at"], "metadata": row["metadata"]}


def _named(owner: Owner) -> Json:
    return {"scope": owner.scope, "owner": owner.name}


def _free(*where: sa.ColumnElement[bool]) -> sa.Update:
    return runs.update().where(runs.c.id.in_(_unlocked(*where)))


def _columns(value: Json, columns: list[sa.Column[Any]]) -> Json:
    return {column.name: value[column.name] for column in columns}


def _prefixed(table: sa.Table) -> list[sa.Label[Any]]:
    return [column.label(f"run.{column.name}") for column in table.c]


def _entries() -> sa.Select[Any]:
    joined = messages.outerjoin(runs, runs.c.id == messages.c.run_id)
    return sa.select(messages, *_prefixed(runs)).select_from(joined)


def _message(row: Any) -> Json:
    value = {column.name: row[column.name] for column in _MESSAGE}
    return {"id": value.pop("id"), "object": "thread.message", **value}


def _run(row: Any, prefix: str = "") -> Json:
    value = {column.name: row[prefix + column.name] for column in _RUN}
    return {"id": value.pop("id"), "object": "thread.run", **value}


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
