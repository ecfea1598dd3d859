"""Reads a stream: from its bytes where it is the SDK's, from its events where it is any iterator."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import openai
from pydantic_core import from_json

from ..errors import RunError
from ..events import Json
from ..fast import chunk_reader, event_template, read_gate
from ..fast.event_template import EventTemplate
from ..fast.read_gate import ReadGate, TimeSlice
from ..platform import openai_sdk
from ..sse import Decoder, TooLongError
from .errors import failure

LONGEST_EVENT: Final = 16 << 20
"""So many bytes an event may have. The last of a long answer tells it whole, perhaps twice, with escapes of six bytes a
character and with its annotations: that is a few megabytes."""
_LARGE: Final = 65_536
_MOST_VALUES: Final = 50_000
"""So many values an event may have. Each may be looked at, while nobody else in the worker has a turn."""
_OF_TOKENS: Final = frozenset({"logprobs", "prompt_logprobs", "prompt_token_ids", "token_ids"})
"""What may say something of each token, of a long prompt too, and nobody here looks at: vLLM has all of these."""
_LONGEST: Final = 1 << 20
_MOST_SILENCE: Final = 4 << 20
"""So many bytes may come without an event, such as comments against a proxy's time-out."""
_HEARTBEATS: Final = frozenset({"ping", "heartbeat", "keepalive", "keep-alive", "keep_alive"})
_SENTENCE: Final = re.compile(r"\[?[A-Za-z][A-Za-z ]{3}")
DONE: Final = "[DONE]"
"""The kind of the in-band end mark that OpenAI's streams close with."""


def unpadded(client: openai.OpenAI) -> Json:
    """Give the stream options that leave out OpenAI's padding; other servers may refuse them.

    It is there against an eavesdropper who reads lengths, and it doubles the bytes of a delta.
    """
    host = client.base_url.host
    return {"include_obfuscation": False} if f".{host}".endswith((".openai.com", ".openai.azure.com")) else {}


def read(stream: Any, gate: ReadGate | None = None, *, joined: bool = False) -> Iterator[list[tuple[str, Json]]]:
    """Give lists of ``(kind, data)``, one list a network read; ``kind`` is the event's type or name. Where they may
    be ``joined``, one event may have the texts of all of a read.

    Give an empty list at the ``gate``. Raises :class:`RunError` for an event that is not JSON or has more than
    :data:`LONGEST_EVENT` bytes, and whatever the transport raises.
    """
    response: Any = getattr(stream, "response", None)
    gate = read_gate.in_use(gate)
    decoder = _Decoder()
    template: EventTemplate | None = None
    if hasattr(response, "iter_bytes") and not response.is_stream_consumed:
        # Typed events cost twenty times what their bytes do, and an unknown one is built as the wrong class.
        openai_sdk.drop_events(stream)
        reads, split, parse = chunk_reader.body(response, gate), decoder.split, _parsed
        template = event_template.for_stream(joined)
    else:
        reads, split, parse = read_gate.through(iter(stream), gate), iter, _from_object  # type: ignore[assignment]
    try:
        yield from _events(reads, split, parse, decoder, template)
    except TooLongError as error:
        raise RunError("answer_too_long", said=str(error)) from None
    if batch := decoder.rest():
        yield batch


def _events(
    reads: Iterable[Any],
    split: Callable[[Any], Any],
    parse: Callable[[Any], tuple[str, Json] | list[tuple[str, Json]] | None],
    decoder: _Decoder,
    template: EventTemplate | None,
) -> Iterator[list[tuple[str, Json]]]:
    turn, is_gated = TimeSlice(), False
    for some in reads:
        if not some:
            is_gated = True
            yield []
            continue
        if not is_gated:
            # Nobody hears of what says nothing, such as heartbeats: a flood of those would keep all others waiting.
            turn.share()
        is_gated = False
        if template is not None and decoder.between and (known := template.read(some)):
            decoder.silence = 0
            yield [known]
            continue
        batch: list[tuple[str, Json]] = []
        event: Any = None
        try:
            items = split(some)
            for item in items:
                event = parse(item)
                if type(event) is tuple:
                    batch.append(event)
                elif event is not None:
                    batch += event
            if template is not None and batch and type(event) is tuple:
                template.learn(items[-1], batch[-1])
        finally:
            # What came before what can't be read was said.
            if batch:
                yield batch
        decoder.listen(0 if batch else len(some))


