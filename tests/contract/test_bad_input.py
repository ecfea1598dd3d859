"""What is refused: with our JSON error, a code, a message that says what to do, and nothing stored."""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
from typing import Any

import pytest
from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.test import TestResponse

from assistream_flask.errors import RequestError
from assistream_flask.runs import values
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, wait_until
from tests.http_helpers import P, read, refused

LIMIT = 1000
JSON_TYPE = "application/json"
NO_THREAD = "thread_" + "0" * 32


@pytest.fixture(scope="module")
def app(make_shared_app: MakeApp) -> Flask:
    return make_shared_app(max_message_chars=LIMIT, max_assistants=3)


@pytest.fixture(scope="module")
def app_with_allowed_origins(make_shared_app: MakeApp) -> Flask:
    return make_shared_app(allowed_origins="https://allowed.example  http://also.example:81")


def rows(app: Flask) -> dict[str, int]:
    """Give how much is stored. A worker says by itself that it lives."""
    path = app.config["ASSISTREAM_DATABASE_URL"].removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as database:
        names = [name for (name,) in database.execute("select name from sqlite_master where name like 'assistream_%'")]
        return {
            name: database.execute(f"select count(*) from {name}").fetchone()[0]
            for name in names
            if name != "assistream_workers"
            and not database.execute("select 1 from sqlite_master where name = ? and type = 'index'", [name]).fetchone()
        }


def post(caller: Caller, route: str, data: bytes, content_type: str | None = JSON_TYPE, **headers: str) -> TestResponse:
    url = {"threads": f"{P}/threads", "cancel": f"{caller.url}/runs/run_0/cancel"}.get(route, f"{caller.url}/{route}")
    return caller.client.post(url, data=data, content_type=content_type, headers=headers)


