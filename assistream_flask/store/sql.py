"""The thread store: threads, messages, runs and the replies to idempotency keys, in SQL.

Objects go in and come out as the JSON of the API. The text of a message that grows is stored
with the event id as of which it is exact, so that text plus later events is the whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import ConfigurationError
from ..events import Json, Said, dumps, text_of
from ..platform.threads import give_way
from ..types import Message, Run, Step, Thread
from . import database, migrations, tables
from .rows import (
    HOLD,
    LEASE,
    LIVING,
    MESSAGE,
    MESSAGE_CHANGES,
    PARKED,
    RUN,
    RUN_CHANGES,
    SAVE_MESSAGE,
    THIS,
    columns,
    leased,
    prefixed,
    remember,
    run_of,
    stored,
)
from .rows import LAPSED as LAPSED
from .rows import RELEASED as RELEASED
from .rows import AnsweredBefore as AnsweredBefore
from .rows import LeasedRun as LeasedRun
from .rows import Owner as Owner
from .rows import State as State
from .rows import Stored as Stored
from .rows import StoredAnswer as StoredAnswer
from .tables import answers, items, messages, runs, threads, tool_calls, workers
from .thread_change import ThreadChange, close_calls, said

PAGE_BYTES: Final = 2 << 20
"""Bytes of messages and steps that a page of more than one entry has at most: each of many readers may hold one."""

# Statements on a request's way to its first words, and of what is stored all the time: SQLAlchemy takes ten times as
# long for one that is made anew.
_OWNED = (threads.c.scope == sa.bindparam("scope"), threads.c.owner == sa.bindparam("owner"))
_OWNS = sa.select(threads.c.number).where(threads.c.id == THIS, *_OWNED)
_COUNT = (
    sa.select(sa.func.count(), sa.func.count().filter(PARKED))
    .select_from(runs.join(threads, threads.c.id == runs.c.thread_id))
    .where(LIVING, *_OWNED)
)
_THREAD = [threads.c.id, threads.c.created_at, threads.c.metadata]
_THREADS = sa.select(sa.func.count()).select_from(threads).where(*_OWNED)
_LAST = sa.select(
    # By itself, which SQLite looks up in the index where it would else read the whole thread.
    sa.select(sa.func.max(messages.c.position)).where(messages.c.thread_id == THIS).scalar_subquery(),
    sa.exists().where(runs.c.thread_id == THIS, PARKED),
)
_NOW = sa.select(database.Now())
_ADD_THREAD, _ADD_MESSAGE, _ADD_RUN = threads.insert(), messages.insert(), runs.insert().values(lease=LEASE)
_BUSY = (
    sa.select(runs.c.id)
    .join(messages, messages.c.id == runs.c.message_id)
    .where(
        runs.c.thread_id == THIS,
        LIVING,
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
    .where(messages.c.id == THIS)
    .subquery()
)
_BESIDE = sa.exists().where(
    runs.c.message_id == messages.c.id, runs.c.group_id == _ASKED.c.group_id, _ASKED.c.mode == "parallel"
)
_HISTORY = (
    # A thread may have thousands: what nobody needs of them costs more than all else of a request.
    sa.select(
        messages.c.position,
        messages.c.assistant_id,
        messages.c.content,
        messages.c.status,
        messages.c.run_id,
        sa.exists().where(items.c.run_id == messages.c.run_id).label("has_items"),
    )
    .where(
        messages.c.thread_id == _ASKED.c.thread_id,
        messages.c.position < _ASKED.c.position,
        messages.c.position < sa.bindparam("before"),
        ~_BESIDE,
    )
    .order_by(messages.c.position.desc())
    .limit(sa.bindparam("some"))
)
# So many at a time: a worker that reads millions of characters in one go does nothing else meanwhile.
_FEWEST, _FIRST, _MOST = 16, 64, 500
_SIZES = (
    sa.select(
        messages.c.position,
        (
            sa.func.length(sa.cast(messages.c.content, sa.Text))
            + sa.func.coalesce(sa.func.length(sa.cast(runs.c.steps, sa.Text)), 0)
        ).label("bytes"),
    )
    .select_from(messages.outerjoin(runs, runs.c.id == messages.c.run_id))
    .where(messages.c.thread_id == THIS, messages.c.position < sa.bindparam("before"))
    .order_by(messages.c.position.desc())
    .limit(sa.bindparam("some"))
    .subquery("sizes")
)
# What each has with all that are newer.
_SUMS = sa.select(_SIZES, sa.func.sum(_SIZES.c.bytes).over(order_by=_SIZES.c.position.desc()).label("sum")).subquery(
    "sums"
)
# The newest entry is on a page however long it is.
_FITS = sa.or_(_SUMS.c.sum <= sa.bindparam("most"), _SUMS.c.sum == _SUMS.c.bytes)
_CUT = sa.select(sa.func.min(sa.case((_FITS, _SUMS.c.position))).label("oldest"), sa.func.count().label("count")).cte(
    "cut"
)
# What was let go of is nobody's, also while its row still names the last who had it.
_HELD = (runs.c.worker == sa.bindparam("mine"), LIVING, runs.c.lease > 0)
MINE_NOW: Final = (*_HELD, runs.c.claim == sa.bindparam("by_claim"))
"""A run that is the worker ``mine``'s by its claim ``by_claim``, and is not over."""
_SAVE_RUN = runs.update().where(runs.c.id == THIS, *MINE_NOW)
_PARK = _SAVE_RUN.where(~runs.c.cancel_requested).values(worker="", lease=LEASE)


