"""An OpenAI stream in, deltas of an answer out, whatever dialect the model server speaks.

:func:`open` starts a run upstream; :func:`resume` goes on with one in the background, which any process began;
:func:`translate` takes a stream that exists already. All give an :class:`AnswerStream`: an iterator of lists
of deltas, one list a network read. :func:`cancel` ends a background response.
"""

from __future__ import annotations

import _thread
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import openai

from ..assistants import Assistant
from ..errors import RunError, masked
from ..events import Json, dumps
from ..fast.read_gate import ReadGate
from ..platform import openai_sdk
from . import background, event_reader, stale_connection
from .background import cancel
from .delivered import Delivered, Shown
from .deltas import Annotation, Begun, Call, Delta, End, Failed, Reasoning, Refusal, Source, Text
from .dialects import DIALECTS
from .errors import failure, of_exception, tells_failure
from .items import Turn, Unmark, closed, plain
from .protocol import Dialect, ModelRequest, Reading, Translator

__all__ = ["AnswerStream", "cancel", "open", "resume", "translate"]

_log = logging.getLogger(__name__)

LATE_SECONDS: Final = 2.0
"""So long a connection may be silent, but for heartbeats, behind the last word of an answer."""
_TRIES: Final = 3
NO_LIMIT: Final = float("inf")


