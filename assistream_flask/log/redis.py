"""The log in Redis: for any number of workers on any number of machines.

A thread's log is one stream, whose ids are ``<epoch>-<offset>`` themselves: an epoch is the time at which the stream
began, in microseconds, so a later one is greater. Its first entry, at offset 0, is a placeholder, not an event. What is
appended is published in the same step; each worker hears of all its viewers' threads on one connection. What the
channel drops, the offsets show: then the stream is read, and where that has a gap too the position has expired.

Of a thread that is gone the stream is its last event alone, with a second field, and nothing comes after it.

All streams together have a budget, see :class:`RedisLog`. The scripts keep its accounts in Redis, and shed streams a
few at a time: as they append, and as each worker looks after its own.

Commands: https://redis.io/docs/latest/commands/ (Redis 7 or newer, not a cluster); what is used is
in :mod:`.redis_requirements`, and the scripts are in ``lua/``.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import resources
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .. import sse
from ..events import Event, dumps
from ..platform.log_throttle import LogThrottle
from . import redis_requirements
from .cursor import READ_BYTES, Cursor
from .protocol import (
    GONE_SECONDS,
    REFUSED,
    AppendRequest,
    Claim,
    EventId,
    LogUnavailableError,
    PositionExpiredError,
    Record,
)
from .thread_buffer import ThreadBuffer, ThreadBuffers

_log = logging.getLogger(__name__)


SECONDS: Final = 2.0
"""How long any answer of Redis is waited for."""
CHECK_SECONDS: Final = 1.5
"""How often each viewed thread is looked up, in case that its stream or a message was lost."""
LOCK_SECONDS: Final = 5.0
"""A lock that was held so long has a dead holder."""
CLAIM_SECONDS: Final = 86_400
"""How long is known who has a run that another had: no worker comes back later and goes on."""
# The budget's least: a smaller Redis has room for nothing.
_LEAST_BYTES: Final = 1 << 20
_AGAIN_SECONDS: Final = 0.5
# A crowd that arrives at once waits for a connection, and Redis is not away for that.
_QUEUE_SECONDS: Final = 15
_KEEP: Final = 512


def lua(name: str) -> str:
    """Read the script ``lua/<name>.lua``. Each but ``common`` calls functions of that one, which goes before it."""
    return resources.files(__package__).joinpath("lua", f"{name}.lua").read_text("utf-8")


class _ViewedBuffer(ThreadBuffer):
    """A thread that this worker has viewers of; exact once ``ready``."""

    def __init__(self, most: int) -> None:
        super().__init__("0")
        self.most = most
        self.heard = threading.Event()
        self.ready = False
        self.early: list[tuple[str, int, list[bytes]]] = []
        self.known = 0

    def feed(self, at: float, epoch: str, first: int, bodies: list[bytes], *, gap: bool = True) -> None:
        """Take what was appended from offset ``first`` on; ``gap`` lets it go on behind a hole, which readers
        fill from the stream."""
        with self.guard:
            new = self.take(at, epoch, first, bodies, gap)
        if new:
            self.wake()

    def take(self, at: float, epoch: str, first: int, bodies: list[bytes], gap: bool = True) -> bool:
        """Do it, and give whether that was new. The caller holds ``guard``."""
        if not self.ready:
            self.early.append((epoch, first, bodies))
            return False
        mine, last = self.event_id
        if int(epoch) < int(mine) or (first > last + 1 and not gap and epoch == mine):
            return False
        if epoch != mine or first > last + 1:
            self.restart(EventId(epoch, first - 1))
        elif first + len(bodies) <= last + 1:
            # An echo: its readers must not wake for nothing. Or what was before is forgotten.
            if not bodies:
                self.trim(last + 1 - first, 1 << 20, 0)
            return False
        known = max(0, self.event_id.offset + 1 - first)
        records = [_record(epoch, first + n, body) for n, body in enumerate(bodies[known:], known)]
        self.add(at, [(record.name, record.key, record.frame) for record in records])
        self.trim(self.most, 1 << 20, 0)
        return True


class RedisLog:
    """The log in the Redis that ``url`` names, see :class:`..Log`.

    A thread's stream keeps at most ``max_events`` events and about ``max_bytes`` bytes, and is dropped when nothing
    was appended, and nobody read it, for ``max_age`` seconds. All streams of this database together keep about
    ``max_memory`` bytes, and no more than half of that Redis's ``maxmemory``, which claims, connections and copies need
    too: beyond that, those that were not used for longest go, and of those that somebody views, in any worker, once
    there are no others, the older half. Connects in the background.
    """

    shared = True

    def __init__(
        self,
        url: str,
        *,
        max_events: int = 10_000,
        max_bytes: int = 8 << 20,
        max_memory: int = 128 << 20,
        max_age: float = 600,
        connections: int = 16,
        throttle: LogThrottle | None = None,
    ) -> None:
        self._throttle = throttle or LogThrottle()
        self._max_events, self._max_bytes, self._ttl = max_events, max_bytes, int(max_age * 1000)
        self._max_memory = self._budget = max_memory
        # The library's own defaults would try for a minute, in silence.
        options: dict[str, Any] = {"socket_connect_timeout": SECONDS, "retry": Retry(NoBackoff(), 0), "protocol": 2}
        self._redis = redis.Redis(
            # One more than _do() lets in: for _meet().
            connection_pool=redis.ConnectionPool.from_url(
                url, max_connections=connections + 1, socket_timeout=SECONDS, **options
            )
        )
        # For the one that listens.
        self._lines = redis.ConnectionPool.from_url(url, max_connections=1, socket_timeout=SECONDS, **options)
        # Channels are the same in all databases of a server, so the database is in the name.
        base = f"assistream:{self._redis.connection_pool.connection_kwargs.get('db') or 0}"
        self._prefix, self._locked, self._signal = f"{base}:", f"{base}-locks", f"{base}-signal".encode()
        self._claims = f"{base}-claim:"
        common = lua("common")
        (
            self._append,
            self._fence,
            self._ends,
            self._restart,
            self._lock,
            self._end_unless_locked,
            self._unlock,
            self._left,
            self._shed,
        ) = (
            self._redis.register_script(common + lua(name))
            for name in ("append", "fence", "ends", "restart", "lock", "quiet", "unlock", "restart_expired", "shed")
        )
        self._forget = self._redis.register_script(common + lua("forget"))
        self._threads = ThreadBuffers(lambda: _ViewedBuffer(min(_KEEP, max_events)), time.monotonic, self._throttle)
        self._locks = ThreadBuffers(lambda: ThreadBuffer("0"), time.monotonic)
        self._attend: Callable[[str], None] = lambda thread_id: None
        self._line: Any = None
        self._sending = threading.Lock()
        self._linked = threading.Event()
        self._closed = threading.Event()
        self._again = 0.0
        # What is known to be wrong with this Redis and what to do; and when such may be said again.
        self._fix = ""
        self._room = threading.BoundedSemaphore(connections)
        self._run_id = ""
        for job in (self._listen, self._watch):
            threading.Thread(target=job, daemon=True, name="assistream-redis").start()

    def listen(self, attend: Callable[[str], None]) -> None:
        self._attend = attend

    # Writing

    def append(self, thread_id: str, events: Sequence[Event], claim: Claim | None = None) -> EventId:
        return self.append_all([AppendRequest(thread_id, events, claim)])[0] or self.end(thread_id)

    def append_all(self, told: Sequence[AppendRequest]) -> Sequence[EventId | None]:
        keys = [self._prefix + one.thread_id for one in told]
        bodies = [[_body(event) for event in one.events] for one in told]
        arguments: list[int | str | bytes] = [self._ttl, self._max_events, self._max_bytes, CLAIM_SECONDS * 1000]
        arguments += (self._locked, self._budget)
        for one, ours in zip(told, bodies, strict=True):
            held = self._locks.get(one.thread_id) if one.locked else None
            arguments += (one.thread_id, held.token if held else "")
            arguments += (self._claims + one.claim.run_id, one.claim.number) if one.claim else ("", 0)
            arguments += [len(ours), *ours]
        found = self._do(lambda: self._append(keys, arguments))
        event_ids = [REFUSED if event_id == b"" else event_id and self._event_id(event_id) for event_id in found]
        for one, ours, event_id in zip(told, bodies, event_ids, strict=True):
            buffer = self._threads.get(one.thread_id)
            if buffer is not None and ours and event_id and event_id is not REFUSED:
                # Its own viewers need not wait for the echo.
                buffer.feed(self._threads.clock(), event_id.epoch, event_id.offset + 1 - len(ours), ours, gap=False)
        return event_ids

    def fence(self, thread_id: str, claim: Claim) -> None:
        self._do(lambda: self._fence([self._claims + claim.run_id], [claim.number, CLAIM_SECONDS * 1000]))

    def viewed(self) -> list[str]:
        return self._threads.used()

    def restart(self, thread_id: str, *, keep: bool = False, holes: Collection[str] = ()) -> None:
        self._do(lambda: self._restart([self._prefix + thread_id], [self._ttl, int(keep), " ".join(holes)]))

    def forget(self, thread_id: str, last: Event) -> None:
        arguments: list[int | bytes] = [GONE_SECONDS * 1000, _body(last), self._ttl]
        self._do(lambda: self._forget([self._prefix + thread_id], arguments))

    def signal(self, thread_id: str) -> None:
        try:
            self._do(lambda: self._redis.publish(self._signal, thread_id))
        except LogUnavailableError:
            # Workers look at the store themselves too, only later.
            pass

    @contextmanager
    def lock(self, thread_id: str) -> Iterator[None]:
        with self._locks.using(thread_id) as ours, ours.lock:
            if ours.held:
                yield
                return
            mine = ours.token = self._acquire(thread_id)
            ours.held = 1
            try:
                yield
            finally:
                ours.held, ours.token = 0, b""
                try:
                    self._do(
                        lambda: self._unlock([self._locked, self._prefix + thread_id], [thread_id, mine, self._ttl])
                    )
                except LogUnavailableError:
                    # It runs out, and the log begins anew then.
                    pass

    def _acquire(self, thread_id: str) -> bytes:
        arguments: list[int | str] = [thread_id, int(LOCK_SECONDS * 1e6), self._ttl]
        for tries in range(2000):
            mine: bytes = self._do(lambda: self._lock([self._locked, self._prefix + thread_id], arguments))
            if mine:
                return mine
            time.sleep(min(0.001 * 2**tries, 0.02) * (0.5 + random.random()))
        raise LogUnavailableError

    # Reading

    def end(self, thread_id: str) -> EventId:
        return self._event_id(self._do(lambda: self._ends([self._prefix + thread_id], [self._ttl]))[0])

    def end_unless_locked(self, thread_id: str) -> EventId | None:
        arguments: list[int | str] = [thread_id, self._ttl]
        found = self._do(lambda: self._end_unless_locked([self._locked, self._prefix + thread_id], arguments))
        return self._event_id(found) if found else None

    def since(self, thread_id: str, event_id: EventId) -> list[Record]:
        return self._range(thread_id, event_id, None)

    def recover(self, thread_id: str, event_id: EventId, run_id: str) -> tuple[list[Record], EventId]:
        self._check_place(event_id)
        key = self._prefix + thread_id
        # In this order: what is put aside in between is found twice, and not never.
        new = self._do(lambda: self._redis.xrange(key))
        old = self._do(lambda: self._redis.xrange(f"{key}:past", str(event_id)))
        found = {self._event_id(id): fields for id, fields in [*old, *new]}
        records: list[Record] = []
        is_proven = False
        for at in sorted(at for at in found if at >= event_id):
            if at == (event_id.epoch, event_id.offset + 1):
                records.append(_record(at.epoch, at.offset, found[at][b"e"]))
            elif at != event_id and not (is_proven and not at.offset and _goes_on(found[at], event_id.epoch, run_id)):
                raise PositionExpiredError
            event_id, is_proven = at, True
        if not is_proven:
            raise PositionExpiredError
        return [record for record in records if record.key == run_id], event_id

    def subscribe(self, thread_id: str, event_id: EventId) -> Cursor:
        buffer = self._threads.enter(thread_id)
        try:
            self._follow(thread_id, buffer)
            if not buffer.has(event_id):
                # The stream may be ahead of what was heard of it.
                self._check([(thread_id, buffer)], patient=False)
                if not buffer.has(event_id):
                    self._range(thread_id, event_id, 1)
            return Cursor(self._threads, buffer, event_id, partial(self._older, thread_id))
        except BaseException:
            self._threads.leave(buffer)
            raise

    def _follow(self, thread_id: str, buffer: _ViewedBuffer) -> None:
        with buffer.lock:
            if buffer.ready:
                return
            buffer.heard.clear()
            buffer.early = []
            if not self._linked.wait(SECONDS):
                raise LogUnavailableError(self._fix)
            self._send("SUBSCRIBE", self._prefix + thread_id)
            if not buffer.heard.wait(SECONDS):
                raise LogUnavailableError
            event_id = self.end(thread_id)
            with buffer.guard:
                buffer.restart(event_id)
                buffer.ready = True
                for early in buffer.early:
                    buffer.take(self._threads.clock(), *early)
            buffer.wake()

    def _older(self, thread_id: str, event_id: EventId) -> list[Record]:
        """Give what a reader has to catch up with, a piece at a time."""
        return self._range(thread_id, event_id, 200)

    def _range(self, thread_id: str, event_id: EventId, count: int | None) -> list[Record]:
        self._check_place(event_id)
        # From the place itself on: it, or the one after it, shows that nothing is missing between.
        more = None if count is None else count + 1
        found = self._do(lambda: self._redis.xrange(self._prefix + thread_id, str(event_id), "+", more))
        first = self._event_id(found[0][0]) if found else None
        if first is None or first.epoch != event_id.epoch or first.offset > event_id.offset + 1:
            raise PositionExpiredError
        records, size = [], 0
        for id, fields in found:
            at = self._event_id(id)
            if at.offset > event_id.offset:
                records.append(_record(at.epoch, at.offset, fields[b"e"]))
                size += len(records[-1].frame)
                if count is not None and size > READ_BYTES:
                    break
        return records

    @staticmethod
    def _check_place(event_id: EventId) -> None:
        if not event_id.epoch.isdecimal() or len(event_id.epoch) > 18:
            raise PositionExpiredError

    # What is heard

    def _listen(self) -> None:
        while not self._closed.is_set():
            line: Any = None
            try:
                line = self._lines.get_connection()
                self._meet(line)
                channels = [self._prefix + thread_id for thread_id, _ in self._threads.all()]
                with self._sending:
                    line.send_command("SUBSCRIBE", self._signal, *channels)
                    self._line = line
                self._linked.set()
                self._fix = ""
                while not self._closed.is_set():
                    if not line.can_read(timeout=SECONDS):
                        self._send("PING")
                    self._hear(line.read_response())
            except Exception as error:
                # Whatever it is: a read that close() ends fails in many ways, and who stops listening is deaf for good.
                self._fix = self._say("heard", error, redis_requirements.advice(error))
            finally:
                with self._sending:
                    self._line = None
                    self._linked.clear()
                    if line is not None:
                        # What is subscribed ends with it: the next is this one, connected anew.
                        line.disconnect()
                        self._lines.release(line)
            self._closed.wait(_AGAIN_SECONDS * (0.5 + random.random()))

    def _meet(self, line: Any) -> None:
        """Have all logs begin anew where Redis started anew, or another took its place: that may have an older state,
        and would give ids out again that viewers have."""
        self._run_id = redis_requirements.check(line, f"{self._prefix}none")
        self._look_at_room()
        met = self._redis.get(f"{self._prefix}met")
        if met not in (None, self._run_id.encode()):
            for key in self._redis.scan_iter(f"{self._prefix}thread_*", count=1000):
                if not key.endswith(b":past"):
                    self._restart([key], [self._ttl])
        self._redis.set(f"{self._prefix}met", self._run_id)

    def _hear(self, told: Any) -> None:
        kind, channel, data = told if len(told) == 3 else (b"pong", b"", b"")
        if channel == self._signal:
            if kind == b"message":
                self._attend(data.decode())
            return
        buffer = self._threads.get(channel.decode().removeprefix(self._prefix))
        if buffer is None:
            return
        if kind == b"subscribe":
            buffer.heard.set()
        elif kind == b"message":
            head, _, rest = data.partition(b"\n")
            epoch, _, first = head.partition(b"-")
            bodies = rest.split(b"\0") if rest else []
            buffer.feed(self._threads.clock(), epoch.decode(), int(first), bodies)

    def _send(self, *command: str) -> None:
        with self._sending:
            try:
                if self._line is None:
                    raise LogUnavailableError
                self._line.send_command(*command)
            except (redis.RedisError, OSError) as error:
                raise LogUnavailableError from error

    def _watch(self) -> None:
        # Well before a stream that is viewed would expire.
        while not self._closed.wait(min(CHECK_SECONDS, self._ttl / 3000)):
            try:
                viewed = [
                    (thread_id, buffer) for thread_id, buffer in self._threads.all() if buffer.ready and buffer.users
                ]
                for at in range(0, len(viewed), 200):
                    self._check(viewed[at : at + 200])
                self._do(lambda: self._left([self._locked], [self._prefix, self._ttl]))
                self._do(self._look_at_room)
                self._do(lambda: self._shed([self._prefix], [self._ttl, self._budget]))
                if self._run_id:
                    # After a FLUSHALL.
                    self._do(lambda: self._redis.set(f"{self._prefix}met", self._run_id, nx=True))
            except LogUnavailableError:
                pass
            except Exception as error:
                self._throttle.error(_log, error, "looking after the log failed; it is tried again")

    def _look_at_room(self) -> None:
        found = int(self._redis.info("memory").get("maxmemory", 0))
        self._budget = min(self._max_memory, max(_LEAST_BYTES, found // 2)) if found else self._max_memory

    def _check(self, viewed: Sequence[tuple[str, _ViewedBuffer]], *, patient: bool = True) -> None:
        """Compare with the streams. What a ``patient`` one finds missing may be on its way until the next time."""
        before = [buffer.event_id.epoch for _, buffer in viewed]
        ends = self._do(lambda: self._ends([self._prefix + thread_id for thread_id, _ in viewed], [self._ttl]))
        for (_, buffer), epoch, found in zip(viewed, before, ends, strict=True):
            event_id = self._event_id(found)
            with buffer.guard:
                if buffer.event_id.epoch != epoch:
                    continue
                missing = event_id.offset if not patient else buffer.known
                behind = event_id.epoch != epoch or buffer.event_id.offset < missing
                if behind:
                    buffer.restart(event_id)
                buffer.known = event_id.offset if event_id.epoch == buffer.event_id.epoch else 0
            if behind:
                buffer.wake()

    # Upkeep

    def tend(self) -> None:
        """Keep house: the streams expire by themselves; what nobody views here any more is not listened to."""
        for thread_id, _ in self._threads.all():
            recent = self._threads.clock() - 5
            if self._threads.drop(thread_id, unless=lambda buffer, recent=recent: buffer.touched > recent):  # type: ignore[misc]
                try:
                    with self._sending:
                        if self._line is not None and self._threads.get(thread_id) is None:
                            self._line.send_command("UNSUBSCRIBE", self._prefix + thread_id)
                except (redis.RedisError, OSError):
                    # The next connection does not subscribe to it.
                    pass
        for thread_id, _ in self._locks.all():
            self._locks.drop(thread_id, unless=lambda buffer: False)

    def wake(self) -> None:
        self._threads.wake()

    def close(self) -> None:
        self.wake()
        self._closed.set()
        self._hang_up()
        self._redis.close()
        self._redis.connection_pool.disconnect()

    def _do(self, call: Callable[[], Any]) -> Any:
        # Who finds it away tells the others, so that not each waits for itself.
        if time.monotonic() < self._again or not self._room.acquire(timeout=_QUEUE_SECONDS):
            raise LogUnavailableError(self._fix)
        try:
            if time.monotonic() < self._again:
                raise LogUnavailableError(self._fix)
            return call()
        except Exception as error:
            # What close() takes a connection from fails in many ways.
            if not (self._closed.is_set() or isinstance(error, (redis.RedisError, OSError))):
                raise
            known = redis_requirements.advice(error)
            # Who listens has tried everything.
            fix = self._say("used", error, known and (self._fix or known))
            if not isinstance(error, redis.ResponseError):
                self._again = time.monotonic() + _AGAIN_SECONDS
            if isinstance(error, redis.exceptions.ReadOnlyError):
                # The address may lead to another server by now, and nothing would end these connections.
                self._redis.connection_pool.disconnect(inuse_connections=False)
                self._hang_up()
            raise LogUnavailableError(fix) from error
        finally:
            self._room.release()

    def _say(self, how: str, error: BaseException, fix: str) -> str:
        """Log that Redis cannot be ``how``, and what is to be done where that is known; give that."""
        if self._closed.is_set():
            pass
        elif fix:
            # Each is a kind of its own, whoever finds it.
            self._throttle.warn(_log, f"Redis cannot be used: {fix}".replace("%", "%%"), level=logging.ERROR)
        else:
            # The client's errors do not show in their repr() what they say.
            self._throttle.warn(_log, "Redis cannot be %s: %s: %s", how, type(error).__name__, error)
        return fix

    def _hang_up(self) -> None:
        with self._sending:
            if self._line is not None:
                self._line.disconnect()

    @staticmethod
    def _event_id(id: bytes) -> EventId:
        epoch, _, offset = id.decode().partition("-")
        return EventId(epoch, int(offset))


def _body(event: Event) -> bytes:
    return (event.key or "").encode() + b"\n" + sse.encode(event.name, dumps(event.data))


def _goes_on(first: dict[bytes, bytes], epoch: str, run_id: str) -> bool:
    """Tell whether a stream's first entry says that it goes on from that epoch, and misses nothing of the run."""
    return first.get(b"from") == epoch.encode() and run_id.encode() not in first[b"holes"].split()


def _record(epoch: str, offset: int, body: bytes) -> Record:
    key, event, _ = body.split(b"\n", 2)
    event_id = EventId(epoch, offset)
    # See sse.encode: the id comes last.
    frame = b"%bid: %b\n\n" % (body[len(key) + 1 : -1], str(event_id).encode())
    return Record(event_id, event[7:].decode(), key.decode() or None, frame)