def _unlocked(*where: sa.ColumnElement[bool]) -> sa.Select[str]:
    # Rows that another transaction holds are passed over: two that wait for many rows can be a deadlock.
    return sa.select(runs.c.id).where(*where).with_for_update(skip_locked=True)


_THESE = runs.c.id.in_(sa.bindparam("these", expanding=True))
_MINE = _unlocked(_THESE, *_HELD).add_columns(runs.c.claim)
_TO_CANCEL = sa.select(runs.c.id).where(_THESE, runs.c.worker == sa.bindparam("mine"), LIVING, runs.c.cancel_requested)
_RENEW = runs.update().where(runs.c.id.in_(_unlocked(_THESE, *_HELD))).values(lease=LEASE)


def _close(connection: Any, _: object) -> None:
    # None where it broke.
    if connection is not None:
        connection.close()


class TooManyRunsError(Exception):
    """The caller has as many runs that are not over as allowed: of those that are no parked ones, or of both together
    where ``with_parked``."""

    def __init__(self, *, with_parked: bool) -> None:
        super().__init__()
        self.with_parked = with_parked


class TooManyThreadsError(Exception):
    """The caller has as many threads as allowed."""


class TooManyMessagesError(Exception):
    """The thread has no room for so many more messages."""


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
    def write(self) -> Iterator[Connection]:
        """Open a transaction that writes."""
        with self._writer, database.writing(self._writes) as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that reads."""
        with self._reader, self._engine.connect() as connection:
            yield connection

    def _create(self) -> None:
        with self.write() as connection:
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
        """Close the connections: those at work as they come back."""
        pool = self._engine.pool
        # The one connection of a database in memory may be at work in another thread.
        with self._reader:
            self._engine.dispose()
        # Others come back to a pool that nobody closes any more, and would stay open until it is collected.
        sa.event.listen(pool, "checkin", _close)
        pool.dispose()

    # Threads

    def create_thread(
        self, owner: Owner, thread: Thread, answer: StoredAnswer | None = None, *, max_threads: int = 0
    ) -> None:
        """Store ``thread`` as ``owner``'s, who may have ``max_threads`` (0: any number). Raises
        :class:`AnsweredBefore`, :class:`TooManyThreadsError`."""
        with self.write() as connection:
            remember(connection, owner, answer)
            if max_threads:
                # Two that count at once would both find room.
                _take_turns(connection, "threads", *owner)
                if (connection.execute(_THREADS, _named(owner)).scalar() or 0) >= max_threads:
                    raise TooManyThreadsError
            connection.execute(_ADD_THREAD, {**columns(thread, _THREAD), **_named(owner)})

    def owns(self, owner: Owner, thread_id: str) -> bool:
        """Tell whether the thread exists and is ``owner``'s."""
        with self.read() as connection:
            return connection.execute(_OWNS, {"this": thread_id, **_named(owner)}).first() is not None

    def thread(self, thread_id: str) -> Thread | None:
        """Give the public thread object."""
        with self.read() as connection:
            row = connection.execute(sa.select(threads).where(threads.c.id == thread_id)).first()
        return None if row is None else thread_object(row._mapping)

    def threads(self, owner: Owner, limit: int, before: str | None) -> tuple[list[Thread], bool] | None:
        """Give ``owner``'s threads older than ``before``, newest first, and whether there are more;
        ``None`` when ``before`` is not one of them."""
        query = sa.select(threads).where(*_OWNED).order_by(threads.c.number.desc()).limit(limit + 1)
        with self.read() as connection:
            if before is not None:
                number = connection.execute(_OWNS, {"this": before, **_named(owner)}).scalar()
                if number is None:
                    return None
                query = query.where(threads.c.number < number)
            rows = connection.execute(query, _named(owner)).all()
        return [thread_object(row._mapping) for row in rows[:limit]], len(rows) > limit

    def delete_thread(self, thread_id: str) -> None:
        """Delete the thread and all that is in it."""
        with self.write() as connection:
            # Before all else, as in add(): whoever else works on the thread comes wholly before or after.
            connection.execute(HOLD, {"this": thread_id})
            ours, thread = answers.c.thread_id == thread_id, answers.c.body["object"].as_string()
            connection.execute(answers.delete().where(ours, thread.is_distinct_from("thread")))
            # What is left is that of its creation, which its key shall not do once more.
            for body in connection.execute(sa.select(answers.c.body).where(ours)).scalars().all():
                connection.execute(answers.update().where(ours).values(body={**body, "metadata": {}}))
            # The runs before what is theirs, as whoever stores a run has them.
            connection.execute(sa.select(runs.c.id).where(runs.c.thread_id == thread_id).with_for_update())
            for table in (tool_calls, items, runs, messages):
                connection.execute(table.delete().where(table.c.thread_id == thread_id))
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
        max_parked: int = 0,
        max_messages: int = 0,
        answer: StoredAnswer | None = None,
        change: Callable[[ThreadChange], None] | None = None,
    ) -> int | None:
        """Store the user's message and, for each pair of ``started``, a run and its message, in this order.

        The runs are ``worker``'s for ``lease`` seconds; with 0 they are anybody's. ``change`` changes parked runs of
        the thread before, in the same transaction, where it has any.

        Give the position of the first of them, ``None`` when the thread is gone.
        Raises :class:`AnsweredBefore`; :class:`TooManyRunsError` where the owner would have more than ``max_runs`` that
        are not over, with ``max_parked`` more that are parked; and :class:`TooManyMessagesError` where the thread would
        have more than ``max_messages`` (0: any number).
        """
        with self.write() as connection:
            if connection.execute(HOLD, {"this": thread_id}).first() is None:
                return None
            remember(connection, owner, answer)
            last, has_parked = connection.execute(_LAST, {"this": thread_id}).one()
            if change is not None and has_parked:
                # Before runs are counted: it ends some.
                change(ThreadChange(connection, thread_id))
            if max_runs is not None and started:
                # Two that count at once would both find room.
                _take_turns(connection, "runs", *owner)
                living, parked = connection.execute(_COUNT, _named(owner)).one()
                # Those that go on may park too, and parked ones go on: so both together have an end.
                if living - parked + len(started) > max_runs or living + len(started) > max_runs + max_parked:
                    raise TooManyRunsError(with_parked=living - parked + len(started) <= max_runs)
            position: int = (last or 0) + 1
            new = ([message] if message else []) + [reply for _, reply in started]
            # Positions have no gap: messages go with their thread only.
            if max_messages and position - 1 + len(new) > max_messages:
                raise TooManyMessagesError
            connection.execute(
                _ADD_MESSAGE, [{**columns(m, MESSAGE), "position": position + i} for i, m in enumerate(new)]
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
                connection.execute(_ADD_RUN, [{**columns(run, RUN), **ours} for run, _ in started])
        return position

    def page(
        self, thread_id: str, limit: int, before: str | None = None, most_bytes: int = PAGE_BYTES
    ) -> tuple[list[Stored], bool] | None:
        """Give the newest entries (older than the message ``before``), in order, and whether there are
        more; ``None`` when the thread is gone, or ``before`` is no message of it.

        They are at most ``limit``, and no more than have ``most_bytes`` together, as they are stored, but for the
        newest. The others are not read.
        """
        values = {"this": thread_id, "before": 1 << 62, "some": limit + 1, "most": most_bytes}
        with self.read() as connection:
            if before is not None:
                where = (messages.c.id == before, messages.c.thread_id == thread_id)
                position = connection.execute(sa.select(messages.c.position).where(*where)).scalar()
                if position is None:
                    return None
                values["before"] = position
            rows = connection.execute(_PAGE, values).all()
            if (
                not rows
                and not connection.execute(sa.select(threads.c.number).where(threads.c.id == thread_id)).first()
            ):
                return None
        newest = rows[:limit]
        return [stored(row) for row in newest][::-1], bool(rows) and rows[0]._mapping["count"] > len(newest)

    def history(self, message_id: str, characters: int, count: int) -> tuple[list[Said], bool]:
        """Give what the run of the message ``message_id`` may see, in order: the messages before it, without
        the replies of its own group where that runs in parallel; and whether there are older ones.

        Of many, the newest: at most ``count``, and no more than it takes to have ``characters``. It is read a few
        messages at a time, and between those the worker's others go on.
        """
        found: list[Said] = []
        at_run: dict[str, int] = {}
        left, before, some, is_cut = characters, 1 << 62, _FIRST, False
        while not is_cut:
            some = min(some, count + 1 - len(found))
            with self.read() as connection:
                values = {"this": message_id, "before": before, "some": some}
                rows = connection.execute(_HISTORY, values).all()
            for position, speaker, content, status, run_id, has_items in rows:
                is_cut = left < 0 or len(found) == count
                if is_cut:
                    break
                if has_items:
                    at_run[run_id] = len(found)
                found.append(Said(speaker, text_of(content), status == "completed"))
                left, before = left - len(found[-1].text), position
            if len(rows) < some:
                break
            some = max(_FEWEST, min(_MOST, max(0, left) * len(found) // (characters - left + 1)))
            give_way()
        self._add_items(found, at_run, characters)
        return found[::-1], is_cut

    def _add_items(self, found: list[Said], at_run: Mapping[str, int], characters: int) -> None:
        """Add to what was said, the newest first, what its runs are resent as, a few runs at a time, and no more than
        so many characters of it: older runs are known by their text."""
        wanted = list(at_run)
        for start in range(0, len(wanted), _FEWEST):
            some = wanted[start : start + _FEWEST]
            with self.read() as connection:
                resent = said(connection, some)
            for run_id in some:
                theirs = resent.get(run_id, [])
                characters -= sum(len(dumps(item)) for item in theirs)
                if characters < 0:
                    return
                found[at_run[run_id]] = found[at_run[run_id]]._replace(items=theirs)
            give_way()

    def run(self, thread_id: str, run_id: str) -> Run | None:
        """Give a run of the thread."""
        with self.read() as connection:
            return run_of(connection, thread_id, run_id)

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
        with self.write() as connection:
            return save_state(connection, worker, (run, message, steps, event_id, upstream, claim))

    def save_grown(self, worker: str, states: Sequence[State]) -> set[str]:
        """Store, at once, what has grown in runs whose status was stored before. Give the ids of those; of another,
        :meth:`save` tells whether it is ``worker``'s."""
        if not states:
            return set()
        with self.write() as connection:
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
                    SAVE_MESSAGE,
                    [{"content": message["content"], "this": message["id"]} for _, message, *_ in found],
                )
        return {run["id"] for run, *_ in found}

    # Who works on what

    def held(self, *where: sa.ColumnElement[bool]) -> list[LeasedRun]:
        """Give the runs that are not over, oldest first, of those that ``where`` (a condition on
        :data:`.tables.runs`) selects."""
        with self.read() as connection:
            # Who waits for a person is nobody's loss, until the question expires.
            return leased(connection, LIVING, sa.or_(~PARKED, LAPSED), *where)

    def busy_before(self, thread_id: str, position: int, group_id: str | None) -> bool:
        """Tell whether a run of the thread that stands before ``position``, and is not of the group, is not over."""
        values = {"this": thread_id, "before": position, "beside": group_id or ""}
        with self.read() as connection:
            return connection.execute(_BUSY, values).first() is not None

    def renew(self, worker: str, run_ids: Collection[str], seconds: float) -> None:
        """Have the leases of those runs that are ``worker``'s end in so many seconds. Writes, or fails to, also where
        there is none."""
        with self.write() as connection:
            connection.execute(_RENEW, {"mine": worker, "these": list(run_ids), "term": seconds})

    def to_cancel(self, worker: str, run_ids: Collection[str]) -> list[str]:
        """Give those of ``worker``'s runs that somebody asked to cancel."""
        with self.read() as connection:
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
        with self.write() as connection:
            taken = runs.update().where(*as_read).values(worker=worker, lease=LEASE, claim=runs.c.claim + 1)
            if not connection.execute(taken, {"term": seconds}).rowcount:
                return None
            return leased(connection, runs.c.id == held.run["id"])[0]

    def now(self) -> float:
        """Give the time by the database's clock, in seconds since the epoch."""
        with self.read() as connection:
            return float(connection.execute(_NOW).scalar_one())

    def beat(self, worker: str, name: str, *, is_shared: bool) -> float:
        """Have all know that ``worker`` lives, which is ``name`` to people; give the time by the database's clock.

        ``is_shared`` says whether others read its event log."""
        lives = workers.update().where(workers.c.id == worker).values(seen=database.Now()).returning(workers.c.seen)
        with self.write() as connection:
            seen = connection.execute(lives).scalar()
            if seen is None:
                values = {"id": worker, "name": name[:255], "is_shared": is_shared, "seen": database.Now()}
                seen = connection.execute(workers.insert().values(values).returning(workers.c.seen)).scalar_one()
        return float(seen)

    def others(self, worker: str, seconds: float) -> list[str]:
        """Give the names of the workers but ``worker`` that were heard of within so many seconds."""
        lives = (workers.c.id != worker, workers.c.seen > database.Now() - seconds)
        with self.read() as connection:
            return list(connection.execute(sa.select(workers.c.name).where(*lives).order_by(workers.c.name)).scalars())

    def newest(self, thread_ids: Collection[str]) -> dict[str, tuple[int, int]]:
        """Give the position of each thread's newest message, and when that was created: 0 and 0 where there is none.
        Threads that are gone are left out."""
        with self.read() as connection:
            rows = connection.execute(_NEWEST, {"these": list(thread_ids)}).all()
        return {thread_id: (position or 0, created_at or 0) for thread_id, position, created_at in rows}

    def retire(self, worker: str) -> None:
        """Forget ``worker``, which left nothing behind."""
        with self.write() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker))

    def bury(self, seconds: float, since: float) -> list[str]:
        """Forget the workers that were not heard of for so many seconds, and have no run that is not over; give the
        threads that they had others in which went on after the Unix time ``since``. Of several that call at once, one
        is given them."""
        silent = workers.c.seen < database.Now() - seconds
        with self.read() as connection:
            # Seldom any, and what writes may have to wait.
            if connection.execute(sa.select(workers.c.id).where(silent).limit(1)).first() is None:
                return []
        busy = sa.exists().where(runs.c.worker == workers.c.id, LIVING)
        # Rows that another has are left to it: two that wait for many rows can be a deadlock.
        dead = sa.select(workers.c.id).where(silent, ~busy).with_for_update(skip_locked=True, of=workers)
        times = (runs.c.started_at, runs.c.completed_at, runs.c.failed_at, runs.c.cancelled_at)
        late = sa.or_(*(time > since for time in times))
        with self.write() as connection:
            gone = connection.execute(workers.delete().where(workers.c.id.in_(dead)).returning(workers.c.id))
            theirs = runs.c.worker.in_(gone.scalars().all())
            return list(connection.execute(sa.select(runs.c.thread_id).where(theirs, late).distinct()).scalars())

    def release(self, worker: str, *run_ids: str) -> None:
        """Let go of ``worker``'s queued runs, or of those named, for the next worker to pick up at once."""
        which = runs.c.id.in_(run_ids) if run_ids else runs.c.status == "queued"
        with self.write() as connection:
            connection.execute(_free(runs.c.worker == worker, which).values(lease=0))

    def request_cancel(self, run_id: str) -> None:
        """Ask the worker that holds the run to cancel it."""
        with self.write() as connection:
            connection.execute(runs.update().where(runs.c.id == run_id).values(cancel_requested=True))

    # Idempotency

    def answer(self, owner: Owner, key: str) -> StoredAnswer | None:
        """Give the answer that ``owner`` got first for this Idempotency-Key."""
        where = (answers.c.scope == owner.scope, answers.c.owner == owner.name, answers.c.key == key)
        columns = (answers.c.key, answers.c.fingerprint, answers.c.status, answers.c.body, answers.c.place)
        with self.read() as connection:
            row = connection.execute(sa.select(*columns).where(*where)).first()
        return None if row is None else StoredAnswer(*row)

    def remember(self, owner: Owner, answer: StoredAnswer) -> None:
        """Store an answer that goes with no other change. Raises :class:`AnsweredBefore`."""
        with self.write() as connection:
            remember(connection, owner, answer)

    def rename_owner(self, former: Owner, owner: Owner) -> None:
        """Give ``owner`` the threads of ``former``; where there are any, forget the answers ``former`` was given."""
        theirs = [(table.c.scope == former.scope, table.c.owner == former.name) for table in (threads, answers)]
        with self.read() as connection:
            if connection.execute(sa.select(threads.c.number).where(*theirs[0]).limit(1)).first() is None:
                return
        with self.write() as connection:
            connection.execute(threads.update().where(*theirs[0]).values(owner=owner.name))
            connection.execute(answers.delete().where(*theirs[1]))

    def forget_owner(self, owner: Owner) -> None:
        """Drop all answers that ``owner`` was given."""
        with self.write() as connection:
            connection.execute(answers.delete().where(answers.c.scope == owner.scope, answers.c.owner == owner.name))

    def forget_answers(self, before: int) -> None:
        """Drop answers given before the Unix time ``before``."""
        key = (answers.c.scope, answers.c.owner, answers.c.key)
        # What another transaction holds is left for the next time: two that wait for many rows can be a deadlock.
        old = sa.select(*key).where(answers.c.created_at < before).with_for_update(skip_locked=True)
        with self.write() as connection:
            connection.execute(answers.delete().where(sa.tuple_(*key).in_(old)))