@pytest.mark.parametrize(
    ("route", "body", "status", "code", "says"),
    [
        # Messages
        ("messages", {"content": ""}, 400, "invalid_value", "must be a text that is not empty"),
        ("messages", {"content": " \n\t\u2003"}, 400, "invalid_value", "must be a text that is not empty"),
        ("messages", {"content": None}, 400, "invalid_value", "must be a text"),
        ("messages", {"content": 5}, 400, "invalid_value", "must be a text"),
        ("messages", {"content": True}, 400, "invalid_value", "must be a text"),
        ("messages", {"content": ["Hi"]}, 400, "invalid_value", "must be a text"),
        ("messages", {"content": {"text": "Hi"}}, 400, "invalid_value", "must be a text"),
        ("messages", {"content": 1e300}, 400, "invalid_value", "must be a text"),
        ("messages", {}, 400, "invalid_value", "'content' is missing. Add it"),
        ("messages", {"content": "Hi", "role": "assistant"}, 400, "unknown_field", "Allowed here: content"),
        ("messages", {"content": "Hi", "metadata": {}}, 400, "unknown_field", "'metadata'"),
        ("messages", {"content": "a\0b"}, 400, "invalid_value", "Remove it"),
        ("messages", {"content": "a\ud800b"}, 400, "invalid_value", "Remove it"),
        ("messages", {"content": "\udc00\ud800"}, 400, "invalid_value", "Remove it"),
        ("messages", {"content": "x" * (LIMIT + 1)}, 413, "message_too_long", f"{LIMIT} are allowed"),
        ("messages", {"content": "🌍" * (LIMIT + 1)}, 413, "message_too_long", f"{LIMIT} are allowed"),
        ("messages", [], 400, "invalid_json", "Send one: {...}"),
        ("messages", "Hi", 400, "invalid_json", "Send one: {...}"),
        ("messages", None, 400, "invalid_json", "Send one: {...}"),
        ("messages", 1, 400, "invalid_json", "Send one: {...}"),
        # Runs
        ("runs", {}, 400, "invalid_value", "'assistant_ids' is missing. Add it"),
        ("runs", {"content": "Hi"}, 400, "invalid_value", "'assistant_ids' is missing"),
        ("runs", {"assistant_ids": None}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": []}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": "tutor"}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": {"tutor": 1}}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": ["tutor", 1]}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": [["tutor"]]}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": [None]}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": ["tutor"] * 4}, 400, "invalid_value", "a list of 1 to 3 ids"),
        ("runs", {"assistant_ids": ["nobody"]}, 404, "assistant_not_found", "lists them"),
        ("runs", {"assistant_ids": ["tutor", ""], "content": "Hi"}, 404, "assistant_not_found", "lists them"),
        ("runs", {"assistant_ids": ["\ud800\0" * 900], "content": "Hi"}, 404, "assistant_not_found", "lists them"),
        ("runs", {"assistant_ids": ["Tutor"], "content": "Hi"}, 404, "assistant_not_found", "lists them"),
        ("runs", {"assistant_ids": ["tutor"], "content": ""}, 400, "invalid_value", "not empty"),
        ("runs", {"assistant_ids": ["tutor"], "content": []}, 400, "invalid_value", "must be a text"),
        ("runs", {"assistant_ids": ["tutor"], "content": False}, 400, "invalid_value", "must be a text"),
        ("runs", {"assistant_ids": ["tutor"], "content": "x" * (LIMIT + 1)}, 413, "message_too_long", "allowed"),
        ("runs", {"assistant_ids": ["tutor"], "mode": "serial"}, 400, "invalid_value", "'sequential'"),
        ("runs", {"assistant_ids": ["tutor"], "mode": None}, 400, "invalid_value", "'parallel'"),
        ("runs", {"assistant_ids": ["tutor"], "mode": ["parallel"]}, 400, "invalid_value", "'parallel'"),
        ("runs", {"assistant_ids": ["tutor"], "mode": {}}, 400, "invalid_value", "'parallel'"),
        ("runs", {"assistant_ids": ["tutor"], "mode": 0}, 400, "invalid_value", "'parallel'"),
        ("runs", {"assistant_ids": ["tutor"], "stream": True}, 400, "unknown_field", "assistant_ids, content, mode"),
        ("runs", {"assistant_id": "tutor"}, 400, "unknown_field", "assistant_ids, content, mode"),
        # Threads
        ("threads", {"metadata": []}, 400, "invalid_value", "16 texts"),
        ("threads", {"metadata": "x"}, 400, "invalid_value", "16 texts"),
        ("threads", {"metadata": False}, 400, "invalid_value", "16 texts"),
        ("threads", {"metadata": {"a": 1}}, 400, "invalid_value", "16 texts"),
        ("threads", {"metadata": {"a": None}}, 400, "invalid_value", "16 texts"),
        ("threads", {"metadata": {"a": {"b": "c"}}}, 400, "invalid_value", "16 texts"),
        ("threads", {"metadata": {str(n): "" for n in range(17)}}, 400, "invalid_value", "16 texts"),
        ("threads", {"metadata": {"k" * 65: ""}}, 400, "invalid_value", "up to 64"),
        ("threads", {"metadata": {"k": "v" * 513}}, 400, "invalid_value", "512 characters"),
        ("threads", {"metadata": {"k": "\0"}}, 400, "invalid_value", ""),
        ("threads", {"metadata": {"\ud800": "v"}}, 400, "invalid_value", ""),
        # A pair must not form from the end of a key and the beginning of its value.
        ("threads", {"metadata": {"\ud83c": "\udf0d"}}, 400, "invalid_value", ""),
        ("threads", {"messages": []}, 400, "unknown_field", "Allowed here: metadata"),
        ("threads", {"a" * 9999: 1}, 400, "unknown_field", "Allowed here: metadata"),
        ("threads", {"\ud800": 1}, 400, "unknown_field", "Allowed here: metadata"),
        ("threads", {"": 1}, 400, "unknown_field", "Allowed here: metadata"),
        # Cancels
        ("cancel", {"reason": "bored"}, 400, "unknown_field", "Allowed here: none"),
        ("cancel", [1], 400, "invalid_json", "Send one: {...}"),
        ("cancel", {}, 404, "run_not_found", "no such run"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_and_nothing_is_stored(
    app: Flask, caller: Caller, route: str, body: Any, status: int, code: str, says: str
) -> None:
    before = rows(app)
    for accept in ("*/*", "text/event-stream"):
        answer = post(caller, route, json.dumps(body).encode(), Accept=accept, **{"Idempotency-Key": "k"})
        message = refused(answer, status, code)
        assert says in message
        assert len(message) < 600
    assert rows(app) == before


@pytest.mark.parametrize("route", ["messages", "runs", "threads", "cancel"])
@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"nonsense",
        b"{'content': 'Hi'}",
        b'{"content": "Hi"',
        b'{"content": "Hi",}',
        b'{"content": "Hi"} {}',
        b'{"content": NaN}',
        b'{"content": Infinity, "metadata": -Infinity}',
        b'{"content": "\xff\xfe"}',
        b'{"content": "\xed\xa0\x80"}',
        b'{"content": "\xc0\xaf"}',
        b'{"content": "line\nend"}',
        b'{"content": "a\x00b"}',
        b"\x00",
        b" ",
        b'{"content": "\\u12"}',
        b'{"content": ' + b"1" * 5000 + b"}",
        b"[" * 50_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b"[" * 20_000 + b"]" * 20_000,
        json.dumps({"content": "Hi"}).encode("utf-16"),
        json.dumps({"content": "Hi"}).encode("utf-32-le"),
        b"\x1f\x8b\x08\x00rest-of-gzip",
    ],
    ids=lambda data: repr(data[:20]),
)
def test_what_is_not_json_in_utf8_is_400(app: Flask, caller: Caller, route: str, data: bytes) -> None:
    before = rows(app)
    assert "Send a JSON object" in refused(post(caller, route, data), 400, "invalid_json")
    assert rows(app) == before