class AnswerStream:
    """An answer that arrives. Iterating gives lists of deltas; the last delta of an answer is an
    :class:`.deltas.End`. Raises :class:`RunError` when the answer fails, a missing end included.

    Go on iterating after the end: it reads the connection empty, so that it can be used again. ``unmark`` takes a mark
    off the answer's beginning, and one with ``names`` is taken off what it is resent as. ``resumed`` is there where
    another stream told the first of the answer. An answer of more than ``most`` characters is cut there: it ends as one
    does that its server cut for its length, and nothing more is read.
    """

    def __init__(
        self,
        stream: Any,
        translator: Translator | None = None,
        place: background.ResumePoint | None = None,
        poll: background.Poll | None = None,
        unmark: Unmark | None = None,
        resumed: _Resumed | None = None,
        most: float = NO_LIMIT,
        names: Sequence[str] = (),
    ) -> None:
        self._stream, self._translator, self._place, self._poll = stream, translator, place, poll
        # How many characters may still come, and whether more came.
        self._room = max(0, most - resumed.delivered.characters) if resumed is not None else most
        self._is_full = False
        self._unmark, self._resumed, self._names = unmark, resumed, names
        self._delivered = resumed.delivered if resumed is not None else None
        self._update_state()
        self.gate: ReadGate | None = None
        """Where it is set, an empty list is given before each read that can be waited for there, and before the first
        that can't, until the end."""
        self._over = False
        # How often something was said; whether somebody waits for the connection to close, and until when.
        self._said = 0
        self._expires = False
        self._closed = threading.Event()

    def state(self) -> Json | None:
        """Give what :func:`resume` needs to go on behind the last list, as JSON for nobody to change.

        ``None`` unless this is a background response whose id is known (:class:`.deltas.Begun` says so). It costs
        nothing, so ask with each list, in the thread that iterates, and keep it with what the list was added to:
        in another thread it may be one list ahead of what that one was handed.
        """
        return self._state

    @property
    def source(self) -> Source | None:
        """Give what the model server says of the answer as a whole, once its end was given."""
        return self._translator.source if self._translator is not None else None

    def __iter__(self) -> Iterator[list[Delta]]:
        try:
            yield from self._read()
            if not self._over and self._poll is not None and self._end() is None:
                yield from self._polled(self._poll)
        except RunError:
            if self._over:
                return
            if held := self._held():
                yield held
            raise
        except Exception as error:
            if self._over:
                return
            broken = of_exception(error, "upstream_cut")
            # The SDK has one class for a connection that failed and one that broke later.
            code = "upstream_cut" if broken.code == "upstream_unreachable" else broken.code
            yield from self._settled(RunError(code, said=broken.said), error)
            return
        finally:
            self._closed.set()
        if not self._over:
            yield from self._settled(RunError("upstream_ended_early"))

    def _settled(self, otherwise: RunError, cause: Exception | None = None) -> Iterator[list[Delta]]:
        """Give the end of an answer whose stream is through. Raises ``otherwise`` where that is none."""
        end = self._end()
        if deltas := [*self._held(), *([self._bare(end)] if isinstance(end, End) else [])]:
            yield deltas
        if not isinstance(end, End):
            raise (otherwise if end is None else end.error) from cause

    def _end(self) -> End | Failed | None:
        """Give what the answer is, should nothing more come."""
        return self._translator.settled() if self._translator is not None else None

    def _held(self) -> list[Delta]:
        """Give what was held back of the answer's beginning. That of one that can be resumed is in its state."""
        return self._unmark.rest() if self._unmark is not None and self._state is None else []

    def _read(self) -> Iterator[list[Delta]]:
        # A place is counted in events.
        joined = self._place is None and self._translator is not None and self._translator.joins
        for batch in event_reader.read(self._stream, self.gate, joined=joined) if self._stream is not None else ():
            if self._over:
                continue
            if not batch:
                yield []
                continue
            texts = None
            if joined and self._unmark is None and self._translator is not None:
                texts = self._translator.texts(batch)
            if texts is None:
                yield from self._told(batch)
            elif texts:
                yield self._limited(texts)
            if self._is_full:
                return

    def _told(self, batch: list[tuple[str, Json]]) -> Iterator[list[Delta]]:
        """Give what a read says. Raises the error of an answer that failed once all before it was given."""
        deltas: list[Delta] = []
        failed: RunError | None = None
        try:
            for kind, data in batch:
                found, begins = self._translated(kind, data)
                deltas += found
                if begins:
                    self._update_state()
                    yield [*deltas, Begun()]
                    deltas = []
                if deltas and isinstance(deltas[-1], End | Failed):
                    break
        except RunError as error:
            # What came before it in the same read was said.
            failed = error
        deltas = self._unmarked(deltas)
        if deltas and isinstance(deltas[-1], Failed):
            failed = deltas[-1].error
            deltas = deltas[:-1]
        if self._delivered is not None:
            deltas = self._delivered.rest(deltas)
        deltas = self._limited(deltas)
        if self._is_full:
            failed = None
        self._note_end(deltas)
        # Also where all was held back, or had been delivered: what comes next is behind that.
        self._update_state()
        if deltas:
            self._said += 1
            yield deltas
        if failed is not None:
            raise failed

    def _note_end(self, deltas: Sequence[Delta]) -> None:
        self._over = bool(deltas) and isinstance(deltas[-1], End)
        if self._over or self._end() is not None:
            # Some servers send a finish reason with every piece: of those the last word is known later.
            self._expire(LATE_SECONDS if self._over or not deltas else 3 * LATE_SECONDS)

    def _limited(self, deltas: list[Delta]) -> list[Delta]:
        """Give the same as far as there is room, and then the answer's end."""
        self._room -= sum(map(_length, deltas))
        if self._room >= 0:
            return deltas
        while self._room < 0:
            last = deltas.pop()
            self._room += _length(last)
        if isinstance(last, Text | Refusal | Reasoning) and self._room:
            deltas.append(last._replace(value=last.value[: int(self._room)]))
        self._over = self._is_full = True
        _log.warning("an answer is cut that is longer than ASSISTREAM_MAX_ANSWER_CHARS allows")
        return [*deltas, End("max_tokens", None)]

    def _unmarked(self, deltas: list[Delta]) -> list[Delta]:
        if self._unmark is not None:
            deltas = self._unmark.take(deltas)
            if self._unmark.is_over and self._place is None:
                # It cannot be resumed: nobody needs its state.
                self._unmark = None
        if deltas and isinstance(end := deltas[-1], End):
            deltas[-1] = self._bare(end)
        return deltas

    def _bare(self, end: End) -> End:
        return end._replace(items=_without_mark(end.items, self._names)) if self._names and end.items else end

    def _translated(self, kind: str, data: Json) -> tuple[list[Delta], bool]:
        """Give the deltas of an event, and whether the answer begins with it."""
        self._translator = self._translator or _translator(kind, data)
        if self._translator is None or (self._place is not None and self._place.repeats(data)):
            return [], False
        found = self._translator.feed(kind, data)
        return found, self._place is not None and self._place.passes(kind, data)

    def _update_state(self) -> None:
        repeated = self._repeated()
        if repeated is not None:
            # What is told behind it was delivered.
            self._state: Json | None = repeated.state
            return
        place = self._place.state() if self._place is not None else None
        if place is not None and self._unmark is not None:
            place["mark"] = self._unmark.state()
        self._state = place

    def _repeated(self) -> _Resumed | None:
        """Give what is gone on with, while the server tells what was delivered: from the answer's start."""
        resumed = self._resumed
        is_past = self._delivered is not None and self._delivered.is_past
        return resumed if resumed is not None and resumed.from_start and not is_past else None

    def _expire(self, seconds: float) -> None:
        """End a connection that stays open behind the last word: some servers send no end, and heartbeats for ever."""
        if not self._expires:
            self._expires = True
            _thread.start_new_thread(self._wait_for_end, (seconds,))

    def _wait_for_end(self, seconds: float) -> None:
        said = -1
        while said != self._said:
            said = self._said
            if self._closed.wait(seconds):
                return
        if not event_reader.hang_up(self._stream):
            self.close()

    def _polled(self, poll: background.Poll) -> Iterator[list[Delta]]:
        """Give the rest of a response that is streamed no more, once it is over."""
        response = poll.wait()
        if self._state is not None and self._resumed is not None:
            # Another stream began the answer, or this one; it is told as a whole now.
            self._unmark = _unmark(self._names, self._state, from_start=True)
            self._resumed.delivered.from_start(self._state)
        assert self._place is not None, "what is polled is in the background"
        self._place = self._place.again(self._state)
        self._translator = self._place.translator
        yield from self._told([(f"response.{response['status']}", {"response": response})])

    def close(self) -> None:
        """Close the connection, and wait no longer for a polled response. Idempotent, from any greenlet or thread.

        The model server sees it and stops, unless it answers in the background: see :func:`cancel`.
        """
        if self._poll is not None:
            self._poll.close()
        event_reader.close(self._stream)