class _Decoder(Decoder):
    """Takes for events, too, what servers send between them that gave up on the format: ``error: {...}``, which
    llama.cpp wrote, and an object by itself, on one line or on several, as gateways and frameworks answer with."""

    def __init__(self) -> None:
        super().__init__(LONGEST_EVENT)
        # The lines of an object that is not whole yet.
        self._object: list[bytes] = []
        self._size = 0
        self.silence = self._held = 0
        """How many bytes came since the last event."""

    def listen(self, silent: int) -> None:
        """Count the bytes of a read that had no event, 0 where it had. Raises :class:`TooLongError` where there were
        too many, one after the other."""
        # What is kept is of an event that goes on.
        kept, self._held = self.held - self._held, self.held
        self.silence = self.silence + max(0, silent - max(0, kept)) if silent else 0
        if self.silence > _MOST_SILENCE:
            raise TooLongError(f"{self.silence} bytes came without an event")

    def other(self, line: bytes) -> Iterable[tuple[bytes, bytes]]:
        if line.startswith(b"error:"):
            return [(b"error", line.removeprefix(b"error:").strip())]
        # Some put the end mark right behind it.
        line = line.removesuffix(b"data: [DONE]")
        begins = line[:1] in (b"{", b"[")
        if begins and _is_object(line):
            self._object, self._size = [], 0
            return [(b"", line)]
        if not self._object and not begins:
            return ()
        self._size += len(line)
        self._object.append(line)
        # As JSON is laid out, its last line begins as its first does: looking after each line would take hours.
        if self._size > _LONGEST or (line[:1] in (b"}", b"]") and len(self._object) > 1):
            whole, self._object, self._size = b"\n".join(self._object), [], 0
            return [(b"", whole)] if _is_object(whole) else ()
        return ()

    def rest(self) -> list[tuple[str, Json]]:
        """Give those events that the last lines stand for, behind which no line end came."""
        lines = bytes(self._rest).splitlines()
        frames = list(self._lines(lines))
        if self._object and _is_object(whole := b"\n".join(self._object)):
            frames.append((b"", whole))
        return [event for frame in frames if isinstance(event := _parsed(frame), tuple)]


def _is_object(text: bytes) -> bool:
    try:
        found = from_json(text.decode("utf-8", "replace"))
    except ValueError:
        return False
    return isinstance(found, dict) or (isinstance(found, list) and bool(found) and isinstance(found[0], dict))


def _parsed(frame: tuple[bytes, bytes]) -> tuple[str, Json] | list[tuple[str, Json]] | None:
    name, text = frame
    try:
        data = from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        if text.startswith(DONE.encode()):
            return DONE, {}
        kind = name.decode("utf-8", "replace")
        if not text.strip():
            # A heartbeat, but where its name says more.
            return (kind, {}) if kind else None
        # Three times as slow, and it takes what is no UTF-8, and lone surrogates.
        words = text.decode("utf-8", "replace")
        try:
            data = json.loads(words, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            if kind == "error":
                return kind, {"message": words}
            if kind in _HEARTBEATS:
                return kind, {}
            if b"\n" in text:
                # Events that no blank line parts.
                found = [_parsed((name, line)) for line in text.split(b"\n")]
                return [event for event in found if isinstance(event, tuple)]
            # A mere sentence is an error's, and may say which.
            code = failure(words).code if _SENTENCE.match(words) else "upstream_error"
            raise RunError("upstream_malformed" if code == "upstream_error" else code, said=words) from error
    if len(text) > _LARGE:
        _count(data)
    kind = name.decode("utf-8", "replace")
    if isinstance(data, dict) and data.get("type") == kind != "":
        return kind, data
    return _kind(kind, data)


def _count(data: Any) -> None:
    """Raise :class:`RunError` for an event of more values than a worker can look at in between."""
    count, left = 0, [data] if isinstance(data, dict | list) else []
    while left:
        one = left.pop()
        values = [value for key, value in one.items() if key not in _OF_TOKENS] if isinstance(one, dict) else one
        count += len(values)
        if count > _MOST_VALUES:
            raise RunError("answer_too_long", said=f"an event has more than {_MOST_VALUES} values")
        left += [value for value in values if isinstance(value, dict | list)]


def _no_constant(name: str) -> None:
    # NaN and Infinity are no JSON, and no browser reads them.
    raise ValueError(name)


def _kind(name: str, data: Any) -> tuple[str, Json]:
    if isinstance(data, list) and data and isinstance(data[0], dict) and data[0].get("error"):
        # Google's, of which nothing else is a list.
        data = data[0]
    if not isinstance(data, dict):
        return name, {}
    if data.get("object") == "response" and not name:
        # A whole one, from who does not know stream=True.
        return f"response.{data.get('status')}", {"response": data}
    kind = data.get("type")
    if name.startswith("thread.") or name in ("done", "error") or not isinstance(kind, str):
        kind = name
    if kind == "" and data.get("error"):
        kind = "error"
    return kind, data


def _from_object(event: Any) -> tuple[str, Json]:
    """Give an event object of the SDK, or the mapping it was made from."""
    data = event if isinstance(event, dict) else event.to_dict(mode="json", warnings=False)
    _count(data)
    if data.get("type") == "chunk" and isinstance(data.get("chunk"), dict):
        # What client.chat.completions.stream() gives beside its own events.
        data = data["chunk"]
    if "event" in data and "data" in data:
        return _kind(data["event"] or "", data["data"])
    return _kind("", data)


def hang_up(stream: Any) -> bool:
    """End the stream for whoever reads it, in whatever way; ``False`` where it has no connection of its own."""
    response: Any = getattr(stream, "response", None)
    network = getattr(response, "extensions", {}).get("network_stream")
    # An HTTP/2 connection carries other streams too.
    if network is None or response.is_closed or response.http_version == "HTTP/2":
        return False
    raw = network.get_extra_info("socket")
    if raw is None:
        return False
    try:
        # close() alone does not wake a thread that waits in recv().
        raw.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    return True


def close(stream: Any) -> None:
    """Close the stream's connection, also while another thread reads from it."""
    hang_up(stream)
    if hasattr(stream, "close"):
        try:
            stream.close()
        except ValueError:
            # A generator that runs in another thread cannot be closed from here; its reader closes it.
            pass