def test_a_byte_order_mark_is_let_pass(caller: Caller) -> None:
    assert post(caller, "messages", b'\xef\xbb\xbf{"content": "Hi"}').status_code == 201


def test_of_a_key_given_twice_the_last_counts(caller: Caller) -> None:
    answer = post(caller, "messages", b'{"content": 5, "content": "Hi"}')
    assert answer.status_code == 201
    assert caller.entries()[0]["message"]["content"][0]["text"]["value"] == "Hi"
    refused(post(caller, "messages", b'{"content": "Hi", "content": 5}'), 400, "invalid_value")


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
        "",
        None,
        "\xff",
    ],
)
@pytest.mark.parametrize("route", ["messages", "runs", "threads", "cancel"])
def test_another_content_type_is_415(app: Flask, caller: Caller, route: str, content_type: str | None) -> None:
    before = rows(app)
    message = refused(post(caller, route, b'{"content": "Hi"}', content_type), 415, "unsupported_media_type")
    assert "Content-Type: application/json" in message
    assert rows(app) == before


def test_parameters_of_the_content_type_are_let_pass(caller: Caller) -> None:
    for content_type in ("application/json; charset=utf-8", "Application/JSON", "application/json;x=y"):
        assert post(caller, "messages", b'{"content": "Hi"}', content_type).status_code == 201


# Length


