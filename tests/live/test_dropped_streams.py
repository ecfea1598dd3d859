"""A stream that no server is given, or that none reads, takes nobody's place for good."""

from __future__ import annotations

import gc
import urllib.error
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, stream_with_context
from werkzeug.test import EnvironBuilder

from assistream_flask import event_response
from assistream_flask.runs.open_streams import OpenStream
from assistream_flask.runs.runtime import Runtime
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, MakeApp, quick_client, wait_until
from tests.gunicorn_server import running
from tests.live.test_crowds import APP

ALLOWED = 3


def fails(_: Response) -> Response:
    raise ValueError("as an app's hook may")


def says_another_thing(_: Response) -> Response:
    return Response("something else")


def says_another_body(response: Response) -> Response:
    response.set_data("something else")
    return response


def has_nothing_to_say(response: Response) -> Response:
    response.status_code = 304
    return response


def has_a_bad_header(response: Response) -> Response:
    # What the server refuses, see ask().
    response.headers["X-Refused"] = "1"
    return response


def around_the_iterator(response: Any) -> Any:
    frames = iter(response.response)
    response.response = (bytes(frame) for frame in frames)
    return response


def another_response(response: Response) -> Response:
    return Response(response.iter_encoded(), headers=response.headers)


def with_context(response: Any) -> Any:
    response.response = stream_with_context(iter(response.response))
    return response


def set_hook(app: Flask, hook: Callable[[Any], Any]) -> None:
    """Add one to an app that has served already."""
    app.after_request_funcs.setdefault(None, []).append(hook)


def ask(app: Flask, method: str, path: str, **more: Any) -> tuple[int, Iterable[bytes]]:
    """Give the status and the body as a server gets it, which does not read it; 500 where the app raises."""
    said = list[int]()

    def start_response(status: str, headers: list[tuple[str, str]], _: object = None) -> Any:
        if dict(headers).get("X-Refused"):
            raise ValueError("as a server refuses a header")
        said.append(int(status.split()[0]))

    try:
        body = app(EnvironBuilder(path, method=method, **more).get_environ(), start_response)
    except ValueError:
        return 500, []
    return said[0], body


def runtime(app: Flask) -> Runtime:
    found: Runtime = app.extensions["assistream"].runtime()
    return found


@pytest.fixture
def watched(make_app: MakeApp) -> tuple[Flask, Caller]:
    app = make_app(max_streams=ALLOWED, owner=lambda: "me")
    return app, Caller(app)


@pytest.mark.parametrize(
    "hook",
    [fails, says_another_thing, says_another_body, has_nothing_to_say, has_a_bad_header],
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_streams_that_an_apps_hook_replaced_are_counted_out_and_let_go_of(
    watched: tuple[Flask, Caller], hook: Callable[[Any], Any], method: str
) -> None:
    app, caller = watched
    set_hook(app, hook)
    more: dict[str, Any] = {}
    if method == "POST":
        more = {"json": {"assistant_ids": ["tutor"], "content": "Hi"}, "headers": {"Accept": "text/event-stream"}}
    path = f"{caller.url}/runs" if method == "POST" else f"{caller.url}/events"
    for _ in range(ALLOWED + 1):
        status, body = ask(app, method, path, **more)
        assert status != 429
        getattr(body, "close", lambda: None)()
    del body
    app.after_request_funcs.clear()
    # What an exception holds in a circle only the garbage collector finds.
    gc.collect()
    assert (runtime(app).streams.callers, runtime(app).open_streams) == ({}, 0)
    caller.wait()
    (tail,) = runtime(app).log._threads._buffers.values()  # type: ignore[attr-defined]
    assert tail.users == 0


def test_a_stream_is_counted_out_as_its_request_fails_not_when_garbage_is_collected(
    watched: tuple[Flask, Caller],
) -> None:
    app, caller = watched
    set_hook(app, fails)
    gc.disable()
    try:
        for _ in range(ALLOWED + 1):
            assert ask(app, "GET", f"{caller.url}/events")[0] == 500
        assert runtime(app).streams.callers == {}
    finally:
        gc.enable()


def test_streams_that_a_middleware_neither_reads_nor_closes_are_counted_out(watched: tuple[Flask, Caller]) -> None:
    app, caller = watched
    gc.disable()
    try:
        for _ in range(ALLOWED + 1):
            assert ask(app, "GET", f"{caller.url}/events")[0] == 200
        assert runtime(app).streams.callers == {}
    finally:
        gc.enable()


@pytest.mark.parametrize("hook", [around_the_iterator, another_response, with_context], ids=lambda one: one.__name__)
@pytest.mark.parametrize("ends", ["read", "closed"])
def test_a_stream_within_an_apps_own_response_is_whole_and_counted_until_that_ends(
    watched: tuple[Flask, Caller], hook: Callable[[Any], Any], ends: str, server: OfflineServer
) -> None:
    app, caller = watched
    set_hook(app, hook)
    body = {"assistant_ids": ["tutor"], "content": "Hi"}
    for _ in range(ALLOWED + 1):
        status, frames = ask(app, "POST", f"{caller.url}/runs", json=body, headers={"Accept": "text/event-stream"})
        assert status == 200
        assert list(runtime(app).streams.callers.values()) == [1]
        gc.collect()
        found = next(iter(frames)) if ends == "closed" else b"".join(frames)
        assert found.startswith(b"retry:") or not found
        if ends == "read":
            assert found.endswith(b"event: done\ndata: [DONE]\n\n")
        frames.close()  # type: ignore[attr-defined]
        del frames
        gc.collect()
        assert runtime(app).streams.callers == {}


def test_a_stream_that_is_let_go_of_while_another_is_counted_is_counted_out(make_app: MakeApp) -> None:
    ours, freed = runtime(make_app()).streams, list[bool]()
    others = OpenStream("other")

    class Rude:
        """Is looked up in the midst of a count, and there somebody leaves, as where garbage is collected."""

        def __hash__(self) -> int:
            if ours.callers and not freed:
                freed.append(True)
                ours.leave(others)
            return 1

    ours.enter(others, 9)
    rude = OpenStream(Rude())
    assert ours.enter(rude, 9)
    assert freed
    assert (list(ours.callers.values()), ours.count) == ([1], 1)
    ours.leave(rude)
    assert (ours.callers, ours.count) == ({}, 0)


def test_a_relayed_stream_that_an_app_drops_is_closed_at_the_model_server(server: OfflineServer) -> None:
    app = Flask("relay")
    set_hook(app, says_another_thing)
    server.replies = Reply(fault="stall")
    with quick_client(server) as client:

        @app.get("/")
        def relayed() -> Response:
            return event_response(client.responses.create(model="m", input="Hi", stream=True))

        assert app.test_client().get("/").text == "something else"
        wait_until(lambda: server.requests[0].disconnected)


def test_under_gunicorn_a_hook_that_fails_costs_no_place(tmp_path: Path) -> None:
    hook = """
@app.after_request
def fail(response):
    if "fail" in request.args:
        raise ValueError
    return response
"""
    with running(tmp_path, app=APP.replace("@app.get", hook + "\n@app.get", 1), max_streams=2) as live:
        thread = live.thread()
        for _ in range(5):
            with pytest.raises(urllib.error.HTTPError, match="500"):
                live.get(f"{thread}/events?fail=1")
        assert live.get("/open") == 0
