"""Spans of runs, as the real SDK of OpenTelemetry has them: which there are, below which, and what they say."""

from __future__ import annotations

import json
import logging
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from flask import Flask
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from assistream_flask import Assistant, ConfigurationError, create_blueprint, page_tool, tool
from assistream_flask.runs import tracing
from assistream_flask.store.tool_calls import ToolCallStore
from assistream_flask.testing import OfflineServer, Reply, ToolCall
from assistream_flask.upstream.deltas import Source, source
from tests.conftest import Caller, MakeApp, examples, quick_client, text, wait_until
from tests.programs import passes_under_gevent

DIALECTS = ("responses", "chat", "assistants")
BEGUN: Final[Sequence[tracing.Begun]] = ("asked", "answered", "taken_over")
SECRETS = ("the question", "the thought", "the argument", "the output", "the answer", "the instructions", "the fault")


class Spans:
    """What was begun, and what was ended."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.begun: list[Any] = []
        provider, begun = self.provider, self.begun

        class Counting(SimpleSpanProcessor):
            def on_start(self, span: Any, parent_context: Any = None) -> None:
                begun.append(span)

            def on_end(self, span: Any) -> None:
                pass

        provider.add_span_processor(Counting(self.exporter))

    @property
    def tracer(self) -> trace.Tracer:
        return self.provider.get_tracer("the app")

    def all(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def of(self, begin: str) -> list[ReadableSpan]:
        found = [span for span in self.all() if span.name.startswith(begin)]
        return sorted(found, key=lambda span: span.start_time or 0)

    def one(self, begin: str) -> ReadableSpan:
        [found] = self.of(begin)
        return found

    def has_begun(self, name: str) -> bool:
        return any(span.name == name for span in self.begun)

    def are_ended(self) -> bool:
        return len(self.begun) == len(self.all())

    def settle(self) -> None:
        """Wait until each that was begun is ended."""
        wait_until(self.are_ended)


def id_of(span: ReadableSpan) -> tuple[int, int]:
    found = span.get_span_context()
    assert found is not None
    return found.trace_id, found.span_id


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return (span.parent.trace_id, span.parent.span_id) if span.parent is not None else None


def says(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def error_of(span: ReadableSpan) -> Any:
    """Give the class of the error that it failed with, ``None`` where it did not."""
    found = says(span).get("error.type")
    assert (span.status.status_code is StatusCode.ERROR) == (found is not None)
    return found


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spans]:
    found = Spans()
    # The API takes a provider once a process.
    monkeypatch.setattr(trace, "get_tracer", found.provider.get_tracer)
    monkeypatch.delenv(tracing.CONTENT_VARIABLE, raising=False)
    yield found
    found.provider.shutdown()


def seen() -> dict[str, Any]:
    span: Any = trace.get_current_span()
    return {"name": span.name, "thread": threading.get_ident()} if span.is_recording() else {}


@tool
def lookup(query: str) -> str:
    """Look something up."""
    return f"the output of {query}"


@tool(approval=True)
def pay(query: str) -> str:
    """Pay."""
    return query


@tool
def breaks(query: str) -> str:
    """Break."""
    raise LookupError("the fault")


@tool(timeout=0.2)
def late(query: str) -> str:
    """Take too long."""
    time.sleep(1)
    return query


GATE = threading.Event()


@tool
def waits(query: str) -> str:
    """Wait for the test."""
    GATE.wait(20)
    return query


TOOLS = (lookup, pay, breaks, late, waits, page_tool("pick", "Pick.", {"type": "object", "properties": {}}))


def clerk(dialect: str = "responses", **more: Any) -> Assistant:
    options = {"model": "m", "name": "The clerk", "instructions": "the instructions", "tools": TOOLS, **more}
    return Assistant("clerk", upstream=dialect, **options)


def call(*names: str, said: str = "") -> Reply:
    return Reply(said, calls=[ToolCall(name, {"query": "the argument"}) for name in names], usage=(10, 2))


def approve(caller: Caller, run_id: str) -> None:
    wait_until(lambda: caller.entry(run_id)["run"]["status"] == "requires_action")
    waiting = caller.entry(run_id)["run"]["required_action"]["submit_tool_outputs"]["tool_calls"]
    body = {"approvals": [{"tool_call_id": one["id"], "approve": True} for one in waiting]}
    assert caller.client.post(f"{caller.url}/runs/{run_id}/approvals", json=body).status_code == 200


# Which there are, and what they say


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_run_is_a_span_below_the_requests_with_its_chats_and_tools_below_it(
    make_app: MakeApp, server: OfflineServer, spans: Spans, dialect: str
) -> None:
    server.replies = [call("lookup", "breaks"), Reply("the answer", usage=(20, 3))]
    caller = Caller(make_app([clerk(dialect, temperature=0.5)]))
    with spans.tracer.start_as_current_span("POST"):
        (run_id,) = caller.run("clerk", content="the question")
    caller.wait()
    spans.settle()
    agent, (first, second) = spans.one("invoke_agent"), spans.of("chat")
    assert parent_of(agent) == id_of(spans.one("POST"))
    assert {parent_of(one) for one in [first, second, *spans.of("execute_tool")]} == {id_of(agent)}
    assert Counter(span.name for span in spans.all()) == {
        "POST": 1,
        "invoke_agent The clerk": 1,
        "chat m": 2,
        "execute_tool lookup": 1,
        "execute_tool breaks": 1,
    }
    # An Assistants run that waits for outputs has no usage yet.
    used = [20, 3] if dialect == "assistants" else [30, 5]
    common = {"assistream.run.id": run_id, "gen_ai.provider.name": "openai", "gen_ai.request.model": "m"}
    common |= {"gen_ai.conversation.id": caller.thread_id}
    assert agent.kind is SpanKind.INTERNAL
    assert says(agent) == {
        **common,
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.id": "clerk",
        "gen_ai.agent.name": "The clerk",
        "gen_ai.usage.input_tokens": used[0],
        "gen_ai.usage.output_tokens": used[1],
        "assistream.run.begun": "asked",
        "assistream.run.status": "completed",
    }
    assert first.kind is SpanKind.CLIENT
    said = says(first)
    assert said.pop("gen_ai.response.id")
    assert said.pop("gen_ai.response.model") == "m"
    assert said.pop("openai.api.type", None) == {"chat": "chat_completions", "responses": "responses"}.get(dialect)
    assert said == {
        **common,
        "gen_ai.operation.name": "chat",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ("tool_calls",),
        **({} if dialect == "assistants" else {"gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 2}),
        "server.address": "127.0.0.1",
        "server.port": int(server.base_url.split(":")[2].split("/")[0]),
    }
    assert says(second)["gen_ai.response.finish_reasons"] == ("stop",)
    executed = spans.one("execute_tool lookup")
    assert executed.kind is SpanKind.INTERNAL
    assert says(executed) == {
        "assistream.run.id": run_id,
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": "lookup",
        "gen_ai.tool.description": "Look something up.",
        "gen_ai.tool.type": "function",
        "gen_ai.tool.call.id": caller.entry(run_id)["steps"][0]["step_details"]["tool_calls"][0]["id"],
    }
    assert error_of(spans.one("execute_tool breaks")) == "LookupError"
    assert [error_of(one) for one in (agent, first, second, executed)] == [None] * 4
    # What was said is nobody's affair unless it is asked for.
    everything = "".join(span.to_json() for span in spans.all())
    assert [one for one in SECRETS if one in everything] == []


@pytest.mark.parametrize("word", ["NO_CONTENT", "EVENT_ONLY", "false", ""])
def test_other_words_of_the_variable_give_no_content(
    make_app: MakeApp, server: OfflineServer, spans: Spans, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv(tracing.CONTENT_VARIABLE, word)
    server.replies = [call("lookup"), "the answer"]
    caller = Caller(make_app([clerk()]))
    caller.run("clerk", content="the question")
    caller.wait()
    spans.settle()
    everything = "".join(span.to_json() for span in spans.all())
    assert [one for one in SECRETS if one in everything] == []


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("word", ["SPAN_ONLY", "span_and_event", "true"])
def test_content_is_there_where_the_conventions_variable_asks_for_it(
    make_app: MakeApp, server: OfflineServer, spans: Spans, monkeypatch: pytest.MonkeyPatch, word: str, dialect: str
) -> None:
    monkeypatch.setenv(tracing.CONTENT_VARIABLE, word)
    server.replies = [call("lookup", said="the thought"), "the answer"]
    caller = Caller(make_app([clerk(dialect)]))
    (run_id,) = caller.run("clerk", content="the question")
    caller.wait()
    spans.settle()
    executed = says(spans.one("execute_tool"))
    assert json.loads(executed["gen_ai.tool.call.arguments"]) == {"query": "the argument"}
    assert executed["gen_ai.tool.call.result"] == "the output of the argument"
    first, second = (
        {key: json.loads(value) for key, value in says(one).items() if key.endswith(("messages", "ions"))}
        for one in spans.of("chat")
    )
    assert first["gen_ai.system_instructions"] == [{"type": "text", "content": "the instructions"}]
    assert first["gen_ai.tool.definitions"][0]["name"] == "lookup"
    asked = {"role": "user", "parts": [{"type": "text", "content": "the question"}]}
    assert first["gen_ai.input.messages"] == [asked]
    call_id = caller.entry(run_id)["steps"][0]["step_details"]["tool_calls"][0]["id"]
    called = {"type": "tool_call", "id": call_id, "name": "lookup", "arguments": {"query": "the argument"}}
    [output] = first["gen_ai.output.messages"]
    assert (output["role"], output["finish_reason"]) == ("assistant", "tool_call")
    thought = {"type": "text", "content": "the thought"}
    assert [{**part, "id": call_id} if "id" in part else part for part in output["parts"]] == [thought, called]
    assert second["gen_ai.input.messages"] == [
        asked,
        {"role": "assistant", "parts": [thought]},
        {"role": "assistant", "parts": [called]},
        {
            "role": "tool",
            "parts": [{"type": "tool_call_response", "id": call_id, "response": "the output of the argument"}],
        },
    ]
    answer = {"role": "assistant", "parts": [{"type": "text", "content": "the answer"}], "finish_reason": "stop"}
    assert second["gen_ai.output.messages"] == [answer]


def test_what_a_client_or_its_transport_traces_is_below_the_chat(
    make_app: MakeApp, server: OfflineServer, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    with quick_client(server) as client:
        # As instrumentations do it that wrap classes.
        kind: Any = type(client._client)
        send = kind.send

        def traced(self: Any, *arguments: Any, **options: Any) -> Any:
            with spans.tracer.start_as_current_span("HTTP POST"):
                return send(self, *arguments, **options)

        monkeypatch.setattr(kind, "send", traced)
        server.replies = [call("lookup"), "the answer"]
        caller = Caller(make_app([clerk()], client=client))
        caller.run("clerk")
        caller.wait()
    spans.settle()
    assert [parent_of(one) for one in spans.of("HTTP")] == [id_of(one) for one in spans.of("chat")]
    assert len(spans.of("HTTP")) == 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_span_of_the_client_itself_is_below_the_chat_too(
    server: OfflineServer, spans: Spans, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dialect: str
) -> None:
    with quick_client(server, max_retries=0) as client:
        part: Any = {
            "responses": client.responses,
            "chat": client.chat.completions,
            "assistants": client.beta.threads,
        }[dialect]
        name = "create_and_run" if dialect == "assistants" else "create"
        create = getattr(part, name)

        def traced(*arguments: Any, **options: Any) -> Any:
            with spans.tracer.start_as_current_span("client"):
                return create(*arguments, **options)

        monkeypatch.setattr(part, name, traced)
        app = Flask("traced")
        app.config["ASSISTREAM_DATABASE_URL"] = f"sqlite:///{tmp_path / 'a.sqlite3'}"
        blueprint = create_blueprint(
            [clerk(dialect, model=None if dialect == "assistants" else "m")],
            owner=lambda: "me",
            client=client,
            read="sdk",
        )
        app.register_blueprint(blueprint, url_prefix="/assistream")
        caller = Caller(app)
        caller.run("clerk")
        assert caller.wait()[-1]["run"]["status"] == "completed"
        app.extensions["assistream"].close()
    spans.settle()
    chat = spans.one("chat")
    # An assistant of the server has a model of its own.
    assert chat.name == ("chat" if dialect == "assistants" else "chat m")
    assert says(chat)["gen_ai.response.id"]
    assert [parent_of(one) for one in spans.of("client")] == [id_of(chat)]


def test_what_a_tool_traces_is_below_its_execution_wherever_it_is_executed(
    make_app: MakeApp, server: OfflineServer, spans: Spans
) -> None:
    def note(name: str) -> str:
        with spans.tracer.start_as_current_span(f"in {name}"):
            time.sleep(0.01)
        return "x"

    @tool
    def plain() -> str:
        """Plainly."""
        return note("plain")

    @tool(thread=True)
    def apart() -> str:
        """In a thread."""
        return note("apart")

    @tool
    async def waiting() -> str:
        """In a coroutine."""
        return note("waiting")

    names = ("plain", "apart", "waiting")
    calls = [ToolCall(name, {}) for name in names]
    server.replies = [Reply(calls=[*calls, *calls]), Reply(calls=calls), "Done."]
    caller = Caller(make_app([clerk(tools=[plain, apart, waiting])]))
    caller.run("clerk")
    caller.wait()
    spans.settle()
    for name in names:
        inner, outer = spans.of(f"in {name}"), spans.of(f"execute_tool {name}")
        assert len(inner) == len(outer) == 3
        assert {parent_of(one) for one in inner} == {id_of(one) for one in outer}
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_what_the_app_is_asked_for_a_run_is_below_it(make_app: MakeApp, server: OfflineServer, spans: Spans) -> None:
    asked: list[Any] = []

    def allows(arguments: Any, context: Any) -> bool:
        asked.append(seen().get("name"))
        return False

    def shorten(messages: list[dict[str, Any]]) -> Sequence[Mapping[str, Any]]:
        asked.append(seen().get("name"))
        return messages

    @tool(approval=allows)
    def careful() -> str:
        """Carefully."""
        return "x"

    server.replies = [Reply(calls=[ToolCall("careful", {})]), "Done."]
    caller = Caller(make_app([clerk(tools=[careful], max_history=shorten)]))
    caller.run("clerk")
    caller.wait()
    assert asked == ["invoke_agent The clerk"] * 2


def test_what_is_stored_of_a_call_is_below_its_run(
    make_app: MakeApp, server: OfflineServer, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    for name in ("claim", "finish"):
        work = getattr(ToolCallStore, name)

        def traced(*given: Any, work: Any = work, **options: Any) -> Any:
            asked.append(seen().get("name"))
            return work(*given, **options)

        monkeypatch.setattr(ToolCallStore, name, traced)
    server.replies = [call("lookup", "breaks"), "Done."]
    caller = Caller(make_app([clerk()]))
    caller.run("clerk")
    caller.wait()
    assert asked == ["invoke_agent The clerk"] * 4


# How they end


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("500", "upstream_error"),
        ("cut", "upstream_cut"),
        ("401", "upstream_unauthorized"),
        ("stall", "upstream_stalled"),
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_run_that_fails_says_so_with_the_code_that_clients_get(
    make_app: MakeApp, server: OfflineServer, spans: Spans, fault: str, code: str, dialect: str
) -> None:
    server.replies = Reply("the answer", fault=fault)
    caller = Caller(make_app([clerk(dialect)], stall_seconds=0.3 if fault == "stall" else 30))
    caller.run("clerk")
    caller.wait()
    spans.settle()
    assert [error_of(spans.one(name)) for name in ("invoke_agent", "chat")] == [code, code]
    assert says(spans.one("invoke_agent"))["assistream.run.status"] == "failed"


def test_an_answer_that_is_cut_for_its_length_is_no_error(
    make_app: MakeApp, server: OfflineServer, spans: Spans
) -> None:
    server.replies = Reply("the answer", fault="incomplete")
    caller = Caller(make_app([clerk()]))
    caller.run("clerk")
    caller.wait()
    spans.settle()
    assert says(spans.one("chat"))["gen_ai.response.finish_reasons"] == ("length",)
    assert [error_of(span) for span in spans.all()] == [None, None]
    assert says(spans.one("invoke_agent"))["assistream.run.status"] == "incomplete"


def test_calls_that_are_not_executed_have_no_span_and_others_say_why_they_failed(
    make_app: MakeApp, server: OfflineServer, spans: Spans
) -> None:
    server.replies = [Reply(calls=[ToolCall("nobodys"), ToolCall("late", {"query": "x"})]), "Done."]
    caller = Caller(make_app([clerk()]))
    caller.run("clerk")
    caller.wait()
    spans.settle()
    assert [(span.name, error_of(span)) for span in spans.of("execute_tool")] == [("execute_tool late", "timeout")]


@pytest.mark.parametrize("where", ["chat", "tool"])
def test_a_run_that_is_cancelled_ends_its_spans_and_did_not_fail(
    make_app: MakeApp, server: OfflineServer, spans: Spans, where: str
) -> None:
    GATE.clear()
    server.replies = call("waits") if where == "tool" else Reply("one two three", fault="stall")
    caller = Caller(make_app([clerk()]))
    (run_id,) = caller.run("clerk")
    if where == "tool":
        wait_until(lambda: spans.has_begun("execute_tool waits"))
    else:
        wait_until(lambda: text(caller.entry(run_id)))
    caller.cancel(run_id)
    caller.wait()
    spans.settle()
    GATE.set()
    agent = spans.one("invoke_agent")
    assert (says(agent)["assistream.run.status"], error_of(agent)) == ("cancelled", None)
    assert [error_of(one) for one in spans.of("chat")] == [None]
    assert [error_of(one) for one in spans.of("execute_tool")] == (["interrupted"] if where == "tool" else [])


def test_a_run_whose_time_is_over_says_so(make_app: MakeApp, server: OfflineServer, spans: Spans) -> None:
    server.replies = Reply("one two three", fault="stall")
    caller = Caller(make_app([clerk()], run_seconds=1))
    caller.run("clerk")
    caller.wait()
    spans.settle()
    assert [error_of(spans.one(name)) for name in ("invoke_agent", "chat")] == ["run_time_limit"] * 2


def test_a_run_that_waits_for_a_person_has_a_span_before_and_one_behind_which_are_linked(
    make_app: MakeApp, server: OfflineServer, spans: Spans
) -> None:
    server.replies = [call("pay"), Reply("Paid.", usage=(20, 3))]
    caller = Caller(make_app([clerk()]))
    with spans.tracer.start_as_current_span("POST runs"):
        (run_id,) = caller.run("clerk")
    wait_until(lambda: len(spans.of("invoke_agent")) == 1)
    assert spans.are_ended()
    with spans.tracer.start_as_current_span("POST approvals"):
        approve(caller, run_id)
    caller.wait()
    spans.settle()
    first, second = spans.of("invoke_agent")
    assert [parent_of(first), parent_of(second)] == [id_of(spans.one("POST runs")), id_of(spans.one("POST approvals"))]
    assert [says(one)["assistream.run.status"] for one in (first, second)] == ["requires_action", "completed"]
    assert [says(one)["assistream.run.begun"] for one in (first, second)] == ["asked", "answered"]
    # Of each what it asked for itself.
    assert [says(one)["gen_ai.usage.input_tokens"] for one in (first, second)] == [10, 20]
    assert [(link.context.trace_id, link.context.span_id) for link in second.links] == [id_of(first)]
    assert list(first.links) == []
    assert parent_of(spans.one("execute_tool pay")) == id_of(second)
    assert [parent_of(one) for one in spans.of("chat")] == [id_of(first), id_of(second)]


def test_a_run_that_another_worker_goes_on_with_has_a_span_in_each(
    make_app: MakeApp, server: OfflineServer, spans: Spans
) -> None:
    server.replies = Reply("a long answer of quite some words " * 5, delay=0.05)
    lasting = [clerk(tools=(), background=True)]
    app, other = make_app(lasting, owner=lambda: "me"), make_app(lasting, owner=lambda: "me")
    caller = Caller(app)
    # Its worker looks for what others leave from now on.
    Caller(other)
    with spans.tracer.start_as_current_span("POST"):
        (run_id,) = caller.run("clerk")
    wait_until(lambda: text(caller.entry(run_id)))
    app.extensions["assistream"].close()
    after = Caller(other, caller.thread_id)
    after.wait(30)
    spans.settle()
    first, second = spans.of("invoke_agent")
    assert parent_of(first) == id_of(spans.one("POST"))
    assert (says(first)["assistream.run.status"], error_of(first)) == ("in_progress", None)
    assert parent_of(second) is None
    assert (says(second)["assistream.run.begun"], says(second)["assistream.run.status"]) == ("taken_over", "completed")
    # The other one of its chats was asked for again.
    assert [error_of(one) for one in spans.of("chat")] == [None, None]
    assert says(spans.of("chat")[1])["gen_ai.response.id"]


def test_a_tool_loop_that_another_worker_goes_on_with_links_to_where_it_was(
    make_app: MakeApp, server: OfflineServer, spans: Spans
) -> None:
    GATE.clear()
    server.replies = [call("waits"), "Done."]
    app, other = (make_app([clerk()], owner=lambda: "me", drain_seconds=0) for _ in range(2))
    caller = Caller(app)
    # Its worker looks for what others leave from now on.
    Caller(other)
    (run_id,) = caller.run("clerk")
    wait_until(lambda: spans.has_begun("execute_tool waits"))
    app.extensions["assistream"].close()
    after = Caller(other, caller.thread_id)
    after.wait(30)
    GATE.set()
    spans.settle()
    first, second = spans.of("invoke_agent")
    assert [(link.context.trace_id, link.context.span_id) for link in second.links] == [id_of(first)]
    assert (parent_of(second), says(second)["assistream.run.begun"]) == (None, "taken_over")
    assert says(second)["assistream.run.id"] == run_id


def test_a_part_links_to_the_last_one_that_got_further(make_app: MakeApp, server: OfflineServer, spans: Spans) -> None:
    server.replies = [call("pay"), Reply("x", fault="stall_headers"), "Done."]
    app, other = (make_app([clerk()], owner=lambda: "me", drain_seconds=0) for _ in range(2))
    caller = Caller(app)
    Caller(other)
    (run_id,) = caller.run("clerk")
    approve(caller, run_id)
    wait_until(lambda: len(server.requests) == 2)
    app.extensions["assistream"].close()
    Caller(other, caller.thread_id).wait(30)
    spans.settle()
    first, second, third = spans.of("invoke_agent")
    links = [[(link.context.trace_id, link.context.span_id) for link in one.links] for one in (first, second, third)]
    assert links == [[], [id_of(first)], [id_of(second)]]
    assert parent_of(spans.one("execute_tool")) == id_of(second)


def test_a_request_whose_thread_nothing_can_stop_fails_as_its_run_does(spans: Spans) -> None:
    run = tracing.Tracing().run("asked")
    run.begin("thread_1", "run_1", clerk(), "")
    with run.chat(clerk(), []):
        run.end("failed", "run_time_limit")
        assert error_of(spans.one("chat")) == "run_time_limit"
    assert len(spans.of("chat")) == 1


def test_what_a_server_calls_an_answer_is_no_longer_than_a_name() -> None:
    assert source({"id": "a" * 1_000, "model": "\ud800"}) == Source("a" * 255, "\ufffd")


def test_what_is_taken_over_belongs_to_nothing_that_its_worker_was_doing(spans: Spans) -> None:
    found = tracing.Tracing()
    with spans.tracer.start_as_current_span("something else"):
        for begun in BEGUN:
            run = found.run(begun)
            run.begin("thread_1", "run_1", clerk(name=begun), "")
            run.end("completed", None)
    assert parent_of(spans.one("invoke_agent taken_over")) is None
    assert parent_of(spans.one("invoke_agent asked")) == id_of(spans.one("something else"))
    assert parent_of(spans.one("invoke_agent answered")) == id_of(spans.one("something else"))


def test_a_name_that_is_none_is_no_link(spans: Spans) -> None:
    run = tracing.Tracing().run("answered")
    run.begin("thread_1", "run_1", clerk(), "01-what a later release stores")
    run.end("completed", None)
    assert list(spans.one("invoke_agent").links) == []


def cut(caller: Caller, chance: random.Random, run_id: str) -> None:
    """Do something to a run that ends it, or has it go on, at any time."""
    time.sleep(chance.random() * 0.06)
    match chance.choice(["cancel", "message", "delete", "approve", "nothing"]):
        case "cancel":
            caller.cancel(run_id)
        case "message":
            caller.client.post(f"{caller.url}/messages", json={"content": "Never mind."})
        case "delete":
            caller.client.delete(caller.url)
        case "approve":
            # It may wait for something else, or not at all.
            if action := caller.entry(run_id)["run"]["required_action"]:
                calls = action["submit_tool_outputs"]["tool_calls"]
                body = {"approvals": [{"tool_call_id": one["id"], "approve": True} for one in calls]}
                caller.client.post(f"{caller.url}/runs/{run_id}/approvals", json=body)


def test_whatever_befalls_runs_each_span_that_was_begun_is_ended_once(
    make_app: MakeApp, server: OfflineServer, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(20261130)
    GATE.clear()
    replies = [
        *(call(name) for name in ("lookup", "breaks", "pay", "waits", "pick", "late")),
        *(Reply("one two three", fault=fault) for fault in ("cut", "stall", "500", "malformed", None)),
    ]
    server.replies = lambda request: chance.choice(replies)
    tried = examples(80)
    while tried > 0:
        app = make_app([clerk(chance.choice(DIALECTS))])
        for _ in range(min(10, tried)):
            tried -= 1
            caller = Caller(app)
            (run_id,) = caller.run("clerk")
            cut(caller, chance, run_id)
        # With whatever is under way.
        app.extensions["assistream"].close()
    GATE.set()
    spans.settle()
    assert set(Counter(id(span) for span in spans.begun).values()) == {1}
    ended = Counter(id_of(span) for span in spans.all())
    assert set(ended.values()) == {1}
    kinds = Counter(span.name.split()[0] for span in spans.all())
    assert set(kinds) == {"invoke_agent", "chat", "execute_tool"}
    # What is below another is of the same trace, and of the same run.
    known = {id_of(span): span for span in spans.all()}
    for span in spans.all():
        above = parent_of(span)
        if above is not None:
            assert says(known[above])["assistream.run.id"] == says(span)["assistream.run.id"]
    assert not [record for record in caplog.records if record.name.startswith("opentelemetry")]


# What it costs, and whom it harms


class Broken:
    """A tracer, or a span, that raises whatever it is asked for, or only one thing."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner, self._name = inner, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise ConnectionError(f"{name} is broken")
        found = getattr(self._inner, name)
        if name != "start_span":
            return found
        return lambda *arguments, **options: Broken(found(*arguments, **options), self._name)


