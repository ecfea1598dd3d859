"""Malformed requests: none is answered with 500 or above, and what is refused below the prefix is our JSON error."""

from __future__ import annotations

import io
import json
import random
import re
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from flask import Flask

from assistream_flask import Assistant
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import KEY, MakeApp
from tests.gunicorn_server import Gunicorn, running
from tests.http_helpers import P, error_of

REQUESTS = 10_000
SEED = 20261122

STRINGS = [
    "",
    " ",
    "\0",
    "\n",
    "\r\n\r\n",
    "\x7f",
    "\x80\xff",
    "ü",
    "null",
    "undefined",
    "NaN",
    "-1",
    "0",
    "1e999",
    "9" * 400,
    "x" * 9000,
    "../../etc/passwd",
    "%00",
    "%2e%2e%2f",
    "%",
    "%u0041",
    "' or 1=1 --",
    "{{7*7}}",
    "<script>",
    "\\",
    "/",
    "//",
    ";",
    "*",
    "[",
    "[::1",
    "http://[::1",
    "http://a:b",
    "a, b",
    '"',
    "text/event-stream",
    "application/json",
]
METHODS = [
    "GET",
    "POST",
    "DELETE",
    "PUT",
    "PATCH",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "BREW",
    "get",
    "\xff",
    "G-T",
    "X" * 999,
]
HEADERS = {
    "Content-Type": [
        "application/json",
        "application/json; charset=utf-16",
        "text/plain",
        "a/b; c=",
        ";",
        "/",
        "multipart/form-data",
    ],
    "Content-Length": ["", "0", "-1", "abc", "1", "5", "99999999", "9" * 40, "+5", "5.0", "٣"],
    "Host": ["", "localhost:99999", "a..b", "x" * 300, "[", "é", "a b", "localhost:x", "[::1]:80"],
    "Origin": ["null", "http://localhost", "https://localhost", "http://evil.example", "http://", "//", "a://b"],
    "Cookie": ["session=x", "session=", "=;=;", "session=eyJ9.x.y", "a" * 9000, "session=\xff"],
    "Accept": ["text/event-stream", "*/*", ";q=", "text/event-stream;q=0", "a/b;q=nan"],
    "Accept-Language": ["x" * 100_000],
    "Last-Event-ID": ["a-1", "-", "a--1", "a-" + "9" * 99, "g-0", "0-0", "\xff-1"],
    "Idempotency-Key": ["k", "k", "k2", "k" * 255, "k" * 256, "ü", '"k"', "\xff"],
    "If-None-Match": ["*", '"x"', "W/", ","],
    "If-Modified-Since": ["never", "Thu, 01 Jan 1970 00:00:00 GMT", "9" * 99],
    "Range": ["bytes=0-1", "bytes=9999999-", "bytes=-", "bytes=5-1", "lines=1-2", "bytes=" + "0-1," * 500],
    "If-Range": ["x", '"x"'],
    "Transfer-Encoding": ["chunked", "gzip", "chunked, chunked"],
    "Content-Encoding": ["gzip", "br"],
    "Expect": ["100-continue", "x"],
    "X-Forwarded-For": ["x", "127.0.0.1, 127.0.0.1"],
    "X-Forwarded-Host": ["evil.example"],
    "X-Forwarded-Prefix": ["//evil.example"],
    "X-HTTP-Method-Override": ["DELETE"],
    "Upgrade": ["websocket"],
    "Authorization": ["Bearer", "Basic !!!", "Digest x"],
}
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    1e300,
    10**400,
    "",
    " ",
    "\0",
    "\ud800",
    "🌍",
    "x" * 3000,
    [],
    [[]],
    {},
    {"a": {}},
]


class Request(NamedTuple):
    method: str
    path: bytes
    query: bytes
    headers: dict[str, str]
    body: bytes


class Ids(NamedTuple):
    threads: list[str]
    messages: list[str]
    runs: list[str]


