"""What is wrapped around a client's calls, as tracing is, sees whole answers where ``read="sdk"`` says so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from flask import Flask

from assistream_flask import Assistant, ConfigurationError, create_blueprint
from assistream_flask.testing import OfflineServer, Reply
from tests.conftest import Caller, quick_client, text, wait_until

IDS = {"responses": "a", "chat": "b", "assistants": "asst_c"}
CALLS = {
    "responses": ("responses", "create"),
    "chat": ("chat.completions", "create"),
    "assistants": ("beta.threads", "create_and_run"),
}
Serve = Callable[..., AbstractContextManager[Caller]]


class Span:
    """What tracing notes of a call."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.has_ended = False


class Traced:
    """A stream that a span lasts as long as: whatever is asked of it, its stream is asked."""

    def __init__(self, stream: Any, span: Span) -> None:
        self._stream, self._span = stream, span

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            self._span.events.append(next(self._stream))
        except StopIteration:
            self._span.has_ended = True
            raise
        return self._span.events[-1]

    def close(self) -> None:
        self._span.has_ended = True
        self._stream.close()


def traced(call: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        spans.append(Span())
        return Traced(call(*arguments, **named), spans[-1])

    return wrapper


def part_of(client: Any, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), client)


@pytest.fixture(params=["the client's", "the SDK's"])
def spans(request: pytest.FixtureRequest, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> list[Span]:
    """Give the spans of calls, of which tracing has wrapped those of one client, or of all."""
    found: list[Span] = []
    for path, name in CALLS.values():
        part = part_of(client, path)
        where = part if request.param == "the client's" else type(part)
        monkeypatch.setattr(where, name, traced(getattr(where, name), found))
    return found


@pytest.fixture
def client(server: OfflineServer) -> Iterator[openai.OpenAI]:
    with quick_client(server, max_retries=0) as client:
        yield client


@pytest.fixture
def serve(client: openai.OpenAI, tmp_path: Path) -> Serve:
    @contextmanager
    def serve(ours: Any = client, more: Mapping[str, Any] | None = None, **settings: Any) -> Iterator[Caller]:
        app = Flask("traced")
        config = {"database_url": f"sqlite:///{tmp_path / 'a.sqlite3'}", "drain_seconds": 0, **settings}
        app.config.update({f"ASSISTREAM_{name.upper()}": value for name, value in config.items()})
        all_kinds = [Assistant(id, model="m", upstream=kind, **(more or {})) for kind, id in IDS.items()]
        lasting = Assistant("lasting", model="m", background=True)
        blueprint = create_blueprint([*all_kinds, lasting], owner=lambda: "me", client=ours, read="sdk")
        app.register_blueprint(blueprint, url_prefix="/assistream")
        try:
            yield Caller(app)
        finally:
            app.extensions["assistream"].close()

    return serve


@pytest.mark.parametrize("dialect", IDS)
def test_a_span_has_all_events_of_an_answer_and_its_end(
    serve: Serve, server: OfflineServer, spans: list[Span], dialect: str
) -> None:
    server.replies = Reply("one two three")
    with serve() as caller:
        (run_id,) = caller.run(IDS[dialect])
        caller.wait()
        assert text(caller.entry(run_id)) == "one two three"
        wait_until(lambda: [one.has_ended for one in spans] == [True])
    said = "".join(str(event) for event in spans[0].events)
    assert all(word in said for word in ("one", "two", "three"))
    assert len(server.requests) == 1


@pytest.mark.parametrize("dialect", IDS)
def test_a_span_of_an_answer_that_is_cancelled_ends_and_the_model_server_sees_that_nobody_listens(
    serve: Serve, server: OfflineServer, spans: list[Span], dialect: str
) -> None:
    server.replies = Reply("one two three", fault="stall")
    with serve() as caller:
        (run_id,) = caller.run(IDS[dialect])
        wait_until(lambda: spans and "one" in str(spans[0].events))
        caller.cancel(run_id)
        wait_until(lambda: spans[0].has_ended and server.requests[0].disconnected)
        assert caller.entry(run_id)["run"]["status"] == "cancelled"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("500", "upstream_error"),
        ("429", "rate_limit_exceeded"),
        ("cut", "upstream_cut"),
        ("ends_early", "upstream_ended_early"),
        ("malformed", "upstream_malformed"),
        ("stall", "upstream_stalled"),
    ],
)
@pytest.mark.parametrize("dialect", IDS)
def test_an_answer_that_fails_fails_as_ever_and_is_asked_for_once(
    serve: Serve, server: OfflineServer, dialect: str, fault: str, code: str
) -> None:
    server.replies = Reply("one two three", fault=fault)
    with serve(stall_seconds=0.5) as caller:
        caller.run(IDS[dialect])
        assert caller.wait()[-1]["run"]["last_error"]["code"] == code
    assert len(server.requests) == 1


def test_the_arguments_and_the_headers_of_a_request_are_the_same(serve: Serve, server: OfflineServer) -> None:
    with serve(more={"temperature": 0.5, "extra_headers": {"X-Tenant": "acme"}}) as caller:
        caller.run(*IDS.values())
        caller.wait()
        caller.run("lasting")
        assert caller.wait()[-1]["run"]["status"] == "completed"
    asked = server.requests[:3]
    assert {one.body["temperature"] for one in asked} == {0.5}
    assert {one.headers["x-tenant"] for one in asked} == {"acme"}
    # So that who takes the run over gets the same answer.
    assert server.requests[3].headers["idempotency-key"].startswith("run_")


def test_a_client_that_tries_again_by_itself_is_refused_with_the_fix(
    serve: Serve, server: OfflineServer, caplog: pytest.LogCaptureFixture
) -> None:
    says = r"give OpenAI\(max_retries=0\)"
    with quick_client(server) as other:
        with pytest.raises(ConfigurationError, match=says), serve(other):
            pass
        with serve(lambda: other) as caller:
            caller.run("a")
            assert caller.wait()[-1]["run"]["last_error"]["code"] == "server_error"
    assert "give OpenAI(max_retries=0)" in caplog.text
    assert server.requests == []


def test_the_client_that_is_made_where_none_is_given_asks_once_too(
    serve: Serve, server: OfflineServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.replies = Reply(fault="500")
    with serve(None) as caller:
        caller.run("a")
        assert caller.wait()[-1]["run"]["last_error"]["code"] == "upstream_error"
        caller.client.application.extensions["assistream"].parts["assistream"].client().close()
    assert len(server.requests) == 1


def test_another_way_to_read_is_refused_with_those_that_there_are() -> None:
    app = Flask("read")
    app.secret_key = "only for tests"
    with pytest.raises(ConfigurationError, match=r"read='events'.*: give .bytes. or .sdk."):
        app.register_blueprint(create_blueprint([], read="events"))