@pytest.mark.parametrize(
    "name",
    ["start_span", "is_recording", "set_attributes", "set_attribute", "set_status", "end"],
)
def test_a_tracer_that_raises_breaks_no_run(
    make_app: MakeApp,
    server: OfflineServer,
    spans: Spans,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    monkeypatch.setattr(trace, "get_tracer", lambda *_: Broken(spans.tracer, name))
    monkeypatch.setenv(tracing.CONTENT_VARIABLE, "SPAN_ONLY")
    server.replies = [call("lookup", "breaks", "pay"), "the answer"]
    caller = Caller(make_app([clerk()]))
    (run_id,) = caller.run("clerk")
    approve(caller, run_id)
    assert caller.wait()[-1]["run"]["status"] == "completed"
    assert text(caller.entry(run_id)) == "the answer"
    told = [record for record in caplog.records if record.levelno >= logging.ERROR and "a span" in record.getMessage()]
    assert told
    if name != "end":
        assert spans.are_ended()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((otel_context, name) for name in ("attach", "detach", "get_current")),
        *((trace, name) for name in ("get_current_span", "set_span_in_context")),
    ],
)
def test_a_context_that_raises_breaks_no_run(
    make_app: MakeApp, server: OfflineServer, spans: Spans, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    server.replies = [call("lookup"), "the answer"]
    caller = Caller(make_app([clerk()]))
    monkeypatch.setattr(module, name, broken)
    caller.run("clerk")
    assert caller.wait()[-1]["run"]["status"] == "completed"
    monkeypatch.undo()
    spans.settle()


def test_a_tracer_that_cannot_be_had_breaks_no_worker(
    make_app: MakeApp, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(trace, "get_tracer", broken)
    caller = Caller(make_app())
    caller.run("tutor")
    assert caller.wait()[-1]["run"]["status"] == "completed"
    assert spans.begun == []


class Counted:
    """Counts what a tracer and its spans are asked for."""

    def __init__(self, inner: Any, counts: Counter[str]) -> None:
        self._inner, self._counts = inner, counts

    def __getattr__(self, name: str) -> Any:
        self._counts[name] += 1
        found = getattr(self._inner, name)
        if name != "start_span":
            return found
        return lambda *arguments, **options: Counted(found(*arguments, **options), self._counts)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_delta_costs_nothing(
    make_app: MakeApp, server: OfflineServer, spans: Spans, monkeypatch: pytest.MonkeyPatch, dialect: str
) -> None:
    counts: Counter[str] = Counter()
    monkeypatch.setattr(trace, "get_tracer", lambda *_: Counted(spans.tracer, counts))
    attach = otel_context.attach

    def attached(context: Any) -> Any:
        counts["attach"] += 1
        return attach(context)

    monkeypatch.setattr(otel_context, "attach", attached)
    caller = Caller(make_app([clerk(dialect)]))
    found = []
    for words in (3, 600):
        counts.clear()
        server.replies = Reply("word " * words, delay=0.0002)
        caller.run("clerk")
        caller.wait()
        spans.settle()
        found.append(dict(counts))
    assert found[0] == found[1]
    assert found[0]["start_span"] == 2


def test_runs_side_by_side_do_not_mix(make_app: MakeApp, server: OfflineServer, spans: Spans) -> None:
    @tool
    def inside(number: int) -> str:
        """Trace something."""
        with spans.tracer.start_as_current_span(f"inside {number}."):
            time.sleep(0.01)
        return f"{number}"

    def reply(request: Any) -> Any:
        last = request.messages[-1]
        return Reply(calls=[ToolCall("inside", {"number": int(last[1])})]) if last[0] == "user" else "Done."

    server.replies = reply
    app = make_app([clerk(tools=[inside])])
    callers = [Caller(app) for _ in range(20)]
    for number, caller in enumerate(callers):
        with spans.tracer.start_as_current_span(f"POST {number}"):
            caller.run("clerk", content=f"{number}")
    for caller in callers:
        caller.wait(30)
    spans.settle()
    known = {id_of(span): span for span in spans.all()}
    for number, caller in enumerate(callers):
        executed = known[parent_of(spans.one(f"inside {number}.")) or (0, 0)]
        agent = known[parent_of(executed) or (0, 0)]
        assert executed.name == "execute_tool inside"
        assert says(agent)["gen_ai.conversation.id"] == caller.thread_id
        assert parent_of(agent) == id_of(next(one for one in spans.all() if one.name == f"POST {number}"))


# Where it is off, or not there


def test_a_setting_switches_it_off(make_app: MakeApp, spans: Spans) -> None:
    caller = Caller(make_app(tracing="off"))
    caller.run("tutor")
    assert caller.wait()[-1]["run"]["status"] == "completed"
    assert spans.begun == []


def test_another_word_is_refused_with_those_that_there_are(make_app: MakeApp) -> None:
    with pytest.raises(ConfigurationError, match="ASSISTREAM_TRACING is 'yes': give on or off"):
        make_app(tracing="yes")


GUIDE = (Path(__file__).resolve().parents[2] / "docs/guides/tracing.md").read_text()


def test_the_guide_has_an_app_write_its_spans_and_names_every_attribute(tmp_path: Path) -> None:
    (setup,) = re.findall(r"^```python\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)
    script = ALONE.replace("from assistream_flask import", f"{setup}\nfrom assistream_flask import", 1)
    command = [sys.executable, "-W", "error", "-c", script, f"sqlite:///{tmp_path / 'a.sqlite3'}", "there"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert '"name": "invoke_agent a"' in done.stdout
    named = {
        value for name, value in vars(tracing).items() if isinstance(value, str) and re.fullmatch("_[A-Z_]+", name)
    }
    asked = {name.removeprefix("gen_ai.request") for name, _ in tracing._ASKED.values()}
    for name in {one for one in named if "." in one} | asked:
        assert f"{name}`" in GUIDE, name


ALONE = """
import sys
import time
from flask import Flask
from assistream_flask.testing import OfflineServer
way = sys.argv[2]
if way == "missing":
    sys.modules["opentelemetry"] = None
from assistream_flask import Assistant, create_blueprint, current_assistream
with OfflineServer(delay=0) as server:
    app = Flask("alone")
    app.config.update(ASSISTREAM_DATABASE_URL=sys.argv[1], ASSISTREAM_TRACING="off" if way == "off" else "on")
    app.register_blueprint(create_blueprint([Assistant("a", model="m")], owner=lambda: "me", client=server.client()))
    found = lambda: sorted(name for name, module in sys.modules.items() if "opentelemetry" in name and module)
    print(found() == [])
    with app.app_context():
        thread = current_assistream.create_thread(owner="me")
        [run] = current_assistream.run(thread["id"], ["a"], content="Hi", owner="me").wait(30)
    print(run["status"], found() == [])
    # A run is stored as completed a moment before its thread lets go of it; closing would log that it waits.
    while app.extensions["assistream"].runtime().runner.active.all():
        time.sleep(0.01)
    app.extensions["assistream"].close()
"""


@pytest.mark.parametrize(("way", "nothing"), [("missing", True), ("off", True), ("there", False)])
def test_nothing_of_it_is_imported_before_a_worker_is_made_nor_where_it_is_off_or_missing(
    tmp_path: Path, way: str, nothing: bool
) -> None:
    command = [sys.executable, "-W", "error", "-c", ALONE, f"sqlite:///{tmp_path / 'a.sqlite3'}", way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == (f"True\ncompleted {nothing}\n", "")


@pytest.mark.slow
def test_all_of_this_holds_under_gevent() -> None:
    passes_under_gevent(__file__, "not under_gevent and not imported and not guide")