class Fuzz:
    """A seeded source of requests: good ones, with one to three things wrong."""

    def __init__(self, seed: int, ids: Ids) -> None:
        self.random, self.ids = random.Random(seed), ids

    def request(self) -> Request:
        pick = self.random
        request = self.good()
        if pick.random() < 0.03:
            return request
        for change in pick.choices(
            [self.method, self.path, self.id, self.query, self.header, self.json, self.bytes],
            [1, 2, 2, 2, 4, 4, 2],
            k=pick.choice([1, 1, 2, 3]),
        ):
            request = change(request)
        return request

    def good(self) -> Request:
        pick = self.random
        thread = f"{P}/threads/{pick.choice(self.ids.threads)}"
        run = f"{thread}/runs/{pick.choice(self.ids.runs)}"
        runs = {"assistant_ids": ["tutor"], "content": "Hi", "mode": "parallel"}
        method, path, query, body = pick.choice(
            [
                ("GET", f"{P}/assistream.js", "", None),
                ("GET", f"{P}/assistants", "", None),
                ("POST", f"{P}/threads", "", {"metadata": {"a": "b"}}),
                ("GET", f"{P}/threads", f"limit=5&before={pick.choice(self.ids.threads)}", None),
                ("DELETE", thread, "", None),
                ("GET", f"{thread}/messages", f"limit=5&before={pick.choice(self.ids.messages)}", None),
                ("POST", f"{thread}/messages", "", {"content": "Hi"}),
                ("POST", f"{thread}/runs", "", runs),
                ("POST", f"{run}/cancel", "", {}),
                ("GET", f"{thread}/events", "last_event_id=a-1", None),
            ]
        )
        headers = {"Host": "localhost"} if body is None else {"Host": "localhost", "Content-Type": "application/json"}
        return Request(
            method, path.encode(), query.encode(), headers, b"" if body is None else json.dumps(body).encode()
        )

    def string(self) -> str:
        pick = self.random
        if pick.random() < 0.3:
            return "".join(chr(pick.randrange(256)) for _ in range(pick.randrange(1, 40)))
        return pick.choice(STRINGS)

    def noise(self, data: bytes) -> bytes:
        """Bytes changed, put in, cut out, doubled."""
        pick, found = self.random, bytearray(data)
        for _ in range(pick.randrange(1, 5)):
            at = pick.randrange(len(found) + 1)
            match pick.randrange(5):
                case 0:
                    found[at:at] = self.string().encode("latin1", "replace")
                case 1:
                    found[at : at + 1] = bytes([pick.randrange(256)])
                case 2:
                    del found[at : at + pick.randrange(1, 9)]
                case 3:
                    del found[at:]
                case 4:
                    found += found[at:]
        return bytes(found)

    def method(self, request: Request) -> Request:
        return request._replace(method=self.random.choice(METHODS))

    def path(self, request: Request) -> Request:
        prefix = P.encode() + b"/"
        return request._replace(path=prefix + self.noise(request.path.removeprefix(prefix)))

    def id(self, request: Request) -> Request:
        parts = request.path.split(b"/")
        at = self.random.randrange(2, len(parts))
        parts[at] = self.random.choice(
            [self.noise(parts[at]), parts[at].upper(), parts[at][:-1], self.string().encode()]
        )
        return request._replace(path=b"/".join(parts))

    def query(self, request: Request) -> Request:
        name = self.random.choice(["limit", "before", "last_event_id", "x"])
        extra = f"&{name}={self.string()}".encode("latin1", "replace")
        return request._replace(query=self.random.choice([self.noise(request.query), request.query + extra, extra[1:]]))

    def header(self, request: Request) -> Request:
        name = self.random.choice(list(HEADERS))
        value = self.random.choice(HEADERS[name]) if self.random.random() < 0.7 else self.string()
        return request._replace(headers={**request.headers, name: value})

    def json(self, request: Request) -> Request:
        try:
            value = self.value(json.loads(request.body or b"{}"))
        except (ValueError, RecursionError):
            return request
        text = json.dumps(value, ensure_ascii=self.random.random() < 0.7)
        return request._replace(body=text.encode("utf-8", "surrogatepass"))

    def value(self, value: Any) -> Any:
        pick = self.random
        if isinstance(value, dict) and value and pick.random() < 0.8:
            key = pick.choice(list(value))
            match pick.randrange(4):
                case 0:
                    return {k: v for k, v in value.items() if k != key}
                case 1:
                    return {**value, self.string(): pick.choice(VALUES)}
                case _:
                    return {**value, key: self.value(value[key])}
        if isinstance(value, list) and value and pick.random() < 0.5:
            return [self.value(value[0]), *value[1:]] * pick.choice([1, 1, 2, 50])
        return pick.choice([*VALUES, self.string()])

    def bytes(self, request: Request) -> Request:
        pick = self.random
        match pick.randrange(12):
            case 0:
                body = b"[" * pick.choice([500, 50_000])
            case 1:
                body = b'{"content":' * 2000
            case 2:
                body = b'{"content": "' + b"x" * pick.choice([11_000, 300_000]) + b'"}'
            case 3:
                body = pick.randbytes(pick.randrange(200))
            case 4:
                body = request.body.decode("utf-8", "replace").encode(pick.choice(["utf-16", "utf-32", "utf-8-sig"]))
            case _:
                body = self.noise(request.body)
        return request._replace(body=body)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