class _Resumed(NamedTuple):
    """What a stream goes on with: see :func:`resume`."""

    state: Json
    delivered: Delivered
    from_start: bool


def _without_mark(items: Sequence[Json], names: Sequence[str]) -> Sequence[Json]:
    """Give ``items`` without the mark that the first of their texts begins with."""
    first = next((at for at, item in enumerate(items) if item["type"] == "message"), None)
    if first is None:
        return items
    unmark, parts = Unmark(names), items[first]["content"]
    told = [*unmark.take([Text(0, parts[0]["text"])]), *unmark.rest()]
    text = "".join(part.value for part in told if isinstance(part, Text))
    bare = plain({**items[first], "content": [{**parts[0], "text": text}, *parts[1:]]})
    return [*items[:first], *([bare] if bare is not None else []), *items[first + 1 :]]


def _unmark(names: Sequence[str], state: Json, *, from_start: bool) -> Unmark | None:
    """Give what takes the mark off an answer that goes on behind ``state``, or is told again ``from_start``."""
    # A worker of an older release takes no marks off.
    mark = state.get("mark")
    if not mark:
        return None
    # Where that is over, what was taken off is counted: see Delivered.from_start().
    return Unmark(mark.get("names", names), mark if mark["over"] or not from_start else None)


def open(
    client: openai.OpenAI,
    assistant: Assistant,
    turns: Sequence[Turn],
    stall: float,
    names: Sequence[str] = (),
    key: str = "",
    most: float = NO_LIMIT,
    *,
    start: int = 0,
    may_call: bool = True,
    followup: Json | None = None,
) -> AnswerStream:
    """Ask ``assistant`` for the next message after ``turns``. ``stall`` is in seconds without a byte; ``names`` are
    the assistant's own, a mark with which is taken off its answer. A background response is asked for under ``key``:
    a server that knows an ``Idempotency-Key`` gives the same one again to whoever asks with it. It is cut behind
    ``most`` characters.

    Where the message has parts already, of earlier answers, this one's first is number ``start``. The model calls no
    tools unless it ``may_call``. ``followup`` is that of the :class:`.deltas.End` whose calls the turns end with the
    outputs of, and has these as ``outputs``, in the order of the calls.

    Raises :class:`RunError`.
    """
    request = ModelRequest(
        assistant.id,
        assistant.model,
        assistant.system,
        assistant.arguments,
        assistant.background,
        closed(turns, None if assistant.system_role else assistant.instructions),
        stall,
        assistant.specs,
        assistant.hosted,
        may_call,
        followup,
    )
    dialect = DIALECTS[assistant.upstream]
    try:
        stream, learn = _asked(dialect, client, request, key)
    except Exception as error:
        raise of_exception(error, "server_error") from error
    unmark = Unmark(names) if names else None
    reading = Reading(assistant.most_tokens, _has_tools(assistant), learn)
    if assistant.background:
        place = background.ResumePoint(reading, start)
        return AnswerStream(stream, place.translator, place, unmark=unmark, most=most, names=names)
    return AnswerStream(stream, dialect.translator(reading, start), unmark=unmark, most=most, names=names)


def _has_tools(assistant: Assistant) -> bool:
    # Those of a server that is away may be in the history, and be called.
    return bool(assistant.specs or assistant.hosted or assistant.mcp)


def _asked(
    dialect: Dialect, client: openai.OpenAI, request: ModelRequest, key: str
) -> tuple[Any, Callable[[], None] | None]:
    """Ask, and once more for something else where the server refuses what others take. Raises the SDK's errors."""
    while True:
        # The SDK would retry a POST that has no idempotency key: a run generated, and paid, twice.
        quick = _quick(client, _once(request, key))
        try:
            return _stream(dialect, quick, request), dialect.learner(quick, request)
        except openai.APIStatusError as error:
            other = dialect.instead(quick, request, error)
            if other is None:
                raise
            _log.info("asked for less, as the server refused it: %s", masked(repr(error)))
            # A server that remembers a refusal would give it again.
            request, key = other, f"{key}-less"
        finally:
            openai_sdk.let_go(quick)


