"""Reading answers: our errors, and event streams frame by frame; and the requests that a model server gets."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from werkzeug.test import TestResponse

P = "/assistream"


class Frame(NamedTuple):
    id: str | None
    event: str
    data: Any


def parse(block: str) -> Frame:
    fields = dict(line.split(": ", 1) for line in block.split("\n") if line)
    data = fields.get("data", "null")
    return Frame(fields.get("id"), fields.get("event", ""), data if data == "[DONE]" else json.loads(data))


def blocks(chunks: Iterable[bytes]) -> Iterator[str]:
    """Give each frame's text as it arrives."""
    rest = b""
    for chunk in chunks:
        rest += chunk
        while b"\n\n" in rest:
            block, rest = rest.split(b"\n\n", 1)
            yield block.decode()
    assert rest == b"", "the stream ended in mid-frame"


def read(answer: TestResponse, until: Callable[[Frame], object] = lambda frame: False) -> list[Frame]:
    """Read a stream to the frame that ``until`` is true of, or to its end, and leave it."""
    assert answer.status_code == 200, answer.text
    found = []
    try:
        for block in blocks(answer.iter_encoded()):
            found.append(parse(block))
            if until(found[-1]):
                break
    finally:
        answer.close()
    return found


def named(event: str) -> Callable[[Frame], bool]:
    return lambda frame: frame.event == event


def refused(answer: TestResponse, status: int, code: str) -> str:
    """Check one of our errors; give its message."""
    assert answer.status_code == status, (answer.status_code, answer.text[:300])
    return error_of(answer.mimetype, answer.data, code)


def error_of(mimetype: str | None, body: bytes, code: str | None = None) -> str:
    assert mimetype == "application/json", (mimetype, body[:300])
    value = json.loads(body)
    assert set(value) == {"error"}
    assert set(value["error"]) - {"decision"} == {"type", "code", "message"}
    assert all(
        value["error"][name] and isinstance(value["error"][name], str) for name in ("type", "code", "message")
    ), value
    if code is not None:
        assert value["error"]["code"] == code, value
    message: str = value["error"]["message"]
    return message


def request_of(peer: socket.socket) -> bytes:
    """Read one request with its body; give what came where the client left before."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := peer.recv(65_536)):
            return data
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += peer.recv(65_536)
    return head + b"\r\n\r\n" + body