def save_state(
    connection: Connection, worker: str, state: State, loop: Json | None = None, *, park: float | None = None
) -> bool:
    """Store a run that is ``worker``'s, with its message, and its ``loop`` where that is given; to ``park`` it for so
    many seconds is to let go of it. The calls of one that is over then are over too.

    Give ``False``, and store nothing, where it is not ``worker``'s by this claim any more, or is over or gone; or where
    it is to be parked, and somebody asked to cancel it."""
    run, message, steps, event_id, upstream, claim = state
    ours = {"steps": steps, "place": event_id, "upstream": upstream, **_by(run, worker, claim)}
    if loop is not None:
        ours["loop"] = loop
    statement = _SAVE_RUN
    if park is not None:
        statement, ours["term"] = _PARK, park
    if not connection.execute(statement, {**columns(run, RUN_CHANGES), **ours}).rowcount:
        return False
    connection.execute(SAVE_MESSAGE, {**columns(message, MESSAGE_CHANGES), "this": message["id"]})
    # A call is stored with its step: all others' ends are spared the statement.
    if any(step["type"] == "tool_calls" for step in steps):
        close_calls(connection, run)
    return True


def thread_object(row: Mapping[Any, Any]) -> Thread:
    """Give the public thread object."""
    return {"id": row["id"], "object": "thread", "created_at": row["created_at"], "metadata": row["metadata"]}