@pytest.mark.parametrize("character", ["x", "ü", "🌍", '"', "\x01"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_message_at_the_limit_passes_however_it_is_written(caller: Caller, character: str, ascii_only: bool) -> None:
    data = json.dumps({"content": character * LIMIT}, ensure_ascii=ascii_only).encode()
    assert post(caller, "messages", data).status_code == 201
    data = json.dumps({"content": character * (LIMIT + 1)}, ensure_ascii=ascii_only).encode()
    assert str(LIMIT) in refused(post(caller, "messages", data), 413, "message_too_long")


def test_the_default_limit_lets_a_long_message_of_emoji_pass(make_app: MakeApp) -> None:
    caller = Caller(make_app())
    assert post(caller, "messages", json.dumps({"content": "🌍" * 100_000}).encode()).status_code == 201


@pytest.mark.parametrize("route", ["messages", "runs", "threads", "cancel"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_413_before_it_is_read(app: Flask, caller: Caller, route: str, chunked: bool) -> None:
    before = rows(app)
    data = b'{"content": "' + b"x" * 200_000 + b'"}'
    if chunked:
        source = io.BytesIO(data)
        url = f"{P}/threads" if route == "threads" else f"{caller.url}/{route.replace('cancel', 'runs/run_0/cancel')}"
        answer = caller.client.post(
            url,
            input_stream=source,
            content_type=JSON_TYPE,
            environ_overrides={"wsgi.input_terminated": True, "HTTP_TRANSFER_ENCODING": "chunked"},
        )
        assert source.tell() < len(data)
    else:
        answer = post(caller, route, data)
    assert "Send a shorter one" in refused(answer, 413, "message_too_long")
    assert rows(app) == before


# The query, the path, the key


@pytest.mark.parametrize("limit", ["0", "201", "-1", "1.5", "x", "", "1e2", "٣", "999999999999", "0x10", " 5", "%00"])
@pytest.mark.parametrize("list_of", ["messages", "threads"])
def test_a_limit_outside_1_to_200_is_400(caller: Caller, list_of: str, limit: str) -> None:
    url = f"{P}/threads" if list_of == "threads" else f"{caller.url}/messages"
    message = refused(caller.client.get(f"{url}?limit={limit}"), 400, "invalid_value")
    assert message == "'limit' must be a number from 1 to 200."


@pytest.mark.parametrize("before", ["", "x", "msg_" + "0" * 32, "%00", "%ff", "%ED%A0%80", "x" * 5000, "'--"])
def test_an_unknown_before_is_404(caller: Caller, before: str) -> None:
    refused(caller.client.get(f"{caller.url}/messages?before={before}"), 404, "message_not_found")
    refused(caller.client.get(f"{P}/threads?before={before}"), 404, "thread_not_found")


@pytest.mark.parametrize("query", ["limit=\xff", "before=\xc3", "last_event_id=\xed\xa0\x80", "\xff"])
def test_a_query_of_raw_bytes_is_no_failure_of_ours(caller: Caller, query: str) -> None:
    for url in (f"{P}/threads", f"{caller.url}/messages", f"{caller.url}/events"):
        answer = caller.client.get(url, environ_overrides={"QUERY_STRING": query})
        if answer.mimetype != "text/event-stream":
            assert "Percent-encode" in refused(answer, 400, "invalid_value")
        answer.close()


@pytest.mark.parametrize(
    "thread_id", [NO_THREAD, "x", "%00", "thread_", NO_THREAD.upper(), NO_THREAD + "%0A", "thread_" + "0" * 9999, "%ff"]
)
def test_an_unknown_thread_is_404_on_every_route(caller: Caller, thread_id: str) -> None:
    url = f"{P}/threads/{thread_id}"
    for answer in (
        caller.client.get(f"{url}/messages"),
        caller.client.get(f"{url}/events"),
        caller.client.post(f"{url}/messages", json={"content": "Hi"}),
        caller.client.post(f"{url}/runs", json={"assistant_ids": ["tutor"]}),
        caller.client.post(f"{url}/runs/run_0/cancel"),
        caller.client.delete(url),
    ):
        refused(answer, 404, "thread_not_found")


@pytest.mark.parametrize("key", ["", " ", "two words", "k" * 256, "ü", "\x7f", "tab\there", "\xff"])
@pytest.mark.parametrize("route", ["messages", "runs", "threads", "cancel"])
def test_an_idempotency_key_of_wrong_form_is_400(app: Flask, caller: Caller, route: str, key: str) -> None:
    before = rows(app)
    body = {"messages": {"content": "Hi"}, "runs": {"assistant_ids": ["tutor"], "content": "Hi"}}.get(route, {})
    url = f"{P}/threads" if route == "threads" else f"{caller.url}/{route.replace('cancel', 'runs/run_0/cancel')}"
    answer = caller.client.post(url, json=body, environ_overrides={"HTTP_IDEMPOTENCY_KEY": key})
    assert "such as a UUID" in refused(answer, 400, "invalid_value")
    assert rows(app) == before


@pytest.mark.parametrize("key", ["k", "k" * 255, "~!@#$%^&*()", '"quoted"'])
def test_an_idempotency_key_of_right_form_passes(caller: Caller, key: str) -> None:
    assert post(caller, "messages", b'{"content": "Hi"}', **{"Idempotency-Key": key}).status_code == 201


# Origin


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "example.org"),
        ("http://example.org", "example.org"),
        ("http://example.org", "example.org:80"),
        ("http://example.org:80", "example.org"),
        ("https://example.org", "example.org"),
        ("https://example.org", "example.org:443"),
        ("https://example.org:443", "example.org"),
        ("http://example.org:8000", "example.org:8000"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("https://allowed.example", "example.org"),
        ("http://also.example:81", "example.org"),
    ],
)
def test_a_command_of_the_apps_own_page_passes(app_with_allowed_origins: Flask, origin: str | None, host: str) -> None:
    app = app_with_allowed_origins
    headers = {"Host": host} if origin is None else {"Host": host, "Origin": origin}
    assert app.test_client().post(f"{P}/threads", headers=headers).status_code == 201


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://evil.example",
        "http://example.org:8000",
        "http://example.org:443",
        "https://example.org:80",
        "http://sub.example.org",
        "http://example.org.evil.example",
        "http://evilexample.org",
        "http://user@example.org",
        "http://example.org@evil.example",
        "null",
        "",
        "*",
        "http://",
        "//example.org",
        "example.org",
        "ftp://example.org",
        "file://example.org",
        "chrome-extension://example.org",
        "http://[::1",
        "http://]",
        "http://[::1]evil",
        "http://a:b",
        "http://example.org:99999999",
        "http://\xbd",
        "http://example.org\x00",
        "http://example.org http://evil.example",
        "allowed.example",
        "https://allowed.example.evil.example",
    ],
)
def test_a_command_of_a_foreign_page_is_403_whatever_its_route(app_with_allowed_origins: Flask, origin: str) -> None:
    app = app_with_allowed_origins
    caller = Caller(app)
    before = rows(app)
    head = {"HTTP_ORIGIN": origin, "HTTP_HOST": "example.org"}
    for method, url, body in (
        ("POST", f"{P}/threads", {}),
        ("POST", f"{caller.url}/messages", {"content": "Hi"}),
        ("POST", f"{caller.url}/runs", {"assistant_ids": ["tutor"], "content": "Hi"}),
        ("POST", f"{caller.url}/runs/run_0/cancel", {}),
        ("DELETE", caller.url, None),
        ("POST", f"{P}/threads/{NO_THREAD}/messages", {"content": "Hi"}),
    ):
        answer = caller.client.open(url, method=method, json=body, environ_overrides=head)
        assert "ASSISTREAM_ALLOWED_ORIGINS" in refused(answer, 403, "foreign_origin")
    assert rows(app) == before