def call(app: Flask, request: Request, cookie: str) -> Answer:
    """Call the WSGI app as a server would, with what no HTTP library would write."""
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": re.sub(
            rb"%([0-9a-fA-F]{2})", lambda hit: bytes([int(hit[1], 16)]), request.path.split(b"?")[0]
        ).decode("latin1"),
        "QUERY_STRING": request.query.decode("latin1"),
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_LENGTH": str(len(request.body)),
        "HTTP_COOKIE": cookie,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    for name, value in request.headers.items():
        key = name.upper().replace("-", "_")
        environ[key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"] = value.encode().decode("latin1")
    if "chunked" in request.headers.get("Transfer-Encoding", ""):
        environ["wsgi.input_terminated"] = True
        del environ["CONTENT_LENGTH"]
    begun: list[Any] = []

    def start(status: str, headers: list[tuple[str, str]], error: Any = None, /) -> Callable[[bytes], object]:
        begun.append((status, headers))
        return lambda data: None

    chunks: Any = app.wsgi_app(environ, start)
    body = b""
    try:
        for chunk in chunks:
            body += chunk
            if dict(begun[0][1])["Content-Type"].startswith("text/event-stream"):
                break
    finally:
        if hasattr(chunks, "close"):
            chunks.close()
    [(status, headers)] = begun
    return Answer(int(status[:3]), {name.lower(): value for name, value in headers}, body)


def ids_of(post: Callable[[str, Any], Any]) -> Ids:
    ids = Ids([], [], [])
    for _ in range(4):
        ids.threads.append(post(f"{P}/threads", {})["id"])
        url = f"{P}/threads/{ids.threads[-1]}/runs"
        started = post(url, {"assistant_ids": ["tutor"], "content": "Hi"})
        ids.messages.append(started["message"]["message"]["id"])
        ids.runs.append(started["runs"][0]["id"])
    return ids


def test_ten_thousand_malformed_requests_get_no_500_and_only_our_errors(
    make_app: MakeApp, server: OfflineServer
) -> None:
    server.replies = lambda request: Reply("Yes.")
    app = make_app([Assistant("tutor", model="m")], max_message_chars=10_000, max_runs=8, heartbeat_seconds=15)
    client = app.test_client()
    ids = ids_of(lambda url, body: client.post(url, json=body).get_json())
    session = client.get_cookie("session")
    assert session is not None
    cookie = f"session={session.value}"
    fuzz = Fuzz(SEED, ids)
    statuses: Counter[int] = Counter()
    codes: Counter[str] = Counter()
    for n in range(REQUESTS):
        request = fuzz.request()
        answer = call(app, request, cookie)
        statuses[answer.status] += 1
        assert answer.status < 500, (n, request, answer.body)
        if answer.status >= 400 and request.method != "HEAD":
            error_of(answer.headers["content-type"], answer.body)
            codes[json.loads(answer.body)["error"]["code"]] += 1
        assert KEY.encode() not in answer.body
        if answer.status == 204:
            deleted = re.findall(r"thread_[0-9a-f]{32}", request.path.decode("latin1"))
            if deleted and deleted[0] in ids.threads:
                ids.threads[ids.threads.index(deleted[0])] = client.post(f"{P}/threads").get_json()["id"]
    assert sum(statuses.values()) == REQUESTS
    # The requests reached far enough to be refused for every reason there is.
    assert {200, 201, 202, 204, 400, 403, 404, 405, 413, 415, 416, 422} <= set(statuses), statuses
    assert {"invalid_json", "unknown_field", "invalid_value", "assistant_not_found", "run_not_found"} <= set(codes)
    assert min(statuses[status] for status in (200, 400, 404, 405)) > 100, statuses
    # Nothing stuck: no stream is still counted, and the app works.
    assert app.extensions["assistream"].runtime().streams.callers == {}
    assert client.post(f"{P}/threads/{ids.threads[0]}/messages", json={"content": "Hi"}).status_code == 201


# Over a socket, against gunicorn


def wire(fuzz: Fuzz, request: Request) -> bytes:
    """Give the request as bytes on a connection, which HTTP's own rules may be broken in too."""
    pick = fuzz.random
    target = request.path.replace(b" ", b"%20") + (b"?" + request.query if request.query else b"")
    headers = {"Connection": "close", "Content-Length": str(len(request.body)), **request.headers}
    body = request.body
    if "Transfer-Encoding" in headers:
        del headers["Content-Length"]
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    head = b"%b %b HTTP/1.1\r\n" % (request.method.encode("latin1"), target)
    head += b"".join(f"{name}: {value}\r\n".encode() for name, value in headers.items())
    data = head + b"\r\n" + body
    return fuzz.noise(data) if pick.random() < 0.25 else data


def send(port: int, data: bytes) -> bytes:
    """Give the beginning of the answer; nothing where the server closed without one."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while len(found) < 4096 and (chunk := connection.recv(4096)):
                found += chunk
                if b"text/event-stream" in found:
                    break
        except ConnectionError:
            pass
    return found


@pytest.fixture
def gunicorn(tmp_path: Path) -> Any:
    with running(tmp_path, delay=0, max_message_chars=10_000, max_runs=8) as gunicorn:
        yield gunicorn


def test_malformed_requests_on_a_socket_get_no_500_of_gunicorn_and_the_server_lives_on(gunicorn: Gunicorn) -> None:
    def post(url: str, body: Any) -> Any:
        if "assistant_ids" in body:
            body = {**body, "assistant_ids": ["responses"]}
        return gunicorn.request("POST", url, body)

    fuzz = Fuzz(SEED + 1, ids_of(post))
    requests = [wire(fuzz, fuzz.request()) for _ in range(1500)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda data: send(gunicorn.port, data), requests))
    statuses: Counter[int] = Counter()
    for request, answer in zip(requests, answers, strict=True):
        if not answer:
            statuses[0] += 1
            continue
        line = re.match(rb"HTTP/1\.[01] ([0-9]{3}) ", answer)
        assert line, (request, answer)
        status = int(line[1])
        statuses[status] += 1
        # 501 is gunicorn's own word, and HTTP's, for a transfer coding that it does not know: no app is asked.
        assert status < 500 or (status == 501 and b"Unsupported transfer coding" in answer), (request, answer)
        if status >= 400 and b"Content-Type: application/json" in answer:
            assert b'{"error":{"type":"' in answer or request.startswith(b"HEAD"), (request, answer)
    assert {200, 400, 404, 405} <= set(statuses), statuses
    assert "Traceback" not in gunicorn.log(), gunicorn.log()[-3000:]
    assert post(f"{P}/threads", {})["object"] == "thread"