def _named(owner: Owner) -> Json:
    return {"scope": owner.scope, "owner": owner.name}


def _heard_of(worker: sa.Column[str] | str, *where: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.exists().where(workers.c.id == worker, *where)


def _by(run: Run, worker: str, claim: int) -> Json:
    return {"this": run["id"], "mine": worker, "by_claim": claim}


def _free(*where: sa.ColumnElement[bool]) -> sa.Update:
    return runs.update().where(runs.c.id.in_(_unlocked(*where)))


def _entries() -> sa.Select[Any]:
    joined = messages.outerjoin(runs, runs.c.id == messages.c.run_id)
    return sa.select(messages, *prefixed(runs)).select_from(joined)


_PAGE = (
    _entries()
    .add_columns(sa.select(_CUT.c.count).scalar_subquery().label("count"))
    .where(
        messages.c.thread_id == THIS,
        messages.c.position < sa.bindparam("before"),
        # Not a join: PostgreSQL would find the cut anew for each message.
        messages.c.position >= sa.select(_CUT.c.oldest).scalar_subquery(),
    )
    .order_by(messages.c.position.desc())
)


def _take_turns(connection: Connection, *names: str) -> None:
    # Until the transaction ends. SQLite's one writer needs none of it.
    if connection.dialect.name == "postgresql":
        digest = hashlib.sha256("\0".join(("assistream", *names)).encode("utf-8", "surrogatepass")).digest()
        number = sa.literal(int.from_bytes(digest[:8], signed=True), sa.BigInteger)
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(number)))