def test_reading_asks_for_no_origin_since_browsers_keep_the_answer_from_a_foreign_page(caller: Caller) -> None:
    answer = caller.client.get(f"{caller.url}/messages", headers={"Origin": "http://evil.example"})
    assert answer.status_code == 200
    assert not [name for name, _ in answer.headers if name.startswith("Access-Control")]


def test_behind_a_proxy_the_forwarded_host_counts(make_app: MakeApp) -> None:
    app = make_app()
    app.wsgi_app = ProxyFix(app.wsgi_app, x_proto=1, x_host=1)  # type: ignore[method-assign]
    head = {"Host": "10.0.0.1:8000", "X-Forwarded-Proto": "https", "X-Forwarded-Host": "example.org"}
    client = app.test_client()
    assert client.post(f"{P}/threads", headers={**head, "Origin": "https://example.org"}).status_code == 201
    refused(client.post(f"{P}/threads", headers={**head, "Origin": "https://evil.example"}), 403, "foreign_origin")


@pytest.mark.parametrize("host", ["", "[", "a b", "a..b", "x" * 300, "é"])
def test_no_host_makes_an_empty_or_broken_origin_the_apps_own(app: Flask, host: str) -> None:
    for origin in ("", "null", "http://", "//", host):
        answer = app.test_client().post(
            f"{P}/threads", environ_overrides={"HTTP_HOST": host.encode().decode("latin1"), "HTTP_ORIGIN": origin}
        )
        assert 400 <= answer.status_code < 500


# Limits of what a caller may have at once