def _stream(dialect: Dialect, quick: openai.OpenAI, request: ModelRequest) -> Any:
    watch = stale_connection.RequestWatch(quick)
    tries = 0
    while True:
        try:
            return dialect.create(quick, request)
        except openai.APIConnectionError as error:
            tries += 1
            if tries > _TRIES or isinstance(error, openai.APITimeoutError) or not watch.was_stale():
                raise
            _log.info("a connection that was kept was closed meanwhile: asked once more")


def _quick(client: openai.OpenAI, headers: dict[str, str]) -> openai.OpenAI:
    """Give a copy that asks once, for an answer that nobody compressed, and whose whole bodies are bounded."""
    # A few hundred kilobytes of gzip are hundreds of megabytes; and a stream that is compressed comes in lumps. What
    # the app's client says of it stays.
    if not any(name.lower() == "accept-encoding" for name in getattr(client, "default_headers", ())):
        headers = {**headers, "Accept-Encoding": "identity"}
    quick = client.with_options(max_retries=0, default_headers=headers)
    openai_sdk.bound(quick)
    return quick


def _once(request: ModelRequest, key: str) -> dict[str, str]:
    # Others are asked for once: what nobody can ask for again needs no key, and servers refuse some with a stream.
    return {"Idempotency-Key": key} if key and request.background else {}


def resume(
    client: openai.OpenAI,
    assistant: Assistant,
    state: Json,
    stall: float,
    *,
    every: float = 2.0,
    names: Sequence[str] = (),
    shown: Shown | None = None,
    most: float = NO_LIMIT,
) -> AnswerStream:
    """Go on with a background response behind ``state``, which :meth:`AnswerStream.state` gave in any process.

    Nothing is given twice and nothing is left out. A server that numbers its events sends those that are new;
    of one that does not, the response is read from its start. What was delivered already is dropped, by counting
    the characters of each part: what ``shown`` has, which may be more than what was told behind ``state``. A
    response that the server streams no more (OpenAI's limit is five minutes), or whose stream stops without an end,
    is asked for ``every`` so many seconds until it is over; the rest then comes in one list, and failures of the
    network or the server that pass are waited out.

    Raises :class:`RunError`: ``worker_lost`` when the server does not know the response (any more). ``stall`` is in
    seconds without a byte.
    """
    quick = _quick(client, {})
    try:
        stream = background.retrieve(quick, state, stall)
    except RunError:
        raise
    except Exception as error:
        raise of_exception(error, "server_error") from error
    from_start = stream is not None and state["sequence"] is None
    reading = Reading(assistant.most_tokens, _has_tools(assistant))
    # Workers of older releases begin with the first part.
    place = background.ResumePoint(reading, state.get("start", 0), state, from_start=from_start)
    poll = background.Poll(quick, state["response_id"], stall, every)
    delivered = Delivered(state, shown)
    if from_start:
        delivered.from_start(state)
    unmark = _unmark(names, state, from_start=from_start)
    resumed = _Resumed(state, delivered, from_start)
    return AnswerStream(stream, place.translator, place, poll, unmark, resumed, most, names)


def translate(stream: Any, most: float = NO_LIMIT) -> AnswerStream:
    """Take any OpenAI stream: the SDK's ``Stream`` of the three dialects, or an iterator of its events. It is cut
    behind ``most`` characters.

    Raises ``TypeError`` for what cannot be iterated, such as an async stream.
    """
    # An answer that came whole can be iterated too: stream=True was forgotten.
    if not hasattr(stream, "__iter__") or isinstance(stream, openai.BaseModel | str | bytes | dict):
        raise TypeError(
            f"got {type(stream).__name__}: pass what client.responses.create(..., stream=True), "
            "client.chat.completions.create(..., stream=True) or an Assistants run with stream=True gives "
            "(the synchronous client's)"
        )
    return AnswerStream(stream, most=most)


def _length(delta: Delta) -> int:
    """Count the characters that a delta brings, an annotation's as it is told."""
    if isinstance(delta, Text | Refusal | Reasoning | Call):
        return len(delta.value)
    return len(dumps(delta.value)) if isinstance(delta, Annotation) else 0


def _translator(kind: str, data: Json) -> Translator | None:
    """Tell the dialect by an event, once one is known."""
    for dialect in DIALECTS.values():
        if dialect.recognises(kind, data):
            return dialect.translator()
    if tells_failure(kind, data):
        raise failure(data)
    return None