def test_over_the_limit_of_runs_is_429_with_retry_after_until_one_ends(
    make_app: MakeApp, server: OfflineServer
) -> None:
    app = make_app(max_runs=2)
    server.replies = Reply(fault="stall")
    caller = Caller(app)
    first, _ = caller.run("tutor", "critic")
    wait_until(lambda: len(server.requests) == 2)
    before = rows(app)
    body = {"assistant_ids": ["tutor"], "content": "Hi"}
    for accept in ("*/*", "text/event-stream"):
        answer = caller.client.post(f"{caller.url}/runs", json=body, headers={"Accept": accept, "Idempotency-Key": "k"})
        assert "You may have 2" in refused(answer, 429, "too_many_runs")
        assert int(answer.headers["Retry-After"]) > 0
    assert rows(app) == before
    assert app.extensions["assistream"].runtime().streams.callers == {}
    # Another thread is no way round, another caller and a message without a run are not concerned.
    other = caller.client.post(f"{P}/threads").get_json()["id"]
    refused(caller.client.post(f"{P}/threads/{other}/runs", json=body), 429, "too_many_runs")
    assert caller.client.post(f"{caller.url}/messages", json={"content": "Hi"}).status_code == 201
    Caller(app).run("tutor")
    caller.cancel(first)
    wait_until(lambda: caller.entry(first)["run"]["status"] == "cancelled")
    answer = caller.client.post(f"{caller.url}/runs", json=body, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 202, "a refusal is not what the key gives again"


def test_over_the_limit_of_streams_is_429_with_retry_after_until_one_closes(make_app: MakeApp) -> None:
    app = make_app(max_streams=2)
    caller = Caller(app)
    streams = [caller.client.get(f"{caller.url}/events") for _ in range(2)]
    before = rows(app)
    body = {"assistant_ids": ["tutor"], "content": "Hi"}
    for answer in (
        caller.client.get(f"{caller.url}/events"),
        caller.client.post(f"{caller.url}/runs", json=body, headers={"Accept": "text/event-stream"}),
    ):
        assert "Close one" in refused(answer, 429, "too_many_streams")
        assert int(answer.headers["Retry-After"]) > 0
    assert rows(app) == before
    other = Caller(app)
    other.client.get(f"{other.url}/events").close()
    streams[0].close()
    assert read(caller.client.get(f"{caller.url}/events"), lambda frame: True)[0].event == "thread.snapshot"
    streams[1].close()
    assert app.extensions["assistream"].runtime().streams.callers == {}


# The server's own state


def test_several_processes_are_refused_and_the_operator_is_told(app: Flask, caller: Caller) -> None:
    for url in (f"{P}/assistants", f"{P}/threads", f"{caller.url}/events"):
        answer = caller.client.get(url, environ_overrides={"wsgi.multiprocess": True})
        assert "run one worker" in refused(answer, 500, "too_many_workers")


def test_while_the_server_stops_streams_are_503_with_retry_after(make_app: MakeApp) -> None:
    app = make_app()
    caller = Caller(app)
    before = rows(app)
    app.extensions["assistream"].runtime().stopping.set()
    body = {"assistant_ids": ["tutor"], "content": "Hi"}
    for answer in (
        caller.client.post(f"{caller.url}/runs", json=body, headers={"Accept": "text/event-stream"}),
        caller.client.get(f"{caller.url}/events"),
    ):
        refused(answer, 503, "shutting_down")
        assert int(answer.headers["Retry-After"]) > 0
    assert rows(app) == before


def test_a_failure_of_the_app_is_a_500_that_tells_nothing_of_it(make_app: MakeApp) -> None:
    def broken() -> str | None:
        raise RuntimeError("secret of the app")

    answer = make_app(owner=broken).test_client().get(f"{P}/threads")
    refused(answer, 500, "server_error")
    assert "secret" not in answer.text


def test_every_check_raises_our_error_and_no_other() -> None:
    odd: list[Any] = [None, 0, 1.5, float("nan"), True, "", "x", b"x", [], [1], {}, {"a": 1}, {"a": []}, ["x"] * 99]
    for value in odd:
        for check in (
            lambda v: values.content(v, 10),
            values.metadata,
            values.mode,
            lambda v: values.assistant_ids(v, 3),
        ):
            with contextlib.suppress(RequestError):
                check(value)
